"""Atomic files with integrity checks: each has a SHA-256 inside or beside it."""

from __future__ import annotations

import csv
import ctypes
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
import tempfile
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
_PIECE = 2**20  # bytes per read
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. If the block succeeds, the file there replaces `path`.

    Leftovers of killed processes are removed first.

    Args:
        path: The file to write.
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
    """Yields a new folder beside `folder`. If the block succeeds, it replaces `folder`.

    Leftovers of killed processes are removed first. On Linux the two folders are exchanged at once, if the file system
    can do that. Elsewhere the old one is moved aside before. If the process is killed between the two moves, it remains
    under another name, and `restore` brings it back.

    Args:
        folder: The folder to write.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    restore(folder)
    clear_leftovers(folder)
    with _temporary(folder) as temporary, _temporary(folder, _OLD) as old:
        temporary.mkdir()
        try:
            yield temporary
            if not _exchanged(temporary, folder):
                if folder.exists():
                    os.replace(folder, old)
                os.replace(temporary, folder)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            for path in (temporary, old):
                shutil.rmtree(path, ignore_errors=True)


def check_writable(folder: Path, key: str) -> None:
    """Checks, before hours of work, that results can be written into a folder, which need not be there yet.

    Args:
        folder: The folder.
        key: The key that gives another one, for the message.

    Raises:
        OSError: If nothing can be written there.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"cannot write what is measured ({error}): give another {key}=") from error


def new_folder(folder: Path) -> Path:
    """Makes a folder that nobody has yet: `folder`, or the same with -2, -3, ... at the end. Returns its path.

    Args:
        folder: The folder.

    Raises:
        OSError: If it cannot be made.
    """
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two paths at once. False, and nothing happens, where the system or the file system cannot do that."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def restore(folder: Path) -> None:
    """Restores a folder that a process killed in `replacing_folder` had moved aside. Does nothing if `folder` exists.

    Args:
        folder: The folder.
    """
    if not folder.exists():
        for path, old in _leftovers(folder):
            if old and path.is_dir():
                with suppress(OSError):  # another process was first, or may, and who reads may not write
                    os.replace(path, folder)
                return


def clear_leftovers(path: Path) -> None:
    """Removes temporary files beside `path` that killed processes left behind.

    Args:
        path: The file or folder that they were writing.
    """
    for leftover, _ in _leftovers(path):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a name has the form of a temporary name of `replacing`, in this version or an earlier one.

    Args:
        name: Name of a file or folder.
    """
    return any(pattern.fullmatch(name) for pattern in (_TEMPORARY, _EARLIER_FILE))


# Machine, process and count; then whether it is the previous content; then the name that it replaces.
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)(-old)?\.(.+)", re.DOTALL)
_EARLIER_FILE = re.compile(r"\.[0-9a-f]{8}\.(.+)", re.DOTALL)
_EARLIER_FOLDER = re.compile(r"\.(.+)\.(\d+)(\.old)?", re.DOTALL)
_OLD = "-old"
_FORGOTTEN_SECONDS = 86_400.0  # a temporary file of an unknown process is a leftover after this time
_COUNT = itertools.count()
_writing: set[str] = set()


@contextmanager
def _temporary(path: Path, kind: str = "") -> Iterator[Path]:
    """Yields a unique path beside `path` for the duration of a write."""
    name = f".{_machine()}-{os.getpid()}-{next(_COUNT)}{kind}.{path.name}"
    _writing.add(name)
    try:
        yield path.with_name(name)
    finally:
        _writing.discard(name)


def _leftovers(path: Path) -> list[tuple[Path, bool]]:
    """Paths that killed processes left beside `path`, and for each whether it is the previous content of `path`."""
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
    except OSError:  # the file was just finished
        return False


def _machine() -> str:
    """8 hex digits of this machine's name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine.

    Args:
        pid: Process id.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ------------------------------------------------------------------------------------------- checksums


class Damaged(SimsearchError, ValueError):
    """The content of a file is not what was written."""


def sha256(path: Path, *spans: tuple[int, int]) -> str:
    """The SHA-256 (hex) of a file or of parts of it.

    Args:
        path: The file.
        spans: Byte ranges start..stop-1, hashed one after another. Without any, the whole file is hashed.
    """
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
    """The SHA-256 of each file, by name. The result is the entry `sha256` in the JSON that describes the folder.

    Args:
        folder: The folder.
        names: Names of files in it.
    """
    return {name: sha256(folder / name) for name in names}


