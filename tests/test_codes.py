"""Packed codes against bit by bit loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.functional.codes import code_words, pack_codes, unpack_codes
from simsearch.functional.ranking import hamming_pairs

shapes = st.tuples(st.integers(0, 5), st.sampled_from([1, 7, 8, 12, 48, 63, 64, 65, 128, 300]))


def outputs(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Real values with some exact zeros."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_roundtrip(shape, seed):
    real = outputs(shape, seed)
    codes = pack_codes(real)
    assert codes.dtype == torch.uint8
    assert codes.shape == (shape[0], -(-shape[1] // 8))
    bits = unpack_codes(codes, shape[1])
    assert bits.dtype == torch.float32
    assert torch.equal(bits, (real > 0).float())


@settings(deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_bits_lie_where_they_are_said_to_lie(shape, seed):
    """Bit j in byte j // 8 at position j % 8 (2^(j % 8)), the rest zero; words are little-endian bytes."""
    real = outputs(shape, seed)
    numbers = [sum(1 << j for j, value in enumerate(row) if value > 0) for row in real.tolist()]
    codes = pack_codes(real)
    assert [int.from_bytes(bytes(row), "little") for row in codes.tolist()] == numbers
    words = code_words(codes)
    assert words.dtype == np.uint64
    assert words.shape == (shape[0], -(-codes.shape[1] // 8))
    assert [sum(int(word) << 64 * w for w, word in enumerate(row)) for row in words] == numbers


def test_packing_equals_numpy():
    real = outputs((40, 29), 0)
    expected = np.packbits((real > 0).numpy(), axis=1, bitorder="little")
    assert np.array_equal(pack_codes(real).numpy(), expected)


def test_packing_takes_integers_booleans_and_strided_outputs():
    real = outputs((24, 16), 1)
    assert torch.equal(pack_codes(real.int()), pack_codes(real))
    assert torch.equal(pack_codes(real > 0), pack_codes(real))
    assert torch.equal(pack_codes(real.T.contiguous().T), pack_codes(real))


def test_hamming_pairs_equal_string_comparison():
    left, right = pack_codes(outputs((30, 77), 2)), pack_codes(outputs((30, 77), 3))
    naive = [
        sum(a != b for a, b in zip(x, y, strict=True))
        for x, y in zip(unpack_codes(left, 77).tolist(), unpack_codes(right, 77).tolist(), strict=True)
    ]
    assert hamming_pairs(left, right).tolist() == naive


def test_outputs_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"\(N, b\), got \(8,\)"):
        pack_codes(torch.zeros(8))


def test_what_has_no_sign_has_no_code():
    real = torch.tensor([[1.0, -torch.inf], [0.5, torch.nan]])
    assert pack_codes(real[:1]).tolist() == [[1]]
    with pytest.raises(ValueError, match=r"codes hold NaN, first in rows \[1\]"):
        pack_codes(real)
