"""The names of a catalog's items. A name stays valid if the catalog is rebuilt."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

POSITION = "position:"
_POSITION = re.compile(rf"{POSITION}(\d{{1,18}})", re.ASCII)


class Names:
    """Maps the items of a catalog to names and back. Several threads may use it at once.

    An item's name is its `id` if the catalog has a column `id` with a distinct value for each item, else its `path`.
    Names are strings and compared exactly: 7, 007 and 0007 differ. If a catalog is rebuilt, names stay and positions
    change, so a position must be requested explicitly, as `position:12`.

    Args:
        items: A table with one row per item.
    """

    def __init__(self, items: pa.Table) -> None:
        self._count = len(items)
        self._columns = [_Sorted(items[name]) for name in ("id", "path") if name in items.column_names]

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _naming(self) -> _Sorted | None:
        return next((column for column in self._columns if column.names_each), None)

    def of(self, positions: Sequence[int]) -> list[str]:
        """The names of the items at some positions. `find` maps each name back to its item.

        Args:
            positions: Positions of the items.
        """
        if self._naming is None:
            return [f"{POSITION}{position}" for position in positions]
        return [self._naming.values[position].as_py() for position in positions]

    def find(self, name: str) -> int | None:
        """The position of an item. None if there is no such item.

        Args:
            name: The item's id or path, or `position:<number>`.

        Raises:
            ValueError: If several items have this id.
        """
        for column in sorted(self._columns, key=lambda column: column is not self._naming):
            found = column.find(name)
            if len(found) > 1:
                raise ValueError(f"{len(found)} items have the id {name!r}: give the path of the one that you mean")
            if found:
                return found[0]
        asked = _POSITION.fullmatch(name)
        return int(asked[1]) if asked and int(asked[1]) < self._count else None


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
