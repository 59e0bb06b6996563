"""How much a client, and all clients together, may ask of the server."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TypeVar

Answer = TypeVar("Answer")

_CLIENTS = 10_000  # whose buckets are remembered


@dataclass(frozen=True)
class Limits:
    """What the server accepts. Raises ValueError for a limit below what makes sense.

    max_upload_bytes: of one image file. max_pixels: of one image, by its header. upload_seconds: to receive a
    request in full. uploads, uploads_bytes: images that are kept for later searches, the longest unused go first;
    uploads_kept_seconds: since their last use. rate: requests a second of one client in the long run, None for any
    number; burst: how many it may send at once. queue: images that wait for an encoder, and as many for each pool
    of threads; what comes then is told to come back. batch_size, batch_wait_ms: most images that an encoder
    describes at once, and how long the first waits for others. threads: that decode, and as many that search.
    connections: open at a time.
    """

    max_upload_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    upload_seconds: float = 60.0
    uploads: int = 500
    uploads_bytes: int = 512_000_000
    uploads_kept_seconds: float = 3600.0
    rate: float | None = 20.0
    burst: int = 60
    queue: int = 64
    batch_size: int = 16
    batch_wait_ms: float = 4.0
    threads: int = 2
    connections: int = 1000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = {"batch_wait_ms": 0}.get(field.name, 1)
            if field.name == "rate":
                if value is not None and value <= 0:
                    raise ValueError(f"limits.rate must be positive, or null for no limit, got {value}")
            elif value < least:
                raise ValueError(f"limits.{field.name} must be at least {least}, got {value}")


class Busy(Exception):
    """A queue is full: the client should come back in a moment."""


class TokenBuckets:
    """Allows each client `burst` requests at once, and `rate` a second in the long run."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when there were so many

    def take(self, client: str, cost: float) -> float:
        """0 where the client may go on, else in how many seconds it may."""
        now = self._clock()
        tokens, then = self._buckets.pop(client, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        wait = max(0.0, (cost - tokens) / self._rate)
        self._buckets[client] = (tokens if wait else tokens - cost, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return wait


def client_address(peer: str, forwarded: str, proxies: int) -> str:
    """Whom a request is counted for: the peer, or behind `proxies` trusted ones whom the first of them named.

    forwarded: X-Forwarded-For, of which everything further left may be invented. An IPv6 client has a whole /64.
    """
    named = [part.strip() for part in forwarded.split(",")] if forwarded else []
    given = named[-proxies] if 0 < proxies <= len(named) else peer
    try:
        address = ipaddress.ip_address(given)
    except ValueError:
        return peer
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Pool:
    """Threads for what would hold up the event loop; at most `queue` calls wait for one."""

    def __init__(self, name: str, threads: int, queue: int) -> None:
        self._threads, self._most = ThreadPoolExecutor(threads, thread_name_prefix=name), threads + queue
        self._lock = threading.Lock()
        self._pending = 0

    @property
    def pending(self) -> int:
        return self._pending

    async def run(self, call: Callable[[], Answer]) -> Answer:
        """What `call` returns. Raises Busy where too many wait already, and what the call raises."""
        with self._lock:
            if self._pending >= self._most:
                raise Busy
            self._pending += 1
        future = self._threads.submit(call)
        future.add_done_callback(self._done)  # also when whoever waits for it has gone
        return await asyncio.wrap_future(future)

    def _done(self, _: object) -> None:
        with self._lock:
            self._pending -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
