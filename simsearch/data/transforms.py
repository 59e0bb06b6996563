"""Augmentation of whole batches, on the device of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simsearch.functional.ragged import Ragged, ragged, stacks


def crop_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crops of the zero-padded images at their own size, some of them mirrored: (B, C, H, W) of the same dtype.

    Args:
        images: (B, C, H, W).
        offsets: int64 (B, 2), top and left of each crop in the padded image, in 0..2 * padding.
        flips: bool (B,), whether to mirror left and right after cropping.
        padding: Pixels added on every side.
    """
    height, width = images.shape[-2:]
    across = torch.arange(width, device=images.device)
    y = offsets[:, :1] - padding + torch.arange(height, device=images.device)
    x = offsets[:, 1:] - padding + torch.where(flips[:, None], width - 1 - across, across)
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[:, None, None, :]
    pixel = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
    pixel = pixel.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, pixel).view(images.shape) * inside


class RandomCropFlip(nn.Module):
    """Random crops of the zero-padded images and random mirroring, drawn for each image from the global seed.

    Args:
        padding: Pixels added on every side, 0 for no crop.
        flip: Whether half of the images are mirrored.

    Raises:
        ValueError: If `padding` is negative.

    Source:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016, section 4.2, with padding 4 on
        CIFAR-10.
    """

    def __init__(self, padding: int, flip: bool) -> None:
        super().__init__()
        if padding < 0:
            raise ValueError(f"padding={padding} is negative: use 0 or more pixels")
        self.padding = padding
        self.flip = flip

    def forward(self, images: Tensor | Ragged) -> Tensor | Ragged:
        """Augmented images, of the same type, shapes and dtype.

        Args:
            images: (B, C, H, W), or Ragged.
        """
        device = images.pixels.device if isinstance(images, Ragged) else images.device
        offsets = torch.randint(0, 2 * self.padding + 1, (len(images), 2), device=device)
        flips = torch.rand(len(images), device=device) < (0.5 if self.flip else 0.0)
        if isinstance(images, Tensor):
            return crop_flip(images, offsets, flips, self.padding)
        augmented: list[Tensor] = [offsets] * len(images)
        for places, stack in stacks(images):
            new = crop_flip(stack, offsets[places.to(device)], flips[places.to(device)], self.padding)
            for place, image in zip(places.tolist(), new, strict=True):
                augmented[place] = image
        return ragged(augmented)
