"""Graded relevance of artworks, and NDCG with it.

The columns of an item are int64 (4,): the numbers of its work, artist, style and period, -1 where unknown. An unknown
value equals nothing. The level of an item is 3 for the same work, else 2 for the same artist, else 1 for the same style
and the same period, else 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = ("work", "artist", "style", "period")
_SAME = {3: (0,), 2: (1,), 1: (2, 3)}  # level -> what must be the same


def graded_relevance(query: Tensor, item: Tensor) -> Tensor:
    """The levels 0 to 3 of items for queries, int64 (...).

    Args:
        query: int64 (..., 4), columns that broadcast with `item`, such as (Q, 1, 4).
        item: int64 (..., 4), columns, such as (Q, K, 4).

    Raises:
        ValueError: If a last dimension is not 4.

    Example:
        >>> graded_relevance(torch.tensor([1, 1, 1, 1]), torch.tensor([[1, 1, 1, 1], [2, 1, 5, 5], [3, 2, 1, 1]]))
        tensor([3, 2, 1])
    """
    _check_columns(query, item)
    same = (query == item) & (query >= 0)
    level = same.new_zeros(same.shape[:-1], dtype=torch.int64)
    for value in sorted(_SAME):
        level = torch.where(same[..., list(_SAME[value])].all(-1), value, level)
    return level


def count_levels(query: Tensor, gallery: Tensor, *, exclude_self: bool = False) -> Tensor:
    """The number of gallery items of each level 0 to 3 for each query, int64 (Q, 4).

    Equal columns are counted by inclusion and exclusion, not pair by pair: no Q x G matrix exists.

    Args:
        query: int64 (Q, 4), columns.
        gallery: int64 (G, 4), columns.
        exclude_self: The gallery holds each query's own item, which does not count.

    Raises:
        ValueError: If a shape is wrong.

    Example:
        >>> gallery = torch.tensor([[1, 1, 1, 1], [2, 1, 5, 5], [3, 2, 1, 1], [4, 3, 1, 5]])
        >>> count_levels(gallery[:1], gallery)
        tensor([[1, 1, 1, 1]])
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
    """The NDCG of the first K ranks, float64 (Q,) in [0, 1].

    The gain is 2^level - 1 (Burges et al. 2005) and the discount 1 / log2(rank + 1) from rank 1 (Järvelin and
    Kekäläinen 2002). The ideal ranking orders the whole gallery by descending level.

    Args:
        level: int64 (Q, K), levels of the ranked items, best rank first, 0 where a list is shorter.
        counts: int64 (Q, L), the number of items of each level 0..L-1 in the whole gallery.

    Returns:
        One value per query, NaN where no item of the gallery has a level above 0.

    Raises:
        ValueError: If a shape is wrong, if a level lies outside 0..L-1, or if a ranking holds more items of a level or
            above than the gallery.

    Example:
        >>> ndcg_graded(level=torch.tensor([[0, 3]]), counts=torch.tensor([[1, 0, 0, 1]]))  # 1 / log2(3)
        tensor([0.6309], dtype=torch.float64)
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
            raise ValueError(
                f"a ranking holds more items of level {wanted} or above than counts states: count all of the gallery"
            )
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
