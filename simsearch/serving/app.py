"""The HTTP API and the web page: routes from requests to catalogs and back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import simsearch
from simsearch.functional.regions import read_region
from simsearch.images import ImageError
from simsearch.search.stores.store import StoreError
from simsearch.serving.documentation import POLICY, documentation
from simsearch.serving.guard import JSON_BYTES, Guard
from simsearch.serving.library import Library, Loaded
from simsearch.serving.limits import Busy, Limits
from simsearch.serving.messages import (
    Example,
    Explained,
    Filter,
    Filters,
    Name,
    Problem,
    Reply,
    Search,
    SearchImage,
    Some,
)
from simsearch.serving.service import GONE, VIEW_SIDE, ZOOM_SIDE, Given, Refusal, Service, check_version, conditions
from simsearch.serving.uploads import status_of

log = logging.getLogger("simsearch.serving")
PAGE = Path(__file__).parent / "page"
_IMMUTABLE = "public, max-age=31536000, immutable"
_PROBLEMS = {
    400: "the request cannot be read",
    403: "the server does not answer requests for this host name or from this page",
    404: "there is no such catalog, item or upload",
    408: "the request did not arrive in time",
    409: "it is for another version of the catalog: `version` is the current one, `items` says where its items are now",
    413: "the request is too large",
    415: "the file is not an image in a supported format",
    422: "a value is missing, unknown or not allowed",
    429: "too many requests from this client: try again after `retry-after` seconds",
    500: "the server failed",
    503: "too many requests are waiting: try again after `retry-after` seconds",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses with these statuses for the API's description. All have the same form.

    Args:
        statuses: HTTP statuses.
    """
    return {status: {"model": Problem, "description": _PROBLEMS[status]} for status in statuses}


_ASKED = problems(404, 422, 503)
_SENT = problems(404, 408, 409, 413, 422, 503)
_CURRENT = problems(409)
_UPLOADED = _SENT | problems(415)


async def leased(request: Request, c: str) -> AsyncIterator[Loaded]:
    """The catalog that an address names. It is held until the response is sent."""
    library: Library = request.app.state.service.library
    with library.lease(c) as loaded:
        if loaded is None:
            names = ", ".join(other.name for other in library.catalogs)
            raise HTTPException(404, f"no catalog {c!r}: there are {names}")
        yield loaded


def asked_item(
    id: Annotated[Name | None, Query(description="the item's id or path")] = None,
    position: Annotated[int | None, Query(ge=0, description="its position in this version of the catalog")] = None,
) -> Example:
    """The item that an address names.

    Args:
        id: The item's id or path.
        position: Its position in this version of the catalog.

    Raises:
        HTTPException: 422 unless exactly one of the two is given.
    """
    if (id is None) == (position is None):
        raise HTTPException(422, "give the item either by id= (its id or path) or by position=")
    return Example(id=id, position=position)


_FILTERS = TypeAdapter(Filters)


def read_filters(text: str) -> list[Filter]:
    """Conditions in the form of JSON.

    Args:
        text: The JSON.

    Raises:
        RequestValidationError: If the text does not hold conditions.
    """
    try:
        return _FILTERS.validate_json(text)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**one, "loc": ("query", "filters", *one["loc"])} for one in wrong]) from None


Catalog = Annotated[Loaded, Depends(leased)]
Item = Annotated[Example, Depends(asked_item)]
Version = Annotated[str, Query(max_length=64, description="the version of the catalog that the request is for")]


def cached(request: Request, etag: str, cache: str) -> Response | None:
    """A response 304 if the client already has this version, else None.

    Args:
        request: The request.
        etag: The version.
        cache: The value of Cache-Control.
    """
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known or "*" in known:
        return Response(status_code=304, headers={"etag": etag, "cache-control": cache})
    return None


