"""Precision against recall, the mean over queries, exact under ties."""

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
    """Precision where `level` (0 to 1) of a query's relevant items are found, float64 (B,), NaN without any.

    That is t / depth with t = ceil(level R), at least 1. depth: the rank of the t-th relevant item; for one inside
    a tie group of n items, r of them relevant, below a items of which p are relevant, the a + n (t - p) / r items
    after which t are found in expectation. Not interpolated: without ties the mean over t = 1..R is the query's AP.
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
    """Mean precision at levels of recall, float64 (L,), over the queries with relevant items; NaN for none.

    Streamed over blocks of queries. Where query or gallery are spread over ranks, every rank must call, and gets
    the curve of all.
    """
    total, count = torch.zeros(len(levels), dtype=torch.float64), 0
    for ranking in rank(query, gallery, exclude_self=exclude_self):
        total += torch.stack([precision_at_recall(ranking, level).nansum() for level in levels])
        count += int((ranking.relevant > 0).sum())
    return total / count
