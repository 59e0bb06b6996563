"""Whether two pictures are one: the correlation of their details, whatever their light, shift or mirroring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FINE, COARSE = 0.7, 2.0  # pixels of a thumbnail: below lies noise, above lie skies and vignettes that strangers share
WEAK = 2.0  # grey levels that soften the division by local contrast: what is weaker stays weak
PLAIN = 0.2  # root mean square of details: less is what encoding leaves on a plain picture


def details(grey: Tensor) -> Tensor:
    """The details of grey pictures (N, H, W), levels 0 to 255, of one contrast everywhere: float32 (N, H, W).

    The difference of two Gaussians over its local deviation (Ruderman 1994, "The statistics of natural images").
    Plain grey values correlate among strangers by a bright sky above dark ground, and undivided differences by a
    frame that is stronger than all that it frames.
    """
    band = _blurred(grey, FINE) - _blurred(grey, COARSE)
    return band / (_blurred(band.square(), COARSE).sqrt() + WEAK)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = round(3 * sigma)
    weights = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma**2))
    weights /= weights.sum()
    wide = F.pad(images[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(wide, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))[:, 0]


def best_correlations(first: Tensor, second: Tensor, shift: int) -> Tensor:
    """The largest normalised cross-correlation (P,) in [-1, 1] of pairs of pictures, over shifts and mirroring.

    first, second: float32 (P, H, W), details. The first without a margin of `shift` pixels is laid on every place of
    the second, and of its mirror image; 0 where one of the two is plain there.

    Raises ValueError for other shapes and a shift that leaves nothing.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"pictures must be two (P, H, W), got {tuple(first.shape)} and {tuple(second.shape)}")
    height, width = (side - 2 * shift for side in first.shape[1:])
    if shift < 0 or min(height, width) < 2:
        raise ValueError(f"shift={shift} leaves nothing of pictures {tuple(first.shape[1:])}: use less")
    if len(first) == 0:
        return torch.empty(0)
    template = first[:, shift : shift + height, shift : shift + width]
    template = template - template.mean((1, 2), keepdim=True)
    own, least = template.square().sum((1, 2)), PLAIN**2 * height * width
    best = torch.full((len(first),), -1.0)
    for image in (second, second.flip(2)):
        mean, square = (F.avg_pool2d(part, (height, width), 1) for part in (image, image.square()))
        energy = (square - mean.square()) * (height * width)  # (P, 2 shift + 1, 2 shift + 1)
        for y in range(2 * shift + 1):
            for x in range(2 * shift + 1):
                product = (template * image[:, y : y + height, x : x + width]).sum((1, 2))
                its = energy[:, y, x]
                correlation = product / (own * its).clamp(min=least**2).sqrt()
                best = torch.maximum(best, torch.where((own < least) | (its < least), 0.0, correlation))
    return best.clamp(max=1)
