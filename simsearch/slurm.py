"""A SLURM job: its step, its warning before the end of its time, and the request to queue it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from simsearch.text import warn

PARENT_ASKS = "SIMSEARCH_PARENT_ASKS"  # set for a process whose parent waits for it, and then asks
_MARGIN_S = 20.0  # between the latest request and the end of the job's time
_WAIT_S = 60.0  # from the warning to the latest request, where SLURM does not say when the time ends


def step() -> str | None:
    """`job.step` if srun started this process, else None. It stays the same after a requeue.

    Also None in an interactive shell of srun (job name bash or interactive), where each command is a run of its own.
    """
    if "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that stop a run here: SIGTERM, and in a SLURM job SIGUSR1, its warning (--signal=USR1@90)."""
    return (signal.SIGTERM, signal.SIGUSR1) if "SLURM_JOB_ID" in os.environ else (signal.SIGTERM,)


class Request:
    """The request to queue this job again, after everything is saved or at the latest `_MARGIN_S` before its end.

    SLURM takes one request for a job, and then ends all its processes. So rank 0 asks, and a process whose parent waits
    for it leaves that to the parent.

    Args:
        rank: Rank of this process.
    """

    def __init__(self, rank: int) -> None:
        parent = PARENT_ASKS in os.environ
        self.status = 128 + signal.SIGUSR1 if parent else 0  # exit status of a process that was warned
        self._asks = rank == 0 and not parent
        self._lock = threading.Lock()
        self._latest: threading.Timer | None = None

    def make_within(self, seconds: float | None = None) -> None:
        """Makes the request later, unless it is made or cancelled by then.

        Args:
            seconds: How much later. None for the time that the job has left.
        """
        self.cancel()
        if self._asks:
            self._latest = threading.Timer(_seconds_left() if seconds is None else seconds, self._make_late)
            self._latest.daemon = True
            self._latest.start()

    def cancel(self) -> None:
        """Does not make the request later."""
        if self._latest is not None:
            self._latest.cancel()

    def make(self) -> None:
        """Makes the request, unless it was made.

        Raises:
            SystemExit: If SLURM refuses, or if the job would not go on where it was.
        """
        self.cancel()
        with self._lock:
            if self._asks:
                _requeue()
                self._asks = False

    def _make_late(self) -> None:
        try:
            self.make()
        except SystemExit as error:
            warn(str(error))


def _seconds_left() -> float:
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return max(1.0, int(end) - time.time() - _MARGIN_S) if end.isdigit() else _WAIT_S


def _requeue() -> None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    if step() is None:
        raise SystemExit(
            f"the SLURM job {job} is not queued again: without srun before it, the same command may begin anew. "
            "What was saved goes on with resume=true run_dir=<run>, or a sweep with the same hydra.sweep.dir"
        )
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise SystemExit(f"cannot requeue the SLURM job {job}: {reason}") from error
    print(f"the SLURM job {job} is queued again and will continue from here", file=sys.stderr)


@contextmanager
def requeued_if_warned(rank: int, stop: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside the block, SLURM's warning calls `stop`; after the block the job is queued again, and the process ends.

    SLURM warns all processes of a step. A training of this process has a handler of its own for as long as it lasts.

    Args:
        rank: Rank of this process.
        stop: Lets the block end soon. By default it ends at once.
    """
    if signal.SIGUSR1 not in stop_signals() or threading.current_thread() is not threading.main_thread():
        yield
        return
    request = Request(rank)
    warned: list[bool] = []

    def hear(*_: object) -> None:
        if not warned:
            warned.append(True)
            request.make_within()
            if stop is None:
                raise SystemExit(request.status)
            stop()

    _start_tracker()
    before = signal.signal(signal.SIGUSR1, hear)
    try:
        yield
    except (Exception, SystemExit) as error:
        if not warned:
            raise
        tell(error)
    finally:
        signal.signal(signal.SIGUSR1, before)
    if warned:
        request.make()
        raise SystemExit(request.status)


def _start_tracker() -> None:
    """Starts multiprocessing's resource tracker, which the warning would end, with the warning blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def tell(error: BaseException) -> None:
    """Prints what went wrong after the warning. A process that only stops prints nothing.

    Args:
        error: What ended it.
    """
    if isinstance(error, Exception):
        warn(f"after SLURM's warning: {type(error).__name__}: {error}")
