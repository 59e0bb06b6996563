"""Middleware in front of the application: access, limits, timeouts, response headers and the log."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import re
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simsearch.serving.limits import Account, Limits, TokenBuckets, account, client_address

log = logging.getLogger("simsearch.serving")

JSON_BYTES = 2**16  # of a request's body that is no upload
_FORM_BYTES = 2**14  # what a form adds to its file
_DRAINED = 4  # times the limit is read at most
_DRAIN_SECONDS = 2.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_GONE = 499  # the status in logs for a client that left before its answer
# A name or an address, and perhaps a port: nothing else may stand in Host (RFC 3986, section 3.2).
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._~-]+))(?::\d{0,5})?", re.IGNORECASE | re.ASCII)
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]+)/?", re.ASCII)
_PORTS = {"http": ":80", "https": ":443"}  # browsers leave them out
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # The page's files too: a browser that guesses how long they hold mixes those of two releases.
    "cache-control": "no-cache",
}


def is_loopback(host: str) -> bool:
    """Whether a server bound to this host is reachable from its own machine only.

    Args:
        host: Host name or address.
    """
    return host in LOOPBACK


class Guard:
    """Middleware that rejects requests beyond `limits` and pages of other origins. HEAD is GET without a body.

    Args:
        app: The application.
        limits: The limits of the server.
        hosts: Accepted names in the Host header. None accepts all. A server on the user's own machine must check them;
            otherwise any web page could reach it under a name of its own (DNS rebinding).
        origins: Origins of foreign pages that may send requests and read the answers, such as https://art.example.
        proxies: Number of trusted proxies in front of the server that append to X-Forwarded-For.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        hosts: Sequence[str] | None = None,
        origins: Sequence[str] = (),
        proxies: int = 0,
    ) -> None:
        self.app, self._limits, self._origins, self._proxies = app, limits, origins, proxies
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._buckets = None if limits.rate is None else TokenBuckets(limits.rate, limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        peer = scope["client"][0] if scope.get("client") else "?"
        client = client_address(peer, headers.getlist("x-forwarded-for"), self._proxies)
        bare = scope["method"] == "HEAD"
        origin = headers.get("origin", "")
        own = Account(self._buckets, client, cost(scope["method"], scope["path"]))
        account.set(own)
        body = self._body(scope, headers, receive)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    given.setdefault(name, value)
                if origin in self._origins:  # its page has to read refusals too, which CORSMiddleware does not see
                    given.setdefault("access-control-allow-origin", origin)
                    given.setdefault("access-control-expose-headers", "retry-after")
                    given.setdefault("vary", "Origin")
                if not body.complete:  # else the server would go on reading what may have no end
                    given["connection"] = "close"
            elif bare:
                message = {**message, "body": b""}
            await send(message)

        try:
            try:
                self._check(scope, headers)
                if scope["method"] != "OPTIONS":  # which browsers send on their own: no page sees its refusal
                    own.pay()
            except HTTPException as refusal:
                await body.drain(self._limits.max_upload_bytes)
                await _reply(answer, refusal)
            else:
                await self.app({**scope, "method": "GET"} if bare else scope, body.receive, answer)
        except ClientDisconnect:  # in the middle of its request
            status = status or _GONE
        except Exception:
            log.exception("%s %s failed", scope["method"], _target(scope))
            if status:  # the answer has begun: all that is left is to break it off
                raise
            problem = "the server failed on this request: its log says why"
            await _reply(answer, HTTPException(500, problem))
        finally:
            spent = 1e3 * (time.perf_counter() - started)
            log.info("%s %s %s %d %.0f ms", client, scope["method"], _target(scope), status, spent)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises HTTPException if the host name is not accepted, or if a page of a foreign origin sends the request."""
        # Not Starlette's TrustedHostMiddleware: it reads the first Host alone, says neither which name it refuses nor
        # what to do, and older releases take [::1]:8000 for the name "[".
        given = headers.getlist("host")
        host = given[0] if given else ""
        name = host_name(host)
        if len(given) > 1 or (host and name is None):
            raise HTTPException(400, "the header Host must name exactly one host, such as localhost:8000")
        if self._hosts is not None and name not in self._hosts:
            raise HTTPException(
                403, f"this server does not answer to the name {name or ''!r}: start it with allow_hosts=[...]"
            )
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            own = origin is None or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
            elsewhere = not own or (origin is None and headers.get("sec-fetch-site") == "cross-site")
            if elsewhere and origin not in self._origins:
                raise HTTPException(
                    403,
                    f"pages of {origin or 'another site'} may not use this server: start it with allow_origins=[...]",
                )

    def _body(self, scope: Scope, headers: Headers, receive: Receive) -> _Body:
        limits, path = self._limits, scope["path"]
        if path == "/api/uploads" or path.endswith("/search/image"):
            most, what = (
                limits.max_upload_bytes + _FORM_BYTES,
                f"an image of at most {limits.max_upload_bytes / 1e6:g} MB",
            )
        else:
            most, what = JSON_BYTES, "less"
        return _Body(receive, headers, most, limits.upload_seconds, what)


class _Body:
    """A request body. At most `most` bytes are passed on, all within `seconds`.

    Raises HTTPException 413 and 408. `complete` is True once the body has been read to its end.
    """

    def __init__(self, receive: Receive, headers: Headers, most: int, seconds: float, what: str) -> None:
        self.complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        self._receive, self._most, self._seconds, self._what = receive, most, seconds, what
        self._deadline = time.monotonic() + seconds
        self._count = 0

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()
        message = await self._part()
        if self._count > self._most:
            await self.drain(_DRAINED * self._most)
            raise HTTPException(413, f"the request is larger than {self._most:,} bytes: send {self._what}")
        return message

    async def drain(self, most: int) -> None:
        """Discards up to `most` bytes that arrive soon. Browsers show no response if the connection breaks off."""
        self._deadline = min(self._deadline, time.monotonic() + _DRAIN_SECONDS)
        with contextlib.suppress(HTTPException):
            while not self.complete and self._count <= most:
                await self._part()

    async def _part(self) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            problem = f"the request did not arrive within {self._seconds:g} s: send it again"
            raise HTTPException(408, problem) from None
        self._count += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        return message


def cost(method: str, path: str) -> float:
    """The number of tokens that a request costs: few for what a page loads by the dozen, 0 for what costs nothing.

    The decoding time of images is charged in addition (`Account.charge`), but for a catalog's own on the page.

    Args:
        method: HTTP method.
        path: Path of the request.
    """
    if not path.startswith("/api/") or path == "/api/health" or method == "OPTIONS":
        return 0.0
    shown = method in ("GET", "HEAD")
    if shown and path.endswith("/thumbnail"):
        return 0.1
    return 0.25 if shown and path.endswith("/image") else 1.0


def host_name(host: str) -> str | None:
    """The lower-case name or address in a Host header, without its port. None if the header is malformed.

    Args:
        host: The header's value.
    """
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else None


def read_host(text: str) -> str:
    """A host name or address of a setting, as `host_name` returns it.

    Args:
        text: The name or address; an IPv6 address may stand in brackets.

    Raises:
        ValueError: If no Host header can have this name.
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text.strip("[]")))
    name = host_name(text)
    if name is None or name != text.lower():
        without = "" if name is None else f": write {name}, without a port"
        raise ValueError(f"{text!r} is not the name of a host, such as art.example{without}")
    return name


def read_origin(text: str) -> str:
    """An origin of a setting, as browsers write it: lower case, without a usual port or a slash at its end.

    Args:
        text: The origin.

    Raises:
        ValueError: If no page can have this origin.
    """
    found = _ORIGIN.fullmatch(text.lower())
    if found is None or host_name(found[2]) is None:
        raise ValueError(f"{text!r} is not the origin of a site, such as https://art.example")
    return f"{found[1]}://{found[2].removesuffix(_PORTS.get(found[1], ':')).removesuffix(':')}"


def _target(scope: Scope) -> str:
    """The path as it was sent. It is percent-encoded, so that it cannot break a line of the log."""
    raw = scope.get("raw_path") or scope["path"].encode()
    return ascii(raw[:200].decode("latin-1"))[1:-1]


async def _reply(send: Send, error: HTTPException) -> None:
    body = json.dumps({"error": error.detail}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(error.headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
