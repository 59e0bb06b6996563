"""Anybody's embeddings measured: exact metrics of the full ranking, with intervals, as a report."""

from __future__ import annotations

import io
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from simsearch.evaluation.evaluator import means
from simsearch.functional.codes import pack_codes
from simsearch.functional.ranking import measure_ranking
from simsearch.types import Descriptors, check_vectors


@dataclass(frozen=True)
class Report:
    """What was measured of some embeddings.

    Attributes:
        metrics: Mean of each metric over the queries that have a relevant item: mAP, P@k, R@k, NDCG@k, ...
        intervals: The 95% interval of each mean over the units.
        per_query: The values of each query, float64 (Q,), NaN for one without a relevant item, and `relevant`, how
            many items are.
        queries: How many queries there are.
        gallery: How many items the gallery has.
        units: How many sampling units the intervals are over.
        without_relevant: Queries that no item is relevant to; they count in no mean.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_query: dict[str, Tensor] = field(repr=False)
    queries: int
    gallery: int
    units: int
    without_relevant: int

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    def rows(self) -> list[dict[str, Any]]:
        """One plain row a metric: metric, value, low, high."""
        ends = self.intervals
        return [
            {"metric": name, "value": value, "low": ends[name][0], "high": ends[name][1]}
            for name, value in self.metrics.items()
        ]

    def to_arrow(self) -> pa.Table:
        """The rows as a pyarrow.Table."""
        return pa.Table.from_pylist(self.rows())

    def to_pandas(self) -> Any:
        """The rows as a pandas.DataFrame, where pandas is installed."""
        import pandas

        return pandas.DataFrame(self.rows())

    def _title(self) -> str:
        without = f", {self.without_relevant} without a relevant item" if self.without_relevant else ""
        return f"{self.queries} queries{without}, gallery of {self.gallery}; 95% intervals over {self.units} units"

    def __repr__(self) -> str:
        table = Table(title=self._title(), title_justify="left")
        for name in ("metric", "value", "low", "high"):
            table.add_column(name, justify="left" if name == "metric" else "right")
        for row in self.rows():
            table.add_row(row["metric"], *(f"{row[name]:.4f}" for name in ("value", "low", "high")))
        out = io.StringIO()
        Console(file=out, width=100, color_system=None).print(table)
        return out.getvalue().rstrip("\n")

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(row['metric'])}</td>"
            + "".join(f"<td>{row[name]:.4f}</td>" for name in ("value", "low", "high"))
            + "</tr>"
            for row in self.rows()
        )
        head = "<tr><th>metric</th><th>value</th><th>low</th><th>high</th></tr>"
        return f"<p>{escape(self._title())}</p><table>{head}{rows}</table>"


def evaluate(
    query_vectors: Any,
    query_labels: Any,
    gallery_vectors: Any,
    gallery_labels: Any,
    *,
    bits: int | None = None,
    ks: Sequence[int] = (1, 10, 100),
    exclude_self: bool = False,
    units: Any = None,
) -> Report:
    """Returns retrieval metrics of embeddings, whatever made them: each query ranks the whole gallery.

    Ranking is by cosine, of codes by Hamming distance, and exact: a metric under ties is its mean over all orders of
    what ties. Means are over the queries that have a relevant item.

    Args:
        query_vectors: Array or tensor (Q, D) of real numbers; with `bits` codes uint8 (Q, ceil(bits / 8)) as
            numpy.packbits(..., bitorder="little") packs them, or (Q, bits) real values, of which those above 0 are set.
        query_labels: Q labels, numbers or texts; items of a query's label are relevant to it. None, NaN (also that of
            pandas: NA, NaT) and negative numbers are unknown labels, which equal none.
        gallery_vectors: The same of the gallery, (G, D).
        gallery_labels: G labels.
        bits: Width of codes; None for real vectors.
        ks: The k of P@k, R@k (hit rate), NDCG@k and AP@k.
        exclude_self: Query i and gallery item i are one image, which is left out of the query's ranking.
        units: What each query is a draw of, Q values such as artists, or None where each query is its own: the
            intervals are over these. A query whose value is None or NaN is its own.

    Raises:
        ValueError: For shapes that do not fit, NaN, and no query with a relevant item.

    Example:
        >>> gallery = [[9, 1], [1, 5], [8, 2]]
        >>> report = evaluate([[1, 0], [0, 1]], ["cat", "dog"], gallery, ["dog", "dog", "cat"], ks=(1,))
        >>> {name: round(report[name], 3) for name in ("mAP", "P@1")}
        {'mAP': 0.667, 'P@1': 0.5}
    """
    query, gallery = _vectors("query_vectors", query_vectors, bits), _vectors("gallery_vectors", gallery_vectors, bits)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query_vectors have {query.shape[1]} columns, but gallery_vectors have {gallery.shape[1]}: give "
            "vectors of the same encoder"
        )
    if exclude_self and len(query) != len(gallery):
        raise ValueError(
            f"exclude_self=True needs query i to be gallery item i, but there are {len(query)} queries and "
            f"{len(gallery)} items: give the same vectors twice"
        )
    numbers: dict[Hashable, int] = {}
    labels = [
        _numbered(name, values, len(vectors), numbers)
        for name, values, vectors in (
            ("query_labels", query_labels, query),
            ("gallery_labels", gallery_labels, gallery),
        )
    ]
    own, of_units = torch.arange(len(query)), None
    if units is not None:
        of_units = _numbered("units", units, len(query), {}, negative=True)
        of_units = torch.where(of_units < 0, len(query) + own, of_units)
    rows = own if exclude_self else own + len(gallery)
    per_query = measure_ranking(
        Descriptors(query, labels[0], rows, bits),
        Descriptors(gallery, labels[1], torch.arange(len(gallery)), bits),
        ks=ks,
        exclude_self=exclude_self,
    )
    relevant = per_query["relevant"]
    if not (relevant > 0).any():
        raise ValueError("no query has a relevant item in the gallery: check that both labels are of the same kind")
    measured = {name: values for name, values in per_query.items() if name != "relevant"}
    metrics, intervals = means(measured, of_units)
    return Report(
        metrics=metrics,
        intervals=intervals,
        per_query=per_query,
        queries=len(query),
        gallery=len(gallery),
        units=len(query) if of_units is None else len(of_units.unique()),
        without_relevant=int((relevant == 0).sum()),
    )


def _vectors(name: str, given: Any, bits: int | None) -> Tensor:
    """Unit vectors float32 (N, D), or packed codes uint8. Raises ValueError for what is neither."""
    values = given.detach().cpu() if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must be (N, D) with N, D >= 1, got shape {tuple(values.shape)}")
    if bits is None:
        check_vectors(name, vectors := values.float())
        return F.normalize(vectors, dim=1)
    if values.dtype == torch.uint8 and values.shape[1] == -(-bits // 8):
        return values
    if values.shape[1] != bits:
        raise ValueError(
            f"{name} of {bits} bits must be packed, uint8 (N, {-(-bits // 8)}), or real (N, {bits}), got "
            f"{values.dtype} {tuple(values.shape)}"
        )
    return pack_codes(values.float())


def _numbered(name: str, given: Any, count: int, numbers: dict[Hashable, int], *, negative: bool = False) -> Tensor:
    """Labels int64 (count,), equal for equal values; -1 for unknown ones. Fills `numbers`.

    With `negative` a number below 0 is a label as any other.
    """
    values = [_plain(value) for value in (given.tolist() if isinstance(given, Tensor | np.ndarray) else given)]
    if len(values) != count:
        raise ValueError(f"{name} must have one value for each of the {count} vectors, got {len(values)}")
    for value in values:
        if not isinstance(value, Hashable):
            raise ValueError(
                f"{name} must be numbers or texts, one for each vector, got {value!r}: for a column x[:, 0]"
            )
    return torch.tensor(
        [-1 if _is_unknown(value, negative) else numbers.setdefault(value, len(numbers)) for value in values],
        dtype=torch.int64,
    )


def _plain(value: Any) -> Any:
    """The value of a NumPy scalar or of a tensor without dimensions, which compare and hash unlike plain ones."""
    return value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0 else value


def _is_unknown(value: Any, negative: bool) -> bool:
    try:
        known = bool(value == value)  # NaN and pandas' NaT are not
    except TypeError:  # pandas' NA, which is neither true nor false
        known = False
    return value is None or not known or (not negative and isinstance(value, int | float) and value < 0)
