"""What is asked of a catalog, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import Tensor

from simsearch.search.filters import Condition


@dataclass(frozen=True)
class Request:
    """What is asked of a catalog.

    like, unlike: descriptors as the catalog's index holds them (`describe.encode`, or `Engine.vectors` of its
    items): float32 (M, D) and (U, D), or packed codes uint8. k: items wanted. weights: of the descriptor's parts, its
    own where None or not named. where: conditions that all hold. diversity: from 0 (by score alone) to 1.
    collapse: at most one item of a work, and none of the works of `exclude`. hubness: rank by the score less half an
    item's mean similarity to its nearest (CSLS), against items that are near to everything. exclude: positions of
    the query's own items.

    Raises ValueError for k < 1, diversity outside [0, 1] and no example.
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

    def __post_init__(self) -> None:
        if not isinstance(self.k, Integral):
            raise ValueError(f"k must be a whole number, got {self.k}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity must lie in [0, 1] (0: by score alone), got {self.diversity}")
        if len(self.like) == 0:
            raise ValueError("no example: give at least one image or item to be like")


@dataclass(frozen=True)
class Recommendation:
    """What a catalog answers, best first; K is less than k where there is no more.

    ids: positions int64 (K,). scores: float32 (K,), inner products with the combined query: the weighted mean of the
    parts' cosines. parts: what each part adds to the score, (K,) each. verdicts: of each item, see
    `Engine.verdicts`; an item whose score is negative is not "similar". verdict: the best of them, "none" where
    there is no item. candidates: how many items were searched, those that may be answered.
    """

    ids: Tensor
    scores: Tensor
    parts: dict[str, Tensor]
    verdicts: list[str]
    verdict: str
    candidates: int


@dataclass(frozen=True)
class Hit:
    """One item that was found.

    score: the cosine to the query, or the weighted mean of its parts' cosines. verdict: "same work", "similar", "none"
    or "uncalibrated". parts: what each part of the descriptor adds to the score. shared: attributes that it has in
    common with items that the query named. attributes: what the catalog knows of it.
    """

    rank: int
    id: str
    score: float
    verdict: str
    parts: dict[str, float]
    shared: dict[str, str]
    attributes: dict[str, Any]
