"""ITQ and Sign against NumPy and SciPy, and against what the paper promises."""

import math

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group
from torch import Tensor

from simsearch.functional.codes import itq_rotation
from simsearch.index.binarize import ITQ, Sign


def features(n: int = 800, dimension: int = 24, seed: int = 0) -> Tensor:
    """Correlated, off-centre and non-negative, as pooled ReLU features are; of lengths about 1."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(99))
    scale = torch.linspace(2, 0.2, dimension)
    return torch.relu((torch.randn(n, dimension, generator=generator) * scale) @ mixing + 1) / 30


def projected(x: Tensor, fitted: tuple[Tensor, Tensor]) -> Tensor:
    weight, bias = fitted
    return x @ weight.T + bias


def principal_components(x: Tensor, bits: int) -> np.ndarray:
    """The centred vectors in their first `bits` principal directions, float64 (N, bits), by the vectors' SVD."""
    centred = x.double().numpy() - x.double().numpy().mean(0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:bits].T


def loss(v: np.ndarray) -> float:
    """||sign(v) - v||^2, what ITQ makes small."""
    return float(((np.where(v > 0, 1, -1) - v) ** 2).sum())


def naive_step(v: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """One alternation of the paper: the corners of V R, and the rotation nearest to them."""
    corners = np.where(v @ rotation > 0, 1.0, -1.0)
    return orthogonal_procrustes(v, corners)[0]


def corners_of_a_cube(n: int, bits: int, dimension: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy corners of a cube of `bits` dimensions turned and moved in `dimension`, and their bits bool (n, bits)."""
    random = np.random.default_rng(seed)
    planted = random.random((n, bits)) < 0.5
    cube = np.zeros((n, dimension))
    cube[:, :bits] = np.where(planted, 1.0, -1.0)
    cube += noise * random.standard_normal(cube.shape)
    turned = cube @ ortho_group.rvs(dimension, random_state=seed) + random.standard_normal(dimension)
    return torch.from_numpy(turned).float(), torch.from_numpy(planted)


# ------------------------------------------------------------------------------------------------- the rotation


@pytest.mark.parametrize(("bits", "n"), [(2, 50), (7, 300), (16, 300)])
def test_the_rotation_is_that_of_naive_alternations(bits, n):
    v = 5 * principal_components(features(n), bits)
    rotation = itq_rotation(torch.from_numpy(v), 0, seed=3).numpy()
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(bits), atol=1e-12)
    for _ in range(15):
        rotation = naive_step(v, rotation)
    np.testing.assert_allclose(itq_rotation(torch.from_numpy(v), 15, seed=3).numpy(), rotation, atol=1e-8)


@pytest.mark.parametrize("bits", [1, 5, 12])
def test_each_iteration_of_the_binariser_is_one_naive_step(bits):
    x = features(400)
    v = principal_components(x, bits)
    for iterations in (1, 2, 9):
        before = projected(x, ITQ(bits, iterations, seed=1).fit(x)).double().numpy()
        after = projected(x, ITQ(bits, iterations + 1, seed=1).fit(x)).double().numpy()
        turned = v @ orthogonal_procrustes(v, np.where(before > 0, 1.0, -1.0))[0]
        np.testing.assert_allclose(after, turned, atol=1e-5)


@given(seed=st.integers(0, 9999), bits=st.integers(1, 24), n=st.sampled_from([30, 300]), scale=st.sampled_from([1, 9]))
@settings(max_examples=10, deadline=None)
def test_the_loss_falls_with_every_iteration(seed, bits, n, scale):
    x = scale * features(n, seed=seed)
    sequence = [loss(projected(x, ITQ(bits, i, seed).fit(x)).double().numpy()) for i in range(1, 9)]
    assert (np.diff(sequence) <= 1e-5 * sequence[0]).all()


@pytest.mark.parametrize("seed", range(3))
def test_further_steps_hardly_lower_the_loss(seed):
    x = 10 * features(seed=seed)  # so that projections are about as long as codes
    v = principal_components(x, 16)

    def after_more(rotated: np.ndarray) -> float:
        for _ in range(50):
            rotated = v @ naive_step(v, orthogonal_procrustes(v, rotated)[0])
        return loss(rotated)

    ours = projected(x, ITQ(16, seed=seed).fit(x)).double().numpy()
    at_random = v @ ortho_group.rvs(16, random_state=seed)
    assert after_more(ours) > 0.99 * loss(ours)
    assert after_more(at_random) < 0.95 * loss(at_random)  # so the figure above says something
    # FAISS 1.15.1 multiplies U V where Procrustes needs U V^T. Were that mended, ours would still be no worse.
    theirs = faiss.ITQMatrix(16)
    theirs.train(v.astype(np.float32))
    assert loss(ours) < 1.02 * loss(theirs.apply(v.astype(np.float32)).astype(np.float64))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("seed", range(4))
def test_corners_of_a_turned_cube_are_found(bits, seed):
    x, planted = corners_of_a_cube(1500, bits, 24, noise=0.15, seed=seed)
    found = projected(x, ITQ(bits, seed=seed).fit(x)) > 0
    agreement = (2.0 * found - 1).T @ (2.0 * planted - 1) / len(x)
    # Each bit is one of the planted ones, or its opposite.
    torch.testing.assert_close(agreement.abs().sort(dim=1).values[:, -1], torch.ones(bits), atol=1e-3, rtol=0)
    assert sorted(agreement.abs().argmax(1).tolist()) == list(range(bits))


@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(1, 24),
    scale=st.sampled_from([2**-9, 0.5, 64.0]),
    shift=st.integers(-100, 100),
)
@settings(max_examples=20, deadline=None)
def test_scale_place_order_and_copies_do_not_matter(seed, bits, scale, shift):
    x = (features(200, seed=seed) * 1024).round() / 1024  # so that float32 holds what is moved and scaled exactly
    order = torch.randperm(400, generator=torch.Generator().manual_seed(seed))
    other = scale * (x + shift * torch.linspace(-1, 1, 24).sign())
    weight, bias = ITQ(bits, 6, seed).fit(x)
    torch.testing.assert_close(weight @ weight.T, torch.eye(bits), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected(x, (weight, bias)).mean(0), torch.zeros(bits), atol=1e-5, rtol=0)
    torch.testing.assert_close(ITQ(bits, 6, seed).fit(torch.cat([other, other])[order])[0], weight, atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------- the binarisers


@pytest.mark.parametrize("bits", [1, 8, 24])
@pytest.mark.parametrize("make", [lambda bits: ITQ(bits=bits, iterations=10), lambda bits: Sign(bits=bits)])
def test_shapes_and_orthonormal_rows(make, bits):
    x = features()
    weight, bias = make(bits).fit(x)
    assert weight.shape == (bits, 24)
    assert bias.shape == (bits,)
    assert weight.dtype == bias.dtype == torch.float32
    torch.testing.assert_close(weight @ weight.T, torch.eye(bits), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected(x, (weight, bias)).mean(0), torch.zeros(bits), atol=1e-3, rtol=0)


def test_sign_is_pca():
    x = features()
    weight, bias = Sign(bits=6).fit(x)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    _, _, rows = np.linalg.svd(centred, full_matrices=False)
    agreement = np.abs((weight.double().numpy() * rows[:6]).sum(1))  # each direction up to its sign
    np.testing.assert_allclose(agreement, 1, atol=1e-4)
    variances = projected(x, (weight, bias)).var(0)
    assert (variances[:-1] >= variances[1:]).all()


def test_itq_rotates_within_the_pca_subspace():
    x = features(2000)
    sign, itq = Sign(bits=8).fit(x), ITQ(bits=8).fit(x)
    assert torch.linalg.svdvals(torch.cat([sign[0], itq[0]]))[8:].max() < 1e-5  # one subspace of 8 dimensions
    assert not torch.allclose(sign[0], itq[0], atol=0.1)


def test_a_mean_far_from_zero_costs_no_digits():
    x = features(500)
    far = x + 2.0**9
    expected = projected((far - far.double().mean(0)).float(), ITQ(8, 5).fit(far - far.mean(0)))
    weight, _ = ITQ(8, 5).fit(far)
    torch.testing.assert_close((far - far.double().mean(0)).float() @ weight.T, expected, atol=1e-3, rtol=0)


def test_deterministic_and_seeded():
    x = features()
    first, again, other = (ITQ(bits=8, iterations=5, seed=seed).fit(x)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(Sign(bits=8).fit(x)[0], Sign(bits=8).fit(x)[0])


@pytest.mark.parametrize("binariser", [ITQ(bits=8, iterations=5), Sign(bits=8)])
class TestErrors:
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.rand(50, 7), "8 bits from 7 dimensions: use at most 7"),
            (torch.rand(8, 24), "more than 8 vectors to be fitted, got 8"),
            (torch.rand(50, 24).double(), r"float32 tensor \(N, D\), got torch.float64"),
            (torch.rand(24), r"got torch.float32 \(24,\)"),
            (np.zeros((50, 24), np.float32), "got ndarray"),
            (torch.ones(50, 24), "vary in fewer than 8 directions"),
            (torch.cat([torch.rand(50, 7), torch.zeros(50, 17)], 1), "vary in fewer than 8 directions"),
        ],
    )
    def test_bad_input(self, binariser, x, message):
        with pytest.raises(ValueError, match=message):
            binariser.fit(x)

    def test_nan(self, binariser):
        x = features(50)
        x[3, 1], x[9, 0] = math.nan, math.inf
        with pytest.raises(ValueError, match=r"NaN or infinity, first in rows \[3, 9\]"):
            binariser.fit(x)


def test_constructors():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Sign(bits=0)
    with pytest.raises(ValueError, match="bits=0"):
        ITQ(bits=0)
    with pytest.raises(ValueError, match="iterations=0"):
        ITQ(bits=8, iterations=0)
