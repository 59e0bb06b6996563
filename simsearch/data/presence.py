"""Detects images that disappear while a command runs, as when a network folder drops out.

A single deleted file is recorded as missing, and the command continues. If its whole folder or many files disappear,
nothing is recorded: the command ends, and can be continued when they are back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from simsearch.errors import SimsearchError
from simsearch.images import ImageError
from simsearch.text import printable

MOST_GONE = 0.1  # fraction of the images that may disappear one by one, and of its items that a catalog may lose
_VANISHING = ("missing", "unreadable")  # the reasons of simsearch.images.REASONS that a lost folder causes
_STATS = 1000  # files whose sizes one thread looks up in a row


class Vanished(SimsearchError, ValueError):
    """Images that existed when the command began have disappeared."""


class Presence:
    """The files that existed when a command began, and how many of them have disappeared.

    Args:
        root: The folder.
        paths: N paths below the root.
        sizes: Sizes of the files in bytes, int64 (N,), -1 if a file does not exist. None looks them up now.
    """

    def __init__(self, root: Path, paths: Sequence[str], sizes: np.ndarray | None = None) -> None:
        sizes = file_sizes(root, paths) if sizes is None else sizes
        self.root, self._identity = root, _identity(root)
        self._never = {paths[row] for row in np.flatnonzero(sizes < 0).tolist()}
        self.seen = len(paths) - len(self._never)
        self._gone = 0

    def check(self, path: str, reason: str) -> None:
        """Records why a file could not be used.

        Args:
            path: The file, as in `paths`.
            reason: A key of simsearch.images.REASONS.

        Raises:
            Vanished: If the folder of the file or too many files have disappeared.
        """
        if not self._was_there(path, reason):
            return
        lost = self._lost(path)
        self._gone += reason == "missing" or _is_readable(self.root / path)
        if lost or self._gone > MOST_GONE * self.seen:
            raise Vanished(
                f"images have disappeared since this began (the last is {printable(path)}): check that "
                f"{self.root} is still connected, and give the same command again when they are back"
            )

    def note(self, errors: Iterable[ValueError]) -> None:
        """Calls `check` for each ImageError of a file below the root.

        Args:
            errors: The errors.

        Raises:
            Vanished: As `check` does.
        """
        for error in errors:
            if isinstance(error, ImageError) and error.path is not None:
                self.check(error.path.relative_to(self.root).as_posix(), error.reason)

    def is_back(self, path: str, reason: str) -> bool:
        """Whether a file that an earlier command could not use can be read now.

        Args:
            path: The file, as in `paths`.
            reason: The reason of the earlier command.
        """
        return self._was_there(path, reason) and _is_readable(self.root / path)

    def _was_there(self, path: str, reason: str) -> bool:
        return reason in _VANISHING and path not in self._never

    def _lost(self, path: str) -> bool:
        """Whether the root is another folder than before, or the file's own folder is gone or empty."""
        if self._identity is None or _identity(self.root) != self._identity:
            return True
        try:
            with os.scandir((self.root / path).parent) as entries:
                return next(entries, None) is None
        except OSError:
            return True


def file_sizes(root: Path, paths: Sequence[str]) -> np.ndarray:
    """Bytes of each file, int64 (N,), -1 if it does not exist. Threads look them up, since a network folder is slow.

    Args:
        root: The folder.
        paths: N paths below the root.
    """

    def sizes(start: int) -> Iterable[int]:
        return [_size(root / path) for path in paths[start : start + _STATS]]

    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(sizes, range(0, len(paths), _STATS)))
    return np.array([size for part in parts for size in part], dtype=np.int64)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder, which differ for a folder that takes its place. None if there is no folder."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_readable(path: Path) -> bool:
    try:
        if not path.is_file():  # opening a pipe would wait
            return False
        with path.open("rb") as file:
            file.read(1)
    except (OSError, ValueError):
        return False
    return True
