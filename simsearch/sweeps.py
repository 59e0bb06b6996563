"""Resumable sweeps. A trial is identified by a hash of its resolved config, so finished trials are skipped."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.table import Table

from simsearch import configs, launch, program, saved_run, settings, terminal
from simsearch.files import is_alive, read_json, write_json
from simsearch.identity import identity
from simsearch.text import cell, warn

# Parts of a config that do not affect a trial's numbers.
_ASIDE = ("hydra", "run_dir", "run_root", "resume", "trust", "logger", "objective")
MEASURED_ON = ("data", "protocol", "backbone", "sampler", "smoke")  # parts of a config that determine its data
_ENDED = ("finished", "pruned", "failed")
_STUDY = "SIMSEARCH_STUDY"  # tells a trial and its ranks what they report to
_COSTS = (
    "bytes_per_item",
    "_s",
    "seconds_per_query",
    "_ms_p50",
    "_ms_p95",
    "_ms_p99",
)  # endings of metrics that should be small
_READABLE, _LONGEST = 60, 150  # characters of a trial's folder that say what it is: usually, and with all swept keys


# --------------------------------------------------------------------------------------------- trials


def trial_name(*, _root_: DictConfig) -> str:
    """The folder name of a trial: as many of its overrides as fit, swept ones first, and a hash of its resolved config.

    A trial that already has a folder in the sweep keeps it, however its overrides were written. Registered as the
    resolver `trial`, for hydra.sweep.subdir.

    Args:
        _root_: The composed config; Hydra passes it.
    """
    values = {name: _root_._get_node(name) for name in _root_ if name not in _ASIDE}
    config = OmegaConf.create({**values, "run_dir": "", "run_root": ""}, flags={"allow_objects": True})
    resolved = OmegaConf.to_container(config, resolve=True)
    digest = identity(resolved)[:10]
    sweep = Path(_root_.hydra.sweep.dir)
    if known := sorted(sweep.glob(f"*{digest}/trial.json")):
        return known[0].parent.name
    swept = set(_root_.hydra.sweeper.get("params") or {})
    if (sweep / "sweep.json").is_file():
        swept.update(read_json(sweep / "sweep.json").get("swept", []))
    return f"{_readable(_root_.hydra.overrides.task, swept)}-{digest}".lstrip("-")


def _readable(overrides: Sequence[str], swept: Iterable[str]) -> str:
    """A description of a trial, without characters that are special to a shell or to Hydra's grammar."""
    name = ""
    for override in sorted(overrides, key=lambda override: override.partition("=")[0] not in swept):
        key, _, value = override.partition("=")
        if key in (*_ASIDE, "sweep"):
            continue
        value = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.4g}", value)
        short = re.split(r"[./]", key.lstrip("+~"))[-1]
        part = re.sub(r"[^\w.+-]+", "-", f"{short}={value}").strip("-_")
        most = _LONGEST if key in swept else _READABLE
        name = f"{name}_{part}".strip("_")[: max(most, len(name))].strip("-_")
    return name


OmegaConf.register_new_resolver("trial", trial_name, replace=True)


