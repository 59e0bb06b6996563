"""Files that are there whole or not at all, and whose damage is seen: each has a SHA-256 beside it or in it."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from simsearch.errors import SimsearchError
from simsearch.text import csv_cell

CHECKSUM = "checksum"
_PIECE = 2**20  # bytes that are read together


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends well.

    What killed processes left of earlier tries is taken away first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    with _temporary(path) as temporary:
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to fill; it takes the place of `folder` when the block ends well.

    What killed processes left of earlier tries is taken away first. A kill between the two moves leaves the old one
    aside: `restore` brings it back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    restore(folder)
    clear_leftovers(folder)
    with _temporary(folder) as temporary, _temporary(folder, _OLD) as old:
        temporary.mkdir()
        try:
            yield temporary
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            for path in (temporary, old):
                shutil.rmtree(path, ignore_errors=True)


def restore(folder: Path) -> None:
    """Puts a folder back that a process which was killed in `replacing_folder` had moved aside, where there is none."""
    if not folder.exists():
        for path, old in _leftovers(folder):
            if old and path.is_dir():
                with suppress(OSError):  # another process was first, or may, and who reads may not write
                    os.replace(path, folder)
                return


def clear_leftovers(path: Path) -> None:
    """Takes away what killed processes left beside `path` in the midst of writing it."""
    for leftover, _ in _leftovers(path):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether `replacing` gives such names, in this version or an earlier one."""
    return any(pattern.fullmatch(name) for pattern in (_TEMPORARY, _EARLIER_FILE))


# Of this machine, process and count; then whether it is what was there before; then what it takes the place of.
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)(-old)?\.(.+)", re.DOTALL)
_EARLIER_FILE = re.compile(r"\.[0-9a-f]{8}\.(.+)", re.DOTALL)
_EARLIER_FOLDER = re.compile(r"\.(.+)\.(\d+)(\.old)?", re.DOTALL)
_OLD = "-old"
_FORGOTTEN_SECONDS = 86_400.0  # after which a temporary name of who knows which process is a left-over
_COUNT = itertools.count()
_writing: set[str] = set()


@contextmanager
def _temporary(path: Path, kind: str = "") -> Iterator[Path]:
    """A name beside `path` that nobody else has, while it is being written to."""
    name = f".{_machine()}-{os.getpid()}-{next(_COUNT)}{kind}.{path.name}"
    _writing.add(name)
    try:
        yield path.with_name(name)
    finally:
        _writing.discard(name)


def _leftovers(path: Path) -> list[tuple[Path, bool]]:
    """What killed processes left beside `path` for it, and whether that is what was there before."""
    found = []
    try:
        names = [entry.name for entry in os.scandir(path.parent) if entry.name[0] == "." and path.name in entry.name]
    except OSError:
        return []
    for name in names:
        other = path.with_name(name)
        if match := _TEMPORARY.fullmatch(name):
            machine, pid, _, old, target = match.groups()
            alive = name in _writing or (int(pid) != os.getpid() and is_alive(int(pid)))
            dead = not alive if machine == _machine() else _is_forgotten(other)
        elif match := _EARLIER_FILE.fullmatch(name):
            target, old, dead = match[1], None, _is_forgotten(other)
        elif (match := _EARLIER_FOLDER.fullmatch(name)) and other.is_dir():
            target, old, dead = match[1], match[3], not is_alive(int(match[2]))
        else:
            continue
        if dead and target == path.name:
            found.append((other, bool(old)))
    return found


