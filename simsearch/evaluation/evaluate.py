"""The evaluator of a search: an index is filled and searched, and full rankings are measured."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from simsearch.evaluation.evaluator import Measured, means
from simsearch.evaluation.sharded_index import GalleryIndex, ShardedIndex, whole_index
from simsearch.evaluation.verification import Verified
from simsearch.functional.definitions import average_precision_definitions
from simsearch.functional.ranking import Junk, average_precision_in_index_order, find_junk, measure_ranking
from simsearch.functional.reranking import Reranker, unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.index.auto import AutoIndex, Frontier
from simsearch.index.faiss_index import FaissIndex
from simsearch.metrics.retrieval import RetrievalMetrics
from simsearch.types import Descriptors, RetrievalTask, SearchResult

_LATENCY_QUERIES = 200
_RECALL_QUERIES = 1000
_BLOCK = 4096  # items that travel together


@dataclass(frozen=True)
class Evaluation(Measured):
    """The measurement of a task with an index.

    All values except the vectors and the index are equal on all ranks. Of the metrics, names under `index/` describe
    the answers of the index, names under `rerank/` the full ranking after re-ranking, names under `verify/` that after
    verification (see `Verified`), names under `code/` the health of codes: `code/empty_ball@2` is the share of queries
    with no other item within distance 2.

    Attributes:
        query: The queries. Their label and index are those of all ranks, the vectors those of this rank.
        gallery: The gallery, likewise.
        found: The answers of the index without junk; ids are gallery positions.
        index: The filled index, with this rank's part of the gallery.
        frontier: What the index was chosen from, on rank 0, where it was chosen by a budget.
    """

    query: Sharded = field(kw_only=True)
    gallery: Sharded = field(kw_only=True)
    found: SearchResult = field(kw_only=True)
    index: GalleryIndex = field(kw_only=True)
    frontier: Frontier | None = field(default=None, kw_only=True)

    def add(self, measured: Measured, name: str) -> None:
        """Adds the numbers of a further evaluator.

        Args:
            measured: The numbers.
            name: The evaluator's name, for the message.

        Raises:
            ValueError: If a name is taken, or if the values are of other queries.
        """
        if taken := sorted({*measured.metrics, *measured.per_query} & {*self.metrics, *self.per_query}):
            raise ValueError(f"evaluators.{name} measures {taken[0]}, which is measured already: give another name")
        if measured.per_query and not torch.equal(measured.units, self.units):
            raise ValueError(f"evaluators.{name} has values of other queries than the task: leave its per_query empty")
        self.metrics.update(measured.metrics)
        self.intervals.update(measured.intervals)
        self.per_query.update(measured.per_query)

    def whole_index(self) -> FaissIndex | None:
        """A FAISS index of the whole gallery on rank 0, None on the other ranks. Every rank must call."""
        assert isinstance(self.index, FaissIndex)
        return whole_index(self.index, self.gallery)


@dataclass(frozen=True)
class Search:
    """Evaluates what a searcher would get of an index, beside full rankings (see `evaluate`).

    Attributes:
        index: The index to fill. Each call fills an empty one of its settings, or chooses one for the gallery by the
            budget.
        ks: Cutoffs k, 1 or more.
        rerank: A way of re-ranking that is measured too, or None.
        seed: Seed of the choice of queries for the recall of the index.
        verified: The measure of what the index stores after geometric verification, or None.
    """

    index: GalleryIndex | AutoIndex
    ks: Sequence[int] = (1, 10, 100)
    rerank: Reranker | None = None
    seed: int = 0
    verified: Verified | None = None

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Evaluation:
        """The metrics of a task. Where several ranks measure, every rank must call.

        Args:
            query: The queries of the task.
            gallery: The gallery of the task.
            task: The task.
        """
        index: GalleryIndex
        if isinstance(self.index, AutoIndex):
            index, frontier = choose(self.index, gallery)
        else:
            index, frontier = self.index.emptied(), None
        result = evaluate(
            query,
            gallery,
            index,
            ks=self.ks,
            exclude_self=task.exclude_self,
            index_order=task.index_order,
            units=None if task.units is None else task.units[query.index],
            rerank=self.rerank,
            seed=self.seed,
        )
        result = replace(result, frontier=frontier)
        if self.verified is not None:
            result.add(self.verified(query, as_stored(gallery, result.index), task), "verify")
        return result


def as_stored(gallery: Sharded, index: GalleryIndex) -> Sharded:
    """The gallery with the vectors that an index stores of it: decoded ones, if it compresses.

    Args:
        gallery: The gallery.
        index: The index that was built of it.
    """
    return gallery if index.is_binary else gallery.with_vectors(ShardedIndex(index, gallery).stored)


def evaluate(
    query: Descriptors | Sharded,
    gallery: Descriptors | Sharded,
    index: GalleryIndex,
    *,
    ks: Sequence[int] = (1, 10, 100),
    exclude_self: bool = False,
    index_order: bool = False,
    units: Tensor | None = None,
    rerank: Reranker | None = None,
    seed: int = 0,
) -> Evaluation:
    """The metrics of queries against a gallery, over the full ranking and over the answers of an index.

    The full ranking is over the vectors that the index stores. For a compressing index (PQ, scalar quantiser) these are
    the decoded vectors, with uncompressed queries. The recall of the index is against exact search of the uncompressed
    gallery, on at most 1,000 queries. The answers of a float Flat index are put in the order of the full ranking's
    scores, since FAISS rounds a score by the position of its vectors.

    With `rerank` the metrics of the full ranking appear a second time, as `rerank/mAP` and so on, after re-ranking the
    stored vectors by cosine (codes as vectors of +1 and -1). `rerank/fit_s` is the time in seconds to prepare the
    gallery. `rerank/seconds_per_query` is the time of the first exact search and the re-ranking; the second search,
    with an expanded query, is not part of it.

    Queries without relevant items have no value. `queries_without_relevant` counts them. `queries_in_own_ranking`
    counts the queries that stand in their own ranking as a right answer.

    A gallery on several ranks (Sharded; every rank must call) stays there: each rank ranks and indexes its part. For
    any number of ranks, the ranks and counts of the full ranking are those of one process, and metrics agree within
    1e-12. Metrics under `index/` agree as far as ShardedIndex answers like a single index. Build time, queries per
    second and latency are those of the slowest rank, without the exchange between ranks.

    Args:
        query: Q queries.
        gallery: G gallery items.
        index: An empty index of the same kind, which is filled with the gallery. A gallery in a store stays there
            until it is dropped.
        ks: Cutoffs k, 1 or more.
        exclude_self: Take each query's own collection row out of its ranking.
        index_order: For codes, measure `mAP_index_order` too, with ties broken by gallery order.
        units: int64 (Q,), the sampling unit of each query, over which intervals are computed. With None each query is
            a unit.
        rerank: A way of re-ranking, or None.
        seed: Seed of the choice of queries for the recall of the index.

    Raises:
        ValueError: If the index is of the other kind, or if `rerank` is given with several ranks.
    """
    query, gallery = Sharded.of(query), Sharded.of(gallery)
    check_kind(index, gallery.bits)
    if rerank is not None:
        check_one_process("rerank", gallery.ranks.world)
    filled = ShardedIndex(index, gallery)

    ranked = filled.as_ranked(query)
    per_query = measure_ranking(*ranked, ks=ks, exclude_self=exclude_self)
    if index_order and gallery.bits is not None:
        per_query["AP_index_order"] = average_precision_in_index_order(query, gallery, exclude_self=exclude_self)
    junk = find_junk(query, gallery.own, exclude_self=exclude_self)
    metrics: dict[str, float] = {}
    if rerank is not None:
        reranked, metrics = _measure_reranked(rerank, query, filled, junk, ks, exclude_self)
        per_query |= reranked
    found, search_seconds = filled.search(query, min(max(ks), len(gallery)), junk=junk)
    relevant = per_query.pop("relevant")
    per_query |= _measure_found(found, query, gallery, relevant, ks)

    averages, intervals = means(per_query, units)
    metrics |= averages
    metrics |= _index_recall(filled, query, ks, seed)
    alone = filled.seconds_alone(query, _LATENCY_QUERIES, k=10)
    metrics |= {f"index/latency_ms_p{p}": 1e3 * float(np.percentile(alone, p)) for p in (50, 95, 99)}
    metrics |= {
        "index/build_s": filled.build_seconds,
        "index/queries_per_s": len(query) / search_seconds,
        "index/bytes_per_item": filled.bytes_per_item,
        "bytes_per_item": filled.code_bytes,
        "queries": float(len(query)),
        "gallery": float(len(gallery)),
        "queries_without_relevant": float((relevant == 0).sum()),
        "queries_in_own_ranking": float(0 if exclude_self else _in_own_ranking(query, gallery)),
    }
    if gallery.bits is not None:
        itself = find_junk(replace(query, group=None), gallery.own, exclude_self=True)
        others, _ = _exact(filled).search(query, 1, junk=itself)
        metrics["code/empty_ball@2"] = float((others.scores[:, 0] < -2).double().mean())
    units = query.index if units is None else units
    return Evaluation(metrics, units, intervals, per_query, query=query, gallery=gallery, found=found, index=index)


def choose(auto: AutoIndex, gallery: Sharded) -> tuple[FaissIndex, Frontier | None]:
    """An empty index for a gallery, and on rank 0 what it was chosen from. Every rank must call.

    Rank 0 chooses, on a sample of the gallery. Queries have no part in it.

    Args:
        auto: What chooses.
        gallery: The gallery.

    Raises:
        NoIndexFits: If no index keeps to the budget.
    """
    rows, total = auto.rows(len(gallery)), len(gallery)
    blocks = [gallery.rows_on_first(positions) for positions in rows.split(_BLOCK)]
    state, error, frontier = None, None, None
    if gallery.ranks.rank == 0:
        vectors = torch.cat([block for block in blocks if block is not None])
        try:
            points = auto.measure(vectors, total, gallery.label[rows])
            best = auto.kinds(points, total, f"items of {vectors.shape[1]} columns")[0]
        except ValueError as problem:
            error = problem
        else:
            frontier = Frontier(points, best)
            text = json.dumps(auto.chosen(best, vectors, total).settings)
            state = torch.tensor(list(text.encode()), dtype=torch.uint8)
    gallery.ranks.raise_together(error)
    state = gallery.ranks.from_first(state)
    return FaissIndex(**json.loads(bytes(state.tolist()))), frontier


def _in_own_ranking(query: Sharded, gallery: Sharded) -> int:
    """The number of queries that are gallery items too, and that no group makes junk to themselves."""
    own = torch.isin(query.index, gallery.index)
    if query.group is not None and gallery.group is not None:
        own &= query.group < 0
    return int(own.sum())


def check_kind(index: GalleryIndex | AutoIndex, bits: int | None) -> None:
    """Checks that an index is of the kind of the descriptors. A choice of the index fits both.

    Args:
        index: The index.
        bits: Width of the codes, None for float descriptors.

    Raises:
        ValueError: If one is for codes and the other is not.
    """
    if not isinstance(index, AutoIndex) and index.is_binary != (bits is not None):
        kind = "codes: use index=binary-flat" if bits is not None else "float descriptors: use index=flat"
        raise ValueError(f"index {index.factory!r} does not fit the model's {kind} (or another index of that kind)")


def check_one_process(key: str, world: int) -> None:
    """Checks that what needs all descriptors in one process has them there.

    Args:
        key: The config's key of it, such as rerank, verify or evaluators.instance.
        world: Number of processes.

    Raises:
        ValueError: If there are several processes.
    """
    if world > 1:
        raise ValueError(
            f"{key} needs all descriptors in one process, but there are {world}: train without it, then "
            f"`simsearch evaluate run=... {key.partition('.')[0]}=...`"
        )


def _measure_reranked(
    rerank: Reranker,
    query: Sharded,
    index: ShardedIndex,
    junk: Junk,
    ks: Sequence[int],
    exclude_self: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The metrics of full rankings after re-ranking, float64 (Q,), and the times it took."""
    start = time.perf_counter()
    ready = rerank.fit(unit_vectors(index.stored, query.bits))
    fitted = time.perf_counter()
    wanted, ahead = ready.rerank(unit_vectors(query.own.vectors, query.bits), junk)
    times = {
        "rerank/fit_s": fitted - start,
        "rerank/seconds_per_query": (time.perf_counter() - fitted) / len(query),
    }
    per_query = measure_ranking(
        query.with_vectors(wanted),
        index.gallery.with_vectors(ready.vectors),
        ks=ks,
        exclude_self=exclude_self,
        ahead=ahead,
    )
    return {f"rerank/{name}": value for name, value in per_query.items() if name != "relevant"}, times


