"""Heat maps: the values of regions are spread over grids of cells, and sums are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spread_regions(values: Tensor, regions: Sequence[tuple[int, int, int, int]], height: int, width: int) -> Tensor:
    """A grid (height, width) with the value of each region spread evenly over its cells.

    Args:
        values: Floating point (R,), one value per region.
        regions: R regions (top, left, height, width) in cells.
        height: Height of the grid in cells.
        width: Width of the grid in cells.

    Example:
        >>> spread_regions(torch.tensor([4.0, 1.0]), [(0, 0, 2, 2), (1, 1, 1, 1)], height=2, width=2)
        tensor([[1., 1.],
                [1., 2.]])
    """
    grid = values.new_zeros(height, width)
    for value, (top, left, tall, wide) in zip(values, regions, strict=True):
        grid[top : top + tall, left : left + wide] += value / (tall * wide)
    return grid


def overlaps(start: float, stop: float, cells: int, onto: int) -> Tensor:
    """The shares of source cells in target cells, float64 (onto, cells); each column sums to 1.

    The source cells are equal and divide start..stop. The target cells are equal and divide 0..1.

    Args:
        start: Start of the source interval, 0 <= start < stop.
        stop: End of the source interval, at most 1.
        cells: Number of source cells.
        onto: Number of target cells.

    Example:
        >>> overlaps(0.0, 1.0, cells=1, onto=2)
        tensor([[0.5000],
                [0.5000]], dtype=torch.float64)
    """
    edges = torch.linspace(start, stop, cells + 1, dtype=torch.float64)
    grid = torch.linspace(0, 1, onto + 1, dtype=torch.float64)
    low = torch.maximum(edges[None, :-1], grid[:-1, None])
    high = torch.minimum(edges[None, 1:], grid[1:, None])
    shares = (high - low).clamp(min=0)
    return shares / shares.sum(0)


def regrid(values: Tensor, shape: tuple[int, int], box: tuple[float, float, float, float] = (0, 1, 0, 1)) -> Tensor:
    """The values of a box of an image on a grid of the whole image; the sum of the values is kept.

    Each cell's value is divided among the cells of the new grid that it overlaps.

    Args:
        values: Floating point (h, w), values of equal cells over the box.
        shape: Height and width of the new grid in cells.
        box: top, bottom, left, right of the box, as fractions of the image in 0..1.

    Example:
        >>> regrid(torch.ones(1, 1), (2, 2), box=(0, 1, 0, 0.5))
        tensor([[0.5000, 0.0000],
                [0.5000, 0.0000]])
    """
    tall = overlaps(box[0], box[1], values.shape[0], shape[0]).to(values)
    wide = overlaps(box[2], box[3], values.shape[1], shape[1]).to(values)
    return tall @ values @ wide.T
