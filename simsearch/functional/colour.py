"""Colour in CIELAB and soft histograms of it."""

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
    """CIELAB (B, 3, H, W), L in 0..100, a and b in about -128..128, of sRGB (B, 3, H, W) in 0..1 under D65."""
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
    """Shares (..., len(centres)), summing to 1, of rising centres in each value, by nearness to the two around it."""
    shares = []
    for i, centre in enumerate(centres):
        up = (values - centres[i - 1]) / (centre - centres[i - 1]) if i else torch.ones_like(values)
        last = i + 1 == len(centres)
        down = torch.ones_like(values) if last else (centres[i + 1] - values) / (centres[i + 1] - centre)
        shares.append(torch.minimum(up, down).clamp(0, 1))
    return torch.stack(shares, dim=-1)


def colour_shares(colours: Tensor, lightness: Sequence[float], chroma: Sequence[float], hues: int) -> Tensor:
    """Shares of colour bins in each pixel, (B, N, H, W), summing to 1 over N, of CIELAB (B, 3, H, W).

    lightness: rising centres of L. chroma: rising centres of the length of (a, b) beyond grey, which is at 0.
    hues: bins around the circle, the first at red (b = 0). N = lightness * (1 + chroma * hues): for each
    lightness grey, then chroma by chroma all hues. A pixel between centres is shared between them.
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
    """Square roots of average shares over grids of n x n cells, n in `levels`, (B, sum n^2 * N), of norm 1.

    shares: (B, N, H, W), summing to 1 over N. Each level weighs the same, each cell of a level too. The inner
    product of two is the mean of the cells' Bhattacharyya coefficients, in 0..1.
    """
    roots = []
    for n in levels:
        cells = F.adaptive_avg_pool2d(shares, (n, n)).flatten(2).transpose(1, 2)
        roots.append((cells / (len(levels) * n * n)).clamp(min=0).sqrt().flatten(1))
    return torch.cat(roots, dim=1)
