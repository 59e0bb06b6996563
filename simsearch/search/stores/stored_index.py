"""A catalog whose items are found by a store."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from simsearch.index.selection import Selection, checked_choice
from simsearch.search.catalog import Catalog
from simsearch.search.filters import Attributes, Condition, Filtered
from simsearch.search.segments import SegmentedIndex
from simsearch.search.stores.push import layout_of, snapshot_of
from simsearch.search.stores.scores import scored
from simsearch.search.stores.store import Store, StoreError
from simsearch.types import SearchResult


class StoredIndex(SegmentedIndex):
    """The index of a catalog, searched by a store: ids are found there, and scores are computed from the own vectors.

    The scores are those of the catalog's index, whatever the store rounds or compresses. Several threads may use it at
    once.

    Args:
        catalog: The catalog.
        store: The store, opened.
    """

    def __init__(self, catalog: Catalog, store: Store) -> None:
        assert catalog.places is not None
        super().__init__([segment.index for segment in catalog.segments], catalog.places)
        self.store = store
        self._folder, self._snapshot = catalog.folder, snapshot_of(catalog)
        self._attributes = Attributes(catalog.items)
        self._ids = catalog.names.numbers
        self._order = np.argsort(self._ids, kind="stable")

    def search(self, vectors: Tensor, k: int, among: Tensor | Selection | None = None) -> SearchResult:
        """The k most similar items of each query that the store finds, as `FaissIndex.search` returns them.

        Conditions that choose the items are sent as conditions, where the store takes them, and as ids otherwise.

        Args:
            vectors: float32 (Q, D) or codes uint8 (Q, bits / 8).
            k: Number of items, 1..N.
            among: The items that may be returned, as a selection or bool (N,); None for all.

        Raises:
            ValueError: As `FaissIndex.search` does.
            StoreError: If the store cannot be reached, or does not hold the catalog's version any more.
        """
        chosen = checked_choice(k, among, len(self))
        where: tuple[Condition, ...] = ()
        only = without = None
        if isinstance(chosen, Filtered) and self.store.capabilities.filters:
            where = tuple(map(self._attributes.spelled, chosen.where))
            without = self._ids[chosen.left_out] if len(chosen.left_out) else None
        elif chosen is not None:
            only = self._ids[chosen.positions]
        found = self.store.search(vectors.numpy(), k, where, among=only, without=without).ids
        self.check()  # afterwards: if the version is still the same, it was so during the search
        return self._scored(vectors, found)

    def check(self) -> None:
        """Checks that the store holds the catalog's version.

        Raises:
            StoreError: If it holds another one, or none.
        """
        if (held := self.store.snapshot()) != self._snapshot:
            said = "holds no whole copy" if held is None else f"holds version {_number(held)}, not {self._now}"
            raise StoreError(
                f"{self.store.place} {said} of the catalog {self._folder}: simsearch catalog push "
                f"catalog={self._folder} store=... brings it there"
            )

    @property
    def _now(self) -> str:
        return _number(self._snapshot)

    def _scored(self, vectors: Tensor, ids: Tensor) -> SearchResult:
        """Items by id as positions with their scores."""
        known = ids >= 0
        places = np.searchsorted(self._ids, ids[known].numpy(), sorter=self._order)
        at = self._order[np.minimum(places, len(self) - 1)]
        if not np.array_equal(self._ids[at], ids[known].numpy()):
            raise StoreError(
                f"{self.store.place} holds items that the catalog {self._folder} does not have: push again"
            )
        positions = torch.full_like(ids, -1)
        positions[known] = torch.from_numpy(at.astype(np.int64))
        return scored(vectors, positions, self.rows, self.metric, self.bits)


def _number(snapshot: str) -> str:
    """A version's number; versions of one number that differ are of changes in two copies of the folder."""
    return snapshot.partition("-")[0] + f" ({snapshot.partition('-')[2][:6]})"


def stored(catalog: Catalog, store: Store | None) -> Catalog:
    """The catalog, searched by a store.

    Args:
        catalog: The catalog.
        store: The store, which is opened. None returns the catalog as it is.

    Raises:
        StoreError: If the store cannot be reached, or holds another version of the catalog.
    """
    if store is None:
        return catalog
    store.open(layout_of(catalog))
    index = StoredIndex(catalog, store)
    index.check()
    return replace(catalog, index=index)
