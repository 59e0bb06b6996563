"""Chooses an index that fits a budget: what it costs and finds is measured on a sample of the vectors."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from simsearch.errors import SimsearchError
from simsearch.index.factories import builds
from simsearch.index.faiss_index import FaissIndex
from simsearch.types import SearchResult

_GOAL = 0.95  # the recall that is wanted where nothing is
_SURE = 1.645  # standard errors below the mean, where 95 % of means lie above
_SAME = 0.01  # recalls that differ by no more are equally good
_GAIN = 0.002  # a search that visits or refines twice as much and finds no more than this ends the sweep
_TIMED = 50  # queries that are timed, each alone
_REFINED = (2, 4, 8, 16, 32, 64, 128)
_BLOCK = 2**14


class NoIndexFits(SimsearchError, ValueError):
    """No index keeps to the budget."""


@dataclass(frozen=True)
class Budget:
    """What an index may cost and must find. None leaves a quantity free.

    Attributes:
        bytes_per_item: Largest size of an item in the index in bytes, with its id and links.
        ms: Longest time of one query alone in milliseconds, the median.
        recall: Smallest recall@k against exact search. It is reached with a certainty of 95 % over the draw of the
            queries that the index is tuned on.

    Raises:
        ValueError: If a limit is not positive, or if the recall is above 1.
    """

    bytes_per_item: float | None = None
    ms: float | None = None
    recall: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None and not value > 0:
                raise ValueError(f"budget.{field.name} must be above 0, got {value}")
        if self.recall is not None and self.recall > 1:
            raise ValueError(f"budget.recall is a share of the nearest items, at most 1, got {self.recall}")

    def __str__(self) -> str:
        limits = (("bytes_per_item", "<=", self.bytes_per_item), ("ms", "<=", self.ms), ("recall", ">=", self.recall))
        return ", ".join(f"{name} {sign} {value:g}" for name, sign, value in limits if value is not None)


@dataclass(frozen=True)
class Point:
    """One way of searching, and what it costs and finds.

    Attributes:
        factory: The factory string, with the number of lists.
        nprobe: As in FaissIndex, like the next two.
        ef_search: Number of candidates of a graph.
        k_factor: Candidates of a refinement.
        items: Number of items that were searched.
        recall: recall@k against exact search.
        least: The recall that is reached with a certainty of 95 %: 1.645 standard errors below, over the queries.
        precision: Share of the k found items with the query's own label, NaN without labels.
        bytes_per_item: Size of an item.
        ms: Median milliseconds of one query alone.
    """

    factory: str
    nprobe: int | None
    ef_search: int | None
    k_factor: float | None
    items: int
    recall: float
    least: float
    precision: float
    bytes_per_item: float
    ms: float

    def excess(self, budget: Budget) -> float:
        """How far the point is outside of a budget: 0 within, else logarithms of ratios, and 10 times lacking recall.

        Args:
            budget: The budget.
        """
        over = [(self.bytes_per_item, budget.bytes_per_item), (self.ms, budget.ms)]
        costs = sum(max(0.0, math.log(value / limit)) for value, limit in over if limit is not None)
        return costs + 10 * max(0.0, (budget.recall or 0.0) - self.least)

    def described(self) -> str:
        """The point in words."""
        recall = f"recall {self.recall:.3f}, surely {self.least:.3f}"
        return f"{self.factory} ({recall}, {self.bytes_per_item:.0f} bytes, {self.ms:.2g} ms)"


@dataclass(frozen=True)
class Frontier:
    """What an index was chosen from.

    Attributes:
        points: All points that were measured.
        chosen: Its own.
    """

    points: list[Point]
    chosen: Point


def preferred(points: Iterable[Point], budget: Budget) -> Point | None:
    """The best of the points within a budget, None if there is none.

    With a wanted recall it is the point with the least product of those costs that have no limit. Without one, it is
    the same among the points whose recall is at most .01 below the highest. Where all is limited, the recall decides.

    Args:
        points: The points.
        budget: The budget. One without any limit wants a recall of .95.
    """
    budget = budget if str(budget) else Budget(recall=_GOAL)
    fitting = [point for point in points if point.excess(budget) == 0]
    if not fitting:
        return None
    free = [name for name in ("bytes_per_item", "ms") if getattr(budget, name) is None]
    if budget.recall is None or not free:
        best = max(point.recall for point in fitting)
        fitting = [point for point in fitting if point.recall >= best - _SAME]
    free = free or ["ms"]
    return min(fitting, key=lambda point: (math.prod(getattr(point, name) for name in free), -point.recall))


def check_budget(limits: Mapping[str, float | None], chooses: bool) -> None:
    """Checks that limits are not given where no index is chosen by them.

    Args:
        limits: The largest bytes and milliseconds and the smallest recall, None where there is no limit.
        chooses: Whether an index is chosen.

    Raises:
        ValueError: If they are.
    """
    if not chooses and (given := [name for name, value in limits.items() if value is not None]):
        raise ValueError(f"budget.{given[0]} limits what index=auto chooses: give index=auto too")


class AutoIndex:
    """Chooses the kind and the settings of an index by a budget.

    Float vectors are tried in Flat, HNSW with SQ8, and IVF with fast-scan PQ or RaBitQ, refined by scalar quantisers;
    codes in flat, IVF and HNSW indexes. Each is filled with a sample, whose own items are the queries; a query's own
    item does not count. If there are more items than that, the sample's lists hold as many items as the lists of the
    whole will, its times are extrapolated, and a catalog measures and chooses the settings again with all items.

    Args:
        budget: Limits by the names of `Budget`.
        metric: "ip" or "l2" for float vectors.
        k: Number of items that a query finds, for the recall.
        sample: Largest number of items to try indexes with.
        queries: Number of queries.
        seed: Seed of the sample, the queries and the index.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        budget: Mapping[str, float | None] | None = None,
        metric: str = "ip",
        k: int = 10,
        sample: int = 50_000,
        queries: int = 500,
        seed: int = 0,
    ) -> None:
        try:
            self.budget = Budget(**(budget or {}))
        except TypeError:
            names = ", ".join(field.name for field in fields(Budget))
            raise ValueError(f"budget has the limits {names}, got {', '.join(budget or ())}") from None
        for name, value in (("k", k), ("sample", sample), ("queries", queries)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if metric not in ("ip", "l2"):
            raise ValueError(f"metric must be ip or l2, got {metric!r}")
        self.metric, self.k, self.sample, self.queries, self.seed = metric, k, sample, queries, seed

    def rows(self, total: int) -> Tensor:
        """The positions int64 (n,), ascending, of the items in the sample.

        Args:
            total: Number of items.
        """
        if total <= self.sample:
            return torch.arange(total)
        return torch.randperm(total, generator=self._generator())[: self.sample].sort().values

    def measure(self, vectors: Tensor, total: int, labels: Tensor | None = None) -> list[Point]:
        """What each kind of index costs and finds on the sample.

        Args:
            vectors: float32 (n, D) or codes uint8 (n, bits / 8), the vectors of `rows(total)`.
            total: Number of items that the index will hold.
            labels: int64 (n,), -1 where unknown, or None.
        """
        count, metric = len(vectors), "hamming" if vectors.dtype == torch.uint8 else self.metric
        own = self.own(count)
        truth = exact(vectors[own], [vectors], min(self.k + 1, count), metric)
        points: list[Point] = []
        for factory in candidates(vectors.shape[1], metric):
            index = self.empty(factory, metric)
            index.settle(total)
            index.factory = _scaled(index.factory, count, total)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # few vectors a centroid: what comes of it is measured
                try:
                    index.add(vectors)
                except ValueError:  # too few to train
                    continue
            points += [_grown(point, total) for point in self.sweep(index, vectors[own], own, truth, labels)]
        return points

    def sweep(
        self, index: FaissIndex, queries: Tensor, own: Tensor, truth: SearchResult, labels: Tensor | None = None
    ) -> list[Point]:
        """What a filled index costs and finds, by how thoroughly it searches.

        Args:
            index: The index.
            queries: Vectors of Q items, as the index stores them.
            own: int64 (Q,), the positions of these items.
            truth: Their k + 1 nearest items by exact search.
            labels: int64 (N,), the labels of all items, or None.
        """
        points: list[Point] = []
        size, best = index.bytes_per_item, -1.0
        for efforts in _efforts(index):
            before = -1.0
            for effort in efforts:
                index.tune(**effort)
                found = index.search(queries, truth.ids.shape[1])
                recalls = _recalls(found, truth, own, index.is_binary)
                error = float(recalls.std()) / math.sqrt(len(recalls)) if len(recalls) > 1 else 0.0
                point = Point(
                    factory=index.factory,
                    nprobe=index.nprobe,
                    ef_search=index.ef_search,
                    k_factor=index.k_factor,
                    items=len(index),
                    recall=(mean := float(recalls.mean())),
                    least=mean - _SURE * error,
                    precision=_precision(found, own, labels),
                    bytes_per_item=size,
                    ms=_milliseconds(index, queries[:_TIMED], self.k),
                )
                points.append(point)
                if point.recall < before + _GAIN:
                    break
                before = point.recall
            if before < best + _GAIN:
                break
            best = before
        return points

    def kinds(self, points: Sequence[Point], total: int, shape: str) -> list[Point]:
        """The best point of each kind of index that keeps to the budget, best first.

        Args:
            points: The points of `measure`.
            total: Number of items that the index will hold.
            shape: What the vectors are, for the message.

        Raises:
            NoIndexFits: If there is none. The message names the nearest.
        """
        left, best = list(points), []
        while (point := preferred(left, self.budget)) is not None:
            best.append(point)
            left = [other for other in left if other.factory != point.factory]
        if not best:
            raise NoIndexFits(self.failure(points, f"{total} {shape}"))
        return best

    def failure(self, points: Sequence[Point], what: str) -> str:
        """What to tell where no index keeps to the budget.

        Args:
            points: All points.
            what: What was to be indexed.
        """
        budget = self.budget if str(self.budget) else Budget(recall=_GOAL)
        nearest: dict[str, Point] = {}
        for point in sorted(points, key=lambda point: point.excess(budget)):
            nearest.setdefault(point.factory, point)
        near = "; ".join(point.described() for point in list(nearest.values())[:3])
        return f"no index of {what} keeps to the budget {budget}; nearest: {near or 'none'}: allow more, or want less"

    def empty(self, factory: str, metric: str) -> FaissIndex:
        """An empty index.

        Args:
            factory: Its factory string.
            metric: "ip", "l2" or "hamming".
        """
        return FaissIndex(factory, metric, seed=self.seed)

    def chosen(self, point: Point, vectors: Tensor, total: int) -> FaissIndex:
        """An empty index of a point's kind and settings for all items.

        Args:
            point: A point of `measure`.
            vectors: Some of the vectors.
            total: Number of items that the index will hold.
        """
        metric = "hamming" if vectors.dtype == torch.uint8 else self.metric
        index = self.empty(point.factory if point.items == total else _free(point.factory), metric)
        index.settle(total)
        index.tune(point.nprobe, point.ef_search, point.k_factor)
        return index

    def own(self, count: int) -> Tensor:
        """The places int64 (Q,) of the sample's items that are queries.

        Args:
            count: Number of items in the sample.
        """
        return torch.randperm(count, generator=self._generator())[: self.queries]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def candidates(width: int, metric: str) -> list[str]:
    """The factory strings to try, those that this release of FAISS makes at a width.

    Args:
        width: Number of columns of the vectors or packed codes.
        metric: "ip", "l2" or "hamming".

    Example:
        >>> candidates(6, "hamming")
        ['BFlat', 'BIVF', 'BHNSW32']
    """
    if metric == "hamming":
        return ["BFlat", "BIVF", "BHNSW32"]
    named = ["Flat", "HNSW32_SQ8"]
    parts = max((m for m in range(1, width // 4 + 1) if width % m == 0), default=1)  # of 4 bits each
    named += [f"IVF,PQ{parts}x4fsr,Refine({stored})" for stored in ("SQ8", "SQ6", "SQ4")]
    named += [f"IVF,PQ{2 * parts}x4fsr,Refine(SQ8)"] if width % (2 * parts) == 0 else []
    named += [f"IVF,RaBitQfs,Refine({stored})" for stored in ("SQ8", "SQ6")]
    return [factory for factory in dict.fromkeys(named) if builds(factory, metric, width)]


def exact(queries: Tensor, parts: Iterable[Tensor], k: int, metric: str) -> SearchResult:
    """The k nearest items of each query by exact search of vectors that come in parts.

    Args:
        queries: Vectors float32 (Q, D) or codes uint8 (Q, bits / 8).
        parts: All vectors, in order.
        k: Number of items.
        metric: "ip", "l2" or "hamming".
    """
    ids = torch.empty(len(queries), 0, dtype=torch.int64)
    scores = torch.empty(len(queries), 0)
    start = 0
    for part in parts:
        for block in part.split(_BLOCK):
            flat = FaissIndex("BFlat" if metric == "hamming" else "Flat", metric)
            flat.add(block)
            found = flat.search(queries, min(k, len(block)))
            both = torch.cat([scores, found.scores], dim=1)
            best = both.argsort(dim=1, descending=True, stable=True)[:, :k]
            scores, ids = both.gather(1, best), torch.cat([ids, found.ids + start], dim=1).gather(1, best)
            start += len(block)
    return SearchResult(ids, scores)


def _efforts(index: FaissIndex) -> Iterator[list[dict[str, Any]]]:
    """Settings from hasty to thorough, in one list for each refinement."""
    if "IVF" in index.factory:
        lists = lists_of(index.factory)
        probes = [{"nprobe": 2**power} for power in range(lists.bit_length())]
        for factor in _REFINED if "Refine" in index.factory else (None,):
            yield [probe | {"k_factor": factor} for probe in probes]
    elif "HNSW" in index.factory:
        yield [{"ef_search": ef} for ef in (16, 32, 64, 128, 256, 512)]
    else:
        yield [{}]


def lists_of(factory: str) -> int:
    """The number of lists in a factory string, such as 256 in "IVF256,Flat".

    Args:
        factory: The factory string.
    """
    return int(factory.partition("IVF")[2].partition(",")[0])


def _free(factory: str) -> str:
    """A factory string without its number of lists."""
    return factory.replace(f"IVF{lists_of(factory)}", "IVF") if "IVF" in factory else factory


def _scaled(factory: str, count: int, total: int) -> str:
    """A factory string for `count` of `total` items, whose lists are as long as those of the whole."""
    if "IVF" not in factory or count == total:
        return factory
    lists = max(1, round(lists_of(factory) * count / total))
    return factory.replace(f"IVF{lists_of(factory)}", f"IVF{lists}")


def _grown(point: Point, total: int) -> Point:
    """A point of a sample, as the whole will be: an exhaustive search takes as much longer as there are more items.

    A graph takes longer by the logarithm. The lists that an IVF index visits are as long as in the sample.
    """
    if point.items == total:
        return point
    grown = {"Flat": total / point.items, "BFlat": total / point.items}.get(point.factory, 1.0)
    if "HNSW" in point.factory:
        grown = math.log(total) / math.log(point.items)
    return replace(point, ms=point.ms * grown)


def _others(ids: Tensor, own: Tensor, k: int) -> Tensor:
    """bool (Q, k + 1), the first k found items that are not the query's own."""
    others = ids != own[:, None]
    return others & (others.cumsum(1) <= k)


def _recalls(found: SearchResult, truth: SearchResult, own: Tensor, ties: bool) -> Tensor:
    """The share of the exact k nearest other items that were found, float64 (Q,).

    Distances of codes tie: whatever is as near as the k-th nearest is one of the nearest.
    """
    k = max(1, truth.ids.shape[1] - 1)
    kept, wanted = _others(found.ids, own, k) & (found.ids >= 0), _others(truth.ids, own, k)
    if ties:
        last = truth.scores.masked_fill(~wanted, math.inf).min(1).values
        right = kept & (found.scores >= last[:, None])
        return right.sum(1) / wanted.sum(1).clamp(min=1).double()
    hits = (found.ids[:, :, None] == truth.ids[:, None, :]) & kept[:, :, None] & wanted[:, None, :]
    return hits.any(1).sum(1) / wanted.sum(1).clamp(min=1).double()


def _precision(found: SearchResult, own: Tensor, labels: Tensor | None) -> float:
    if labels is None:
        return math.nan
    k = max(1, found.ids.shape[1] - 1)
    kept = _others(found.ids, own, k) & (found.ids >= 0)
    right = kept & (labels[found.ids.clamp(min=0)] == labels[own][:, None])
    known = labels[own] >= 0
    return float((right.sum(1) / k)[known].mean())


def _milliseconds(index: FaissIndex, queries: Tensor, k: int) -> float:
    times = []
    for query in queries.split(1):
        start = time.perf_counter()
        index.search(query, min(k, len(index)))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
