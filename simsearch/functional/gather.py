"""The rows of all ranks, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from simsearch.functional.collectives import world_size


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of every rank in rank order, (world * B, ...), equal on all ranks.

    The gradient of a row is the sum of its gradients on all ranks. Suppose every rank computes the same loss of all
    rows, and the gradients of the parameters are then averaged over ranks, as DDP does. The result is then the gradient
    of one batch with all rows. With one process the rows are returned as they are.

    Args:
        rows: (B, ...), with the same B on all ranks.

    Raises:
        ValueError: If ranks differ in their number of rows.

    Example:
        >>> gather_rows(torch.tensor([[1.0], [2.0]]))
        tensor([[1.],
                [2.]])
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
