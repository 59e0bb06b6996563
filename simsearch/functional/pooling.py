"""Pooling of a spatial feature map into vectors: pure functions of maps (B, C, H, W)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def spoc(features: Tensor) -> Tensor:
    """Average over positions, (B, C) (sum-pooled convolutional features, Babenko and Lempitsky 2015)."""
    return features.mean((2, 3))


def mac(features: Tensor) -> Tensor:
    """Maximum activation over positions, (B, C) (Tolias, Sicre and Jégou 2016)."""
    return features.amax((2, 3))


def gem(features: Tensor, p: Tensor | float, eps: float = 1e-6) -> Tensor:
    """Generalised mean over positions, (B, C): (mean x^p)^(1/p) of x clamped to eps.

    p = 1 is the average of what is positive, p to infinity the maximum (Radenović, Tolias and
    Chum 2018, eq. 5). The maximum is factored out first, so that large p does not overflow.
    """
    clamped = features.clamp(min=eps)
    peak = clamped.amax((2, 3), keepdim=True)
    return (clamped / peak).pow(p).mean((2, 3)).pow(1.0 / p) * peak[:, :, 0, 0]


@lru_cache(maxsize=256)
def rmac_regions(height: int, width: int, levels: int, overlap: float = 0.4) -> tuple[tuple[int, int, int], ...]:
    """The regions (top, left, side) of the R-MAC grid, scale by scale, each row by row.

    Along the long side as many regions, 2 to 7, as bring the overlap of neighbours closest to
    `overlap`; at scale l squares of side floor(2 min(H, W) / (l + 1)) in l x (l + n - 1) places,
    n = 1 for a square map (Tolias, Sicre and Jégou 2016, section 3.2).

    Raises ValueError where a region's side would be zero.
    """
    if levels < 1:
        raise ValueError(f"R-MAC needs at least one level, got {levels}")
    short, long = min(height, width), max(height, width)
    extra = 0
    if long > short > 0:
        # Neighbours of n regions on the long side lie (long - short) / (n - 1) apart. Shared area by whole
        # area, in the release's order of operations: rounding decides where two n are as close.
        shared = [(short**2 - short * ((long - short) / (n - 1))) / short**2 for n in range(2, 8)]
        gaps = [abs(share - overlap) for share in shared]
        extra = gaps.index(min(gaps)) + 1
    tall, wide = (extra, 0) if height > width else (0, extra)
    regions = []
    for level in range(1, levels + 1):
        side = 2 * short // (level + 1)
        if side == 0:
            raise ValueError(
                f"R-MAC level {level} has regions of zero side on a {height}x{width} map: "
                "use fewer levels or larger images"
            )
        tops = _spread(height - side, level + tall)
        lefts = _spread(width - side, level + wide)
        regions += [(top, left, side) for top in tops for left in lefts]
    return tuple(regions)


def _spread(room: int, count: int) -> list[int]:
    """`count` starts spread evenly over 0..room, rounded down."""
    return [i * room // max(count - 1, 1) for i in range(count)]


def rmac(features: Tensor, levels: int, *, whole: bool = False, overlap: float = 0.4) -> Tensor:
    """Maximum activations of each R-MAC region, (B, R, C).

    With `whole` the whole map is added as one more region, last, as a well-known port has it; the
    paper has none.
    """
    regions = rmac_regions(features.shape[2], features.shape[3], levels, overlap)
    pooled = [features[:, :, y : y + s, x : x + s].amax((2, 3)) for y, x, s in regions]
    if whole:
        pooled.append(mac(features))
    return torch.stack(pooled, dim=1)
