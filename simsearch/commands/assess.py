"""simsearch assess: measures runs on an art collection with many metrics at once, compared with a baseline."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from simsearch import configs, launch, program, results, saved_run, terminal
from simsearch.commands.evaluate import trained_rows, trainings
from simsearch.data.collection import Collection
from simsearch.data.manifest import Manifest
from simsearch.data.protocols import Everything
from simsearch.evaluation import assessment
from simsearch.evaluation.assessment import Assessed, Finding
from simsearch.evaluation.evaluator import Measured
from simsearch.evaluation.verification import Verified
from simsearch.figures import spared
from simsearch.files import check_writable, write_csv
from simsearch.search.calibration_sample import outside_sample
from simsearch.search.describe import as_floats, batches_of
from simsearch.search.describe import describe as describe_batches
from simsearch.text import cell as shown_cell
from simsearch.text import warn
from simsearch.types import RetrievalTask

SHOWN = (("art-artist", "mAP"), ("art-artist", "P@10"), ("art-style", "mAP"), ("art-style", "P@10"))
INSTANCE = (("art-work", "R@1"), ("art-work", "GAP"), ("art-work", "GAP_outside"), ("art-artist", "NDCG@10_graded"))
VERIFIED = tuple(("art-work", f"verify/{name}") for name in ("R@1", "mAP", "mAP_p", "GAP_without", "GAP", "microAP"))
AS_LISTS = ("P@10", "coverage", "gini", "long_tail", "diversity", "novelty")


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
    further = {name: configs.build(node) for name, node in (values.get("evaluators") or {}).items()}
    verifier = configs.build(values["verify"]) if values.get("verify") else None
    outside = None
    if values["outside"]:
        outside = outside_sample(Path(values["outside"]), values["outside_limit"], values["seed"])
    check_writable(out := Path(values["out"]), "out")
    described, collection, tasks, verified = [], None, {}, None
    for name, run in zip(names, runs, strict=True):
        node = fitted(given, run.config["data"])
        data = configs.build_data({"data": node}, Everything())
        if collection is None:
            collection = data.collection
            tasks = split(collection, values["protocols"], whole=values["part"] == "all")
            if verifier is not None:
                if "work" not in tasks:
                    raise ValueError("verify= measures the protocol work, which does not fit the collection")
                verified = Verified(verifier, collection.images, workers=data.num_workers)
        elif data.collection.fingerprint != collection.fingerprint:
            raise ValueError(f"{run.folder} has other data than {runs[0].folder}: give data= to measure all runs on")
        trained = trained_rows(run, run.config | {"data": node}, collection)
        note_trained_queries(name, trained, tasks.values())
        described.append(replace(describe(name, run, data, outside), trained=trained))
        gc.collect()  # trainer and model hold each other, and sessions of ONNX Runtime gigabytes
    assert collection is not None

    found = {run.name: assessment.measure(run, collection, tasks, further, verified) for run in described}
    recommended = {}
    if "artist" in tasks:
        recommended = assessment.recommend(described, collection, tasks["artist"], values["seed"])
    compared = assessment.compare(found)
    lines = assessment.result_lines(described, found, recommended, values["seed"])
    write_csv(out / "results.csv", (*results.RESULT_COLUMNS, "trained_queries"), lines)
    write_csv(out / "paired.csv", list(compared[0]) if compared else [], (line.values() for line in compared))
    galleries: list[Path] = []
    with spared():
        galleries = assessment.write_galleries(out, described, found, collection, tasks)
    show(found, recommended, compared)
    print(f"results: {', '.join(map(str, (out / 'results.csv', out / 'paired.csv', *galleries)))}")


def show(
    found: Mapping[str, Sequence[Finding]], recommended: Mapping[str, Finding], compared: Sequence[Mapping[str, Any]]
) -> None:
    """Prints the tables, and a line for each comparison with the baseline.

    Args:
        found: The findings of each run, by its name.
        recommended: The findings of the recommendations.
        compared: The comparisons.
    """
    for title, columns in (("By attribute", SHOWN), ("Same work, open set and graded", INSTANCE)):
        terminal.show(values_table(title, columns, found))
    if any(name.startswith("verify/") for findings in found.values() for f in findings for name in f.measured.metrics):
        terminal.show(values_table("Same work, the best items verified by geometry", VERIFIED, found))
    terminal.show(lists_table(recommended))
    for line in compared:
        print(
            f"{line['row']} - {line['baseline']}, {line['protocol']} mAP: {line['difference']:+.4f} "
            f"({line['low']:+.4f} to {line['high']:+.4f}), p {line['p_holm']:.4f} after Holm, "
            f"by {line['unit']} ({line['units']})"
        )


def fitted(data: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The data config of the first run, with the image size and fit of another run.

    Args:
        data: The data config of the first run.
        own: The data config of the other run.
    """
    return data | {name: own[name] for name in ("size", "fit") if name in own and name in data}


