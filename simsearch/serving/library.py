"""The catalogs that are served. A catalog is reloaded when its folder changes."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from simsearch.files import Damaged, read_json
from simsearch.images import MAX_BYTES, header_shape
from simsearch.models.backbones import Runtime
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.engine import Engine
from simsearch.search.errors import CatalogError
from simsearch.search.items import ThumbnailGroups
from simsearch.search.names import Names
from simsearch.search.request import Request
from simsearch.search.segments import SEGMENT_FILES, SegmentedThumbnails
from simsearch.search.stores.push import snapshot_of
from simsearch.search.stores.store import Store, StoreError
from simsearch.search.stores.stored_index import stored
from simsearch.serving.backend_choice import Choice, choose_runtime
from simsearch.serving.browse import Listing, whole
from simsearch.serving.encoder import EncoderWorker
from simsearch.serving.limits import Limits
from simsearch.types import can_explain

_FILES = (
    *("catalog.json", "calibration.json", "items.parquet", "encoder.safetensors"),
    *("index/index.json", "index/index.faiss"),
)
_HELD_BYTES = 2**30  # of thumbnails that are held in memory whole, else of groups of rows
_TRIES = 3  # to read a catalog that changes while it is read
Stamp = tuple[tuple[int, int, int] | str | None, ...]


@dataclass(frozen=True)
class Source:
    """The location of a catalog and of its images.

    Attributes:
        folder: The catalog's folder.
        root: Folder of the original images, if they may be shown.
        exported: Folder of exported files that describe queries, or None for the catalog's own encoder.
    """

    folder: Path
    root: Path | None = None
    exported: Path | None = None


@dataclass(frozen=True, eq=False)
class Loaded:
    """A catalog as it was when it was loaded, with everything that answers requests for it.

    Attributes:
        name: Name of the catalog.
        catalog: The catalog.
        engine: Its search engine.
        worker: The worker of its encoder.
        listing: Its items, to browse.
        thumbnails: Its thumbnails.
        root: Folder of the original images, or None.
        version: 16 hex digits, which change whenever the catalog changes.
        since: When it was loaded.
        parts: Weights of the descriptor's parts.
        explains: True if the encoder can compute heat maps.
        runtime: The chosen runtime of the networks, or None.
        before: Version and names of the catalog that it replaced, or None.
    """

    name: str
    catalog: Catalog
    engine: Engine
    worker: EncoderWorker
    listing: Listing
    thumbnails: Thumbnails
    root: Path | None
    version: str
    since: str
    parts: dict[str, float]
    explains: bool
    runtime: Choice | None
    before: tuple[str, Names] | None = None

    def now(self, name: str | None, position: int | None, version: str) -> str | None:
        """The present name of an item that had this name, or this position, in an earlier version. None if it is gone.

        Args:
            name: The name, or None.
            position: The position, or None.
            version: The earlier version.
        """
        if self.before is not None and self.before[0] == version:
            old = self.before[1]
            at = position if name is None else old.find(name)
            if at is not None and at < len(old):
                (name,) = old.of([at])
        found = None if name is None else self.engine.names.find(name)
        return None if found is None else self.engine.names.of([found])[0]

    def describe(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Id, attributes, width and height of items, as the API returns them.

        Args:
            positions: Positions of the items.
        """
        answer = []
        names = self.engine.names.of(positions)
        for position, name, row in zip(positions, names, self.listing.rows(positions), strict=True):
            width, height = whole(row.get("width")), whole(row.get("height"))
            if not (width and height):  # of the thumbnail: the shape is the same
                width, height = self.thumbnails.shape(position)
            about = {n: v for n, v in row.items() if n not in ("width", "height", "sha1", "sha256")}
            answer.append({"id": name, "attributes": about, "width": width, "height": height})
        return answer

    def original(self, position: int) -> bytes | None:
        """The bytes of an item's image file. None if there is no root, or no such regular file in it.

        Args:
            position: Position of the item.
        """
        path = self.catalog.items["path"][position].as_py() if "path" in self.catalog.items.column_names else None
        return read_inside(self.root, str(path)) if self.root is not None and path else None


