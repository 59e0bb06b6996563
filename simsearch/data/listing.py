"""What a stranger's folder or table lists, read so that a bad row costs that row alone."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from simsearch.data.manifest import (
    PATH_COLUMNS,
    Column,
    _as_text,
    _below,
    _is_binary,
    _is_utf8,
    link_check,
    path_problem,
    walk,
)
from simsearch.text import printable

# Names of the column of paths, the first that a table has.
PATH_NAMES = (*PATH_COLUMNS, "file_path", "filepath", "file_name", "filename", "file", "image")
REASONS = {
    "row-ragged": "its line has another number of values than the header",
    "row-unclosed": "its line opens a quote that nothing closes",
    "path-empty": "it has no path",
    "path-zero-byte": "its path holds a zero byte",
    "path-absolute": "its path is absolute: give paths relative to the root",
    "path-climbs": "its path climbs with '..'",
    "path-leaves-root": "a link takes it out of the root",
    "path-twice": "another row has the same path",
    "linked-folder": "a link to a folder, which is not followed",
    "name-not-utf8": "its name is not UTF-8, so that no table can hold it",
    "unreadable-folder": "the system refuses to list it",
}
_IN_FOLDER = {
    "linked folder": "linked-folder",
    "name not UTF-8": "name-not-utf8",
    "link out of the root": "path-leaves-root",
    "unreadable folder": "unreadable-folder",
}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_RECORD_LINES = 50  # a quoted value that goes on for more is a quote that nobody closed


@dataclass(frozen=True)
class Rejected:
    """Something that was listed and is not taken. reason: a key of REASONS, of simsearch.images.REASONS or of
    simsearch.data.ingest.REASONS."""

    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Listing:
    """N image files under one folder, each once, and what its source says about each.

    attributes: for each name N values, None where unknown. rejected: what else was listed. skipped: how many
    entries of a folder were left out without a word each, by reason. notes: what a person should know about how the
    source was read.
    """

    root: Path
    paths: tuple[str, ...]
    attributes: dict[str, Column]
    rejected: tuple[Rejected, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_listing(source: Path, root: Path | None = None) -> Listing:
    """The images that a folder or a table (.csv, .parquet) lists.

    Of a folder the first folder below it is the attribute "artist" and the file's name "title". A table has a column
    of paths (PATH_NAMES, in any case); names of columns come out in lower case with underscores. CSV may be divided
    by commas, semicolons or tabs; it is UTF-8, or UTF-16 or UTF-32 with a byte order mark, else it is taken as
    cp1252. Of rows with one path that with most values is kept.

    Raises FileNotFoundError for a missing source or root, ValueError for a table without a column of paths or that
    cannot be read at all, and where nothing is left.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder, a .csv or a .parquet")
    root = root or (source if source.is_dir() else source.parent)
    if not root.is_dir():
        raise FileNotFoundError(f"root {root} is not a folder: give the one that the paths are relative to")
    if source.is_dir():
        listing = _from_folder(source, root)
    elif source.suffix.lower() == ".parquet":
        listing = _from_table(source, root, *_parquet_columns(source), [])
    elif source.suffix.lower() in (".csv", ".tsv", ".txt"):
        listing = _from_table(source, root, *_csv_columns(source))
    else:
        raise ValueError(f"{source} is neither a folder nor a table: give a folder, a .csv or a .parquet")
    if not listing.paths:
        reasons = Counter(one.reason for one in listing.rejected) + Counter(listing.skipped)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "it lists nothing"
        raise ValueError(f"{source} lists no image that could be taken ({why})")
    return listing


# ------------------------------------------------------------------------------------------- folders


def _from_folder(source: Path, root: Path) -> Listing:
    prefix = PurePosixPath(_below(source, root))
    found, rejected, skipped = [], [], Counter[str]()
    for path, reason in walk(source, root):
        if reason is None:
            found.append(path)
        elif reason in _IN_FOLDER:
            rejected.append(Rejected(printable(path), _IN_FOLDER[reason]))
        else:
            skipped[reason] += 1
    found.sort()
    rejected.sort(key=lambda one: one.path)
    parts = [PurePosixPath(path).parts for path in found]
    attributes: dict[str, Column] = {"title": tuple(_words(PurePosixPath(p[-1]).stem) for p in parts)}
    if any(len(p) > 1 for p in parts):
        attributes = {"artist": tuple(_words(p[0]) if len(p) > 1 else None for p in parts)} | attributes
    return Listing(root, tuple(str(prefix / path) for path in found), attributes, tuple(rejected), dict(skipped))


def _words(name: str) -> str:
    """A file's or folder's name as words: underscores are spaces, and so are hyphens where nothing else divides."""
    words = name.replace("_", " ")
    return words if " " in words.strip() else words.replace("-", " ")


# -------------------------------------------------------------------------------------------- tables


