"""Binary codes: packing, unpacking, 64-bit words."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack_codes(real: Tensor) -> Tensor:
    """Packed codes uint8 (N, ceil(b / 8)) of real-valued outputs (N, b): bit j is real[:, j] > 0.

    Bit j lies in byte j // 8 at position j % 8; unused bits of the last byte are 0, so that
    padded codes have the same Hamming distances.

    Raises ValueError for another shape and for NaN, which has no sign.
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
    """Bits as float32 (N, bits) of 0 and 1 from packed codes uint8 (N, ceil(bits / 8))."""
    powers = 2 ** torch.arange(8, device=codes.device, dtype=torch.uint8)
    unpacked = (codes[:, :, None] & powers) > 0
    return unpacked.flatten(1)[:, :bits].float()


def code_words(codes: Tensor) -> np.ndarray:
    """The codes as 64-bit words, uint64 (N, ceil(bytes / 8)), zero-padded."""
    n, width = codes.shape
    padded = np.zeros((n, -(-width // 8) * 8), np.uint8)
    padded[:, :width] = codes.cpu().numpy()
    return padded.view(np.uint64)
