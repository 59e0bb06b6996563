"""What a searcher would get: index, search and full ranking of the collected descriptors."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from simsearch.files import replacing, write_json
from simsearch.functional.ranking import Junk, average_precision_in_index_order, find_junk, measure_ranking
from simsearch.functional.reranking import Reranker, unit_vectors
from simsearch.functional.significance import bootstrap_interval
from simsearch.index.faiss_index import FaissIndex
from simsearch.metrics.retrieval import RetrievalMetrics, mean_name
from simsearch.types import Descriptors, RetrievalTask, SearchResult

_LATENCY_QUERIES = 200
_RECALL_QUERIES = 1000


@dataclass(frozen=True)
class Evaluation:
    """One measurement of one task.

    metrics: name -> value, means over queries; names under `index/` are of what the index returned,
    those under `rerank/` of the full ranking after re-ranking; under `code/` is the health of codes
    (functional.code_statistics), `code/empty_ball@2` the share of queries with nothing else within distance 2.
    intervals: name -> (low, high), 95% bootstrap over queries. per_query: name -> float64 (Q,).
    query, gallery: what was compared. found: the index's answer without junk, ids are gallery
    positions. index: the built index.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_query: dict[str, Tensor]
    query: Descriptors
    gallery: Descriptors
    found: SearchResult
    index: FaissIndex


def evaluate(
    query: Descriptors,
    gallery: Descriptors,
    index: FaissIndex,
    *,
    ks: Sequence[int] = (1, 10, 100),
    exclude_self: bool = False,
    index_order: bool = False,
    rerank: Reranker | None = None,
    seed: int = 0,
) -> Evaluation:
    """The full ranking and the index's answers, measured on queries against a gallery.

    `index` is filled with the gallery. The full ranking is over what the index stores: for a
    compressing index (PQ, scalar quantiser) over its decoded vectors, the queries uncompressed. The
    index's recall is against exact search of the uncompressed gallery, on at most 1,000 queries.
    With `index_order` codes also get `mAP_index_order`, ties broken by gallery order.

    With `rerank` the metrics of the full ranking come once more, as `rerank/mAP` and so on, after
    re-ranking what the index stores by cosine (codes as vectors of + and - 1); beside them
    `rerank/fit_s`, seconds that the gallery took once, and `rerank/seconds_per_query`, of the first
    exact search and the re-ranking; an expanded query is then searched again, which is not in it.

    Queries without relevant items have no value; they are counted in `queries_without_relevant`.
    """
    _check_kind(index, gallery.bits)
    start = time.perf_counter()
    index.add(gallery.vectors)
    build_seconds = time.perf_counter() - start

    ranked_query, ranked_gallery = _as_ranked(query, gallery, index)
    per_query = measure_ranking(ranked_query, ranked_gallery, ks=ks, exclude_self=exclude_self)
    if index_order and gallery.bits is not None:
        per_query["AP_index_order"] = average_precision_in_index_order(query, gallery, exclude_self=exclude_self)
    junk = find_junk(query, gallery, exclude_self=exclude_self)
    metrics: dict[str, float] = {}
    if rerank is not None:
        reranked, metrics = _measure_reranked(rerank, query, gallery, index, junk, ks, exclude_self)
        per_query |= reranked
    found, search_seconds = _search(index, query, junk, k=min(max(ks), len(gallery)))
    relevant = per_query.pop("relevant")
    per_query |= _measure_found(found, query, gallery, relevant, ks)

    values = torch.stack(list(per_query.values()), dim=1)
    metrics |= {mean_name(n): float(v.nanmean()) for n, v in per_query.items()}
    bounds = bootstrap_interval(values, seed=seed).tolist()
    intervals = {mean_name(n): (low, high) for n, (low, high) in zip(per_query, bounds, strict=True)}
    metrics |= _index_recall(index, query, gallery, ks, seed)
    metrics |= _latency(index, query, k=min(10, len(gallery)))
    metrics |= {
        "index/build_s": build_seconds,
        "index/queries_per_s": len(query) / search_seconds,
        "index/bytes_per_item": float(index.bytes_per_item),
        "bytes_per_item": float(index.code_bytes),
        "queries": float(len(query)),
        "gallery": float(len(gallery)),
        "queries_without_relevant": float((relevant == 0).sum()),
    }
    if gallery.bits is not None:
        others, _ = _search(index, query, find_junk(query, gallery, exclude_self=True), k=1)
        metrics["code/empty_ball@2"] = float((others.scores[:, 0] < -2).double().mean())
    return Evaluation(metrics, intervals, per_query, query, gallery, found, index)


def _check_kind(index: FaissIndex, bits: int | None) -> None:
    if index.is_binary != (bits is not None):
        kind = "codes: use index=binary-flat" if bits is not None else "float descriptors: use index=flat"
        raise ValueError(f"index {index.factory!r} does not fit the model's {kind} or another of that kind")


