"""Which images show the same work: groups that are given, equal files, near-duplicates. Pure functions of pairs.

Perceptual hashes and neighbours by descriptor (EfficientNet-Lite0 with GeM on 192 pixels) propose pairs of images, the
correlation of their pixels decides, and cliques of pairs are works. What the defaults of `simsearch data ingest` find:

- among 3,964 paintings of 224 x 224 pixels, of which 85 pairs of other scans or versions of one work are known: all 85,
  and 13 more, 12 of them the same picture by eye. Without pixels, pairs joined in chains: 83 and 10, 2 of them wrong.
- among 120 drawn pages of text, coins, night skies and line sketches each, of which 15 have a second scan: 15, 15, 13
  and 15 of the scans, no two unlike images. Without pixels each of the first three became one work.

So these find other scans of one picture, also turned or mirrored ones. Views of one motif (a series of haystacks) and
details are works of their own unless a column groups them, and so are scans of plain pictures, which have nothing to
compare.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from simsearch.data.near_duplicates import MIN_CORRELATION

_BY_CHANCE = 0.001  # pairs of unlike images that may be tied, were correlations normally distributed
_LEAST_BACKGROUND = 30  # pairs that tell how alike unlike images are


@dataclass(frozen=True)
class SameWork:
    """What near-duplicates say. pairs: places of files that show one work, which connect its files. counts: how many
    near-duplicates each criterion proposed and pixels confirmed. least: the correlation that did. suspicious: groups
    too large to be believed, which are not tied."""

    pairs: list[tuple[int, int]]
    counts: dict[str, int]
    least: float
    suspicious: list[list[int]]


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` rows the smallest row that pairs connect it with."""
    rows, columns = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    _, smallest, component = np.unique(component, return_index=True, return_inverse=True)
    return smallest[component].tolist()


def equal_pairs(values: Sequence[Hashable | None]) -> list[tuple[int, int]]:
    """Pairs of rows that connect those of equal values; None equals nothing."""
    first: dict[Hashable, int] = {}
    return [
        (first[value], row)
        for row, value in enumerate(values)
        if value is not None and first.setdefault(value, row) != row
    ]


def least_correlation(background: Tensor, pairs: int) -> float:
    """The correlation of pixels from which on two images are one picture, by how alike unlike ones of a collection are.

    That is MIN_CORRELATION, and more where pages, coins or skies are alike among themselves: so far above the middle of
    `background`, correlations (n,) of images that are neighbours and unlike, that of `pairs` pairs a thousandth of one
    gets there by chance. Middle and spread are medians, which the few pairs of one picture do not move.
    """
    if len(background) < _LEAST_BACKGROUND:
        return MIN_CORRELATION
    middle = float(background.median())
    spread = 1.4826 * float((background - middle).abs().median())  # of a normal distribution its standard deviation
    return max(MIN_CORRELATION, middle + NormalDist().inv_cdf(1 - _BY_CHANCE / max(1, pairs)) * spread)


def cliques(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """For each of `count` rows the smallest row of its group: two groups become one where at least half of all pairs
    between them agree.

    pairs: that agree, the surest first, each once. Average linkage (Sokal and Michener 1958) of what agrees: a chain,
    of which each image is like the next alone, comes apart.
    """
    agreed = {(min(pair), max(pair)) for pair in pairs}
    group = {row: [row] for pair in agreed for row in pair}
    for one, other in pairs:
        first, second = group[one], group[other]
        if first is second:
            continue
        agreeing = sum((min(a, b), max(a, b)) in agreed for a in first for b in second)
        if 2 * agreeing >= len(first) * len(second):
            first += second
            for row in second:
                group[row] = first
    return [min(group[row]) if row in group else row for row in range(count)]
