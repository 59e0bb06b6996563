"""The gallery of an evaluation, searched by a store."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from simsearch.index.selection import checked_choice
from simsearch.search.stores.scores import scored
from simsearch.search.stores.store import Layout, Rows, Store, StoreError
from simsearch.types import SearchResult

_EVALUATION = "evaluation"  # in place of a catalog's fingerprint
_BLOCK = 4096  # items that are sent together


class StoredGallery:
    """The gallery of an evaluation in a store, filled and searched as an evaluation does with a `FaissIndex`.

    It gets a table or collection of its own, which `drop` removes again. What a killed evaluation left is replaced by
    the next one of the same gallery. Ids are found in the store, and scores are computed from the gallery's own
    vectors, as `StoredIndex` does.

    Args:
        store: The store.
        metric: "ip" or "l2" for vectors, "hamming" for codes.

    Attributes:
        factory: "exact", or the store's name of its index.
    """

    def __init__(self, store: Store, metric: str = "ip") -> None:
        self.store, self.metric, self.is_binary = store, metric, metric == "hamming"
        self.factory = "exact" if store.capabilities.exact else store.index.upper()
        self._vectors: Tensor | None = None
        self._snapshot = ""

    def __len__(self) -> int:
        return 0 if self._vectors is None else len(self._vectors)

    @property
    def settings(self) -> dict[str, str]:
        """Where the gallery is, without passwords, and by which index it is searched."""
        return {"place": self.store.place, "index": self.store.index}

    @property
    def keeps_vectors(self) -> bool:
        """True: scores are computed from the gallery's own vectors."""
        return True

    @property
    def code_bytes(self) -> int:
        """The size of an item's vector or code in bytes, without what the store adds."""
        return 0 if self._vectors is None else self._vectors[:1].nbytes

    @property
    def bytes_per_item(self) -> float:
        """NaN: stores do not say what an item takes."""
        return float("nan")

    def check(self, width: int) -> None:
        """Checks that the store can be reached and takes such a gallery.

        Args:
            width: Number of columns of the vectors, or of bits of the codes.

        Raises:
            StoreError: If it cannot be reached, or does not take it.
        """
        self.store.open(Layout(f"simsearch_{_EVALUATION}", _EVALUATION, width, self.metric))

    def add(self, vectors: Tensor) -> None:
        """Fills the store with the gallery, in place of an earlier one.

        Args:
            vectors: float32 (N, D), or packed codes uint8 (N, bits / 8).

        Raises:
            StoreError: If the store cannot be reached or does not take the gallery.
        """
        self.drop()
        array = np.ascontiguousarray(vectors.cpu().numpy())
        self._snapshot = hashlib.sha256(array.data).hexdigest()[:16]
        width = 8 * array.shape[1] if self.is_binary else array.shape[1]
        self.store.open(Layout(f"simsearch_{_EVALUATION}_{self._snapshot}", _EVALUATION, width, self.metric))
        self.store.drop()  # what a killed evaluation left
        with self.store.changing() as writer:
            for start in range(0, len(array), _BLOCK):
                block = array[start : start + _BLOCK]
                nothing: list[dict] = [{}] * len(block)
                rows = Rows(np.arange(start, start + len(block)), block, nothing, nothing)
                writer.upsert(rows, np.zeros(len(block), dtype=np.int64))
            writer.finish(self._snapshot)
        self._vectors = torch.from_numpy(array)

    def search(self, vectors: Tensor, k: int) -> SearchResult:
        """The k most similar items of each query that the store finds, as `FaissIndex.search` returns them.

        Args:
            vectors: float32 (Q, D) or codes uint8 (Q, bits / 8).
            k: Number of items, 1..N.

        Raises:
            ValueError: If k is out of range.
            StoreError: If the store cannot be reached, or if another evaluation changed the gallery.
        """
        checked_choice(k, None, len(self))
        assert self._vectors is not None
        found = self.store.search(vectors.numpy(), k).ids
        if self.store.snapshot() != self._snapshot:
            raise StoreError(f"another evaluation changed {self.store.place}: evaluate one after the other")
        bits = 8 * self._vectors.shape[1] if self.is_binary else None
        return scored(vectors, found, self._vectors.__getitem__, self.metric, bits)

    def reconstruct(self) -> Tensor:
        """The gallery's own vectors."""
        assert self._vectors is not None
        return self._vectors

    def emptied(self) -> StoredGallery:
        """Itself, without the gallery: a store holds one at a time."""
        self.drop()
        return self

    def drop(self) -> None:
        """Removes the gallery from the store.

        Raises:
            StoreError: If the store cannot be reached.
        """
        if self._vectors is not None:
            self.store.drop()
            self._vectors = None
