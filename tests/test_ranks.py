"""Several ranks: real two-process trainings in every way that they are started, and how they end."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from conftest import SMALL, simsearch
from omegaconf import OmegaConf
from pytorch_lightning.utilities.exceptions import SIGTERMException
from test_resume import DATA, DIR

from simsearch import configs, launch, run_directory, saved_run
from simsearch import slurm as slurm_job
from simsearch import worker as rank
from simsearch.callbacks import interruption
from simsearch.callbacks.interruption import Interruption
from simsearch.files import read_json

TINY = (
    *("experiment=dsh", "data=rendered", "protocol=rendered-work", "protocol.validation=0.2", "data.size=32"),
    *("data.styles=3", "data.artists=2", "data.works=4", "data.photographs=3", "sampler.batch_size=8"),
    *("optimizer.lr=1e-5", "trainer.max_steps=3", "trainer.precision=32-true", "trainer.log_every_n_steps=1"),
    *("callbacks.neighbours=null", "callbacks.progress.refresh_rate=0", "callbacks.evaluation.ks=[1,5]"),
)
RANKS = ("trainer=training-ddp", "trainer.devices=2", "trainer.max_steps=3", "trainer.precision=32-true")
PROBE = ("+callbacks.probe._target_=test_ranks.Probe",)
LEFT = {
    *("catalog", "checkpoints", "config.yaml", "metrics.csv", "metrics.json", "per_query.parquet", "run.json"),
    *("wandb", "train.log"),
}


class Probe(pl.Callback):
    """Each rank writes down what it trained on and what came out."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, _: Any, batch: Any, *__: Any) -> None:
        self.rows.append(batch["index"].tolist())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "probe"
        folder.mkdir(exist_ok=True)
        about = {
            "rows": self.rows,
            "weight": getattr(pl_module.loss, "weight", None),
            "world": trainer.world_size,
            "threads": os.environ["OMP_NUM_THREADS"],
            "parameters": {n: p.detach().cpu() for n, p in pl_module.named_parameters()},
        }
        torch.save(about, folder / f"{trainer.global_rank}.pt")


