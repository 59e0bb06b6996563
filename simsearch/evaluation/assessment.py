"""The assessment of an art collection: several runs, measured by all evaluators under all tasks, and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simsearch.data.collection import Collection
from simsearch.evaluation.evaluator import Evaluator, Measured, sides
from simsearch.evaluation.ndcg import GradedNDCG, column_or_unknown
from simsearch.evaluation.open_set import OpenSet
from simsearch.evaluation.ranking import FullRanking
from simsearch.evaluation.recommendation import Recommend, Recommendations, nearest_lists, popular_lists, random_lists
from simsearch.evaluation.verification import Verified
from simsearch.figures import Tile, save_grid
from simsearch.functional.significance import holm, paired_interval, paired_permutation
from simsearch.text import warn
from simsearch.types import RetrievalTask

_EXAMPLES = 5  # queries of a gallery that gain, and as many that lose


@dataclass(frozen=True)
class Assessed:
    """One run, and its descriptors of a whole collection.

    Attributes:
        name: Name of the run.
        vectors: Descriptors float32 (N, D), or real-valued codes, of all images.
        bits: Number of bits of a code, or None.
        outside: Descriptors of images from elsewhere, or None.
        seconds: Duration of describing, in seconds.
        trained: int64 (n,), the rows of the collection that it was trained on, or None if it was trained on others.
    """

    name: str
    vectors: Tensor
    bits: int | None
    outside: Tensor | None
    seconds: float
    trained: Tensor | None = None

    @property
    def bytes_per_item(self) -> int:
        """The size of a descriptor in bytes."""
        return 4 * self.vectors.shape[1] if self.bits is None else -(-self.bits // 8)


@dataclass(frozen=True)
class Finding:
    """What one evaluator measured of one run under one task.

    Attributes:
        task: The task.
        measured: The numbers.
    """

    task: RetrievalTask
    measured: Measured


def measure(
    run: Assessed,
    collection: Collection,
    tasks: Mapping[str, RetrievalTask],
    further: Mapping[str, Evaluator] | None = None,
    verified: Verified | None = None,
) -> list[Finding]:
    """All findings of a run, except its recommendations.

    What a task's evaluators measured already, further ones do not add again: a line on standard error says so.

    Args:
        run: The run.
        collection: The collection.
        tasks: The test tasks by name: `artist` is also measured with grades, `work` as an open set.
        further: Evaluators that measure each task too, by any names.
        verified: The measure of verified rankings, of the task `work`, or None.
    """
    planned: list[tuple[Evaluator, RetrievalTask]] = [(FullRanking(), task) for task in tasks.values()]
    if "artist" in tasks:
        planned.append((GradedNDCG(collection), tasks["artist"]))
    if "work" in tasks:
        planned.append((OpenSet(run.outside), tasks["work"]))
        planned += [] if verified is None else [(verified, tasks["work"])]
    found = [Finding(task, run_evaluator(evaluator, run, collection, task)) for evaluator, task in planned]
    for name, evaluator in (further or {}).items():
        for task in tasks.values():
            before = [finding.measured for finding in found if finding.task is task]
            measured = run_evaluator(evaluator, run, collection, task)
            if taken := sorted({*measured.metrics} & {metric for one in before for metric in one.metrics}):
                warn(f"evaluators.{name} of {run.name}: {task.name} has {', '.join(taken)} already, left out")
            found.append(Finding(task, without_known(measured, before)))
    return found


def without_known(measured: Measured, before: Sequence[Measured]) -> Measured:
    """The numbers of an evaluator whose names no earlier one has used.

    Args:
        measured: The numbers.
        before: The earlier numbers of the same task.
    """
    names = {name for one in before for name in (*one.metrics, *one.per_query)}

    def new(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in names}

    return replace(
        measured,
        metrics=new(measured.metrics),
        intervals=new(measured.intervals),
        per_query=new(measured.per_query),
    )


def trained_queries(trained: Tensor | None, task: RetrievalTask) -> int | None:
    """The number of queries of a task that were trained on, None if `trained` is.

    Args:
        trained: int64 (n,), the rows that were trained on, or None.
        task: The task.
    """
    return None if trained is None else int(torch.isin(task.query, trained).sum())


def run_evaluator(evaluator: Evaluator, run: Assessed, collection: Collection, task: RetrievalTask) -> Measured:
    """What an evaluator measures of a run under a task.

    Args:
        evaluator: The evaluator.
        run: The run.
        collection: The collection.
        task: The task.
    """
    return evaluator(*sides(run.vectors, run.bits, collection, task), task)


def recommend(
    runs: Sequence[Assessed], collection: Collection, task: RetrievalTask, seed: int = 0
) -> dict[str, Finding]:
    """Measures lists of ten recommendations, by recommender.

    The recommenders are each run, the last run with diversity or hubness correction, and random and popular choices.

    Args:
        runs: The runs.
        collection: The collection.
        task: The task whose queries are used.
        seed: Seed of the random choices.
    """
    popularity = artist_popularity(collection, task)
    last = runs[-1]
    made: dict[str, tuple[Assessed, Recommend]] = {run.name: (run, nearest_lists) for run in runs}
    for diversity in (0.3, 0.6):
        made[f"{last.name} diversity={diversity}"] = last, partial(nearest_lists, diversity=diversity)
    made[f"{last.name} hubness"] = last, partial(nearest_lists, hubness=True)
    made["random"] = last, partial(random_lists, items=len(collection), seed=seed)
    made["popular"] = last, partial(popular_lists, popularity=popularity)
    found = {}
    for name, (run, way) in made.items():
        evaluator = Recommendations(way, space=runs[0].vectors, popularity=popularity)
        found[name] = Finding(task, run_evaluator(evaluator, run, collection, task))
    return found


def artist_popularity(collection: Collection, task: RetrievalTask) -> Tensor:
    """The number of gallery images by the artist of each gallery image, int64 (G,); 1 where the artist is unknown.

    Args:
        collection: The collection.
        task: The task.
    """
    artist = column_or_unknown(collection, "artist")[task.gallery]
    names, place, counts = artist.unique(return_inverse=True, return_counts=True)
    return torch.where(names[place] < 0, 1, counts[place])


def compare(found: Mapping[str, Sequence[Finding]]) -> list[dict[str, Any]]:
    """Paired AP differences to the first run, by protocol. p-values are from sign flips of units, adjusted by Holm.

    Args:
        found: The findings of each run, by its name.
    """
    (baseline, of_baseline), *others = found.items()
    lines = []
    for name, of_run in others:
        for ours, base in zip(of_run, of_baseline, strict=True):
            if "AP" not in ours.measured.per_query:
                continue
            a, b = ours.measured.per_query["AP"], base.measured.per_query["AP"]
            task, units = ours.task, ours.measured.units
            difference, low, high = paired_interval(a, b, units)
            facts: dict[str, Any] = {"row": name, "baseline": baseline, "protocol": task.name}
            facts |= {"fingerprint": task.fingerprint, "difference": difference, "low": low, "high": high}
            both = ~(a - b).isnan()
            facts |= {"p": paired_permutation(a, b, units), "queries": int(both.sum())}
            lines.append(facts | {"unit": task.unit, "units": len(units[both].unique())})
    adjusted = holm(torch.tensor([line["p"] for line in lines], dtype=torch.float64)).tolist() if lines else []
    return [line | {"p_holm": p} for line, p in zip(lines, adjusted, strict=True)]


def result_lines(
    runs: Sequence[Assessed],
    found: Mapping[str, Sequence[Finding]],
    recommended: Mapping[str, Finding],
    seed: int,
) -> list[list[Any]]:
    """One measured value per line, in the columns of a study's results.csv and `trained_queries` (empty for lists).

    Args:
        runs: The runs.
        found: The findings of each run, by its name.
        recommended: The findings of the recommendations.
        seed: The seed.
    """
    lines: list[list[Any]] = []

    def add(name: str, finding: Finding, prefix: str, size: int | str, seconds: float | str, trained: Any) -> None:
        task, measured = finding.task, finding.measured
        for metric, value in measured.metrics.items():
            over = (task.unit, len(measured.units.unique()))
            ends = (*measured.intervals[metric], *over) if metric in measured.intervals else [""] * 4
            head = [name, "art", task.name, task.fingerprint, prefix + metric, value, *ends]
            lines.append([*head, len(measured.units), size, seconds, seed, "simsearch assess", trained])

    for run in runs:
        for finding in found[run.name]:
            trained = trained_queries(run.trained, finding.task)
            add(run.name, finding, "", run.bytes_per_item, round(run.seconds, 1), trained)
    for name, finding in recommended.items():
        add(name, finding, "lists/", "", "", None)
    return lines


# ------------------------------------------------------------------------------------------------- pictures


def write_galleries(
    out: Path,
    runs: Sequence[Assessed],
    found: Mapping[str, Sequence[Finding]],
    collection: Collection,
    tasks: Mapping[str, RetrievalTask],
) -> list[Path]:
    """Writes gallery-<protocol>.png, with the results of each run for some queries, and returns the files.

    The queries are those that gain and lose most from the first run to the last.

    Args:
        out: Folder to write to.
        runs: The runs.
        found: The findings of each run, by its name.
        collection: The collection.
        tasks: The test tasks by name.
    """
    if len(runs) < 2:
        return []
    ends, paths = (runs[0], runs[-1]), []
    for task in tasks.values():
        precision = [
            next(f.measured.per_query["AP"] for f in found[run.name] if f.task is task and "AP" in f.measured.per_query)
            for run in ends
        ]
        places = most_changed(precision[1], precision[0], _EXAMPLES)
        some = replace(task, query=task.query[places])
        lists = []
        for run in ends:
            query, gallery = sides(run.vectors, run.bits, collection, some)
            lists.append(nearest_lists(query.whole, gallery.whole, some))
        tiles = [
            answer(collection, some, place, ids[place], f"AP {ap[places[place]]:.2f} {run.name}")
            for place in range(len(places))
            for run, ids, ap in zip(ends, lists, precision, strict=True)
        ]
        paths.append(out / f"gallery-{task.name}.png")
        title = f"{task.name}: what gains and loses most from {ends[0].name} to {ends[1].name}"
        save_grid(paths[-1], tiles, title=title)
    return paths


def most_changed(ours: Tensor, theirs: Tensor, count: int) -> Tensor:
    """The positions of the queries that gain most and that lose most, int64 (2 * count or fewer,), from gain to loss.

    Args:
        ours: Floating point (Q,), average precision, NaN where a query has none.
        theirs: Floating point (Q,), average precision of another system for the same queries.
        count: Number of queries at each end.
    """
    change = ours - theirs
    known = change.isnan().logical_not().nonzero()[:, 0]
    order = known[change[known].argsort(descending=True, stable=True)]
    return order if len(order) <= 2 * count else torch.cat([order[:count], order[-count:]])


def answer(collection: Collection, task: RetrievalTask, place: int, ids: Tensor, caption: str) -> list[Tile]:
    """A query of a task and its recommendations as one row of a picture.

    Args:
        collection: The collection.
        task: The task.
        place: Position of the query in the task.
        ids: int64 (K,), gallery positions of the recommendations.
        caption: Text below the query.
    """
    labels = collection.column(task.attribute)
    names = collection.classes[collection.attributes.index(task.attribute)]
    query = int(task.query[place])
    tiles = [Tile(collection.images[query], caption)]
    for row in task.gallery[ids[ids >= 0]].tolist():
        label = int(labels[row])
        said = names[label] if label >= 0 else "unknown"
        tiles.append(Tile(collection.images[row], said, label == int(labels[query]) and label >= 0))
    return tiles
