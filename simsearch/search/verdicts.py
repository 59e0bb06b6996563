"""What the scores of an answer say: the same work, similar, or nothing; the words and the rules of a calibration."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simsearch.functional.open_set import agreeing

SAME_WORK, SIMILAR, NONE, UNCALIBRATED = "same work", "similar", "none", "uncalibrated"
# How much of a query's background counts against the same work, and for what is similar: of 0, .25, .5, .75 and 1 the
# one that finds most photographs of works at the same rate (experiments/2026-11-23-art-recommender).
_BACKGROUND = 0.5


def sameness(cosines: Tensor, background: Tensor) -> Tensor:
    """What the thresholds of "same work" are of: cosines (..., Q) less a part of the queries' background (Q,)."""
    return cosines - _BACKGROUND * background.clamp(min=-1)


def similarity(cosines: Tensor, background: Tensor) -> Tensor:
    """What the thresholds of "similar" are of: cosines (..., Q) and a part of the queries' background (Q,)."""
    return cosines + _BACKGROUND * background.clamp(min=-1)


def exceeds(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Which items, bool (K,), enough of the examples are near to; values (K, M), thresholds as `thresholds_at` has."""
    needed, of = agreeing(values.shape[1], len(thresholds))
    return values.topk(needed, dim=1).values[:, -1] > thresholds[of - 1]


def best_verdict(verdicts: Sequence[str]) -> str:
    """The verdict of an answer: the best of its items', "none" where it has none."""
    return min(verdicts, key=(SAME_WORK, SIMILAR, UNCALIBRATED, NONE).index, default=NONE)
