"""Work on items from strangers in processes that may be ended: bounds on the time and memory of each item."""

from __future__ import annotations

import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

SECONDS, MEMORY = 30.0, 2 * 2**30  # that an image may take in the commands; the worst honest ones take 1.5 GiB

_AHEAD = 8  # items that a process has at a time: it goes on while their results wait to be taken
_WINDOW = 256  # items that may be done before one that takes long: their results wait in memory
_TICK = 0.1  # seconds after which the time that items have taken is looked at: they begin without a word
_START_SECONDS = 120.0  # until a process is ready
_IDLE, _STARTING = -1.0, -2.0
_FORKS = sys.platform == "linux"


@dataclass(frozen=True)
class Failure:
    """An item without a result. reason: "too-slow" or "crashed"."""

    reason: str
    detail: str


class Closed(Exception):
    """The pool is closed, and the call without a result."""


def bounded_map(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, seconds: float, memory: int
) -> Iterator[R | Failure]:
    """function(item) of each item, in order, or a Failure where that took too long or ended its process.

    workers: processes, each of which works a few items ahead of what is taken. seconds: wall-clock time that an item
    may take; then its process is killed, and another one goes on with the next item. memory: bytes that a process may
    have beyond what it starts with; beyond them allocation fails in `function` (where the system has such limits).

    Raises what `function` raises, and ValueError for workers below 1 and bounds that are not positive.
    """
    for name, value in (("workers", workers), ("seconds", seconds), ("memory", memory)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    # Forked, since one that was killed is replaced in no time.
    context: Any = multiprocessing.get_context("fork" if _FORKS else "spawn")
    todo, again = enumerate(items), deque[tuple[int, T]]()
    results: dict[int, R | Failure] = {}
    given, asked = 0, 0  # results given out, items asked for
    window = max(_WINDOW, 2 * workers * _AHEAD)
    pool: list[_Worker[T]] = []

    def next_item() -> tuple[int, T] | None:
        nonlocal asked
        if again:
            return again.popleft()
        if asked >= given + window or (found := next(todo, None)) is None:
            return None
        asked += 1
        return found

    def start() -> _Worker[T]:
        # A fork has our ends of all pipes, and while it keeps them open nobody notices that we are gone.
        return _Worker(context, function, memory, [worker.connection for worker in pool] if _FORKS else None)

    try:
        while True:
            while len(pool) < workers and (item := next_item()):  # no more of them than there is work
                pool.append(start())
                pool[-1].give(item)
            while pool and len(least := min(pool, key=len)) < _AHEAD and (item := next_item()):
                least.give(item)
            busy = [worker for worker in pool if worker.items]
            if not busy:
                return
            wait([worker.connection for worker in busy], timeout=_TICK)
            for place, worker in enumerate(pool):
                alive = worker.collect(results)
                if not alive or (worker.items and worker.left(seconds) <= 0):
                    if worker.items:
                        blamed = worker.blamed()
                        results[blamed[0]] = worker.end(seconds, late=alive)
                        again.extend(item for item in worker.items if item is not blamed)
                    pool[place] = start()
            while given in results:
                given += 1
                yield results.pop(given - 1)
    finally:
        for worker in pool:
            worker.end(seconds, late=False)


class BoundedPool:
    """Processes that call functions for any number of threads, each call within `seconds` and `memory` bytes.

    They are forked, when they are needed, of a process that has imported `modules` and done nothing else: this one may
    have many threads and much memory.
    """

    def __init__(self, workers: int, *, seconds: float, memory: int, modules: Sequence[str] = ()) -> None:
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *modules])
        forkserver.ensure_running()
        self._seconds, self._memory = seconds, memory
        self._free: queue.LifoQueue[_Worker[Any] | None] = queue.LifoQueue()  # None: one to be started
        for _ in range(workers):
            self._free.put(None)
        self._lock = threading.Lock()
        self._all: set[_Worker[Any]] = set()
        self._closed = False

    def call(
        self, function: Callable[..., R], *arguments: Any, spent: Callable[[float], object] | None = None
    ) -> R | Failure:
        """function(*arguments), or a Failure where that took too long or ended its process.

        The function is one of a module, found by its name. spent: is told the seconds that it took, whatever came of
        it. Raises what the function raises, and Closed.
        """
        worker = self._free.get()
        try:
            worker, results = self._started(worker), dict[int, R]()
            worker.give((0, (function, arguments)))
            alive = True
            while alive and worker.items and worker.left(self._seconds) > 0:
                wait([worker.connection], timeout=_TICK)
                alive = worker.collect(results)
            if self._closed and not results:
                raise Closed
            return results[0] if results else worker.end(self._seconds, late=alive)
        finally:
            if worker is not None and spent is not None:
                spent(worker.seconds())
            if worker is not None and worker.items:
                worker.end(self._seconds, late=False)
                with self._lock:
                    self._all.discard(worker)
                worker = None
            self._free.put(worker)

    def _started(self, worker: _Worker[Any] | None) -> _Worker[Any]:
        with self._lock:
            if self._closed:
                raise Closed
            if worker is None:
                worker = _Worker(self._context, _apply, self._memory, None)
                self._all.add(worker)
            return worker

    def close(self) -> None:
        """Kills the processes, in the middle of calls too."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.process.kill()


def _apply(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    function, arguments = call
    return function(*arguments)


class _Worker(Generic[T]):
    """A process and the items that it has. inherited: connections that a fork has and must not keep; None of none."""

    def __init__(
        self, context: Any, function: Callable[[T], Any], memory: int, inherited: Sequence[Connection] | None
    ) -> None:
        self.connection, other = context.Pipe()
        ours = () if inherited is None else (self.connection, *inherited)
        # The number of the item that is worked on, and since when: what is done may not have arrived here yet.
        self.begun = context.RawArray("d", (_STARTING, time.monotonic()))
        arguments = (function, other, self.begun, memory, ours)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()  # which may wait for what it is forked of
        if self.begun[0] == _STARTING:
            self.begun[1] = time.monotonic()
        other.close()
        self.items: deque[tuple[int, T]] = deque()
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self.items)

    def give(self, item: tuple[int, T]) -> None:
        self.items.append(item)
        with suppress(OSError):  # it is dead, which `collect` finds
            self.connection.send(item)

    def collect(self, results: dict[int, Any]) -> bool:
        """Takes the results that are there. False where the process is dead. Raises what the function raised."""
        while True:
            try:
                if not self.connection.poll():
                    return True
                number, result, raised, self._seconds = self.connection.recv()
            except (EOFError, OSError):
                return False
            self.items.popleft()
            if raised:
                raise result
            results[number] = result

    def left(self, seconds: float) -> float:
        """How long the item that is worked on may still take, all of `seconds` where there is none at the moment."""
        number, since = self.begun
        if number == _IDLE or number != self.begun[0]:
            return seconds
        return since + (_START_SECONDS if number == _STARTING else seconds) - time.monotonic()

    def seconds(self) -> float:
        """What the item that is worked on has taken, else the last one that was done."""
        number, since = self.begun
        return self._seconds if number < 0 else time.monotonic() - since

    def blamed(self) -> tuple[int, T]:
        """The item that is worked on, the first where it is none."""
        return next((item for item in self.items if item[0] == self.begun[0]), self.items[0])

    def end(self, seconds: float, late: bool) -> Failure:
        """Kills the process; what became of its item."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        if late:
            return Failure("too-slow", f"it took more than {seconds:g} s")
        return Failure("crashed", f"its decoding ended the process ({_ending(self.process.exitcode)})")


def _serve(
    function: Callable[[Any], Any], connection: Connection, begun: Any, memory: int, inherited: Iterable[Connection]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    done: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for target, arguments in ((_send, (connection, done)), (_end_with_parent, ())):
        threading.Thread(target=target, args=arguments, daemon=True).start()
    _limit_memory(memory)
    begun[0] = _IDLE
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            number, item = connection.recv()
            begun[1] = time.monotonic()
            begun[0] = number
            try:
                result, raised = function(item), False
            except Exception as error:
                result, raised = error, True
            seconds, begun[0] = time.monotonic() - begun[1], _IDLE
            done.put(ForkingPickler.dumps((number, result, raised, seconds)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)  # in the middle of an item too


def _send(connection: Connection, done: queue.SimpleQueue[memoryview]) -> None:
    with suppress(OSError):  # the parent is gone
        while True:
            connection.send_bytes(done.get())


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
