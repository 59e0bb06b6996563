"""Bootstrap intervals against what statistics says of them."""

import numpy as np
import pytest
import torch

from simsearch.functional.significance import bootstrap_interval


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
