"""Run directories: creates, locks and reopens them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from simsearch import __version__, configs, launch, slurm
from simsearch.files import read_json, replacing, write_json
from simsearch.saved_run import Run, open_run, read_config
from simsearch.text import warn

if TYPE_CHECKING:
    import pytorch_lightning as pl


@contextmanager
def start_run(config: DictConfig) -> Iterator[Run]:
    """Yields a new run directory (Hydra's) with config.yaml; with resume=true the existing one in `run_dir`.

    A resumed run keeps its own config. The directory is locked for this process inside the block. Under srun, rank 0
    creates the directory and the other ranks wait for it. A step that SLURM requeued continues in its own directory.

    Args:
        config: The composed config.

    Raises:
        ValueError: If there is no run to resume, if the folder of a new run holds a run with something to lose, or if
            another process is working on it.
    """
    if config.get("smoke"):
        make_few(config)
    resume = bool(config.get("resume"))
    folder = Path(config.run_dir if resume else HydraConfig.get().runtime.output_dir)
    instead = "" if resume else ", or give another run_dir="
    with _alone(folder, instead) if launch.rank() == 0 and folder.is_dir() else nullcontext():
        if resume:
            run = replace(open_run(folder, trusted=configs.trusts(config), own=_composed(config)), resumed=True)
            run = _with_length(run, config)
        else:
            config.run_dir = str(folder)  # in a sweep the job's own folder; other values refer to it
            values = _settled(config)
            run = _claim(folder, values) if launch.rank() == 0 else _await(folder, values)
        if run.resumed and launch.rank() == 0:
            print(f"resuming {run.folder} with its own config", file=sys.stderr)
        import pytorch_lightning as pl  # installed only with the extra train

        pl.seed_everything(run.config["seed"], workers=True, verbose=False)
        yield run


_WAIT_S = 10.0  # for loader processes of a run that was killed, which hold on to its lock until they see it


_LENGTH = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time")


def _with_length(run: Run, config: DictConfig) -> Run:
    """The resumed run with the length from the command line, which is also written to its config.yaml.

    Other differences from its own config are reported and ignored. Raises ValueError if the learning rate was scheduled
    for another length.
    """
    composed = _composed(config) or OmegaConf.to_container(config)
    own, new = DictConfig(run.config), DictConfig(composed)
    lengths, ignored = {}, []
    for text in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        (parsed,) = OverridesParser.create().parse_overrides([text])
        name = parsed.key_or_group.replace("/", ".")
        there, given = (_selected(values, name) for values in (own, new))
        if name.split(".")[0] in ("hydra", "resume", "run_dir", "run_root", "trust", "objective") or there == given:
            continue
        if name in _LENGTH:
            lengths[name.partition(".")[2]] = given
        else:
            ignored.append(text if isinstance(given, dict) else f"{text} (it has {there})")
    if ignored and launch.rank() == 0:
        warn(
            f"{run.folder} goes on with its own config and ignores {', '.join(ignored)}; start a new run to change them"
        )
    if not lengths:
        return run
    if set(lengths) - {"max_time"}:  # a limit of the time plans nothing
        _check_unplanned(run)
    if launch.rank() == 0:
        _forget_test(run.folder)  # it is of the former length
        values = read_config(run.folder / "config.yaml")
        values["trainer"].update(lengths)
        _write_config(run.folder, values, read_json(run.folder / "run.json"))
    return replace(run, config={**run.config, "trainer": {**run.config["trainer"], **lengths}})


def _check_unplanned(run: Run) -> None:
    """Raises ValueError if the learning rate or the weights of a run were brought to an end at its length."""
    scheduler = (run.config.get("model") or {}).get("scheduler") or {}
    if planned := [name for name in ("total_steps", "T_max", "total_iters") if name in scheduler]:
        raise ValueError(
            f"{run.folder} has a learning rate schedule that was planned for its length (scheduler.{planned[0]}="
            f"{scheduler[planned[0]]}): start a new run from it by model.start={run.folder}"
        )
    nodes = [node for node in (run.config.get("callbacks") or {}).values() if isinstance(node, Mapping)]
    if any(str(node.get("_target_")).endswith(".Lookahead") for node in nodes):
        raise ValueError(
            f"{run.folder} has Lookahead, which ends on the slow average at its length: start a new run from it by "
            f"model.start={run.folder}"
        )


def _forget_test(folder: Path) -> None:
    """Removes the results of test and evaluations, so that nobody takes them for those of the training that begins."""
    path = folder / "metrics.json"
    if path.is_file() and "test" in (stages := read_json(path)):
        write_json(path, {stage: about for stage, about in stages.items() if stage != "test"})
    (folder / "per_query.parquet").unlink(missing_ok=True)
    for measured in (folder / "evaluations").rglob("metrics.json"):
        measured.unlink()
        (measured.parent / "per_query.parquet").unlink(missing_ok=True)


def _selected(config: DictConfig, name: str) -> Any:
    value = OmegaConf.select(config, name, throw_on_resolution_failure=False)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _write_config(folder: Path, values: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes config.yaml, as the last file, and records its digest in run.json beside the other facts on the run."""
    text = OmegaConf.to_yaml(OmegaConf.create(dict(values)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_json(folder / "run.json", {**about, "sha256": {**about.get("sha256", {}), "config.yaml": digest}})
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _alone(folder: Path, instead: str) -> Iterator[None]:
    """Locks a run until the block or this process ends, whatever ends it.

    Raises ValueError if another process is working on it, with what else to do at its end.
    """
    lock = FileLock(folder / ".training")
    try:
        lock.acquire(timeout=_WAIT_S)
    except Timeout:
        raise ValueError(f"another process works on {folder} already: wait for it, or end it{instead}") from None
    try:
        yield
    finally:
        lock.release()


def make_few(config: DictConfig) -> None:
    """Reduces steps and sizes of a training's config to those of smoke=true, before anything refers to them.

    Args:
        config: The composed config, which is modified.
    """
    from simsearch import settings  # and with it the callbacks, Lightning's

    for key, most in settings.FEW.items():
        value = OmegaConf.select(config, key)
        if key == "trainer.max_steps" and not config.model.get("optimizer"):
            continue  # a model that is fitted has to see all images, of which there are few
        if isinstance(value, int) and (value > most or value < 0):
            OmegaConf.update(config, key, most)
    config.logger.tags = [*(config.logger.tags or []), "smoke"]
    print(
        "smoke=true: few images and few steps, to check that everything runs; its numbers mean nothing", file=sys.stderr
    )


def _settled(config: DictConfig) -> dict[str, Any]:
    """The plain config of a training on this machine, as its folder stores it."""
    values = configs.plain(config)
    values.pop("trust", None)  # the user says it for this command, about other folders
    values["trainer"] = launch.settle_devices(values["trainer"])
    return values


def _composed(config: DictConfig) -> dict[str, Any] | None:
    """The config that a command line with resume=true stands for. None if it only names the folder."""
    try:
        return _settled(config)
    except (OmegaConfBaseException, ValueError, LookupError):
        return None


def _claim(folder: Path, values: dict[str, Any]) -> Run:
    """Creates a run in an empty folder, or reopens the one this SLURM step created before it was requeued.

    config.yaml is written last: if a kill left a folder without it, nothing has begun.
    """
    if (folder / "config.yaml").is_file():
        if _is_ours(folder):
            return replace(open_run(folder, own=values), resumed=True)
        if _holds_work(folder):
            raise _taken(folder)
        for path in folder.glob("metrics*.csv"):  # of a start that failed
            path.unlink()
        (folder / "config.yaml").unlink()
    about = {"wandb_id": _new_id(), "slurm_step": slurm.step(), "versions": versions()}
    _write_config(folder, values, about)
    return Run(folder, values, trusted=True)


def _holds_work(folder: Path) -> bool:
    """Whether a run directory has a checkpoint or results. A start that failed or was killed early leaves neither."""
    return (folder / "metrics.json").is_file() or any(folder.glob("checkpoints/[!.]*.ckpt"))


def _new_id() -> str:
    """An id for W&B. If W&B's sweep agent started this process, its id."""
    given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    return given or uuid.uuid4().hex[:8]


def _await(folder: Path, values: Mapping[str, Any], seconds: float = 600.0) -> Run:
    """The run that rank 0 of this SLURM step creates, or created before the step was requeued."""
    deadline = time.monotonic() + seconds
    while not (_is_ours(folder) and (folder / "config.yaml").is_file()):
        if _is_ours(folder) is False and _holds_work(folder):
            raise _taken(folder)
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank {launch.rank()} waited {seconds:.0f} s for rank 0 to write {folder / 'config.yaml'}: "
                "look for what ended rank 0, or put run_root on a file system that all nodes share"
            )
        time.sleep(0.1)
    return replace(open_run(folder, own=values), resumed=True)


def _is_ours(folder: Path) -> bool | None:
    """Whether this SLURM step created the run directory. None if it does not exist yet."""
    try:
        step = read_json(folder / "run.json").get("slurm_step")
    except (OSError, ValueError):  # not there, or being written
        return None
    return step is not None and step == slurm.step()


def _taken(folder: Path) -> ValueError:
    return ValueError(f"{folder} already holds a run: continue it with resume=true, or give another run_dir")


def note_training(
    folder: Path,
    seconds: float,
    trainer: pl.Trainer,
    model: pl.LightningModule,
    pruned: Mapping[str, Any] | None = None,
) -> None:
    """Records in run.json the duration of a part of the training, its device, and the encoder's number of parameters.

    The parts of a resumed run are added up. A part that was killed without a chance to end is missing.

    Args:
        folder: The run directory.
        seconds: Duration of the part.
        trainer: The Trainer.
        model: The model.
        pruned: What was known when the training was pruned, or None.
    """
    about = {name: value for name, value in read_json(folder / "run.json").items() if name != "pruned"}
    about |= {} if pruned is None else {"pruned": dict(pruned)}
    cuda = trainer.strategy.root_device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    about["train_seconds"] = about.get("train_seconds", 0.0) + seconds
    about["device"] = name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"
    encoder: torch.nn.Module = model.encoder  # type: ignore[assignment]
    about["parameters"] = sum(parameter.numel() for parameter in encoder.parameters())
    write_json(folder / "run.json", about)


def versions() -> dict[str, str]:
    """Versions of everything that numbers may depend on. `commit` is simsearch's own, if known."""
    names = ("torch", "torchvision", "timm", "faiss-cpu", "pytorch-lightning", "numpy", "onnxruntime")
    own = {"simsearch": __version__} | ({"commit": known} if (known := commit()) else {})
    return own | {"python": sys.version.split()[0], **{name: metadata.version(name) for name in names}}


def commit() -> str | None:
    """The git commit of simsearch's source, with `-dirty` if files were changed since. None if unknown."""
    root = Path(configs.CONF).parent
    try:
        if (root / ".git").exists():
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
        source = json.loads(metadata.distribution("simsearch").read_text("direct_url.json") or "{}")
        return source.get("vcs_info", {}).get("commit_id")  # pip installed it from a repository
    except (OSError, ValueError, subprocess.SubprocessError, metadata.PackageNotFoundError):
        return None
