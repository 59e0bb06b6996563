"""What long trainings want: throughput, randomness that resumes, a checkpoint when the scheduler says stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException


class Throughput(pl.Callback):
    """Logs images a second of all ranks (`train/images_per_s`) and the share of time spent waiting for data.

    Both are running means over about the last 50 batches; validation does not count.
    """

    def __init__(self) -> None:
        self._ready = self._seconds = self._waited = self._images = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited = 0.98 * self._waited + (time.perf_counter() - self._ready)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._seconds = 0.98 * self._seconds + (now - self._ready)
        self._images = 0.98 * self._images + len(batch["index"]) * trainer.world_size
        pl_module.log_dict(
            {"train/images_per_s": self._images / self._seconds, "train/data_share": self._waited / self._seconds},
            batch_size=1,
        )
        trainer.progress_bar_metrics["img/s"] = round(self._images / self._seconds)
        self._ready = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready = time.perf_counter()


class StepSeed(pl.Callback):
    """Seeds torch before each training batch from (seed, rank, batches so far).

    So augmentation and dropout of a batch depend on nothing that happened before, and a resumed run
    goes on as the uninterrupted one would have.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.batches = seed, 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.batches = state_dict["batches"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        self._seed(trainer)

    def _seed(self, trainer: pl.Trainer) -> None:
        state = np.random.SeedSequence([self.seed, trainer.global_rank, self.batches]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0] >> 1))


class SaveOnSigterm(pl.Callback):
    """On SIGTERM writes last.ckpt into the ModelCheckpoint's folder, from which `resume=true` goes on.

    The batch in work is finished first; the run then ends with the signal's exit status.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            folder = next(c.dirpath for c in trainer.callbacks if isinstance(c, ModelCheckpoint))
            trainer.save_checkpoint(Path(str(folder)) / "last.ckpt")
