"""A catalog: an index, its items and the encoder that filled it, in one folder.

    catalog.json          format, version, encoder fingerprint and config, provenance, counts; segments, removed items
    segments/3/           some of the items with their index and thumbnails (simsearch.search.segments)
    removed/5.npy         the rows of the segments that version 5 removed or replaced
    encoder.safetensors   all tensors of the encoder
    calibration.json      thresholds of `simsearch calibrate`; its curves are in calibration/

There are no pickles. Segments and lists of removed rows never change. A new version is a new catalog.json, which takes
the place of the old one at once (simsearch.search.change). A whole catalog is written beside its place and then moved
there. Damage and files of another catalog are reported: small files are compared with their digests when they are
opened, all files by `simsearch catalog verify`.

An item has an id, which no other item of the catalog ever gets. Positions count the items of one version.

A catalog of format 1 has index/, items.parquet and local_features.npy in place of segments. It opens as it is;
`simsearch catalog migrate`, and the first change, bring it to this format.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from simsearch.cache import cache_key
from simsearch.data.manifest import Manifest
from simsearch.data.tables import Rejected
from simsearch.errors import SimsearchError
from simsearch.files import (
    Damaged,
    checked,
    checksum,
    digests,
    is_temporary,
    read_array,
    read_json,
    replacing_folder,
    restore,
    write_csv,
    write_json,
)
from simsearch.images import ImageError
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.backbones import state_fingerprint
from simsearch.models.encoder import build, build_encoder
from simsearch.models.exported import ExportedEncoder, read_about
from simsearch.search.items import THUMBNAIL
from simsearch.search.local_features import NAME as LOCAL_FEATURES
from simsearch.search.local_features import about_local_features
from simsearch.search.names import OWN_ID, Names
from simsearch.search.segments import (
    CONTENT,
    ID,
    ItemFeatures,
    Places,
    Segment,
    SegmentedFeatures,
    SegmentedIndex,
    SegmentedThumbnails,
    items_of,
    read_old,
    read_segment,
    regroup,
    with_ids,
    write_segment,
)
from simsearch.search.verification import Verification
from simsearch.text import warn
from simsearch.trust import VERIFIERS, Untrusted, check_config, check_links
from simsearch.types import Encoder, LocalFeatures, Part

FORMAT = 2
OF_FORMAT_1 = ("index", "items.parquet", LOCAL_FEATURES)
_ENTRIES = {"catalog.json", "segments", "removed", "encoder.safetensors", "skipped.csv", *OF_FORMAT_1}
_ENTRIES |= {"calibration.json", "calibration", "frontier.csv", "frontier.png"}
_ADDED = 2**16  # vectors that an index is given together
MOST_CHANGED = 0.1  # share of the items that may come and go until a calibration does not stand any more
_TRIES = 3  # to read a catalog that changes while it is read


class CatalogError(SimsearchError, ValueError):
    """The folder is not a catalog, the catalog is damaged, or the encoder is not the catalog's own."""


def _fingerprint(about: Mapping[str, Any]) -> str:
    return checksum(about)[:16]


def _identity(about: Mapping[str, Any]) -> str:
    """The fingerprint of a catalog's first version."""
    return str(about["first"]["catalog"]) if "first" in about else _fingerprint(about)


def encoder_fingerprint(encoder: Encoder) -> str:
    """16 hex digits over the encoder's identity() and its tensors, which together determine the descriptors.

    Args:
        encoder: The encoder.
    """
    return cache_key({"identity": encoder.identity(), "state": state_fingerprint(encoder)})[:16]


