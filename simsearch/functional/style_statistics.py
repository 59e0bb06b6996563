"""Statistics of feature maps (B, C, H, W) over places: vectors that say how, not where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moments(features: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean and standard deviation of each channel over places, (B, 2 C): all means, then all deviations.

    Of N values, not N - 1; eps is added to the variance. Huang and Belongie 2017, "Arbitrary Style Transfer in
    Real-time with Adaptive Instance Normalization", eq. 5 and 6.
    """
    mean = features.mean((2, 3))
    variance = (features - mean[:, :, None, None]).square().mean((2, 3))
    return torch.cat([mean, (variance + eps).sqrt()], dim=1)


def gram(features: Tensor) -> Tensor:
    """Inner products of each pair of channels i <= j, averaged over places, (B, C (C + 1) / 2), row by row.

    Gatys, Ecker, Bethge 2016, "Image Style Transfer Using Convolutional Neural Networks", eq. 3.
    """
    channels = features.shape[1]
    flat = features.flatten(2)
    products = flat @ flat.transpose(1, 2) / flat.shape[2]
    rows, columns = torch.triu_indices(channels, channels).tolist()
    keep = torch.tensor([channels * i + j for i, j in zip(rows, columns, strict=True)], device=features.device)
    return products.flatten(1)[:, keep]


def signed_root_unit(vectors: Tensor) -> Tensor:
    """sign(x) |x|^(1/2), then L2-normalised, (B, D): large entries no longer decide alone (Perronnin et al. 2010)."""
    return F.normalize(vectors.sign() * (vectors.abs() + 1e-8).sqrt(), dim=1)  # finite slope at 0
