"""Measures of recommendations, against loops over items and pairs."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.functional.recommendation import (
    coverage,
    exposure,
    gini,
    intra_list_diversity,
    long_tail_share,
    novelty,
)

ITEMS = 7
LISTS = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(st.integers(-1, ITEMS - 1), min_size=k, max_size=k), min_size=1, max_size=6)
)
POPULARITY = st.lists(st.integers(1, 4), min_size=ITEMS, max_size=ITEMS)


@given(LISTS, POPULARITY, st.sampled_from([0.1, 0.2, 0.5, 0.9]))
@settings(max_examples=80, deadline=None)
def test_exposure_and_what_follows_from_it(lists, popularity, head):
    shown = [item for row in lists for item in row if item >= 0]
    counts = exposure(torch.tensor(lists), ITEMS)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [shown.count(item) for item in range(ITEMS)]
    if not shown:
        with pytest.raises(ValueError, match="nothing is recommended"):
            coverage(counts)
        return
    assert coverage(counts) == pytest.approx(len(set(shown)) / ITEMS)
    # Gini: half the mean absolute difference over the mean.
    x = counts.numpy()
    assert gini(counts) == pytest.approx(np.abs(x[:, None] - x).mean() / (2 * x.mean()), abs=1e-12)
    # The head as a mean over all orders in which equally popular items can stand, item by item.
    tail = 0.0
    for item, count in enumerate(counts.tolist()):
        above = sum(p > popularity[item] for p in popularity)
        equal = popularity.count(popularity[item])
        tail += count * (1 - min(max((head * ITEMS - above) / equal, 0), 1))
    assert long_tail_share(counts, torch.tensor(popularity), head) == pytest.approx(tail / len(shown))


def test_ends_by_hand():
    even, one = torch.full((10,), 3), torch.tensor([0] * 9 + [5])
    assert (coverage(even), gini(even)) == (1.0, pytest.approx(0.0, abs=1e-12))
    assert (coverage(one), gini(one)) == (0.1, pytest.approx(0.9))
    popularity = torch.arange(10)
    assert long_tail_share(even, popularity, 0.2) == pytest.approx(0.8)
    assert long_tail_share(one, popularity, 0.2) == 0.0
    assert long_tail_share(one, -popularity, 0.2) == 1.0
    assert long_tail_share(one, torch.ones(10), 0.2) == pytest.approx(0.8)  # all equally popular


@given(LISTS, st.integers(0, 100), st.sampled_from([1, 2**20]))
@settings(max_examples=60, deadline=None)
def test_intra_list_diversity_against_pairs(lists, seed, block_bytes):
    vectors = torch.randn(ITEMS, 3, generator=torch.Generator().manual_seed(seed))
    vectors[2] = 0
    ours = intra_list_diversity(torch.tensor(lists), vectors, block_bytes=block_bytes)
    assert ours.dtype == torch.float64
    units = vectors.double() / vectors.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    for row, value in zip(lists, ours.tolist(), strict=True):
        pairs = [1 - float(units[a] @ units[b]) for a, b in combinations([i for i in row if i >= 0], 2)]
        if pairs:
            assert value == pytest.approx(np.mean(pairs), abs=1e-6)
        else:
            assert math.isnan(value)


@given(LISTS, POPULARITY)
@settings(max_examples=60, deadline=None)
def test_novelty_against_items(lists, popularity):
    ours = novelty(torch.tensor(lists), torch.tensor(popularity))
    assert ours.dtype == torch.float64
    for row, value in zip(lists, ours.tolist(), strict=True):
        bits = [-math.log2(popularity[item] / sum(popularity)) for item in row if item >= 0]
        assert math.isnan(value) if not bits else value == pytest.approx(np.mean(bits))


def test_novelty_needs_popularity_of_recommended_items_only():
    popularity = torch.tensor([0, 2, 6])
    assert novelty(torch.tensor([[1, 1]]), popularity).tolist() == [2.0]
    with pytest.raises(ValueError, match="has popularity 0"):
        novelty(torch.tensor([[0, 1]]), popularity)


def test_no_lists_give_no_values():
    none = torch.empty(0, 3, dtype=torch.int64)
    assert exposure(none, 2).tolist() == [0, 0]
    assert len(intra_list_diversity(none, torch.ones(2, 2))) == 0
    assert len(novelty(none, torch.ones(2))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exposure(torch.tensor([[2]]), 2), r"ids must lie in -1\.\.1, got 2\.\.2"),
        (lambda: exposure(torch.tensor([[-2]]), 2), r"ids must lie in -1\.\.1, got -2"),
        (lambda: exposure(torch.tensor([1]), 2), r"ids must be int64 \(Q, K\)"),
        (lambda: exposure(torch.tensor([[1.0]]), 2), r"ids must be int64 \(Q, K\), got torch.float32"),
        (lambda: exposure(torch.tensor([[1]]), 0), "there are no items"),
        (lambda: gini(torch.zeros(3)), "nothing is recommended"),
        (lambda: coverage(torch.ones(3, 1)), r"counts must be one an item, \(N,\)"),
        (lambda: long_tail_share(torch.ones(3), torch.ones(2)), r"popularity must be one an item, \(3,\)"),
        (lambda: long_tail_share(torch.ones(3), torch.ones(3), 1.0), r"head=1\.0 is not a share"),
        (lambda: long_tail_share(torch.ones(1), torch.tensor([math.nan])), "popularity holds NaN"),
        (lambda: intra_list_diversity(torch.tensor([[0]]), torch.ones(3)), r"vectors must be \(N, D\)"),
        (lambda: novelty(torch.tensor([[0]]), torch.ones(3, 1)), "popularity must be one an item"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("items", [100_000, 1_000_000])
def test_large_collections_in_whole_numbers(items):
    """Counts whose sums and squares float32 does not hold, against NumPy's whole numbers."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 1000, items)
    counts[:7] = 10_000_000
    places = np.arange(1, items + 1)
    expected = 2 * sum(map(int, places * np.sort(counts))) / (items * int(counts.sum())) - (items + 1) / items
    assert gini(torch.from_numpy(counts)) == pytest.approx(expected, abs=1e-12)
    popularity = rng.permutation(items)
    tail = int(counts[popularity < 0.8 * items].sum())
    assert long_tail_share(torch.from_numpy(counts), torch.from_numpy(popularity)) == pytest.approx(
        tail / int(counts.sum()), abs=1e-12
    )
    assert coverage(torch.from_numpy(counts)) == np.count_nonzero(counts) / items
    ids = torch.from_numpy(rng.integers(0, items, (3, 5)))
    ids[ids == int(popularity.argmin())] = int(popularity.argmax())
    share = popularity[ids.numpy()] / popularity.sum()
    assert np.allclose(novelty(ids, torch.from_numpy(popularity)).numpy(), -np.log2(share).mean(1), rtol=1e-12)
    one = torch.full((2, 4), items - 1)
    assert exposure(one, items)[-1] == 8
