"""Measures of what a catalog answers to photographs: which works it finds, and which it accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simsearch.evaluation.evaluator import Measured, means
from simsearch.functional.open_set import global_average_precision, jackknifed_average_precision
from simsearch.functional.ranking import mean_name
from simsearch.functional.significance import (
    jackknife_difference,
    jackknife_interval,
    paired_interval,
    paired_permutation,
)

NOTHING = (
    "no photograph shows a work of the catalog, and the catalog does not say which answers are the same work: there is "
    "nothing to measure; run `simsearch calibrate`, or make the catalog with verify=sift"
)
POOLED = ("GAP", "microAP")  # over the answers to all photographs together: no mean over photographs


@dataclass(frozen=True)
class Answers:
    """What was answered to Q photographs: for each a list of works, best first.

    Attributes:
        works: int64 (Q, K), numbers of works, each at most once in a list, -1 where a list is shorter.
        confidence: float64 (Q, K), how sure each answer is, on one scale for all photographs, not rising in a list.
            -inf where a list is shorter.
        accepted: bool (Q, K), which answers are called the same work. None if the catalog is not calibrated.

    Raises:
        ValueError: If the shapes differ, or a confidence is NaN or rises.
    """

    works: Tensor
    confidence: Tensor
    accepted: Tensor | None

    def __post_init__(self) -> None:
        given = [self.works, self.confidence, *([] if self.accepted is None else [self.accepted])]
        if self.works.ndim != 2 or any(one.shape != self.works.shape for one in given):
            raise ValueError(f"answers must all be (Q, K), got {[tuple(one.shape) for one in given]}")
        if self.confidence.isnan().any() or (self.confidence[:, 1:] > self.confidence[:, :-1]).any():
            raise ValueError("the confidence of a list must not be NaN or rise: order the answers, best first")


@dataclass(frozen=True)
class Paired:
    """The difference of one metric between two lists of answers to the same photographs.

    Attributes:
        metric: Name of the metric.
        difference: How much larger it is for the first answers.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        p: Two-sided p-value, not adjusted: sign flips of units, or Student's test of the jackknife for POOLED.
    """

    metric: str
    difference: float
    low: float
    high: float
    p: float


def judge(answers: Answers, right: Sequence[Sequence[int]]) -> Tensor:
    """bool (Q, K), which answers are right.

    Args:
        answers: The answers.
        right: Numbers of the works that each photograph shows.
    """
    known = [torch.isin(own, torch.tensor(list(shown))) for own, shown in zip(answers.works, right, strict=True)]
    return torch.stack(known) & (answers.works >= 0)


def measure_queries(answers: Answers, right: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5)) -> dict[str, Tensor]:
    """The metrics of each photograph, float64 (Q,), NaN where it has no value.

    Of photographs with a match, that is of works in the catalog:

    - `R@k`: whether a right work is among the first k.
    - `AP@K_minRk`: the precisions at the right works, summed and divided by the number of right works, or by K if there
      are more. Where a photograph shows one work, it is 1 / rank.
    - `false`: whether a wrong work is accepted.
    - `found`: the share of the right works that are accepted, 0 if a wrong one is too.
    - `unknown`: the rest, of which nothing is said.

    Of photographs without a match:

    - `no_match/false`: whether a work is accepted.

    Args:
        answers: The answers.
        right: Numbers of the works that each photograph shows. Empty if the catalog has none of them.
        ks: Cutoffs of R@k.
    """
    hits = judge(answers, right)
    count = torch.tensor([len(set(shown)) for shown in right])
    none = count == 0
    length = answers.works.shape[1]
    found = {f"R@{k}": hits[:, :k].any(1).double() for k in ks}
    precision = hits.double().cumsum(1) / torch.arange(1, length + 1)
    best = count.clamp(min=1, max=max(length, 1))
    found[f"AP@{length}_minRk"] = (precision * hits).sum(1) / best
    if answers.accepted is not None:
        taken = answers.accepted & (answers.works >= 0)
        found["false"] = (taken & ~hits).any(1).double()
        found["found"] = (taken & hits).sum(1) / count.clamp(min=1).double() * (1 - found["false"])
        found["unknown"] = 1 - found["false"] - found["found"]
    found = {name: values.masked_fill(none, torch.nan) for name, values in found.items()}
    if answers.accepted is not None:
        found["no_match/false"] = taken.any(1).double().masked_fill(~none, torch.nan)
    return found


def measure_photographs(
    answers: Answers, right: Sequence[Sequence[int]], units: Tensor, ks: Sequence[int] = (1, 5)
) -> Measured:
    """The means of `measure_queries`, and GAP and microAP over the answers to all photographs, with 95% intervals.

    Photographs without a match are distractors: what is answered to them counts as wrong in both. Where no photograph
    has a match, only `no_match/false` is measured.

    - `GAP`: the first answers to all photographs in one ranking by confidence, divided by the number of photographs
      with a match (Weyand et al. 2020).
    - `microAP`: all answers to all photographs in one ranking, divided by the number of pairs of photograph and right
      work (Perronnin et al. 2009; the image similarity challenge, Douze et al. 2021).

    Args:
        answers: The answers.
        right: Numbers of the works that each photograph shows. Empty if the catalog has none of them.
        units: int64 (Q,), the sampling unit of each photograph.
        ks: Cutoffs of R@k.

    Raises:
        ValueError: If no photograph has a match, and nothing was accepted or refused.
    """
    if not any(right) and answers.accepted is None:
        raise ValueError(NOTHING)
    per_query = measure_queries(answers, right, ks)
    per_query = {name: values for name, values in per_query.items() if not values.isnan().all()}
    metrics, intervals = means(per_query, units)
    for name, (value, without, sizes) in _pooled(answers, right, units).items():
        metrics[name], intervals[name] = value, jackknife_interval(value, without, sizes)
    return Measured(metrics, units, intervals, per_query)


def compare_photographs(
    ours: Answers, theirs: Answers, right: Sequence[Sequence[int]], units: Tensor, ks: Sequence[int] = (1, 5)
) -> list[Paired]:
    """The paired differences of all metrics that two lists of answers have in common.

    Args:
        ours: Answers.
        theirs: Other answers to the same photographs.
        right: Numbers of the works that each photograph shows.
        units: int64 (Q,), the sampling unit of each photograph.
        ks: Cutoffs of R@k.
    """
    length = min(ours.works.shape[1], theirs.works.shape[1])
    ours, theirs = _shortened(ours, length), _shortened(theirs, length)
    a, b = measure_queries(ours, right, ks), measure_queries(theirs, right, ks)
    found = []
    for name in (name for name in a if name in b and not a[name].isnan().all()):
        ends = paired_interval(a[name], b[name], units)
        found.append(Paired(mean_name(name), *ends, paired_permutation(a[name], b[name], units)))
    mine, other = _pooled(ours, right, units), _pooled(theirs, right, units)
    for name, (value, without, sizes) in mine.items():
        difference = value - other[name][0]
        found.append(Paired(name, difference, *jackknife_difference(difference, without - other[name][1], sizes)))
    return found


def _shortened(answers: Answers, length: int) -> Answers:
    accepted = None if answers.accepted is None else answers.accepted[:, :length]
    return replace(
        answers, works=answers.works[:, :length], confidence=answers.confidence[:, :length], accepted=accepted
    )


def _pooled(answers: Answers, right: Sequence[Sequence[int]], units: Tensor) -> dict[str, tuple[float, Tensor, Tensor]]:
    """GAP and microAP, their values without each of the units (U,), and each unit's number of right answers (U,).

    With a single unit of works there is no value without it: it stands for itself.
    """
    _, unit = units.unique(return_inverse=True)
    number = int(unit.max()) + 1
    hits = judge(answers, right)
    count = torch.tensor([len(set(shown)) for shown in right])
    found: dict[str, tuple[float, Tensor, Tensor]] = {}
    if not any(right):
        return found
    for name, depth, own in (("GAP", 1, count.clamp(max=1)), ("microAP", answers.works.shape[1], count)):
        there = answers.works[:, :depth] >= 0
        confidence, correct = answers.confidence[:, :depth][there], hits[:, :depth][there]
        of = unit[:, None].expand_as(there)[there]
        positives = torch.zeros(number, dtype=torch.int64).index_add_(0, unit, own)
        value = global_average_precision(confidence, correct, int(own.sum()))
        without = jackknifed_average_precision(confidence, correct, of, positives)
        found[name] = value, without.nan_to_num(value), positives
    return found
