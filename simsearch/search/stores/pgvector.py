"""A catalog in PostgreSQL with the extension pgvector, by psycopg.

    <table>               one row per item: id, digest, vector, columns, numbers
    simsearch_snapshots   for each table the fingerprint and version of its catalog

`columns` has the attributes as text, so that SQL can ask for them: select id, columns->>'artist' from <table>. A push
is one transaction: others see the old version until it is whole, and a process that is killed leaves the old version.

pgvector: https://github.com/pgvector/pgvector
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from simsearch.search.filters import Condition
from simsearch.search.stores.store import Capabilities, Layout, Rows, StoreError, one_line_reason, padded
from simsearch.types import SearchResult

if TYPE_CHECKING:
    from psycopg import Connection, Cursor, sql

_SNAPSHOTS = "simsearch_snapshots"
_NAME_BYTES = 63  # PostgreSQL cuts longer names
_OPERATORS = {"ip": "<#>", "l2": "<->", "hamming": "<~>"}
_CLASSES = {"ip": "vector_ip_ops", "l2": "vector_l2_ops", "hamming": "bit_hamming_ops"}
_MOST_COLUMNS = {"vector": 16_000, "bit": 64_000}  # that pgvector compares (bits: that it indexes)
_MOST_INDEXED = 2000  # columns of a vector in an HNSW graph
_LOCK_SECONDS = 10  # a push waits for another one, or for what a killed one left


class Pgvector:
    """A catalog in a table of PostgreSQL. See `Store` for its methods.

    Args:
        uri: Where PostgreSQL is: postgresql://user@host/database, or `host=/run/postgresql dbname=...`. A password
            belongs in ~/.pgpass or PGPASSWORD.
        table: Name of the table. None takes one of the catalog's own.
        index: "exact" compares a query with all items that meet the conditions. "hnsw" searches a graph, which finds
            most of the nearest items in a fraction of the time.
        m: Number of neighbours of an item in the graph.
        ef_construction: Number of candidates while the graph is built.
        ef_search: Number of candidates of a search, 1 to 1000.
        max_scan_tuples: Number of items that a search under conditions visits at most (iterative scan).

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        uri: str,
        table: str | None = None,
        index: Literal["exact", "hnsw"] = "exact",
        m: int = 16,
        ef_construction: int = 64,
        ef_search: int = 100,
        max_scan_tuples: int = 20_000,
    ) -> None:
        if index not in ("exact", "hnsw"):
            raise ValueError(f"index must be exact or hnsw, got {index!r}")
        if table is not None and not 0 < len(table.encode()) <= _NAME_BYTES:
            raise ValueError(f"the name of a table has 1 to {_NAME_BYTES} bytes, got {table!r}")
        ranges = {"m": (m, 2, 100), "ef_construction": (ef_construction, 4, 1000), "ef_search": (ef_search, 1, 1000)}
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in {low}..{high}, got {value}")
        if ef_construction < 2 * m:
            raise ValueError(f"ef_construction={ef_construction} must be at least twice m={m}")
        if max_scan_tuples < 1:
            raise ValueError(f"max_scan_tuples must be at least 1, got {max_scan_tuples}")
        self.uri, self.index, self.m, self.ef_construction = uri, index, m, ef_construction
        self.ef_search, self.max_scan_tuples = ef_search, max_scan_tuples
        self._table = table
        self._layout: Layout | None = None
        self._own = threading.local()  # a connection for each thread
        self._connections: list[Connection] = []

    @property
    def capabilities(self) -> Capabilities:
        """What the store can do."""
        return Capabilities(binary=True, filters=True, exact=self.index == "exact")

    @property
    def layout(self) -> Layout:
        """What the catalog holds."""
        if self._layout is None:
            raise StoreError("the store is not opened")
        return self._layout

    @property
    def table(self) -> str:
        """Name of the table."""
        return self._table or self.layout.name

    @property
    def place(self) -> str:
        """Where the store is, without passwords."""
        from psycopg import ProgrammingError, conninfo

        try:
            known = conninfo.conninfo_to_dict(self.uri)
        except ProgrammingError:
            return "PostgreSQL"
        at = [str(known[name]) for name in ("host", "port", "dbname") if known.get(name)]
        return f"the table {self.table} of PostgreSQL ({', '.join(at) or 'the usual database'})"

    def open(self, layout: Layout) -> None:
        """Makes the store ready for a catalog. Nothing is written.

        Args:
            layout: What the catalog holds.

        Raises:
            StoreError: If PostgreSQL cannot be reached, or if pgvector takes no vectors of that width.
        """
        self._layout = layout
        kind = "bit" if layout.is_binary else "vector"
        if layout.width > _MOST_COLUMNS[kind]:
            raise StoreError(f"pgvector compares vectors of at most {_MOST_COLUMNS[kind]} columns, got {layout.width}")
        if self.index == "hnsw" and not layout.is_binary and layout.width > _MOST_INDEXED:
            raise StoreError(
                f"an HNSW graph of pgvector takes at most {_MOST_INDEXED} columns, got {layout.width}: give "
                "store.index=exact"
            )
        held = self._held()
        if held is not None and held[0] != layout.catalog:
            raise StoreError(f"{self.place} holds another catalog: give another store.table=, or drop the table")

    def close(self) -> None:
        """Ends the connections."""
        while self._connections:
            self._connections.pop().close()

    def snapshot(self) -> str | None:
        """The version of the catalog that the store holds, or None.

        Raises:
            StoreError: If PostgreSQL cannot be reached.
        """
        return None if (held := self._held()) is None else held[1]

    def count(self) -> int:
        """The number of items in the store."""
        from psycopg import sql

        if not self._exists(self.table):
            return 0
        return int(self._rows(sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(self.table)))[0][0])

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
            k: Number of items.
            where: Conditions that must all hold. Their values are compared exactly.
            among: int64 (n,), the ids that may be returned. None for all.
            without: int64 (n,), ids that may not be returned.

        Raises:
            StoreError: If PostgreSQL cannot be reached.
        """

        statement, values = _statement(self.table, self.layout, self.index, where, among, without)
        found = [self._rows(statement, values | {"k": k, "query": self._text(query)}) for query in queries]
        to_score = {"ip": lambda d: 0.0 - d, "l2": lambda d: 0.0 - d * d, "hamming": lambda d: 0.0 - d}[
            self.layout.metric
        ]
        return padded([[(number, to_score(distance)) for number, distance in rows] for rows in found], k)

    @contextmanager
    def changing(self) -> Iterator[_Writer]:
        """Lets nobody else change the table inside the block, which is one transaction.

        Raises:
            StoreError: If another process changes the table, or if it cannot be written to.
        """
        with self._transaction() as cursor:
            yield _Writer(cursor, self.table, self.layout, self)

    def drop(self) -> None:
        """Removes the table, if it holds what `open` said.

        Raises:
            StoreError: If another process changes the table, or if it cannot be written to.
        """
        from psycopg import sql

        if (held := self._held()) is not None and held[0] == self.layout.catalog:
            with self._transaction() as cursor:
                cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(self.table)))
                cursor.execute(f"DELETE FROM {_SNAPSHOTS} WHERE name = %s", [self.table])

    @contextmanager
    def _transaction(self) -> Iterator[Cursor]:
        """A transaction in which nobody else changes the table."""
        with self._told(), self._connect() as connection:
            self._prepare(connection)
            with connection.transaction():
                cursor = connection.cursor()
                cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{_LOCK_SECONDS}s"])
                cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"simsearch {self.table}"])
                yield cursor

    def _prepare(self, connection: Connection) -> None:
        """Makes the extension and the table of versions, unless they are there."""
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('simsearch', 0))")
            known = connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchone()
            if known is None:
                connection.execute("CREATE EXTENSION vector")
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {_SNAPSHOTS} (name text PRIMARY KEY, catalog text NOT NULL, "
                "version text NOT NULL)"
            )

    def _held(self) -> tuple[str, str] | None:
        """Fingerprint and version of the catalog in the table, or None. What is noted of no table does not count."""
        if not self._exists(_SNAPSHOTS) or not self._exists(self.table):
            return None
        found = self._rows(f"SELECT catalog, version FROM {_SNAPSHOTS} WHERE name = %(name)s", {"name": self.table})
        return (found[0][0], found[0][1]) if found else None

    def _exists(self, table: str) -> bool:
        return bool(self._rows("SELECT to_regclass(quote_ident(%(table)s)) IS NOT NULL", {"table": table})[0][0])

    def _rows(self, statement: Any, values: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """The rows of a statement that reads, on this thread's own connection, which is made anew where it broke."""
        import psycopg

        with self._told():
            connection = getattr(self._own, "connection", None)
            if connection is not None and not connection.closed:
                try:
                    return connection.execute(statement, values).fetchall()
                except psycopg.OperationalError:
                    if not connection.closed:
                        raise
            return self._connected().execute(statement, values).fetchall()

    def _connected(self) -> Connection:
        """A new connection of this thread, for reading."""
        connection = self._own.connection = self._connect()
        connection.autocommit = True
        self._connections = [*(one for one in self._connections if not one.closed), connection]
        settings = {"hnsw.ef_search": self.ef_search, "hnsw.max_scan_tuples": self.max_scan_tuples}
        for name, value in (settings | {"hnsw.iterative_scan": "strict_order"}).items():
            connection.execute("SELECT set_config(%s, %s, false)", [name, str(value)])
        return connection

    def _connect(self) -> Connection:
        import psycopg

        # Statements are planned with their values: how many items meet a condition decides how they are found.
        return psycopg.connect(self.uri, prepare_threshold=None, application_name="simsearch")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tells of PostgreSQL's errors in one line."""
        import psycopg

        try:
            yield
        except psycopg.errors.LockNotAvailable:
            raise StoreError(f"another process changes {self.place}: wait until it is done") from None
        except psycopg.OperationalError as error:
            raise StoreError(f"{self.place} cannot be reached ({one_line_reason(error)}): check store.uri=") from error
        except psycopg.Error as error:
            raise StoreError(f"{self.place} refuses: {one_line_reason(error)}") from error

    def _text(self, query: np.ndarray) -> str:
        return _bits_text(query) if self.layout.is_binary else f"[{','.join(map(repr, query.tolist()))}]"