def media_type(data: bytes) -> str:
    """The media type of an image file's bytes.

    Args:
        data: The bytes.
    """
    return "image/png" if data.startswith(b"\x89PNG") else "image/webp" if data[8:12] == b"WEBP" else "image/jpeg"


def create_app(
    library: Library,
    limits: Limits,
    *,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
    proxies: int = 0,
    uploads_folder: Path | None = None,
) -> FastAPI:
    """The application that serves a library.

    Args:
        library: The catalogs.
        limits: The limits of the server.
        hosts: As in `Guard`.
        origins: As in `Guard`.
        proxies: As in `Guard`.
        uploads_folder: As in `Service`.
    """
    service = Service(library, limits, uploads_folder)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.watch())
        yield
        watching.cancel()
        service.close()

    app = FastAPI(
        title="simsearch",
        version=simsearch.__version__,
        description="Finds similar images in one or more catalogs.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=Reply,
        responses=problems(400, 403, 429, 500),
    )
    app.state.service = service
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
                           allow_headers=["content-type"], expose_headers=["retry-after"])  # fmt: skip
    app.add_middleware(Guard, limits=limits, hosts=hosts, origins=origins, proxies=proxies)
    _handle_errors(app)

    @app.get("/api/health", tags=["server"])
    async def health() -> Reply:
        """The state of the server, and what it has loaded."""
        catalogs = {
            loaded.name: {"items": len(loaded.catalog), "loaded": loaded.since, "version": loaded.version}
            | ({"error": library.problems[loaded.name]} if loaded.name in library.problems else {})
            for loaded in library.catalogs
        }
        return Reply({"status": "ok", "uptime_s": service.uptime, "queue": service.pending, "catalogs": catalogs})

    @app.get("/api/catalogs", tags=["catalogs"])
    async def catalogs() -> Reply:
        """The catalogs: their size, parts, attributes and calibration."""
        return Reply([_about(loaded) for loaded in library.catalogs])

    @app.get("/api/catalogs/{c}/values", tags=["catalogs"], responses=_ASKED | _CURRENT)
    async def values(
        request: Request,
        loaded: Catalog,
        attribute: str,
        prefix: Annotated[str, Query(max_length=200)] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        v: Version = "",
    ) -> Response:
        """The values of an attribute with their number of items, most frequent first."""
        check_version(loaded, v)
        etag = f'"{loaded.version}"'
        if known := cached(request, etag, "no-cache"):
            return known
        try:
            found = await service.reading.run(lambda: loaded.listing.values(attribute, prefix, limit))
        except KeyError:
            names = ", ".join(a.name for a in loaded.listing.attributes)
            raise HTTPException(422, f"no attribute {attribute!r}: there are {names}") from None
        return Reply(found, headers={"etag": etag, "cache-control": "no-cache"})

    @app.get("/api/catalogs/{c}/items", tags=["items"], responses=_ASKED | _CURRENT)
    async def items(
        request: Request,
        loaded: Catalog,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=500)] = 60,
        text: Annotated[str, Query(max_length=200)] = "",
        where: Annotated[str, Query(max_length=2000)] = "",
        filters: Annotated[str, Query(max_length=JSON_BYTES, description="JSON, as in search")] = "[]",
        seed: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
        v: Version = "",
    ) -> Response:
        """A page of the items whose title or artist has all words of `text` and that pass `where` and `filters`."""
        check_version(loaded, v)
        etag = f'"{loaded.version}"'
        if known := cached(request, etag, "no-cache"):
            return known

        chosen = conditions(where, read_filters(filters))

        def read() -> dict[str, Any]:
            total, positions = loaded.listing.page(text=text, where=chosen, seed=seed, offset=offset, limit=limit)
            return {"total": total, "items": loaded.describe(positions)}

        try:
            found = await service.reading.run(read)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        return Reply(found, headers={"etag": etag, "cache-control": "no-cache"})

    @app.get("/api/catalogs/{c}/item", tags=["items"], responses=_ASKED | _CURRENT)
    async def item(loaded: Catalog, item: Item, v: Version = "") -> Reply:
        """An item's attributes and shape."""
        check_version(loaded, v, [item])
        at = service.item(item, loaded)
        return Reply((await service.reading.run(lambda: loaded.describe([at])))[0])

    @app.post("/api/catalogs/{c}/items", tags=["items"], responses=_SENT)
    async def some_items(loaded: Catalog, wanted: Some, v: Version = "") -> Reply:
        """The attributes and shapes of the items with these ids, in their order, and the ids that no item has."""
        check_version(loaded, v, [Example(id=name) for name in wanted.ids])

        def read() -> dict[str, Any]:
            found = {name: service.position(Example(id=name), loaded) for name in dict.fromkeys(wanted.ids)}
            known = [position for position in found.values() if position is not None]
            missing = [name for name, position in found.items() if position is None]
            return {"items": loaded.describe(known), "missing": missing}

        return Reply(await service.reading.run(read))

    @app.get("/api/catalogs/{c}/thumbnail", tags=["items"], responses=_ASKED | _CURRENT, response_class=Response)
    async def thumbnail(request: Request, loaded: Catalog, item: Item, v: Version = "") -> Response:
        """A small image of an item. With v=<version of the catalog> clients may cache it permanently."""
        if item.position is not None:  # a name is the same item's in any version
            check_version(loaded, v, [item])
        at, etag = service.item(item, loaded), f'"{loaded.version}"'
        cache = _IMMUTABLE if v == loaded.version else "no-cache"
        if known := cached(request, etag, cache):
            return known
        data = await service.reading.run(lambda: loaded.thumbnails[at])
        return Response(data, media_type=media_type(data), headers={"etag": etag, "cache-control": cache})

    @app.get("/api/catalogs/{c}/image", tags=["items"], responses=_ASKED | _CURRENT, response_class=Response)
    async def image(
        request: Request,
        loaded: Catalog,
        item: Item,
        side: Annotated[int, Query(ge=1, le=ZOOM_SIDE, description="longest side in pixels, at most")] = VIEW_SIDE,
        v: Version = "",
    ) -> Response:
        """An item's image at up to `side` pixels if the image root is known, else its thumbnail."""
        if item.position is not None:  # a name is the same item's in any version
            check_version(loaded, v, [item])
        at, etag = service.item(item, loaded), f'"{loaded.version}"'
        cache = _IMMUTABLE if v == loaded.version else "no-cache"
        if known := cached(request, etag, cache):
            return known

        data = await service.reading.run(lambda: loaded.original(at))
        if data is not None:
            with contextlib.suppress(ImageError):
                shown = await service.picture(data, side)
                return Response(shown, media_type=media_type(shown), headers={"etag": etag, "cache-control": cache})
        # Not to be kept: the file may be there the next time.
        small = await service.reading.run(lambda: loaded.thumbnails[at])
        return Response(small, media_type=media_type(small), headers={"cache-control": "no-cache"})

    @app.post("/api/uploads", tags=["search"], status_code=201, openapi_extra=_FORM, responses=_UPLOADED)
    async def upload(request: Request) -> Reply:
        """Keeps an image for later searches, for a limited time."""
        data = await service.received(request)
        opened, (width, height) = await service.opened(data, library.catalogs[0])
        about = {"upload": await service.keep(opened), "width": width, "height": height}
        return Reply(about | {"expires_s": limits.uploads_kept_seconds}, status_code=201)

    @app.get("/api/uploads/{token}/image", tags=["search"], responses=_ASKED, response_class=Response)
    async def upload_image(token: str) -> Response:
        """An upload at up to 1600 pixels."""
        kept = await service.upload(token)
        if kept is None:
            raise HTTPException(404, GONE)
        data = await service.shown(kept.data)
        return Response(data, media_type=media_type(data), headers={"cache-control": "private, max-age=3600"})

    @app.post("/api/catalogs/{c}/search", tags=["search"], responses=_SENT)
    async def search(loaded: Catalog, wanted: Search, v: Version = "") -> Reply:
        """Items similar to the examples in `like` and dissimilar to those in `unlike`."""
        check_version(loaded, v, [*wanted.like, *wanted.unlike])
        examples = await service.examples([*wanted.like, *wanted.unlike], loaded)
        like, unlike = examples[: len(wanted.like)], examples[len(wanted.like) :]
        return await service.search(loaded, wanted, like, unlike, wanted.filters)

    @app.post("/api/catalogs/{c}/search/image", tags=["search"], openapi_extra=_FORM, responses=_UPLOADED)
    async def search_image(request: Request, loaded: Catalog, wanted: Annotated[SearchImage, Query()]) -> Reply:
        """Items similar to an image, or to the part of it in `region`, in one request."""
        data, region = await service.received(request), read_region(wanted.region or None)
        check_version(loaded, wanted.v)
        opened, _ = await service.opened(data, loaded, region)
        return await service.search(loaded, wanted, [Given(opened, region)])

    @app.post("/api/catalogs/{c}/heatmap", tags=["search"], responses=_SENT)
    async def heatmap(loaded: Catalog, wanted: Explained, v: Version = "") -> Reply:
        """What each region of an item contributes to its score in a search, and each region of one example likewise."""
        check_version(loaded, v, [*wanted.like, *wanted.unlike, Example(id=wanted.id)])
        if not loaded.explains:
            raise HTTPException(422, f"the descriptors of {loaded.name} do not have regions whose scores can be shown")
        return await service.explain(loaded, wanted)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(documentation(app.openapi()), headers={"content-security-policy": POLICY})

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/static", StaticFiles(directory=PAGE, check_dir=False))
    return app


