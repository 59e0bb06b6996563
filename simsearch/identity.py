"""Identifies runs by their configs, as plain values.

A trial of a sweep is identified by its whole config (`identity`). A run of a study is identified by the part of its
config that determines its numbers, wherever it is stored (`run_identity`). Runs that are compared over seeds are
identified by the same part without the seeds.
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

# The parts of a config that determine the numbers; the other groups only fill these in.
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
    """64 hex digits (SHA-256) over plain values. The order of keys does not matter.

    Args:
        values: Plain values.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def run_identity(config: Mapping[str, Any], *, without: Collection[str] = ()) -> str:
    """16 hex digits over the part of a config that determines a run's numbers.

    Args:
        config: The run's plain config.
        without: Keys to leave out at every level, also in the config of the run that training starts from, such as
            "seed" if runs may differ in it.

    Raises:
        KeyError: If the config lacks an entry that determines numbers.
    """
    return identity(deciding(config, without=without))[:16]


def deciding(config: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """The part of a config that determines a run's numbers.

    Locations, reports and values equal to the constructor's defaults are left out. Thus a config from before an option
    was added equals one with the option at its default. A run that training starts from counts by its own config.

    Args:
        config: The run's plain config.
        without: As in `run_identity`.
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


def measurement_identity(config: Mapping[str, Any]) -> str:
    """16 hex digits over how `simsearch evaluate` searches and measures, but for seeds.

    Of the data counts at which size and fit images are decoded; the rest of them and the protocol have fingerprints.

    Args:
        config: The plain config of the evaluation.
    """
    seen = {name: (config.get("data") or {}).get(name) for name in ("size", "fit")}
    parts = {"evaluation": config["callbacks"]["evaluation"], "store": config.get("store"), "seen": seen}
    return identity(_reduced(parts, ["seed"]))[:16]


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without where data and caches lie, and how data are read, which may differ between machines.

    Args:
        config: The plain config.
    """

    def kept(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: kept(value) for key, value in node.items() if not _is_place(key, node)}
        return [kept(value) for value in node] if isinstance(node, list) else node

    data = {key: value for key, value in (config.get("data") or {}).items() if key not in _IDLE["data"]}
    return kept({**config, "data": data})


def same_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the images of two trainings have the same rows, as far as their configs say.

    Args:
        one: The plain config of a training.
        other: That of another.
    """
    aside = (*_IDLE["data"], "augment", "sampler", "eval_batch_size", "size", "fit")
    first, second = ({k: v for k, v in config["data"].items() if k not in aside} for config in (one, other))
    return first == second and one.get("smoke") == other.get("smoke")


def start_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of the run whose checkpoint or folder a training starts from. None if there is no such run.

    Args:
        config: The plain config of the training.

    Raises:
        ValueError: If the run starts from itself, perhaps through others.
    """
    folder, seen = _start_folder(config), set()
    at = folder
    while at is not None and at.resolve() not in seen:
        seen.add(at.resolve())
        at = _start_folder(read_run(at).config)
    if at is not None:
        raise ValueError(
            f"{folder} starts from itself by model.start in its config.yaml: name the run that it was really "
            "started from"
        )
    return None if folder is None else read_run(folder).config


def _start_folder(config: Mapping[str, Any]) -> Path | None:
    """The folder of the run that a training starts from. None if there is no such run."""
    model = config.get("model")
    start = model.get("start") if isinstance(model, Mapping) else None
    if start is None:
        return None
    path = Path(start)
    if path.is_dir():
        return path if (path / "config.yaml").is_file() else None
    folder = path.parent.parent  # other programs have a config.yaml there, too
    return folder if all((folder / name).is_file() for name in ("config.yaml", "run.json")) else None


def _reduced(node: Any, without: Collection[str]) -> Any:
    """The values without constructor defaults, without the keys in `without` and without cache locations."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        defaults = _defaults(target) if isinstance(target, str) else {}
        return {
            key: _reduced(value, without)
            for key, value in node.items()
            if key not in without
            and (key not in defaults or isinstance(value, Mapping) or value != defaults[key])
            and not _is_place(key, node)
        }
    return [_reduced(value, without) for value in node] if isinstance(node, list) else node


def _is_place(key: str, node: Mapping[str, Any]) -> bool:
    return key == "root" and node.get("_target_") == "simsearch.cache.ArrayCache"


def _defaults(target: str) -> dict[str, Any]:
    """The default arguments of a function or constructor. Tuples become lists, as in a config.

    Only our own targets are looked at: the config may be untrusted, and importing a module runs its code.
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