@dataclass(frozen=True)
class Catalog:
    """An opened catalog.

    Attributes:
        folder: The catalog's folder.
        index: The index of the items, by position.
        items: Path and attributes, one row per item, without thumbnails.
        about: The content of catalog.json.
        calibration: The thresholds of a match (see `write_calibration`). None if the catalog is not calibrated.
        trusted: True if the user trusts whoever made the catalog.
        local: The local features of the items. None if the catalog has none.
        verification: How matches are verified by local features. None if the catalog has none.
        exported: Folder of exported files that describe queries in place of the stored encoder, or None.
        ids: int64 (N,), the ids of the items. None if they are the positions.
        contents: The SHA-256 (hex) of each item's image file, or null. None if none is known.
        pictures: The thumbnails. None for a catalog that was not read from a folder.
        segments: The segments.
        places: Where the items lie in the segments.
    """

    folder: Path
    index: FaissIndex | SegmentedIndex
    items: pa.Table
    about: dict[str, Any]
    calibration: dict[str, Any] | None = None
    trusted: bool = False
    local: ItemFeatures | None = None
    verification: Verification | None = None
    exported: Path | None = None
    ids: np.ndarray | None = None
    contents: pa.ChunkedArray | None = None
    pictures: SegmentedThumbnails | None = None
    segments: tuple[Segment, ...] = ()
    places: Places | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the description of the catalog's first version, with the digests of its files.

        They stay when items are added and removed.
        """
        return _identity(self.about)

    @cached_property
    def names(self) -> Names:
        """The names of the items."""
        own, count = self.about.get("own_ids"), int(self.about.get("next_id", len(self)))
        removed = None
        if own and self.places is not None:
            rows = [pa.array(self.places.removed_of(number)) for number in range(len(self.segments))]
            known = [
                s.items[OWN_ID].take(r).cast(pa.string()) for s, r in zip(self.segments, rows, strict=True) if len(r)
            ]
            removed = pa.chunked_array([chunk for one in known for chunk in one.chunks], pa.string())
        return Names(self.items, self.ids, own=own, given=count, removed=removed)

    def position(self, name: str) -> int:
        """The position of an item by id or path, as in `Names.find`.

        Args:
            name: The item's id or path.

        Raises:
            ValueError: If the catalog has no such item, or none any more.
        """
        found = self.names.find(name)
        if found is None and self.names.is_gone(name):
            raise ValueError(f"the item {name} was removed from the catalog {self.folder}")
        if found is None:
            is_number = self.names.own and re.fullmatch(r"[0-9]+", name)
            hint = f", or position:{name} for the item at that place" if is_number else ""
            raise ValueError(
                f"no item {name!r} in the catalog {self.folder}: give an id or path as the catalog has it{hint}"
            )
        return found

    @property
    def parts(self) -> dict[str, Part]:
        """The parts of a descriptor in the order of its columns. A code has one part, its bits."""
        if (stored := self.about.get("parts")) is not None:
            return {name: Part(**part) for name, part in stored.items()}
        width = self.index.bits if self.index.is_binary else self.index.dimension
        return {"content": Part(0, int(width or 0), 1.0)}

    def thumbnails(self, positions: Sequence[int]) -> list[bytes]:
        """The thumbnails (image bytes) of the items at some positions. Reads only the row groups that contain them.

        Args:
            positions: Positions of the items.

        Raises:
            CatalogError: If the file is damaged.
        """
        if self.pictures is None:
            raise CatalogError(f"the catalog {self.folder} has no thumbnails")
        try:
            return self.pictures.take(positions)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CatalogError(f"the catalog {self.folder} is damaged ({error}): make it again") from error

    def local_features(self, positions: Sequence[int]) -> list[LocalFeatures]:
        """The local features of the items at some positions.

        Args:
            positions: Positions of the items.

        Raises:
            CatalogError: If the catalog has none, or damaged ones.
        """
        if self.local is None:
            raise CatalogError(f"the catalog {self.folder} has no local features: make it again with verify=sift")
        try:
            return self.local.take(positions)
        except ValueError as error:
            raise CatalogError(f"the catalog {self.folder} is damaged ({error}): make it again") from error

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that filled the catalog, or its exported files. The first access builds, loads and checks it.

        Raises:
            CatalogError: If the encoder is not available, or is a different one.
            Untrusted: If the encoder's config would run code and the catalog is not trusted.
        """
        if self.exported is not None:
            return read_exported(self.exported)
        return read_encoder(self.folder, self.about, trusted=self.trusted)


