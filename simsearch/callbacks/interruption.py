"""Stopping a run on a signal: all ranks stop after the same batch, and SLURM requeues the job if it sent a warning."""

from __future__ import annotations

import signal
import sys
import threading
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException

from simsearch import slurm

_FINISH_S = 20.0  # time for loggers that wait for the network; then the job is requeued in any case


class Interruption(pl.Callback):
    """Handles signals inside a `with` block, and stops the run as one of its callbacks.

    SIGTERM ends the process with status 143. SIGINT (Ctrl-C) ends it with status 130; a second Ctrl-C ends it at once.
    In a SLURM job, SIGUSR1 is the warning before the time limit (--signal=USR1@90): rank 0 requeues the job, and the
    status is 0 (138 where a parent process waits and requeues it).

    During a training, the current batch or validation is finished first. All ranks stop after the same batch, whichever
    rank received the signal: if one rank stopped alone, the others would wait for it, and a checkpoint from within a
    batch would not resume exactly. SaveOnSigterm writes the checkpoint. Outside of a training the process ends at once.

    Args:
        rank: Rank of this process.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.received = rank, 0
        self._patient = False
        self._request = slurm.Request(rank)
        self._found: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, *slurm.stop_signals())
            self._found = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)
        self._request.cancel()
        if self.received == signal.SIGUSR1 and error is not None:
            slurm.tell(error)
            self._request.make()
            raise SystemExit(self._request.status) from None

    def _hear(self, number: int, _: Any) -> None:
        again = self.received == number == signal.SIGINT  # a second Ctrl-C stops at once
        if again or not self.received:  # SLURM sends SIGTERM when it requeues
            self.received = number
            if number == signal.SIGUSR1:
                self._request.make_within()
            if again or not self._patient:
                raise SystemExit(128 + number)
            if number == signal.SIGINT and self.rank == 0:
                print(
                    "stopping after this batch with a checkpoint; press Ctrl-C again to stop at once", file=sys.stderr
                )

    # As a callback

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning's own handler would call the other ranks at any point of the program.
        trainer._signal_connector._sigterm_notifier_fn = _nothing  # type: ignore[method-assign, assignment]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._patient = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._agree(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Otherwise Lightning would end the validation after its first batch, and not run it again.
        trainer._signal_connector.received_sigterm = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._patient:
            self._agree(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._patient = False
        if self._agree(trainer):
            raise SystemExit(128 + self.received)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._patient = False
        if isinstance(exception, SIGTERMException):  # the checkpoint is written
            exception.code = 128 + self.received
            if self.received == signal.SIGUSR1:  # loggers finish first, since SLURM ends them when it requeues
                self._request.make_within(_FINISH_S)

    def _agree(self, trainer: pl.Trainer) -> bool:
        """Whether any rank received a signal; if so, the trainer of every rank is asked to stop."""
        number = self.received
        if trainer.world_size > 1:
            largest = torch.tensor(number, device=trainer.strategy.root_device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            number = int(largest)
        if number:  # later signals wait for the next batch, as on the other ranks
            self.received = number
            trainer._signal_connector.received_sigterm = True
        return bool(number)


def _nothing(*_: Any) -> None:
    pass