def _measure_found(
    found: SearchResult, query: Sharded, gallery: Sharded, relevant: Tensor, ks: Sequence[int]
) -> dict[str, Tensor]:
    """P@k, R@k and AP@k (divided by min(R, k)) of the returned lists, float64 (Q,)."""
    right = (gallery.label[found.ids.clamp(min=0)] == query.label[:, None]) & (found.ids >= 0)
    hits = right.double().cumsum(1)
    precision = hits / torch.arange(1, right.shape[1] + 1)
    metrics = {}
    for k in ks:
        last = min(k, right.shape[1])
        metrics[f"index/P@{k}"] = hits[:, last - 1] / k
        metrics[f"index/R@{k}"] = (hits[:, last - 1] > 0).double()
        metrics[f"index/AP@{k}_minRk"] = (precision * right)[:, :last].sum(1) / relevant.clamp(min=1, max=k)
    # One ranking by every definition of mAP@k, so that a paper's number can be translated.
    counted = right & (relevant > 0)[:, None]  # an unknown label equals no other
    first = torch.nn.functional.pad(counted, (0, max(ks) - right.shape[1]))
    named = average_precision_definitions(first, relevant.long())
    metrics |= {f"definitions/{name}": value for name, value in named.items()}
    return {name: value.masked_fill(relevant == 0, torch.nan) for name, value in metrics.items()}