def verifying(
    catalog: Catalog,
    verify: bool = True,
    *,
    top: int | None = None,
    regions: int | None = None,
    mirrored: bool | None = None,
) -> Catalog:
    """The catalog with other settings of its verification.

    Args:
        catalog: The catalog. One without local features is returned as it is.
        verify: Verify matches. False returns a catalog without local features.
        top: Number of items that are verified. None keeps the catalog's own.
        regions: Number of parts of a query that are searched too. None keeps the catalog's own.
        mirrored: Find mirrored items too. None keeps the catalog's own.

    Raises:
        ValueError: If `top` is below 1 or `regions` below 0.
    """
    if catalog.verification is None or not verify:
        return replace(catalog, local=None, verification=None)
    return replace(catalog, verification=catalog.verification.changed(top=top, regions=regions, mirrored=mirrored))


def write_encoder(folder: Path, encoder: Encoder) -> dict[str, Any]:
    """Writes the tensors of an encoder to encoder.safetensors and returns its fingerprint and provenance.

    The digest of the file is not included; the caller adds it.

    Args:
        folder: Folder to write to.
        encoder: The encoder.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    (folder / "encoder.safetensors").write_bytes(save(state))  # save_file would keep it from other users
    return {
        "encoder_fingerprint": encoder_fingerprint(encoder),
        "backbone": dict(encoder.provenance),
        **_parts(encoder),
    }


def _parts(encoder: Encoder) -> dict[str, Any]:
    """The entry `parts` for an encoder with several parts, or with codes (the index cannot tell bits from padding)."""
    if (parts := getattr(encoder, "parts", None)) is None and encoder.bits is not None:
        parts = {"content": Part(0, encoder.bits, 1.0)}
    return {} if parts is None else {"parts": {name: asdict(part) for name, part in parts.items()}}


def read_encoder(folder: Path, about: Mapping[str, Any], *, trusted: bool = False) -> Encoder:
    """The encoder that `write_encoder` wrote to `folder`, checked against `about`.

    Args:
        folder: Folder of the encoder's tensors.
        about: The folder's description with config, fingerprint and digests.
        trusted: Allow the config to build any object.

    Raises:
        CatalogError: If the encoder cannot be built, or if its tensors are damaged or belong to another encoder.
        Untrusted: If the config names an object that an encoder may not contain, and `trusted` is False.
    """
    try:
        encoder = build_encoder(about["config"], trusted=trusted)
    except (LookupError, TypeError) as error:
        raise CatalogError(f"{folder} does not record how its encoder is built: {error!r}") from error
    load_tensors(folder, about, encoder)
    return encoder


def read_exported(folder: Path) -> ExportedEncoder:
    """The encoder that `simsearch export` wrote to a folder, after a check that it describes images as torch did.

    Args:
        folder: The folder of the exported files.

    Raises:
        CatalogError: If a file is missing or damaged, or if ONNX Runtime gives other descriptors here.
    """
    try:
        encoder = ExportedEncoder(folder)
        encoder.check_samples()
    except Exception as error:  # onnxruntime has many kinds
        raise CatalogError(f"cannot use the exported encoder in {folder}: {error}") from error
    return encoder


def _check_exported(exported: Path, folder: Path, about: Mapping[str, Any]) -> None:
    """Checks that exported files come from the encoder of a catalog. Raises CatalogError."""
    try:
        other = read_about(exported).get("encoder")
    except ValueError as error:
        raise CatalogError(str(error)) from error
    if other != (own := about["encoder_fingerprint"]):
        raise CatalogError(
            f"{exported} was exported from encoder {other}, the catalog {folder} was filled by {own}: their "
            f"descriptors do not compare. Export its own: simsearch export catalog={folder} out=..."
        )


def load_tensors(folder: Path, about: Mapping[str, Any], encoder: Encoder) -> None:
    """Loads the tensors in `folder` into an encoder and checks the result against `about`.

    Args:
        folder: Folder of the encoder's tensors.
        about: The folder's description with fingerprint and digests.
        encoder: The encoder to load into.

    Raises:
        CatalogError: If the tensors are damaged or do not fit, or if the result is a different encoder.
    """
    try:
        encoder.load_state_dict(load_file(checked(folder, "encoder.safetensors", about)))
    except (RuntimeError, SafetensorError, OSError, ValueError) as error:
        raise CatalogError(f"cannot load the encoder of {folder}: {error}") from error
    encoder.provenance = dict(about["backbone"])
    own, other = about["encoder_fingerprint"], encoder_fingerprint(encoder)
    if own != other:
        raise CatalogError(
            f"{folder} was filled by encoder {own}, but this one is {other}: their descriptors cannot be compared. "
            "Search with the catalog's own encoder or make a new catalog"
        )


def fill_index(index: FaissIndex, counts: Sequence[int], read: Callable[[int], Tensor]) -> None:
    """Trains an empty index and adds all vectors to it.

    The result does not depend on how the vectors are split into parts. Many vectors are read twice: first a random
    choice of at most index.train_size vectors for training, then all of them. Besides the index, memory holds the
    training vectors, and later one block of _ADDED vectors and one part.

    Args:
        index: An empty index.
        counts: Number of vectors in each part.
        read: Function that returns the counts[i] vectors of part i.
    """
    total = sum(counts)
    index.settle(total)
    if total > _ADDED:  # else the index trains by itself
        chosen = torch.arange(total)
        if total > index.train_size:
            chosen = torch.randperm(total, generator=torch.Generator().manual_seed(index.seed))[: index.train_size]
        index.train(_take(chosen, counts, read))
    for block in regroup(map(read, range(len(counts))), _ADDED, torch.cat):
        index.add(block)


def _take(rows: Tensor, counts: Sequence[int], read: Callable[[int], Tensor]) -> Tensor:
    """The vectors at some rows of the concatenated parts, in the order of `rows`."""
    rows, order = rows.sort()
    ends = torch.tensor(counts).cumsum(0)
    cuts = [0, *torch.searchsorted(rows, ends).tolist()]
    found: Tensor | None = None
    for part, (start, stop) in enumerate(pairwise(cuts)):
        if start < stop:
            vectors = read(part)[rows[start:stop] - (ends[part] - counts[part])]
            if found is None:
                found = vectors.new_empty(len(rows), vectors.shape[1])
            found[order[start:stop]] = vectors
    assert found is not None
    return found


def write_catalog(
    folder: Path,
    *,
    index: FaissIndex,
    items: pa.Table | Iterable[pa.Table],
    encoder: Encoder,
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    errors: Sequence[ImageError | Rejected] = (),
    verification: Verification | None = None,
    local: Iterable[np.ndarray] = (),
) -> None:
    """Writes a catalog of the items in an index. It replaces a catalog that is already in `folder`.

    An item keeps the id that an item of the same path had there. A calibration is kept if the catalog is unchanged, and
    removed otherwise.

    Args:
        folder: The catalog's folder.
        index: The filled index.
        items: One row per item, in one table or several: attributes, perhaps the column CONTENT, thumbnails.
        encoder: The encoder that filled the index.
        config: The plain config that builds the encoder.
        about: Further plain facts for catalog.json (protocol, skipped files, ...).
        errors: Errors of files that could not be read, for skipped.csv.
        verification: How matches will be verified by local features. None stores no local features.
        local: The records of the items' local features, in the order of the index (see `describe_items`).

    Raises:
        ValueError: If items, index and local features differ in number.
        FileExistsError: If `folder` holds something other than a catalog.
    """
    folder = Path(folder).resolve()
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: give another out=")
    restore(folder)
    with locked(folder):
        _write_catalog(
            folder, index=index, items=items, encoder=encoder, config=config, about=about, errors=errors,
            verification=verification, local=local,
        )  # fmt: skip


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets no other process change the catalog in a folder inside the block. Nothing is locked if there is no folder.

    Args:
        folder: The catalog's folder.

    Raises:
        CatalogError: If another process changes the catalog.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        yield
    except BlockingIOError:
        raise CatalogError(f"another process changes the catalog {folder}: wait until it is done") from None
    finally:
        os.close(descriptor)


def _write_catalog(
    folder: Path,
    *,
    index: FaissIndex,
    items: pa.Table | Iterable[pa.Table],
    encoder: Encoder,
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    errors: Sequence[ImageError | Rejected],
    verification: Verification | None,
    local: Iterable[np.ndarray],
) -> None:
    entries = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if entries and "catalog.json" not in entries:
        raise FileExistsError(f"{folder} exists and is not a catalog: give another out=")
    if foreign := sorted(name for name in entries - _ENTRIES if not is_temporary(name)):
        raise FileExistsError(
            f"the catalog {folder} also holds other files ({', '.join(foreign[:3])}): give another out="
        )
    numbering = _Numbering(folder)
    with replacing_folder(folder) as temporary:
        tables = map(numbering.numbered, [items] if isinstance(items, pa.Table) else items)
        segment = write_segment(temporary, 1, index=index, items=tables, verification=verification, local=local)
        of_local = {} if verification is None else {"local_features": about_local_features(verification)}
        about = {
            "format": FORMAT,
            "version": 1,
            **write_encoder(temporary, encoder),
            "bytes_per_item": index.code_bytes,
            "config": dict(config),
            **about,
            **of_local,
            "items": len(index),
            "columns": numbering.columns,
            "own_ids": numbering.own_ids,
            "next_id": numbering.next_id,
            "segments": [segment],
            "removed": None,
            "sha256": digests(temporary, ["encoder.safetensors"]),
        }
        about["first"] = {"catalog": _fingerprint(about), "items": len(index), "next_id": about["next_id"]}
        write_json(temporary / "catalog.json", about)
        if errors:
            write_skipped(temporary, errors)
        if calibrated_for(folder) == _identity(about):
            shutil.copy(folder / "calibration.json", temporary)
            if (folder / "calibration").is_dir():
                shutil.copytree(folder / "calibration", temporary / "calibration")


def write_skipped(folder: Path, errors: Sequence[ImageError | Rejected]) -> None:
    """Writes the skipped.csv of a catalog.

    Args:
        folder: The catalog's folder.
        errors: Errors of files that could not be read.
    """
    rows = ((str(error.path), error.reason, error.detail) for error in errors)
    write_csv(folder / "skipped.csv", ["path", "reason", "detail"], rows)


class _Numbering:
    """Gives ids to the items of a new catalog. A path keeps the id that it had in the catalog in the same folder."""

    def __init__(self, folder: Path) -> None:
        self._before: dict[str, int] = {}
        self.next_id = 0
        try:
            old = read_catalog(folder, calibrated=False)
        except (ValueError, OSError, KeyError, TypeError):  # there is none, or none that can be read
            old = None
        if old is not None and "path" in old.items.column_names:
            paths, ids = old.items["path"].to_pylist(), old.names.numbers
            self._before = dict(zip(paths, ids.tolist(), strict=True))
            self.next_id = old.names.given
        self.columns: list[str] = []
        self._own: list[pa.ChunkedArray] = []
        self._counted = 0

    def numbered(self, table: pa.Table) -> pa.Table:
        """A table of items with their ids."""
        contents = table[CONTENT].to_pylist() if CONTENT in table.column_names else None
        table = table.drop_columns([CONTENT]) if contents is not None else table
        self.columns = [name for name in table.column_names if name != THUMBNAIL]
        paths = table["path"].to_pylist() if "path" in table.column_names else [None] * len(table)
        ids = np.empty(len(table), dtype=np.int64)
        for row, path in enumerate(paths):
            known = self._before.pop(path, None)
            ids[row] = self.next_id if known is None else known
            self.next_id += known is None
        self._counted += len(table)
        if OWN_ID in table.column_names:
            self._own.append(table[OWN_ID])
        return with_ids(table, ids, contents)

    @property
    def own_ids(self) -> bool:
        """Whether each item has an id of its own in the column `id`."""
        if sum(map(len, self._own)) < self._counted or not self._own:
            return False
        return Names(pa.table({OWN_ID: pa.chunked_array([c for one in self._own for c in one.chunks])})).own


def calibrated_for(folder: Path) -> str | None:
    """The fingerprint of the catalog that the calibration in `folder` belongs to.

    Args:
        folder: The catalog's folder.

    Returns:
        The fingerprint, None if there is no calibration, or "" if the calibration does not say.
    """
    try:
        return str(read_json(folder / "calibration.json").get("catalog", ""))
    except (OSError, ValueError):
        return "" if (folder / "calibration.json").exists() else None


def read_catalog(
    folder: Path, *, calibrated: bool = True, trusted: bool = False, exported: Path | None = None
) -> Catalog:
    """The catalog in a folder.

    Args:
        folder: The catalog's folder.
        calibrated: Also read the calibration, if there is one.
        trusted: Allow links to lead out of the folder.
        exported: Folder of `simsearch export`, whose files describe queries in ONNX Runtime in place of the stored
            encoder. None for the stored encoder.

    Raises:
        CatalogError: If the folder holds no catalog, or a damaged one, or if `exported` is of another encoder.
        Untrusted: If a link leads out of the folder, or the verification would run code, and `trusted` is False.
    """
    folder = Path(folder)
    restore(folder)
    if not trusted and folder.is_dir():
        check_links(folder)
    for left in reversed(range(_TRIES)):
        about = read_manifest(folder)
        try:
            catalog = _opened(folder, about, trusted)
        except CatalogError:
            if left and _has_changed(folder, about):  # its segments were merged and deleted meanwhile
                continue
            raise
        break
    if exported is not None:
        if not trusted and exported.is_dir():
            check_links(exported)
        _check_exported(exported, folder, about)
        catalog = replace(catalog, exported=exported)
    return replace(catalog, calibration=_read_calibration(catalog)) if calibrated else catalog


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of the catalog.json in a folder.

    Args:
        folder: The catalog's folder.

    Raises:
        CatalogError: If there is none, or a damaged one, or one of an unknown format.
    """
    try:
        about = read_json(folder / "catalog.json")
    except OSError as error:
        raise CatalogError(
            f"no catalog in {folder} ({error}): make one by `simsearch index run=... images=...`, or give "
            "the catalog folder of a run"
        ) from error
    except ValueError as error:
        raise CatalogError(f"the catalog {folder} is damaged ({error}): make it again") from error
    if about.get("format") not in (1, FORMAT):
        raise CatalogError(f"{folder} has catalog format {about.get('format')}, this version reads 1 and {FORMAT}")
    needed = {"encoder_fingerprint", "backbone", "config"}
    if about["format"] == FORMAT:
        needed |= {"version", "segments", "removed", "columns", "items", "next_id", "own_ids", "first"}
    if missing := sorted(needed - set(about)):
        raise CatalogError(
            f"the catalog {folder} is damaged (catalog.json does not have {', '.join(missing)}): make it again"
        )
    return about


