"""Rows of all ranks, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from simsearch.functional.collectives import world_size


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (B, ...) of every rank as (world * B, ...) in rank order; equal on all ranks.

    The gradient of a row is the sum of the gradients that it has on each rank. Where every rank computes
    the same loss of all rows and gradients of parameters are then averaged over ranks (as DDP does),
    the result is the gradient of one batch of all rows. One process: the rows themselves.

    Raises ValueError where ranks differ in their number of rows.
    """
    if (world := world_size()) == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    if len({int(size) for size in sizes}) > 1:
        counts = [int(size) for size in sizes]
        raise ValueError(f"ranks have batches of {counts} items: drop incomplete batches to gather them")
    if rows.is_floating_point():
        return torch.cat(all_gather(rows.contiguous()))
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
