"""Writes a whole catalog (simsearch.search.catalog): fills its index and gives ids to its items."""

from __future__ import annotations

import csv
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from simsearch.data.tables import Rejected
from simsearch.files import digests, is_temporary, read_json, replacing_folder, restore, write_csv, write_json
from simsearch.images import ImageError
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.calibration_file import calibrated_for
from simsearch.search.catalog import FORMAT, OF_FORMAT_1, first_fingerprint, read_catalog
from simsearch.search.encoder_files import write_encoder
from simsearch.search.errors import CatalogError
from simsearch.search.items import THUMBNAIL
from simsearch.search.local_features import about_local_features
from simsearch.search.names import OWN_ID, Names
from simsearch.search.segments import CONTENT, regroup, with_ids, write_segment
from simsearch.search.verification import Verification
from simsearch.text import warn
from simsearch.types import Encoder

_ENTRIES = {"catalog.json", "segments", "removed", "encoder.safetensors", "skipped.csv", *OF_FORMAT_1}
_ENTRIES |= {"calibration.json", "calibration", "frontier.csv", "frontier.png"}
_SKIPPED = ["path", "reason", "detail"]
_ADDED = 2**16  # vectors that an index is given together


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
    check_place(folder)
    restore(folder)
    with locked(folder):
        check_place(folder)
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
            about["first"] = {"catalog": first_fingerprint(about), "items": len(index), "next_id": about["next_id"]}
            write_json(temporary / "catalog.json", about)
            write_skipped(temporary, errors)
            if calibrated_for(folder) == first_fingerprint(about):
                shutil.copy(folder / "calibration.json", temporary)
                if (folder / "calibration").is_dir():
                    shutil.copytree(folder / "calibration", temporary / "calibration")


def check_place(folder: Path) -> None:
    """Checks that a catalog may be written to a folder.

    Args:
        folder: The folder.

    Raises:
        FileExistsError: If it is a file, or holds something other than a catalog.
    """
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: give another out=")
    entries = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if entries and "catalog.json" not in entries:
        raise FileExistsError(f"{folder} exists and is not a catalog: give another out=")
    if foreign := sorted(name for name in entries - _ENTRIES if not is_temporary(name)):
        raise FileExistsError(
            f"the catalog {folder} also holds other files ({', '.join(foreign[:3])}): give another out="
        )


def check_apart(out: Path, catalog: Path) -> None:
    """Checks that a folder for other files and a catalog do not lie in each other.

    Args:
        out: The folder.
        catalog: The catalog's folder.

    Raises:
        ValueError: If they do. A catalog that holds other files cannot be made anew.
    """
    out, catalog = out.resolve(), catalog.resolve()
    if out.is_relative_to(catalog) or catalog.is_relative_to(out):
        raise ValueError(f"out={out} and the catalog {catalog} lie in each other: give another out=")


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


def write_skipped(
    folder: Path, errors: Sequence[ImageError | Rejected], kept: Sequence[tuple[str, str, str]] = ()
) -> None:
    """Writes the skipped.csv of a catalog, or removes it if no file was skipped.

    Args:
        folder: The catalog's folder.
        errors: Errors of files that could not be read.
        kept: Rows that go first: path, reason and detail. A path that is among the errors is left out.
    """
    rows = [(str(error.path), error.reason, error.detail) for error in errors]
    again = {path for path, _, _ in rows}
    rows = [*(row for row in kept if row[0] not in again), *rows]
    if rows:
        write_csv(folder / "skipped.csv", _SKIPPED, rows)
    else:
        (folder / "skipped.csv").unlink(missing_ok=True)


def read_skipped(folder: Path) -> list[tuple[str, str, str]]:
    """The rows of the skipped.csv of a catalog: path, reason and detail. Empty without such a file.

    Args:
        folder: The catalog's folder.
    """
    path = folder / "skipped.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["path"], row["reason"], row["detail"]) for row in csv.DictReader(file)]


class _Numbering:
    """Gives ids to the items of a new catalog. A path keeps the id that it had in the catalog in the same folder."""

    def __init__(self, folder: Path) -> None:
        self._before: dict[str, int] = {}
        self.next_id = 0
        try:
            old = read_catalog(folder, calibrated=False)
        except (ValueError, OSError, KeyError, TypeError):  # there is none, or none that can be read
            old = None
            self._begin_above(folder)
        if old is not None and "path" in old.items.column_names:
            paths, ids = old.items["path"].to_pylist(), old.names.numbers
            self._before = dict(zip(paths, ids.tolist(), strict=True))
            self.next_id = old.names.given
        self.columns: list[str] = []
        self._own: list[pa.ChunkedArray] = []
        self._counted = 0

    def _begin_above(self, folder: Path) -> None:
        """Gives no id that a damaged catalog may have given, as far as its catalog.json says which."""
        try:
            self.next_id = int(read_json(folder / "catalog.json")["next_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        warn(f"note: the items of the damaged catalog {folder} cannot be read, so all get new ids, from {self.next_id}")

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
