"""Reads runs: their results, or why there are none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from simsearch.files import Damaged, checked, note_change, read_json
from simsearch.functional.ranking import mean_name

# One of these lies in a folder that is or was to become a run's.
_TRACES = ("config.yaml", "run.json", "metrics.json", "checkpoints", ".hydra")
_DEPTH = 3  # outputs/sweeps/<date>/<job>


class Unreadable(ValueError):
    """The reason why a folder has no result."""


@dataclass(frozen=True)
class Result:
    """The finished test of one run.

    Attributes:
        name: Name in reports.
        place: The run's folder, or its address in W&B.
        config: The run's plain config.
        protocol: Name of the protocol.
        fingerprint: Fingerprint of the task.
        metrics: As in metrics.json.
        intervals: As in metrics.json.
        facts: Content of run.json, with `train_seconds`, `device` and `parameters` if recorded.
        run: The run directory. `place` lies in its evaluations/ if the test was repeated. None for W&B.
        unit: Sampling unit of the intervals. None for older results, whose intervals are over queries.
        units: Number of sampling units, or None.
        measured_by: What searched and measured in `simsearch evaluate` (`measurement_identity`). None for others.
    """

    name: str
    place: str
    config: Mapping[str, Any]
    protocol: str
    fingerprint: str
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Sequence[float]]
    facts: Mapping[str, Any]
    run: Path | None = None
    unit: str | None = None
    units: int | None = None
    measured_by: str | None = None

    @cached_property
    def _columns(self) -> dict[str, str]:
        """The per-query column of each metric that has one."""
        if self.run is None:
            return {}
        return {mean_name(name): name for name in pq.read_schema(Path(self.place) / "per_query.parquet").names}

    def has_queries(self, metric: str) -> bool:
        """Whether per-query values of a metric are known.

        Args:
            metric: Name of the metric.
        """
        return metric in self._columns

    def per_query(self, metric: str) -> Queries:
        """The values of a metric for each query.

        Args:
            metric: Name of the metric.
        """
        path = Path(self.place) / "per_query.parquet"
        unit = "index" if self.unit is None else "unit"
        table = pq.read_table(path, columns=["index", "label", self._columns[metric], unit])
        index, label, value, units = (torch.from_numpy(column.to_numpy().copy()) for column in table.columns)
        order = index.argsort()
        return Queries(index[order], label[order], value[order].double(), units[order])

    def found(self, rows: Sequence[int]) -> list[list[int]] | None:
        """Collection rows of the first neighbours of some queries. None if the run did not store them.

        Args:
            rows: Collection rows of the queries.
        """
        if "found" not in self._columns:
            return None
        table = pq.read_table(Path(self.place) / "per_query.parquet", columns=["index", "found"])
        position = {row: i for i, row in enumerate(table["index"].to_pylist())}
        taken = table["found"].take(pa.array([position[row] for row in rows], pa.int64())).to_pylist()
        return [[row for row in line if row >= 0] for line in taken]


@dataclass(frozen=True)
class Queries:
    """Values of Q queries.

    Attributes:
        index: int64 (Q,), collection rows, ascending.
        label: int64 (Q,).
        value: float64 (Q,).
        units: int64 (Q,), equal for queries of one sampling unit.
    """

    index: Tensor
    label: Tensor
    value: Tensor
    units: Tensor


@dataclass(frozen=True)
class Missing:
    """A run without a result.

    Attributes:
        name: Name of the run.
        state: "unfinished" (also if it ended before its test) or "damaged".
        reason: Details.
    """

    name: str
    state: Literal["unfinished", "damaged"]
    reason: str


def expand(given: Iterable[str]) -> list[Path]:
    """The folders that paths, globs and sweep directories name, in order and without duplicates.

    A folder that is not a run stands for the runs in it, at most three levels down.

    Args:
        given: Paths and globs.

    Raises:
        ValueError: If a name leads to no run.
    """
    folders: dict[Path, None] = {}
    for text in given:
        path = Path(text).expanduser()
        paths = [path] if path.exists() else sorted(map(Path, glob(str(path))), key=_natural)
        paths = [p for p in paths if p.is_dir()]
        if not paths:
            raise ValueError(f"{text} is not a folder: give run directories, a sweep's directory or a glob of them")
        # A glob may meet files and other folders; what was named alone must hold a run.
        inside = [run for p in paths for run in _runs_in(p, _DEPTH)]
        if not inside:
            raise ValueError(
                f"{text} does not hold a run: give a folder that `simsearch train` made, or one of such folders"
            )
        folders |= {run.resolve(): None for run in inside}
    return list(folders)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A sort key that puts 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def _runs_in(folder: Path, depth: int) -> list[Path]:
    if any((folder / trace).exists() for trace in _TRACES):
        return [folder]
    if depth == 0:
        return []
    children = sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_natural)
    return [run for child in children for run in _runs_in(child, depth - 1)]


def read_all(folders: Iterable[Path]) -> tuple[list[Result], list[Missing]]:
    """The results of the finished runs in some folders under short names, and the other runs with their reasons.

    Args:
        folders: Run directories.
    """
    folders = list(folders)
    names = short_names([str(folder) for folder in folders])
    results, missing = [], []
    for folder, name in zip(folders, names, strict=True):
        try:
            result = read_run(folder)
        except Unreadable as error:
            missing.append(Missing(name, "damaged", str(error)))
            continue
        if isinstance(result, str):
            missing.append(Missing(name, "unfinished", result))
        else:
            results.append(replace(result, name=name))
    return results, missing


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest unique endings of paths, in whole parts.

    Args:
        paths: The paths.
    """
    parts = [path.rstrip("/").split("/") for path in paths]
    names = []
    for own in parts:
        least = 3 if own[-2:-1] == ["evaluations"] else 1  # a measurement's name alone says nothing of its run
        sizes = range(least, len(own))
        size = next((n for n in sizes if sum(other[-n:] == own[-n:] for other in parts) == 1), len(own))
        names.append("/".join(own[-size:]).replace("/evaluations/", "/"))
    return names


