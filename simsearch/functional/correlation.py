"""The correlation of the details of two pictures, which shows whether they are one picture.

A change of light, a small shift and mirroring do not matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FINE, COARSE = 0.7, 2.0  # pixels of a thumbnail: below lies noise, above lie skies and vignettes of unrelated pictures
WEAK = 2.0  # grey levels that soften the division by local contrast: what is weaker stays weak
PLAIN = 0.2  # root mean square of details: less is what encoding leaves on a plain picture


def details(grey: Tensor) -> Tensor:
    """The details of grey pictures, scaled to one contrast everywhere, float32 (N, H, W).

    A difference of two Gaussians is divided by its local standard deviation (Ruderman 1994, "The statistics of natural
    images").

    Plain grey values of unrelated pictures correlate where both have a bright sky above dark ground. Differences
    without the division correlate where both have a frame that is stronger than the picture inside.

    Args:
        grey: Floating point (N, H, W), grey levels 0 to 255.

    Example:
        >>> float(details(torch.full((1, 16, 16), 90.0)).abs().max()) < 1e-4  # a plain picture has no details
        True
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
    """The largest normalised cross-correlation of each pair over all shifts, mirrored or not, (P,) in [-1, 1].

    The first picture, without a margin of `shift` pixels, is laid on every position of the second picture and of its
    mirror image. The correlation is 0 where one of the two is plain there.

    Args:
        first: float32 (P, H, W), from `details`.
        second: float32 (P, H, W), from `details`.
        shift: Largest shift in pixels, 0 or more.

    Raises:
        ValueError: If the shapes differ or are not (P, H, W), or if the shift leaves less than 2 pixels of a side.

    Example:
        >>> picture = (torch.arange(64.0) % 5).view(1, 8, 8)
        >>> best_correlations(picture, picture.flip(2), shift=1)
        tensor([1.])
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(f"pictures must be two (P, H, W), got {tuple(first.shape)} and {tuple(second.shape)}")
    height, width = (side - 2 * shift for side in first.shape[1:])
    if shift < 0 or min(height, width) < 2:
        raise ValueError(f"shift={shift} leaves nothing to compare of pictures {tuple(first.shape[1:])}: use less")
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


def aligned_correlation(query: Tensor, item: Tensor, outline: Tensor, side: int = 64) -> float:
    """The correlation of the details of an item with those of the part of a query that shows it, in [-1, 1].

    The query is drawn into the item's frame by the homography that puts the item's corners where the outline says. Only
    what lies in the query is compared. 0 if that is too small or plain.

    Args:
        query: uint8 (3, H, W).
        item: uint8 (3, h, w).
        outline: float (4, 2), the item's corners in the query, clockwise from the top left, as fractions of its sides.
        side: Pixels of a side of the compared squares.

    Example:
        >>> picture = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        >>> whole = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
        >>> round(aligned_correlation(picture, picture, whole), 2)
        1.0
        >>> aligned_correlation(picture, picture.flip(1), whole) < 0.5
        True
    """
    first, second = (_grey(image).float() for image in (query, item))
    places = _perspective(outline.double(), side)
    inside = ((places > 0) & (places < 1)).all(2)
    # What is smaller than a pixel of the square must not alias: the query is first reduced to the item's scale.
    wide, high = outline.double().amax(0) - outline.double().amin(0)
    reduced = [
        min(n, max(2, round(side / max(float(part), 1e-3)))) for n, part in zip(first.shape, (high, wide), strict=True)
    ]
    first = F.interpolate(first[None, None], reduced, mode="bilinear", antialias=True, align_corners=False)
    drawn = F.grid_sample(
        first, (2 * places - 1)[None].float(), mode="bilinear", align_corners=False, padding_mode="border"
    )
    square = F.interpolate(second[None, None], (side, side), mode="bilinear", antialias=True, align_corners=False)
    ours, theirs = (details(one[0])[0][inside] for one in (drawn, square))
    if len(ours) < side * side / 50 or min(ours.std(), theirs.std()) < PLAIN:
        return 0.0
    return float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])


def _perspective(corners: Tensor, side: int) -> Tensor:
    """Where the centres of a square's pixels lie under the homography to four corners, (side, side, 2).

    Source:
        Heckbert: Fundamentals of texture mapping and image warping. 1989.
    """
    a, b, c, d = corners
    first, second, third = b - c, d - c, a - b + c - d
    cross = first[0] * second[1] - first[1] * second[0]
    g = (third[0] * second[1] - third[1] * second[0]) / cross
    h = (first[0] * third[1] - first[1] * third[0]) / cross
    centre = (torch.arange(side, dtype=corners.dtype) + 0.5) / side
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    x, y = x[:, :, None], y[:, :, None]
    return ((b - a + g * b) * x + (d - a + h * d) * y + a) / (g * x + h * y + 1)


def _grey(image: Tensor) -> Tensor:
    return (image.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
