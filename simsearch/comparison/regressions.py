"""Regressions: the queries that a run ranks worse than the baseline, with the images that both found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simsearch.comparison.leaderboard import Entry
from simsearch.comparison.page import Case, Picture, differences_by_query
from simsearch.comparison.runs import Result
from simsearch.data.collection import Collection
from simsearch.files import read_json
from simsearch.images import encode_thumbnail
from simsearch.search.catalog import read_catalog
from simsearch.search.describe import encode
from simsearch.search.engine import Engine

THUMBNAIL_SIDE = 96


def cases(
    judge: Judge, line: Entry, compared: Iterable[Entry], count: int, k: int, *, trusted: bool = False
) -> dict[str, Sequence[Case] | str]:
    """For each entry its worst regressions with images, or why there are none.

    Neighbours are those that the runs stored, else those that their catalogs find now. Images come from the data.

    Args:
        judge: Relevance in the collection, and its images.
        line: The baseline's entry.
        compared: The entries, each with a paired test.
        count: Number of regressions per entry.
        k: Number of neighbours per query.
        trusted: True if the user trusts whoever made the runs.
    """
    found: dict[str, Sequence[Case] | str] = {}
    for entry in compared:
        worst = worst_queries(entry, line, count)
        try:
            two = [neighbours(e.results[0], judge, worst, k, trusted=trusted) for e in (line, entry)]
        except (ValueError, OSError) as error:
            found[entry.name] = f"no pictures: {error}"
            continue
        found[entry.name] = [judge.case(row, line, entry, *both) for row, *both in zip(worst, *two, strict=True)]
    return found


def worst_queries(entry: Entry, line: Entry, count: int) -> list[int]:
    """Collection rows of the queries whose value falls most against the baseline, largest fall first.

    Args:
        entry: The entry.
        line: The baseline's entry.
        count: Number of queries.
    """
    change = differences_by_query(entry, line).nan_to_num(0.0)
    order = change.argsort(stable=True)[:count]
    return line.queries.index[order[change[order] < 0]].tolist()  # type: ignore[union-attr]


def neighbours(result: Result, judge: Judge, rows: list[int], k: int, *, trusted: bool = False) -> list[list[int]]:
    """Collection rows of the first k neighbours of some queries.

    They were stored by the run, or its catalog finds them.

    Args:
        result: The result of the run.
        judge: Relevance in the collection, and its images.
        rows: Collection rows of the queries.
        k: Number of neighbours per query.
        trusted: True if the user trusts whoever made the run.

    Raises:
        ValueError: If the run has neither.
    """
    if (kept := result.found(rows)) is not None:
        return [line[:k] for line in kept]
    collection = judge.collection
    folder = result.run / "catalog"  # type: ignore[operator]
    if not folder.is_dir():
        raise ValueError(f"{result.name} kept no neighbours of its queries and has no catalog to search")
    catalog = read_catalog(folder, trusted=trusted)
    source = catalog.about.get("source", {})
    if (source.get("data"), source.get("protocol")) != (collection.name, result.protocol):
        raise ValueError(f"the catalog of {result.name} holds {source.get('data')}, {source.get('protocol')}")
    places = {collection.path(row): row for row in range(len(collection))}
    try:
        items = torch.tensor([places[path] for path in catalog.items["path"].to_pylist()])
    except KeyError as error:
        raise ValueError(f"the catalog of {result.name} holds {error}, which is not in the data") from None
    engine = Engine(catalog)
    answers = []
    for row in rows:
        vector = encode(catalog.encoder, collection.images[int(row)][None])
        ids = engine.nearest(vector, k + int(judge.junk(row, items).sum())).ids[0]
        near = items[ids[ids >= 0]]
        answers.append(near[~judge.junk(row, near)][:k].tolist())
    return answers


@dataclass(frozen=True)
class Judge:
    """Relevance in a collection, and its images.

    Attributes:
        collection: The collection.
        label: int64 (N,). Items of one label are relevant to each other.
        group: int64 (N,) or None. Items of one group are junk to each other.
        names: Names of the labels.
        exclude_self: True if a query is junk to itself.
    """

    collection: Collection
    label: Tensor
    group: Tensor | None
    names: Sequence[str]
    exclude_self: bool

    @classmethod
    def of(cls, collection: Collection, line: Entry) -> Judge:
        """The judge of the baseline's test.

        Args:
            collection: The collection.
            line: The baseline's entry.

        Raises:
            ValueError: If the collection has other labels than the test.
        """
        about = read_json(Path(line.results[0].place) / "metrics.json")["test"]
        label = collection.column(about["attribute"])
        queries = line.queries
        assert queries is not None
        if len(label) <= int(queries.index.max()) or not torch.equal(label[queries.index], queries.label):
            raise ValueError("they have changed since the runs")
        group = collection.column(about["junk"]) if about["junk"] else None
        names = collection.classes[collection.attributes.index(about["attribute"])]
        return cls(collection, label, group, names, about["exclude_self"])

    def junk(self, row: int, others: Tensor) -> Tensor:
        """bool (M,), which rows the ranking of a query leaves out.

        Args:
            row: Collection row of the query.
            others: int64 (M,), collection rows.
        """
        itself = (others == row) & self.exclude_self
        if self.group is None or self.group[row] < 0:
            return itself
        return itself | (self.group[others] == self.group[row])

    def picture(self, row: int, query: int | None = None) -> Picture:
        """The thumbnail of a row with the name of its label.

        Args:
            row: Collection row.
            query: Collection row of the query that it is judged for, or None.
        """
        label = int(self.label[row])
        right = None if query is None else label == int(self.label[query]) >= 0
        data = encode_thumbnail(self.collection.images[row], THUMBNAIL_SIDE)
        return Picture(data, self.names[label] if label >= 0 else "unknown", right)

    def case(self, row: int, line: Entry, entry: Entry, before: Sequence[int], after: Sequence[int]) -> Case:
        """A query with what the baseline and the entry found.

        Args:
            row: Collection row of the query.
            line: The baseline's entry.
            entry: The entry.
            before: Collection rows that the baseline found.
            after: Collection rows that the entry found.
        """
        values = []
        for queries in (line.queries, entry.queries):
            assert queries is not None
            values.append(float(queries.value[queries.index == row]))
        found = [[self.picture(other, row) for other in rows] for rows in (before, after)]
        return Case(self.picture(row), values[0], values[1], *found)
