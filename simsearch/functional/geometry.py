"""Geometric verification: whether the local features of two images agree on one perspective view of one plane.

Philbin et al. (CVPR 2007) re-rank the first results of a search this way. Pairs of features are mutual nearest
neighbours that pass the ratio test (Lowe, IJCV 2004); a homography is fitted to them by MAGSAC++ (Barath et al., CVPR
2020, in OpenCV); and a homography that no camera could have made is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from simsearch.types import LocalFeatures

Pairs = tuple[np.ndarray, np.ndarray]  # places of paired features in the query and in an item, int64 (p,) each

_FEWEST = 5  # pairs to fit a homography, of which 4 pairs determine one
_ITERATIONS = 1000
# What a view of a picture may look like: its share of the query's area, opposite sides, and its two directions.
_LEAST_AREA, _MOST_AREA, _MOST_RATIO, _MOST_STRETCH = 2e-3, 400.0, 5.0, 6.0


@dataclass(frozen=True)
class Match:
    """The evidence that an image (the query) shows another image (the item).

    Attributes:
        inliers: Number of features of different places that agree on one homography.
        spread: Share in [0, 1] of the item's area that the convex hull of these places covers.
        residual: Median distance of the inliers from where the homography puts them, as a share of the query's longest
            side.
        outline: float32 (4, 2), where the item's corners lie in the query: top left, top right, bottom right, bottom
            left; x and y as fractions of the query's width and height, outside of [0, 1] beyond its border.
        points: float32 (inliers, 4), the inliers: x and y in the query, x and y in the item, as fractions.
        mirrored: True if the query shows the item mirrored.
    """

    inliers: int
    spread: float
    residual: float
    outline: np.ndarray
    points: np.ndarray
    mirrored: bool = False

    @property
    def least_share(self) -> float:
        """Share of the area that the inliers span, in the query or the item, whichever is less."""
        return float(self.spread * min(1.0, _area(self.outline)))


class Verifier(Protocol):
    """What verifies the first items of a ranking, in four steps, so that each can be done where it belongs and timed.

    Attributes:
        top: Number of items that are verified.
    """

    top: int

    def item(self, image: Tensor) -> LocalFeatures:
        """The local features of an item.

        Args:
            image: uint8 (3, H, W).
        """

    def query(self, image: Tensor) -> tuple[LocalFeatures, ...]:
        """The local features of a query, one or more sets of them.

        Args:
            image: uint8 (3, H, W).
        """

    def pair(self, queries: Sequence[LocalFeatures], items: Sequence[LocalFeatures]) -> list[list[Pairs]]:
        """The pairs of features of each query and each item.

        Args:
            queries: The local features of the queries.
            items: The local features of the items.
        """

    def fit(
        self, queries: Sequence[LocalFeatures], items: Sequence[LocalFeatures], pairs: Sequence[Sequence[Pairs]]
    ) -> list[Match | None]:
        """The verified matches of the items; None for an item that is not verified.

        Args:
            queries: The local features of the queries.
            items: The local features of the items.
            pairs: The pairs of features of each query and each item.
        """


def verify(
    query: LocalFeatures, items: Sequence[LocalFeatures], *, ratio: float = 0.85, tolerance: float = 0.006
) -> list[Match | None]:
    """The evidence for each item that the query shows it. None without a homography that a camera could have made.

    Args:
        query: The local features of the query.
        items: The local features of M items.
        ratio: Largest ratio in (0, 1] of the distances to the nearest and the second nearest feature of an item.
        tolerance: Largest distance of an inlier from where the homography puts it, as a share of the query's longest
            side.

    Raises:
        ValueError: If `ratio` or `tolerance` is out of range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> places = rng.uniform(0, 200, (30, 2)).astype(np.float32)
        >>> item = LocalFeatures(places, rng.integers(-127, 128, (30, 32), dtype=np.int8), (200, 200))
        >>> query = LocalFeatures(places / 2 + 40, item.descriptors, (200, 200))  # the item at half its size
        >>> (match,) = verify(query, [item])
        >>> match.inliers, match.outline.astype(float).round(2).tolist()[0]
        (30, [0.2, 0.2])
    """
    if not 0 < ratio <= 1 or not tolerance > 0:
        raise ValueError(f"ratio must lie in (0, 1] and tolerance above 0, got {ratio} and {tolerance}")
    pairs = mutual_pairs(query.descriptors, [item.descriptors for item in items], ratio)
    return [fit(query, item, *pair, tolerance=tolerance) for item, pair in zip(items, pairs, strict=True)]


def shown(match: Match) -> float:
    """The share in [0, 1] of the query's area in which the item lies.

    Args:
        match: The match of the item.
    """
    inside = match.outline.astype(np.float64)
    for axis in (0, 1):  # clipped at each border of the query in turn (Sutherland and Hodgman)
        for sign, border in ((1.0, 0.0), (-1.0, -1.0)):
            depth = sign * inside[:, axis] - border
            ahead = np.roll(depth, -1)
            cut = []
            for place, (one, other) in enumerate(zip(depth, ahead, strict=True)):
                if one >= 0:
                    cut.append(inside[place])
                if (one >= 0) != (other >= 0):
                    step = one / (one - other)
                    cut.append((1 - step) * inside[place] + step * inside[(place + 1) % len(inside)])
            if not cut:
                return 0.0
            inside = np.array(cut)
    return min(1.0, _area(inside))


def support(match: Match, query: LocalFeatures, item: LocalFeatures) -> float:
    """The share in [0, 1] of the features that both pictures could have in common on which they agree.

    These are the features of the query that lie where the item is shown, or the features of the item that lie in the
    query, whichever are fewer. A copy agrees on many of them. Different coins of one rim, or pages under one heading,
    agree on few, however many that are.

    Args:
        match: The match of the two.
        query: The local features of the query.
        item: The local features of the item.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> places = rng.uniform(0, 200, (30, 2)).astype(np.float32)
        >>> item = LocalFeatures(places, rng.integers(-127, 128, (30, 32), dtype=np.int8), (200, 200))
        >>> other = rng.integers(-127, 128, (30, 32), dtype=np.int8)
        >>> half = LocalFeatures(places, np.where(places[:, :1] < 100, item.descriptors, other), (200, 200))
        >>> bool(support(*verify(half, [item]), half, item) == (places[:, 0] < 100).mean())
        True
    """
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    outline = match.outline.copy()
    if query.mirrored:
        outline[:, 0] = 1 - outline[:, 0]
    shared = []
    for picture, corners, aim in ((query, outline, square), (item, square, outline)):
        there = _projected(cv2.getPerspectiveTransform(corners, aim), picture.points / np.array(picture.size))
        shared.append(int(((there > 0) & (there < 1)).all(1).sum()))
    return min(1.0, match.inliers / max(1, min(shared)))


def mutual_pairs(query: np.ndarray, items: Sequence[np.ndarray], ratio: float) -> list[Pairs]:
    """The pairs of features of the query and each item that are each other's nearest and pass the ratio test.

    One product of matrices gives the distances to an item's features. They stay in a core's cache while they are looked
    at, and the second direction is looked at only for what passed the ratio test.

    Args:
        query: int8 (n, d), the descriptors of the query.
        items: int8 (m, d) for each of M items.
        ratio: Largest ratio of the distances to the nearest and the second nearest feature of the item. Below 1, a
            feature that equals two features of the item is paired with neither.

    Returns:
        For each item, the places of the paired features in the query and in the item, int64 (p,) each.
    """
    n, none = len(query), np.zeros(0, np.int64)
    longest = max((len(item) for item in items), default=0)
    if n == 0 or longest < 2:
        return [(none, none)] * len(items)
    own = query.astype(np.float32)
    # A row (x, 1, |x|^2) times a column (-2 y, |y|^2, 1) is the squared distance.
    left = torch.from_numpy(np.hstack([own, np.ones((n, 1), np.float32), np.square(own).sum(1, keepdims=True)]))
    memory = torch.empty(n * longest)  # fresh memory for each item would take longer than the product
    places, pairs = np.arange(n), []
    for item in items:
        m = len(item)
        if m < 2:
            pairs.append((none, none))
            continue
        columns = item.T.astype(np.float32)
        right = np.vstack([-2 * columns, np.square(columns).sum(0, keepdims=True), np.ones((1, m), np.float32)])
        gaps = torch.mm(left, torch.from_numpy(right), out=memory[: n * m].view(n, m)).numpy()
        nearest = gaps.argmin(1)
        first = gaps[places, nearest]
        gaps[places, nearest] = np.inf
        second = gaps.min(1)
        gaps[places, nearest] = first
        near = np.flatnonzero((first.clip(0) <= ratio**2 * second.clip(0)) & ((second > 0) | (ratio == 1)))
        kept = near[gaps[:, nearest[near]].argmin(0) == near]
        pairs.append((kept, nearest[kept]))
    return pairs


def fit(
    query: LocalFeatures, item: LocalFeatures, ours: np.ndarray, theirs: np.ndarray, *, tolerance: float
) -> Match | None:
    """The evidence of pairs of features. None if they agree on no homography that a camera could have made.

    Args:
        query: The local features of the query.
        item: The local features of the item.
        ours: int64 (p,), places of the paired features in the query.
        theirs: int64 (p,), places of the paired features in the item.
        tolerance: Largest distance of an inlier from where the homography puts it, as a share of the query's longest
            side.
    """
    if len(ours) < _FEWEST:
        return None
    from_, to = item.points[theirs].astype(np.float64), query.points[ours].astype(np.float64)
    limit = tolerance * max(query.size)
    homography, found = cv2.findHomography(from_, to, cv2.USAC_MAGSAC, limit, maxIters=_ITERATIONS, confidence=0.999)
    if homography is None or not np.isfinite(homography).all():
        return None
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * item.size
    outline = plausible_view(homography, corners, query.size)
    if outline is None:
        return None
    error = np.linalg.norm(_projected(homography, from_) - to, axis=1)
    inlier = (found.ravel() > 0) & (error <= limit)
    # SIFT finds a place several times, with different orientations; it counts once.
    _, once = np.unique(np.round(np.hstack([to, from_])[inlier]), axis=0, return_index=True)
    chosen = np.flatnonzero(inlier)[once]
    inliers = min(len(np.unique(np.round(side[chosen]), axis=0)) for side in (to, from_))
    if inliers < 4:
        return None
    hull = cv2.contourArea(cv2.convexHull(from_[chosen].astype(np.float32)))
    fractions = np.hstack([to[chosen] / query.size, from_[chosen] / item.size])
    outline = outline / query.size
    if query.mirrored:
        fractions[:, 0], outline[:, 0] = 1 - fractions[:, 0], 1 - outline[:, 0]
    return Match(
        inliers=inliers,
        spread=float(min(1.0, hull / (item.size[0] * item.size[1]))),
        residual=float(np.median(error[chosen]) / max(query.size)),
        outline=outline.astype(np.float32),
        points=fractions.astype(np.float32),
        mirrored=query.mirrored,
    )


def plausible_view(homography: np.ndarray, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """Where a homography puts the corners of a picture, float64 (4, 2), or None if no camera sees a picture that way.

    The corners must stay in front of the camera, and in their order: a convex quadrilateral that is not mirrored. It
    must not be tiny, and neither its opposite sides nor its two directions may differ too much.

    Args:
        homography: float64 (3, 3), from pixels of the picture to pixels of the view.
        corners: float64 (4, 2), the picture's corners, clockwise from the top left.
        size: Width and height of the view.

    Example:
        >>> corners = np.array([[0.0, 0], [100, 0], [100, 100], [0, 100]])
        >>> plausible_view(np.eye(3), corners, (100, 100)).tolist()[2]
        [100.0, 100.0]
        >>> plausible_view(np.diag([-1.0, 1, 1]), corners, (100, 100)) is None  # mirrored
        True
    """
    scale = homography[2] @ np.vstack([corners.T, np.ones(4)])
    if not (scale.min() > 0 or scale.max() < 0):
        return None
    view = _projected(homography, corners)
    sides = np.roll(view, -1, axis=0) - view
    ahead = np.roll(sides, -1, axis=0)
    turns = sides[:, 0] * ahead[:, 1] - sides[:, 1] * ahead[:, 0]
    if turns.min() <= 0:
        return None
    if not _LEAST_AREA <= _area(view) / (size[0] * size[1]) <= _MOST_AREA:
        return None
    lengths = np.linalg.norm(sides, axis=1)
    own = np.linalg.norm(np.roll(corners, -1, axis=0) - corners, axis=1)
    opposite = np.maximum(lengths[:2] / lengths[2:], lengths[2:] / lengths[:2])
    scales = (lengths[:2] + lengths[2:]) / (own[:2] + own[2:])
    if opposite.max() > _MOST_RATIO or scales.max() / scales.min() > _MOST_STRETCH:
        return None
    return view


def _area(polygon: np.ndarray) -> float:
    """The area of a polygon (n, 2)."""
    x, y = polygon.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _projected(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (n, 2) under a homography."""
    moved = np.hstack([points, np.ones((len(points), 1))]) @ homography.T
    return moved[:, :2] / moved[:, 2:]
