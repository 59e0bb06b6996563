"""Thresholds for queries without a match, against counting and scikit-learn."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom
from sklearn.metrics import average_precision_score, precision_recall_curve

from simsearch.functional.open_set import (
    agreeing,
    false_match_curve,
    global_average_precision,
    least_rate,
    least_scores,
    pairs_once,
    stand_out,
    threshold_at,
    thresholds_at,
)

SCORES = st.lists(st.integers(-5, 5).map(lambda n: n / 4), min_size=1, max_size=30)


@given(SCORES, st.sampled_from([0.01, 0.05, 0.1, 0.29, 0.5, 0.9]), st.sampled_from([0.05, 0.5, 0.8, 0.95]))
@settings(max_examples=100, deadline=None)
def test_threshold_is_the_smallest_that_keeps_the_promise(scores, rate, certainty):
    """Against SciPy: the rate above the j-th largest of N is Beta(j, N - j + 1)."""
    count = len(scores)
    given = torch.tensor(scores, dtype=torch.float64)
    threshold = threshold_at(given, rate, certainty, units=torch.arange(count))
    places = [j for j in range(1, count + 1) if beta.cdf(rate, j, count - j + 1) >= certainty - 1e-12]
    assert threshold == (sorted(scores, reverse=True)[places[-1] - 1] if places else math.inf)
    assert math.isinf(threshold) == (count < least_scores(rate, certainty))


def test_threshold_by_hand():
    scores = torch.arange(299.0)
    assert threshold_at(scores, 0.01) == 298.0  # 0.99 ** 299 is 0.0495
    assert threshold_at(scores[:298], 0.01) == math.inf
    assert least_scores(0.01) == 299
    assert threshold_at(torch.tensor([]), 0.5) == math.inf
    assert threshold_at(torch.tensor([0.5, -math.inf, 0.25]), 0.5, 0.5) == 0.25  # the median of three


def test_threshold_of_many_scores():
    """A million: (1 - rate) ** N is no number any more."""
    place = 1_000_000 - threshold_at(torch.arange(1_000_000.0), 0.01)
    assert place == binom.ppf(0.05, 1_000_000, 0.01)


def test_threshold_holds_for_new_scores():
    """Of 2,000 draws of 200 scores, in at most 5 % (and not far fewer) more than 5 % of new ones exceed."""
    drawn = torch.rand(2_000, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    broken = np.mean([1 - threshold_at(row, 0.05) > 0.05 for row in drawn])  # uniform: 1 - t exceed t
    assert 0.01 < broken < 0.065


@given(SCORES, SCORES)
@settings(max_examples=60, deadline=None)
def test_curve_against_scikit_learn_and_counting(match, no_match):
    thresholds, recall, rate, precision = false_match_curve(torch.tensor(match), torch.tensor(no_match))
    assert all(x.dtype == torch.float64 for x in (thresholds, recall, rate, precision))
    assert thresholds.tolist() == sorted({*match, *no_match})
    for t, r, f in zip(thresholds.tolist(), recall.tolist(), rate.tolist(), strict=True):
        assert r == pytest.approx(sum(s > t for s in match) / len(match))
        assert f == pytest.approx(sum(s > t for s in no_match) / len(no_match))
    # scikit-learn accepts a score that equals the threshold: the one before it is ours.
    labels = [1] * len(match) + [0] * len(no_match)
    theirs, _, levels = precision_recall_curve(labels, match + no_match)
    there = dict(zip(levels.tolist(), theirs[:-1].tolist(), strict=True))
    assert precision[:-1].tolist() == pytest.approx([there[t] for t in thresholds[1:].tolist()])
    assert math.isnan(precision[-1])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_of_one_work_are_one_draw():
    """50 works can't promise .01 by having 20 images each, in any of 1,000 draws."""
    own = torch.arange(50).repeat_interleave(20)
    for seed in range(1_000):
        scores = torch.rand(50, generator=seeded(seed)).repeat_interleave(20)
        for units in (None, own):
            assert threshold_at(scores, 0.01, units=units) == math.inf
    assert threshold_at(scores, 0.1, units=own) == threshold_at(scores, 0.1) == threshold_at(scores[::20], 0.1)
    different = torch.rand(1_000, generator=seeded(0))
    highest = different.view(50, 20).amax(1)
    assert threshold_at(different, 0.1, units=own) == threshold_at(highest, 0.1)
    with pytest.raises(ValueError, match=r"units must have one value per score, \(2,\), got \(3,\)"):
        threshold_at(torch.rand(2), 0.1, units=torch.arange(3))


