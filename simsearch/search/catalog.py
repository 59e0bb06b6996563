"""A catalog: an index, its items and the encoder that filled it, in one folder.

    catalog.json          format, encoder fingerprint and config, provenance, counts, digests of the other files
    index/                the FAISS index
    items.parquet         one row per item, in index order: path, attributes, thumbnail (image bytes)
    encoder.safetensors   all tensors of the encoder
    local_features.npy    local features of each item, if matches are verified by geometry
    calibration.json      thresholds of `simsearch calibrate`; its curves are in calibration/

There are no pickles. A catalog is written beside its place and then moved there as a whole. A file whose digest differs
from the recorded one is never used, so damage and files of another catalog are reported. Catalogs of older versions
have no digests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

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
    checked,
    checksum,
    digests,
    is_temporary,
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
from simsearch.search.items import THUMBNAIL, ThumbnailGroups, read_items, write_items
from simsearch.search.local_features import NAME as LOCAL_FEATURES
from simsearch.search.local_features import StoredFeatures, write_local_features
from simsearch.search.verification import Verification
from simsearch.text import warn
from simsearch.trust import VERIFIERS, Untrusted, check_config, check_links
from simsearch.types import Encoder, LocalFeatures, Part

FORMAT = 1
_ENTRIES = {"catalog.json", "index", "items.parquet", "encoder.safetensors", "skipped.csv"}
_ENTRIES |= {"calibration.json", "calibration", LOCAL_FEATURES}
_GROUP = 1024  # items whose thumbnails are read together
_ADDED = 2**16  # vectors that an index is given together
Rows = TypeVar("Rows", Tensor, pa.Table)


class CatalogError(SimsearchError, ValueError):
    """The folder is not a catalog, the catalog is damaged, or the encoder is not the catalog's own."""