def _has_changed(folder: Path, about: Mapping[str, Any]) -> bool:
    try:
        return read_json(folder / "catalog.json") != about
    except (OSError, ValueError):
        return False


def _opened(folder: Path, about: dict[str, Any], trusted: bool) -> Catalog:
    """The catalog that `about` describes. Raises CatalogError if it is damaged."""
    verification = _verification(folder, about, trusted)
    try:
        if about["format"] == 1:
            segments = [read_old(folder, about, verification)]
            places = Places([len(segments[0])], np.empty(0, dtype=np.int64))
            columns = [name for name in segments[0].items.column_names if name not in (ID, CONTENT)]
        else:
            segments = [read_segment(folder, entry, verification) for entry in about["segments"]]
            places, columns = Places(list(map(len, segments)), read_removed(folder, about)), list(about["columns"])
        if not segments or len(places) != int(about.get("items", len(places))):
            raise ValueError(f"it holds {len(places)} items, not {about.get('items')}")
        table = items_of(segments, places)
        one = len(segments) == 1 and not len(places.removed)
        index = segments[0].index if one else SegmentedIndex([segment.index for segment in segments], places)
        for name in set(columns) - set(table.column_names):  # of a table in which nobody has a value
            table = table.append_column(name, pa.nulls(len(table), pa.string()))
        items = table.select(columns)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise CatalogError(f"the catalog {folder} is damaged ({error}): make it again") from error
    stored = [segment.local for segment in segments if segment.local is not None]
    local = None if verification is None else SegmentedFeatures(stored, places)
    pictures = SegmentedThumbnails([segment.thumbnails for segment in segments], places)
    ids = None if about["format"] == 1 else table[ID].to_numpy()
    return Catalog(
        folder, index, items, about, trusted=trusted, local=local, verification=verification, ids=ids,
        contents=table[CONTENT], pictures=pictures, segments=tuple(segments), places=places,
    )  # fmt: skip


