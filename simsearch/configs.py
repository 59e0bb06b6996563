"""Configs as plain values, and the objects that they describe."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from simsearch import launch, trust, usage

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

    from simsearch.data.datamodule import RetrievalDataModule

CONF = str(usage.CONF)


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as resolved plain values, Hydra's own part left out."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    trust.follow_moves(values)
    return {str(key): value for key, value in values.items() if key != "hydra"}


def build(config: Mapping[str, Any]) -> Any:
    """The object that a plain config with `_target_` describes."""
    return hydra.utils.instantiate(OmegaConf.create(dict(config)), _convert_="all")


def build_data(config: Mapping[str, Any], protocol: Any = None) -> RetrievalDataModule:
    """The DataModule of `config["data"]` with its data read, under `protocol` or that of the config."""
    data = prepare_data(config, protocol)
    data.setup()
    if config.get("smoke"):
        data.shrink()
    return data


def prepare_data(config: Mapping[str, Any], protocol: Any = None) -> RetrievalDataModule:
    """The DataModule, its data downloaded where the config asks for it, but not read."""
    node = OmegaConf.create(dict(config["data"]))
    # Not as an argument of instantiate, which would turn the protocol's dataclass into a config.
    partial = hydra.utils.instantiate(node, _convert_="all", _partial_=True)
    data = partial(protocol=protocol or build(config["protocol"]))
    data.prepare_data()
    return data


def build_trainer(
    config: Mapping[str, Any], folder: Path, loggers: list[Logger], more: Sequence[pl.Callback] = ()
) -> pl.Trainer:
    """The Trainer with its callbacks, then those in `more`, writing into `folder`."""
    from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar  # which a search goes without

    from simsearch.callbacks.training import OwnCheckpoints, WholeCheckpoints

    callbacks = [OwnCheckpoints(), *(build(node) for node in config["callbacks"].values() if node), *more]
    if config["trainer"].get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = str(folder / "checkpoints")
    values = {"use_distributed_sampler": False, **config["trainer"]}  # our loaders deal out to ranks themselves
    if launch.is_rank() and values.get("strategy", "auto") in ("auto", "ddp"):
        values["strategy"] = {"_target_": "simsearch.callbacks.training.DataParallel"}
    trainer = hydra.utils.instantiate(
        OmegaConf.create(values), callbacks=callbacks, logger=loggers, default_root_dir=str(folder), _convert_="all"
    )
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    return trainer


def build_encoder(config: Mapping[str, Any], *, trusted: bool = False) -> nn.Module:
    """The encoder of a catalog's config on random weights, without a cache, for tensors that are loaded next.

    The config may come from a stranger's catalog: raises ValueError where it names anything but the
    classes and functions of simsearch's own models and binarizers, unless it is `trusted`.
    """
    model = _without_weights(config["model"])
    if not trusted:
        trust.check_config({"model": model}, "the catalog's config", trust.ENCODERS)
    return build(model).eval().requires_grad_(False)


def encoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's config builds its encoder: the network of a trained family, the whole frozen model."""
    model = config["model"]
    return {"model": model.get("network", model)}


def _without_weights(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_weights(value) for value in node]
    if not isinstance(node, dict):
        return node
    blank = {"weights": "random", "cache": None, "start": None}

    def stays(name: str, value: Any) -> bool:
        return name not in blank or (name == "weights" and isinstance(value, dict))  # those of parts

    return {name: _without_weights(value) if stays(name, value) else blank[name] for name, value in node.items()}


_NOT_A_STRANGERS = ("hydra", "resume", "run", "run_dir", "run_root", "trust")


def check_overrides(overrides: Sequence[str], where: str) -> None:
    """Raises ValueError for overrides of somebody else's that are more than values of a config.

    Those are options of the program, what tells Hydra where to look and what to start, where results go and what is
    trusted, and interpolations. where: names the overrides in the message.
    """
    for text in overrides:
        more = text.startswith("-") or "${" in text
        if not more:
            try:
                (parsed,) = OverridesParser.create().parse_overrides([text])
            except HydraException as error:
                raise ValueError(f"{where}: {text!r} is no override: {str(error).splitlines()[0]}") from error
            more = any(
                re.split(r"[./]", name)[0] in _NOT_A_STRANGERS for name in (parsed.key_or_group, parsed.package or "")
            )
        if more:
            raise trust.Untrusted(f"{where}: {text!r} is more than a value of the config; {trust.MEND}")


def device(name: str) -> torch.device:
    """The device of that name; "auto" is the first accelerator, else the CPU. Raises ValueError where it is none."""
    if name != "auto":
        try:
            torch.zeros(0, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError, TypeError) as error:
            there = "auto, cpu or cuda" if torch.cuda.is_available() else "auto or cpu on this machine"
            raise ValueError(f"device={name}: give {there} ({str(error).splitlines()[0]})") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_there(name: str) -> bool:
    """Whether a file or folder has that name."""
    return Path(name).expanduser().exists()


def listed(value: Any, known: Callable[[str], bool] = is_there) -> list[str]:
    """The texts that a config's value stands for: none, one, a list of them, or several with commas between.

    A text with commas is one where it is `known`, by default as the name of a file or folder.
    """
    if value is None or isinstance(value, list):
        return [str(one) for one in value or ()]
    text = str(value)
    return [text] if known(text) else [part.strip() for part in text.split(",")]


def trusts(config: Mapping[str, Any]) -> bool:
    """Whether a command's config says that the folders which it names are trusted. Raises ValueError for no boolean."""
    said = config.get("trust", False)
    if not isinstance(said, bool):
        raise ValueError(f"trust must be true or false, got {said!r}")
    return said


def read_config(path: Path) -> dict[str, Any]:
    """The config in a file as it stands there, to be looked at: neither resolved nor checked.

    Raises ValueError where it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("it holds an alias, by which a short file may stand for gigabytes")
        values = OmegaConf.to_container(OmegaConf.create(text))  # a safe loader of plain values
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error or type(error).__name__}") from error
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} is damaged: it holds no config")
    trust.follow_moves(values)
    return {str(key): value for key, value in values.items()}


def admitted(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config of somebody else's that may be built. Raises ValueError for what it may not name.

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
