"""CIELAB colours and soft histograms of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# IEC 61966-2-1, linear sRGB to XYZ by a white of D65.
_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_D65 = (0.95047, 1.0, 1.08883)


def lab(rgb: Tensor) -> Tensor:
    """CIELAB colours (B, 3, H, W): L in 0..100, a and b in about -128..128.

    Args:
        rgb: Floating point (B, 3, H, W), sRGB values in 0..1 with the white point D65.

    Example:
        >>> round(lab(torch.ones(1, 3, 1, 1))[0, 0].item(), 3)  # white has the lightness 100
        100.0
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(_XYZ, dtype=rgb.dtype, device=rgb.device)
    matrix = matrix / torch.tensor(_D65, dtype=rgb.dtype, device=rgb.device)[:, None]
    x, y, z = torch.einsum("xc,bchw->xbhw", matrix, linear)
    root = [
        torch.where(t > (6 / 29) ** 3, t.clamp(min=1e-8) ** (1 / 3), t / (3 * (6 / 29) ** 2) + 4 / 29)
        for t in (x, y, z)
    ]
    return torch.stack([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])], dim=1)


def soft_bins(values: Tensor, centres: Sequence[float]) -> Tensor:
    """The shares of histogram bins in each value, (..., len(centres)), which sum to 1.

    A value between two centres is shared between them in proportion to its nearness. A value beyond the ends belongs to
    the last bin there.

    Args:
        values: Floating point (...).
        centres: Centres of the bins, ascending.

    Example:
        >>> soft_bins(torch.tensor([0.0, 25.0, 60.0]), centres=(0.0, 50.0))
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    shares = []
    for i, centre in enumerate(centres):
        up = (values - centres[i - 1]) / (centre - centres[i - 1]) if i else torch.ones_like(values)
        last = i + 1 == len(centres)
        down = torch.ones_like(values) if last else (centres[i + 1] - values) / (centres[i + 1] - centre)
        shares.append(torch.minimum(up, down).clamp(0, 1))
    return torch.stack(shares, dim=-1)


def colour_shares(colours: Tensor, lightness: Sequence[float], chroma: Sequence[float], hues: int) -> Tensor:
    """The shares of colour bins in each pixel, (B, N, H, W), which sum to 1 over the N bins.

    N = lightness * (1 + chroma * hues). The bins are ordered by lightness. Within a lightness comes grey, then each
    chroma with all its hues. A pixel between centres is shared between them.

    Args:
        colours: Floating point (B, 3, H, W), CIELAB colours.
        lightness: Centres of L, ascending.
        chroma: Centres of the length of (a, b), ascending. Grey, at 0, is added.
        hues: Number of hues around the circle. The first is red (b = 0).

    Example:
        >>> grey = torch.tensor([50.0, 0.0, 0.0]).view(1, 3, 1, 1)
        >>> colour_shares(grey, lightness=(50.0,), chroma=(40.0,), hues=2).flatten()
        tensor([1., 0., 0.])
    """
    length = colours[:, 1:].square().sum(1).sqrt()
    light = soft_bins(colours[:, 0], lightness)
    strong = soft_bins(length, (0.0, *chroma))
    turn = torch.atan2(colours[:, 2], colours[:, 1]) * hues / (2 * math.pi) % hues
    places = torch.arange(hues, device=colours.device, dtype=colours.dtype)
    apart = (turn[..., None] - places).abs()
    hue = (1 - torch.minimum(apart, hues - apart)).clamp(min=0)
    vivid = (strong[..., 1:, None] * hue[..., None, :]).flatten(-2)
    bins = torch.cat([strong[..., :1], vivid], dim=-1)
    return (light[..., :, None] * bins[..., None, :]).flatten(-2).permute(0, 3, 1, 2)


def hellinger_pyramid(shares: Tensor, levels: Sequence[int]) -> Tensor:
    """A spatial pyramid of colour histograms, (B, N * sum n^2), of norm 1.

    The shares are averaged over the cells of grids of n x n cells, and their square roots are taken. Each level has the
    same weight, and so has each cell of a level. The inner product of two results is the mean of the Bhattacharyya
    coefficients of their cells, in 0..1.

    Args:
        shares: Floating point (B, N, H, W), which sum to 1 over N.
        levels: The values of n.

    Example:
        >>> shares = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
        >>> hellinger_pyramid(shares, levels=(1,))
        tensor([[0., 1.]])
    """
    roots = []
    for n in levels:
        cells = F.adaptive_avg_pool2d(shares, (n, n)).flatten(2).transpose(1, 2)
        roots.append((cells / (len(levels) * n * n)).clamp(min=0).sqrt().flatten(1))
    return torch.cat(roots, dim=1)
