"""Groups images of the same work: by given columns, equal files and near-duplicates. Pure functions of pairs.

Perceptual hashes and nearest descriptors (EfficientNet-Lite0 with GeM at 192 pixels) propose pairs of images. Local
features that agree on one homography, and the pixels that it lays on each other, decide; cliques of pairs become works.
Measured with the defaults of `simsearch data ingest` (experiments/2026-11-28-works):

- Among 3,964 paintings of 224 x 224 pixels with 85 known pairs of other scans or versions of one work: 80, and 20 more.
- Of 60 copies each, found: turned by 10 degrees 41, by 45 degrees 4 (most are not proposed), by quarters 60; without
  15 % of each side 59; in a frame 43, with a border of 15 % 54; mirrored 60.
- Among 120 drawn pages of text, coins, night skies, sketches, stamps and book covers of one series each, of which 20
  have a second scan: all scans (of night skies 7), and no two different images.

Views of one motif (a series of haystacks) become works of their own unless a column groups them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from simsearch.data.near_duplicates import MIN_CORRELATION

FEWEST = 20  # local features of an image that geometry may judge
INLIERS = 8  # features of two images of one picture that agree on one homography, at least
SHARE = 0.05  # of the area of each of the two images, which these features span at least
SUPPORT = 0.1  # of the features that both images could share, which agree at least
ALIGNED = 0.55  # correlation of what the homography lays on each other, at least
EXACT = 0.97  # such a correlation that pixels are almost the same
STRONG = 20  # inliers that leave no doubt
_OF_ONE_WORK = 5  # of the pairs of an image that may well be of its work: the others tell how alike unlike images are
_LEAST_BACKGROUND = 10  # other pairs needed to tell it


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
        support: float32 (P,), share of the features of both pictures that agree (`geometry.support`). 0 without one.
        same: bool (P,), whether the evidence is enough.
    """

    pairs: Tensor
    correlation: Tensor
    features: Tensor
    inliers: Tensor
    share: Tensor
    aligned: Tensor
    support: Tensor
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
        suspicious: Groups that are too large to be plausible. They are not grouped.
        weak: Groups that are grouped on weak evidence.
        evidence: The evidence of all candidate pairs.
        verified: Whether geometry was asked.
    """

    pairs: list[tuple[int, int]]
    counts: dict[str, int]
    suspicious: list[list[int]]
    weak: list[list[int]]
    evidence: Evidence
    verified: bool

    def among(self, places: Sequence[int]) -> SameWork:
        """The same result with positions among more files.

        Args:
            places: The positions there, ascending, of the files here.
        """

        def moved(groups: list[list[int]]) -> list[list[int]]:
            return [[places[place] for place in group] for group in groups]

        return replace(
            self,
            pairs=[(places[one], places[other]) for one, other in self.pairs],
            suspicious=moved(self.suspicious),
            weak=moved(self.weak),
            evidence=replace(self.evidence, pairs=torch.tensor(places, dtype=torch.int64)[self.evidence.pairs]),
        )


def agreement(
    pairs: Tensor,
    correlation: Tensor,
    features: Tensor,
    inliers: Tensor,
    share: Tensor,
    aligned: Tensor,
    support: Tensor,
) -> Tensor:
    """Whether pairs of images show one picture by their evidence, bool (P,).

    Geometry decides: INLIERS features, SUPPORT of those that both images could share, must agree on one homography and
    span SHARE of both images, and the pixels that it lays on each other must correlate by ALIGNED. Of images with fewer
    than FEWEST features, the correlation of the whole images must reach MIN_CORRELATION. Both correlations must be
    higher for images that are like many others (`least_values`).

    Args:
        pairs: int64 (P, 2), as in Evidence, like the others.
        correlation: float32 (P,).
        features: int64 (P,).
        inliers: int64 (P,).
        share: float32 (P,).
        aligned: float32 (P,).
        support: float32 (P,).
    """
    geometry = (inliers >= INLIERS) & (share >= SHARE) & (support >= SUPPORT)
    geometry &= aligned >= least_values(pairs, aligned, ALIGNED)
    return torch.where(features >= FEWEST, geometry, correlation >= least_values(pairs, correlation, MIN_CORRELATION))


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


def least_values(pairs: Tensor, values: Tensor, floor: float) -> Tensor:
    """The least value of each pair at which its two images are one picture, float32 (P,).

    It is `floor`, or higher for pages, coins or stamps, which have much in common with others of their kind. An image
    of which 5 pairs, those of the highest values, may be of its work and at least 10 others are known, asks for a value
    halfway between the highest of these others and 1, at most EXACT. A pair must satisfy both its images. What the rest
    of the collection is like does not matter.

    Args:
        pairs: int64 (P, 2), positions of two files, each pair once.
        values: float32 (P,), correlations of the pairs.
        floor: The least value of images that are like few others.

    Example:
        >>> alike = torch.combinations(torch.arange(17))  # 17 coins
        >>> least_values(alike, torch.full((len(alike),), 0.8), floor=0.55)[0]
        tensor(0.9000)
        >>> least_values(alike[:5], torch.full((5,), 0.8), floor=0.55)[0]
        tensor(0.5500)
    """
    if not len(pairs):
        return values.clone()
    ends, of_ends = pairs.T.reshape(-1), values.repeat(2)
    order = of_ends.argsort(descending=True)
    order = order[ends[order].argsort(stable=True)]  # by image, the highest value first
    counts = ends.bincount()
    raised = counts >= _OF_ONE_WORK + _LEAST_BACKGROUND
    others = (counts.cumsum(0) - counts + _OF_ONE_WORK)[raised]
    least = torch.full((len(counts),), floor)
    least[raised] = ((1 + of_ends[order[others]]) / 2).clamp(floor, EXACT)
    return least[pairs].amax(1)


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
