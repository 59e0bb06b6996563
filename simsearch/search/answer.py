"""The result of a search: as a table, as images in a notebook, and as pandas or Arrow data."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from simsearch.search.request import Hit
from simsearch.search.verdicts import NONE, UNCALIBRATED
from simsearch.text import cell, printable

_SIDE = 112  # of a picture in a notebook


@dataclass(frozen=True)
class Answer(Sequence[Hit]):
    """The items found for one query, best first.

    Attributes:
        query: The examples in words. Counter-examples begin with "not: ".
        hits: The items, best first.
        verdict: The best verdict among the items.
        candidates: Number of items that were searched, after filters.
        pictures: Thumbnails (image bytes) of the query's examples, then of the items.
    """

    query: tuple[str, ...]
    hits: tuple[Hit, ...]
    verdict: str
    candidates: int
    pictures: tuple[tuple[bytes, ...], tuple[bytes, ...]] = field(default=((), ()), repr=False)

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, place: Any) -> Any:
        return self.hits[place]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    @property
    def ids(self) -> list[str]:
        """The ids of the items."""
        return [hit.id for hit in self.hits]

    @property
    def scores(self) -> list[float]:
        """The scores of the items."""
        return [hit.score for hit in self.hits]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per item: rank, id, score, verdict, then the attributes."""
        fixed = ("rank", "id", "score", "verdict")
        return [
            {name: getattr(hit, name) for name in fixed} | {n: v for n, v in hit.attributes.items() if n not in fixed}
            for hit in self.hits
        ]

    def to_arrow(self) -> pa.Table:
        """The rows as a pyarrow.Table."""
        return pa.Table.from_pylist(self.rows())

    def to_pandas(self) -> Any:
        """The rows as a pandas.DataFrame. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.rows())

    def __repr__(self) -> str:
        table = Table(title=self._title(cell), title_justify="left")
        names = self._shown()
        for name in names:
            table.add_column(cell(name), justify="right" if name in ("rank", "score") else "left", overflow="fold")
        for row in self.rows():
            table.add_row(*(cell(_text(row[name])) for name in names))
        return _plain(table)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        title = "<br>".join(escape(line) for line in self._title(printable).split("\n"))
        queries = "".join(map(_image, self.pictures[0]))
        names = self._shown()
        head = "".join(f"<th>{escape(printable(name))}</th>" for name in ("", *names))
        body = []
        for place, row in enumerate(self.rows()):
            picture = _image(self.pictures[1][place]) if place < len(self.pictures[1]) else ""
            cells = "".join(f"<td>{escape(printable(_text(row[name])))}</td>" for name in names)
            body.append(f"<tr><td>{picture}</td>{cells}</tr>")
        return f"<p>{title}</p><p>{queries}</p><table><tr>{head}</tr>{''.join(body)}</table>"

    def _title(self, shown: Any) -> str:
        said = (
            "" if self.verdict == UNCALIBRATED else "no similar item, " if self.verdict == NONE else self.verdict + ", "
        )
        return f"{shown(', '.join(self.query))}\n{said}{len(self)} of {self.candidates} items"

    def _shown(self) -> list[str]:
        """The columns that hold a value. `path` is left out if it equals the id."""
        rows = self.rows()
        same = all(row.get("path") == row["id"] for row in rows)
        names = dict.fromkeys(name for row in rows for name in row)
        left_out = {*(("verdict",) if self.verdict == UNCALIBRATED else ()), *(("path",) if same else ())}
        return [n for n in names if n not in left_out and any(row.get(n) not in (None, "") for row in rows)]


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _image(data: bytes) -> str:
    """The bytes of an image file, embedded in HTML. Empty for a format that no catalog stores."""
    kinds = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"RIFF": "webp"}
    kind = next((kind for start, kind in kinds.items() if data.startswith(start)), None)
    if kind is None:
        return ""
    return (
        f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" '
        f'style="max-width: {_SIDE}px; max-height: {_SIDE}px">'
    )


def _plain(table: Table) -> str:
    """A rich table as text, 100 columns wide."""
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(table)
    return out.getvalue().rstrip("\n")
