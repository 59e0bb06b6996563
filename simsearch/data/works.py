"""Which images show the same work: groups that are given, equal files, near-duplicates. Pure functions of pairs.

What the defaults of `simsearch data ingest` find among 3,964 paintings of 224 x 224 pixels whose 85 pairs of other
scans or versions of one work are known (perceptual hash; EfficientNet-Lite0 with GeM on 192 pixels):

- hash alone: to 4 bits 37 pairs, to 6 bits 58, all known; to 8 bits 72, 3 of them not known (2 of these are right, by
  eye); to 10 bits 96, 15 not known.
- descriptor alone: from 0.92 on 16 pairs; from 0.88 on 48, 1 of them another work of a series.
- both, as the defaults have it (6 bits; or 0.92; or 0.78 and 12 bits): 93 pairs, 83 of the 85. Of the 10 others 8 are
  the same work by eye and 2 are not: 98 % are right.

So these find other scans of one picture. Views of one motif (a series of haystacks), details and mirror images are
works of their own unless a column groups them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from simsearch.data.audit import near_pairs_by_hash
from simsearch.functional.codes import code_words

Pairs = tuple[Tensor, Tensor]  # rows int64 (P,) and (P,)

BRUTE_FORCE = 50_000  # hashes that are compared each with each; more by bands
_BANDED_PAIRS = 50_000_000


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


def hash_distances(hashes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Hamming distances int64 (P,) of chosen pairs of packed hashes uint8 (N, 8)."""
    words = code_words(hashes)[:, 0]
    return torch.from_numpy(np.bitwise_count(words[rows.numpy()] ^ words[columns.numpy()]).astype(np.int64))


def agreeing(similarity: Tensor, distance: Tensor, *, strict: float, loose: float, bits: int) -> Tensor:
    """Which pairs are near-duplicates by descriptor, bool (P,): cosines from `strict` on, and from `loose` on where
    the hashes agree too, to `bits` of 64.

    similarity: float (P,). distance: int64 (P,). Two criteria that err on different things may each be looser than
    one alone, which keeps groups from growing into chains.
    """
    return (similarity >= strict) | ((similarity >= loose) & (distance <= bits))
