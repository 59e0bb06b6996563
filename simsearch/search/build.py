"""Builds a catalog on disk: describes the images, indexes the descriptors and writes the folder atomically."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from simsearch.data.manifest import Manifest
from simsearch.data.presence import MOST_GONE, Presence
from simsearch.data.tables import Rejected
from simsearch.files import read_json, sha256
from simsearch.index.auto import AutoIndex, Frontier, NoIndexFits, Point, exact, preferred
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.describe import batches_of, describe
from simsearch.search.filters import Attributes
from simsearch.search.item_tables import path_table, with_thumbnails
from simsearch.search.local_features import describe_items
from simsearch.search.segments import CONTENT
from simsearch.search.verification import Verification
from simsearch.search.writing import fill_index, write_catalog
from simsearch.types import Encoder

_READERS = 8  # threads that read files, which a network folder sends slowly


@dataclass(frozen=True)
class Filling:
    """The content of a new catalog, split into parts.

    Attributes:
        encoder: The encoder that describes the images.
        config: The plain config that builds the encoder.
        counts: Number of vectors in each part.
        vectors: Function that returns the counts[i] vectors of part i.
        items: Tables of the items, in the order of the vectors.
        errors: Errors of the images that could not be read.
        rejected: Rows of the manifest that were refused.
        skipped: Number of images left out, by reason.
        source: Names of the `run` and of the `images`.
        verification: How matches will be verified by local features, or None.
        local: The records of the items' local features.
        thumbnail: Longest side in pixels of the thumbnails.
        labels: int64 (N,), what the run's task calls relevant, -1 where unknown, or None. Only a choice of the index
            (`AutoIndex`) looks at them.
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
    verification: Verification | None = None
    local: Iterable[np.ndarray] = ()
    thumbnail: int | None = None
    labels: Tensor | None = None


def filling_of(
    manifest: Manifest,
    encoder: Encoder,
    config: Mapping[str, Any],
    *,
    run: str,
    thumbnail: int,
    batch_size: int,
    workers: int,
    verification: Verification | None = None,
    label: str | None = None,
) -> Filling:
    """Describes the images of a manifest now, with a progress bar, and returns them as a Filling.

    Local features, if there are any, are described when they are written, with a progress bar of their own.

    Args:
        manifest: The images and their attributes.
        encoder: The encoder that describes them.
        config: The plain config that builds the encoder.
        run: Name of the run that the encoder comes from.
        thumbnail: Longest side in pixels of each thumbnail.
        batch_size: Number of images per forward pass, 1 or more.
        workers: Number of additional processes that decode files, 0 or more.
        verification: How matches will be verified by local features, or None.
        label: The attribute that the run's task retrieves by, or None. The manifest may lack it.

    Raises:
        ValueError: If no image can be read, or if a column's name is reserved.
        Vanished: If images disappear during the work.
    """
    presence = Presence(manifest.root, manifest.paths)
    contents = content_digests(manifest.root, manifest.paths)  # before they are described: a later change is seen
    table = path_table(manifest).append_column(CONTENT, pa.array(contents, pa.string()))
    batches = batches_of(encoder, manifest, batch_size=batch_size, workers=workers)
    with tqdm(total=len(manifest), unit="img", desc="index") as bar:
        found = describe(encoder, batches, thumbnail=thumbnail, presence=presence, advance=bar.update)
    if not len(found):
        raise ValueError(f"none of the {len(manifest)} images of {manifest.root} could be read: {found.errors[0]}")
    described = table.take(found.rows.numpy())
    return Filling(
        encoder=encoder,
        config=config,
        counts=[len(found)],
        vectors=lambda _: found.vectors,
        items=[with_thumbnails(described, found.thumbnails)],
        errors=found.errors,
        rejected=manifest.rejected,
        skipped=manifest.skipped,
        source={"run": run, "images": str(manifest.root)},
        verification=verification,
        local=()
        if verification is None
        else local_records(manifest, found.rows.tolist(), verification, workers, presence),
        thumbnail=thumbnail,
        labels=torch.from_numpy(Attributes(described).column(label).codes.astype(np.int64))
        if label is not None and label in described.column_names
        else None,
    )


def content_digests(root: Path, paths: Sequence[str]) -> list[str | None]:
    """The SHA-256 (hex) of each file, None where it is missing, no regular file, or unreadable.

    Args:
        root: The folder.
        paths: N paths below the root.
    """

    def digest(path: str) -> str | None:
        try:
            return sha256(root / path) if (root / path).is_file() else None
        except OSError:
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(digest, paths))


