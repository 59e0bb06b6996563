"""Which images show the same work: groups that are given, equal files, near-duplicates. Pure functions of pairs.

Perceptual hashes and neighbours by descriptor (EfficientNet-Lite0 with GeM on 192 pixels) propose pairs of images, the
correlation of their pixels decides, and cliques of pairs are works. What the defaults of `simsearch data ingest` find:

- among 3,964 paintings of 224 x 224 pixels, of which 85 pairs of other scans or versions of one work are known: all 85,
  and 13 more, 12 of them the same picture by eye. Without pixels, pairs joined in chains: 83 and 10, 2 of them wrong.
- among 120 drawn pages of text, coins, night skies and line sketches each, of which 15 have a second scan: 15, 15, 13
  and 15 of the scans, no two unlike images. Without pixels each of the first three became one work.

So these find other scans of one picture, also turned or mirrored ones. Views of one motif (a series of haystacks) and
details are works of their own unless a column groups them, and so are scans of plain pictures, which have nothing to
compare.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from simsearch.data.audit import MIN_CORRELATION, near_pairs_by_hash
from simsearch.functional.codes import code_words

Pairs = tuple[Tensor, Tensor]  # rows int64 (P,) and (P,)

BRUTE_FORCE = 50_000  # hashes that are compared each with each; more by bands
_BANDED_PAIRS = 50_000_000
_BY_CHANCE = 0.001  # pairs of unlike images that may be tied, were correlations normally distributed
_LEAST_BACKGROUND = 30  # pairs that tell how alike unlike images are


@dataclass(frozen=True)
class SameWork:
    """What near-duplicates say. pairs: places of files that show one work, which connect its files. counts: how many
    near-duplicates each criterion proposed and pixels confirmed. least: the correlation that did. suspicious: groups
    too large to be believed, which are not tied."""

    pairs: list[tuple[int, int]]
    counts: dict[str, int]
    least: float
    suspicious: list[list[int]]


def union_find(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` rows the smallest row that pairs connect it with."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [root(row) for row in range(count)]


def equal_pairs(values: Sequence[Hashable | None]) -> list[tuple[int, int]]:
    """Pairs of rows that connect those of equal values; None equals nothing."""
    first: dict[Hashable, int] = {}
    return [
        (first[value], row)
        for row, value in enumerate(values)
        if value is not None and first.setdefault(value, row) != row
    ]


def hash_pairs(hashes: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows i < j and Hamming distances, int64 (P,) each, of the pairs of at most `max_distance` bits of 64.

    hashes: packed uint8 (N, 8). Beyond BRUTE_FORCE hashes only those are compared that agree in one of
    max_distance + 1 bands of bits, as each such pair does (Manku et al. 2007).

    Raises ValueError for another shape, a distance outside 0..64, and more than 50 million candidates.
    """
    if len(hashes) <= BRUTE_FORCE:
        rows, columns, distances = near_pairs_by_hash(hashes, hashes, max_distance)
        kept = rows < columns
        return rows[kept], columns[kept], distances[kept]
    return banded_pairs(hashes, max_distance)


def banded_pairs(hashes: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `hash_pairs` gives, by bands. The bits are shuffled first: low coefficients agree more often."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(64)
    bits = np.unpackbits(hashes.numpy(), axis=1)[:, order]
    words = code_words(hashes)[:, 0]
    found = [np.empty((0, 2), dtype=np.int64)]
    for band in np.array_split(np.arange(64), max_distance + 1):
        keys = bits[:, band] @ (1 << np.arange(len(band), dtype=np.uint64))
        sequence = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.r_[True, keys[sequence][1:] != keys[sequence][:-1]])
        for bucket in np.split(sequence, starts[1:]):
            if len(bucket) > 1:
                found.append(_near_in(words, np.sort(bucket), max_distance))
        if sum(map(len, found)) > _BANDED_PAIRS:
            raise ValueError(f"more than {_BANDED_PAIRS:,} pairs are that near: lower max_distance")
    pairs = np.unique(np.concatenate(found), axis=0)
    distances = np.bitwise_count(words[pairs[:, 0]] ^ words[pairs[:, 1]]).astype(np.int64)
    rows, columns = torch.from_numpy(np.ascontiguousarray(pairs.T))
    return rows, columns, torch.from_numpy(distances)


def _near_in(words: np.ndarray, rows: np.ndarray, max_distance: int) -> np.ndarray:
    """Pairs (P, 2) of near hashes among the sorted rows of a bucket, in blocks."""
    step = max(1, 2**22 // len(rows))
    found = []
    for start in range(0, len(rows), step):
        own = rows[start : start + step]
        near = np.bitwise_count(words[own, None] ^ words[rows]) <= max_distance
        i, j = np.nonzero(near & (own[:, None] < rows))
        found.append(np.stack([own[i], rows[j]], axis=1))
    return np.concatenate(found)


def turned_pairs(hashes: Tensor, turned: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows i < j and quarter turns 1, 2 or 3, int64 (P,) each: the i-th image so turned is near the j-th by its hash.

    hashes: packed uint8 (N, 8). turned: those of the images turned by 1, 2 and 3 quarters, uint8 (N, 3, 8).
    """
    count = len(hashes)
    rows, columns, _ = hash_pairs(torch.cat([hashes, *turned.unbind(1)]), max_distance)
    turns, other = columns // count, columns % count
    kept = (rows < count) & (turns > 0) & (rows != other)
    rows, other, turns = rows[kept], other[kept], turns[kept]
    # The other image was turned. One is near the other turned when that is near it turned back.
    swapped = rows < other
    turns = torch.where(swapped, (4 - turns) % 4, turns)
    found = torch.stack([torch.minimum(rows, other), torch.maximum(rows, other), turns], 1).unique(dim=0)
    return found[:, 0], found[:, 1], found[:, 2]


def least_correlation(background: Tensor, pairs: int) -> float:
    """The correlation of pixels from which on two images are one picture, by how alike unlike ones of a collection are.

    That is MIN_CORRELATION, and more where pages, coins or skies are alike among themselves: so far above the middle of
    `background`, correlations (n,) of images that are neighbours and unlike, that of `pairs` pairs a thousandth of one
    gets there by chance. Middle and spread are medians, which the few pairs of one picture do not move.
    """
    if len(background) < _LEAST_BACKGROUND:
        return MIN_CORRELATION
    middle = float(background.median())
    spread = 1.4826 * float((background - middle).abs().median())  # of a normal distribution its standard deviation
    return max(MIN_CORRELATION, middle + NormalDist().inv_cdf(1 - _BY_CHANCE / max(1, pairs)) * spread)


def cliques(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """For each of `count` rows the smallest row of its group: two groups become one where at least half of all pairs
    between them agree.

    pairs: that agree, the surest first, each once. Average linkage (Sokal and Michener 1958) of what agrees: a chain,
    of which each image is like the next alone, comes apart.
    """
    agreed = {(min(pair), max(pair)) for pair in pairs}
    group = {row: [row] for pair in agreed for row in pair}
    for one, other in pairs:
        first, second = group[one], group[other]
        if first is second:
            continue
        agreeing = sum((min(a, b), max(a, b)) in agreed for a in first for b in second)
        if 2 * agreeing >= len(first) * len(second):
            first += second
            for row in second:
                group[row] = first
    return [min(group[row]) if row in group else row for row in range(count)]
