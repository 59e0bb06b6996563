"""Graded relevance of artworks, and NDCG by it.

Columns of an item are int64 (4,): its work, artist, style and period, each a number, -1 where unknown; unknown
values equal nothing. A level is 3 for the same work, else 2 for the same artist, else 1 for the same style and the
same period, else 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = ("work", "artist", "style", "period")
_SAME = {3: (0,), 2: (1,), 1: (2, 3)}  # level -> what must be the same


def graded_relevance(query: Tensor, item: Tensor) -> Tensor:
    """Levels 0 to 3, int64 (...), of columns int64 (..., 4) that broadcast, such as (Q, 1, 4) and (Q, K, 4).

    Raises ValueError for a last dimension other than 4.
    """
    _check_columns(query, item)
    same = (query == item) & (query >= 0)
    level = same.new_zeros(same.shape[:-1], dtype=torch.int64)
    for value in sorted(_SAME):
        level = torch.where(same[..., list(_SAME[value])].all(-1), value, level)
    return level


def count_levels(query: Tensor, gallery: Tensor, *, exclude_self: bool = False) -> Tensor:
    """How many gallery items have each level 0 to 3 for each query, int64 (Q, 4).

    query: int64 (Q, 4), gallery: int64 (G, 4). exclude_self: the gallery holds each query's own item, which does
    not count. By counting equal columns (inclusion and exclusion), not pairs: no Q x G matrix.

    Raises ValueError for other shapes.
    """
    if query.ndim != 2 or gallery.ndim != 2:
        raise ValueError(f"columns must be (Q, 4) and (G, 4), got {tuple(query.shape)} and {tuple(gallery.shape)}")
    _check_columns(query, gallery)

    def same(*columns: int) -> Tensor:
        return _count_equal(query[:, columns], gallery[:, columns])

    work, artist, both = same(0), same(1), same(0, 1)
    period = same(2, 3) - same(0, 2, 3) - same(1, 2, 3) + same(0, 1, 2, 3)
    counts = torch.stack([len(gallery) - (work + artist - both) - period, period, artist - both, work], dim=1)
    if exclude_self:
        counts -= torch.nn.functional.one_hot(graded_relevance(query, query), 4)
    return counts


def ndcg_graded(level: Tensor, counts: Tensor) -> Tensor:
    """NDCG of the first K ranks, float64 (Q,), in [0, 1]; NaN where no item of the gallery has a level above 0.

    level: int64 (Q, K), of the ranked items, best first, 0 where a list is shorter. counts: int64 (Q, L), how many
    items of a query's whole gallery have each level 0..L-1: the ideal ranking is by falling level. Gain 2^level - 1,
    discount 1 / log2(rank + 1) from rank 1 (Järvelin and Kekäläinen 2002; the gain of Burges et al. 2005).

    Raises ValueError for other shapes, levels outside 0..L-1 and rankings with more items of a level or above than
    the gallery has.
    """
    if level.ndim != 2 or counts.ndim != 2 or len(level) != len(counts):
        raise ValueError(f"level and counts must be (Q, K) and (Q, L), got {tuple(level.shape)}, {tuple(counts.shape)}")
    k, levels = level.shape[1], counts.shape[1]
    if level.numel() and not 0 <= int(level.min()) <= int(level.max()) < levels:
        raise ValueError(f"levels must lie in 0..{levels - 1}, got {int(level.min())}..{int(level.max())}")
    at_least = counts.flip(1).cumsum(1).flip(1)[:, 1:]  # (Q, L - 1), items of level 1, 2, ... or above
    places = torch.arange(k)
    ideal = torch.zeros_like(level)
    for wanted in range(1, levels):
        if ((level >= wanted).sum(1) > at_least[:, wanted - 1]).any():
            raise ValueError(f"a ranking holds more items of level {wanted} or above than its gallery: count them all")
        ideal += places < at_least[:, wanted - 1 : wanted]
    discount = 1.0 / torch.log2(places.double() + 2)
    gained, best = ((2.0 ** values.double() - 1) @ discount for values in (level, ideal))
    return gained / best


def _count_equal(query: Tensor, gallery: Tensor) -> Tensor:
    """How many rows of gallery (G, C) equal each row of query (Q, C), int64 (Q,); 0 where one is unknown."""
    different, row = torch.cat([gallery, query]).unique(dim=0, return_inverse=True)
    counts = row[: len(gallery)].bincount(minlength=len(different))
    return counts[row[len(gallery) :]].masked_fill((query < 0).any(1), 0)


def _check_columns(*columns: Tensor) -> None:
    for part in columns:
        if part.shape[-1:] != (len(COLUMNS),):
            raise ValueError(f"columns must be (..., 4): {', '.join(COLUMNS)}; got {tuple(part.shape)}")
