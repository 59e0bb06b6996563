"""Rectangular parts of images, and the one function that cuts them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_ROUNDING = 1e-3  # what writing fractions with few digits may add


@dataclass(frozen=True)
class Region:
    """A rectangle in an upright image.

    If all four values are at most 1, they are fractions of the image's width (`x`, `width`) and height (`y`, `height`).
    If one of them is above 1, all four are pixels.

    Attributes:
        x: Left edge.
        y: Upper edge.
        width: Width, above 0.
        height: Height, above 0.

    Raises:
        ValueError: If a value is negative or not finite, a side is 0, or fractions reach beyond the image.
    """

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        values = (self.x, self.y, self.width, self.height)
        if not all(math.isfinite(value) for value in values) or min(values) < 0 or min(self.width, self.height) <= 0:
            raise ValueError(f"{_RULE}, got {self}: x and y must be at least 0, w and h above 0")
        if not self.is_pixels and max(self.x + self.width, self.y + self.height) > 1 + _ROUNDING:
            raise ValueError(f"{_RULE}, got {self}: x + w and y + h must be at most 1")

    def __str__(self) -> str:
        return ",".join(f"{value:g}" for value in (self.x, self.y, self.width, self.height))

    @property
    def is_pixels(self) -> bool:
        """Whether the values are pixels."""
        return max(self.x, self.y, self.width, self.height) > 1

    def of(self, height: int, width: int) -> Region:
        """The region in fractions of an image of this size.

        Args:
            height: Height of the upright image in pixels.
            width: Its width in pixels.

        Raises:
            ValueError: If the region is given in pixels and reaches beyond the image.
        """
        if not self.is_pixels:
            return self
        if self.x + self.width > width or self.y + self.height > height:
            raise ValueError(f"the region {self} (x,y,w,h in pixels) reaches beyond an image of {width} x {height}")
        return Region(self.x / width, self.y / height, self.width / width, self.height / height)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """First row, first column, and the row and column after the last, in whole pixels. At least one pixel.

        Args:
            height: Height of the upright image in pixels.
            width: Its width in pixels.

        Raises:
            ValueError: As `of`.

        Example:
            >>> Region(0.5, 0, 0.5, 0.25).box(40, 80)
            (0, 40, 10, 80)
        """
        part = self.of(height, width)
        top, left = min(height - 1, round(part.y * height)), min(width - 1, round(part.x * width))
        bottom = min(height, max(top + 1, round((part.y + part.height) * height)))
        right = min(width, max(left + 1, round((part.x + part.width) * width)))
        return top, left, bottom, right


_RULE = (
    "a region is x,y,w,h of the upright image, as fractions of its width and height, or as pixels if any of them is "
    "above 1"
)


def read_region(given: str | Sequence[float] | Region | None) -> Region | None:
    """The region that a user gave. None for None.

    Args:
        given: "x,y,w,h", or four numbers.

    Raises:
        ValueError: If it is not a region.

    Example:
        >>> read_region("0.1,0.2,0.5,0.6")
        Region(x=0.1, y=0.2, width=0.5, height=0.6)
    """
    if given is None or isinstance(given, Region):
        return given
    try:
        x, y, width, height = map(float, given.split(",") if isinstance(given, str) else given)
    except (TypeError, ValueError):
        raise ValueError(f"{_RULE}, got {given!r}: give four numbers") from None
    return Region(x, y, width, height)


def crop(image: Tensor, region: Region | None) -> Tensor:
    """The part of an image in a region, (..., h, w). The whole image without one.

    Args:
        image: (..., H, W), upright.
        region: The region, or None.

    Raises:
        ValueError: If the region is given in pixels and reaches beyond the image.

    Example:
        >>> import torch
        >>> crop(torch.arange(6).reshape(2, 3), Region(0, 0.5, 1, 0.5))
        tensor([[3, 4, 5]])
    """
    if region is None:
        return image
    top, left, bottom, right = region.box(*image.shape[-2:])
    return image[..., top:bottom, left:right]
