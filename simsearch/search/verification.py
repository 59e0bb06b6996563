"""Verifies the best items of a search by geometry: the settings, and how queries and items are described."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import Tensor

from simsearch.functional import geometry
from simsearch.functional.geometry import Match, Pairs
from simsearch.functional.sift import Sift
from simsearch.types import LocalDescriber, LocalFeatures

_MOST_FEATURES = 10_000


class Verification:
    """Compares a query with items by local features that must agree on one homography.

    Args:
        features: What describes the images. None for SIFT.
        item_side: Longest side in pixels at which an item is described.
        item_features: Largest number of features of an item.
        query_side: Longest side in pixels at which a query is described.
        query_features: Largest number of features of a query.
        top: Number of items that are verified, the best of the search.
        ratio: Largest ratio in (0, 1] of the distances to the nearest and second nearest feature.
        tolerance: Largest error of an inlier, as a share of the query's longest side.
        inliers: Least number of inliers of a verified item, 5 or more.
        spread: Least share in [0, 1] of a verified item's area that the inliers span.
        regions: Number of parts of a query that are searched too, unless a verified item fills half of the query. 0
            searches whole images alone.
        region_top: Number of items that are verified for each part, the best of its search.
        mirrored: Find mirrored items too, at twice the cost.

    Raises:
        ValueError: If a number is out of range, or not whole where it must be.
    """

    def __init__(
        self,
        features: LocalDescriber | None = None,
        *,
        item_side: int = 448,
        item_features: int = 300,
        query_side: int = 448,
        query_features: int = 500,
        top: int = 20,
        ratio: float = 0.85,
        tolerance: float = 0.006,
        inliers: int = 15,
        spread: float = 0.02,
        regions: int = 8,
        region_top: int = 10,
        mirrored: bool = False,
    ) -> None:
        _check_whole("item_side", item_side, 16)
        _check_whole("item_features", item_features, 5, _MOST_FEATURES)
        _check_whole("query_side", query_side, 16)
        _check_whole("query_features", query_features, 5, _MOST_FEATURES)
        _check_whole("top", top, 1)
        _check_whole("inliers", inliers, 5)
        _check_whole("regions", regions, 0)
        _check_whole("region_top", region_top, 1)
        if not 0 <= spread <= 1:
            raise ValueError(f"spread must lie in [0, 1], got {spread}")
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
        self.features = Sift() if features is None else features
        self.item_side, self.item_features = item_side, item_features
        self.query_side, self.query_features = query_side, query_features
        self.top, self.ratio, self.tolerance = top, ratio, tolerance
        self.inliers, self.spread, self.mirrored = inliers, spread, mirrored
        self.regions, self.region_top = regions, region_top

    @property
    def config(self) -> dict[str, Any]:
        """The plain config that builds this object."""
        names = ("item_side", "item_features", "query_side", "query_features", "top", "ratio", "tolerance", "inliers")
        own = {name: getattr(self, name) for name in (*names, "spread", "regions", "region_top", "mirrored")}
        return {"_target_": _path(self), "features": {"_target_": _path(self.features), **vars(self.features)}, **own}

    def changed(
        self, *, top: int | None = None, regions: int | None = None, mirrored: bool | None = None
    ) -> Verification:
        """The same verification with other settings.

        Args:
            top: Number of items that are verified. None keeps it.
            regions: Number of parts of a query that are searched too. None keeps it.
            mirrored: Find mirrored items too. None keeps it.

        Raises:
            ValueError: If `top` is below 1 or `regions` below 0, or either is not whole.
        """
        other = copy(self)
        other.top = self.top if top is None else top
        other.regions = self.regions if regions is None else regions
        other.mirrored = self.mirrored if mirrored is None else mirrored
        _check_whole("top", other.top, 1)
        _check_whole("regions", other.regions, 0)
        return other

    def item(self, image: Tensor) -> LocalFeatures:
        """The local features of an item.

        Args:
            image: uint8 (3, H, W).
        """
        return self.features.describe(image, side=self.item_side, most=self.item_features)

    def query(self, image: Tensor) -> tuple[LocalFeatures, ...]:
        """The local features of a query; with `mirrored`, those of its mirrored image too.

        Args:
            image: uint8 (3, H, W).
        """
        given = {"side": self.query_side, "most": self.query_features}
        own = self.features.describe(image, **given)
        if not self.mirrored:
            return (own,)
        return own, replace(self.features.describe(image.flip(2), **given), mirrored=True)

    def verify(self, queries: Sequence[LocalFeatures], items: Sequence[LocalFeatures]) -> list[Match | None]:
        """The verified matches of the items; None for an item that is not verified.

        An item's match is the one with most inliers among the queries.

        Args:
            queries: The local features of the queries, as `query` returns them.
            items: The local features of the items.
        """
        return self.fit(queries, items, self.pair(queries, items))

    def pair(self, queries: Sequence[LocalFeatures], items: Sequence[LocalFeatures]) -> list[list[Pairs]]:
        """The pairs of features of each query and each item, as `mutual_pairs` finds them.

        Args:
            queries: The local features of the queries.
            items: The local features of the items.
        """
        stored = [item.descriptors for item in items]
        return [geometry.mutual_pairs(query.descriptors, stored, self.ratio) for query in queries]

    def fit(
        self, queries: Sequence[LocalFeatures], items: Sequence[LocalFeatures], pairs: Sequence[Sequence[Pairs]]
    ) -> list[Match | None]:
        """The verified matches of the items, from their pairs of features; None for an item that is not verified.

        Args:
            queries: The local features of the queries.
            items: The local features of the items.
            pairs: What `pair` returned.
        """
        best: list[Match | None] = [None] * len(items)
        for query, of_items in zip(queries, pairs, strict=True):
            for place, (item, pair) in enumerate(zip(items, of_items, strict=True)):
                if len(pair[0]) < self.inliers:
                    continue  # not enough, whatever the homography
                match = geometry.fit(query, item, *pair, tolerance=self.tolerance)
                if match is not None and self.accepts(match):
                    known = best[place]
                    best[place] = match if known is None or match.inliers > known.inliers else known
        return best

    def accepts(self, match: Match) -> bool:
        """Whether the evidence is enough.

        Args:
            match: The evidence.
        """
        return match.inliers >= self.inliers and match.spread >= self.spread


def _check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least or (most and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} must be a whole number, {limits}, got {value!r}")


def _path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