def checked(folder: Path, name: str, about: Mapping[str, Any]) -> Path:
    """The path of a file in a folder, after a comparison with its recorded digest.

    Args:
        folder: The folder.
        name: Name of the file.
        about: The description of the folder. Without an entry `sha256` for the file, nothing is compared.

    Raises:
        Damaged: If the file differs from what was written.
        FileNotFoundError: If the file is missing.
    """
    path, expected = folder / name, about.get("sha256", {}).get(name)
    if expected is not None and sha256(path) != expected:
        raise Damaged(f"{path} is damaged or belongs to another folder: its SHA-256 is not the recorded one")
    return path


def note_change(folder: Path, name: str, about: Mapping[str, Any]) -> None:
    """Prints a note on standard error if a file that users may change differs from its recorded digest.

    Args:
        folder: The folder.
        name: Name of the file.
        about: The description of the folder, with an entry `sha256`.
    """
    try:
        checked(folder, name, about)
    except Damaged:
        print(
            f"note: {folder / name} was changed or damaged since it was written; it is used as it is", file=sys.stderr
        )


def checksum(value: Mapping[str, Any]) -> str:
    """The SHA-256 (hex) of plain values. The order of keys does not matter.

    Args:
        value: The values.
    """
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `value` and its checksum as JSON, atomically.

    Args:
        path: The file to write.
        value: Plain values.
    """
    with replacing(path) as temporary:
        temporary.write_text(to_json(value))


def to_json(value: Mapping[str, Any]) -> str:
    """The text that `write_json` writes.

    Args:
        value: Plain values.
    """
    value = {name: entry for name, entry in value.items() if name != CHECKSUM}
    return json.dumps({**value, CHECKSUM: checksum(value)}, indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The values that `write_json` wrote. A file without a checksum (handmade, or of an older version) is accepted.

    Args:
        path: The file.

    Raises:
        Damaged: If the file holds anything else.
        OSError: If the file cannot be read.
    """
    return from_json(path.read_bytes(), path)


def from_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """The values that `to_json` turned into text. Checks as `read_json` does.

    Args:
        text: The text.
        path: The file that it comes from, for messages.

    Raises:
        Damaged: If the text is anything else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged: its content is not a mapping")
    stated = value.pop(CHECKSUM, None)
    if stated is None and value:  # it stands last, perhaps under a damaged name
        *others, last = value
        lost = value[last] == checksum({name: value[name] for name in others})
    else:
        lost = False
    if lost or (stated is not None and stated != checksum(value)):
        raise Damaged(
            f"{path} is damaged or was changed by hand: make it again, or delete its line {CHECKSUM!r} if the "
            "change was intended"
        )
    return value


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file, followed by the SHA-256 of its values, atomically.

    Args:
        path: The file to write.
        array: The array.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.write(hashlib.sha256(np.ascontiguousarray(array).data).digest())


def read_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """The array that `write_array` wrote.

    Args:
        path: The file.
        dtype: The expected dtype.

    Raises:
        Damaged: If the file holds anything else.
        OSError: If the file cannot be read.
    """
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
    """Compares the entries of a zip file, as torch.save writes them, with their CRC-32. Returns the path.

    torch.load does not do this. A file that does not start like a zip file is not checked.

    Args:
        path: The file.

    Raises:
        Damaged: If an entry differs from what was written.
        OSError: If the file cannot be read.
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
        rows: The rows, one cell per column.
        exact: Write the text unchanged, for a table that a program reads back. By default, text that a spreadsheet
            would interpret as a formula is made harmless (`simsearch.text.csv_cell`).
    """
    with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        _write_rows(file, header, rows, exact=exact)


def to_csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """The text that `write_csv` writes.

    Args:
        header: The names of the columns.
        rows: The rows, one cell per column.
    """
    file = io.StringIO()
    _write_rows(file, header, rows, exact=False)
    return file.getvalue()


def _write_rows(file: TextIO, header: Sequence[str], rows: Iterable[Iterable[Any]], *, exact: bool) -> None:
    table = itertools.chain([header], rows)
    csv.writer(file, lineterminator="\n").writerows(table if exact else (map(csv_cell, row) for row in table))


def json_line(value: Any) -> str:
    """`value` as JSON on one line.

    Values that JSON cannot express are replaced: NaN and infinity by null, a date by its text.

    Args:
        value: The value.
    """
    return json.dumps(_plain(value), allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
