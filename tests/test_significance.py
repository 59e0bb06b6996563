"""Intervals and paired tests against what statistics says of them, SciPy, enumeration and simulation."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simsearch.functional.ranking import measure_ranking
from simsearch.functional.significance import (
    holm,
    mean_interval,
    minimum_detectable_effect,
    paired_interval,
    paired_permutation,
)
from simsearch.types import Descriptors


def normal(q: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(q, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_units(q: int, units: int, seed: int = 0) -> torch.Tensor:
    """Units of q queries, of unequal sizes, numbers with gaps, in no order."""
    drawn = np.random.default_rng(seed).choice(units, q, p=np.arange(1, units + 1) / (units * (units + 1) / 2))
    return torch.from_numpy(drawn * 7 - 3)


def jackknife(column: np.ndarray, units: np.ndarray) -> tuple[float, float, float, int]:
    """Mean of the known values, its error by leaving out one unit after the other, degrees of freedom, units."""
    column, units = column[~np.isnan(column)], units[~np.isnan(column)]
    names = np.unique(units)
    left = np.array([column[units != name].mean() for name in names])
    g = len(names)
    sizes = np.array([(units == name).sum() for name in names])
    error = np.sqrt((g - 1) / g * ((left - column.mean()) ** 2).sum())
    return column.mean(), error, max(sizes.sum() ** 2 / (sizes**2).sum() - 1, 1), g


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_interval_of_normal_values_is_students(confidence):
    values = 2 * normal(40, 3) + 5
    expected = stats.ttest_1samp(values.numpy(), 0).confidence_interval(confidence)
    np.testing.assert_allclose(mean_interval(values, confidence=confidence).T, expected, rtol=1e-10)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_interval_over_units_of_one_size_is_students_of_their_means(confidence):
    values = normal(60, 2) + 3 * normal(12, 2, seed=1).repeat_interleave(5, 0)
    units = torch.arange(12).repeat_interleave(5)
    means = values.reshape(12, 5, 2).mean(1).numpy()
    expected = stats.ttest_1samp(means, 0).confidence_interval(confidence)
    np.testing.assert_allclose(mean_interval(values, units, confidence=confidence).T, expected, rtol=1e-10)


def test_interval_over_units_is_that_of_a_loop_that_leaves_each_out():
    values, units = 3 * normal(50, 1), some_units(50, 9)
    values[::6] = torch.nan
    mean, error, freedom, _ = jackknife(values[:, 0].numpy(), units.numpy())
    expected = stats.t.interval(0.95, freedom, mean, error)
    np.testing.assert_allclose(mean_interval(values, units)[0], expected, rtol=1e-10)


def test_interval_of_shares_over_units_is_binomial_with_the_effective_trials():
    values, units = torch.sigmoid(normal(50, 1)), some_units(50, 9)
    values[::6] = torch.nan
    mean, error, freedom, _ = jackknife(values[:, 0].numpy(), units.numpy())
    trials = mean * (1 - mean) / error**2 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, freedom)) ** 2
    wins, losses = trials * mean, trials * (1 - mean)
    expected = stats.beta.ppf(0.025, wins, losses + 1), stats.beta.ppf(0.975, wins + 1, losses)
    np.testing.assert_allclose(mean_interval(values, units)[0], expected, rtol=1e-9)


@given(st.integers(1, 60), st.data(), st.sampled_from([0.95, 0.9]))
@settings(max_examples=25, deadline=None)
def test_a_rate_over_queries_has_the_exact_binomial_interval(n, data, confidence):
    right = data.draw(st.integers(0, n))
    values = torch.cat([torch.ones(right), torch.zeros(n - right), torch.full((2,), torch.nan)])[:, None]
    expected = stats.binomtest(right, n).proportion_ci(confidence, method="exact")
    np.testing.assert_allclose(mean_interval(values, confidence=confidence)[0], expected, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_rate_without_exception_is_one_of_so_many_units(value):
    bounds = mean_interval(torch.full((100, 1), value), torch.arange(100) // 10)
    np.testing.assert_allclose(bounds[0], stats.binomtest(round(10 * value), 10).proportion_ci(), atol=1e-9)


@pytest.mark.parametrize(("rate", "queries"), [(0.99, 50), (0.5, 50), (0.9, 20), (0.995, 500)])
def test_the_interval_of_a_rate_over_queries_covers_by_enumeration(rate, queries):
    """All numbers of right queries with their chances; the percentile bootstrap covers .39 of (.99, 50)."""
    right = np.arange(queries + 1)
    values = torch.from_numpy((right[None] > np.arange(queries)[:, None]).astype(float))
    low, high = mean_interval(values).numpy().T
    covered = stats.binom.pmf(right, queries, rate)[(low <= rate) & (rate <= high)].sum()
    assert covered >= 0.95


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_intervals_hold_the_mean_lie_in_bounds_and_know_neither_order_nor_names(q, many, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(q, 4, generator=generator, dtype=torch.float64)
    values[:, 1] = values[:, 1].round()
    values[:, 2] = (values[:, 2] > 0.1).double()
    values[:, 3] = torch.where(values[:, 3] < 0.3, torch.nan, values[:, 3])
    units = torch.randint(many, (q,), generator=generator)
    bounds = mean_interval(values, units)
    known = ~values.isnan().all(0)
    mean = values.nanmean(0)[known]
    assert ((bounds[known, 0] <= mean + 1e-9) & (mean - 1e-9 <= bounds[known, 1])).all()
    assert ((bounds[known] >= 0) & (bounds[known] <= 1)).all()
    assert bounds[~known].isnan().all()
    order = torch.randperm(q, generator=generator)
    np.testing.assert_allclose(mean_interval(values[order], 5 - 3 * units[order]), bounds, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean_interval(values[:, :1], units), bounds[:1], rtol=0, atol=1e-12)
    wider = mean_interval(values, units, confidence=0.99)[known]
    assert ((wider[:, 0] <= bounds[known, 0] + 1e-12) & (wider[:, 1] >= bounds[known, 1] - 1e-12)).all()


def test_rounding_changes_no_rule():
    """Ranks that sum in another order may find 1 - 1e-16 where one process finds 1: intervals agree within 1e-12."""
    values = (torch.arange(50)[:, None] > torch.tensor([-1, 2])).double()
    for units in (None, torch.arange(50) // 5):
        near = mean_interval(values * (1 - 1e-15), units)
        torch.testing.assert_close(near, mean_interval(values, units), rtol=0, atol=1e-12)


def test_missing_values_are_left_out():
    values, units = torch.sigmoid(normal(60, 2)), some_units(60, 8)
    values[::4, 0] = torch.nan
    kept = ~values[:, 0].isnan()
    torch.testing.assert_close(mean_interval(values, units)[0], mean_interval(values[kept], units[kept])[0])
    assert mean_interval(torch.full((5, 1), torch.nan)).isnan().all()


def test_one_unit_bounds_nothing():
    assert mean_interval(torch.tensor([[0.25, 3.0]])).tolist() == [[0, 1], [-np.inf, np.inf]]
    assert mean_interval(torch.rand(9, 1), torch.zeros(9, dtype=torch.int64)).tolist() == [[0, 1]]
    assert paired_interval(torch.tensor([0.3]), torch.tensor([0.2]))[1:] == (-np.inf, np.inf)


def test_errors():
    with pytest.raises(ValueError, match=r"\(Q, M\) with Q > 0, got \(0, 2\)"):
        mean_interval(torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        mean_interval(torch.zeros(4))
    with pytest.raises(ValueError, match=r"units must be \(4,\), one for each query, got \(3,\)"):
        mean_interval(torch.zeros(4, 1), torch.zeros(3))
    for confidence in (0.0, 1.0, 95.0):
        for interval in (mean_interval, paired_interval):
            args = (torch.zeros(4, 1),) if interval is mean_interval else (torch.zeros(4), torch.ones(4))
            with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
                interval(*args, confidence=confidence)


# ---------------------------------------------------------------------------------------------- simulations


def samples(kind: str, many: int, mean: float, columns: int, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (Q, columns) of queries in `many` units with sizes drawn from 1 to 100, and the units.

    Rates ("rate") and average precisions ("AP") whose units differ: .3 of a rate's variance and nearly half of that
    of AP lie between them.
    """
    units = np.repeat(np.arange(many), np.round(100 ** rng.random(many)).astype(int))
    between = 1 / 0.3 - 1 if kind == "rate" else 9
    own = rng.beta(mean * between, (1 - mean) * between, (many, columns))[units].clip(1e-9, 1 - 1e-9)
    values = (rng.random(own.shape) < own).astype(float) if kind == "rate" else rng.beta(6 * own, 6 * (1 - own))
    return torch.from_numpy(values), torch.from_numpy(units)


