"""The meaning of scores: same work, similar or none. Words and rules of the calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from simsearch.functional.geometry import Match
from simsearch.functional.open_set import agreeing

SAME_WORK, SIMILAR, NONE, UNCALIBRATED = "same work", "similar", "none", "uncalibrated"
# How much of a query's background counts against the same work, and for what is similar: of 0, .25, .5, .75 and 1 the
# one that finds most photographs of works at the same rate (experiments/2026-11-23-art-recommender).
_BACKGROUND = 0.5


def sameness(cosines: Tensor, background: Tensor) -> Tensor:
    """The values that the thresholds of "same work" apply to: cosines minus a fraction of the background.

    Args:
        cosines: (..., Q), cosines to the queries.
        background: (Q,), background of the queries.
    """
    return cosines - _BACKGROUND * background.clamp(min=-1)


def similarity(cosines: Tensor, background: Tensor) -> Tensor:
    """The values that the thresholds of "similar" apply to: cosines plus a fraction of the background.

    A background above an item's cosine counts no more than that cosine. An item far behind the query's neighbours is
    not similar for their sake. The best item of a query is never behind them.

    Args:
        cosines: (..., Q), cosines to the queries.
        background: (Q,), background of the queries.
    """
    return cosines + _BACKGROUND * torch.minimum(cosines, background).clamp(min=-1)


def exceeds(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """bool (K,), which items are close to enough of the examples.

    Args:
        values: (K, M), a value for each item and example.
        thresholds: Thresholds, as `thresholds_at` returns them.
    """
    needed, of = agreeing(values.shape[1], len(thresholds))
    return values.topk(needed, dim=1).values[:, -1] > thresholds[of - 1]


def exceeds_inliers(matches: Sequence[Match | None], thresholds: Sequence[float] | None, examples: int) -> list[bool]:
    """Which matches have more inliers than calibrated. A match is that of the example with most inliers.

    Args:
        matches: The matches of items, None for one that is not verified.
        thresholds: Thresholds, as `thresholds_at` returns them. None if they are not calibrated: any match is enough.
        examples: Number of examples. If no threshold promises the rate for so many, no match is enough.
    """
    if thresholds is None:
        least = 0.0
    else:
        needed, of = agreeing(examples, len(thresholds))
        least = thresholds[of - 1] if needed == 1 else math.inf
    return [match is not None and match.inliers > least for match in matches]


def best_verdict(verdicts: Sequence[str]) -> str:
    """The verdict of an answer: the best verdict among its items. "none" if there are no items.

    Args:
        verdicts: The verdicts on the items.
    """
    return min(verdicts, key=(SAME_WORK, SIMILAR, UNCALIBRATED, NONE).index, default=NONE)
