"""A catalog in Milvus, by pymilvus: in this process (milvus-lite), on one server or a cluster, by the same client.

    <collection>          one entity per item: id, digest, vector; text_... and number_... of each attribute
    simsearch_snapshots   for each collection the fingerprint and version of its catalog, and its index

Milvus has no transactions: while a push changes a collection, nobody searches it, and after a push that was ended
early nobody does until the next one. A push is no match for another one at the same time: only one process should push.

Milvus: https://milvus.io; its expressions: https://milvus.io/docs/boolean.md
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from simsearch.search.filters import Condition
from simsearch.search.stores.store import Capabilities, Layout, Rows, StoreError, one_line_reason, padded
from simsearch.types import SearchResult

_SNAPSHOTS = "simsearch_snapshots"
_METRICS = {"ip": "IP", "l2": "L2", "hamming": "HAMMING"}
_EXACT = ("FLAT", "BIN_FLAT")
_MOST_FOUND = 16_384  # items of a search
_MOST_TEXT = 65_535  # bytes of a text
_SENT = 1000  # items of a request
_NO_NUMBER = sys.float_info.max  # in place of a number: Milvus and milvus-lite treat null in different ways

# They log that milvus-lite starts and ends, and with tracebacks what it does not have, which is no fault of the user's.
_QUIET = {
    "milvus_lite": logging.WARNING,
    "grpc._server": logging.CRITICAL,
    "pymilvus.client.iterator.query_iterator": logging.ERROR,
}


class Milvus:
    """A catalog in a collection of Milvus. See `Store` for its methods.

    Args:
        uri: A file (./catalog.db: milvus-lite in this process, for small catalogs of vectors), or the address of a
            server or cluster (http://host:19530).
        token: "user:password" or a key, or None.
        database: Name of the database. None takes the usual one.
        collection: Name of the collection. None takes one of the catalog's own.
        index: "exact" compares a query with all items that meet the conditions. Otherwise Milvus's own name of an
            index, such as HNSW, IVF_RABITQ or DISKANN.
        build: Parameters of that index when it is built, by Milvus's own names.
        search: Parameters of that index when it is searched, by Milvus's own names.

    Raises:
        ValueError: If there are parameters for an exact search, or if the collection's name is none.
    """

    def __init__(
        self,
        uri: str,
        token: str | None = None,
        database: str | None = None,
        collection: str | None = None,
        index: str = "exact",
        build: Mapping[str, Any] | None = None,
        search: Mapping[str, Any] | None = None,
    ) -> None:
        if collection is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", collection):
            raise ValueError(f"the name of a collection has letters, digits and _, got {collection!r}")
        if index == "exact" and (build or search):
            raise ValueError("an exact search has no parameters: leave store.build= and store.search= out")
        self.uri, self.index, self.build, self.parameters = uri, index, dict(build or {}), dict(search or {})
        self._token, self._database, self._collection = token, database, collection
        self._layout: Layout | None = None
        self._opened: Any = None
        self._loaded: set[str] = set()  # collections

    @property
    def is_lite(self) -> bool:
        """Whether Milvus runs in this process, on a file."""
        return "://" not in self.uri

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do."""
        exact = self.index in ("exact", *_EXACT)
        return Capabilities(binary=not self.is_lite, filters=True, exact=exact)

    @property
    def layout(self) -> Layout:
        """What the catalog holds."""
        if self._layout is None:
            raise StoreError("the store is not opened")
        return self._layout

    @property
    def collection(self) -> str:
        """Name of the collection."""
        return self._collection or self.layout.name

    @property
    def place(self) -> str:
        """Where the store is, without passwords."""
        return f"the collection {self.collection} of Milvus ({re.sub(r'//[^/@]*@', '//', self.uri)})"

    def open(self, layout: Layout) -> None:
        """Makes the store ready for a catalog. Nothing is written, except the file of milvus-lite.

        Args:
            layout: What the catalog holds.

        Raises:
            StoreError: If Milvus cannot be reached, if milvus-lite should hold codes, or if the collection holds
                something else.
        """
        self._layout = layout
        if layout.is_binary and not self.capabilities.binary:
            raise StoreError(
                f"milvus-lite ({self.uri}) compares no codes: give the address of a server, store.uri=http://..., or "
                "store=pgvector"
            )
        held = self._held()
        if held is not None and held["catalog"] != layout.catalog:
            raise StoreError(
                f"{self.place} holds another catalog: give another store.collection=, or drop the collection"
            )
        with self._told() as client:
            if held is None and client.has_collection(self.collection):
                raise StoreError(f"{self.place} is not simsearch's: give another store.collection=")

    def close(self) -> None:
        """Ends the connection."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
            self._loaded.clear()

    def snapshot(self) -> str | None:
        """The version of the catalog that the store holds, or None.

        Raises:
            StoreError: If Milvus cannot be reached.
        """
        held = self._held()
        return None if held is None else held["version"] or None

    def count(self) -> int:
        """The number of items in the store."""
        with self._told() as client:
            if not self._is_loaded(client, self.collection):
                return 0
            found = client.query(self.collection, filter="", output_fields=["count(*)"], consistency_level="Strong")
            return int(found[0]["count(*)"])

    def search(
        self,
        queries: np.ndarray,
        k: int,
        where: Sequence[Condition] = (),
        *,
        among: np.ndarray | None = None,
        without: np.ndarray | None = None,
    ) -> SearchResult:
        """Ids and scores (Q, k) of the most similar items of each query, as `Store.search` returns them.

        Args:
            queries: float32 (Q, D), or packed codes uint8 (Q, bits / 8).
            k: Number of items. Milvus finds 16,384 at most.
            where: Conditions that must all hold. Their values are compared exactly.
            among: int64 (n,), the ids that may be returned. None for all.
            without: int64 (n,), ids that may not be returned.

        Raises:
            StoreError: If Milvus cannot be reached.
        """
        if among is not None and len(among) == 0:
            return padded([()] * len(queries), k)
        tests = [expression(condition) for condition in where]
        tests += [] if among is None else [f"id in {among.tolist()}"]
        tests += [] if without is None or len(without) == 0 else [f"id not in {without.tolist()}"]
        binary, sign = self.layout.is_binary, 1 if self.layout.metric == "ip" else -1
        with self._told() as client:
            self._is_loaded(client, self.collection)
            found = client.search(
                self.collection,
                data=[query.tobytes() if binary else query.tolist() for query in queries],
                anns_field="vector",
                filter=" and ".join(tests),
                limit=min(k, _MOST_FOUND),
                search_params={"metric_type": _METRICS[self.layout.metric], "params": self.parameters},
                consistency_level="Strong",
            )
        return padded([[(int(hit["id"]), sign * float(hit["distance"])) for hit in hits] for hits in found], k)

    @contextmanager
    def changing(self) -> Iterator[_Writer]:
        """Yields the writer of the collection. Milvus itself lets others change it too.

        Raises:
            StoreError: If the collection cannot be written to.
        """
        with self._told() as client:
            yield _Writer(client, self)

    def drop(self) -> None:
        """Removes the collection, if it holds what `open` said.

        Raises:
            StoreError: If Milvus cannot be reached.
        """
        if (held := self._held()) is not None and held["catalog"] == self.layout.catalog:
            with self._told() as client:
                client.drop_collection(self.collection)
                self._loaded.discard(self.collection)
                client.delete(_SNAPSHOTS, ids=[self.collection])  # last: without it the collection is not simsearch's

    def _held(self) -> dict[str, Any] | None:
        """What is noted of the collection: catalog, version ("" while it is being changed) and index; or None."""
        with self._told() as client:
            there = self.collection in self._loaded or client.has_collection(self.collection)
            if not there or not self._is_loaded(client, _SNAPSHOTS):
                return None
            found = client.get(_SNAPSHOTS, ids=[self.collection], consistency_level="Strong")
            return dict(found[0]) if found else None

    def _is_loaded(self, client: Any, name: str) -> bool:
        """Loads a collection, which milvus-lite does not do by itself when it opens a file. False if there is none."""
        if name not in self._loaded and client.has_collection(name):
            client.load_collection(name)
            self._loaded.add(name)
        return name in self._loaded

    @contextmanager
    def _told(self) -> Iterator[Any]:
        """Yields the client, which is made once, and tells of Milvus's errors in one line."""
        from pymilvus import MilvusClient, MilvusException

        try:
            if self._opened is None:
                for name, level in _QUIET.items():
                    logging.getLogger(name).setLevel(level)
                given = {"token": self._token, "db_name": self._database}
                self._opened = MilvusClient(self.uri, **{name: value for name, value in given.items() if value})
            yield self._opened
        except MilvusException as error:
            raise StoreError(f"{self.place} refuses or cannot be reached: {one_line_reason(error)}") from error


class _Writer:
    """Changes a collection, entity by entity. See `Writer` for its methods."""

    def __init__(self, client: Any, store: Milvus) -> None:
        self._client, self._name, self._layout = client, store.collection, store.layout
        kind = "BIN_FLAT" if self._layout.is_binary else "FLAT"
        self._index = (kind if store.index == "exact" else store.index, store.build)
        self._held = store._held()
        self._make(_SNAPSHOTS, {"catalog": "VARCHAR", "version": "VARCHAR", "index": "VARCHAR"}, ("FLAT", {}), "L2", 2)
        if store._is_loaded(client, self._name):
            fields = {field["name"] for field in client.describe_collection(self._name)["fields"]}
            if fields != {"id", "vector", *self._fields} or (self._held or {}).get("index") != self._about_index:
                self._note("")
                client.drop_collection(self._name)
        if not client.has_collection(self._name):
            self._note("")  # so that the next push knows what one that was killed has made
        self._make(self._name, self._fields, self._index, _METRICS[self._layout.metric], self._layout.width)

    @property
    def _fields(self) -> dict[str, str]:
        """The fields of attributes with their types."""
        texts = {text_field(name): "VARCHAR" for name in self._layout.columns}
        return {"digest": "INT64", **texts, **{number_field(name): "DOUBLE" for name in self._layout.numeric}}

    @property
    def _about_index(self) -> str:
        return json.dumps(self._index, sort_keys=True)

    def _make(self, name: str, fields: Mapping[str, str], index: tuple[str, Any], metric: str, width: int) -> None:
        """Makes a collection unless it is there. That of versions is keyed by text."""
        from pymilvus import DataType

        if self._client.has_collection(name):
            return
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        if name == _SNAPSHOTS:
            schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=255)
        else:
            schema.add_field("id", DataType.INT64, is_primary=True)
        binary = metric == "HAMMING"
        schema.add_field("vector", DataType.BINARY_VECTOR if binary else DataType.FLOAT_VECTOR, dim=width)
        for field, kind in fields.items():
            more = {"max_length": _MOST_TEXT} if kind == "VARCHAR" else {}
            schema.add_field(field, getattr(DataType, kind), **more)
        indexes = self._client.prepare_index_params()
        indexes.add_index("vector", index_type=index[0], metric_type=metric, params=index[1])
        self._client.create_collection(name, schema=schema, index_params=indexes, consistency_level="Strong")

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids and digests of all items in the collection, int64 (n,) each."""
        ids, digests = array("q"), array("q")
        rows = self._client.query_iterator(
            self._name, batch_size=_SENT, output_fields=["id", "digest"], consistency_level="Strong"
        )
        while block := rows.next():
            ids.extend(int(row["id"]) for row in block)
            digests.extend(int(row["digest"]) for row in block)
        rows.close()
        return np.array(ids, dtype=np.int64), np.array(digests, dtype=np.int64)

    def upsert(self, rows: Rows, digests: np.ndarray) -> None:
        """Adds items, in place of those of the same ids.

        Args:
            rows: The items.
            digests: int64 (n,), their digests.
        """
        self._note("")
        entities = []
        for number, digest, vector, columns, numbers in zip(
            rows.ids.tolist(), digests.tolist(), rows.vectors, rows.columns, rows.numbers, strict=True
        ):
            sent = vector.tobytes() if self._layout.is_binary else vector.tolist()
            texts = {text_field(name): columns.get(name, "") for name in self._layout.columns}
            values = {number_field(name): numbers.get(name, _NO_NUMBER) for name in self._layout.numeric}
            entities.append({"id": number, "digest": digest, "vector": sent, **texts, **values})
        for start in range(0, len(entities), _SENT):
            self._client.upsert(self._name, entities[start : start + _SENT])

    def delete(self, ids: np.ndarray) -> None:
        """Removes items.

        Args:
            ids: int64 (n,), their ids.
        """
        self._note("")
        for start in range(0, len(ids), _SENT):
            self._client.delete(self._name, ids=ids[start : start + _SENT].tolist())

    def finish(self, snapshot: str) -> None:
        """Says which version of the catalog the collection holds now.

        Args:
            snapshot: Name of the version.
        """
        self._note(snapshot)

    def _note(self, version: str) -> None:
        """Notes the version that the collection holds, "" while it is being changed."""
        note = {"id": self._name, "catalog": self._layout.catalog, "version": version, "index": self._about_index}
        if self._held is None or any(self._held.get(name) != value for name, value in note.items()):
            self._client.upsert(_SNAPSHOTS, [note | {"vector": [0.0, 0.0]}])
            self._held = note


def text_field(attribute: str) -> str:
    """The name of the field of an attribute's text.

    Args:
        attribute: Name of the attribute. One that Milvus does not take is named by its SHA-256.

    Example:
        >>> text_field("artist")
        'text_artist'
    """
    return f"text_{_name(attribute)}"


def number_field(attribute: str) -> str:
    """The name of the field of an attribute's number.

    Args:
        attribute: Name of the attribute.
    """
    return f"number_{_name(attribute)}"


def _name(attribute: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_]{0,199}[A-Za-z0-9])?", attribute)
    return attribute if plain else f"_{hashlib.sha256(attribute.encode()).hexdigest()[:16]}"


def literal(text: str) -> str:
    r"""A text as a literal of Milvus's expressions.

    Args:
        text: The text.

    Example:
        >>> print(literal('a "b" \\ c'))
        "a \"b\" \\ c"
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'


def expression(condition: Condition) -> str:
    """A condition as an expression of Milvus.

    An unknown value is stored as an empty text, and a missing number as the largest one.

    Args:
        condition: The condition.

    Example:
        >>> print(expression(Condition("artist", ("Claude Monet", ""))))
        text_artist in ["Claude Monet", ""]
    """
    if condition.low is not None or condition.high is not None:
        field = number_field(condition.attribute)
        ends = [f"{field} < {_NO_NUMBER!r}"]
        ends += [] if condition.low is None else [f"{field} >= {condition.low!r}"]
        ends += [] if condition.high is None else [f"{field} <= {condition.high!r}"]
        return f"{'not ' if condition.negate else ''}({' and '.join(ends)})"
    field = text_field(condition.attribute)
    if not condition.values:
        return f"{field} {'==' if condition.negate else '!='} {literal('')}"
    listed = ", ".join(literal(value if value.strip() else "") for value in condition.values)
    return f"{field} {'not in' if condition.negate else 'in'} [{listed}]"
