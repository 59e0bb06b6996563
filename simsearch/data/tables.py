"""Lenient reader of user-supplied tables of images (.csv, .tsv, .txt, .parquet): bad rows are skipped and reported."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from simsearch.text import printable

Column = tuple[str | None, ...]
ENDINGS = (".csv", ".tsv", ".txt", ".parquet")
# Names of the column of paths, in any case. The first that a table has is used.
PATH_NAMES = ("path", "image_path", "file_path", "filepath", "file_name", "filename", "file", "image")
REASONS = {
    "row-ragged": "its line has more or fewer values than the header",
    "row-unclosed": "its line opens a quote that is never closed",
}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_RECORD_LINES = 50  # a quoted value of more lines counts as an unclosed quote


@dataclass(frozen=True)
class Rejected:
    """A listed image that is not used.

    Attributes:
        path: Its path.
        reason: A key of REASONS here, in simsearch.data.manifest, simsearch.images or simsearch.data.ingest.pipeline.
        detail: More about the reason.
    """

    path: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """The columns of a table.

    Attributes:
        columns: Texts by column name, None if empty.
        rejected: Rows that could not be read.
        notes: Remarks for the user on how the table was read.
        images: Name of the column that holds the bytes of images, as Hugging Face writes them. None without one.
    """

    columns: dict[str, Column]
    rejected: tuple[Rejected, ...] = ()
    notes: tuple[str, ...] = ()
    images: str | None = None


def read_table(source: Path) -> Table:
    """The content of a table.

    CSV values may be separated by commas, semicolons or tabs, or as a first line `sep=;` says. The encoding is UTF-8,
    or UTF-16 or UTF-32 with a byte order mark, otherwise cp1252. Columns with the same name get numbers, and columns
    without a name are left out. Parquet columns without plain values are left out.

    Args:
        source: The file.

    Raises:
        ValueError: If the file is no table or cannot be read at all.
    """
    if not source.is_file():
        raise ValueError(f"{source} is neither a folder nor a regular file")
    if source.suffix.lower() == ".parquet":
        return _read_parquet(source)
    return _read_csv(source)


def path_name(columns: Iterable[str]) -> str | None:
    """The name of the column of paths, None without one.

    Args:
        columns: Names of the columns.
    """
    plain = {plain_name(name): name for name in reversed(list(columns))}
    return next((plain[name] for name in PATH_NAMES if name in plain), None)


def plain_name(name: str) -> str:
    """A column's name in lower case with underscores.

    Args:
        name: The name.
    """
    return re.sub(r"\W+", "_", unicodedata.normalize("NFC", name).strip().lower()).strip("_")


def plain_names(columns: dict[str, Column]) -> tuple[dict[str, Column], list[str]]:
    """The columns by unique names in lower case with underscores, and remarks on other changes.

    Args:
        columns: The columns by their own names.
    """
    plain: dict[str, Column] = {}
    notes = []
    for given, values in columns.items():
        name = wanted = plain_name(given)
        if not name:
            continue
        number = 2
        while name in plain:
            name, number = f"{wanted}_{number}", number + 1
        if name != wanted:
            notes.append(f"a second column {wanted!r} was renamed {name!r}")
        plain[name] = values
    return plain, notes


def _read_csv(source: Path) -> Table:
    text, notes = decode_text(source.read_bytes())
    lines = list(io.StringIO(text, newline=""))
    first = next((line for line in lines if line.strip()), "")
    skipped = 0
    if said := re.fullmatch(r'"?sep=(.)"?', first.strip()):  # Excel's
        skipped, delimiter = lines.index(first) + 1, said[1]
    else:
        delimiter = max(",;\t", key=re.sub('"[^"]*"', "", first).count)  # as in `path;"born, died"`
    if delimiter != ",":
        notes.append(f"values are separated by {delimiter!r}")
    records, rejected, header = [], [], None
    for number, record in _records(lines[skipped:], delimiter):
        line = number + skipped
        if isinstance(record, str):
            rejected.append(Rejected(printable(record.strip()[:200]), "row-unclosed", f"line {line}"))
        elif header is None:
            header = [name.strip() for name in record]
        elif len(record) < len(header) or any(record[len(header) :]):
            what = f"line {line}: {len(record)} values for {len(header)} columns"
            rejected.append(Rejected(printable(delimiter.join(record)[:200]), "row-ragged", what))
        else:
            records.append([value or None for value in record])
    columns = {name: _shared(row[i] for row in records) for i, name in enumerate(_numbered(header or [])) if name}
    return Table(columns, tuple(rejected), tuple(notes))


def _records(lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The line number of each record, from 1, and its values, or the line if it has an unclosed quote.

    After such a line, reading continues with the next line, so that a missing quote does not swallow what follows.
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
            yield at + 1, _lenient(lines[at], delimiter)
            at += 1


def _lenient(line: str, delimiter: str) -> list[str] | str:
    """The values of a line with text behind a quoted one, as in `"Madonna" (study)`. The line if a quote is open."""
    reader = csv.reader([line, ""], delimiter=delimiter)
    try:
        record = next(reader)
    except csv.Error:
        return line
    return record if reader.line_num == 1 else line


def _numbered(header: Sequence[str]) -> list[str]:
    """Unique names of columns. Empty names stay empty."""
    seen: Counter[str] = Counter()
    names = []
    for name in header:
        seen[name] += 1
        names.append(name if seen[name] == 1 or not name.strip() else f"{name} {seen[name]}")
    return names


def _shared(values: Iterator[str | None]) -> Column:
    """The values, with equal ones as one object, since most values repeat in millions of rows."""
    seen: dict[str | None, str | None] = {}
    return tuple(seen.setdefault(value, value) for value in values)


def decode_text(data: bytes) -> tuple[str, list[str]]:
    """The text in the bytes of a table, and remarks on its encoding.

    Args:
        data: The bytes.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None:
        try:
            return data.decode("utf-8"), []
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            notes = [f"it is not UTF-8 (byte 0x{data[error.start]:02x}, line {line}) and was read as cp1252"]
            encoding = "cp1252"
    else:
        notes = [] if encoding == "utf-8-sig" else [f"it is {encoding.upper()}"]
    text = data.decode(encoding, "replace")
    if damaged := text.count("\ufffd"):
        notes.append(f"{damaged} characters could not be read")
    return text, notes


