"""Segments: immutable folders with some of a catalog's items each, and their items seen as one.

    segments/3/segment.json          number of items, digests of the other files
    segments/3/index/                the FAISS index
    segments/3/items.arrow           one row per item, in index order: id, SHA-256 of the image file, path, attributes
    segments/3/thumbnails.parquet    image bytes of each item
    segments/3/local_features.npy    local features of each item, if matches are verified by geometry

A row is a place in the segments one after another. A position is a place among the items that were not removed, which
is what searches speak of. A file of at most 64 MiB is read and compared with its digest when the segment is opened. A
larger one is mapped into memory where that is possible, and compared by `simsearch catalog verify`; thumbnails and
local features are compared in blocks when they are read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from simsearch.files import Damaged, read_json, sha256, write_json
from simsearch.index.faiss_index import FaissIndex
from simsearch.index.selection import Selection, checked_choice
from simsearch.search.items import THUMBNAIL, ThumbnailGroups, check_outside, read_items, write_items
from simsearch.search.local_features import NAME as LOCAL_FEATURES
from simsearch.search.local_features import StoredFeatures, write_local_features
from simsearch.search.verification import Verification
from simsearch.types import LocalFeatures, SearchResult

ID, CONTENT = "simsearch:id", "simsearch:sha256"  # columns of items.arrow that are not attributes
ITEMS, THUMBNAILS, INDEX = "items.arrow", "thumbnails.parquet", "index/index.faiss"
_SEGMENT = "segment.json"
SEGMENT_FILES = (_SEGMENT, INDEX, "index/index.json", ITEMS, THUMBNAILS, LOCAL_FEATURES)
_FOLDER = re.compile(r"segments/[0-9]{1,18}", re.ASCII)
_READ_WHOLE = 2**26  # bytes of a file that is read and checked when it is opened
_GROUP = 1024  # items whose thumbnails are read together
_ROWS = 2**16  # items whose attributes are stored together
_DROPPED = 1000  # up to so many removed rows stay in tables and searches and are left out; of more, copies are made
Rows = TypeVar("Rows", Tensor, pa.Table)


class ItemFeatures(Protocol):
    """The local features of items, by position."""

    def take(self, positions: Sequence[int]) -> list[LocalFeatures]:
        """The local features of the items at some positions.

        Args:
            positions: Positions of the items.
        """
        ...


@dataclass(frozen=True)
class Segment:
    """An opened segment.

    Attributes:
        folder: Its folder.
        index: Its index.
        items: Ids, digests of the image files, paths and attributes, one row per item.
        thumbnails: Its thumbnails.
        local: The local features of its items, or None.
    """

    folder: Path
    index: FaissIndex
    items: pa.Table
    thumbnails: ThumbnailGroups
    local: StoredFeatures | None = None

    def __len__(self) -> int:
        return len(self.items)


def regroup(parts: Iterable[Rows], size: int, join: Callable[[list[Rows]], Rows]) -> Iterator[Rows]:
    """Yields all rows of the parts, in order, in groups of `size`. The last group may be smaller.

    Args:
        parts: Tables or tensors with rows.
        size: Number of rows per group.
        join: Function that concatenates a list of rows.
    """
    waiting: list[Rows] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        if count >= size:
            whole = join(waiting)
            full = count - count % size
            for start in range(0, full, size):
                yield whole[start : start + size]
            waiting, count = [whole[full:]], count - full
    if count:
        yield join(waiting)


# --------------------------------------------------------------------------------------------- writing


def with_ids(table: pa.Table, ids: np.ndarray, contents: Sequence[str | None] | None = None) -> pa.Table:
    """A table of items with their ids and the digests of their image files as its first columns.

    Args:
        table: Path, attributes and thumbnails of the items.
        ids: int64 (n,), their ids.
        contents: The SHA-256 (hex) of each image file, None if it is not known. None if none is known.
    """
    known = [None] * len(table) if contents is None else list(contents)
    columns = {ID: pa.array(ids, pa.int64()), CONTENT: pa.array(known, pa.string())}
    return pa.table(columns | {name: table[name] for name in table.column_names})


def write_segment(
    catalog: Path,
    number: int,
    *,
    index: FaissIndex,
    items: Iterable[pa.Table],
    verification: Verification | None = None,
    local: Iterable[np.ndarray] = (),
) -> dict[str, Any]:
    """Writes a segment and returns its entry for catalog.json.

    Args:
        catalog: The catalog's folder.
        number: Number of the segment; no other segment has had it.
        index: The filled index.
        items: Tables as of `with_ids`, in the order of the index. The thumbnails are the last column.
        verification: How matches are verified by local features, or None.
        local: The records of the items' local features, in the order of the index.

    Raises:
        ValueError: If items, index and local features differ in number.
    """
    name = f"segments/{number}"
    folder = catalog / name
    folder.mkdir(parents=True)
    index.save(folder / "index")
    with pa.OSFile(str(folder / ITEMS), "wb") as file:
        about = write_items(folder / THUMBNAILS, _attributes_written(file, items))
    if len(index) != about["items"]:
        raise ValueError(f"the index holds {len(index)} items, the table {about['items']}")
    if verification is not None:
        about["local_features"] = write_local_features(folder / LOCAL_FEATURES, len(index), local, verification)
    names = [INDEX, ITEMS, THUMBNAILS, *([LOCAL_FEATURES] if verification is not None else [])]
    known = {INDEX: read_json(folder / "index" / "index.json")["sha256"]}  # a large index is read once
    about["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": known.get(name) or sha256(folder / name)}
        for name in names
    }
    write_json(folder / _SEGMENT, about)
    return {"folder": name, "items": len(index), "sha256": sha256(folder / _SEGMENT)}


def _attributes_written(file: pa.NativeFile, items: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Writes all columns but the thumbnails to an Arrow file, and yields the thumbnails in groups."""

    def thumbnails() -> Iterator[pa.Table]:
        waiting: list[pa.Table] = []
        writer = None
        for table in items:
            waiting.append(table.drop_columns([THUMBNAIL]))
            if writer is None:
                writer = pa.ipc.new_file(file, waiting[0].schema)
            if sum(map(len, waiting)) >= _ROWS:
                writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=_ROWS)
                waiting = []
            yield table.select([THUMBNAIL])
        if writer is not None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting).combine_chunks(), max_chunksize=_ROWS)
            writer.close()

    return regroup(thumbnails(), _GROUP, pa.concat_tables)


