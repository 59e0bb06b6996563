"""What an engine beside the catalog's own index must do, so that a catalog is searched in it.

The catalog's folder stays the truth: encoder, items, thumbnails, calibration and vectors. A store holds a copy of the
ids, vectors and attributes of one version of the catalog, and finds nearest vectors among those that meet conditions.
`simsearch catalog push` brings it to the catalog's present version (simsearch.search.stores.push).

A descriptor of several parts needs nothing of a store: a query's parts are scaled, and the inner product with the
stored concatenation is the weighted sum of their cosines (simsearch.functional.feedback).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from simsearch.errors import SimsearchError
from simsearch.search.filters import Condition
from simsearch.types import SearchResult


class StoreError(SimsearchError, OSError):
    """The store cannot be reached, cannot hold the catalog, or does not hold its present version."""


@dataclass(frozen=True)
class Layout:
    """What a store must know of a catalog to hold it.

    Attributes:
        name: Name of the table or collection, unless the user names another.
        catalog: Fingerprint of the catalog.
        width: Number of columns of a vector, or of bits of a code.
        metric: "ip" or "l2" for vectors, "hamming" for codes.
        columns: Names of the attributes.
        numeric: Those of them in which an item has a number; empty where nothing is written.
    """

    name: str
    catalog: str
    width: int
    metric: str
    columns: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()

    @property
    def is_binary(self) -> bool:
        """Whether the catalog holds codes."""
        return self.metric == "hamming"


@dataclass(frozen=True)
class Capabilities:
    """What a store can do.

    Attributes:
        binary: It holds codes and compares them by Hamming distance.
        filters: It takes conditions on attributes. Without, all ids that meet them are sent.
        exact: It compares a query with all items, so that it finds the nearest ones.
    """

    binary: bool
    filters: bool
    exact: bool


@dataclass(frozen=True)
class Rows:
    """Items as a store holds them.

    Attributes:
        ids: int64 (n,), the numbers that the catalog gave to the items.
        vectors: float32 (n, D), or packed codes uint8 (n, bits / 8).
        columns: The known attributes of each item, as text.
        numbers: Those of them that are numbers.
    """

    ids: np.ndarray
    vectors: np.ndarray
    columns: Sequence[Mapping[str, str]]
    numbers: Sequence[Mapping[str, float]]

    def __len__(self) -> int:
        return len(self.ids)

    def digests(self) -> np.ndarray:
        """int64 (n,), a digest of each item's vector and attributes, by which a changed item is known."""
        found = []
        for vector, columns in zip(np.ascontiguousarray(self.vectors), self.columns, strict=True):
            text = json.dumps(dict(columns), sort_keys=True).encode()
            found.append(hashlib.blake2b(vector.tobytes() + text, digest_size=8).digest())
        return np.frombuffer(b"".join(found), dtype="<i8").astype(np.int64)

    def take(self, places: np.ndarray) -> Rows:
        """Some of the items.

        Args:
            places: int64 (m,), their places.
        """
        chosen = places.tolist()
        columns, numbers = [self.columns[i] for i in chosen], [self.numbers[i] for i in chosen]
        return Rows(self.ids[places], self.vectors[places], columns, numbers)


class Writer(Protocol):
    """Changes a store. Only one writer at a time does."""

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids and digests of all items in the store, int64 (n,) each."""
        ...

    def upsert(self, rows: Rows, digests: np.ndarray) -> None:
        """Adds items, in place of those of the same ids.

        Args:
            rows: The items.
            digests: int64 (n,), their digests.
        """
        ...

    def delete(self, ids: np.ndarray) -> None:
        """Removes items.

        Args:
            ids: int64 (n,), their ids. An id that is not there is no error.
        """
        ...

    def finish(self, snapshot: str) -> None:
        """Says which version of the catalog the store holds now. It is the last change.

        Args:
            snapshot: Name of the version.
        """
        ...


class Store(Protocol):
    """An engine that holds one version of a catalog. Several threads may search at once.

    Attributes:
        index: "exact", or the engine's name of the index that it searches.
    """

    index: str

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do."""
        ...

    @property
    def place(self) -> str:
        """Where the store is, for messages, without passwords."""
        ...

    def open(self, layout: Layout) -> None:
        """Makes the store ready for a catalog. Nothing is written.

        Args:
            layout: What the catalog holds.

        Raises:
            StoreError: If the store cannot be reached or cannot hold the catalog.
        """
        ...

    def snapshot(self) -> str | None:
        """The version of the catalog that the store holds. None if it holds none, or is being changed.

        Raises:
            StoreError: If the store cannot be reached.
        """
        ...

    def count(self) -> int:
        """The number of items in the store."""
        ...

    def search(
        self,
        queries: np.ndarray,
        k: int,
        where: Sequence[Condition] = (),
        *,
        among: np.ndarray | None = None,
        without: np.ndarray | None = None,
    ) -> SearchResult:
        """Ids and scores (Q, k) of the most similar items of each query, best first; id -1 where there are fewer.

        Scores are inner products, minus squared distances or minus Hamming distances. Which of the items that tie with
        the k-th score are found is the engine's choice.

        Args:
            queries: float32 (Q, D), or packed codes uint8 (Q, bits / 8).
            k: Number of items.
            where: Conditions that must all hold. Their values are compared exactly.
            among: int64 (n,), the ids that may be returned. None for all.
            without: int64 (n,), ids that may not be returned.

        Raises:
            StoreError: If the store cannot be reached.
        """
        ...

    def changing(self) -> AbstractContextManager[Writer]:
        """Lets nobody else change the store inside the block. An error inside it leaves the store as it was, if it can.

        Raises:
            StoreError: If another process changes the store, or if it cannot be written to.
        """
        ...

    def drop(self) -> None:
        """Removes the copy that `open` found or that was made since. Nothing else is touched.

        Raises:
            StoreError: If the store cannot be reached, or if it cannot be written to.
        """
        ...

    def close(self) -> None:
        """Ends the connections."""
        ...


def padded(found: Sequence[Sequence[tuple[int, float]]], k: int) -> SearchResult:
    """Ids and scores of several queries as a result of shape (Q, k).

    Args:
        found: Ids and scores of each query, at most k, best first.
        k: Number of columns.

    Example:
        >>> padded([[(7, 1.0)]], 2)
        SearchResult(ids=tensor([[ 7, -1]]), scores=tensor([[1., -inf]]))
    """
    ids, scores = torch.full((len(found), k), -1), torch.full((len(found), k), -torch.inf)
    for row, items in enumerate(found):
        for column, (number, score) in enumerate(items):
            ids[row, column], scores[row, column] = number, score
    return SearchResult(ids, scores)


def one_line_reason(error: BaseException) -> str:
    """The first line of an engine's error message.

    Args:
        error: The error.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
