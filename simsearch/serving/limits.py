"""Limits on the requests of one client and of all clients together."""

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
    """The limits of the server.

    Attributes:
        max_upload_bytes: Largest size of one image file, in bytes.
        max_pixels: Largest number of pixels of one image, by its header.
        upload_seconds: Time to receive a whole request, in seconds.
        uploads: Largest number of images that are kept for later searches. The least recently used go first.
        uploads_bytes: Largest total size of these images, in bytes.
        uploads_kept_seconds: How long an upload is kept after its last use, in seconds.
        rate: Requests per second of one client in the long run. None sets no limit. Decoding is charged too: one second
            of it costs as much as `rate` requests. A work's picture at the size of the page has a fixed price.
        burst: Number of requests that a client may send at once.
        queue: Number of images that may wait for an encoder, and of calls that may wait for each thread pool. Further
            requests are asked to come back later.
        batch_size: Largest number of images per forward pass.
        batch_wait_ms: How long the first image of a batch waits for others, in milliseconds.
        threads: Number of processes that decode images, and number of threads that search.
        decode_seconds: Time to decode one image, in seconds. Then its process is terminated.
        connections: Largest number of open connections.

    Raises:
        ValueError: If a limit is below its smallest useful value.
    """

    max_upload_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    upload_seconds: float = 60.0
    uploads: int = 500
    uploads_bytes: int = 512_000_000
    uploads_kept_seconds: float = 604_800.0
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
    """A queue is full. The client should retry in a moment."""


class TokenBuckets:
    """Allows each client `burst` requests at once, and `rate` per second in the long run. Thread-safe.

    Args:
        rate: Tokens per second.
        burst: Capacity of a client's bucket, in tokens.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self._burst, self._clock = rate, float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and the time of that balance
        self._lock = threading.Lock()

    def take(self, client: str, cost: float) -> float:
        """Takes tokens. 0 if the client may proceed, else the number of seconds until it may.

        Args:
            client: Name of the client.
            cost: Number of tokens.
        """
        with self._lock:
            tokens = self._tokens(client)
            wait = max(0.0, (cost - tokens) / self.rate)
            self._put(client, tokens if wait else tokens - cost)
        return wait

    def charge(self, client: str, cost: float) -> None:
        """Takes tokens for work that has been done already. The balance may become negative.

        Args:
            client: Name of the client.
            cost: Number of tokens.
        """
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
    """Charges one request to its client's bucket.

    Args:
        buckets: The buckets. None charges nothing.
        client: Name of the client.
        price: Price of the request, in tokens.
    """

    def __init__(self, buckets: TokenBuckets | None, client: str, price: float) -> None:
        self._buckets, self._client, self._price = buckets, client, price

    def pay(self) -> None:
        """Charges the price of the request.

        Raises:
            HTTPException: 429 if the client has to wait.
        """
        self._take(self._price)

    def check(self) -> None:
        """Checks that the client's other requests have not put it into debt meanwhile.

        Raises:
            HTTPException: 429 if they have.
        """
        self._take(0.0)

    def charge(self, seconds: float) -> None:
        """Charges decoding time beyond the price of the request, at `rate` requests per second.

        Args:
            seconds: Decoding time.
        """
        if self._buckets is not None:
            cost = seconds * self._buckets.rate
            paid = min(cost, self._price)
            self._price -= paid
            self._buckets.charge(self._client, cost - paid)

    def _take(self, cost: float) -> None:
        if self._buckets is not None and (wait := self._buckets.take(self._client, cost)):
            seconds = math.ceil(wait)
            problem = f"too many requests from {self._client}: try again in {seconds} s"
            raise HTTPException(429, problem, headers={"retry-after": str(seconds)})


# Of the request that is being answered.
account: ContextVar[Account] = ContextVar("account")


def client_address(peer: str, forwarded: Sequence[str], proxies: int) -> str:
    """The client that a request is charged to.

    This is the peer or, behind trusted proxies, the address that the first of them named.

    An IPv6 client stands for its whole /64, unless its address is an IPv4 address on a dual-stack socket.

    Args:
        peer: Address of the peer.
        forwarded: All X-Forwarded-For headers of the request. Entries further left may be forged.
        proxies: Number of trusted proxies.
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
    """Threads for calls that would block the event loop.

    Args:
        name: Name of the threads.
        threads: Number of threads.
        queue: Largest number of waiting calls.
    """

    def __init__(self, name: str, threads: int, queue: int) -> None:
        self._threads, self._most = ThreadPoolExecutor(threads, thread_name_prefix=name), threads + queue
        self._lock = threading.Lock()
        self._pending = 0

    @property
    def pending(self) -> int:
        """The number of waiting calls."""
        return self._pending

    async def run(self, call: Callable[[], Answer]) -> Answer:
        """The result of a call. Raises what the call raises.

        Args:
            call: The function to run.

        Raises:
            Busy: If too many calls wait already.
        """
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
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