@cache
def code_version() -> str:
    """A hash of simsearch's own source at the start of this process."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Trial:
    """One job of a sweep.

    Attributes:
        folder: Its folder.
        overrides: Its overrides.
        values: Its objectives, if it was finished before.
        pruned: What was known when it was pruned, or None.
        finished: True if there is nothing left to do.
        elsewhere: True if another process is working on it.
        numbers: Its numbers in an Optuna study: several if the point was proposed again, none in a grid.
        _started: Time of the start, in seconds.
    """

    folder: Path
    overrides: Sequence[str]
    values: Any = None
    pruned: dict[str, Any] | None = None
    finished: bool = False
    elsewhere: bool = False
    numbers: list[int] = field(default_factory=list)
    _started: float = field(default_factory=time.time)

    def write(self, state: str, error: str = "") -> None:
        """Records the state in folder/trial.json, atomically.

        Args:
            state: running, finished, pruned, failed or interrupted.
            error: The error message, if it failed.
        """
        if launch.rank() != 0:
            return
        about = {
            "state": state,
            "overrides": list(self.overrides),
            "values": self.values,
            "error": error,
            "code": code_version(),
            "started": self._started,
            "ended": None if state == "running" else time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        about |= {"numbers": self.numbers} if self.numbers else {}
        about |= {"pruned": self.pruned} if self.pruned else {}
        write_json(self.folder / "trial.json", about)


@contextmanager
def trial(config: DictConfig) -> Iterator[Trial | None]:
    """Yields the current job of a sweep, and records its start and end. None outside a sweep.

    A finished trial has `finished` set. For an interrupted trial, `config.resume` is set, so that it continues its run.
    A trial that another process of the sweep works on has `elsewhere` set, or is waited for if the sweeper needs its
    values.

    Args:
        config: The composed config.
    """
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        yield None
        return
    present = Trial(Path(hydra.runtime.output_dir), list(hydra.overrides.task))
    path = present.folder / "trial.json"
    lock = FileLock(present.folder / ".lock")
    if launch.rank() == 0:
        try:
            lock.acquire(timeout=-1 if "direction" in hydra.sweeper else 0)
        except Timeout:
            print(
                f"{present.folder} is left to another process of this sweep, which works on it already", file=sys.stderr
            )
            present.elsewhere = True
            yield present
            return
    before = read_json(path) if path.is_file() else {}
    study = "direction" in hydra.sweeper
    present.numbers = sorted({*before.get("numbers", ()), *([int(hydra.job.num)] if study else ())})
    try:
        if before.get("state") == "finished" or (before.get("state") == "pruned" and hydra.sweeper.get("pruner")):
            present.values, present.pruned, present.finished = before["values"], before.get("pruned"), True
            if launch.rank() == 0:
                write_json(path, before | {"overrides": present.overrides, "numbers": present.numbers})
            yield present
            return
        if (present.folder / "config.yaml").is_file():
            config.resume, config.run_dir = True, str(present.folder)
        present.write("running")
        try:
            with _reporting(config, hydra):
                yield present
        except Exception as error:
            present.write("failed", f"{type(error).__name__}: {error}")
            raise
        except BaseException:
            present.write("interrupted")
            raise
        present.write("pruned" if present.pruned else "finished")
    finally:
        lock.release()


@contextmanager
def _reporting(config: DictConfig, hydra: Any) -> Iterator[None]:
    """Inside the block, this process and the ranks that it starts know the study that may prune them."""
    if not hydra.sweeper.get("pruner"):
        yield
        return
    about = {
        "storage": str(hydra.sweeper.storage),
        "study": str(hydra.sweeper.study_name),
        "number": int(hydra.job.num),
        "pruner": OmegaConf.to_container(hydra.sweeper.pruner, resolve=True),
        "monitor": _names(config.objective)[0],
    }
    os.environ[_STUDY] = json.dumps(about)
    try:
        yield
    finally:
        os.environ.pop(_STUDY)


def pruned_by() -> dict[str, Any] | None:
    """What may prune the trial that this process or its parent runs. None if nothing may.

    Returns:
        `storage`, `study` and `number` of the trial, the plain config of the `pruner`, and the metric to `monitor`.
    """
    return json.loads(os.environ[_STUDY]) if _STUDY in os.environ else None


def check_same_data(folder: Path, config: DictConfig) -> None:
    """Checks that the data and protocol of a finished trial have not changed.

    Args:
        folder: The trial's folder.
        config: The composed config.

    Raises:
        ValueError: If they have.
    """
    stored = read_json(folder / "metrics.json")["test"]["fingerprint"]
    values = configs.plain(config)
    now = _fingerprint(json.dumps({name: values[name] for name in MEASURED_ON}))
    if now != stored:
        raise ValueError(
            f"{folder} was measured on other data (fingerprint {stored}, now {now}): give the sweep another folder "
            "(hydra.sweep.dir), or delete this trial"
        )


@cache  # a sweep that goes on asks for each of its finished trials
def _fingerprint(config: str) -> str:
    return str(configs.build_data(json.loads(config)).task("test").fingerprint)


def check_objective(config: DictConfig) -> None:
    """Checks that this training will measure the `objective`.

    Args:
        config: The composed config.

    Raises:
        ValueError: If it will not.
    """
    names = _names(config.objective)
    if not names:
        return
    values = {
        key: OmegaConf.to_container(config[key], resolve=True) for key in ("callbacks", "index", "model", "protocol")
    }
    known = settings.measured_names(values)
    for name in names if known else ():
        if name not in known:
            raise ValueError(f"objective={name} will not be measured{settings.name_hint(name, known)}")


def directions(names: Sequence[str], given: Any) -> Any:
    """What a sweeper does with each objective.

    Args:
        names: Names of the objectives.
        given: The sweeper's direction: a word, a list of them, or None, which maximises what is better when it is
            larger.

    Returns:
        A word for one objective, a list for several.

    Raises:
        ValueError: If a direction is no such word, or their number differs from the number of objectives.
    """
    several = OmegaConf.is_list(given) or isinstance(given, list)
    said = list(given) if several else [given] * len(names)
    if not several and given is None:
        said = ["minimize" if is_cost(name) else "maximize" for name in names]
    if len(said) != len(names) or not {"minimize", "maximize"}.issuperset(said):
        raise ValueError(
            f"hydra.sweeper.direction={said} is for {len(said)} objectives, but objective names {len(names)}: "
            "give as many directions (minimize or maximize), or none"
        )
    return said if len(said) > 1 else said[0]


def is_cost(name: str) -> bool:
    """Whether smaller values of a metric are better: bytes, seconds and milliseconds.

    Args:
        name: Name of the metric.

    Example:
        >>> is_cost("val/bytes_per_item"), is_cost("test/index/queries_per_s"), is_cost("val/mAP")
        (True, False, False)
    """
    return name.endswith(_COSTS) and not name.endswith("per_s")


def objectives(folder: Path, names: str | Sequence[str] | None) -> Any:
    """The values of a finished run that a sweeper optimises: a float for one name, a list for several, None for none.

    Args:
        folder: The run directory.
        names: Names of metrics, such as `val/mAP`, or None.

    Raises:
        ValueError: If a metric was not measured or has no value.
    """
    if names is None:
        return None
    stages = read_json(folder / "metrics.json")
    known = {f"{stage}/{name}": value for stage, about in stages.items() for name, value in about["metrics"].items()}

    def value(name: str) -> float:
        if known.get(name) is None:
            raise ValueError(f"objective={name} was not measured{settings.name_hint(name, known)}")
        return float(known[name])

    return value(names) if isinstance(names, str) else [value(name) for name in names]


def _names(objective: Any) -> list[str]:
    return [objective] if isinstance(objective, str) else list(objective or [])


# ------------------------------------------------------------------------------------ the whole sweep


class Sweep(Callback):
    """A Hydra callback for sweeps. It continues interrupted sweeps and reports their state and failures.

    Each trial finds out by itself whether it is finished.
    """

    def __init__(self) -> None:
        self._since = time.time()

    def on_run_start(self, config: DictConfig, config_name: str | None = None) -> None:  # type: ignore[override]
        """Checks that the folder of a single run can be written to.

        Args:
            config: The composed config.
            config_name: Name of the config.
        """
        HydraConfig.instance().set_config(config)
        try:  # Hydra would end in a traceback where it cannot make the folder
            folder = Path(config.hydra.run.dir)
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"the folder {folder} is not writable")
        except program.user_errors() as error:
            warn(f"simsearch train: {program.reason(error)}: give another run_dir")
            raise SystemExit(1) from None

    def on_multirun_start(self, config: DictConfig, config_name: str | None = None) -> None:  # type: ignore[override]
        """Prepares the sweep, or ends the process with an error.

        Args:
            config: The composed config.
            config_name: Name of the config.
        """
        try:
            self._start(config)
        except program.user_errors() as error:  # Hydra would make a warning of it and go on
            warn(f"simsearch train: {program.reason(error)}")
            raise SystemExit(1) from None

    def _start(self, config: DictConfig) -> None:
        folder, sweeper = Path(config.hydra.sweep.dir), config.hydra.sweeper
        names = _names(config.objective)
        check_objective(config)
        if "direction" in sweeper:
            if not names:
                raise ValueError(
                    "this sweeper needs an objective: give objective=val/mAP, or several as "
                    "objective=[val/mAP,val/bytes_per_item]"
                )
            with open_dict(config):
                sweeper.direction = directions(names, sweeper.direction)
            if sweeper.get("pruner") and not (len(names) == 1 and names[0].startswith("val/")):
                raise ValueError(
                    f"a pruner needs one objective of the validation, such as val/mAP, not {', '.join(names)}: leave "
                    "hydra/sweeper/pruner out, or name one objective"
                )
        loader = GlobalHydra.instance().config_loader()
        swept, shared = plan(sweeper.get("params"), config.hydra.overrides.task, loader)
        about = {"swept": list(swept), "objective": names, "ended": False}
        if "n_trials" in sweeper:
            about |= {"planned": sweeper.n_trials, "study": str(sweeper.study_name)}
        else:
            about |= {"planned": math.prod(len(values) for values in swept.values()), "grid": swept, "shared": shared}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sweep.json", about | {"host": socket.gethostname(), "pid": os.getpid()})
        print(f"sweep {folder}: {summary(folder)}; watch it by `simsearch progress folder={folder}`", file=sys.stderr)

    def on_job_end(self, config: DictConfig, job_return: JobReturn) -> None:  # type: ignore[override]
        """Reports the end of a job.

        Args:
            config: The composed config.
            job_return: The result of the job.
        """
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        print(f"sweep: {summary(Path(config.hydra.sweep.dir), self._since)}", file=sys.stderr)
        result = Path(config.hydra.runtime.output_dir) / "trial.json"
        if job_return.status is JobStatus.FAILED and result.is_file() and read_json(result)["error"]:
            # Left as it is, a grid would report the first failure by its traceback and forget the others.
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, config_name: str | None = None) -> None:  # type: ignore[override]
        """Reports the state of the sweep at its end. Ends the process with status 1 if a trial failed.

        Args:
            config: The composed config.
            config_name: Name of the config.
        """
        folder = Path(config.hydra.sweep.dir)
        write_json(folder / "sweep.json", {**_read_sweep(folder), "ended": True})
        terminal.show(progress_table(folder))
        trials = read_trials(folder)
        others = [t["folder"] for t in trials if t["state"] == "finished" and t.get("code") != code_version()]
        if others:
            warn(
                f"{len(others)} trials were computed by another version of the code, such as {others[0]}: delete "
                "them to compute them again"
            )
        failed = [about for about in trials if about["state"] == "failed"]
        for about in failed:
            warn(f"failed: {about['folder']}: {about['error']}")
        cut_off = [about for about in trials if about["state"] == "interrupted"]
        if cut_off:
            warn(f"{len(cut_off)} trials were cut off, such as {cut_off[0]['folder']}: the same command continues them")
        if failed or cut_off:
            raise SystemExit(1)


def plan(
    params: Mapping[str, Any] | None, overrides: Sequence[str], loader: ConfigLoader | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """The keys that a sweep varies, with their values, and the overrides that its trials share.

    An interval has no values. The product of the numbers of values is the number of jobs of Hydra's basic sweeper.

    Args:
        params: The sweeper's `params`, or None.
        overrides: Overrides of the command line.
        loader: Finds the options of a group, which glob(*) chooses among.
    """
    arguments = {name: f"{name}={value}" for name, value in (params or {}).items()}
    arguments |= {text.partition("=")[0]: text for text in overrides}
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments.values()))
    swept = {
        str(override.get_key_element()): list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
        for override in parsed
        if override.is_sweep_override()
    }
    shared = [  # as the basic sweeper writes them
        f"{override.get_key_element()}={override.get_value_element_as_str()}"
        for override in parsed
        if not override.is_sweep_override()
    ]
    return swept, shared


# ------------------------------------------------------------------------------------------- progress


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The content of trial.json of each trial of a sweep, with its `folder`, ordered by start time.

    Args:
        folder: Folder of the sweep.
    """
    trials = []
    for path in folder.glob("*/trial.json"):
        about = read_json(path)
        about["folder"] = path.parent.name
        if about["state"] == "running" and about["host"] == socket.gethostname() and not is_alive(about["pid"]):
            about["state"] = "interrupted"
        trials.append(about)
    return sorted(trials, key=lambda about: about["started"])


