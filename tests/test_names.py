"""Names of items against loops over Python's own lists and dictionaries."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.search.names import Names

TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4), st.sampled_from(["7", "07", "1e3", "é"])
)
PATHS = st.lists(TEXT, min_size=1, max_size=12, unique=True)


@st.composite
def tables(draw) -> dict[str, list[str | None]]:
    paths = draw(PATHS)
    ids = draw(st.lists(st.none() | TEXT, min_size=len(paths), max_size=len(paths)))
    return {"id": ids, "path": paths} if draw(st.booleans()) else {"path": paths}


@given(tables(), TEXT)
def test_a_name_leads_to_its_item_and_no_other_text_does(columns, other):
    items = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    names = Names(pa.table(items))
    count = len(columns["path"])
    called = names.of(range(count))
    assert [names.find(name) for name in called] == list(range(count))
    ids = columns.get("id", [])
    unique = len({*ids}) == count and all(ids)
    assert called == (ids if unique else [str(i) for i in range(count)])
    texts = [value for values in columns.values() for value in values]
    if other not in texts and other not in called:
        assert names.find(other) is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True), st.integers(0, 50))
def test_a_number_means_the_id_and_nothing_else(numbers, asked):
    items = pa.table({"path": [str(i) for i in range(len(numbers))]})  # paths that look like numbers of others
    names = Names(items, np.array(numbers), own=False, given=41)
    assert names.of(range(len(numbers))) == [str(number) for number in numbers]
    assert names.find(str(asked)) == (numbers.index(asked) if asked in numbers else None)
    assert names.is_gone(str(asked)) == (asked < 41 and asked not in numbers)
    assert not names.is_gone("a.jpg")
    assert not names.is_gone("position:3")


def test_ids_go_first_and_exactly():
    items = pa.table({"path": ["7", "a.jpg", "b.jpg", "c.jpg"], "id": ["0007", "7", "007", "position:0"]})
    names = Names(items)
    asked = [
        "7",
        "007",
        "0007",
        "a.jpg",
        "position:0",
        "position:2",
        "00007",
        "2",
        "position:4",
        "position:-1",
        "",
        "A.jpg",
    ]
    assert [names.find(name) for name in asked] == [1, 2, 0, 1, 3, 2, None, None, None, None, None, None]
    assert names.of([3, 0]) == ["position:0", "0007"]


def test_an_id_of_several_items_names_none():
    names = Names(pa.table({"path": ["a", "b", "c"], "id": ["x", "x", "y"]}))
    assert names.of(range(3)) == ["0", "1", "2"]
    assert (names.find("y"), names.find("b")) == (2, 1)
    with pytest.raises(ValueError, match="2 items have the id 'x': give the path"):
        names.find("x")


def test_numbers_and_pieces():
    ids = pa.chunked_array([[3, 1], [], [2]], pa.int64())
    names = Names(pa.table({"id": ids}))
    assert [names.find(name) for name in ("1", "2", "3", "4")] == [1, 2, 0, None]
    assert Names(pa.table({"title": ["x", "y"]})).of([1]) == ["1"]
