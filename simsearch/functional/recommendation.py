"""Measures of recommendation lists: the share of a collection that they show, and how similar their items are.

Lists are ids int64 (Q, K), positions of N items, -1 where a list is shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 2**27


def exposure(ids: Tensor, items: int) -> Tensor:
    """The number of times that each item is recommended, int64 (N,).

    Args:
        ids: int64 (Q, K), -1 for no item.
        items: N, the number of items.

    Raises:
        ValueError: If the ids are not int64 (Q, K), or if one lies outside -1..N-1.

    Example:
        >>> exposure(torch.tensor([[0, 1], [0, -1]]), items=3)
        tensor([2, 1, 0])
    """
    _check_ids(ids, items)
    return torch.bincount(ids[ids >= 0], minlength=items)


def coverage(counts: Tensor) -> float:
    """The share of the items that are recommended at least once, in [0, 1].

    Args:
        counts: int64 (N,), from `exposure`.

    Raises:
        ValueError: If nothing is recommended.

    Example:
        >>> coverage(torch.tensor([3, 1, 0, 0]))
        0.5
    """
    _check_counts(counts)
    return float((counts > 0).double().mean())


def gini(counts: Tensor) -> float:
    """The Gini coefficient of the exposure, from 0 (all items equally often) to 1 - 1 / N (always the same item).

    Args:
        counts: int64 (N,), from `exposure`.

    Raises:
        ValueError: If nothing is recommended.

    Example:
        >>> gini(torch.tensor([3, 0, 0, 0]))
        0.75
    """
    _check_counts(counts)
    n = len(counts)
    rising = counts.double().sort().values
    places = torch.arange(1, n + 1, dtype=torch.float64)
    return float(2 * (places @ rising) / (n * rising.sum()) - (n + 1) / n)


def long_tail_share(counts: Tensor, popularity: Tensor, head: float = 0.2) -> float:
    """The share of the recommendations that go to items outside the most popular ones, in [0, 1].

    An even exposure gives 1 - head. Where several items are equally popular at the border of the head, the fraction of
    them that fits into the head counts as head.

    Args:
        counts: int64 (N,), from `exposure`.
        popularity: (N,), such as the number of works by an item's artist, or the number of items that have it among
            their nearest.
        head: Share of the items that are the most popular ones, in (0, 1).

    Raises:
        ValueError: If a shape is wrong, if the popularity holds NaN, if `head` lies outside (0, 1), or if nothing is
            recommended.

    Example:
        >>> counts, popularity = torch.tensor([3, 1, 0, 0, 0]), torch.tensor([9, 5, 1, 1, 1])
        >>> long_tail_share(counts, popularity, head=0.2)
        0.25
    """
    _check_counts(counts)
    _check_popularity(popularity, len(counts))
    if not 0 < head < 1:
        raise ValueError(f"head={head} is not a share of the items: use a number between 0 and 1, such as 0.2")
    _, level = (-popularity.double()).unique(return_inverse=True)
    size = level.bincount().double()
    before = size.cumsum(0) - size
    in_head = ((head * len(counts) - before) / size).clamp(0, 1)
    return float(((1 - in_head[level]) * counts).sum() / counts.sum())


def intra_list_diversity(ids: Tensor, vectors: Tensor, *, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """The mean of 1 - cosine over all pairs of items in each list, float64 (Q,) in [0, 2].

    It is computed from the length of the sum of a list's unit vectors, in blocks of lists. Ziegler et al. (2005)
    average over pairs in this way.

    Args:
        ids: int64 (Q, K), -1 for no item.
        vectors: Floating point (N, D), of any length. A vector of zeros has the cosine 0 to all others.
        block_bytes: Memory for a block.

    Returns:
        One value per list, NaN for fewer than two items.

    Raises:
        ValueError: If the ids are not int64 (Q, K), if one lies outside -1..N-1, or if the vectors are not (N, D).

    Example:
        >>> intra_list_diversity(torch.tensor([[0, 1], [0, -1]]), torch.eye(2))
        tensor([1., nan], dtype=torch.float64)
    """
    if vectors.ndim != 2:
        raise ValueError(f"vectors must be (N, D), got {tuple(vectors.shape)}")
    _check_ids(ids, len(vectors))
    step = max(1, block_bytes // (8 * max(ids.shape[1] * vectors.shape[1], 1)))
    values = []
    for block in ids.split(step):
        there = (block >= 0).double()
        units = torch.nn.functional.normalize(vectors[block.clamp(min=0)].double(), dim=2) * there[:, :, None]
        pairs = there.sum(1) * (there.sum(1) - 1)
        cosines = units.sum(1).square().sum(1) - units.square().sum((1, 2))
        values.append((1 - cosines / pairs).masked_fill(pairs == 0, torch.nan))
    return torch.cat(values) if values else torch.empty(0, dtype=torch.float64)


def novelty(ids: Tensor, popularity: Tensor) -> Tensor:
    """The mean self-information -log2 p of the items of each list in bits, float64 (Q,); NaN for an empty list.

    Args:
        ids: int64 (Q, K), -1 for no item.
        popularity: (N,). p is an item's share of the sum (Zhou et al. 2010).

    Raises:
        ValueError: If the ids are not int64 (Q, K), if one lies outside -1..N-1, if the popularity is not (N,) or holds
            NaN, or if a recommended item has a popularity of 0 or less.

    Example:
        >>> novelty(torch.tensor([[0, 1]]), torch.tensor([1, 1, 2]))  # both items have p = 1/4
        tensor([2.], dtype=torch.float64)
    """
    _check_popularity(popularity, len(popularity))
    _check_ids(ids, len(popularity))
    there = ids >= 0
    if (popularity[ids[there]] <= 0).any():
        raise ValueError(
            "a recommended item has popularity 0, for which novelty is infinite: for example, add 1 to all"
        )
    bits = -torch.log2(popularity.double() / popularity.double().sum())
    return torch.where(there, bits[ids.clamp(min=0)], 0.0).sum(1) / there.sum(1)


def _check_ids(ids: Tensor, items: int) -> None:
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 (Q, K), got {ids.dtype} {tuple(ids.shape)}")
    if items < 1:
        raise ValueError("there are no items to recommend")
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < items:
        raise ValueError(f"ids must lie in -1..{items - 1}, got {int(ids.min())}..{int(ids.max())}")


def _check_counts(counts: Tensor) -> None:
    if counts.ndim != 1:
        raise ValueError(f"counts must be one an item, (N,), got {tuple(counts.shape)}")
    if len(counts) == 0 or int(counts.sum()) == 0:
        raise ValueError("nothing is recommended: there is no exposure to measure")


def _check_popularity(popularity: Tensor, items: int) -> None:
    if popularity.shape != (items,):
        raise ValueError(f"popularity must be one an item, ({items},), got {tuple(popularity.shape)}")
    if popularity.isnan().any():
        raise ValueError("popularity holds NaN: give every item a number")
