"""Batched crop and flip against one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from simsearch.data.transforms import AlternatingCropFlip, RandomCropFlip, crop_flip, starts_flipped
from simsearch.functional.ragged import ragged


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


@given(side=st.integers(2, 9), padding=st.integers(0, 8), batch=st.integers(1, 4), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_reflected_borders_equal_numpys(side, padding, batch, seed):
    padding = min(padding, side - 1)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, side, side + 1), generator=generator).to(torch.uint8)
    offsets = torch.randint(0, 2 * padding + 1, (batch, 2), generator=generator)
    flips = torch.rand(batch, generator=generator) < 0.5
    result = crop_flip(images, offsets, flips, padding, reflect=True)
    for image, (top, left), flip, crop in zip(images.numpy(), offsets.tolist(), flips.tolist(), result, strict=True):
        wide = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        expected = wide[:, top : top + side, left : left + side + 1]
        assert np.array_equal(crop.numpy(), expected[..., ::-1] if flip else expected)


def test_every_image_is_mirrored_once_in_two_epochs_whatever_batch_it_is_in():
    images = torch.randint(0, 256, (400, 3, 6, 6), dtype=torch.uint8)
    rows = torch.randperm(60_000)[:400]
    augment = AlternatingCropFlip(padding=0, seed=3)
    mirrored = []
    for epoch in range(4):
        order = torch.randperm(400)
        batches = [augment(images[part], rows[part], epoch) for part in order.split(64)]
        seen = torch.empty_like(images)
        seen[order] = torch.cat(batches)
        mirrored.append((seen == images.flip(-1)).flatten(1).all(1))
        assert torch.equal(mirrored[-1], ~(seen == images).flatten(1).all(1))
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])
    assert torch.equal(mirrored[1], mirrored[3])


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_a_random_half_begins_mirrored(seed):
    chosen = starts_flipped(torch.arange(50_000), seed).numpy()
    assert abs(chosen.mean() - 0.5) < 4 * 0.5 / 50_000**0.5
    for lag in (1, 2, 10, 5000):  # a row says nothing about another
        assert abs((chosen[lag:] == chosen[:-lag]).mean() - 0.5) < 4.5 * 0.5 / (50_000 - lag) ** 0.5
    other = starts_flipped(torch.arange(50_000), seed + 1).numpy()
    assert abs((chosen == other).mean() - 0.5) < 4 * 0.5 / 50_000**0.5


def test_cutout_is_one_whole_square_in_each_image():
    images = torch.zeros(500, 3, 12, 12, dtype=torch.uint8)
    torch.manual_seed(0)
    augmented = AlternatingCropFlip(padding=2, cutout=5)(images, torch.arange(500), 0)
    corners = set()
    for image in augmented.numpy():
        y, x = np.nonzero((image == 128).all(0))
        assert (image == 128).sum() == 75
        assert (np.ptp(y), np.ptp(x)) == (4, 4)
        corners.add((int(y.min()), int(x.min())))
    assert len(corners) == 64  # every place where the whole square fits


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="cutout=-2"):
        AlternatingCropFlip(padding=0, cutout=-2)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"padding=4 must be below.*4 pixels"):
        AlternatingCropFlip(padding=4)(images, torch.arange(2), 0)
    with pytest.raises(ValueError, match="one shape"):
        AlternatingCropFlip(padding=1)(ragged([torch.zeros(3, 1, 2)]), torch.arange(1), 0)
