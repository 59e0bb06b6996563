"""Copies of pictures as people and cameras make them, drawn for whole batches on the device of the batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.functional.camera import blur, jpeg, perspective_grid
from simsearch.functional.ragged import Ragged

_TAPS = 9  # of the blur
_BLOCK = 16  # pictures at a time, so that they stay in the cache of a processor


class RandomCopies(nn.Module):
    """A random copy of each picture of a batch, drawn from the global seed.

    A copy shows a part of the picture or the picture before a wall or another picture of the batch, perhaps framed, in
    perspective, turned or mirrored. Something may cover a part of it, or another picture shine through. It has another
    light and other colours, blur, noise and the traces of JPEG.

    Args:
        strength: 0 to 1. At 0 a copy is nearly its picture; at 1 a part may be a quarter of its area, and a picture may
            fill a quarter of the copy.
        mirror: Share of the copies that are mirrored, 0 to 1.
        size: Side of the copies in pixels. None for that of the pictures.

    Raises:
        ValueError: If a number is out of range.

    Source:
        The augmentations follow Pizzi et al.: A Self-Supervised Descriptor for Image Copy Detection. CVPR 2022, section
        4.2, with frames, walls and light in place of emoji and text.
    """

    def __init__(self, strength: float = 1.0, mirror: float = 0.25, size: int | None = None) -> None:
        super().__init__()
        for name, value in (("strength", strength), ("mirror", mirror)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if size is not None and size < 8:
            raise ValueError(f"size must be at least 8 pixels, got {size}")
        self.strength, self.mirror, self.size = strength, mirror, size

    def forward(self, images: Tensor) -> Tensor:
        """Copies, uint8 (B, 3, size, size).

        Args:
            images: uint8 (B, 3, S, S).

        Raises:
            ValueError: If the images are not squares of one size.
        """
        if isinstance(images, Ragged) or images.shape[2] != images.shape[3]:
            raise ValueError("RandomCopies needs squares of one size: set data.fit=square")
        size = self.size or images.shape[3]
        others = images.roll(len(images) // 2, 0)  # views of one picture are neighbours in a batch
        blocks = zip(images.split(_BLOCK), others.split(_BLOCK), strict=True)
        return torch.cat([self._copies(block.float() / 255, other.float() / 255, size) for block, other in blocks])

    def _copies(self, pictures: Tensor, others: Tensor, size: int) -> Tensor:
        draw = _Draw(len(pictures), pictures.device)
        others = F.interpolate(others, (size, size), mode="bilinear", antialias=True)
        copies = self._framed(draw, pictures, others)
        copies = self._covered(draw, copies, others)
        copies = self._lit(draw, copies)
        sigma = 0.1 + 1.9 * self.strength * draw.uniform() ** 3
        taps = torch.arange(_TAPS, device=copies.device) - _TAPS // 2
        kernel = torch.exp(-0.5 * (taps[None] / sigma) ** 2)
        copies = blur(copies, (kernel / kernel.sum(1, keepdim=True))[:, :, None, None])
        noise = 0.06 * self.strength * draw.uniform() ** 2
        copies = (copies + noise[..., None, None] * torch.randn_like(copies)).clamp(0, 1)
        coarse = torch.where(draw.uniform() < 0.5, 100 - 88 * self.strength * draw.uniform(), 100)
        return (255 * jpeg(copies, coarse[:, 0])).round().to(torch.uint8)

    def _framed(self, draw: _Draw, pictures: Tensor, others: Tensor) -> Tensor:
        """Pictures seen by a camera: parts of them, or they with what is around them."""
        size, far = others.shape[-1], self.strength
        reach = torch.exp(draw.uniform(-math.log(2), math.log(2)) * far)  # half a side seen, 1 is the picture
        squash = torch.exp(0.25 * far * draw.uniform(-1, 1))
        turned = torch.where(draw.uniform() < 0.1, draw.uniform(-math.pi, math.pi), draw.uniform(-0.25, 0.25)) * far
        corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], device=pictures.device)
        corners = corners + 0.2 * far * draw.uniform(-1, 1, 8).view(-1, 4, 2)
        corners = corners * torch.cat([reach * squash, reach / squash], 1)[:, None]
        cos, sin = turned.cos(), turned.sin()
        corners = corners @ torch.cat([cos, sin, -sin, cos], 1).view(-1, 2, 2)
        corners = corners + ((1 - reach).abs() * draw.uniform(-1, 1, 2))[:, None]
        flip = torch.where(draw.uniform() < self.mirror, -1.0, 1.0)
        grid = perspective_grid(corners * torch.cat([flip, torch.ones_like(flip)], 1)[:, None], size)
        seen = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
        distance = grid.abs().amax(3)[:, None]  # from the picture's middle: at 1 it ends
        wall = draw.uniform(0, 1, 3)[..., None, None].expand_as(seen)
        wall = torch.where(draw.uniform()[..., None, None] < 0.3, others, wall)
        width = 0.25 * draw.uniform()[..., None, None] * (draw.uniform() < 0.6)[..., None, None]
        profile = (1.2 - 0.6 * (distance - 1) / width.clamp(min=1e-3)).clamp(0, 1.2)
        frame = draw.uniform(0, 1, 3)[..., None, None] * profile
        return torch.where(distance <= 1, seen, torch.where(distance <= 1 + width, frame, wall))

    def _covered(self, draw: _Draw, copies: Tensor, others: Tensor) -> Tensor:
        """Copies of which a rectangle is covered, or through which another picture shines."""
        size = copies.shape[-1]
        at = torch.linspace(-1, 1, size, device=copies.device)
        middle, half = draw.uniform(-1, 1, 2), draw.uniform(0.05, 0.5, 2) * self.strength
        inside = ((at[None] - middle[:, :1]).abs() < half[:, :1])[:, None, :, None]
        inside = inside & ((at[None] - middle[:, 1:]).abs() < half[:, 1:])[:, None, None, :]
        inside = inside & (draw.uniform() < 0.3)[..., None, None]
        cover = torch.where(
            draw.uniform()[..., None, None] < 0.5, others, draw.uniform(0, 1, 3)[..., None, None].expand_as(copies)
        )
        copies = torch.where(inside, cover, copies)
        share = (0.4 * self.strength * draw.uniform() * (draw.uniform() < 0.15))[..., None, None]
        return (1 - share) * copies + share * others

    def _lit(self, draw: _Draw, copies: Tensor) -> Tensor:
        """Copies in another light, with other colours, contrast and tone."""
        far = self.strength
        grey = copies.mean(1, keepdim=True)
        saturation = torch.where(draw.uniform() < 0.1, 1 - far, 1 + 0.6 * far * draw.uniform(-1, 1))[..., None, None]
        copies = (grey + saturation * (copies - grey)).clamp(1e-4, 1)
        copies = copies ** torch.exp(0.5 * far * draw.uniform(-1, 1))[..., None, None]
        contrast = torch.exp(0.4 * far * draw.uniform(-1, 1))[..., None, None]
        cast = (1 + 0.25 * far * draw.uniform(-1, 1, 3))[..., None, None]
        at = torch.linspace(-1, 1, copies.shape[-1], device=copies.device)
        slope = 0.35 * far * draw.uniform(-1, 1, 2)[..., None]
        light = 1 + (slope[:, :1] * at)[..., None] + (slope[:, 1:] * at)[:, :, None]
        brightness = 0.2 * far * draw.uniform(-1, 1)[..., None, None]
        return ((copies - 0.5) * contrast + 0.5 + brightness) * cast * light


class _Draw:
    """Random columns (B, C) for the images of a batch."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device

    def uniform(self, low: float = 0.0, high: float = 1.0, columns: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(self.count, columns, device=self.device)
