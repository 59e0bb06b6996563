"""Several ranks: who this process is among them, and starting those of one node from a run directory."""

from __future__ import annotations

import os
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

from simsearch.files import read_json, write_json

TRUST = "trust=true"
_GRACE_S = 20.0  # for the others once a rank has failed: a collective may wait for it for half an hour
_LEFT_BEHIND = (
    *("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PL_GLOBAL_SEED", "PL_SEED_WORKERS"),
)


class RankError(RuntimeError):
    """A rank failed. The message is one line; details: its traceback, or what it last wrote, where that helps."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


# ---------------------------------------------------------------------------------- who this process is


class Place(NamedTuple):
    """A process among `ranks` that work together: its rank, and its number on its own machine (`local`)."""

    rank: int
    ranks: int
    local: int


def place() -> Place:
    """Where torchrun, `run_ranks` or srun put this process; the only rank where none of them started it.

    It is known before the ranks can talk: what they share later, `simsearch.functional.collectives` tells.
    """
    if dist.is_torchelastic_launched():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif is_slurm_rank():
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return Place(0, 1, 0)
    return Place(*(int(os.environ[name]) for name in names))


def rank() -> int:
    """This process's rank; 0 where there is one only."""
    return place().rank


def is_rank() -> bool:
    """Whether this process is one of several, however they were started."""
    return dist.is_torchelastic_launched() or is_slurm_rank()


def is_slurm_rank() -> bool:
    """Whether srun started this process as one of several tasks."""
    return not dist.is_torchelastic_launched() and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def slurm_step() -> str | None:
    """`job.step` where srun started this process, the same again after a requeue; None elsewhere.

    In a shell that srun gave (its job is called so) each command is one of its own.
    """
    if "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"


def settle_devices(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's settings with the number of devices, and of nodes, that `devices=auto` means here.

    That is what SLURM gave to this step, else all GPUs of this machine, else one process on the CPU. Raises
    ValueError where a number of devices is not what there is.
    """
    devices, nodes = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
    automatic = devices in ("auto", -1, "-1")
    gpus = torch.cuda.device_count() if trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") else 0
    if is_slurm_rank():
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise ValueError("SLURM was not told how many tasks a node has: give --ntasks-per-node, not --ntasks alone")
        there = int(os.environ["SLURM_STEP_NUM_NODES"])
        tasks = int(os.environ["SLURM_STEP_NUM_TASKS"]) // there
        if automatic:
            devices, nodes = tasks, there
        if (count_devices(devices), nodes) != (tasks, there):
            raise ValueError(
                f"SLURM runs {tasks} tasks on each of {there} nodes, but trainer.devices={devices} and "
                f"trainer.num_nodes={nodes}: take trainer.devices=auto, or as many tasks a node as devices"
            )
    elif automatic:
        devices = max(gpus, 1)
    if gpus and count_devices(devices) > gpus:
        raise ValueError(f"trainer.devices={devices}, but this machine has {gpus} GPUs: use as many, or auto")
    return {**trainer, "devices": devices} | ({"num_nodes": nodes} if nodes != 1 else {})


def count_devices(devices: int | str | Sequence[int]) -> int:
    """How many processes a trainer's settled `devices` stand for: a number, or a list of GPUs."""
    if isinstance(devices, str):
        return len([part for part in devices.split(",") if part.strip()]) if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)


# ------------------------------------------------------------------------------------------- the parent


def run_ranks(folder: Path, ranks: int, *, trusted: bool = False) -> None:
    """Trains the run directory `folder` with that many ranks on this node, and waits for them.

    trusted: the ranks need not check what its config names, since this process composed it or was told so.

    Rank 0 writes where this process writes; what the others write is kept from the terminal. Signals are
    passed on to the ranks, which also end when this process is no more.

    Raises RankError with the error of the rank that failed first, SystemExit where a signal ended them.

    The ranks get the environment that torchrun gives. Not torchrun itself: it would die of SLURM's warning
    signal, and kill ranks that take longer than 30 s over a last checkpoint.
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
    """Processes of one node that begin and end together, within a context.

    reports: a folder in which a rank leaves `<rank>.json` about its error.
    """

    def __init__(self, reports: Path) -> None:
        self.reports = reports
        self.processes: list[subprocess.Popen[bytes]] = []
        self.killed: set[int] = set()
        self.received = 0
        self._found: dict[int, Any] = {}

    def __enter__(self) -> _Ranks:
        if threading.current_thread() is threading.main_thread():
            from simsearch.callbacks.interruption import stop_signals  # and Lightning, which a search goes without

            numbers = (signal.SIGINT, *stop_signals())
            self._found = {number: signal.signal(number, self._pass_on) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for process in self.processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        for number, handler in self._found.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: Any) -> None:
        again = self.received == number == signal.SIGINT  # who presses Ctrl-C twice means it
        self.received = number
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
        """Until all have ended; those that outlive a failed one for long are killed."""
        deadline = None
        while None in (codes := [process.poll() for process in self.processes]):
            if deadline is None and any(codes):
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
        """Raises what the ranks' end means; nothing where all did their work."""
        codes = [process.returncode for process in self.processes]
        if self.received == signal.SIGUSR1 and codes[0] == 0:
            raise SystemExit(0)  # the job is queued again
        if any(codes):
            raise SystemExit(128 + self.received) if self.received else self._first_error(codes)

    def _first_error(self, codes: Sequence[int]) -> RankError:
        """The error that the others' errors come from."""
        told = {number: read_json(path) for number in range(len(codes)) if (path := self._path(number))}
        died = [n for n, code in enumerate(codes) if code < 0 and n not in told and n not in self.killed]
        if told and all(codes[n] == -signal.SIGABRT for n in died):  # so libraries end when they lose another rank
            first = min(told, key=lambda number: told[number]["time"])
            return RankError(f"rank {first} of {len(codes)}: {told[first]['message']}", told[first]["details"])
        first = (*died, *(n for n, code in enumerate(codes) if code and n not in self.killed))[0]
        name = signal.Signals(-codes[first]).name if codes[first] < 0 else f"status {codes[first]}"
        log = (self.reports / f"{first}.log").read_text(errors="replace")
        return RankError(f"rank {first} of {len(codes)} ended by {name}, without a word", log[-2000:])

    def _path(self, number: int) -> Path | None:
        path = self.reports / f"{number}.json"
        return path if path.is_file() else None


# -------------------------------------------------------------------------------------------- the ranks


def report_error(reports: Path, message: str, details: str) -> None:
    """Leaves for the parent what ended this rank: one line, and details or an empty string."""
    write_json(reports / f"{rank()}.json", {"time": time.time(), "message": message, "details": details})


def end_with_parent() -> None:
    """Tells this process to stop (SIGTERM) once its parent, which holds its standard input, is no more."""

    def wait() -> None:
        os.read(0, 1)  # sys.stdin would hold a lock when the interpreter ends
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def as_found() -> Iterator[None]:
    """Leaves the environment as it is found, and no process group."""
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