def read_removed(folder: Path, about: Mapping[str, Any]) -> np.ndarray:
    """The rows of a catalog's segments that were removed, int64, ascending.

    Args:
        folder: The catalog's folder.
        about: The content of catalog.json.

    Raises:
        Damaged: If the file is not the one that was written.
        OSError: If it is missing.
    """
    if (known := about["removed"]) is None:
        return np.empty(0, dtype=np.int64)
    name = f"removed/{int(known['version'])}.npy"
    removed = read_array(checked(folder, name, {"sha256": {name: known["sha256"]}}), np.dtype(np.int64))
    if removed.shape != (known["rows"],):
        raise Damaged(f"{folder / name} holds {removed.shape} rows, not {known['rows']}")
    return removed


def _verification(folder: Path, about: Mapping[str, Any], trusted: bool) -> Verification | None:
    """How a catalog verifies matches, or None. Raises CatalogError if that is damaged."""
    if (of_local := about.get("local_features")) is None:
        return None
    try:
        config = {"verification": of_local["verification"]}
        if not trusted:
            check_config(config, f"the catalog {folder}", VERIFIERS)
        return build(config, None if trusted else VERIFIERS)["verification"]
    except Untrusted:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CatalogError(f"the catalog {folder} is damaged ({error}): make it again") from error


