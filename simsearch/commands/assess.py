"""simsearch assess: measures runs on an art collection with many metrics at once, compared with a baseline."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from simsearch import configs, program, results, saved_run, terminal
from simsearch.data.collection import Collection
from simsearch.data.manifest import read_manifest
from simsearch.data.protocols import Split
from simsearch.evaluation import assessment
from simsearch.evaluation.assessment import Measured
from simsearch.figures import Tile, save_grid, spared
from simsearch.files import write_csv
from simsearch.functional.significance import holm, paired_interval, paired_permutation
from simsearch.search.describe import as_floats, at_most, batches_of
from simsearch.search.describe import describe as images_described
from simsearch.text import cell as shown_cell
from simsearch.text import warn
from simsearch.types import Encoder, RetrievalTask

SHOWN = (("art-artist", "mAP"), ("art-artist", "P@10"), ("art-style", "mAP"), ("art-style", "P@10"))
INSTANCE = (("art-work", "R@1"), ("art-work", "GAP"), ("art-work", "GAP_outside"), ("art-artist", "NDCG@10_graded"))
_EXAMPLES = 5  # queries of a gallery that gain, and as many that lose
AS_LISTS = ("P@10", "coverage", "gini", "long_tail", "diversity", "novelty")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: Name of the run.
        vectors: Descriptors float32 (N, D), or real-valued codes, of all images.
        bits: Number of bits of a code, or None.
        outside: Descriptors of images from elsewhere, or None.
        seconds: Duration of describing, in seconds.
    """

    name: str
    vectors: Tensor
    bits: int | None
    outside: Tensor | None
    seconds: float

    @property
    def bytes_per_item(self) -> int:
        """The size of a descriptor in bytes."""
        return 4 * self.vectors.shape[1] if self.bits is None else -(-self.bits // 8)


@program.command("assess")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch assess`.

    Args:
        config: The config of conf/assess.yaml.

    Raises:
        ValueError: If a value is invalid or the runs do not fit together.
    """
    values = configs.plain(config)
    runs = [saved_run.open_run(Path(run), trusted=configs.trusts(config)) for run in configs.listed(values["runs"])]
    names = configs.listed(values["names"]) if values["names"] else [run.folder.name for run in runs]
    if len(names) != len(runs) or len(set(names)) != len(names):
        raise ValueError(f"names={names}: give a different name for each of the {len(runs)} runs")
    if values["part"] not in ("test", "all"):
        raise ValueError(f"part must be test or all, got {values['part']!r}")
    given = values.get("data") or runs[0].config["data"]
    if values["part"] == "all":
        check_unknown(given, runs)
    rows, collection, tasks = [], None, {}
    for name, run in zip(names, runs, strict=True):
        data = configs.build_data({"data": fitted(given, run.config["data"])}, Everything())
        if collection is None:
            collection = data.collection
            tasks = split(collection, values["protocols"], whole=values["part"] == "all")
        elif data.collection.fingerprint != collection.fingerprint:
            raise ValueError(f"{run.folder} has other data than {runs[0].folder}: give data= to measure all runs on")
        rows.append(describe(name, run, data, values["outside"], values["outside_limit"]))
        gc.collect()  # trainer and model hold each other, and sessions of ONNX Runtime gigabytes
    assert collection is not None

    found = {row.name: measure(row, collection, tasks) for row in rows}
    recommended = recommend(rows, collection, tasks["artist"]) if "artist" in tasks else {}
    out = Path(values["out"])
    write_results(out / "results.csv", rows, found, recommended, values["seed"])
    compared = compare(rows, found)
    write_csv(out / "paired.csv", list(compared[0]) if compared else [], (line.values() for line in compared))
    galleries: list[Path] = []
    with spared():
        galleries = write_galleries(out, rows, found, collection, tasks)
    for title, columns in (("By attribute", SHOWN), ("Same work, open set and graded", INSTANCE)):
        terminal.show(values_table(title, columns, found))
    terminal.show(lists_table(recommended))
    for line in compared:
        print(
            f"{line['row']} - {line['baseline']}, {line['protocol']} mAP: {line['difference']:+.4f} "
            f"({line['low']:+.4f} to {line['high']:+.4f}), p {line['p_holm']:.4f} after Holm, "
            f"by {line['unit']} ({line['units']})"
        )
    print(f"results: {', '.join(map(str, (out / 'results.csv', out / 'paired.csv', *galleries)))}")


def fitted(data: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The data config of the first run, with the image size and fit of another run.

    Args:
        data: The data config of the first run.
        own: The data config of the other run.
    """
    return data | {name: own[name] for name in ("size", "fit") if name in own and name in data}


def check_unknown(data: dict[str, Any], runs: list[saved_run.Run]) -> None:
    """Checks that no run was trained on these data, judged by the data's source.

    Args:
        data: The data config.
        runs: The runs.

    Raises:
        ValueError: If a run was.
    """
    for run in runs:
        own = run.config["data"]
        if all(own.get(name) == data.get(name) for name in ("_target_", "source", "root")):
            raise ValueError(
                f"{run.folder} was trained on a part of these data, but part=all is for a collection that no run "
                "was trained on "
                "(data=art data.source=...)"
            )


@dataclass(frozen=True)
class Everything:
    """A protocol for a whole collection that is only described. Nothing is used for training.

    Attributes:
        name: Name of the protocol.
    """

    name: str = "everything"

    def split(self, collection: Collection) -> Split:
        """The split of a collection, without a training part.

        Args:
            collection: The collection.
        """
        rows, attribute = torch.arange(len(collection)), collection.attributes[0]
        return Split(rows[:0], None, RetrievalTask(self.name, rows, rows, attribute, None, True, ""))


def split(
    collection: Collection, protocols: dict[str, dict[str, Any]], *, whole: bool = False
) -> dict[str, RetrievalTask]:
    """The test tasks for which the collection has the attributes. Other tasks are listed on standard error.

    Args:
        collection: The collection.
        protocols: The protocols' configs, by name.
        whole: Use all images, not only those that the protocols hold out.

    Raises:
        ValueError: If no protocol fits the collection.
    """
    tasks = {}
    for name, node in protocols.items():
        try:
            chosen = node | {"evaluation": 1.0, "validation": None} if whole else node
            tasks[name] = configs.build(chosen).split(collection).test
        except ValueError as error:
            warn(f"left out: {error}")
    if not tasks:
        raise ValueError("none of the protocols fits the collection (see above): set protocols.<name>.attribute")
    return tasks


def describe(name: str, run: saved_run.Run, data: Any, outside: str | None, limit: int) -> Row:
    """Describes a whole collection in row order, and images from elsewhere.

    Args:
        name: Name of the run.
        run: The run.
        data: The DataModule of the collection.
        outside: Folder or table of images from elsewhere, or None.
        limit: Largest number of images from elsewhere.
    """
    model = saved_run.load_model(run)
    one = run.config["trainer"] | {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    trainer = configs.build_trainer({**run.config, "trainer": one, "callbacks": {}}, run.folder, [])
    start = time.perf_counter()
    vectors = torch.cat(trainer.predict(model, data))  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    bits: Any = model.bits
    return Row(name, vectors, bits, describe_files(model.encoder, outside, limit), seconds)


def describe_files(encoder: Encoder, source: str | None, limit: int) -> Tensor | None:
    """The descriptors of at most `limit` image files. None if there is no source.

    Args:
        encoder: The encoder.
        source: A folder or table, or None.
        limit: Largest number of images.

    Raises:
        ValueError: If no image can be read.
    """
    if source is None:
        return None
    batches = batches_of(encoder, read_manifest(Path(source)))
    found = images_described(encoder, at_most(batches, limit))
    if not len(found):
        raise ValueError(f"no image of outside={source} could be read")
    return as_floats(found.vectors, encoder.bits)


def measure(row: Row, collection: Collection, tasks: dict[str, RetrievalTask]) -> list[Measured]:
    """All measurements of a run, except its recommendations.

    Args:
        row: The run.
        collection: The collection.
        tasks: The test tasks by name.
    """
    found = [assessment.measure_task(row.vectors, row.bits, collection, task) for task in tasks.values()]
    if "artist" in tasks:
        found.append(assessment.measure_graded(row.vectors, row.bits, collection, tasks["artist"]))
    if "work" in tasks:
        found.append(assessment.measure_open_set(row.vectors, row.bits, collection, tasks["work"], row.outside))
    return found


def recommend(rows: list[Row], collection: Collection, task: RetrievalTask) -> dict[str, Measured]:
    """Measures lists of ten recommendations, by recommender.

    The recommenders are each run, the last run with diversity or hubness correction, and random and popular choices.

    Args:
        rows: The runs.
        collection: The collection.
        task: The task whose queries are used.
    """
    popularity = assessment.artist_popularity(collection, task)
    space = rows[0].vectors
    made = {row.name: assessment.lists(row.vectors, row.bits, collection, task) for row in rows}
    last = rows[-1]
    for diversity in (0.3, 0.6):
        made[f"{last.name} diversity={diversity}"] = assessment.lists(
            last.vectors, last.bits, collection, task, diversity=diversity
        )
    made[f"{last.name} hubness"] = assessment.lists(last.vectors, last.bits, collection, task, hubness=True)
    made["random"] = assessment.random_lists(collection, task)
    made["popular"] = assessment.popular_lists(collection, task, popularity)
    return {name: assessment.measure_lists(ids, space, collection, task, popularity) for name, ids in made.items()}


def compare(rows: list[Row], found: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """Paired AP differences to the first run, by protocol. p-values are from sign flips of units, adjusted by Holm.

    Args:
        rows: The runs.
        found: The measurements of each run, by its name.
    """
    lines = []
    for row in rows[1:]:
        for ours, base in zip(found[row.name], found[rows[0].name], strict=True):
            if "mAP" not in ours.per_query:
                continue
            a, b = ours.per_query["mAP"], base.per_query["mAP"]
            units = ours.units
            difference, low, high = paired_interval(a, b, units)
            facts: dict[str, Any] = {"row": row.name, "baseline": rows[0].name, "protocol": ours.protocol}
            facts |= {"fingerprint": ours.fingerprint, "difference": difference, "low": low, "high": high}
            both = ~(a - b).isnan()
            facts |= {"p": paired_permutation(a, b, units), "queries": int(both.sum())}
            lines.append(facts | {"unit": ours.unit, "units": len(units[both].unique())})
    adjusted = holm(torch.tensor([line["p"] for line in lines])).tolist() if lines else []
    return [line | {"p_holm": p} for line, p in zip(lines, adjusted, strict=True)]


def write_galleries(
    out: Path,
    rows: list[Row],
    found: dict[str, list[Measured]],
    collection: Collection,
    tasks: dict[str, RetrievalTask],
) -> list[Path]:
    """Writes gallery-<protocol>.png, with the results of each run for some queries, and returns the files.

    The queries are those that gain and lose most from the first run to the last.

    Args:
        out: Folder to write to.
        rows: The runs.
        found: The measurements of each run, by its name.
        collection: The collection.
        tasks: The test tasks by name.
    """
    if len(rows) < 2:
        return []
    ends, paths = (rows[0], rows[-1]), []
    for task in tasks.values():
        precision = [
            next(m for m in found[row.name] if m.protocol == task.name and "mAP" in m.per_query).per_query["mAP"]
            for row in ends
        ]
        places = assessment.most_changed(precision[1], precision[0], _EXAMPLES)
        some = replace(task, query=task.query[places])
        lists = [assessment.lists(row.vectors, row.bits, collection, some) for row in ends]
        tiles = [
            answer(collection, some, place, ids[place], f"AP {ap[places[place]]:.2f} {row.name}")
            for place in range(len(places))
            for row, ids, ap in zip(ends, lists, precision, strict=True)
        ]
        paths.append(out / f"gallery-{task.name}.png")
        title = f"{task.name}: what gains and loses most from {ends[0].name} to {ends[1].name}"
        save_grid(paths[-1], tiles, title=title)
    return paths


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


def write_results(
    path: Path, rows: list[Row], found: dict[str, list[Measured]], recommended: dict[str, Measured], seed: int
) -> None:
    """Writes one measured value per line, in the columns of a study's results.csv.

    Args:
        path: The file to write.
        rows: The runs.
        found: The measurements of each run, by its name.
        recommended: The measurements of the recommendations.
        seed: The seed.
    """
    lines: list[list[Any]] = []

    def add(name: str, measured: Measured, prefix: str, size: int | str, seconds: float | str) -> None:
        for metric, value in measured.values.items():
            over = (measured.unit, len(measured.units.unique()))
            ends = (*measured.intervals[metric], *over) if metric in measured.intervals else [""] * 4
            head = [name, "art", measured.protocol, measured.fingerprint, prefix + metric, value, *ends]
            lines.append([*head, len(measured.index), size, seconds, seed, "simsearch assess"])

    for row in rows:
        for measured in found[row.name]:
            add(row.name, measured, "", row.bytes_per_item, round(row.seconds, 1))
    for name, measured in recommended.items():
        add(name, measured, "lists/", "", "")
    write_csv(path, results.RESULT_COLUMNS, lines)


def values_table(title: str, columns: tuple[tuple[str, str], ...], found: dict[str, list[Measured]]) -> Table:
    """A table of some metrics of each run, with their intervals.

    Args:
        title: Title of the table.
        columns: Pairs of metric and column title.
        found: The measurements of each run, by its name.
    """
    table = Table(title=f"{title} (95% intervals by sampling unit)", title_justify="left")
    table.add_column("run", overflow="fold")
    counted = {m.protocol: f"{m.unit}: {len(m.units.unique())}" for ms in found.values() for m in ms if m.intervals}
    for protocol, metric in columns:
        table.add_column(f"{protocol}\n{metric}\n{counted.get(protocol, '')}", justify="right")
    for name, all_measured in found.items():
        cells = [shown_cell(name)]
        for protocol, metric in columns:
            holds = [m for m in all_measured if m.protocol == protocol and metric in m.values]
            cells.append(cell(holds[0], metric) if holds else "-")
        table.add_row(*cells)
    return table


def cell(measured: Measured, metric: str) -> str:
    """A value, with its interval below it.

    Args:
        measured: The measurement.
        metric: Name of the metric.
    """
    text = f"{measured.values[metric]:.4f}"
    if metric in measured.intervals:
        low, high = measured.intervals[metric]
        text += f"\n[dim]{low:.4f}-{high:.4f}[/dim]"
    return text


def lists_table(recommended: dict[str, Measured]) -> Table:
    """A table on lists of ten recommendations: accuracy, coverage of the collection, diversity and novelty.

    Args:
        recommended: The measurements by recommender.
    """
    table = Table(title="As a recommender: ten works per query, by artist", title_justify="left")
    table.add_column("lists", overflow="fold")
    for metric in AS_LISTS:
        table.add_column(metric, justify="right")
    for name, measured in recommended.items():
        table.add_row(shown_cell(name), *(f"{measured.values[metric]:.4f}" for metric in AS_LISTS))
    return table


if __name__ == "__main__":
    main()
