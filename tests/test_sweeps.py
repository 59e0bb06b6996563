"""Sweeps: trials by what they compute, finished ones not computed again, cut-off ones gone on with."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import hydra
import pytest
import yaml
from conftest import simsearch
from filelock import FileLock
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from simsearch import configs, saved_run, settings
from simsearch.files import read_json, write_json
from simsearch.sweeps import objectives
from simsearch.sweeps.progress import is_open, progress_table, summary
from simsearch.sweeps.space import plan
from simsearch.sweeps.trials import Trial, _readable, read_trials, trial_name

TINY = (
    *("data.styles=4", "data.artists=2", "data.works=6", "data.photographs=4", "data.size=40", "backbone.size=40"),
    *("logger.mode=disabled", "callbacks.neighbours=null", "catalog.write=false", "backbone.weights=random"),
    *("model.cache=null", "model.whitening.dimension=16", "model.sample=100"),
)
CLASS_MEANS = "+evaluators@callbacks.evaluation.evaluators=class-means"


def compose(*overrides: str):
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        config = hydra.compose("train", list(overrides), return_hydra_config=True)
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    config.hydra.overrides.task = list(overrides)
    return config


def name(*overrides: str) -> str:
    return trial_name(_root_=compose(*overrides))


def test_a_trials_name_is_what_it_computes():
    elsewhere = name("seed=3", "pooling=gem", "run_root=/elsewhere", "logger.mode=disabled")
    assert name("pooling=gem", "seed=3")[-10:] == elsewhere[-10:]
    other = name("seed=3", "pooling=gem", "data=cifar10")
    assert name("seed=3", "pooling=gem", "data=cifar10", "data.root=/scratch", "data.cache=/tmp/a")[-10:] == other[-10:]
    assert (
        name("seed=3", "pooling=gem", "data=cifar10", "model.cache.root=/tmp/b")[-10:] == other[-10:] != elsewhere[-10:]
    )
    hashes = {name(*some)[-10:] for some in (("seed=3",), ("seed=4",), ("pooling=gem",), ("index=sq8",), ())}
    assert len(hashes) == 5
    assert name()[-10:] == name("seed=0")[-10:]  # the default, given


def test_a_start_counts_by_what_it_computes(tmp_path):
    def of(folder: str, **config) -> str:
        path = tmp_path / folder / "config.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"run_dir": str(path.parent), "model": {"bits": 12}, **config}))
        return name("model=hashing", f"+model.start={path.parent}")[-10:]

    first = of("a", seed=0)
    assert of("b", seed=0) == first  # it lies elsewhere
    assert of("a", seed=1) != first  # it was trained again, in place
    assert name("model=hashing", f"+model.start={tmp_path}/gone")[-10:] != first


def test_a_trials_name_is_readable_and_safe_for_shells():
    found = name(
        *("sweep=index-families", "model.whitening.power=0.2500012345"),
        *("index=hnsw", "callbacks.checkpoint.filename='/a b,c'"),
    )
    assert found.startswith("index-hnsw_power-0.25_filename-a-b-c")
    assert re.fullmatch(r"[\w.+-]{1,80}", found)
    long = _readable([f"data.source=/{'画' * 90}.csv"], {"data.source"})
    assert 100 < len(long.encode()) < 200  # of the 255 bytes that a file system takes


def test_a_trial_keeps_its_folder_however_its_overrides_are_written(tmp_path, monkeypatch):
    sweep = f"hydra.sweep.dir={tmp_path}"
    before = name("seed=1", "pooling=gem", sweep)
    assert name("pooling=gem", "seed=1", sweep) != before
    (tmp_path / before).mkdir()
    write_json(tmp_path / before / "trial.json", {"state": "finished"})
    assert name("pooling=gem", "seed=1", sweep) == before
    monkeypatch.setattr("simsearch.sweeps.trials.code_version", lambda: "other")  # code is told of, and no other trial
    assert name("seed=1", "pooling=gem", sweep) == before
    assert name("seed=2", "pooling=gem", sweep) != before


def test_keys_swept_on_the_command_line_are_in_the_folders_name(tmp_path):
    many = ("backbone.weights=random", "model.whitening.dimension=16", "model.sample=100", "data.photographs=4")
    write_json(tmp_path / "sweep.json", {"planned": 2, "swept": ["seed", "pooling"]})
    found = name(*many, "pooling=gem", "seed=7", f"hydra.sweep.dir={tmp_path}")
    assert found.startswith("pooling-gem_seed-7_weights-random")
    assert len(found) < 80


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1,2,3", "pooling=gem,mac"],
        ["seed=1", "pooling=gem"],
        ["seed=range(0,10,2)", "index=choice(flat,sq8)"],
        ["data.root='a,b'", "seed=0,1"],
        ["loss=glob(*,exclude=dsh)", "seed=0,1"],
    ],
)
def test_what_is_swept_is_what_hydra_makes(overrides):
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(["loss=a,b", *overrides])
        jobs = list(itertools.chain(*BasicSweeper.split_arguments(parsed, None)))
        found, shared = plan({"loss": "a,b"}, overrides, loader)
    assert math.prod(map(len, found.values())) == len(jobs)
    for key in {text.partition("=")[0] for text in jobs[0]}:
        values = {text.partition("=")[2] for job in jobs for text in job if text.startswith(f"{key}=")}
        assert set(found.get(key, values)) == values
        assert (key in found) or len(values) == 1
    assert {text for job in jobs for text in job if text.partition("=")[0] not in found} == set(shared)


def test_the_command_line_takes_a_swept_parameters_place():
    found = plan({"seed": "1,2,3", "index": "flat,sq8"}, ["seed=5"])
    assert found == ({"index": ["flat", "sq8"]}, ["seed=5"])


def metrics(folder: Path, **stages: dict) -> Path:
    write_json(folder / "metrics.json", {stage: {"metrics": values} for stage, values in stages.items()})
    return folder


def test_objectives(tmp_path):
    folder = metrics(tmp_path, val={"mAP": 0.5, "bytes_per_item": 16.0}, test={"mAP": 0.4})
    assert objectives.values_of(folder, None) is None
    assert objectives.values_of(folder, "val/mAP") == 0.5
    assert objectives.values_of(folder, ["test/mAP", "val/bytes_per_item"]) == [0.4, 16.0]
    with pytest.raises(ValueError, match="objective=val/mPA was not measured; there are val/mAP"):
        objectives.values_of(folder, "val/mPA")
    with pytest.raises(ValueError, match=r"protocol\.validation=0\.1"):
        objectives.values_of(metrics(tmp_path, test={"mAP": 0.4}), "val/mAP")
    with pytest.raises(ValueError, match="objective=val/GAP was measured without a value"):
        objectives.values_of(metrics(tmp_path, val={"mAP": 0.5, "GAP": None}), "val/GAP")


def test_a_dead_process_has_left_its_trial(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for number, (pid, state) in enumerate([(gone.pid, "running"), (os.getpid(), "running"), (gone.pid, "finished")]):
        trial = Trial(tmp_path / str(number), ["a=1"])
        trial.write(state)
        about = json.loads((trial.folder / "trial.json").read_text())
        write_json(trial.folder / "trial.json", {**about, "pid": pid, "started": number})
    write_json(tmp_path / "sweep.json", {"planned": 4})
    assert [about["state"] for about in read_trials(tmp_path)] == ["interrupted", "running", "finished"]
    assert summary(tmp_path) == "1 of 4 trials finished, 1 running, 1 interrupted"
    assert is_open(tmp_path)
    with pytest.raises(ValueError, match="is not a sweep"):
        summary(tmp_path / "0")


@pytest.mark.parametrize(
    ("about", "states", "expected"),
    [
        ({}, ["finished", "running"], True),
        ({}, ["finished", "interrupted"], True),  # its process goes on
        ({"ended": True}, ["finished", "finished"], False),  # of 4: a point came twice
        ({"ended": True}, ["finished", "running"], True),  # by another process
        ({"pid": "gone"}, ["finished", "interrupted"], False),
        ({"pid": "gone"}, ["finished", "running"], True),  # a cluster's jobs outlive the process that sent them
        ({"pid": "gone", "host": "elsewhere"}, ["finished"], True),
        ({}, ["finished", "failed", "finished", "finished"], False),
        ({}, [], True),
    ],
)
def test_a_sweep_ends_by_its_trials_and_its_process(tmp_path, about, states, expected):
    gone = subprocess.Popen(["true"])
    gone.wait()
    about = {"planned": 4, "ended": False, "host": socket.gethostname(), "pid": os.getpid()} | about
    write_json(tmp_path / "sweep.json", about | ({"pid": gone.pid} if about["pid"] == "gone" else {}))
    for number, state in enumerate(states):
        Trial(tmp_path / str(number), ["a=1"]).write(state)
    assert is_open(tmp_path) is expected


def test_a_repeated_point_is_told(tmp_path):
    write_json(tmp_path / "sweep.json", {"planned": 4, "ended": True})
    Trial(tmp_path / "a", ["a=1"]).write("finished")
    assert summary(tmp_path) == "1 trials finished (of 4 planned; a repeated point counts once)"
    write_json(tmp_path / "sweep.json", {"planned": 0, "ended": True})  # an earlier plan's trial lies there
    assert summary(tmp_path) == "1 of 1 trials finished"


def test_the_best_trial_is_by_what_is_good(tmp_path):
    for objective, best in (("val/mAP", "b"), ("val/bytes_per_item", "a"), ("test/rerank/seconds_per_query", "a")):
        write_json(tmp_path / "sweep.json", {"planned": 2, "objective": [objective]})
        for trial, value in (("a", 1.0), ("b", 2.0)):
            Trial(tmp_path / trial, [f"x={trial}"], values=value).write("finished")
        assert f"({best})" in summary(tmp_path)


def test_the_best_trial_is_by_the_objective_of_now(tmp_path):
    """A grid that goes on with another objective meets its finished trials one after the other."""
    write_json(tmp_path / "sweep.json", {"planned": 2, "objective": ["val/bytes_per_item"]})
    Trial(tmp_path / "a", ["x=a"], values=0.5, objective=["val/mAP"]).write("finished")
    assert "best" not in summary(tmp_path)
    Trial(tmp_path / "b", ["x=b"], values=64.0, objective=["val/bytes_per_item"]).write("finished")
    assert "best 64.0000 (b)" in summary(tmp_path)


def test_progress_reads_each_config_once(tmp_path, monkeypatch):
    write_json(tmp_path / "sweep.json", {"planned": 1})
    Trial(tmp_path / "a", ["x=a"]).write("running")
    config, read = tmp_path / "a" / "config.yaml", []
    config.write_text("trainer: {max_steps: 30}\n")
    (tmp_path / "a" / "metrics.csv").write_text("step\n9\n")
    monkeypatch.setattr(saved_run, "read_config", lambda path: read.append(path) or yaml.safe_load(path.read_text()))
    for _ in range(3):
        assert list(progress_table(tmp_path).columns[2].cells) == ["9/30"]
    assert len(read) == 1
    config.write_text("trainer: {max_steps: 60}\n")  # the training was made longer
    os.utime(config, (0, 0))
    assert list(progress_table(tmp_path).columns[2].cells) == ["9/60"]


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (["val/mAP"], None, "maximize"),
        (["val/mAP"], "minimize", "minimize"),  # whoever says so gets it
        (["val/index/latency_ms_p95"], None, "minimize"),
        (["val/index/queries_per_s"], None, "maximize"),
        (["val/code/dead_bits"], None, "minimize"),
        (["val/code/balance"], None, "maximize"),
        (["val/mAP", "val/bytes_per_item"], None, ["maximize", "minimize"]),
        (["val/mAP", "val/bytes_per_item"], ["minimize", "minimize"], ["minimize", "minimize"]),
    ],
)
def test_directions_follow_what_is_good(names, given, expected):
    assert objectives.directions(names, given) == expected


@pytest.mark.parametrize("given", [["maximize", "minimize"], "upwards"])
def test_directions_are_as_many_as_objectives(given):
    with pytest.raises(ValueError, match="objectives, but objective names 1"):
        objectives.directions(["val/mAP"], given)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=val/mAp"], "objective=val/mAp will not be measured; there are val/mAP"),
        (["objective=[val/mAP,val/bytes]"], "objective=val/bytes will not be measured"),
        (["objective=val/mAP", "protocol.validation=null"], "give protocol.validation=0.1"),
        (["objective=val/mAP", "protocol.validation=null", CLASS_MEANS], "give protocol.validation=0.1"),
        (["objective=test/class/accuracy", CLASS_MEANS], None),
        (["objective=test/rerank/mAP"], "objective=test/rerank/mAP will not be measured"),
        (["objective=val/code/empty_ball@2"], "will not be measured"),
        (["objective=test/rerank/mAP", "rerank=aqe"], None),
        (["objective=val/code/empty_ball@2", "model=hashing"], None),
        (["objective=[val/mAP,val/P@5,test/index/latency_ms_p95]", "callbacks.evaluation.ks=[5]"], None),
        (["objective=val/mine", "model._target_=mine.Model"], None),  # who knows what that measures
    ],
)
def test_an_objective_is_checked_before_anything_trains(overrides, message):
    config = compose("backbone.weights=random", *overrides)
    if message is None:
        objectives.check(config)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            objectives.check(config)


def test_what_will_be_measured_is_what_was(small_run):
    config = saved_run.open_run(small_run).config
    stages = read_json(small_run / "metrics.json")
    measured = {f"{stage}/{metric}" for stage, about in stages.items() for metric in about["metrics"]}
    assert measured == settings.measured_names(config)


@pytest.mark.parametrize(("protocol", "stages"), [("10k-50k", set()), ("dsh-release", {"test"})])
def test_a_ranking_in_index_order_is_an_objective_where_it_is_measured(protocol, stages):
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        config = hydra.compose(
            "train", ["run_dir=x", "experiment=dsh", f"protocol={protocol}", "protocol.validation=0.1"]
        )
    known = settings.measured_names(OmegaConf.to_container(config, resolve=True))
    assert {name.partition("/")[0] for name in known if name.endswith("/mAP_index_order")} == stages


def test_the_documented_sweep_of_wandb_optimises_what_its_command_logs():
    guide = (Path(__file__).parent.parent / "docs" / "pages" / "guides" / "train.md").read_text()
    block = yaml.safe_load(re.search(r"```yaml\n(# wandb sweep.*?)```", guide, re.S)[1])
    assert block["command"][:2] == ["simsearch", "train"]
    config = compose(*(text for text in block["command"][2:] if "=" in text), *(f"{k}=1" for k in block["parameters"]))
    config.objective = block["metric"]["name"]
    objectives.check(config)


def train(tmp_path: Path, *overrides: str, **settings) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "simsearch", "train", *overrides, *TINY, f"run_root={tmp_path}"]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings
    )


def test_a_grid_reports_what_failed_and_skips_what_is_finished(tmp_path, monkeypatch):
    grid = ("-m", "hydra.sweep.dir=${run_root}/grid", "index=flat,opq16,sq8")  # too few items to train OPQ on
    first = simsearch("train", *grid, *TINY, f"run_root={tmp_path}", cwd=tmp_path, expect=1)
    said = first.stdout + first.stderr
    trials = read_trials(tmp_path / "grid")
    states = {next(o for o in about["overrides"] if o.startswith("index=")): about["state"] for about in trials}
    assert states == {"index=flat": "finished", "index=opq16": "failed", "index=sq8": "finished"}
    assert said.count("failed: ") == 1
    assert "needs at least 256 vectors" in said
    assert "Traceback" not in said
    runs = {path.parent: path.stat().st_mtime_ns for path in (tmp_path / "grid").glob("*/metrics.json")}
    assert len(runs) == 2
    left = {path.name for path in tmp_path.iterdir()} | {path.name for path in (tmp_path / "grid").iterdir()}
    assert left == {"grid", "sweep.json", "multirun.yaml", *(about["folder"] for about in trials)}

    # What failed is tried again, and fails again; what is finished stays, also under code that has changed since.
    monkeypatch.setattr("simsearch.sweeps.trials.code_version", lambda: "other")
    second = simsearch("train", *grid, *TINY, f"run_root={tmp_path}", cwd=tmp_path, expect=1)
    assert {path.parent: path.stat().st_mtime_ns for path in (tmp_path / "grid").glob("*/metrics.json")} == runs
    assert "2 of 3 trials finished, 1 failed" in second.stdout + second.stderr
    assert second.stderr.count("2 trials were computed by another version of the code, such as index-") == 1

    # A study takes the values of its own objective from trials of a grid, which had none.
    pytest.importorskip("optuna")
    study = ("-m", "hydra/sweeper=optuna", "hydra.sweep.dir=${run_root}/grid", "hydra.sweeper.n_trials=2")
    simsearch(
        "train", *study, "index=choice(flat,sq8)", "objective=test/P@1", *TINY, f"run_root={tmp_path}", cwd=tmp_path
    )
    assert {path.parent: path.stat().st_mtime_ns for path in (tmp_path / "grid").glob("*/metrics.json")} == runs
    told = [about for about in read_trials(tmp_path / "grid") if about.get("numbers")]
    assert told
    for about in told:
        assert about["objective"] == ["test/P@1"]
        assert (
            about["values"] == read_json(tmp_path / "grid" / about["folder"] / "metrics.json")["test"]["metrics"]["P@1"]
        )
    assert (tmp_path / "grid" / "optimization_results.yaml").is_file()


def test_a_trial_that_another_process_has_is_left_to_it(tmp_path):
    grid = ("hydra.sweep.dir=${run_root}/grid", "seed=5")
    folder = tmp_path / "grid" / name("seed=5", *TINY, f"run_root={tmp_path}", "hydra.sweep.dir=${run_root}/grid")
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        done = simsearch("train", "-m", *grid, *TINY, f"run_root={tmp_path}", cwd=tmp_path)
    assert f"{folder} is left to another process of this sweep, which works on it already" in done.stderr
    assert not (folder / "run.json").exists()
    assert read_json(tmp_path / "grid" / "sweep.json")["ended"] is True


def test_jobs_of_a_cluster_share_the_sweep_s_folder(monkeypatch):
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        sweep = loader.load_configuration("train", [], run_mode=RunMode.MULTIRUN)
        folder = sweep.hydra.sweep.dir
        monkeypatch.setenv("SLURM_JOB_ID", "7")  # a job composes in a step of its own
        monkeypatch.setenv("SLURM_STEP_ID", "0")
        assert loader.load_sweep_config(sweep, ["seed=1"]).hydra.sweep.dir == folder
        assert "slurm" not in folder


def test_a_study_is_not_run_by_the_ranks_of_srun(tmp_path, monkeypatch):
    for key, value in {"STEP_NUM_TASKS": 2, "PROCID": 1, "LOCALID": 1}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    study = ("-m", "hydra/sweeper=optuna", "hydra.sweep.dir=${run_root}/study", "seed=choice(0,1)", "objective=val/mAP")
    done = simsearch("train", *study, *TINY, f"run_root={tmp_path}", cwd=tmp_path, expect=1)
    assert "a study is run by one process, and srun started several: use --ntasks=1" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_trial_that_goes_on_has_the_value_of_the_objective_of_now(tmp_path):
    grid = ("-m", "hydra.sweep.dir=${run_root}/grid", "seed=5", *TINY, f"run_root={tmp_path}")
    simsearch("train", *grid, "objective=test/mAP", cwd=tmp_path)
    (path,) = (tmp_path / "grid").glob("*/trial.json")
    write_json(path, read_json(path) | {"state": "interrupted"})
    simsearch("train", *grid, "objective=test/P@1", cwd=tmp_path)
    about, measured = read_json(path), read_json(path.with_name("metrics.json"))["test"]["metrics"]
    assert (about["state"], about["objective"]) == ("finished", ["test/P@1"])
    assert about["values"] == measured["P@1"] != measured["mAP"]


@pytest.mark.slow
def test_all_ranks_leave_a_trial_that_another_process_has(tmp_path, monkeypatch):
    grid = ("seed=5", *TINY, f"run_root={tmp_path}", "trainer.devices=auto", "hydra.sweep.dir=${run_root}/grid")
    folder = tmp_path / "grid" / name(*grid)
    folder.mkdir(parents=True)
    step = {"JOB_ID": 7, "STEP_ID": 0, "STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 1, "NTASKS_PER_NODE": 2}
    for key, value in step.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))

    def rank(number: int):
        monkeypatch.setenv("SLURM_PROCID", str(number))
        monkeypatch.setenv("SLURM_LOCALID", str(number))
        return simsearch("train", "-m", *grid, cwd=tmp_path)

    with FileLock(folder / ".lock"):
        assert "is left to another process of this sweep" in rank(0).stderr
        assert "is left to another process" not in rank(1).stderr  # said once, and it has nobody to train with
    assert not (folder / "run.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "this sweeper needs an objective: give objective=val/mAP"),
        (["objective=val/mPA"], "objective=val/mPA will not be measured; there are val/mAP"),
        (["objective=[val/mAP,val/P@1]", "hydra.sweeper.direction=[maximize]"], "is for 1 objectives"),
    ],
)
def test_a_study_without_a_measured_objective_trains_nothing(overrides, message, tmp_path):
    study = ("-m", "hydra/sweeper=optuna", "hydra.sweep.dir=${run_root}/study", "seed=choice(0,1)", *overrides)
    done = simsearch("train", *study, *TINY, f"run_root={tmp_path}", cwd=tmp_path, expect=1)
    assert done.stderr.startswith(f"simsearch train: {message}") or message in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_terminal_keeps_up_until_ctrl_c(tmp_path):
    write_json(tmp_path / "sweep.json", {"planned": 30, "objective": ["val/mAP"], "ended": False, "study": "s"})
    for number in range(29):
        Trial(tmp_path / str(number), [f"x={number}"], values=0.5, numbers=[number]).write("finished")
    Trial(tmp_path / "29", ["x=29"], numbers=[29]).write("running")
    command = [sys.executable, "-m", "simsearch", "progress", f"folder={tmp_path}", "watch=0.2"]
    master, slave = pty.openpty()
    environment = os.environ | {"LINES": "20", "COLUMNS": "120"}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs do not hear
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, preexec_fn=heard)
    os.close(slave)
    shown, start = "", time.monotonic()
    while shown.count("running ") < 5:  # in a low terminal too
        assert time.monotonic() - start < 60, shown
        shown += os.read(master, 65536).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the end of a terminal
        while more := os.read(master, 65536):
            shown += more.decode(errors="replace")
    os.close(master)
    assert process.wait(60) == -signal.SIGINT
    assert "simsearch progress: interrupted" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_a_study_maximises_a_precision_and_ends_where_points_repeat(tmp_path):
    optuna = pytest.importorskip("optuna")
    from simsearch.sweeps.journal import open_storage

    study = ("-m", "hydra/sweeper=optuna", "hydra.sweep.dir=${run_root}/study", "hydra.sweeper.n_trials=3")
    study += ("objective=val/mAP", "model.whitening.power=choice(0,1)", "callbacks.precision_recall=null")
    done = simsearch("train", *study, *TINY, f"run_root={tmp_path}", cwd=tmp_path)
    found = optuna.load_study(study_name="sweep", storage=open_storage(f"{tmp_path}/study/study.journal"))
    assert [direction.name for direction in found.directions] == ["MAXIMIZE"]
    assert len(found.trials) == 3
    trials = read_trials(tmp_path / "study")
    assert len(trials) < 3  # of two choices one came twice
    assert "3 of 3 trials finished" in done.stderr
    best = max(trials, key=lambda about: about["values"])
    assert found.best_value == best["values"]
    assert f"({best['folder']})" in done.stderr.splitlines()[-1] or best["folder"] in done.stdout
    assert not is_open(tmp_path / "study")
    simsearch("progress", f"folder={tmp_path}/study")  # and ends


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_pruned_training_has_no_test_and_compare_reads_the_sweep_while_it_runs(devices, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    from test_ranks import TINY as TRAINED

    from simsearch.comparison.runs import expand, read_all
    from simsearch.sweeps.journal import open_storage

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    sweep = tmp_path / "sweep"
    study = ("hydra/sweeper=optuna", "hydra/sweeper/pruner=halving", "hydra.sweeper.pruner.reduction_factor=2")
    study += ("hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=0", "optimizer.lr=tag(log,interval(1e-6,1e-2))")
    length = ("trainer=training-ddp", f"trainer.devices={devices}", "trainer.max_steps=8", "trainer.precision=32-true")
    length += ("trainer.check_val_every_n_epoch=1", "catalog.write=false", "logger.mode=disabled")
    command = [sys.executable, "-m", "simsearch", "train", "-m", *TRAINED, *length, *study]
    process = subprocess.Popen(
        [*command, "objective=val/mAP", f"hydra.sweep.dir={sweep}"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    reader = threading.Thread(target=lambda: said.append(process.communicate()[0]))
    said: list[str] = []
    reader.start()
    looks = 0
    while process.poll() is None:  # reading never meets a folder that it cannot read
        if any(sweep.glob("*/config.yaml")):
            _, missing = read_all(expand([str(sweep)]))
            assert {one.state for one in missing} <= {"unfinished"}, missing
            looks += 1
        time.sleep(0.2)
    reader.join()
    assert process.returncode == 0, said[0]
    assert looks > 0
    trials = read_trials(sweep)
    states = {about["folder"]: about["state"] for about in trials}
    assert set(states.values()) == {"finished", "pruned"}
    results, missing = read_all(expand([str(sweep)]))
    assert {result.name for result in results} == {name for name, state in states.items() if state == "finished"}
    assert {one.name for one in missing if "it was pruned at step" in one.reason} == states.keys() - {
        result.name for result in results
    }
    found = optuna.load_study(study_name="sweep", storage=open_storage(str(sweep / "study.journal")))
    for about in trials:
        trial = found.trials[about["numbers"][0]]
        stages = read_json(sweep / about["folder"] / "metrics.json")
        assert ("test" in stages) == (about["state"] == "finished")
        assert trial.state.name == {"finished": "COMPLETE", "pruned": "PRUNED"}[about["state"]]
        assert list(trial.intermediate_values) == list(range(1, len(trial.intermediate_values) + 1))
        if about["state"] == "pruned":
            assert about["pruned"]["step"] < 8
            assert trial.value == about["pruned"]["value"]
            assert trial.value == pytest.approx(stages["val"]["metrics"]["mAP"], rel=1e-6)  # logged as float32


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path):
    pytest.importorskip("optuna")
    study = ("sweep=tpe-quality-bytes", "hydra.sweeper.n_trials=5", "hydra.sweep.dir=${run_root}/tpe")
    study += ("~hydra.sweeper.params.index", "~hydra.sweeper.params.pooling", "data.works=8")
    first = train(tmp_path, *study)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "tpe").glob("*/metrics.json"))) < 2:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "tpe").glob("*/metrics.json")}
    finished = {about["folder"] for about in read_trials(tmp_path / "tpe") if about["state"] == "finished"}

    second = train(tmp_path, *study)
    said, _ = second.communicate()
    assert second.returncode == 0, said
    trials = read_trials(tmp_path / "tpe")
    assert [about["state"] for about in trials] == ["finished"] * len(trials)
    assert len(trials) == 5
    after = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "tpe").glob("*/metrics.json")}
    assert all(after[folder] == before[folder] for folder in finished)
    assert all(len(about["values"]) == 2 for about in trials)