class Fail(pl.Callback):
    """Raises on rank 1, in the second step."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, _: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:  # the other one waits for its gradients then
            raise ValueError("the power failed")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, known)]))


def check_run(run: Path) -> list[dict[str, Any]]:
    """Asserts that two ranks left one whole run in `run`; what they wrote down."""
    names = {path.name for path in run.iterdir() if not path.name.startswith(".rank-0-")}
    names -= {".hydra", ".lock", ".training", "trial.json", "figures"}
    assert names == LEFT | {"probe"}
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    identity = json.loads((run / "run.json").read_text())["wandb_id"]
    assert [path.name for path in run.glob("wandb/offline-run-*/*.wandb")] == [f"run-{identity}.wandb"]
    assert sorted(path.name for path in (run / "probe").iterdir()) == ["0.pt", "1.pt"]
    found = [torch.load(run / "probe" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [about["world"] for about in found] == [2, 2]
    for name, value in found[0]["parameters"].items():
        assert torch.equal(value, found[1]["parameters"][name]), name
    for first, second in zip(found[0]["rows"], found[1]["rows"], strict=True):
        assert first
        assert second
        assert not set(first) & set(second)
    lines = (run / "metrics.csv").read_text().splitlines()
    assert sum("train/loss" in line for line in lines) == 1
    assert len(lines) > 3
    return found


def test_two_ranks_leave_one_run(tmp_path):
    before = dict(os.environ)
    run = tmp_path / "run"
    done = simsearch("train", *TINY, *PROBE, "trainer.devices=2", f"run_dir={run}", cwd=tmp_path)
    assert done.stderr == ""
    found = check_run(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")} == {
        n: v for n, v in before.items() if not n.startswith("PYTEST")
    }
    assert not dist.is_initialized()
    config = OmegaConf.load(run / "config.yaml")
    assert (config.trainer.devices, config.run_dir) == (2, str(run))
    started = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert started["global_step"] == 3
    for name, value in found[0]["parameters"].items():
        assert torch.equal(started["state_dict"][name].cpu(), value)
    assert {len(rows) for about in found for rows in about["rows"]} == {8}  # what would not fill a batch is left out
    split = configs.build_data(saved_run.open_run(run, trusted=True).config).split  # type: ignore[attr-defined]
    assert {row for about in found for rows in about["rows"] for row in rows} <= set(split.train.tolist())
    assert len(split.train) % 16


@pytest.mark.slow
def test_a_failing_rank_is_one_line(tmp_path):
    run = tmp_path / "run"
    fail = "+callbacks.fail._target_=test_ranks.Fail"
    done = simsearch("train", *TINY, fail, "trainer.devices=2", f"run_dir={run}", expect=1)
    assert done.stderr == "simsearch train: rank 1 of 2: the power failed\n"
    assert not (run / "catalog").exists()


@pytest.mark.slow
def test_ranks_share_what_was_mined(tmp_path):
    """Two ranks train on the triplets that one process with batches twice as large would have."""
    one, two = tmp_path / "one", tmp_path / "two"
    given = (*DATA, *DIR, *PROBE, "data.augment=null", "trainer.max_steps=2", "trainer.precision=32-true")
    simsearch("train", *given, "sampler.triplets=6", f"run_dir={one}", cwd=tmp_path)
    simsearch("train", *given, "trainer=training-ddp", "trainer.devices=2", f"run_dir={two}", cwd=tmp_path)
    whole = torch.load(one / "probe/0.pt", weights_only=True)
    ranks = [torch.load(two / f"probe/{rank}.pt", weights_only=True) for rank in range(2)]
    assert [about["world"] for about in ranks] == [2, 2]
    assert [first + second for first, second in zip(*(about["rows"] for about in ranks), strict=True)] == whole["rows"]
    for name, value in ranks[0]["parameters"].items():
        assert torch.equal(value, ranks[1]["parameters"][name]), name
        torch.testing.assert_close(value, whole["parameters"][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_ranks_learn_in_layers_of_a_network_and_lower_the_rate_together(tmp_path):
    """Its later layers get no gradient. Each rank has other losses, whose mean the rate follows."""
    run = tmp_path / "run"
    layers = ("backbone=lite0-style", "backbone.weights=random", "backbone.stages=[0]", "backbone.size=32")
    steered = ("scheduler=plateau", "scheduler.mode=min", "scheduler.patience=0", "scheduler.threshold=9")
    given = (*TINY[1:], "model=hashing", "pooling=average", *layers, *steered, *RANKS, "trainer.max_steps=6", *PROBE)
    simsearch("train", *given, f"run_dir={run}", cwd=tmp_path)
    first, second = (torch.load(run / f"probe/{rank}.pt", weights_only=True) for rank in range(2))
    assert first["rows"] != second["rows"]
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name
    (scheduler,) = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["lr_schedulers"]
    assert scheduler["last_epoch"] > 1
    assert scheduler["_last_lr"][0] < 1e-5


def test_a_rank_reports_what_ended_it(tmp_path, monkeypatch):
    """In this process; how the parent tells of the first report is for TestGroup."""
    parent = []
    monkeypatch.setattr(launch, "end_with_parent", lambda: parent.append(True))
    monkeypatch.setattr(sys, "argv", ["rank", str(tmp_path / "none"), str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        rank.main()
    assert error.value.code == 1
    assert parent
    report = json.loads((tmp_path / "0.json").read_text())
    assert str(tmp_path / "none") in report["message"]
    assert report["details"] == ""

    def broken(*_: Any, trusted: bool) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(saved_run, "open_run", broken)
    with pytest.raises(SystemExit):
        rank.main()
    report = json.loads((tmp_path / "0.json").read_text())
    assert report["message"] == "RuntimeError: out of luck"
    assert "Traceback" in report["details"]


# ----------------------------------------------------------------------------------- ways of starting

STARTS = {
    "console script": (["simsearch", "train"], ["seed=1"], None),
    "module, multirun": ([sys.executable, "-m", "simsearch", "train"], ["seed=0,1"], None),
    "joblib": (
        ["simsearch", "train"],
        ["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        "hydra_plugins.hydra_joblib_launcher",
    ),
    "submitit local": (
        ["simsearch", "train"],
        ["seed=0,1", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
        "hydra_plugins.hydra_submitit_launcher",
    ),
    "optuna": (
        ["simsearch", "train"],
        [
            *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"),
            *("loss.weight=interval(0.01, 0.1)", "objective=val/mAP"),
        ],
        "optuna",
    ),
    "optuna, two processes": (
        [sys.executable, "-m", "simsearch", "train"],
        [
            *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"),
            *("loss.weight=interval(0.01, 0.1)", "objective=val/mAP"),
        ],
        "optuna",
    ),
    "optuna, submitit local": (
        ["simsearch", "train"],
        [
            *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2"),
            *("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"),
            *("loss.weight=interval(0.01, 0.1)", "objective=val/mAP"),
        ],
        "hydra_plugins.hydra_submitit_launcher",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_however_it_is_started(name, tmp_path):
    program, arguments, plugin = STARTS[name]
    if plugin:
        pytest.importorskip(plugin)
    if program[0] == "simsearch":
        program = [str(Path(sys.executable).parent / "simsearch"), *program[1:]]
    sweep = name != "console script"
    place = tmp_path / "place"
    where = f"{'hydra.sweep.dir' if sweep else 'run_dir'}={place}"
    command = [*program, *(["-m"] if sweep else []), *TINY, *RANKS, *PROBE, *arguments, where]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    runs = jobs(place) if sweep else [place]
    assert len(runs) == (2 if sweep else 1)
    settings, ids = set(), set()
    for run in runs:
        found = check_run(run)
        config = OmegaConf.load(run / "config.yaml")
        assert config.run_dir == str(run)
        for about in found:  # what was composed is what every rank trained
            assert about["weight"] == config.loss.weight
        settings.add((config.seed, config.loss.weight))
        ids.add(json.loads((run / "run.json").read_text())["wandb_id"])
    assert len(ids) == len(settings) == len(runs)


def jobs(sweep: Path) -> list[Path]:
    """The run directories of a sweep's jobs, in order of start; asserts that there is no other folder."""
    folders = [path for path in sweep.iterdir() if path.is_dir() and path.name not in (".submitit", ".optuna")]
    assert all((folder / "run.json").is_file() for folder in folders)
    return sorted(folders, key=lambda folder: (folder / "run.json").stat().st_mtime_ns)


