"""A content-addressed store of large arrays on disk, computed once and shared by all jobs."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from simsearch.files import read_json, write_json

_SAVE_BYTES, _SAVE_SECONDS = 2**25, 10.0  # saving is a disk write: after so much or so long

Fill = Callable[[np.ndarray, int], Iterator[int]]


def cache_key(parts: Mapping[str, object]) -> str:
    """32 hex digits of a SHA-256 over the parts as sorted JSON.

    Args:
        parts: Plain values.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class ArrayCache:
    """Arrays that are stored under a hash of everything they were computed from.

    An entry is a folder `<key>/` with array.npy and meta.json, which holds the digests of its blocks of rows. While it
    is being computed, it is named `<key>.partial/`. One job holds its lock; other jobs wait and then read the result.
    If a job is killed, its rows remain, and the next job continues after them. When an entry is opened, all rows are
    compared with their digests (at 1 GB per second and core); a damaged entry is computed again.

    Args:
        root: Folder of the cache. It is created when needed.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()

    def __contains__(self, parts: Mapping[str, object]) -> bool:
        return (self.root / cache_key(parts) / "meta.json").is_file()

    def get(self, parts: Mapping[str, object], shape: tuple[int, ...], dtype: str, fill: Fill) -> np.ndarray:
        """The entry of `parts`, as a read-only memory map.

        Args:
            parts: Plain values that name everything the rows depend on.
            shape: Shape of the array.
            dtype: dtype of the array.
            fill: Called as fill(array, start) if there is no finished entry. It writes the rows from `start` on, and
                yields the number of finished rows after each block.

        Raises:
            OSError: If the disk cannot hold the entry.
        """
        entry = self.root / cache_key(parts)
        if (found := self._open(entry, shape, dtype)) is not None:
            return found
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"cannot make the cache folder {self.root} ({error}): set SIMSEARCH_CACHE to another"
            ) from error
        with _told_of_the_disk(self.root), _locked(entry):
            if (found := self._open(entry, shape, dtype)) is not None:
                return found
            if entry.exists():
                print(f"the cache entry {entry} is damaged or has another shape: computing it again", file=sys.stderr)
                shutil.rmtree(entry)  # where that fails, its place could not be taken after the work
            self._fill(entry, dict(parts), shape, dtype, fill)
        found = self._open(entry, shape, dtype)
        assert found is not None
        return found

    @staticmethod
    def _open(entry: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
        """The array of a finished entry. None if there is none, or if the array is damaged."""
        if not (entry / "meta.json").is_file():
            return None
        try:
            blocks = read_json(entry / "meta.json").get("blocks")
            array = np.load(entry / "array.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if array.shape != shape or array.dtype != np.dtype(dtype):
            return None
        sound = blocks is None or _sound_rows(array, blocks) == len(array)  # an older version's has no digests
        return array if sound else None

    def _fill(self, entry: Path, parts: dict[str, object], shape: tuple[int, ...], dtype: str, fill: Fill) -> None:
        partial = entry.with_name(f"{entry.name}.partial")
        path, progress = partial / "array.npy", partial / "progress.json"
        array, blocks = None, []
        if progress.is_file():
            try:
                array = np.load(path, mmap_mode="r+", allow_pickle=False)
                blocks = read_json(progress)["blocks"]
            except (OSError, ValueError, EOFError, KeyError):
                array = None
        if array is not None and array.shape == shape and array.dtype == np.dtype(dtype):
            sound = _sound_rows(array, blocks)
            blocks = [block for block in blocks if block[0] <= sound]
        else:
            array = None  # an open file would keep its folder on NFS
            if partial.exists():
                shutil.rmtree(partial)
            need = int(np.prod(shape)) * np.dtype(dtype).itemsize
            free = shutil.disk_usage(self.root).free
            if need > free:
                raise OSError(
                    f"the descriptor cache {self.root} needs {need / 2**30:.1f} GiB and its disk has "
                    f"{free / 2**30:.1f} GiB free: put the cache on a larger disk (SIMSEARCH_CACHE) or "
                    "do without one"
                )
            partial.mkdir(parents=True)
            array, blocks = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape), []
        try:
            _reserve(path)
        except OSError:
            if not blocks:
                del array
                shutil.rmtree(partial)
            raise
        start = saved = blocks[-1][0] if blocks else 0
        last = time.monotonic()
        for done in fill(array, start) if start < shape[0] else ():
            due = (done - saved) * array[:1].nbytes >= _SAVE_BYTES or time.monotonic() - last > _SAVE_SECONDS
            if due or done == shape[0]:
                array.flush()
                blocks.append([done, _sha256(array[saved:done])])
                write_json(progress, {"blocks": blocks})
                saved, last = done, time.monotonic()
        if saved != shape[0]:
            raise RuntimeError(f"{shape[0]} rows were announced to the cache, but {saved} came")
        del array
        write_json(partial / "meta.json", {"parts": parts, "shape": shape, "dtype": dtype, "blocks": blocks})
        os.replace(partial, entry)
        (entry / progress.name).unlink(missing_ok=True)


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """Holds the lock of an entry inside the block."""
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print("waiting for another job that computes the same cache entry", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _told_of_the_disk(root: Path) -> Iterator[None]:
    """Inside the block, an error about a full disk or a missing permission says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(
                f"cannot write to the cache {root}, which may be another user's ({error}): set SIMSEARCH_CACHE to a "
                "folder of your own"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk of the cache {root} is full ({error.strerror}): make room, put the cache on a larger disk "
            "(SIMSEARCH_CACHE) or do without one"
        ) from error


def _reserve(path: Path) -> None:
    """Reserves disk space for a whole memory-mapped file. Otherwise a full disk would kill the process at a page write.

    Raises OSError if the disk is full. Does nothing if the system cannot reserve space.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise


def _sound_rows(array: np.ndarray, blocks: Sequence[tuple[int, str]]) -> int:
    """The number of leading rows that are undamaged. `blocks` holds the end and the digest of each block."""
    starts = [0, *(stop for stop, _ in blocks)]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda start, block: _sha256(array[start : block[0]]), starts, blocks)
        sound = [digest == known for digest, (_, known) in zip(found, blocks, strict=True)]
    return starts[(*sound, False).index(False)]


def _sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.data).hexdigest()
