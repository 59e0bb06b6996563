"""Tables of photographs whose works are known: which work of a catalog each of them shows, or none."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from simsearch.data.manifest import PATH_PROBLEMS, path_problem
from simsearch.data.tables import path_name, plain_name, plain_names, read_table
from simsearch.images import read_image

Box = tuple[float, float, float, float]
_SIDES = ("x", "y", "w", "h")
_RULES = "photographs-1: lists of works, AP@k_minRk, GAP of the first, microAP of all pairs"  # in the fingerprint


@dataclass(frozen=True)
class Photograph:
    """One query: a photograph, or a rectangle of it, and the works that it shows.

    Attributes:
        path: Relative POSIX path.
        box: The rectangle (x, y, w, h) in pixels of the upright image, x and y of its upper left corner. None for all.
        works: Names of the works. Empty for works without a name, which no catalog has.
        units: Names of further sampling units, such as a visit.
    """

    path: str
    box: Box | None
    works: tuple[str, ...]
    units: tuple[str, ...] = ()


def read_photographs(table: Path) -> list[Photograph]:
    """The photographs of a table with the columns path and work, and perhaps x, y, w, h and unit.

    An empty `work` is one that no catalog has. Rows with the same path and box are one photograph of several works. The
    box x, y, w, h is the part of the photograph that is asked about. Photographs of one `unit` are not independent.

    Args:
        table: The table, a .csv, .tsv, .txt or .parquet file.

    Raises:
        ValueError: If a column is missing, or a row's path or box is wrong. The message names the row.
    """
    read = read_table(table)
    if read.rejected:
        raise ValueError(f"{table}: {read.rejected[0].detail or read.rejected[0].reason}: correct this line")
    columns, _ = plain_names(read.columns)
    path = path_name(read.columns)
    if path is None or "work" not in columns:
        raise ValueError(f"{table} has the columns {', '.join(read.columns)}: it needs path and work")
    if 0 < len(columns.keys() & set(_SIDES)) < len(_SIDES):
        raise ValueError(f"{table} has some of the columns x, y, w and h: a box needs all four")
    paths, works = columns[plain_name(path)], columns["work"]
    empty = (None,) * len(paths)
    sides = list(zip(*(columns.get(side, empty) for side in _SIDES), strict=True))
    units = columns.get("unit", empty)

    found: dict[tuple[str, Box | None], Photograph] = {}
    for row, (name, work, side, unit) in enumerate(zip(paths, works, sides, units, strict=True), start=1):
        where = f"{table}, row {row}"
        if problem := path_problem(name or ""):
            raise ValueError(f"{where}: the path {name!r} {PATH_PROBLEMS[problem]}; give paths relative to the table")
        key = (name or "", _box(side, where))
        before = found.get(key, Photograph(*key, ()))
        names = dict.fromkeys((*before.works, *([work] if work else [])))
        visits = dict.fromkeys((*before.units, *([unit] if unit else [])))
        found[key] = Photograph(*key, tuple(names), tuple(visits))
    if not found:
        raise ValueError(f"{table} lists no photograph")
    return list(found.values())


def _box(sides: Sequence[str | None], where: str) -> Box | None:
    if not any(sides):
        return None
    try:
        x, y, w, h = (float(side or "nan") for side in sides)
    except ValueError:
        x = y = w = h = math.nan
    if not (all(map(math.isfinite, (x, y, w, h))) and min(x, y) >= 0 and min(w, h) > 0):
        raise ValueError(f"{where}: the box {', '.join(str(side) for side in sides)} must be x, y >= 0 and w, h > 0")
    return x, y, w, h


def read_photograph(path: Path, box: Box | None) -> Tensor:
    """The pixels of a photograph or of a rectangle of it, uint8 (3, H, W).

    Args:
        path: The file.
        box: The rectangle (x, y, w, h), whose corners are rounded, or None for all.

    Raises:
        ImageError: If the file cannot be read.
        ValueError: If the rectangle exceeds the image by more than a pixel.
    """
    image = read_image(path)
    if box is None:
        return image
    height, width = image.shape[1:]
    x, y, right, bottom = (round(value) for value in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    if right > width + 1 or bottom > height + 1 or x >= min(right, width) or y >= min(bottom, height):
        raise ValueError(
            f"{path}: the box {list(box)} does not lie in its {width} x {height} pixels: is this the original file?"
        )
    return image[:, y:bottom, x:right].contiguous()


def linked(marks: Sequence[Iterable[Hashable]]) -> Tensor:
    """int64 (Q,), equal numbers for what shares a mark, directly or through others. Numbers are 0, 1, 2, ...

    Args:
        marks: The marks of each of Q things.

    Example:
        >>> linked([["a"], ["b"], ["a", "c"], ["c"]])
        tensor([0, 1, 0, 0])
    """
    places: dict[Hashable, int] = {}
    pairs = [(row, places.setdefault(mark, len(places))) for row, own in enumerate(marks) for mark in own]
    rows, columns = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.numpy()
    size = len(marks) + len(places)
    graph = coo_array(([1] * len(pairs), (rows, columns + len(marks))), shape=(size, size))
    return torch.from_numpy(connected_components(graph, directed=False)[1][: len(marks)]).long()


def photograph_units(photographs: Sequence[Photograph]) -> Tensor:
    """The sampling unit of each photograph, int64 (Q,): its works, its named units and its file.

    Photographs that share any of them are one unit, directly or through others.

    Args:
        photographs: The photographs.
    """
    return linked(
        [
            [("file", one.path), *(("work", work) for work in one.works), *(("unit", unit) for unit in one.units)]
            for one in photographs
        ]
    )


def photographs_fingerprint(
    photographs: Sequence[Photograph], root: Path, right: Sequence[Sequence[str]], gallery: Iterable[str]
) -> str:
    """16 hex digits over the photographs (by name and size of file), what each of them shows, and what is searched.

    Args:
        photographs: The photographs.
        root: Folder that their paths are relative to.
        right: Names of the items that are right for each photograph.
        gallery: Names of the items that are searched, in any order.

    Raises:
        FileNotFoundError: If files are missing. The message names the first.
    """
    names = sorted({one.path for one in photographs})
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} photographs are not in {root}, first {missing[0]}: paths are relative to "
            "the folder of the table"
        )
    shown = [[one.path, one.box, sorted(own)] for one, own in zip(photographs, right, strict=True)]
    sizes = {name: (root / name).stat().st_size for name in names}
    content = json.dumps([_RULES, sorted(shown, key=str), sizes, sorted(gallery)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
