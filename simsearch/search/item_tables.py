"""The items of a new catalog as tables: path, attributes, thumbnails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from simsearch.data.manifest import Manifest
from simsearch.search.items import THUMBNAIL
from simsearch.search.segments import CONTENT, ID


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
    if reserved := sorted({"rank", "score", "verdict", THUMBNAIL, ID, CONTENT} & set(manifest.attributes)):
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
