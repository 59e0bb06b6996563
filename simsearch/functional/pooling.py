"""Pooling of a feature map (B, C, H, W) into vectors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def spoc(features: Tensor) -> Tensor:
    """The average of each channel over all positions (SPoC), (B, C).

    Args:
        features: Floating point (B, C, H, W).

    Source:
        Babenko, Lempitsky: Aggregating Deep Convolutional Features for Image Retrieval. ICCV 2015.

    Example:
        >>> spoc(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2))
        tensor([[2.5000]])
    """
    return features.mean((2, 3))


def mac(features: Tensor) -> Tensor:
    """The maximum of each channel over all positions (MAC), (B, C).

    Args:
        features: Floating point (B, C, H, W).

    Source:
        Tolias, Sicre, Jégou: Particular object retrieval with integral max-pooling of CNN activations. ICLR 2016.

    Example:
        >>> mac(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2))
        tensor([[4.]])
    """
    return features.amax((2, 3))


def gem(features: Tensor, p: Tensor | float, eps: float = 1e-6) -> Tensor:
    """The generalised mean of each channel over all positions (GeM), (B, C).

    The value is (mean x^p)^(1/p), with x clamped to eps. p = 1 is the average of the positive activations; with p to
    infinity the value approaches the maximum. The maximum is factored out first, so that a large p does not overflow.

    Args:
        features: Floating point (B, C, H, W).
        p: The exponent, above 0.
        eps: The smallest activation.

    Source:
        Radenović, Tolias, Chum: Fine-tuning CNN Image Retrieval with No Human Annotation. 2018, eq. 5.

    Example:
        >>> gem(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2), p=3.0)  # (100 / 4)^(1/3)
        tensor([[2.9240]])
    """
    clamped = features.clamp(min=eps)
    peak = clamped.amax((2, 3), keepdim=True)
    return (clamped / peak).pow(p).mean((2, 3)).pow(1.0 / p) * peak[:, :, 0, 0]


@lru_cache(maxsize=256)
def rmac_regions(height: int, width: int, levels: int, overlap: float = 0.4) -> tuple[tuple[int, int, int], ...]:
    """The regions (top, left, side) of the R-MAC grid, scale by scale, each scale row by row.

    At scale l, square regions of side floor(2 min(H, W) / (l + 1)) lie at l x (l + n - 1) positions. n is the number of
    regions along the long side, 2 to 7, that brings the overlap of neighbours closest to `overlap`. For a square map n
    is 1.

    Args:
        height: H, in cells of the map.
        width: W, in cells of the map.
        levels: Number of scales, 1 or more.
        overlap: Wanted overlap of neighbouring regions, as a fraction of their area.

    Raises:
        ValueError: If `levels` is below 1, or if the side of a region would be zero.

    Source:
        Tolias, Sicre, Jégou: Particular object retrieval with integral max-pooling of CNN activations. ICLR 2016,
        section 3.2.

    Example:
        >>> rmac_regions(height=4, width=4, levels=2)
        ((0, 0, 4), (0, 0, 2), (0, 2, 2), (2, 0, 2), (2, 2, 2))
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
    """The maximum of each channel in each region of the R-MAC grid, (B, R, C).

    Args:
        features: Floating point (B, C, H, W).
        levels: Number of scales, 1 or more.
        whole: Add the whole map as one more region, last. A well-known port does so; the paper does not.
        overlap: Wanted overlap of neighbouring regions, as a fraction of their area.

    Raises:
        ValueError: As `rmac_regions` does.

    Example:
        >>> rmac(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2), levels=1)
        tensor([[[4.]]])
    """
    regions = rmac_regions(features.shape[2], features.shape[3], levels, overlap)
    pooled = [features[:, :, y : y + s, x : x + s].amax((2, 3)) for y, x, s in regions]
    if whole:
        pooled.append(mac(features))
    return torch.stack(pooled, dim=1)
