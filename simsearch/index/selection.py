"""Choices among the items of an index, held so that they cost what they choose."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_SPARSE = 32  # a position of 32 bits takes as much as 32 items of a bitmap


class Selection:
    """Some of N items. Few are held as their ascending positions, many as a bitmap of N bits.

    Combining two selections costs the smaller one where it is held as positions, and N / 8 bytes otherwise. A selection
    is not modified. Several threads may use it at once.

    Args:
        total: N.
        positions: int32 or int64 (n,), the chosen positions, ascending, each once. None if `bitmap` is given.
        bitmap: uint8 (ceil(N / 8),), bit i % 8 of byte i // 8 says whether item i is chosen; unused bits are 0.

    Example:
        >>> few, even = Selection(8, np.array([2, 5])), Selection.of(torch.arange(8) % 2 == 0)
        >>> (few & even).positions, len(few & ~even)
        (array([2]), 1)
    """

    def __init__(self, total: int, positions: np.ndarray | None = None, bitmap: np.ndarray | None = None) -> None:
        self.total = total
        if positions is not None:
            self.positions = positions
            self._count = len(positions)
        else:
            assert bitmap is not None
            self.bitmap = bitmap
            self._count = int(np.bitwise_count(bitmap).sum(dtype=np.int64))

    @classmethod
    def of(cls, mask: Tensor | np.ndarray) -> Selection:
        """The items where a mask is true.

        Args:
            mask: bool (N,).
        """
        return cls(len(mask), bitmap=np.packbits(np.asarray(mask), bitorder="little"))

    @classmethod
    def everything(cls, total: int) -> Selection:
        """All of N items.

        Args:
            total: N.
        """
        bitmap = np.full(-(-total // 8), 255, np.uint8)
        if total % 8:
            bitmap[-1] = (1 << total % 8) - 1
        return cls(total, bitmap=bitmap)

    def __len__(self) -> int:
        return self._count

    @property
    def is_sparse(self) -> bool:
        """Whether the positions take less memory than the bitmap."""
        return self._count * _SPARSE <= self.total

    @cached_property
    def positions(self) -> np.ndarray:
        """int32 or int64 (n,), the chosen positions, ascending."""
        return np.flatnonzero(self.mask())

    @cached_property
    def bitmap(self) -> np.ndarray:
        """uint8 (ceil(N / 8),), a bit for each item, the first in the lowest bit of the first byte."""
        return np.packbits(self._mask_of_positions(), bitorder="little")

    def mask(self) -> Tensor:
        """bool (N,), which items are chosen. It may be modified."""
        if "bitmap" not in self.__dict__:
            return torch.from_numpy(self._mask_of_positions())
        return torch.from_numpy(np.unpackbits(self.bitmap, count=self.total, bitorder="little").view(bool))

    def holds(self, positions: np.ndarray) -> np.ndarray:
        """bool (n,), which of some items are chosen.

        Args:
            positions: int32 or int64 (n,).
        """
        if "bitmap" in self.__dict__:
            return (self.bitmap[positions >> 3] >> (positions & 7) & 1).astype(bool)
        if not len(self):
            return np.zeros(len(positions), bool)
        places = np.searchsorted(self.positions, positions.astype(self.positions.dtype, copy=False))
        return self.positions[np.minimum(places, len(self) - 1)] == positions

    def without(self, positions: np.ndarray) -> Selection:
        """The selection without some items.

        Args:
            positions: int64 (n,), ascending, each once.
        """
        if self.is_sparse:
            return Selection(self.total, self.positions[~Selection(self.total, positions).holds(self.positions)])
        return self & ~Selection(self.total, positions) if len(positions) else self

    def __and__(self, other: Selection) -> Selection:
        few, many = (self, other) if len(self) <= len(other) else (other, self)
        if few.is_sparse:
            return Selection(self.total, few.positions[many.holds(few.positions)])
        return Selection(self.total, bitmap=few.bitmap & many.bitmap)

    def __invert__(self) -> Selection:
        return Selection(self.total, bitmap=Selection.everything(self.total).bitmap & ~self.bitmap)

    def _mask_of_positions(self) -> np.ndarray:
        mask = np.zeros(self.total, bool)
        mask[self.positions] = True
        return mask


def checked_choice(k: int, among: Tensor | Selection | None, total: int) -> Selection | None:
    """The items that a search may return, None for all, after a check of what it is asked for.

    Args:
        k: Number of items that are wanted.
        among: A selection or bool (N,), or None for all.
        total: N, the number of items of the index.

    Raises:
        ValueError: If k does not lie in 1..N, or if `among` does not choose among N items.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k > total:
        raise ValueError(f"k={k} neighbours are more than the index's {total} items: lower k")
    if isinstance(among, Tensor):
        if among.dtype != torch.bool or among.shape != (total,):
            raise ValueError(f"among must be bool ({total},), got {among.dtype} {tuple(among.shape)}")
        return Selection.of(among)
    if among is not None and among.total != total:
        raise ValueError(f"among selects from {among.total} items, the index has {total}: select from its own")
    return among
