"""Near-duplicate images: perceptual hashes propose pairs, the correlation of pixels decides."""

from __future__ import annotations

from collections.abc import Iterator

import imagehash
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from simsearch.functional.codes import code_words, pack_codes
from simsearch.functional.correlation import best_correlations, details
from simsearch.functional.ragged import Ragged
from simsearch.functional.resize import resize

MIN_CORRELATION = 0.7
SIDE, SHIFT = 32, 2  # of the thumbnails that are compared, in pixels, and by how many one may be shifted
CELLS = 2**22  # distances that are held together, 32 MiB of hash words
BRUTE_FORCE = 50_000  # hashes that are compared each with each; more by bands

_MAX_PAIRS, _MAX_CANDIDATES = 10_000_000, 50_000_000
_PAIRS = 1024  # whose pixels are compared at a time


def perceptual_hashes(images: Tensor | Ragged, *, progress: bool = False) -> Tensor:
    """Perceptual hashes, packed uint8 (N, 8), of images uint8 (N, 3, H, W) or Ragged: imagehash.phash.

    A bit says whether one of the lowest 8 x 8 coefficients of the grey image's cosine transform exceeds
    their median; bits are packed as by simsearch.functional.codes.pack_codes. progress: show a bar on
    stderr (thousands of images a second).

    Raises ValueError for another shape or dtype.
    """
    check_images(images)
    shown = tqdm(images, desc="perceptual hashes", unit="image", disable=not progress)
    bits = [imagehash.phash(to_image(image)).hash.reshape(64) for image in shown]
    return pack_codes(torch.from_numpy(np.array(bits, dtype=bool).reshape(-1, 64)))


