"""Grouping images into works, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.data.works import agreeing, banded_pairs, equal_pairs, hash_distances, hash_pairs, union_find


@given(st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_union_find_gives_the_smallest_row_that_can_be_reached(count, draw):
    row = st.integers(0, count - 1)
    pairs = draw.draw(st.lists(st.tuples(row, row), max_size=15))
    reach = np.eye(count, dtype=bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for _ in range(count):
        reach = reach @ reach
    assert union_find(count, pairs) == [int(np.flatnonzero(line)[0]) for line in reach]


def test_equal_values_are_connected_and_none_is_equal_to_nothing():
    values = ["a", None, "b", "a", None, "a", "b"]
    assert union_find(7, equal_pairs(values)) == [0, 1, 2, 0, 4, 0, 2]


@pytest.mark.parametrize("max_distance", [0, 3, 6])
def test_bands_find_the_pairs_that_brute_force_finds(max_distance):
    random = np.random.default_rng(3)
    bits = random.integers(0, 2, (60, 64))
    # Neighbours at every distance up to 9 from the first twenty, and doubles.
    near = bits[:20].copy()
    for i, line in enumerate(near):
        line[random.permutation(64)[: i % 10]] ^= 1
    bits = np.concatenate([bits, near, bits[:3]])
    hashes = torch.from_numpy(np.packbits(bits, axis=1))
    wanted = {
        (i, j, int((bits[i] != bits[j]).sum()))
        for i in range(len(bits))
        for j in range(i + 1, len(bits))
        if (bits[i] != bits[j]).sum() <= max_distance
    }
    assert len(wanted) > 3
    for found in (hash_pairs(hashes, max_distance), banded_pairs(hashes, max_distance)):
        assert set(zip(*(part.tolist() for part in found), strict=True)) == wanted
        assert len(found[0]) == len(wanted)
    rows, columns, distances = banded_pairs(hashes, max_distance)
    assert torch.equal(hash_distances(hashes, rows, columns), distances)


def test_a_loose_cosine_needs_the_hash_to_agree():
    similarity = torch.tensor([0.95, 0.92, 0.91, 0.8, 0.8, 0.78, 0.77])
    distance = torch.tensor([40, 64, 13, 12, 13, 0, 0])
    got = agreeing(similarity, distance, strict=0.92, loose=0.78, bits=12)
    assert got.tolist() == [True, True, False, True, False, True, False]
