"""What all measures share: an evaluator takes descriptors and a task, and returns numbers with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from simsearch.data.collection import Collection
from simsearch.functional.codes import pack_codes
from simsearch.functional.ranking import mean_name
from simsearch.functional.sharded import Sharded
from simsearch.functional.significance import mean_interval
from simsearch.types import Descriptors, RetrievalTask

Numbers = dict[str, float]
Intervals = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """The numbers that an evaluator found. The task that it was given names their protocol and the sampling unit.

    Attributes:
        metrics: Name -> value, such as the mean over queries.
        units: int64 (Q,), the sampling unit of each query.
        intervals: Name -> (low, high), 95% over sampling units, for the metrics that have an interval.
        per_query: Name -> float64 (Q,), NaN where a query has no value. The mean of AP is called mAP (`mean_name`).
    """

    metrics: Numbers
    units: Tensor
    intervals: Intervals = field(default_factory=dict)
    per_query: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, per_query: Mapping[str, Tensor], units: Tensor, named: Callable[[str], str] = mean_name) -> Measured:
        """The means of some values of queries, with their intervals.

        Args:
            per_query: Name -> float64 (Q,), NaN where a query has no value.
            units: int64 (Q,), the sampling unit of each query.
            named: The name of the mean of a value.

        Example:
            >>> Measured.of({"AP": torch.tensor([1.0, 0.5, torch.nan])}, torch.arange(3)).metrics
            {'mAP': 0.75}
        """
        metrics, intervals = means(per_query, units, named)
        return cls(metrics, units, intervals, dict(per_query))


class Evaluator(Protocol):
    """A measure of descriptors. It is a class of its own, in a file of its own; a config may name it.

    What it needs beside the descriptors, such as a cutoff or the lists of a benchmark, its constructor takes. One that
    takes `query.whole` or `gallery.whole` has `one_process = True`: several processes then refuse it before they train.
    """

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The numbers of one task. Where several ranks measure, every rank calls, and all get the same numbers.

        `rank` and `measure_ranking` rank descriptors that are spread over ranks. A measure that needs them all in one
        process takes `query.whole` and `gallery.whole`.

        Args:
            query: The queries of the task.
            gallery: The gallery of the task.
            task: The task: its protocol, junk, and sampling units.
        """
        ...


def means(
    per_query: Mapping[str, Tensor], units: Tensor | None, named: Callable[[str], str] = mean_name
) -> tuple[Numbers, Intervals]:
    """The mean of each metric over the queries with a value, and its 95% interval over the units.

    Args:
        per_query: Name -> float64 (Q,), NaN where a query has no value.
        units: int64 (Q,), the sampling unit of each query. With None each query is a unit.
        named: The name of the mean of a value.

    Example:
        >>> means({"P@1": torch.tensor([1.0, 0.0, 1.0, 0.0])}, None)[0]
        {'P@1': 0.5}
    """
    bounds = mean_interval(torch.stack(list(per_query.values()), dim=1), units).tolist()
    metrics = {named(name): float(values.nanmean()) for name, values in per_query.items()}
    return metrics, {named(name): (low, high) for name, (low, high) in zip(per_query, bounds, strict=True)}


def check_ks(ks: Sequence[int]) -> None:
    """Checks the cutoffs of a measure.

    Args:
        ks: Cutoffs k.

    Raises:
        ValueError: If they are not a list of ranks from 1.
    """
    if isinstance(ks, Integral) or not list(ks) or not all(isinstance(k, Integral) and k >= 1 for k in ks):
        raise ValueError(f"ks must be a list of ranks from 1, such as [1, 10], got {ks}")


def query_units(query: Sharded, task: RetrievalTask) -> Tensor:
    """int64 (Q,), the sampling unit of each query under a task.

    Args:
        query: The queries.
        task: The task.
    """
    return query.index if task.units is None else task.units[query.index]


def sides(vectors: Tensor, bits: int | None, collection: Collection, task: RetrievalTask) -> tuple[Sharded, Sharded]:
    """The queries and the gallery of a task, of a collection that is described as a whole.

    Args:
        vectors: float32 (N, D), or real-valued codes (N, bits), of the whole collection.
        bits: Width of the codes, None for float vectors.
        collection: The collection.
        task: The task, which says which attributes are labels and junk groups.
    """

    def some(rows: Tensor) -> Sharded:
        group = None if task.junk is None else collection.column(task.junk)[rows]
        kept = vectors[rows] if bits is None else pack_codes(vectors[rows])
        return Sharded.of(Descriptors(kept, collection.column(task.attribute)[rows], rows, bits=bits, group=group))

    return some(task.query), some(task.gallery)