def check_unknown(data: dict[str, Any], runs: list[saved_run.Run]) -> None:
    """Checks that no run, and none that it starts from, was trained on these data, judged by their source.

    Args:
        data: The data config.
        runs: The runs.

    Raises:
        ValueError: If a run was.
    """
    for run in runs:
        if any(_origin(training["data"]) == _origin(data) for training in trainings(run)):
            raise ValueError(
                f"{run.folder}, or a run that it starts from, was trained on a part of these data, but part=all is for "
                "a collection that no run was trained on (data=art data.source=...)"
            )


def _origin(data: Mapping[str, Any]) -> tuple[Any, Path | None]:
    """What reads the data, and from where."""
    source = data.get("source")
    return data.get("_target_"), None if source is None else Path(source).expanduser().resolve()


def note_trained_queries(name: str, trained: Tensor | None, tasks: Iterable[RetrievalTask]) -> None:
    """Says on standard error how many queries of each task a run was trained on, if any.

    Args:
        name: Name of the run.
        trained: int64 (n,), the rows that it was trained on, or None.
        tasks: The tasks.
    """
    for task in tasks:
        if count := assessment.trained_queries(trained, task):
            warn(
                f"note: {count} of {len(task.query)} queries of {task.name} were in the training of {name}: the "
                "numbers are not those of new images"
            )


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


def describe(name: str, run: saved_run.Run, data: Any, outside: Manifest | None) -> Assessed:
    """Describes a whole collection in row order, and images from elsewhere.

    Args:
        name: Name of the run.
        run: The run.
        data: The DataModule of the collection.
        outside: Images from elsewhere, or None.

    Raises:
        ValueError: If no image from elsewhere can be read.
    """
    model = saved_run.load_model(run)
    one = launch.of_one_process(run.config["trainer"])
    trainer = configs.build_trainer({**run.config, "trainer": one, "callbacks": {}}, run.folder, [])
    start = time.perf_counter()
    vectors = torch.cat(trainer.predict(model, data))  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    bits: Any = model.bits
    outer = None
    if outside is not None:
        found = describe_batches(model.encoder, batches_of(model.encoder, outside))
        if not len(found):
            raise ValueError(f"no image of outside={outside.root} could be read")
        outer = as_floats(found.vectors, model.encoder.bits)
    return Assessed(name, vectors, bits, outer, seconds)


def values_table(title: str, columns: tuple[tuple[str, str], ...], found: Mapping[str, Sequence[Finding]]) -> Table:
    """A table of some metrics of each run, with their intervals.

    Args:
        title: Title of the table.
        columns: Pairs of protocol and metric.
        found: The findings of each run, by its name.
    """
    table = Table(title=f"{title} (95% intervals by sampling unit)", title_justify="left")
    table.add_column("run", overflow="fold")
    every = [finding for findings in found.values() for finding in findings]
    counted = {f.task.name: f"{f.task.unit}: {len(f.measured.units.unique())}" for f in every if f.measured.intervals}
    for protocol, metric in columns:
        table.add_column(f"{protocol}\n{metric}\n{counted.get(protocol, '')}", justify="right")
    for name, findings in found.items():
        cells = [shown_cell(name)]
        for protocol, metric in columns:
            holds = [f.measured for f in findings if f.task.name == protocol and metric in f.measured.metrics]
            cells.append(cell(holds[0], metric) if holds else "-")
        table.add_row(*cells)
    return table


def cell(measured: Measured, metric: str) -> str:
    """A value, with its interval below it.

    Args:
        measured: The numbers.
        metric: Name of the metric.
    """
    text = f"{measured.metrics[metric]:.4f}"
    if metric in measured.intervals:
        low, high = measured.intervals[metric]
        text += f"\n[dim]{low:.4f}-{high:.4f}[/dim]"
    return text


def lists_table(recommended: Mapping[str, Finding]) -> Table:
    """A table on lists of ten recommendations: accuracy, coverage of the collection, diversity and novelty.

    Args:
        recommended: The findings by recommender.
    """
    table = Table(title="As a recommender: ten works per query, by artist", title_justify="left")
    table.add_column("lists", overflow="fold")
    for metric in AS_LISTS:
        table.add_column(metric, justify="right")
    for name, finding in recommended.items():
        table.add_row(shown_cell(name), *(f"{finding.measured.metrics[metric]:.4f}" for metric in AS_LISTS))
    return table


if __name__ == "__main__":
    main()
