"""Benchmarks like Revisited Oxford / Paris: gallery files, cropped queries, and easy, hard and junk items.

The format is JSON, {"name": ..., "images": [file, ...], "queries": [{"image": file, "bbx": [x1, y1, x2, y2] or null,
"easy": [...], "hard": [...], "junk": [...]}, ...]}, with positions in `images`. The authors' pickles, {"gnd": [{"bbx",
"easy", "hard", "junk"}], "imlist": [...], "qimlist": [...]}, are converted to it without unpickling
(`simsearch.data.pickles`).

Source:
    Radenović, Iscen, Tolias, Avrithis, Chum: Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking.
    CVPR 2018.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from simsearch.data.loading import ImageBatch, Item, load_batches
from simsearch.data.manifest import ENDINGS, Manifest, load_images
from simsearch.data.pickles import read_pickle
from simsearch.files import Damaged, read_json, write_json
from simsearch.functional.resize import Fit, resize_to_fit
from simsearch.functional.revisited import GRADES
from simsearch.images import ImageError, read_image

Box = tuple[float, float, float, float]
_RULES = "revisited-1: trapezoid AP, P@k up to the last right item"  # part of the fingerprint

# --------------------------------------------------------------------------------------- the benchmark


@dataclass(frozen=True)
class Query:
    """One query: an image or a part of it, and its listed gallery items.

    Attributes:
        image: Relative POSIX path of the image.
        bbx: The part (x1, y1, x2, y2) of the image in pixels, None for all of it.
        easy: Gallery positions.
        hard: Gallery positions.
        junk: Gallery positions.

    Raises:
        ValueError: If the box has no area or a corner left of or above the image, or an item is listed twice.
    """

    image: str
    bbx: Box | None
    easy: tuple[int, ...]
    hard: tuple[int, ...]
    junk: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bbx is not None:
            x1, y1, x2, y2 = self.bbx
            if not all(map(math.isfinite, self.bbx)) or not (-1 < x1 < x2 and -1 < y1 < y2):
                raise ValueError(f"bbx {list(self.bbx)} must be [x1, y1, x2, y2] with 0 <= x1 < x2 and 0 <= y1 < y2")
        seen: dict[int, str] = {}
        for grade in GRADES:
            for item in getattr(self, grade):
                if item in seen:
                    both = f"twice as {grade}" if seen[item] == grade else f"as {seen[item]} and as {grade}"
                    raise ValueError(f"image {item} is listed {both}: leave one out")
                seen[item] = grade


@dataclass(frozen=True)
class Benchmark:
    """A gallery of G image files and Q queries.

    Attributes:
        name: Name in reports.
        images: Relative POSIX paths, unique. A name without an image's ending stands for a .jpg.
        queries: The queries.

    Raises:
        ValueError: If there are no images or queries, a path leaves the root or comes twice, a listed item lies outside
            0..G-1, or a query's own image is in the gallery and not among its junk.
    """

    name: str
    images: tuple[str, ...]
    queries: tuple[Query, ...]

    def __post_init__(self) -> None:
        if not self.images or not self.queries:
            raise ValueError(f"there are {len(self.images)} images and {len(self.queries)} queries: nothing to measure")
        try:
            place = {path: i for i, path in enumerate(self.gallery(Path()).paths)}
        except ValueError as error:
            raise ValueError(f"images, {error}") from None
        for i, query in enumerate(self.queries):
            where = f"query {i} ({query.image})"
            path = file_name(query.image)
            try:
                Manifest(Path(), (path,))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            for item in (*query.easy, *query.hard, *query.junk):
                if not 0 <= item < len(self.images):
                    raise ValueError(f"{where} lists image {item}: there are {len(self.images)}, counted from 0")
            if path in place and place[path] not in query.junk:
                raise ValueError(f"{where} is image {place[path]} of the gallery too: take it out or list it as junk")

    def gallery(self, root: Path) -> Manifest:
        """The gallery's files.

        Args:
            root: Folder that the paths are relative to.
        """
        return Manifest(root, tuple(map(file_name, self.images)))

    def listed(self, grade: str) -> list[tuple[int, ...]]:
        """For each query the gallery positions of a grade.

        Args:
            grade: "easy", "hard" or "junk".
        """
        return [getattr(query, grade) for query in self.queries]


def landmarks(benchmark: Benchmark) -> Tensor:
    """The landmark of each query, int64 (Q,): the number of the first query that shows it.

    Queries show one landmark if they list a common image as easy or hard, directly or through other queries. File names
    do not always tell (oxford_002985). Landmarks are the sampling units, since the queries of one landmark are alike.

    Args:
        benchmark: The benchmark.
    """
    place = list(range(len(benchmark.queries)))
    shown: dict[int, int] = {}
    for i, query in enumerate(benchmark.queries):
        for j in {shown[item] for item in (*query.easy, *query.hard) if item in shown}:
            first, other = sorted((place[i], place[j]))
            place = [first if p == other else p for p in place]
        shown |= dict.fromkeys((*query.easy, *query.hard), i)
    return torch.tensor(place)


def file_name(name: str) -> str:
    """The relative path of an image whose ending .jpg may be left out in a list.

    Args:
        name: The name in the list.
    """
    return name if PurePosixPath(name).suffix.lower() in ENDINGS else f"{name}.jpg"


def fingerprint(benchmark: Benchmark, root: Path) -> str:
    """16 hex digits over the ground truth, the rules, and the sizes in bytes of all files.

    Sizes stand for the content: they tell re-encoded or resized copies from the originals without reading the files.

    Args:
        benchmark: The benchmark.
        root: Folder that the paths are relative to.

    Raises:
        FileNotFoundError: If files are missing. The message names the first.
    """
    names = [*benchmark.images, *(query.image for query in benchmark.queries)]
    sizes, missing = [], []
    for name in map(file_name, names):
        try:
            sizes.append((root / name).stat().st_size)
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} files are not in {root}, first {missing[0]}: give the folder that "
            "the names are relative to (of Oxford and Paris: jpg)"
        )
    content = [_RULES, benchmark.images, [asdict(query) for query in benchmark.queries], sizes]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- images


class QueryCrops(Dataset[Item]):
    """The queries of a benchmark, cropped to their boxes. Item i is i with uint8 (3, H, W) or an error.

    Boxes are in pixels of the upright image, with rounded corners. A box that exceeds the image by more than a pixel is
    an error, since the file is then not the image that the box was drawn on.

    Args:
        benchmark: The benchmark.
        root: Folder that the paths are relative to.
        size: Size of the crops in pixels.
        fit: How crops are resized, "square" or "longest".
    """

    def __init__(self, benchmark: Benchmark, root: Path, *, size: int, fit: Fit = "square") -> None:
        self.benchmark, self.root, self.size, self.fit = benchmark, root, size, fit

    def __len__(self) -> int:
        return len(self.benchmark.queries)

    def path(self, i: int) -> Path:
        """The file of a query.

        Args:
            i: Number of the query.
        """
        return self.root / file_name(self.benchmark.queries[i].image)

    def __getitem__(self, i: int) -> Item:
        path = self.path(i)
        try:
            image = _crop(read_image(path), self.benchmark.queries[i].bbx, path)
            return i, resize_to_fit(image, self.size, self.fit)
        except ImageError as error:
            return i, ImageError(error.path, error.reason, error.detail)
        except ValueError as error:
            return i, ValueError(str(error))


def _crop(image: Tensor, box: Box | None, path: Path) -> Tensor:
    if box is None:
        return image
    height, width = image.shape[1:]
    x1, y1, x2, y2 = map(round, box)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if x2 > width + 1 or y2 > height + 1 or left >= right or top >= bottom:
        raise ValueError(
            f"{path}: bbx {list(box)} is not inside its {width} x {height} pixels: is this the original file?"
        )
    return image[:, top:bottom, left:right]


def load_queries(
    benchmark: Benchmark, root: Path, *, size: int, fit: Fit = "square", batch_size: int = 64, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of cropped queries, uint8 (B, 3, H, W) of one shape, and their positions int64 (B,).

    With fit "square" they come in order, otherwise in the order of `load_batches`.

    Args:
        benchmark: The benchmark.
        root: Folder that the paths are relative to.
        size: Size of the crops in pixels.
        fit: How crops are resized, "square" or "longest".
        batch_size: Number of queries in a batch, from 1.
        workers: As in `load_items`.

    Raises:
        ImageError: If a file cannot be read.
        ValueError: If a box does not fit its image.
    """
    crops = QueryCrops(benchmark, root, size=size, fit=fit)
    return _all_readable(load_batches(crops, batch_size=batch_size, workers=workers))


