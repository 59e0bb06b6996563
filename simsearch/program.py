"""Starts and ends a command: Hydra composes its config, and a user's error is reported in one line."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from simsearch import configs, launch, slurm, usage
from simsearch.models.backbones import WeightsError
from simsearch.text import warn

USER_ERRORS: tuple[type[Exception], ...] = (
    *(ValueError, OSError, WeightsError, InstantiationException, OmegaConfBaseException),
    ModuleNotFoundError,  # something is not installed
)


def user_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The kinds of errors that a user can fix: USER_ERRORS, Lightning's own, and `others`.

    Args:
        others: More kinds.
    """
    return (*USER_ERRORS, *_lightning_errors(), *others)


def _lightning_errors() -> tuple[type[Exception], ...]:
    """Lightning's error for a user's mistake. Empty where Lightning is not loaded: a search should not load it."""
    module = sys.modules.get("pytorch_lightning.utilities.exceptions")
    return () if module is None else (module.MisconfigurationException,)


def command(name: str, *, resumes: bool = False) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """A decorator that turns `task(config)` into a Hydra command composed from conf/<name>.yaml.

    An error that a user can fix (`user_errors`: a wrong value, a missing file) is one line without a traceback.
    SIMSEARCH_DEBUG=1 shows the traceback. A sweeper optimises the value that the task returns.

    Args:
        name: Name of the config.
        resumes: The same command goes on with what it began: a SLURM job of it that runs out of time is queued again.
    """

    title = name.replace("_", " ")

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        reported = []

        def guarded(config: DictConfig) -> Any:
            quiet_libraries()
            if multiprocessing.get_start_method(allow_none=True) == "loky":  # joblib's, which starts no others
                multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
            try:
                with _requeued(resumes):  # here too, since a cluster's job comes without main
                    return task(config)
            except Exception as error:
                if (log := logging.getLogger("simsearch")).handlers:  # where a command keeps a log, not the terminal
                    log.info("failed", exc_info=True)
                expected = isinstance(error, user_errors(launch.RankError))
                if not expected or os.environ.get("SIMSEARCH_DEBUG") == "1":
                    raise
                if isinstance(error, launch.RankError) and error.details:
                    print(error.details, file=sys.stderr)
                warn(f"simsearch {title}: {reason(error, title)}")
                reported.append(error)
                if HydraConfig.get().mode is RunMode.MULTIRUN:
                    raise  # an exit would end the sweep; an exception fails this job alone
                remove_unused(Path(HydraConfig.get().runtime.output_dir))
                raise SystemExit(1) from None

        program = hydra.main(version_base="1.3", config_path=configs.CONF, config_name=name)(guarded)

        @wraps(task)
        def main() -> None:
            given = os.environ.get("HYDRA_FULL_ERROR")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here, where they are reported in one line
            try:
                sys.argv[1:] = [without_null(argument) for argument in sys.argv[1:]]
                with _requeued(resumes):  # between the runs of a sweep
                    program()
            except user_errors(launch.RankError, HydraException) as error:
                if os.environ.get("SIMSEARCH_DEBUG") == "1":
                    raise
                if not reported:
                    warn(f"simsearch {title}: {reason(error, title)}")
                raise SystemExit(1) from None
            finally:
                reported.clear()
                for handler in logging.getLogger("simsearch").handlers[:]:  # its log is that of this command alone
                    logging.getLogger("simsearch").removeHandler(handler)
                    handler.close()
                os.environ.pop("HYDRA_FULL_ERROR")
                if given is not None:
                    os.environ["HYDRA_FULL_ERROR"] = given

        return main

    return decorate


def _requeued(resumes: bool) -> AbstractContextManager[None]:
    return slurm.requeued_if_warned(launch.rank()) if resumes else nullcontext()


def remove_unused(folder: Path) -> None:
    """Removes the folder that Hydra made for a command if it only holds our notes, log and lock.

    Args:
        folder: The folder.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() and folder.resolve() != Path.cwd() else set()
    if there and there <= {".hydra", ".training", "train.log"}:
        shutil.rmtree(folder)


def without_null(argument: str) -> str:
    """Replaces an override `group=null`, which Hydra rejects, by `group=none` if the group has this option.

    Other arguments are returned unchanged.

    Args:
        argument: An argument of the command line.

    Raises:
        ValueError: If the group has no such option. The error lists its options.
    """
    group, _, value = argument.partition("=")
    folder = Path(configs.CONF) / group
    if value != "null" or not re.fullmatch(r"[\w/]+", group) or not folder.is_dir():
        return argument
    options = sorted(path.stem for path in folder.glob("*.yaml"))
    if "none" not in options:
        raise ValueError(f"{argument} is not possible here: leave {group}= out, or take one of {', '.join(options)}")
    return f"{group}=none"


def reason(error: BaseException, command: str = "") -> str:
    """The message of an error, without Hydra's wrapping.

    Args:
        error: The error.
        command: Name of the command whose keys the error may be about.
    """
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        cause = error.__cause__
        key = str(error).rpartition("full_key: ")[2].strip()
        return f"{key}: {reason(cause, command)}" if key and key != str(error) else reason(cause, command)
    if isinstance(error, InterpolationResolutionError):  # an error of our resolvers comes in three lines
        return re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0])
    if isinstance(error, _lightning_errors()):
        return str(error).strip().split("\n")[0]
    if isinstance(error, ModuleNotFoundError):
        return usage.missing(error)
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, MissingMandatoryValue):
        key = (re.findall(r"full_key: ([^\s]+)", str(error)) or re.findall(r"value: ([^\s]+)", first) or [first])[0]
        return f"{key} has no value: {usage.about_key(command, key)}"
    if found := re.match(r"Could not override '([^']+)'|Could not append|Key '([^']+)' is not in struct", first):
        key = found[1] or found[2] or ""
        known = usage.known_keys(command) if command else []
        if key in known:
            group = key.partition(".")[0]
            return f"{key} belongs to an option of {group} that is not chosen: give {group}=<the option> too"
        return f"there is no key {key}{usage.suggest(key, known)} (+{key}=... adds it anyway)" if key else first
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read ({str(error.message).splitlines()[0]}): quote a value with brackets, "
            "commas or spaces twice, as in key=\"'a, b'\""
        )
    if isinstance(error, HydraException):
        return " ".join(str(error).split())
    return str(error) or type(error).__name__


def quiet_libraries() -> None:
    """Silences messages of libraries that are useless to a user of this program."""
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
