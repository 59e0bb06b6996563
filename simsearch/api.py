"""The Python API: open and search a catalog, describe images, evaluate embeddings, build a catalog.

The API needs neither Hydra nor a command line nor a config. Errors that a caller may want to catch are subclasses of
SimsearchError. A wrong argument raises ValueError.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from simsearch import saved_run
from simsearch.data.manifest import read_manifest
from simsearch.evaluation.report import Report, evaluate
from simsearch.functional.regions import Region, crop, read_region
from simsearch.functional.reranking import Reranker
from simsearch.images import encode_thumbnail
from simsearch.index.auto import AutoIndex
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.encoder import device as device_of
from simsearch.models.encoder import encoder_config
from simsearch.models.exported import ExportedEncoder
from simsearch.search.answer import Answer
from simsearch.search.build import check_not_fewer, filling_of, write_filled
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.change import (
    Change,
    compact,
    manifest_to_add,
    problems,
    remove,
    settings_for,
    takes,
    update,
)
from simsearch.search.describe import describe, encode
from simsearch.search.drift import Standing, standing
from simsearch.search.engine import Engine
from simsearch.search.filters import Condition, parse_filters
from simsearch.search.given import Given, given_images, pixels_of
from simsearch.search.item_tables import path_table
from simsearch.search.local_features import describe_queries
from simsearch.search.parquet import ROWS, export_parquet
from simsearch.search.query_regions import joined, regions_of
from simsearch.search.request import Hit, Regions, Request
from simsearch.search.stores.push import push
from simsearch.search.stores.store import Store
from simsearch.search.stores.stored_index import stored
from simsearch.search.verification import Verification
from simsearch.search.writing import check_place
from simsearch.text import printable
from simsearch.types import Encoder, LocalFeatures

__all__ = [
    "Answer",
    "Change",
    "Hit",
    "LoadedEncoder",
    "OpenCatalog",
    "Report",
    "Standing",
    "build_catalog",
    "evaluate",
    "load_encoder",
    "open_catalog",
]
_PICTURE = 128  # longest side of a query's picture beside an answer


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder that is ready to describe images.

    Attributes:
        encoder: The torch module.
        config: The plain config that builds the encoder.
        run: Name of the run that the encoder comes from.
    """

    encoder: Encoder
    config: dict[str, Any]
    run: str

    @property
    def dimension(self) -> int:
        """Number of values in a descriptor, or number of bits in a code."""
        return self.encoder.dimension

    @property
    def bits(self) -> int | None:
        """Number of bits in a code. None if the encoder returns real-valued descriptors."""
        return self.encoder.bits

    def describe(self, images: Given | Sequence[Given], *, batch_size: int = 64, workers: int = 0) -> Tensor:
        """The descriptors of the images: L2-normalised float32 (N, D), or packed codes uint8 (N, ceil(bits / 8)).

        Args:
            images: One image or several. An image is a file, a Pillow image, an array uint8 (H, W, 3) or a tensor uint8
                (3, H, W).
            batch_size: Number of images per forward pass, 1 or more.
            workers: Number of additional processes that decode files, 0 or more.

        Raises:
            ImageError: If a file cannot be read. The error names the first such file.
            ValueError: If an item is not an image, or if there is no image.

        Example:
            >>> encoder = simsearch.load_encoder("outputs/run")
            >>> vectors = encoder.describe(["a.jpg", "b.jpg"])
            >>> len(vectors)
            2
        """
        several = _several(images)
        given = given_images(several, self.encoder)
        found = describe(self.encoder, given.batches(batch_size=batch_size, workers=workers))
        if found.errors:
            raise found.errors[0]
        if not several:
            raise ValueError("there is no image to describe: give at least one")
        return found.vectors

    def __repr__(self) -> str:
        kind = f"codes of {self.bits} bits" if self.bits is not None else f"{self.dimension} numbers an image"
        seen = f"{self.encoder.input_size} px, fit {self.encoder.fit}"
        return f"<encoder of {printable(self.run)}: {kind}, {seen}>"


