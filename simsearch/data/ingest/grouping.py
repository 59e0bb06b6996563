"""Groups images of the same work: by given columns, equal files and near-duplicates. Pure functions of pairs.

Perceptual hashes and nearest descriptors (EfficientNet-Lite0 with GeM at 192 pixels) propose pairs of images. Local
features that agree on one homography, and the pixels that it lays on each other, decide; cliques of pairs become works.
Measured with the defaults of `simsearch data ingest`, and in brackets with near.verify=false, where the correlation of
the whole images decides:

- Among 3,964 paintings of 224 x 224 pixels with 85 known pairs of other scans or versions of one work: 84 and 25 more
  (85 and 13). By eye, all of the 25 are the same picture or a replica of it, and the missing pair is of two haystacks.
- Of 60 copies each among them, found: turned by 10 degrees 57 (0), by 45 degrees 42 (0), by quarters 60 (60); without
  15 % of each side 58 (0), without 15 % of two sides 60 (0); in a frame 53 (0), with a border of 8 % 59 (0) and of
  15 % 58 (0); mirrored 60 (60). Of all that were proposed, geometry refused none.
- Among 120 drawn pages of text, pages under one heading, coins, night skies and line sketches each, of which 15 have a
  second scan: all scans (of coins none, else all), and no two different images.

These figures are of the strongest 300 features of each image; spread over the image, as `Sift` chooses them now, 83 of
the 85 pairs are confirmed.

Views of one motif (a series of haystacks) become works of their own unless a column groups them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from simsearch.data.near_duplicates import MIN_CORRELATION

FEWEST = 20  # local features of an image that geometry may judge
INLIERS = 8  # features of two images of one picture that agree on one homography, at least
SHARE = 0.05  # of the area of each of the two images, which these features span at least
ALIGNED = 0.55  # correlation of what the homography lays on each other, at least
EXACT = 0.97  # such a correlation that pixels are almost the same
STRONG = 20  # inliers that leave no doubt
_BY_CHANCE = 0.001  # expected pairs of different images that are grouped, if correlations are normally distributed
_LEAST_BACKGROUND = 30  # pairs needed to estimate how alike different images are


@dataclass(frozen=True)
class Evidence:
    """What speaks for P candidate pairs of images that they show one picture.

    Attributes:
        pairs: int64 (P, 2), positions of two files, the smaller first, each pair once.
        correlation: float32 (P,), the best correlation of their pixels.
        features: int64 (P,), local features of the image that has fewer. 0 without verification.
        inliers: int64 (P,), features that agree on one homography.
        share: float32 (P,), share of the area that the inliers span, in the image where it is less.
        aligned: float32 (P,), correlation of the pixels that the homography lays on each other. 0 without one.
        same: bool (P,), whether the evidence is enough.
    """

    pairs: Tensor
    correlation: Tensor
    features: Tensor
    inliers: Tensor
    share: Tensor
    aligned: Tensor
    same: Tensor

    def within(self, group: Iterable[int]) -> list[int]:
        """Places of the pairs whose two images are in a group, ascending.

        Args:
            group: Positions of files.
        """
        members = set(group)
        found = (pair for one in members for pair in self._partners.get(one, ()))
        return sorted(place for place, other in found if other in members)

    @cached_property
    def _partners(self) -> dict[int, list[tuple[int, int]]]:
        """For each file that is the first of a pair, the places of these pairs and their second files."""
        found: dict[int, list[tuple[int, int]]] = {}
        for place, (one, other) in enumerate(self.pairs.tolist()):
            found.setdefault(one, []).append((place, other))
        return found


@dataclass(frozen=True)
class SameWork:
    """The result of the search for near-duplicates.

    Attributes:
        pairs: Positions of files that show one work. They connect the files of the work.
        counts: Number of near-duplicates that each criterion proposed and that were confirmed.
        least: The least correlation that confirmed a pair.
        suspicious: Groups that are too large to be plausible. They are not grouped.
        weak: Groups that are grouped on weak evidence.
        evidence: The evidence of all candidate pairs.
        verified: Whether geometry was asked.
    """

    pairs: list[tuple[int, int]]
    counts: dict[str, int]
    least: float
    suspicious: list[list[int]]
    weak: list[list[int]]
    evidence: Evidence
    verified: bool


def agreement(
    correlation: Tensor, features: Tensor, inliers: Tensor, share: Tensor, aligned: Tensor, least: float
) -> Tensor:
    """Whether pairs of images show one picture by their evidence, bool (P,).

    Geometry decides: INLIERS features must agree on one homography and span SHARE of both images, and the pixels that
    it lays on each other must correlate by ALIGNED, or the whole images by `least`. ALIGNED is raised to `least`, at
    most EXACT, in collections of pages or coins, where equal headings or rims agree on a homography too. Of images with
    fewer than FEWEST features, the correlation of the whole images decides.

    Args:
        correlation: float32 (P,), as in Evidence, like the next four.
        features: int64 (P,).
        inliers: int64 (P,).
        share: float32 (P,).
        aligned: float32 (P,).
        least: The least correlation that confirms a pair, as `least_correlation` returns it.
    """
    enough = ALIGNED if least <= MIN_CORRELATION else min(least, EXACT)
    whole = correlation >= least
    geometry = (inliers >= INLIERS) & (share >= SHARE) & ((aligned >= enough) | whole)
    return torch.where(features >= FEWEST, geometry, whole)


def is_weak(group: Sequence[int], evidence: Evidence, confirmed: Iterable[tuple[int, int]] = ()) -> bool:
    """Whether a person should look at a group: one of its pairs has few inliers, and nobody confirmed that pair.

    Args:
        group: Positions of files.
        evidence: The evidence of all candidate pairs.
        confirmed: Pairs that a person confirmed.
    """
    known = set(confirmed)
    inside = evidence.within(group)
    pairs, inliers = evidence.pairs[inside].tolist(), evidence.inliers[inside].tolist()
    return any(n < STRONG and (one, other) not in known for (one, other), n in zip(pairs, inliers, strict=True))


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


def cliques(
    count: int,
    pairs: Sequence[tuple[int, int]],
    confirmed: Iterable[tuple[int, int]] = (),
    cut: Iterable[tuple[int, int]] = (),
) -> list[int]:
    """For each row the smallest row of its group. Two groups merge if at least half of all pairs between them agree.

    This is average linkage on agreeing pairs. It splits chains, in which each image is like the next one only.

    Args:
        count: Number of rows.
        pairs: Pairs of rows that agree, the most certain first, each once.
        confirmed: Pairs of rows that are in one group whatever the others say.
        cut: Pairs of rows that are never in one group. Confirmed pairs do not tie them.

    Source:
        Sokal, Michener: A statistical method for evaluating systematic relationships. 1958.
    """
    agreed = {(min(pair), max(pair)) for pair in pairs}
    apart = {(min(pair), max(pair)) for pair in cut}
    tied = connected(count, confirmed)
    members: dict[int, list[int]] = {}
    for row in range(count):
        members.setdefault(tied[row], []).append(row)
    group = {row: members[tied[row]] for row in range(count)}
    for one, other in pairs:
        first, second = group[one], group[other]
        if first is second:
            continue
        between = [(min(a, b), max(a, b)) for a in first for b in second]
        if 2 * sum(pair in agreed for pair in between) >= len(between) and apart.isdisjoint(between):
            first += second
            for row in second:
                group[row] = first
    return [min(group[row]) for row in range(count)]
