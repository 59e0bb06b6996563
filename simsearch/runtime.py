"""All Hydra and OmegaConf glue: objects from a config, run directories."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from torch import nn

from simsearch import __version__, launch, settings, trust, usage
from simsearch.callbacks.training import OwnCheckpoints, WholeCheckpoints
from simsearch.files import Damaged, check_zip, note_change, read_json, replacing, write_json
from simsearch.models.backbones import WeightsError
from simsearch.text import cell, lines, warn

CONF = str(usage.CONF)
HEADLINES = ("mAP", "P@1", "P@10", "R@10")
RESULT_COLUMNS = (
    *("row", "data", "protocol", "fingerprint", "metric", "value", "ci_low", "ci_high", "unit", "units"),
    *("queries", "bytes_per_item", "seconds", "seed", "command"),
)


# ------------------------------------------------------------------------------- commands and errors


MENDABLE = (
    *(ValueError, OSError, WeightsError, InstantiationException, OmegaConfBaseException),
    MisconfigurationException,  # what Lightning calls a user's mistake
    ModuleNotFoundError,  # what is not installed
)


def command(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """A decorator that makes `task(config)` a Hydra command composed from conf/<name>.yaml.

    What a user can mend (MENDABLE: a wrong value, a missing file) ends in one line, not in a traceback;
    SIMSEARCH_DEBUG=1 shows the traceback. What the task returns is what a sweeper optimises.
    """

    title = name.replace("_", " ")

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        told = []

        def guarded(config: DictConfig) -> Any:
            quiet_libraries()
            if multiprocessing.get_start_method(allow_none=True) == "loky":  # joblib's, which starts no others
                multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
            try:
                return task(config)
            except Exception as error:
                logging.getLogger("simsearch").info("failed", exc_info=True)  # where a command keeps a log
                mendable = isinstance(error, (*MENDABLE, launch.RankError))
                if not mendable or os.environ.get("SIMSEARCH_DEBUG") == "1":
                    raise
                if isinstance(error, launch.RankError) and error.details:
                    print(error.details, file=sys.stderr)
                warn(f"simsearch {title}: {reason(error, title)}")
                told.append(error)
                if HydraConfig.get().mode is RunMode.MULTIRUN:
                    raise  # an exit would end the sweep; an exception fails this job alone
                remove_unused(Path(HydraConfig.get().runtime.output_dir))
                raise SystemExit(1) from None

        program = hydra.main(version_base="1.3", config_path=CONF, config_name=name)(guarded)

        @wraps(task)
        def main() -> None:
            given = os.environ.get("HYDRA_FULL_ERROR")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here, where they get one line and a mend
            try:
                sys.argv[1:] = [without_null(argument) for argument in sys.argv[1:]]
                program()
            except (*MENDABLE, launch.RankError, HydraException) as error:
                if os.environ.get("SIMSEARCH_DEBUG") == "1":
                    raise
                if not told:
                    warn(f"simsearch {title}: {reason(error, title)}")
                raise SystemExit(1) from None
            finally:
                told.clear()
                for handler in logging.getLogger("simsearch").handlers[:]:  # its log is that of this command alone
                    logging.getLogger("simsearch").removeHandler(handler)
                    handler.close()
                os.environ.pop("HYDRA_FULL_ERROR")
                if given is not None:
                    os.environ["HYDRA_FULL_ERROR"] = given

        return main

    return decorate


def remove_unused(folder: Path) -> None:
    """Removes the folder that Hydra made for a command, where nothing but our own notes, log and lock are in it."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() and folder.resolve() != Path.cwd() else set()
    if there and there <= {".hydra", ".training", "train.log"}:
        shutil.rmtree(folder)


