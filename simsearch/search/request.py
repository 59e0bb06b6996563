"""Requests to a catalog, and its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from simsearch.functional.geometry import Match
from simsearch.search.filters import Condition
from simsearch.types import LocalFeatures

Regions = Callable[[], Tensor]


def check_min_score(value: float | None) -> None:
    """Raises a ValueError unless a least score of items is None or a finite number.

    Args:
        value: The least score.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(
            f"min_score must be a finite number such as 0.3, or null for items with any score, got {value}"
        )


@dataclass(frozen=True)
class Request:
    """One request to a catalog.

    Attributes:
        like: Examples, in the form that the index stores (`describe.encode`, or `Engine.vectors` for items): float32
            (M, D), or packed codes uint8.
        unlike: Counter-examples (U, D), in the same form.
        k: Number of items, 1 or more.
        weights: Weights of the descriptor's parts. A part that is not named keeps its own weight.
        where: Conditions that must all hold.
        diversity: Trade-off in [0, 1]: 0 ranks by score alone.
        collapse: Return at most one item per work, and none of the works of `exclude`.
        hubness: Subtract half of an item's mean similarity to its nearest neighbours from its score (CSLS), which
            demotes items that are close to every query.
        exclude: Positions of the query's own items.
        local: Local features of the examples (`Verification.query`, `StoredFeatures.take`). The best items are verified
            by them. Nothing is verified without.
        regions: The descriptors of the examples' regions, (R, D) in the form of `like`. Their nearest items are
            verified too. It is called only if they are needed.
        min_score: Return only items with at least this score. None returns items with any score.

    Raises:
        ValueError: If `k` is below 1, `diversity` lies outside [0, 1], `min_score` is no finite number, or there is no
            example.
    """

    like: Tensor
    unlike: Tensor | None = None
    k: int = 10
    weights: Mapping[str, float] | None = None
    where: tuple[Condition, ...] = ()
    diversity: float = 0.0
    collapse: bool = True
    hubness: bool = False
    exclude: tuple[int, ...] = ()
    local: tuple[LocalFeatures, ...] = ()
    regions: Regions | None = None
    min_score: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.k, Integral):
            raise ValueError(f"k must be a whole number, got {self.k}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity must lie in [0, 1] (0: by score alone), got {self.diversity}")
        check_min_score(self.min_score)
        if len(self.like) == 0:
            raise ValueError("no example: give at least one image or item to be like")


@dataclass(frozen=True)
class Recommendation:
    """The answer of a catalog, best first. K is below the requested k if no more items are left.

    Attributes:
        ids: int64 (K,), positions.
        scores: float32 (K,), inner products with the combined query: weighted means of the cosines of the parts.
        parts: For each part, its contribution to the scores, (K,).
        verdicts: The verdict on each item (see `Engine.verdicts`). An item whose score is negative, or no higher than
            the calibration's floor, is never "similar".
        verdict: The best of the verdicts. "none" if there is no item.
        candidates: Number of items that were searched, after filters and exclusions.
        matches: For each item, the match of a verified item, else None. Verified items come first, those with most
            inliers ahead.
    """

    ids: Tensor
    scores: Tensor
    parts: dict[str, Tensor]
    verdicts: list[str]
    verdict: str
    candidates: int
    matches: list[Match | None]


@dataclass(frozen=True)
class Hit:
    """One item of an answer.

    Attributes:
        rank: Rank in the answer, from 1.
        id: The item's id.
        score: Cosine to the query, or the weighted mean of the cosines of the parts.
        verdict: "same work", "similar", "none" or "uncalibrated".
        parts: The contribution of each part of the descriptor to the score.
        shared: Attributes that the item has in common with items that the query named.
        attributes: All attributes of the item.
        inliers: Number of inliers of a verified item. None for other items.
        outline: The corners of a verified item in the query, clockwise from its top left; x and y as fractions of the
            query's width and height. None for other items.
    """

    rank: int
    id: str
    score: float
    verdict: str
    parts: dict[str, float]
    shared: dict[str, str]
    attributes: dict[str, Any]
    inliers: int | None = None
    outline: list[list[float]] | None = None
