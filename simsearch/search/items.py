"""The files that hold a catalog's items: attributes, read when it is opened, and thumbnails, one row group at a time.

Digests cover the thumbnails of each row group and all other bytes. Parquet's own checksums cover pages only, not their
headers or the footer. Catalogs of format 1 have one file for both.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simsearch.files import Damaged, sha256

THUMBNAIL = "thumbnail"


def write_items(path: Path, groups: Iterable[pa.Table]) -> dict[str, Any]:
    """Writes tables as row groups of a parquet file and returns their number of rows and digests.

    Args:
        path: The file to write.
        groups: One table per row group. The thumbnails are the last column.

    Returns:
        `items`, the number of items, and `items_sha256`, the digests of the file.
    """
    count, writer = 0, None
    try:
        for table in groups:
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table, row_group_size=len(table))
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    with pq.ParquetFile(path) as file:
        spans = [_span(file.metadata.row_group(group)) for group in range(file.num_row_groups)]
    thumbnails = [{"start": start, "stop": stop, "sha256": sha256(path, (start, stop))} for start, stop in spans]
    return {"items": count, "items_sha256": {"thumbnails": thumbnails, "others": _sha256_outside(path, spans)}}


def _span(group: pq.RowGroupMetaData) -> tuple[int, int]:
    """The first and the past-the-end byte of a row group's last column."""
    column = group.column(group.num_columns - 1)
    starts = (column.dictionary_page_offset, column.data_page_offset)
    start = min(start for start in starts if start)  # 4 at least; 0 or None where there is no dictionary
    return start, start + column.total_compressed_size


def _sha256_outside(path: Path, spans: Iterable[tuple[int, int]]) -> str:
    cuts = [0, *(cut for span in spans for cut in span), path.stat().st_size]
    return sha256(path, *zip(cuts[::2], cuts[1::2], strict=True))


def check_outside(path: Path, about: Mapping[str, Any]) -> None:
    """Compares all bytes of a file but its thumbnails with their digest.

    Args:
        path: The file.
        about: Entries of `write_items`. Older versions have no digests.

    Raises:
        Damaged: If the file differs from what was written.
    """
    if (known := about.get("items_sha256")) is not None:
        spans = [(group["start"], group["stop"]) for group in known["thumbnails"]]
        if _sha256_outside(path, spans) != known["others"]:
            raise Damaged(f"{path} is damaged or belongs to another catalog: its SHA-256 is not the recorded one")


def read_items(path: Path, about: Mapping[str, Any]) -> pa.Table:
    """The items in a parquet file without their thumbnails.

    Args:
        path: The file.
        about: Entries of `write_items`. Older versions have no digests.

    Raises:
        Damaged: If the file differs from what was written.
    """
    check_outside(path, about)
    names = [name for name in pq.read_schema(path).names if name != THUMBNAIL]
    return pq.read_table(path, columns=names)


def rows_at(items: pa.Table, positions: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of a table at some positions, as dictionaries.

    Arrow's `take` of a table in pieces costs as much as the table is long.

    Args:
        items: The table.
        positions: Positions of the rows.
    """
    columns = [[column[position].as_py() for position in positions] for column in items.columns]
    return [dict(zip(items.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


class ThumbnailGroups:
    """The thumbnails of the rows of a file, one row group at a time. Several threads may use it at once.

    The file stays open, so the object keeps working after another file has taken its place. `sizes` holds the number of
    bytes of each row group.

    Args:
        path: The parquet file.
        about: Entries of `write_items`. Older versions have no digests.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path, self._known = path, about.get("items_sha256", {}).get("thumbnails")
        self._source = pa.OSFile(str(path))
        self._file = pq.ParquetFile(self._source)
        self._lock = threading.Lock()  # one place in the file at a time
        groups = [self._file.metadata.row_group(group) for group in range(self._file.num_row_groups)]
        column = self._file.schema_arrow.get_field_index(THUMBNAIL)
        self.sizes = [group.column(column).total_uncompressed_size for group in groups]
        self._starts = [0, *accumulate(group.num_rows for group in groups)]

    def place(self, row: int) -> tuple[int, int]:
        """The row group of a row, and the row's place in it.

        Args:
            row: The row.
        """
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def group(self, number: int) -> pa.ChunkedArray:
        """The thumbnails of a row group.

        Args:
            number: Number of the row group.

        Raises:
            Damaged: If the bytes differ from what was written.
        """
        with self._lock:
            if self._known is not None:
                known = self._known[number]
                self._source.seek(known["start"])
                content = self._source.read(known["stop"] - known["start"])
                if hashlib.sha256(content).hexdigest() != known["sha256"]:
                    raise Damaged(f"{self._path} is damaged: the SHA-256 of its thumbnails is not the recorded one")
            return self._file.read_row_group(number, columns=[THUMBNAIL]).column(THUMBNAIL)

    def take(self, rows: Sequence[int]) -> list[bytes]:
        """The thumbnails of some rows. Reads only the row groups that contain them.

        Args:
            rows: The rows.

        Raises:
            Damaged: If the bytes differ from what was written.
        """
        places = [self.place(row) for row in rows]
        groups = {group: self.group(group) for group in {group for group, _ in places}}
        return [groups[group][place].as_py() for group, place in places]
