"""The resize that all images pass, as tensors or from files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.types import Fit


def resize_to_fit(image: Tensor, size: int, fit: Fit) -> Tensor:
    """Images in the size that a network sees, (..., 3, h, w) in the dtype of the input.

    Args:
        image: uint8 or floating point (..., 3, H, W).
        size: Side of the square, or longest side, in pixels.
        fit: "square" for `resize_square`, "longest" for `resize_longest`.

    Raises:
        ValueError: If `fit` is another word, if `image` has another dtype or shape, or if `size` is below 1.

    Example:
        >>> resize_to_fit(torch.zeros(3, 30, 40), size=20, fit="longest").shape
        torch.Size([3, 15, 20])
    """
    check_fit(fit)
    return resize_square(image, size) if fit == "square" else resize_longest(image, size)


def check_fit(fit: str) -> None:
    """Checks the name of a fit.

    Args:
        fit: "square" or "longest".

    Raises:
        ValueError: If `fit` is another word.
    """
    if fit not in ("square", "longest"):
        raise ValueError(f"fit must be square (the centre square) or longest (the whole image), got {fit!r}")


def longest_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """The height and width of an image that is scaled to a longest side of `size`.

    The other side is rounded to a whole pixel, at least 1. It is off by at most half a pixel, unless the image is
    thinner than 1 : 2 size. A shape that this function returned stays as it is.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        size: Longest side in pixels.

    Example:
        >>> longest_shape(300, 400, size=100)
        (75, 100)
    """
    longest = max(height, width)
    scaled = (max(1, (2 * size * side + longest) // (2 * longest)) for side in (height, width))
    return next(scaled), next(scaled)


def resize_longest(image: Tensor, size: int) -> Tensor:
    """The whole image, scaled to a longest side of `size`, (..., 3, h, w) in the dtype of the input.

    The aspect ratio is kept (see `longest_shape`). Nothing is cropped or padded. Smaller images are enlarged, as in the
    papers of R-MAC. Pixels are interpolated as in `resize_square`.

    Args:
        image: uint8 or floating point (..., 3, H, W).
        size: Longest side in pixels.

    Raises:
        ValueError: If `image` has another dtype or shape, or if `size` is below 1.

    Example:
        >>> resize_longest(torch.zeros(3, 30, 40), size=20).shape
        torch.Size([3, 15, 20])
    """
    _check(image, size)
    height, width = image.shape[-2:]
    return resize(image, *longest_shape(height, width, size))


def resize_square(image: Tensor, size: int) -> Tensor:
    """The centre square, scaled to side `size`, (..., 3, size, size) in the dtype of the input.

    The interpolation is bicubic, antialiased when it shrinks. An image that already is size x size is returned as it
    is. uint8 values are rounded and clamped to 0..255 after each of the two axes, as Pillow does. They equal Pillow's
    within 2 levels on every device. A float image is not clamped and may overshoot.

    Args:
        image: uint8 or floating point (..., 3, H, W).
        size: Side in pixels.

    Raises:
        ValueError: If `image` has another dtype or shape, or if `size` is below 1.

    Example:
        >>> resize_square(torch.zeros(3, 30, 40), size=20).shape
        torch.Size([3, 20, 20])
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
    """Images scaled to a height and a width, (..., 3, height, width) in the dtype of the input, as in `resize_square`.

    Args:
        image: uint8 or floating point (..., 3, H, W).
        height: New height in pixels.
        width: New width in pixels.

    Raises:
        ValueError: If `image` has another dtype.

    Example:
        >>> resize(torch.full((3, 4, 4), 7, dtype=torch.uint8), height=1, width=2)[0]
        tensor([[7, 7]], dtype=torch.uint8)
    """
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
    """The result of the CPU kernel for uint8, on devices that have no such kernel."""
    for shape in ((batch.shape[-2], width), (height, width)):
        batch = _bicubic(batch.float(), *shape).round().clamp(0, 255).to(torch.uint8)
    return batch


def _bicubic(batch: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)
