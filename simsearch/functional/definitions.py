"""The definitions of mAP@k in papers and programs, side by side for one ranking."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision_definitions(relevance: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """The AP@k of each query by every definition in use: name -> float64 (Q,).

    Let S be the sum, over the relevant items among the first k, of the precision at their ranks.

    - `AP@k_found`: S / the number of relevant items found, 0 where none is found. Most hashing releases use it. A query
      that finds one item at rank 1 and misses all others scores 1.
    - `AP@k_found_only`: the same, but NaN where none is found. A mean that skips NaN is then over the queries that
      found something, as in releases that leave the other queries out of the sum and of the count.
    - `AP@k_R`: S / R with all R relevant items, the cutoff of TREC. It is at most k / R.
    - `AP@k_minRk`: S / min(R, k), the best possible sum in k ranks. This framework reports it first at a cutoff.
    - `AP@k_trapezoid`: the area under the precision-recall curve by trapezoids, as in the program of Oxford Buildings.
      Each found item adds the mean of the precision before and after it, where the first precision is 1. The sum is
      divided by R.

    The relevance is taken as it stands: ties are not resolved.

    Args:
        relevance: bool (Q, k), whether the item at each rank is relevant, best rank first. Ranks beyond the end of a
            list are False.
        relevant: int64 (Q,), R, the number of relevant items in the gallery.

    Returns:
        One tensor per name. Values are NaN for queries without relevant items.

    Raises:
        ValueError: If a shape or dtype is wrong, or if a query finds more relevant items than there are.

    Example:
        >>> relevance, relevant = torch.tensor([[True, False, True]]), torch.tensor([4])
        >>> for name, value in average_precision_definitions(relevance, relevant).items():
        ...     print(name, round(value.item(), 3))
        AP@3_found 0.833
        AP@3_found_only 0.833
        AP@3_R 0.417
        AP@3_minRk 0.556
        AP@3_trapezoid 0.396
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