class Thumbnails:
    """The thumbnails of a catalog, by position.

    They are held in memory if they take at most `held_bytes` altogether.

    Args:
        file: The stored thumbnails, whose files stay open.
        held_bytes: Largest total size in bytes to hold in memory.

    Raises:
        Damaged: If the thumbnails differ from what was written.
    """

    def __init__(self, file: ThumbnailGroups | SegmentedThumbnails, held_bytes: int = _HELD_BYTES) -> None:
        self._file = file
        self._lock = threading.Lock()
        sizes = self._file.sizes
        self._most = max(1, held_bytes // max(1, max(sizes, default=1)))
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._shapes: dict[int, tuple[int, int]] = {}
        if sum(sizes) <= held_bytes:
            self._most = len(sizes)
            for group in range(len(sizes)):
                self._group(group)

    def __getitem__(self, position: int) -> bytes:
        group, place = self._file.place(position)
        with self._lock:
            return self._group(group)[place].as_py()

    def shape(self, position: int) -> tuple[int, int]:
        """Width and height of a thumbnail in pixels. (1, 1) if it is not an image.

        Args:
            position: Position of the item.
        """
        if position not in self._shapes:
            height, width = header_shape(self[position]) or (1, 1)
            self._shapes[position] = width, height
        return self._shapes[position]

    def _group(self, group: int) -> pa.ChunkedArray:
        if group in self._groups:
            self._groups.move_to_end(group)
        else:
            self._groups[group] = self._file.group(group)
            if len(self._groups) > self._most:
                self._groups.popitem(last=False)
        return self._groups[group]


class Library:
    """Catalogs by name. Catalogs that were filled by the same encoder share it.

    `refresh` reloads catalogs whose folders changed. Whoever holds an old one by `lease` keeps it.

    Args:
        sources: Folder and image root of each catalog, by name.
        device: Device of the encoders.
        limits: The limits of the server.
        runtime: Runtime of the networks (simsearch.serving.backend_choice). None leaves it to the catalogs' configs.
        trusted: True if the user trusts whoever made the catalogs.
        settings: Function that returns a catalog with other settings, such as those of its verification.
        store: Function that makes a store, in which each catalog is searched. None searches their own indexes.

    Raises:
        ValueError: If a catalog cannot be loaded (CatalogError).
        StoreError: If a store does not hold its catalog's version.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        device: torch.device,
        limits: Limits,
        runtime: Runtime | None = None,
        trusted: bool = False,
        settings: Callable[[Catalog], Catalog] | None = None,
        store: Callable[[], Store] | None = None,
    ) -> None:
        self.sources = dict(sources)
        self._stores = {} if store is None else {name: store() for name in self.sources}
        self.problems: dict[str, str] = {}
        self._device, self._limits, self._runtime = device, limits, runtime
        self._trusted, self._settings = trusted, settings
        self._lock = threading.Lock()
        # Weak references: once no catalog uses an encoder, it is freed.
        self._workers: weakref.WeakValueDictionary[tuple[str, Path | None], EncoderWorker] = (
            weakref.WeakValueDictionary()
        )
        self._loaded: dict[str, Loaded] = {}
        self._stamps: dict[str, Stamp] = {}
        for name in self.sources:
            self._loaded[name], self._stamps[name] = self._load(name)

    @property
    def catalogs(self) -> list[Loaded]:
        """The current catalogs."""
        return list(self._loaded.values())

    @property
    def pending(self) -> int:
        """The number of jobs that wait for an encoder."""
        return sum(worker.pending for worker in {loaded.worker for loaded in self.catalogs})

    @contextmanager
    def lease(self, name: str) -> Iterator[Loaded | None]:
        """Yields the catalog of this name, or None if there is none. Its encoder keeps running inside the block.

        Args:
            name: Name of the catalog.
        """
        with self._lock:
            loaded = self._loaded.get(name)
            if loaded is not None:
                loaded.worker.retain()
        try:
            yield loaded
        finally:
            if loaded is not None:
                loaded.worker.release()

    def refresh(self) -> list[str]:
        """Reloads changed catalogs and returns their names.

        A catalog that cannot be read stays as it was, and `problems` says why.
        """
        changed = []
        for name in self.sources:
            stamp = self._stamp(name)
            if stamp == self._stamps[name]:
                continue
            try:
                loaded, stamp = self._load(name)
            except (ValueError, OSError, pa.ArrowException) as error:
                self.problems[name], self._stamps[name] = str(error) or type(error).__name__, stamp
                continue
            with self._lock:
                old = self._loaded[name]
                loaded = replace(loaded, before=(old.version, old.engine.names))
                self._loaded[name], self._stamps[name] = loaded, stamp
            self.problems.pop(name, None)
            old.worker.release()
            changed.append(name)
        return changed

    def close(self) -> None:
        """Releases all catalogs and their encoders."""
        for loaded in self.catalogs:
            loaded.worker.release()
        for store in self._stores.values():
            store.close()

    def _stamp(self, name: str) -> Stamp:
        """A value that changes whenever a catalog or the version in its store changes."""
        stamp, store = _stamp(self.sources[name].folder), self._stores.get(name)
        if store is None:
            return stamp
        try:
            return (*stamp, store.snapshot())
        except StoreError as error:
            return (*stamp, str(error))

    def _load(self, name: str) -> tuple[Loaded, Stamp]:
        source = self.sources[name]
        for left in reversed(range(_TRIES)):
            stamp = _stamp(source.folder)
            try:
                loaded = self._open(name, source)
            except (CatalogError, Damaged, OSError):
                if left and _stamp(source.folder) != stamp:
                    continue
                raise
            if _stamp(source.folder) == stamp:
                held = (snapshot_of(loaded.catalog),) if name in self._stores else ()  # as `stored` found it
                return loaded, (*stamp, *held)
            loaded.worker.release()
        raise CatalogError(f"the catalog {source.folder} keeps changing while it is read")

    def _open(self, name: str, source: Source) -> Loaded:
        catalog = read_catalog(source.folder, trusted=self._trusted, exported=source.exported)
        catalog = catalog if self._settings is None else self._settings(catalog)
        catalog = stored(catalog, self._stores.get(name))
        engine = Engine(catalog)
        engine.position(*engine.names.of([0]))
        engine.recommend(Request(like=engine.vectors([0]), k=1, exclude=(0,)))  # loads what is loaded lazily
        listing = Listing(engine.attributes)
        assert catalog.pictures is not None
        thumbnails, version = Thumbnails(catalog.pictures), _version(source.folder)
        worker = self._worker(catalog)
        return Loaded(
            name=name,
            catalog=catalog,
            engine=engine,
            worker=worker,
            listing=listing,
            thumbnails=thumbnails,
            root=source.root,
            version=version,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            parts={n: part.weight for n, part in catalog.parts.items()},
            explains=can_explain(worker.encoder),
            runtime=worker.runtime,
        )

    def _worker(self, catalog: Catalog) -> EncoderWorker:
        """The worker of the catalog's encoder, retained once more."""
        key = (catalog.about["encoder_fingerprint"], catalog.exported)
        known = self._workers.get(key)
        if known is not None and known.retain():
            return known
        encoder, limits = catalog.encoder.to(self._device), self._limits
        worker = EncoderWorker(
            encoder,
            batch_size=limits.batch_size,
            wait_ms=limits.batch_wait_ms,
            queue_length=limits.queue,
            runtime=choose_runtime(encoder, limits.batch_size, self._runtime) if self._runtime else None,
        )
        try:
            worker.warm_up()
        except Exception:
            worker.release()
            raise
        self._workers[key] = worker
        return worker


def read_inside(root: Path, path: str, most: int = MAX_BYTES) -> bytes | None:
    """The bytes of a regular file below `root`, after links are resolved.

    None for anything else, and for paths outside.

    Args:
        root: The folder.
        path: Path relative to `root`.
        most: Largest size in bytes.
    """
    try:
        base = root.resolve(strict=True)
        found = (base / path).resolve(strict=True)
        if not found.is_relative_to(base):
            return None
        # What the path named a moment ago may be a link or a pipe by now.
        descriptor = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            return file.read() if stat.S_ISREG(about.st_mode) and about.st_size <= most else None
    except (OSError, ValueError, RuntimeError):  # missing, a zero byte in the name, links in a circle
        return None


def _stamp(folder: Path) -> Stamp:
    """A value that changes whenever the catalog in the folder changes."""
    found: list[tuple[int, int, int] | str | None] = []
    for name in (*_FILES, *_segment_files(folder)):
        try:
            about = (folder / name).stat()
            found.append((about.st_ino, about.st_mtime_ns, about.st_size))
        except OSError:
            found.append(None)
    return tuple(found)


def _segment_files(folder: Path) -> list[str]:
    """The files of the segments that a catalog's present version names."""
    try:
        entries = read_json(folder / "catalog.json").get("segments", ())
        return [f"{entry['folder']}/{name}" for entry in entries for name in SEGMENT_FILES]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _version(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("catalog.json", "calibration.json", "index/index.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"-")
    with suppress(OSError):  # of format 1, which may have no digests
        about = (folder / "items.parquet").stat()
        digest.update(f"{about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
