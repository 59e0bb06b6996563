"""Near-duplicate images: perceptual hashes propose pairs, and the correlation of pixels decides."""

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
SIDE, SHIFT = 32, 2  # side of the compared thumbnails, and largest shift between them, in pixels
CELLS = 2**22  # distances in memory at a time, 32 MiB of hash words
BRUTE_FORCE = 8  # all pairs of hashes are compared for up to so many hashes per change of a band; else bands are used

_MAX_PAIRS, _MAX_CANDIDATES = 10_000_000, 50_000_000
_PAIRS = 1024  # pairs whose pixels are compared at a time


def perceptual_hashes(images: Tensor | Ragged, *, progress: bool = False) -> Tensor:
    """Perceptual hashes of images (imagehash.phash), packed uint8 (N, 8).

    Each bit says whether one of the lowest 8 x 8 coefficients of the grey image's cosine transform exceeds their
    median. Bits are packed as by simsearch.functional.codes.pack_codes.

    Args:
        images: uint8 (N, 3, H, W), or Ragged.
        progress: Whether to show a progress bar on stderr. The rate is thousands of images per second.

    Raises:
        ValueError: If the images have another shape or dtype.
    """
    check_images(images)
    shown = tqdm(images, desc="perceptual hashes", unit="image", disable=not progress)
    bits = [imagehash.phash(to_image(image)).hash.reshape(64) for image in shown]
    return pack_codes(torch.from_numpy(np.array(bits, dtype=bool).reshape(-1, 64)))


