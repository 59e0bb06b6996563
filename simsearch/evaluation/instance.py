"""The evaluator of instance retrieval with distractor queries: GAP, micro-average precision and AP at a cutoff."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from simsearch.evaluation.evaluator import Intervals, Measured, Numbers, means, query_units
from simsearch.functional.open_set import global_average_precision, jackknifed_average_precision
from simsearch.functional.ranking import find_junk, measure_ranking
from simsearch.functional.reranking import nearest, unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.functional.significance import jackknife_interval
from simsearch.types import RetrievalTask

_GROUPS = 200  # of sampling units, at most, in a jackknife


@dataclass(frozen=True)
class Instance:
    """Evaluates the answers to all queries as the benchmarks of instance retrieval do, distractor queries included.

    A query without a relevant item is a distractor: what is answered to it is wrong. Scores are cosines (codes as
    vectors of +1 and -1), and junk is left out. Equal scores of several queries count in expectation over their orders.
    Of items with one score for a query, as codes have them, the first in the gallery is its first answer.

    - `instance/GAP`: the first answers to all queries in one ranking by score, divided by the number of queries that
      have a relevant item; `instance/GAP-` leaves the distractors out, and `instance/accuracy` is the share of the
      others whose first answer is relevant (the Met, with one neighbour).
    - `instance/microAP`: the first `depth` answers to all queries in one ranking, divided by the number of all pairs of
      a query and a relevant item (the image similarity challenge, DISC, which puts the wrong of equal scores first).
    - `instance/mAP@k_minRk` with k = `depth`: the AP of the first k ranks, divided by min(R, k), the mean over the
      queries that have a relevant item (ILIAS: mAP@1k).
    - `instance/distractors`: the number of distractors.

    Attributes:
        one_process: It needs all descriptors in one process.
        depth: Number of answers to a query, 1 or more.

    Raises:
        ValueError: If `depth` is below 1.

    Source:
        Ypsilantis et al.: The Met dataset: Instance-level recognition for artworks. NeurIPS 2021. Douze et al.: The
        2021 image similarity dataset and challenge. Kordopatis-Zilos et al.: ILIAS: Instance-level image retrieval at
        scale. CVPR 2025.
    """

    one_process: ClassVar[bool] = True

    depth: int = 1000

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The metrics of a task, NaN where no query has a relevant item.

        Args:
            query: The queries of the task, in one process.
            gallery: The gallery of the task, in one process.
            task: The task.
        """
        asked, searched = (
            side.with_vectors(unit_vectors(side.whole.vectors, side.bits)).whole for side in (query, gallery)
        )
        junk = find_junk(asked, searched, exclude_self=task.exclude_self)
        found = nearest(asked.vectors, searched.vectors, self.depth, junk)
        right = (searched.label[found.ids.clamp(min=0)] == asked.label[:, None]) & (asked.label >= 0)[:, None]
        right &= found.ids >= 0
        ranked = measure_ranking(asked, searched, ks=(self.depth,), exclude_self=task.exclude_self)
        relevant, name = ranked["relevant"].long(), f"AP@{self.depth}_minRk"
        accuracy = right[:, 0].double().masked_fill(relevant == 0, torch.nan)
        per_query = {f"instance/{name}": ranked[name], "instance/accuracy": accuracy}

        units = query_units(query, task)
        metrics, intervals = means(per_query, units)
        values, ends = measure_pooled(found.scores, right, relevant, units)
        metrics |= {f"instance/{name}": value for name, value in values.items()}
        intervals |= {f"instance/{name}": interval for name, interval in ends.items()}
        metrics["instance/distractors"] = float((relevant == 0).sum())
        return Measured(metrics, units, intervals, per_query)


@dataclass(frozen=True)
class _Answers:
    """Answers in one ranking: confidence, correctness and query of each, (N,), and right answers of each query (Q,)."""

    confidence: Tensor
    correct: Tensor
    query: Tensor
    positives: Tensor

    @property
    def precision(self) -> float:
        """The micro-average precision, NaN where there is no right answer at all."""
        total = int(self.positives.sum())
        return global_average_precision(self.confidence, self.correct, total) if total else math.nan

    def interval(self, units: Tensor) -> tuple[float, float]:
        """The 95% interval of the precision over units (Q,), of which more than 200 are joined to 200 at random."""
        unit = units.unique(return_inverse=True)[1]
        count = int(unit.max()) + 1
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % _GROUPS
        group = mixed[unit]
        positives = torch.zeros(min(count, _GROUPS), dtype=torch.int64).index_add_(0, group, self.positives)
        without = jackknifed_average_precision(self.confidence, self.correct, group[self.query], positives)
        return jackknife_interval(self.precision, without.nan_to_num(self.precision), positives)


def pooled_precision(scores: Tensor, right: Tensor, relevant: Tensor) -> dict[str, float]:
    """GAP, GAP- and microAP of the answers to all queries together (see `Instance`).

    Args:
        scores: Floating point (Q, M), the scores of the answers to each query, -inf where there is none.
        right: bool (Q, M), which answers are right.
        relevant: (Q,), the number of right answers that each query has, found or not. 0 for a distractor.

    Returns:
        Name -> value, NaN where no query has a right answer.

    Example:
        >>> scores = torch.tensor([[0.75, 0.5], [0.625, 0.25]])
        >>> right = torch.tensor([[False, True], [True, False]])
        >>> pooled_precision(scores, right, torch.tensor([1, 2]))["GAP"]  # the second of two first answers is right
        0.25
    """
    return {name: answers.precision for name, answers in _rankings(scores, right, relevant.long()).items()}


def measure_pooled(scores: Tensor, right: Tensor, relevant: Tensor, units: Tensor) -> tuple[Numbers, Intervals]:
    """The values of `pooled_precision` and, where there are any, their 95% intervals over sampling units.

    Args:
        scores: Floating point (Q, M), the scores of the answers to each query, -inf where there is none.
        right: bool (Q, M), which answers are right.
        relevant: int64 (Q,), the number of right answers that each query has, found or not. 0 for a distractor.
        units: int64 (Q,), the sampling unit of each query.
    """
    rankings = _rankings(scores, right, relevant)
    values = {name: answers.precision for name, answers in rankings.items()}
    known = bool((relevant > 0).any())
    return values, {name: answers.interval(units) for name, answers in rankings.items()} if known else {}


def _rankings(scores: Tensor, right: Tensor, relevant: Tensor) -> dict[str, _Answers]:
    rows, has_match = torch.arange(len(scores)), relevant > 0
    best, place = scores.max(1)
    first, one = right.gather(1, place[:, None])[:, 0], has_match.long()
    there = scores.isfinite()
    return {
        "GAP": _Answers(best, first, rows, one),
        "GAP-": _Answers(best[has_match], first[has_match], rows[has_match], one),
        "microAP": _Answers(scores[there], right[there], rows[:, None].expand_as(there)[there], relevant),
    }
