"""What an experiment leaves: an index, the items in it and the encoder that filled it, in one folder.

    catalog.json          format, encoder fingerprint and config, provenance, counts
    index/                the FAISS index
    items.parquet         one row an item, in index order: path, attributes, thumbnail (image bytes)
    encoder.safetensors   all tensors of the encoder

No pickles. A catalog is written aside and moved into place whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from simsearch.cache import cache_key
from simsearch.files import write_json
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.backbones import state_fingerprint

FORMAT = 1
_ENTRIES = {"catalog.json", "index", "items.parquet", "encoder.safetensors", "skipped.csv"}
THUMBNAIL = "thumbnail"
_GROUP = 1024  # rows of items.parquet that are read together


class CatalogError(ValueError):
    """A folder that is no catalog, a damaged one, or an encoder that is not the catalog's."""


def encoder_fingerprint(encoder: nn.Module) -> str:
    """16 hex digits over all that decides an encoder's descriptors: its identity() and its tensors."""
    return cache_key({"identity": encoder.identity(), "state": state_fingerprint(encoder)})[:16]  # type: ignore[operator]


@dataclass(frozen=True)
class Catalog:
    """An opened catalog. items: one row an item without its thumbnail; about: catalog.json."""

    folder: Path
    index: FaissIndex
    items: pa.Table
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.items)

    def thumbnails(self, positions: Sequence[int]) -> list[bytes]:
        """Image bytes of the items at these positions; reads only the parts of the file that hold them."""
        found: dict[int, bytes] = {}
        with pq.ParquetFile(self.folder / "items.parquet") as file:
            for group in {position // _GROUP for position in positions}:
                column = file.read_row_group(group, columns=[THUMBNAIL]).column(THUMBNAIL)
                inside = [p for p in positions if p // _GROUP == group]
                found |= {p: column[p % _GROUP].as_py() for p in inside}
        return [found[position] for position in positions]

    def load_encoder_state(self, encoder: nn.Module) -> None:
        """Loads the catalog's tensors into an encoder built from its config and checks its fingerprint.

        Raises CatalogError where the tensors do not fit or the result is another encoder.
        """
        try:
            encoder.load_state_dict(load_file(self.folder / "encoder.safetensors"))
        except (RuntimeError, SafetensorError, OSError) as error:
            raise CatalogError(f"cannot load the encoder of {self.folder}: {error}") from error
        encoder.provenance = dict(self.about["backbone"])  # type: ignore[assignment]
        self.check_encoder(encoder)

    def check_encoder(self, encoder: nn.Module) -> None:
        """Raises CatalogError for an encoder other than the one that filled the catalog."""
        own, other = self.about["encoder_fingerprint"], encoder_fingerprint(encoder)
        if own != other:
            raise CatalogError(
                f"the catalog {self.folder} was filled by encoder {own}, this one is {other}: their "
                "descriptors do not compare. Search with the catalog's own encoder or make a new catalog"
            )


def write_catalog(
    folder: Path,
    *,
    index: FaissIndex,
    items: pa.Table,
    encoder: nn.Module,
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """Writes a catalog of the items in `index`, taking the place of one that may be in `folder`.

    config: the plain config that builds the encoder. about: further plain facts (protocol, skipped
    files, ...). Raises ValueError where items and index differ in number, FileExistsError where
    `folder` holds something else.
    """
    if len(index) != len(items):
        raise ValueError(f"the index holds {len(index)} items, the table {len(items)}")
    folder = Path(folder).resolve()
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: give another place by out=")
    entries = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if entries and "catalog.json" not in entries:
        raise FileExistsError(f"{folder} exists and is no catalog: give another place by out=")
    if strange := sorted(entries - _ENTRIES):
        raise FileExistsError(
            f"the catalog {folder} holds other things too ({', '.join(strange[:3])}): give another out="
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        index.save(temporary / "index")
        pq.write_table(items, temporary / "items.parquet", row_group_size=_GROUP)
        state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
        save_file(state, temporary / "encoder.safetensors")
        write_json(
            temporary / "catalog.json",
            {
                "format": FORMAT,
                "encoder_fingerprint": encoder_fingerprint(encoder),
                "backbone": dict(encoder.provenance),  # type: ignore[arg-type]
                "items": len(items),
                "bytes_per_item": index.code_bytes,
                "config": dict(config),
                **about,
            },
        )
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.replace(folder, old)
            try:
                os.replace(temporary, folder)
            except OSError:
                os.replace(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_catalog(folder: Path) -> Catalog:
    """The catalog in `folder`. Raises CatalogError where there is none or it is damaged."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "catalog.json").read_text())
    except (OSError, ValueError) as error:
        raise CatalogError(
            f"no catalog in {folder} ({error}): make one by `simsearch index run=... images=...`, or give "
            "the catalog folder of a run"
        ) from error
    about = about if isinstance(about, dict) else {}
    if about.get("format") != FORMAT:
        raise CatalogError(f"{folder} has catalog format {about.get('format')}, this version reads {FORMAT}")
    if missing := sorted({"encoder_fingerprint", "backbone", "config"} - set(about)):
        raise CatalogError(f"the catalog {folder} is damaged (catalog.json lacks {', '.join(missing)}): make it again")
    try:
        index = FaissIndex.load(folder / "index")
        names = [n for n in pq.read_schema(folder / "items.parquet").names if n != THUMBNAIL]
        items = pq.read_table(folder / "items.parquet", columns=names)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CatalogError(f"the catalog {folder} is damaged ({error}): make it again") from error
    if len(index) != len(items):
        raise CatalogError(f"the catalog {folder} is damaged: {len(index)} vectors for {len(items)} items")
    return Catalog(folder, index, items, about)


def item_table(columns: Mapping[str, Sequence[Any]], thumbnails: Sequence[bytes]) -> pa.Table:
    """A catalog's items: the given columns and a thumbnail each."""
    return pa.table({**{n: pa.array(v) for n, v in columns.items()}, THUMBNAIL: pa.array(thumbnails, pa.binary())})
