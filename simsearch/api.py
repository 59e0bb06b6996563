"""simsearch from Python: open a catalog and search it, describe images, measure embeddings, make a catalog.

None of it needs Hydra, a command line or a config. Errors that a caller may want to catch are SimsearchErrors; a wrong
argument is a ValueError.
"""

from __future__ import annotations

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
from simsearch.functional.reranking import Reranker
from simsearch.images import encode_thumbnail
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.encoder import device as device_of
from simsearch.models.encoder import encoder_config
from simsearch.search.answer import Answer
from simsearch.search.build import check_kind, check_not_fewer, filling_of, write_filled
from simsearch.search.catalog import Catalog, path_table, read_catalog
from simsearch.search.describe import describe, encode
from simsearch.search.engine import Engine
from simsearch.search.filters import Condition, parse_filters
from simsearch.search.given import Given, given_images
from simsearch.search.request import Hit, Request
from simsearch.text import printable
from simsearch.types import Encoder

__all__ = [
    "Answer",
    "Hit",
    "LoadedEncoder",
    "OpenCatalog",
    "Report",
    "build_catalog",
    "evaluate",
    "load_encoder",
    "open_catalog",
]
_PICTURE = 128  # longest side of a query's picture beside an answer


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder that describes images. encoder: the torch module. config: builds it again. run: its run's name."""

    encoder: Encoder
    config: dict[str, Any]
    run: str

    @property
    def dimension(self) -> int:
        """Numbers, or bits, of a description."""
        return self.encoder.dimension

    @property
    def bits(self) -> int | None:
        """Width of the codes; None where descriptions are real vectors."""
        return self.encoder.bits

    def describe(self, images: Given | Sequence[Given], *, batch_size: int = 64, workers: int = 0) -> Tensor:
        """Returns a row for each image: L2-normalised float32 (N, D), or packed codes uint8 (N, ceil(bits / 8)).

        Args:
            images: Files, pictures of Pillow, arrays uint8 (H, W, 3) or tensors uint8 (3, H, W); one or several.
            batch_size: Images that go through the encoder together.
            workers: Processes that decode files beside this one.

        Raises:
            ImageError: For the first file that cannot be read.
            ValueError: For what is no image.

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
            raise ValueError("there is no image to describe: give one at least")
        return found.vectors

    def __repr__(self) -> str:
        kind = f"codes of {self.bits} bits" if self.bits is not None else f"{self.dimension} numbers an image"
        seen = f"{self.encoder.input_size} px, fit {self.encoder.fit}"
        return f"<encoder of {printable(self.run)}: {kind}, {seen}>"


class OpenCatalog:
    """A catalog that is open for searching. Any number of threads may search it."""

    def __init__(self, catalog: Catalog, device: torch.device) -> None:
        self._catalog, self._device = catalog, device
        self._engine = Engine(catalog)
        self._reranked: tuple[Reranker, Engine] | None = None  # the last one that was asked for

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._catalog.folder

    @property
    def items(self) -> pa.Table:
        """One row an item: path and attributes."""
        return self._catalog.items

    @property
    def ids(self) -> list[str]:
        """What the items are called, in the order of `items`."""
        return self._engine.names.of(range(len(self)))

    @property
    def encoder(self) -> LoadedEncoder:
        """The encoder that filled it, opened when it is first asked for.

        Raises:
            CatalogError: Where it is damaged.
            Untrusted: Where it would run code, and the catalog was not opened with trusted=True.
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
        like: Given | Sequence[Given],
        *,
        unlike: Given | Sequence[Given] | None = None,
        k: int = 10,
        where: str | Sequence[Condition] | None = None,
        weights: Mapping[str, float] | None = None,
        diversity: float = 0.0,
        collapse: bool = False,
        hubness: bool = False,
        rerank: Reranker | None = None,
    ) -> Answer:
        """Returns the k items that are most like the examples, best first, with a verdict where it is calibrated.

        Args:
            like: One example or several, which make one query together: an item's id, a file, a picture of Pillow, an
                array uint8 (H, W, 3), a tensor uint8 (3, H, W), or a description as `encoder.describe` gives it. A text
                is a file where there is one of that name, else an item's id or path.
            unlike: Counter-examples in the same forms.
            k: Items wanted; there are fewer where no more are left. Items that are examples are left out.
            where: A filter on attributes, such as "artist!=Claude Monet; year=1850..1900" (simsearch.search.filters).
            weights: Of the parts of the descriptor, such as {"colour": 0.8}; its own where none is given.
            diversity: From 0, by score alone, to 1.
            collapse: Give at most one item of a work, and none of an example's work.
            hubness: Rank against items that are near to everything.
            rerank: How to re-rank, such as simsearch.search.rerank.AlphaQE(): it decides the order, not the scores.

        Raises:
            ImageError: For a file that cannot be read.
            CatalogError: Where the catalog is damaged.
            ValueError: For a filter, a weight or another argument that does not fit the catalog.

        Example:
            >>> catalog = simsearch.open_catalog("outputs/art-catalog")
            >>> answer = catalog.search("photo.jpg", k=3, where="artist!=Claude Monet")
            >>> len(answer), answer[0].rank
            (3, 1)
        """
        examples = [self._example(one) for one in _several(like)]
        counters = [] if unlike is None else [self._example(one) for one in _several(unlike)]
        if not examples:
            raise ValueError("there is no example: give one image or id at least")
        engine = self._engine if rerank is None else self._with(rerank)
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
                exclude=tuple(one.position for one in (*examples, *counters) if one.position is not None),
            )
        )
        ids = found.ids.tolist()
        hits = engine.hits(found, [one.position for one in examples if one.position is not None])
        names = [one.name for one in examples] + [f"not: {one.name}" for one in counters]
        shown = tuple(one.picture for one in examples if one.picture is not None)
        pictures = (shown, tuple(self._catalog.thumbnails(ids)))
        return Answer(tuple(names), tuple(hits), found.verdict, found.candidates, pictures)

    def _with(self, rerank: Reranker) -> Engine:
        if self._reranked is None or self._reranked[0] is not rerank:
            self._reranked = rerank, Engine(self._catalog, rerank)
        return self._reranked[1]

    def _example(self, given: Given) -> _Example:
        """One example. Raises ValueError for what is neither an item, an image nor a description."""
        if isinstance(given, str) and not Path(given).expanduser().is_file():
            if (position := self._engine.names.find(given)) is None:
                raise ValueError(f"{given!r} is neither a file nor an item of the catalog {self.folder}")
            (name,) = self._engine.names.of([position])
            (picture,) = self._catalog.thumbnails([position])
            return _Example(name, self._engine.vectors([position])[0], position, picture)
        if isinstance(given, np.ndarray | Tensor) and given.ndim == 1:
            return _Example("a description", self._description(torch.as_tensor(given)))
        encoder = self.encoder.encoder
        ((images, _, errors),) = given_images([given], encoder).batches(batch_size=1)
        if errors:
            raise errors[0]
        name = str(given) if isinstance(given, str | Path) else "an image"
        return _Example(name, encode(encoder, images)[0], None, encode_thumbnail(images[0], _PICTURE))

    def _description(self, given: Tensor) -> Tensor:
        """A description as the index holds it."""
        return given.cpu() if self._catalog.index.is_binary else given.cpu().float()