def summary(folder: Path, since: float | None = None) -> str:
    """A status line: number of trials by state, best value of the first objective, and the estimated time left.

    Args:
        folder: Folder of the sweep.
        since: The estimate uses trials that finished after this time, in seconds. None makes no estimate.
    """
    found, sweep = read_trials(folder), _read_sweep(folder)
    trials = [about for about in found if _is_planned(about, sweep)]
    count = _count(trials)
    planned = max(sweep["planned"], sum(count.values()))
    parts = [f"{count['finished']} of {planned} trials finished"]
    if sweep.get("ended") and len(trials) < planned and "study" not in sweep:
        parts = [f"{count['finished']} trials finished (of {planned} planned; a repeated point counts once)"]
    parts += [f"{count[state]} {state}" for state in ("pruned", "running", "failed", "interrupted") if count[state]]
    if others := len(found) - len(trials):
        parts.append(f"{others} of earlier plans")
    if (best := _best(trials, sweep)) is not None:
        parts.append(f"best {_objective(best):.4f}{_interval(folder / best['folder'], sweep)} ({best['folder']})")
    recent = [about for about in trials if since is not None and (about["ended"] or 0) > since]
    left = planned - sum(count[state] for state in _ENDED)
    if recent and left > 0:
        seconds = (time.time() - min(about["started"] for about in recent)) / len(recent) * left
        parts.append(f"about {_duration(seconds)} left")
    return ", ".join(parts)


