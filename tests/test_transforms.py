"""Batched crop and flip against one image at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from simsearch.data.transforms import RandomCropFlip, crop_flip


def naive(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    height, width = images.shape[-2:]
    crops = []
    for image, (top, left), flip in zip(images, offsets.tolist(), flips.tolist(), strict=True):
        padded = F.pad(image, [padding] * 4)
        crop = padded[:, top : top + height, left : left + width]
        crops.append(crop.flip(-1) if flip else crop)
    return torch.stack(crops)


@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 12),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_equals_padding_and_slicing_each_image(batch, height, width, padding, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator).to(dtype)
    offsets = torch.randint(0, 2 * padding + 1, (batch, 2), generator=generator)
    flips = torch.rand(batch, generator=generator) < 0.5
    result = crop_flip(images, offsets, flips, padding)
    assert result.dtype == dtype
    assert torch.equal(result, naive(images, offsets, flips, padding))


def test_reads_channels_last_and_sliced_images():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    offsets, flips = torch.tensor([[0, 4], [3, 1], [2, 2]]), torch.tensor([True, False, True])
    expected = naive(images[::2], offsets, flips, 2)
    assert torch.equal(crop_flip(images[::2], offsets, flips, 2), expected)
    channels_last = images[::2].to(memory_format=torch.channels_last)
    assert torch.equal(crop_flip(channels_last, offsets, flips, 2), expected)


def test_each_image_gets_its_own_offset_and_flip():
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(2000, 3, 8, 8)
    torch.manual_seed(0)
    augmented = RandomCropFlip(padding=2, flip=True)(images)
    # 5 x 5 offsets x 2 mirrors, all of which 2,000 draws surely meet.
    assert len({image.numpy().tobytes() for image in augmented}) == 50
    torch.manual_seed(0)
    assert torch.equal(augmented, RandomCropFlip(padding=2, flip=True)(images))


def test_switched_off_it_changes_nothing():
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(RandomCropFlip(padding=0, flip=False)(images), images)
    mirrored = RandomCropFlip(padding=0, flip=True)(images)
    same, flipped = (mirrored == images).flatten(1).all(1), (mirrored == images.flip(-1)).flatten(1).all(1)
    assert (same | flipped).all()


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match=r"padding=-1 is negative: use 0"):
        RandomCropFlip(padding=-1, flip=True)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    offsets, flips = torch.randint(0, 9, (16, 2)), torch.rand(16) < 0.5
    device = crop_flip(images.cuda(), offsets.cuda(), flips.cuda(), 4)
    assert torch.equal(device.cpu(), crop_flip(images, offsets, flips, 4))
    assert RandomCropFlip(4, True)(images.cuda()).is_cuda
