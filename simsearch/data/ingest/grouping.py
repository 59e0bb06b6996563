"""Groups images of the same work: by given columns, equal files and near-duplicates. Pure functions of pairs.

Perceptual hashes and nearest descriptors (EfficientNet-Lite0 with GeM at 192 pixels) propose pairs of images. The
correlation of their pixels decides, and cliques of pairs become works. The defaults of `simsearch data ingest` find:

- Among 3,964 paintings of 224 x 224 pixels with 85 known pairs of other scans or versions of one work: all 85, and 13
  more, of which 12 are the same picture by eye. Without pixels, pairs joined in chains: 83 and 10, 2 of them wrong.
- Among 120 drawn pages of text, coins, night skies and line sketches each, of which 15 have a second scan: 15, 15, 13
  and 15 of the scans, and no two different images. Without pixels each of the first three sets became one work.

So the method finds other scans of one picture, also turned or mirrored. Views of one motif (a series of haystacks) and
details become works of their own unless a column groups them. So do scans of plain pictures, which have no details to
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

_BY_CHANCE = 0.001  # expected pairs of different images that are grouped, if correlations are normally distributed
_LEAST_BACKGROUND = 30  # pairs needed to estimate how alike different images are


@dataclass(frozen=True)
class SameWork:
    """The result of the search for near-duplicates.

    Attributes:
        pairs: Positions of files that show one work. They connect the files of the work.
        counts: Number of near-duplicates that each criterion proposed and pixels confirmed.
        least: The least correlation that confirmed a pair.
        suspicious: Groups that are too large to be plausible. They are not grouped.
    """

    pairs: list[tuple[int, int]]
    counts: dict[str, int]
    least: float
    suspicious: list[list[int]]


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each row the smallest row that pairs connect it with, directly or through others.

    Args:
        count: Number of rows.
        pairs: Pairs of rows.
    """
    rows, columns = np.array(list(pairs), dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    _, smallest, component = np.unique(component, return_index=True, return_inverse=True)
    return smallest[component].tolist()


def equal_pairs(values: Sequence[Hashable | None]) -> list[tuple[int, int]]:
    """Pairs of rows that connect all rows with equal values. None equals nothing.

    Args:
        values: A value for each row.
    """
    first: dict[Hashable, int] = {}
    return [
        (first[value], row)
        for row, value in enumerate(values)
        if value is not None and first.setdefault(value, row) != row
    ]


def least_correlation(background: Tensor, pairs: int) -> float:
    """The least correlation of pixels at which two images are the same picture, given how alike different images are.

    It is MIN_CORRELATION, or higher for collections such as pages, coins or skies, whose images are alike. It is then
    so far above the median of `background` that among `pairs` pairs of different images, 0.001 are expected to reach it
    by chance. Centre and spread are medians, so that a few pairs of the same picture do not move them.

    Args:
        background: Correlations (n,) of neighbouring but different images.
        pairs: Number of pairs that are compared.
    """
    if len(background) < _LEAST_BACKGROUND:
        return MIN_CORRELATION
    middle = float(background.median())
    spread = 1.4826 * float((background - middle).abs().median())  # the standard deviation of a normal distribution
    return max(MIN_CORRELATION, middle + NormalDist().inv_cdf(1 - _BY_CHANCE / max(1, pairs)) * spread)


def cliques(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """For each row the smallest row of its group. Two groups merge if at least half of all pairs between them agree.

    This is average linkage on agreeing pairs. It splits chains, in which each image is like the next one only.

    Args:
        count: Number of rows.
        pairs: Pairs of rows that agree, the most certain first, each once.

    Source:
        Sokal, Michener: A statistical method for evaluating systematic relationships. 1958.
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
