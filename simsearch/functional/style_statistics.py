"""Statistics of feature maps (B, C, H, W) over all positions: vectors that describe style, not layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moments(features: Tensor, eps: float = 1e-5) -> Tensor:
    """The mean and the standard deviation of each channel over positions, (B, 2 C): all means, then all deviations.

    The variance is divided by the number of positions N, not by N - 1.

    Args:
        features: Floating point (B, C, H, W).
        eps: Added to the variance.

    Source:
        Huang, Belongie: Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization. ICCV 2017, eq. 5
        and 6.

    Example:
        >>> moments(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2))
        tensor([[2.0000, 1.0000]])
    """
    mean = features.mean((2, 3))
    variance = (features - mean[:, :, None, None]).square().mean((2, 3))
    return torch.cat([mean, (variance + eps).sqrt()], dim=1)


def gram(features: Tensor) -> Tensor:
    """The inner products of all pairs of channels i <= j, averaged over positions, (B, C (C + 1) / 2), row by row.

    Args:
        features: Floating point (B, C, H, W).

    Source:
        Gatys, Ecker, Bethge: Image Style Transfer Using Convolutional Neural Networks. CVPR 2016, eq. 3.

    Example:
        >>> gram(torch.tensor([[1.0, 3.0], [2.0, 2.0]]).view(1, 2, 1, 2))
        tensor([[5., 4., 4.]])
    """
    channels = features.shape[1]
    flat = features.flatten(2)
    products = flat @ flat.transpose(1, 2) / flat.shape[2]
    rows, columns = torch.triu_indices(channels, channels).tolist()
    keep = torch.tensor([channels * i + j for i, j in zip(rows, columns, strict=True)], device=features.device)
    return products.flatten(1)[:, keep]


def signed_root_unit(vectors: Tensor) -> Tensor:
    """The signed square roots of the entries, sign(x) |x|^(1/2), then L2-normalised, (B, D).

    Large entries then no longer dominate.

    Args:
        vectors: Floating point (B, D).

    Source:
        Perronnin, Sánchez, Mensink: Improving the Fisher Kernel for Large-Scale Image Classification. ECCV 2010.

    Example:
        >>> signed_root_unit(torch.tensor([[9.0, -16.0]]))
        tensor([[ 0.6000, -0.8000]])
    """
    return F.normalize(vectors.sign() * (vectors.abs() + 1e-8).sqrt(), dim=1)  # finite slope at 0
