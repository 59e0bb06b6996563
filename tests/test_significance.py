"""Intervals and paired tests against what statistics says of them, SciPy and enumeration."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simsearch.functional.significance import (
    bootstrap_interval,
    holm,
    minimum_detectable_effect,
    paired_bootstrap,
    paired_permutation,
)


def normal(q: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(q, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.960), (0.8, 1.2816)])
def test_interval_of_normal_values(confidence, z):
    values = 2 * normal(400, 1) + 5
    ((low, high),) = bootstrap_interval(values, confidence=confidence, resamples=4000).tolist()
    width = z * float(values.std()) / 20
    assert low < float(values.mean()) < high
    assert float(values.mean()) - low == pytest.approx(width, rel=0.1)
    assert high - float(values.mean()) == pytest.approx(width, rel=0.1)


def test_nineteen_of_twenty_intervals_hold_the_mean():
    """300 samples (columns) of one distribution: the share that covers 0 is binomial around 0.94."""
    bounds = bootstrap_interval(normal(60, 300), resamples=600)
    covered = ((bounds[:, 0] < 0) & (bounds[:, 1] > 0)).double().mean()
    assert 0.90 < float(covered) < 0.98


def test_equals_a_loop_over_numpy_resamples_in_distribution():
    """Other draws, the same quantiles, of a skewed metric with missing values."""
    values = normal(80, 1, seed=3).exp()
    values[::7] = torch.nan
    generator = np.random.default_rng(12345)
    column = values[:, 0].numpy()
    means = [np.nanmean(generator.choice(column, 80)) for _ in range(4000)]
    expected = np.quantile(means, [0.025, 0.975])
    found = bootstrap_interval(values, resamples=4000)[0]
    np.testing.assert_allclose(found, expected, atol=0.1 * (expected[1] - expected[0]))


def test_missing_values_are_left_out():
    values = torch.where(torch.arange(50)[:, None] % 2 == 0, torch.nan, 3.0).double()
    np.testing.assert_allclose(bootstrap_interval(values), [[3.0, 3.0]], rtol=1e-12)
    assert bootstrap_interval(torch.full((5, 1), torch.nan)).isnan().all()


def test_a_column_does_not_disturb_another():
    values = normal(100, 3)
    empty = torch.full((100, 1), torch.nan, dtype=torch.float64)
    together = bootstrap_interval(torch.cat([values, empty, values[:, :1]], 1), resamples=200)
    assert together.shape == (5, 2)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together[:3], bootstrap_interval(values, resamples=200))
    torch.testing.assert_close(together[0], together[4], rtol=0, atol=0)  # the same resamples
    assert together[3].isnan().all()


def test_seeds_decide():
    values = normal(100, 2)
    assert torch.equal(bootstrap_interval(values), bootstrap_interval(values))
    assert not torch.equal(bootstrap_interval(values), bootstrap_interval(values, seed=1))


def test_one_query_has_an_interval_of_no_width():
    np.testing.assert_allclose(bootstrap_interval(torch.tensor([[0.25, 1.0]])), [[0.25, 0.25], [1, 1]])


def test_errors():
    with pytest.raises(ValueError, match=r"\(Q, M\) with Q > 0, got \(0, 2\)"):
        bootstrap_interval(torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        bootstrap_interval(torch.zeros(4))
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
            bootstrap_interval(torch.zeros(4, 1), confidence=confidence)
    with pytest.raises(ValueError, match="at least 1 resample, got 0"):
        bootstrap_interval(torch.zeros(4, 1), resamples=0)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_permutation_of_few_queries_counts_every_sign_pattern(differences):
    """Small integers: sums are exact, ties are many."""
    d = np.array(differences)
    patterns = itertools.product((1, -1), repeat=len(d))
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in patterns]
    expected = np.mean([s >= abs(d.sum()) for s in sums])
    a = torch.tensor(d / 8 + 0.5)
    assert paired_permutation(a, torch.full_like(a, 0.5)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("q", [6, 12])
def test_permutation_agrees_with_scipy_exactly(q):
    a, b = normal(q, 2, seed=q).T
    theirs = stats.permutation_test((a.numpy(), b.numpy()), lambda x, y, axis: np.mean(x - y, axis=axis),
                                    permutation_type="samples", vectorized=True, n_resamples=np.inf)  # fmt: skip
    assert paired_permutation(a, b) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_permutation_of_many_queries_agrees_with_the_t_test():
    for shift in (0.0, 0.05, 0.1):
        a, b = normal(500, 2, seed=1).T
        p = paired_permutation(a + shift, b, resamples=20_000)
        assert p == pytest.approx(float(stats.ttest_rel(a + shift, b).pvalue), abs=0.015)


def test_permutation_says_nothing_is_different_once_in_twenty():
    """Under the null the p-value is uniform: of 400 samples about 20 are below .05."""
    pairs = normal(40, 800, seed=2)
    p = [paired_permutation(pairs[:, 2 * i], pairs[:, 2 * i + 1], resamples=199) for i in range(400)]
    assert 8 <= sum(value <= 0.05 for value in p) <= 34


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_permutation_knows_no_order_no_scale_and_no_queries_without_values(q, seed):
    a, b = normal(q, 2, seed=seed).T
    p = paired_permutation(a, b, resamples=300)
    assert 1 / 301 <= p <= 1
    assert paired_permutation(b, a, resamples=300) == p
    assert paired_permutation(4 * a, 4 * b, resamples=300) == p
    missing = torch.tensor([torch.nan, 1.0], dtype=torch.float64)
    more = torch.cat([a, missing]), torch.cat([b, missing.flip(0)])
    assert paired_permutation(*more, resamples=300) == p


def test_permutation_of_equal_systems_and_of_clearly_different_ones():
    a = normal(200, 1)[:, 0]
    assert paired_permutation(a, a) == 1
    assert paired_permutation(a + 1, a, resamples=999) == pytest.approx(1 / 1000)


def test_permutation_of_ten_thousand_queries_stays_small_in_memory():
    a, b = normal(10_000, 2).T
    tracemalloc.start()
    paired_permutation(a, b, resamples=2_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6, "2,000 x 10,000 signs as float64 would be 160 MB"


def test_paired_interval_is_that_of_the_differences_and_narrower_than_of_each():
    common = normal(300, 1, seed=5)
    a, b = (common + 0.1 * normal(300, 2, seed=6)).T
    difference, low, high = paired_bootstrap(a + 0.02, b)
    assert difference == pytest.approx(float((a + 0.02 - b).mean()), abs=1e-12)
    half = 1.96 * float((a - b).std()) / 300**0.5
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.25 * half)
    alone = bootstrap_interval(a[:, None])[0]
    assert high - low < 0.5 * float(alone[1] - alone[0])
    b[::3] = torch.nan
    kept = ~b.isnan()
    assert paired_bootstrap(a, b) == paired_bootstrap(a[kept], b[kept])


@pytest.mark.parametrize("test", [paired_bootstrap, paired_permutation])
def test_paired_values_must_be_of_the_same_queries(test):
    with pytest.raises(ValueError, match="same queries"):
        test(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="same queries"):
        test(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="nothing to compare"):
        test(torch.zeros(3), torch.full((3,), torch.nan))
    with pytest.raises(ValueError, match="at least 1 resample"):
        test(torch.zeros(3), torch.ones(3), resamples=0)


def test_holm_on_a_hand_worked_example():
    found = holm(torch.tensor([0.01, 0.04, 0.03, 0.005, 0.9], dtype=torch.float64))
    # ascending .005 x5, .01 x4, .03 x3, .04 x2 (kept at .09), .9 x1
    np.testing.assert_allclose(found, [0.04, 0.09, 0.09, 0.025, 0.9], rtol=1e-12)
    assert len(holm(torch.zeros(0))) == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(p):
    found = holm(torch.tensor(p, dtype=torch.float64))
    assert ((found >= torch.tensor(p, dtype=torch.float64)) & (found <= 1)).all()
    order = np.argsort(p, kind="stable")
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for i, test in enumerate(order):
            if p[test] * (len(p) - i) > alpha:
                break
            rejected.add(int(test))
        assert {i for i, value in enumerate(found.tolist()) if value <= alpha} == rejected


def test_holm_refuses_what_is_no_p_value():
    for wrong in (torch.tensor([0.1, 1.2]), torch.tensor([torch.nan]), torch.tensor([-0.1]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            holm(wrong)


@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.8), (0.01, 0.9)])
def test_a_detectable_effect_is_detected_as_often_as_said(alpha, power):
    """4,000 samples of 120 queries whose differences have just that mean: t-tests find the stated share."""
    a, b = normal(120, 2, seed=7).T
    effect = minimum_detectable_effect(a, b, alpha=alpha, power=power)
    spread = float((a - b).std())
    samples = effect + spread * normal(120, 4000, seed=8)
    found = (stats.ttest_1samp(samples.numpy(), 0.0).pvalue < alpha).mean()
    assert found == pytest.approx(power, abs=0.03)


def test_a_detectable_effect_shrinks_with_the_root_of_the_queries_and_skips_missing_ones():
    a, b = normal(400, 2, seed=9).T
    whole = minimum_detectable_effect(a, b)
    assert whole == pytest.approx(2.8016 * float((a - b).std()) / 20, rel=1e-4)  # z(.975) + z(.8) = 1.95996 + 0.84162
    assert minimum_detectable_effect(a.repeat(4), b.repeat(4)) == pytest.approx(whole / 2, rel=2e-3)
    assert minimum_detectable_effect(3 * a, 3 * b) == pytest.approx(3 * whole)
    b[::4] = torch.nan
    kept = ~b.isnan()
    assert minimum_detectable_effect(a, b) == minimum_detectable_effect(a[kept], b[kept])


def test_a_detectable_effect_needs_sense():
    a, b = normal(10, 2).T
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
            minimum_detectable_effect(a, b, alpha=alpha)
    for power in (0.05, 1.0):
        with pytest.raises(ValueError, match="power must lie between alpha"):
            minimum_detectable_effect(a, b, power=power)
    with pytest.raises(ValueError, match="at least 2"):
        minimum_detectable_effect(a[:1], b[:1])
