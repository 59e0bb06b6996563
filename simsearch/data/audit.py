"""The leak audit: near-duplicates of the queries in the gallery and in the training set.

Descriptors and perceptual hashes propose pairs, and pixels decide: the details of two thumbnails must correlate, up to
light, a small shift or mirroring. The decision does not depend on the model that proposes. A better model only misses
fewer pairs. The fraction of correct pairs is estimated from labels (`estimated_precision`).

On CIFAR-10 (JPEG q75), test against training images, with EfficientNet-Lite0 at 32 pixels: 345 of 10,000 test images in
567 pairs, none of different classes. Among them are 180 of the 249 pairs of one shot that ciFAIR lists (Barz and
Denzler 2020, "Do we train on test data?").

Among 1,729 paintings (art-artist, EfficientNet-Lite0 at 224 pixels) it finds 59 pairs: all 53 known second scans, and 6
more. Of 40 pairs judged by eye, 37 show one work and 3 are views of one motif by one artist. The audit misses larger
shifts, crops and other scales.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from simsearch.data.collection import Collection
from simsearch.data.near_duplicates import (
    CELLS,
    MIN_CORRELATION,
    check_images,
    check_max_distance,
    hash_distances,
    hash_pairs_between,
    perceptual_hashes,
    pixel_correlations,
    to_image,
)
from simsearch.files import replacing, write_csv
from simsearch.functional.ragged import Ragged
from simsearch.functional.reranking import nearest
from simsearch.types import RetrievalTask

NEIGHBOURS = 5
MAX_DISTANCE = 10
PARTS = ("gallery", "train", "both")
CRITERIA = ("hash", "descriptor", "both")
COLUMNS = ("query", "other", "part", "correlation", "similarity", "hash_distance", "by", "query_label", "other_label")

_LEAST_FAILED = 100
_SHEET_SIDE, _SHEET_GAP, _SHEET_CAPTION = 96, 4, 16


@dataclass(frozen=True)
class Duplicates:
    """N pairs of a query and one of its near-duplicates, most similar first.

    Attributes:
        query: int64 (N,), collection rows.
        other: int64 (N,), collection rows.
        correlation: float32 (N,), correlation of their details, which decided.
        similarity: float32 (N,), cosine of the descriptors, NaN without descriptors.
        hash_distance: int64 (N,), number of differing bits of 64.
        part: The part of the data that holds `other`: "gallery", "train" or "both".
        by: The source of the proposal: "hash", "descriptor" or "both".

    Raises:
        ValueError: If shapes or dtypes disagree, a part or source is unknown, or a row is paired with itself.
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
            raise ValueError(f"row {row} is paired with itself: remove such pairs")

    def __len__(self) -> int:
        return len(self.query)

    def select(self, keep: Tensor) -> Duplicates:
        """The chosen pairs, in the order of `keep`.

        Args:
            keep: A bool mask (N,), or int64 positions.
        """
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
        """Collection rows of the queries with a near-duplicate in a part: int64, sorted, unique.

        Args:
            part: "gallery" or "train".

        Raises:
            ValueError: If the part is unknown.
        """
        if part not in ("gallery", "train"):
            raise ValueError(f"part={part!r} is unknown: use 'gallery' or 'train'")
        stands = torch.tensor([p in (part, "both") for p in self.part], dtype=torch.bool)
        return torch.unique(self.query[stands])


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
    """Near-duplicates of a task's queries in its gallery and the training rows, and the estimated precision.

    Proposals are the `neighbours` nearest items of each query, and all items whose hash differs in at most
    `max_distance` bits. Pairs with a correlation of at least `min_correlation` are near-duplicates. A row is never
    paired with itself. Pairs that the task's junk rule excludes from the ranking are listed like others.

    Args:
        images: uint8 (N, 3, H, W) or Ragged, the whole collection.
        descriptors: L2-normalised float32 (N, D) of the same rows. None proposes by hashes alone.
        task: The task with queries and gallery.
        train_rows: int64, collection rows.
        labels: int64 (N,), the task's attribute, for the precision (`estimated_precision`).
        min_correlation: Least correlation of near-duplicates, in (0, 1].
        neighbours: Number of nearest items proposed for each query, from 1.
        max_distance: Differing bits of the hash, 0 to 64.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If images and descriptors differ in number, rows lie outside the collection, a setting is out of
            range, or hashes propose too many pairs (hash_pairs_between).
    """
    check_max_distance(max_distance)
    if not 0 < min_correlation <= 1:
        raise ValueError(f"min_correlation={min_correlation} is not a correlation: use a number above 0 and at most 1")
    if neighbours < 1:
        raise ValueError(f"neighbours={neighbours} would propose no pairs: use 1 or more")
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
    rows, columns, _ = hash_pairs_between(hashes[query], hashes[other], max_distance)
    found = [torch.stack([query[rows], other[columns]], 1)]
    if descriptors is not None:
        _check_descriptors("the collection's", descriptors)
        # One more than wanted, since one may be the query itself.
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
        hash_distances(hashes, query, other),
        tuple(PARTS[i] for i in part.tolist()),
        tuple(CRITERIA[i - 1] for i in by.tolist()),
    )
    return duplicates.select(torch.from_numpy(np.lexsort((other, query, -correlation)))), precision


