"""Reproduces the rows of a study: trains and measures what is missing, and compares the values with expectations."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from simsearch import configs, saved_run, slurm
from simsearch.data.cifar10 import DataError
from simsearch.files import read_json
from simsearch.identity import run_identity
from simsearch.models.backbones import WeightsError
from simsearch.saved_run import Run
from simsearch.studies.rows import Expected, Row
from simsearch.studies.runs import (
    Runs,
    compose,
    find_run,
    is_finished,
    override,
    run_on_its_data,
    start_seed,
    train_overrides,
)

REPRODUCED, GAP, NOT_RUNNABLE = "reproduced", "gap", "not runnable here"


class NotRunnable(Exception):
    """Something that a row needs is missing on this machine."""


class Failed(Exception):
    """A training or an evaluation failed, or did not measure what a row expects."""


@dataclass(frozen=True)
class Measured:
    """One metric of one measurement.

    Attributes:
        measurement: Name of the measurement.
        metric: Name of the metric.
        values: The value for each seed.
        expected: The expected mean, or None.
    """

    measurement: str
    metric: str
    values: tuple[float, ...]
    expected: Expected | None

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def difference(self) -> float | None:
        """Mean minus expected value. None if no value is expected yet."""
        return None if self.expected is None else self.mean - self.expected.value

    @property
    def verdict(self) -> str:
        """The verdict on this value."""
        if self.expected is None or self.difference is None or math.isnan(self.difference):
            return GAP
        # A difference of just the tolerance passes, whatever rounding did to it.
        return REPRODUCED if abs(self.difference) <= self.expected.tolerance * (1 + 1e-9) else GAP


@dataclass(frozen=True)
class Outcome:
    """The outcome of a row.

    Attributes:
        row: Name of the row.
        verdict: The verdict.
        measured: The measured values.
        reason: What is missing, failed or was skipped.
    """

    row: str
    verdict: str
    measured: tuple[Measured, ...] = ()
    reason: str = ""


def reproduce(
    book: Mapping[str, Row],
    name: str,
    seeds: Sequence[int],
    root: Path,
    runs: dict[str, list[Run]],
    *,
    budget: float | None,
    trusted: bool = False,
) -> Outcome:
    """Trains and measures a row, after its start rows, and compares the means over seeds with the expected values.

    Args:
        book: All rows by name.
        name: Name of the row.
        seeds: The seeds to run.
        root: Folder of the runs.
        runs: Finished runs by identity, which may be used. Those that are trained here are added.
        budget: Largest acceptable cost in minutes on two cores, or None.
        trusted: True if the user trusts whoever made the rows and runs.

    Raises:
        ValueError: If `seeds` are none, or as `check_composes` does. This is checked before anything runs.
    """
    row = book[name]
    if not isinstance(seeds, list | tuple) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"seeds must be a list of whole numbers such as [0,1], or all, got {seeds!r}")
    check_composes(book, name, trusted=trusted)
    try:
        minutes = cost(book, name, seeds, runs, trusted=trusted)
        if budget is not None and minutes > budget:
            raise NotRunnable(f"it takes about {minutes:g} minutes on two cores, but the budget is {budget:g}")
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


def check_composes(book: Mapping[str, Row], name: str, *, trusted: bool = False) -> None:
    """Checks that a row's training, those that it starts from, and its measurements have configs.

    Args:
        book: All rows by name.
        name: Name of the row.
        trusted: True if the user trusts whoever made the rows.

    Raises:
        ValueError: As `compose` does.
    """
    row = book[name]
    config = compose(train_overrides(book, name, row.seeds[0], Path("unused")), trusted=trusted)
    for measurement in row.expect:
        protocol = shlex.split(measurement)[0]
        own = protocol.startswith(config["protocol"].get("name") or protocol)  # perhaps with a fold behind it
        chosen = () if own else (f"protocol={protocol}",)
        compose((*chosen, *measured_by(measurement)), command="evaluate", trusted=trusted)
    if row.start is not None:
        check_composes(book, row.start, trusted=trusted)


def cost(
    book: Mapping[str, Row],
    name: str,
    seeds: Iterable[int],
    runs: Runs,
    *,
    trusted: bool = False,
) -> float:
    """The minutes on two cores of the trainings that a row still needs, its start rows included.

    Args:
        book: All rows by name.
        name: Name of the row.
        seeds: The seeds to run.
        runs: Finished runs by identity.
        trusted: True if the user trusts whoever made the rows.
    """
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
        raise Failed(f"it expects {metric} of {measurement!r}, which has {', '.join(sorted(stage['metrics']))}")
    value = stage["metrics"][metric]
    return math.nan if value is None else float(value)


def obtain(
    book: Mapping[str, Row],
    name: str,
    seed: int,
    root: Path,
    runs: dict[str, list[Run]],
    *,
    trusted: bool = False,
) -> Run:
    """The finished run of a row and seed. Trains what is missing and adds it to `runs`.

    Args:
        book: All rows by name.
        name: Name of the row.
        seed: The seed.
        root: Folder of the runs.
        runs: Finished runs by identity. It is modified.
        trusted: True if the user trusts whoever made the rows and runs.

    Raises:
        NotRunnable: If data, weights or an accelerator are missing.
        Failed: If a training fails.
    """
    row = book[name]
    start = None
    if row.start is not None:
        start = obtain(book, row.start, start_seed(book, name, seed), root, runs, trusted=trusted).folder
    overrides = train_overrides(book, name, seed, start)
    config = compose(overrides, trusted=trusted)
    key = run_identity(config)
    if (found := run_on_its_data(row, runs.get(key, ()))) is not None:
        print(f"{name}, seed {seed}: the finished run {found.folder} has an equal config", file=sys.stderr)
        return found
    check_runnable(row, config)
    folder = root / f"{name}-s{seed}-{key[:8]}"
    if is_finished(folder):  # and not to be used: go on with another that was begun, or begin one
        begun = [path.parent for path in sorted(root.glob(f"{folder.name}-*/config.yaml"))]
        another = folder.with_name(f"{folder.name}-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        folder = next((path for path in begun if not is_finished(path)), another)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):  # another process at this row: it trains, this one waits
        if not is_finished(folder):
            resumed = (folder / "config.yaml").is_file()
            print(f"{name}, seed {seed}: {'continuing' if resumed else 'training'} in {folder}", file=sys.stderr)
            said = ["trust=true"] if trusted else []
            launch("train", [override("run_dir", folder), *(["resume=true"] if resumed else overrides), *said])
            if not is_finished(folder):
                raise Failed(f"the training in {folder} ended without a result; the same command goes on")
    run = saved_run.open_run(folder, trusted=trusted)
    runs.setdefault(key, []).append(run)
    return run


def check_runnable(row: Row, config: Mapping[str, Any]) -> None:
    """Checks, before hours are spent, that data, weights and accelerator are there.

    Args:
        row: The row.
        config: Its plain config.

    Raises:
        NotRunnable: If something is missing.
    """
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
    """Checks that the row's expected values belong to the data and rules at hand.

    Args:
        row: The row.
        protocol: Name of the protocol.
        found: Fingerprint at hand.

    Raises:
        NotRunnable: If they do not.
    """
    wanted = row.fingerprints.get(protocol)
    if wanted is not None and found != wanted:
        raise NotRunnable(
            f"the expected values belong to other data: {protocol} has the fingerprint {found} here, "
            f"but {wanted} in the study"
        )


def measure(run: Run, row: Row, measurement: str, *, trusted: bool = False) -> dict[str, Any]:
    """The entry in metrics.json for a measurement of a run: its own test, or an evaluation that is run if needed.

    Args:
        run: The run.
        row: Its row.
        measurement: Name of the measurement.
        trusted: True if the user trusts whoever made the run.

    Raises:
        NotRunnable: As `obtain` does.
        Failed: As `obtain` does.
    """
    own = read_json(run.folder / "metrics.json")["test"]
    protocol, *extra = shlex.split(measurement)
    if protocol == own["protocol"] and not extra:
        stage = own
    else:
        path = evaluation_folder(run, measurement) / "metrics.json"
        if not is_measured(run, measurement):
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
    """The overrides of `simsearch evaluate` in the name of a measurement. The name starts with the protocol.

    Args:
        measurement: Name of the measurement.
    """
    return tuple(shlex.split(measurement)[1:])


def evaluation_folder(run: Run, measurement: str) -> Path:
    """The folder of a measurement other than the run's own test.

    Args:
        run: The run.
        measurement: Name of the measurement.
    """
    return run.folder / "evaluations" / re.sub(r"[^\w.=+-]+", "_", measurement)


def is_measured(run: Run, measurement: str) -> bool:
    """Whether a run was evaluated by a measurement other than its own test, after its last training.

    Args:
        run: The run.
        measurement: Name of the measurement.
    """
    path = evaluation_folder(run, measurement) / "metrics.json"
    checkpoint = run.folder / "checkpoints" / "best.ckpt"
    return path.is_file() and path.stat().st_mtime >= checkpoint.stat().st_mtime


def launch(command: str, arguments: Sequence[str]) -> None:
    """Runs a simsearch command as a separate process. Its output goes to standard error.

    After SIGTERM, Ctrl-C or SLURM's warning, which are forwarded, a training writes its checkpoint. Then this process
    ends too.

    Args:
        command: Name of the command.
        arguments: Its arguments.

    Raises:
        Failed: If the exit status is not 0.
    """
    line = shlex.join(["simsearch", command, *arguments])
    print(f"$ {line}", file=sys.stderr, flush=True)
    environment = os.environ | {slurm.PARENT_ASKS: "1"}
    process = subprocess.Popen([sys.executable, "-m", "simsearch", command, *arguments], stdout=2, env=environment)
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        again = received[:1] == [number] == [signal.SIGINT]
        received.append(number)
        if again:
            process.kill()
        elif number != signal.SIGINT:  # Ctrl-C comes to both
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with slurm.requeued_if_warned(0, partial(process.send_signal, signal.SIGUSR1)):
            status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(128 + received[0])
    if status:
        raise Failed(f"`{line}` ended with status {status}; what it printed is above")
