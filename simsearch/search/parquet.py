"""Exports the items of a catalog as Parquet files, which databases and data frames read.

    _export.json          what was exported; the digest of each file
    items-00000.parquet   id, vector, path and attributes of the first items, one row per item
    items-00001.parquet   ... of the next

Readers of a folder skip names that begin with an underscore (Spark, Arrow). A vector is a fixed-size list, which Arrow,
LanceDB, DuckDB and the bulk import of Milvus take as a vector: of float32, or of uint8 for packed codes. The entry
`simsearch` of each file's metadata says in JSON what the vectors are.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from simsearch.files import digests, is_temporary, replacing_folder, restore, write_json
from simsearch.search.catalog import Catalog
from simsearch.search.names import OWN_ID
from simsearch.search.writing import check_apart

ABOUT = "_export.json"
ID, VECTOR = "id", "vector"
ROWS = 1_000_000
_GROUP = 2**14  # items that are held in memory together, and stored in one row group
_FILE = re.compile(r"items-\d{5,}\.parquet", re.ASCII)


def export_parquet(catalog: Catalog, out: Path, *, rows: int = ROWS) -> list[Path]:
    """Writes ids, vectors and attributes of a catalog's items as Parquet, atomically. Returns the files in their order.

    The export replaces an earlier one at once. Items are read and written block by block, with a progress bar.

    Args:
        catalog: The catalog. Its encoder is not needed.
        out: The folder of the files.
        rows: Largest number of items in a file, 1 or more.

    Raises:
        ValueError: If `rows` is below 1, if `out` lies in the catalog, or if the index cannot decode its items.
        FileExistsError: If `out` holds something other than an export.
        OSError: If the folder cannot be written to. The earlier export stays.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    out = out.resolve()
    _check_place(out, catalog)
    about = facts(catalog)
    with replacing_folder(out) as temporary, tqdm(total=len(catalog), unit="item", desc="export") as bar:
        names = []
        for number, start in enumerate(range(0, len(catalog), rows)):
            names.append(f"items-{number:05d}.parquet")
            stop = min(start + rows, len(catalog))
            _write_file(temporary / names[-1], catalog, about, start, stop, bar)
        write_json(temporary / ABOUT, {**about, "sha256": digests(temporary, names)})
    return [out / name for name in names]


def facts(catalog: Catalog) -> dict[str, Any]:
    """What an export says of itself.

    - `catalog`, `version`, `encoder`: the catalog's fingerprint and version, and the fingerprint of its encoder.
    - `items`, `ids`: the number of items, and what the column `id` holds.
    - `metric`: how vectors compare: "ip" (the larger the more similar), "l2" or "hamming" (the smaller).
    - `dimension`: D of float vectors. `bits`: number of bits of codes, 8 to a byte, the first in the lowest bit.
    - `parts`: the columns and the weight of each part of a vector. Weights are contained in the vectors.
    - `decoded`: whether a compressed index returned approximations of the vectors. `index`: its factory string.

    Args:
        catalog: The catalog.
    """
    parts = {name: asdict(part) for name, part in catalog.parts.items()}
    width = max(part["stop"] for part in parts.values())
    return {
        "format": 1,
        "catalog": catalog.fingerprint,
        "version": int(catalog.about.get("version", 1)),
        "encoder": catalog.about["encoder_fingerprint"],
        "items": len(catalog),
        "ids": "the column id" if catalog.names.own else "numbers of the catalog",
        "metric": catalog.index.metric,
        "bits" if catalog.index.is_binary else "dimension": width,
        "parts": parts,
        "decoded": not catalog.index.keeps_vectors,
        "index": catalog.index.factory,
    }


def _check_place(out: Path, catalog: Catalog) -> None:
    """Raises an error if `out` lies in the catalog or around it, or holds something other than an export."""
    check_apart(out, catalog.folder)
    restore(out)
    if not out.exists():
        return
    names = {path.name for path in out.iterdir() if not is_temporary(path.name)} if out.is_dir() else {out.name}
    foreign = sorted(name for name in names if name != ABOUT and not _FILE.fullmatch(name))
    if foreign or (names and ABOUT not in names):
        what = "is a file" if out.is_file() else f"holds {(foreign or sorted(names))[0]}"
        raise FileExistsError(f"{out} {what} and is not an export: give another out=")


def _write_file(path: Path, catalog: Catalog, about: dict[str, Any], start: int, stop: int, bar: tqdm) -> None:
    """Writes the items start..stop-1."""
    schema = _table(catalog, range(0)).schema.with_metadata({"simsearch": json.dumps(about)})
    others = [name for name in schema.names if name != VECTOR]  # neither helps vectors
    with (
        path.open("wb") as file,
        pq.ParquetWriter(file, schema, use_dictionary=others, write_statistics=others) as writer,
    ):
        for first in range(start, stop, _GROUP):
            table = _table(catalog, range(first, min(first + _GROUP, stop)))
            writer.write_table(table, row_group_size=_GROUP)
            bar.update(len(table))


def _table(catalog: Catalog, positions: range) -> pa.Table:
    """The items at some positions, one row each."""
    start, count = positions.start, len(positions)
    items, numbers = catalog.items, catalog.names.numbers
    if catalog.names.own:
        ids, items = items[OWN_ID].slice(start, count).cast(pa.string()), items.drop_columns([OWN_ID])
    else:
        ids = pa.array(numbers[start : start + count], pa.int64())
    vectors = catalog.index.rows(torch.arange(start, start + count)).numpy()
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])
    columns = {ID: ids, VECTOR: lists}
    for name in items.column_names:
        new = name if name not in (ID, VECTOR) else f"attribute:{name}"
        while new != name and new in items.column_names:
            new = f"attribute:{new}"
        columns[new] = items[name].slice(start, count)
    return pa.table(columns)
