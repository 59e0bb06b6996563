"""Trials of a sweep and what became of them. A hash of its resolved config identifies a trial."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from simsearch import configs, launch
from simsearch.files import is_alive, read_json, write_json
from simsearch.identity import identity, start_config, without_places
from simsearch.sweeps import objectives

# Parts of a config that do not affect a trial's numbers.
_ASIDE = ("hydra", "run_dir", "run_root", "resume", "trust", "logger", "objective")
MEASURED_ON = ("data", "protocol", "backbone", "sampler", "smoke")  # parts of a config that determine its data
_STUDY = "SIMSEARCH_STUDY"  # tells a trial and its ranks what they report to
_READABLE, _LONGEST = 60, 150  # characters of a trial's folder that say what it is: usually, and with all swept keys


def decisive(overrides: Iterable[str]) -> list[str]:
    """The overrides that may affect a trial's numbers.

    Args:
        overrides: The overrides.
    """
    return [text for text in overrides if re.split(r"[.@=]", text.lstrip("+~"))[0] not in _ASIDE]


def trial_name(*, _root_: DictConfig) -> str:
    """The folder name of a trial: as many of its overrides as fit, swept ones first, and a hash of its resolved config.

    A trial that already has a folder in the sweep keeps it, however its overrides were written, and wherever data,
    caches and the run that it starts from lie. Registered as the resolver `trial`, for hydra.sweep.subdir.

    Args:
        _root_: The composed config; Hydra passes it.
    """
    values = {name: _root_._get_node(name) for name in _root_ if name not in _ASIDE}
    config = OmegaConf.create({**values, "run_dir": "", "run_root": ""}, flags={"allow_objects": True})
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    present = without_places(resolved)
    digest, *former = (identity(values)[:10] for values in (_with_start(present), present, resolved))
    sweep = Path(_root_.hydra.sweep.dir)
    if known := [path for end in (digest, *former) for path in sorted(sweep.glob(f"*{end}/trial.json"))]:
        return known[0].parent.name
    swept = set(_root_.hydra.sweeper.get("params") or {})
    if (sweep / "sweep.json").is_file():
        swept.update(read_json(sweep / "sweep.json").get("swept", []))
    return f"{_readable(_root_.hydra.overrides.task, swept)}-{digest}".lstrip("-")


def _with_start(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what the run computed that training starts from, in place of its folder."""
    begun = start_config(config)
    if begun is None:
        return config
    computes = without_places({name: value for name, value in begun.items() if name not in _ASIDE})
    return {**config, "model": {**config["model"], "start": identity(computes)}}


def _readable(overrides: Sequence[str], swept: Iterable[str]) -> str:
    """A description of a trial, without characters that are special to a shell or to Hydra's grammar."""
    name = ""
    for override in sorted(overrides, key=lambda override: override.partition("=")[0] not in swept):
        key, _, value = override.partition("=")
        if key in (*_ASIDE, "sweep"):
            continue
        part = re.sub(r"[^\w.+-]+", "-", f"{last_word(key)}={short_numbers(value)}").strip("-_")
        most = _LONGEST if key in swept else _READABLE
        name = f"{name}_{part}".strip("_")[: max(most, len(name))].strip("-_")
    return name.encode()[:_LONGEST].decode(errors="ignore")  # file systems count bytes


def last_word(key: str) -> str:
    """The last part of an override's key.

    Args:
        key: The key.

    Example:
        >>> last_word("optimizer.lr"), last_word("+hydra/launcher")
        ('lr', 'launcher')
    """
    return re.split(r"[./]", key.lstrip("+~"))[-1]


def short_numbers(text: str) -> str:
    """The text with four significant digits of each number that has four or more after the point.

    Args:
        text: The text, such as an override.

    Example:
        >>> short_numbers("optimizer.lr=0.04043878009515104"), short_numbers("optimizer.weight_decay=2.809728041e-05")
        ('optimizer.lr=0.04044', 'optimizer.weight_decay=2.81e-05')
    """
    return re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.4g}", text)


OmegaConf.register_new_resolver("trial", trial_name, replace=True)


@cache
def code_version() -> str:
    """A hash of simsearch's own source at the start of this process."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
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
        study: Name of that study, or None.
        objective: Names of the metrics that `values` are of.
        _started: Time of the start, in seconds.
    """

    folder: Path
    overrides: Sequence[str]
    values: Any = None
    pruned: dict[str, Any] | None = None
    finished: bool = False
    elsewhere: bool = False
    numbers: list[int] = field(default_factory=list)
    study: str | None = None
    objective: Any = None
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
            "objective": self.objective,
            "error": error,
            "code": code_version(),
            "started": self._started,
            "ended": None if state == "running" else time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        about |= {"numbers": self.numbers} if self.numbers else {}
        about |= {"study": self.study} if self.study else {}
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
    study = "direction" in hydra.sweeper
    before = _begin(present.folder, lock, study, int(hydra.job.num))
    if before is None:
        present.elsewhere = True
        yield present
        return
    present.objective = objectives.names_of(config.objective)
    same = before.get("objective", present.objective) == present.objective
    present.numbers, present.study = list(before.get("numbers", ())), before.get("study")
    if study:
        name = str(hydra.sweeper.study_name)
        numbers = present.numbers if present.study in (None, name) else ()  # those of another study say nothing here
        present.numbers, present.study = sorted({*numbers, int(hydra.job.num)}), name
    try:
        pruned = before.get("state") == "pruned" and hydra.sweeper.get("pruner") and same
        if before.get("state") == "finished" or pruned:
            present.values, present.pruned, present.finished = before["values"], before.get("pruned"), True
            yield present
            if launch.rank() == 0:  # its values may be of another objective now
                now = ("overrides", "numbers", "study", "objective", "values")
                write_json(path, before | {name: getattr(present, name) for name in now})
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


def _begin(folder: Path, lock: FileLock, wait: bool, number: int) -> dict[str, Any] | None:
    """The content of trial.json once this process has the trial. None if another process of the sweep works on it.

    Of several ranks under srun, rank 0 takes the lock, and all others do as it does.

    Args:
        folder: The trial's folder.
        lock: Its lock.
        wait: Whether to wait for the other process.
        number: The job's number in the sweep.
    """
    step = (os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    shared, path = folder / f".rank-0-{'-'.join(step)}-{number}.json", folder / "trial.json"
    if launch.rank() != 0:
        while not shared.is_file():  # as long as rank 0 waits
            time.sleep(0.1)
        before: dict[str, Any] | None = read_json(shared)["before"]
        return before
    try:
        lock.acquire(timeout=-1 if wait else 0)
        before = read_json(path) if path.is_file() else {}
    except Timeout:
        print(f"{folder} is left to another process of this sweep, which works on it already", file=sys.stderr)
        before = None
    if launch.is_slurm_rank():
        write_json(shared, {"before": before})
    return before


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
        "monitor": objectives.names_of(config.objective)[0],
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
