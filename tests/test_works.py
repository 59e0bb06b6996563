"""Grouping images into works, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.data.ingest.grouping import (
    agreement,
    cliques,
    connected,
    equal_pairs,
    least_values,
)
from simsearch.data.near_duplicates import (
    _changes,
    banded_pairs,
    hash_pairs_between,
    hash_pairs_within,
    perceptual_hashes,
    pixel_correlations,
    turned_pairs,
)


@given(st.integers(1, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_connected_rows_are_known_by_the_smallest_row_that_can_be_reached(count, draw):
    row = st.integers(0, count - 1)
    pairs = draw.draw(st.lists(st.tuples(row, row), max_size=15))
    reach = np.eye(count, dtype=bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for _ in range(count):
        reach = reach @ reach
    assert connected(count, pairs) == [int(np.flatnonzero(line)[0]) for line in reach]


def test_equal_values_are_connected_and_none_is_equal_to_nothing():
    values = ["a", None, "b", "a", None, "a", "b"]
    assert connected(7, equal_pairs(values)) == [0, 1, 2, 0, 4, 0, 2]


@pytest.mark.parametrize("max_distance", [0, 3, 6, 10])
def test_bands_find_the_pairs_that_brute_force_finds(max_distance, monkeypatch):
    random = np.random.default_rng(3)
    bits = random.integers(0, 2, (60, 64))
    # Neighbours at every distance up to 12 from the first twenty, and doubles.
    near = bits[:20].copy()
    for i, line in enumerate(near):
        line[random.permutation(64)[: i % 13]] ^= 1
    bits = np.concatenate([bits, near, bits[:3]])
    hashes = torch.from_numpy(np.packbits(bits, axis=1))
    wanted = {
        (i, j, int((bits[i] != bits[j]).sum()))
        for i in range(len(bits))
        for j in range(i + 1, len(bits))
        if (bits[i] != bits[j]).sum() <= max_distance
    }
    assert len(wanted) > 3
    for found in (hash_pairs_within(hashes, max_distance), banded_pairs(hashes, max_distance)):
        assert set(zip(*(part.tolist() for part in found), strict=True)) == wanted
        assert len(found[0]) == len(wanted)
    expected = hash_pairs_between(hashes[:40], hashes[30:], max_distance)
    monkeypatch.setattr("simsearch.data.near_duplicates.BRUTE_FORCE", 0)
    found = hash_pairs_between(hashes[:40], hashes[30:], max_distance, cells=7)  # several blocks
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_of_two_near_hashes_some_band_differs_little_enough():
    for max_distance in range(65):
        changes = _changes(max_distance)
        missed = [int(np.bitwise_count(band).max()) + 1 if len(band) else 0 for band in changes]  # in every band
        assert sum(missed) == max_distance + 1


@given(st.integers(2, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_groups_grow_only_where_half_of_the_pairs_between_them_agree(count, draw):
    """Against the same by matrices of shares."""
    row = st.integers(0, count - 1)
    chosen = draw.draw(st.lists(st.tuples(row, row).filter(lambda pair: pair[0] < pair[1]), unique=True, max_size=20))
    agree = np.zeros((count, count))
    for a, b in chosen:
        agree[a, b] = agree[b, a] = 1
    labels = np.arange(count)
    for a, b in chosen:
        one, other = labels == labels[a], labels == labels[b]
        if labels[a] != labels[b] and agree[np.ix_(one, other)].mean() >= 0.5:
            labels[one | other] = min(labels[a], labels[b])
    assert cliques(count, chosen) == labels.tolist()


def test_a_chain_comes_apart_and_a_clique_holds():
    chain = [(i, i + 1) for i in range(9)]
    assert max(np.bincount(cliques(10, chain))) <= 3  # of three, two of whose pairs agree
    whole = [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert cliques(6, whole) == [0] * 5 + [5]
    # A work of four, one pair of which no criterion found, and a stranger that is like one of them.
    assert cliques(5, [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (3, 4)]) == [0, 0, 0, 0, 4]


@given(st.integers(2, 40), st.floats(0.0, 1.0), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_what_decides_rises_for_images_that_are_like_many_others(count, share, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(count))
    pairs = pairs[torch.rand(len(pairs), generator=generator) < share]
    values = torch.rand(len(pairs), generator=generator)
    expected = []
    for pair in pairs.tolist():
        least = [0.55]
        for image in pair:
            own = sorted((v for p, v in zip(pairs.tolist(), values.tolist(), strict=True) if image in p), reverse=True)
            if len(own) >= 15:  # 5 may be of the image's work, and 10 are needed
                least.append(min(0.97, (1 + own[5]) / 2))
        expected.append(max(least))
    assert least_values(pairs, values, 0.55).tolist() == pytest.approx(expected, abs=1e-6)


def test_coins_do_not_become_one_work_among_paintings_and_their_second_scans_do():
    """24 coins of one rim, one of them scanned twice, beside a painting and its copy."""
    coins = torch.combinations(torch.arange(25))
    pairs = torch.cat([coins, torch.tensor([[25, 26]])])
    twice = (pairs == torch.tensor([0, 24])).all(1) | (pairs[:, 0] == 25)
    aligned = torch.where(twice, 0.98, 0.86)
    aligned[-1] = 0.6  # the copy of a painting, in a frame
    many, half = torch.full((len(pairs),), 140), torch.full((len(pairs),), 0.5)
    assert agreement(pairs, aligned, many, many, half, aligned, half).tolist() == twice.tolist()


def test_turned_copies_are_found_with_their_turn():
    random = np.random.default_rng(5)
    coarse = torch.from_numpy(random.integers(0, 256, (12, 3, 7, 9)).astype(np.uint8)).float()
    images = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 255).to(torch.uint8)
    images[6] = images[1].rot90(1, (1, 2))
    images[7] = images[2].rot90(2, (1, 2))
    images[0] = images[3].rot90(1, (1, 2))
    turned = torch.stack([perceptual_hashes(images.rot90(by, (2, 3))) for by in (1, 2, 3)], 1)
    rows, columns, turns = turned_pairs(perceptual_hashes(images), turned, 6)
    assert list(zip(rows.tolist(), columns.tolist(), turns.tolist(), strict=True)) == [(0, 3, 3), (1, 6, 1), (2, 7, 2)]
    assert (pixel_correlations(images, rows, columns, turns) > 0.99).all()
    assert (pixel_correlations(images, rows, columns) < 0.7).all()