class OpenCatalog:
    """A catalog that is open for searching. Several threads may search it at once.

    Args:
        catalog: The catalog that `read_catalog` returns.
        device: Device on which the encoder describes images.
        store: Engine in which the catalog is searched. None searches its own index.
    """

    def __init__(self, catalog: Catalog, device: torch.device, store: Store | None = None) -> None:
        self._device, self._store = device, store
        self._version = _Version(catalog, Engine(stored(catalog, store)))
        self._reranked: tuple[Reranker, Engine] | None = None  # the last one that was asked for
        self._reopening = threading.Lock()  # an older version never takes the place of a newer one

    @property
    def _catalog(self) -> Catalog:
        return self._version.catalog

    @property
    def folder(self) -> Path:
        """The folder of the catalog."""
        return self._catalog.folder

    @property
    def items(self) -> pa.Table:
        """Path and attributes of the items, one row per item."""
        return self._catalog.items

    @property
    def ids(self) -> list[str]:
        """The ids of the items, in the order of `items`. They stay when items are added and removed."""
        names = self._version.engine.names
        return names.of(range(len(names)))

    @property
    def encoder(self) -> LoadedEncoder:
        """The encoder that filled the catalog. The first access loads it.

        Raises:
            CatalogError: If the encoder's files are damaged.
            Untrusted: If the encoder would run code and the catalog was opened without trusted=True.
        """
        catalog = self._catalog
        run = str((catalog.about.get("source") or {}).get("run", catalog.folder.name))
        return LoadedEncoder(catalog.encoder.to(self._device), dict(catalog.about["config"]), run)

    def __len__(self) -> int:
        return len(self._catalog)

    def __repr__(self) -> str:
        calibrated = "calibrated" if self._catalog.calibration else "not calibrated"
        columns = ", ".join(map(printable, self.items.column_names))
        return f"<catalog {printable(self.folder)}: {len(self)} items, {calibrated}, with {columns}>"

    def search(
        self,
        like: Given | int | Sequence[Given | int],
        *,
        unlike: Given | int | Sequence[Given | int] | None = None,
        region: str | Sequence[float] | None = None,
        k: int = 10,
        where: str | Sequence[Condition] | None = None,
        weights: Mapping[str, float] | None = None,
        diversity: float = 0.0,
        collapse: bool = False,
        hubness: bool = False,
        min_score: float | None = None,
        rerank: Reranker | None = None,
        verify: bool = True,
    ) -> Answer:
        """The k items that are most similar to the examples, best first. A calibrated catalog adds a verdict.

        Args:
            like: One example or several; together they form one query. An example is an item's id, a file, a Pillow
                image, an array uint8 (H, W, 3), a tensor uint8 (3, H, W) or a descriptor as `encoder.describe` returns
                it. A string is read as a file if a file of this name exists, else as an item's id or path.
            unlike: Counter-examples, in the same forms.
            region: The part of each image in `like` to search with: (x, y, w, h) of the upright image, as fractions of
                its width and height, or as pixels if one of them is above 1. None searches with whole images.
            k: Number of items, 1 or more. The answer is shorter if fewer items are left. Items that are examples are
                left out.
            where: A filter on attributes, such as "artist!=Claude Monet; year=1850..1900" (see
                simsearch.search.filters).
            weights: Weights of the descriptor's parts, such as {"colour": 0.8}. None keeps the descriptor's own
                weights.
            diversity: Trade-off in [0, 1]: 0 ranks by score alone, 1 by diversity alone.
            collapse: Return at most one item per work, and no item of an example's work.
            hubness: Correct the ranking for items that are close to every query (hubs).
            min_score: Return only items with at least this score. None returns items with any score.
            rerank: The re-ranking method, such as simsearch.search.rerank.AlphaQE(). It changes the order, not the
                scores. Items behind its shortlist, if it has one, follow in their own order.
            verify: Compare the best items with the examples point by point, if the catalog has local features.
                Verified items come first.

        Raises:
            ImageError: If a file cannot be read.
            CatalogError: If the catalog is damaged.
            ValueError: If a filter, a weight or another argument does not fit the catalog.

        Example:
            >>> catalog = simsearch.open_catalog("outputs/art-catalog")
            >>> answer = catalog.search("photo.jpg", k=3, where="artist!=Claude Monet")
            >>> len(answer), answer[0].rank
            (3, 1)
        """
        part = read_region(region)
        version = self._version  # another thread may change the catalog meanwhile
        examples = [self._example(version, one, part, verify) for one in _several(like)]
        if part is not None and all(one.position is not None or one.picture is None for one in examples):
            raise ValueError(f"region={part} is a part of an image, and like has no image")
        counters = [] if unlike is None else [self._example(version, one) for one in _several(unlike)]
        if not examples:
            raise ValueError("there is no example: give at least one image or id")
        engine = version.engine if rerank is None else self._reranking(version.engine, rerank)
        found = engine.recommend(
            Request(
                like=torch.stack([one.vector for one in examples]),
                unlike=torch.stack([one.vector for one in counters]) if counters else None,
                k=k,
                weights=weights,
                where=parse_filters(where) if where is None or isinstance(where, str) else tuple(where),
                diversity=diversity,
                collapse=collapse,
                hubness=hubness,
                min_score=min_score,
                exclude=tuple(one.position for one in (*examples, *counters) if one.position is not None),
                local=tuple(found for one in examples for found in one.local),
                regions=joined([one.regions for one in examples]),
            )
        )
        ids = found.ids.tolist()
        hits = engine.hits(found, [one.position for one in examples if one.position is not None])
        names = [one.name for one in examples] + [f"not: {one.name}" for one in counters]
        shown = tuple(one.picture for one in examples if one.picture is not None)
        pictures = (shown, tuple(version.catalog.thumbnails(ids)))
        return Answer(tuple(names), tuple(hits), found.verdict, found.candidates, pictures)

    def add(
        self,
        images: str | Path,
        *,
        root: str | Path | None = None,
        batch_size: int = 64,
        workers: int = 2,
    ) -> Change:
        """Adds images to the catalog on disk, and describes again those that are there and have changed.

        This object has the new version afterwards. Others that are open keep theirs.

        Args:
            images: A folder, an image, or a table (.csv, .parquet) with a column `path`, whose other columns become
                attributes.
            root: Folder that paths are relative to. None means where the catalog's own images lie, if these lie in it,
                else the images' own folder.
            batch_size: Number of images per forward pass, 1 or more.
            workers: Number of processes that decode files, 0 or more.

        Returns:
            The numbers of the items that were added and changed, and the errors of images that could not be read.

        Raises:
            CatalogError: If the catalog is damaged, or if another process changes it.
            ValueError: If the images or their columns do not fit the catalog.
        """
        source = Path(images).expanduser().resolve()
        base = None if root is None else Path(root).expanduser().resolve()
        manifest = manifest_to_add(self.folder, source, base, trusted=self._catalog.trusted)
        encoder = self._catalog.encoder.to(self._device)
        if isinstance(encoder, ExportedEncoder):
            raise ValueError("exported files describe queries only: open the catalog without encoder= to add to it")
        change = update(
            self.folder,
            manifest,
            encoder,
            remove=False,
            batch_size=batch_size,
            workers=workers,
            trusted=self._catalog.trusted,
        )
        self._reopen()
        return change

    def remove(self, items: str | int | Sequence[str | int]) -> Change:
        """Removes items from the catalog on disk. Their ids are never given again.

        This object has the new version afterwards. Others that are open keep theirs.

        Args:
            items: Ids or paths of the items.

        Raises:
            CatalogError: If the catalog is damaged, or if another process changes it.
            ValueError: If there is no such item, or if none would be left.
        """
        names = [items] if isinstance(items, str | int | np.integer) else list(items)
        change = remove(self.folder, names, trusted=self._catalog.trusted)
        self._reopen()
        return change

    def compact(self) -> None:
        """Merges the segments of the catalog on disk into one. Ids and answers stay.

        Raises:
            CatalogError: If the catalog is damaged, or if another process changes it.
        """
        compact(self.folder, trusted=self._catalog.trusted)
        self._reopen()

    def verify(self) -> list[str]:
        """Compares each file of the catalog on disk with its digest. Returns what is wrong, one line each."""
        return problems(self.folder, trusted=self._catalog.trusted)

    def export(self, out: str | Path, *, rows: int = ROWS) -> list[Path]:
        """Writes ids, vectors and attributes of the items as Parquet files, and returns the files in their order.

        LanceDB, DuckDB, Spark, pandas and the bulk import of Milvus read them. An earlier export is replaced at once.
        The metadata say what the vectors are (see simsearch.search.parquet).

        Args:
            out: The folder of the files.
            rows: Largest number of items in a file, 1 or more.

        Raises:
            ValueError: If `rows` is below 1, or if `out` lies in the catalog.
            FileExistsError: If `out` holds something other than an export.

        Example:
            >>> catalog = simsearch.open_catalog("outputs/art-catalog")
            >>> [path.name for path in catalog.export("outputs/parquet")]
            ['items-00000.parquet']
        """
        return export_parquet(self._catalog, Path(out).expanduser(), rows=rows)

    def standing(self) -> Standing | None:
        """What has changed since the catalog was calibrated. None if it is not calibrated."""
        return standing(self._catalog)

    def _reopen(self) -> None:
        with self._reopening:
            before = self._catalog
            catalog = read_catalog(before.folder, trusted=before.trusted, exported=before.exported)
            known = "encoder" in vars(before)
            if known and catalog.about["encoder_fingerprint"] == before.about["encoder_fingerprint"]:
                vars(catalog)["encoder"] = before.encoder  # it is loaded already
            if self._store is not None:
                push(catalog, self._store)
            self._version, self._reranked = _Version(catalog, Engine(stored(catalog, self._store))), None

    def _reranking(self, engine: Engine, rerank: Reranker) -> Engine:
        kept = self._reranked
        if kept is None or kept[0] is not rerank or kept[1].catalog is not engine.catalog:
            self._reranked = kept = rerank, Engine(engine.catalog, rerank)
        return kept[1]

    def _example(self, version: _Version, given: Given, region: Region | None = None, verify: bool = False) -> _Example:
        """One example. Raises ValueError if `given` is neither an item nor an image nor a descriptor."""
        catalog, names = version.catalog, version.engine.names
        verification = catalog.verification if verify else None
        if isinstance(given, str) and not Path(given).expanduser().is_file():
            if (position := names.find(given)) is None and names.is_gone(given):
                raise ValueError(f"the item {given} was removed from the catalog {self.folder}")
            if position is None:
                raise ValueError(f"{given!r} is neither a file nor an item of the catalog {self.folder}")
            (name,) = names.of([position])
            (picture,) = catalog.thumbnails([position])
            local = () if verification is None else tuple(catalog.local_features([position]))
            return _Example(name, version.engine.vectors([position])[0], position, picture, local)
        if isinstance(given, np.ndarray | Tensor) and given.ndim == 1:
            return _Example("a description", _description(torch.as_tensor(given), catalog))
        encoder = catalog.encoder.to(self._device)
        ((images, _, errors),) = given_images([given], encoder, region).batches(batch_size=1)
        if errors:
            raise errors[0]
        name = str(given) if isinstance(given, str | Path) else "an image"
        picture, vector = encode_thumbnail(images[0], _PICTURE), encode(encoder, images)[0]
        if verification is None:
            return _Example(name, vector, None, picture)
        source = Path(given).expanduser() if isinstance(given, str | Path) else pixels_of(given)
        regions = regions_of(source, encoder, verification, region)
        return _Example(name, vector, None, picture, _local_features(source, region, verification), regions)


