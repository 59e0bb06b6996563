"""The evaluator of benchmarks with easy, hard and junk items, such as Revisited Oxford and Paris."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simsearch.data.revisited import Benchmark, fingerprint, landmarks
from simsearch.evaluation.evaluator import Measured, check_ks, query_units
from simsearch.evaluation.instance import measure_pooled
from simsearch.evaluation.record import plain_metrics
from simsearch.functional.definitions import average_precision_definitions
from simsearch.functional.ranking import Junk
from simsearch.functional.reranking import nearest
from simsearch.functional.revisited import GRADES, SETUPS, measure_revisited
from simsearch.functional.sharded import Sharded
from simsearch.types import Descriptors, RetrievalTask


@dataclass(frozen=True)
class Revisited:
    """Evaluates mAP and mP@k under the setups easy, medium and hard (see `measure_revisited`).

    With `depth`, each setup also has `GAP`, `GAP-`, `microAP` and `mAP@k_minRk` of the first k = `depth` answers, as
    `Instance` defines them: a query that has nothing right under a setup is a distractor of it.

    Attributes:
        benchmark: The benchmark, whose lists say what is right.
        ks: Cutoffs k, 1 or more.
        depth: Number of answers to a query, 1 or more, or None.

    Raises:
        ValueError: If `ks` is not a list of ranks from 1, or `depth` is below 1.
    """

    benchmark: Benchmark
    ks: Sequence[int] = (1, 5, 10)
    depth: int | None = None

    def __post_init__(self) -> None:
        check_ks(self.ks)
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth must be at least 1, or null to measure without, got {self.depth}")

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The metrics of the benchmark, NaN for a setup that has nothing right for any query.

        Args:
            query: Its queries, in one process.
            gallery: Its gallery, in one process.
            task: Its task (`benchmark_task`).
        """
        listed = (self.benchmark.listed(grade) for grade in GRADES)
        vectors, units = (query.whole.vectors, gallery.whole.vectors), query_units(query, task)
        per_query = measure_revisited(*vectors, *listed, ks=self.ks)
        pooled = {setup: self._answers(*vectors, setup) for setup in SETUPS} if self.depth else {}
        for setup, (_, right, relevant) in pooled.items():
            definitions = average_precision_definitions(right, relevant)
            name = f"AP@{right.shape[1]}_minRk"  # of a gallery that holds fewer items, all count
            per_query[f"{setup}/AP@{self.depth}_minRk"] = definitions[name]
        measured = Measured.of(per_query, units, named=_mean_name)
        for setup, answers in pooled.items():
            values, ends = measure_pooled(*answers, units)
            measured.metrics.update({f"{setup}/{name}": value for name, value in values.items()})
            measured.intervals.update({f"{setup}/{name}": interval for name, interval in ends.items()})
        return measured

    def _answers(self, query: Tensor, gallery: Tensor, setup: str) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and correctness of the first answers under a setup, (Q, M), and how many are right at all, (Q,)."""
        positive: list[set[int]] = [set() for _ in query]
        ignored: list[tuple[int, int]] = []
        for grade in GRADES:
            for q, positions in enumerate(self.benchmark.listed(grade)):
                if grade in SETUPS[setup]:
                    positive[q].update(int(position) for position in positions)
                else:
                    ignored += [(q, int(position)) for position in positions]
        pairs = torch.tensor(sorted(ignored), dtype=torch.int64).reshape(-1, 2)
        rows, columns = pairs.T.contiguous()
        found = nearest(query, gallery, self.depth or 1, Junk(rows, columns))
        right = [[item in listed for item in items] for items, listed in zip(found.ids.tolist(), positive, strict=True)]
        return found.scores, torch.tensor(right), torch.tensor([len(listed) for listed in positive])


def stage(task: RetrievalTask, measured: Measured, model: Mapping[str, Any]) -> dict[str, Any]:
    """What metrics.json says of a benchmark: means over queries with a value, None if there are none, and intervals.

    Args:
        task: The task of the benchmark.
        measured: The numbers.
        model: Plain facts about the model and the source of its weights.
    """
    metrics: dict[str, float | None] = plain_metrics(measured.metrics)
    for setup in SETUPS:
        metrics[f"{setup}/queries_without_relevant"] = int(measured.per_query[f"{setup}/AP"].isnan().sum())
    return {
        "protocol": task.name,
        "fingerprint": task.fingerprint,
        "model": dict(model),
        "unit": task.unit,
        "units": len(measured.units.unique()),
        "metrics": metrics,
        "intervals": {name: ends for name, ends in measured.intervals.items() if metrics[name] is not None},
    }


def columns(benchmark: Benchmark, measured: Measured) -> dict[str, Any]:
    """The columns of per_query.parquet: the number and image of each query, its landmark and its values.

    Args:
        benchmark: The benchmark.
        measured: The numbers.
    """
    found: dict[str, Any] = {"query": range(len(benchmark.queries)), "image": [q.image for q in benchmark.queries]}
    found["unit"] = measured.units.numpy()
    return found | {name: values.numpy() for name, values in measured.per_query.items()}


def _mean_name(name: str) -> str:
    """The name of a mean in the papers: easy/P@1 becomes easy/mP@1."""
    setup, _, metric = name.partition("/")
    return f"{setup}/m{metric}"


def benchmark_task(benchmark: Benchmark, root: Path) -> RetrievalTask:
    """The task of a benchmark: its images are rows 0..G-1, its queries the rows after them.

    No attribute says what is relevant, as the lists of the benchmark do. The sampling unit is the landmark.

    Args:
        benchmark: The benchmark.
        root: Folder that the paths are relative to.

    Raises:
        FileNotFoundError: If files are missing. The message names the first.
    """
    images = len(benchmark.images)
    rows = torch.arange(images + len(benchmark.queries))
    return RetrievalTask(
        name=benchmark.name,
        query=rows[images:],
        gallery=rows[:images],
        attribute="",
        junk=None,
        exclude_self=False,
        fingerprint=fingerprint(benchmark, root),
        unit="landmark",
        units=torch.cat([torch.full((images,), -1), landmarks(benchmark)]),  # an image of the gallery has none
    )


def benchmark_sides(query: Tensor, gallery: Tensor, task: RetrievalTask) -> tuple[Sharded, Sharded]:
    """The queries and the gallery of a benchmark as an evaluator takes them, without labels.

    Args:
        query: float32 (Q, D).
        gallery: float32 (G, D).
        task: The task of the benchmark.
    """

    def unlabelled(vectors: Tensor, rows: Tensor) -> Sharded:
        return Sharded.of(Descriptors(vectors, torch.full_like(rows, -1), rows))

    return unlabelled(query, task.query), unlabelled(gallery, task.gallery)
