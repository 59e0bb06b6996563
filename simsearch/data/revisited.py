"""Benchmarks of the Revisited Oxford / Paris kind: gallery files, cropped queries, easy, hard and junk items.

Radenović, Iscen, Tolias, Avrithis, Chum: Revisiting Oxford and Paris, CVPR 2018. The product's own format is
JSON, {"name": ..., "images": [file, ...], "queries": [{"image": file, "bbx": [x1, y1, x2, y2] or null,
"easy": [...], "hard": [...], "junk": [...]}, ...]}, with positions in `images`. The authors' pickles,
{"gnd": [{"bbx", "easy", "hard", "junk"}], "imlist": [...], "qimlist": [...]}, are converted to it without
being unpickled (`read_pickle`).
"""

from __future__ import annotations

import hashlib
import json
import math
import pickletools
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
from simsearch.files import Damaged, read_json, write_json
from simsearch.functional.resize import Fit, resize_to_fit
from simsearch.functional.revisited import GRADES
from simsearch.images import ImageError, read_image

Box = tuple[float, float, float, float]
_RULES = "revisited-1: trapezoid AP, P@k up to the last right item"  # part of the fingerprint

# --------------------------------------------------------------------------------------- the benchmark


@dataclass(frozen=True)
class Query:
    """One query: the part `bbx` (x1, y1, x2, y2 in pixels, None: all) of an image, and its listed gallery items.

    Raises ValueError for a box without area or with a corner left of or above the image, and for an item that
    is listed twice.
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

    name: as reports print it. images: relative POSIX paths, unique; a name without an image's ending stands
    for a .jpg.

    Raises ValueError where there are no images or queries, for a path that leaves the root or comes twice, a
    listed item outside 0..G-1, and a query whose own image is in the gallery without being its junk.
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
        """The gallery's files under `root`."""
        return Manifest(root, tuple(map(file_name, self.images)))

    def listed(self, grade: str) -> list[tuple[int, ...]]:
        """For each query the gallery positions of that grade (easy, hard or junk)."""
        return [getattr(query, grade) for query in self.queries]


def landmarks(benchmark: Benchmark) -> Tensor:
    """The landmark that each query shows, int64 (Q,): the number of the first query that shows it.

    Queries that list a common image as easy or hard, directly or over others, show one landmark; names of files
    do not always tell (oxford_002985). Landmarks are what chance draws: the queries of one are alike.
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
    """The relative path of an image that a list may name without its ending .jpg."""
    return name if PurePosixPath(name).suffix.lower() in ENDINGS else f"{name}.jpg"


def fingerprint(benchmark: Benchmark, root: Path) -> str:
    """16 hex digits over ground truth, rules and the sizes in bytes of all files under `root`.

    Sizes stand for the content, so that re-encoded or resized copies are told from the originals without
    reading them. Raises FileNotFoundError where files are missing, naming the first.
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
    """The queries of a benchmark, cropped to their boxes; item i is i and uint8 (3, H, W), or what is wrong.

    Boxes count in pixels of the upright image, corners rounded. One that reaches past the image by more than
    a pixel is an error: then the file is not the image that the box was drawn on. Crops are resized by `fit`.
    """

    def __init__(self, benchmark: Benchmark, root: Path, *, size: int, fit: Fit = "square") -> None:
        self.benchmark, self.root, self.size, self.fit = benchmark, root, size, fit

    def __len__(self) -> int:
        return len(self.benchmark.queries)

    def path(self, i: int) -> Path:
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
            f"{path}: bbx {list(box)} does not lie in its {width} x {height} pixels: is this the original file?"
        )
    return image[:, top:bottom, left:right]


