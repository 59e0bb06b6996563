"""Queries that have no match: thresholds that say so, and what accepting an answer's score is worth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simsearch.functional.ties import Rankings, average_precision, harmonic_numbers


def stand_out(scores: Tensor, works: Tensor, taken: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The best score of each query and what it stands out against, (Q,) both; -inf where there is nothing.

    scores: (Q, K), best first, -inf where there is none. works: int64 (Q, K), of which work each is. taken: bool
    (Q, K), what does not count. The background of a query is the mean of its `neighbours` best scores of other works
    than the leader's, fewer where there are fewer. Scores are judged beside those of a cohort as in speaker
    verification (Auckenthaler, Carey, Lloyd-Thomas: Score normalization, 2000); here the cohort is the nearest.
    """
    order = taken.to(torch.uint8).argsort(dim=1, stable=True)
    best, works = scores.masked_fill(taken, -torch.inf).gather(1, order), works.gather(1, order)
    known = (works != works[:, :1]) & best.isfinite()
    known &= known.cumsum(1) <= neighbours
    mean = best.masked_fill(~known, 0.0).sum(1) / known.sum(1).clamp(min=1)
    return best[:, 0], mean.masked_fill(~known.any(1), -torch.inf)


def threshold_at(
    no_match_scores: Tensor, rate: float, certainty: float = 0.95, *, units: Tensor | None = None
) -> float:
    """The smallest of the scores that new queries without a match exceed (score > threshold) at a rate of at most
    `rate`, with a probability of at least `certainty` over the scores drawn; inf where they are too few.

    no_match_scores: (N,), top scores of queries without a match; new ones are taken to be drawn as they were.
    units: int64 (N,), what was drawn: scores of one unit (a work) count once, by the highest. None: scores are units,
    but equal ones, which chance does not make, are one; of a kind that ties by itself (codes) say `units`.
    The rate at which new scores exceed the j-th largest of N is Beta(j, N - j + 1) or lower, and at most `rate` with
    the probability that a Binomial(N, rate) is j or more: the threshold is that of the largest j for which it is
    `certainty` (the tolerance limits of Wilks 1941; for conformal prediction Vovk 2012, proposition 2b).

    Raises ValueError for scores that are not (N,) or hold NaN, units of another shape, and for a rate or certainty
    outside (0, 1).
    """
    _check_scores("no_match_scores", no_match_scores)
    _check_promise(rate, certainty)
    scores = no_match_scores.double()
    if units is None:
        scores = scores.unique()
    else:
        if units.shape != scores.shape:
            raise ValueError(f"units must be one a score, {tuple(scores.shape)}, got {tuple(units.shape)}")
        kinds, unit = units.unique(return_inverse=True)
        scores = scores.new_full((len(kinds),), -math.inf).scatter_reduce(0, unit, scores, "amax")
    count = len(scores)
    fewer = torch.arange(count + 1, dtype=torch.float64)  # than j
    chances = torch.lgamma(torch.tensor(count + 1.0, dtype=torch.float64)) - torch.lgamma(fewer + 1)
    chances += fewer * math.log(rate) + (count - fewer) * math.log1p(-rate) - torch.lgamma(count - fewer + 1)
    place = int((chances.exp().cumsum(0) <= 1 - certainty).sum())
    if place == 0:
        return math.inf
    return float(scores.sort(descending=True).values[place - 1])


def pairs_once(scores: Tensor) -> Tensor:
    """Of each two scores that follow each other in order the lower, (N // 2,), falling: what `threshold_at` may take
    of scores between the works of one collection.

    Two works that are each other's nearest have the same score, and almost all high scores are of such pairs: the
    number above a threshold is then twice that of the pairs, or between where only one of some was drawn. Half as many
    units, each worth two scores, make the same promise.
    """
    return scores.sort(descending=True).values[1::2]


def thresholds_at(units: Tensor, rate: float, certainty: float = 0.95, most: int = 16) -> list[float]:
    """Thresholds that any of 1, 2, ... queries without a match exceed at a rate of at most `rate`: those of rate,
    rate / 2, ..., `most` of them or as many as the scores (N,), one a unit, can promise. See `agreeing`.
    """
    own = torch.arange(len(units))
    found = [threshold_at(units, rate / m, certainty, units=own) for m in range(1, most + 1)]
    return [threshold for threshold in found if threshold < math.inf]


def agreeing(examples: int, promised: int) -> tuple[int, int]:
    """(j, m): a request of so many `examples` keeps the rate of one where j of them must exceed the m-th threshold,
    m <= promised, the one that a single query exceeds at rate / m (`thresholds_at`).

    j is 1 where there are thresholds enough. By Markov's inequality j or more of M queries exceed it at once at a rate
    of at most M rate / (m j), however they depend on each other.
    """
    needed = -(-examples // promised)
    return needed, -(-examples // needed)


def least_scores(rate: float, certainty: float = 0.95) -> int:
    """How many units `threshold_at` takes at least to promise a rate."""
    _check_promise(rate, certainty)
    return math.ceil(math.log1p(-certainty) / math.log1p(-rate))


def least_rate(units: int, certainty: float = 0.95) -> float:
    """The least rate that `threshold_at` promises by so many units; 1 of none."""
    least = -math.expm1(math.log1p(-certainty) / units) if units else 1.0
    return min(1.0, least * (1 + 1e-9))  # by a hair more than what rounding takes


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


def _check_promise(rate: float, certainty: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate} is no rate of false matches: use a number between 0 and 1, such as 0.01")
    if not 0 < certainty < 1:
        raise ValueError(f"certainty={certainty} is no probability: use a number between 0 and 1, such as 0.95")


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.ndim != 1:
        raise ValueError(f"{name} must be one score a query, (N,), got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{name} holds NaN: give each query a score, -inf for one that is never accepted")
