"""Work on items from strangers in processes that may be ended: bounds on the time and memory of each item."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # items that a process has at a time, so that it need not wait for the next
_WINDOW = 256  # items that may be done before one that takes long: their results wait in memory


@dataclass(frozen=True)
class Failure:
    """An item without a result. reason: "too-slow" or "crashed"."""

    reason: str
    detail: str


def bounded_map(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, seconds: float, memory: int
) -> Iterator[R | Failure]:
    """function(item) of each item, in order, or a Failure where that took too long or ended its process.

    workers: processes. seconds: wall-clock time that an item may take; then its process is killed, and another one
    goes on with the next item. memory: bytes that a process may have beyond what it starts with; beyond them
    allocation fails in `function` (where the system has such limits).

    Raises what `function` raises, and ValueError for workers below 1 and bounds that are not positive.
    """
    for name, value in (("workers", workers), ("seconds", seconds), ("memory", memory)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    todo, again = enumerate(items), deque[tuple[int, T]]()
    results: dict[int, R | Failure] = {}
    given, asked = 0, 0  # results given out, items asked for
    pool: list[_Worker[T]] = []

    def next_item() -> tuple[int, T] | None:
        nonlocal asked
        if again:
            return again.popleft()
        if asked >= given + _WINDOW or (found := next(todo, None)) is None:
            return None
        asked += 1
        return found

    try:
        for _ in range(workers):
            pool.append(_Worker(function, memory, pool))
        while True:
            for worker in pool:
                while len(worker.items) < _AHEAD and (item := next_item()):
                    worker.give(item)
            busy = [worker for worker in pool if worker.items]
            if not busy:
                return
            left = min(worker.since for worker in busy) + seconds - time.monotonic()
            wait([worker.connection for worker in busy], timeout=max(0.0, left))
            for place, worker in enumerate(pool):
                dead = not worker.collect(results)
                late = worker.items and time.monotonic() - worker.since > seconds
                if dead or late:
                    worker.end()
                    if worker.items:
                        number, _ = worker.items.popleft()
                        code = worker.process.exitcode
                        results[number] = (
                            Failure("crashed", f"its decoding ended the process ({_ending(code)})")
                            if dead
                            else Failure("too-slow", f"it took more than {seconds:g} s")
                        )
                        again.extend(worker.items)
                    pool[place] = _Worker(function, memory, pool)
            while given in results:
                given += 1
                yield results.pop(given - 1)
    finally:
        for worker in pool:
            worker.end()


class _Worker(Generic[T]):
    """A process and the items that it has, the first being worked on since `since`."""

    def __init__(self, function: Callable[[T], Any], memory: int, pool: Iterable[_Worker[T]]) -> None:
        # Forked, since one that was killed is replaced in no time.
        forks = sys.platform == "linux"
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        self.connection, other = context.Pipe()
        # A fork has our ends of all pipes, and while it keeps them open nobody notices that we are gone.
        ours = [self.connection, *(worker.connection for worker in pool)] if forks else []
        self.process = context.Process(target=_serve, args=(function, other, memory, ours), daemon=True)
        self.process.start()
        other.close()
        self.items: deque[tuple[int, T]] = deque()
        self.since = time.monotonic()

    def give(self, item: tuple[int, T]) -> None:
        if not self.items:
            self.since = time.monotonic()
        self.items.append(item)
        with suppress(OSError):  # it is dead, which `collect` finds
            self.connection.send(item)

    def collect(self, results: dict[int, Any]) -> bool:
        """Takes the results that are there. False where the process is dead. Raises what the function raised."""
        try:
            while self.connection.poll():
                number, result = self.connection.recv()
                if isinstance(result, BaseException):
                    raise result
                results[number] = result
                self.items.popleft()
                self.since = time.monotonic()
        except (EOFError, ConnectionError):
            return False
        return True

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(
    function: Callable[[Any], Any], connection: Connection, memory: int, inherited: Iterable[Connection]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    _limit_memory(memory)
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            number, item = connection.recv()
            try:
                result = function(item)
            except Exception as error:
                result = error
            connection.send((number, result))


def _limit_memory(memory: int) -> None:
    """Bounds this process's address space to what it is now and `memory` bytes more, where /proc tells what it is."""
    path = Path("/proc/self/statm")
    if path.is_file():
        now = int(path.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = now + memory if hard == resource.RLIM_INFINITY else min(now + memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