def hash_distances(hashes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Hamming distances int64 (P,) of chosen pairs of packed hashes uint8 (N, 8)."""
    words = code_words(hashes)[:, 0]
    return torch.from_numpy(np.bitwise_count(words[rows] ^ words[columns]).astype(np.int64))


def hash_pairs_between(
    query: Tensor, other: Tensor, max_distance: int, *, cells: int = CELLS
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and Hamming distances, int64 (P,) each, of the pairs of at most `max_distance` bits.

    Args:
        query: Packed hashes, uint8 (Q, 8).
        other: Packed hashes, uint8 (G, 8).
        max_distance: Differing bits, 0 to 64.
        cells: How many of the Q x G distances are held at a time.

    Returns:
        The pairs, ordered by row, then column.

    Raises:
        ValueError: For another shape or dtype, a distance outside 0..64, and more than 10 million pairs.
    """
    check_max_distance(max_distance)
    query_words, other_words = _words("query", query), _words("other", other)
    return _gathered(_near(query_words, other_words, max_distance, cells), _MAX_PAIRS)


def hash_pairs_within(hashes: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows i < j and Hamming distances, int64 (P,) each, of the pairs of at most `max_distance` bits, each once.

    Beyond BRUTE_FORCE hashes only those are compared that agree in one of max_distance + 1 bands of bits, as each such
    pair does (Manku et al. 2007, "Detecting near-duplicates for web crawling").

    Args:
        hashes: Packed, uint8 (N, 8).
        max_distance: Differing bits, 0 to 64.

    Raises:
        ValueError: For another shape, a distance outside 0..64, and too many pairs: 10 million, by bands 50 million.
    """
    if len(hashes) > BRUTE_FORCE:
        return banded_pairs(hashes, max_distance)
    rows, columns, distances = hash_pairs_between(hashes, hashes, max_distance)
    kept = rows < columns
    return rows[kept], columns[kept], distances[kept]


def banded_pairs(hashes: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `hash_pairs_within` gives, by bands. The bits are shuffled first: low coefficients agree more often."""
    check_max_distance(max_distance)
    words = _words("hashes", hashes)
    order = np.random.Generator(np.random.PCG64(0)).permutation(64)
    bits = np.unpackbits(hashes.numpy(), axis=1)[:, order]

    def near() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for band in np.array_split(np.arange(64), max_distance + 1):
            keys = bits[:, band] @ (1 << np.arange(len(band), dtype=np.uint64))
            sequence = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.r_[True, keys[sequence][1:] != keys[sequence][:-1]])
            for bucket in np.split(sequence, starts[1:]):
                if len(bucket) > 1:
                    bucket = np.sort(bucket)
                    for row, column, distance in _near(words[bucket], words[bucket], max_distance, CELLS):
                        kept = row < column
                        yield bucket[row[kept]], bucket[column[kept]], distance[kept]

    rows, columns, distances = _gathered(near(), _MAX_CANDIDATES)
    _, first = np.unique((rows * len(hashes) + columns).numpy(), return_index=True)  # several bands propose one pair
    return rows[first], columns[first], distances[first]


def _near(
    query: np.ndarray, other: np.ndarray, max_distance: int, cells: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, columns and distances of near words uint64 (Q,) and (G,), by blocks of `cells` pairs or one query."""
    step = max(1, cells // max(1, len(other)))
    for start in range(0, len(query), step):
        distance = np.bitwise_count(query[start : start + step, None] ^ other)
        row, column = np.nonzero(distance <= max_distance)
        yield row + start, column, distance[row, column]


def _gathered(parts: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """All parts as int64. Raises ValueError, before they are all held, where they are more than `most` pairs."""
    kept, total = [(np.empty(0, np.int64),) * 3], 0
    for part in parts:
        total += len(part[0])
        if total > most:
            raise ValueError(f"more than {most:,} pairs are that near: lower max_distance")
        kept.append(part)
    rows, columns, distances = (np.concatenate(column).astype(np.int64) for column in zip(*kept, strict=True))
    return torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(distances)


def turned_pairs(hashes: Tensor, turned: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows i < j and quarter turns 1, 2 or 3, int64 (P,) each: the i-th image so turned is near the j-th by its hash.

    hashes: packed uint8 (N, 8). turned: those of the images turned by 1, 2 and 3 quarters, uint8 (N, 3, 8).
    """
    count = len(hashes)
    rows, columns, _ = hash_pairs_within(torch.cat([hashes, *turned.unbind(1)]), max_distance)
    turns, other = columns // count, columns % count
    kept = (rows < count) & (turns > 0) & (rows != other)
    rows, other, turns = rows[kept], other[kept], turns[kept]
    # The other image was turned. One is near the other turned when that is near it turned back.
    swapped = rows < other
    turns = torch.where(swapped, (4 - turns) % 4, turns)
    found = torch.stack([torch.minimum(rows, other), torch.maximum(rows, other), turns], 1).unique(dim=0)
    return found[:, 0], found[:, 1], found[:, 2]


def pixel_correlations(
    images: Tensor | Ragged, rows: Tensor, columns: Tensor, turns: Tensor | None = None, *, progress: bool = False
) -> Tensor:
    """How much the details of pairs of images correlate at best over small shifts and mirroring, float32 (P,).

    images: uint8 (N, 3, H, W) or Ragged. rows, columns: int64 (P,). Both are drawn to squares of 32 x 32 first. turns:
    int64 (P,), by how many quarters, against the clock, the first of a pair is turned before.
    """
    if len(rows) == 0:
        return torch.empty(0)
    used, place = torch.cat([rows, columns]).unique(return_inverse=True)
    thumbnails = torch.cat([_thumbnails(images, block) for block in used.split(_PAIRS)])
    turns = torch.zeros_like(rows) if turns is None else turns
    parts = [part.split(_PAIRS) for part in (place[: len(rows)], place[len(rows) :], turns)]
    shown = tqdm(zip(*parts, strict=True), total=len(parts[0]), desc="compare pixels", disable=not progress)
    return torch.cat(
        [best_correlations(_turned(thumbnails[i], by).float(), thumbnails[j].float(), SHIFT) for i, j, by in shown]
    )


def _turned(squares: Tensor, quarters: Tensor) -> Tensor:
    """Squares (n, S, S), each turned by so many quarters."""
    found = squares.clone()
    for by in range(1, 4):
        found[quarters == by] = squares[quarters == by].rot90(by, (1, 2))
    return found


def _thumbnails(images: Tensor | Ragged, rows: Tensor) -> Tensor:
    """Details float16 (n, 32, 32) of some images."""
    if isinstance(images, Ragged):
        small = torch.stack([resize(images[int(row)], SIDE, SIDE) for row in rows])
    else:
        small = resize(images[rows], SIDE, SIDE)
    grey = (small.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    return details(grey).half()


def to_image(image: Tensor) -> Image.Image:
    """The picture of a uint8 (3, H, W) tensor."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def check_images(images: Tensor | Ragged) -> None:
    if isinstance(images, Ragged):
        return
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")


def _words(name: str, hashes: Tensor) -> np.ndarray:
    """Packed hashes as words uint64 (N,). Raises ValueError for another shape or dtype."""
    if hashes.dtype != torch.uint8 or hashes.ndim != 2 or hashes.shape[1] != 8:
        raise ValueError(
            f"{name} must be packed hashes uint8 (N, 8), got {hashes.dtype} {tuple(hashes.shape)}: "
            "make them with perceptual_hashes"
        )
    return code_words(hashes)[:, 0]


def check_max_distance(max_distance: int) -> None:
    if not 0 <= max_distance <= 64:
        raise ValueError(f"max_distance={max_distance}: a hash has 64 bits, of which 0 to 64 may differ")