def write_calibration(folder: Path, calibration: Mapping[str, Any]) -> None:
    """Writes the catalog's calibration.json atomically. `read_catalog` reads it.

    The calibration has these entries:

    - `catalog`: fingerprint of the catalog that the calibration belongs to; another catalog refuses it.
    - `items`, `next_id`: number of its items then, and the id that the next one got (see simsearch.search.drift).
    - `same_work`, `similar`: thresholds, as `thresholds_at` returns them (see `Engine.verdicts`). `similar` is None if
      it was not calibrated.
    - `verified`: thresholds of the number of inliers, by which an item is the same work where it is verified by local
      features. Missing if they were not calibrated.
    - `floor`: the cosine that a similar item must exceed.
    - `neighbours`: number of neighbours that a background averages over.
    - `rate`: the promised rate of false matches of each kind; `of`: what it is a rate of. `asked`: the requested rate.
    - `certainty`: the probability with which each promise holds.
    - `weights`: weights of the descriptor's parts.
    - `units`: number of independent draws behind the thresholds.
    - `held_out`: what the first threshold does to held-out queries. `coverage`: the share of true matches that it
      finds, at least, with the certainty.
    - `photographs`: what is found, false and unknown of photographs whose works are known, if any.

    Only the thresholds, `floor` and `neighbours` are needed; calibrations of earlier versions have fewer entries.

    Args:
        folder: The catalog's folder.
        calibration: The entries above.
    """
    write_json(folder / "calibration.json", calibration)


