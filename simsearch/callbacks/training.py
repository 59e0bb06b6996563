"""Callbacks for long trainings: throughput, randomness and checkpoints that resume exactly, weight averaging."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from simsearch.files import replacing

_WARM, _TIMED = 2, 4  # batches before the time estimate, and during it
_SLOW_BF16 = "; this processor has no bf16 arithmetic: trainer.precision=32-true may be several times as fast"
_WORTH_SAYING_S = 180.0


class Throughput(pl.Callback):
    """Logs the images per second of all ranks (`train/images_per_s`) and the fraction of time spent waiting for data.

    The fraction is `train/data_share`. Both are running means over about the last 50 batches, without validation. After
    a few batches the callback prints how long the training will take.
    """

    def __init__(self) -> None:
        self._ready = self._seconds = self._waited = self._images = 0.0
        self._started, self._batches = 0.0, -_WARM

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = -_WARM
        self._ready = time.perf_counter()  # after a resume in the middle of an epoch no epoch start is reported

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
        # Logging values that are not shown would cost a small network a tenth of its step.
        if trainer._logger_connector.should_update_logs or trainer.is_last_batch:
            pl_module.log_dict(
                {"train/images_per_s": self._images / self._seconds, "train/data_share": self._waited / self._seconds},
                batch_size=1,
            )
        trainer.progress_bar_metrics["img/s"] = round(self._images / self._seconds)
        self._forecast(trainer, now)
        self._ready = time.perf_counter()

    def _forecast(self, trainer: pl.Trainer, now: float) -> None:
        """Prints once an estimate of the training time from the first batches, if it is more than a few minutes."""
        self._batches += 1
        if self._batches == 0:
            self._started = now
        if self._batches != _TIMED or not trainer.is_global_zero:
            return
        left = (trainer.estimated_stepping_batches - trainer.global_step) * trainer.accumulate_grad_batches
        seconds = left * (now - self._started) / _TIMED
        if _WORTH_SAYING_S < seconds < math.inf:
            hours, minutes = divmod(round(seconds / 60), 60)
            print(
                f"about {f'{hours} h ' if hours else ''}{minutes} min of training ahead ({left:.0f} batches, "
                "plus mining and validation); smoke=true tries the experiment in a minute"
                + _SLOW_BF16
                * (trainer.precision == "bf16-mixed" and not _has_bf16(trainer.strategy.root_device)),
                file=sys.stderr,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ready = time.perf_counter()


def _has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 itself, as far as torch can say."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class StepSeed(pl.Callback):
    """Seeds torch before each training batch from the seed, the rank and the number of batches so far.

    Augmentation and dropout of a batch then depend on nothing that happened before, and a resumed run continues as the
    uninterrupted run would have.

    Args:
        seed: Seed of the run.
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

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(trainer)  # its loaders drew from the generator, which a run resumed from here would not have done

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(trainer)

    def _seed(self, trainer: pl.Trainer) -> None:
        state = np.random.SeedSequence([self.seed, trainer.global_rank, self.batches]).generate_state(1, np.uint64)
        seed, kind = int(state[0] >> 1), trainer.strategy.root_device.type
        if kind not in ("cpu", "cuda"):
            torch.manual_seed(seed)
            return
        # torch.manual_seed would record a stack trace for each kind of device that is missing.
        torch.default_generator.manual_seed(seed)
        if kind == "cuda":
            torch.cuda.manual_seed(seed)


