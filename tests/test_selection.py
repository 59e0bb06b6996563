"""Selections against masks of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simsearch.index.selection import Selection


def held(mask: Tensor, as_positions: bool) -> Selection:
    return Selection(len(mask), mask.nonzero()[:, 0].numpy().astype(np.int32)) if as_positions else Selection.of(mask)


@st.composite
def masks(draw, total: int) -> tuple[Tensor, Selection]:
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    mask = torch.rand(total, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) < share
    return mask, held(mask, draw(st.booleans()))


@given(st.data(), st.integers(1, 300))
@settings(deadline=None, max_examples=150)
def test_everything_is_what_masks_do(data, total):
    (one, left), (other, right) = data.draw(masks(total)), data.draw(masks(total))
    asked = torch.randint(total, (7,), generator=torch.Generator().manual_seed(total)).numpy()
    taken = other.nonzero()[:, 0].numpy()
    for expected, got in (
        (one, left),
        (one & other, left & right),
        (~one, ~left),
        (one & ~other, left.without(taken)),
        (~(~one & ~other), ~(~left & ~right)),
        (torch.ones(total, dtype=torch.bool), Selection.everything(total)),
    ):
        assert len(got) == int(expected.sum())
        assert got.total == total
        assert np.array_equal(got.holds(asked), expected.numpy()[asked])
        assert np.array_equal(got.positions, expected.nonzero()[:, 0].numpy())
        assert np.array_equal(got.bitmap, np.packbits(expected.numpy(), bitorder="little"))
        assert torch.equal(got.mask(), expected)


@pytest.mark.parametrize("as_positions", [True, False])
def test_a_mask_is_a_copy(as_positions):
    selection = held(torch.arange(20) % 3 == 0, as_positions)
    for _ in range(2):
        mask = selection.mask()
        assert int(mask.sum()) == 7
        mask.fill_(False)


def test_few_of_many_stay_positions():
    """A selective filter makes no array of all items."""
    few = Selection(10**9, np.array([3, 10**8], dtype=np.int32))
    other = Selection(10**9, np.array([2, 3, 5], dtype=np.int32))
    assert (few & other).positions.tolist() == [3]
    assert few.without(np.array([3, 4])).positions.tolist() == [10**8]
    assert "bitmap" not in few.__dict__ | other.__dict__
