"""Ranking metrics of rankings with ties, in closed form.

A ranking is known by its relevant items. One whose score nobody shares is *alone* and has a rank.
Others form *groups* of equal score, whose order nothing decides: each metric is then the
expectation over all orders, which needs no tie-break and no luck. Average precision also has its
two ends: a group's relevant items last (pessimistic) or first (optimistic). A query without
relevant items has no value: NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TieOrder = Literal["expected", "pessimistic", "optimistic"]
Normaliser = Literal["min(R,k)", "R"]


@dataclass(frozen=True)
class Rankings:
    """Rankings of B queries by their relevant items.

    relevant: int64 (B,), R, the number of relevant items of each query.
    above: int64 (B, T), for the relevant items in order, best first, how many items rank above
    each; read only where `alone`, bool (B, T), says that its score is its own.
    query, at, size, hits_above, hits: int64 (E,), the tie groups that hold relevant items: whose
    ranking it is, how many items rank above the group, how many share its score, how many relevant
    items rank above it and how many are in it.
    """

    relevant: Tensor
    above: Tensor
    alone: Tensor
    query: Tensor
    at: Tensor
    size: Tensor
    hits_above: Tensor
    hits: Tensor

    def _sum(self, alone: Tensor, groups: Tensor) -> Tensor:
        """Sums over each query's items, float64 (B,): `alone` (B, t) by slot and `groups` (E,)."""
        total = torch.where(self.alone[:, : alone.shape[1]], alone, 0.0).sum(1, dtype=torch.float64)
        return total.index_add_(0, self.query, groups)

    def _per_query(self, value: Tensor) -> Tensor:
        return value.masked_fill(self.relevant == 0, torch.nan)


def harmonic_numbers(n: int) -> Tensor:
    """Harmonic numbers H(0) = 0, H(1) = 1, ..., H(n) as float64 (n + 1,)."""
    steps = torch.arange(n + 1, dtype=torch.float64)
    return torch.cat([steps[:1], (1.0 / steps[1:]).cumsum(0)])


def average_precision(
    ranking: Rankings,
    harmonic: Tensor,
    *,
    k: int | None = None,
    ties: TieOrder = "expected",
    normaliser: Normaliser = "R",
) -> Tensor:
    """Average precision of each query, float64 (B,), in [0, 1].

    With `k` only the first k ranks count and the sum of precisions is divided by `normaliser`:
    "min(R,k)", the best that k ranks can hold, or "R", all relevant items. `harmonic` is
    harmonic_numbers(G). Expected values as in McSherry and Najork (2008), "Computing information
    retrieval performance measures efficiently in the presence of tied scores": a group of n items,
    r of them relevant, below a items of which p are relevant, adds
    (r/n) [(p + 1 - c - c a)(H(a+m) - H(a)) + c m] with c = (r-1)/(n-1) and m = min(n, k - a).
    """
    above = ranking.above if k is None else ranking.above[:, :k]
    slots = torch.arange(1, above.shape[1] + 1, dtype=torch.float64)
    alone = slots / (above + 1)
    if k is not None:
        alone = torch.where(above < k, alone, 0.0)

    a, n, r = ranking.at, ranking.size, ranking.hits
    p = ranking.hits_above.double()
    end = a + n if k is None else torch.full_like(a, k)
    if ties == "expected":
        c = (r - 1).double() / (n - 1).clamp(min=1)
        m = torch.minimum(n, (end - a).clamp(min=0))
        groups = r.double() / n * ((p + 1 - c - c * a) * (harmonic[a + m] - harmonic[a]) + c * m)
    else:
        start = a + n - r if ties == "pessimistic" else a
        m = torch.minimum(r, (end - start).clamp(min=0))
        groups = m + (p - start) * (harmonic[start + m] - harmonic[start])
    ideal = ranking.relevant if k is None or normaliser == "R" else ranking.relevant.clamp(max=k)
    return ranking._per_query(ranking._sum(alone, groups) / ideal.clamp(min=1))


def _hits_within(ranking: Rankings, k: Tensor, slots: int) -> Tensor:
    """Expected number of relevant items within the first k (B,) ranks; no k is above `slots`."""
    alone = (ranking.above[:, :slots] < k[:, None]).double()
    taken = torch.minimum(ranking.size, (k[ranking.query] - ranking.at).clamp(min=0))
    return ranking._sum(alone, ranking.hits.double() * taken / ranking.size)


def precision_at(ranking: Rankings, k: int) -> Tensor:
    """Precision of the first k ranks, float64 (B,): relevant among them divided by k."""
    hits = _hits_within(ranking, torch.full_like(ranking.relevant, k), k)
    return ranking._per_query(hits / k)


def r_precision(ranking: Rankings) -> Tensor:
    """Precision of the first R ranks, R the query's own number of relevant items, float64 (B,)."""
    r = ranking.relevant
    return ranking._per_query(_hits_within(ranking, r, ranking.above.shape[1]) / r.clamp(min=1))


def hit_rate_at(ranking: Rankings, k: int) -> Tensor:
    """Probability that the first k ranks hold a relevant item (R@k), float64 (B,).

    For a group of n items, r relevant, that the first m of them hold none has the probability
    C(n - r, m) / C(n, m).
    """
    best = ranking.above[:, :1]
    hit = ranking._sum((best < k).double(), torch.zeros_like(ranking.at, dtype=torch.float64))
    first = ranking.hits_above == 0
    query, a, n, r = (x[first] for x in (ranking.query, ranking.at, ranking.size, ranking.hits))
    m = torch.minimum(n, (k - a).clamp(min=0))
    log_miss = (
        torch.lgamma((n - r + 1).double())
        + torch.lgamma((n - m + 1).double())
        - torch.lgamma((n - r - m + 1).clamp(min=1).double())
        - torch.lgamma((n + 1).double())
    )
    chance = torch.where(m > n - r, 1.0, -torch.expm1(log_miss)).masked_fill(m == 0, 0.0)
    return ranking._per_query(hit.index_add_(0, query, chance))


def ndcg_at(ranking: Rankings, k: int) -> Tensor:
    """NDCG of the first k ranks with gain 1 for relevant items, float64 (B,), in [0, 1].

    Discount 1 / log2(rank + 1) (Järvelin and Kekäläinen 2002); each item of a group takes the mean
    discount of the group's ranks.
    """
    ranks = torch.arange(k, dtype=torch.float64)
    discount = torch.cat([1.0 / torch.log2(ranks + 2), ranks.new_zeros(1)])
    summed = torch.cat([ranks.new_zeros(1), discount[:-1].cumsum(0)])
    alone = discount[ranking.above[:, :k].clamp(max=k)]
    start, stop = ranking.at.clamp(max=k), (ranking.at + ranking.size).clamp(max=k)
    groups = ranking.hits.double() * (summed[stop] - summed[start]) / ranking.size
    ideal = summed[ranking.relevant.clamp(min=1, max=k)]
    return ranking._per_query(ranking._sum(alone, groups) / ideal)
