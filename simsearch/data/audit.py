"""The leak audit: near-duplicates of the queries in the gallery and in the training set.

Descriptors and perceptual hashes propose pairs, pixels decide: the details of two thumbnails must correlate, whatever
the light, a small shift or mirroring. So the same pairs are near-duplicates whatever model proposes them; a better
model only misses fewer. How many of the pairs are right is estimated from labels (`estimated_precision`).

On CIFAR-10 (JPEG q75), test against training images, EfficientNet-Lite0 at 32 px: 345 of 10,000 test images in 567
pairs, none of different classes. Among them are 180 of the 249 pairs of one shot that ciFAIR lists (Barz and Denzler
2020, "Do we train on test data?").

Among 1,729 paintings (art-artist, EfficientNet-Lite0 at 224 px) it finds 59 pairs: all 53 other scans that are known,
and 6 more; of 40 that were judged by eye 37 show one work and 3 are views of one motif by one artist. Larger shifts,
crops and other scales are missed.
"""

from __future__ import annotations

import csv
import math
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
from simsearch.files import replacing, write_csv
from simsearch.functional.codes import code_words, pack_codes
from simsearch.functional.correlation import best_correlations, details
from simsearch.functional.ragged import Ragged
from simsearch.functional.reranking import nearest
from simsearch.functional.resize import resize
from simsearch.types import RetrievalTask

MIN_CORRELATION = 0.7
NEIGHBOURS = 5
MAX_DISTANCE = 10
SIDE, SHIFT = 32, 2  # of the thumbnails that are compared, in pixels, and by how many one may be shifted
CELLS = 2**22  # 16 MiB of cosines, 32 MiB of hash words
PARTS = ("gallery", "train", "both")
CRITERIA = ("hash", "descriptor", "both")
COLUMNS = ("query", "other", "part", "correlation", "similarity", "hash_distance", "by", "query_label", "other_label")

_MAX_PAIRS = 10_000_000
_LEAST_FAILED = 100
_PAIRS = 1024  # whose pixels are compared at a time
_SLACK = 0.01  # more than a matmul in reduced precision (TF32, bfloat16) is off
_SHEET_SIDE, _SHEET_GAP, _SHEET_CAPTION = 96, 4, 16


