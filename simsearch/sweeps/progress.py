"""The state of a sweep, read from its folder: a line, a table, and whether it goes on."""

from __future__ import annotations

import csv
import math
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from operator import ge
from pathlib import Path
from typing import Any

from rich.table import Table

from simsearch import saved_run, terminal
from simsearch.files import is_alive, read_json
from simsearch.sweeps.objectives import is_cost
from simsearch.sweeps.trials import last_word, read_trials, short_numbers
from simsearch.text import cell

_ENDED = ("finished", "pruned", "failed")


def summary(folder: Path, since: float | None = None) -> str:
    """A status line: number of trials by state, best value of the first objective, and the estimated time left.

    Args:
        folder: Folder of the sweep.
        since: The estimate uses trials that finished after this time, in seconds. None makes no estimate.
    """
    found, sweep = read_trials(folder), read_sweep(folder)
    trials = [about for about in found if _is_planned(about, sweep)]
    count = _count(trials)
    planned = max(sweep["planned"], sum(count.values()))
    parts = [f"{count['finished']} of {planned} trials finished"]
    if sweep.get("ended") and len(trials) < planned and "study" not in sweep:
        parts = [f"{count['finished']} trials finished (of {planned} planned; a repeated point counts once)"]
    parts += [f"{count[state]} {state}" for state in ("pruned", "running", "failed", "interrupted") if count[state]]
    if others := len(found) - len(trials):
        parts.append(f"{others} of earlier plans")
    if front := _front(trials, sweep):
        best = max(front, key=lambda about: _gains(about, sweep)[0])
        parts.append(f"best {_values(best)[0]:.4f}{_interval(folder / best['folder'], sweep)} ({best['folder']})")
        if len(front) > 1:
            parts.append(f"{len(front)} on the Pareto front")
    recent = [about for about in trials if since is not None and (about["ended"] or 0) > since]
    left = planned - sum(count[state] for state in _ENDED)
    if recent and left > 0:
        seconds = (time.time() - min(about["started"] for about in recent)) / len(recent) * left
        parts.append(f"about {_duration(seconds)} left")
    return ", ".join(parts)


def progress_table(folder: Path, *, newest_first: bool = False) -> Table:
    """The trials of a sweep as a table: state, progress, time and objectives. The best, or the Pareto front, is marked.

    Args:
        folder: Folder of the sweep.
        newest_first: Trials that run come first, then those that ended last: what a low terminal should show.
    """
    trials, sweep = read_trials(folder), read_sweep(folder)
    if newest_first:
        trials.sort(key=lambda about: -(about["ended"] or math.inf))
    front = _front([about for about in trials if _is_planned(about, sweep)], sweep)
    varying = _varying([about["overrides"] for about in trials])
    caption = "mAP on the validation images, or on the test (t) where there are none"
    padding = 0 if terminal.console().width < 100 else 1
    table = Table(title=f"{cell(folder)}\n{summary(folder)}", caption=caption, padding=(0, padding))
    for name in ("trial", "state", "step", "time", "objectives", "mAP"):
        justify: Any = "left" if name in ("trial", "state") else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name in ("state", "step", "time"))
    for about, overrides in zip(trials, varying, strict=True):
        numbers = " ".join(f"{value:.4f}" for value in _values(about) if not math.isnan(value))
        style = {"failed": "red", "running": "cyan", "interrupted": "yellow", "pruned": "dim"}.get(about["state"], "")
        if pruned := about.get("pruned"):
            numbers = f"{pruned['value']:.4f} at validation {pruned['validation']}"
        if any(about is one for one in front):
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
    trials, about = read_trials(folder), read_sweep(folder)
    if any(trial["state"] == "running" for trial in trials):
        return True
    gone = about.get("host") == socket.gethostname() and not is_alive(about["pid"])
    count = _count([trial for trial in trials if _is_planned(trial, about)])
    return not about.get("ended") and not gone and sum(count[state] for state in _ENDED) < about["planned"]


