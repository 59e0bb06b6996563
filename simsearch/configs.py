"""Configs as plain values, and the objects that they describe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from simsearch import launch, slurm, trust, usage
from simsearch.saved_run import open_run

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import Logger

    from simsearch.data.datamodule import RetrievalDataModule
    from simsearch.types import Encoder

CONF = str(usage.CONF)


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as resolved plain values, without Hydra's own part.

    Args:
        config: The composed config.
    """
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    trust.follow_moves(values)
    return {str(key): value for key, value in values.items() if key != "hydra"}


def choice(group: str) -> str | None:
    """The file that the command took from a group of configs, or None where it takes none from that group.

    Args:
        group: The group's name, such as `rerank`.
    """
    name: str | None = HydraConfig.get().runtime.choices.get(group)
    return name


def see_as(config: DictConfig, own: Mapping[str, Any], encoder: Encoder) -> None:
    """Lets other data be decoded as an encoder sees images, unless their size and fit are given. Changes `config`.

    Args:
        config: The config of a command on a run.
        own: The plain config of the run.
        encoder: The run's encoder.
    """
    with open_dict(config):
        config.backbone = {**(own.get("backbone") or {}), "size": encoder.input_size, "fit": encoder.fit}


def overrides_of(*groups: str) -> list[str]:
    """The overrides of the command line that choose or change some groups of configs, in their order.

    Args:
        groups: Names of the groups, such as `data`.
    """
    mine = re.compile(rf"[+~]*(?:{'|'.join(map(re.escape, groups))})\b")
    return [text for text in HydraConfig.get().overrides.task if mine.match(text)]


def build(config: Mapping[str, Any]) -> Any:
    """The object that a plain config with `_target_` describes.

    Args:
        config: The plain config.
    """
    return hydra.utils.instantiate(OmegaConf.create(dict(config)), _convert_="all")


def build_data(config: Mapping[str, Any], protocol: Any = None) -> RetrievalDataModule:
    """The DataModule of a config, with its data read.

    Args:
        config: The plain config; its entry `data` is built.
        protocol: The protocol. None takes the config's own.
    """
    data = prepare_data(config, protocol)
    data.setup()
    if config.get("smoke"):
        data.shrink()
    return data


def prepare_data(config: Mapping[str, Any], protocol: Any = None) -> RetrievalDataModule:
    """The DataModule of a config. Its data are downloaded if the config asks for it, but not read.

    Args:
        config: The plain config; its entry `data` is built.
        protocol: The protocol. None takes the config's own.
    """
    node = OmegaConf.create(dict(config["data"]))
    # Not as an argument of instantiate, which would turn the protocol's dataclass into a config.
    partial = hydra.utils.instantiate(node, _convert_="all", _partial_=True)
    data = partial(protocol=protocol or build(config["protocol"]))
    data.prepare_data()
    return data


def build_trainer(
    config: Mapping[str, Any], folder: Path, loggers: list[Logger], more: Sequence[pl.Callback] = ()
) -> pl.Trainer:
    """The Trainer with its callbacks.

    Args:
        config: The plain config.
        folder: Folder that the Trainer writes to.
        loggers: The loggers.
        more: Further callbacks, after those of the config.
    """
    from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar  # which a search goes without

    from simsearch.callbacks.training import OwnCheckpoints, Throughput, WholeCheckpoints

    callbacks = [OwnCheckpoints(), *(build(node) for node in config["callbacks"].values() if node), *more]
    if config["trainer"].get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    # The last one sees a step's end last: what the others do there is not time spent waiting for data.
    callbacks.sort(key=lambda callback: isinstance(callback, Throughput))
    for callback in [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]:
        callback.dirpath = str(folder / "checkpoints")
        if callback.monitor is None and callback.filename == "best":
            callbacks.remove(callback)  # it would write the last weights at each epoch: `train` does so at the end
    values = {"use_distributed_sampler": False, **config["trainer"]}  # our loaders deal out to ranks themselves
    if values.get("strategy", "auto") in ("auto", "ddp"):
        # One process needs no group, whose port in a SLURM job is that of all its processes.
        values["strategy"] = {"_target_": "simsearch.callbacks.training.DataParallel"} if launch.is_rank() else "auto"
    trainer = hydra.utils.instantiate(
        OmegaConf.create(values), callbacks=callbacks, logger=loggers, default_root_dir=str(folder), _convert_="all"
    )
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    return trainer


_RESERVED = ("hydra", "resume", "run", "run_dir", "run_root", "trust")


def check_overrides(overrides: Sequence[str], where: str) -> None:
    """Checks that overrides from an untrusted source only set values of a config.

    Not allowed are options of the program, settings that tell Hydra where to look and what to start, output locations,
    trust, and interpolations.

    Args:
        overrides: The overrides.
        where: Where they come from, for the message.

    Raises:
        ValueError: If an override is malformed or does more than set a value (Untrusted).
    """
    for text in overrides:
        more = text.startswith("-") or "${" in text
        if not more:
            try:
                (parsed,) = OverridesParser.create().parse_overrides([text])
            except HydraException as error:
                raise ValueError(f"{where}: {text!r} is not an override: {str(error).splitlines()[0]}") from error
            more = any(re.split(r"[./]", name)[0] in _RESERVED for name in (parsed.key_or_group, parsed.package or ""))
        if more:
            raise trust.Untrusted(f"{where}: {text!r} does more than set a value of the config; {trust.TRUST_HINT}")


def is_there(name: str) -> bool:
    """Whether a file or folder of this name exists.

    Args:
        name: The path.
    """
    return Path(name).expanduser().exists()


def listed(value: Any, known: Callable[[str], bool] = is_there) -> list[str]:
    """The texts in a config value: none, one, a list, or several separated by commas.

    Args:
        value: The value.
        known: Function that says whether a text with commas is a single name. By default, it is if it names a file or
            folder.
    """
    if value is None or isinstance(value, list):
        return [str(one) for one in value or ()]
    text = str(value)
    return [text] if known(text) else [part.strip() for part in text.split(",")]


def trusts(config: Mapping[str, Any]) -> bool:
    """Whether a command's config says that the folders it names are trusted.

    Args:
        config: The composed config.

    Raises:
        ValueError: If `trust` is not a boolean.
    """
    said = config.get("trust", False)
    if not isinstance(said, bool):
        raise ValueError(f"trust must be true or false, got {said!r}")
    return said


# ------------------------------------------------------------------------------------ what conf/ asks for


def network_of(run: str, *, _root_: DictConfig) -> dict[str, Any]:
    """The node `model.network` of a trained run, for `${network_of:<run>}`.

    Args:
        run: The run directory.
        _root_: The config that asks; Hydra passes it.

    Raises:
        ValueError: If the run has no such node, or if the node names foreign objects and the config lacks trust=true.
    """
    model = open_run(Path(run), trusted=trusts(_root_)).config["model"]
    if "network" not in model:
        raise ValueError(f"{run} has no trained network, as model=dir has: its model is {model.get('_target_')}")
    return model["network"]


OmegaConf.register_new_resolver("network_of", network_of, replace=True)
OmegaConf.register_new_resolver(
    # Tasks of a SLURM step compose in different seconds, and again after a requeue, but must share a folder.
    "started",
    lambda now: now if (step := slurm.step()) is None else f"slurm-{step}",
    use_cache=True,  # a sweep's jobs compose again, in a step of their own, and get the cache of the sweep
    replace=True,
)
