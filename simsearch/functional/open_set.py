"""Queries that have no match: thresholds that say so, and what accepting an answer's score is worth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simsearch.functional.ties import Rankings, average_precision, harmonic_numbers


def familiarity(scores: Tensor, neighbours: int) -> Tensor:
    """How much queries look like a collection as a whole, (Q,): the mean of their `neighbours` best scores.

    scores: (Q, K), best first, -inf where there is none; of fewer than `neighbours` the mean of these, -inf of none.
    What lies outside a distribution is far from its neighbours there (Sun et al. 2022, by the distance of the k-th).
    """
    best = scores[:, :neighbours]
    known = best.isfinite()
    mean = best.masked_fill(~known, 0.0).sum(1) / known.sum(1).clamp(min=1)
    return mean.masked_fill(~known.any(1), -torch.inf)


def threshold_at(no_match_scores: Tensor, rate: float, certainty: float = 0.95) -> float:
    """The smallest of the scores that new queries without a match exceed (score > threshold) at a rate of at most
    `rate`, with a probability of at least `certainty` over the scores drawn; inf where they are too few.

    no_match_scores: (N,), top scores of queries without a match; new ones are taken to be drawn as they were.
    The rate at which these exceed the j-th largest is Beta(j, N - j + 1) or lower, and at most `rate` with the
    probability that a Binomial(N, rate) is j or more: the threshold is that of the largest j for which it is
    `certainty` (the tolerance limits of Wilks 1941; for conformal prediction Vovk 2012, proposition 2b).

    Raises ValueError for scores that are not (N,) or hold NaN, and for a rate or certainty outside (0, 1).
    """
    _check_scores("no_match_scores", no_match_scores)
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate} is no rate of false matches: use a number between 0 and 1, such as 0.01")
    if not 0 < certainty < 1:
        raise ValueError(f"certainty={certainty} is no probability: use a number between 0 and 1, such as 0.95")
    count = len(no_match_scores)
    fewer = torch.arange(count + 1, dtype=torch.float64)  # than j
    chances = torch.lgamma(torch.tensor(count + 1.0, dtype=torch.float64)) - torch.lgamma(fewer + 1)
    chances += fewer * math.log(rate) + (count - fewer) * math.log1p(-rate) - torch.lgamma(count - fewer + 1)
    place = int((chances.exp().cumsum(0) <= 1 - certainty).sum())
    if place == 0:
        return math.inf
    return float(no_match_scores.double().sort(descending=True).values[place - 1])


def least_scores(rate: float, certainty: float = 0.95) -> int:
    """How many scores `threshold_at` takes at least to promise a rate."""
    return math.ceil(math.log1p(-certainty) / math.log1p(-rate))


def false_match_curve(match_scores: Tensor, no_match_scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Thresholds, recall, false-match rate and precision at each, float64 (T,) all.

    match_scores: (M,), of queries with a match, -inf where the answer is not it. no_match_scores: (N,), of
    queries without one. Thresholds are the scores that occur, rising; what exceeds one is accepted. recall: the
    share of match_scores accepted; false-match rate: that of no_match_scores; precision: the share of matches
    among all accepted, of these M and N; NaN at the last, where nothing is.

    Raises ValueError for scores that are not (M,) and (N,), for none of either, and for NaN.
    """
    accepted = []
    thresholds = torch.cat([match_scores.double().flatten(), no_match_scores.double().flatten()]).unique()
    for name, scores in (("match_scores", match_scores), ("no_match_scores", no_match_scores)):
        _check_scores(name, scores)
        if len(scores) == 0:
            raise ValueError(f"{name} is empty: a curve needs queries with a match and queries without")
        below = torch.searchsorted(scores.double().sort().values, thresholds, right=True)
        accepted.append((len(scores) - below).double())
    match, no_match = accepted
    return thresholds, match / len(match_scores), no_match / len(no_match_scores), match / (match + no_match)


def global_average_precision(confidence: Tensor, correct: Tensor, total_positive: int) -> float:
    """Micro-average precision (GAP) of one answer a query, in [0, 1].

    All queries are ranked together by confidence; each correct answer adds the precision down to it, and the sum
    is divided by `total_positive`, the queries that have a right answer. Equal confidences: the expectation over
    their orders. As Google Landmarks (Weyand et al. 2020) and the Met benchmark (Ypsilantis et al. 2021) have it.

    confidence: (Q,). correct: bool (Q,), never true of a distractor. Raises ValueError for other shapes, no
    queries, NaN, and a total_positive below 1 or below the number of correct answers.
    """
    _check_scores("confidence", confidence)
    if correct.shape != confidence.shape or correct.dtype != torch.bool:
        raise ValueError(f"correct must be bool {tuple(confidence.shape)}, got {correct.dtype} {tuple(correct.shape)}")
    found = int(correct.sum())
    if total_positive < max(found, 1):
        raise ValueError(
            f"total_positive={total_positive}, but {found} answers are correct: count all queries with a right answer"
        )
    if found == 0:
        return 0.0
    _, level = (-confidence.double()).unique(return_inverse=True)
    size = level.bincount()
    hits = level[correct].bincount(minlength=len(size))
    held = hits > 0
    ranking = Rankings(
        relevant=torch.tensor([found]),
        above=torch.empty(1, 0, dtype=torch.int64),
        alone=torch.empty(1, 0, dtype=torch.bool),
        query=torch.zeros(int(held.sum()), dtype=torch.int64),
        at=(size.cumsum(0) - size)[held],
        size=size[held],
        hits_above=(hits.cumsum(0) - hits)[held],
        hits=hits[held],
    )
    return float(average_precision(ranking, harmonic_numbers(len(confidence)))) * found / total_positive


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.ndim != 1:
        raise ValueError(f"{name} must be one score a query, (N,), got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{name} holds NaN: give each query a score, -inf for one that is never accepted")
