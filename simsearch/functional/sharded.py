"""Descriptors that are spread over ranks, and the exchange between the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from simsearch.functional.collectives import rank_and_world
from simsearch.types import Descriptors


@dataclass(frozen=True)
class Ranks:
    """The processes that work together; by default one process alone.

    Every rank must call each method, in the same order. Results lie on the CPU and are equal on all ranks.

    Attributes:
        rank: The number of this process, from 0.
        world: The number of processes.
        device: Device of the collectives, a GPU for NCCL.

    Example:
        >>> Ranks.here()
        Ranks(rank=0, world=1, device='cpu')
    """

    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def here(cls, device: torch.device | str = "cpu") -> Ranks:
        """The ranks of the default process group; one rank where there is no group.

        Args:
            device: Device of the collectives, a GPU for NCCL.
        """
        return cls(*rank_and_world(), device)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks.

        Args:
            values: A tensor of one shape and dtype on all ranks.
        """
        return values if self.world == 1 else self._reduced(values)

    def largest(self, values: Tensor) -> Tensor:
        """The element-wise maximum of a tensor over ranks.

        Args:
            values: A tensor of one shape and dtype on all ranks.
        """
        return values if self.world == 1 else self._reduced(values, largest=True)

    def stack(self, values: Tensor) -> Tensor:
        """The tensors of all ranks, (world, ...).

        Args:
            values: A tensor (...) of one shape and dtype on all ranks.
        """
        if self.world == 1:
            return values[None]
        own = values.to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own)
        return torch.stack([part.cpu() for part in parts])

    def sum_on_first(self, values: Tensor) -> Tensor | None:
        """The sum of a tensor over ranks on rank 0, None on the other ranks.

        Args:
            values: A tensor of one shape and dtype on all ranks.
        """
        if self.world == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.reduce(total, dst=0)
        return total.cpu() if self.rank == 0 else None

    def from_first(self, values: Tensor | None) -> Tensor:
        """The bytes of rank 0, uint8 (n,).

        Args:
            values: uint8 (n,) on rank 0. The values of other ranks are ignored and may be None.
        """
        if self.world == 1:
            assert values is not None
            return values
        own = torch.empty(0, dtype=torch.uint8) if self.rank or values is None else values
        size = torch.tensor(len(own), device=self.device)
        dist.broadcast(size, src=0)
        sent = own.to(self.device) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(sent, src=0)
        return sent.cpu()

    def raise_together(self, error: ValueError | None) -> None:
        """Raises an error on all ranks where one rank has an error, so that no rank is left waiting.

        Args:
            error: The error of this rank, or None.

        Raises:
            ValueError: The error of this rank.
            RuntimeError: If only other ranks have an error.
        """
        failed = self.stack(torch.tensor(int(error is not None)))
        if error is not None:
            raise error
        if failed.any():
            raise RuntimeError(f"rank {failed.nonzero()[:, 0].tolist()} failed: see its message")

    def _reduced(self, values: Tensor, *, largest: bool = False) -> Tensor:
        total = values.to(self.device, copy=True)
        dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return total.cpu()


@dataclass(frozen=True)
class Sharded:
    """N descriptors, each on one rank.

    Label, index and group are those of all items, equal on all ranks: 24 bytes per item.

    Attributes:
        own: The descriptors (n) of this rank.
        position: int64 (n,), their positions in the whole, ascending.
        label: int64 (N,), -1 where unknown.
        index: int64 (N,), collection rows.
        group: int64 (N,) or None; items of one group are junk to each other.
        ranks: The ranks.

    Example:
        >>> whole = Descriptors(torch.eye(2), label=torch.tensor([0, 1]), index=torch.tensor([4, 7]))
        >>> Sharded.of(whole).rows(torch.tensor([1]))
        tensor([[0., 1.]])
    """

    own: Descriptors
    position: Tensor
    label: Tensor
    index: Tensor
    group: Tensor | None
    ranks: Ranks

    @classmethod
    def of(cls, whole: Descriptors | Sharded) -> Sharded:
        """Descriptors that this process holds as a whole, in their order. A Sharded is returned as it is.

        Args:
            whole: N descriptors.
        """
        if isinstance(whole, Sharded):
            return whole
        return cls(whole, torch.arange(len(whole)), whole.label, whole.index, whole.group, Ranks())

    @classmethod
    def spread(cls, own: Descriptors, ranks: Ranks) -> Sharded:
        """The descriptors of all ranks, ordered by collection row.

        A row that several ranks have stays on the lowest of them. Every rank must call.

        Args:
            own: The descriptors of this rank; there may be none. Either all ranks have groups or none.
            ranks: The ranks.
        """
        most = int(ranks.largest(torch.tensor(len(own))))
        about = torch.full((4, most), -1, dtype=torch.int64)
        about[3, len(own) :] = 0  # nothing is there
        for line, column in zip(about, (own.index, own.label, own.group), strict=False):
            if column is not None:
                line[: len(own)] = column
        columns = ranks.stack(about).transpose(0, 1).flatten(1)  # (4, world * most), rank by rank
        there = columns[3].nonzero()[:, 0]
        _, first = np.unique(columns[0, there].numpy(), return_index=True)
        kept = there[torch.from_numpy(first)]
        index, label, group = columns[:3, kept]
        mine = kept // max(most, 1) == ranks.rank
        place = kept[mine] - ranks.rank * most
        if not torch.equal(place, torch.arange(len(own))):
            junk = None if own.group is None else own.group[place]
            own = Descriptors(own.vectors[place], own.label[place], own.index[place], own.bits, junk)
        return cls(own, mine.nonzero()[:, 0], label, index, None if own.group is None else group, ranks)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def bits(self) -> int | None:
        """The width of the codes, None for float descriptors."""
        return self.own.bits

    @property
    def columns(self) -> int:
        """D for float descriptors, the number of bytes for codes."""
        return self.own.vectors.shape[1]

    @property
    def whole(self) -> Descriptors:
        """All descriptors, which this process holds.

        Raises:
            ValueError: If they are spread over several ranks.
        """
        if self.ranks.world > 1:
            raise ValueError(
                f"a measure needs all descriptors in one process, and they are spread over {self.ranks.world}: take it "
                "by `simsearch evaluate`"
            )
        return self.own

    def with_vectors(self, vectors: Tensor) -> Sharded:
        """The same items with other float vectors.

        Args:
            vectors: float32 (n, D), those of this rank.
        """
        own = self.own
        return replace(self, own=Descriptors(vectors, own.label, own.index, group=own.group))

    def rows(self, positions: Tensor) -> Tensor:
        """The vectors at some positions, (P, D), on every rank. Every rank must call.

        Args:
            positions: int64 (P,), positions in the whole.
        """
        return self.ranks.sum(self._of_mine(positions))

    def rows_on_first(self, positions: Tensor) -> Tensor | None:
        """The vectors at some positions, (P, D), on rank 0, None on the other ranks. Every rank must call.

        Args:
            positions: int64 (P,), positions in the whole.
        """
        return self.ranks.sum_on_first(self._of_mine(positions))

    def _of_mine(self, positions: Tensor) -> Tensor:
        """The vectors at `positions` that this rank holds, zeros elsewhere. Their sum over ranks holds all vectors."""
        if self.ranks.world == 1:
            return self.own.vectors[positions]
        vectors = self.own.vectors.new_zeros(len(positions), self.columns)
        here = torch.isin(positions, self.position)
        vectors[here] = self.own.vectors[torch.searchsorted(self.position, positions[here])]
        return vectors