def load_gallery(
    benchmark: Benchmark, root: Path, *, size: int, fit: Fit = "square", batch_size: int = 64, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of gallery images and their positions, as `load_queries` returns those of queries.

    Args:
        benchmark: The benchmark.
        root: Folder that the paths are relative to.
        size: Image size in pixels.
        fit: How images are resized, "square" or "longest".
        batch_size: Number of images in a batch, from 1.
        workers: As in `load_items`.

    Raises:
        ImageError: If a file cannot be read. Without it the numbers would be those of another benchmark.
    """
    images = load_images(benchmark.gallery(root), size=size, fit=fit, batch_size=batch_size, workers=workers)
    return _all_readable(images)


def _all_readable(batches: Iterator[ImageBatch]) -> Iterator[tuple[Tensor, Tensor]]:
    for images, rows, errors in batches:
        if errors:
            raise errors[0]
        yield images, rows


# ------------------------------------------------------------------------------------- JSON and pickles


def read_benchmark(path: Path) -> Benchmark:
    """The benchmark in a JSON file.

    Args:
        path: The file.

    Raises:
        ValueError: If the content is wrong. The message names what and where.
    """
    try:
        value = read_json(path)
    except Damaged as error:
        hint = f": convert it first by simsearch data convert gnd={path}" if path.suffix in (".pkl", ".pickle") else ""
        raise ValueError(f"{error}{hint}") from None
    try:
        return _benchmark(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_benchmark(path: Path, benchmark: Benchmark) -> None:
    """Writes the JSON that `read_benchmark` reads.

    Args:
        path: The file.
        benchmark: The benchmark.
    """
    write_json(path, asdict(benchmark))


def convert_ground_truth(path: Path, name: str) -> Benchmark:
    """The benchmark in a gnd_*.pkl of the authors' layout. `read_pickle` reads the file without unpickling.

    Args:
        path: The file.
        name: Name of the benchmark.

    Raises:
        ValueError: If the file lacks something or holds anything else.
    """
    try:
        value = _record(read_pickle(path.read_bytes()), ("gnd", "imlist", "qimlist"), "the file")
        truth, names = _sequence(value["gnd"], "gnd"), _sequence(value["qimlist"], "qimlist")
        if len(truth) != len(names):
            raise ValueError(f"gnd has {len(truth)} queries, but qimlist has {len(names)}")
        parts = ("bbx", *GRADES)
        entries = [_record(entry, parts, f"gnd of query {i}") for i, entry in enumerate(truth)]
        queries = [
            {"image": image, **{part: entry[part] for part in parts}}
            for image, entry in zip(names, entries, strict=True)
        ]
        return _benchmark({"name": name, "images": value["imlist"], "queries": queries})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _benchmark(value: object) -> Benchmark:
    fields = _record(value, ("name", "images", "queries"), "the benchmark")
    queries = []
    for i, entry in enumerate(_sequence(fields["queries"], "queries")):
        where = f"query {i}"
        parts = _record(entry, ("image", "bbx", *GRADES), where)
        box = parts["bbx"]
        if box is not None:
            box = tuple(_number(x, f"{where}, bbx") for x in _sequence(box, f"{where}, bbx"))
            if len(box) != 4:
                raise ValueError(f"{where}, bbx: it must be [x1, y1, x2, y2], got {len(box)} numbers")
        image = _text(parts["image"], f"{where}, image")
        grades = (
            tuple(_position(x, f"{where}, {grade}") for x in _sequence(parts[grade], f"{where}, {grade}"))
            for grade in GRADES
        )
        try:
            queries.append(Query(image, box, *grades))
        except ValueError as error:
            raise ValueError(f"{where} ({image}): {error}") from None
    images = tuple(_text(name, f"image {i}") for i, name in enumerate(_sequence(fields["images"], "images")))
    return Benchmark(_text(fields["name"], "name"), images, tuple(queries))


# Messages name only types: an untrusted value may be too deep, or too long, to print.


def _record(value: object, keys: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must have the keys {', '.join(keys)}, got a {type(value).__name__}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{where} does not have {', '.join(missing)}")
    return value


def _sequence(value: object, where: str) -> Sequence[Any]:
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: it must be a list, got a {type(value).__name__}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: it must be a string that is not empty, got a {type(value).__name__}")
    return value


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e9:
        raise ValueError(f"{where}: it must hold pixel coordinates, got a {type(value).__name__}")
    return float(value)


def _position(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}: it must hold positions in images, got a {type(value).__name__}")
    return value
