"""items.parquet of a catalog: attributes, read whole when it is opened, and thumbnails, read group by group.

catalog.json has digests of both: of the thumbnails of each group of rows, and of all other bytes. Parquet's own
checksums are of pages alone, not of their headers or the footer.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from simsearch.files import Damaged, sha256

THUMBNAIL = "thumbnail"


def write_items(path: Path, groups: Iterable[pa.Table]) -> dict[str, Any]:
    """What catalog.json says of the items: `items`, how many there are, and `items_sha256`, digests of the file.

    groups: one table a group of rows, the thumbnails last.
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
    """Where the bytes of a group's last column begin and end."""
    column = group.column(group.num_columns - 1)
    starts = (column.dictionary_page_offset, column.data_page_offset)
    start = min(start for start in starts if start)  # 4 at least; 0 or None where there is no dictionary
    return start, start + column.total_compressed_size


def _sha256_outside(path: Path, spans: Iterable[tuple[int, int]]) -> str:
    cuts = [0, *(cut for span in spans for cut in span), path.stat().st_size]
    return sha256(path, *zip(cuts[::2], cuts[1::2], strict=True))


def read_items(path: Path, about: Mapping[str, Any]) -> pa.Table:
    """The items without their thumbnails. about: catalog.json; an older one has no digests.

    Raises Damaged where the file is not what was written.
    """
    if (known := about.get("items_sha256")) is not None:
        spans = [(group["start"], group["stop"]) for group in known["thumbnails"]]
        if _sha256_outside(path, spans) != known["others"]:
            raise Damaged(f"{path} is damaged or of another catalog: its SHA-256 is not the recorded one")
    names = [name for name in pq.read_schema(path).names if name != THUMBNAIL]
    return pq.read_table(path, columns=names)


class ThumbnailGroups:
    """The thumbnails of checked items by groups of rows. Use it as a context, or `close` it.

    The file stays open: another may take its place, and this one still answers. sizes: bytes of each group.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path, self._known = path, about.get("items_sha256", {}).get("thumbnails")
        self._source = pa.OSFile(str(path))
        self._file = pq.ParquetFile(self._source)
        groups = [self._file.metadata.row_group(group) for group in range(self._file.num_row_groups)]
        column = self._file.schema_arrow.get_field_index(THUMBNAIL)
        self.sizes = [group.column(column).total_uncompressed_size for group in groups]
        self._starts = [0, *accumulate(group.num_rows for group in groups)]

    def __enter__(self) -> ThumbnailGroups:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()

    def place(self, position: int) -> tuple[int, int]:
        """The group of the item at a position, and its place in it."""
        group = bisect_right(self._starts, position) - 1
        return group, position - self._starts[group]

    def group(self, number: int) -> pa.ChunkedArray:
        """The thumbnails of a group. Raises Damaged where they are not what was written."""
        if self._known is not None:
            known = self._known[number]
            self._source.seek(known["start"])
            content = self._source.read(known["stop"] - known["start"])
            if hashlib.sha256(content).hexdigest() != known["sha256"]:
                raise Damaged(f"{self._path} is damaged: the SHA-256 of its thumbnails is not the recorded one")
        return self._file.read_row_group(number, columns=[THUMBNAIL]).column(THUMBNAIL)
