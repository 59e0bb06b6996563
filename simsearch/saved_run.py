"""Runs that a training left, opened again without Hydra; somebody else may have made them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simsearch import trust
from simsearch.errors import SimsearchError
from simsearch.files import Damaged, check_zip, note_change, read_json
from simsearch.models import encoder
from simsearch.models.steps import DescribesBatches


class RunError(SimsearchError, ValueError):
    """A folder that is no run, a run that did not finish, or a damaged one."""


@dataclass(frozen=True)
class Run:
    """A run directory and the plain config in it.

    resumed: it goes on from its last checkpoint. trusted: this process composed the config, or the user said so.
    """

    folder: Path
    config: dict[str, Any]
    resumed: bool = False
    trusted: bool = False


def read_config(path: Path) -> dict[str, Any]:
    """The config in a file as it stands there, to be looked at: neither resolved nor checked.

    Raises RunError where it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("it holds an alias, by which a short file may stand for gigabytes")
        values = OmegaConf.to_container(OmegaConf.create(text))  # a safe loader of plain values
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error or type(error).__name__}") from error
    if not isinstance(values, dict) or not values:
        raise RunError(f"{path} is damaged: it holds no config")
    trust.follow_moves(values)
    return {str(key): value for key, value in values.items()}


def admitted(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config of somebody else's that may be built. Raises Untrusted for what it may not name.

    Caches lie where this machine has them, and nothing is downloaded: such places are not a stranger's to choose.
    """
    trust.check_config(config, where)
    values = _own_caches(dict(config))
    if isinstance(data := values.get("data"), dict):
        ours = {"cache": f"{cache_root()}/images", "download": False}
        values["data"] = data | {name: value for name, value in ours.items() if data.get(name) is not None}
    return values


def _own_caches(node: Any) -> Any:
    if isinstance(node, list):
        return [_own_caches(value) for value in node]
    if not isinstance(node, dict):
        return node
    if node.get("_target_") == "simsearch.cache.ArrayCache":
        return node | {"root": f"{cache_root()}/features"}
    return {name: _own_caches(value) for name, value in node.items()}


def cache_root() -> str:
    """Where this machine keeps what is computed once, as the configs have it."""
    return os.environ.get("SIMSEARCH_CACHE", "~/.cache/simsearch")


def read_run(folder: Path) -> Run:
    """A run directory whose config is looked at only, never built. Raises RunError where it is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"{folder} is no run directory: it has no config.yaml. Give one that `simsearch train` made")
    values = read_config(path)
    if (folder / "run.json").is_file():
        note_change(folder, path.name, read_json(folder / "run.json"))
    return Run(folder, values | {"run_dir": str(folder)})


def open_run(folder: Path, *, trusted: bool = False, own: Mapping[str, Any] | None = None) -> Run:
    """An existing run directory, to build from.

    Somebody else may have made it, so that its config builds what simsearch.trust allows and no link leads out of it,
    unless it is `trusted`. own: the config that this process composed of its command line; where the folder holds just
    that, it may build what it likes, as the command line may.

    Raises RunError where `folder` is no run directory, Untrusted where it is not trusted and would have to be.
    """
    run = read_run(folder)
    if not trusted:
        trust.check_links(folder)
    if not trusted and (own is None or not _equal(run.config, own)):
        return replace(run, config=admitted(run.config, str(folder / "config.yaml")))
    try:
        values = OmegaConf.to_container(OmegaConf.create(run.config), resolve=True)
    except OmegaConfBaseException as error:
        raise RunError(f"{folder / 'config.yaml'} is damaged: {error}") from error
    assert isinstance(values, dict)
    return replace(run, config={str(key): value for key, value in values.items()}, trusted=True)


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs are one, wherever it lies and however it was started."""
    aside = ("run_dir", "resume", "trust")
    return all(one.get(name) == other.get(name) for name in (one.keys() | other.keys()) - set(aside))


def load_model(run: Run) -> DescribesBatches:
    """The model of a finished run with its best checkpoint. Raises RunError where none fits."""
    path = run.folder / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise RunError(f"{run.folder} has no checkpoints/best.ckpt: its training did not finish; resume it")
    model = encoder.build(run.config["model"], None if run.trusted else trust.ALLOWED)
    try:
        checkpoint = torch.load(check_zip(path), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, Damaged) as error:
        raise RunError(f"{path} is damaged or holds more than tensors: {error}") from error
    try:
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (LookupError, TypeError, RuntimeError) as error:
        raise RunError(f"{path} does not fit the model in {run.folder / 'config.yaml'}: {error}") from error
    return model.eval().requires_grad_(False)
