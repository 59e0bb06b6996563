"""What a camera does to batches of pictures: perspective, blur and JPEG."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def perspective_grid(corners: Tensor, size: int) -> Tensor:
    """Sampling grid float32 (B, size, size, 2) for `grid_sample` that spreads quadrilaterals over whole images.

    Args:
        corners: Upper left, upper right, lower right and lower left corner of the quadrilaterals, floating point
            (B, 4, 2), as x and y in the coordinates of grid_sample: -1 to 1 is the picture. They must be convex.
        size: Side of the images in pixels.

    Source:
        Heckbert: Fundamentals of texture mapping and image warping. 1989, section 2.2.3 (the projective map of the unit
        square in closed form).
    """
    p0, p1, p2, p3 = corners.unbind(1)
    d1, d2, d3 = p1 - p2, p3 - p2, p0 - p1 + p2 - p3

    def cross(a: Tensor, b: Tensor) -> Tensor:
        return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]

    g, h = cross(d3, d2) / cross(d1, d2), cross(d1, d3) / cross(d1, d2)
    a = p1 - p0 + g[:, None] * p1
    b = p3 - p0 + h[:, None] * p3
    at = (torch.arange(size, dtype=corners.dtype, device=corners.device) + 0.5) / size
    v, u = at[:, None, None], at[None, :, None]
    above = a[:, None, None] * u + b[:, None, None] * v + p0[:, None, None]
    below = g[:, None, None, None] * u + h[:, None, None, None] * v + 1.0
    return (above / below).float()


def blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Images (B, C, H, W), each blurred by its own separable kernel. Edges are repeated.

    Args:
        image: Floating point (B, C, H, W).
        kernel: Weights that sum to 1, (B, K, 1, 1) with an odd K.
    """
    taps = kernel.shape[1]
    height, width = image.shape[-2:]
    padded = F.pad(image, [taps // 2] * 4, mode="replicate")
    none = torch.zeros((), device=image.device)
    rows: Tensor = sum((kernel[:, t : t + 1] * padded[:, :, t : t + height] for t in range(taps)), none)
    return sum((kernel[:, t : t + 1] * rows[..., t : t + width] for t in range(taps)), none)


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Images float32 (B, 3, H, W) in 0..1, quantised as JPEG does without subsampling of colour.

    Args:
        image: Floating point (B, 3, H, W) in 0..1.
        quality: Quality of each image in 1..100, (B,), as libjpeg counts it.

    Source:
        ITU-T T.81, annex K (tables K.1 and K.2), and the JFIF conversion of colour. Quality scales the tables as in
        libjpeg.
    """
    device = image.device
    height, width = image.shape[-2:]
    padded = F.pad(image.float(), (0, -width % 8, 0, -height % 8), mode="replicate")
    forward = torch.tensor(_YCBCR, device=device)
    colours = torch.einsum("ij,bjhw->bihw", forward, 255 * padded)
    colours[:, 0] -= 128
    blocks = colours.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # (B, 3, rows, 8, columns, 8)
    basis = _cosines(device)
    spectrum = torch.einsum("ui,bcrimj,vj->bcrumv", basis, blocks, basis)
    quality = quality.float().clamp(1, 100)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    tables = torch.tensor([_LUMA, _CHROMA, _CHROMA], device=device, dtype=torch.float32)
    steps = ((tables * scale[:, None, None, None] + 50) / 100).floor().clamp(1, 255)[:, :, None, :, None, :]
    blocks = torch.einsum("ui,bcrumv,vj->bcrimj", basis, (spectrum / steps).round() * steps, basis)
    colours = blocks.flatten(4, 5).flatten(2, 3)
    colours[:, 0] += 128
    back = torch.linalg.inv(forward)
    return (torch.einsum("ij,bjhw->bihw", back, colours)[..., :height, :width] / 255).clamp(0, 1)


def _cosines(device: torch.device) -> Tensor:
    """The orthonormal cosine transform of 8 samples, (8, 8)."""
    u, i = torch.arange(8, device=device)[:, None], torch.arange(8, device=device)
    basis = torch.cos((2 * i + 1) * u * (torch.pi / 16)) / 2
    basis[0] /= 2**0.5
    return basis


_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
