"""The items of a catalog to browse: filtered, searched by words, in an order, counted by value."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsearch.search.filters import Attributes, Condition

_WORDS = ("title", "artist", "label", "name")  # columns that a search by words looks into, where there are any
_TECHNICAL = ("path", "sha1", "sha256", "width", "height")
_NUMBER = r"^\s*-?\d+(\.\d+)?\s*$"
_NUMBERS = 0.9  # of a column's values make it one of numbers
_ORDERS = 16  # that are remembered, for the next pages of a list


@dataclass(frozen=True)
class Attribute:
    """What is known of an attribute: kind "text" or "number", distinct values, and the range of a number."""

    name: str
    kind: str
    distinct: int
    low: float | None = None
    high: float | None = None


class Listing:
    """Pages of a catalog's items; any number of threads may ask. All work on all items is Arrow's or numpy's."""

    def __init__(self, attributes: Attributes) -> None:
        self.items, self.filters = attributes.items.combine_chunks(), attributes
        self.attributes = [_attribute(n, self.items[n]) for n in self.items.column_names if n not in _TECHNICAL]
        words = [n for n in _WORDS if n in self.items.column_names] or [
            n for n in ("path",) if n in self.items.column_names
        ]
        self._words = _joined([folded(self.items[name]) for name in words])
        self._lock = threading.Lock()
        self._values: dict[str, tuple[list[Any], list[int], pa.Array]] = {}
        self._orders: OrderedDict[tuple[str, tuple[Condition, ...], int | None], np.ndarray] = OrderedDict()

    def values(self, attribute: str, prefix: str, limit: int) -> list[dict[str, Any]]:
        """The values of an attribute with their counts, the most frequent first.

        prefix: of any word in a value, case and accents apart. Raises KeyError for an attribute that there isn't.
        """
        values, counts, plain = self._counted(attribute)
        if prefix:
            start = folded(pa.array([prefix]))[0].as_py()
            inside = pc.or_(pc.starts_with(plain, start), pc.match_substring(plain, f" {start}"))
            chosen = np.flatnonzero(inside.to_numpy(zero_copy_only=False))[:limit].tolist()
        else:
            chosen = range(min(limit, len(values)))
        return [{"value": values[i], "count": counts[i]} for i in chosen]

    def page(
        self, *, text: str, where: tuple[Condition, ...], seed: int | None, offset: int, limit: int
    ) -> tuple[int, list[int]]:
        """How many items there are with all words of `text` that meet the conditions, and the positions of one page.

        seed: of a random order, the same for the same seed; None for the catalog's own. Raises ValueError for
        conditions that have no meaning here.
        """
        key = (text, where, seed)
        with self._lock:
            order = self._orders.pop(key, None)
        if order is None:
            order = self._order(text, where, seed)
        with self._lock:
            self._orders[key] = order
            while len(self._orders) > _ORDERS:
                self._orders.popitem(last=False)
        return len(order), order[offset : offset + limit].tolist()

    def rows(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The attributes of items; unknown ones are left out."""
        taken = self.items.take(pa.array(positions, pa.int64())).to_pylist()
        return [{name: value for name, value in row.items() if value is not None} for row in taken]

    def _order(self, text: str, where: tuple[Condition, ...], seed: int | None) -> np.ndarray:
        chosen = np.ones(len(self.items), dtype=bool)
        if where:
            chosen &= self.filters.select(where).numpy()
        for word in folded(pa.array([text]))[0].as_py().split():
            if self._words is None:
                chosen[:] = False
            else:
                chosen &= pc.match_substring(self._words, word).to_numpy(zero_copy_only=False)
        order = np.flatnonzero(chosen).astype(np.int32)
        return order if seed is None else np.random.default_rng(abs(seed)).permutation(order)

    def _counted(self, attribute: str) -> tuple[list[Any], list[int], pa.Array]:
        if attribute not in self._values:
            if attribute not in {a.name for a in self.attributes}:
                raise KeyError(attribute)
            counted = pc.value_counts(pc.drop_null(self.items[attribute].combine_chunks()))
            values, counts = counted.field("values"), counted.field("counts")
            order = pc.sort_indices(
                pa.table({"v": values, "c": counts}), sort_keys=[("c", "descending"), ("v", "ascending")]
            )
            values = values.take(order)
            self._values[attribute] = values.to_pylist(), counts.take(order).to_pylist(), folded(values)
        return self._values[attribute]


def folded(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Values as lower-case text without accents, empty where unknown."""
    text = pc.fill_null(pc.cast(values, pa.string()), "")
    return pc.utf8_lower(pc.replace_substring_regex(pc.utf8_normalize(text, "NFKD"), r"\p{Mn}", ""))


def _joined(columns: list[Any]) -> Any:
    return pc.binary_join_element_wise(*columns, "\n") if columns else None


def _attribute(name: str, column: pa.ChunkedArray) -> Attribute:
    known = pc.drop_null(column)
    distinct = pc.count_distinct(known).as_py()
    numbers = _numbers(known)
    if numbers is None:
        return Attribute(name, "text", distinct)
    bounds = pc.min_max(numbers).as_py()
    return Attribute(name, "number", distinct, bounds["min"], bounds["max"])


def _numbers(known: pa.ChunkedArray) -> Any:
    """The values of a column as finite numbers, None where it is one of text."""
    if len(known) == 0 or pa.types.is_boolean(known.type):
        return None
    if pa.types.is_integer(known.type) or pa.types.is_floating(known.type):
        values = pc.cast(known, pa.float64())
        finite = values.filter(pc.is_finite(values))
        return finite if len(finite) else None
    if not (pa.types.is_string(known.type) or pa.types.is_large_string(known.type)):
        return None
    like = pc.match_substring_regex(known, _NUMBER)
    if pc.sum(like).as_py() < _NUMBERS * len(known):
        return None
    return pc.cast(pc.utf8_trim_whitespace(known.filter(like)), pa.float64())


def whole(value: object) -> int | None:
    """A positive whole number that a cell holds as number or text, else None."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return int(number) if math.isfinite(number) and number >= 1 else None
