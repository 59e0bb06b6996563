"""Lists of images on disk, from a folder or a table, and loaders that survive unreadable files."""

from __future__ import annotations

import csv
import functools
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from simsearch.data.batches import ImageBatch, Item, load_batches
from simsearch.files import Damaged, checked, read_json
from simsearch.functional.resize import Fit, check_fit
from simsearch.images import ImageError, read_image

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PATH_COLUMNS = ("path", "image_path")
PATH_PROBLEMS = {
    "path-empty": "is empty",
    "path-zero-byte": "holds a zero byte",
    "path-absolute": "is absolute",
    "path-climbs": "climbs out with '..'",
}
# What marks the folder of a finished `simsearch data ingest`, and of one that is not; its cleaned table.
INGEST, INGEST_PLAN, INGEST_TABLE = "ingest.json", "plan.json", "manifest.parquet"
Column = tuple[str | None, ...]


@dataclass(frozen=True)
class Manifest:
    """A list of N image files under one folder, and what is known about each.

    root: the folder. paths: N relative POSIX paths, unique, none of which leaves the root. attributes: for
    each name N values, None where unknown. skipped: how many directory entries were left out, by reason
    (of a folder; empty for a table).

    Raises ValueError for a path that is absolute, climbs with '..' or comes twice (rows count from 1), and
    for an attribute of another length.
    """

    root: Path
    paths: tuple[str, ...]
    attributes: dict[str, Column] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first_row: dict[str, int] = {}
        for row, path in enumerate(self.paths, start=1):
            if problem := path_problem(path):
                what = PATH_PROBLEMS[problem]
                raise ValueError(f"row {row}: path {path!r} {what}; give paths relative to {self.root}")
            if (before := first_row.setdefault(path, row)) != row:
                raise ValueError(f"row {row}: path {path!r} is already in row {before}; leave one of them out")
        for name, values in self.attributes.items():
            if len(values) != len(self.paths):
                raise ValueError(f"attribute {name!r} has {len(values)} values for {len(self.paths)} paths")

    def __len__(self) -> int:
        return len(self.paths)


class ImageFiles(Dataset[Item]):
    """The images of a manifest, by `fit` at one size; item i is its row and its pixels or error.

    Items are (i, uint8 (3, size, size)), with fit "longest" (i, uint8 (3, h, w)), or (i, ImageError). Raises
    ValueError for a size below 1 or another fit.
    """

    def __init__(self, manifest: Manifest, *, size: int, fit: Fit = "square") -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        check_fit(fit)
        self.manifest = manifest
        self.size = size
        self.fit = fit

    def __len__(self) -> int:
        return len(self.manifest)

    def path(self, i: int) -> Path:
        return self.manifest.root / self.manifest.paths[i]

    def __getitem__(self, i: int) -> Item:
        try:
            return i, read_image(self.path(i), size=self.size, fit=self.fit)
        except ImageError as error:
            # Without its traceback, whose frames would keep the bytes of the file alive.
            return i, ImageError(error.path, error.reason, error.detail)


def load_images(
    manifest: Manifest, *, size: int, fit: Fit = "square", batch_size: int = 64, workers: int = 0
) -> Iterator[ImageBatch]:
    """Batches over a manifest as `load_batches` gives them, the errors ImageErrors.

    Raises ValueError for a size or batch_size below 1 and another fit.
    """
    return load_batches(ImageFiles(manifest, size=size, fit=fit), batch_size=batch_size, workers=workers)