def _index_recall(index: ShardedIndex, query: Sharded, ks: Sequence[int], seed: int) -> dict[str, float]:
    """The share of the exact k nearest items that the index returns, junk and the query itself included, by k.

    Where more items to find make an index search more thoroughly, each k is searched for by itself.
    """
    few = torch.from_numpy(np.random.default_rng(seed).permutation(len(query))[:_RECALL_QUERIES])
    g, exact = len(index.gallery), _exact(index)
    ks = sorted({min(k, g) for k in ks})
    if exact is index:
        return {f"index/recall@{k}": 1.0 for k in ks}
    got, truth = (one.search(query, ks[-1], chosen=few)[0] for one in (index, exact))
    row = torch.arange(len(few))[:, None] * g
    recall = {}
    for k in reversed(ks):
        if index.narrows and k < ks[-1]:
            got = index.search(query, k, chosen=few)[0]
        if index.index.is_binary:
            # Distances tie: whatever is as near as the k-th nearest is one of the nearest.
            kept = got.scores[:, :k] >= truth.scores[:, k - 1 : k]
        else:
            kept = torch.isin(row + got.ids[:, :k], row + truth.ids[:, :k]) & (got.ids[:, :k] >= 0)
        recall[f"index/recall@{k}"] = float(kept.double().mean())
    return dict(reversed(recall.items()))


