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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from simsearch.files import Damaged, checked, checksum, read_array, read_json, restore
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.encoder import build
from simsearch.search.calibration_file import read_calibration
from simsearch.search.encoder_files import check_exported, read_encoder, read_exported
from simsearch.search.errors import CatalogError
from simsearch.search.local_features import NAME as LOCAL_FEATURES
from simsearch.search.local_features import check_software
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
)
from simsearch.search.verification import Verification
from simsearch.text import warn
from simsearch.trust import VERIFIERS, Untrusted, check_config, check_links
from simsearch.types import Encoder, LocalFeatures, Part

FORMAT = 2
OF_FORMAT_1 = ("index", "items.parquet", LOCAL_FEATURES)
MOST_CHANGED = 0.1  # share of the items that may come and go until a calibration does not stand any more
_TRIES = 3  # to read a catalog that changes while it is read


def first_fingerprint(about: Mapping[str, Any]) -> str:
    """The fingerprint of a catalog's first version.

    Args:
        about: The content of catalog.json, or what will be the first.
    """
    return str(about["first"]["catalog"]) if "first" in about else checksum(about)[:16]


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
        return first_fingerprint(self.about)

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
        check_exported(exported, folder, about)
        catalog = replace(catalog, exported=exported)
    if calibrated and (calibration := read_calibration(folder, catalog.fingerprint)) is not None:
        catalog = replace(catalog, calibration=calibration)
        came, went, share = turnover(catalog, calibration)
        if share > MOST_CHANGED:
            warn(
                f"note: {came} items of the catalog {folder} came and {went} went since it was calibrated: what it "
                "promises may not hold any more. simsearch calibrate makes the calibration anew"
            )
    return catalog


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
        verification = build(config, None if trusted else VERIFIERS)["verification"]
        check_software(of_local, verification, f"the catalog {folder}")
        return verification
    except Untrusted:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CatalogError(f"the catalog {folder} is damaged ({error}): make it again") from error


def arrivals(catalog: Catalog, calibration: Mapping[str, Any]) -> np.ndarray:
    """bool (N,), which items came since a calibration.

    Args:
        catalog: The catalog.
        calibration: Its calibration. One that does not say how many items there were is of the first version.
    """
    return catalog.names.numbers >= int(calibration.get("next_id", _first(catalog)["next_id"]))


def turnover(catalog: Catalog, calibration: Mapping[str, Any]) -> tuple[int, int, float]:
    """The numbers of items that came and went since a calibration, and their share of all items, then and now.

    An item whose image changed went and came.

    Args:
        catalog: The catalog.
        calibration: Its calibration. One that does not say how many items there were is of the first version.
    """
    then = int(calibration.get("items", _first(catalog)["items"]))
    new = int(arrivals(catalog, calibration).sum())
    again = int(catalog.about.get("changed") or 0) - int(calibration.get("changed") or 0)
    came, went = new + again, then - (len(catalog) - new) + again
    return came, went, (came + went) / max(1, then + came)


def _first(catalog: Catalog) -> dict[str, Any]:
    return catalog.about.get("first") or {"items": len(catalog), "next_id": len(catalog)}  # of format 1