@pytest.mark.slow
def test_a_frozen_model_is_fitted_as_by_one_process(tmp_path):
    results = []
    for name, arguments in (("one", []), ("two", ["trainer=ddp", "trainer.devices=2"])):
        common = (*SMALL, "logger.mode=disabled", "callbacks.neighbours=null", f"run_dir={tmp_path / name}")
        simsearch("train", *common, *arguments)
        results.append(read_json(tmp_path / name / "metrics.json"))
    one, two = ({stage: about["metrics"] for stage, about in result.items()} for result in results)
    for stage in ("val", "test"):
        for metric in ("mAP", "P@1", "R@10", "queries", "gallery"):
            assert two[stage][metric] == pytest.approx(one[stage][metric], abs=1e-5), (stage, metric)


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failing_job(tmp_path):
    done = simsearch(
        "train", "-m", *TINY, *RANKS, *PROBE, "optimizer.lr=-1,1e-6", f"hydra.sweep.dir={tmp_path}", expect=1
    )  # fmt: skip
    assert "optimizer.lr=-1 is not a learning rate" in done.stderr
    failed, went_well = jobs(tmp_path)
    assert not (failed / "metrics.json").exists()
    check_run(went_well)


@pytest.mark.slow
def test_ranks_that_are_told_to_stop_go_on_exactly(tmp_path):
    arguments = (*TINY, *RANKS, "trainer.max_steps=300", "trainer.check_val_every_n_epoch=60", "logger.mode=disabled")
    program = [sys.executable, "-m", "simsearch", "train"]
    wanted, run = tmp_path / "wanted", tmp_path / "run"
    subprocess.run([*program, *arguments, f"run_dir={wanted}"], check=True, capture_output=True, timeout=300)
    with subprocess.Popen([*program, *arguments, f"run_dir={run}"], stderr=subprocess.DEVNULL) as process:
        start = time.monotonic()
        while not (run / "checkpoints" / "last.ckpt").is_file():
            assert time.monotonic() - start < 200
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 128 + signal.SIGTERM
    stopped = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert 0 < stopped["global_step"] < 300
    simsearch("train", "resume=true", f"run_dir={run}")
    first, second = (torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in (wanted, run))
    assert first["global_step"] == second["global_step"] == 300
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    results = [json.loads((r / "metrics.json").read_text())["test"]["metrics"]["mAP"] for r in (wanted, run)]
    assert results[0] == results[1]