@dataclass(frozen=True)
class Duplicates:
    """N pairs of a query and a near-duplicate of it, most alike first.

    query, other: int64 (N,), collection rows. correlation: float32 (N,), of their details, which decided. similarity:
    float32 (N,), cosine of the descriptors, NaN without them. hash_distance: int64 (N,), differing bits of 64. part:
    where `other` stands, "gallery", "train" or "both". by: what proposed the pair, "hash", "descriptor" or "both".

    Raises ValueError where shapes or dtypes disagree, for an unknown part or criterion, and for a
    pair of a row with itself.
    """

    query: Tensor
    other: Tensor
    correlation: Tensor
    similarity: Tensor
    hash_distance: Tensor
    part: tuple[str, ...]
    by: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.query)
        for name, dtype in (
            ("query", torch.int64),
            ("other", torch.int64),
            ("correlation", torch.float32),
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
            self.correlation[chosen],
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
    labels: Tensor,
    *,
    min_correlation: float = MIN_CORRELATION,
    neighbours: int = NEIGHBOURS,
    max_distance: int = MAX_DISTANCE,
    progress: bool = False,
) -> tuple[Duplicates, float]:
    """Near-duplicates of the task's queries in its gallery and among the training rows, and their estimated precision.

    images: uint8 (N, 3, H, W) or Ragged, the whole collection. descriptors: L2-normalised float32 (N, D) of the
    same rows, or None to let hashes alone propose. train_rows: int64, collection rows. labels: int64 (N,), the task's
    attribute, for the precision (`estimated_precision`). Proposed are the `neighbours` nearest of each query, and what
    differs from it in at most `max_distance` bits of the hash; pairs of a correlation of at least `min_correlation` are
    near-duplicates. A row is never paired with itself. Pairs that the task's junk rule takes out of the ranking are
    listed like others. progress: show bars.

    Raises ValueError where images and descriptors differ in number, for rows outside the collection, settings out of
    range, and what near_pairs_by_hash raises.
    """
    _check_max_distance(max_distance)
    if not 0 < min_correlation <= 1:
        raise ValueError(f"min_correlation={min_correlation} is no correlation: use more than 0 and at most 1")
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} proposes nothing: use 1 or more")
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
    rows, columns, _ = near_pairs_by_hash(hashes[query], hashes[other], max_distance)
    found = [torch.stack([query[rows], other[columns]], 1)]
    if descriptors is not None:
        _check_descriptors("the collection's", descriptors)
        # One more than wanted: it may be the query itself.
        near = nearest(descriptors[query], descriptors[other], neighbours + 1).ids
        found.append(torch.stack([query.repeat_interleave(near.shape[1]), other[near.flatten()]], 1))
    pairs, which = torch.cat(found).unique(dim=0, return_inverse=True)
    by = torch.zeros(len(pairs), dtype=torch.int64)
    by[which[: len(found[0])]] += 1
    if descriptors is not None:
        by[which[len(found[0]) :]] += 2
    by = by[pairs[:, 0] != pairs[:, 1]]
    query, other = pairs[pairs[:, 0] != pairs[:, 1]].unbind(1)

    correlation = pixel_correlations(images, query, other, progress=progress)
    known = (labels[query] >= 0) & (labels[other] >= 0)
    precision = estimated_precision(correlation[known], (labels[query] != labels[other])[known], min_correlation)
    kept = correlation >= min_correlation
    query, other, correlation, by = query[kept], other[kept], correlation[kept], by[kept]
    similarity = torch.full((len(query),), torch.nan)
    if descriptors is not None:
        similarity = _similarity(descriptors, descriptors, query, other)
    part = torch.isin(other, task.gallery) + 2 * torch.isin(other, train_rows) - 1
    duplicates = Duplicates(
        query,
        other,
        correlation,
        similarity,
        _hash_distance(hashes, query, other),
        tuple(PARTS[i] for i in part.tolist()),
        tuple(CRITERIA[i - 1] for i in by.tolist()),
    )
    return duplicates.select(torch.from_numpy(np.lexsort((other, query, -correlation)))), precision


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
        small = torch.stack([resize(images[int(row)], SIDE, SIDE) for row in rows])  # type: ignore[arg-type]
    else:
        small = resize(images[rows], SIDE, SIDE)
    grey = (small.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    return details(grey).half()


def estimated_precision(correlation: Tensor, differing: Tensor, min_correlation: float) -> float:
    """The share of right pairs among those that passed, in [0, 1], estimated by labels; NaN where they cannot tell.

    Two pictures of one thing have one label. So the pairs that passed with different labels are false, and the false
    ones of equal label are as many again as among those that failed: of F false pairs d F show, with d the share of
    different labels among the pairs that failed most narrowly, as many as passed (100 at least). Duplicates that are
    labelled differently count as false, and those that failed lower d: both err to the low side. False pairs that can
    only have one label, such as views of one motif where the label is the artist, are not seen.

    correlation: (P,), of all pairs proposed. differing: bool (P,), whether their labels differ.
    """
    passed = correlation >= min_correlation
    count = int(passed.sum())
    failed = differing[~passed][correlation[~passed].argsort(descending=True, stable=True)]
    share = float(failed[: max(count, _LEAST_FAILED)].double().mean())
    if count == 0 or not share > 0:
        return math.nan
    return max(0.0, 1 - int(differing[passed].sum()) / share / count)


def write_duplicates(path: Path, duplicates: Duplicates, collection: Collection) -> None:
    """Writes the pairs, one a line, with the names of their labels; a value that is missing is left empty.

    Several attributes share a label's column, divided by `/`. The file is there whole or not at all.
    """
    query, other = duplicates.query.tolist(), duplicates.other.tolist()
    columns = (
        query,
        other,
        duplicates.part,
        map(str, duplicates.correlation.numpy()),  # the shortest text of this float32
        ("" if np.isnan(value) else str(value) for value in duplicates.similarity.numpy()),
        duplicates.hash_distance.tolist(),
        duplicates.by,
        (_label(collection, row) for row in query),
        (_label(collection, row) for row in other),
    )
    write_csv(path, COLUMNS, zip(*columns, strict=True))


def read_duplicates(path: Path) -> Duplicates:
    """The Duplicates that write_duplicates wrote; label names are not read.

    Raises ValueError, naming file and line, where a column is missing or a value cannot be read.
    """
    lines: list[tuple[int, int, float, float, int, str, str]] = []
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
                        float(line["correlation"]),
                        float(line["similarity"] or "nan"),
                        int(line["hash_distance"]),
                        line["part"],
                        line["by"],
                    )
                )
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} line {reader.line_num} cannot be read ({error}): "
                    "mend the line or run `simsearch data audit` again"
                ) from error
    query, other, correlation, similarity, distance, part, by = zip(*lines, strict=True) if lines else ((),) * 7
    try:
        return Duplicates(
            torch.tensor(query, dtype=torch.int64),
            torch.tensor(other, dtype=torch.int64),
            torch.tensor(correlation, dtype=torch.float32),
            torch.tensor(similarity, dtype=torch.float32),
            torch.tensor(distance, dtype=torch.int64),
            part,
            by,
        )
    except ValueError as error:
        raise ValueError(f"{path} holds no duplicates of ours: {error}") from error


def contact_sheet(images: Tensor | Ragged, pairs: Duplicates, path: Path, limit: int = 40) -> None:
    """Writes a PNG of pairs side by side, each with its rows and correlation, for a person to judge.

    images: uint8 (N, 3, H, W) or Ragged, the whole collection. Of more than `limit` pairs it shows `limit`, evenly
    spaced from the most alike to the least, so that it shows where true duplicates end. Without pairs it
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
        draw.text((x, y + height), f"{query} {other}  {float(pairs.correlation[place]):.2f}", fill="black")
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