def test_pairs_count_once():
    """Scores in equal pairs, of which a half takes one or both: in at most 5 % of 1,500 draws the rate is exceeded.

    Each score by itself exceeds it in more.
    """
    generator, rate, works = seeded(0), 0.05, 400
    broken = {"each": 0, "pairs": 0}
    for _ in range(1_500):
        scores = torch.rand(works // 2, generator=generator, dtype=torch.float64).repeat_interleave(2)
        half = scores[torch.rand(works, generator=generator) < 0.5]
        own = torch.arange(len(half))
        broken["each"] += 1 - threshold_at(half, rate, units=own) > rate
        broken["pairs"] += 1 - threshold_at(pairs_once(half), rate) > rate
    assert broken["pairs"] <= binom.ppf(0.975, 1_500, 0.05)
    assert broken["each"] > binom.ppf(0.999, 1_500, 0.05)
    assert pairs_once(torch.tensor([0.1, 0.5, 0.4, 0.3, 0.2])).tolist() == pytest.approx([0.4, 0.2])


@pytest.mark.parametrize("certainty", [0.5, 0.95])
def test_the_least_rate_is_promised_and_no_lower_one(certainty):
    for units in [*range(1, 400), 9_999]:
        rate = least_rate(units, certainty)
        assert least_scores(rate, certainty) == units
        assert threshold_at(torch.arange(float(units)), rate, certainty) == units - 1
        if units > 1:
            assert threshold_at(torch.arange(float(units)), 0.999 * rate, certainty) == math.inf
    assert least_rate(0) == 1.0


def test_thresholds_of_several_examples():
    scores = torch.rand(1_000, generator=seeded(0))
    found = thresholds_at(scores, 0.01)
    assert found == [threshold_at(scores, 0.01 / m) for m in (1, 2, 3)]  # 0.01 / 4 takes 1,197
    assert len(thresholds_at(scores, 0.5)) == 16
    assert thresholds_at(scores[:10], 0.01) == []


@given(st.integers(1, 40), st.integers(1, 16))
def test_agreeing_examples_keep_the_rate(examples, promised):
    needed, of = agreeing(examples, promised)
    assert 1 <= needed <= examples
    assert 1 <= of <= promised
    assert examples <= needed * of  # Markov: examples * rate / of / needed <= rate
    assert needed == 1 or examples > (needed - 1) * promised  # and no more than that takes


@given(st.lists(st.lists(st.integers(0, 40), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_standing_out_against_loops(rows, neighbours):
    scores = torch.tensor([sorted(row, reverse=True) for row in rows]) / 40
    works = torch.tensor([[value % 3 for value in row] for row in rows])
    taken = torch.tensor([[value % 4 == 0 for value in row] for row in rows])
    top, background = stand_out(scores, works, taken, neighbours)
    for i in range(len(rows)):
        left = [(float(scores[i, j]), int(works[i, j])) for j in range(6) if not taken[i, j]]
        others = [score for score, work in left if work != left[0][1]][:neighbours]
        assert float(top[i]) == (left[0][0] if left else -math.inf)
        assert float(background[i]) == pytest.approx(np.mean(others) if others else -math.inf)


def test_curve_never_accepts_a_wrong_answer_as_a_match():
    _, recall, rate, precision = false_match_curve(torch.tensor([0.9, -math.inf]), torch.tensor([0.2]))
    assert recall.tolist() == [0.5, 0.5, 0.0]
    assert rate.tolist() == [1.0, 0.0, 0.0]
    assert precision[:2].tolist() == [0.5, 1.0]


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_gap_without_ties_against_scikit_learn(correct, missed, random):
    confidence = [*range(len(correct))]
    random.shuffle(confidence)
    total = sum(correct) + missed
    if total == 0:
        return
    ours = global_average_precision(torch.tensor(confidence).float() - 10, torch.tensor(correct), total)
    theirs = average_precision_score(correct, confidence) * sum(correct) / total if any(correct) else 0.0
    assert ours == pytest.approx(theirs, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_gap_of_ties_is_the_mean_over_all_orders(answers, missed):
    def gap(ordered):
        found, total = 0, 0.0
        for place, (_, right) in enumerate(ordered, start=1):
            found += right
            total += right * found / place
        return total / (sum(right for _, right in answers) + missed)

    orders = [gap(o) for o in permutations(answers) if [c for c, _ in o] == sorted((c for c, _ in o), reverse=True)]
    confidence, correct = (torch.tensor(column) for column in zip(*answers, strict=True))
    ours = global_average_precision(confidence.float(), correct, int(correct.sum()) + missed)
    assert ours == pytest.approx(np.mean(orders), abs=1e-12)


def test_gap_counts_distractors_and_misses():
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.1])
    correct = torch.tensor([True, False, True, False])  # the second is a confident distractor
    assert global_average_precision(confidence, correct, 2) == pytest.approx((1 + 2 / 3) / 2)
    assert global_average_precision(confidence, correct, 4) == pytest.approx((1 + 2 / 3) / 4)
    assert global_average_precision(confidence, torch.zeros(4, dtype=torch.bool), 3) == 0.0
    whole = [global_average_precision(torch.arange(n).float(), torch.ones(n).bool(), n) for n in range(1, 300)]
    assert max(whole) == 1.0
    assert min(whole) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: threshold_at(torch.ones(2), 0.0), r"rate=0\.0 is not a rate"),
        (lambda: threshold_at(torch.ones(2), 1.0), r"rate=1\.0 is not a rate"),
        (lambda: threshold_at(torch.ones(2), 0.1, 1.0), r"certainty=1\.0 is not a probability"),
        (lambda: threshold_at(torch.ones(2, 1), 0.1), r"must hold one score per query, \(N,\), got \(2, 1\)"),
        (lambda: threshold_at(torch.tensor([math.nan]), 0.1), "no_match_scores holds NaN"),
        (lambda: false_match_curve(torch.ones(0), torch.ones(1)), "match_scores is empty"),
        (lambda: false_match_curve(torch.ones(1), torch.ones(0)), "no_match_scores is empty"),
        (lambda: false_match_curve(torch.tensor([math.nan]), torch.ones(1)), "match_scores holds NaN"),
        (lambda: global_average_precision(torch.ones(2), torch.ones(2), 2), "correct must be bool"),
        (lambda: global_average_precision(torch.ones(2), torch.ones(3).bool(), 3), r"must be bool \(2,\)"),
        (lambda: global_average_precision(torch.ones(2), torch.ones(2).bool(), 1), "2 answers are correct"),
        (lambda: global_average_precision(torch.ones(2), torch.zeros(2).bool(), 0), "total_positive=0"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
