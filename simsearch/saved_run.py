"""Opens runs of earlier trainings without Hydra. They may come from an untrusted source."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simsearch import trust
from simsearch.errors import SimsearchError
from simsearch.files import Damaged, check_zip, note_change, read_json
from simsearch.models import encoder

if TYPE_CHECKING:  # it brings Lightning, which a search does without
    from simsearch.models.steps import DescribesBatches


class RunError(SimsearchError, ValueError):
    """The folder is not a run, the run did not finish, or it is damaged."""


@dataclass(frozen=True)
class Run:
    """A run directory and its plain config.

    Attributes:
        folder: The run directory.
        config: The plain config.
        resumed: True if the run continues from its last checkpoint.
        trusted: True if this process composed the config, or if the user trusts it.
    """

    folder: Path
    config: dict[str, Any]
    resumed: bool = False
    trusted: bool = False


def read_config(path: Path) -> dict[str, Any]:
    """The config in a file for inspection. It is neither resolved nor checked.

    Args:
        path: The file.

    Raises:
        RunError: If it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("it holds a YAML alias, with which a short file can stand for gigabytes")
        values = OmegaConf.to_container(OmegaConf.create(text))  # a safe loader of plain values
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error or type(error).__name__}") from error
    if not isinstance(values, dict) or not values:
        raise RunError(f"{path} is damaged: it does not hold a config")
    trust.follow_moves(values)
    return {str(key): value for key, value in values.items()}


def admitted(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An untrusted config that may be built.

    Caches are placed where this machine keeps them, and nothing is downloaded: an untrusted config may not choose such
    places.

    Args:
        config: The plain config.
        where: Where it comes from, for the message.

    Raises:
        Untrusted: If it names something that it may not name.
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
    """The folder of this machine's caches, as the configs define it."""
    return os.environ.get("SIMSEARCH_CACHE", "~/.cache/simsearch")


def read_run(folder: Path) -> Run:
    """A run directory whose config is only inspected, never built.

    Args:
        folder: The run directory.

    Raises:
        RunError: If it is not one.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"{folder} is not a run directory: it has no config.yaml. Give one that `simsearch train` made")
    values = read_config(path)
    if (folder / "run.json").is_file():
        note_change(folder, path.name, read_json(folder / "run.json"))
    return Run(folder, values | {"run_dir": str(folder)})


def open_run(folder: Path, *, trusted: bool = False, own: Mapping[str, Any] | None = None) -> Run:
    """An existing run directory, to build objects from.

    The run may come from an untrusted source. Unless it is `trusted`, its config may only name what simsearch.trust
    allows, and no link may lead out of the folder.

    Args:
        folder: The run directory.
        trusted: True if the user trusts whoever made the run.
        own: A config that this process composed from its command line. If the folder holds exactly this config, it may
            name anything, as the command line may.

    Raises:
        RunError: If `folder` is not a run directory.
        Untrusted: If the run would need to be trusted and is not.
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
    """Whether two configs are equal, apart from their location and how they were started."""
    aside = ("run_dir", "resume", "trust")
    return all(one.get(name) == other.get(name) for name in (one.keys() | other.keys()) - set(aside))


def load_model(run: Run) -> DescribesBatches:
    """The model of a finished run with its best checkpoint.

    Args:
        run: The run.

    Raises:
        RunError: If there is no checkpoint, or if it is damaged or does not fit.
    """
    path = run.folder / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise RunError(
            f"{run.folder} has no checkpoints/best.ckpt: its training did not finish. Continue it with resume=true"
        )
    model = encoder.build(run.config["model"], None if run.trusted else trust.ALLOWED)
    try:
        checkpoint = torch.load(check_zip(path), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, Damaged) as error:
        raise RunError(f"{path} is damaged or holds other things than tensors: {error}") from error
    try:
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (LookupError, TypeError, RuntimeError) as error:
        raise RunError(f"{path} does not fit the model in {run.folder / 'config.yaml'}: {error}") from error
    return model.eval().requires_grad_(False)
