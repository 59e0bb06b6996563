"""Selections against masks of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simsearch.index.faiss_index import FaissIndex
from simsearch.index.selection import Selection
from simsearch.search.segments import Places, SegmentedIndex


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


@given(st.integers(0, 999), st.integers(1, 40), st.integers(0, 30), st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_few_items_of_several_segments(seed, chosen, gone, k):
    """A sparse selection costs what it chooses, makes no mask, and answers as a naive search does."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 900, 3)
    vectors = torch.from_numpy(rng.standard_normal((counts.sum(), 4), dtype=np.float32))
    removed = np.sort(rng.choice(len(vectors), min(gone, len(vectors) - 1), replace=False))
    indexes = []
    for part in vectors.split(counts.tolist()):
        indexes.append(FaissIndex("Flat"))
        indexes[-1].add(part)
    left = torch.from_numpy(np.delete(vectors.numpy(), removed, axis=0))
    index = SegmentedIndex(indexes, Places(counts.tolist(), removed))
    k = min(k, len(left))
    positions = np.sort(rng.choice(len(left), min(chosen, -(-len(left) // 32)), replace=False)).astype(np.int32)
    selection = Selection(len(left), positions)
    query = torch.from_numpy(rng.standard_normal((2, 4), dtype=np.float32))
    if sparse := selection.is_sparse:
        selection.mask = lambda: pytest.fail("it makes a mask of all items")
    found = index.search(query, k, selection)
    for row in range(2):
        scores = [float(query[row] @ left[position]) for position in positions]
        best = sorted(zip(scores, positions.tolist(), strict=True), reverse=True)[:k]
        assert found.ids[row].tolist() == [i for _, i in best] + [-1] * (k - len(best)), sparse
        assert np.allclose(found.scores[row][: len(best)], [score for score, _ in best], atol=1e-5)


def test_a_selection_of_another_catalog_is_refused():
    indexes = [FaissIndex("Flat"), FaissIndex("Flat")]
    for one in indexes:
        one.add(torch.eye(4))
    index = SegmentedIndex(indexes, Places([4, 4], np.empty(0, dtype=np.int64)))
    with pytest.raises(ValueError, match="among selects from 9 items, the index has 8"):
        index.search(torch.eye(4)[:1], 1, Selection(9, np.array([8])))