# ------------------------------------------------------------------------------ processes, not trainings

REPORT = """
import json, pathlib, sys, time
pathlib.Path({folder!r}, "{rank}.json").write_text(json.dumps({{"time": {when}, "message": "{text}", "details": ""}}))
raise SystemExit(1)
"""


def run_programs(folder: Path, *programs: str) -> tuple[launch._Ranks, BaseException | None]:
    """Lets Python programs be the ranks; the group and what it raised."""
    with launch._Ranks(folder) as group:
        for program in programs:
            group.start([sys.executable, "-c", program], os.environ)
        group.wait()
        try:
            group.judge()
        except (launch.RankError, SystemExit) as error:
            return group, error
    return group, None


class TestGroup:
    def test_all_is_well(self, tmp_path):
        assert run_programs(tmp_path, "", "")[1] is None

    def test_the_first_error_counts_and_not_what_follows_from_it(self, tmp_path):
        late = REPORT.format(folder=str(tmp_path), rank=0, when=20.0, text="connection closed")
        early = REPORT.format(folder=str(tmp_path), rank=1, when=10.0, text="the cause")
        assert str(run_programs(tmp_path, late, early)[1]) == "rank 1 of 2: the cause"

    def test_one_that_is_killed_is_the_cause(self, tmp_path):
        report = REPORT.format(folder=str(tmp_path), rank=0, when=1.0, text="connection closed")
        dies = "import os, sys; print('last words', flush=True); os.kill(os.getpid(), 9)"
        error = run_programs(tmp_path, report, dies)[1]
        assert str(error) == "rank 1 of 2 ended by SIGKILL without an error message"
        assert error.details == "last words\n"

    def test_one_that_aborts_because_another_is_gone_is_not(self, tmp_path):
        report = REPORT.format(folder=str(tmp_path), rank=0, when=1.0, text="the cause")
        assert str(run_programs(tmp_path, report, "import os; os.abort()")[1]) == "rank 0 of 2: the cause"

    def test_one_that_waits_for_ever_is_killed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(launch, "_GRACE_S", 0.2)
        group, error = run_programs(tmp_path, "import time; time.sleep(600)", "raise SystemExit(3)")
        assert group.killed == {0}
        assert str(error) == "rank 1 of 2 ended by status 3 without an error message"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signals_are_passed_on(self, number, tmp_path):
        before = signal.getsignal(number)
        program = (
            "import pathlib, signal, sys, time\n"
            f"signal.signal({int(number)}, lambda *_: sys.exit({128 + number}))\n"
            f"pathlib.Path({str(tmp_path)!r}, sys.argv[0] + str(time.time_ns()) + '.ready').touch()\n"
            "time.sleep(600)"
        )

        def tell() -> None:
            while len(list(tmp_path.glob("*.ready"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), number)

        threading.Thread(target=tell).start()
        group, error = run_programs(tmp_path, program, program)
        assert isinstance(error, SystemExit)
        assert error.code == 128 + number
        assert [process.returncode for process in group.processes] == [128 + number] * 2
        assert signal.getsignal(number) == before

    def test_a_second_interrupt_kills(self, tmp_path):
        program = (
            "import pathlib, signal, time\n"
            f"signal.signal(2, lambda *_: pathlib.Path({str(tmp_path)!r}, 'heard').touch())\n"
            f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
            "while True: time.sleep(0.01)"
        )

        def tell() -> None:
            for name in ("ready", "heard"):
                while not (tmp_path / name).exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=tell).start()
        group, error = run_programs(tmp_path, program)
        assert group.processes[0].returncode == -signal.SIGKILL
        assert error.code == 128 + signal.SIGINT

    @pytest.mark.parametrize("how", ["saved", "importing", "failed", "ended well"])
    def test_the_parent_queues_the_job_of_warned_ranks_again(self, how, tmp_path, scontrol, capsys):
        handlers = {
            "saved": "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))",
            "importing": "",
            "failed": "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))",
            "ended well": "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))",
        }
        program = (
            "import os, pathlib, signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            f"{handlers[how]}\n"
            f"pathlib.Path({str(tmp_path)!r}, str(os.getpid()) + '.ready').touch()\n"
            "time.sleep(600)"
        )

        def tell() -> None:
            while len(list(tmp_path.glob("*.ready"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)  # as SLURM does

        threading.Thread(target=tell).start()
        error = run_programs(tmp_path, program, program)[1]
        said = capsys.readouterr().err
        if how == "ended well":  # before it came to stopping
            assert error is None
            assert not (scontrol / "asked").exists()
        else:
            assert isinstance(error, SystemExit)
            assert error.code == 0
            assert (scontrol / "asked").read_text() == "requeue 12\n"
            assert ("after SLURM's warning: RankError: rank 0 of 2 ended by status 3" in said) == (how == "failed")

    def test_ranks_end_with_their_parent(self, tmp_path):
        rank = (
            "import os, pathlib, signal, sys, threading, time\n"
            f"{inspect.getsource(launch.end_with_parent)}\n"  # without the imports of its module
            f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path)!r}, 'told').touch(), sys.exit()))\n"
            "end_with_parent()\n"
            f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
            "time.sleep(600)"
        )
        with subprocess.Popen([sys.executable, "-c", rank], stdin=subprocess.PIPE) as process:
            while not (tmp_path / "ready").exists():
                time.sleep(0.02)
            assert process.poll() is None
            process.stdin.close()  # as the system does when the parent is gone
            assert process.wait(60) == 0
        assert (tmp_path / "told").exists()