@dataclass(frozen=True)
class _Example:
    name: str
    vector: Tensor
    position: int | None = None
    picture: bytes | None = None


def open_catalog(folder: str | Path, *, trusted: bool = False, device: str = "auto") -> OpenCatalog:
    """Returns the catalog in a folder, open for searching; a run's own catalog where the folder is a run.

    Args:
        folder: What `simsearch index`, `simsearch train` or `build_catalog` left.
        trusted: Its encoder may run code, and links in it lead elsewhere: only where you trust whoever made it.
        device: auto, cpu or cuda: where its encoder describes images.

    Raises:
        CatalogError: Where there is no catalog or it is damaged.
        Untrusted: Where it leads out of its folder, and it is not `trusted`.
    """
    folder = Path(folder).expanduser()
    if not (folder / "catalog.json").is_file() and (folder / "catalog" / "catalog.json").is_file():
        folder = folder / "catalog"
    return OpenCatalog(read_catalog(folder, trusted=trusted), device_of(device))


def load_encoder(run: str | Path, *, trusted: bool = False, device: str = "auto") -> LoadedEncoder:
    """Returns the encoder of a finished run, with its best checkpoint.

    Args:
        run: A run directory of `simsearch train`.
        trusted: The run's config may build anything, and links in it lead elsewhere: only where you trust whoever made
            it.
        device: auto, cpu or cuda.

    Raises:
        RunError: Where there is no finished run or it is damaged.
        WeightsError: Where the weights of its backbone cannot be had.
        Untrusted: Where its config names what no run is made of, and it is not `trusted`.
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
    index: str | FaissIndex | None = None,
    thumbnail: int = 256,
    batch_size: int = 64,
    workers: int = 2,
    fewer: bool = False,
) -> OpenCatalog:
    """Returns the catalog of a folder's images, after describing them and writing it to `out`.

    What cannot be read is left out, with a warning, and listed in skipped.csv of the catalog. The catalog appears whole
    or not at all.

    Args:
        encoder: What describes them; the catalog keeps it.
        images: A folder, or a table (.csv, .parquet) with a column `path` and further ones that become attributes.
        out: The catalog's folder; a catalog that is there is replaced.
        root: What a table's paths are relative to; by default its folder.
        index: A FAISS factory such as "HNSW32", or an empty FaissIndex; exact search by default.
        thumbnail: Longest side in pixels of what the catalog keeps of each image.
        batch_size: Images that go through the encoder together.
        workers: Processes that decode files.
        fewer: Allow a catalog to take the place of one of far more items.

    Raises:
        ValueError: Where no image can be read, or the index does not fit the encoder.
        FileExistsError: Where `out` holds something else.

    Example:
        >>> catalog = simsearch.build_catalog(simsearch.load_encoder("outputs/run"), "folder", "out")
        >>> catalog.search("a.jpg", k=2).scores[0] > 0.99
        True
    """
    source, place = Path(images).expanduser().resolve(), Path(out).expanduser()
    manifest = read_manifest(source, None if root is None else Path(root).expanduser())
    path_table(manifest)  # refuses columns before the work
    check_not_fewer(place, len(manifest), fewer)
    made = (
        index if isinstance(index, FaissIndex) else FaissIndex(index or ("Flat" if encoder.bits is None else "BFlat"))
    )
    check_kind(made, encoder.encoder)
    settings: dict[str, int] = {"thumbnail": thumbnail, "batch_size": batch_size, "workers": workers}
    filling = filling_of(manifest, encoder.encoder, encoder.config, run=encoder.run, **settings)
    check_not_fewer(place, sum(filling.counts), fewer)
    write_filled(place, made, filling)
    if filling.errors:
        warnings.warn(
            f"{len(filling.errors)} of {len(manifest)} images could not be read: see {place / 'skipped.csv'}",
            stacklevel=2,
        )
    parameter = next(iter(encoder.encoder.parameters()), torch.empty(0))
    return OpenCatalog(read_catalog(place), parameter.device)


def _several(given: Any) -> list[Any]:
    """One thing or several as a list; an array with one axis more than an image or a description is several."""
    if isinstance(given, np.ndarray | Tensor):
        of_descriptions = given.ndim == 2 and not _is_uint8(given)
        return list(given) if given.ndim == 4 or of_descriptions else [given]
    return [given] if isinstance(given, str | Path | Image.Image) else list(given)


def _is_uint8(given: np.ndarray | Tensor) -> bool:
    return given.dtype in (np.uint8, torch.uint8)
