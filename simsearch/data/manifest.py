"""Lists of images on disk, from a folder or a table, and loaders that skip and report unreadable files."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from torch.utils.data import Dataset

from simsearch.data.loading import ImageBatch, Item, load_batches
from simsearch.data.process_pool import MEMORY
from simsearch.data.tables import ENDINGS as TABLES
from simsearch.data.tables import PATH_NAMES, Column, Rejected, path_name, read_table
from simsearch.files import Damaged, checked, read_json
from simsearch.functional.regions import Region
from simsearch.functional.resize import Fit, check_fit
from simsearch.images import MAX_PIXELS, ImageError, read_image
from simsearch.text import printable

_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Opened if Pillow or a plugin has their decoder. Otherwise each file is reported by its content.
_BY_PLUGINS = (".avif", ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jxl")
ENDINGS = (*_ENDINGS, *_BY_PLUGINS)
# Images that are not opened, and are reported by name.
_RARE = (".psd", ".psb", ".svg", ".eps", ".ai", ".pdf", ".djvu", ".exr", ".hdr", ".tga", ".ico", ".dng", ".cr2")
_RAW = (".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".xcf", ".ppm", ".pgm", ".pnm", ".jxr", ".webm")
NOT_OPENED = (*_RARE, *_RAW)
PATH_PROBLEMS = {
    "path-empty": "is empty",
    "path-zero-byte": "holds a zero byte",
    "path-absolute": "is absolute",
    "path-climbs": "leaves the root by '..'",
}
# Files that mark the folder of a finished and an unfinished `simsearch data ingest`, and its cleaned table.
INGEST, INGEST_PLAN, INGEST_TABLE = "ingest.json", "plan.json", "manifest.parquet"
# Names of files and folders that programs leave in folders of images, as patterns.
EXCLUDE = ("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX", "lost+found", ".thumbnails")
REASONS = {
    "path-empty": "it has no path",
    "path-zero-byte": "its path holds a zero byte",
    "path-absolute": "its path is absolute: give paths relative to the root",
    "path-climbs": "its path leaves the root by '..'",
    "path-leaves-root": "it is a link that leads out of the root",
    "path-twice": "another row has the same path",
    "linked-folder": "it is a link to a folder, which is not followed",
    "name-not-utf8": "its name is not UTF-8, so that no table can hold it",
    "unreadable-folder": "the system cannot list it",
}


@dataclass(frozen=True)
class Manifest:
    """A list of N image files under one folder, with the attributes of each.

    Attributes:
        root: The folder.
        paths: N relative POSIX paths, unique, inside the root. Rows in messages count from 1.
        attributes: For each name N values, None if unknown.
        skipped: Number of directory entries or rows that were left out, by reason.
        rejected: The rows of a table that were left out.
        notes: Remarks for the user on how the source was read.
        max_pixels: Largest number of pixels of an image, as in read_image.

    Raises:
        ValueError: If a path is absolute, climbs with '..' or comes twice, or an attribute has another length.
    """

    root: Path
    paths: tuple[str, ...]
    attributes: dict[str, Column] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        first_row: dict[str, int] = {}
        for row, path in enumerate(self.paths, start=1):
            if problem := path_problem(path):
                what = PATH_PROBLEMS[problem]
                raise ValueError(f"row {row}: path {path!r} {what}; give paths relative to {self.root}")
            if (before := first_row.setdefault(path, row)) != row:
                raise ValueError(f"row {row}: path {path!r} is already in row {before}: remove one of them")
        for name, values in self.attributes.items():
            if len(values) != len(self.paths):
                raise ValueError(f"attribute {name!r} has {len(values)} values for {len(self.paths)} paths")

    def __len__(self) -> int:
        return len(self.paths)


class ImageFiles(Dataset[Item]):
    """The images of a manifest at one size. Item i is (i, pixels) or (i, ImageError).

    Pixels are uint8 (3, size, size), or (3, h, w) with fit "longest".

    Args:
        manifest: The list of files.
        size: Image size in pixels, from 1.
        fit: "square" takes the centre square, "longest" the whole image with its longest side at `size`.
        region: The part of each image to take alone, or None.

    Raises:
        ValueError: If `size` is below 1 or `fit` is unknown.
    """

    def __init__(self, manifest: Manifest, *, size: int, fit: Fit = "square", region: Region | None = None) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        check_fit(fit)
        self.manifest = manifest
        self.memory = max(MEMORY, MEMORY * manifest.max_pixels // MAX_PIXELS)
        self.size = size
        self.fit = fit
        self.region = region

    def __len__(self) -> int:
        return len(self.manifest)

    def path(self, i: int) -> Path:
        """The file of an item.

        Args:
            i: Row of the item.
        """
        return self.manifest.root / self.manifest.paths[i]

    def __getitem__(self, i: int) -> Item:
        try:
            most = self.manifest.max_pixels
            return i, read_image(self.path(i), size=self.size, fit=self.fit, region=self.region, max_pixels=most)
        except ImageError as error:
            # Without its traceback, whose frames would keep the bytes of the file alive.
            return i, ImageError(error.path, error.reason, error.detail)


def load_images(
    manifest: Manifest,
    *,
    size: int,
    fit: Fit = "square",
    region: Region | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> Iterator[ImageBatch]:
    """Batches over a manifest as `load_batches` makes them. Errors are ImageErrors.

    Args:
        manifest: The list of files.
        size: Image size in pixels, from 1.
        fit: As in ImageFiles.
        region: As in ImageFiles.
        batch_size: Number of items in a batch, from 1.
        workers: As in `load_items`.

    Raises:
        ValueError: If `size` or `batch_size` is below 1, or `fit` is unknown.
    """
    return load_batches(ImageFiles(manifest, size=size, fit=fit, region=region), batch_size=batch_size, workers=workers)


def lists_files(source: Path) -> bool:
    """Whether a source is a folder of images or one image, not a table.

    Args:
        source: The folder or file.
    """
    return source.suffix.lower() in ENDINGS if source.is_file() else not read_ingest(source)


def read_manifest(source: Path, root: Path | None = None) -> Manifest:
    """The images that a source lists: a folder, one image file, or a table (.csv, .tsv, .txt, .parquet).

    A folder is searched with all its subfolders for files with the ending of an image, sorted by path. If some of them
    lie in subfolders, the first folder below `source` is the attribute "label" (None for files beside the subfolders).
    Hidden names, other endings, names that are not UTF-8, linked folders and links out of the root are skipped and
    counted.

    The folder of a finished `simsearch data ingest` stands for its cleaned table, with the recorded root.

    A table has a column of paths (PATH_NAMES, in any case). Every other column becomes an attribute, as text, None if
    empty. `read_table` describes how it is read. Rows without a usable image are left out and counted.

    Args:
        source: The folder or file.
        root: Folder that paths are relative to. None for the folder itself, or the folder of the file.

    Raises:
        FileNotFoundError: If the source or the root is missing.
        ValueError: If there are no images, none of the listed files exists, or a table has no column of paths or cannot
            be read.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder, an image, a .csv or a .parquet")
    if about := read_ingest(source):
        try:
            table = checked(source, INGEST_TABLE, about)
        except Damaged as error:
            raise ValueError(f"{error}: run `simsearch data ingest` again") from error
        manifest = _from_table(table, Path(root or about["root"]))
        return replace(manifest, max_pixels=max(MAX_PIXELS, int(about.get("settings", {}).get("max_pixels", 0))))
    if root is None:
        root = source if source.is_dir() else source.parent
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder: give the folder that the paths are relative to")
    if source.is_dir():
        return _read_folder(source, root)
    ending = source.suffix.lower()
    if ending in ENDINGS:
        return Manifest(root, (_below(source, root),))
    if ending not in TABLES:
        raise ValueError(
            f"{source}: the name of a table must end in {' or '.join(TABLES)}, that of an image in {', '.join(ENDINGS)}"
        )
    return _from_table(source, root)


