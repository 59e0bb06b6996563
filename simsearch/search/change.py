"""Changes of a catalog: items are added, described again and removed, segments merged. Readers are not disturbed.

A change writes new files beside the old ones. Then a new catalog.json takes the place of the old one, in one step, and
files that it does not name are deleted. A process that is killed leaves the old version or the new one, and perhaps
files that the next change deletes. Whoever has opened an older version goes on to read it, since open files stay.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from simsearch.data.manifest import Manifest, lists_files
from simsearch.data.manifest import read_manifest as list_images
from simsearch.data.presence import Presence
from simsearch.files import clear_leftovers, sha256, write_array, write_json
from simsearch.images import ImageError
from simsearch.index.auto import AutoIndex
from simsearch.index.faiss_index import SETTINGS, FaissIndex
from simsearch.search.build import check_not_fewer, content_digests, local_records
from simsearch.search.catalog import FORMAT, OF_FORMAT_1, Catalog, read_catalog, read_manifest, read_removed
from simsearch.search.describe import batches_of, describe
from simsearch.search.encoder_files import encoder_fingerprint
from simsearch.search.errors import CatalogError
from simsearch.search.item_tables import path_table, with_thumbnails
from simsearch.search.local_features import about_local_features
from simsearch.search.plan import Plan, check_own_ids, texts
from simsearch.search.segments import Places, damaged_files, with_ids, write_segment
from simsearch.search.verification import Verification
from simsearch.search.writing import locked, read_skipped, write_skipped
from simsearch.trust import check_links
from simsearch.types import Encoder

THUMBNAIL_SIDE = 256  # of catalogs that do not say theirs
_BLOCK = 1024  # items that are copied together
_NUMBERED = {"segments": re.compile(r"[0-9]+"), "removed": re.compile(r"[0-9]+\.npy")}
_OF_FORMAT_1 = ("items_sha256", "bytes_per_item", "sha256", "local_features", "format", "items")


@dataclass(frozen=True)
class Change:
    """What a change did to a catalog. Items are named by the numbers that the catalog gave them.

    Attributes:
        version: The version of the catalog afterwards.
        added: Items that are new.
        changed: Items whose image has changed, so that they were described again.
        edited: Items whose path or attributes have changed, but not their image.
        removed: Items that are gone.
        kept: Number of items that stayed as they were.
        errors: Errors of the images that could not be read.
    """

    version: int
    added: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    edited: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    kept: int = 0
    errors: tuple[ImageError, ...] = ()

    def __str__(self) -> str:
        counts = {"added": self.added, "changed": self.changed, "edited": self.edited, "removed": self.removed}
        said = [f"{len(ids)} {name}" for name, ids in counts.items() if ids]
        return f"version {self.version}: {', '.join([*said, f'{self.kept} as they were'])}"


@contextmanager
def changing(folder: Path, *, trusted: bool = False) -> Iterator[Catalog]:
    """Yields the catalog in a folder, in the present format. No other process can change it meanwhile.

    Args:
        folder: The catalog's folder.
        trusted: Allow links to lead out of the folder.

    Raises:
        CatalogError: If there is no catalog, or a damaged one, or if another process changes it.
        OSError: If the folder cannot be written to.
    """
    folder = Path(folder)
    read_manifest(folder)
    with locked(folder):
        catalog = read_catalog(folder, calibrated=False, trusted=trusted)
        if catalog.about["format"] != FORMAT:
            _rewrite_old(catalog)
            catalog = read_catalog(folder, calibrated=False, trusted=trusted)
        _clean(folder, catalog.about)
        yield catalog


def settings_for(
    folder: Path, encoder: Encoder, index: FaissIndex | AutoIndex | None, verification: Verification | None
) -> tuple[FaissIndex | AutoIndex, Verification | None]:
    """The empty index and the verification for a catalog: the given ones, or else those of the catalog in its folder.

    Where there is none, or where its index does not fit the encoder, the search is exact.

    Args:
        folder: The catalog's folder.
        encoder: The encoder that describes the images.
        index: The empty index that was given, or what chooses one (which fits floats and codes), or None.
        verification: How matches are to be verified, if that was given, or None.

    Raises:
        ValueError: If the index is for floats and the encoder for codes, or the other way round, or if FAISS makes no
            such index of descriptors of this width.
    """
    codes = encoder.bits is not None
    if isinstance(index, FaissIndex) and index.is_binary != codes:
        kind, fitting = ("codes", "binary-flat, binary-hnsw") if codes else ("float descriptors", "flat, hnsw, ivf-pq")
        raise ValueError(f"the index {index.factory} does not fit this run, which gives {kind}: take {fitting} or so")
    try:
        before = read_catalog(folder, calibrated=False)
    except (OSError, ValueError):
        before = None
    if index is None:
        own = None if before is None else before.segments[0].index
        fits = own is not None and own.is_binary == codes
        index = FaissIndex(**own.settings) if fits else FaissIndex("BFlat" if codes else "Flat")  # type: ignore[union-attr]
    if isinstance(index, FaissIndex):
        index.check_width(-(-encoder.bits // 8) if encoder.bits is not None else encoder.dimension)
    return index, verification or (None if before is None else before.verification)


def takes(folder: Path, encoder: Encoder, index: FaissIndex | AutoIndex, verification: Verification | None) -> bool:
    """Whether a folder holds a catalog that `update` can bring to what a new catalog would be.

    A choice of the index is made anew, of all items.

    Args:
        folder: The folder.
        encoder: The encoder that would describe the images.
        index: The empty index of the new catalog, or what chooses one.
        verification: How matches would be verified. None leaves it to the catalog.
    """
    try:
        catalog = read_catalog(folder, calibrated=False)
    except (OSError, ValueError):
        return False
    if isinstance(index, AutoIndex):
        return False
    own, index = catalog.segments[0].index, copy(index)
    index.settle_as(own)  # a training stays, however many items segments hold later
    if "path" not in catalog.items.column_names or any(getattr(own, n) != getattr(index, n) for n in SETTINGS):
        return False
    known = None if catalog.verification is None else catalog.verification.config
    if verification is not None and verification.config != known:
        return False
    return catalog.about["encoder_fingerprint"] == encoder_fingerprint(encoder)


def manifest_to_add(folder: Path, source: Path, root: Path | None, *, trusted: bool = False) -> Manifest:
    """The images of a folder, an image or a table, as those of the collection of a catalog.

    Below the folder of the catalog's images, paths are relative to it, and labels that the catalog has from its folders
    are those that it would give.

    Args:
        folder: The catalog's folder.
        source: A folder, an image, or a table.
        root: Folder that paths are relative to. None means the usual one.
        trusted: Allow links to lead out of the catalog's folder.

    Raises:
        CatalogError: If the catalog is damaged.
        ValueError: If the source holds no images, or if the table cannot be read.
    """
    usual = usual_root(folder, source) if root is None else None
    manifest = list_images(source, root or usual)
    if usual is None or not lists_files(source):
        return manifest
    items = read_catalog(folder, calibrated=False, trusted=trusted).items
    if not {"label", "path"} <= set(items.column_names):
        return manifest
    others = {name: column for name, column in manifest.attributes.items() if name != "label"}
    if texts(items["label"]) != _first_folders(items["path"].to_pylist()):  # of a table
        return replace(manifest, attributes=others)
    return replace(manifest, attributes={**others, "label": tuple(_first_folders(manifest.paths))})


def _first_folders(paths: Sequence[str]) -> list[str | None]:
    return [first if below else None for first, _, below in (path.partition("/") for path in paths)]


def usual_root(folder: Path, source: Path) -> Path | None:
    """The folder that paths of new images are relative to: that of the catalog's images, if they lie in it, else None.

    Args:
        folder: The catalog's folder.
        source: A folder, an image, or a table.
    """
    known = (read_manifest(folder).get("source") or {}).get("images")
    root = None if known is None else Path(known)
    return root if root is not None and root.is_dir() and source.is_relative_to(root) else None


def migrate(folder: Path, *, trusted: bool = False) -> bool:
    """Brings a catalog of format 1 to the present format, and returns whether it was of format 1. Ids are positions.

    Args:
        folder: The catalog's folder.
        trusted: Allow links to lead out of the folder.

    Raises:
        CatalogError: As `changing` does.
    """
    old = read_manifest(folder)["format"] != FORMAT
    with changing(folder, trusted=trusted):
        return old


def update(
    folder: Path,
    manifest: Manifest,
    encoder: Encoder | None = None,
    *,
    remove: bool,
    fewer: bool = False,
    thumbnail: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | None = None,
    trusted: bool = False,
) -> Change:
    """Adds the images of a manifest that a catalog does not have, and describes again those whose files have changed.

    An image is known by its path, and a file by its SHA-256; one that was not recorded counts as changed. Items keep
    their ids, and so does, with `remove`, an image whose path has changed. Only what is new or changed is described.

    Args:
        folder: The catalog's folder.
        manifest: The images and their attributes.
        encoder: The catalog's encoder, if it is loaded already.
        remove: The manifest lists the whole collection: other items are removed, and attributes that it does not have.
        fewer: Allow far fewer items than before.
        thumbnail: Longest side in pixels of thumbnails. None means what the catalog was made with.
        batch_size: Number of images per forward pass, 1 or more.
        workers: Number of additional processes that decode files, 0 or more.
        device: Device of the catalog's encoder, if it has to be loaded. None means the CPU.
        trusted: Allow the encoder's config to build any object, and links to lead out of the folder.

    Raises:
        CatalogError: As `changing` does.
        ValueError: If a column's name is reserved, if ids would not be distinct, or if far fewer items would be left.
        Vanished: If images disappear during the work.
    """
    table = path_table(manifest)
    with changing(folder, trusted=trusted) as catalog:
        if "path" not in catalog.items.column_names:
            raise ValueError(f"the items of the catalog {folder} have no paths: make it again to add to it")
        plan = Plan.of(catalog, table, content_digests(manifest.root, manifest.paths), remove=remove)
        side = thumbnail or int(catalog.about.get("thumbnail") or THUMBNAIL_SIDE)
        described = _Described.of(catalog, manifest, plan, encoder, device, side, batch_size, workers)
        at = {row: position for row, position in enumerate(plan.position) if position is not None}
        failed = sorted(set(plan.describe) - set(described.rows)) if remove else []
        gone = [*plan.gone, *(at[row] for row in failed if row in at)]
        changed = [at[row] for row in described.rows if row in at]
        new = [row for row in described.rows if row not in at]
        left = len(catalog) - len(gone) + len(new)
        if remove:
            check_not_fewer(folder, left, fewer)
        if left == 0:
            raise ValueError(f"no item of the catalog {folder} would be left")
        errors: list[Any] = [*described.errors, *manifest.rejected]
        numbers = catalog.names.numbers
        next_id = int(catalog.about["next_id"])
        ids = plan.ids(described.rows, numbers, next_id)
        edited = sorted(plan.edits)
        outcome = Change(
            version=int(catalog.about["version"]),
            added=tuple(one for one, row in zip(ids, described.rows, strict=True) if row not in at),
            changed=tuple(int(numbers[position]) for position in changed),
            edited=tuple(int(numbers[position]) for position in edited),
            removed=tuple(int(numbers[position]) for position in gone),
            kept=len(catalog) - len(gone) - len(changed) - len(edited),
            errors=tuple(described.errors),  # type: ignore[arg-type]
        )
        source = {**(catalog.about.get("source") or {}), "images": str(manifest.root)}
        if new or changed or edited or gone or (remove and source != catalog.about.get("source")):
            attributes = (
                plan.attributes(catalog, table, [plan.edits[position] for position in edited], edited),
                plan.attributes(catalog, table, described.rows, [plan.position[row] for row in described.rows]),
            )
            check_own_ids(catalog, attributes, [*gone, *changed, *edited])
            tables = _tables(catalog, plan, attributes, described, ids, edited)
            entry = _write(catalog, manifest, tables, described, edited, workers) if edited or described.rows else None
            changes: dict[str, Any] = {"columns": plan.columns, "next_id": next_id + len(new)}
            changes["changed"] = int(catalog.about.get("changed") or 0) + len(changed)  # ever; see `turnover`
            if remove:
                changes |= {"skipped": manifest.skipped | _reasons(described.errors), "source": source}
            outcome = replace(outcome, version=_commit(catalog, [*gone, *changed, *edited], entry, changes))
        read = {str(manifest.root / manifest.paths[row]) for row in described.rows}
        write_skipped(
            folder, errors, kept=[] if remove else [row for row in read_skipped(folder) if row[0] not in read]
        )
        return outcome


def remove(folder: Path, names: Sequence[str | int], *, trusted: bool = False) -> Change:
    """Removes items of a catalog.

    Args:
        folder: The catalog's folder.
        names: Their ids or paths.
        trusted: Allow links to lead out of the folder.

    Raises:
        CatalogError: As `changing` does.
        ValueError: If there is no such item, or if none would be left.
    """
    with changing(folder, trusted=trusted) as catalog:
        gone = sorted({catalog.position(str(name)) for name in names})
        if len(gone) == len(catalog):
            raise ValueError(f"no item of the catalog {folder} would be left: delete the folder instead")
        if not gone:
            raise ValueError("no item is named: give ids or paths")
        ids = tuple(int(number) for number in catalog.names.numbers[gone])
        return Change(_commit(catalog, gone, None, {}), removed=ids, kept=len(catalog) - len(gone))


def compact(folder: Path, *, trusted: bool = False) -> Change:
    """Merges the segments of a catalog into one, without what was removed. Ids, order and answers stay.

    Args:
        folder: The catalog's folder.
        trusted: Allow links to lead out of the folder.

    Raises:
        CatalogError: As `changing` does.
    """
    with changing(folder, trusted=trusted) as catalog:
        version = int(catalog.about["version"])
        if len(catalog.segments) > 1 or catalog.about["removed"] is not None:
            everything = np.arange(len(catalog))
            version = _commit(catalog, everything, _copied(catalog, everything, version + 1), {})
        return Change(version, kept=len(catalog))


def problems(folder: Path, *, trusted: bool = False) -> list[str]:
    """Compares each file of a catalog with its digest, and returns what is wrong, one line each.

    Args:
        folder: The catalog's folder.
        trusted: Allow links to lead out of the folder.
    """
    try:
        if not trusted and folder.is_dir():
            check_links(folder)
        about = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    found = []
    if about["format"] == FORMAT:
        for entry in about["segments"]:
            found += list(damaged_files(folder, entry))
        try:
            read_removed(folder, about)
        except (OSError, ValueError) as error:
            found.append(str(error))
    if (digest := about.get("sha256", {}).get("encoder.safetensors")) is not None:
        try:
            if sha256(folder / "encoder.safetensors") != digest:
                found.append(f"{folder / 'encoder.safetensors'} is damaged: its SHA-256 is not the recorded one")
        except OSError as error:
            found.append(str(error))
    if not found:  # what is whole must fit together
        try:
            catalog = read_catalog(folder, trusted=trusted)
            numbers = catalog.names.numbers
            if len(np.unique(numbers)) < len(numbers) or (numbers >= catalog.names.given).any():
                found.append(f"{folder}: two items have one id, or an id that was never given")
            if about["format"] != FORMAT:
                for start in range(0, len(catalog), _BLOCK):
                    block = range(start, min(start + _BLOCK, len(catalog)))
                    catalog.thumbnails(block)
                    _ = None if catalog.local is None else catalog.local_features(block)
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


# ----------------------------------------------------------------------------------------- describing


@dataclass(frozen=True)
class _Described:
    """Images of a manifest that were described: their rows, vectors, thumbnails, and the errors of the others."""

    rows: list[int]
    vectors: torch.Tensor
    thumbnails: list[bytes]
    errors: list[ValueError]

    @classmethod
    def of(
        cls,
        catalog: Catalog,
        manifest: Manifest,
        plan: Plan,
        encoder: Encoder | None,
        device: torch.device | None,
        thumbnail: int,
        batch_size: int,
        workers: int,
    ) -> _Described:
        if not plan.describe:
            return cls([], torch.empty(0), [], [])
        encoder = catalog.encoder.to(device or torch.device("cpu")) if encoder is None else encoder
        some = _subset(manifest, plan.describe)
        batches = batches_of(encoder, some, batch_size=batch_size, workers=workers)
        with tqdm(total=len(some), unit="img", desc="index") as bar:
            presence = Presence(some.root, some.paths)
            found = describe(encoder, batches, thumbnail=thumbnail, presence=presence, advance=bar.update)
        rows = [plan.describe[place] for place in found.rows.tolist()]
        return cls(rows, found.vectors, found.thumbnails, found.errors)


def _subset(manifest: Manifest, rows: Sequence[int]) -> Manifest:
    attributes = {name: tuple(column[row] for row in rows) for name, column in manifest.attributes.items()}
    return replace(manifest, paths=tuple(manifest.paths[row] for row in rows), attributes=attributes)


def _reasons(errors: Sequence[ValueError]) -> dict[str, int]:
    reasons = [error.reason for error in errors]  # type: ignore[attr-defined]
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


# --------------------------------------------------------------------------------------------- writing


def _tables(
    catalog: Catalog,
    plan: Plan,
    attributes: tuple[pa.Table, pa.Table],
    described: _Described,
    ids: Sequence[int],
    edited: Sequence[int],
) -> Iterator[pa.Table]:
    """The items of a new segment: edited ones in blocks, then those that were described."""
    of_edited, of_described = attributes
    for start in range(0, len(edited), _BLOCK):
        block = edited[start : start + _BLOCK]
        own = with_thumbnails(of_edited.slice(start, _BLOCK), catalog.thumbnails(block))
        contents = [plan.contents[plan.edits[position]] for position in block]
        yield with_ids(own, catalog.names.numbers[list(block)], contents)
    if described.rows:
        contents = [plan.contents[row] for row in described.rows]
        yield with_ids(with_thumbnails(of_described, described.thumbnails), np.array(ids, dtype=np.int64), contents)


def _write(
    catalog: Catalog,
    manifest: Manifest,
    tables: Iterable[pa.Table],
    described: _Described,
    edited: Sequence[int],
    workers: int,
) -> dict[str, Any]:
    """Writes a segment of edited items, whose vectors are copied, and described images. Returns its entry."""
    index = _joined(catalog, edited)
    if described.rows:
        index.add(described.vectors)

    def local() -> Iterator[np.ndarray]:
        assert catalog.verification is not None
        yield from _records(catalog, edited)
        presence = Presence(manifest.root, manifest.paths)
        yield from local_records(manifest, described.rows, catalog.verification, workers, presence)

    return write_segment(
        catalog.folder,
        int(catalog.about["version"]) + 1,
        index=index,
        items=tables,
        verification=catalog.verification,
        local=() if catalog.verification is None else local(),
    )


def _joined(catalog: Catalog, positions: Sequence[int] | np.ndarray) -> FaissIndex:
    """An index of the items at ascending positions, with their codes."""
    assert catalog.places is not None
    parts = catalog.places.split(positions) if len(positions) else []
    if not parts:
        return catalog.segments[0].index.emptied()
    return FaissIndex.joined([(catalog.segments[n].index, torch.from_numpy(rows)) for n, _, rows in parts])


def _records(catalog: Catalog, positions: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
    """The records of local features of the items at ascending positions."""
    assert catalog.places is not None
    for number, _, rows in catalog.places.split(positions) if len(positions) else []:
        local = catalog.segments[number].local
        assert local is not None
        yield from local.records(rows.tolist())


def _copied(catalog: Catalog, positions: np.ndarray, number: int) -> dict[str, Any]:
    """Writes a segment of items at ascending positions. Returns its entry."""
    assert catalog.contents is not None

    def tables() -> Iterator[pa.Table]:
        contents = catalog.contents
        assert contents is not None
        for block in np.split(positions, range(_BLOCK, len(positions), _BLOCK)):
            at = pa.array(block, pa.int64())
            table = with_thumbnails(catalog.items.take(at), catalog.thumbnails(block.tolist()))
            yield with_ids(table, catalog.names.numbers[block], contents.take(at).to_pylist())

    return write_segment(
        catalog.folder,
        number,
        index=_joined(catalog, positions),
        items=tables(),
        verification=catalog.verification,
        local=() if catalog.verification is None else _records(catalog, positions),
    )


def _commit(
    catalog: Catalog, gone: Sequence[int] | np.ndarray, entry: Mapping[str, Any] | None, changes: Mapping[str, Any]
) -> int:
    """Makes a new version without the items at some positions and with a new segment. Returns its number."""
    assert catalog.places is not None
    about, folder = catalog.about, catalog.folder
    version = int(about["version"]) + 1
    counts = [int(one["items"]) for one in about["segments"]]
    rows = np.union1d(catalog.places.removed, catalog.places.rows(np.array(sorted(gone), dtype=np.int64)))
    places = Places(counts, rows)
    segments, removed, start = [], [], 0
    for number, one in enumerate(about["segments"]):
        own = places.removed_of(number)
        if len(own) < counts[number]:  # else nothing of it is left
            segments.append(one)
            removed.append(own + start)
            start += counts[number]
    left = np.concatenate([*removed, np.empty(0, dtype=np.int64)]).astype(np.int64)
    if entry is not None:
        segments.append(dict(entry))
    of_removed = None
    if len(left):
        write_array(folder / "removed" / f"{version}.npy", left)
        of_removed = {"version": version, "rows": len(left), "sha256": sha256(folder / "removed" / f"{version}.npy")}
    count = sum(int(one["items"]) for one in segments) - len(left)
    made = {**about, **changes, "version": version, "items": count, "segments": segments, "removed": of_removed}
    if read_manifest(folder) != about:
        raise CatalogError(f"the catalog {folder} was replaced meanwhile: nothing was changed; give the command again")
    write_json(folder / "catalog.json", made)
    _clean(folder, made)
    return version


def _rewrite_old(catalog: Catalog) -> None:
    """Brings an opened catalog of format 1 to the present format."""
    shutil.rmtree(catalog.folder / "segments", ignore_errors=True)  # of a process that was killed
    entry = _copied(catalog, np.arange(len(catalog)), 1)
    about = {name: value for name, value in catalog.about.items() if name not in _OF_FORMAT_1}
    if catalog.verification is not None:
        known = about_local_features(catalog.verification)  # but not with which software
        about["local_features"] = {name: known[name] for name in ("verification", "bytes_per_item")}
    if (digest := catalog.about.get("sha256", {}).get("encoder.safetensors")) is not None:
        about["sha256"] = {"encoder.safetensors": digest}
    made = {
        "format": FORMAT,
        "version": 1,
        **about,
        "bytes_per_item": catalog.about.get("bytes_per_item", catalog.index.code_bytes),
        "items": len(catalog),
        "columns": catalog.items.column_names,
        "own_ids": catalog.names.own,
        "next_id": len(catalog),
        "segments": [entry],
        "removed": None,
        "first": {"catalog": catalog.fingerprint, "items": len(catalog), "next_id": len(catalog)},
    }
    write_json(catalog.folder / "catalog.json", made)
    _clean(catalog.folder, made)


def _clean(folder: Path, about: Mapping[str, Any]) -> None:
    """Deletes the files of a catalog that its present version does not name."""
    for name in ("catalog.json", "calibration.json", "skipped.csv"):
        clear_leftovers(folder / name)
    clear_leftovers(folder)
    named = {str(entry["folder"]) for entry in about["segments"]}
    if about["removed"] is not None:
        named.add(f"removed/{about['removed']['version']}.npy")
    for kind, pattern in _NUMBERED.items():
        with suppress(FileNotFoundError):
            for path in (folder / kind).iterdir():
                if pattern.fullmatch(path.name) and f"{kind}/{path.name}" not in named:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    clear_leftovers(folder / "removed" / f"{int(about['version']) + 1}.npy")
    with suppress(OSError):  # it holds a file, or is not there
        (folder / "removed").rmdir()
    for name in OF_FORMAT_1:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