def coverage(kind: str, many: int, mean: float, *, by_unit: bool, draws: int = 30, columns: int = 40) -> float:
    rng = np.random.default_rng(many)
    held = []
    for _ in range(draws):
        values, units = samples(kind, many, mean, columns, rng)
        low, high = mean_interval(values, units if by_unit else None).T
        held.append(((low <= mean) & (mean <= high)).double().mean())
    return float(np.mean(held))


@pytest.mark.parametrize("many", [10, 20, 45])
@pytest.mark.parametrize(("kind", "mean"), [("AP", 0.2), ("rate", 0.7)])
def test_intervals_over_unequal_units_cover(kind, mean, many):
    """1,200 samples: at least .93; over queries two thirds of the intervals or fewer do."""
    assert coverage(kind, many, mean, by_unit=True) >= 0.93
    assert coverage(kind, many, mean, by_unit=False) < 0.75


@pytest.mark.parametrize(("mean", "weight"), [(0.2, 2.0), (0.05, 2.0), (0.9, 3.0), (0.5, 0.6)])
@pytest.mark.parametrize("queries", [20, 50, 500])
def test_intervals_of_average_precision_over_queries_cover(mean, weight, queries):
    """2,000 samples of skewed and U-shaped values; binomial noise is .005. Of few and very skewed ones .89 do."""
    rng = np.random.default_rng(queries)
    values = torch.from_numpy(rng.beta(weight * mean, weight * (1 - mean), (queries, 2000)))
    low, high = mean_interval(values).T
    covered = float(((low <= mean) & (mean <= high)).double().mean())
    assert covered >= (0.87 if (mean, queries) == (0.05, 20) else 0.925), covered


