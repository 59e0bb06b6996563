"""The leak audit: near-duplicates of the queries in the gallery and in the training set.

Two criteria, either of which suffices: cosine of descriptors (sees crops, shifts and mirror images; errs
on objects before plain backgrounds) and Hamming distance of 64-bit perceptual hashes (sees re-encoding,
brightness and colour; of shifts by one of 32 pixels 2 in 5, of mirror images none).

What the defaults find on CIFAR-10 (JPEG q75), test against training images, EfficientNet-Lite0 at 128 px
with GeM and PCA to 128 dimensions, where samples of 40 pairs were judged by eye:

- both together: 216 of 10,000 test images in 345 pairs, 35 of 40 the same photograph. Among them are 126
  of the 286 that ciFAIR lists (Barz and Denzler 2020, "Do we train on test data?"): the audit finds the
  plain cases and is a lower bound.
- hash: to 4 bits 103 test images, 40 of 40 right; to 6 bits 181, at just 6 bits 34 of 40; to 8 bits
  366, at just 8 bits about 16 of 40. A hash has 32 ones as a rule, so that distances are even.
- descriptor: from 0.92 on 63 test images, 33 of 40 right; between 0.90 and 0.92 about 20 of 40. Another
  model has another scale: average-pooled without PCA, 0.88 (128 px) or 0.90 (224 px) is as precise.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imagehash
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from simsearch.data.collection import Collection
from simsearch.files import replacing
from simsearch.functional.codes import code_words, pack_codes
from simsearch.functional.ragged import Ragged
from simsearch.types import RetrievalTask

MIN_SIMILARITY = 0.92
MAX_DISTANCE = 6
CELLS = 2**22  # 16 MiB of cosines, 32 MiB of hash words
PARTS = ("gallery", "train", "both")
CRITERIA = ("hash", "descriptor", "both")
COLUMNS = ("query", "other", "part", "similarity", "hash_distance", "by", "query_label", "other_label")

_MAX_PAIRS = 10_000_000
_SLACK = 0.01  # more than a matmul in reduced precision (TF32, bfloat16) is off
_SHEET_SIDE, _SHEET_GAP, _SHEET_CAPTION = 96, 4, 16


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
        stands = torch.tensor([p in (part, "both") for p in self.part], dtype=torch.bool)
        return torch.unique(self.query[stands])


def perceptual_hashes(images: Tensor | Ragged, *, progress: bool = False) -> Tensor:
    """Perceptual hashes, packed uint8 (N, 8), of images uint8 (N, 3, H, W) or Ragged: imagehash.phash.

    A bit says whether one of the lowest 8 x 8 coefficients of the grey image's cosine transform exceeds
    their median; bits are packed as by simsearch.functional.codes.pack_codes. progress: show a bar on
    stderr (thousands of images a second).

    Raises ValueError for another shape or dtype.
    """
    _check_images(images)
    shown = tqdm(images, desc="perceptual hashes", unit="image", disable=not progress)
    bits = [imagehash.phash(_to_image(image)).hash.reshape(64) for image in shown]
    return pack_codes(torch.from_numpy(np.array(bits, dtype=bool).reshape(-1, 64)))


def near_pairs_by_hash(
    query: Tensor, other: Tensor, max_distance: int, *, cells: int = CELLS
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and Hamming distances, int64 (P,) each, of the pairs of at most `max_distance` bits.

    query, other: packed hashes uint8 (Q, 8) and (G, 8). Pairs come ordered by row, then column. cells:
    how many of the Q x G distances are held at a time.

    Raises ValueError for another shape or dtype, a distance outside 0..64, and over 10 million pairs.
    """
    _check_hashes("query", query)
    _check_hashes("other", other)
    _check_max_distance(max_distance)
    query_words, other_words = code_words(query)[:, 0], code_words(other)[:, 0]

    def near(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        distance = np.bitwise_count(query_words[rows, None] ^ other_words)
        row, column = np.nonzero(distance <= max_distance)
        found = distance[row, column].astype(np.int64)
        return torch.from_numpy(row + rows.start), torch.from_numpy(column), torch.from_numpy(found)

    return _gather(map(near, _blocks(len(query), len(other), cells)), torch.int64)


def near_pairs_by_descriptor(
    query: Tensor, other: Tensor, min_similarity: float, *, cells: int = CELLS
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns, int64 (P,), and cosines, float32 (P,), of the pairs of at least `min_similarity`.

    query, other: L2-normalised float32 (Q, D) and (G, D). Pairs come ordered by row, then column. cells:
    how many of the Q x G cosines are held at a time. A matmul proposes pairs and a sum in double
    precision decides, so that neither the blocks nor the machine change the result.

    Raises ValueError for another shape or dtype, descriptors that are not of length 1, a similarity
    outside (-1, 1], and over 10 million pairs.
    """
    _check_descriptors("query", query)
    _check_descriptors("other", other)
    if query.shape[1] != other.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} dimensions and other {other.shape[1]}: describe both with one model"
        )
    _check_min_similarity(min_similarity)

    def near(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        row, column = torch.nonzero(query[rows] @ other.T >= min_similarity - _SLACK, as_tuple=True)
        row = row + rows.start
        similarity = _similarity(query, other, row, column)
        kept = similarity >= min_similarity
        return row[kept], column[kept], similarity[kept]

    return _gather(map(near, _blocks(len(query), len(other), cells)), torch.float32)


def audit(
    images: Tensor | Ragged,
    descriptors: Tensor | None,
    task: RetrievalTask,
    train_rows: Tensor,
    *,
    min_similarity: float = MIN_SIMILARITY,
    max_distance: int = MAX_DISTANCE,
    progress: bool = False,
) -> Duplicates:
    """Duplicates: near-duplicates of the task's queries in its gallery and among the training rows.

    images: uint8 (N, 3, H, W) or Ragged, the whole collection. descriptors: L2-normalised float32 (N, D) of the
    same rows, or None to compare hashes only. train_rows: int64, collection rows. A pair counts by
    either criterion; a row is never paired with itself. Pairs that the task's junk rule takes out of
    the ranking are listed like others. progress: show a bar while hashing.

    Raises ValueError where images and descriptors differ in number, for rows outside the collection,
    and what near_pairs_by_hash and near_pairs_by_descriptor raise.
    """
    _check_max_distance(max_distance)
    _check_min_similarity(min_similarity)
    if descriptors is not None and len(descriptors) != len(images):
        raise ValueError(f"{len(images)} images but {len(descriptors)} descriptors: describe each image once")
    query, other = task.query, torch.unique(torch.cat([task.gallery, train_rows]))
    for row in (query.min(), query.max(), other.min(), other.max()):
        if not 0 <= row < len(images):
            raise ValueError(
                f"row {int(row)} lies outside the collection of {len(images)} images: "
                "give the task and training rows of this collection"
            )
    hashes = perceptual_hashes(images, progress=progress)
    found = [near_pairs_by_hash(hashes[query], hashes[other], max_distance)]
    if descriptors is not None:
        found.append(near_pairs_by_descriptor(descriptors[query], descriptors[other], min_similarity))
    rows, columns = (torch.cat(part) for part in list(zip(*found, strict=True))[:2])
    pairs = torch.unique(torch.stack([query[rows], other[columns]], 1), dim=0)
    query, other = pairs[pairs[:, 0] != pairs[:, 1]].unbind(1)

    distance = _hash_distance(hashes, query, other)
    similarity = torch.full((len(query),), torch.nan)
    if descriptors is not None:
        similarity = _similarity(descriptors, descriptors, query, other)
    part = torch.isin(other, task.gallery) + 2 * torch.isin(other, train_rows) - 1
    by = (distance <= max_distance) + 2 * (similarity >= min_similarity) - 1
    worst_first = torch.from_numpy(np.lexsort((other, query, distance, -similarity)))
    return Duplicates(
        query,
        other,
        similarity,
        distance,
        tuple(PARTS[i] for i in part.tolist()),
        tuple(CRITERIA[i] for i in by.tolist()),
    ).select(worst_first)


def write_csv(path: Path, duplicates: Duplicates, collection: Collection) -> None:
    """Writes the pairs, one a line, with the names of their labels; a value that is missing is left empty.

    Several attributes share a label's column, divided by `/`. The file is there whole or not at all.
    """
    with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for query, other, part, similarity, distance, by in zip(
            duplicates.query.tolist(),
            duplicates.other.tolist(),
            duplicates.part,
            duplicates.similarity.numpy(),
            duplicates.hash_distance.tolist(),
            duplicates.by,
            strict=True,
        ):
            writer.writerow(
                (
                    query,
                    other,
                    part,
                    "" if np.isnan(similarity) else str(similarity),  # the shortest text of this float32
                    "" if distance < 0 else distance,
                    by,
                    _label(collection, query),
                    _label(collection, other),
                )
            )


def read_csv(path: Path) -> Duplicates:
    """The Duplicates that write_csv wrote; label names are not read.

    Raises ValueError, naming file and line, where a column is missing or a value cannot be read.
    """
    lines: list[tuple[int, int, float, int, str, str]] = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}: write it with `simsearch data audit`")
        for line in reader:
            try:
                lines.append(
                    (
                        int(line["query"]),
                        int(line["other"]),
                        float(line["similarity"] or "nan"),
                        int(line["hash_distance"] or -1),
                        line["part"],
                        line["by"],
                    )
                )
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} line {reader.line_num} cannot be read ({error}): "
                    "mend the line or run `simsearch data audit` again"
                ) from error
    query, other, similarity, distance, part, by = zip(*lines, strict=True) if lines else ((),) * 6
    try:
        return Duplicates(
            torch.tensor(query, dtype=torch.int64),
            torch.tensor(other, dtype=torch.int64),
            torch.tensor(similarity, dtype=torch.float32),
            torch.tensor(distance, dtype=torch.int64),
            part,
            by,
        )
    except ValueError as error:
        raise ValueError(f"{path} holds no duplicates of ours: {error}") from error


def contact_sheet(images: Tensor | Ragged, pairs: Duplicates, path: Path, limit: int = 40) -> None:
    """Writes a PNG of pairs side by side, each with its rows, similarity and distance, for a person to judge.

    images: uint8 (N, 3, H, W) or Ragged, the whole collection. Of more than `limit` pairs it shows `limit`, evenly
    spaced from the worst to the least, so that it shows where true duplicates end. Without pairs it
    says so.
    """
    _check_images(images)
    if limit < 1:
        raise ValueError(f"limit={limit} shows nothing: use 1 or more")
    if len(pairs) > limit:
        pairs = pairs.select(torch.linspace(0, len(pairs) - 1, limit).round().long())
    sides = images.shapes.amax(0).tolist() if isinstance(images, Ragged) else images.shape[2:]
    scale = _SHEET_SIDE / max(sides)
    height, width = (round(side * scale) for side in sides)
    cell = (2 * width + 3 * _SHEET_GAP, height + 2 * _SHEET_GAP + _SHEET_CAPTION)
    columns = min(5, max(1, len(pairs)))
    sheet = Image.new("RGB", (columns * cell[0], max(1, -(-len(pairs) // columns)) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    if not len(pairs):
        draw.text((_SHEET_GAP, _SHEET_GAP), "no near-duplicates", fill="black")
    for place, (query, other) in enumerate(zip(pairs.query.tolist(), pairs.other.tolist(), strict=True)):
        x, y = place % columns * cell[0] + _SHEET_GAP, place // columns * cell[1] + _SHEET_GAP
        for step, row in enumerate((query, other)):
            picture = _to_image(images[row])  # type: ignore[arg-type]
            size = tuple(max(1, round(side * scale)) for side in picture.size)
            shown = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
            sheet.paste(shown, (x + step * (width + _SHEET_GAP), y))
        similarity, distance = float(pairs.similarity[place]), int(pairs.hash_distance[place])
        parts = (
            f"{query} {other}",
            "" if np.isnan(similarity) else f"{similarity:.3f}",
            "" if distance < 0 else f"{distance} bits",
        )
        draw.text((x, y + height), "  ".join(filter(None, parts)), fill="black")
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")


def _to_image(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _label(collection: Collection, row: int) -> str:
    values = zip(collection.labels[row].tolist(), collection.classes, strict=True)
    return "/".join("?" if value < 0 else names[value] for value, names in values)


def _hash_distance(hashes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    differing = code_words(hashes[rows]) ^ code_words(hashes[columns])
    return torch.from_numpy(np.bitwise_count(differing)[:, 0].astype(np.int64))


def _similarity(query: Tensor, other: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines float32 (P,) of chosen pairs, summed in double precision."""
    step = max(1, CELLS // query.shape[1])
    parts = [
        (query[r].double() * other[c].double()).sum(1).float()
        for r, c in zip(rows.split(step), columns.split(step), strict=True)
    ]
    return torch.cat(parts)


def _blocks(queries: int, others: int, cells: int) -> Iterator[slice]:
    """Slices of the queries that make at most `cells` pairs each, or one query at a time."""
    step = max(1, cells // max(1, others))
    return (slice(start, start + step) for start in range(0, queries, step))


def _gather(parts: Iterable[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.empty(0, dtype=torch.int64)
    kept, total = [(empty, empty, empty.to(dtype))], 0
    for part in parts:
        kept.append(part)
        total += len(part[0])
        if total > _MAX_PAIRS:
            raise ValueError(
                f"more than {_MAX_PAIRS:,} pairs are that near: raise min_similarity or lower max_distance"
            )
    rows, columns, values = (torch.cat(column) for column in zip(*kept, strict=True))
    return rows, columns, values


def _check_images(images: Tensor | Ragged) -> None:
    if isinstance(images, Ragged):
        return
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")


def _check_hashes(name: str, hashes: Tensor) -> None:
    if hashes.dtype != torch.uint8 or hashes.ndim != 2 or hashes.shape[1] != 8:
        raise ValueError(
            f"{name} must be packed hashes uint8 (N, 8), got {hashes.dtype} {tuple(hashes.shape)}: "
            "make them with perceptual_hashes"
        )


def _check_descriptors(name: str, descriptors: Tensor) -> None:
    if descriptors.dtype != torch.float32 or descriptors.ndim != 2:
        raise ValueError(
            f"{name} must be descriptors float32 (N, D), got {descriptors.dtype} {tuple(descriptors.shape)}"
        )
    wrong = torch.nonzero(~((descriptors.norm(dim=1) - 1).abs() < 1e-3))[:, 0]
    if len(wrong):
        raise ValueError(
            f"{name} descriptor {int(wrong[0])} has length {float(descriptors[wrong[0]].norm()):.4g}, "
            "expected 1: L2-normalise descriptors first"
        )


def _check_min_similarity(min_similarity: float) -> None:
    if not -1 < min_similarity <= 1:
        raise ValueError(f"min_similarity={min_similarity} is no cosine: use more than -1 and at most 1")


def _check_max_distance(max_distance: int) -> None:
    if not 0 <= max_distance <= 64:
        raise ValueError(f"max_distance={max_distance} is no number of bits of a hash: use 0 to 64")