def _as_ranked(query: Descriptors, gallery: Descriptors, index: FaissIndex) -> tuple[Descriptors, Descriptors]:
    """Query and gallery so that inner products rank as the index's own (decoded) scores do."""
    if index.is_binary:
        return query, gallery
    stored, wanted = _stored(gallery, index), query.vectors
    if index.metric == "l2":
        # -|q - x|^2 orders as q.x - |x|^2 / 2: one more column.
        stored = torch.cat([stored, -0.5 * stored.square().sum(1, keepdim=True)], dim=1)
        wanted = torch.cat([wanted, torch.ones(len(wanted), 1)], dim=1)
    return (
        Descriptors(wanted, query.label, query.index, group=query.group),
        Descriptors(stored, gallery.label, gallery.index, group=gallery.group),
    )


def _stored(gallery: Descriptors, index: FaissIndex) -> Tensor:
    """The gallery's vectors as the index holds them: decoded where it compresses."""
    compresses = not index.is_binary and index.code_bytes < 4 * gallery.vectors.shape[1]
    return index.reconstruct() if compresses else gallery.vectors


def _measure_reranked(
    rerank: Reranker,
    query: Descriptors,
    gallery: Descriptors,
    index: FaissIndex,
    junk: Junk,
    ks: Sequence[int],
    exclude_self: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Full-ranking metrics after re-ranking, float64 (Q,), and the times that it took."""
    start = time.perf_counter()
    ready = rerank.fit(unit_vectors(_stored(gallery, index), gallery.bits))
    fitted = time.perf_counter()
    wanted, ahead = ready.rerank(unit_vectors(query.vectors, query.bits), junk)
    times = {
        "rerank/fit_s": fitted - start,
        "rerank/seconds_per_query": (time.perf_counter() - fitted) / len(query),
    }
    per_query = measure_ranking(
        Descriptors(wanted, query.label, query.index, group=query.group),
        Descriptors(ready.vectors, gallery.label, gallery.index, group=gallery.group),
        ks=ks,
        exclude_self=exclude_self,
        ahead=ahead,
    )
    return {f"rerank/{name}": value for name, value in per_query.items() if name != "relevant"}, times


def _search(index: FaissIndex, query: Descriptors, junk: Junk, k: int) -> tuple[SearchResult, float]:
    """The k best that are not junk, and the seconds that the search took."""
    most = int(torch.bincount(junk.rows).max()) if len(junk.rows) else 0
    start = time.perf_counter()
    found = index.search(query.vectors, min(k + most, len(index)))
    seconds = time.perf_counter() - start
    if most:
        g = len(index)
        keys = torch.arange(len(query))[:, None] * g + found.ids
        bad = torch.isin(keys, junk.rows * g + junk.columns) & (found.ids >= 0)
        order = bad.long().argsort(dim=1, stable=True)[:, :k]
        ids = found.ids.masked_fill(bad, -1).gather(1, order)
        found = SearchResult(ids, found.scores.masked_fill(bad, -torch.inf).gather(1, order))
    return found, seconds


def _measure_found(
    found: SearchResult, query: Descriptors, gallery: Descriptors, relevant: Tensor, ks: Sequence[int]
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
    return {name: value.masked_fill(relevant == 0, torch.nan) for name, value in metrics.items()}


def _index_recall(
    index: FaissIndex, query: Descriptors, gallery: Descriptors, ks: Sequence[int], seed: int
) -> dict[str, float]:
    """Share of the exact k nearest that the index returns, junk and self included, by k."""
    few = np.random.default_rng(seed).permutation(len(query))[:_RECALL_QUERIES]
    wanted = query.vectors[torch.from_numpy(few)]
    k = min(max(ks), len(gallery))
    exact = FaissIndex("BFlat") if index.is_binary else FaissIndex("Flat", metric=index.metric)
    exact.add(gallery.vectors)
    truth, got = exact.search(wanted, k), index.search(wanted, k)
    recall = {}
    for k in sorted({min(k, len(gallery)) for k in ks}):
        if index.is_binary:
            # Distances tie: whatever is as near as the k-th nearest is one of the nearest.
            kept = got.scores[:, :k] >= truth.scores[:, k - 1 : k]
        else:
            kept = (got.ids[:, :k, None] == truth.ids[:, None, :k]).any(2)
        recall[f"index/recall@{k}"] = float(kept.double().mean())
    return recall


def _latency(index: FaissIndex, query: Descriptors, k: int) -> dict[str, float]:
    """Percentiles of the milliseconds that one query alone takes."""
    seconds = []
    for i in range(min(_LATENCY_QUERIES, len(query))):
        start = time.perf_counter()
        index.search(query.vectors[i : i + 1], k)
        seconds.append(time.perf_counter() - start)
    return {f"index/latency_ms_p{p}": 1e3 * float(np.percentile(seconds, p)) for p in (50, 95, 99)}


class RetrievalEvaluation(pl.Callback):
    """Evaluates every validation epoch and at test, and logs on every rank.

    index: the index to fill, fresh each time. ks: the cutoffs. rerank: also measure after re-ranking,
    at test and when only validating, but not in the epochs of a training, which it would slow.

    The outputs of the module's validation and test steps are its embeddings; two loaders, query and
    gallery, come in that order; the DataModule tells the RetrievalTask. Results lie in the run
    directory, written by rank 0: metrics.json by stage, per_query.parquet of the test.
    """

    def __init__(
        self,
        index: FaissIndex,
        ks: Sequence[int] = (1, 10, 100),
        seed: int = 0,
        rerank: Reranker | None = None,
    ) -> None:
        if isinstance(ks, int) or not list(ks) or min(ks) < 1:
            raise ValueError(f"ks must be a list of ranks from 1, such as [1, 10], got {ks}")
        self.index, self.ks, self.seed, self.rerank = index, tuple(ks), seed, rerank
        self.results: dict[str, Evaluation] = {}
        self._metrics: RetrievalMetrics | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _check_kind(self.index, getattr(pl_module, "bits", None))  # before hours of work, not after

    def _start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if trainer.sanity_checking:
            return
        task: RetrievalTask = trainer.datamodule.task(stage)  # type: ignore[attr-defined]
        self._metrics = RetrievalMetrics(self.ks, getattr(module, "bits", None), task.exclude_self).to(module.device)

    def _collect(self, trainer: pl.Trainer, outputs: Any, batch: Any, part: int, stage: str) -> None:
        if self._metrics is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        task: RetrievalTask = data.task(stage)
        rows = batch["index"]
        label = data.collection.column(task.attribute)[rows.cpu()].to(rows.device)
        group = data.collection.column(task.junk)[rows.cpu()].to(rows.device) if task.junk else None
        self._metrics.update("query" if part == 0 else "gallery", outputs, label, rows, group)

    def _finish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self._metrics is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        task: RetrievalTask = data.task(stage)
        with self._metrics.sync_context():
            query, gallery = self._metrics.descriptors("query"), self._metrics.descriptors("gallery")
            health = {f"code/{name}": value for name, value in self._metrics.code_statistics().items()}
        self._metrics = None
        for part, got, expected in (("query", query, task.query), ("gallery", gallery, task.gallery)):
            if not torch.equal(got.index, expected.sort().values):
                raise RuntimeError(
                    f"{len(got)} {part} items were collected, the protocol {task.name} has {len(expected)}: "
                    "a loader left some out or brought others"
                )
        result = evaluate(
            query,
            gallery,
            copy.deepcopy(self.index),
            ks=self.ks,
            exclude_self=task.exclude_self,
            index_order=task.index_order,
            rerank=None if trainer.state.fn == TrainerFn.FITTING else self.rerank,
            seed=self.seed,
        )
        result.metrics.update(health)
        self.results[stage] = result
        prefix = "val" if stage == "validate" else stage
        # Every rank holds all descriptors and so the same values: nothing to reduce.
        module.log_dict({f"{prefix}/{name}": value for name, value in result.metrics.items()}, rank_zero_only=False)
        if trainer.is_global_zero:
            about = {"identity": module.identity(), **module.provenance} if hasattr(module, "provenance") else {}
            write_results(Path(trainer.default_root_dir), prefix, task, result, about)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module, "validate")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch, dataloader_idx, "validate")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module, "validate")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch, dataloader_idx, "test")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module, "test")


def write_results(folder: Path, stage: str, task: RetrievalTask, result: Evaluation, model: Mapping[str, Any]) -> None:
    """Adds the stage to folder/metrics.json; for the test also writes per_query.parquet. Atomic.

    model: plain facts about the model and where its weights are from. A metric without a value is null.
    """
    path = folder / "metrics.json"
    stages = json.loads(path.read_text()) if path.is_file() else {}
    stages[stage] = {
        "protocol": task.name,
        "fingerprint": task.fingerprint,
        "attribute": task.attribute,
        "junk": task.junk,
        "exclude_self": task.exclude_self,
        "model": dict(model),
        "metrics": {name: None if math.isnan(value) else value for name, value in result.metrics.items()},
        "intervals": result.intervals,
    }
    write_json(path, stages)
    if stage == "test":
        columns = {"index": result.query.index.numpy(), "label": result.query.label.numpy()}
        columns |= {name: value.numpy() for name, value in result.per_query.items()}
        meta = {"protocol": task.name, "fingerprint": task.fingerprint, "model": json.dumps(dict(model))}
        with replacing(folder / "per_query.parquet") as temporary:
            pq.write_table(pa.table(columns).replace_schema_metadata(meta), temporary)