class SaveOnSigterm(pl.Callback):
    """Writes last.ckpt when Interruption stops a training. The run continues with `resume=true`."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and trainer.state.fn == TrainerFn.FITTING:
            trainer.save_checkpoint(last_checkpoint(Path(trainer.default_root_dir)), weights_only=False)


def last_checkpoint(run: Path) -> Path:
    """The checkpoint that `resume=true` continues from.

    Args:
        run: The run directory.
    """
    return run / "checkpoints" / "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Writes last.ckpt at the end of each epoch, and also every few optimizer steps if asked to.

    At the last batch of an epoch it waits for the end of the epoch: validation and schedulers act in between, and a run
    resumed from an earlier checkpoint would miss them.

    Args:
        every_n_train_steps: Number of optimizer steps between checkpoints within an epoch, None for none.

    Raises:
        ValueError: If `every_n_train_steps` is below 1.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"callbacks.last.every_n_train_steps={every_n_train_steps}: use 1 or more, or null")
        self.every, self._saved = every_n_train_steps, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every is not None and step % self.every == 0 and step != self._saved
        if due and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = trainer.global_step
        trainer.save_checkpoint(last_checkpoint(Path(trainer.default_root_dir)), weights_only=False)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically: the old file stays until the new one is on the disk.

    Lightning writes to the folder for temporary files, and copies the file over the old one if that lies on another
    file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: The content.
            path: The file to write.
            storage_options: Ignored.

        Raises:
            OSError: If the file cannot be written. The old checkpoint is then whole.
        """
        content = io.BytesIO()  # torch.save would not report a full disk
        torch.save(checkpoint, content)
        try:
            with replacing(Path(path)) as temporary, temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; the checkpoint before it is complete", str(path)) from error


class OwnCheckpoints(pl.Callback):
    """Finds the files that a loaded checkpoint's ModelCheckpoint states name in this run's folder, wherever it is now.

    Lightning would forget the best score of a run that was moved, or that is named by another path (relative, absolute)
    than at its start, and replace the best checkpoint by the next one.

    Files outside of the folder are forgotten. Lightning deletes the file that a checkpoint calls its best one as soon
    as there is a better one. An address such as local:///home also names such a file, and the checkpoint may come from
    somebody else.
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        folder = next((str(c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)

        def here(path: object, before: object) -> str:
            address = ":/" in str(path) or "::" in str(path)  # local:///home is a folder to Lightning
            if folder is None or not path or address:
                return ""
            found = os.path.join(folder, os.path.relpath(str(path), str(before)))
            base = os.path.realpath(folder)
            inside = os.path.commonpath([base, os.path.realpath(found)]) == base
            return found if inside else ""

        for state in checkpoint["callbacks"].values():
            if not isinstance(state, dict) or "dirpath" not in state:
                continue
            before = state["dirpath"] or "."
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[name] = here(state.get(name), before)
            files = {here(path, before): score for path, score in state.get("best_k_models", {}).items()}
            state["best_k_models"] = {path: score for path, score in files.items() if path}
            state["dirpath"] = folder


class WeightAverage(WeightAveraging):
    """An exponential moving average of the weights, used by validation, checkpoints, test and the catalog.

    Args:
        decay: The share of the average that a step keeps, from 0 to 1.
        use_buffers: Whether buffers are averaged too. The average has the module's own otherwise.
    """

    def __init__(self, decay: float = 0.999, use_buffers: bool = True) -> None:
        super().__init__(use_buffers=use_buffers)
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._average_model = _LearntAverage(pl_module, self.decay, self._use_buffers)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # at test it would restore the weights before averaging
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class _LearntAverage(AveragedModel):
    """An average of all tensors at once, without frozen parameters: else a head's step would be mostly this."""

    def __init__(self, module: pl.LightningModule, decay: float, use_buffers: bool) -> None:
        super().__init__(module, module.device, use_buffers=use_buffers)
        self.average = get_ema_multi_avg_fn(decay)
        self._pairs = list(zip(_places(self.module), _places(module), strict=True))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averages, values, first = [], [], not self.n_averaged  # which a GPU is asked for once
        olds, news = [], []
        for (place, name), (other, _) in self._pairs:
            average, now = place[name], other[name]
            frozen = isinstance(now, nn.Parameter) and not now.requires_grad
            averaged = now.requires_grad or (self.use_buffers and now.is_floating_point() and not frozen)
            if first or not (frozen or averaged):
                olds.append(average)
                news.append(now)
            elif averaged:
                averages.append(average)
                values.append(now)
        if olds:
            torch._foreach_copy_(olds, news)
        if averages:
            self.average(averages, values, self.n_averaged)
        self.n_averaged += 1


