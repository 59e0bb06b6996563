"""A catalog of images on disk: described, indexed, written whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor
from tqdm import tqdm

from simsearch.data.manifest import Manifest
from simsearch.data.presence import MOST_GONE, Presence
from simsearch.data.tables import Rejected
from simsearch.files import read_json
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.catalog import fill_index, path_table, with_thumbnails, write_catalog
from simsearch.search.describe import batches_of, describe
from simsearch.types import Encoder


@dataclass(frozen=True)
class Filling:
    """What a catalog is filled with, in parts: vectors(i) gives the counts[i] of part i, `items` their tables.

    rejected: rows of the manifest that were not taken. config: what builds the encoder. source: `run` and `images`.
    """

    encoder: Encoder
    config: Mapping[str, Any]
    counts: list[int]
    vectors: Callable[[int], Tensor]
    items: Iterable[pa.Table]
    errors: list[ValueError]
    rejected: tuple[Rejected, ...]
    skipped: dict[str, int]
    source: dict[str, str]


def filling_of(
    manifest: Manifest,
    encoder: Encoder,
    config: Mapping[str, Any],
    *,
    run: str,
    thumbnail: int,
    batch_size: int,
    workers: int,
) -> Filling:
    """The images of a manifest, described now, with a progress bar.

    run: the name of the run that the encoder comes from. thumbnail: longest side of what the catalog keeps of each.
    Raises ValueError where none can be read or a column's name is taken, Vanished where images are lost meanwhile.
    """
    table, presence = path_table(manifest), Presence(manifest.root, manifest.paths)
    batches = batches_of(encoder, manifest, batch_size=batch_size, workers=workers)
    with tqdm(total=len(manifest), unit="img", desc="index") as bar:
        found = describe(encoder, batches, thumbnail=thumbnail, presence=presence, advance=bar.update)
    if not len(found):
        raise ValueError(f"none of the {len(manifest)} images of {manifest.root} could be read: {found.errors[0]}")
    return Filling(
        encoder=encoder,
        config=config,
        counts=[len(found)],
        vectors=lambda _: found.vectors,
        items=[with_thumbnails(table.take(found.rows.numpy()), found.thumbnails)],
        errors=found.errors,
        rejected=manifest.rejected,
        skipped=manifest.skipped,
        source={"run": run, "images": str(manifest.root)},
    )


def write_filled(out: Path, index: FaissIndex, filling: Filling) -> None:
    """Fills an empty index and writes the catalog to `out`. Raises what fill_index and write_catalog raise."""
    fill_index(index, filling.counts, filling.vectors)
    reasons = dict(Counter(error.reason for error in filling.errors))  # type: ignore[attr-defined]
    write_catalog(
        out,
        index=index,
        items=filling.items,
        encoder=filling.encoder,
        config=filling.config,
        about={"source": filling.source, "skipped": reasons | filling.skipped},
        errors=[*filling.errors, *filling.rejected],  # type: ignore[list-item]
    )


def check_kind(index: FaissIndex, encoder: Encoder) -> None:
    """Raises ValueError for an index of floats with an encoder that gives codes, or the other way."""
    if index.is_binary != (encoder.bits is not None):
        kind = "codes: index=binary-flat" if encoder.bits else "float descriptors: index=flat"
        raise ValueError(f"index={index.factory} does not fit this run, which gives {kind} or another of that kind")


def check_not_fewer(out: Path, count: int, told: bool) -> None:
    """Raises ValueError where a catalog of `count` items would take the place of one of far more, unless `told`."""
    try:
        before = int(read_json(out / "catalog.json").get("items", 0))
    except (OSError, ValueError, TypeError):  # there is none, or none that could be missed
        return
    if count < (1 - MOST_GONE) * before and not told:
        raise ValueError(
            f"the catalog {out} has {before} items, this one would have {count}: see whether all images are there; "
            "if so, say fewer=true, or give another out="
        )