def _from_table(
    source: Path, root: Path, columns: dict[str, Column], notes: list[str], rejected: list[Rejected]
) -> Listing:
    columns, renamed = _plain_names(columns)
    notes = [*notes, *renamed]
    name = next((name for name in PATH_NAMES if name in columns), None)
    if name is None:
        have = ", ".join(columns) or "none"
        raise ValueError(f"{source} has no column {' or '.join(PATH_COLUMNS)}; its columns: {have}")
    values = columns.pop(name)
    leaves_root = link_check(root)
    known = [sum(value is not None for value in row) for row in zip(*columns.values(), strict=True)] or [0] * len(
        values
    )
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
    return Listing(root, tuple(path_of[row] for row in rows), attributes, tuple(rejected), notes=tuple(notes))


def _checked_path(value: str | None, root: Path) -> tuple[str, str | None]:
    """The path of a table's cell, relative and POSIX, and what is wrong with it."""
    text = (value or "").strip()
    path = PurePosixPath(text).as_posix() if text else ""
    if re.match(r"[A-Za-z]:[\\/]", text):
        return path, "path-absolute"
    problem = path_problem(path)
    if problem is None and not os.path.lexists(root / path):
        # What other systems write: backslashes, and accents as marks of their own or not.
        for other in (text.replace("\\", "/"), *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))):
            other = PurePosixPath(other).as_posix()
            if path_problem(other):
                return path, path_problem(other)
            if _is_utf8(other) and os.path.lexists(root / other):
                return other, None
    return path, problem


def _plain_names(columns: dict[str, Column]) -> tuple[dict[str, Column], list[str]]:
    """The columns by names in lower case with underscores, each once, and what was changed beyond that."""
    plain: dict[str, Column] = {}
    notes = []
    for given, values in columns.items():
        name = wanted = re.sub(r"\W+", "_", unicodedata.normalize("NFC", given).strip().lower()).strip("_")
        if not name:
            continue
        number = 2
        while name in plain:
            name, number = f"{wanted}_{number}", number + 1
        if name != wanted:
            notes.append(f"a second column {wanted!r} is called {name!r}")
        plain[name] = values
    return plain, notes


def _csv_columns(source: Path) -> tuple[dict[str, Column], list[str], list[Rejected]]:
    text, notes = decode_text(source.read_bytes())
    lines = list(io.StringIO(text, newline=""))
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    if delimiter != ",":
        notes.append(f"values are divided by {delimiter!r}")
    records, rejected, header = [], [], None
    for number, record in _records(lines, delimiter):
        if isinstance(record, str):
            rejected.append(Rejected(printable(record.strip()[:200]), "row-unclosed", f"line {number}"))
        elif header is None:
            header = record
        elif len(record) < len(header) or any(record[len(header) :]):
            what = f"line {number}: {len(record)} values for {len(header)} columns"
            rejected.append(Rejected(printable(delimiter.join(record)[:200]), "row-ragged", what))
        else:
            records.append([value or None for value in record])
    names = _numbered(header or [])
    return {name: _shared(row[i] for row in records) for i, name in enumerate(names)}, notes, rejected


def _records(lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The number of each record's first line, from 1, and its values, or the line where a quote is not closed.

    After such a line reading goes on with the next, so that a lost quote does not swallow what follows.
    """
    at = 0
    while at < len(lines):
        for extra in range(min(_RECORD_LINES, len(lines) - at)):
            try:
                record = next(csv.reader(lines[at : at + extra + 1], delimiter=delimiter, strict=True), [])
            except csv.Error:
                continue
            if record:
                yield at + 1, record
            at += extra + 1
            break
        else:
            yield at + 1, lines[at]
            at += 1


def _numbered(header: Sequence[str]) -> list[str]:
    """Names of columns, each once; what has no name keeps none."""
    seen: Counter[str] = Counter()
    names = []
    for name in header:
        seen[name] += 1
        names.append(name if seen[name] == 1 or not name.strip() else f"{name} {seen[name]}")
    return names


def _shared(values: Iterator[str | None]) -> Column:
    """The values, equal ones as one object: of millions of rows most repeat."""
    seen: dict[str | None, str | None] = {}
    return tuple(seen.setdefault(value, value) for value in values)


def decode_text(data: bytes) -> tuple[str, list[str]]:
    """The text in the bytes of a table, and what is to be said about its encoding."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None:
        try:
            return data.decode("utf-8"), []
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            notes = [f"it is not UTF-8 (byte 0x{data[error.start]:02x}, line {line}) and was taken as cp1252"]
            encoding = "cp1252"
    else:
        notes = [] if encoding == "utf-8-sig" else [f"it is {encoding.upper()}"]
    text = data.decode(encoding, "replace")
    if damaged := text.count("\ufffd"):
        notes.append(f"{damaged} characters could not be read")
    return text, notes


def _parquet_columns(source: Path) -> tuple[dict[str, Column], list[str]]:
    notes, columns = [], {}
    try:
        schema = pq.read_schema(source)
        names = _numbered(schema.names)
        keep = [not (pa.types.is_nested(column.type) or _is_binary(column.type)) for column in schema]
        notes += [
            f"column {n!r} holds {c.type}: left out" for n, c, k in zip(names, schema, keep, strict=True) if not k
        ]
        table = pq.read_table(source)
        for position, name in enumerate(names):
            if keep[position]:
                columns[name] = _shared(iter(_as_text(table.column(position))))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read as Parquet: {error}") from error
    return columns, notes
