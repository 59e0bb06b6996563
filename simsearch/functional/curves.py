"""Precision against recall: the mean over queries, exact under ties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simsearch.functional.ranking import rank
from simsearch.functional.sharded import Sharded
from simsearch.functional.ties import Rankings
from simsearch.types import Descriptors

RECALL_LEVELS = tuple(level / 20 for level in range(21))


def precision_at_recall(ranking: Rankings, level: float) -> Tensor:
    """The precision of each query at the rank where a share `level` of its relevant items is found, float64 (B,).

    The value is t / depth with t = ceil(level R), at least 1. The depth is the rank of the t-th relevant item. Consider
    a tie group of n items, r of them relevant, below a items of which p are relevant. For a t-th item inside the group,
    the depth is a + n (t - p) / r, after which t items are found in expectation.

    Precision is not interpolated: without ties, the mean over t = 1..R is the query's AP.

    Args:
        ranking: Rankings of B queries.
        level: Recall in 0..1.

    Returns:
        One precision per query, NaN for a query without relevant items.

    Example:
        >>> query = Descriptors(torch.ones(1, 1), torch.tensor([0]), torch.tensor([9]))
        >>> gallery = Descriptors(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> precision_at_recall(next(rank(query, gallery)), level=1.0)  # both relevant items are among 3
        tensor([0.6667], dtype=torch.float64)
    """
    t = (level * ranking.relevant.double() - 1e-9).ceil().clamp(min=1)  # level * R may round up
    depth = torch.full_like(t, torch.nan)
    if ranking.above.shape[1]:
        slot = (t.long() - 1).clamp(max=ranking.above.shape[1] - 1)[:, None]
        alone = ranking.alone.gather(1, slot)[:, 0] & (ranking.relevant > 0)
        depth[alone] = ranking.above.gather(1, slot)[alone, 0].double() + 1
    wanted = t[ranking.query] - ranking.hits_above
    here = (wanted > 0) & (wanted <= ranking.hits)
    depth[ranking.query[here]] = (ranking.at + ranking.size * wanted / ranking.hits)[here]
    return t / depth


def precision_recall_curve(
    query: Descriptors | Sharded,
    gallery: Descriptors | Sharded,
    *,
    levels: Sequence[float] = RECALL_LEVELS,
    exclude_self: bool = False,
) -> Tensor:
    """The mean precision at some levels of recall over all queries with relevant items, float64 (L,).

    The rankings are streamed in blocks of queries. Where query or gallery are spread over ranks, every rank must call,
    and each gets the curve of all queries.

    Args:
        query: Q queries.
        gallery: G gallery items.
        levels: L levels of recall in 0..1.
        exclude_self: Take each query's own collection row out of its ranking.

    Returns:
        One precision per level, NaN where no query has relevant items.

    Raises:
        ValueError: If the gallery is empty, or if query and gallery differ in width or kind.

    Example:
        >>> query = Descriptors(torch.ones(1, 1), torch.tensor([0]), torch.tensor([9]))
        >>> gallery = Descriptors(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> precision_recall_curve(query, gallery, levels=(0.5, 1.0))
        tensor([1.0000, 0.6667], dtype=torch.float64)
    """
    total, count = torch.zeros(len(levels), dtype=torch.float64), 0
    for ranking in rank(query, gallery, exclude_self=exclude_self):
        total += torch.stack([precision_at_recall(ranking, level).nansum() for level in levels])
        count += int((ranking.relevant > 0).sum())
    return total / count
