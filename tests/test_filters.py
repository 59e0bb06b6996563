"""Filters: the grammar there and back, and masks against a search by hand."""

from __future__ import annotations

import threading
import time
from difflib import get_close_matches
from unittest import mock

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.search import filters
from simsearch.search.filters import Attributes, Condition, parse_filters, select

TABLE = pa.table(
    {
        "artist": ["Claude Monet", "claude  monet", "Paul Cézanne", None, 'Who; me? | "x"', " ", "*"],
        "year": ["1870", "1900", "c. 1890", None, "1850.5", "-3", "1900"],
        "rating": pa.array([1, 2, None, 4, 5, 6, 7]),
        "empty": pa.array([None] * 7, pa.string()),
        "lot": ["12", "1-2", "-3", "3", "2..3", "1_000", "a\nb"],
        "price": pa.array([float("nan"), 3.5, 3.25, 1e9, 4.0, None, 0.5]),
    }
)


def rows(text: str) -> list[int]:
    return select(TABLE, parse_filters(text)).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0, 1, 2, 3, 4, 5, 6]),
        (" ; ", [0, 1, 2, 3, 4, 5, 6]),
        ("artist=CLAUDE MONET", [0, 1]),
        ("artist = claude monet | Paul Ce\u0301zanne ;", [0, 1, 2]),
        ("artist!=claude monet", [2, 3, 4, 5, 6]),
        ("artist=*", [0, 1, 2, 4, 6]),
        ("artist!=*", [3, 5]),
        ('artist="*"', [6]),
        ("artist=PAUL CEZANNE|claude-monet", [0, 1, 2]),
        ('artist=""', [3, 5]),
        ('artist!=" "', [0, 1, 2, 4, 6]),
        ('artist=""|"*"', [3, 5, 6]),
        ('lot=12|"2..3"', [0, 4]),
        ("lot=-3", [2]),
        ('lot="a\nb"', [6]),
        ("price=3..4", [1, 2, 4]),
        ("price!=*", [0, 5]),
        ('price=""|4', [0, 4, 5]),
        ('artist="Who; me? | ""x"""', [4]),
        ("year=1850..1890", [0, 4]),
        ("year=1900..", [1, 6]),
        ("year=..0", [5]),
        ("year!=1850..1890", [1, 2, 3, 5, 6]),
        ("year=1900", [1, 6]),
        ("year=1850.5..1850.5", [4]),
        ("rating=2..5", [1, 3, 4]),
        ("rating=7|1", [0, 6]),
        ("artist=claude monet; year=1880..; rating!=7", [1]),
        ("empty!=*", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_select(text, expected):
    assert rows(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("artist", "has no =: write attribute=value"),
        ("=x", "names no attribute"),
        ("artist=", "has no value"),
        ("artist=a|", "has no value"),
        ("artist=a=b", "two =: quote a value that holds = with double quotes"),
        ('artist="a" b', "do not enclose a whole value"),
        ('artist="a', "do not enclose a whole value"),
        ("year=1800..1900|1950", "cannot be combined with other values"),
        ("artist=*|x", r"\* cannot be combined with other values"),
        ("year=1900..1800", "its lower end is above its upper end"),
        ("year=1e999..2", "the filter on year has a range whose end is not a finite number: leave that end out"),
        ("year=-1e999..", "not a finite number"),
        ("year!=..1e999", "not a finite number"),
        ("artsit=x", r"no attribute 'artsit' in this catalog: did you mean artist\? there are artist, year, rating"),
        ("artist=Claude Mone", "did you mean 'Claude Monet'"),
        ("artist=zzz", "no item has artist 'zzz': there are 'Claude Monet'"),
        ("empty=x", "it has no values"),
        ("artist=1800..1900", "artist does not hold numbers, so that it cannot have a range"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        rows(text)


def test_a_condition_has_values_or_a_range():
    with pytest.raises(ValueError, match="write two conditions"):
        Condition("year", ("1900",), 1.0)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
NUMBER = st.floats(-1e18, 1e18).map(lambda value: value + 0.0)  # no -0.0


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    name, negate = draw(TEXT), draw(st.booleans())
    kind = draw(st.sampled_from(["values", "range", "known"]))
    if kind == "values":
        return Condition(name, tuple(draw(st.lists(TEXT, min_size=1, max_size=3))), negate=negate)
    if kind == "known":
        return Condition(name, negate=negate)
    low, high = sorted([draw(NUMBER), draw(NUMBER)])
    ends = draw(st.sampled_from([(low, high), (low, None), (None, high)]))
    return Condition(name, (), *ends, negate)


@given(st.lists(conditions(), max_size=3))
@settings(deadline=None)
def test_there_and_back(stated):
    assert parse_filters("; ".join(map(str, stated))) == tuple(stated)


@given(st.text(max_size=30))
@settings(deadline=None)
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_filters(text)
    except ValueError:
        return
    assert parse_filters("; ".join(map(str, found))) == found


@given(
    st.lists(st.one_of(st.none(), st.sampled_from(["a", "A", "b", "1", "2.5", "10", ""])), min_size=1, max_size=12),
    st.sampled_from(["a", "1", "2.5"]),
    st.booleans(),
)
@settings(deadline=None)
def test_masks_are_a_search_by_hand(column, value, negate):
    attributes = Attributes(pa.table({"x": pa.array(column, pa.string())}))
    if any(text is not None and text.lower() == value for text in column):
        mask = attributes.select([Condition("x", (value,), negate=negate)])
        assert mask.tolist() == [((text or "").lower() == value) != negate for text in column]
    if any(text in ("1", "2.5", "10") for text in column):
        mask = attributes.select([Condition("x", (), 1.5, 10.0, negate)])
        assert mask.tolist() == [(text in ("2.5", "10")) != negate for text in column]


WORDS = st.sampled_from(["a", "b", "B", "c d", "1", "2.5", "-3", "10", None, ""])


@st.composite
def tables(draw) -> tuple[pa.Table, list[Condition]]:
    """A table of two columns and conditions on it; rows repeat, so that some values are rare and some frequent."""
    rows = draw(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8))
    times = draw(st.lists(st.sampled_from([1, 1, 40, 300]), min_size=len(rows), max_size=len(rows)))
    many = [row for row, count in zip(rows, times, strict=True) for _ in range(count)]
    order = torch.randperm(len(many), generator=torch.Generator().manual_seed(len(many))).tolist()
    columns = {name: [many[i][place] for i in order] for place, name in enumerate("xy")}
    conditions = []
    for name in draw(st.lists(st.sampled_from("xy"), max_size=3)):
        known = [*sorted({value.lower() for value in columns[name] if value}), ""]
        negate, kind = draw(st.booleans()), draw(st.sampled_from(["any", "values", "range"]))
        if kind == "values":
            values = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
            conditions.append(Condition(name, tuple(values), negate=negate))
        elif kind == "range" and any(number(value) is not None for value in columns[name]):
            low, high = draw(st.sampled_from([(None, 2.5), (-3.0, 1.0), (2.0, None), (3.0, 4.0)]))
            conditions.append(Condition(name, (), low, high, negate))
        else:
            conditions.append(Condition(name, negate=negate))
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), conditions


def number(value: str | None) -> float | None:
    try:
        return float(value or "none")
    except ValueError:
        return None


def meets(value: str | None, condition: Condition) -> bool:
    """By hand, one value."""
    if condition.values:
        return ((value or "").lower() in condition.values) != condition.negate
    if condition.low is None and condition.high is None:
        return bool(value) != condition.negate
    n = number(value)
    inside = n is not None and (condition.low or -9e9) <= n <= (9e9 if condition.high is None else condition.high)
    return inside != condition.negate


@given(tables())
@settings(deadline=None, max_examples=120)
def test_selections_are_a_search_by_hand(drawn):
    table, conditions = drawn
    columns = table.to_pydict()
    expected = [all(meets(columns[c.attribute][i], c) for c in conditions) for i in range(len(table))]
    attributes = Attributes(table)
    for _ in range(2):  # the second time from what is kept
        assert attributes.select(conditions).tolist() == expected
        assert len(attributes.selection(conditions)) == sum(expected)


def test_values_that_are_near_are_found_beside_other_filters():
    """Long titles that resemble each other, which took seconds for one suggestion, with all filters waiting."""
    words = [f"{chr(97 + i % 26)}{i % 89}or{i % 7}" for i in range(500)]
    titles = [" ".join(words[(7 * i + j * j) % 500] for j in range(i % 40)) + f" plate {i}" for i in range(20_000)]
    attributes = Attributes(pa.table({"title": [*titles, "Sunflowers"], "year": ["1888"] * 20_001}))
    assert len(attributes.meeting(Condition("title", ("sunflowers",)))) == 1
    free: list[bool] = []

    def matches(*given: object, **more: object) -> list[str]:
        other = threading.Thread(target=attributes.meeting, args=[Condition("year", ("1888",))], daemon=True)
        other.start()  # another person's filter
        other.join(5)
        free.append(not other.is_alive())
        began = time.perf_counter()
        found = get_close_matches(*given, **more)
        assert time.perf_counter() - began < 0.5
        return found

    with mock.patch.object(filters.difflib, "get_close_matches", matches):
        with pytest.raises(ValueError, match="no item has title 'Sunflowrs': did you mean 'Sunflowers'"):
            attributes.meeting(Condition("title", ("Sunflowrs",)))
        with pytest.raises(ValueError, match=r"no item has title .*: there are "):
            attributes.meeting(Condition("title", (titles[39] * 3,)))
    assert free == [True]


def test_a_rare_value_costs_its_items():
    """A million items: what a rare value selects is a piece of its column's inverted list, and stays one."""
    values = torch.randint(2000, (1_000_000,), generator=torch.Generator().manual_seed(0)).numpy()
    attributes = Attributes(pa.table({"x": values, "y": values % 7}))
    one = attributes.meeting(Condition("x", ("17",)))
    assert one.positions.tolist() == (values == 17).nonzero()[0].tolist()
    assert one.positions.base is attributes.column("x").inverted[0]
    both = attributes.selection([Condition("y", ("3",)), Condition("x", ("17",))])
    assert len(both) == int(((values == 17) & (values % 7 == 3)).sum())
    assert "bitmap" not in both.__dict__ | one.__dict__


def test_selections_are_kept_and_masks_are_copies():
    attributes = Attributes(TABLE)
    condition = Condition("year", (), 1800.0)
    kept = attributes.meeting(condition)
    assert attributes.meeting(condition) is kept
    attributes.select([condition]).fill_(False)
    assert len(attributes.meeting(condition)) == 4
    for year in range(70):
        attributes.meeting(Condition("year", (), float(year)))
    assert attributes.meeting(condition) is not kept
    assert torch.equal(attributes.meeting(condition).mask(), kept.mask())


def test_columns_tell_what_they_hold():
    attributes = Attributes(TABLE)
    assert attributes.names == ["artist", "year", "rating", "empty", "lot", "price"]
    assert attributes.column("year").counted()[0] == ("1900", 2)
    assert {name: attributes.column(name).is_numeric for name in attributes.names} == {
        "artist": False,
        "year": False,  # five of six
        "rating": True,
        "empty": False,
        "lot": False,  # neither "1-2" nor "1_000" is one
        "price": True,
    }
    assert attributes.column("artist").counted()[0] == ("Claude Monet", 2), "two spellings"
    text = Attributes(
        pa.table({"x": ["1", " -2.5 ", "+3e1", ".5", "7.", "1e400", "nan", "0x1F", "１", "1 2", " ", ""]})
    )
    numbers = text.column("x").of_values.tolist()
    assert [number for number in numbers if number == number] == [1, -2.5, 30, 0.5, 7]
    assert attributes.column("empty").counted() == []


def test_chunked_columns_share_their_values():
    table = pa.concat_tables([pa.table({"x": ["a", "b"]}), pa.table({"x": ["b", "c", None]})])
    assert table["x"].num_chunks == 2
    assert select(table, parse_filters("x=b")).tolist() == [False, True, True, False, False]
    assert select(table.slice(0, 0), ()).tolist() == []


@given(st.lists(st.lists(st.sampled_from(["Monet", "monet", "", " ", None, "1850", "ö"]), max_size=5), max_size=6))
@settings(deadline=None)
def test_a_column_in_pieces_is_coded_as_a_whole(pieces):
    """Segments and blocks of a catalog are pieces of one table."""
    table = pa.table({"artist": pa.chunked_array([pa.array(piece, pa.string()) for piece in pieces], pa.string())})
    column = Attributes(table).column("artist")
    texts = [text for piece in pieces for text in piece]
    assert len(column.values) == len(set(column.values)) == len(set(texts) - {None, "", " "})
    assert [None if code < 0 else column.values[code] for code in column.codes.tolist()] == [
        text if text and text.strip() else None for text in texts
    ]