def read_ingest(source: Path) -> dict[str, Any] | None:
    """ingest.json in the folder of a finished `simsearch data ingest`, None for anything else.

    Args:
        source: The folder.

    Raises:
        ValueError: If an ingest was begun there and not finished, or the file is damaged.
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


def walk(source: Path, root: Path, exclude: Sequence[str] = EXCLUDE) -> Iterator[tuple[str, str | None]]:
    """Each file and linked folder below a folder: its path below the folder, and the reason to leave it out or None.

    Args:
        source: The folder.
        root: Folder that links must not leave.
        exclude: Shell patterns of names of files and folders, or of paths below the folder.
    """

    def is_excluded(path: str) -> bool:
        return any(fnmatchcase(path, p) or fnmatchcase(path.rpartition("/")[2], p) for p in exclude)

    prefix = PurePosixPath(_below(source, root))
    leaves_root = link_check(root)
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(source, onerror=unreadable.append):
        below = Path(folder).relative_to(source)
        entered = []
        for name in subfolders:
            path = (below / name).as_posix()
            if is_excluded(path):
                yield path, "excluded"
                continue
            if os.path.islink(os.path.join(folder, name)):
                yield path, "linked folder"
            if name.startswith("."):
                yield path, "hidden"
            else:
                entered.append(name)
        subfolders[:] = entered
        for name in names:
            path, ending = (below / name).as_posix(), os.path.splitext(name)[1].lower()
            if is_excluded(path):
                yield path, "excluded"
            elif name.startswith("."):
                yield path, "hidden"
            elif ending in NOT_OPENED:
                yield path, "unsupported"
            elif ending not in ENDINGS:
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


@dataclass(frozen=True)
class Listed:
    """N images that a table lists.

    Attributes:
        paths: Relative POSIX paths.
        attributes: Columns by their own names.
        rejected: Rows without a usable image.
        notes: Remarks for the user on how the table was read.
    """

    paths: tuple[str, ...]
    attributes: dict[str, Column]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]


def list_table(source: Path, root: Path) -> Listed:
    """The images that a table lists, each once. Of several rows with one path, the row with most values is kept.

    Args:
        source: The table.
        root: Folder that paths are relative to.

    Raises:
        ValueError: If the table has no column of paths, or `read_table` refuses it.
    """
    table = read_table(source)
    columns = dict(table.columns)
    name = path_name(columns)
    if name is None:
        have = ", ".join(columns) or "none"
        hint = f"; {table.images!r} holds images: `simsearch data ingest` unpacks them" if table.images else ""
        raise ValueError(f"{source} has no column {' or '.join(PATH_NAMES[:2])}; its columns: {have}{hint}")
    values = columns.pop(name)
    leaves_root = link_check(root)
    known = [sum(value is not None for value in row) for row in zip(*columns.values(), strict=True)] or [0] * len(
        values
    )
    rejected = list(table.rejected)
    row_of: dict[str, int] = {}
    for row, value in enumerate(values):
        path, problem = _checked_path(value, root)
        if problem is None and leaves_root(path):
            problem = "path-leaves-root"
        if problem is None:
            before = row_of.setdefault(path, row)
            if before != row:
                kept, lost = (row, before) if known[row] > known[before] else (before, row)
                row_of[path] = kept
                rejected.append(Rejected(path, "path-twice", f"row {lost + 1}; row {kept + 1} is kept"))
        else:
            rejected.append(Rejected(printable(value or ""), problem, f"row {row + 1}"))
    rows = sorted(row_of.values())
    path_of = {row: path for path, row in row_of.items()}
    attributes = {name: tuple(column[row] for row in rows) for name, column in columns.items()}
    return Listed(tuple(path_of[row] for row in rows), attributes, tuple(rejected), table.notes)


def _checked_path(value: str | None, root: Path) -> tuple[str, str | None]:
    """The relative POSIX path of a table's cell, and what is wrong with it, or None."""
    exact = PurePosixPath(value).as_posix() if value else ""
    if path_problem(exact) is None and _is_utf8(exact) and os.path.lexists(root / exact):
        return exact, None
    text = (value or "").strip()
    path = PurePosixPath(text).as_posix() if text else ""
    if re.match(r"[A-Za-z]:[\\/]", text):
        return path, "path-absolute"
    problem = path_problem(path)
    if problem is None and not os.path.lexists(root / path):
        # Other systems write backslashes, and accents as combining marks or not.
        for other in (text.replace("\\", "/"), *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))):
            other = PurePosixPath(other).as_posix()
            if path_problem(other):
                return path, path_problem(other)
            if _is_utf8(other) and os.path.lexists(root / other):
                return other, None
    return path, problem


