"""Retrieval with easy, hard and junk items, as in the Revisited Oxford and Paris benchmarks.

Each query lists the gallery items that are easy, hard or junk to it; all other items are wrong. A setup says which of
the listed items are right, and takes the other listed items out of the ranking.

Radenović, Iscen, Tolias, Avrithis, Chum: Revisiting Oxford and Paris. CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simsearch.functional.ranking import inner_products
from simsearch.types import check_vectors

GRADES = ("easy", "hard", "junk")
SETUPS = {
    "easy": ("easy",),
    "medium": ("easy", "hard"),
    "hard": ("hard",),
}  # the right grades; the other grades are ignored
BLOCK_BYTES = 2**27

Lists = Sequence[Sequence[int]]


def measure_revisited(
    query: Tensor,
    gallery: Tensor,
    easy: Lists,
    hard: Lists,
    junk: Lists,
    *,
    ks: Sequence[int] = (1, 5, 10),
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Tensor]:
    """The metrics of each query under the setups easy, medium and hard: name -> float64 (Q,).

    Memory beyond the descriptors peaks at about `block_bytes`.

    Args:
        query: float32 (Q, D).
        gallery: float32 (G, D), compared with the queries by inner product. A query's own image is not taken for a part
            of the gallery. Where it is one, list it as junk.
        easy: Gallery positions that are easy, for each query. No position may be listed twice for a query.
        hard: Gallery positions that are hard, for each query.
        junk: Gallery positions that are junk, for each query.
        ks: Cutoffs k, 1 or more.
        block_bytes: Memory for a block.

    Returns:
        `<setup>/AP`, the `trapezoid_average_precision`, and `<setup>/P@k`, the `precision_at_cutoff`. Values are NaN
            where the setup has nothing right for a query; the benchmark leaves such queries out of its means.

    Raises:
        ValueError: If a shape is wrong, if a vector holds NaN or infinity, if there are no queries or no gallery, if a
            position lies outside the gallery or is listed twice, or if a k is below 1.

    Example:
        >>> query, gallery = torch.ones(1, 1), torch.tensor([[3.0], [2.0], [1.0]])
        >>> measured = measure_revisited(query, gallery, easy=[[0]], hard=[[2]], junk=[[1]], ks=(1,))
        >>> measured["medium/AP"], measured["hard/P@1"]  # junk and the other grades are taken out
        (tensor([1.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    for k in ks:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
    for grade, lists in zip(GRADES, (easy, hard, junk), strict=True):
        if len(lists) != len(query):
            raise ValueError(f"there are {len(query)} queries and {len(lists)} lists of {grade} items")
    listed = [
        np.concatenate([np.asarray(part, np.int64) for part in parts]) for parts in zip(easy, hard, junk, strict=True)
    ]
    # listed_ranks gives them in this order.
    bounds = [np.cumsum([len(part) for part in parts])[:2] for parts in zip(easy, hard, junk, strict=True)]
    names = [f"{setup}/{metric}" for setup in SETUPS for metric in ("AP", *(f"P@{k}" for k in ks))]
    values = {name: torch.full((len(query),), torch.nan, dtype=torch.float64) for name in names}
    for q, ranks in enumerate(listed_ranks(query, gallery, listed, block_bytes=block_bytes)):
        graded = dict(zip(GRADES, np.split(ranks, bounds[q]), strict=True))
        for setup, right in SETUPS.items():
            positive = np.concatenate([graded[grade] for grade in right])
            ignored = np.concatenate([graded[grade] for grade in GRADES if grade not in right])
            if len(positive) == 0:
                continue
            positive = ranks_without(positive, ignored)
            values[f"{setup}/AP"][q] = trapezoid_average_precision(positive)
            for k in ks:
                values[f"{setup}/P@{k}"][q] = precision_at_cutoff(positive, k)
    return values


def trapezoid_average_precision(ranks: np.ndarray) -> float:
    """The area under the precision-recall curve by trapezoids, in (0, 1].

    Each right item adds the mean of the precision just before it (1 at rank 0) and the precision with it. The value is
    never above the usual average precision, which uses the latter alone.

    Args:
        ranks: int64 (R,), R > 0, the ranks of all right items, ascending from 0.

    Example:
        >>> round(trapezoid_average_precision(np.array([0, 2])), 4)  # the mean of (1 + 1) / 2 and (1/2 + 2/3) / 2
        0.7917
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float(np.mean((before + (found + 1) / (ranks + 1)) / 2))


def precision_at_cutoff(ranks: np.ndarray, k: int) -> float:
    """The share of right items among the first k ranks, or down to the last right item where that comes earlier.

    With this smaller cutoff a perfect ranking of few right items scores 1.

    Args:
        ranks: int64 (R,), R > 0, the ranks of all right items, ascending from 0.
        k: The cutoff, 1 or more.

    Example:
        >>> round(precision_at_cutoff(np.array([0, 2]), k=10), 4)  # 2 of the first 3
        0.6667
    """
    depth = min(int(ranks[-1]) + 1, k)
    return float(np.searchsorted(ranks, depth)) / depth


def ranks_without(ranks: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """The ranks that some items have once other items are taken out of the ranking, (R,), ascending.

    Args:
        ranks: int64 (R,), ranks of the items that stay.
        ignored: int64 (I,), ranks of the items that are taken out.

    Example:
        >>> ranks_without(np.array([0, 2]), np.array([1])).tolist()
        [0, 1]
    """
    ranks = np.sort(ranks)
    return ranks - np.searchsorted(np.sort(ignored), ranks)


def listed_ranks(
    query: Tensor, gallery: Tensor, listed: Sequence[np.ndarray], *, block_bytes: int = BLOCK_BYTES
) -> list[np.ndarray]:
    """The ranks of each query's listed gallery items, int64 (L,) from 0 per query.

    Items are ranked by inner product. Equal scores are ordered by gallery position, as in a stable argsort of the
    negative scores. (The benchmark's own script sorts unstably, so that its ties fall at random.)

    There is no Q x G matrix and no full ranking: a block of scores is sorted by value and searched for the listed
    scores.

    Args:
        query: float32 (Q, D).
        gallery: float32 (G, D).
        listed: Gallery positions int64 (L,), one array per query.
        block_bytes: Memory for a block.

    Raises:
        ValueError: As `measure_revisited` does.

    Example:
        >>> ranks = listed_ranks(torch.ones(1, 1), torch.tensor([[1.0], [3.0], [2.0]]), [np.array([0, 2])])
        >>> ranks[0].tolist()
        [2, 1]
    """
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query and gallery must be (Q, D) and (G, D), got {tuple(query.shape)} and {tuple(gallery.shape)}"
        )
    g = len(gallery)
    if len(query) == 0 or g == 0:
        raise ValueError(f"there is nothing to rank: {len(query)} queries, {g} gallery items")
    for name, vectors in (("query", query), ("gallery", gallery)):
        check_vectors(f"{name} descriptors", vectors)
    for q, positions in enumerate(listed):
        if len(positions) and not 0 <= positions.min() <= positions.max() < g:
            wrong = positions[(positions < 0) | (positions >= g)][0]
            raise ValueError(f"query {q} lists gallery position {wrong}: there are {g}, from 0")
        if len(np.unique(positions)) < len(positions):
            raise ValueError(f"query {q} lists a gallery position twice: list it once, as easy, hard or junk")
    step = max(1, block_bytes // (8 * g))
    ranks = []
    for start in range(0, len(query), step):
        scores = inner_products(query[start : start + step], gallery).numpy()
        ranks += [_ranks_in(row, positions) for row, positions in zip(scores, listed[start:], strict=False)]
    return ranks


def _ranks_in(scores: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Ranks int64 (L,) of the positions `listed` (L,) by scores (G,), equal scores by position."""
    wanted, group = np.unique(scores[listed], return_inverse=True)
    ordered = np.sort(scores)
    up_to = np.searchsorted(ordered, wanted, "right")
    ranks = (len(scores) - up_to)[group]
    for tie in np.flatnonzero(up_to - np.searchsorted(ordered, wanted) > 1):
        members = group == tie
        ranks[members] += np.searchsorted(np.flatnonzero(scores == wanted[tie]), listed[members])
    return ranks
