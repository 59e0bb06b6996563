"""Which runs are the same: by their configs, as plain values.

A trial of a sweep is its whole config (`identity`). A run of a study is what of its config decides its numbers,
wherever it lies (`run_identity`), and runs that are compared over seeds are that without the seeds.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from simsearch.saved_run import read_run
from simsearch.trust import ALLOWED

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


def identity(values: object) -> str:
    """64 hex digits (SHA-256) over plain values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def run_identity(config: Mapping[str, Any], *, without: Collection[str] = ()) -> str:
    """16 hex digits over what decides a run's numbers.

    Args:
        config: The run's plain config.
        without: Keys that are left out wherever they stand, also in the config of the run that training starts from,
            such as "seed" where runs may differ in it.

    Raises:
        KeyError: Where the config lacks what decides numbers.
    """
    return identity(deciding(config, without=without))[:16]


def deciding(config: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """What of a run's config decides its numbers; for the arguments see `run_identity`.

    Left out are places, reports, and values that are the constructor's own defaults, so that a config from
    before an option came still equals one with the option at its default. A run that training starts
    from counts by its own config.
    """
    kept: dict[str, Any] = {}
    for group in _DECIDING:
        if group in without:
            continue
        node = config[group]
        if isinstance(node, Mapping):
            node = {key: value for key, value in node.items() if key not in _IDLE.get(group, ())}
        kept[group] = _reduced(node, without)
    checkpoint = kept["callbacks"].get("checkpoint") or {}
    kept["callbacks"]["checkpoint"] = {key: checkpoint[key] for key in _CHOOSES if key in checkpoint}
    if (start := config["model"].get("start")) is not None:
        begun = start_config(config)
        kept["model"]["start"] = str(start) if begun is None else run_identity(begun, without=without)
    return kept


def start_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the run whose checkpoint or folder a training starts from; None where there is no such run."""
    model = config.get("model")
    start = model.get("start") if isinstance(model, Mapping) else None
    if start is None:
        return None
    folder = Path(start) if Path(start).is_dir() else Path(start).parent.parent
    return read_run(folder).config if (folder / "config.yaml").is_file() else None


def _reduced(node: Any, without: Collection[str]) -> Any:
    """Values without those that are their constructor's defaults, the keys in `without` and where a cache lies."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        defaults = _defaults(target) if isinstance(target, str) else {}
        return {
            key: _reduced(value, without)
            for key, value in node.items()
            if key not in without
            and (key not in defaults or isinstance(value, Mapping) or value != defaults[key])
            and not (key == "root" and target == "simsearch.cache.ArrayCache")
        }
    return [_reduced(value, without) for value in node] if isinstance(node, list) else node


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
