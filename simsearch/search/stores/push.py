"""Brings a store to the present version of a catalog: adds and changes what differs, removes what is gone.

What differs is known by digests that the store keeps beside each item, so that a push mends whatever an earlier one
left when it was killed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from simsearch.files import checksum
from simsearch.search.catalog import Catalog
from simsearch.search.filters import Attributes
from simsearch.search.stores.store import Layout, Rows, Store

_BLOCK = 4096  # items that are compared and sent together


@dataclass(frozen=True)
class Pushed:
    """What a push changed in a store, in numbers of items.

    Attributes:
        added: Items that the store did not have.
        changed: Items whose vector or attributes differed.
        removed: Items that the catalog does not have.
        kept: Items that stayed as they were.
    """

    added: int
    changed: int
    removed: int
    kept: int

    def __str__(self) -> str:
        counts = {"added": self.added, "changed": self.changed, "removed": self.removed}
        return ", ".join([*(f"{n} {name}" for name, n in counts.items() if n), f"{self.kept} as they were"])


def layout_of(catalog: Catalog) -> Layout:
    """What a store must know of a catalog.

    Args:
        catalog: The catalog.
    """
    index = catalog.index
    width = index.bits if index.is_binary else index.dimension
    assert width is not None
    columns = tuple(catalog.items.column_names)
    return Layout(f"simsearch_{catalog.fingerprint}", catalog.fingerprint, width, index.metric, columns)


def snapshot_of(catalog: Catalog) -> str:
    """The name of a catalog's version: its number, and a digest of all that the catalog says of itself.

    Args:
        catalog: The catalog.
    """
    return f"{catalog.about.get('version', 1)}-{checksum(catalog.about)[:16]}"


class CatalogRows:
    """Reads the items of a catalog as a store holds them.

    Args:
        catalog: The catalog.

    Attributes:
        numeric: The attributes in which an item has a number.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        attributes = Attributes(catalog.items)
        self._columns = [(name, attributes.column(name)) for name in attributes.names]
        self.numeric = tuple(name for name, column in self._columns if np.isfinite(column.of_values).any())

    def block(self, start: int, stop: int) -> Rows:
        """The items at the positions start..stop-1.

        Args:
            start: First position.
            stop: Last position plus one.
        """
        catalog = self._catalog
        columns: list[dict[str, str]] = [{} for _ in range(start, stop)]
        numbers: list[dict[str, float]] = [{} for _ in range(start, stop)]
        for name, column in self._columns:
            for place, code in enumerate(column.codes[start:stop].tolist()):
                if code >= 0:
                    columns[place][name] = column.values[code]
                    if np.isfinite(number := column.of_values[code]):
                        numbers[place][name] = float(number)
        vectors = catalog.index.reconstruct(start, stop).numpy()
        return Rows(catalog.names.numbers[start:stop], vectors, columns, numbers)


def push(catalog: Catalog, store: Store) -> Pushed:
    """Brings a store to the catalog's version. Only items that differ are sent.

    Args:
        catalog: The catalog.
        store: The store. It is opened.

    Raises:
        StoreError: If the store cannot be reached, cannot hold the catalog, or is being changed by another process.
    """
    rows, numbers = CatalogRows(catalog), catalog.names.numbers
    store.open(replace(layout_of(catalog), numeric=rows.numeric))
    added = changed = 0
    with store.changing() as writer:
        ids, digests = writer.digests()
        order = np.argsort(ids, kind="stable")
        ids, digests = ids[order], digests[order]
        with tqdm(total=len(catalog), unit="item", desc="push", disable=None) as bar:
            for start in range(0, len(catalog), _BLOCK):
                block = rows.block(start, min(start + _BLOCK, len(catalog)))
                own = block.digests()
                places = np.searchsorted(ids, block.ids)
                known = places < len(ids)
                known[known] = ids[places[known]] == block.ids[known]
                differs = ~known
                differs[known] = digests[places[known]] != own[known]
                if differs.any():
                    writer.upsert(block.take(np.flatnonzero(differs)), own[differs])
                added += int((~known).sum())
                changed += int((differs & known).sum())
                bar.update(len(block))
        gone = np.setdiff1d(ids, numbers)
        if len(gone):
            writer.delete(gone)
        writer.finish(snapshot_of(catalog))
    return Pushed(added, changed, len(gone), len(catalog) - added - changed)
