"""Geometric verification: whether the local features of two images agree on one perspective view of one plane.

Philbin et al. (CVPR 2007) re-rank the first results of a search this way. Pairs of features are mutual nearest
neighbours that pass the ratio test (Lowe, IJCV 2004); a homography is fitted to them by MAGSAC++ (Barath et al., CVPR
2020, in OpenCV); and a homography that no camera could have made is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from simsearch.types import LocalFeatures

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
        >>> match.inliers, match.outline.round(2).tolist()[0]
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


def mutual_pairs(query: np.ndarray, items: Sequence[np.ndarray], ratio: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pairs of features of the query and each item that are each other's nearest and pass the ratio test.

    All items are compared in one product of matrices.

    Args:
        query: int8 (n, d), the descriptors of the query.
        items: int8 (m, d) for each of M items.
        ratio: Largest ratio of the distances to the nearest and the second nearest feature of the item.

    Returns:
        For each item, the places of the paired features in the query and in the item, int64 (p,) each.
    """
    counts = [len(item) for item in items]
    longest = max(counts, default=0)
    none = np.zeros(0, np.int64)
    if len(query) == 0 or longest < 2:
        return [(none, none)] * len(items)
    ours = torch.from_numpy(query.astype(np.float32))
    theirs = torch.zeros(len(items), longest, ours.shape[1])
    for place, item in enumerate(items):
        theirs[place, : len(item)] = torch.from_numpy(item.astype(np.float32))
    missing = torch.arange(longest) >= torch.tensor(counts)[:, None]
    lengths = theirs.square().sum(2).masked_fill(missing, torch.inf)
    # Squared distances (M, longest, n) without the squared length of the query's features.
    products = (theirs.flatten(0, 1) @ ours.T).unflatten(0, missing.shape)
    gaps = torch.add(lengths[:, :, None], products, alpha=-2.0)
    own = ours.square().sum(1)
    first, nearest = gaps.min(dim=1)  # (M, n), over the item's features
    back = (gaps + own).argmin(dim=2)  # (M, longest), over the query's features
    places = torch.arange(len(ours)).expand_as(nearest)
    gaps.scatter_(1, nearest[:, None], torch.inf)
    second = gaps.amin(dim=1)
    near = (first + own).clamp(min=0) <= ratio**2 * (second + own).clamp(min=0)
    kept = near & (back.gather(1, nearest) == places) & second.isfinite()
    return [(np.flatnonzero(one), of[one].numpy()) for one, of in zip(kept.numpy(), nearest, strict=True)]


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