@dataclass(frozen=True)
class _Version:
    """One version of a catalog, as its folder holds it and as it is searched."""

    catalog: Catalog
    engine: Engine


@dataclass(frozen=True)
class _Example:
    name: str
    vector: Tensor
    position: int | None = None
    picture: bytes | None = None
    local: tuple[LocalFeatures, ...] = ()
    regions: Regions | None = None


def _description(given: Tensor, catalog: Catalog) -> Tensor:
    """A descriptor in the form that the catalog's index stores."""
    return given.cpu() if catalog.index.is_binary else given.cpu().float()


def _local_features(
    source: Path | Tensor, region: Region | None, verification: Verification
) -> tuple[LocalFeatures, ...]:
    """The local features of an image, or of a part of it, as a query."""
    if isinstance(source, Path):
        return next(describe_queries([source], verification, region=region))
    return verification.query(crop(source, region))


def open_catalog(
    folder: str | Path,
    *,
    trusted: bool = False,
    device: str = "auto",
    encoder: str | Path | None = None,
    store: Store | None = None,
) -> OpenCatalog:
    """The catalog in a folder, open for searching.

    Args:
        folder: Output of `simsearch index`, `simsearch train` or `build_catalog`. For a run directory, the run's own
            catalog is opened.
        trusted: Allow the catalog's encoder to run code and its links to lead out of the folder. Set it only if you
            trust whoever made the catalog.
        device: Device of the encoder: auto, cpu or cuda.
        encoder: Output of `simsearch export`: its files describe images in ONNX Runtime on the CPU, and neither timm
            nor the catalog's own encoder is loaded. None means the catalog's own encoder.
        store: Engine in which the catalog is searched, such as `simsearch.search.stores.pgvector.Pgvector(uri)`, to
            which `simsearch catalog push` brought it. What this object changes is pushed too. None searches the
            catalog's own index.

    Raises:
        CatalogError: If the folder holds no catalog, or a damaged one, or if the export is of another encoder.
        StoreError: If the store cannot be reached, or does not hold the catalog's version.
        Untrusted: If a link leads out of the folder and `trusted` is False.
    """
    folder = Path(folder).expanduser()
    if not (folder / "catalog.json").is_file() and (folder / "catalog" / "catalog.json").is_file():
        folder = folder / "catalog"
    exported = None if encoder is None else Path(encoder).expanduser()
    return OpenCatalog(read_catalog(folder, trusted=trusted, exported=exported), device_of(device), store)


