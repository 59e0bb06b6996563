"""File-based leases on work items, for processes that share only a folder."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from simsearch.files import is_alive

BEAT_SECONDS = 2.0
STALE_SECONDS = 90.0  # more than network file systems keep a file's times for


class Claims:
    """Claims on numbered pieces of work. Inside `with`, held claims are renewed every BEAT_SECONDS.

    A claim avoids duplicate work. It is not a lock: a process that was suspended may lose its claim to another one.
    Therefore a piece must give the same result whoever computes it, and must be written atomically. A claim has expired
    if its process on this machine is gone, or if it was not renewed for STALE_SECONDS by this process's own clock.

    Args:
        folder: The shared folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owner = f"{socket.gethostname()} {os.getpid()}"
        self._held: dict[int, int] = {}
        self._seen: dict[int, tuple[int, float]] = {}  # a claim's time of change, and since when we know it
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        for number in list(self._held):
            self.release(number)

    def take(self, number: int) -> bool:
        """Claims a piece of work. True if this process holds it now: it was free, or its claim had expired.

        Args:
            number: Number of the piece.
        """
        path = self.folder / str(number)
        try:
            with path.open("x") as file:
                file.write(f"{self._owner} 0")
        except FileExistsError:
            if not self._is_dead(number):
                return False
            _write(path, f"{self._owner} 0")
        with self._lock:
            self._held[number] = 0
        return True

    def advance(self, number: int, done: int) -> None:
        """Reports progress on a held piece. The next renewal writes it.

        Args:
            number: Number of the piece.
            done: Number of items of the piece that are done.
        """
        with self._lock:
            self._held[number] = done

    def release(self, number: int) -> None:
        """Releases a held piece.

        Args:
            number: Number of the piece.
        """
        with self._lock:
            (self.folder / str(number)).unlink(missing_ok=True)
            self._held.pop(number, None)  # last: a signal in between leaves it to the end of `with`

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            with self._lock:
                for number, done in self._held.items():
                    _write(self.folder / str(number), f"{self._owner} {done}")

    def _is_dead(self, number: int) -> bool:
        path = self.folder / str(number)
        try:
            owner = path.read_text().rpartition(" ")[0]
            changed = path.stat().st_mtime_ns
        except OSError:  # given back in this moment
            return False
        host, _, pid = owner.rpartition(" ")
        if host == socket.gethostname() and pid.isdigit() and _is_gone(int(pid)):
            return True
        before, since = self._seen.get(number, (None, 0.0))
        if before != changed:
            self._seen[number] = changed, time.monotonic()
            return False
        return time.monotonic() - since > STALE_SECONDS


def claimed(folder: Path) -> dict[int, int]:
    """The claimed numbers, with the number of items reported as done for each.

    Args:
        folder: The shared folder.
    """
    found = {}
    for path in folder.glob("*"):
        try:
            found[int(path.name)] = int(path.read_text().rpartition(" ")[2])
        except (OSError, ValueError):  # given back, or being written in this moment
            continue
    return found


def _write(path: Path, text: str) -> None:
    """Replaces a file's text, which is at no moment empty to who reads it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.write(file, text.encode())
        os.ftruncate(file, len(text.encode()))
    finally:
        os.close(file)


def _is_gone(pid: int) -> bool:
    # This process's own number is then an earlier one's: what is held is not asked for.
    return pid == os.getpid() or not is_alive(pid)
