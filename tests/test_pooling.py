"""Pooling against naive loops; R-MAC's regions against the paper's counts and a grid in fractions."""

import itertools
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.functional.pooling import gem, mac, rmac, rmac_regions, spoc
from simsearch.models.pooling import MAC, RMAC, Average, GeM


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def each_position(features: torch.Tensor, b: int, c: int) -> list[float]:
    height, width = features.shape[2:]
    return [float(features[b, c, y, x]) for y, x in itertools.product(range(height), range(width))]


@pytest.mark.parametrize("p", [0.7, 1.0, 3.0, 6.5])
def test_poolings_equal_naive_loops(p):
    features = maps(2, 3, 5, 4)
    for b, c in itertools.product(range(2), range(3)):
        values = each_position(features, b, c)
        clamped = [max(value, 1e-6) for value in values]
        assert float(spoc(features)[b, c]) == pytest.approx(sum(values) / 20, abs=1e-6)
        assert float(mac(features)[b, c]) == max(values)
        naive = (sum(value**p for value in clamped) / 20) ** (1 / p)
        assert float(gem(features, p)[b, c]) == pytest.approx(naive, rel=1e-5)


def test_gem_lies_between_average_and_maximum():
    features = maps(2, 3, 6, 7).abs() + 0.1
    torch.testing.assert_close(gem(features, 1.0), spoc(features))
    torch.testing.assert_close(gem(features, 2000.0), mac(features), rtol=0.003, atol=0)
    assert (spoc(features) < gem(features, 3.0)).all()
    assert (gem(features, 3.0) < mac(features)).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_gem_of_large_p_neither_overflows_nor_loses_its_gradient(scale):
    """x^50 of 1e4 is 1e200, beyond float32."""
    features = (scale * maps(2, 3, 6, 7)).requires_grad_()
    p = torch.tensor(50.0, requires_grad=True)
    pooled = gem(features, p)
    exact = gem(features.detach().double(), 50.0)
    torch.testing.assert_close(pooled.double(), exact, rtol=1e-5, atol=0)
    pooled.sum().backward()
    assert features.grad.isfinite().all()
    assert (features.grad.amax((2, 3)) > 0).all()
    assert p.grad.isfinite()


def test_gem_gradient_equals_finite_differences():
    features = (maps(1, 2, 3, 3).double().abs() + 0.1).requires_grad_()
    p = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gem, (features, p))


def test_gem_of_a_map_without_anything_positive():
    features = (-maps(1, 2, 3, 3).abs()).requires_grad_()
    pooled = gem(features, 3.0)
    torch.testing.assert_close(pooled, torch.full((1, 2), 1e-6))
    pooled.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("size", "levels", "count"),
    [
        ((30, 30), 2, 5),
        ((30, 30), 3, 14),
        ((30, 40), 2, 8),
        ((30, 40), 3, 20),
        ((40, 30), 2, 8),
        ((40, 30), 3, 20),
    ],
)
def test_region_counts_of_the_paper(size, levels, count):
    assert len(rmac_regions(*size, levels)) == count