# --------------------------------------------------------------------------------------------- reading


def read_segment(catalog: Path, entry: Mapping[str, Any], verification: Verification | None) -> Segment:
    """A segment of a catalog.

    Args:
        catalog: The catalog's folder.
        entry: The segment's entry in catalog.json.
        verification: How matches are verified by local features, or None.

    Raises:
        Damaged: If a file of at most 64 MiB differs from what was written, or a larger one has another size.
        OSError: If a file is missing.
    """
    folder, about = _described(catalog, entry)
    whole = {name: is_read_whole(folder, name, known) for name, known in about["files"].items()}
    index = FaissIndex.load(folder / "index", mapped=not whole[INDEX])
    if read_json(folder / "index" / "index.json")["sha256"] != about["files"][INDEX]["sha256"]:
        raise Damaged(f"{folder}: its index belongs to another catalog")
    items = _read_attributes(folder / ITEMS, about["files"][ITEMS]["sha256"], whole[ITEMS])
    check_outside(folder / THUMBNAILS, about)
    thumbnails = ThumbnailGroups(folder / THUMBNAILS, about)
    if not len(index) == len(items) == about["items"] == int(entry["items"]):
        raise Damaged(f"{folder} is damaged: {len(index)} vectors for {len(items)} items")
    local = None
    if verification is not None:
        local = StoredFeatures(folder / LOCAL_FEATURES, about["local_features"], verification, len(items))
    return Segment(folder, index, items, thumbnails, local)