def _read_calibration(catalog: Catalog) -> dict[str, Any] | None:
    path = catalog.folder / "calibration.json"
    try:
        calibration = read_json(path)
        if isinstance(calibration.get("same_work"), (int, float)):
            warn(
                f"note: {path} was made by an earlier method, which counted images of one work as independent and kept "
                "its rate less often than stated: it is not used. simsearch calibrate makes it anew"
            )
            return None
        kinds = ["same_work"] if calibration["similar"] is None else ["same_work", "similar"]
        kinds += ["verified"] if "verified" in calibration else []
        if not all(len(calibration[kind]) and [float(value) for value in calibration[kind]] for kind in kinds):
            raise ValueError("no threshold")
        if "similar" in kinds:
            float(calibration["floor"])
        if int(calibration["neighbours"]) < 1:
            raise ValueError("neighbours")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CatalogError(
            f"{path} is damaged or was written by another version ({error!r}): delete it, or calibrate again"
        ) from error
    if calibration.get("catalog", catalog.fingerprint) != catalog.fingerprint:  # older ones do not say
        raise CatalogError(f"{path} belongs to another catalog, whose scores differ: delete it, or calibrate again")
    came, went, share = turnover(catalog, calibration)
    if share > MOST_CHANGED:
        warn(
            f"note: {came} items of the catalog {catalog.folder} came and {went} went since it was calibrated: what it "
            "promises may not hold any more. simsearch calibrate makes the calibration anew"
        )
    return calibration


