"""Collectives over all ranks. Every rank must call them. With one process they do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """The rank of this process in the default group and the number of processes; (0, 1) without a group.

    Example:
        >>> rank_and_world()
        (0, 1)
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def world_size() -> int:
    """The number of processes in the default group; 1 without a group.

    Example:
        >>> world_size()
        1
    """
    return rank_and_world()[1]


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor over all ranks, equal on all ranks. It lies on the device of the input.

    Args:
        values: A tensor of one shape and dtype on all ranks.
        device: Device of the collectives, a GPU for NCCL.

    Example:
        >>> sum_over_ranks(torch.tensor([1.0, 2.0]), torch.device("cpu"))
        tensor([1., 2.])
    """
    if world_size() == 1:
        return values
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def gather_batches(batches: Sequence[Tensor], width: int) -> Tensor:
    """The rows of all batches of all ranks, (N, width), on the CPU and equal on all ranks.

    The first batches of all ranks come first, in rank order, then the second batches, and so on. Rows that a sampler
    has distributed over the ranks therefore come in the order that one process would give. Ranks may differ in the
    number and the size of their batches, and may have none.

    Args:
        batches: The batches of this rank, each (B, width).
        width: Number of columns, which a rank without batches needs.

    Example:
        >>> gather_batches([torch.ones(2, 1), torch.zeros(1, 1)], width=1).flatten()
        tensor([1., 1., 0.])
    """
    ranks: list[list[Tensor]] = [[batch.cpu() for batch in batches]]
    if world_size() > 1:
        own, ranks = ranks[0], [[]] * world_size()
        dist.all_gather_object(ranks, own)
    empty = torch.empty(0, width)
    return torch.cat([empty, *chain.from_iterable(zip_longest(*ranks, fillvalue=empty))])


def from_first_rank(values: Tensor) -> Tensor:
    """The tensor of rank 0, on every rank.

    Rounding may differ between machines. Where all ranks must agree on a value, rank 0 decides.

    Args:
        values: A tensor of one shape and dtype on all ranks. It is overwritten on the ranks above 0.

    Example:
        >>> from_first_rank(torch.tensor([3]))
        tensor([3])
    """
    if world_size() > 1:
        dist.broadcast(values, src=0)
    return values
