"""Pooling modules: feature maps (B, C, H, W) to region vectors (B, R, C). R = 1 if the whole map is one region."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simsearch.functional import pooling


class Average(nn.Module):
    """SPoC: the average over positions."""

    def forward(self, features: Tensor) -> Tensor:
        """Region vectors (B, 1, C).

        Args:
            features: Feature maps (B, C, H, W).
        """
        return pooling.spoc(features)[:, None]


class MAC(nn.Module):
    """The maximum over positions."""

    def forward(self, features: Tensor) -> Tensor:
        """Region vectors (B, 1, C).

        Args:
            features: Feature maps (B, C, H, W).
        """
        return pooling.mac(features)[:, None]


class GeM(nn.Module):
    """The generalised mean over positions.

    Args:
        p: Exponent, above 0.
        trainable: Whether `p` is learnt.

    Raises:
        ValueError: If `p` is not positive.
    """

    def __init__(self, p: float = 3.0, trainable: bool = False) -> None:
        super().__init__()
        if p <= 0:
            raise ValueError(f"GeM's p must be positive, got {p}")
        self.p = nn.Parameter(torch.tensor(float(p)), requires_grad=trainable)

    def extra_repr(self) -> str:
        return f"p={self.p.item():.6g}"

    def forward(self, features: Tensor) -> Tensor:
        """Region vectors (B, 1, C).

        Args:
            features: Feature maps (B, C, H, W).
        """
        return pooling.gem(features, self.p)[:, None]


class RMAC(nn.Module):
    """The maxima of the R-MAC regions.

    Args:
        levels: Number of region sizes, from 1.
        overlap: Wanted overlap of neighbouring regions, in [0, 1).
        whole: Whether the whole map is one more region.

    Raises:
        ValueError: If `levels` or `overlap` is out of range.
    """

    def __init__(self, levels: int = 3, overlap: float = 0.4, whole: bool = False) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"R-MAC needs at least one level, got {levels}")
        if not 0 <= overlap < 1:
            raise ValueError(f"R-MAC's overlap must lie in [0, 1), got {overlap}")
        self.levels, self.overlap, self.whole = levels, overlap, whole

    def extra_repr(self) -> str:
        return f"levels={self.levels}, overlap={self.overlap}, whole={self.whole}"

    def forward(self, features: Tensor) -> Tensor:
        """Region vectors (B, R, C).

        Args:
            features: Feature maps (B, C, H, W).
        """
        return pooling.rmac(features, self.levels, whole=self.whole, overlap=self.overlap)
