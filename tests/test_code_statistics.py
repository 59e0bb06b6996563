"""Health of codes against NumPy's own mean and corrcoef, and through the metric. Two processes: test_gather.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from simsearch.functional.code_health import CodeMoments
from simsearch.metrics.retrieval import RetrievalMetrics

NAMES = {"balance", "worst_balance", "correlation", "quantisation_error", "dead_bits"}


def naive(real: np.ndarray) -> dict[str, float]:
    signs = np.where(real > 0, 1.0, -1.0)
    share = (signs == 1).mean(0)
    alive = [k for k in range(real.shape[1]) if 0 < share[k] < 1]
    pairs = [abs(np.corrcoef(signs[:, i], signs[:, j])[0, 1]) for i in alive for j in alive if i < j]
    return {
        "balance": float(np.mean(2 * np.minimum(share, 1 - share))),
        "worst_balance": float(np.min(2 * np.minimum(share, 1 - share))),
        "correlation": float(np.mean(pairs)) if pairs else 0.0,
        "quantisation_error": float(np.mean((real - signs) ** 2)),
        "dead_bits": float(real.shape[1] - len(alive)),
    }


def moments(real: np.ndarray, *cuts: int) -> CodeMoments:
    sums = CodeMoments.zeros(real.shape[1])
    for part in np.split(real, cuts):
        sums.add(torch.from_numpy(part))
    return sums


codes = st.tuples(st.integers(1, 30), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.sampled_from([-3.0, -0.5, 0.0, 0.25, 1.0, 2.0]))
)


@settings(max_examples=100, deadline=None)
@given(codes, st.integers(0, 30))
def test_equal_to_numpy_in_parts(real, cut):
    got = moments(real, min(cut, len(real))).statistics()
    assert got == pytest.approx(naive(real), abs=1e-12)


def test_half_precision_and_gradients_are_left_behind():
    real = torch.randn(20, 4).half().requires_grad_()
    sums = CodeMoments.zeros(4)
    sums.add(real)
    assert sums.statistics() == pytest.approx(naive(real.detach().double().numpy()))


def test_balanced_independent_signs_are_healthy():
    real = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert moments(real).statistics() == {
        "balance": 1.0,
        "worst_balance": 1.0,
        "correlation": 0.0,
        "quantisation_error": 0.0,
        "dead_bits": 0.0,
    }


def test_constant_bits_are_dead_and_correlate_with_nothing():
    real = np.random.default_rng(0).normal(size=(50, 5))
    real[:, 1], real[:, 3] = 0.7, 0.0  # zero counts as not set
    got = moments(real).statistics()
    assert got["dead_bits"] == 2
    assert got["worst_balance"] == 0
    assert got["correlation"] == pytest.approx(naive(real[:, [0, 2, 4]])["correlation"])
    assert moments(real[:, [1, 3]]).statistics()["correlation"] == 0
    assert moments(real[:, [0, 1]]).statistics()["correlation"] == 0


def test_a_bit_and_its_opposite_correlate_wholly():
    real = np.random.default_rng(0).normal(size=(50, 1))
    assert moments(np.hstack([real, -real])).statistics()["correlation"] == pytest.approx(1)


def test_a_nearly_constant_bit_of_very_many_images_lives():
    sums = CodeMoments.zeros(2)
    block = torch.ones(1000, 2)
    block[::2, 1] = -1
    for _ in range(1000):
        sums.add(block)
    sums.add(torch.tensor([[-1.0, 1.0]]))
    got = sums.statistics()
    assert got["dead_bits"] == 0
    assert got["worst_balance"] == pytest.approx(2 / 1_000_001)
    assert got["correlation"] == pytest.approx(1e-3, rel=1e-2)  # by hand: cov 1e-6, deviations 2e-3 and 1


def test_nothing_added_is_an_error():
    with pytest.raises(ValueError, match="no codes"):
        CodeMoments.zeros(3).statistics()


# ------------------------------------------------------------------------------ through the metric


def feed(metric: RetrievalMetrics, part: str, real: torch.Tensor, first: int) -> None:
    for rows in torch.arange(len(real)).split(7):
        metric.update(part, real[rows], rows % 3, first + rows)


def test_the_metric_describes_the_gallery_alone():
    query, gallery = torch.randn(10, 12), torch.randn(40, 12) + 0.5
    metric = RetrievalMetrics((1,), bits=12)
    feed(metric, "query", query, 100)
    feed(metric, "gallery", gallery, 0)
    assert metric.code_statistics() == pytest.approx(naive(gallery.double().numpy()))
    assert metric.code_statistics().keys() == NAMES
    metric.reset()
    with pytest.raises(ValueError, match="no codes"):
        metric.code_statistics()
    feed(metric, "gallery", gallery[:9], 0)
    assert metric.code_statistics() == pytest.approx(naive(gallery[:9].double().numpy()))
    assert RetrievalMetrics((1,), bits=12).code_count == 0  # one metric's sums are not another's


def test_float_descriptors_have_none():
    metric = RetrievalMetrics((1,))
    feed(metric, "gallery", torch.randn(5, 3), 0)
    assert metric.code_statistics() == {}