def progress_table(folder: Path) -> Table:
    """The trials of a sweep as a table: state, progress, time and objectives. The best first objective is marked.

    Args:
        folder: Folder of the sweep.
    """
    trials, sweep = read_trials(folder), _read_sweep(folder)
    best = _best([about for about in trials if _is_planned(about, sweep)], sweep)
    varying = _varying([about["overrides"] for about in trials])
    caption = "mAP on the validation images, or on the test (t) where there are none"
    table = Table(title=f"{cell(folder)}\n{summary(folder)}", caption=caption)
    for name in ("trial", "state", "step", "time", "objectives", "mAP"):
        table.add_column(name, justify="left" if name in ("trial", "state") else "right")
    for about, overrides in zip(trials, varying, strict=True):
        values = about["values"] if isinstance(about["values"], list) else [about["values"]]
        numbers = " ".join(f"{value:.4f}" for value in values if value is not None)
        style = {"failed": "red", "running": "cyan", "interrupted": "yellow", "pruned": "dim"}.get(about["state"], "")
        if pruned := about.get("pruned"):
            numbers = f"{pruned['value']:.4f} at validation {pruned['validation']}"
        if best is about:
            numbers, style = f"* {numbers}{_interval(folder / about['folder'], sweep)}", "bold"
        cells = (
            " ".join(overrides) or about["folder"],
            about["state"],
            _steps(folder / about["folder"]),
            _duration((about["ended"] or time.time()) - about["started"]),
            numbers or "-",
            _mean_ap(folder / about["folder"]),
        )
        table.add_row(*map(cell, cells), style=style)
    return table


