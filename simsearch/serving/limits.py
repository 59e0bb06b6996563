"""How much a client, and all clients together, may ask of the server."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import TypeVar

from starlette.exceptions import HTTPException

Answer = TypeVar("Answer")

_CLIENTS = 10_000  # whose buckets are remembered
_ADDRESS_WITH_PORT = re.compile(r"\[(.+)\](?::\d+)?|([\d.]+):\d+")


@dataclass(frozen=True)
class Limits:
    """What the server accepts. Raises ValueError for a limit below what makes sense.

    max_upload_bytes: of one image file. max_pixels: of one image, by its header. upload_seconds: to receive a
    request in full. uploads, uploads_bytes: images that are kept for later searches, the longest unused go first;
    uploads_kept_seconds: since their last use. rate: requests a second of one client in the long run, None for any
    number; burst: how many it may send at once. A client pays too for what its images take to decode: a second costs as
    much as `rate` requests. queue: images that wait for an encoder, and as many for each pool of threads; what comes
    then is told to come back. batch_size, batch_wait_ms: most images that an encoder describes at once, and how long
    the first waits for others. threads: processes that decode, and as many threads that search. decode_seconds: that an
    image may take, then its process is ended. connections: open at a time.
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
    decode_seconds: float = 10.0
    connections: int = 1000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = {"batch_wait_ms": 0}.get(field.name, 1)
            if field.name == "rate":
                if value is not None and not 0 < value < math.inf:
                    raise ValueError(f"limits.rate must be positive, or null for no limit, got {value}")
            elif not least <= value < math.inf:
                raise ValueError(f"limits.{field.name} must be at least {least} and finite, got {value}")


class Busy(Exception):
    """A queue is full: the client should come back in a moment."""


class TokenBuckets:
    """Allows each client `burst` requests at once, and `rate` a second in the long run. For any number of threads."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self._burst, self._clock = rate, float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when there were so many
        self._lock = threading.Lock()

    def take(self, client: str, cost: float) -> float:
        """0 where the client may go on, else in how many seconds it may."""
        with self._lock:
            tokens = self._tokens(client)
            wait = max(0.0, (cost - tokens) / self.rate)
            self._put(client, tokens if wait else tokens - cost)
        return wait

    def charge(self, client: str, cost: float) -> None:
        """Takes tokens for what has been done already, into debt where there are none."""
        with self._lock:
            self._put(client, self._tokens(client) - cost)

    def _tokens(self, client: str) -> float:
        now = self._clock()
        tokens, then = self._buckets.get(client, (self._burst, now))
        return min(self._burst, tokens + (now - then) * self.rate)

    def _put(self, client: str, tokens: float) -> None:
        self._buckets[client] = (tokens, self._clock())
        self._buckets.move_to_end(client)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)


class Account:
    """What one request takes of its client's bucket; nothing where `buckets` is None."""

    def __init__(self, buckets: TokenBuckets | None, client: str, price: float) -> None:
        self._buckets, self._client, self._price = buckets, client, price

    def pay(self) -> None:
        """Takes the price of the request. Raises HTTPException 429 where the client has to wait."""
        self._take(self._price)

    def check(self) -> None:
        """Raises HTTPException 429 where the client is in debt by what its other requests have taken since."""
        self._take(0.0)

    def charge(self, seconds: float) -> None:
        """Takes what `seconds` of decoding cost beyond the price of the request: the requests of that time."""
        if self._buckets is not None:
            cost = seconds * self._buckets.rate
            paid = min(cost, self._price)
            self._price -= paid
            self._buckets.charge(self._client, cost - paid)

    def _take(self, cost: float) -> None:
        if self._buckets is not None and (wait := self._buckets.take(self._client, cost)):
            seconds = math.ceil(wait)
            problem = f"too many requests from {self._client}: come back in {seconds} s"
            raise HTTPException(429, problem, headers={"retry-after": str(seconds)})


# Of the request that is being answered.
account: ContextVar[Account] = ContextVar("account")


def client_address(peer: str, forwarded: Sequence[str], proxies: int) -> str:
    """Whom a request is counted for: the peer, or behind `proxies` trusted ones whom the first of them named.

    forwarded: all X-Forwarded-For of the request, of which everything further left may be invented. An IPv6 client has
    a whole /64, unless it is one of IPv4 that came to a socket of both.
    """
    # Not uvicorn's proxy_headers: it knows proxies by their addresses, not by their number. Where those are unknown it
    # has to trust all, and then believes the leftmost name, which clients invent.
    named = [part.strip() for line in forwarded for part in line.split(",")]
    given = named[-proxies] if 0 < proxies <= len(named) else peer
    if match := _ADDRESS_WITH_PORT.fullmatch(given):
        given = match[1] or match[2]
    try:
        address = ipaddress.ip_address(given)
    except ValueError:
        return peer
    if address.version == 6 and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
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