# ------------------------------------------------------------------------------------- who a process is

STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_NAME": "train",
}  # fmt: skip


@pytest.fixture
def slurm(monkeypatch):
    """A function that makes this process a task of a SLURM step."""

    def set_(**changes: str | None) -> None:
        for name, value in (STEP | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return set_


class TestPlace:
    def test_alone(self, slurm):
        assert (launch.rank(), launch.is_rank(), slurm_job.step()) == (0, False, None)

    def test_in_a_slurm_step(self, slurm):
        slurm()
        assert (launch.rank(), launch.is_rank(), launch.is_slurm_rank(), slurm_job.step()) == (3, True, True, "7.0")
        assert launch.place() == (3, 4, 1)

    def test_in_a_batch_script(self, slurm):
        slurm(SLURM_STEP_ID=None, SLURM_STEP_NUM_TASKS=None, SLURM_PROCID="0")
        assert (launch.rank(), launch.is_rank(), slurm_job.step()) == (0, False, None)

    def test_in_a_shell_on_a_node(self, slurm):
        slurm(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0", SLURM_JOB_NAME="bash")
        assert (launch.is_rank(), slurm_job.step()) == (False, None)

    def test_started_by_a_parent_within_slurm(self, slurm, monkeypatch):
        slurm(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert (launch.rank(), launch.is_rank(), launch.is_slurm_rank()) == (1, True, False)
        assert launch.place() == (1, 4, 1)

    def test_torchrun_around_the_command_is_refused(self, monkeypatch, tmp_path):
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        done = simsearch("train", f"run_dir={tmp_path}", expect=1)
        assert "do not use torchrun" in done.stderr


class TestDevices:
    @pytest.mark.parametrize(("devices", "count"), [(1, 1), (4, 4), ("3", 3), ([0, 2], 2), ("0,2", 2), ("1,", 1)])
    def test_count(self, devices, count):
        assert launch.count_devices(devices) == count

    def test_text_that_is_no_number_is_told(self):
        with pytest.raises(ValueError, match=r"trainer\.devices=two: give a number, a list of GPUs"):
            launch.count_devices("two")

    def test_a_measurement_takes_what_the_machine_has(self):
        trained = {"accelerator": "gpu", "devices": [0, 1], "num_nodes": 2, "strategy": "ddp", "precision": "16-mixed"}
        own = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        assert launch.of_one_process(trained) == {"accelerator": "auto", "precision": "16-mixed", **own}
        assert launch.of_one_process({"accelerator": "cpu"}) == {"accelerator": "cpu", **own}

    @pytest.mark.parametrize("automatic", ["auto", -1, "-1"])
    def test_auto_takes_what_is_there(self, automatic, slurm, monkeypatch):
        settings = {"accelerator": "auto", "devices": automatic, "a": 1}
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        assert launch.settle_devices(settings) == {"accelerator": "auto", "devices": 3, "a": 1}
        assert launch.settle_devices(settings | {"accelerator": "cpu"})["devices"] == 1
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert launch.settle_devices(settings)["devices"] == 1
        slurm()
        settled = launch.settle_devices(settings)
        assert (settled["devices"], settled["num_nodes"]) == (2, 2)

    def test_numbers_stay(self, slurm):
        assert launch.settle_devices({"devices": 2}) == {"devices": 2}
        slurm()
        assert launch.settle_devices({"devices": [0, 1], "num_nodes": 2})["devices"] == [0, 1]

    def test_more_than_there_is(self, slurm, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(ValueError, match=r"trainer.devices=2, but this machine has 1 GPUs"):
            launch.settle_devices({"devices": 2})
        assert launch.settle_devices({"devices": 2, "accelerator": "cpu"})["devices"] == 2

    def test_other_than_slurm_has(self, slurm):
        slurm()
        with pytest.raises(ValueError, match=r"SLURM runs 2 tasks on each of 2 nodes, but trainer.devices=1"):
            launch.settle_devices({"devices": 1})
        slurm(SLURM_NTASKS_PER_NODE=None)
        with pytest.raises(ValueError, match="--ntasks-per-node"):
            launch.settle_devices({"devices": "auto"})


class TestSlurmRunDirectory:
    VALUES = {"trainer": {"devices": "auto"}, "seed": 1}  # noqa: RUF012

    @pytest.fixture
    def start(self, slurm, tmp_path, monkeypatch):
        """start_run as the task of a rank."""

        def as_rank(rank: int, **changes: Any) -> saved_run.Run:
            slurm(SLURM_PROCID=str(rank), **{n: v for n, v in changes.items() if n.startswith("SLURM")})
            values = {**self.VALUES, **{n: v for n, v in changes.items() if not n.startswith("SLURM")}}
            if rank == 0:
                return run_directory._claim(tmp_path, values)
            return run_directory._await(tmp_path, values, seconds=0.3)

        return as_rank

    def test_rank_0_writes_and_the_others_read(self, start, tmp_path):
        with pytest.raises(ValueError, match=r"rank 2 waited 0 s for rank 0 to write .*config.yaml"):
            start(2)
        run = start(0)
        assert not run.resumed
        assert start(2).config == run.config | {"run_dir": str(tmp_path)}

    def test_queued_again_it_goes_on_in_its_own(self, start, tmp_path):
        first = start(0, seed=5)
        about = (tmp_path / "run.json").read_text()
        again = start(0, seed=6)
        assert again.resumed
        assert again.config["seed"] == first.config["seed"] == 5
        assert (tmp_path / "run.json").read_text() == about  # and with it the W&B run
        assert start(1).config["seed"] == 5

    def test_queued_again_before_there_was_a_config(self, start, tmp_path):
        start(0)
        (tmp_path / "config.yaml").unlink()
        with pytest.raises(ValueError, match="waited"):
            start(1)
        assert not start(0).resumed
        assert start(1).config["seed"] == 1

    @pytest.mark.parametrize("other", [{"SLURM_JOB_ID": "8"}, {"SLURM_STEP_ID": "1"}, {"SLURM_STEP_ID": None}])
    def test_what_another_wrote_is_not_read(self, other, start, tmp_path):
        start(0)
        (tmp_path / "metrics.json").touch()
        for other_rank in (0, 1):
            with pytest.raises(ValueError, match="already holds a run"):
                start(other_rank, **other)

    def test_a_file_in_the_making_is_waited_for(self, start, tmp_path):
        (tmp_path / "run.json").write_text('{"slurm_')
        with pytest.raises(ValueError, match="waited"):
            start(1)

    def test_tasks_share_a_folder_s_name(self, slurm):
        text = {"run_dir": "out/${started:2026-01-01}_x"}
        assert OmegaConf.create(text).run_dir == "out/2026-01-01_x"
        slurm()
        assert OmegaConf.create(text).run_dir == "out/slurm-7.0_x"


# --------------------------------------------------------------------------------------------- stopping


class FakeTrainer:
    """As much of a trainer as Interruption looks at."""

    world_size = 1

    class _signal_connector:
        received_sigterm = False


class TestInterruption:
    def test_outside_of_a_training_it_ends_at_once(self):
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as error, Interruption(0):
            signal.raise_signal(signal.SIGTERM)
        assert error.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before

    def test_in_a_training_it_waits_for_the_batch(self):
        trainer = FakeTrainer()
        trainer._signal_connector = FakeTrainer._signal_connector()
        with Interruption(0) as stop:
            stop.on_train_start(trainer, None)
            stop.on_train_batch_end(trainer)
            assert not trainer._signal_connector.received_sigterm
            signal.raise_signal(signal.SIGTERM)
            assert not trainer._signal_connector.received_sigterm
            stop.on_train_batch_end(trainer)
            assert trainer._signal_connector.received_sigterm
            stop.on_validation_start(trainer, None)
            assert not trainer._signal_connector.received_sigterm  # it is not broken off
            stop.on_validation_end(trainer, None)
            assert trainer._signal_connector.received_sigterm
            error = SIGTERMException()
            stop.on_exception(trainer, None, error)
            assert error.code == 128 + signal.SIGTERM

    def test_a_second_ctrl_c_ends_at_once(self, capsys):
        def train() -> None:
            with Interruption(0) as stop:
                stop.on_train_start(FakeTrainer(), None)
                signal.raise_signal(signal.SIGINT)
                assert "stopping after this batch with a checkpoint" in capsys.readouterr().err
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(SystemExit) as error:
            train()
        assert error.value.code == 128 + signal.SIGINT

    def test_in_the_last_batch_it_ends_after_the_training(self):
        with Interruption(0) as stop:
            stop.on_train_start(FakeTrainer(), None)
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(SystemExit):
                stop.on_train_end(FakeTrainer(), None)

    def test_the_warning_puts_the_job_back_into_the_queue(self, scontrol, capsys):
        with pytest.raises(SystemExit) as error, Interruption(0):
            signal.raise_signal(signal.SIGUSR1)
        assert error.value.code == 0
        assert (scontrol / "asked").read_text() == "requeue 12\n"
        assert "12 is queued again" in capsys.readouterr().err

    def test_whatever_ends_a_warned_run_it_is_queued_again_once(self, scontrol, monkeypatch, capsys):
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
        monkeypatch.setattr(interruption, "_FINISH_S", 0.01)

        def train() -> None:
            with Interruption(0) as stop:
                stop.on_train_start(FakeTrainer(), None)
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGTERM)  # as SLURM does
                assert stop.received == signal.SIGUSR1
                stop.on_exception(FakeTrainer(), None, SIGTERMException())
                while not (scontrol / "asked").exists():  # loggers take long
                    time.sleep(0.01)
                raise RuntimeError("the others are gone")

        with pytest.raises(SystemExit) as error:
            train()
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()
        assert error.value.code == 0
        assert (scontrol / "asked").read_text() == "requeue 10_2\n"
        assert "job 10_2 is queued again" in capsys.readouterr().err

    def test_only_rank_0_asks(self, scontrol):
        with pytest.raises(SystemExit) as error, Interruption(1):
            signal.raise_signal(signal.SIGUSR1)
        assert error.value.code == 0
        assert not (scontrol / "asked").exists()

    def test_slurm_may_refuse(self, scontrol):
        (scontrol / "broken").touch()
        with pytest.raises(SystemExit, match="cannot requeue the SLURM job 12"), Interruption(0):
            signal.raise_signal(signal.SIGUSR1)

    def test_a_late_request_that_slurm_refuses_is_told_and_made_again(self, scontrol, monkeypatch, capsys):
        monkeypatch.setattr(interruption, "_FINISH_S", 0.01)
        (scontrol / "broken").touch()

        def train() -> None:
            with Interruption(0) as stop:
                stop.on_train_start(FakeTrainer(), None)
                signal.raise_signal(signal.SIGUSR1)
                stop.on_exception(FakeTrainer(), None, SIGTERMException())
                while "cannot requeue" not in capsys.readouterr().err:
                    time.sleep(0.01)
                (scontrol / "broken").unlink()
                raise SystemExit(143)

        with pytest.raises(SystemExit) as error:
            train()
        assert error.value.code == 0
        assert (scontrol / "asked").read_text() == "requeue 12\n" * 2

    def test_a_validation_that_outlasts_the_job_s_time_does_not_cost_its_place(self, scontrol, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + slurm_job._MARGIN_S)))
        with Interruption(0) as stop:
            stop.on_train_start(FakeTrainer(), None)
            signal.raise_signal(signal.SIGUSR1)
            while not (scontrol / "asked").exists():
                time.sleep(0.01)

    def test_an_error_after_the_warning_is_told(self, scontrol, capsys):
        def train() -> None:
            with Interruption(0) as stop:
                stop.on_train_start(FakeTrainer(), None)
                signal.raise_signal(signal.SIGUSR1)
                raise OSError("no space left")

        with pytest.raises(SystemExit) as error:
            train()
        assert error.value.code == 0
        assert "after SLURM's warning: OSError: no space left" in capsys.readouterr().err

    def test_a_process_whose_parent_waits_leaves_the_request_to_it(self, scontrol, monkeypatch):
        monkeypatch.setenv(slurm_job.PARENT_ASKS, "1")
        for block in (Interruption(0), slurm_job.requeued_if_warned(0)):
            with pytest.raises(SystemExit) as error, block:
                signal.raise_signal(signal.SIGUSR1)
            assert error.value.code == 138
        assert not (scontrol / "asked").exists()

    def test_a_job_that_would_begin_anew_is_not_queued_again(self, scontrol, monkeypatch):
        monkeypatch.delenv("SLURM_STEP_ID")
        with pytest.raises(SystemExit, match="job 12 is not queued again: without srun"), Interruption(0):
            signal.raise_signal(signal.SIGUSR1)
        assert not (scontrol / "asked").exists()

    def test_the_warning_does_not_end_the_tracker_of_semaphores(self, scontrol):
        program = (
            "import multiprocessing, os, signal, time\n"
            "from multiprocessing.resource_tracker import _resource_tracker as tracker\n"
            "from simsearch.slurm import requeued_if_warned\n"
            "with requeued_if_warned(0, lambda: None):\n"
            "    lock = multiprocessing.get_context('spawn').Lock()\n"
            "    os.kill(tracker._pid, signal.SIGUSR1)\n"
            "    time.sleep(0.2)\n"
            "    del lock\n"
            "    multiprocessing.get_context('spawn').Lock()\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")

    def test_without_slurm_the_other_signal_is_not_ours(self, monkeypatch):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        before = signal.getsignal(signal.SIGUSR1)
        with Interruption(0):
            assert signal.getsignal(signal.SIGUSR1) == before