def read_manifest(source: Path, root: Path | None = None) -> Manifest:
    """The images that `source` lists: a folder, one image file, or a table (.csv, .parquet).

    A folder is searched through all its sub-folders for files with an image's ending, sorted by path. When
    some lie in sub-folders, the first folder below `source` is the attribute "label" (None for files beside
    them). Hidden names, other endings, names that are not UTF-8, linked folders and links that leave the
    root are skipped and counted.

    The folder of a finished `simsearch data ingest` stands for its cleaned table, with the root that was recorded.

    A table has a column `path` or `image_path`; every other column becomes an attribute, as text, None
    where empty. CSV is UTF-8, with or without a byte order mark, comma-separated, with a header; columns
    without a name are left out.

    root: what paths are relative to; by default the folder, or the folder that holds the file.

    Raises FileNotFoundError for a missing source or root; ValueError for a folder or table without images,
    a table without a path column, in another encoding or otherwise damaged, for paths that leave the root
    (absolute, '..', a link) or come twice, naming the row, and where no listed file exists.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder, an image, a .csv or a .parquet")
    if about := read_ingest(source):
        try:
            table = checked(source, INGEST_TABLE, about)
        except Damaged as error:
            raise ValueError(f"{error}: run `simsearch data ingest` again") from error
        return _from_table(table, Path(root or about["root"]), _read_parquet(table))
    if root is None:
        root = source if source.is_dir() else source.parent
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder: give the one that the paths are relative to")
    if source.is_dir():
        return _read_folder(source, root)
    ending = source.suffix.lower()
    if ending in ENDINGS:
        return Manifest(root, (_below(source, root),))
    if ending not in (".csv", ".parquet"):
        known = ", ".join(ENDINGS)
        raise ValueError(f"{source}: a table must end in .csv or .parquet, an image in one of {known}")
    if not source.is_file():
        raise ValueError(f"{source} is neither a folder nor a regular file")
    columns = _read_csv(source) if ending == ".csv" else _read_parquet(source)
    return _from_table(source, root, columns)


def read_ingest(source: Path) -> dict[str, Any] | None:
    """ingest.json of the folder of a finished `simsearch data ingest`, None for anything else.

    Raises ValueError where an ingest was begun there and not finished, and where the file is damaged.
    """
    path = source / INGEST
    if not path.is_file():
        if (source / INGEST_PLAN).is_file() and (source / "pixels").is_dir():
            raise ValueError(f"the ingest in {source} is not finished: run the same `simsearch data ingest` again")
        return None
    try:
        about = read_json(path)
        return {"root": str(about["root"])} | about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `simsearch data ingest` again") from error


def walk(source: Path, root: Path) -> Iterator[tuple[str, str | None]]:
    """Each file and linked folder below a folder as (path below it, None), or with the reason to leave it out."""
    prefix = PurePosixPath(_below(source, root))
    leaves_root = link_check(root)
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(source, onerror=unreadable.append):
        below = Path(folder).relative_to(source)
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                yield (below / name).as_posix(), "linked folder"
            if name.startswith("."):
                yield (below / name).as_posix(), "hidden"
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = (below / name).as_posix()
            if name.startswith("."):
                yield path, "hidden"
            elif os.path.splitext(name)[1].lower() not in ENDINGS:
                yield path, "other ending"
            elif not _is_utf8(path):
                yield path, "name not UTF-8"
            elif leaves_root(str(prefix / path)):
                yield path, "link out of the root"
            else:
                yield path, None
    for error in unreadable:
        yield os.path.relpath(error.filename or source, source), "unreadable folder"


def _read_folder(source: Path, root: Path) -> Manifest:
    prefix = PurePosixPath(_below(source, root))
    entries = list(walk(source, root))
    found = [path for path, reason in entries if reason is None]
    skipped = Counter(reason for _, reason in entries if reason is not None)
    if not found:
        others = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        raise ValueError(f"{source} holds no images ({', '.join(ENDINGS)}); skipped: {others}")
    found.sort()
    folders = [PurePosixPath(path).parts[:-1] for path in found]
    attributes = {"label": tuple(parts[0] if parts else None for parts in folders)} if any(folders) else {}
    return Manifest(root, tuple(str(prefix / path) for path in found), attributes, dict(skipped))


def _from_table(source: Path, root: Path, columns: dict[str, Column]) -> Manifest:
    name = next((name for name in PATH_COLUMNS if name in columns), None)
    if name is None:
        have = ", ".join(columns) or "none"
        raise ValueError(f"{source} has no column {' or '.join(PATH_COLUMNS)}; its columns: {have}")
    values = columns.pop(name)
    if not values:
        raise ValueError(f"{source} lists no images: it has a header and no rows")
    paths = tuple(PurePosixPath(value).as_posix() if value else "" for value in values)
    try:
        manifest = Manifest(root, paths, columns)
    except ValueError as error:
        raise ValueError(f"{source}, {error}") from None
    leaves_root = link_check(root)
    for row, path in enumerate(paths, start=1):
        if leaves_root(path):
            raise ValueError(f"{source}, row {row}: {path!r} is reached by a link that leaves {root}")
    if not any(os.path.exists(root / path) for path in paths):
        raise ValueError(f"none of the {len(paths)} files that {source} lists exists under {root}: is root right?")
    return manifest


def _read_csv(source: Path) -> dict[str, Column]:
    data = source.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object lacks the byte order mark; counted from the end, both agree.
        offset = len(data) - len(error.object) + error.start
        line = data.count(b"\n", 0, offset) + 1
        where = f"byte 0x{data[offset]:02x} at offset {offset}, line {line}"
        raise ValueError(f"{source} is not UTF-8 ({where}): save it as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_names(source, header)
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"{source}, line {reader.line_num}: {len(row)} values for {len(header)} columns")
            if row:
                rows.append([value or None for value in row])
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num}: {error}") from None
    return {name: tuple(row[i] for row in rows) for i, name in enumerate(header) if name}


def _read_parquet(source: Path) -> dict[str, Column]:
    try:
        schema = pq.read_schema(source)
        _check_names(source, schema.names)
        for column in schema:
            if pa.types.is_nested(column.type) or _is_binary(column.type):
                raise ValueError(f"{source}: column {column.name!r} holds {column.type}, no plain value: leave it out")
        table = pq.read_table(source)
        return {name: _as_text(table[name]) for name in schema.names}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read as Parquet: {error}") from error


def _as_text(values: pa.ChunkedArray) -> Column:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return tuple(value or None for value in values.cast(pa.string()).to_pylist())


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _check_names(source: Path, names: Iterable[str]) -> None:
    doubled = [name for name, count in Counter(names).items() if name and count > 1]
    if doubled:
        raise ValueError(f"{source} has more than one column {doubled[0]!r}: rename or leave out the others")


def path_problem(path: str) -> str | None:
    """Why a table may not list this path, a key of PATH_PROBLEMS; None where it may."""
    if path in ("", "."):
        return "path-empty"
    if "\0" in path:
        return "path-zero-byte"
    if PurePosixPath(path).is_absolute():
        return "path-absolute"
    if ".." in PurePosixPath(path).parts:
        return "path-climbs"
    return None


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # undecodable bytes come as lone surrogates, which no table can hold
        return False
    return True


def _below(source: Path, root: Path) -> str:
    """`source` relative to `root`, POSIX. Raises ValueError where it lies elsewhere."""
    try:
        return Path(os.path.abspath(source)).relative_to(os.path.abspath(root)).as_posix()
    except ValueError:
        raise ValueError(f"{source} does not lie in root {root}: leave root out or give a folder above") from None


def link_check(root: Path) -> Callable[[str], bool]:
    """A predicate on paths relative to `root`: do links take this one out of the root?"""
    real_root = os.path.realpath(root)

    def leaves(path: str) -> bool:
        return os.path.commonpath([real_root, os.path.realpath(os.path.join(real_root, path))]) != real_root

    folder_leaves = functools.cache(leaves)  # few folders, many files

    def check(path: str) -> bool:
        folder = os.path.dirname(path)
        return folder_leaves(folder) or (os.path.islink(os.path.join(real_root, path)) and leaves(path))

    return check
