"""simsearch reproduce: a study's rows trained and measured anew, beside the values that the study states."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from omegaconf import DictConfig
from rich.table import Table

from simsearch import runtime
from simsearch.data.cifar10 import DataError
from simsearch.models.backbones import WeightsError

REPRODUCED, GAP, NOT_RUNNABLE = "reproduced", "gap", "not runnable here"

# What of a config decides the numbers; the other groups only fill these in.
_DECIDING = ("seed", "data", "protocol", "model", "trainer", "callbacks")
_IDLE = {
    "data": ("root", "cache", "download", "num_workers"),
    "model": ("start",),
    "trainer": (
        *("log_every_n_steps", "enable_model_summary", "enable_progress_bar"),
        *("num_nodes", "strategy", "use_distributed_sampler"),
    ),
    # Pictures, logging and resuming; a callback that is not listed counts.
    "callbacks": (
        *("neighbours", "precision_recall", "progress", "throughput", "learning_rate"),
        *("sigterm", "last", "epochs"),
    ),
}
_CHOOSES = ("monitor", "mode")  # of a ModelCheckpoint: which checkpoint is tested


@runtime.command("reproduce")
def main(config: DictConfig) -> None:
    values = runtime.plain(config)
    book = read_rows(row_files(values["rows"]))
    root = Path(values["run_root"]).expanduser().resolve()
    if values["list"]:
        runtime.show(list_table(book, finished_runs(root)))
        return
    names = list(book) if values["row"] == "all" else [values["row"]]
    check_names(names, book)
    outcomes = []
    for name in names:
        seeds = values["seeds"] or book[name].seeds[:1]
        outcome = reproduce(book, name, seeds, root, budget=values["budget"], reuse=values["reuse"])
        print(f"{name}: {outcome.verdict}{f': {outcome.reason}' if outcome.reason else ''}", file=sys.stderr)
        outcomes.append(outcome)
    runtime.show(outcome_table(outcomes))
    raise SystemExit(exit_status(outcomes))


# ------------------------------------------------------------------------------------- the rows' file


@dataclass(frozen=True)
class Expected:
    """A stated value and how far from it a new measurement may lie, both in units of the metric."""

    value: float
    tolerance: float

    @classmethod
    def of(cls, text: str) -> Expected:
        """`0.61 ± 0.01` (or `0.61 +- 0.01`) as a value. Raises ValueError for other text."""
        number = r"(-?\d*\.?\d+(?:[eE][-+]?\d+)?)"
        match = re.fullmatch(rf"{number}\s*(?:±|\+-)\s*{number}", str(text).strip())
        if not match or float(match[2]) < 0:
            raise ValueError(f"{text!r} is no expected value: write `0.61 ± 0.01`, or null until it is known")
        return cls(float(match[1]), float(match[2]))


@dataclass(frozen=True)
class Row:
    """One row of a study: what trains, what it starts from, what is measured and expected.

    name: family-variant-size. what: one line for a reader. train: overrides of `simsearch train`. start:
    the row whose run `model.start` names, or None. seeds: those that the study ran. minutes: of one
    training on two cores. expect: measurement -> metric -> Expected, or None where nothing is known yet. A
    measurement is a protocol's name as reports print it, perhaps with overrides of `simsearch evaluate`:
    `10k-50k rerank=aqe`. fingerprints: protocol -> fingerprint of the data that the values belong to.
    """

    name: str
    what: str
    train: tuple[str, ...]
    start: str | None
    seeds: tuple[int, ...]
    minutes: float
    expect: dict[str, dict[str, Expected | None]]
    fingerprints: dict[str, str]

    @classmethod
    def of(cls, name: str, fields: Mapping[str, Any], fingerprints: Mapping[str, str]) -> Row:
        """The row that a file's mapping describes. Raises ValueError naming the row and the key."""
        required, optional = {"what", "train", "minutes", "expect"}, {"start", "seeds"}
        if missing := sorted(required - set(fields)):
            raise ValueError(f"row {name} lacks {', '.join(missing)}")
        if unknown := sorted(set(fields) - required - optional):
            raise ValueError(f"row {name} has unknown keys {', '.join(unknown)}: choose from {required | optional}")
        if not fields["expect"]:
            raise ValueError(f"row {name} expects nothing: name a protocol and a metric, the value may be null")
        return cls(
            name=name,
            what=fields["what"],
            train=tuple(shlex.split(fields["train"])),
            start=fields.get("start"),
            seeds=tuple(fields.get("seeds", (0,))),
            minutes=float(fields["minutes"]),
            expect={
                measurement: {metric: None if text is None else Expected.of(text) for metric, text in metrics.items()}
                for measurement, metrics in fields["expect"].items()
            },
            fingerprints=dict(fingerprints),
        )


