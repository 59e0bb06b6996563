"""Stopping a run on a signal: all ranks stop after the same batch, and SLURM requeues the job if it sent a warning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities.exceptions import SIGTERMException

_FINISH_S = 20.0  # time for loggers that wait for the network; then the job is requeued in any case


class Interruption(pl.Callback):
    """Handles signals inside a `with` block, and stops the run as one of its callbacks.

    SIGTERM ends the process with status 143. SIGINT (Ctrl-C) ends it with status 130; a second Ctrl-C ends it at once.
    In a SLURM job, SIGUSR1 is the warning before the time limit (--signal=USR1@90): rank 0 requeues the job, and the
    status is 0.

    During a training, the current batch or validation is finished first. All ranks stop after the same batch, whichever
    rank received the signal: if one rank stopped alone, the others would wait for it, and a checkpoint from within a
    batch would not resume exactly. SaveOnSigterm writes the checkpoint. Outside of a training the process ends at once.

    Args:
        rank: Rank of this process.
    """

    def __init__(self, rank: int) -> None:
        self.rank, self.received = rank, 0
        self._patient = self._requeued = False
        self._latest: threading.Timer | None = None
        self._found: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, *stop_signals())
            self._found = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)
        if self.received == signal.SIGUSR1 and error is not None:
            self._requeue()
            raise SystemExit(0) from None

    def _hear(self, number: int, _: Any) -> None:
        again = self.received == number == signal.SIGINT  # a second Ctrl-C stops at once
        if again or not self.received:  # SLURM sends SIGTERM when it requeues
            self.received = number
            if again or not self._patient:
                raise SystemExit(128 + number)
            if number == signal.SIGINT and self.rank == 0:
                print(
                    "stopping after this batch with a checkpoint; press Ctrl-C again to stop at once", file=sys.stderr
                )

    def _requeue(self) -> None:
        if self._latest is not None:
            self._latest.cancel()
        if self.rank == 0 and not self._requeued:
            self._requeued = True
            requeue()

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
                self._latest = threading.Timer(_FINISH_S, self._requeue)
                self._latest.daemon = True
                self._latest.start()

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


def stop_signals() -> tuple[int, ...]:
    """The signals that stop a run here: SIGTERM, and SIGUSR1 in a SLURM job."""
    return (signal.SIGTERM, signal.SIGUSR1) if "SLURM_JOB_ID" in os.environ else (signal.SIGTERM,)


def requeue() -> None:
    """Requeues the current SLURM job.

    Raises:
        SystemExit: If SLURM refuses.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise SystemExit(f"cannot requeue the SLURM job {job}: {reason}") from error
    print(f"the SLURM job {job} is queued again and will continue from here", file=sys.stderr)


def _nothing(*_: Any) -> None:
    pass