def is_open(folder: Path) -> bool:
    """Whether a sweep has running trials, or its process will start further ones.

    The number of trials does not tell: a point that occurs twice is one trial.

    Args:
        folder: Folder of the sweep.
    """
    trials, about = read_trials(folder), _read_sweep(folder)
    if any(trial["state"] == "running" for trial in trials):
        return True
    gone = about.get("host") == socket.gethostname() and not is_alive(about["pid"])
    count = _count([trial for trial in trials if _is_planned(trial, about)])
    return not about.get("ended") and not gone and sum(count[state] for state in _ENDED) < about["planned"]


def _is_planned(trial: Mapping[str, Any], sweep: Mapping[str, Any]) -> bool:
    """Whether a trial belongs to what was started last in a sweep's folder, which may hold those of earlier plans."""
    if "study" in sweep:
        return bool(trial.get("numbers"))
    if "grid" not in sweep:  # of an older version
        return True
    given = {text.partition("=")[0]: text.partition("=")[2] for text in trial["overrides"]}
    swept = all(given.get(key) in values for key, values in sweep["grid"].items())
    shared = {text for text in trial["overrides"] if text.partition("=")[0] not in sweep["grid"]}
    return swept and shared == set(sweep["shared"])


def _count(trials: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """The number of trials in each state. A point that a study proposed several times counts as often."""
    count: Counter[str] = Counter()
    for about in trials:
        count[about["state"]] += len(about.get("numbers") or [None])
    return count


def _read_sweep(folder: Path) -> dict[str, Any]:
    path = folder / "sweep.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a sweep: it has no sweep.json. Give a folder that `simsearch train -m` wrote to"
        )
    return read_json(path)


