"""State and steps that the routes share: uploads, threads, and the way from an image or item to an answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor

from simsearch.data.process_pool import MEMORY, BoundedPool, Closed, Failure
from simsearch.functional.feedback import query_weights, reweight
from simsearch.functional.geometry import Match
from simsearch.functional.regions import Region, crop
from simsearch.functional.resize import resize_to_fit
from simsearch.images import ImageError, decode_thumbnail
from simsearch.search.filters import Condition, parse_filters
from simsearch.search.local_features import query_features
from simsearch.search.names import POSITION
from simsearch.search.query_regions import joined, region_pixels
from simsearch.search.request import Recommendation, Regions
from simsearch.search.request import Request as Wish
from simsearch.serving.library import Library, Loaded
from simsearch.serving.limits import Account, Busy, Limits, Pool, account
from simsearch.serving.messages import Example, Explained, Filter, Reply, Wanted
from simsearch.serving.uploads import Upload, UploadFolder, Uploads, decoded, viewable
from simsearch.types import LocalFeatures, parts_of

log = logging.getLogger("simsearch.serving")

T = TypeVar("T")

POLL_SECONDS = 2.0
SWEEP_SECONDS = 60.0
_NOBODY = Account(None, "", 0.0)
VIEW_SIDE = 1600
ZOOM_SIDE = 6000
MOST_POINTS = 200
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


def evidence(match: Match) -> dict[str, Any]:
    """What makes an item the same work, as the API returns it.

    - `inliers`: number of points of both images that agree.
    - `outline`: corners of the item in the query, clockwise from its top left.
    - `points`: agreeing points, at most 200: x and y in the query, x and y in the item.

    Places are fractions of width and height.

    Args:
        match: The match.
    """
    points = match.points[:MOST_POINTS].round(4).tolist()
    return {"inliers": match.inliers, "outline": match.outline.round(5).tolist(), "points": points}


@dataclass(frozen=True)
class Given:
    """An image that a search is made with.

    Attributes:
        image: An upload, or the position of an item.
        region: The part of the image to take alone, or None.
    """

    image: Upload | int
    region: Region | None = None


class _Form(MultiPartParser):
    spool_max_size = 2**40  # in memory: the guard bounds the request


class Service:
    """State that the routes share.

    Args:
        library: The catalogs.
        limits: The limits of the server.
        uploads_folder: Folder in which uploads outlive the server. None keeps them in memory only.
    """

    def __init__(self, library: Library, limits: Limits, uploads_folder: Path | None = None) -> None:
        self.library, self.limits = library, limits
        bounds = limits.uploads, limits.uploads_bytes, limits.uploads_kept_seconds
        self.uploads_problem: str | None = None
        folder = None
        if uploads_folder is not None:
            try:
                folder = UploadFolder(uploads_folder, *bounds)
                folder.sweep()
            except OSError as error:
                self.uploads_problem = str(error)
        self.uploads = Uploads(*bounds, folder)
        self.decoding = Pool("decode", limits.threads, limits.queue)
        self.showing = Pool("show", limits.threads, limits.queue)  # beside it: a wall of pictures delays no upload much
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
        pools = (self.decoding, self.showing, self.searching, self.reading)
        return self.library.pending + sum(pool.pending for pool in pools)

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._started, 1)

    async def watch(self) -> None:
        """Reloads catalogs whose folders change, and drops uploads that expire, until the server ends."""
        swept = time.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                if time.monotonic() > swept + SWEEP_SECONDS:
                    swept = time.monotonic()
                    await asyncio.to_thread(self.uploads.sweep)
                before = dict(self.library.problems)
                for name in await asyncio.to_thread(self.library.refresh):
                    log.info("catalog %s was replaced by the new one in its folder", name)
                for name, problem in self.library.problems.items():
                    if before.get(name) != problem:
                        log.warning("catalog %s stays as it was, since the new one cannot be opened: %s", name, problem)
            except Exception:
                log.exception("the check for new catalogs and expired uploads failed")

    def stop_decoding(self) -> None:
        """Stops all decoding at once. Its requests get the response that the server is ending."""
        self._decoders.close()

    def close(self) -> None:
        """Ends threads and processes, and closes the library."""
        self.stop_decoding()
        for pool in (self.decoding, self.showing, self.searching, self.reading):
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
        payer = account.get(_NOBODY)
        return await self.decoding.run(lambda: self._decoded(payer, function, *arguments))

    def _decoded(self, payer: Account, function: Callable[..., T], *arguments: Any) -> T:
        """`decode`, in the thread that calls it."""
        payer.check()
        try:
            found = self._decoders.call(function, *arguments, spent=payer.charge)
        except Closed:
            raise HTTPException(503, "the server is shutting down: try again shortly", {"retry-after": "5"}) from None
        if isinstance(found, Failure):
            raise ImageError(None, found.reason, found.detail)
        return found

    async def opened(self, data: bytes, loaded: Loaded, region: Region | None = None) -> tuple[Upload, tuple[int, int]]:
        """An upload, decoded at the size and fit of the catalog's encoder, and its width and height.

        Args:
            data: Bytes of an image file.
            loaded: The catalog.
            region: The part of the image that is asked for, or None.
        """
        size, fit = loaded.worker.size, loaded.worker.fit
        pixels, shape = await self.decode(decoded, data, size, fit, self.limits.max_pixels, region)
        return Upload(data, pixels={(size, fit, region): torch.from_numpy(pixels)}), shape

    async def keep(self, upload: Upload) -> str:
        """Keeps an upload and returns its token.

        Args:
            upload: The upload.
        """
        return await self.reading.run(lambda: self.uploads.add(upload))

    async def upload(self, token: str) -> Upload | None:
        """The upload of a token. None if there is none, or if it has been dropped.

        Args:
            token: The token.
        """
        return await self.reading.run(lambda: self.uploads.get(token))

    async def pixels(self, given: Given, loaded: Loaded) -> Tensor:
        """The pixels of an image at the size and fit of the catalog's encoder.

        Those of an item come from its file if the root is known, else from its thumbnail.

        Args:
            given: The image.
            loaded: The catalog.
        """
        size, fit, most, region = loaded.worker.size, loaded.worker.fit, self.limits.max_pixels, given.region
        if isinstance(given.image, Upload):
            known, key = given.image.pixels, (size, fit, region)
            if (pixels := known.get(key)) is None:
                found, _ = await self.decode(decoded, given.image.data, size, fit, most, region)
                pixels = known[key] = torch.from_numpy(found)
                given.image.make_room()
            return pixels
        item = given.image
        data = await self.reading.run(lambda: loaded.original(item))
        if data is not None:
            with contextlib.suppress(ImageError):
                return torch.from_numpy((await self.decode(decoded, data, size, fit, most, region))[0])

        def small() -> Tensor:
            return resize_to_fit(crop(decode_thumbnail(loaded.thumbnails[item]), region), size, fit)

        return await self.reading.run(small)

    async def picture(self, data: bytes, side: int) -> bytes:
        """An item's image file as pages show it. They show dozens at once.

        So up to VIEW_SIDE the client does not pay for the time. A pool of its own bounds the work of all clients.

        Args:
            data: Bytes of an image file.
            side: Longest side in pixels, at most.

        Raises:
            ImageError: If the image cannot be used.
            Busy: If too many pictures are waiting.
        """
        if side > VIEW_SIDE:
            return await self.shown(data, side)
        return await self.showing.run(lambda: self._decoded(_NOBODY, viewable, data, side, self.limits.max_pixels))

    async def shown(self, data: bytes, side: int = VIEW_SIDE) -> bytes:
        """An image file as pages show it.

        Args:
            data: Bytes of an image file.
            side: Longest side in pixels, at most.

        Raises:
            ImageError: If the image cannot be used.
        """
        return await self.decode(viewable, data, side, self.limits.max_pixels)

    async def described(self, given: Given, loaded: Loaded) -> Tensor:
        """The descriptor (D,) of an image by the catalog's encoder.

        Args:
            given: The image.
            loaded: The catalog.
        """
        known = given.image.descriptors if isinstance(given.image, Upload) else {}
        key = loaded.catalog.about["encoder_fingerprint"], given.region
        if (found := known.get(key)) is None:
            pixels = await self.pixels(given, loaded)
            try:
                found = known[key] = await asyncio.wrap_future(loaded.worker.describe(pixels))
            except ValueError as error:  # no finite descriptor
                raise HTTPException(422, str(error)) from None
            if isinstance(given.image, Upload):
                given.image.make_room()
        return found

    async def local(self, given: Given, loaded: Loaded) -> tuple[LocalFeatures, ...]:
        """The local features of an image, by which the catalog verifies matches. Empty if it has none.

        Args:
            given: The image.
            loaded: The catalog.
        """
        catalog, image = loaded.catalog, given.image
        if (verification := catalog.verification) is None:
            return ()
        describe = functools.partial(
            query_features, verification, region=given.region, max_pixels=self.limits.max_pixels
        )
        if isinstance(image, Upload):
            key = repr(verification.config), given.region
            if (found := image.local.get(key)) is None:
                found = image.local[key] = await self.decode(describe, image.data)
                image.make_room()
            return found
        if given.region is None:
            return tuple(await self.searching.run(lambda: catalog.local_features([image])))
        data = await self.reading.run(lambda: loaded.original(image))
        if data is not None:
            with contextlib.suppress(ImageError):
                return await self.decode(describe, data)
        return await self.decode(describe, await self.reading.run(lambda: loaded.thumbnails[image]))

    def regions(self, given: Given, loaded: Loaded) -> Regions | None:
        """A function that returns the descriptors (R, D) of an upload's regions, for the thread that searches.

        None for an item, or if the catalog asks for none. The function waits for decoders and the encoder, which wait
        for no search.

        Args:
            given: The image.
            loaded: The catalog.
        """
        verification, image, worker = loaded.catalog.verification, given.image, loaded.worker
        if verification is None or verification.regions == 0 or not isinstance(image, Upload):
            return None
        key = loaded.catalog.about["encoder_fingerprint"], verification.regions, given.region
        read = functools.partial(
            region_pixels, verification, image.data, size=worker.size, fit=worker.fit, region=given.region,
            max_pixels=self.limits.max_pixels,
        )  # fmt: skip
        payer = account.get(_NOBODY)

        def described() -> Tensor:
            if (found := image.regions.get(key)) is None:
                jobs = [worker.describe(torch.from_numpy(one)) for one in self._decoded(payer, read)]
                usable = [job.result() for job in jobs if job.exception() is None]  # a region may have no descriptor
                found = image.regions[key] = torch.stack(usable) if usable else torch.empty(0)
                image.make_room()
            return found

        return described

    async def vectors(self, examples: Sequence[Given], loaded: Loaded) -> Tensor:
        """The descriptors (M, D) of images, in order. Those of whole items are the stored ones.

        Args:
            examples: The images.
            loaded: The catalog.
        """
        whole = [isinstance(one.image, int) and one.region is None for one in examples]
        ids = [one.image for one in examples if isinstance(one.image, int) and one.region is None]
        new = [one for one, stored in zip(examples, whole, strict=True) if not stored]
        own = iter(await asyncio.gather(*(self.described(one, loaded) for one in new)))
        kept = iter(await self.searching.run(lambda: loaded.engine.vectors(ids)) if ids else ())
        return torch.stack([next(kept) if stored else next(own) for stored in whole])

    async def examples(self, asked: Sequence[Example], loaded: Loaded) -> list[Given]:
        """The uploads and the positions of items that a message names, with their regions.

        Args:
            asked: The examples of the message.
            loaded: The catalog.

        Raises:
            Refusal: 404 if some do not exist. The response names them.
        """
        found = [self.position(one, loaded) if one.upload is None else await self.upload(one.upload) for one in asked]
        self._refuse([one for one, there in zip(asked, found, strict=True) if there is None], loaded)
        return [Given(there, one.part) for one, there in zip(asked, found, strict=True) if there is not None]

    def item(self, example: Example, loaded: Loaded) -> int:
        """The position of the item that a message names. Raises as `examples` does.

        Args:
            example: The example.
            loaded: The catalog.
        """
        found = self.position(example, loaded)
        self._refuse([example] if found is None else [], loaded)
        assert found is not None
        return found

    @staticmethod
    def _refuse(missing: Sequence[Example], loaded: Loaded) -> None:
        if missing:
            problem = GONE if missing[0].upload is not None else f"no item {name_of(missing[0])!r} in {loaded.name}"
            if missing[0].upload is None and loaded.engine.names.is_gone(name_of(missing[0])):
                problem = f"the item {name_of(missing[0])} was removed from {loaded.name}"
            raise Refusal(404, problem, {"missing": [one.model_dump(exclude_none=True) for one in missing]})

    @staticmethod
    def position(example: Example, loaded: Loaded) -> int | None:
        """The position of the item that a message names. None if there is no such item.

        Args:
            example: The example.
            loaded: The catalog.

        Raises:
            HTTPException: 422 if several items have that name.
        """
        if example.position is not None:
            return example.position if example.position < len(loaded.catalog) else None
        try:
            return loaded.engine.names.find(name_of(example))
        except ValueError as error:  # several items
            raise HTTPException(422, str(error)) from None

    async def search(
        self,
        loaded: Loaded,
        wanted: Wanted,
        like: Sequence[Given],
        unlike: Sequence[Given] = (),
        filters: Sequence[Filter] = (),
    ) -> Reply:
        """The answer to a search by uploads and items of the catalog.

        Args:
            loaded: The catalog.
            wanted: The settings of the search.
            like: Examples.
            unlike: Counter-examples.
            filters: Conditions as data.

        Raises:
            HTTPException: 422 if a setting does not fit the catalog.
        """
        where = conditions(wanted.where, filters)
        encoding = time.perf_counter()
        examples = await self.vectors([*like, *unlike], loaded)
        local = [await self.local(one, loaded) for one in like] if wanted.verify else []
        regions = joined([self.regions(one, loaded) for one in like] if wanted.verify else [])
        ids = [one.image for one in like if isinstance(one.image, int)]
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
                exclude=tuple(one.image for one in (*like, *unlike) if isinstance(one.image, int)),
                local=tuple(features for found in local for features in found),
                regions=regions,
                min_score=wanted.min_score,
            )
            found = loaded.engine.recommend(wish)
            positions = found.ids.tolist()
            shared = loaded.engine.shared(positions, ids)
            return found, loaded.describe(positions), shared

        try:
            found, items, shared = await self.searching.run(answer)
        except ImageError:  # of a region
            raise
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
                **({} if (match := found.matches[rank]) is None else evidence(match)),
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
        examples = await self.examples([*wanted.like, *wanted.unlike], loaded)
        likes = len(wanted.like)
        vectors = await self.vectors([*examples, Given(item)], loaded)
        pixels = await self.pixels(examples[wanted.shown], loaded)
        shown = await self.pixels(Given(item), loaded)
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
