"""Optuna studies that several processes share: where a study is kept, and what a running trial tells it."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def open_storage(address: str) -> BaseStorage:
    """The storage of studies at an address.

    Args:
        address: A file, which is created if it is not there, or the address of a database, such as sqlite:///study.db.

    Raises:
        ValueError: If the storage cannot be opened.
    """
    try:
        if "://" in address:
            return optuna.storages.get_storage(address)
        path = Path(address).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(Journal(str(path)))
    except Exception as error:  # an older schema, no server, a driver that is not installed: each library has its own
        raise ValueError(f"hydra.sweeper.storage={address} cannot be opened: {_line(error)}") from error


class Journal(JournalFileBackend):
    """A journal file that several machines append to, and that survives the kill of whoever writes.

    A file opened exclusively is the lock, which also works on network file systems (NFSv3 and later). A lock whose
    owner was killed is broken after half a minute. A last line that a kill cut off is removed before the next is
    written; Optuna would join the two, and nobody could read the study any more.

    Args:
        path: The file, by its absolute path.
    """

    def __init__(self, path: str) -> None:
        self.path, self.lock = path, JournalFileOpenLock(path)
        super().__init__(path, self.lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends entries.

        Args:
            logs: The entries, plain values.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self.lock.acquire()
        try:
            with open(self.path, "r+b") as file:
                end = file.seek(0, os.SEEK_END)
                if end and (file.seek(end - 1), file.read(1)) != (end - 1, b"\n"):
                    file.seek(0)
                    end = file.read().rfind(b"\n") + 1
                file.seek(end)
                file.truncate()
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(RuntimeError):  # another process took this one for dead
                self.lock.release()


_PRUNED = "pruned_at"  # attribute of a trial: the validation after which the pruner ended it


class Reporter:
    """Tells a study about a trial's validations, and asks whether the trial should end.

    Args:
        storage: Address of the storage.
        study: Name of the study.
        number: Number of the trial.
        pruner: The pruner.
    """

    def __init__(self, storage: str, study: str, number: int, pruner: optuna.pruners.BasePruner) -> None:
        # The sampler would propose parameters once more.
        sampler = optuna.samplers.RandomSampler()
        known = optuna.load_study(study_name=study, storage=open_storage(storage), sampler=sampler, pruner=pruner)
        self.trial = optuna.trial.Trial(known, known.get_trials(deepcopy=False)[number]._trial_id)

    def __call__(self, value: float, validation: int) -> bool:
        """Whether the pruner ends the trial.

        Args:
            value: The objective.
            validation: Number of the validation, from 1.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resumed run repeats what it reported after its last checkpoint
            self.trial.report(value, validation)
        # A pruner that is asked again after a kill takes the rung for passed.
        if (before := self.trial.user_attrs.get(_PRUNED)) is not None and validation >= before:
            return True
        prune = self.trial.should_prune()
        if prune:
            self.trial.set_user_attr(_PRUNED, validation)
        return prune


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