def _places(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where each parameter and buffer is found: to ask a module for all of them takes longer than to average a few."""
    places, seen = [], set()
    for owner in module.modules():
        for place in (owner._parameters, owner._buffers):
            for name, tensor in place.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    places.append((place, name))
    return places


class Lookahead(pl.Callback):
    """Draws the weights back to a slow average of themselves every few optimizer steps, less and less of new ones.

    The average a of the weights w becomes d a + (1 - d) w, and the weights go on from a. d rises from 0 to `decay` as
    the third power of the share of the training that is done. After the last step of its length the weights become a of
    the last average before, so that the steps since have no effect; a training that ends early keeps its weights as
    they are. The statistics of batch normalisation are averaged too, the loss's buffers not. Validations and
    checkpoints see the weights as they are.

    Args:
        every: Optimizer steps between two averages, from 1.
        decay: The last d, from 0 and below 1.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Zhang, Lucas, Hinton, Ba: Lookahead Optimizer. NeurIPS 2019, with the rising d of Jordan: 94% on CIFAR-10 in
        3.29 Seconds on a Single GPU. 2024, section 3.4.
    """

    def __init__(self, every: int = 5, decay: float = 0.774) -> None:
        if every < 1:
            raise ValueError(f"callbacks.lookahead.every={every}: use 1 or more steps")
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.lookahead.decay={decay} must be from 0 and below 1")
        self.every, self.decay = every, decay
        self._slow: dict[str, torch.Tensor] = {}
        self._averaged = 0  # the step of the last average

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self._slow, "averaged": self._averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._slow, self._averaged = dict(state_dict["slow"]), state_dict["averaged"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not math.isfinite(trainer.estimated_stepping_batches):
            raise ValueError("callbacks.lookahead needs a length of the training: set trainer.max_steps or max_epochs")
        state = _learnt(pl_module)
        self._slow = {name: self._slow.get(name, value).to(value, copy=True) for name, value in state.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        last = step >= steps
        if step == self._averaged or not (last or step % self.every == 0):
            return  # between two averages, or within accumulated gradients
        self._averaged = step
        decay = 1.0 if last else self.decay * (step / steps) ** 3
        for name, value in _learnt(pl_module).items():
            value.copy_(self._slow[name].lerp_(value, 1 - decay))


def _learnt(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a module without the buffers of its loss, by name."""
    own = {name for name, _ in module.named_parameters()}
    state = module.state_dict()
    return {n: t for n, t in state.items() if t.is_floating_point() and (n in own or not n.startswith("loss."))}


class EpochsAfterResume(pl.Callback):
    """Makes a resumed run begin the next epoch if the checkpoint is from an epoch's end, else finish its epoch.

    With max_steps, Lightning 2.6 would run the ended epoch once more without a batch, and count it twice: samplers
    would skip an epoch, and check_val_every_n_epoch would fall on other epochs. Lightning also counts an epoch that the
    last step of a training cut short as a whole one, which matters if the training is made longer.
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "loops" not in checkpoint:  # of weights alone
            return
        loops = checkpoint["loops"]["fit_loop"]
        epochs = loops["epoch_progress"]
        ended = epochs["current"]["processed"] == epochs["current"]["started"]
        if ended and not loops["epoch_loop.batch_progress"]["is_last_batch"]:
            for count in ("current", "total"):
                epochs[count]["processed"] -= 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if batches.restarting and batches.batch_progress.is_last_batch:
            progress = epochs.epoch_progress
            progress.current.completed, progress.total.completed = progress.current.processed, progress.total.processed  # type: ignore[attr-defined]
            batches.restarting = False
            epochs.reset_restart_stage()
            batches.reset_restart_stage()


class FrozenBackbone(pl.Callback):
    """Keeps the network's `backbone` frozen, with its batch statistics, in the first epochs of a training.

    Images still pass through the backbone, so that they may be augmented; a cache of features (model.cache) rules that
    out.

    At setup it raises ValueError for a network without a backbone, and for several ranks with a number of epochs:
    DistributedDataParallel is given the trainable parameters once, at the start.

    Args:
        epochs: Number of epochs in which the backbone is frozen, None for all.

    Raises:
        ValueError: If `epochs` is below 1.
    """

    def __init__(self, epochs: int | None = None) -> None:
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs={epochs}: give at least 1 epoch, or null for all")
        self.epochs = epochs
        self._parameters: list[torch.nn.Parameter] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        backbone = getattr(pl_module.network, "backbone", None)
        if not isinstance(backbone, torch.nn.Module):
            raise ValueError(f"{type(pl_module.network).__name__} has no backbone to freeze: remove this callback")
        if self.epochs is not None and trainer.world_size > 1:
            raise ValueError(
                f"unfreezing after epochs={self.epochs} needs a single process: train with epochs=null, then start "
                "from "
                "that run by model.start="
            )
        if stage == "fit":
            self._parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
            if self.epochs is None:  # before the optimizer is made, so that it leaves them out
                backbone.requires_grad_(False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._freeze(trainer, pl_module)  # after a resume in the middle of an epoch no epoch start is reported

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._freeze(trainer, pl_module)

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        frozen = self.epochs is None or trainer.current_epoch < self.epochs
        for parameter in self._parameters if self.epochs is not None else ():
            parameter.requires_grad_(not frozen)
        if frozen:
            pl_module.network.backbone.eval()  # type: ignore[union-attr]
        elif trainer.current_epoch == self.epochs:
            pl_module.train()  # the module's own `train` may keep batch normalisation frozen


class LastValidation(Checkpoint):
    """Validates the last weights of a training, whether it ends by steps, epochs, time or an early stop.

    A run shorter than check_val_every_n_epoch then has a checkpoint to choose, and the last weights are always among
    those compared. The class is a Checkpoint, so that the trainer calls it after whatever stops a training. It must
    stand before the other checkpoints, so that they save validated weights.

    Attributes:
        validated: Number of batches that the weights had seen at their last validation, 0 if there was none.
    """

    def __init__(self) -> None:
        self.validated = 0

    def state_dict(self) -> dict[str, int]:
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validated = state_dict["validated"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = [state for state in checkpoint["callbacks"].values() if isinstance(state, dict)]
        trainer.should_stop |= any(state.get("stopping_reason") for state in states)  # an early stop ended it

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop
        steps = 0 <= trainer.max_steps <= trainer.global_step
        epochs = 0 <= (trainer.max_epochs or 0) <= loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        if steps or epochs or (trainer.should_stop and loop._can_stop_early):
            self._validate(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validate(trainer)  # a resumed run may have been killed between its last batch and validation

    def _validate(self, trainer: pl.Trainer) -> None:
        batches = trainer.fit_loop.epoch_loop
        if not trainer.enable_validation or self.validated == batches.batch_progress.total.processed:  # type: ignore[attr-defined]
            return
        connector = trainer._logger_connector
        first = connector._first_loop_iter
        batches._batches_that_stepped -= 1  # logged at the step of the previous batch, as other validations are
        batches.val_loop.restarting = False
        trainer.validating = True
        batches.val_loop.run()
        trainer.training = True
        batches._batches_that_stepped += 1
        connector._first_loop_iter = first


class DataParallel(DDPStrategy):
    """Lightning's `ddp`, which also accepts a model without gradients: frozen models share their work over ranks."""

    def configure_ddp(self) -> None:
        """Wraps the model in DistributedDataParallel if any parameter trains."""
        if any(parameter.requires_grad for parameter in self.model.parameters()):  # type: ignore[union-attr]
            super().configure_ddp()