def load_encoder(run: str | Path, *, trusted: bool = False, device: str = "auto") -> LoadedEncoder:
    """The encoder of a finished run, with the weights of its best checkpoint.

    Args:
        run: A run directory of `simsearch train`.
        trusted: Allow the run's config to build any object, and links to lead out of the folder. Set it only if you
            trust whoever made the run.
        device: Device of the encoder: auto, cpu or cuda.

    Raises:
        RunError: If the folder holds no finished run, or a damaged one.
        WeightsError: If the weights of the backbone are not available.
        Untrusted: If the config names an object that a run may not contain, and `trusted` is False.
    """
    opened = saved_run.open_run(Path(run).expanduser(), trusted=trusted)
    encoder = saved_run.load_model(opened).encoder.to(device_of(device))
    return LoadedEncoder(encoder, encoder_config(opened.config), opened.folder.resolve().name)


def build_catalog(
    encoder: LoadedEncoder,
    images: str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    index: str | FaissIndex | AutoIndex | None = None,
    thumbnail: int = 256,
    batch_size: int = 64,
    workers: int = 2,
    fewer: bool = False,
    verification: Verification | None = None,
) -> OpenCatalog:
    """Describes the images of a folder, writes a catalog of them to `out` and returns it opened.

    Images that cannot be read are left out with a warning and listed in the catalog's skipped.csv. The catalog is
    written atomically: it appears complete or not at all.

    Args:
        encoder: The encoder that describes the images. A copy is stored in the catalog.
        images: A folder, or a table (.csv, .parquet) with a column `path`. The other columns become attributes.
        out: Folder of the catalog. A catalog of the same encoder that is already there is brought up to date, unless
            another index or other local features are given: only images that are new or have changed are described,
            and ids stay. Any other is replaced.
        root: Folder that the table's paths are relative to. None means the table's own folder.
        index: A FAISS factory string such as "HNSW32", an empty FaissIndex, or simsearch.index.auto.AutoIndex, which
            chooses one by a budget. None means that of the catalog in `out`, or exact search.
        thumbnail: Longest side in pixels of the thumbnail that the catalog stores per image.
        batch_size: Number of images per forward pass, 1 or more.
        workers: Number of processes that decode files, 0 or more.
        fewer: Allow the new catalog to replace one that has far more items.
        verification: Stores local features, by which searches verify matches, such as
            simsearch.search.verification.Verification(). None means those of the catalog in `out`, or none.

    Raises:
        ValueError: If no image can be read, if the index does not fit the encoder, or if the encoder is exported.
        FileExistsError: If `out` holds something other than a catalog.

    Example:
        >>> catalog = simsearch.build_catalog(simsearch.load_encoder("outputs/run"), "folder", "out")
        >>> catalog.search("a.jpg", k=2).scores[0] > 0.99
        True
    """
    if isinstance(encoder.encoder, ExportedEncoder):
        raise ValueError("a catalog keeps its encoder, which exported files are not: give one of load_encoder(run)")
    source, place = Path(images).expanduser().resolve(), Path(out).expanduser()
    manifest = read_manifest(source, None if root is None else Path(root).expanduser().resolve())
    path_table(manifest)  # refuses columns before the work
    check_not_fewer(place, len(manifest), fewer)
    given = FaissIndex(index) if isinstance(index, str) else index
    made, verification = settings_for(place, encoder.encoder, given, verification)
    parameter = next(iter(encoder.encoder.parameters()), torch.empty(0))
    if takes(place, encoder.encoder, made, verification):
        change = update(
            place,
            manifest,
            encoder.encoder,
            remove=True,
            fewer=fewer,
            thumbnail=thumbnail,
            batch_size=batch_size,
            workers=workers,
        )
        _warn_unreadable(place, len(change.errors), len(manifest))
        return OpenCatalog(read_catalog(place), parameter.device)
    check_place(place)
    filling = filling_of(
        manifest,
        encoder.encoder,
        encoder.config,
        run=encoder.run,
        thumbnail=thumbnail,
        batch_size=batch_size,
        workers=workers,
        verification=verification,
    )
    check_not_fewer(place, sum(filling.counts), fewer)
    write_filled(place, made, filling)
    _warn_unreadable(place, len(filling.errors), len(manifest))
    return OpenCatalog(read_catalog(place), parameter.device)


def _warn_unreadable(place: Path, count: int, of: int) -> None:
    if count:
        warnings.warn(f"{count} of {of} images could not be read: see {place / 'skipped.csv'}", stacklevel=3)


def _several(given: Any) -> list[Any]:
    """The given images as a list. An array with one axis more than one image or one descriptor holds several."""
    if isinstance(given, np.ndarray | Tensor):
        return list(given) if given.ndim in (2, 4) else [given]
    several = [given] if isinstance(given, int | np.integer | str | Path | Image.Image) else list(given)
    return [str(one) if isinstance(one, int | np.integer) else one for one in several]
