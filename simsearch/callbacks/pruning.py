"""Pruning: a trial of a sweep that falls behind others ends early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl


class Pruning(pl.Callback):
    """Reports a metric after each validation, and ends the training if it is not worth going on.

    The decision is made on rank 0 for all ranks. A training that has reached its length, or is about to stop for
    another reason, is never pruned: it only lacks its test, or goes on later.

    Args:
        monitor: Name of the metric, such as `val/mAP`.
        decide: Gets the metric and the number of the validation, from 1, and says whether the training should end.

    Attributes:
        validations: Number of validations so far, also before a resume.
        pruned: What was known when the training was ended, None if it was not.

    Raises:
        ValueError: At the first validation, if the metric is not measured.
    """

    def __init__(self, monitor: str, decide: Callable[[float, int], bool]) -> None:
        self.monitor, self.decide = monitor, decide
        self.validations = 0
        self.pruned: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validations = state_dict["validations"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or self.pruned is not None:
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"objective={self.monitor} is not measured by a validation, so nothing can be pruned by it: leave "
                "hydra/sweeper/pruner out"
            )
        self.validations += 1
        value = float(trainer.callback_metrics[self.monitor])
        behind = trainer.is_global_zero and self.decide(value, self.validations)
        if trainer.strategy.broadcast(behind) and not (_is_through(trainer) or trainer.should_stop):
            self.pruned = {
                "objective": self.monitor,
                "value": value,
                "validation": self.validations,
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
            }
            trainer.should_stop = True


def _is_through(trainer: pl.Trainer) -> bool:
    """Whether the training has reached its length."""
    last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    steps = 0 <= trainer.max_steps <= trainer.global_step
    return steps or (last and 0 <= (trainer.max_epochs or 0) <= trainer.current_epoch + 1)