_FILE = {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}, "required": ["file"]}
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FILE}}}}


def _about(loaded: Loaded) -> dict[str, Any]:
    attributes = []
    for a in loaded.listing.attributes:
        about: dict[str, Any] = {"name": a.name, "kind": a.kind, "distinct": a.distinct}
        attributes.append(about | ({"low": a.low, "high": a.high} if a.kind == "number" else {}))
    return {
        "name": loaded.name,
        "version": loaded.version,
        "items": len(loaded.catalog),
        "bytes_per_item": loaded.catalog.about.get("bytes_per_item"),
        "parts": loaded.parts,
        "attributes": attributes,
        "calibration": loaded.catalog.calibration,
        "explains": loaded.explains,
        "verifies": loaded.catalog.verification is not None,
    }


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Reply:
        detail = {404: "there is no such address: see /docs", 405: "this address has no such method: see /docs"}
        plain = detail.get(error.status_code, "") if error.detail in ("Not Found", "Method Not Allowed") else ""
        about = error.about if isinstance(error, Refusal) else {}
        return Reply({"error": plain or error.detail, **about}, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Reply:
        wrong = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"][1:])
            wrong.append(f"{place}: {problem['msg']}" if place else problem["msg"])
        return Reply({"error": "; ".join(wrong)}, status_code=422)

    @app.exception_handler(ImageError)
    async def bad_image(_: Request, error: ImageError) -> Reply:
        about = {"error": f"{error.reason}: {error.detail}", "reason": error.reason}
        return Reply(about, status_code=status_of(error))

    @app.exception_handler(StoreError)
    async def elsewhere(_: Request, error: StoreError) -> Reply:
        log.warning("%s", error)
        problem = "the engine that is searched cannot be reached, or is being brought up to date: try again in a second"
        return Reply({"error": problem}, status_code=503, headers={"retry-after": "1"})

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Reply:
        problem = "too many requests are waiting: try again in a second"
        return Reply({"error": problem}, status_code=503, headers={"retry-after": "1"})
