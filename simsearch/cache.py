"""A content-addressed store of large arrays on disk, computed once and shared by all jobs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock

from simsearch.files import write_json

_SAVE_BYTES = 2**25  # saving is a disk write: every few blocks

Fill = Callable[[np.ndarray, int], Iterator[int]]


def cache_key(parts: Mapping[str, object]) -> str:
    """32 hex digits of a SHA-256 over `parts` as sorted JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class ArrayCache:
    """Arrays by the content of what they were computed from, under `root` (made when needed).

    An entry is a folder `<key>/` with array.npy and meta.json. While it is being computed it is
    `<key>.partial/` and one job holds its lock; others wait and then read the result. A job that
    was killed leaves its rows behind, and the next one goes on after them.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()

    def __contains__(self, parts: Mapping[str, object]) -> bool:
        return (self.root / cache_key(parts) / "meta.json").is_file()

    def get(self, parts: Mapping[str, object], shape: tuple[int, ...], dtype: str, fill: Fill) -> np.ndarray:
        """The entry of `parts`, a read-only memory map of `shape` and `dtype`.

        On a miss `fill(array, start)` writes the rows from `start` on, yielding after each block
        how many rows are done. `parts` must name everything that the rows depend on.

        Raises OSError where the disk cannot hold the entry.
        """
        entry = self.root / cache_key(parts)
        if (found := self._open(entry, shape, dtype)) is not None:
            return found
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if (found := self._open(entry, shape, dtype)) is not None:
                return found
            shutil.rmtree(entry, ignore_errors=True)
            self._fill(entry, dict(parts), shape, dtype, fill)
        found = self._open(entry, shape, dtype)
        assert found is not None
        return found

    @staticmethod
    def _open(entry: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
        """The array of a finished entry, None where there is none or its array is damaged."""
        if not (entry / "meta.json").is_file():
            return None
        try:
            array = np.load(entry / "array.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return array if array.shape == shape and array.dtype == np.dtype(dtype) else None

    def _fill(self, entry: Path, parts: dict[str, object], shape: tuple[int, ...], dtype: str, fill: Fill) -> None:
        partial = entry.with_name(f"{entry.name}.partial")
        path, progress = partial / "array.npy", partial / "progress.json"
        array, start = None, 0
        if progress.is_file():
            try:
                array = np.load(path, mmap_mode="r+", allow_pickle=False)
                start = int(json.loads(progress.read_text())["rows"])
            except (OSError, ValueError, EOFError, KeyError):
                array, start = None, 0
        if array is None or array.shape != shape or array.dtype != np.dtype(dtype):
            shutil.rmtree(partial, ignore_errors=True)
            need = int(np.prod(shape)) * np.dtype(dtype).itemsize
            free = shutil.disk_usage(self.root).free
            if need > free:
                raise OSError(
                    f"the descriptor cache {self.root} needs {need / 2**30:.1f} GiB and its disk has "
                    f"{free / 2**30:.1f} GiB free: put the cache on a larger disk (SIMSEARCH_CACHE) or "
                    "do without one"
                )
            partial.mkdir(parents=True)
            array, start = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape), 0
        saved = start
        for done in fill(array, start) if start < shape[0] else ():
            if (done - saved) * array[:1].nbytes >= _SAVE_BYTES or done == shape[0]:
                array.flush()
                write_json(progress, {"rows": done})
                saved = done
        if saved != shape[0]:
            raise RuntimeError(f"{shape[0]} rows were promised to the cache, {saved} came")
        del array
        write_json(partial / "meta.json", {"parts": parts, "shape": shape, "dtype": dtype})
        os.replace(partial, entry)
        (entry / progress.name).unlink(missing_ok=True)
