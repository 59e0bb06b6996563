"""Distributed ranks: finds out this process's rank, and starts the ranks of one node from a run directory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from simsearch import slurm
from simsearch.files import read_json, write_json

TRUST = "trust=true"
_WARNED = 128 + signal.SIGUSR1  # exit status of a rank that SLURM's warning stopped
_GRACE_S = 20.0  # for the others once a rank has failed: a collective may wait for it for half an hour
_LEFT_BEHIND = (
    *("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PL_GLOBAL_SEED", "PL_SEED_WORKERS"),
)


class RankError(RuntimeError):
    """A rank failed.

    Args:
        message: One line.
        details: The rank's traceback, or its last output, if that helps.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


# ----------------------------------------------------------------------------- the rank of this process


class Place(NamedTuple):
    """The place of a process among the ranks.

    Attributes:
        rank: Rank of the process.
        ranks: Number of ranks.
        local: Number of the process on its own machine.
    """

    rank: int
    ranks: int
    local: int


def place() -> Place:
    """The place that torchrun, `run_ranks` or srun gave this process. Rank 0 of 1 if none of them started it.

    This works before the ranks can communicate. Later, use `simsearch.functional.collectives`.
    """
    if dist.is_torchelastic_launched():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif is_slurm_rank():
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return Place(0, 1, 0)
    return Place(*(int(os.environ[name]) for name in names))


def rank() -> int:
    """This process's rank. 0 if there is only one process."""
    return place().rank


def is_rank() -> bool:
    """Whether this process is one of several ranks, however they were started."""
    return dist.is_torchelastic_launched() or is_slurm_rank()


def is_slurm_rank() -> bool:
    """Whether srun started this process as one of several tasks."""
    return not dist.is_torchelastic_launched() and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def settle_devices(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's settings with `devices=auto` replaced by the number of devices and nodes of this machine.

    These are the resources that SLURM gave to this step, else all GPUs of this machine, else one process on the CPU.

    Args:
        trainer: The trainer's plain config.

    Raises:
        ValueError: If a given number of devices does not match the machine or the SLURM step.
    """
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    automatic = devices in ("auto", -1, "-1")
    gpus = torch.cuda.device_count() if trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") else 0
    if is_slurm_rank():
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise ValueError(
                "SLURM does not know how many tasks each node runs: give --ntasks-per-node, not only --ntasks"
            )
        there = int(os.environ["SLURM_STEP_NUM_NODES"])
        tasks = int(os.environ["SLURM_STEP_NUM_TASKS"]) // there
        if automatic:
            devices, nodes = tasks, there
        if (count_devices(devices), nodes) != (tasks, there):
            raise ValueError(
                f"SLURM runs {tasks} tasks on each of {there} nodes, but trainer.devices={devices} and "
                f"trainer.num_nodes={nodes}: use trainer.devices=auto, or start as many tasks per node as devices"
            )
    elif automatic:
        devices = max(gpus, 1)
    if gpus and count_devices(devices) > gpus:
        raise ValueError(f"trainer.devices={devices}, but this machine has {gpus} GPUs: use at most that many, or auto")
    return {**trainer, "devices": devices} | ({"num_nodes": nodes} if nodes != 1 else {})


def of_one_process(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's settings for a measurement by this process, on a machine that may lack what the run trained on.

    Args:
        trainer: The plain config of the run's trainer.
    """
    accelerator = "cpu" if trainer.get("accelerator") == "cpu" else "auto"
    return {**trainer, "accelerator": accelerator, "devices": 1, "num_nodes": 1, "strategy": "auto"}


def count_devices(devices: int | str | Sequence[int]) -> int:
    """The number of processes for a trainer's settled `devices`.

    Args:
        devices: A number, or a list of GPUs.

    Raises:
        ValueError: If it is other text.
    """
    if isinstance(devices, str) and not re.fullmatch(r"[\d\s,-]+", devices):
        raise ValueError(f"trainer.devices={devices}: give a number, a list of GPUs such as [0,1], or auto")
    if isinstance(devices, str):
        return len([part for part in devices.split(",") if part.strip()]) if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)


# ------------------------------------------------------------------------------------------- the parent


