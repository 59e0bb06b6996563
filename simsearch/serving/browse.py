"""Browses the items of a catalog: filters, word search, orders, and counts by value."""

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
from simsearch.search.items import rows_at
from simsearch.text import folded

_WORDS = ("title", "artist", "label", "name")  # columns that a search by words looks into, where there are any
_TECHNICAL = ("path", "sha1", "sha256", "width", "height")
_FEW = 8  # one of so many items or fewer are looked at alone
_BLOCK = 2**16  # values that are strings of Python at once
_ORDERS = 16  # that are remembered, for the next pages of a list


@dataclass(frozen=True)
class Attribute:
    """Facts about an attribute.

    Attributes:
        name: Name of the attribute.
        kind: "text" or "number".
        distinct: Number of distinct values.
        low: Smallest number. None for text.
        high: Largest number. None for text.
    """

    name: str
    kind: str
    distinct: int
    low: float | None = None
    high: float | None = None


class Listing:
    """Pages of a catalog's items. Several threads may use it at once.

    Arrow and numpy do the work that spans all items.

    Args:
        attributes: The attribute columns of the items.
    """

    def __init__(self, attributes: Attributes) -> None:
        self.items, self.filters = attributes.items, attributes
        self.attributes = [self._about(name) for name in self.items.column_names if name not in _TECHNICAL]
        words = [n for n in _WORDS if n in self.items.column_names] or [
            n for n in ("path",) if n in self.items.column_names
        ]
        self._words = pc.binary_join_element_wise(*map(self._plain, words), "\n") if words else None
        self._lock = threading.Lock()
        self._values: dict[str, tuple[list[Any], list[int], pa.Array]] = {}
        self._orders: OrderedDict[tuple[str, tuple[Condition, ...], int | None], np.ndarray] = OrderedDict()

    def values(self, attribute: str, prefix: str, limit: int) -> list[dict[str, Any]]:
        """The values of an attribute in their usual spelling with their counts, most frequent first.

        Args:
            attribute: Name of the attribute.
            prefix: Start of any word in a value. Case and accents do not matter.
            limit: Largest number of values.

        Raises:
            KeyError: If there is no such attribute.
        """
        values, counts, plain = self._counted(attribute)
        if prefix:
            start = folded(prefix)
            inside = pc.or_(pc.starts_with(plain, start), pc.match_substring(plain, f" {start}"))
            chosen = np.flatnonzero(inside.to_numpy(zero_copy_only=False))[:limit].tolist()
        else:
            chosen = range(min(limit, len(values)))
        return [{"value": values[i], "count": counts[i]} for i in chosen]

    def page(
        self, *, text: str, where: tuple[Condition, ...], seed: int | None, offset: int, limit: int
    ) -> tuple[int, list[int]]:
        """The number of matching items, and the positions of those on one page.

        Args:
            text: Words that must all occur in the item.
            where: Conditions that must all hold.
            seed: Seed of a random order; the same seed gives the same order. None keeps the catalog's order.
            offset: Number of matching items before the page.
            limit: Largest number of items on the page.

        Raises:
            ValueError: If a condition does not fit the catalog.
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
        """The attributes of items. Unknown values are left out.

        Args:
            positions: Positions of the items.
        """
        rows = rows_at(self.items, positions)
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def _order(self, text: str, where: tuple[Condition, ...], seed: int | None) -> np.ndarray:
        order = self.filters.selection(where).positions if where else np.arange(len(self.items), dtype=np.int32)
        for word in sorted(folded(text).split(), key=len, reverse=True):  # long words are rare: the others look at less
            if self._words is None:
                order = order[:0]
            elif _FEW * len(order) > len(self.items):
                order = order[pc.match_substring(self._words, word).to_numpy(zero_copy_only=False)[order]]
            else:
                words = self._words.take(pa.array(order))
                order = order[pc.match_substring(words, word).to_numpy(zero_copy_only=False)]
        order = order.astype(np.int32, copy=False)
        return order if seed is None else np.random.default_rng(abs(seed)).permutation(order)

    def _counted(self, attribute: str) -> tuple[list[Any], list[int], pa.Array]:
        if attribute not in self._values:
            if attribute not in {a.name for a in self.attributes}:
                raise KeyError(attribute)
            counted, own = self.filters.column(attribute).counted(), self.items[attribute].type
            texts = pa.array([value for value, _ in counted], pa.string())
            values = (texts.cast(own) if pa.types.is_primitive(own) else texts).to_pylist()
            order = sorted(range(len(values)), key=lambda i: (-counted[i][1], values[i]))
            plain = pa.array([folded(counted[i][0]) for i in order], pa.string())
            self._values[attribute] = [values[i] for i in order], [counted[i][1] for i in order], plain
        return self._values[attribute]

    def _plain(self, name: str) -> pa.Array:
        """The items' values of an attribute as `folded` text, empty if unknown."""
        column = self.filters.column(name)
        blocks = [column.distinct.slice(start, _BLOCK) for start in range(0, len(column.distinct), _BLOCK)]
        chunks = [pa.array(map(folded, block.to_pylist()), pa.string()) for block in blocks]
        plain = pa.concat_arrays([*chunks, pa.array([""], pa.string())])
        return plain.take(pa.array(np.where(column.codes < 0, len(plain) - 1, column.codes)))

    def _about(self, name: str) -> Attribute:
        column = self.filters.column(name)
        distinct = len(column.counts)
        if not column.is_numeric:
            return Attribute(name, "text", distinct)
        low, high = float(np.nanmin(column.of_values)), float(np.nanmax(column.of_values))
        return Attribute(name, "number", distinct, low, high)


def whole(value: object) -> int | None:
    """The positive integer that a cell holds as a number or as text, else None.

    Args:
        value: The cell.
    """
    try:
        number = float(str(value))
    except ValueError:
        return None
    return int(number) if math.isfinite(number) and number >= 1 else None