def without_null(argument: str) -> str:
    """An override `group=null`, which Hydra does not take, as `group=none` where the group has that option.

    Raises ValueError with the group's options where it has not. Other arguments stay as they are.
    """
    group, _, value = argument.partition("=")
    folder = Path(CONF) / group
    if value != "null" or not re.fullmatch(r"[\w/]+", group) or not folder.is_dir():
        return argument
    options = sorted(path.stem for path in folder.glob("*.yaml"))
    if "none" not in options:
        raise ValueError(f"{argument}: one of the group's options is needed: {', '.join(options)}")
    return f"{group}=none"


def reason(error: BaseException, command: str = "") -> str:
    """The message of an error, without Hydra's wrapping where there is one. command: whose keys it may be about."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        cause = error.__cause__
        key = str(error).rpartition("full_key: ")[2].strip()
        return f"{key}: {reason(cause, command)}" if key and key != str(error) else reason(cause, command)
    if isinstance(error, InterpolationResolutionError):  # what a resolver of ours raised comes in three lines
        return re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0])
    if isinstance(error, MisconfigurationException):
        return str(error).strip().split("\n")[0]
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, MissingMandatoryValue):
        key = (re.findall(r"full_key: ([^\s]+)", str(error)) or re.findall(r"value: ([^\s]+)", first) or [first])[0]
        return f"{key} has no value: {usage.about_key(command, key)}"
    if found := re.match(r"Could not override '([^']+)'|Could not append|Key '([^']+)' is not in struct", first):
        key = found[1] or found[2] or ""
        known = usage.known_keys(command) if command else []
        if key in known:
            return f"{key} is a key of another option than the one that is chosen for {key.partition('.')[0]}"
        return f"there is no key {key}{usage.suggest(key, known)} (+{key}=... adds it all the same)" if key else first
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read ({str(error.message).splitlines()[0]}): put a value with brackets, "
            "commas or spaces in quotes twice, as in key=\"'a, b'\""
        )
    if isinstance(error, HydraException):
        return " ".join(str(error).split())
    return str(error) or type(error).__name__


def quiet_libraries() -> None:
    """Silences messages that say nothing to a user of this program."""
    for text in (
        ".*does not have many workers.*",
        ".*`configure_optimizers` returned `None`.*",
        ".*LightningModule.configure_optimizers. returned .None.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*`training_step` returned `None`.*",
        ".*There is a wandb run already in progress.*",
        ".*is an instance of `nn.Module` and is already saved during checkpointing.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*`srun` command is available on your system but is not used.*",
        ".*`self.log\\(.*sync_dist=True.*",  # what is logged is equal on all ranks, or of one
        ".*module\\(s\\) in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", message=text)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for name in (
        "pytorch_lightning.accelerators",
        "pytorch_lightning.trainer.connectors.signal_connector",
        "lightning_fabric.utilities.distributed",
        "faiss.loader",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)


# ------------------------------------------------------------------------------- configs and objects


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as resolved plain values, Hydra's own part left out."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key != "hydra"}


def build(config: Mapping[str, Any]) -> Any:
    """The object that a plain config with `_target_` describes."""
    return hydra.utils.instantiate(OmegaConf.create(dict(config)), _convert_="all")


def build_data(config: Mapping[str, Any], protocol: Any = None) -> pl.LightningDataModule:
    """The DataModule of `config["data"]` with its data read, under `protocol` or that of the config."""
    data = prepare_data(config, protocol)
    data.setup()
    if config.get("smoke"):
        data.shrink()
    return data


def prepare_data(config: Mapping[str, Any], protocol: Any = None) -> pl.LightningDataModule:
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
    callbacks = [OwnCheckpoints(), *(build(node) for node in config["callbacks"].values() if node), *more]
    if config["trainer"].get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = str(folder / "checkpoints")
    values = {"use_distributed_sampler": False, **config["trainer"]}  # our loaders deal out to ranks themselves
    if launch.is_rank() and values.get("strategy", "auto") in ("auto", "ddp"):
        values["strategy"] = {"_target_": "simsearch.launch.DataParallel"}
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


def network_of(run: str, *, _root_: DictConfig) -> dict[str, Any]:
    """The node `model.network` of a run of a trained family, for `${network_of:<run>}`.

    Raises ValueError where it has none, or names what is not ours and the config does not say trust=true.
    """
    model = open_run(Path(run), trusted=trusts(_root_)).config["model"]
    if "network" not in model:
        raise ValueError(f"{run} has no trained network, as model=dir has: its model is {model.get('_target_')}")
    return model["network"]


OmegaConf.register_new_resolver("network_of", network_of, replace=True)


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


# ------------------------------------------------------------------------------------ run directories


@dataclass(frozen=True)
class Run:
    """A run directory and the plain config in it.

    resumed: it goes on from its last checkpoint. trusted: this process composed the config, or the user said so.
    """

    folder: Path
    config: dict[str, Any]
    resumed: bool = False
    trusted: bool = False


@contextmanager
def start_run(config: DictConfig) -> Iterator[Run]:
    """A new run directory (Hydra's) with config.yaml; with resume=true the one in `run_dir`, with its config.

    It is this process's while the context lasts. Under srun rank 0 makes it and the others wait for it; a step that
    SLURM queued again goes on in its own.

    Raises ValueError where there is no run to resume, where the folder of a new run holds one already that has
    something to lose, and where another process has it in work.
    """
    if config.get("smoke"):
        make_few(config)
    resume = bool(config.get("resume"))
    folder = Path(config.run_dir if resume else HydraConfig.get().runtime.output_dir)
    with _alone(folder) if launch.rank() == 0 and folder.is_dir() else nullcontext():
        if resume:
            run = replace(open_run(folder, trusted=trusts(config), own=_composed(config)), resumed=True)
            run = _with_length(run, config)
        else:
            config.run_dir = str(folder)  # in a sweep the job's own folder; other values refer to it
            values = _settled(config)
            run = _claim(folder, values) if launch.rank() == 0 else _await(folder, values)
        if run.resumed and launch.rank() == 0:
            print(f"resuming {run.folder} with its own config", file=sys.stderr)
        pl.seed_everything(run.config["seed"], workers=True, verbose=False)
        yield run


_WAIT_S = 10.0  # for loader processes of a run that was killed, which hold on to its lock until they see it
_LENGTH = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time")


def _with_length(run: Run, config: DictConfig) -> Run:
    """The resumed run with the length that the command line gives, which its config.yaml has from now on.

    What else is given otherwise than its own config has it is told, and ignored. Raises ValueError where the learning
    rate was planned for another length.
    """
    composed = _composed(config) or OmegaConf.to_container(config)
    own, config = OmegaConf.create(run.config), OmegaConf.create(composed)
    lengths, ignored = {}, []
    for text in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        (parsed,) = OverridesParser.create().parse_overrides([text])
        name = parsed.key_or_group.replace("/", ".")
        there, given = (_selected(values, name) for values in (own, config))
        if name.split(".")[0] in ("hydra", "resume", "run_dir", "run_root", "trust", "objective") or there == given:
            continue
        if name in _LENGTH:
            lengths[name.partition(".")[2]] = given
        else:
            ignored.append(text if isinstance(given, dict) else f"{text} (it has {there})")
    if ignored and launch.rank() == 0:
        warn(f"{run.folder} goes on with its own config, without {', '.join(ignored)}; for another one start a new run")
    if not lengths:
        return run
    scheduler = (run.config.get("model") or {}).get("scheduler") or {}
    if planned := [name for name in ("total_steps", "T_max", "total_iters") if name in scheduler]:
        raise ValueError(
            f"{run.folder} has a learning rate that was planned for its length (scheduler.{planned[0]}="
            f"{scheduler[planned[0]]}): start a new run from it by model.start={run.folder}"
        )
    if launch.rank() == 0:
        values = read_config(run.folder / "config.yaml")
        values["trainer"].update(lengths)
        _write_config(run.folder, values, read_json(run.folder / "run.json"))
    return replace(run, config={**run.config, "trainer": {**run.config["trainer"], **lengths}})


def _selected(config: DictConfig, name: str) -> Any:
    value = OmegaConf.select(config, name, throw_on_resolution_failure=False)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _write_config(folder: Path, values: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes config.yaml, last, and its digest into run.json, beside what is known about the run."""
    text = OmegaConf.to_yaml(OmegaConf.create(dict(values)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_json(folder / "run.json", {**about, "sha256": {**about.get("sha256", {}), "config.yaml": digest}})
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from training this run, until the context or this process ends, however it does.

    Raises ValueError where another one has it in work.
    """
    lock = FileLock(folder / ".training")
    try:
        lock.acquire(timeout=_WAIT_S)
    except Timeout:
        raise ValueError(f"{folder} is in work already, by another process: wait for it, or end it") from None
    try:
        yield
    finally:
        lock.release()


def make_few(config: DictConfig) -> None:
    """Cuts the steps and sizes of a training's config down to those of smoke=true, before anything refers to them."""
    for key, most in settings.FEW.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, int) and (value > most or value < 0):
            OmegaConf.update(config, key, most)
    config.logger.tags = [*(config.logger.tags or []), "smoke"]
    print("smoke=true: few images and few steps, to see that everything runs; its numbers say nothing", file=sys.stderr)


def _settled(config: DictConfig) -> dict[str, Any]:
    """The plain config of a training on this machine, as its folder will hold it."""
    values = plain(config)
    values.pop("trust", None)  # what the user says here and now, of other folders
    values["trainer"] = launch.settle_devices(values["trainer"])
    return values


def _composed(config: DictConfig) -> dict[str, Any] | None:
    """The config that a command line with resume=true stands for; None where it only names the folder."""
    try:
        return _settled(config)
    except (OmegaConfBaseException, ValueError, LookupError):
        return None


def _claim(folder: Path, values: dict[str, Any]) -> Run:
    """The run of a folder that no other one has, or that this SLURM step had before it was queued again.

    config.yaml is written last: where a kill left a folder without it, nothing has begun.
    """
    if (folder / "config.yaml").is_file():
        if _is_ours(folder):
            return replace(open_run(folder, own=values), resumed=True)
        if _holds_work(folder):
            raise _taken(folder)
        for path in folder.glob("metrics*.csv"):  # of a start that failed
            path.unlink()
        (folder / "config.yaml").unlink()
    about = {"wandb_id": _new_id(), "slurm_step": launch.slurm_step(), "versions": versions()}
    _write_config(folder, values, about)
    return Run(folder, values, trusted=True)


def _holds_work(folder: Path) -> bool:
    """Whether a run directory has a checkpoint or results: what a start that failed, or a kill before them, lacks."""
    return (folder / "metrics.json").is_file() or any(folder.glob("checkpoints/[!.]*.ckpt"))


def _new_id() -> str:
    """An id for W&B: the one that its agent gave, where a sweep of W&B's started this process."""
    given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    return given or uuid.uuid4().hex[:8]


def _await(folder: Path, values: Mapping[str, Any], seconds: float = 600.0) -> Run:
    """The run that rank 0 of this SLURM step makes, or had made before the step was queued again."""
    deadline = time.monotonic() + seconds
    while not (_is_ours(folder) and (folder / "config.yaml").is_file()):
        if _is_ours(folder) is False and _holds_work(folder):
            raise _taken(folder)
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank {launch.rank()} waited {seconds:.0f} s for rank 0 to write {folder / 'config.yaml'}: "
                "see what ended rank 0, or put run_root on a file system that all nodes share"
            )
        time.sleep(0.1)
    return replace(open_run(folder, own=values), resumed=True)


def _is_ours(folder: Path) -> bool | None:
    """Whether this SLURM step made the run directory; None where nobody did yet."""
    try:
        step = read_json(folder / "run.json").get("slurm_step")
    except (OSError, ValueError):  # not there, or being written
        return None
    return step is not None and step == launch.slurm_step()


def _taken(folder: Path) -> ValueError:
    return ValueError(f"{folder} holds a run already: go on with it by resume=true, or give another run_dir")


OmegaConf.register_new_resolver(
    # Tasks of a SLURM step compose in different seconds, and again after a requeue, but must share a folder.
    "started",
    lambda now: now if (step := launch.slurm_step()) is None else f"slurm-{step}",
    replace=True,
)


def note_training(folder: Path, seconds: float, trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Adds to run.json how long a part of the training took, on what, and how many parameters the encoder has.

    The parts of a resumed run add up; one that was killed without a chance to end is missing.
    """
    about = read_json(folder / "run.json")
    cuda = trainer.strategy.root_device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    about["train_seconds"] = about.get("train_seconds", 0.0) + seconds
    about["device"] = name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"
    about["parameters"] = sum(parameter.numel() for parameter in model.encoder.parameters())
    write_json(folder / "run.json", about)


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
    return {str(key): value for key, value in values.items()}


def read_run(folder: Path) -> Run:
    """A run directory whose config is looked at only, never built. Raises ValueError where it is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is no run directory: it has no config.yaml. Give one that `simsearch train` made")
    values = read_config(path)
    if (folder / "run.json").is_file():
        note_change(folder, path.name, read_json(folder / "run.json"))
    return Run(folder, values | {"run_dir": str(folder)})


def open_run(folder: Path, *, trusted: bool = False, own: Mapping[str, Any] | None = None) -> Run:
    """An existing run directory, to build from.

    Somebody else may have made it, so that its config builds what simsearch.trust allows and no link leads out of it,
    unless it is `trusted`. own: the config that this process composed of its command line; where the folder holds just
    that, it may build what it likes, as the command line may.

    Raises ValueError where `folder` is no run directory, or not trusted.
    """
    run = read_run(folder)
    if not trusted:
        trust.check_links(folder)
    if not trusted and (own is None or not _equal(run.config, own)):
        return replace(run, config=admitted(run.config, str(folder / "config.yaml")))
    try:
        values = OmegaConf.to_container(OmegaConf.create(run.config), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{folder / 'config.yaml'} is damaged: {error}") from error
    assert isinstance(values, dict)
    return replace(run, config={str(key): value for key, value in values.items()}, trusted=True)


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs are one, wherever it lies and however it was started."""
    aside = ("run_dir", "resume", "trust")
    return all(one.get(name) == other.get(name) for name in (one.keys() | other.keys()) - set(aside))


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


def load_model(run: Run) -> pl.LightningModule:
    """The model of a finished run with its best checkpoint. Raises ValueError where none fits."""
    path = run.folder / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise ValueError(f"{run.folder} has no checkpoints/best.ckpt: its training did not finish; resume it")
    model = build(run.config["model"])
    try:
        checkpoint = torch.load(check_zip(path), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, Damaged) as error:
        raise ValueError(f"{path} is damaged or holds more than tensors: {error}") from error
    try:
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (LookupError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the model in {run.folder / 'config.yaml'}: {error}") from error
    return model.eval().requires_grad_(False)


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on; `commit` is simsearch's own, where it is known."""
    names = ("torch", "torchvision", "timm", "faiss-cpu", "pytorch-lightning", "numpy", "onnxruntime")
    own = {"simsearch": __version__} | ({"commit": known} if (known := commit()) else {})
    return own | {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}


def commit() -> str | None:
    """The git commit of simsearch's source, `-dirty` where files were changed since; None where it is unknown."""
    root = Path(CONF).parent
    try:
        if (root / ".git").exists():
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
        source = json.loads(metadata.distribution("simsearch").read_text("direct_url.json") or "{}")
        return source.get("vcs_info", {}).get("commit_id")  # pip installed it from a repository
    except (OSError, ValueError, subprocess.SubprocessError, metadata.PackageNotFoundError):
        return None


# -------------------------------------------------------------------------------------------- reports


def results_table(
    stages: Mapping[str, Any], only: tuple[str, ...] = ("val", "test"), parts: tuple[str, ...] = ("rerank",)
) -> Table:
    """The headline numbers of metrics.json as a table: value and 95% interval, bytes, latency.

    parts: of what else there are rows, where it was measured: "rerank", after re-ranking; "index", of the lists that
    the index gives.
    """
    table = Table(title="Retrieval results (95% intervals by unit of chance)")
    table.add_column("protocol", no_wrap=True)
    table.add_column("unit", justify="right", overflow="fold")
    for name in (*HEADLINES, "bytes/image", "ms/query p50"):
        table.add_column(name, justify="right", overflow="fold")
    dash = "-" if console().width >= 118 else "-\n"
    notes: dict[str, None] = {}  # each once, in order
    for stage in only:
        if stage not in stages:
            continue
        about = stages[stage]
        metrics = about["metrics"]
        first = f"{cell(about['protocol'])}\n[dim]{cell(about['fingerprint'])}[/dim]"
        costs = [f"{metrics['bytes_per_item']:.0f}", f"{metrics['index/latency_ms_p50']:.2f}"]
        table.add_row(first, "{}\n[dim]{}[/dim]".format(*unit(about)), *_headlines(about, "", dash), *costs)
        for part in parts:
            cells = _headlines(about, f"{part}/", dash)
            if set(cells) != {"-"}:
                table.add_row({"rerank": "  re-ranked", "index": "  by the index"}[part], "", *cells, "", "")
        if "index" in parts and metrics.get("index/recall@10") is not None:
            notes[f"the index returns {metrics['index/recall@10']:.1%} of the ten nearest by exact search"] = None
        if (about.get("model") or {}).get("weights") == "random":
            notes["random weights: these numbers say nothing about a trained network"] = None
        if metrics.get("queries_in_own_ranking"):
            notes[f"{about['protocol']}: each query is in its own ranking: P@1 and R@k count it"] = None
    table.caption = "\n".join(notes) or None
    return table


def _headlines(about: Mapping[str, Any], prefix: str, dash: str) -> list[str]:
    cells = []
    for name in (f"{prefix}{headline}" for headline in HEADLINES):
        value, ends = about["metrics"].get(name), about["intervals"].get(name)
        interval = f"\n[dim]{ends[0]:.4f}{dash}{ends[1]:.4f}[/dim]" if ends else ""
        cells.append("-" if value is None else f"{value:.4f}{interval}")
    return cells


def result_lines(
    about: Mapping[str, Any], names: Sequence[str], *, row: str, data: str, seconds: float, seed: int, command: str
) -> list[list[Any]]:
    """Lines of a study's results.csv (RESULT_COLUMNS) for one stage of a metrics.json, one a metric that it has."""
    metrics, intervals = about["metrics"], about["intervals"]
    head = [row, data, about["protocol"], about["fingerprint"]]
    over = unit(about)
    tail = [int(metrics["queries"]), int(metrics["bytes_per_item"]), round(seconds, 1), seed, command]
    ends = {name: (*intervals[name], *over) if name in intervals else [""] * 4 for name in names}
    return [[*head, name, metrics[name], *ends[name], *tail] for name in names if name in metrics]


def unit(about: Mapping[str, Any]) -> tuple[str, int]:
    """The unit of chance of one stage of a metrics.json and how many there are; before it was named, the queries."""
    return (about["unit"], about["units"]) if "unit" in about else ("query", int(about["metrics"]["queries"]))


def console() -> Console:
    """The terminal, as wide as it is or COLUMNS says; 120 columns where it is none."""
    told = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console() if told else Console(width=120)


def show(*what: Any) -> None:
    """Prints to the terminal, tables included; whatever their text holds gives the terminal no orders."""
    terminal = console()
    terminal.push_render_hook(_Harmless())
    for item in what:
        terminal.print(item)


class _Harmless(RenderHook):
    """Writes control characters in what is shown as escapes."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


@dataclass(frozen=True)
class _Shown:
    renderable: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else lines(text), style, control)