def local_records(
    manifest: Manifest, rows: Sequence[int], verification: Verification, workers: int, presence: Presence
) -> Iterator[np.ndarray]:
    """The records of `describe_items`, with a progress bar.

    Args:
        manifest: The images.
        rows: Rows of the manifest, in the order of the index.
        verification: What describes the images.
        workers: Number of processes; at least one is used.
        presence: The images that existed when the work began.
    """
    records = describe_items(manifest, rows, verification, workers=workers, presence=presence)
    return iter(tqdm(records, total=len(rows), unit="img", desc="local features"))


def write_filled(out: Path, index: FaissIndex | AutoIndex, filling: Filling) -> tuple[FaissIndex, Frontier | None]:
    """Fills an index and writes the catalog to `out`. Returns the index, and what it was chosen from, if it was.

    An index that was chosen is stored like any other.

    Args:
        out: Folder of the catalog.
        index: An empty index, or what chooses one.
        filling: The content of the catalog.

    Raises:
        NoIndexFits: If no index keeps to the budget.
        ValueError: As `fill_index` and `write_catalog` do.
    """
    frontier: Frontier | None = None
    if isinstance(index, AutoIndex):
        index, frontier = fill_chosen(index, filling.counts, filling.vectors, filling.labels)
    else:
        fill_index(index, filling.counts, filling.vectors)
    reasons = dict(Counter(error.reason for error in filling.errors))  # type: ignore[attr-defined]
    write_catalog(
        out,
        index=index,
        items=filling.items,
        encoder=filling.encoder,
        config=filling.config,
        about={"source": filling.source, "skipped": reasons | filling.skipped, "thumbnail": filling.thumbnail},
        errors=[*filling.errors, *filling.rejected],  # type: ignore[list-item]
        verification=filling.verification,
        local=filling.local,
    )
    return index, frontier


def fill_chosen(
    auto: AutoIndex, counts: Sequence[int], read: Callable[[int], Tensor], labels: Tensor | None = None
) -> tuple[FaissIndex, Frontier]:
    """A filled index that keeps to a budget, and what it was chosen from.

    If the sample is not the whole, the index is tuned again with all items in it, against exact search of all of them.
    If it does not keep to the budget then, the next kind is filled. Vectors are read part by part.

    Args:
        auto: What chooses.
        counts: Number of vectors in each part.
        read: Function that returns the counts[i] vectors of part i.
        labels: int64 (N,), the labels of the items, or None.

    Raises:
        NoIndexFits: If no index keeps to the budget.
    """
    total = sum(counts)
    rows = auto.rows(total)
    sample = _at(rows, counts, read)
    points = auto.measure(sample, total, None if labels is None else labels[rows])
    whole: list[Point] = []
    for kind in auto.kinds(points, total, f"items of {sample.shape[1]} columns"):
        index = auto.chosen(kind, sample, total)
        fill_index(index, counts, read)
        if len(rows) == total:
            return index, Frontier(points, kind)
        own = auto.own(len(rows))
        parts = (read(part) for part in range(len(counts)))
        truth = exact(sample[own], parts, auto.k + 1, index.metric)
        whole += auto.sweep(index, sample[own], rows[own], truth, labels)
        if (best := preferred(whole, auto.budget)) is not None:
            index.tune(best.nprobe, best.ef_search, best.k_factor)
            return index, Frontier(points + whole, best)
    raise NoIndexFits(auto.failure(whole, f"all {total} items"))


def _at(rows: Tensor, counts: Sequence[int], read: Callable[[int], Tensor]) -> Tensor:
    """The vectors at ascending rows of the concatenated parts."""
    ends = torch.tensor(counts).cumsum(0)
    cuts = [0, *torch.searchsorted(rows, ends).tolist()]
    firsts = (ends - torch.tensor(counts)).tolist()
    spans = enumerate(pairwise(cuts))
    return torch.cat([read(i)[rows[start:stop] - firsts[i]] for i, (start, stop) in spans if start < stop])


def check_not_fewer(out: Path, count: int, allowed: bool) -> None:
    """Checks that a new catalog does not replace one that has far more items.

    Args:
        out: Folder of the catalog.
        count: Number of items in the new catalog.
        allowed: True if the user allows fewer items.

    Raises:
        ValueError: If it does and `allowed` is False.
    """
    try:
        before = int(read_json(out / "catalog.json").get("items", 0))
    except (OSError, ValueError, TypeError):  # there is none, or none that could be missed
        return
    if count < (1 - MOST_GONE) * before and not allowed:
        raise ValueError(
            f"the catalog {out} has {before} items, but the new one would have {count}. Check that all images are "
            "there; then allow it with fewer=true, or give another out="
        )
