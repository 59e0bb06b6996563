"""The names of a catalog's items: ids, which no other item ever gets."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

POSITION = "position:"
OWN_ID = "id"  # the column of ids that a collection brings along
_POSITION = re.compile(rf"{POSITION}(\d{{1,18}})", re.ASCII)
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)


class Names:
    """Maps the items of a catalog to names and back. Several threads may use it at once.

    If the collection has a column `id` with a distinct value for each item, these are the ids. Otherwise the catalog
    has given each item a number, and a name that is written as a number means this id and nothing else. Items are found
    by their `path` too. Names are strings and compared exactly: 7, 007 and 0007 differ. Positions change from version
    to version of a catalog, so a position must be requested explicitly, as `position:12`.

    Args:
        items: A table with one row per item.
        numbers: int64 (N,), the numbers that the catalog gave. None if they are the positions.
        own: Whether the column `id` holds the ids. None looks at its values.
        given: Number of numbers that the catalog has given so far. None if no item was ever removed.
        removed: The column `id` of items that were removed, as far as it is known, or None.
    """

    def __init__(
        self,
        items: pa.Table,
        numbers: np.ndarray | None = None,
        *,
        own: bool | None = None,
        given: int | None = None,
        removed: pa.ChunkedArray | None = None,
    ) -> None:
        self._count, self._numbers, self._known = len(items), numbers, own
        self.given = len(items) if given is None else given
        self._removed, self._items = removed, items

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _columns(self) -> dict[str, _Sorted]:
        return {n: _Sorted(self._items[n]) for n in (OWN_ID, "path") if n in self._items.column_names}

    @cached_property
    def own(self) -> bool:
        """Whether the column `id` holds the ids."""
        if self._known is None:
            return OWN_ID in self._columns and self._columns[OWN_ID].names_each
        return self._known and OWN_ID in self._items.column_names

    @cached_property
    def numbers(self) -> np.ndarray:
        """int64 (N,), the numbers that the catalog gave to the items."""
        return np.arange(self._count) if self._numbers is None else self._numbers

    @cached_property
    def _order(self) -> np.ndarray | None:
        """Positions in the order of the numbers. None if that is their own."""
        return None if bool(np.all(np.diff(self.numbers) > 0)) else np.argsort(self.numbers, kind="stable")

    def of(self, positions: Sequence[int]) -> list[str]:
        """The ids of the items at some positions. `find` maps each id back to its item.

        Args:
            positions: Positions of the items.
        """
        if self.own:
            return [self._columns[OWN_ID].values[position].as_py() for position in positions]
        return [str(number) for number in self.numbers[np.asarray(positions, dtype=np.int64)].tolist()]

    def find(self, name: str) -> int | None:
        """The position of an item. None if there is no such item.

        Args:
            name: The item's id or path, or `position:<number>`.

        Raises:
            ValueError: If several items have this name.
        """
        if not self.own and _NUMBER.fullmatch(name):
            return self._numbered(int(name))
        for column in self._columns.values():
            found = column.find(name)
            if len(found) > 1:
                raise ValueError(f"{len(found)} items have the id {name!r}: give the path of the one that you mean")
            if found:
                return found[0]
        asked = _POSITION.fullmatch(name)
        return int(asked[1]) if asked and int(asked[1]) < self._count else None

    def is_gone(self, name: str) -> bool:
        """Whether an item had this id that is not there any more. Own ids are forgotten when segments are merged.

        Args:
            name: The name.
        """
        if self.own:
            known = self._removed is not None and bool(pc.any(pc.equal(self._removed, name)).as_py())
            return known and self.find(name) is None
        return bool(_NUMBER.fullmatch(name)) and int(name) < self.given and self._numbered(int(name)) is None

    def _numbered(self, number: int) -> int | None:
        place = int(np.searchsorted(self.numbers, number, sorter=self._order))
        if place == self._count:
            return None
        position = place if self._order is None else int(self._order[place])
        return position if int(self.numbers[position]) == number else None


class _Sorted:
    """A column of strings with lookup by binary search."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        text = column.cast(pa.large_string())  # in one piece, however long it is
        self.values = pa.concat_arrays(text.chunks) if text.num_chunks else pa.array([], pa.large_string())

    @cached_property
    def order(self) -> pa.Array:
        """Positions of the known strings, sorted by the strings."""
        return pc.sort_indices(self.values)[: len(self.values) - self.values.null_count]

    @cached_property
    def names_each(self) -> bool:
        """Whether each item has a string, and all are distinct."""
        known = pc.all(pc.fill_null(pc.not_equal(self.values, ""), False), min_count=0).as_py()
        return bool(known) and pc.count_distinct(self.values).as_py() == len(self.values)

    def find(self, text: str) -> list[int]:
        """Positions of all items with this string."""

        def nth(n: int) -> str:
            return self.values[self.order[n].as_py()].as_py()

        everywhere = range(len(self.order))
        first, last = (bisect(everywhere, text, key=nth) for bisect in (bisect_left, bisect_right))
        return [self.order[n].as_py() for n in range(first, last)]