class _Writer:
    """Changes a table in one transaction. See `Writer` for its methods."""

    def __init__(self, cursor: Cursor, table: str, layout: Layout, store: Pgvector) -> None:
        from psycopg import sql

        self._cursor, self._layout, self._store, self._name = cursor, layout, store, table
        self._table = sql.Identifier(table)
        kind = sql.SQL("bit({})" if layout.is_binary else "vector({})").format(sql.Literal(layout.width))
        self._execute(
            "CREATE TABLE IF NOT EXISTS {table} (id bigint PRIMARY KEY, digest bigint NOT NULL, "
            "vector {kind} NOT NULL, columns jsonb NOT NULL, numbers jsonb NOT NULL)",
            parts={"kind": kind},
        )

    def digests(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids and digests of all items in the table, int64 (n,) each."""
        from psycopg import sql

        ids, digests = array("q"), array("q")
        statement = sql.SQL("SELECT id, digest FROM {}").format(self._table)
        with self._cursor.connection.cursor(name="digests") as cursor:  # a part of the rows at a time
            cursor.itersize = 10_000
            for number, digest in cursor.execute(statement):
                ids.append(number)
                digests.append(digest)
        return np.array(ids, dtype=np.int64), np.array(digests, dtype=np.int64)

    def upsert(self, rows: Rows, digests: np.ndarray) -> None:
        """Adds items, in place of those of the same ids.

        Args:
            rows: The items.
            digests: int64 (n,), their digests.
        """
        self._execute("CREATE TEMPORARY TABLE sent (LIKE {table}) ON COMMIT DROP")
        with self._cursor.copy("COPY sent FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(["int8", "int8", "bytea", "bytea", "bytea"])  # the last three as PostgreSQL sends them
            for number, digest, vector, columns, numbers in zip(
                rows.ids.tolist(), digests.tolist(), rows.vectors, rows.columns, rows.numbers, strict=True
            ):
                sent = _sent_bits(vector, self._layout.width) if self._layout.is_binary else _sent_vector(vector)
                copy.write_row((number, digest, sent, _sent_json(columns), _sent_json(numbers)))
        self._execute(
            "INSERT INTO {table} SELECT * FROM sent ON CONFLICT (id) DO UPDATE SET digest = excluded.digest, "
            "vector = excluded.vector, columns = excluded.columns, numbers = excluded.numbers"
        )
        self._execute("DROP TABLE sent")

    def delete(self, ids: np.ndarray) -> None:
        """Removes items.

        Args:
            ids: int64 (n,), their ids.
        """
        self._execute("DELETE FROM {table} WHERE id = ANY(%(ids)s)", {"ids": ids.tolist()})

    def finish(self, snapshot: str) -> None:
        """Says which version of the catalog the table holds now, and makes the indexes that are missing.

        A graph of other settings is built anew. Searches go on in the old one, which is dropped last: until the end of
        the transaction they would wait for that.

        Args:
            snapshot: Name of the version.
        """
        from psycopg import sql

        gin, old = sql.Identifier(_short(self._name, "columns")), list[str]()
        self._execute(
            "CREATE INDEX IF NOT EXISTS {gin} ON {table} USING gin (columns jsonb_path_ops)", parts={"gin": gin}
        )
        if self._store.index == "hnsw":
            m, ef = self._store.m, self._store.ef_construction
            plain = _short(self._name, "hnsw")  # of earlier releases
            named = _short(self._name, f"hnsw_{m}_{ef}")
            self._cursor.execute(
                "SELECT relname, reloptions FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
                "WHERE indrelid = to_regclass(quote_ident(%s)) AND starts_with(relname, 'simsearch_hnsw_')",
                [self._name],
            )
            graphs = {name: set(options or ()) for name, options in self._cursor.fetchall()}
            if graphs.get(plain) == {f"m={m}", f"ef_construction={ef}"}:
                named = plain
            old = sorted(set(graphs) - {named})
            self._execute(
                "CREATE INDEX IF NOT EXISTS {hnsw} ON {table} USING hnsw (vector {ops}) "
                "WITH (m = {m}, ef_construction = {ef})",
                parts={
                    "hnsw": sql.Identifier(named),
                    "ops": sql.SQL(_CLASSES[self._layout.metric]),
                    "m": sql.Literal(m),
                    "ef": sql.Literal(ef),
                },
            )
        self._execute("ANALYZE {table}")
        self._cursor.execute(
            f"INSERT INTO {_SNAPSHOTS} VALUES (%s, %s, %s) ON CONFLICT (name) DO UPDATE SET "
            "catalog = excluded.catalog, version = excluded.version",
            [self._name, self._layout.catalog, snapshot],
        )
        for name in old:
            self._execute("DROP INDEX {hnsw}", parts={"hnsw": sql.Identifier(name)})

    def _execute(
        self, statement: str, values: Mapping[str, Any] | None = None, parts: Mapping[str, sql.Composable] | None = None
    ) -> None:
        from psycopg import sql

        named = {"table": self._table, **(parts or {})}
        self._cursor.execute(sql.SQL(statement).format(**named), values)


def _statement(
    table: str,
    layout: Layout,
    index: str,
    where: Sequence[Condition],
    among: np.ndarray | None,
    without: np.ndarray | None,
) -> tuple[sql.Composed, dict[str, Any]]:
    """The statement of a search with the placeholders query and k, and the values of its other placeholders."""
    from psycopg import sql

    values: dict[str, Any] = {}
    tests: list[Any] = []
    for condition in where:
        test, own = _test(condition, f"c{len(tests)}")
        tests.append(test)
        values |= own
    if among is not None:
        tests.append(sql.SQL("id = ANY(%(among)s)"))
        values["among"] = among.tolist()
    if without is not None:
        tests.append(sql.SQL("id <> ALL(%(without)s)"))
        values["without"] = without.tolist()
    query = sql.SQL("%(query)s::bit({})" if layout.is_binary else "%(query)s::vector({})")
    distance = sql.SQL("vector {} {}").format(
        sql.SQL(_OPERATORS[layout.metric]), query.format(sql.Literal(layout.width))
    )
    # A graph answers for a distance alone, so that adding 0 asks for the exact one.
    order = distance if index == "hnsw" else sql.SQL("({}) + 0, id").format(distance)
    nearest = sql.SQL("SELECT id, {distance} AS distance FROM {table} {where} ORDER BY {order} LIMIT %(k)s").format(
        distance=distance,
        table=sql.Identifier(table),
        where=sql.SQL("WHERE ") + sql.SQL(" AND ").join(tests) if tests else sql.SQL(""),
        order=order,
    )
    return sql.SQL("SELECT id, distance FROM ({}) AS nearest ORDER BY distance, id").format(nearest), values


def _test(condition: Condition, name: str) -> tuple[sql.Composable, dict[str, Any]]:
    """The test of a condition in SQL, and the values of its placeholders, whose names begin with `name`."""
    from psycopg import sql

    column = sql.Placeholder(f"{name}_column")
    values: dict[str, Any] = {f"{name}_column": condition.attribute}
    known = sql.SQL("jsonb_exists(columns, {})").format(column)
    if condition.low is not None or condition.high is not None:
        test: sql.Composable = sql.SQL(
            "coalesce((numbers ->> {})::float8 BETWEEN {}::float8 AND {}::float8, false)"
        ).format(column, sql.Placeholder(f"{name}_low"), sql.Placeholder(f"{name}_high"))
        values |= {f"{name}_low": _end(condition.low, "-"), f"{name}_high": _end(condition.high, "")}
    elif not condition.values:
        test = known
    else:
        wanted = [json.dumps({condition.attribute: value}) for value in condition.values if value.strip()]
        parts: list[sql.Composable] = []
        if wanted:
            del values[f"{name}_column"]
            parts.append(sql.SQL("columns @> ANY({}::jsonb[])").format(sql.Placeholder(f"{name}_values")))
            values[f"{name}_values"] = wanted
        if len(wanted) < len(condition.values):
            values[f"{name}_column"] = condition.attribute
            parts.append(sql.SQL("NOT ") + known)
        test = sql.SQL("({})").format(sql.SQL(" OR ").join(parts))
    return (sql.SQL("NOT {}").format(test) if condition.negate else test), values


def _end(end: float | None, sign: str) -> str | float:
    return f"{sign}Infinity" if end is None else end


def _short(table: str, kind: str) -> str:
    """A name for an index of a table, which PostgreSQL does not cut."""
    return f"simsearch_{kind}_{hashlib.sha256(table.encode()).hexdigest()[:16]}"


# Values as PostgreSQL's binary COPY has them: a vector is its length, two unused bytes and its floats, big-endian; bits
# are their number and their bytes; jsonb is the format's version and the text.


def _sent_vector(vector: np.ndarray) -> bytes:
    return len(vector).to_bytes(2, "big") + b"\0\0" + vector.astype(">f4").tobytes()


def _sent_bits(code: np.ndarray, width: int) -> bytes:
    return width.to_bytes(4, "big") + code.tobytes()


def _sent_json(value: Mapping[str, Any]) -> bytes:
    return b"\x01" + json.dumps(dict(value)).encode()


def _bits_text(code: np.ndarray) -> str:
    return "".join(map(str, np.unpackbits(code).tolist()))
