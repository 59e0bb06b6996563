"""Values of regions spread over grids of cells; sums stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spread_regions(values: Tensor, regions: Sequence[tuple[int, int, int, int]], height: int, width: int) -> Tensor:
    """The values (R,) of regions (top, left, height, width), each spread evenly over its cells, (height, width)."""
    grid = values.new_zeros(height, width)
    for value, (top, left, tall, wide) in zip(values, regions, strict=True):
        grid[top : top + tall, left : left + wide] += value / (tall * wide)
    return grid


def overlaps(start: float, stop: float, cells: int, onto: int) -> Tensor:
    """Shares float64 (onto, cells) of each of `cells` equal cells over start..stop in each of `onto` over 0..1.

    0 <= start < stop <= 1; columns sum to 1.
    """
    edges = torch.linspace(start, stop, cells + 1, dtype=torch.float64)
    grid = torch.linspace(0, 1, onto + 1, dtype=torch.float64)
    low = torch.maximum(edges[None, :-1], grid[:-1, None])
    high = torch.minimum(edges[None, 1:], grid[1:, None])
    shares = (high - low).clamp(min=0)
    return shares / shares.sum(0)


def regrid(values: Tensor, shape: tuple[int, int], box: tuple[float, float, float, float] = (0, 1, 0, 1)) -> Tensor:
    """Values (h, w) of equal cells over a box (top, bottom, left, right; in 0..1) of an image, on a grid of all of it.

    shape: of that grid. Each cell's value goes where the cell lies, in parts; the sum stays.
    """
    tall = overlaps(box[0], box[1], values.shape[0], shape[0]).to(values)
    wide = overlaps(box[2], box[3], values.shape[1], shape[1]).to(values)
    return tall @ values @ wide.T