def artists(rng, systems: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Labels (Q,) of the works of 45 artists, and AP (Q,) of each by descriptors of some systems.

    Each artist has 3 to 40 works and is as easy as chance will for each system; a query searches all other works.
    """
    label = torch.from_numpy(np.repeat(np.arange(45), np.round(3 * (40 / 3) ** rng.random(45)).astype(int)))
    rows = torch.arange(len(label))
    found = []
    for _ in range(systems):
        centre = rng.normal(size=(45, 16)) * rng.gamma(2.0, 0.4, (45, 1))
        vectors = torch.from_numpy(centre[label] + rng.normal(size=(len(label), 16))).float()
        items = Descriptors(torch.nn.functional.normalize(vectors, dim=1), label, rows)
        found.append(measure_ranking(items, items, ks=(1,), exclude_self=True)["AP"])
    return label, found


@pytest.mark.slow
def test_intervals_over_artists_who_search_each_other_cover():
    """300 collections, ranked: an artist's works are queries and the others' distractors, as in art-artist."""
    rng = np.random.default_rng(0)
    drawn = [artists(rng) for _ in range(300)]
    truth = float(torch.cat([ap for _, (ap,) in drawn]).mean())  # expected sum over expected number

    def covered(by_unit: bool) -> float:
        bounds = [mean_interval(ap[:, None], label if by_unit else None)[0].tolist() for label, (ap,) in drawn]
        return float(np.mean([low <= truth <= high for low, high in bounds]))

    assert covered(True) >= 0.91  # .95 less two standard errors of the simulation, and some of the second order
    assert covered(False) < 0.6


@pytest.mark.slow
def test_flips_of_artists_reject_equal_systems_once_in_twenty():
    """300 collections, two systems equally good on average: p over artists is below .05 in 5 %, over works in more."""
    rng = np.random.default_rng(1)
    rejected = {True: 0, False: 0}
    for _ in range(300):
        label, (a, b) = artists(rng, 2)
        for by_unit in rejected:
            rejected[by_unit] += paired_permutation(a, b, label if by_unit else None, resamples=999) <= 0.05
    assert stats.binomtest(rejected[True], 300, 0.05, alternative="greater").pvalue > 0.01, rejected
    assert rejected[False] > 90


@pytest.mark.slow
@pytest.mark.parametrize(("many", "least"), [(10, 0.89), (20, 0.86), (45, 0.87)])
def test_rates_whose_errors_lie_in_few_units_cover_less(many, least):
    """.95 by units nine tenths of which have hardly an error: the docstring says so."""
    assert coverage("rate", many, 0.95, by_unit=True, draws=200) >= least


def test_flips_of_units_say_nothing_is_different_once_in_twenty():
    """200 samples of 30 units, differences alike within: about 10 p-values are below .05; over queries most are."""
    rng = np.random.default_rng(5)
    rejected = {True: 0, False: 0}
    for _ in range(200):
        units = torch.from_numpy(np.repeat(np.arange(30), rng.integers(1, 40, 30)))
        d = torch.from_numpy(rng.normal(size=30)[units] + rng.normal(size=len(units)))
        for by_unit in rejected:
            rejected[by_unit] += paired_permutation(d, 0 * d, units if by_unit else None, resamples=199) <= 0.05
    assert 3 <= rejected[True] <= 19
    assert rejected[False] > 75


# ---------------------------------------------------------------------------------------------- paired tests


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_permutation_of_few_units_counts_every_sign_pattern(rows):
    """Small integers: sums are exact, ties are many."""
    d, units = (np.array(column) for column in zip(*rows, strict=True))
    names = np.unique(units)
    sums = []
    for signs in itertools.product((1, -1), repeat=len(names)):
        sign = dict(zip(names, signs, strict=True))
        sums.append(abs(sum(sign[u] * x for u, x in zip(units, d, strict=True))))
    expected = np.mean([s >= abs(d.sum()) for s in sums])
    a = torch.tensor(d / 8 + 0.5)
    assert paired_permutation(a, torch.full_like(a, 0.5), torch.from_numpy(units)) == pytest.approx(expected, abs=1e-12)


def test_permutation_over_units_agrees_with_scipy_on_their_sums():
    a, b = normal(40, 2, seed=3).T
    units = some_units(40, 8)
    sums = [[float(x[units == name].sum()) for name in units.unique()] for x in (a, b)]
    theirs = stats.permutation_test(sums, lambda x, y, axis: np.sum(x - y, axis=axis), permutation_type="samples",
                                    vectorized=True, n_resamples=np.inf)  # fmt: skip
    assert paired_permutation(a, b, units) == pytest.approx(theirs.pvalue, abs=1e-12)
    assert paired_permutation(a + 100, b, units) == 2 ** (1 - len(units.unique()))  # the least that so few can give


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
    difference, low, high = paired_interval(a + 0.02, b)
    assert difference == pytest.approx(float((a + 0.02 - b).mean()), abs=1e-12)
    assert (low, high) == pytest.approx(tuple(stats.ttest_rel(a + 0.02, b).confidence_interval()), abs=1e-12)
    alone = mean_interval(a[:, None])[0]
    assert high - low < 0.5 * float(alone[1] - alone[0])
    b[::3] = torch.nan
    kept, units = ~b.isnan(), some_units(300, 20)
    assert paired_interval(a, b, units) == paired_interval(a[kept], b[kept], units[kept])
    mean, error, freedom, _ = jackknife((a - b).numpy(), units.numpy())
    assert paired_interval(a, b, units) == pytest.approx((mean, *stats.t.interval(0.95, freedom, mean, error)))


@pytest.mark.parametrize("test", [paired_interval, paired_permutation, minimum_detectable_effect])
def test_paired_values_must_be_of_the_same_queries(test):
    with pytest.raises(ValueError, match="same queries"):
        test(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="same queries"):
        test(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="nothing to compare"):
        test(torch.zeros(3), torch.full((3,), torch.nan))
    with pytest.raises(ValueError, match=r"units must be \(3,\), one for each query, got \(2,\)"):
        test(torch.zeros(3), torch.ones(3), torch.zeros(2))
    with pytest.raises(ValueError, match="at least 1 resample"):
        paired_permutation(torch.zeros(3), torch.ones(3), resamples=0)


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
    steps = stats.t.ppf(0.975, 399) + stats.t.ppf(0.8, 399)  # 2.810; z(.975) + z(.8) = 2.802
    assert whole == pytest.approx(steps * float((a - b).std()) / 20)
    assert minimum_detectable_effect(a.repeat(4), b.repeat(4)) == pytest.approx(whole / 2, rel=4e-3)
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


def test_few_units_detect_what_they_can():
    """4,000 samples of 10 units of 4: t-tests of their means find the stated share; z would promise an eighth less."""
    a, b = (normal(10, 2, seed=3).repeat_interleave(4, 0) + normal(40, 2, seed=4)).T
    units = torch.arange(10).repeat_interleave(4)
    means = (a - b).reshape(10, 4).mean(1)
    effect = minimum_detectable_effect(a, b, units)
    error = float(means.std()) / 10**0.5
    assert effect == pytest.approx(error * (stats.t.ppf(0.975, 9) + stats.t.ppf(0.8, 9)))
    drawn = effect + float(means.std()) * normal(10, 4000, seed=8)
    assert (stats.ttest_1samp(drawn.numpy(), 0.0).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)
    assert minimum_detectable_effect(a[:20], b[:20], units[:20]) == np.inf  # five flips: p is never below .0625
    assert minimum_detectable_effect(a[:24], b[:24], units[:24]) < np.inf
    assert minimum_detectable_effect(a[:1], b[:1]) == np.inf
