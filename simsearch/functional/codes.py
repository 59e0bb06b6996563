"""Binary codes: the ITQ rotation before the signs, packing to bytes, unpacking, and 64-bit words."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def itq_rotation(vectors: Tensor, iterations: int, seed: int) -> Tensor:
    """A rotation R, float64 (b, b), that brings centred vectors V near the corners of the cube.

    The algorithm starts from a random R. Each iteration sets B = sign(V R), then R = U W^T from the singular value
    decomposition V^T B = U S W^T. Among all orthogonal matrices this R has the smallest ||B - V R|| (the Procrustes
    problem). Neither step increases this loss.

    Args:
        vectors: V, floating point (N, b), centred.
        iterations: Number of iterations.
        seed: Seed of the random start.

    Source:
        Gong, Lazebnik, Gordo, Perronnin: Iterative Quantization. TPAMI 2013, algorithm 1.

    Example:
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> turned = corners.double() @ torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)
        >>> (turned @ itq_rotation(turned, 20, seed=0)).abs().allclose(torch.ones(4, 2, dtype=torch.float64))
        True
    """
    v = vectors.double()
    start = torch.randn(v.shape[1], v.shape[1], dtype=v.dtype, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(start)[0]
    for _ in range(iterations):
        corners = torch.where(v @ rotation > 0, 1.0, -1.0).to(v.dtype)
        u, _, wt = torch.linalg.svd(v.T @ corners)
        rotation = u @ wt
    return rotation


def pack_codes(real: Tensor) -> Tensor:
    """Packed codes, uint8 (N, ceil(b / 8)): bit j is set where real[:, j] > 0.

    Bit j lies in byte j // 8 at position j % 8. Unused bits of the last byte are 0, so that the padding does not change
    Hamming distances.

    Args:
        real: Floating point (N, b), real-valued codes.

    Raises:
        ValueError: If `real` is not (N, b), or if it holds NaN, which has no sign.

    Example:
        >>> pack_codes(torch.tensor([[1.0, -1.0, 1.0]]))
        tensor([[5]], dtype=torch.uint8)
    """
    if real.ndim != 2:
        raise ValueError(f"real-valued codes must be (N, b), got {tuple(real.shape)}")
    if real.isnan().any():
        rows = real.isnan().any(1).nonzero()[:5, 0].tolist()
        raise ValueError(f"real-valued codes hold NaN, first in rows {rows}: it has no sign")
    bits = real > 0
    missing = -bits.shape[1] % 8
    if missing:
        bits = torch.cat([bits, bits.new_zeros(len(bits), missing)], dim=1)
    powers = 2 ** torch.arange(8, device=real.device, dtype=torch.uint8)
    return (bits.unflatten(1, (-1, 8)) * powers).sum(2, dtype=torch.uint8)


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """The bits of packed codes, float32 (N, bits) of 0 and 1.

    Args:
        codes: uint8 (N, ceil(bits / 8)), packed by `pack_codes`.
        bits: b, the width of the codes.

    Example:
        >>> unpack_codes(torch.tensor([[5]], dtype=torch.uint8), bits=3)
        tensor([[1., 0., 1.]])
    """
    powers = 2 ** torch.arange(8, device=codes.device, dtype=torch.uint8)
    unpacked = (codes[:, :, None] & powers) > 0
    return unpacked.flatten(1)[:, :bits].float()


def code_words(codes: Tensor) -> np.ndarray:
    """The codes as 64-bit words, uint64 (N, ceil(bytes / 8)), padded with zeros.

    Args:
        codes: uint8 (N, bytes), packed codes.

    Example:
        >>> code_words(torch.tensor([[5]], dtype=torch.uint8)).tolist()
        [[5]]
    """
    n, width = codes.shape
    padded = np.zeros((n, -(-width // 8) * 8), np.uint8)
    padded[:, :width] = codes.cpu().numpy()
    return padded.view(np.uint64)