def regions_of_the_release(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
    """The grid by region centres, as the authors' MATLAB code has it; centres in exact arithmetic."""
    w = min(height, width)
    step = (max(height, width) - w) / (np.array([2, 3, 4, 5, 6, 7]) - 1)
    best = int(np.argmin(np.abs((w**2 - w * step) / w**2 - 0.4))) + 1
    more_rows, more_columns = best * (height > width), best * (width > height)
    found = []
    for level in range(1, levels + 1):
        side = floor(Fraction(2 * w, level + 1))
        half = floor(Fraction(side, 2) - 1)
        starts = []
        for length, places in ((height, level + more_rows), (width, level + more_columns)):
            gap = Fraction(length - side, places - 1) if places > 1 else Fraction(0)
            starts.append([floor(half + i * gap) - half for i in range(places)])
        found += [(top, left, side) for top in starts[0] for left in starts[1]]
    return found


sides = st.integers(1, 60)


@settings(max_examples=300, deadline=None)
@given(height=sides, width=sides, levels=st.integers(1, 4))
def test_regions_equal_the_release_and_lie_inside(height, width, levels):
    if 2 * min(height, width) < levels + 1:
        with pytest.raises(ValueError, match="use fewer levels or larger images"):
            rmac_regions(height, width, levels)
        return
    regions = rmac_regions(height, width, levels)
    assert list(regions) == regions_of_the_release(height, width, levels)
    for top, left, side in regions:
        assert side >= 1
        assert 0 <= top <= height - side
        assert 0 <= left <= width - side
    turned = sorted((left, top, side) for top, left, side in rmac_regions(width, height, levels))
    assert sorted(regions) == turned
    if max(height, width) <= 4 * min(height, width):  # up to there seven squares cover the long side
        covered = torch.zeros(height, width)
        for top, left, side in regions:
            covered[top : top + side, left : left + side] = 1
        assert covered.all()


def test_neighbours_overlap_as_asked():
    """Long side 8/5 of the short: two squares overlap by 0.4 exactly; asked for 0.7, three do by 0.7."""
    assert list(rmac_regions(50, 80, 1)) == [(0, 0, 50), (0, 30, 50)]
    assert list(rmac_regions(50, 80, 1, 0.7)) == [(0, 0, 50), (0, 15, 50), (0, 30, 50)]


def test_region_errors_name_the_mend():
    with pytest.raises(ValueError, match="at least one level, got 0"):
        rmac_regions(5, 5, 0)
    with pytest.raises(ValueError, match="level 2 has regions of zero side on a 1x4 map: use fewer levels"):
        rmac_regions(1, 4, 3)
    with pytest.raises(ValueError, match="zero side on a 0x4 map"):
        rmac_regions(0, 4, 1)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [(7, 7), (6, 11), (9, 5)])
def test_rmac_equals_naive_loops(size, whole):
    features = maps(2, 3, *size)
    pooled = rmac(features, 3, whole=whole)
    regions = list(rmac_regions(*size, 3))
    assert pooled.shape == (2, len(regions) + whole, 3)
    for r, (top, left, side) in enumerate(regions):
        for b, c in itertools.product(range(2), range(3)):
            inside = [float(features[b, c, y, x]) for y in range(top, top + side) for x in range(left, left + side)]
            assert float(pooled[b, r, c]) == max(inside)
    if whole:
        assert torch.equal(pooled[:, -1], mac(features))


def test_rmac_sends_gradients_to_the_maxima():
    features = maps(1, 2, 6, 6).requires_grad_()
    rmac(features, 2).sum().backward()
    assert float(features.grad.sum()) == 10  # five regions in two channels
    peak = features.detach()[0, 0].flatten().argmax()
    assert float(features.grad[0, 0].flatten()[peak]) >= 1


def test_modules_wrap_the_functions():
    features = maps(2, 3, 6, 8)
    assert torch.equal(Average()(features), spoc(features)[:, None])
    assert torch.equal(MAC()(features), mac(features)[:, None])
    assert torch.equal(GeM(4.0)(features), gem(features, 4.0)[:, None])
    assert torch.equal(RMAC(2, 0.5, whole=True)(features), rmac(features, 2, whole=True, overlap=0.5))


def test_gem_learns_p_only_where_asked():
    features = maps(2, 3, 6, 8)
    assert not GeM().p.requires_grad
    learner = GeM(3.0, trainable=True)
    learner(features).sum().backward()
    assert float(learner.p.grad) > 0  # the mean grows with p
    assert GeM().state_dict().keys() == {"p"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GeM(0.0), "GeM's p must be positive, got 0.0"),
        (lambda: RMAC(0), "at least one level, got 0"),
        (lambda: RMAC(2, 1.0), r"overlap must lie in \[0, 1\), got 1.0"),
    ],
)
def test_module_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
