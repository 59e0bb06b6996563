"""ITQ and Sign against FAISS's own apply, against NumPy, and against what the paper promises."""

import math

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simsearch.index.binarize import ITQ, Sign


def features(n: int = 800, dimension: int = 24, seed: int = 0) -> Tensor:
    """Correlated, off-centre and non-negative, as pooled ReLU features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(99))
    scale = torch.linspace(2, 0.2, dimension)
    return torch.relu((torch.randn(n, dimension, generator=generator) * scale) @ mixing + 1)


def projected(x: Tensor, fitted: tuple[Tensor, Tensor]) -> Tensor:
    weight, bias = fitted
    return x @ weight.T + bias


def quantisation_error(v: Tensor) -> float:
    """||sign(v) - v||^2 per item after a common scale, which the rotation of ITQ makes small."""
    v = v / v.square().mean().sqrt()
    return (v.sign() - v).square().mean().item()


@given(seed=st.integers(0, 1000), bits=st.integers(1, 24), n=st.sampled_from([30, 300]))
@settings(max_examples=12, deadline=None)
def test_itq_has_the_signs_of_faiss(seed, bits, n):
    """FAISS normalises each centred vector; one linear map has the same signs, on unseen data too."""
    x, unseen = features(n, seed=seed), features(200, seed=seed + 1)
    reference = faiss.ITQTransform(24, bits, True)
    reference.itq.max_iter, reference.itq.seed = 10, 5
    reference.train(x.numpy())
    fitted = ITQ(bits=bits, iterations=10, seed=5).fit(x)
    for data in (x, unseen):
        theirs = torch.from_numpy(reference.apply(data.numpy()))
        sure = theirs.abs() > 1e-4  # signs of rounding noise mean nothing
        assert sure.double().mean() > 0.99
        assert torch.equal((projected(data, fitted) > 0)[sure], (theirs > 0)[sure])


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


def test_itq_rotates_within_the_pca_subspace_and_lowers_the_error():
    x = features(2000)
    x = x - x.mean(0)
    x = x / x.norm(dim=1, keepdim=True)  # so that FAISS's weighting by norm is the identity, nearly
    sign, itq = Sign(bits=8).fit(x), ITQ(bits=8).fit(x)
    together = torch.cat([sign[0], itq[0]])
    assert torch.linalg.svdvals(together)[8:].max() < 0.05  # one subspace of 8 dimensions
    errors = [quantisation_error(projected(x, ITQ(bits=8, iterations=i).fit(x))) for i in (1, 50)]
    assert errors[1] < errors[0]
    assert errors[1] < quantisation_error(projected(x, sign))


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
            (torch.rand(50, 7), "8 bits from 7 dimensions: at most 7"),
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
