"""What the routes share: uploads, threads, and how an image or an item becomes an answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor

from simsearch.data.bounded import MEMORY, BoundedPool, Closed, Failure
from simsearch.functional.feedback import query_weights, reweight
from simsearch.functional.resize import resize_to_fit
from simsearch.images import ImageError, decode_thumbnail
from simsearch.models.parts import parts_of
from simsearch.search.filters import parse_filters
from simsearch.search.recommender import Recommendation
from simsearch.search.recommender import Request as Wish
from simsearch.serving.library import Library, Loaded
from simsearch.serving.limits import Account, Busy, Limits, Pool, account
from simsearch.serving.messages import Example, Explained, Reply, Wanted
from simsearch.serving.uploads import Upload, Uploads, decoded, viewable

log = logging.getLogger("simsearch.serving")

T = TypeVar("T")

POLL_SECONDS = 2.0
VIEW_SIDE = 1600
GONE = "this upload has expired or never was: send the image again"


def position(item: int | None, loaded: Loaded) -> int:
    """The position of an item that exists. Raises HTTPException 404."""
    if item is None or not 0 <= item < len(loaded.catalog):
        raise HTTPException(404, f"no item {item} in {loaded.name}: ids go from 0 to {len(loaded.catalog) - 1}")
    return item


class _Form(MultiPartParser):
    spool_max_size = 2**40  # in memory: the guard bounds the request


class Service:
    """What the routes share."""

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
        pools = (self.decoding, self.searching, self.reading)
        return self.library.pending + sum(pool.pending for pool in pools)

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._started, 1)

    async def watch(self) -> None:
        """Exchanges catalogs whose folders change, for as long as the server runs."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                before = dict(self.library.problems)
                for name in await asyncio.to_thread(self.library.refresh):
                    log.info("catalog %s was exchanged for the new one in its folder", name)
                for name, problem in self.library.problems.items():
                    if before.get(name) != problem:
                        log.warning("catalog %s stays as it was, the new one fails: %s", name, problem)
            except Exception:
                log.exception("looking for new catalogs failed")

    def stop_decoding(self) -> None:
        """Ends all decoding at once; its requests are told that the server ends."""
        self._decoders.close()

    def close(self) -> None:
        self.stop_decoding()
        for pool in (self.decoding, self.searching, self.reading):
            pool.close()
        self.library.close()

    async def received(self, request: Request) -> bytes:
        """The file that a request's form holds in the field `file`."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "send the image as multipart/form-data in the field file")
        if self._receiving >= self.limits.queue:
            raise Busy
        self._receiving += 1
        try:
            form = await _Form(request.headers, request.stream(), max_files=1, max_fields=8).parse()
            file = form.get("file")
            if file is None or isinstance(file, str):
                raise HTTPException(422, "the form has no file in its field file")
            data = await file.read(self.limits.max_upload_bytes + 1)
            await form.close()
        except (MultiPartException, KeyError) as error:
            raise HTTPException(400, f"the form cannot be read: {getattr(error, 'message', error)}") from None
        finally:
            self._receiving -= 1
        if len(data) > self.limits.max_upload_bytes:
            raise HTTPException(413, f"the image has more than {self.limits.max_upload_bytes / 1e6:g} MB: send less")
        return data

    async def decode(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments) in a process that is ended where it takes too long; the client pays for the time.

        Raises ImageError, Busy, and HTTPException 429 for a client whose other images have taken too long meanwhile.
        """
        payer = account.get(Account(None, "", 0.0))

        def call() -> T | Failure:
            payer.check()
            return self._decoders.call(function, *arguments, spent=payer.charge)

        try:
            found = await self.decoding.run(call)
        except Closed:
            raise HTTPException(503, "the server is ending: ask again in a moment", {"retry-after": "5"}) from None
        if isinstance(found, Failure):
            raise ImageError(None, found.reason, found.detail)
        return found

    async def opened(self, data: bytes, loaded: Loaded) -> Upload:
        """An upload, decoded as the catalog's encoder sees it."""
        size, fit = loaded.worker.size, loaded.worker.fit
        pixels, (width, height) = await self.decode(decoded, data, size, fit, self.limits.max_pixels)
        return Upload(data, width, height, pixels={(size, fit): torch.from_numpy(pixels)})

    async def pixels(self, upload: Upload, loaded: Loaded) -> Tensor:
        """The pixels of an upload as the catalog's encoder sees them."""
        size, fit = loaded.worker.size, loaded.worker.fit
        if (size, fit) not in upload.pixels:
            pixels, _ = await self.decode(decoded, upload.data, size, fit, self.limits.max_pixels)
            upload.pixels[size, fit] = torch.from_numpy(pixels)
        return upload.pixels[size, fit]

    async def shown(self, data: bytes) -> bytes:
        """An image file as pages show it, at up to 1600 pixels. Raises ImageError."""
        return await self.decode(viewable, data, VIEW_SIDE, self.limits.max_pixels)

    async def described(self, upload: Upload, loaded: Loaded) -> Tensor:
        """The descriptor (D,) of an upload by the catalog's encoder."""
        fingerprint = loaded.catalog.about["encoder_fingerprint"]
        if fingerprint not in upload.descriptors:
            pixels = await self.pixels(upload, loaded)
            try:
                upload.descriptors[fingerprint] = await asyncio.wrap_future(loaded.worker.describe(pixels))
            except ValueError as error:  # no finite descriptor
                raise HTTPException(422, str(error)) from None
        return upload.descriptors[fingerprint]

    async def vectors(self, examples: Sequence[Upload | int], loaded: Loaded) -> Tensor:
        """The descriptors (M, D) of uploads and items, in order."""
        uploads = [one for one in examples if not isinstance(one, int)]
        ids = [one for one in examples if isinstance(one, int)]
        own = iter(await asyncio.gather(*(self.described(upload, loaded) for upload in uploads)))
        stored = iter(await self.searching.run(lambda: loaded.recommender.vectors(ids)) if ids else ())
        return torch.stack([next(stored) if isinstance(one, int) else next(own) for one in examples])

    def example(self, example: Example, loaded: Loaded) -> Upload | int:
        """The upload or item that a message names. Raises HTTPException 404 where there is none."""
        if example.upload is None:
            return position(example.id, loaded)
        upload = self.uploads.get(example.upload)
        if upload is None:
            raise HTTPException(404, GONE)
        return upload

    async def search(
        self, loaded: Loaded, wanted: Wanted, like: Sequence[Upload | int], unlike: Sequence[Upload | int] = ()
    ) -> Reply:
        """The answer to a search by uploads and items of the catalog."""
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
                where=parse_filters(wanted.where),
                diversity=wanted.diversity,
                collapse=wanted.collapse,
                hubness=wanted.hubness,
                exclude=tuple(one for one in (*like, *unlike) if isinstance(one, int)),
            )
            found = loaded.recommender.recommend(wish)
            positions = found.ids.tolist()
            shared = loaded.recommender.shared(positions, ids)
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
        """An item's pixels as the encoder sees them: of its file where the root is known, else of its thumbnail."""
        size, fit = loaded.worker.size, loaded.worker.fit
        data = await self.reading.run(lambda: loaded.original(item))
        if data is not None:
            with contextlib.suppress(ImageError):
                return torch.from_numpy((await self.decode(decoded, data, size, fit, self.limits.max_pixels))[0])
        return await self.reading.run(lambda: resize_to_fit(decode_thumbnail(loaded.thumbnails[item]), size, fit))

    async def explain(self, loaded: Loaded, wanted: Explained) -> Reply:
        """What each place of the query, and of the item, adds to their score."""
        item, like = position(wanted.id, loaded), self.example(wanted.like, loaded)
        query, stored = await self.vectors([like, item], loaded)
        by_id = isinstance(like, int)
        pixels = await (self.stored_pixels(like, loaded) if by_id else self.pixels(like, loaded))
        shown = await self.stored_pixels(item, loaded)
        parts = parts_of(loaded.worker.encoder)
        try:
            weights = query_weights(parts, wanted.weights)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        query, by_item = reweight(query, parts, weights), reweight(stored, parts, weights)

        def maps(encoder: Any) -> tuple[Any, Any]:
            return encoder.heat_map(pixels, by_item), encoder.heat_map(shown, query)

        of_query, of_item = await asyncio.wrap_future(loaded.worker.call(maps))

        def plain(heat: Any) -> dict[str, Any]:
            height, width = heat.values.shape
            rows = [[round(value, 8) for value in row] for row in heat.values.tolist()]
            return {"height": height, "width": width, "values": rows, "rest": round(float(heat.rest), 8)}

        answer = {"query": plain(of_query), "item": plain(of_item)}
        score = min(1.0, max(-1.0, float(query @ stored)))
        return Reply(answer | {"score": round(score, 6), "rest": answer["query"]["rest"]})
