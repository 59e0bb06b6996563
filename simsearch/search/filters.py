"""Filters on the attributes of a catalog's items, from text to a selection.

    artist=Claude Monet|Alfred Sisley; style!=Cubism; year=1850..1900; museum=*

Conditions are joined by `;`, and all must hold. `|` separates alternative values. Values match regardless of case,
accents, spaces and hyphens (`simsearch.text.spelling_key`). `!=` negates a condition. `low..high` is a range of
numbers; either end may be left out. `*` is any known value and `""` an unknown value. Double quotes are needed around a
name or value that contains one of `;|="` (for a name also `!`), looks like a range or `*`, or has spaces at an end. A
quote inside quotes is doubled: `title="Who; ""me""?"`.

The text form is for people. Programs, such as the web page, send the fields of `Condition` as data.
"""

from __future__ import annotations

import difflib
import math
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from simsearch.index.selection import Selection
from simsearch.text import spelling_key, spellings

_CACHED = 64  # selections kept, a bit an item each at most
_UNKNOWN = -1  # the code of an unknown value
# For a suggestion, a value is compared with so many others, none of more letters than these: all of a long column would
# take seconds.
_COMPARED = 500
_LETTERS = 60
_SCANNED = 100_000  # values whose beginning is looked at
_NUMERIC_SHARE = 0.9
_TOKEN = re.compile(r'"(?:[^"]|"")*"|!=|[;|=]|[^;|="!]+|!|"')
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_RANGE = re.compile(rf"({_NUMBER})?\s*\.\.\s*({_NUMBER})?")


@dataclass(frozen=True)
class Condition:
    """One condition: the attribute has one of `values`, or lies in low..high; without both it is any known value.

    str() returns the text that `parse_filters` reads.

    Attributes:
        attribute: Name of the attribute.
        values: Alternative values. An empty string stands for an unknown value.
        low: Smallest number, inclusive. None leaves the range open.
        high: Largest number, inclusive. None leaves the range open.
        negate: Select all items that do not meet the condition. This includes items whose value is unknown.

    Raises:
        ValueError: If values are given together with a range, or if the range is empty or has an end that is not
            finite.
    """

    attribute: str
    values: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    negate: bool = False

    def __post_init__(self) -> None:
        if self.values and (self.low is not None or self.high is not None):
            raise ValueError(f"the filter on {self.attribute} has both values and a range: write two conditions")
        if not all(math.isfinite(end) for end in (self.low, self.high) if end is not None):
            raise ValueError(
                f"the filter on {self.attribute} has a range whose end is not a finite number: leave that end out"
            )
        if self.low is not None and self.high is not None and not self.low <= self.high:
            raise ValueError(
                f"the filter {self} excludes everything, since its lower end is above its upper end: swap them"
            )

    def __str__(self) -> str:
        if self.values:
            right = "|".join(_quoted(value, value == "*" or bool(_RANGE.fullmatch(value))) for value in self.values)
        elif self.low is None and self.high is None:
            right = "*"
        else:
            right = "..".join("" if end is None else _number(end) for end in (self.low, self.high))
        return f"{_quoted(self.attribute, '!' in self.attribute)}{'!=' if self.negate else '='}{right}"


def parse_filters(text: str | None) -> tuple[Condition, ...]:
    """The conditions in a text. The grammar is in the docstring of the module.

    Args:
        text: The text. None and an empty text contain no condition.

    Raises:
        ValueError: If the text does not follow the grammar. The error names the condition.
    """
    conditions, tokens = [], _TOKEN.findall(text or "")
    while tokens:
        end = tokens.index(";") if ";" in tokens else len(tokens)
        if any(token.strip() for token in tokens[:end]):
            conditions.append(_condition(tokens[:end]))
        tokens = tokens[end + 1 :]
    return tuple(conditions)


def select(items: pa.Table, conditions: Sequence[Condition]) -> Tensor:
    """bool (N,), which rows of `items` meet all conditions.

    Args:
        items: A table with one row per item.
        conditions: The conditions.

    Raises:
        ValueError: As `Attributes.select` does.
    """
    return Attributes(items).select(conditions)