def row_files(given: str | None) -> list[Path]:
    """The files that hold rows: the one given, or those of all studies. Raises ValueError where there is none."""
    if given is not None:
        return [Path(given).expanduser()]
    studies = Path(runtime.CONF).parent / "experiments"
    files = sorted(studies.glob("*/rows.yaml"))
    if not files:
        raise ValueError(f"no study in {studies} has a rows.yaml: name one with rows=<file>")
    return files


def read_rows(files: Iterable[Path]) -> dict[str, Row]:
    """All rows by name, in the files' order. Raises ValueError for a damaged file and what does not fit together."""
    book: dict[str, Row] = {}
    for path in files:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            rows, fingerprints = content["rows"], content.get("fingerprints") or {}
            parsed = {name: Row.of(name, fields, fingerprints) for name, fields in rows.items()}
        except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no file of rows: {error}") from error
        if twice := [name for name in parsed if name in book]:
            raise ValueError(f"{path} has rows of another file again: {', '.join(twice)}; name one with rows=<file>")
        book |= parsed
    for row in book.values():
        chain = [row.name]
        while (start := book[chain[-1]].start) is not None:
            if start not in book:
                raise ValueError(f"row {chain[-1]} starts from {start}, which is no row")
            if start in chain:
                raise ValueError(f"row {start} starts from itself: {' <- '.join([*chain, start])}")
            chain.append(start)
    return book


def check_names(names: Iterable[str | None], book: Mapping[str, Row]) -> None:
    """Raises ValueError for a name that is no row's."""
    for name in names:
        if name not in book:
            wrong = "which row? row=<name>" if name is None else f"there is no row {name!r}"
            raise ValueError(f"{wrong}; there are {', '.join(book)}, and row=all; list=true says more")


# ------------------------------------------------------------------- configs, and runs of equal config


