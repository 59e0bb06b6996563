"""Metrics of rankings with ties, in closed form.

A ranking is described by its relevant items. An item whose score no other item has is *alone* and has a rank. Items of
equal score form *groups*, whose order nothing decides. Each metric is then the expectation over all orders, which needs
no tie-break and no luck. Average precision also has its two ends: the relevant items of each group last (pessimistic)
or first (optimistic). A query without relevant items has no value: NaN.
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
    """The rankings of B queries, described by their relevant items.

    The E tie groups are those that hold relevant items.

    Attributes:
        relevant: int64 (B,), R, the number of relevant items of each query.
        above: int64 (B, T), the number of items that rank above each relevant item, best first. It is valid only where
            `alone` is True.
        alone: bool (B, T), whether no other item has the score of the relevant item.
        query: int64 (E,), the query of each group.
        at: int64 (E,), the number of items above the group.
        size: int64 (E,), the number of items in the group.
        hits_above: int64 (E,), the number of relevant items above the group.
        hits: int64 (E,), the number of relevant items in the group.
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
    """The harmonic numbers H(0) = 0, H(1) = 1, ..., H(n), float64 (n + 1,).

    Args:
        n: The last index.

    Example:
        >>> harmonic_numbers(2)
        tensor([0.0000, 1.0000, 1.5000], dtype=torch.float64)
    """
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
    """The average precision of each query, float64 (B,) in [0, 1].

    With `k` only the first k ranks count. In expectation over the orders of ties, a group of n items, r of them
    relevant, below a items of which p are relevant, adds (r/n) [(p + 1 - c - c a)(H(a+m) - H(a)) + c m] with c =
    (r-1)/(n-1) and m = min(n, k - a).

    Args:
        ranking: Rankings of B queries.
        harmonic: float64 (G + 1,), `harmonic_numbers(G)` of the gallery's size.
        k: The cutoff, None for the whole ranking.
        ties: "expected" for the expectation; "pessimistic" or "optimistic" for the relevant items of each group last or
            first.
        normaliser: The divisor of the sum of precisions with `k`: "min(R,k)", the best possible sum in k ranks, or "R",
            all relevant items.

    Returns:
        One value per query, NaN for a query without relevant items.

    Source:
        McSherry, Najork: Computing information retrieval performance measures efficiently in the presence of tied
        scores. ECIR 2008.

    Example:
        >>> none, zero, one, two = torch.zeros(1, 0), torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        >>> tied = Rankings(one, none.long(), none.bool(), zero, zero, two, zero, one)  # a right and a wrong item tie
        >>> average_precision(tied, harmonic_numbers(2))  # the mean of 1 and 1/2
        tensor([0.7500], dtype=torch.float64)
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
    """The expected number of relevant items within the first k (B,) ranks; no k is above `slots`."""
    alone = (ranking.above[:, :slots] < k[:, None]).double()
    taken = torch.minimum(ranking.size, (k[ranking.query] - ranking.at).clamp(min=0))
    return ranking._sum(alone, ranking.hits.double() * taken / ranking.size)


def precision_at(ranking: Rankings, k: int) -> Tensor:
    """The precision of the first k ranks, float64 (B,): the relevant items among them divided by k.

    Args:
        ranking: Rankings of B queries.
        k: The cutoff, 1 or more.

    Returns:
        One value per query, NaN for a query without relevant items.

    Example:
        >>> none, zero, one, two = torch.zeros(1, 0), torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        >>> tied = Rankings(one, none.long(), none.bool(), zero, zero, two, zero, one)  # a right and a wrong item tie
        >>> precision_at(tied, k=1)
        tensor([0.5000], dtype=torch.float64)
    """
    hits = _hits_within(ranking, torch.full_like(ranking.relevant, k), k)
    return ranking._per_query(hits / k)


def r_precision(ranking: Rankings) -> Tensor:
    """The precision of the first R ranks, float64 (B,), where R is the query's own number of relevant items.

    Args:
        ranking: Rankings of B queries.

    Returns:
        One value per query, NaN for a query without relevant items.

    Example:
        >>> none, zero, one, two = torch.zeros(1, 0), torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        >>> tied = Rankings(one, none.long(), none.bool(), zero, zero, two, zero, one)  # a right and a wrong item tie
        >>> r_precision(tied)
        tensor([0.5000], dtype=torch.float64)
    """
    r = ranking.relevant
    return ranking._per_query(_hits_within(ranking, r, ranking.above.shape[1]) / r.clamp(min=1))


def hit_rate_at(ranking: Rankings, k: int) -> Tensor:
    """The probability that the first k ranks hold a relevant item (R@k), float64 (B,).

    The first m items of a group of n items, r of them relevant, hold no relevant item with the probability C(n - r, m)
    / C(n, m).

    Args:
        ranking: Rankings of B queries.
        k: The cutoff, 1 or more.

    Returns:
        One value per query, NaN for a query without relevant items.

    Example:
        >>> none, zero, one, two = torch.zeros(1, 0), torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        >>> tied = Rankings(one, none.long(), none.bool(), zero, zero, two, zero, one)  # a right and a wrong item tie
        >>> hit_rate_at(tied, k=1)
        tensor([0.5000], dtype=torch.float64)
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
    """The NDCG of the first k ranks with gain 1 for relevant items, float64 (B,) in [0, 1].

    The discount is 1 / log2(rank + 1) (Järvelin and Kekäläinen 2002). Each item of a group gets the mean discount of
    the group's ranks.

    Args:
        ranking: Rankings of B queries.
        k: The cutoff, 1 or more.

    Returns:
        One value per query, NaN for a query without relevant items.

    Example:
        >>> none, zero, one, two = torch.zeros(1, 0), torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        >>> tied = Rankings(one, none.long(), none.bool(), zero, zero, two, zero, one)  # a right and a wrong item tie
        >>> ndcg_at(tied, k=2)  # the mean of 1 and 1 / log2(3)
        tensor([0.8155], dtype=torch.float64)
    """
    ranks = torch.arange(k, dtype=torch.float64)
    discount = torch.cat([1.0 / torch.log2(ranks + 2), ranks.new_zeros(1)])
    summed = torch.cat([ranks.new_zeros(1), discount[:-1].cumsum(0)])
    alone = discount[ranking.above[:, :k].clamp(max=k)]
    start, stop = ranking.at.clamp(max=k), (ranking.at + ranking.size).clamp(max=k)
    groups = ranking.hits.double() * (summed[stop] - summed[start]) / ranking.size
    ideal = summed[ranking.relevant.clamp(min=1, max=k)]
    return ranking._per_query(ranking._sum(alone, groups) / ideal)
