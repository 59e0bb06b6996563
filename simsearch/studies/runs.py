"""The finished runs of a study's rows: known by what of their configs decides numbers, not by name or place."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException

from simsearch import configs, run_directory
from simsearch.files import read_json
from simsearch.studies.rows import Row
from simsearch.trust import ALLOWED, MEND, Untrusted

# What of a config decides the numbers; the other groups only fill these in.
_DECIDING = ("seed", "data", "protocol", "model", "trainer", "callbacks")
_IDLE = {
    "data": ("root", "cache", "download", "num_workers"),
    "protocol": ("unit",),  # of intervals and tests, not of values
    "model": ("start",),
    "trainer": (
        *("log_every_n_steps", "enable_model_summary", "enable_progress_bar"),
        *("num_nodes", "strategy", "use_distributed_sampler"),
    ),
    # Pictures, logging and resuming; a callback that is not listed counts.
    "callbacks": (
        *("neighbours", "precision_recall", "progress", "throughput", "learning_rate"),
        *("sigterm", "last", "epochs", "last_validation"),
    ),
}
_CHOOSES = ("monitor", "mode")  # of a ModelCheckpoint: which checkpoint is tested


@cache
def compose(overrides: tuple[str, ...], *, command: str = "train", trusted: bool = False) -> dict[str, Any]:
    """The plain config of `simsearch train`, or `evaluate`, with these overrides, shared by all callers.

    They are a study's, perhaps somebody else's: raises ValueError where they do not compose, and, unless they are
    `trusted`, where they are more than values, name what a folder's config may not name, or choose where caches lie.
    """
    line = f"`simsearch {command} {' '.join(overrides)}`"
    if not trusted:
        configs.check_overrides(overrides, line)
    places = ["run_dir=unused"] if command == "train" else ["run=unused", "run_dir=unused"]
    try:
        values = configs.plain(hydra.compose(command, [*places, *overrides]))
    except HydraException as error:
        raise ValueError(f"{line}: {error}") from error
    if not trusted and configs.admitted(values, line) != values:
        raise Untrusted(f"{line}: it downloads, or chooses where caches lie; {MEND}")
    return values


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
    start = config["model"].get("start")
    if start is not None:
        path = Path(start)
        folder = path if path.is_dir() else path.parent.parent
        there = (folder / "config.yaml").is_file()
        kept["model"]["start"] = digest(run_directory.read_run(folder).config) if there else str(path)
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
    """The default values of a function's or constructor's arguments; tuples as the lists of a config.

    Of those of ours alone: the config may be a stranger's, and to import a module is to run it.
    """
    if target not in ALLOWED:
        return {}
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


def finished_runs(root: Path, *, trusted: bool = False) -> dict[str, run_directory.Run]:
    """Digest -> run, of the runs in `root` that were trained and tested, and may be opened."""
    runs: dict[str, run_directory.Run] = {}
    for path in sorted(root.glob("*/config.yaml")):
        try:
            if is_finished(path.parent):
                run = run_directory.open_run(path.parent, trusted=trusted)
                runs.setdefault(digest(run.config), run)
        except (ValueError, LookupError, AttributeError):
            continue  # damaged, or of a time when configs were others: no row's run
    return runs


def is_finished(folder: Path) -> bool:
    """Whether a run directory has its checkpoint and its test results."""
    path, checkpoint = folder / "metrics.json", folder / "checkpoints" / "best.ckpt"
    return checkpoint.is_file() and path.is_file() and "test" in read_json(path)


def find_run(
    book: Mapping[str, Row], name: str, seed: int, runs: Mapping[str, run_directory.Run], *, trusted: bool = False
) -> tuple[run_directory.Run | None, dict[str, Any] | None]:
    """The finished run of a row and seed, or None, and the row's config; that is None, too, while its start row has
    no finished run."""
    start = None
    if book[name].start is not None:
        begun, _ = find_run(book, book[name].start, start_seed(book, name, seed), runs, trusted=trusted)  # type: ignore[arg-type]
        if begun is None:
            return None, None
        start = begun.folder
    config = compose(train_overrides(book, name, seed, start), trusted=trusted)
    return runs.get(digest(config)), config