def load_queries(
    benchmark: Benchmark, root: Path, *, size: int, fit: Fit = "square", batch_size: int = 64, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of cropped queries, uint8 (B, 3, H, W) of one shape, and their positions int64 (B,).

    In order with fit "square"; else as `load_batches` gives them. Raises ImageError for a file that cannot
    be read, ValueError for a box that does not fit its image.
    """
    crops = QueryCrops(benchmark, root, size=size, fit=fit)
    return _all_readable(load_batches(crops, batch_size=batch_size, workers=workers))


def load_gallery(
    benchmark: Benchmark, root: Path, *, size: int, fit: Fit = "square", batch_size: int = 64, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the gallery and their positions, as `load_queries` gives those of queries.

    Raises ImageError for an unreadable file: with images left out, numbers would be those of another benchmark.
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
    """The benchmark in a JSON file. Raises ValueError, naming what is wrong where, for any other content."""
    try:
        value = read_json(path)
    except Damaged as error:
        mend = f": convert it first by simsearch data convert gnd={path}" if path.suffix in (".pkl", ".pickle") else ""
        raise ValueError(f"{error}{mend}") from None
    try:
        return _benchmark(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_benchmark(path: Path, benchmark: Benchmark) -> None:
    """Writes the JSON that `read_benchmark` reads."""
    write_json(path, asdict(benchmark))


def convert_ground_truth(path: Path, name: str) -> Benchmark:
    """The benchmark in a gnd_*.pkl of the authors' layout; the file is interpreted by `read_pickle`.

    Raises ValueError for a file that holds anything else or lacks parts.
    """
    try:
        value = _record(read_pickle(path.read_bytes()), ("gnd", "imlist", "qimlist"), "the file")
        truth, names = _sequence(value["gnd"], "gnd"), _sequence(value["qimlist"], "qimlist")
        if len(truth) != len(names):
            raise ValueError(f"gnd has {len(truth)} queries, qimlist {len(names)}")
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


# The types' names only: a stranger's value may be too deep, or too long, to print.


def _record(value: object, keys: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must have the keys {', '.join(keys)}, got a {type(value).__name__}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return value


def _sequence(value: object, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: it must be a list, got a {type(value).__name__}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: it must be a text of at least one letter, got a {type(value).__name__}")
    return value


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e9:
        raise ValueError(f"{where}: it must hold numbers of pixels, got a {type(value).__name__}")
    return float(value)


def _position(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}: it must hold positions in images, got a {type(value).__name__}")
    return value


# ------------------------------------------------------------------ pickles without the pickle machine


@dataclass(frozen=True)
class _Global:
    """The name of a class or function in a pickle. Only a name: nothing is imported or called by it."""

    module: str
    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "="


class _Array(list[Any]):
    """A one-dimensional NumPy array as a list."""


_DTYPES = {f"{kind}{size}" for kind, sizes in {"i": "1248", "u": "1248", "f": "48"}.items() for size in sizes}
_PLAIN = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


def read_pickle(data: bytes) -> Any:
    """The plain value in a pickle of protocol 0 to 5: None, bool, int, float, str, bytes, list, tuple, dict.

    NumPy's integer and floating scalars come as int and float, its one-dimensional arrays of them as lists.
    Sets, other classes, persistent ids, extension codes and out-of-band buffers are refused.

    A pickle is a program, and unpickling runs it: it may import and call anything. Here it is only read.
    `pickletools.genops` splits the bytes into instructions (it executes none), and this function carries out
    those that build plain data, on a stack of its own. The instruction that loads a global loads its name;
    the one that calls compares that name with the six that arrays and scalars need (in `_Reader.call`), and
    does their work itself on checked arguments; the one that sets an object's state fills an array or the
    byte order of a dtype and nothing else. So no text in the file ever becomes an object of the
    interpreter: there is nothing to slip past, as there would be in an Unpickler whose find_class says no
    (extension codes that were looked up before skip it, and what it does hand out can have its attributes
    set). Copies of bytes are limited by the length of the file; a memo position takes no memory by being high.

    Raises ValueError for a damaged file and for whatever is refused, naming it.
    """
    try:
        return _Reader(len(data)).run(data)
    except (IndexError, KeyError) as error:
        raise ValueError(f"the pickle is damaged: it takes what it never stored ({error})") from None


class _Reader:
    def __init__(self, budget: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = budget

    def run(self, data: bytes) -> Any:
        try:
            for opcode, argument, position in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument, position or 0)
        except OverflowError as error:
            raise ValueError(f"the pickle is damaged: {error}") from None
        raise ValueError("the pickle is damaged: it has no end")

    def step(self, name: str, argument: Any, position: int) -> None:
        stack = self.stack
        if name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "LIST":
            stack.append(self.pop_mark())
        elif name == "TUPLE":
            stack.append(tuple(self.pop_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name == "DICT":
            items = self.pop_mark()
            stack.append({})
            self.set_items(items)
        elif name == "APPEND":
            self.extend([stack.pop()])
        elif name == "APPENDS":
            self.extend(self.pop_mark())
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.pop_mark())
        elif name == "GLOBAL":
            stack.append(_Global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            own, module = stack.pop(), stack.pop()
            stack.append(_Global(_text(module, "a module's name"), _text(own, "a global's name")))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self.build(stack[-1], state)
        else:
            raise ValueError(f"the pickle holds {name} at byte {position}: only plain data is read")

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark, which goes too."""
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("the pickle is damaged: it appends to what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("the pickle is damaged: it sets an item of what is no dict, or half an item")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_text(key, "a dict's key")] = value

    def call(self, function: object, arguments: object) -> Any:
        """What the NumPy constructor of that name would return, made here. Raises ValueError for another."""
        if not isinstance(function, _Global):
            raise ValueError(f"the pickle calls a {type(function).__name__}: only plain data is read")
        named = (function.module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), function.name)
        match named, arguments:
            case ("numpy", "dtype"), (str(code), _, _) if code in _DTYPES:
                return _Dtype(code)
            case ("numpy", "dtype"), (str(code), _, _):
                raise ValueError(f"the pickle holds a NumPy array of dtype {code[:20]!r}: only numbers are read")
            case ("numpy.core.multiarray", "_reconstruct"), (_Global("numpy", "ndarray"), _, _):
                return _Array()
            case ("numpy.core.multiarray", "scalar"), (_Dtype() as dtype, raw):
                return self.numbers(dtype, (1,), raw)[0]
            case ("numpy.core.numeric", "_frombuffer"), (raw, _Dtype() as dtype, shape, _):
                return _Array(self.numbers(dtype, shape, raw))
            case ("_codecs", "encode"), (str(text), "latin1" | "latin-1"):  # how protocols 0 to 2 write bytes
                self.spend(len(text))
                return text.encode("latin-1")
            case ("builtins", "bytes"), ():
                return b""
        raise ValueError(
            f"the pickle wants to call {function.module[:80]}.{function.name[:80]}: it is refused. A ground truth "
            "needs lists, numbers and names only; do not load this file by other means"
        )

    def build(self, target: object, state: object) -> None:
        match target, state:
            case _Dtype(), (_, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                target.order = order
            case _Array(), (_, shape, _Dtype() as dtype, _, raw):
                target[:] = self.numbers(dtype, shape, raw)
            case _:
                raise ValueError(f"the pickle sets the state of a {type(target).__name__}: only plain data is read")

    def numbers(self, dtype: _Dtype, shape: object, raw: object) -> list[Any]:
        """The raw bytes of a one-dimensional array as int or float."""
        if isinstance(raw, str):  # Python 2
            raw = raw.encode("latin-1")
        kind = np.dtype(dtype.code).newbyteorder(dtype.order)  # type: ignore[arg-type]
        match shape, raw:
            case (int(n),), bytes() | bytearray() if len(raw) == n * kind.itemsize:
                self.spend(len(raw))
                return np.frombuffer(raw, kind).tolist()
        raise ValueError("the pickle holds a NumPy array that is not one-dimensional, or damaged")

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise ValueError("the pickle unfolds to more than its own length: it is refused")