def run_ranks(folder: Path, ranks: int, *, trusted: bool = False) -> None:
    """Trains a run directory with several ranks on this node, and waits for them.

    Rank 0 shares the output of this process; the output of other ranks is not shown. Signals are forwarded to the
    ranks. The ranks also end if this process ends.

    The ranks get the environment that torchrun provides. torchrun itself is not used: it would end at SLURM's warning
    signal, and kill ranks that take longer than 30 s for a last checkpoint.

    Args:
        folder: The run directory.
        ranks: Number of ranks.
        trusted: The ranks need not check the names in the config, because this process composed it or the user trusts
            it.

    Raises:
        RankError: With the error of the rank that failed first.
        SystemExit: If a signal ended the ranks.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the port is ours from here on
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "simsearch",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        slurm.PARENT_ASKS: "1",
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks)))
    with tempfile.TemporaryDirectory(prefix="simsearch-ranks-") as reports, _Ranks(Path(reports)) as group:
        for number in range(ranks):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)} | ({"TQDM_DISABLE": "1"} if number else {})
            command = [sys.executable, "-m", "simsearch.worker", str(folder), reports, *([TRUST] if trusted else [])]
            group.start(command, environment | own)
        group.wait()
        group.judge()


class _Ranks:
    """Processes of one node that start and end together, as a context manager.

    Args:
        reports: A folder in which a rank writes its error as `<rank>.json`.
    """

    def __init__(self, reports: Path) -> None:
        self.reports = reports
        self.processes: list[subprocess.Popen[bytes]] = []
        self.killed: set[int] = set()
        self.received = 0
        self._request = slurm.Request(0)
        self._found: dict[int, Any] = {}

    def __enter__(self) -> _Ranks:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, *slurm.stop_signals())
            self._found = {number: signal.signal(number, self._pass_on) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        self._request.cancel()
        self.kill()
        for process in self.processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        for number, handler in self._found.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: Any) -> None:
        again = self.received == number == signal.SIGINT  # Ctrl-C twice ends at once
        if self.received == signal.SIGUSR1:  # SLURM sends SIGTERM when it requeues; they are saving already
            return
        self.received = number
        if number == signal.SIGUSR1:
            self._request.make_within()
        for process in self.processes:
            process.send_signal(signal.SIGKILL if again else number)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts the next rank."""
        number = len(self.processes)
        with (self.reports / f"{number}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,  # its end tells the rank that this process is no more
                    stdout=None if number == 0 else log,
                    stderr=None if number == 0 else log,
                    start_new_session=True,  # Ctrl-C comes once, passed on
                )
            )
        if self.received:
            self.processes[-1].send_signal(self.received)

    def wait(self) -> None:
        """Waits until all ranks have ended. Ranks that long outlive a failed one are killed."""
        deadline = None
        while None in (codes := [process.poll() for process in self.processes]):
            if deadline is None and any(code not in (None, 0, _WARNED) for code in codes):
                deadline = time.monotonic() + _GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
            time.sleep(0.05)

    def kill(self) -> None:
        for number, process in enumerate(self.processes):
            if process.poll() is None:
                self.killed.add(number)
                process.kill()

    def judge(self) -> None:
        """Raises the error that follows from the ranks' exit statuses, if any."""
        codes = [process.returncode for process in self.processes]
        if self.received == signal.SIGUSR1 and any(codes):
            failed = [0 if code in (_WARNED, -signal.SIGUSR1) else code for code in codes]
            if any(failed):
                slurm.tell(self._first_error(failed))
            self._request.make()
            raise SystemExit(self._request.status)
        if any(codes):
            raise SystemExit(128 + self.received) if self.received else self._first_error(codes)

    def _first_error(self, codes: Sequence[int]) -> RankError:
        """The error that caused the others."""
        reported = {number: read_json(path) for number in range(len(codes)) if (path := self._path(number))}
        died = [n for n, code in enumerate(codes) if code < 0 and n not in reported and n not in self.killed]
        if reported and all(codes[n] == -signal.SIGABRT for n in died):  # so libraries end when they lose another rank
            first = min(reported, key=lambda number: reported[number]["time"])
            return RankError(f"rank {first} of {len(codes)}: {reported[first]['message']}", reported[first]["details"])
        first = (*died, *(n for n, code in enumerate(codes) if code and n not in self.killed))[0]
        name = signal.Signals(-codes[first]).name if codes[first] < 0 else f"status {codes[first]}"
        log = (self.reports / f"{first}.log").read_text(errors="replace")
        return RankError(f"rank {first} of {len(codes)} ended by {name} without an error message", log[-2000:])

    def _path(self, number: int) -> Path | None:
        path = self.reports / f"{number}.json"
        return path if path.is_file() else None


# -------------------------------------------------------------------------------------------- the ranks


def report_error(reports: Path, message: str, details: str) -> None:
    """Reports to the parent what ended this rank.

    Args:
        reports: Folder of the reports.
        message: One line.
        details: Details, or an empty string.
    """
    write_json(reports / f"{rank()}.json", {"time": time.time(), "message": message, "details": details})


def end_with_parent() -> None:
    """Stops this process (SIGTERM) once its parent, which holds its standard input, is gone."""

    def wait() -> None:
        os.read(0, 1)  # sys.stdin would hold a lock when the interpreter ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def as_found() -> Iterator[None]:
    """Restores the environment at the end of the block, and removes the process group."""
    found = {name: os.environ.get(name) for name in _LEFT_BEHIND}
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in found.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
