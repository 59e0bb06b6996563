"""Queries without a match: thresholds that reject them, and measures of accepting an answer by its score."""

from __future__ import annotations

import math

import torch
from scipy.special import betaincinv
from torch import Tensor

from simsearch.functional.ties import Rankings, average_precision, harmonic_numbers

_BLOCK = 2**22  # counts that are held together


def stand_out(scores: Tensor, works: Tensor, taken: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """The best score of each query and the background that it stands out against, (Q,) both.

    The background is the mean of the query's `neighbours` best scores of other works than the leading one, or of fewer
    where there are fewer. Speaker verification judges scores against those of a cohort in the same way (Auckenthaler,
    Carey, Lloyd-Thomas: Score normalization, 2000). Here the cohort is the nearest works.

    Args:
        scores: Floating point (Q, K), best first, -inf where there is none.
        works: int64 (Q, K), the work of each item.
        taken: bool (Q, K), items that do not count.
        neighbours: Number of scores in the background.

    Returns:
        Best scores and backgrounds, -inf where there is no score.

    Example:
        >>> scores, works = torch.tensor([[0.75, 0.5, 0.25]]), torch.tensor([[1, 1, 2]])
        >>> stand_out(scores, works, torch.zeros(1, 3, dtype=torch.bool), neighbours=1)
        (tensor([0.7500]), tensor([0.2500]))
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
    """The smallest threshold, among the scores, that queries without a match exceed at a rate of at most `rate`.

    The promise is for new queries, drawn as the given ones were, and for score > threshold. It holds with a probability
    of at least `certainty` over the draw of the given scores.

    The rate at which new scores exceed the j-th largest of N follows Beta(j, N - j + 1) or is lower. It is at most
    `rate` with the probability that a Binomial(N, rate) variable is j or more. The threshold is the j-th largest score
    for the largest j whose probability reaches `certainty`.

    Args:
        no_match_scores: Floating point (N,), the top scores of queries without a match.
        rate: Rate of false matches, in (0, 1).
        certainty: Probability of the promise, in (0, 1).
        units: int64 (N,), the sampling unit of each score: the scores of one unit (a work) count once, by the highest.
            With None each score is a unit, except that equal scores count as one, since chance does not make them. Give
            units for scores that tie by nature, such as Hamming distances.

    Returns:
        The threshold, or inf where there are too few scores to promise the rate.

    Raises:
        ValueError: If the scores are not (N,) or hold NaN, if the units have another shape, or if `rate` or `certainty`
            lies outside (0, 1).

    Source:
        Wilks 1941 (tolerance limits); for conformal prediction Vovk 2012, proposition 2b.

    Example:
        >>> threshold_at(torch.arange(299.0), rate=0.01)
        298.0
        >>> threshold_at(torch.arange(298.0), rate=0.01)  # too few
        inf
    """
    _check_scores("no_match_scores", no_match_scores)
    _check_promise(rate, certainty)
    scores = no_match_scores.double()
    if units is None:
        scores = scores.unique()
    else:
        if units.shape != scores.shape:
            raise ValueError(f"units must have one value per score, {tuple(scores.shape)}, got {tuple(units.shape)}")
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
    """The lower score of each two neighbours in sorted order, (N // 2,), descending.

    `threshold_at` may use these scores for scores between the works of one collection. Two works that are each other's
    nearest have the same score, and almost all high scores belong to such pairs. The number of scores above a threshold
    is then twice the number of pairs, or less where only one work of a pair was drawn. Half as many units, each worth
    two scores, keep the same promise.

    Args:
        scores: Floating point (N,).

    Example:
        >>> pairs_once(torch.tensor([0.5, 0.75, 0.75, 0.5, 0.25]))
        tensor([0.7500, 0.5000])
    """
    return scores.sort(descending=True).values[1::2]


def thresholds_at(units: Tensor, rate: float, certainty: float = 0.95, most: int = 16) -> list[float]:
    """Thresholds for the rates `rate`, `rate` / 2, `rate` / 3, ..., as many as the scores can promise.

    `agreeing` says which of them a request with several queries must exceed.

    Args:
        units: Floating point (N,), top scores of queries without a match, one per sampling unit.
        rate: Rate of false matches, in (0, 1).
        certainty: Probability of each promise, in (0, 1).
        most: Largest number of thresholds.

    Raises:
        ValueError: As `threshold_at` does.

    Example:
        >>> thresholds_at(torch.arange(299.0), rate=0.02)
        [297.0, 298.0]
    """
    own = torch.arange(len(units))
    found = [threshold_at(units, rate / m, certainty, units=own) for m in range(1, most + 1)]
    return [threshold for threshold in found if threshold < math.inf]


def agreeing(examples: int, promised: int) -> tuple[int, int]:
    """The pair (j, m): a request is accepted where j of its examples exceed the m-th of the `thresholds_at`.

    The request then has at most the rate of false matches of a single query. j is 1 where there are enough thresholds.
    A single query exceeds the m-th threshold at the rate r / m. By Markov's inequality, j or more of M queries exceed
    it together at a rate of at most M r / (m j), however they depend on each other.

    Args:
        examples: M, the number of query images in the request.
        promised: Number of thresholds, m <= `promised`.

    Example:
        >>> agreeing(examples=5, promised=16), agreeing(examples=5, promised=2)
        ((1, 5), (3, 2))
    """
    needed = -(-examples // promised)
    return needed, -(-examples // needed)


def least_scores(rate: float, certainty: float = 0.95) -> int:
    """The smallest number of units from which `threshold_at` can promise a rate.

    Args:
        rate: Rate of false matches, in (0, 1).
        certainty: Probability of the promise, in (0, 1).

    Raises:
        ValueError: If an argument lies outside (0, 1).

    Example:
        >>> least_scores(0.01)
        299
    """
    _check_promise(rate, certainty)
    return math.ceil(math.log1p(-certainty) / math.log1p(-rate))


def least_rate(units: int, certainty: float = 0.95) -> float:
    """The smallest rate that `threshold_at` can promise from some units; 1 for no units.

    Args:
        units: Number of sampling units.
        certainty: Probability of the promise, in (0, 1).

    Example:
        >>> round(least_rate(299), 5)
        0.00997
    """
    least = -math.expm1(math.log1p(-certainty) / units) if units else 1.0
    return min(1.0, least * (1 + 1e-9))  # by a hair more than what rounding takes


def least_share(found: int, of: int, certainty: float = 0.95) -> float:
    """The largest share that the true share reaches with a certainty, after some draws; 0 if nothing was found.

    Args:
        found: Number of draws that count.
        of: Number of independent draws.
        certainty: Probability that the true share is as large as the result, in (0, 1).

    Source:
        The lower limit of Clopper and Pearson: The use of confidence or fiducial limits. Biometrika 1934.

    Example:
        >>> round(least_share(59, of=59), 3), least_share(0, of=59)
        (0.95, 0.0)
    """
    return float(betaincinv(found, of - found + 1, 1 - certainty)) if found else 0.0


def false_match_curve(match_scores: Tensor, no_match_scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Thresholds, and the recall, the false-match rate and the precision at each of them, float64 (T,) each.

    The thresholds are the scores that occur, ascending. A score above a threshold is accepted.

    Args:
        match_scores: Floating point (M,), scores of queries with a match, -inf where the answer is not the match.
        no_match_scores: Floating point (N,), scores of queries without a match.

    Returns:
        Thresholds; the accepted share of `match_scores` (recall); the accepted share of `no_match_scores` (false-match
            rate); the share of matches among all that is accepted of these M and N scores (precision), NaN at the last
            threshold, where nothing is accepted.

    Raises:
        ValueError: If the scores are not (M,) and (N,), if one of them is empty, or if they hold NaN.

    Example:
        >>> _, recall, false_matches, _ = false_match_curve(torch.tensor([0.9, 0.6]), torch.tensor([0.5, 0.7]))
        >>> recall.tolist(), false_matches.tolist()
        ([1.0, 0.5, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0])
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
    """The micro-average precision (GAP) of one answer per query, in [0, 1].

    All queries are ranked together by confidence. Each correct answer adds the precision down to its rank. The sum is
    divided by the number of queries that have a right answer. Where confidences are equal, the value is the expectation
    over their orders.

    Args:
        confidence: Floating point (Q,).
        correct: bool (Q,), never true for a distractor.
        total_positive: Number of queries that have a right answer.

    Raises:
        ValueError: If a shape is wrong, if a confidence is NaN, or if `total_positive` is below 1 or below the number
            of correct answers.

    Source:
        Google Landmarks (Weyand et al. 2020), the Met benchmark (Ypsilantis et al. 2021).

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True])
        >>> round(global_average_precision(confidence, correct, total_positive=2), 4)  # (1 + 2/3) / 2
        0.8333
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
    at, above = size.cumsum(0) - size, hits.cumsum(0) - hits
    harmonic = harmonic_numbers(len(confidence))
    sums = _precision_sums(at[held][None], size[held][None], above[held][None], hits[held][None], harmonic)
    return min(1.0, float(sums[0]) / total_positive)  # precisions of 1 may add up to a rounding more


