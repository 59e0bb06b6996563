"""The one resize of the product, for tensors and files alike."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Fit = Literal["square", "longest"]


def resize_to_fit(image: Tensor, size: int, fit: Fit) -> Tensor:
    """Images as a network sees them: `resize_square` for fit "square", `resize_longest` for "longest".

    Raises ValueError for another fit, and what these raise.
    """
    check_fit(fit)
    return resize_square(image, size) if fit == "square" else resize_longest(image, size)


def check_fit(fit: str) -> None:
    """Raises ValueError for a fit that there isn't."""
    if fit not in ("square", "longest"):
        raise ValueError(f"fit must be square (the centre square) or longest (the whole image), got {fit!r}")


def longest_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image scaled so that its longest side is `size`.

    The other side is rounded to a whole pixel, at least 1: it is off by half a pixel at most, unless the image is
    thinner than 1 : 2 size. A shape that has come out stays as it is.
    """
    longest = max(height, width)
    scaled = (max(1, (2 * size * side + longest) // (2 * longest)) for side in (height, width))
    return next(scaled), next(scaled)


def resize_longest(image: Tensor, size: int) -> Tensor:
    """The whole image scaled to a longest side of `size`, (..., 3, h, w) in the dtype of the input.

    image: uint8 or floating (..., 3, H, W). Aspect is kept (`longest_shape`), nothing is cropped or padded, and
    smaller images are enlarged, as the papers of R-MAC do. Pixels as `resize_square` makes them.

    Raises ValueError for another dtype or shape, and for a size below 1.
    """
    _check(image, size)
    height, width = image.shape[-2:]
    return resize(image, *longest_shape(height, width, size))


def resize_square(image: Tensor, size: int) -> Tensor:
    """The centre square scaled to side `size`, (..., 3, size, size) in the dtype of the input.

    image: uint8 or floating (..., 3, H, W). Bicubic, antialiased when shrinking; the image itself when it
    already is size x size. uint8 is rounded and clamped to 0..255 after each of the two axes, as Pillow
    does (equal to it within 2 levels, on every device); a float image is not clamped and may overshoot.

    Raises ValueError for another dtype or shape, and for a size below 1.
    """
    _check(image, size)
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[..., top : top + side, left : left + side], size, size)


def _check(image: Tensor, size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if image.ndim < 3 or image.shape[-3] != 3 or 0 in image.shape[-2:]:
        raise ValueError(f"image must be (..., 3, H, W) with H, W >= 1, got {tuple(image.shape)}")


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Images (..., 3, height, width) in the dtype of the input, as `resize_square` scales them."""
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"image must be uint8 or floating, got {image.dtype}")
    if image.shape[-2:] == (height, width):
        return image
    batch = image.reshape(-1, *image.shape[-3:])
    if image.dtype != torch.uint8:
        working = batch if batch.dtype == torch.float64 else batch.float()
        resized = _bicubic(working, height, width).to(image.dtype)
    elif image.device.type == "cpu":
        # Channels last is the fast path: about ten times the speed of resizing in float.
        resized = _bicubic(batch.contiguous(memory_format=torch.channels_last), height, width)
    else:
        resized = _resize_uint8_by_axes(batch, height, width)
    return resized.reshape(*image.shape[:-2], height, width)


def _resize_uint8_by_axes(batch: Tensor, height: int, width: int) -> Tensor:
    """What the CPU kernel computes for uint8, for devices that have no such kernel."""
    for shape in ((batch.shape[-2], width), (height, width)):
        batch = _bicubic(batch.float(), *shape).round().clamp(0, 255).to(torch.uint8)
    return batch


def _bicubic(batch: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)