def estimated_precision(correlation: Tensor, differing: Tensor, min_correlation: float) -> float:
    """The fraction of correct pairs among those that passed, in [0, 1], estimated from labels. NaN if they cannot tell.

    Two pictures of one thing have one label, so pairs that passed with different labels are false. But false pairs may
    also have equal labels. Let d be the fraction of different labels among the pairs that failed most narrowly: as many
    pairs as passed, at least 100. Of F false pairs, d F then have different labels, which gives F.

    Two errors make the estimate too low: duplicates with different labels count as false, and duplicates among the
    failed pairs lower d. False pairs that always share a label are not seen, such as views of one motif if the label is
    the artist.

    Args:
        correlation: (P,), of all proposed pairs.
        differing: bool (P,), whether their labels differ.
        min_correlation: Least correlation of the pairs that passed.
    """
    passed = correlation >= min_correlation
    count = int(passed.sum())
    failed = differing[~passed][correlation[~passed].argsort(descending=True, stable=True)]
    share = float(failed[: max(count, _LEAST_FAILED)].double().mean())
    if count == 0 or not share > 0:
        return math.nan
    return max(0.0, 1 - int(differing[passed].sum()) / share / count)


def write_duplicates(path: Path, duplicates: Duplicates, collection: Collection) -> None:
    """Writes the pairs as CSV, one a line, with the names of their labels. Missing values are left empty.

    Labels of several attributes share a column, separated by `/`. The file is written atomically.

    Args:
        path: The file.
        duplicates: The pairs.
        collection: The collection, for the names.
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
    """The Duplicates in a file of write_duplicates. Label names are not read.

    Args:
        path: The file.

    Raises:
        ValueError: If a column is missing or a value cannot be read. The message names file and line.
    """
    lines: list[tuple[int, int, float, float, int, str, str]] = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(
                f"{path} does not have the columns {', '.join(missing)}: write it with `simsearch data audit`"
            )
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
                    "correct the line or run `simsearch data audit` again"
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
        raise ValueError(f"{path} is not a list that `simsearch data audit` wrote: {error}") from error


def contact_sheet(images: Tensor | Ragged, pairs: Duplicates, path: Path, limit: int = 40) -> None:
    """Writes a PNG of pairs side by side, each with its rows and correlation, to be judged by eye.

    If there are more than `limit` pairs, it shows `limit` of them, evenly spaced from the most to the least similar, so
    that one sees where true duplicates end. Without pairs the picture says so.

    Args:
        images: uint8 (N, 3, H, W) or Ragged, the whole collection.
        pairs: The pairs.
        path: The PNG file.
        limit: Number of pairs shown, from 1.

    Raises:
        ValueError: If `limit` is below 1 or the images have another shape or dtype.
    """
    check_images(images)
    if limit < 1:
        raise ValueError(f"limit={limit} would show nothing: use 1 or more")
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
            picture = to_image(images[row])
            size = tuple(max(1, round(side * scale)) for side in picture.size)
            shown = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
            sheet.paste(shown, (x + step * (width + _SHEET_GAP), y))
        draw.text((x, y + height), f"{query} {other}  {float(pairs.correlation[place]):.2f}", fill="black")
    with replacing(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")


def _label(collection: Collection, row: int) -> str:
    values = zip(collection.labels[row].tolist(), collection.classes, strict=True)
    return "/".join("?" if value < 0 else names[value] for value, names in values)


def _similarity(query: Tensor, other: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines float32 (P,) of chosen pairs, summed in double precision."""
    step = max(1, CELLS // query.shape[1])
    parts = [
        (query[r].double() * other[c].double()).sum(1).float()
        for r, c in zip(rows.split(step), columns.split(step), strict=True)
    ]
    return torch.cat(parts)


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
