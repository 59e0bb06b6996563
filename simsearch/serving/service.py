"""State and steps that the routes share: uploads, threads, and the way from an image or item to an answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor

from simsearch.data.process_pool import MEMORY, BoundedPool, Closed, Failure
from simsearch.functional.feedback import query_weights, reweight
from simsearch.functional.resize import resize_to_fit
from simsearch.images import ImageError, decode_thumbnail
from simsearch.search.filters import Condition, parse_filters
from simsearch.search.names import POSITION
from simsearch.search.request import Recommendation
from simsearch.search.request import Request as Wish
from simsearch.serving.library import Library, Loaded
from simsearch.serving.limits import Account, Busy, Limits, Pool, account
from simsearch.serving.messages import Example, Explained, Filter, Reply, Wanted
from simsearch.serving.uploads import Upload, Uploads, decoded, viewable
from simsearch.types import parts_of

log = logging.getLogger("simsearch.serving")

T = TypeVar("T")

POLL_SECONDS = 2.0
VIEW_SIDE = 1600
GONE = "there is no such upload, or it has expired: send the image again"


class Refusal(HTTPException):
    """An error response with further fields.

    Args:
        status: HTTP status.
        detail: The message.
        about: Further fields of `Problem`.
    """

    def __init__(self, status: int, detail: str, about: Mapping[str, Any]) -> None:
        super().__init__(status, detail)
        self.about = about


def conditions(where: str, filters: Sequence[Filter]) -> tuple[Condition, ...]:
    """The conditions in a text and in data.

    Args:
        where: Conditions as text.
        filters: Conditions as data.

    Raises:
        HTTPException: 422 if a condition is invalid.
    """
    try:
        return (*parse_filters(where), *(one.condition() for one in filters))
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def name_of(example: Example) -> str:
    """The id or `position:` of an example that is an item of the catalog.

    Args:
        example: The example.
    """
    return f"{POSITION}{example.position}" if example.id is None else example.id


def check_version(loaded: Loaded, version: str, asked: Sequence[Example] = ()) -> None:
    """Checks that a request was made for the current version of a catalog.

    Args:
        loaded: The catalog.
        version: The version that the request names.
        asked: The examples of the request.

    Raises:
        Refusal: 409 if it was made for another version. The response says where its items are now.
    """
    if version and version != loaded.version:
        try:
            items = {name_of(one): loaded.now(one.id, one.position, version) for one in asked if one.upload is None}
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        problem = f"the catalog {loaded.name} was replaced by a new version: repeat the request"
        raise Refusal(409, problem, {"version": loaded.version, "items": items})


class _Form(MultiPartParser):
    spool_max_size = 2**40  # in memory: the guard bounds the request


class Service:
    """State that the routes share.

    Args:
        library: The catalogs.
        limits: The limits of the server.
    """

    def __init__(self, library: Library, limits: Limits) -> None:
        self.library, self.limits = library, limits
        self.uploads = Uploads(limits.uploads, limits.uploads_bytes, limits.uploads_kept_seconds)
        self.decoding = Pool("decode", limits.threads, limits.queue)
        self._decoders = BoundedPool(
            limits.threads, seconds=limits.decode_seconds, memory=MEMORY, modules=["simsearch.serving.uploads"]
        )
        self.searching = Pool("search", limits.threads, limits.queue)
        self.reading = Pool("read", 2 * limits.threads, 4 * limits.queue)  # of what pages show by the dozen
        self._receiving = 0
        self._started = time.monotonic()

    @property
    def pending(self) -> int:
        """The number of jobs and calls that wait."""
        pools = (self.decoding, self.searching, self.reading)
        return self.library.pending + sum(pool.pending for pool in pools)

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._started, 1)

    async def watch(self) -> None:
        """Reloads catalogs whose folders change, until the server ends."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                before = dict(self.library.problems)
                for name in await asyncio.to_thread(self.library.refresh):
                    log.info("catalog %s was replaced by the new one in its folder", name)
                for name, problem in self.library.problems.items():
                    if before.get(name) != problem:
                        log.warning("catalog %s stays as it was, since the new one cannot be opened: %s", name, problem)
            except Exception:
                log.exception("the check for new catalogs failed")

    def stop_decoding(self) -> None:
        """Stops all decoding at once. Its requests get the response that the server is ending."""
        self._decoders.close()

    def close(self) -> None:
        """Ends threads and processes, and closes the library."""
        self.stop_decoding()
        for pool in (self.decoding, self.searching, self.reading):
            pool.close()
        self.library.close()

    async def received(self, request: Request) -> bytes:
        """The file in the field `file` of a request's form.

        Args:
            request: The request.

        Raises:
            HTTPException: If the form has no such file, cannot be read, or is too large.
            Busy: If too many requests are waiting.
        """
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "send the image as multipart/form-data in the field file")
        if self._receiving >= self.limits.queue:
            raise Busy
        self._receiving += 1
        try:
            form = await _Form(request.headers, request.stream(), max_files=1, max_fields=8).parse()
            file = form.get("file")
            if file is None or isinstance(file, str):
                raise HTTPException(422, "the form's field file does not hold a file")
            data = await file.read(self.limits.max_upload_bytes + 1)
            await form.close()
        except (MultiPartException, KeyError) as error:
            raise HTTPException(400, f"the form cannot be read: {getattr(error, 'message', error)}") from None
        finally:
            self._receiving -= 1
        if len(data) > self.limits.max_upload_bytes:
            raise HTTPException(413, f"the image exceeds {self.limits.max_upload_bytes / 1e6:g} MB: send a smaller one")
        return data

    async def decode(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of function(*arguments) in a process with a time limit. The client pays for the time.

        Args:
            function: The function.
            arguments: Its arguments.

        Raises:
            ImageError: If the image cannot be used.
            Busy: If too many calls are waiting.
            HTTPException: 429 if the client's other images have taken too long meanwhile.
        """
        payer = account.get(Account(None, "", 0.0))

        def call() -> T | Failure:
            payer.check()
            return self._decoders.call(function, *arguments, spent=payer.charge)

        try:
            found = await self.decoding.run(call)
        except Closed:
            raise HTTPException(503, "the server is shutting down: try again shortly", {"retry-after": "5"}) from None
        if isinstance(found, Failure):
            raise ImageError(None, found.reason, found.detail)
        return found

    async def opened(self, data: bytes, loaded: Loaded) -> Upload:
        """An upload, decoded at the size and fit of the catalog's encoder.

        Args:
            data: Bytes of an image file.
            loaded: The catalog.
        """
        size, fit = loaded.worker.size, loaded.worker.fit
        pixels, (width, height) = await self.decode(decoded, data, size, fit, self.limits.max_pixels)
        return Upload(data, width, height, pixels={(size, fit): torch.from_numpy(pixels)})

    async def pixels(self, upload: Upload, loaded: Loaded) -> Tensor:
        """The pixels of an upload at the size and fit of the catalog's encoder.

        Args:
            upload: The upload.
            loaded: The catalog.
        """
        size, fit = loaded.worker.size, loaded.worker.fit
        if (size, fit) not in upload.pixels:
            pixels, _ = await self.decode(decoded, upload.data, size, fit, self.limits.max_pixels)
            upload.pixels[size, fit] = torch.from_numpy(pixels)
        return upload.pixels[size, fit]

    async def shown(self, data: bytes) -> bytes:
        """An image file as pages show it, at up to 1600 pixels.

        Args:
            data: Bytes of an image file.

        Raises:
            ImageError: If the image cannot be used.
        """
        return await self.decode(viewable, data, VIEW_SIDE, self.limits.max_pixels)

    async def described(self, upload: Upload, loaded: Loaded) -> Tensor:
        """The descriptor (D,) of an upload by the catalog's encoder.

        Args:
            upload: The upload.
            loaded: The catalog.
        """
        fingerprint = loaded.catalog.about["encoder_fingerprint"]
        if fingerprint not in upload.descriptors:
            pixels = await self.pixels(upload, loaded)
            try:
                upload.descriptors[fingerprint] = await asyncio.wrap_future(loaded.worker.describe(pixels))
            except ValueError as error:  # no finite descriptor
                raise HTTPException(422, str(error)) from None
        return upload.descriptors[fingerprint]

    async def vectors(self, examples: Sequence[Upload | int], loaded: Loaded) -> Tensor:
        """The descriptors (M, D) of uploads and items, in order.

        Args:
            examples: Uploads, and positions of items.
            loaded: The catalog.
        """
        uploads = [one for one in examples if not isinstance(one, int)]
        ids = [one for one in examples if isinstance(one, int)]
        own = iter(await asyncio.gather(*(self.described(upload, loaded) for upload in uploads)))
        stored = iter(await self.searching.run(lambda: loaded.engine.vectors(ids)) if ids else ())
        return torch.stack([next(stored) if isinstance(one, int) else next(own) for one in examples])

    def examples(self, asked: Sequence[Example], loaded: Loaded) -> list[Upload | int]:
        """The uploads and the positions of items that a message names.

        Args:
            asked: The examples of the message.
            loaded: The catalog.

        Raises:
            Refusal: 404 if some do not exist. The response names them.
        """
        found = [self._example(one, loaded) for one in asked]
        if missing := [one for one, there in zip(asked, found, strict=True) if there is None]:
            problem = GONE if missing[0].upload is not None else f"no item {name_of(missing[0])!r} in {loaded.name}"
            raise Refusal(404, problem, {"missing": [one.model_dump(exclude_none=True) for one in missing]})
        return [one for one in found if one is not None]

    def _example(self, example: Example, loaded: Loaded) -> Upload | int | None:
        if example.upload is not None:
            return self.uploads.get(example.upload)
        if example.position is not None:
            return example.position if example.position < len(loaded.catalog) else None
        try:
            return loaded.engine.names.find(name_of(example))
        except ValueError as error:  # several items
            raise HTTPException(422, str(error)) from None

    def item(self, example: Example, loaded: Loaded) -> int:
        """The position of the item that a message names. Raises as `examples` does.

        Args:
            example: The example.
            loaded: The catalog.
        """
        (found,) = self.examples([example], loaded)
        assert isinstance(found, int)
        return found

    async def search(
        self,
        loaded: Loaded,
        wanted: Wanted,
        like: Sequence[Upload | int],
        unlike: Sequence[Upload | int] = (),
        filters: Sequence[Filter] = (),
    ) -> Reply:
        """The answer to a search by uploads and items of the catalog.

        Args:
            loaded: The catalog.
            wanted: The settings of the search.
            like: Examples: uploads, and positions of items.
            unlike: Counter-examples, in the same form.
            filters: Conditions as data.

        Raises:
            HTTPException: 422 if a setting does not fit the catalog.
        """
        where = conditions(wanted.where, filters)
        encoding = time.perf_counter()
        examples = await self.vectors([*like, *unlike], loaded)
        ids = [one for one in like if isinstance(one, int)]
        began = time.perf_counter()

        def answer() -> tuple[Recommendation, list[dict[str, Any]], list[dict[str, str]]]:
            wish = Wish(
                like=examples[: len(like)],
                unlike=examples[len(like) :] if unlike else None,
                k=wanted.k,
                weights=wanted.weights,
                where=where,
                diversity=wanted.diversity,
                collapse=wanted.collapse,
                hubness=wanted.hubness,
                exclude=tuple(one for one in (*like, *unlike) if isinstance(one, int)),
            )
            found = loaded.engine.recommend(wish)
            positions = found.ids.tolist()
            shared = loaded.engine.shared(positions, ids)
            return found, loaded.describe(positions), shared

        try:
            found, items, shared = await self.searching.run(answer)
        except ValueError as error:  # a filter, weights or a part that there is not
            raise HTTPException(422, str(error)) from None
        parts = {name: values.tolist() for name, values in found.parts.items()}
        results = [
            {
                **item,
                "rank": rank + 1,
                "score": round(float(found.scores[rank]), 6),
                "verdict": found.verdicts[rank],
                "parts": {name: round(values[rank], 6) for name, values in parts.items()},
                "shared": shared[rank],
            }
            for rank, item in enumerate(items)
        ]
        spent = {"encode": began - encoding, "search": time.perf_counter() - began}
        milliseconds = {name: round(1e3 * seconds, 2) for name, seconds in spent.items()}
        return Reply(
            {
                "verdict": found.verdict,
                "results": results,
                "milliseconds": milliseconds,
                "total_candidates": found.candidates,
                "version": loaded.version,
            }
        )

    async def stored_pixels(self, item: int, loaded: Loaded) -> Tensor:
        """An item's pixels at the size and fit of the encoder.

        They come from its file if the root is known, else its thumbnail.

        Args:
            item: Position of the item.
            loaded: The catalog.
        """
        size, fit = loaded.worker.size, loaded.worker.fit
        data = await self.reading.run(lambda: loaded.original(item))
        if data is not None:
            with contextlib.suppress(ImageError):
                return torch.from_numpy((await self.decode(decoded, data, size, fit, self.limits.max_pixels))[0])
        return await self.reading.run(lambda: resize_to_fit(decode_thumbnail(loaded.thumbnails[item]), size, fit))

    async def explain(self, loaded: Loaded, wanted: Explained) -> Reply:
        """The contribution of each region of an item to its score in a search, and that of each region of one example.

        The score is the one that `search` gives the item, for all examples and counter-examples together.

        Args:
            loaded: The catalog.
            wanted: The request.

        Raises:
            HTTPException: 422 if `shown` is not a place in `like`, or if a setting does not fit the catalog.
        """
        if wanted.shown >= len(wanted.like):
            raise HTTPException(422, f"shown must be a position from 0 in like, which has {len(wanted.like)} images")
        item = self.item(Example(id=wanted.id), loaded)
        examples = self.examples([*wanted.like, *wanted.unlike], loaded)
        likes = len(wanted.like)
        vectors = await self.vectors([*examples, item], loaded)
        chosen = examples[wanted.shown]
        pixels = await (self.stored_pixels(chosen, loaded) if isinstance(chosen, int) else self.pixels(chosen, loaded))
        shown = await self.stored_pixels(item, loaded)
        parts, stored = parts_of(loaded.worker.encoder), vectors[-1]
        unlike = vectors[likes:-1] if wanted.unlike else None
        try:
            query = loaded.engine.query(Wish(like=vectors[:likes], unlike=unlike, weights=wanted.weights))
            by_item = reweight(stored, parts, query_weights(parts, wanted.weights))
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

        def maps(encoder: Any) -> tuple[Any, Any]:
            return encoder.heat_map(pixels, by_item), encoder.heat_map(shown, query)

        of_query, of_item = await asyncio.wrap_future(loaded.worker.call(maps))

        def plain(heat: Any) -> dict[str, Any]:
            height, width = heat.values.shape
            rows = [[round(value, 8) for value in row] for row in heat.values.tolist()]
            return {"height": height, "width": width, "values": rows, "rest": round(float(heat.rest), 8)}

        answer = {"query": plain(of_query), "item": plain(of_item)}
        score = min(1.0, max(-1.0, float(query @ stored)))
        return Reply(answer | {"score": round(score, 6), "rest": answer["item"]["rest"]})