def _exact(index: ShardedIndex) -> ShardedIndex:
    """The exact search of the same gallery, uncompressed: the index itself, if it is one."""
    if index.index.factory in ("Flat", "BFlat"):
        return index
    flat = FaissIndex("BFlat") if index.index.is_binary else FaissIndex("Flat", metric=index.index.metric)
    return ShardedIndex(flat, index.gallery)


def metric_names(ks: Sequence[int], *, codes: bool, rerank: bool = False, index_order: bool = False) -> set[str]:
    """The names of the metrics that RetrievalEvaluation logs, without the prefix of a stage.

    The names come from a small measurement. A gallery with fewer items than the last of `ks` gets its recall at the
    number of its items instead.

    Args:
        ks: Cutoffs k, 1 or more.
        codes: Whether descriptors are binary codes.
        rerank: Whether the ranking is measured after re-ranking too.
        index_order: Whether codes are measured with ties broken by gallery order too.
    """
    metrics = RetrievalMetrics(ks, 8 if codes else None, exclude_self=True)
    index = torch.arange(max(ks) + 1)
    vectors = torch.randn(len(index), 8, generator=torch.Generator().manual_seed(0))
    metrics.update("query", vectors[:2], index[:2] % 2, index[:2])
    metrics.update("gallery", vectors, index % 2, index)
    query, gallery = metrics.sharded("query"), metrics.sharded("gallery")
    flat = FaissIndex("BFlat") if codes else FaissIndex("Flat")
    result = evaluate(query, gallery, flat, ks=ks, exclude_self=True, index_order=index_order)
    names = {*result.metrics, *(f"code/{name}" for name in metrics.code_statistics())}
    if rerank:
        names |= {f"rerank/{name}" for name in (*metrics.compute(), "fit_s", "seconds_per_query")}
    return names
