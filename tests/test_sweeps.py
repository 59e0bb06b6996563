"""Sweeps: trials by what they compute, finished ones not computed again, cut-off ones gone on with."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
from conftest import simsearch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from simsearch import runtime, sweeps
from simsearch.files import write_json

TINY = (
    *("data.styles=4", "data.artists=2", "data.works=6", "data.photographs=4", "data.size=40", "backbone.size=40"),
    *("logger.mode=disabled", "callbacks.neighbours=null", "catalog.write=false", "backbone.weights=random"),
    *("model.cache=null", "model.whitening.dimension=16", "model.sample=100"),
)


def compose(*overrides: str):
    with hydra.initialize_config_dir(runtime.CONF, version_base="1.3"):
        config = hydra.compose("train", list(overrides), return_hydra_config=True)
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    config.hydra.overrides.task = list(overrides)
    return config


def name(*overrides: str) -> str:
    return sweeps.trial_name(_root_=compose(*overrides))


def test_a_trials_name_is_what_it_computes():
    elsewhere = name("seed=3", "pooling=gem", "run_root=/elsewhere", "logger.mode=disabled")
    assert name("pooling=gem", "seed=3")[-10:] == elsewhere[-10:]
    hashes = {name(*some)[-10:] for some in (("seed=3",), ("seed=4",), ("pooling=gem",), ("index=sq8",), ())}
    assert len(hashes) == 5
    assert name()[-10:] == name("seed=0")[-10:]  # the default, given


def test_a_trials_name_is_readable_and_safe_for_shells():
    found = name(
        *("sweep=index-families", "model.whitening.power=0.2500012345"),
        *("index=hnsw", "callbacks.checkpoint.filename='/a b,c'"),
    )
    assert found.startswith("index-hnsw_power-0.25_filename-a-b-c")
    assert re.fullmatch(r"[\w.+-]{1,80}", found)


def test_another_version_of_the_code_is_another_trial(monkeypatch):
    before = name("seed=1")
    monkeypatch.setattr(sweeps, "code_version", lambda: "other")
    assert name("seed=1") != before


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=1,2,3", "pooling=gem,mac"],
        ["seed=1", "pooling=gem"],
        ["seed=range(0,10,2)", "index=choice(flat,sq8)"],
        ["data.root='a,b'", "seed=0,1"],
    ],
)
def test_grid_size_is_what_hydra_makes(overrides):
    parsed = OverridesParser.create().parse_overrides(["loss=a,b", *overrides])
    expected = len(list(itertools.chain(*BasicSweeper.split_arguments(parsed, None))))
    assert sweeps.grid_size({"loss": "a,b"}, overrides) == expected


def test_the_command_line_takes_a_swept_parameters_place():
    assert sweeps.grid_size({"seed": "1,2,3", "index": "flat,sq8"}, ["seed=5"]) == 2


def test_a_study_goes_on_with_what_was_cut_off(tmp_path):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path}/study.db"
    assert sweeps.continue_study(storage, "s", 5) == (5, 0)
    study = optuna.create_study(study_name="s", storage=storage)
    distribution = optuna.distributions.UniformDistribution(0, 1)
    asked = []
    for _ in range(4):
        trial = study.ask()
        trial._suggest("x", distribution)
        asked.append(trial)
    study.tell(asked[0], 0.5)
    study.tell(asked[1], state=optuna.trial.TrialState.FAIL)
    cut_off = [asked[2].params["x"], asked[3].params["x"]]

    left, before = sweeps.continue_study(storage, "s", 5)
    assert left == 3  # of 5: one finished, one failed
    assert before == 6  # with the two that were queued again
    again = optuna.load_study(study_name="s", storage=storage)
    found = []
    for _ in range(2):
        trial = again.ask()
        trial._suggest("x", distribution)
        found.append(trial.params["x"])
        again.tell(trial, 0.1)
    assert found == pytest.approx(cut_off)
    assert sweeps.continue_study(storage, "s", 5)[0] == 1


def metrics(folder: Path, **stages: dict) -> Path:
    write_json(folder / "metrics.json", {stage: {"metrics": values} for stage, values in stages.items()})
    return folder


def test_objectives(tmp_path):
    folder = metrics(tmp_path, val={"mAP": 0.5, "bytes_per_item": 16.0}, test={"mAP": 0.4})
    assert sweeps.objectives(folder, None) is None
    assert sweeps.objectives(folder, "val/mAP") == 0.5
    assert sweeps.objectives(folder, ["test/mAP", "val/bytes_per_item"]) == [0.4, 16.0]
    with pytest.raises(ValueError, match="objective=val/nDCG was not measured; there are"):
        sweeps.objectives(folder, "val/nDCG")
    with pytest.raises(ValueError, match=r"protocol\.validation=0\.1"):
        sweeps.objectives(metrics(tmp_path, test={"mAP": 0.4}), "val/mAP")


def test_a_dead_process_has_left_its_trial(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    for number, (pid, state) in enumerate([(gone.pid, "running"), (os.getpid(), "running"), (gone.pid, "finished")]):
        trial = sweeps.Trial(tmp_path / str(number), ["a=1"])
        trial.write(state)
        about = json.loads((trial.folder / "trial.json").read_text())
        write_json(trial.folder / "trial.json", {**about, "pid": pid, "started": number})
    write_json(tmp_path / "sweep.json", {"planned": 4})
    assert [about["state"] for about in sweeps.read_trials(tmp_path)] == ["interrupted", "running", "finished"]
    assert sweeps.summary(tmp_path) == "1 of 4 trials finished, 1 running, 1 interrupted"
    assert sweeps.is_open(tmp_path)
    with pytest.raises(ValueError, match="is no sweep"):
        sweeps.summary(tmp_path / "0")


def train(tmp_path: Path, *overrides: str, **settings) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "simsearch", "train", *overrides, *TINY, f"run_root={tmp_path}"]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings
    )


def test_a_grid_reports_what_failed_and_skips_what_is_finished(tmp_path):
    grid = ("-m", "hydra.sweep.dir=${run_root}/grid", "index=flat,opq16,sq8")  # too few items to train OPQ on
    first = simsearch("train", *grid, *TINY, f"run_root={tmp_path}", cwd=tmp_path, expect=1)
    said = first.stdout + first.stderr
    trials = sweeps.read_trials(tmp_path / "grid")
    states = {next(o for o in about["overrides"] if o.startswith("index=")): about["state"] for about in trials}
    assert states == {"index=flat": "finished", "index=opq16": "failed", "index=sq8": "finished"}
    assert said.count("failed: ") == 1
    assert "needs at least 256 vectors" in said
    assert "Traceback" not in said
    runs = {path.parent: path.stat().st_mtime_ns for path in (tmp_path / "grid").glob("*/metrics.json")}
    assert len(runs) == 2
    left = {path.name for path in tmp_path.iterdir()} | {path.name for path in (tmp_path / "grid").iterdir()}
    assert left == {"grid", "sweep.json", "multirun.yaml", *(about["folder"] for about in trials)}

    # What failed is tried again, and fails again.
    second = simsearch("train", *grid, *TINY, f"run_root={tmp_path}", cwd=tmp_path, expect=1)
    assert {path.parent: path.stat().st_mtime_ns for path in (tmp_path / "grid").glob("*/metrics.json")} == runs
    assert "2 of 3 trials finished, 1 failed" in second.stdout + second.stderr


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
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
    finished = {about["folder"] for about in sweeps.read_trials(tmp_path / "tpe") if about["state"] == "finished"}

    second = train(tmp_path, *study)
    said, _ = second.communicate()
    assert second.returncode == 0, said
    trials = sweeps.read_trials(tmp_path / "tpe")
    assert [about["state"] for about in trials] == ["finished"] * len(trials)
    assert len(trials) == 5
    after = {p.parent.name: p.stat().st_mtime_ns for p in (tmp_path / "tpe").glob("*/metrics.json")}
    assert all(after[folder] == before[folder] for folder in finished)
    assert all(len(about["values"]) == 2 for about in trials)