def turnover(catalog: Catalog, calibration: Mapping[str, Any]) -> tuple[int, int, float]:
    """The numbers of items that came and went since a calibration, and their share of all items, then and now.

    Args:
        catalog: The catalog.
        calibration: Its calibration. One that does not say how many items there were is of the first version.
    """
    first = catalog.about.get("first") or {"items": len(catalog), "next_id": len(catalog)}  # of format 1
    then, next_id = (int(calibration.get(name, first[name])) for name in ("items", "next_id"))
    came = int((catalog.names.numbers >= next_id).sum())
    went = then - (len(catalog) - came)
    return came, went, (came + went) / max(1, then + came)


def item_table(columns: Mapping[str, Sequence[Any]], thumbnails: Sequence[bytes]) -> pa.Table:
    """The items of a catalog as a table: the given columns and the thumbnails.

    Args:
        columns: The values of each column.
        thumbnails: Image bytes, one per item.
    """
    return with_thumbnails(pa.table({n: pa.array(v) for n, v in columns.items()}), thumbnails)


def path_table(manifest: Manifest) -> pa.Table:
    """Path and attributes of a manifest's images, as text.

    Args:
        manifest: The images and their attributes.

    Raises:
        ValueError: If a column has a name that search results use themselves.
    """
    if reserved := sorted({"rank", "score", "verdict", THUMBNAIL, ID, CONTENT} & set(manifest.attributes)):
        raise ValueError(
            f"the images have the columns {', '.join(reserved)}, whose names results use already: rename them"
        )
    return pa.table({n: pa.array(v, pa.string()) for n, v in {"path": manifest.paths, **manifest.attributes}.items()})


def with_thumbnails(table: pa.Table, thumbnails: Sequence[bytes]) -> pa.Table:
    """A table with the thumbnails as an additional column.

    Args:
        table: Path and attributes of the items.
        thumbnails: Image bytes, one per item.
    """
    return table.append_column(THUMBNAIL, pa.array(thumbnails, pa.binary()))