def read_run(folder: Path) -> Result | str:
    """The result of a run directory, or of a folder in its evaluations/. A str says why there is none yet.

    Args:
        folder: The folder.

    Raises:
        Unreadable: If it is damaged.
    """
    # A measurement lies in <run>/evaluations/<name>, perhaps one level down.
    above = next((f.parent for f in folder.parents[:2] if f.name == "evaluations"), folder)
    run = folder if (folder / "config.yaml").is_file() else above
    if not (run / "config.yaml").is_file():
        if set(_TRACES) & {path.name for path in folder.iterdir()} <= {".hydra"}:
            return "it ended before it wrote its config.yaml"
        raise Unreadable("it has no config.yaml")
    config = _mapping(run / "config.yaml")
    facts = _mapping(run / "run.json") if (run / "run.json").is_file() else {}
    note_change(run, "config.yaml", facts)
    if isinstance(pruned := facts.get("pruned"), dict):
        return f"it was pruned at step {pruned.get('step')}, {pruned.get('objective')} {pruned.get('value')}"
    if not (folder / "metrics.json").is_file():
        trained = any((run / "checkpoints").glob("*.ckpt"))
        return "it was not tested" + (" (there is a checkpoint: continue with resume=true)" if trained else "")
    about = _mapping(folder / "metrics.json").get("test")
    if about is None:
        return "it was validated but not tested"
    try:
        metrics = {str(name): None if value is None else float(value) for name, value in about["metrics"].items()}
        intervals = {str(name): (float(low), float(high)) for name, (low, high) in about["intervals"].items()}
        stated = about["protocol"], about["fingerprint"]
        over = about.get("unit"), about.get("units"), about.get("measured_by")
        result = Result(folder.name, str(folder), config, *stated, metrics, intervals, facts, run, *over)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Unreadable(f"metrics.json is damaged: {type(error).__name__} {error}") from error
    try:
        schema = pq.read_schema(checked(folder, "per_query.parquet", about))
    except Damaged as error:
        raise Unreadable(f"metrics.json and per_query.parquet belong to different measurements: {error}") from error
    except (OSError, pa.ArrowException) as error:
        raise Unreadable(f"per_query.parquet is missing or damaged: {error}") from error
    recorded = {key: (schema.metadata or {}).get(key.encode(), b"").decode() for key in ("fingerprint", "unit")}
    if recorded != {"fingerprint": result.fingerprint, "unit": result.unit or ""}:
        raise Unreadable("metrics.json and per_query.parquet belong to different measurements")
    return result


def _mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON or YAML file. Raises Unreadable if it is not a mapping."""
    try:
        value = read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Unreadable(f"{path.name} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise Unreadable(f"{path.name} is damaged: its content is not a mapping")
    return value


# ------------------------------------------------------------------------------------ Weights & Biases


def read_wandb(api: Any, address: str) -> tuple[list[Result], list[Missing]]:
    """The results of the runs at an address in Weights & Biases.

    W&B holds only configs and summaries: intervals of the headline metrics, and no per-query values.

    Args:
        api: A wandb.Api.
        address: `entity/project` or `entity/project/name`, where name is a group or the id of a sweep.

    Raises:
        ValueError: If the address has another form, or if there is no run.
    """
    parts = address.strip("/").split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"wandb:{address} is not an address: write wandb:entity/project or wandb:entity/project/group")
    project = "/".join(parts[:2])
    wanted: dict[str, Any] = {"$or": [{"group": parts[2]}, {"sweep": parts[2]}]} if len(parts) == 3 else {}
    found = list(api.runs(project, filters=wanted))
    if not found:
        raise ValueError(f"wandb:{address} has no runs")
    names = [run.name if [r.name for r in found].count(run.name) == 1 else f"{run.name} ({run.id})" for run in found]
    results, missing = [], []
    for run, name in zip(found, names, strict=True):
        summary = {str(key): value for key, value in run.summary.items()}
        test = {key.removeprefix("test/"): value for key, value in summary.items() if key.startswith("test/")}
        if run.state != "finished" or not {"mAP", "fingerprint", "protocol"} <= set(test):
            missing.append(Missing(name, "unfinished", f"it is {run.state} in W&B, without a finished test"))
            continue
        metrics = {key: float(v) for key, v in test.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        ends = {key: (metrics.get(f"{key}_low"), metrics.get(f"{key}_high")) for key in metrics}
        intervals = {key: (low, high) for key, (low, high) in ends.items() if low is not None and high is not None}
        facts: dict[str, Any] = {
            key: summary[key] for key in ("train_seconds", "device", "parameters") if key in summary
        }
        place = f"wandb:{project}/{run.id}"
        stated = str(test["protocol"]), str(test["fingerprint"])
        over = test.get("unit"), test.get("units")
        results.append(Result(name, place, dict(run.config), *stated, metrics, intervals, facts, None, *over))
    return results, missing