def jackknifed_average_precision(confidence: Tensor, correct: Tensor, units: Tensor, positives: Tensor) -> Tensor:
    """The micro-average precision without each sampling unit, float64 (U,). NaN where nothing right is left.

    Each value is that of `global_average_precision` over the answers of the other units.

    Args:
        confidence: Floating point (N,), the confidence of each answer. A query may have several.
        correct: bool (N,).
        units: int64 (N,), the unit of each answer, in 0..U-1.
        positives: int64 (U,), the number of right answers that each unit's queries have, found or not.

    Raises:
        ValueError: If a shape is wrong, or if a confidence is NaN.

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True])
        >>> jackknifed_average_precision(confidence, correct, torch.arange(3), torch.tensor([1, 0, 1]))
        tensor([0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    _check_scores("confidence", confidence)
    if not confidence.shape == correct.shape == units.shape or (len(units) and int(units.max()) >= len(positives)):
        raise ValueError(
            f"correct and units must be one an answer, {tuple(confidence.shape)}, with units below {len(positives)}, "
            f"got {tuple(correct.shape)} and {tuple(units.shape)}"
        )
    _, level = (-confidence.double()).unique(return_inverse=True)
    size = level.bincount()
    all_hits = level[correct].bincount(minlength=len(size))
    held = (all_hits > 0).nonzero()[:, 0]  # the levels of equal confidence that hold something right, best first
    at = (size.cumsum(0) - size)[held]
    below, place = torch.searchsorted(held, level, right=True), torch.searchsorted(held, level)
    same = torch.isin(level, held)
    order = units.argsort(stable=True)
    ends = [0, *units.bincount(minlength=len(positives)).cumsum(0).tolist()]
    step = max(1, _BLOCK // (len(held) + 1))
    harmonic, sums = harmonic_numbers(len(confidence)), []
    for start in range(0, len(positives), step):
        stop = min(start + step, len(positives))
        rows = order[ends[start] : ends[stop]]
        shape = (stop - start, len(held) + 1)

        def counted(columns: Tensor, rows: Tensor, shape: tuple[int, int] = shape, start: int = start) -> Tensor:
            """How many answers of each unit are in each column, int64 (units of the block, len(held) + 1)."""
            flat = (units[rows] - start) * shape[1] + columns[rows]
            return flat.bincount(minlength=shape[0] * shape[1]).reshape(shape)

        own_above = counted(below, rows).cumsum(1)[:, :-1]
        own = counted(place, rows[same[rows]])[:, :-1]
        hits = all_hits[held] - counted(place, rows[correct[rows]])[:, :-1]
        sums.append(_precision_sums(at - own_above, size[held] - own, hits.cumsum(1) - hits, hits, harmonic))
    left = positives.sum() - positives
    return torch.cat(sums) / left.double().masked_fill(left == 0, torch.nan)


def _precision_sums(at: Tensor, size: Tensor, hits_above: Tensor, hits: Tensor, harmonic: Tensor) -> Tensor:
    """The expected sum of the precisions at the hits of B rankings, float64 (B,).

    Args:
        at: int64 (B, L), the number of answers above each level of equal confidence.
        size: int64 (B, L), the number of answers in it.
        hits_above: int64 (B, L), the number of hits above it.
        hits: int64 (B, L), the number of hits in it.
        harmonic: float64 (n + 1,), the harmonic numbers up to at least the number of answers of each ranking.
    """
    held = hits > 0
    found = hits.sum(1)
    ranking = Rankings(
        relevant=found,
        above=torch.empty(len(hits), 0, dtype=torch.int64),
        alone=torch.empty(len(hits), 0, dtype=torch.bool),
        query=held.nonzero()[:, 0],
        at=at[held],
        size=size[held],
        hits_above=hits_above[held],
        hits=hits[held],
    )
    return (average_precision(ranking, harmonic) * found).nan_to_num(0.0)


def _check_promise(rate: float, certainty: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate} is not a rate of false matches: use a number between 0 and 1, such as 0.01")
    if not 0 < certainty < 1:
        raise ValueError(f"certainty={certainty} is not a probability: use a number between 0 and 1, such as 0.95")


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.ndim != 1:
        raise ValueError(f"{name} must hold one score per query, (N,), got {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{name} holds NaN: give each query a score, -inf for one that is never accepted")
