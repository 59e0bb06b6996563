"""Jobs on a real SLURM: `make test-slurm` starts one on this machine. The launchers' configs need none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from test_ranks import PROBE, TINY, check_run, jobs

from simsearch import configs

LONG = (
    *TINY,
    *("trainer=training-ddp", "trainer.max_steps=400", "trainer.check_val_every_n_epoch=80"),
    *("trainer.precision=32-true", "trainer.log_every_n_steps=1"),
)
HERE = (
    *("hydra/launcher=slurm", "hydra.launcher.partition=debug", "hydra.launcher.gpus_per_node=null"),
    *("hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"),
)
PROGRAM = (sys.executable, "-m", "simsearch", "train")


# ---------------------------------------------------------------------------- configs, without a SLURM


def launcher(*overrides: str) -> dict:
    """The composed launcher of a sweep."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        config = hydra.compose("train", ["run_dir=unused", *overrides], return_hydra_config=True)
        config.hydra.job.id = config.hydra.job.num = 0
        node = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(node, dict)
    return node


def test_the_launcher_takes_changes():
    node = launcher("hydra/launcher=slurm", "hydra.launcher.tasks_per_node=4", "hydra.launcher.array_parallelism=3")
    assert node["_target_"].endswith("SlurmLauncher")
    assert (node["nodes"], node["tasks_per_node"], node["gpus_per_node"], node["array_parallelism"]) == (1, 4, 4, 3)
    assert node["additional_parameters"] == {"signal": "USR1@90", "requeue": True}
    node = launcher("hydra/launcher=slurm", "hydra.launcher.additional_parameters.signal=USR1@300")
    assert node["additional_parameters"] == {"signal": "USR1@300", "requeue": True}
    assert launcher("hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null")["gpus_per_node"] is None


def test_several_nodes_are_the_same_with_more():
    one, several = launcher("hydra/launcher=slurm"), launcher("hydra/launcher=slurm-multinode")
    changed = {name for name in one if one[name] != several[name] and name != "submitit_folder"}  # that has the time
    assert changed == {"nodes", "tasks_per_node", "gpus_per_node", "array_parallelism", "setup"}
    assert several["gpus_per_node"] == several["tasks_per_node"]


# ---------------------------------------------------------------------------------------- a real SLURM


@pytest.fixture
def tests_on_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def slurm(tests_on_path):
    """A function that asks SLURM; a skip where there is none."""
    if not shutil.which("sinfo") or subprocess.run(["sinfo", "--noheader"], capture_output=True).returncode:
        pytest.skip("no SLURM answers: run `make test-slurm`")

    def ask(*command: str) -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.split()

    yield ask
    subprocess.run(["scancel", "--user=root"], capture_output=True)


def until(ready: Callable[[], object], process: subprocess.Popen[str], seconds: float = 200.0) -> None:
    """Waits until something is so, or fails where it never is."""
    start = time.monotonic()
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.1)


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def same_training(run: Path, wanted: Path) -> None:
    """Asserts equal parameters, to the last bit, and equal results."""
    first, second = last(wanted), last(run)
    assert first["global_step"] == second["global_step"] == 400
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    ends = [json.loads((r / "metrics.json").read_text())["test"]["metrics"]["mAP"] for r in (wanted, run)]
    assert ends[0] == ends[1]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> Path:
    """The training with two ranks that nothing interrupts, without SLURM."""
    run = tmp_path_factory.mktemp("wanted") / "run"
    command = [*PROGRAM, *LONG, "trainer.devices=2", "seed=0", "logger.mode=disabled", f"run_dir={run}"]
    subprocess.run(command, check=True, capture_output=True, timeout=400)
    return run


