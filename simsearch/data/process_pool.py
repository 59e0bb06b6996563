"""Runs functions on untrusted items in processes that can be ended, with limits of time and memory for each item."""

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

SECONDS, MEMORY = 30.0, 2 * 2**30  # limits for an image in the commands; the worst valid ones take 1.5 GiB

_AHEAD = 8  # items queued for a process, so that it works on while results wait
_WINDOW = 256  # items that may be finished before a slow one; their results wait in memory
_TICK = 0.1  # seconds between checks of the time that items have taken, since processes do not report their start
_START_SECONDS = 120.0  # time for a process to start
_IDLE, _STARTING = -1.0, -2.0
_FORKS = sys.platform == "linux"


@dataclass(frozen=True)
class Failure:
    """An item without a result.

    Attributes:
        reason: "too-slow" or "crashed".
        detail: What happened, for a message.
    """

    reason: str
    detail: str


class Closed(Exception):
    """The pool was closed before the call had a result."""


def bounded_map(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, seconds: float, memory: int
) -> Iterator[R | Failure]:
    """function(item) for each item, in order, or a Failure if that took too long or ended its process, twice.

    A second time, since an item is not to blame for a disk that stalls, a machine that is suspended, or memory that
    others took.

    Args:
        function: The function.
        items: The items.
        workers: Number of processes. Each works a few items ahead of the consumer.
        seconds: Wall-clock limit for an item. After it the process is killed, and another continues with the next item.
        memory: Bytes that a process may allocate beyond its memory at the start. Beyond them allocation fails in
            `function`, on systems that have such limits.

    Raises:
        ValueError: If a number is not positive.
        Exception: Any exception of `function`.
    """
    for name, value in (("workers", workers), ("seconds", seconds), ("memory", memory)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    # Forked, since a killed process is then replaced quickly.
    context: Any = multiprocessing.get_context("fork" if _FORKS else "spawn")
    todo, again, failed = enumerate(items), deque[tuple[int, T]](), set[int]()
    results: dict[int, R | Failure] = {}
    given, asked = 0, 0  # results returned, items taken from the input
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
        # A fork inherits our ends of all pipes. While it keeps them open, other processes do not notice that we ended.
        return _Worker(context, function, memory, [worker.connection for worker in pool] if _FORKS else None)

    try:
        while True:
            while len(pool) < workers and (item := next_item()):  # no more processes than there is work
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
                        blamed, failure = worker.blamed(), worker.end(seconds, late=alive)
                        if blamed[0] in failed:
                            results[blamed[0]] = failure
                            worker.items.remove(blamed)
                        failed.add(blamed[0])
                        again.extend(worker.items)
                    pool[place] = start()
            while given in results:
                given += 1
                yield results.pop(given - 1)
    finally:
        for worker in pool:
            worker.end(seconds, late=False)


class BoundedPool:
    """Processes that call functions for any number of threads, each call with limits of time and memory.

    Processes are forked on demand from a clean server process that has only imported `modules`, since this process may
    have many threads and much memory.

    Args:
        workers: Number of processes.
        seconds: Wall-clock limit for a call.
        memory: Bytes that a process may allocate beyond its memory at the start.
        modules: Modules that the server process imports.
    """

    def __init__(self, workers: int, *, seconds: float, memory: int, modules: Sequence[str] = ()) -> None:
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *modules])
        forkserver.ensure_running()
        self._seconds, self._memory = seconds, memory
        self._free: queue.LifoQueue[_Worker[Any] | None] = queue.LifoQueue()  # None: a process that is not started yet
        for _ in range(workers):
            self._free.put(None)
        self._lock = threading.Lock()
        self._all: set[_Worker[Any]] = set()
        self._closed = False

    def call(
        self, function: Callable[..., R], *arguments: Any, spent: Callable[[float], object] | None = None
    ) -> R | Failure:
        """function(*arguments), or a Failure if that took too long or ended its process.

        Args:
            function: A function of a module, which is found by its name.
            spent: A function that gets the seconds that the call took, whatever its outcome. None for no such function.
            arguments: Arguments of the function.

        Raises:
            Closed: If the pool is closed.
            Exception: Any exception of the function.
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
        """Kills the processes, even during calls."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.process.kill()


def _apply(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    function, arguments = call
    return function(*arguments)


class _Worker(Generic[T]):
    """A process and its items. `inherited` are connections that a fork has and must close, None without a fork."""

    def __init__(
        self, context: Any, function: Callable[[T], Any], memory: int, inherited: Sequence[Connection] | None
    ) -> None:
        self.connection, other = context.Pipe()
        ours = () if inherited is None else (self.connection, *inherited)
        # Number and start time of the current item. Results of earlier items may not have arrived here yet.
        self.begun = context.RawArray("d", (_STARTING, time.monotonic()))
        arguments = (function, other, self.begun, memory, ours)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()  # this may wait for the process that it is forked from
        if self.begun[0] == _STARTING:
            self.begun[1] = time.monotonic()
        other.close()
        self.items: deque[tuple[int, T]] = deque()
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self.items)

    def give(self, item: tuple[int, T]) -> None:
        self.items.append(item)
        with suppress(OSError):  # the process is dead, and `collect` will find that
            self.connection.send(item)

    def collect(self, results: dict[int, Any]) -> bool:
        """Takes the available results. False if the process is dead. Raises the function's exception."""
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
        """Seconds that the current item may still take, all of `seconds` if there is no current item."""
        number, since = self.begun
        if number == _IDLE or number != self.begun[0]:
            return seconds
        return since + (_START_SECONDS if number == _STARTING else seconds) - time.monotonic()

    def seconds(self) -> float:
        """Seconds that the current item has taken so far, or else the last finished one."""
        number, since = self.begun
        return self._seconds if number < 0 else time.monotonic() - since

    def blamed(self) -> tuple[int, T]:
        """The current item, or the first one if there is no current item."""
        return next((item for item in self.items if item[0] == self.begun[0]), self.items[0])

    def end(self, seconds: float, late: bool) -> Failure:
        """Kills the process, and returns the Failure of its item."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        if late:
            return Failure("too-slow", f"it took more than {seconds:g} s")
        return Failure("crashed", f"decoding it crashed the process ({_ending(self.process.exitcode)})")


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
    os._exit(1)  # even in the middle of an item


def _send(connection: Connection, done: queue.SimpleQueue[memoryview]) -> None:
    with suppress(OSError):  # the parent is gone
        while True:
            connection.send_bytes(done.get())


def _limit_memory(memory: int) -> None:
    """Limits the address space of this process to its present size plus `memory` bytes, if /proc shows that size."""
    path = Path("/proc/self/statm")
    if path.is_file():
        now = int(path.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = now + memory if hard == resource.RLIM_INFINITY else min(now + memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