class Filtered(Selection):
    """The items that meet conditions, without some. It keeps the conditions, which other engines are told of.

    Args:
        selection: All chosen items.
        where: The conditions.
        left_out: int64 (n,), ascending, positions of items that are not chosen whatever they meet.
    """

    def __init__(
        self, selection: Selection, where: Sequence[Condition] = (), left_out: np.ndarray | None = None
    ) -> None:
        self.__dict__.update(selection.__dict__)  # its positions or its bitmap, whichever it holds
        self.where = tuple(where)
        self.left_out = np.empty(0, dtype=np.int64) if left_out is None else left_out

    def without(self, positions: np.ndarray) -> Filtered:
        """The selection without some items.

        Args:
            positions: int64 (n,), ascending, each once.
        """
        return Filtered(super().without(positions), self.where, np.union1d(self.left_out, positions))


class Attributes:
    """The attribute columns of a catalog's items, prepared for filters. Several threads may use it at once.

    The first access to a column converts it to one integer code per item, and its first filter to the inverted lists of
    its values, 4 bytes an item. A filter then costs what it selects. The selections of recent conditions are kept.
    Empty text and NaN are unknown values.

    Args:
        items: A table with one row per item.
    """

    def __init__(self, items: pa.Table) -> None:
        self.items = items
        self._columns: dict[str, _Column] = {}
        self._selections: OrderedDict[Condition, Selection] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """The names of the attributes, in the order of the table."""
        return list(self.items.column_names)

    def column(self, name: str) -> _Column:
        """The attribute with the given name.

        Args:
            name: Name of the attribute.

        Raises:
            ValueError: If there is no such attribute. The error lists the existing ones.
        """
        if name not in self.names:
            close = difflib.get_close_matches(name, self.names, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"no attribute {name!r} in this catalog: {hint}there are {', '.join(self.names)}")
        with self._lock:
            if name not in self._columns:
                self._columns[name] = _Column(self.items[name])
            return self._columns[name]

    def meeting(self, condition: Condition) -> Selection:
        """The items that meet a condition.

        Args:
            condition: The condition.

        Raises:
            ValueError: As `selection` does.
        """
        codes = self._codes(condition)  # before the lock: to say which values are near to an unknown one takes time
        with self._lock:
            if condition not in self._selections:
                self._selections[condition] = self._meeting(condition, codes)
                while len(self._selections) > _CACHED:
                    self._selections.popitem(last=False)
            self._selections.move_to_end(condition)
            return self._selections[condition]

    def selection(self, conditions: Sequence[Condition]) -> Selection:
        """The items that meet all conditions.

        Args:
            conditions: The conditions.

        Raises:
            ValueError: If an attribute or a value is unknown (the error suggests similar values), or if a range is
                given for an attribute without numbers.
        """
        if not conditions:
            return Selection.everything(len(self.items))
        first, *others = sorted(map(self.meeting, conditions), key=len)
        return reduce(Selection.__and__, others, first)

    def select(self, conditions: Sequence[Condition]) -> Tensor:
        """bool (N,), which items meet all conditions.

        Args:
            conditions: The conditions.

        Raises:
            ValueError: As `selection` does.
        """
        return self.selection(conditions).mask()

    def spelled(self, condition: Condition) -> Condition:
        """A condition whose values are all spellings that the items have, for engines that compare text exactly.

        Args:
            condition: The condition.

        Raises:
            ValueError: As `selection` does.
        """
        values = self.column(condition.attribute).values
        codes = self._codes(condition)
        return replace(condition, values=tuple("" if code == _UNKNOWN else values[code] for code in codes))

    def _meeting(self, condition: Condition, codes: Sequence[int]) -> Selection:
        column = self.column(condition.attribute)
        if condition.low is None and condition.high is None:
            if not condition.values:
                unknown = column.having([_UNKNOWN])
                return unknown if condition.negate else ~unknown
            found = column.having(codes)
        else:
            numbers, in_order = column.ascending
            if not len(numbers):
                raise ValueError(
                    f"{condition.attribute} does not hold numbers, so that it cannot have a range: name values"
                )
            low = -math.inf if condition.low is None else condition.low
            high = math.inf if condition.high is None else condition.high
            found = column.having(in_order[np.searchsorted(numbers, low) : np.searchsorted(numbers, high, "right")])
        return ~found if condition.negate else found

    def _codes(self, condition: Condition) -> list[int]:
        """The codes of all spellings of a condition's values. Raises ValueError if no item has one of the values."""
        column, codes = self.column(condition.attribute), list[int]()
        for value in condition.values:
            if not value.strip():
                codes.append(_UNKNOWN)
                continue
            key = spelling_key(value)
            with self._lock:
                spelled = column.by_key.get(key)
            if spelled is None:
                near, examples = column.near(key), ", ".join(map(repr, column.frequent[:3]))
                hint = f"there are {examples}, ..." if examples else "it has no values"
                if near:
                    hint = f"did you mean {' or '.join(map(repr, near))}?"
                raise ValueError(f"no item has {condition.attribute} {value!r}: {hint}")
            codes += spelled
        return codes


