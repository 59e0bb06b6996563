"""A study's rows trained and measured anew, where no finished run is there, and compared with what is expected."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from simsearch import configs, saved_run
from simsearch.data.cifar10 import DataError
from simsearch.files import read_json
from simsearch.identity import run_identity
from simsearch.models.backbones import WeightsError
from simsearch.saved_run import Run
from simsearch.studies.rows import Expected, Row
from simsearch.studies.runs import (
    compose,
    find_run,
    finished_runs,
    is_finished,
    override,
    start_seed,
    train_overrides,
)

REPRODUCED, GAP, NOT_RUNNABLE = "reproduced", "gap", "not runnable here"


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
    book: Mapping[str, Row],
    name: str,
    seeds: Sequence[int],
    root: Path,
    *,
    budget: float | None,
    reuse: bool,
    trusted: bool = False,
) -> Outcome:
    """Trains and measures a row, its start rows first, and compares the mean over seeds with what is expected.

    Rows and runs may be somebody else's: raises ValueError, before anything runs, for a row that names what a folder's
    config may not name, unless they are `trusted`.
    """
    row = book[name]
    if not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"seeds must be a list of whole numbers such as [0,1], got {seeds!r}")
    for measurement in row.expect:
        compose(measured_by(measurement), command="evaluate", trusted=trusted)
    runs = finished_runs(root, trusted=trusted) if reuse else {}
    try:
        minutes = cost(book, name, seeds, runs, trusted=trusted)
        if budget is not None and minutes > budget:
            raise NotRunnable(f"it takes about {minutes:g} minutes on two cores, and the budget is {budget:g}")
        trained = [obtain(book, name, seed, root, runs, trusted=trusted) for seed in seeds]
        measured = []
        for measurement, metrics in row.expect.items():
            stages = [measure(run, row, measurement, trusted=trusted) for run in trained]
            for metric, expected in metrics.items():
                values = tuple(_value(stage, metric, row, measurement) for stage in stages)
                measured.append(Measured(measurement, metric, values, expected))
    except NotRunnable as error:
        return Outcome(name, NOT_RUNNABLE, reason=str(error))
    except Failed as error:
        return Outcome(name, GAP, reason=str(error))
    verdict = REPRODUCED if all(m.verdict == REPRODUCED for m in measured) else GAP
    return Outcome(name, verdict, tuple(measured))


def cost(
    book: Mapping[str, Row],
    name: str,
    seeds: Iterable[int],
    runs: Mapping[str, Run],
    *,
    trusted: bool = False,
) -> float:
    """Minutes on two cores of the trainings that a row still needs, its start rows' included."""
    wanted: dict[tuple[str, int], float] = {}

    def visit(name: str, seed: int) -> None:
        if find_run(book, name, seed, runs, trusted=trusted)[0] is None:
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


def obtain(
    book: Mapping[str, Row],
    name: str,
    seed: int,
    root: Path,
    runs: dict[str, Run],
    *,
    trusted: bool = False,
) -> Run:
    """The finished run of a row and seed; trains what is missing and adds it to `runs`.

    Raises NotRunnable where data, weights or an accelerator are missing, Failed where a training fails.
    """
    row = book[name]
    start = None
    if row.start is not None:
        start = obtain(book, row.start, start_seed(book, name, seed), root, runs, trusted=trusted).folder
    overrides = train_overrides(book, name, seed, start)
    config = compose(overrides, trusted=trusted)
    key = run_identity(config)
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
            said = ["trust=true"] if trusted else []
            launch("train", [override("run_dir", folder), *(["resume=true"] if begun else overrides), *said])
    runs[key] = saved_run.open_run(folder, trusted=trusted)
    return runs[key]


def check_runnable(row: Row, config: Mapping[str, Any]) -> None:
    """Raises NotRunnable where data, weights or an accelerator are missing, before hours are spent."""
    if config["trainer"]["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise NotRunnable(f"an accelerator is missing (trainer.accelerator={config['trainer']['accelerator']})")
    try:
        task = configs.build_data(config).task("test")
        configs.build(config["model"])
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


def measure(run: Run, row: Row, measurement: str, *, trusted: bool = False) -> dict[str, Any]:
    """What metrics.json says of a measurement of a run: of its own test, or of an evaluation, done if need be.

    Raises NotRunnable and Failed as `obtain` does.
    """
    own = read_json(run.folder / "metrics.json")["test"]
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
            compose((*chosen, *extra), command="evaluate", trusted=trusted)
            places = [override("run", run.folder), override("run_dir", path.parent)]
            launch("evaluate", [*places, *chosen, *extra, *(["trust=true"] if trusted else [])])
        stage = read_json(path)["test"]
    check_fingerprint(row, protocol, stage["fingerprint"])
    return stage


def measured_by(measurement: str) -> tuple[str, ...]:
    """The overrides of `simsearch evaluate` in the name of a measurement: all but the protocol that it begins with."""
    return tuple(shlex.split(measurement)[1:])


def evaluation_folder(run: Run, measurement: str) -> Path:
    """Where a measurement of a run other than its own test lies."""
    return run.folder / "evaluations" / re.sub(r"[^\w.=+-]+", "_", measurement)


def launch(command: str, arguments: Sequence[str]) -> None:
    """Runs a command of simsearch as a program of its own; its output goes to standard error.

    SIGTERM is passed on, so that a training leaves its checkpoint, and then ends this process too. Raises Failed for a
    bad exit status.
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
