"""What runs the jobs of a sweep: this process, processes of this machine, or a launcher of Hydra (SLURM)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from simsearch import program, slurm


class Refused(ValueError):
    """A cluster takes no job at present."""


@dataclass(frozen=True)
class Job:
    """What came of a job.

    Attributes:
        folder: The trial's folder, None if its worker died.
        error: An error that the folder does not know, or "".
    """

    folder: Path | None
    error: str = ""


class Runner(Protocol):
    """Runs one job at a time."""

    def run(self, overrides: Sequence[str], number: int) -> Job:
        """What came of a job, after its end.

        Args:
            overrides: The overrides of the trial.
            number: Its number in the study.
        """

    def close(self) -> None:
        """Ends what runs jobs, after the job at hand."""

    def stop(self, number: int) -> None:
        """Passes a signal on to what runs jobs, where that is ours to do. A training saves and ends.

        Args:
            number: The signal.
        """

    def kill(self) -> None:
        """Ends what runs jobs at once, where that is ours to do."""


def _job(returned: JobReturn) -> Job:
    folder = Path(returned.hydra_cfg.hydra.runtime.output_dir) if returned.hydra_cfg is not None else None
    failed = returned.status is JobStatus.FAILED
    return Job(folder, program.reason(returned._return_value) if failed else "")


class Launched:
    """Jobs that a launcher of Hydra runs: in this process, or on a cluster.

    Args:
        launcher: The launcher, which has been set up.
    """

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher

    def run(self, overrides: Sequence[str], number: int) -> Job:
        """What came of a job, after its end.

        Args:
            overrides: The overrides of the trial.
            number: Its number in the study.

        Raises:
            Refused: If the cluster does not take the job.
        """
        try:
            (returned,) = self.launcher.launch([list(overrides)], initial_job_idx=number)
        except Exception as error:  # submitit's are known by their names, as it comes with an extra
            said = " ".join(str(error).split())
            if type(error).__name__ not in ("UncompletedJobError", "FailedJobError"):
                raise
            if isinstance(error.__cause__, subprocess.CalledProcessError):  # of sbatch
                raise Refused(f"the cluster takes no job: {said}; the same command goes on later") from error
            return Job(None, said)  # it died without a result, or before it was a trial
        return _job(returned)

    def close(self) -> None:
        """Does nothing: jobs of a cluster end by themselves."""

    def stop(self, number: int) -> None:
        """Does nothing, as `close`.

        Args:
            number: A signal.
        """

    def kill(self) -> None:
        """Does nothing, as `close`."""


class Process:
    """Jobs that a process of this machine runs one after another. After its death the next job gets a new one.

    Args:
        setting: The state of Hydra's singletons, and what a launcher needs to be set up.
        share: Number of processes that share the processor.
    """

    def __init__(self, setting: Mapping[str, Any], share: int) -> None:
        self.setting, self.share = setting, share
        self.process: Any = None
        self.pipe: Any = None

    def run(self, overrides: Sequence[str], number: int) -> Job:
        """What came of a job, after its end or the death of the process.

        Args:
            overrides: The overrides of the trial.
            number: Its number in the study.

        Raises:
            ValueError: If the job could not even begin.
        """
        try:
            if self.process is None:
                self._start()
            self.pipe.send((list(overrides), number))
            folder, error, fatal = self.pipe.recv()
        except (EOFError, OSError):  # the process was killed
            self.close()
            return Job(None)
        if fatal:
            raise ValueError(error)
        return Job(None if folder is None else Path(folder), error)

    def _start(self) -> None:
        import cloudpickle

        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.share))
        self.process.start()
        theirs.close()
        self.pipe.send_bytes(cloudpickle.dumps(self.setting))

    def close(self) -> None:
        """Ends the process after the job at hand."""
        if self.process is not None:
            self.pipe.close()
            self.process.join()
            self.process = None

    def stop(self, number: int) -> None:
        """Passes a signal on to the process. A training saves, and the process ends or runs no further job.

        Args:
            number: The signal.
        """
        if self.process is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Ends the process at once."""
        if self.process is not None:
            self.process.kill()


def _serve(pipe: Any, share: int) -> None:
    """Runs the jobs that come through a pipe, until it is closed. If the parent dies, a job saves and ends."""
    import cloudpickle
    import torch

    os.environ[slurm.PARENT_ASKS] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all processes; a training listens to it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // share))
    with suppress(EOFError, OSError):  # the sweep has ended
        setting = cloudpickle.loads(pipe.recv_bytes())
        Singleton.set_state(setting["singletons"])
        launcher = BasicLauncher()
        launcher.setup(**setting["job"])
        while True:
            overrides, number = pipe.recv()
            pipe.send(_outcome(launcher, overrides, number))


def _outcome(launcher: BasicLauncher, overrides: list[str], number: int) -> tuple[str | None, str, bool]:
    """The folder of a job, an error that its folder does not know, and whether the job could not even begin."""
    try:
        (returned,) = launcher.launch([overrides], initial_job_idx=number)
    except SystemExit:  # a training was told to stop; the sweep decides whether it goes on
        return None, "", False
    except Exception as error:
        return None, program.reason(error), True
    job = _job(returned)
    return None if job.folder is None else str(job.folder), job.error, False


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
