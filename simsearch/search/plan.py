"""What a change of a catalog has to do: which images to describe, which items to edit and which to remove."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from simsearch.search.catalog import Catalog
from simsearch.search.names import OWN_ID


@dataclass
class Plan:
    """What to do with the rows of a table of images and the items of a catalog.

    Attributes:
        columns: The columns that the items will have.
        position: The position of each row's item, None if there is none.
        contents: The digest of each row's file.
        describe: Rows that are described.
        edits: Rows whose item gets another path or other attributes, by position.
        gone: Positions of the items that are removed.
        partial: Whether the table may lack attributes, which stay.
    """

    columns: list[str]
    position: list[int | None]
    contents: list[str | None]
    describe: list[int] = field(default_factory=list)
    edits: dict[int, int] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    partial: bool = False

    @classmethod
    def of(cls, catalog: Catalog, table: pa.Table, contents: list[str | None], *, remove: bool) -> Plan:
        """The plan for a catalog and a table of images.

        Args:
            catalog: The catalog.
            table: `path` and the attributes of the images, as text.
            contents: The digest of each row's file, None if it cannot be read.
            remove: The table lists the whole collection: other items are removed.
        """
        before = list(catalog.about["columns"])
        added = [name for name in table.column_names if name not in before]
        columns = list(table.column_names) if remove else [*before, *added]
        at = {path: position for position, path in enumerate(catalog.items["path"].to_pylist())}
        assert catalog.contents is not None
        known = catalog.contents.to_pylist()
        paths = table["path"].to_pylist()
        plan = cls(columns, [at.get(path) for path in paths], contents, partial=not remove)
        if remove:
            listed = {position for position in plan.position if position is not None}
            plan.gone = [position for position in range(len(catalog)) if position not in listed]
            moved = {known[position]: position for position in reversed(plan.gone) if known[position] is not None}
            for row, position in enumerate(plan.position):
                if position is None and (found := moved.pop(contents[row], None)) is not None:
                    plan.position[row] = found
                    plan.edits[found] = row
            plan.gone = [position for position in plan.gone if position not in plan.edits]
        names = [*table.column_names, *(name for name in before if remove and name not in table.column_names)]
        nothing = [None] * max(len(catalog), len(table))
        was = {name: texts(catalog.items[name]) if name in before else nothing for name in names}
        now = {name: table[name].to_pylist() if name in table.column_names else nothing for name in names}
        for row, position in enumerate(plan.position):
            if position is None or contents[row] is None or contents[row] != known[position]:
                plan.describe.append(row)
            elif any(was[name][position] != now[name][row] for name in names):
                plan.edits[position] = row
        return plan

    def ids(self, rows: Sequence[int], numbers: np.ndarray, next_id: int) -> list[int]:
        """The ids of described rows: those of their items, or new ones.

        Args:
            rows: The rows.
            numbers: int64 (N,), the ids of the catalog's items.
            next_id: The first new one.
        """
        ids = []
        for row in rows:
            position = self.position[row]
            ids.append(next_id if position is None else int(numbers[position]))
            next_id += position is None
        return ids

    def attributes(
        self, catalog: Catalog, table: pa.Table, rows: Sequence[int], positions: Sequence[int | None]
    ) -> pa.Table:
        """The columns of the items that rows of a table become.

        Args:
            catalog: The catalog.
            table: The table of the images.
            rows: The rows.
            positions: Positions of their items so far, None if new.
        """

        def values(name: str) -> list[str | None]:
            if name in table.column_names:
                return table[name].take(pa.array(rows, pa.int64())).to_pylist()
            if not self.partial or name not in catalog.items.column_names:
                return [None] * len(rows)
            known = [position for position in positions if position is not None]
            old = iter(texts(catalog.items[name].take(pa.array(known, pa.int64()))))
            return [None if position is None else next(old) for position in positions]

        return pa.table({name: pa.array(values(name), pa.string()) for name in self.columns})


def texts(column: pa.ChunkedArray) -> list[str | None]:
    """The values of a column as text.

    Args:
        column: The column.
    """
    return column.cast(pa.string()).to_pylist()


def check_own_ids(catalog: Catalog, tables: Sequence[pa.Table], replaced: Sequence[int]) -> None:
    """Checks that a column `id` that holds the ids of a catalog will do so after a change.

    Args:
        catalog: The catalog.
        tables: The items that are added.
        replaced: Positions of the items that go.

    Raises:
        ValueError: If an item would have no id, or two the same.
    """
    if not catalog.names.own:
        return
    left = np.ones(len(catalog), dtype=bool)
    left[list(replaced)] = False
    seen = set(texts(catalog.items[OWN_ID].filter(pa.array(left))))
    for table in tables:
        for one in table[OWN_ID].to_pylist() if OWN_ID in table.column_names else [None]:
            if not one:
                raise ValueError(f"an image has no id, but all items of {catalog.folder} have: fill the column id")
            if one in seen:
                raise ValueError(f"two images have the id {one!r}, but ids of {catalog.folder} are distinct")
            seen.add(one)