def _read_parquet(source: Path) -> Table:
    notes, columns, images = [], {}, None
    try:
        schema = pq.read_schema(source)
        names, classes = _numbered(schema.names), _classes(schema)
        kept = []
        for position, (name, column) in enumerate(zip(names, schema, strict=True)):
            kind = getattr(column.type, "storage_type", column.type)  # what UUIDs or tensors are made of
            if images is None and _holds_images(column.type):
                images = column.name
            elif pa.types.is_nested(kind) or is_binary(kind):
                notes.append(f"column {name!r} holds {column.type}: left out")
            else:
                kept.append((position, name))
        doubled = len(set(schema.names)) < len(schema.names)
        wanted = None if doubled else [schema.names[position] for position, _ in kept]  # images are large
        table = pq.read_table(source, columns=wanted)
        for number, (position, name) in enumerate(kept):
            values = _shared(iter(as_text(table.column(position if doubled else number))))
            columns[name] = _named(values, classes[name]) if name in classes else values
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read as Parquet: {error}") from error
    return Table({name: values for name, values in columns.items() if name}, (), tuple(notes), images)


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column holds images as Hugging Face writes them: {bytes, path}."""
    return pa.types.is_struct(kind) and any(part.name == "bytes" and is_binary(part.type) for part in kind)


def _classes(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names of columns that hold class numbers, as Hugging Face keeps them beside the table."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: [str(value) for value in about["names"]]
            for name, about in features.items()
            if isinstance(about, dict) and about.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _named(values: Column, names: list[str]) -> Column:
    known = {str(number): name for number, name in enumerate(names)}
    return tuple(value if value is None else known.get(value) for value in values)


def table_images(source: Path, name: str) -> Iterator[tuple[bytes | None, str | None]]:
    """The bytes of each row's image, or None, and the path that the table gives for it.

    Args:
        source: A Parquet file.
        name: Name of the column of images.
    """
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=64, columns=[name]):
            for value in batch.column(0).to_pylist():
                value = value or {}
                path = value.get("path")
                yield value.get("bytes"), path if isinstance(path, str) else None


def as_text(values: pa.ChunkedArray) -> Column:
    """Plain values of a Parquet column as text, None if empty.

    Args:
        values: The column.
    """
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return tuple(value or None for value in values.cast(pa.string()).to_pylist())


def is_binary(kind: pa.DataType) -> bool:
    """Whether a Parquet column holds bytes rather than text.

    Args:
        kind: Type of the column.
    """
    fixed = pa.types.is_fixed_size_binary(kind)
    return fixed or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view"