def _is_forgotten(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS
    except OSError:  # finished in this moment
        return False


def _machine() -> str:
    """8 hex digits of this machine's name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ------------------------------------------------------------------------------------------- checksums


class Damaged(SimsearchError, ValueError):
    """A file whose content is not what was written."""


def sha256(path: Path, *spans: tuple[int, int]) -> str:
    """The SHA-256 (hex) of a file, or of its bytes start..stop-1 of these spans, one after another."""
    with path.open("rb") as file:
        if not spans:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, piece = hashlib.sha256(), bytearray(_PIECE)
        for start, stop in spans:
            file.seek(start)
            while start < stop and (count := file.readinto(memoryview(piece)[: stop - start])):
                digest.update(memoryview(piece)[:count])
                start += count
        return digest.hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files in a folder, by name, for an entry `sha256` of the JSON that describes the folder."""
    return {name: sha256(folder / name) for name in names}


def checked(folder: Path, name: str, about: Mapping[str, Any]) -> Path:
    """The path of a file in a folder, after comparing it with about["sha256"]; with nothing where that lacks it.

    Raises Damaged where it is another file than was written, FileNotFoundError where it is missing.
    """
    path, expected = folder / name, about.get("sha256", {}).get(name)
    if expected is not None and sha256(path) != expected:
        raise Damaged(f"{path} is damaged or of another folder: its SHA-256 is not the recorded one")
    return path


def note_change(folder: Path, name: str, about: Mapping[str, Any]) -> None:
    """Says on standard error where a file in a folder that a user may change is not the one in about["sha256"]."""
    try:
        checked(folder, name, about)
    except Damaged:
        print(f"note: {folder / name} was changed or damaged since it was written: it counts as it is", file=sys.stderr)


def checksum(value: Mapping[str, Any]) -> str:
    """The SHA-256 (hex) of plain values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` as JSON with a checksum of it, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(value))


def to_json(value: Mapping[str, Any]) -> str:
    """The text that `write_json` writes."""
    value = {name: entry for name, entry in value.items() if name != CHECKSUM}
    return json.dumps({**value, CHECKSUM: checksum(value)}, indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. A file without a checksum, by hand or of an older version, is taken as it is.

    Raises Damaged where it is anything else, OSError where it can't be read.
    """
    return from_json(path.read_bytes(), path)


def from_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """What `to_json` made the text of, as `read_json` has it; path: where it lies."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged: it holds no mapping")
    stated = value.pop(CHECKSUM, None)
    if stated is None and value:  # it stands last, perhaps under a damaged name
        *others, last = value
        lost = value[last] == checksum({name: value[name] for name in others})
    else:
        lost = False
    if lost or (stated is not None and stated != checksum(value)):
        raise Damaged(
            f"{path} is damaged or was changed by hand: make it again, or delete its line {CHECKSUM!r} where that was "
            "on purpose"
        )
    return value


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file, followed by the SHA-256 of its values, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.write(hashlib.sha256(np.ascontiguousarray(array).data).digest())


def read_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """What `write_array` wrote, of this type. Raises Damaged for anything else, OSError where it can't be read."""
    with path.open("rb") as file:
        try:
            array = np.load(file, allow_pickle=False)
            sound = array.dtype == dtype and file.read() == hashlib.sha256(np.ascontiguousarray(array).data).digest()
        except Exception as error:  # a header is a Python literal, of which anything may be left
            raise Damaged(f"{path} is damaged: {error}") from error
    if not sound:
        raise Damaged(f"{path} is damaged: its SHA-256 is not that of its values")
    return array


def check_zip(path: Path) -> Path:
    """The path, after comparing the entries of a zip file, as torch.save writes them, with their CRC-32.

    torch.load does not look at them. A file that does not begin as a zip file does is left alone.

    Raises Damaged where an entry is not what was written, OSError where the file can't be read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return path
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if wrong is not None:
        raise Damaged(f"{path} is damaged: the CRC-32 of {wrong} in it is not the recorded one")
    return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]], *, exact: bool = False) -> None:
    """Writes a table as CSV in UTF-8, atomically.

    Args:
        path: The file to write.
        header: The names of the columns.
        rows: One cell a column.
        exact: Write the text as it is, for a table that a program reads back. By default a text that a spreadsheet
            would take for a formula is made harmless (`simsearch.text.csv_cell`).
    """
    with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        _write_rows(file, header, rows, exact=exact)


def to_csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """The text that `write_csv` writes."""
    file = io.StringIO()
    _write_rows(file, header, rows, exact=False)
    return file.getvalue()


def _write_rows(file: TextIO, header: Sequence[str], rows: Iterable[Iterable[Any]], *, exact: bool) -> None:
    table = itertools.chain([header], rows)
    csv.writer(file, lineterminator="\n").writerows(table if exact else (map(csv_cell, row) for row in table))


def json_line(value: Any) -> str:
    """`value` as JSON in one line, without what JSON has no word for: NaN and infinity become null, a date its text."""
    return json.dumps(_plain(value), allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