def _fingerprint(about: Mapping[str, Any]) -> str:
    return checksum(about)[:16]


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
        index: The FAISS index.
        items: Path and attributes, one row per item, without thumbnails.
        about: The content of catalog.json.
        calibration: The thresholds of a match (see `write_calibration`). None if the catalog is not calibrated.
        trusted: True if the user trusts whoever made the catalog.
        local: The local features of the items. None if the catalog has none.
        verification: How matches are verified by local features. None if the catalog has none.
        exported: Folder of exported files that describe queries in place of the stored encoder, or None.
    """

    folder: Path
    index: FaissIndex
    items: pa.Table
    about: dict[str, Any]
    calibration: dict[str, Any] | None = None
    trusted: bool = False
    local: StoredFeatures | None = None
    verification: Verification | None = None
    exported: Path | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the catalog's description, which includes the digests of its files."""
        return _fingerprint(self.about)

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
        try:
            with ThumbnailGroups(self.folder / "items.parquet", self.about) as file:
                places = [file.place(position) for position in positions]
                groups = {group: file.group(group) for group in {group for group, _ in places}}
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CatalogError(f"the catalog {self.folder} is damaged ({error}): make it again") from error
        return [groups[group][place].as_py() for group, place in places]

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

    A calibration is kept if the catalog is unchanged, and removed otherwise.

    Args:
        folder: The catalog's folder.
        index: The filled index.
        items: One row per item, in one table or several.
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
    entries = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if entries and "catalog.json" not in entries:
        raise FileExistsError(f"{folder} exists and is not a catalog: give another out=")
    if foreign := sorted(name for name in entries - _ENTRIES if not is_temporary(name)):
        raise FileExistsError(
            f"the catalog {folder} also holds other files ({', '.join(foreign[:3])}): give another out="
        )
    with replacing_folder(folder) as temporary:
        index.save(temporary / "index")
        groups = regroup([items] if isinstance(items, pa.Table) else items, _GROUP, pa.concat_tables)
        of_items = write_items(temporary / "items.parquet", groups)
        if len(index) != of_items["items"]:
            raise ValueError(f"the index holds {len(index)} items, the table {of_items['items']}")
        if verification is not None:
            of_local = write_local_features(temporary / LOCAL_FEATURES, len(index), local, verification)
            about = {**about, "local_features": of_local}
        about = {
            "format": FORMAT,
            **write_encoder(temporary, encoder),
            "bytes_per_item": index.code_bytes,
            "config": dict(config),
            **about,
            **of_items,
            "sha256": digests(temporary, ["encoder.safetensors"]) | _index_digest(temporary),
        }
        write_json(temporary / "catalog.json", about)
        if errors:
            rows = ((str(error.path), error.reason, error.detail) for error in errors)
            write_csv(temporary / "skipped.csv", ["path", "reason", "detail"], rows)
        if calibrated_for(folder) == _fingerprint(read_json(temporary / "catalog.json")):
            shutil.copy(folder / "calibration.json", temporary)
            if (folder / "calibration").is_dir():
                shutil.copytree(folder / "calibration", temporary / "calibration")


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
    try:
        about = read_json(folder / "catalog.json")
    except OSError as error:
        raise CatalogError(
            f"no catalog in {folder} ({error}): make one by `simsearch index run=... images=...`, or give "
            "the catalog folder of a run"
        ) from error
    except ValueError as error:
        raise CatalogError(f"the catalog {folder} is damaged ({error}): make it again") from error
    if about.get("format") != FORMAT:
        raise CatalogError(f"{folder} has catalog format {about.get('format')}, this version reads {FORMAT}")
    if missing := sorted({"encoder_fingerprint", "backbone", "config"} - set(about)):
        raise CatalogError(
            f"the catalog {folder} is damaged (catalog.json does not have {', '.join(missing)}): make it again"
        )
    try:
        index = FaissIndex.load(folder / "index")
        if (known := about.get("sha256")) is not None and _index_digest(folder).items() - known.items():
            raise ValueError("its index belongs to another catalog")
        items = read_items(folder / "items.parquet", about)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CatalogError(f"the catalog {folder} is damaged ({error}): make it again") from error
    if len(index) != len(items):
        raise CatalogError(f"the catalog {folder} is damaged: {len(index)} vectors for {len(items)} items")
    if exported is not None:
        if not trusted and exported.is_dir():
            check_links(exported)
        _check_exported(exported, folder, about)
    catalog = _with_local_features(Catalog(folder, index, items, about, trusted=trusted, exported=exported))
    return replace(catalog, calibration=_read_calibration(catalog)) if calibrated else catalog


def _with_local_features(catalog: Catalog) -> Catalog:
    """The catalog with its local features, if it has any. Raises CatalogError if they are damaged."""
    if (about := catalog.about.get("local_features")) is None:
        return catalog
    try:
        config = {"verification": about["verification"]}
        if not catalog.trusted:
            check_config(config, f"the catalog {catalog.folder}", VERIFIERS)
        verification = build(config, None if catalog.trusted else VERIFIERS)["verification"]
        local = StoredFeatures(catalog.folder / LOCAL_FEATURES, about, verification, len(catalog))
    except Untrusted:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CatalogError(f"the catalog {catalog.folder} is damaged ({error}): make it again") from error
    return replace(catalog, local=local, verification=verification)


def _index_digest(folder: Path) -> dict[str, str]:
    """The digest of index.faiss, read from index.json so that a large index is read once. Other settings may change."""
    return {"index/index.faiss": read_json(folder / "index" / "index.json")["sha256"]}


def write_calibration(folder: Path, calibration: Mapping[str, Any]) -> None:
    """Writes the catalog's calibration.json atomically. `read_catalog` reads it.

    The calibration has these entries:

    - `catalog`: fingerprint of the catalog that the calibration belongs to; another catalog refuses it.
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
    return calibration


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
    if reserved := sorted({"rank", "score", "verdict", THUMBNAIL} & set(manifest.attributes)):
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
