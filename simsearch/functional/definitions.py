"""The mAP@k of different papers and programs, side by side for one ranking."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision_definitions(relevance: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """AP@k of each query by every definition in use: name -> float64 (Q,), NaN without relevant items.

    With S the sum, over the relevant items among the first k, of the precision at their ranks:

    - `AP@k_found`: S / how many were found, 0 where none was. Most hashing releases; a query that finds one
      item at rank 1 and misses all others scores 1.
    - `AP@k_found_only`: the same, but NaN where none was found, so that a mean that skips NaN is over the
      queries that found something, as releases do that leave the others out of the sum and of the count.
    - `AP@k_R`: S / R, all relevant items (TREC's cut-off). At most k / R.
    - `AP@k_minRk`: S / min(R, k), the best that k ranks can hold. This framework's headline at a cutoff.
    - `AP@k_trapezoid`: area under precision over recall by trapezoids, as Oxford Buildings' program: each found
      item adds the mean of the precision before and after it, the first precision being 1, divided by R.

    relevance: bool (Q, k), whether the item at each rank is relevant, best first; ranks beyond the end of a list
    are False. relevant: int64 (Q,), R, how many relevant items the gallery holds. Ties count as they stand.

    Raises ValueError for other shapes or dtypes, and where more is found than there is.
    """
    if relevance.ndim != 2 or relevance.dtype != torch.bool or relevance.shape[1] == 0:
        raise ValueError(f"relevance must be bool (Q, k), k >= 1, got {relevance.dtype} {tuple(relevance.shape)}")
    q, k = relevance.shape
    if relevant.shape != (q,) or relevant.dtype != torch.int64:
        raise ValueError(f"relevant must be int64 ({q},), got {relevant.dtype} {tuple(relevant.shape)}")
    hits = relevance.double().cumsum(1)
    found = hits[:, -1]
    if bool((found > relevant).any()):
        worst = int((found - relevant).argmax())
        raise ValueError(f"query {worst} found {int(found[worst])} relevant items of {int(relevant[worst])}")
    ranks = torch.arange(1, k + 1, dtype=torch.float64, device=relevance.device)
    right = relevance.double()
    summed = (hits / ranks * right).sum(1)
    # Before the item at rank r are hits - 1 relevant of r - 1 items; before the first rank precision is 1.
    before = torch.where(ranks == 1, 1.0, (hits - 1) / (ranks - 1).clamp(min=1))
    trapezoids = (0.5 * (before + hits / ranks) * right).sum(1)
    r = relevant.double()
    values = {
        f"AP@{k}_found": summed / found.clamp(min=1),
        f"AP@{k}_found_only": summed / found,
        f"AP@{k}_R": summed / r,
        f"AP@{k}_minRk": summed / r.clamp(max=k),
        f"AP@{k}_trapezoid": trapezoids / r,
    }
    return {name: value.masked_fill(relevant == 0, torch.nan) for name, value in values.items()}
