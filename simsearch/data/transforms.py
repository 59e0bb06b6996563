"""Augmentation of whole batches, on the device of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simsearch.functional.ragged import Ragged, ragged, stacks


def crop_flip(images: Tensor, offsets: Tensor, flips: Tensor, padding: int, reflect: bool = False) -> Tensor:
    """Crops of the padded images at their own size, some of them mirrored: (B, C, H, W) of the same dtype.

    Args:
        images: (B, C, H, W).
        offsets: int64 (B, 2), top and left of each crop in the padded image, in 0..2 * padding.
        flips: bool (B,), whether to mirror left and right after cropping.
        padding: Pixels added on every side.
        reflect: Whether these repeat the image as a mirror does, without its outermost row, instead of being zeros. The
            padding is then below H and W.
    """
    height, width = images.shape[-2:]
    across = torch.arange(width, device=images.device)
    y = offsets[:, :1] - padding + torch.arange(height, device=images.device)
    x = offsets[:, 1:] - padding + torch.where(flips[:, None], width - 1 - across, across)
    if reflect:
        y, x = (last - (last - place.abs()).abs() for last, place in ((height - 1, y), (width - 1, x)))
    pixel = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
    pixel = pixel.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    crops = images.flatten(2).gather(2, pixel).view(images.shape)
    if reflect:
        return crops
    return crops * (((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[:, None, None, :])


def cut_out(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """The images with a square of grey (128) in each, (B, C, H, W) of the same dtype.

    Args:
        images: (B, C, H, W), in 0..255.
        corners: int64 (B, 2), the square's top row and left column.
        side: Side of the square in pixels.
    """
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device) - corners[:, :1]
    x = torch.arange(width, device=images.device) - corners[:, 1:]
    inside = ((y >= 0) & (y < side))[:, None, :, None] & ((x >= 0) & (x < side))[:, None, None, :]
    return images.masked_fill(inside, 128)


def starts_flipped(rows: Tensor, seed: int) -> Tensor:
    """Whether each row is of the random half that is mirrored in even epochs, bool of the same shape.

    A hash of row and seed decides, so that it is the same in every process, after every resume, and for every subset.

    Args:
        rows: int64, rows of a collection.
        seed: Seed of the choice.

    Source:
        Wellons: Prospecting for Hash Functions, the constants of a hash of 32 bits with little bias.
    """

    def mixed(value: Tensor) -> Tensor:
        value = value & 0xFFFFFFFF
        value = ((value ^ (value >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        value = ((value ^ (value >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        return value ^ (value >> 15)

    return mixed(rows + mixed(torch.tensor(seed + 1, device=rows.device))) % 2 == 1


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


class RowAugmentation(nn.Module):
    """An augmentation that depends on which image it changes, and in which epoch, beside the pixels."""

    def forward(self, images: Tensor | Ragged, rows: Tensor, epoch: int) -> Tensor | Ragged:
        """Augmented images, of the same type, shapes and dtype.

        Args:
            images: (B, C, H, W), or Ragged.
            rows: int64 (B,), the images' rows in the collection.
            epoch: The number of the epoch, from 0.
        """
        raise NotImplementedError


class AlternatingCropFlip(RowAugmentation):
    """Crops of images with reflected borders, each image mirrored in every other epoch, perhaps a grey square in each.

    Half of the images, drawn by the seed, are mirrored in even epochs, the others in odd ones: in two epochs each image
    is seen once either way, which random mirroring grants to half of them only. Crops and squares are drawn for each
    image from the global seed.

    Args:
        padding: Pixels added on every side, 0 for no crop. Images are larger than that.
        cutout: Side of the grey square in pixels, 0 for none. Images are at least as large.
        seed: Seed of the choice of the images that are mirrored first.

    Raises:
        ValueError: If `padding` or `cutout` is negative.

    Source:
        Jordan: 94% on CIFAR-10 in 3.29 Seconds on a Single GPU. 2024, section 3.6; DeVries and Taylor: Improved
        Regularization of Convolutional Neural Networks with Cutout. 2017, here with whole squares.
    """

    def __init__(self, padding: int, cutout: int = 0, seed: int = 0) -> None:
        super().__init__()
        if padding < 0 or cutout < 0:
            raise ValueError(f"padding={padding}, cutout={cutout}: use 0 or more pixels")
        self.padding, self.cutout, self.seed = padding, cutout, seed

    def forward(self, images: Tensor | Ragged, rows: Tensor, epoch: int) -> Tensor:
        """Augmented images of the same shape and dtype.

        Args:
            images: (B, C, H, W), in 0..255 where there are squares.
            rows: int64 (B,), the images' rows in the collection.
            epoch: The number of the epoch, from 0.

        Raises:
            ValueError: If the images have several shapes, or are too small.
        """
        if isinstance(images, Ragged):
            raise ValueError("data.augment: this augmentation takes images of one shape: use data.fit=square")
        count, _, height, width = images.shape
        if self.padding >= min(height, width) or self.cutout > min(height, width):
            raise ValueError(
                f"data.augment: padding={self.padding} must be below, and cutout={self.cutout} at most, the side of "
                f"the images, {min(height, width)} pixels"
            )
        device = images.device
        offsets = torch.randint(0, 2 * self.padding + 1, (count, 2), device=device)
        flips = starts_flipped(rows.to(device), self.seed) ^ (epoch % 2 == 1)
        crops = crop_flip(images, offsets, flips, self.padding, reflect=True)
        if not self.cutout:
            return crops
        y = torch.randint(0, height - self.cutout + 1, (count,), device=device)
        x = torch.randint(0, width - self.cutout + 1, (count,), device=device)
        return cut_out(crops, torch.stack([y, x], dim=1), self.cutout)