def _described(catalog: Path, entry: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a segment and its segment.json, which is the one that catalog.json means."""
    if not _FOLDER.fullmatch(str(entry["folder"])):
        raise Damaged(f"catalog.json names the segment {entry['folder']!r}, which is none")
    path = catalog / str(entry["folder"]) / _SEGMENT
    if sha256(path) != entry["sha256"]:
        raise Damaged(f"{path} is damaged or belongs to another catalog: its SHA-256 is not the recorded one")
    about = read_json(path)
    if foreign := sorted(set(about["files"]) - set(SEGMENT_FILES)):
        raise Damaged(f"{path} names the file {foreign[0]!r}, which no segment has")
    return path.parent, about


def is_read_whole(folder: Path, name: str, known: Mapping[str, Any]) -> bool:
    """Whether a file is small enough to be read and checked when it is opened.

    Args:
        folder: The folder of the file.
        name: Its name.
        known: Its recorded size, `bytes`.

    Raises:
        Damaged: If it has another size.
    """
    size = (folder / name).stat().st_size
    if size != known["bytes"]:
        raise Damaged(f"{folder / name} is damaged or belongs to another catalog: {size} of {known['bytes']} bytes")
    return size <= _READ_WHOLE


def _read_attributes(path: Path, digest: str, whole: bool) -> pa.Table:
    source = pa.memory_map(str(path)) if not whole else pa.py_buffer(path.read_bytes())
    if whole and hashlib.sha256(source).hexdigest() != digest:
        raise Damaged(f"{path} is damaged or belongs to another catalog: its SHA-256 is not the recorded one")
    table = pa.ipc.open_file(source).read_all()
    table.validate(full=whole)  # what somebody else wrote may point anywhere
    return table


def read_old(folder: Path, about: Mapping[str, Any], verification: Verification | None) -> Segment:
    """The items of a catalog of format 1 as a segment. Their ids are their positions.

    Args:
        folder: The catalog's folder.
        about: The content of catalog.json.
        verification: How matches are verified by local features, or None.

    Raises:
        ValueError: If a file is damaged.
        OSError: If a file is missing.
    """
    index, digest = FaissIndex.load(folder / "index"), read_json(folder / "index" / "index.json")["sha256"]
    if about.get("sha256") is not None and about["sha256"].get("index/index.faiss", digest) != digest:
        raise Damaged("its index belongs to another catalog")
    items = read_items(folder / "items.parquet", about)
    if len(index) != len(items):
        raise Damaged(f"{len(index)} vectors for {len(items)} items")
    items = with_ids(items, np.arange(len(items)))
    thumbnails = ThumbnailGroups(folder / "items.parquet", about)
    local = None
    if verification is not None:
        local = StoredFeatures(folder / LOCAL_FEATURES, about["local_features"], verification, len(items))
    return Segment(folder, index, items, thumbnails, local)


def damaged_files(catalog: Path, entry: Mapping[str, Any]) -> Iterator[str]:
    """Compares each file of a segment with its digest, and yields what is wrong.

    Args:
        catalog: The catalog's folder.
        entry: The segment's entry in catalog.json.
    """
    try:
        folder, about = _described(catalog, entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield str(error)
        return
    for name, known in about["files"].items():
        try:
            is_read_whole(folder, name, known)
            if sha256(folder / name) != known["sha256"]:
                yield f"{folder / name} is damaged: its SHA-256 is not the recorded one"
            elif name == ITEMS:
                pa.ipc.open_file(pa.memory_map(str(folder / name))).read_all().validate(full=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            yield str(error)
    try:
        if read_json(folder / "index" / "index.json")["sha256"] != about["files"][INDEX]["sha256"]:
            yield f"{folder / 'index' / 'index.json'} belongs to another index"
    except (OSError, ValueError, KeyError) as error:
        yield str(error)


# ----------------------------------------------------------------------------------------- seen as one


class Places:
    """Maps positions, which count the items that were not removed, to rows of segments and back.

    Args:
        counts: Number of rows of each segment.
        removed: int64, ascending, the rows that were removed.

    Raises:
        ValueError: If `removed` does not ascend within the rows.
    """

    def __init__(self, counts: Sequence[int], removed: np.ndarray) -> None:
        self.starts = [0, *accumulate(counts)]
        self.removed = removed
        if len(removed) and not (
            removed[0] >= 0 and removed[-1] < self.starts[-1] and bool(np.all(np.diff(removed) > 0))
        ):
            raise ValueError(f"the removed rows do not ascend within the {self.starts[-1]} rows")
        self._before = removed - np.arange(len(removed))  # positions before each removed row

    def __len__(self) -> int:
        return self.starts[-1] - len(self.removed)

    def rows(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of the items at some positions, int64 (n,).

        Args:
            positions: Positions of the items.
        """
        positions = np.asarray(positions, dtype=np.int64)
        return positions + np.searchsorted(self._before, positions, side="right")

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """The positions of rows that were not removed, int64 (n,).

        Args:
            rows: int64 (n,).
        """
        return rows - np.searchsorted(self.removed, rows)

    def split(self, positions: Sequence[int] | np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """The items at some positions by segment: its number, which of the positions, and the rows in the segment.

        Args:
            positions: Positions of the items.
        """
        rows = self.rows(positions)
        of = np.searchsorted(self.starts, rows, side="right") - 1
        return [(int(n), np.flatnonzero(of == n), rows[of == n] - self.starts[n]) for n in np.unique(of)]

    def removed_of(self, segment: int) -> np.ndarray:
        """The removed rows of a segment, counted within it.

        Args:
            segment: Number of the segment.
        """
        low, high = np.searchsorted(self.removed, self.starts[segment : segment + 2])
        return self.removed[low:high] - self.starts[segment]


class SegmentedIndex:
    """The indexes of several segments as one, without the removed items. Several threads may use it at once.

    It has those methods and properties of `FaissIndex` that searching needs, with the same meaning. Equal scores come
    in the order of the positions.

    Args:
        indexes: The indexes, of equal settings.
        places: Where the items lie.

    Raises:
        ValueError: If the indexes differ in kind or dimension.
    """

    def __init__(self, indexes: Sequence[FaissIndex], places: Places) -> None:
        self._indexes, self._places = list(indexes), places
        first = self._indexes[0]
        self.factory, self.metric, self.is_binary = first.factory, first.metric, first.is_binary
        self.dimension, self.bits, self.code_bytes = first.dimension, first.bits, first.code_bytes
        kinds = {(one.factory, one.metric, one.dimension, one.bits) for one in self._indexes}
        if len(kinds) > 1:
            raise ValueError(f"the indexes of its segments are of different kinds: {sorted(map(str, kinds))}")
        self.keeps_vectors = first.keeps_vectors

    def __len__(self) -> int:
        return len(self._places)

    def search(self, vectors: Tensor, k: int, among: Tensor | Selection | None = None) -> SearchResult:
        """The k most similar items of each query, as `FaissIndex.search` returns them.

        Args:
            vectors: float32 (Q, D) or codes uint8 (Q, bits / 8).
            k: Number of items, 1..N.
            among: The items that may be returned, as a selection or bool (N,); None for all.

        Raises:
            ValueError: As `FaissIndex.search` does.
        """
        chosen = checked_choice(k, among, len(self))
        if len(self._indexes) == 1 and len(self._indexes[0]) == len(self):  # none is removed: positions are its own
            return self._indexes[0].search(vectors, k, chosen)
        own: dict[int, Selection] | None = None  # few items, by segment: these cost what they choose
        mask: Tensor | None = None
        if chosen is not None and chosen.is_sparse:
            split = self._places.split(chosen.positions)
            own = {n: Selection(len(self._indexes[n]), positions=rows) for n, _, rows in split}
        elif chosen is not None:
            mask = chosen.mask()
        ids, scores = [], []
        for number, index in enumerate(self._indexes):
            if own is None:
                found = self._search_one(number, index, vectors, k, mask)
            elif number in own:
                found = self._in_positions(number, index.search(vectors, min(k, len(index)), own[number]))
            else:
                continue
            if found is not None:
                ids.append(found.ids)
                scores.append(found.scores)
        missing = k - sum(one.shape[1] for one in ids)
        if missing > 0:
            ids.append(torch.full((len(vectors), missing), -1))
            scores.append(torch.full((len(vectors), missing), -math.inf))
        together = torch.cat(scores, dim=1)
        best = together.argsort(dim=1, descending=True, stable=True)[:, :k]  # earlier segments first
        return SearchResult(torch.cat(ids, dim=1).gather(1, best), together.gather(1, best))

    def _search_one(
        self, number: int, index: FaissIndex, vectors: Tensor, k: int, among: Tensor | None
    ) -> SearchResult | None:
        """The answer of one segment in positions, with at most k items. None if none of its items may be returned."""
        start, removed = self._places.starts[number], self._places.removed_of(number)
        first = int(self._places.positions(np.array([start]))[0])
        count = len(index) - len(removed)
        if count == 0:
            return None
        chosen, more = None, 0
        if among is not None:
            own = among[first : first + count]
            if not own.any():
                return None
            if not own.all():
                chosen = own
        if len(removed) > _DROPPED or (chosen is not None and len(removed)):
            kept = torch.ones(len(index), dtype=torch.bool)
            kept[removed] = False
            chosen = kept if chosen is None else kept.masked_scatter(kept, chosen)
        elif len(removed):
            more = len(removed)
        found = index.search(vectors, min(k + more, len(index)), chosen)
        ids, scores = found.ids, found.scores
        if more:
            gone = torch.isin(ids, torch.from_numpy(removed))
            order = gone.to(torch.uint8).argsort(dim=1, stable=True)  # removed ones go to the end
            ids = ids.masked_fill(gone, -1).gather(1, order)[:, :k]
            scores = scores.masked_fill(gone, -math.inf).gather(1, order)[:, :k]
        return self._in_positions(number, SearchResult(ids, scores))

    def _in_positions(self, number: int, found: SearchResult) -> SearchResult:
        """The answer of one segment, whose ids are its rows, in positions."""
        rows = found.ids.clamp(min=0).numpy() + self._places.starts[number]
        positions = torch.from_numpy(self._places.positions(rows))
        return SearchResult(positions.masked_fill(found.ids < 0, -1), found.scores)

    def rows(self, positions: Tensor) -> Tensor:
        """The stored items at some positions, as `FaissIndex.rows` returns them.

        Args:
            positions: int64 (n,).

        Raises:
            ValueError: If a position lies outside the index.
        """
        if len(positions) == 0:
            return self._indexes[0].reconstruct(0, 0)
        if int(positions.min()) < 0 or int(positions.max()) >= len(self):
            raise ValueError(f"positions must lie in 0 .. {len(self) - 1}, got {positions[:5].tolist()} ...")
        out: Tensor | None = None
        for number, places, rows in self._places.split(positions.numpy()):
            own = self._indexes[number].rows(torch.from_numpy(rows))
            if out is None:
                out = own.new_empty((len(positions), own.shape[1]))
            out[torch.from_numpy(places)] = own
        assert out is not None
        return out

    def reconstruct(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The stored items start..stop-1, as `FaissIndex.reconstruct` returns them.

        Args:
            start: First position.
            stop: Last position plus one; None for the end.
        """
        return self.rows(torch.arange(start, len(self) if stop is None else stop))


class SegmentedThumbnails:
    """The thumbnails of a catalog's items by position, one row group at a time. Several threads may use it at once.

    Args:
        files: The thumbnails of each segment.
        places: Where the items lie.
    """

    def __init__(self, files: Sequence[ThumbnailGroups], places: Places) -> None:
        self._files, self._places = list(files), places
        self.sizes = [size for file in files for size in file.sizes]
        self._starts = [0, *accumulate(len(file.sizes) for file in files)]

    def place(self, position: int) -> tuple[int, int]:
        """The row group of an item, and the item's place in it.

        Args:
            position: Position of the item.
        """
        ((segment, _, rows),) = self._places.split([position])
        group, place = self._files[segment].place(int(rows[0]))
        return self._starts[segment] + group, place

    def group(self, number: int) -> pa.ChunkedArray:
        """The thumbnails of a row group.

        Args:
            number: Number of the row group.

        Raises:
            Damaged: If the bytes differ from what was written.
        """
        segment = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._files[segment].group(number - self._starts[segment])

    def take(self, positions: Sequence[int]) -> list[bytes]:
        """The thumbnails of some items. Reads only the row groups that contain them.

        Args:
            positions: Positions of the items.

        Raises:
            Damaged: If the bytes differ from what was written.
        """
        return _gathered(self._places, positions, lambda segment, rows: self._files[segment].take(rows))


class SegmentedFeatures:
    """The local features of a catalog's items by position. Several threads may use it at once.

    Args:
        parts: The local features of each segment.
        places: Where the items lie.
    """

    def __init__(self, parts: Sequence[StoredFeatures], places: Places) -> None:
        self._parts, self._places = list(parts), places

    def take(self, positions: Sequence[int]) -> list[LocalFeatures]:
        """The local features of the items at some positions.

        Args:
            positions: Positions of the items.

        Raises:
            Damaged: If a file is damaged.
        """
        return _gathered(self._places, positions, lambda segment, rows: self._parts[segment].take(rows))


T = TypeVar("T")


def _gathered(places: Places, positions: Sequence[int], take: Callable[[int, list[int]], list[T]]) -> list[T]:
    found: dict[int, T] = {}
    for segment, at, rows in places.split(positions):
        found |= dict(zip(at.tolist(), take(segment, rows.tolist()), strict=True))
    return [found[place] for place in range(len(positions))]


def items_of(segments: Sequence[Segment], places: Places) -> pa.Table:
    """The items of segments that were not removed, in the order of their positions.

    Ids and digests come first. A column that a segment does not have is null there. Unless many were removed, no row
    is copied.

    Args:
        segments: The segments.
        places: Where the items lie.
    """
    table = pa.concat_tables([segment.items for segment in segments], promote_options="permissive")
    if not len(places.removed):
        return table
    if len(places.removed) <= _DROPPED:
        cuts = [-1, *places.removed.tolist(), len(table)]
        return pa.concat_tables([table.slice(before + 1, after - before - 1) for before, after in pairwise(cuts)])
    kept = np.ones(len(table), dtype=bool)
    kept[places.removed] = False
    return table.filter(pa.array(kept))
