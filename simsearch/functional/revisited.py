"""Retrieval with easy, hard and junk items, as the Revisited Oxford and Paris benchmarks measure it.

Radenović, Iscen, Tolias, Avrithis, Chum: Revisiting Oxford and Paris, CVPR 2018. Each query lists the gallery
items that are easy, hard or junk to it; all others are wrong. A setup says which of the listed are right, and
takes the other listed ones out of the ranking.
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
    """`<setup>/AP` and `<setup>/P@k` of each query under easy, medium and hard: name -> float64 (Q,).

    NaN where the setup has nothing right for a query: the benchmark leaves such queries out of its means.
    query: float32 (Q, D), gallery: float32 (G, D), compared by inner product. easy, hard, junk: for each query
    gallery positions, no position twice. AP is `trapezoid_average_precision`, P@k `precision_at_cutoff`. The query's
    own image is taken for no part of the gallery; where it is one, list it as junk. Peak memory beyond the
    descriptors is about `block_bytes`.

    Raises ValueError for other shapes, NaN or infinity, an empty gallery or no queries, positions outside the
    gallery or listed twice, and a k below 1.
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

    ranks: int64 (R,) with R > 0, ascending from 0, of all that is right. Each right item is worth the mean of
    the precision just before it (1 at rank 0) and the precision with it. Never above the usual average
    precision, which takes the latter alone.
    """
    found = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, found / np.maximum(ranks, 1))
    return float(np.mean((before + (found + 1) / (ranks + 1)) / 2))


def precision_at_cutoff(ranks: np.ndarray, k: int) -> float:
    """The share of right items among the first k, or down to the last right one where that comes earlier.

    ranks: int64 (R,) with R > 0, ascending from 0, of all that is right. With k clipped so, a perfect ranking
    of few right items scores 1.
    """
    depth = min(int(ranks[-1]) + 1, k)
    return float(np.searchsorted(ranks, depth)) / depth


def ranks_without(ranks: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """`ranks` (R,), ascending, as they are once the items at the ranks `ignored` (I,) are taken out."""
    ranks = np.sort(ranks)
    return ranks - np.searchsorted(np.sort(ignored), ranks)


def listed_ranks(
    query: Tensor, gallery: Tensor, listed: Sequence[np.ndarray], *, block_bytes: int = BLOCK_BYTES
) -> list[np.ndarray]:
    """For each query the ranks, int64 (L,) from 0, that its listed gallery positions (L,) have.

    Ranked by inner product, equal scores by gallery position: what a stable argsort of the negative scores
    gives. (The benchmark's own script sorts unstably, so that its ties fall as they like.) No Q x G matrix and
    no full ranking exist: a block of scores is sorted by value, and searched for the listed scores.

    query: float32 (Q, D), gallery: float32 (G, D). Raises ValueError as `measure_revisited` does.
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
            raise ValueError(f"query {q} lists a gallery position twice: each is easy, hard or junk")
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