@pytest.mark.slurm
def test_a_sweep_of_two_rank_jobs_survives_a_requeue(slurm, wanted, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    sweep = tmp_path / "sweep"
    limit = "hydra.launcher.array_parallelism=1"
    command = [*PROGRAM, "-m", *LONG, *PROBE, *HERE, limit, "seed=0,1", f"hydra.sweep.dir={sweep}"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        until(lambda: list(sweep.glob("*/checkpoints/last.ckpt")), process)
        (interrupted,) = (path.parents[1] for path in sweep.glob("*/checkpoints/last.ckpt"))
        (job,) = slurm("squeue", "--noheader", "--states=RUNNING", "--format=%F_%K")  # one at a time
        identity = json.loads((interrupted / "run.json").read_text())["wandb_id"]
        slurm("scancel", "--signal=USR1", job)
        until(lambda: (interrupted / "run.json").is_file() and job_state(slurm, job) == "PENDING", process)
        stopped = last(interrupted)["global_step"]
        assert 0 < stopped < 400
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert len(jobs(sweep)) == 2
    assert json.loads((interrupted / "run.json").read_text())["wandb_id"] == identity
    logs = [path.name for path in interrupted.glob("wandb/offline-run-*/*.wandb")]
    assert logs == [f"run-{identity}.wandb"] * 2  # two parts of one run
    assert (interrupted / "metrics-0.csv").is_file()
    same_training(interrupted, wanted)
    (other,) = (job for job in jobs(sweep) if job != interrupted)
    check_run(other)
    probes = [torch.load(interrupted / "probe" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [len(probe["rows"]) for probe in probes] == [400 - stopped] * 2  # not one batch twice
    for name, value in probes[0]["parameters"].items():
        assert torch.equal(value, probes[1]["parameters"][name]), name


def job_state(slurm: Callable[..., list[str]], job: str) -> str:
    return next(iter(slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T")), "GONE")


def start_again(slurm: Callable[..., list[str]], job: str) -> None:
    """Starts a job that is queued again at once, and not in two minutes.

    SLURM revokes what the first start was allowed, in whole seconds: a second start in the same second would fail.
    """
    time.sleep(1.5)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.mark.slurm
def test_srun_in_a_batch_script_that_is_requeued(slurm, wanted, tmp_path):
    script = tmp_path / "job.sh"
    arguments = " ".join(f"'{argument}'" for argument in (*LONG, "seed=0", "logger.mode=disabled"))
    program = " ".join(PROGRAM)
    script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit {program} {arguments} run_root={tmp_path}/out\n")
    options = ("--requeue", "--ntasks-per-node=2", "--open-mode=append", f"--output={tmp_path}/log")
    (job,) = slurm("sbatch", "--parsable", *options, str(script))
    run = tmp_path / "out" / f"slurm-{job}.0_rendered_dsh"

    def wait(ready: Callable[[], object]) -> None:
        start = time.monotonic()
        while not ready():
            assert time.monotonic() - start < 300, (tmp_path / "log").read_text()
            time.sleep(0.1)

    wait((run / "checkpoints" / "last.ckpt").is_file)
    slurm("scontrol", "requeue", job)  # as a preemption: SIGTERM, and nobody asks for a requeue
    wait(lambda: job_state(slurm, job) == "PENDING")
    assert 0 < last(run)["global_step"] < 400
    start_again(slurm, job)
    wait(lambda: job_state(slurm, job) in ("COMPLETED", "GONE", "FAILED", "COMPLETING"))
    wait((run / "catalog" / "catalog.json").is_file)
    same_training(run, wanted)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [run.name]


@pytest.mark.slurm
def test_a_job_that_runs_two_trials_at_a_time_is_requeued_after_both_have_saved(slurm, tmp_path):
    pytest.importorskip("optuna")
    from simsearch.sweeps.trials import read_trials

    sweep, script = tmp_path / "sweep", tmp_path / "job.sh"
    study = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=2")
    study += ("hydra.sweeper.sampler.seed=0", "loss.weight=interval(0.01,0.1)", "objective=val/mAP")
    setting = (*LONG, "trainer.devices=1", "logger.mode=disabled", f"hydra.sweep.dir={sweep}")
    arguments = " ".join(f"'{argument}'" for argument in ("-m", *setting, *study))
    script.write_text(f"#!/bin/bash\nsrun {' '.join(PROGRAM)} {arguments}\n")
    options = ("--requeue", "--ntasks=1", "--cpus-per-task=2", "--open-mode=append", f"--output={tmp_path}/log")
    (job,) = slurm("sbatch", "--parsable", *options, str(script))

    def wait(ready: Callable[[], object]) -> None:
        start = time.monotonic()
        while not ready():
            assert time.monotonic() - start < 400, (tmp_path / "log").read_text()
            time.sleep(0.1)

    wait(lambda: len(list(sweep.glob("*/checkpoints/last.ckpt"))) == 2)
    slurm("scancel", "--signal=USR1", job)
    wait(lambda: job_state(slurm, job) == "PENDING")
    assert (tmp_path / "log").read_text().count("is queued again") == 1
    assert [about["state"] for about in read_trials(sweep)] == ["interrupted"] * 2  # SLURM killed none
    runs = {path.parents[1] for path in sweep.glob("*/checkpoints/last.ckpt")}
    assert all(0 < last(run)["global_step"] < 400 for run in runs)
    start_again(slurm, job)
    wait(lambda: job_state(slurm, job) in ("COMPLETED", "GONE", "FAILED", "COMPLETING"))
    wait(lambda: [about["state"] for about in read_trials(sweep)] == ["finished"] * 2)
    assert {sweep / about["folder"] for about in read_trials(sweep)} == runs
    assert [last(run)["global_step"] for run in runs] == [400] * 2


@pytest.mark.slurm
def test_one_task_starts_its_ranks_itself_and_a_failing_one_is_told(slurm, tmp_path):
    arguments = (*TINY, "+callbacks.fail._target_=test_ranks.Fail", "trainer.devices=2", f"run_dir={tmp_path}/run")
    done = subprocess.run(
        ["srun", "--ntasks=1", "--cpus-per-task=2", *PROGRAM, *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "simsearch train: rank 1 of 2: the power failed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slurm
def test_jobs_of_a_cluster_share_a_study(slurm, tmp_path):
    """At most two jobs at a time, of two ranks each; the same command again finds that nothing is left.

    None is killed here: without accounting, submitit never learns of a job that died, and waits for it.
    """
    pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from simsearch.sweeps.trials import read_trials

    sweep = tmp_path / "sweep"
    study = ("hydra/sweeper=optuna", "hydra/sweeper/pruner=halving", "hydra.sweeper.n_trials=4")
    study += ("hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=0", "loss.weight=interval(0.01,0.1)")
    setting = (*LONG, *HERE, "logger.mode=disabled", "objective=val/mAP", f"hydra.sweep.dir={sweep}")
    for _ in range(2):
        done = subprocess.run(
            [*PROGRAM, "-m", *setting, *study], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        trials = read_trials(sweep)
        assert sorted(number for about in trials for number in about["numbers"]) == [0, 1, 2, 3]
        assert {about["state"] for about in trials} <= {"finished", "pruned"}
        assert len(list((sweep / ".submitit").glob("[0-9]*"))) == 4  # jobs