class _Column:
    """One attribute. codes: int32 (N,), the index of each item's value in `distinct`, -1 if unknown."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        text = column if pa.types.is_string(column.type) else column.cast(pa.string())
        text = pc.if_else(pc.equal(pc.utf8_trim_whitespace(text), ""), None, text)
        # Arrow gives all pieces the one dictionary of the whole. To unify them all the same takes pieces x values.
        pieces = pa.chunked_array(text.dictionary_encode()).chunks or [pa.array([], pa.string()).dictionary_encode()]
        self.distinct: pa.Array = pieces[-1].dictionary
        self.codes: np.ndarray = np.concatenate(
            [piece.indices.fill_null(_UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int32) for piece in pieces]
        )

    @cached_property
    def values(self) -> list[str]:
        """The distinct known values, as text. Many titles are many strings: `distinct` holds them in an array."""
        return self.distinct.to_pylist()

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 (V,), the number of items with each value."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.distinct))

    @cached_property
    def by_key(self) -> dict[str, list[int]]:
        """For each spelling key, the places in `values` of all its spellings."""
        places: dict[str, list[int]] = {}
        for code, value in enumerate(self.values):
            places.setdefault(spelling_key(value), []).append(code)
        return places

    @cached_property
    def frequent(self) -> list[str]:
        """The most frequent values, a few hundred at most."""
        return [self.values[code] for code in np.argsort(-self.counts, kind="stable")[:_COMPARED]]

    def near(self, key: str) -> list[str]:
        """Up to three values whose spelling is near to a key: of the most frequent ones, and those that begin alike.

        Args:
            key: A spelling key.
        """
        if len(key) > _LETTERS:
            return []
        alike = (other for other in islice(self.by_key, _SCANNED) if other.startswith(key[:3]))
        keys = dict.fromkeys([*map(spelling_key, self.frequent), *islice(alike, _COMPARED)])
        close = difflib.get_close_matches(key, [other for other in keys if len(other) <= _LETTERS], 3, cutoff=0.5)
        return [self.values[self.by_key[other][0]] for other in close]

    @cached_property
    def of_values(self) -> np.ndarray:
        """float64 (V,), the distinct values as finite numbers. NaN if a value is not a number."""
        text = pc.utf8_trim_whitespace(self.distinct)
        like = pc.match_substring_regex(text, f"^{_NUMBER}$")
        numbers = pc.if_else(like, text, None).cast(pa.float64()).to_numpy(zero_copy_only=False)
        return np.where(np.isfinite(numbers), numbers, np.nan)

    @cached_property
    def ascending(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 (n,) and int64 (n,), the distinct values that are numbers, ascending, and their codes."""
        codes = np.flatnonzero(np.isfinite(self.of_values))
        codes = codes[np.argsort(self.of_values[codes], kind="stable")]
        return self.of_values[codes], codes

    @cached_property
    def inverted(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 (N,) and int64 (V + 2,): positions and starts.

        The items with code c are positions[starts[c + 1] : starts[c + 2]], ascending.
        """
        codes = self.codes + np.int64(1)
        starts = np.cumsum(np.bincount(codes, minlength=len(self.distinct) + 1))
        keys = codes * len(codes) + np.arange(len(codes))
        keys.sort()  # several times as fast as a stable argsort
        return (keys % max(1, len(codes))).astype(np.int32), np.append(0, starts)

    def having(self, codes: Sequence[int] | np.ndarray) -> Selection:
        """The items with one of some codes.

        Args:
            codes: Codes, -1 for an unknown value.
        """
        positions, starts = self.inverted
        chosen = np.unique(np.asarray(codes, dtype=np.int64)) + 1
        count = int((starts[chosen + 1] - starts[chosen]).sum())
        if len(chosen) == 1:
            return Selection(len(positions), positions[starts[chosen[0]] : starts[chosen[0] + 1]])
        if count * 8 > len(positions):
            wanted = np.zeros(len(starts), bool)
            wanted[chosen] = True
            return Selection.of(wanted[self.codes + 1])
        lists = [positions[starts[code] : starts[code + 1]] for code in chosen]
        return Selection(len(positions), np.sort(np.concatenate([positions[:0], *lists])))

    @property
    def is_numeric(self) -> bool:
        """Whether at least 90% of the known values are numbers."""
        known = int(self.counts.sum())
        return known > 0 and self.counts[np.isfinite(self.of_values)].sum() >= _NUMERIC_SHARE * known

    def counted(self) -> list[tuple[str, int]]:
        """Each distinct value in its usual spelling with its number of items, most frequent first."""
        chosen = spellings(dict(zip(self.values, self.counts.tolist(), strict=True)))
        counts = Counter[str]()
        for value, count in zip(self.values, self.counts.tolist(), strict=True):
            counts[chosen[value]] += count
        return counts.most_common()


def _condition(tokens: list[str]) -> Condition:
    text = "".join(tokens).strip()
    sign = next((i for i, token in enumerate(tokens) if token in ("=", "!=")), None)
    if sign is None:
        raise ValueError(f"the filter {text!r} has no =: write attribute=value, as in artist=Claude Monet")
    name, _ = _text(tokens[:sign], text)
    if not name:
        raise ValueError(f"the filter {text!r} names no attribute: write attribute=value")
    right, negate = tokens[sign + 1 :], tokens[sign] == "!="
    alternatives: list[list[str]] = [[]]
    for token in right:
        if token == "|":
            alternatives.append([])
        else:
            alternatives[-1].append(token)
    values = [_text(part, text) for part in alternatives]
    if any(not value and not quoted for value, quoted in values):
        raise ValueError(f"the filter {text!r} has no value: write attribute=value, or attribute=* for any known value")
    if len(values) == 1 and not values[0][1]:
        if values[0][0] == "*":
            return Condition(name, negate=negate)
        if (ends := _RANGE.fullmatch(values[0][0])) and any(ends.groups()):
            low, high = (None if end is None else float(end) for end in ends.groups())
            return Condition(name, (), low, high, negate)
    for value, quoted in values:
        if not quoted and (value == "*" or ((ends := _RANGE.fullmatch(value)) and any(ends.groups()))):
            raise ValueError(
                f"in the filter {text!r} {value} cannot be combined with other values: write two conditions"
            )
    return Condition(name, tuple(value for value, _ in values), negate=negate)


def _text(tokens: list[str], condition: str) -> tuple[str, bool]:
    """The content of a name or value, and whether it was quoted."""
    if "=" in tokens or "!=" in tokens:
        raise ValueError(f"the filter {condition!r} has two =: quote a value that holds = with double quotes")
    if not any(token[0] == '"' for token in tokens):
        return "".join(tokens).strip(), False
    around = [token for token in tokens if token.strip()]
    if len(around) > 1 or around[0] == '"':
        raise ValueError(f"the quotes in the filter {condition!r} do not enclose a whole value")
    return around[0][1:-1].replace('""', '"'), True


def _quoted(text: str, must: bool) -> str:
    if must or not text or text != text.strip() or any(sign in text for sign in ';|="') or "!=" in text:
        return '"' + text.replace('"', '""') + '"'
    return text


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