def _from_table(source: Path, root: Path) -> Manifest:
    listed = list_table(source, root)
    if not listed.paths:
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(one.reason for one in listed.rejected).most_common())
        raise ValueError(f"{source} lists no images ({why or 'it has a header and no rows'})")
    if not any(os.path.exists(root / path) for path in listed.paths):
        raise ValueError(f"none of the {len(listed.paths)} files that {source} lists exists under {root}: check root")
    counts = Counter(one.reason for one in listed.rejected)
    return Manifest(root, listed.paths, listed.attributes, dict(counts), listed.rejected, listed.notes)


def path_problem(path: str) -> str | None:
    """The reason why a table may not list a path, a key of PATH_PROBLEMS, or None.

    Args:
        path: The path.
    """
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
    """`source` relative to `root`, POSIX. Raises ValueError if it lies outside."""
    try:
        return Path(os.path.abspath(source)).relative_to(os.path.abspath(root)).as_posix()
    except ValueError:
        raise ValueError(
            f"{source} is not inside root {root}: leave root out or give a folder that contains it"
        ) from None


def link_check(root: Path) -> Callable[[str], bool]:
    """A predicate on paths relative to `root`: whether links lead the path out of the root.

    Args:
        root: The folder.
    """
    real_root = os.path.realpath(root)

    def leaves(path: str) -> bool:
        return os.path.commonpath([real_root, os.path.realpath(os.path.join(real_root, path))]) != real_root

    folder_leaves = functools.cache(leaves)  # few folders, many files

    def check(path: str) -> bool:
        folder = os.path.dirname(path)
        return folder_leaves(folder) or (os.path.islink(os.path.join(real_root, path)) and leaves(path))

    return check