def _objective(about: Mapping[str, Any]) -> float:
    values = about["values"]
    value = values[0] if isinstance(values, list) else values
    return math.nan if value is None else float(value)


def _best(trials: Sequence[dict[str, Any]], sweep: Mapping[str, Any]) -> dict[str, Any] | None:
    known = [about for about in trials if not math.isnan(_objective(about))]
    smaller = any(map(is_cost, sweep.get("objective", [])[:1]))
    return (min if smaller else max)(known, key=_objective, default=None)


def _interval(folder: Path, sweep: Mapping[str, Any]) -> str:
    """The interval of a trial's first objective, where it has one."""
    path, (stage, _, metric) = folder / "metrics.json", (sweep.get("objective") or [""])[0].partition("/")
    about = read_json(path).get(stage, {}) if path.is_file() else {}
    interval = about.get("intervals", {}).get(metric)
    return f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""


def _varying(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """For each trial, the overrides that not all trials share."""
    common = set(overrides[0]).intersection(*overrides) if len(overrides) > 1 else set()
    return [[text for text in some if text not in common] for some in overrides]


def _steps(folder: Path) -> str:
    """The last logged step of a run, and the number of steps."""
    history, config = folder / "metrics.csv", folder / "config.yaml"
    if not history.is_file() or not config.is_file():
        return "-"
    with history.open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("step")]
    most = saved_run.read_config(config)["trainer"].get("max_steps", -1)
    return f"{max(steps, default=0)}" + (f"/{most}" if most > 0 else "")


def _mean_ap(folder: Path) -> str:
    path = folder / "metrics.json"
    stages = read_json(path) if path.is_file() else {}
    stage = "val" if "val" in stages else "test"
    value = stages.get(stage, {}).get("metrics", {}).get("mAP")
    return "-" if value is None else f"{value:.4f}" + (" t" if stage == "test" else "")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
