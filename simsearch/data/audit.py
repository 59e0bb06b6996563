"""The leak audit: near-duplicates of the queries in the gallery and in the training set.

Two criteria, either of which suffices: cosine similarity of descriptors, and Hamming distance of
64-bit perceptual hashes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imagehash
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from simsearch.data.collection import Collection
from simsearch.files import replacing
from simsearch.functional.codes import code_words, pack_codes
from simsearch.types import RetrievalTask

MIN_SIMILARITY = 0.95
MAX_HASH_DISTANCE = 6
PARTS = ("gallery", "train", "both")
CRITERIA = ("hash", "descriptor", "both")
COLUMNS = ("query", "other", "part", "similarity", "hash_distance", "by", "query_label", "other_label")

_HASH_BYTES = 8
_CELLS = 2**22  # similarities or distances held at a time
_MAX_PAIRS = 10_000_000
_SLACK = 0.01  # more than a matmul in reduced precision (TF32, bfloat16) is wrong by


@dataclass(frozen=True)
class Duplicates:
    """N pairs of a query and a near-duplicate of it, worst first.

    query, other: int64 (N,), collection rows. similarity: float32 (N,), cosine, NaN without
    descriptors. hash_distance: int64 (N,), differing bits of 64, -1 without hashes. part: where
    `other` stands, "gallery", "train" or "both". by: the criterion that found the pair, "hash",
    "descriptor" or "both".

    Raises ValueError where shapes or dtypes disagree, for an unknown part or criterion, and for a
    pair of a row with itself.
    """

    query: Tensor
    other: Tensor
    similarity: Tensor
    hash_distance: Tensor
    part: tuple[str, ...]
    by: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.query)
        for name, dtype in (
            ("query", torch.int64),
            ("other", torch.int64),
            ("similarity", torch.float32),
            ("hash_distance", torch.int64),
        ):
            value = getattr(self, name)
            if value.shape != (n,) or value.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} ({n},), got {value.dtype} {tuple(value.shape)}")
        for name, known in (("part", PARTS), ("by", CRITERIA)):
            value = getattr(self, name)
            if len(value) != n or not set(value) <= set(known):
                raise ValueError(f"{name} must be {n} of {', '.join(known)}, got {len(value)}: {set(value)}")
        if (self.query == self.other).any():
            row = int(self.query[self.query == self.other][0])
            raise ValueError(f"row {row} is paired with itself: take self pairs out")

    def __len__(self) -> int:
        return len(self.query)

    def select(self, keep: Tensor) -> Duplicates:
        """The pairs that `keep` chooses, a bool mask (N,) or int64 positions, in that order."""
        chosen = torch.arange(len(self))[keep]
        return Duplicates(
            self.query[chosen],
            self.other[chosen],
            self.similarity[chosen],
            self.hash_distance[chosen],
            tuple(self.part[i] for i in chosen.tolist()),
            tuple(self.by[i] for i in chosen.tolist()),
        )

    def queries(self, part: Literal["gallery", "train"]) -> Tensor:
        """Collection rows of the queries with a near-duplicate in that part, int64, sorted, unique."""
        if part not in ("gallery", "train"):
            raise ValueError(f"part={part!r} is unknown: use 'gallery' or 'train'")
        return torch.unique(self.query[torch.tensor([p in (part, "both") for p in self.part], dtype=torch.bool)])


def perceptual_hashes(images: Tensor, *, progress: bool = False) -> Tensor:
    """Perceptual hashes, packed uint8 (N, 8), of images uint8 (N, 3, H, W): imagehash.phash, 64 bits.

    The hash compares the lowest 8 x 8 coefficients of the grey image's cosine transform with their
    median. It survives re-encoding, resizing and brightness; not mirroring, cropping or rotation.
    progress: show a bar on stderr (about 3,000 images a second).

    Raises ValueError for another shape or dtype.
    """
    _check_images(images)
    bits = torch.empty(len(images), 8 * _HASH_BYTES, dtype=torch.bool)
    for row, image in enumerate(tqdm(images, desc="perceptual hashes", unit="image", disable=not progress)):
        bits[row] = torch.from_numpy(imagehash.phash(_to_pil(image)).hash.reshape(-1))
    return pack_codes(bits)


def near_pairs_by_hash(
    query: Tensor, other: Tensor, max_distance: int, *, cells: int = _CELLS
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and Hamming distances, int64 (P,) each, of the pairs of at most `max_distance` bits.

    query, other: packed hashes uint8 (Q, 8) and (G, 8). Pairs come ordered by row, then column. cells:
    how many distances are held at a time.

    Raises ValueError for another shape or dtype, a distance outside 0..64, and over 10 million pairs.
    """
    _check_hashes(query, "query")
    _check_hashes(other, "other")
    _check_distance(max_distance)
    query_words, other_words = code_words(query)[:, 0], code_words(other)[:, 0]
    found = _Pairs(f"max_distance={max_distance}", "lower it")
    for block in _blocks(len(query), len(other), cells):
        distance = np.bitwise_count(query_words[block, None] ^ other_words)
        rows, columns = np.nonzero(distance <= max_distance)
        found.add(rows + block.start, columns, distance[rows, columns].astype(np.int64))
    return found.tensors(np.int64)


def near_pairs_by_descriptor(
    query: Tensor, other: Tensor, min_similarity: float, *, cells: int = _CELLS
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns, int64 (P,), and cosines, float32 (P,), of the pairs of at least `min_similarity`.

    query, other: L2-normalised float32 (Q, D) and (G, D). Pairs come ordered by row, then column, and
    do not depend on `cells`, how many similarities are held at a time: matmul proposes, a sum in double
    precision decides.

    Raises ValueError for another shape or dtype, descriptors of another length than 1, a similarity
    outside (-1, 1], and over 10 million pairs.
    """
    _check_descriptors(query, "query")
    _check_descriptors(other, "other")
    if query.shape[1] != other.shape[1]:
        raise ValueError(
            f"query descriptors have {query.shape[1]} dimensions and other {other.shape[1]}: "
            "describe both with one model"
        )
    _check_similarity(min_similarity)
    found = _Pairs(f"min_similarity={min_similarity}", "raise it")
    for block in _blocks(len(query), len(other), cells):
        proposed = torch.nonzero(query[block] @ other.T >= min_similarity - _SLACK)
        found.check(len(proposed))
        rows, columns = proposed[:, 0] + block.start, proposed[:, 1]
        similarity = _similarity(query, other, rows, columns)
        near = similarity >= min_similarity
        found.add(rows[near].numpy(), columns[near].numpy(), similarity[near].numpy())
    return found.tensors(np.float32)