def hash_distances(hashes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Hamming distances of chosen pairs, int64 (P,).

    Args:
        hashes: Packed hashes, uint8 (N, 8).
        rows: int64 (P,).
        columns: int64 (P,).
    """
    words = code_words(hashes)[:, 0]
    return torch.from_numpy(np.bitwise_count(words[rows] ^ words[columns]).astype(np.int64))


def hash_pairs_between(
    query: Tensor, other: Tensor, max_distance: int, *, cells: int = CELLS
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and Hamming distances, int64 (P,) each, of the pairs that differ in at most `max_distance` bits.

    Args:
        query: Packed hashes, uint8 (Q, 8).
        other: Packed hashes, uint8 (G, 8).
        max_distance: Differing bits, 0 to 64.
        cells: Number of the Q x G distances held at a time.

    Returns:
        The pairs, ordered by row, then column.

    Raises:
        ValueError: If shape or dtype differ, the distance lies outside 0..64, or there are more than 10 million pairs.
    """
    check_max_distance(max_distance)
    query_words, other_words = _words("query", query), _words("other", other)
    if len(other_words) > BRUTE_FORCE * sum(map(len, _changes(max_distance))):
        return _each_once(_banded(query_words, other_words, max_distance, cells), len(other_words), _MAX_PAIRS)
    return _gathered(_near(query_words, other_words, max_distance, cells), _MAX_PAIRS)


def hash_pairs_within(hashes: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows i < j and Hamming distances, int64 (P,) each, of the pairs that differ in at most `max_distance` bits.

    Args:
        hashes: Packed hashes, uint8 (N, 8).
        max_distance: Differing bits, 0 to 64.

    Raises:
        ValueError: If the shape differs, the distance lies outside 0..64, or there are too many pairs: 10 million, with
            bands 50 million.
    """
    check_max_distance(max_distance)
    if len(hashes) > BRUTE_FORCE * sum(map(len, _changes(max_distance))):
        return banded_pairs(hashes, max_distance)
    rows, columns, distances = hash_pairs_between(hashes, hashes, max_distance)
    kept = rows < columns
    return rows[kept], columns[kept], distances[kept]


def banded_pairs(hashes: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `hash_pairs_within`, computed with bands.

    Args:
        hashes: Packed hashes, uint8 (N, 8).
        max_distance: Differing bits, 0 to 64.

    Raises:
        ValueError: If the shape differs, the distance lies outside 0..64, or there are more than 50 million pairs.
    """
    check_max_distance(max_distance)
    words = _words("hashes", hashes)
    near = _banded(words, words, max_distance, CELLS)
    upper = ((row[kept], column[kept], distance[kept]) for row, column, distance in near for kept in [row < column])
    return _each_once(upper, len(words), _MAX_CANDIDATES)


def _banded(
    query: np.ndarray, other: np.ndarray, max_distance: int, cells: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, columns and distances of near words, as `_near` returns them, up to four times each and in no order.

    Words are cut into four bands of 16 bits. Of two near words, one of the bands differs by one of its `_changes`. So
    only words are compared that have such a band, which is looked up in a table of the other words. Bits are shuffled
    first, because low coefficients agree more often.

    Source:
        Norouzi, Punjani, Fleet: Fast Search in Hamming Space with Multi-Index Hashing. CVPR 2012.
    """
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(64)
    each = (np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1)[:, shuffled] for words in (query, other))
    asked, held = (np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint16) for bits in each)
    for band, changes in enumerate(_changes(max_distance)):
        order = np.argsort(held[:, band], kind="stable")
        bounds = np.searchsorted(held[order, band], np.arange(2**16 + 1))
        for change in changes:
            bucket = (asked[:, band] ^ change).astype(np.int64)
            counts = bounds[bucket + 1] - bounds[bucket]
            stops = counts.cumsum()
            starts = stops - counts
            cuts = np.searchsorted(stops, np.arange(cells, stops[-1:].sum(), cells))
            for rows in np.split(np.arange(len(query)), np.unique(cuts)):
                row = rows.repeat(counts[rows])
                inside = np.arange(len(row)) - (starts[row] - starts[rows[:1]].sum())
                column = order[bounds[bucket[row]] + inside]
                distance = np.bitwise_count(query[row] ^ other[column])
                kept = distance <= max_distance
                yield row[kept], column[kept], distance[kept]


def _changes(max_distance: int) -> list[np.ndarray]:
    """For each of four bands the patterns of bits, uint16 (n,), of which two near words differ by one in some band.

    If the numbers of bits that differ reach k[0], ..., k[3] in the four bands, then their sum reaches that of k, which
    is max_distance + 1. So some band differs in fewer bits.
    """
    bits = np.bitwise_count(np.arange(2**16, dtype=np.uint16))
    return [np.flatnonzero(bits < (max_distance + 4 - band) // 4).astype(np.uint16) for band in range(4)]


def _each_once(
    parts: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]], width: int, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of the parts as int64, ordered by row, then column, each once. Raises ValueError above `most` pairs."""
    rows, columns, distances = _gathered(parts, max(most, _MAX_CANDIDATES))
    _, first = np.unique((rows * width + columns).numpy(), return_index=True)
    if len(first) > most:
        raise ValueError(f"more than {most:,} pairs are within this distance: lower max_distance")
    return rows[first], columns[first], distances[first]


def _near(
    query: np.ndarray, other: np.ndarray, max_distance: int, cells: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, columns and distances of near words uint64 (Q,) and (G,), in blocks of `cells` pairs or one query."""
    step = max(1, cells // max(1, len(other)))
    for start in range(0, len(query), step):
        distance = np.bitwise_count(query[start : start + step, None] ^ other)
        row, column = np.nonzero(distance <= max_distance)
        yield row + start, column, distance[row, column]


def _gathered(parts: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """All parts as int64. Raises ValueError if they have more than `most` pairs, before all of them are in memory."""
    kept, total = [(np.empty(0, np.int64),) * 3], 0
    for part in parts:
        total += len(part[0])
        if total > most:
            raise ValueError(f"more than {most:,} pairs are within this distance: lower max_distance")
        kept.append(part)
    rows, columns, distances = (np.concatenate(column).astype(np.int64) for column in zip(*kept, strict=True))
    return torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(distances)


def turned_pairs(hashes: Tensor, turned: Tensor, max_distance: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows i < j and quarter turns 1, 2 or 3, int64 (P,) each: image i, turned, is near image j by its hash.

    Args:
        hashes: Packed hashes, uint8 (N, 8).
        turned: Packed hashes of the images turned by 1, 2 and 3 quarters, uint8 (N, 3, 8).
        max_distance: Differing bits, 0 to 64.
    """
    rows, columns, _ = hash_pairs_between(hashes, turned.flatten(0, 1), max_distance)
    other, turns = columns // 3, columns % 3 + 1
    kept = rows != other
    rows, other, turns = rows[kept], other[kept], turns[kept]
    # The other image was turned. If a is near b turned, then b is near a turned back.
    swapped = rows < other
    turns = torch.where(swapped, (4 - turns) % 4, turns)
    found = torch.stack([torch.minimum(rows, other), torch.maximum(rows, other), turns], 1).unique(dim=0)
    return found[:, 0], found[:, 1], found[:, 2]


def pixel_correlations(
    images: Tensor | Ragged, rows: Tensor, columns: Tensor, turns: Tensor | None = None, *, progress: bool = False
) -> Tensor:
    """The best correlation of the details of pairs of images over small shifts and mirroring, float32 (P,).

    Both images are resized to 32 x 32 pixels first.

    Args:
        images: uint8 (N, 3, H, W), or Ragged.
        rows: int64 (P,).
        columns: int64 (P,).
        turns: int64 (P,), quarters by which the first image of each pair is turned counter-clockwise. None for 0.
        progress: Whether to show a progress bar.
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
    """Squares (n, S, S), each turned by its number of quarters."""
    found = squares.clone()
    for by in range(1, 4):
        found[quarters == by] = squares[quarters == by].rot90(by, (1, 2))
    return found


def _thumbnails(images: Tensor | Ragged, rows: Tensor) -> Tensor:
    """Details of chosen images, float16 (n, 32, 32)."""
    if isinstance(images, Ragged):
        small = torch.stack([resize(images[int(row)], SIDE, SIDE) for row in rows])
    else:
        small = resize(images[rows], SIDE, SIDE)
    grey = (small.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    return details(grey).half()


def to_image(image: Tensor) -> Image.Image:
    """An image as a Pillow image.

    Args:
        image: uint8 (3, H, W).
    """
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def check_images(images: Tensor | Ragged) -> None:
    """Checks that images are uint8 (N, 3, H, W) or Ragged.

    Args:
        images: The images.

    Raises:
        ValueError: If they are not.
    """
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
    """Checks a largest Hamming distance of hashes.

    Args:
        max_distance: Differing bits.

    Raises:
        ValueError: If it lies outside 0..64.
    """
    if not 0 <= max_distance <= 64:
        raise ValueError(f"max_distance={max_distance}: a hash has 64 bits, of which 0 to 64 may differ")