@cache
def compose(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The plain config of `simsearch train` with these overrides, shared by all callers.

    Raises ValueError where they do not compose.
    """
    try:
        return runtime.plain(runtime.hydra.compose("train", ["run_dir=unused", *overrides]))
    except runtime.hydra.errors.HydraException as error:
        raise ValueError(f"`simsearch train {' '.join(overrides)}`: {error}") from error


def train_overrides(book: Mapping[str, Row], name: str, seed: int, start: Path | None) -> tuple[str, ...]:
    """What `simsearch train` is given for a row and a seed, whose start row's run lies in `start`."""
    row = book[name]
    begin = [] if row.start is None else [override("model.start", start)]
    return (*row.train, f"seed={seed}", *begin, "catalog.write=false")


def override(key: str, value: object) -> str:
    """An override whose value Hydra takes as it is, whatever characters it has."""
    text = str(value)
    if re.fullmatch(r"[\w./@+-]+", text):
        return f"{key}={text}"
    escaped = text.replace("'", "\\'")
    return f"{key}='{escaped}'"


def start_seed(book: Mapping[str, Row], name: str, seed: int) -> int:
    """The seed of the run that a row's training starts from: the same, or the start row's first."""
    seeds = book[book[name].start].seeds  # type: ignore[index]
    return seed if seed in seeds else seeds[0]


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's config decides its numbers.

    Left out are places, reports, and values that are the constructor's own defaults, so that a config from
    before an option came still equals one with the option at its default. A run that training starts
    from counts by its own config.
    """
    kept = {}
    for group in _DECIDING:
        node = config[group]
        if isinstance(node, Mapping):
            node = {key: value for key, value in node.items() if key not in _IDLE.get(group, ())}
        kept[group] = _without_defaults(node)
    checkpoint = kept["callbacks"].get("checkpoint") or {}
    kept["callbacks"]["checkpoint"] = {key: checkpoint[key] for key in _CHOOSES if key in checkpoint}
    if config["protocol"].get("validation") is None:
        kept["callbacks"].pop("last_validation", None)  # there is none
    start = config["model"].get("start")
    if start is not None:
        path = Path(start)
        folder = path if path.is_dir() else path.parent.parent
        there = (folder / "config.yaml").is_file()
        kept["model"]["start"] = digest(runtime.open_run(folder).config) if there else str(path)
    return kept


def _without_defaults(node: Any) -> Any:
    if isinstance(node, Mapping):
        target = node.get("_target_")
        defaults = _defaults(target) if isinstance(target, str) else {}
        return {
            key: _without_defaults(value)
            for key, value in node.items()
            if (key not in defaults or isinstance(value, Mapping) or value != defaults[key])
            and not (key == "root" and target == "simsearch.cache.ArrayCache")
        }
    return [_without_defaults(value) for value in node] if isinstance(node, list) else node


def _defaults(target: str) -> dict[str, Any]:
    """The default values of a function's or constructor's arguments; tuples as the lists of a config."""
    module, _, name = target.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return {}
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def digest(config: Mapping[str, Any]) -> str:
    """16 hex digits over what decides a run's numbers."""
    text = json.dumps(comparable(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished_runs(root: Path) -> dict[str, runtime.Run]:
    """Digest -> run, of the runs in `root` that were trained and tested."""
    runs = {}
    for path in sorted(root.glob("*/config.yaml")):
        try:
            if is_finished(path.parent):
                run = runtime.open_run(path.parent)
                runs.setdefault(digest(run.config), run)
        except (ValueError, LookupError, AttributeError):
            continue  # damaged, or of a time when configs were others: no row's run
    return runs


def is_finished(folder: Path) -> bool:
    """Whether a run directory has its checkpoint and its test results."""
    path = folder / "metrics.json"
    return (folder / "checkpoints" / "best.ckpt").is_file() and path.is_file() and "test" in _read_json(path)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def find_run(
    book: Mapping[str, Row], name: str, seed: int, runs: Mapping[str, runtime.Run]
) -> tuple[runtime.Run | None, dict[str, Any] | None]:
    """The finished run of a row and seed, or None, and the row's config; that is None, too, while its start row has
    no finished run."""
    start = None
    if book[name].start is not None:
        begun, _ = find_run(book, book[name].start, start_seed(book, name, seed), runs)  # type: ignore[arg-type]
        if begun is None:
            return None, None
        start = begun.folder
    config = compose(train_overrides(book, name, seed, start))
    return runs.get(digest(config)), config


# ------------------------------------------------------------------------------------ train and measure


class NotRunnable(Exception):
    """What a row needs and this machine lacks."""


class Failed(Exception):
    """A training or evaluation that ended badly."""


@dataclass(frozen=True)
class Measured:
    """One metric of one measurement: its value for each seed, and what was expected of their mean."""

    measurement: str
    metric: str
    values: tuple[float, ...]
    expected: Expected | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def difference(self) -> float | None:
        """Mean minus expected value, or None where nothing is expected yet."""
        return None if self.expected is None else self.mean - self.expected.value

    @property
    def verdict(self) -> str:
        if self.expected is None or self.difference is None or math.isnan(self.difference):
            return GAP
        # A difference of just the tolerance passes, whatever rounding did to it.
        return REPRODUCED if abs(self.difference) <= self.expected.tolerance * (1 + 1e-9) else GAP


@dataclass(frozen=True)
class Outcome:
    """What came of a row; reason says what is missing, failed or was left undone."""

    row: str
    verdict: str
    measured: tuple[Measured, ...] = ()
    reason: str = ""


def reproduce(
    book: Mapping[str, Row], name: str, seeds: Sequence[int], root: Path, *, budget: float | None, reuse: bool
) -> Outcome:
    """Trains and measures a row, its start rows first, and compares the mean over seeds with what is expected."""
    row = book[name]
    if not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"seeds must be a list of whole numbers such as [0,1], got {seeds!r}")
    runs = finished_runs(root) if reuse else {}
    try:
        minutes = cost(book, name, seeds, runs)
        if budget is not None and minutes > budget:
            raise NotRunnable(f"it takes about {minutes:g} minutes on two cores, and the budget is {budget:g}")
        trained = [obtain(book, name, seed, root, runs) for seed in seeds]
        measured = []
        for measurement, metrics in row.expect.items():
            stages = [measure(run, row, measurement) for run in trained]
            for metric, expected in metrics.items():
                values = tuple(_value(stage, metric, row, measurement) for stage in stages)
                measured.append(Measured(measurement, metric, values, expected))
    except NotRunnable as error:
        return Outcome(name, NOT_RUNNABLE, reason=str(error))
    except Failed as error:
        return Outcome(name, GAP, reason=str(error))
    verdict = REPRODUCED if all(m.verdict == REPRODUCED for m in measured) else GAP
    return Outcome(name, verdict, tuple(measured))


def cost(book: Mapping[str, Row], name: str, seeds: Iterable[int], runs: Mapping[str, runtime.Run]) -> float:
    """Minutes on two cores of the trainings that a row still needs, its start rows' included."""
    wanted: dict[tuple[str, int], float] = {}

    def visit(name: str, seed: int) -> None:
        if find_run(book, name, seed, runs)[0] is None:
            wanted[name, seed] = book[name].minutes
            if book[name].start is not None:
                visit(book[name].start, start_seed(book, name, seed))  # type: ignore[arg-type]

    for seed in seeds:
        visit(name, seed)
    return sum(wanted.values())


def _value(stage: Mapping[str, Any], metric: str, row: Row, measurement: str) -> float:
    if metric not in stage["metrics"]:
        raise ValueError(
            f"row {row.name} expects {metric} of {measurement!r}, which has {', '.join(sorted(stage['metrics']))}"
        )
    value = stage["metrics"][metric]
    return math.nan if value is None else float(value)


def obtain(book: Mapping[str, Row], name: str, seed: int, root: Path, runs: dict[str, runtime.Run]) -> runtime.Run:
    """The finished run of a row and seed; trains what is missing and adds it to `runs`.

    Raises NotRunnable where data, weights or an accelerator are missing, Failed where a training fails.
    """
    row = book[name]
    start = None
    if row.start is not None:
        start = obtain(book, row.start, start_seed(book, name, seed), root, runs).folder
    overrides = train_overrides(book, name, seed, start)
    config = compose(overrides)
    key = digest(config)
    if key in runs:
        print(f"{name}, seed {seed}: the finished run {runs[key].folder} has an equal config", file=sys.stderr)
        return runs[key]
    check_runnable(row, config)
    folder = root / f"{name}-s{seed}-{key[:8]}"
    if is_finished(folder):  # and not to be reused
        folder = folder.with_name(f"{folder.name}-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):  # another process at this row: it trains, this one waits
        if not is_finished(folder):
            begun = (folder / "run.json").is_file()
            print(f"{name}, seed {seed}: {'going on' if begun else 'training'} in {folder}", file=sys.stderr)
            launch("train", [override("run_dir", folder), *(["resume=true"] if begun else overrides)])
    runs[key] = runtime.open_run(folder)
    return runs[key]


def check_runnable(row: Row, config: Mapping[str, Any]) -> None:
    """Raises NotRunnable where data, weights or an accelerator are missing, before hours are spent."""
    if config["trainer"]["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise NotRunnable(f"an accelerator is missing (trainer.accelerator={config['trainer']['accelerator']})")
    try:
        task = runtime.build_data(config).task("test")  # type: ignore[operator]
        runtime.build(config["model"])
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, DataError):
            raise NotRunnable(f"data are missing: {cause}") from error
        if isinstance(cause, WeightsError | OSError):
            raise NotRunnable(f"weights or files are missing: {cause}") from error
        raise
    check_fingerprint(row, task.name, task.fingerprint)


def check_fingerprint(row: Row, protocol: str, found: str) -> None:
    """Raises NotRunnable where the row's values belong to other data or rules than those at hand."""
    wanted = row.fingerprints.get(protocol)
    if wanted is not None and found != wanted:
        raise NotRunnable(
            f"the data of the expected values are missing: {protocol} has the fingerprint {found} here, "
            f"they belong to {wanted}"
        )


def measure(run: runtime.Run, row: Row, measurement: str) -> dict[str, Any]:
    """What metrics.json says of a measurement of a run: of its own test, or of an evaluation, done if need be.

    Raises NotRunnable and Failed as `obtain` does.
    """
    own = _read_json(run.folder / "metrics.json")["test"]
    protocol, *extra = shlex.split(measurement)
    if protocol == own["protocol"] and not extra:
        stage = own
    else:
        path = evaluation_folder(run, measurement) / "metrics.json"
        checkpoint = run.folder / "checkpoints" / "best.ckpt"
        if not path.is_file() or path.stat().st_mtime < checkpoint.stat().st_mtime:
            check_runnable(row, run.config)
            print(f"{row.name}: measuring {measurement} of {run.folder}", file=sys.stderr)
            chosen = [] if protocol == own["protocol"] else [f"protocol={protocol}"]
            places = [override("run", run.folder), override("run_dir", path.parent)]
            launch("evaluate", [*places, *chosen, *extra])
        stage = _read_json(path)["test"]
    check_fingerprint(row, protocol, stage["fingerprint"])
    return stage


def evaluation_folder(run: runtime.Run, measurement: str) -> Path:
    """Where a measurement of a run other than its own test lies."""
    return run.folder / "evaluations" / re.sub(r"[^\w.=+-]+", "_", measurement)


def launch(command: str, arguments: Sequence[str]) -> None:
    """Runs a command of simsearch as a program of its own; its output goes to standard error.

    SIGTERM is passed on, so that a training leaves its checkpoint, and then ends this process too. Raises
    Failed for a bad exit status.
    """
    line = shlex.join(["simsearch", command, *arguments])
    print(f"$ {line}", file=sys.stderr, flush=True)
    process = subprocess.Popen([sys.executable, "-m", "simsearch", command, *arguments], stdout=2)
    told: list[int] = []

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if told:
        raise SystemExit(128 + told[0])
    if status:
        raise Failed(f"`{line}` ended with status {status}; what it printed is above")


# --------------------------------------------------------------------------------------------- reports


def exit_status(outcomes: Iterable[Outcome]) -> int:
    """0 where all are reproduced, 1 where there is a gap, else 2."""
    verdicts = {outcome.verdict for outcome in outcomes}
    return 1 if GAP in verdicts else 2 if NOT_RUNNABLE in verdicts else 0


def outcome_table(outcomes: Iterable[Outcome]) -> Table:
    """Rows with value, expected value, difference and verdict of each measurement."""
    table = Table(title="Rows measured anew, beside what their study states")
    table.add_column("row", overflow="fold")
    table.add_column("measured", overflow="fold")
    for name in ("value", "expected", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for outcome in outcomes:
        for i, m in enumerate(outcome.measured):
            spread = f" ({len(m.values)} seeds: {min(m.values):.4f}-{max(m.values):.4f})" if len(m.values) > 1 else ""
            expected = "nothing yet" if m.expected is None else f"{m.expected.value:.4f} ± {m.expected.tolerance:g}"
            table.add_row(
                outcome.row if i == 0 else "",
                f"{m.metric}, {m.measurement}{spread}",
                f"{m.mean:.4f}",
                expected,
                "-" if m.difference is None else f"{m.difference:+.4f}",
                m.verdict,
            )
        if not outcome.measured:
            table.add_row(outcome.row, "-", "-", "-", "-", f"{outcome.verdict}: {outcome.reason}")
        table.add_section()
    return table


def list_table(book: Mapping[str, Row], runs: Mapping[str, runtime.Run]) -> Table:
    """Rows with what they are, expect and cost, and which of their seeds have finished runs."""
    table = Table(title="Rows; minutes of one training on two cores")
    table.add_column("row", overflow="fold")
    table.add_column("what", overflow="fold")
    table.add_column("expected", overflow="fold")
    for name in ("minutes", "seeds", "finished"):
        table.add_column(name, justify="right")
    for row in book.values():
        stated = [
            f"{measurement} {metric} {'?' if e is None else f'{e.value:.4f} ± {e.tolerance:g}'}"
            for measurement, metrics in row.expect.items()
            for metric, e in metrics.items()
        ]
        finished = [seed for seed in row.seeds if find_run(book, row.name, seed, runs)[0] is not None]
        what = row.what + (f" [dim](starts from {row.start})[/dim]" if row.start else "")
        listed = (",".join(map(str, numbers)) or "-" for numbers in (row.seeds, finished))
        table.add_row(row.name, what, "\n".join(stated), f"{row.minutes:g}", *listed)
    return table


if __name__ == "__main__":
    main()
