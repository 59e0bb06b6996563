"""Heat maps: which places of an image a similarity comes from. They are exact for sums of region vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simsearch.functional.heat_map import regrid, spread_regions
from simsearch.functional.pooling import rmac_regions
from simsearch.models.backbones import Backbone
from simsearch.models.pooling import RMAC
from simsearch.types import HeatMap

if TYPE_CHECKING:
    from simsearch.models.frozen import DescriptorHead


def has_regions(head: DescriptorHead) -> bool:
    """Whether a DescriptorHead sums vectors of regions that have a place in the image.

    Args:
        head: The head.
    """
    return isinstance(head.pooling, RMAC) and bool(head.whiten_regions)


def region_heat_map(
    backbone: Backbone, head: DescriptorHead, sizes: Sequence[int], image: Tensor, vector: Tensor
) -> HeatMap:
    """Contributions of the places of an image to the inner product of its descriptor with a vector.

    The descriptor is a sum over regions and scales, divided by norms, which are taken as constants. The contribution of
    a region is spread evenly over its cells. All scales are added on the finest grid. With fit "square" the
    contribution outside the centre square is 0.

    Args:
        backbone: The backbone.
        head: A DescriptorHead for which has_regions is True.
        sizes: Image sizes in pixels, one for each scale.
        image: uint8 or float (3, H, W) in 0..255.
        vector: Descriptor float32 (D,).

    Returns:
        The heat map. Its `rest` is 0.
    """
    pooling = head.pooling
    assert isinstance(pooling, RMAC)
    height, width = image.shape[1:]
    box = (0.0, 1.0, 0.0, 1.0)
    if backbone.fit == "square":
        box = (*_middle(height, width), *_middle(width, height))
    grids, totals = [], []
    for size in sizes:
        maps = backbone(image[None], size)
        units = head.unit_regions(head.regions(maps))[0]
        total = units.sum(0)
        shape = maps.shape[2:]
        grids.append(spread_regions(units @ vector / total.norm(), _rectangles(pooling, *shape), *shape))
        totals.append(total / total.norm())
    norm = torch.stack(totals).sum(0).norm()
    finest = max((grid.shape for grid in grids), key=lambda shape: shape[0] * shape[1])
    cells = (round(finest[0] / (box[1] - box[0])), round(finest[1] / (box[3] - box[2])))
    values = torch.stack([regrid(grid / norm, cells, box) for grid in grids]).sum(0)
    return HeatMap(values, 0.0)


def _middle(side: int, other: int) -> tuple[float, float]:
    """Start and end of the centre square along one side of an image, in 0..1."""
    square = min(side, other)
    start = (side - square) // 2
    return start / side, (start + square) / side


def _rectangles(pooling: RMAC, height: int, width: int) -> list[tuple[int, int, int, int]]:
    squares = rmac_regions(height, width, pooling.levels, pooling.overlap)
    whole = [(0, 0, height, width)] if pooling.whole else []
    return [(top, left, side, side) for top, left, side in squares] + whole
