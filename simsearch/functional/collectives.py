"""What the ranks hold, together. Every rank must call; in one process nothing happens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank in the default group and the number of its processes; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def world_size() -> int:
    """The number of processes of the default group, 1 without one."""
    return rank_and_world()[1]


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor over ranks, equal on all, where the tensor lies; `device` is that of the collectives."""
    if world_size() == 1:
        return values
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def gather_batches(batches: Sequence[Tensor], width: int) -> Tensor:
    """The rows (B, width) of all batches of all ranks on the CPU, equal on all: batch by batch, each in rank order.

    So rows that a sampler dealt out to the ranks come in the order in which one process would have had them. Ranks
    may differ in the number of batches and their rows, and may have none.
    """
    ranks: list[list[Tensor]] = [[batch.cpu() for batch in batches]]
    if world_size() > 1:
        own, ranks = ranks[0], [[]] * world_size()
        dist.all_gather_object(ranks, own)
    empty = torch.empty(0, width)
    return torch.cat([empty, *chain.from_iterable(zip_longest(*ranks, fillvalue=empty))])


def from_first_rank(values: Tensor) -> Tensor:
    """The tensor of rank 0, on every rank: where rounding may differ between machines, one decides for all."""
    if world_size() > 1:
        dist.broadcast(values, src=0)
    return values