def planned_trials(folder: Path) -> list[dict[str, Any]]:
    """The trials of a sweep that belong to what was started last in its folder, as `read_trials` has them.

    Args:
        folder: Folder of the sweep.
    """
    sweep = read_sweep(folder)
    trials = [about for about in read_trials(folder) if _is_planned(about, sweep)]
    if "study" not in sweep:
        return trials
    seen: set[int] = set()
    for about in reversed(trials):
        about["numbers"] = [number for number in about["numbers"] if number not in seen]
        seen.update(about["numbers"])
    return [about for about in trials if about["numbers"]]  # one that was begun anew counts once


def _is_planned(trial: Mapping[str, Any], sweep: Mapping[str, Any]) -> bool:
    """Whether a trial belongs to what was started last in a sweep's folder, which may hold those of earlier plans."""
    if "study" in sweep:
        return bool(trial.get("numbers")) and trial.get("study", sweep["study"]) == sweep["study"]
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


def read_sweep(folder: Path) -> dict[str, Any]:
    """The content of sweep.json.

    Args:
        folder: Folder of the sweep.

    Raises:
        ValueError: If the folder is not that of a sweep.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a sweep: it has no sweep.json. Give a folder that `simsearch train -m` wrote to"
        )
    return read_json(path)


def _values(about: Mapping[str, Any]) -> list[float]:
    values = about["values"] if isinstance(about["values"], list) else [about["values"]]
    return [math.nan if value is None else float(value) for value in values]


def _gains(about: Mapping[str, Any], sweep: Mapping[str, Any]) -> list[float]:
    """A trial's objectives, those that should be small with the other sign."""
    costs = [word == "minimize" for word in sweep.get("direction") or []]  # a grid has none
    costs = costs or [is_cost(name) for name in sweep.get("objective") or [""]]
    return [-value if cost else value for value, cost in zip(_values(about), costs, strict=False)]


def _front(trials: Sequence[dict[str, Any]], sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials that no other is better than in all objectives. With one objective the best one, if there is one.

    What a grid has measured for another objective, and not yet for that of now, does not count.
    """
    names = sweep.get("objective")
    trials = [about for about in trials if (about.get("objective") or names) == names]
    known = [(about, _gains(about, sweep)) for about in trials if not any(map(math.isnan, _values(about)))]
    front = [
        (about, gains)
        for about, gains in known
        if not any(other != gains and all(map(ge, other, gains)) for _, other in known)
    ]
    return [about for about, gains in front[: 1 if front and len(front[0][1]) == 1 else None]]


def _interval(folder: Path, sweep: Mapping[str, Any]) -> str:
    """The interval of a trial's first objective, where it has one."""
    path, (stage, _, metric) = folder / "metrics.json", (sweep.get("objective") or [""])[0].partition("/")
    about = read_json(path).get(stage, {}) if path.is_file() else {}
    interval = about.get("intervals", {}).get(metric)
    return f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""


def _varying(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """For each trial, the overrides that not all trials share, with four digits and the last words of their keys."""
    common = set(overrides[0]).intersection(*overrides) if len(overrides) > 1 else set()
    keys = {text.partition("=")[0] for some in overrides for text in some if text not in common}
    count = Counter(map(last_word, keys))

    def short(text: str) -> str:
        key, equals, value = text.partition("=")
        return (last_word(key) if count[last_word(key)] == 1 else key) + equals + short_numbers(value)

    return [[short(text) for text in some if text not in common] for some in overrides]


def _steps(folder: Path) -> str:
    """The last logged step of a run, and the number of steps."""
    history, config = folder / "metrics.csv", folder / "config.yaml"
    if not history.is_file() or not config.is_file():
        return "-"
    with history.open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("step")]
    most = _length(config, config.stat().st_mtime_ns)
    return f"{max(steps, default=0)}" + (f"/{most}" if most > 0 else "")


@cache  # a tenth of a second for each trial, whenever the table is drawn
def _length(config: Path, written: int) -> int:
    """The number of steps of a training, -1 for no limit. `written` says when its config was written last."""
    return int(saved_run.read_config(config)["trainer"].get("max_steps") or -1)


def _mean_ap(folder: Path) -> str:
    path = folder / "metrics.json"
    stages = read_json(path) if path.is_file() else {}
    stage = "val" if "val" in stages else "test"
    value = stages.get(stage, {}).get("metrics", {}).get("mAP")
    return "-" if value is None else f"{value:.4f}" + (" t" if stage == "test" else "")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
