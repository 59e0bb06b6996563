"""What all tests share: one thread, no network, caches of their own, and small data."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import settings
from PIL import Image

from simsearch.__main__ import main
from simsearch.files import write_json
from simsearch.search.catalog import read_catalog
from simsearch.search.item_tables import with_thumbnails
from simsearch.search.names import Names
from simsearch.search.segments import with_ids, write_segment

torch.set_num_threads(1)
os.environ.pop("COLUMNS", None)  # the width of the terminal that the tests were started in

# The same examples in each run, so that a change is not blamed for what it did not do; HYPOTHESIS_PROFILE=default
# draws others. No deadline: a busy machine is no fault.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))

SMALL = (
    "data.styles=4",
    "data.artists=2",
    "data.works=5",
    "data.photographs=3",
    "data.size=48",
    "backbone.size=64",
    "model.whitening.dimension=16",
)


@pytest.fixture(autouse=True)
def _own_logs():
    """Commands log into the folders of their runs, which are gone after their test."""
    yield
    for logger in (logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        for handler in [one for one in logger.handlers if isinstance(one, logging.FileHandler)]:
            logger.removeHandler(handler)
            handler.close()


@pytest.fixture(scope="module", autouse=True)
def _no_server_of_milvus_lite():
    """Other files of tests fork this process, which its threads of gRPC do not bear."""
    yield
    if (servers := sys.modules.get("milvus_lite.server_manager")) is not None:
        servers.server_manager_instance.release_all()


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory):
    """Nothing is read from or written to the user's caches, W&B never goes online."""
    folder = tmp_path_factory.mktemp("environment")
    values = {
        "SIMSEARCH_CACHE": str(folder / "cache"),
        "WANDB_MODE": "offline",
        "WANDB_CACHE_DIR": str(folder / "wandb"),
        "WANDB_DATA_DIR": str(folder / "wandb"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    yield
    for name, value in old.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a scontrol that writes its arguments to `asked`; this process is step 0 of SLURM's job 12."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ntest ! -e {tmp_path}/broken\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_END_TIME", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, or a skip that says what is missing."""
    root = os.environ.get("SIMSEARCH_DATA")
    if not root or not Path(root, "cifar10").is_dir():
        pytest.skip("SIMSEARCH_DATA does not name a folder with cifar10/: tests on real images are SKIPPED")
    return Path(root)


@dataclass(frozen=True)
class Done:
    """What a command wrote."""

    stdout: str
    stderr: str


def simsearch(*arguments: str, cwd: Path | None = None, expect: int = 0) -> Done:
    """Runs a command in this process, which spares its imports, and checks its exit status."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    old = sys.argv
    sys.argv = ["simsearch", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err), chdir(cwd or Path.cwd()):
            main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    finally:
        sys.argv = old
    assert code == expect, f"exit {code}\n{out.getvalue()}\n{err.getvalue()}"
    return Done(out.getvalue(), err.getvalue())


def change_items(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Gives a catalog other attributes: `change` gets and returns the table of its items without thumbnails."""
    catalog = read_catalog(folder, calibrated=False)
    items = change(catalog.items)
    table = with_thumbnails(items, catalog.thumbnails(range(len(catalog))))
    number = catalog.about["version"] + 1
    tables = [with_ids(table, catalog.names.numbers)]
    segment = write_segment(folder, number, index=catalog.index, items=tables)
    about = catalog.about | {"version": number, "segments": [segment], "columns": items.column_names}
    write_json(folder / "catalog.json", about | {"own_ids": Names(items).own})


def start_forkserver() -> None:
    """The one process that others are forked of, with all that they want imported; whoever starts it first decides."""
    libraries = ["pytest", "hypothesis", "torchmetrics", "simsearch.callbacks.evaluation", "simsearch.serving.uploads"]
    multiprocessing.set_forkserver_preload(libraries)
    forkserver.ensure_running()


def in_ranks(work: Callable[..., None], count: int, *arguments: object) -> None:
    """Runs `work(rank, *arguments)` in `count` processes at once, forked of one that has imported the libraries."""
    start_forkserver()
    mp.start_processes(work, args=arguments, nprocs=count, start_method="forkserver")


def scan_bomb(length: int, side: tuple[int, int] = (4000, 3000), *, progressive: bool = True) -> bytes:
    """A JPEG of so many bytes whose scans hold nothing: a decoder passes over all pixels for each ten bytes."""
    buffer = io.BytesIO()
    Image.new("L", side, 100).save(buffer, "JPEG", progressive=progressive, quality=50)
    head, last = buffer.getvalue()[:-2], b"\x3f\x00"
    scan = b"\xff\xda\x00\x08\x01\x01\x00" + (b"\x01" if progressive else b"\x00") + last
    return head + scan * ((length - len(head)) // len(scan)) + b"\xff\xd9"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, _own_folders: None) -> Path:
    """The run directory of a training on a small rendered sample."""
    run = tmp_path_factory.mktemp("runs") / "small"
    done = simsearch("train", *SMALL, f"run_dir={run}", "callbacks.evaluation.ks=[1,10]")
    (run / "stdout.txt").write_text(done.stdout)
    return run
