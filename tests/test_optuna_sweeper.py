"""The sweeper on Optuna: what it searches, who works on what, and what is left after kills. Trials are cheap ones."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cheap_sweep
import hydra
import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import simsearch
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from simsearch import configs
from simsearch.callbacks.pruning import Pruning
from simsearch.comparison.runs import read_run
from simsearch.files import is_alive, write_json
from simsearch.sweeps import trials
from simsearch.sweeps.callback import Sweep
from simsearch.sweeps.jobs import Job, Launched
from simsearch.sweeps.progress import _varying, is_open, progress_table, summary
from simsearch.sweeps.space import distributions, point
from simsearch.sweeps.sweeper import NAME, OptunaSweeper
from simsearch.sweeps.trials import MEASURED_ON, Trial, code_version, read_trials

optuna = pytest.importorskip("optuna")
journal = pytest.importorskip("simsearch.sweeps.journal")
COMPLETE, PRUNED, FAIL, RUNNING = (optuna.trial.TrialState[n] for n in ("COMPLETE", "PRUNED", "FAIL", "RUNNING"))


# ----------------------------------------------------------------------------------------- search space


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0.0,1.0)", optuna.distributions.FloatDistribution(0.0, 1.0)),
        ("tag(log,interval(0.01,1.0))", optuna.distributions.FloatDistribution(0.01, 1.0, log=True)),
        ("int(interval(1,8))", optuna.distributions.IntDistribution(1, 8)),
        ("range(16,257,16)", optuna.distributions.IntDistribution(16, 256, step=16)),
        ("range(0,10,2)", optuna.distributions.IntDistribution(0, 8, step=2)),  # as in a grid, without its end
        ("range(9,0,-3)", optuna.distributions.IntDistribution(3, 9, step=3)),
        ("range(0,1,0.25)", optuna.distributions.FloatDistribution(0.0, 0.75, step=0.25)),
        ("choice(flat,sq8)", optuna.distributions.CategoricalDistribution(["flat", "sq8"])),
        ("1,2,30", optuna.distributions.CategoricalDistribution(["1", "2", "30"])),
        ("choice([1,2],[3])", optuna.distributions.CategoricalDistribution(["[1,2]", "[3]"])),
    ],
)
def test_the_search_space_is_what_hydra_says(text, expected):
    swept, shared = distributions({"x": text, "y": "1,2"}, ["y=2", "pooling=gem"])
    assert swept == {"x": expected}
    assert shared == ["y=2", "pooling=gem"]  # the command line takes a parameter's place


def test_an_empty_search_is_one_line():
    with pytest.raises(ValueError, match=re.escape("x=range(4,4): the range is empty")):
        distributions({"x": "range(4,4)"}, [])
    with pytest.raises(ValueError, match=re.escape("x=interval(2.0,1.0)")):
        distributions({"x": "interval(2.0,1.0)"}, [])


def test_overrides_are_a_point_of_the_space_or_none():
    space, _ = distributions({"a": "interval(0.0,1.0)", "b": "range(0,9,4)", "c": "choice(u,v)"}, [])
    assert point(space, ["c=u", "other=3", "b=4", "a=0.25"]) == {"a": 0.25, "b": 4, "c": "u"}
    for wrong in (["a=2.0", "b=4", "c=u"], ["a=0.5", "b=5", "c=u"], ["a=0.5", "b=4", "c=w"], ["a=0.5", "b=4"]):
        assert point(space, wrong) is None


SETTINGS = [
    (kind, path.stem)
    for kind in ("sampler", "pruner")
    for path in sorted(Path(configs.CONF, "hydra/sweeper", kind).glob("*.yaml"))
]


@pytest.mark.parametrize(("kind", "option"), SETTINGS)
def test_samplers_and_pruners_build(kind, option):
    built = configs.build(yaml.safe_load(Path(configs.CONF, "hydra/sweeper", kind, f"{option}.yaml").read_text()))
    assert isinstance(built, optuna.samplers.BaseSampler if kind == "sampler" else optuna.pruners.BasePruner)


def test_the_sweeper_takes_what_its_config_says():
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        chosen = ["hydra/sweeper=optuna", "hydra/sweeper/pruner=halving", "hydra/sweeper/sampler=random"]
        config = hydra.compose("train", ["run_dir=unused", *chosen, "hydra.sweep.dir=x"], return_hydra_config=True)
    sweeper = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    assert sweeper.pop("_target_") == NAME
    assert not sweeper.pop("_recursive_")
    assert sweeper["storage"] == "x/study.journal"
    built = OptunaSweeper(**sweeper | {"direction": "maximize"})
    assert built.directions == ["maximize"]
    assert isinstance(configs.build(built.pruner), optuna.pruners.SuccessiveHalvingPruner)
    with pytest.raises(ValueError, match=r"hydra\.sweeper\.n_jobs=0: give 1 or more"):
        OptunaSweeper(**sweeper | {"direction": "maximize", "n_jobs": 0})


# ---------------------------------------------------------------------------------------------- journal


def test_a_line_that_a_kill_cut_off_costs_only_itself(tmp_path):
    path = tmp_path / "study.journal"
    study = optuna.create_study(study_name="s", storage=journal.open_storage(str(path)))
    for value in (1.0, 2.0):
        study.tell(study.ask(), value)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"a')  # the rest of the write never came
    again = optuna.load_study(study_name="s", storage=journal.open_storage(str(path)))
    assert [trial.value for trial in again.trials] == [1.0, 2.0]
    again.tell(again.ask(), 3.0)
    assert path.read_bytes().startswith(whole)
    for storage in (
        journal.open_storage(str(path)),
        optuna.storages.JournalStorage(journal.JournalFileBackend(str(path))),
    ):
        known = optuna.load_study(study_name="s", storage=storage)
        assert [trial.value for trial in known.trials] == [1.0, 2.0, 3.0]


def test_workers_share_a_journal(tmp_path):
    path = str(tmp_path / "study.journal")
    optuna.create_study(study_name="s", storage=journal.open_storage(path))

    def work() -> None:
        study = optuna.load_study(study_name="s", storage=journal.open_storage(path))
        for _ in range(5):
            trial = study.ask()
            study.tell(trial, trial.suggest_float("x", 0, 1))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    trials = optuna.load_study(study_name="s", storage=journal.open_storage(path)).trials
    assert [trial.number for trial in trials] == list(range(15))
    assert all(trial.state == COMPLETE and trial.value == trial.params["x"] for trial in trials)


def test_a_storage_that_cannot_be_opened_is_one_line():
    with pytest.raises(ValueError, match=r"hydra\.sweeper\.storage=nothing://x cannot be opened"):
        journal.open_storage("nothing://x")


# --------------------------------------------------------------------------------------------- callback


class Curve(pl.LightningModule):
    """Validates to the values that it is given, one an epoch."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.layer, self.curve = torch.nn.Linear(1, 1), values

    def training_step(self, batch, _):
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, _):
        self.log("val/mAP", self.curve[self.trainer.current_epoch], batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 1)), 2)

    val_dataloader = train_dataloader


def fit(
    folder: Path, callback: Pruning, epochs: int, checkpoint: Path | None = None, max_steps: int = -1
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[callback], logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=1, default_root_dir=folder, 
        enable_checkpointing=False, max_steps=max_steps,
    )  # fmt: skip
    trainer.fit(Curve([0.1, 0.3, 0.2, 0.4, 0.5]), ckpt_path=checkpoint, weights_only=True)
    return trainer


def test_a_training_is_pruned_after_the_validation_that_says_so(tmp_path):
    reported: list[tuple[float, int]] = []

    def decide(value: float, validation: int) -> bool:
        reported.append((round(value, 6), validation))
        return validation >= 3

    trainer = fit(tmp_path, callback := Pruning("val/mAP", decide), 5)
    assert reported == [(0.1, 1), (0.3, 2), (0.2, 3)]  # the sanity check is none
    assert trainer.global_step == 6
    about = callback.pruned
    assert (about["validation"], about["step"], about["epoch"], about["objective"]) == (3, 6, 2, "val/mAP")
    assert about["value"] == pytest.approx(0.2)


@pytest.mark.parametrize("length", [{"epochs": 2}, {"epochs": -1, "max_steps": 4}])
def test_a_training_that_has_reached_its_length_is_not_pruned(length, tmp_path):
    fit(tmp_path, callback := Pruning("val/mAP", lambda value, validation: validation == 2), **length)
    assert callback.pruned is None
    assert callback.validations == 2


class Stops(Pruning):
    """A training that another callback ends before this validation."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


def test_a_training_that_stops_for_another_reason_is_not_pruned(tmp_path):
    fit(tmp_path, callback := Stops("val/mAP", lambda *_: True), 5)
    assert (callback.pruned, callback.validations) == (None, 1)


class Once(optuna.pruners.BasePruner):
    """As successive halving: a rung that was looked at once is passed."""

    def prune(self, study, trial):
        seen = "seen" in trial.user_attrs
        study._storage.set_trial_user_attr(trial._trial_id, "seen", True)
        return not seen


def test_a_decision_to_prune_outlives_a_kill(tmp_path):
    storage = str(tmp_path / "study.journal")
    optuna.create_study(study_name="s", storage=journal.open_storage(storage)).ask()

    def reporter() -> journal.Reporter:
        return journal.Reporter(storage, "s", 0, Once())

    assert reporter()(0.5, 2)
    resumed = reporter()
    assert not resumed(0.4, 1)  # from a checkpoint before it
    assert resumed(0.5, 2)


def test_a_resumed_training_counts_on(tmp_path):
    trainer = fit(tmp_path, Pruning("val/mAP", lambda *_: False), 2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    seen = []
    fit(tmp_path, Pruning("val/mAP", lambda value, number: seen.append(number) or False), 4, tmp_path / "last.ckpt")
    assert seen == [3, 4]


def test_an_objective_that_no_validation_measures_prunes_nothing(tmp_path):
    with pytest.raises(ValueError, match="objective=val/index/x is not measured by a validation"):
        fit(tmp_path, Pruning("val/index/x", lambda *_: True), 2)


# ---------------------------------------------------------------------------------------- whole studies


def start(*arguments: str) -> int:
    """Runs the cheap program in this process; its exit status."""
    old = sys.argv
    GlobalHydra.instance().clear()
    try:
        sys.argv = ["cheap", *arguments]
        cheap_sweep.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        sys.argv = old
        GlobalHydra.instance().clear()
    return 0


def run(folder: Path, *overrides: str, expect: int = 0) -> None:
    """Runs a cheap sweep in this process."""
    assert start(*cheap_sweep.sweep(folder, *overrides)) == expect


def study(folder: Path, name: str = "sweep"):
    return optuna.load_study(study_name=name, storage=journal.open_storage(str(folder / "study.journal")))


def check(folder: Path, planned: int) -> None:
    """Asserts that study and folders agree, and that all planned trials ended."""
    trials = {trial.number: trial for trial in study(folder).trials}
    assert sorted(trials) == list(range(planned))
    numbers = []
    for about in read_trials(folder):
        given = dict(text.split("=") for text in about["overrides"])
        for number in about["numbers"]:
            trial = trials[number]
            params = {name: float(given[name]) for name in ("+cheap.lr", "+cheap.margin")}
            assert trial.params == params
            value = cheap_sweep.value_of(*params.values())
            assert (trial.state, about["state"]) in ((COMPLETE, "finished"), (PRUNED, "pruned"), (PRUNED, "failed"))
            if trial.state == COMPLETE:
                assert trial.value == about["values"] == value
            numbers.append(number)
    assert sorted(numbers) == list(range(planned))


def worked(folder: Path) -> Counter[tuple[str, int]]:
    """How often each epoch of each trial was computed."""
    return Counter((name, epoch) for name, epoch, *_ in map(json.loads, (folder / "work.log").open()))


def test_a_study_runs_its_trials_and_goes_on_as_if_it_had_never_stopped(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    few = "hydra.sweeper.sampler.n_startup_trials=2"
    run(whole, "hydra.sweeper.n_trials=4", few)
    check(whole, 4)
    assert [direction.name for direction in study(whole).directions] == ["MAXIMIZE"]  # a precision
    results = yaml.safe_load((whole / "optimization_results.yaml").read_text())
    assert results["best_value"] == max(trial.value for trial in study(whole).trials)
    assert "4 of 4 trials finished" in capsys.readouterr().err
    run(parts, "hydra.sweeper.n_trials=2", few)
    run(parts, "hydra.sweeper.n_trials=4", few)
    assert [trial.params for trial in study(parts).trials] == [trial.params for trial in study(whole).trials]
    assert set(worked(parts).values()) == {1}

    # Fewer than there are: nothing is done, and the count is not "4 of 1".
    capsys.readouterr()
    run(parts, "hydra.sweeper.n_trials=1")
    assert "sweep: " not in (said := capsys.readouterr().err)
    assert "4 of 4 trials finished" in said

    # The journal may be lost: folders know all of it.
    before = {json.dumps(trial.params): trial.value for trial in study(parts).trials}
    (parts / "study.journal").unlink()
    run(parts, "hydra.sweeper.n_trials=4", few)
    assert {json.dumps(trial.params): trial.value for trial in study(parts).trials} == before
    check(parts, 4)
    assert set(worked(parts).values()) == {1}


def test_failed_trials_are_told_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(cheap_sweep.FAILS_BELOW, "0.8")
    run(tmp_path, "hydra.sweeper.n_trials=4", "hydra/sweeper/sampler=random", expect=1)
    check(tmp_path, 4)
    failed = [trial for trial in study(tmp_path).trials if "is too far away" in trial.user_attrs.get("error", "")]
    assert 0 < len(failed) < 4
    said = capsys.readouterr().err
    assert said.count("is too far away") >= len(failed)
    assert "Traceback" not in said
    assert f"{4 - len(failed)} of 4 trials finished, {len(failed)} failed" in said
    # A failed one has had its chance.
    run(tmp_path, "hydra.sweeper.n_trials=4", "hydra/sweeper/sampler=random", expect=1)
    assert len(study(tmp_path).trials) == 4


@pytest.mark.slow
def test_a_sampler_learns_from_trials_that_fail(tmp_path, monkeypatch):
    monkeypatch.setenv(cheap_sweep.FAILS_BELOW, "0.95")  # 16 % of all points are good enough
    run(tmp_path, "hydra.sweeper.n_trials=24", "hydra.sweeper.sampler.n_startup_trials=8", expect=1)
    check(tmp_path, 24)
    failed = [trial.number for trial in study(tmp_path).trials if "error" in trial.user_attrs]
    assert sum(number >= 8 for number in failed) <= 8  # 12 if it did not know of them


def test_a_config_that_cannot_be_composed_ends_the_sweep(tmp_path, capsys):
    run(tmp_path, "nowhere=choice(1,2)", "hydra.sweeper.n_trials=3", expect=1)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "there is no key nowhere" in said
    assert [trial.state for trial in study(tmp_path).trials] == [FAIL]


def test_trials_that_fall_behind_are_pruned_and_shown(tmp_path, capsys):
    run(tmp_path, "hydra.sweeper.n_trials=9", "hydra/sweeper/sampler=random", "hydra/sweeper/pruner=halving")
    check(tmp_path, 9)
    trials = study(tmp_path).trials
    states = Counter(trial.state for trial in trials)
    assert states[PRUNED] >= 3
    # By hand: at the rungs (1, 3, 9 epochs) a trial goes on if it is among the best third, at least one, so far.
    rungs: dict[int, list[float]] = {1: [], 3: []}
    for trial in trials:
        last = cheap_sweep.EPOCHS
        for epoch, seen in rungs.items():
            now = cheap_sweep.value_of(trial.params["+cheap.lr"], trial.params["+cheap.margin"]) * (1 - 0.5**epoch)
            seen.append(now)
            if sorted(seen)[-max(1, len(seen) // 3)] > now:
                last = epoch
                break
        assert trial.last_step == last
    assert f"{states[COMPLETE]} of 9 trials finished, {states[PRUNED]} pruned" in capsys.readouterr().err
    capsys.readouterr()
    shown = simsearch("progress", f"folder={tmp_path}", "watch=0").stdout
    assert shown.replace("│", " ").count(" pruned ") >= states[PRUNED]
    assert "validation 1" in shown
    # Again: nothing is computed twice.
    run(tmp_path, "hydra.sweeper.n_trials=9", "hydra/sweeper/sampler=random", "hydra/sweeper/pruner=halving")
    assert set(worked(tmp_path).values()) == {1}
    # Without a pruner, as in a grid, a pruned trial is trained to its end.
    first = next(about for about in read_trials(tmp_path) if about["state"] == "pruned")
    assert start("-m", f"hydra.sweep.dir={tmp_path}", *first["overrides"]) == 0
    again = next(about for about in read_trials(tmp_path) if about["folder"] == first["folder"])
    assert (again["state"], again["values"] > first["pruned"]["value"]) == ("finished", True)
    assert set(worked(tmp_path).values()) == {1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=[val/mAP,val/bytes_per_item]"], "not val/mAP, val/bytes_per_item: leave hydra/sweeper/pruner out"),
        (["objective=test/mAP"], "a pruner needs one objective of the validation, such as val/mAP, not test/mAP"),
    ],
)
def test_pruning_is_for_one_objective_of_the_validation(overrides, message, tmp_path, capsys):
    run(tmp_path / "x", *overrides, "hydra/sweeper/pruner=halving", expect=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "x").exists()


def test_several_objectives_make_a_front(tmp_path, capsys):
    run(tmp_path, "objective=[val/mAP,val/bytes_per_item]", "hydra.sweeper.n_trials=5", "hydra/sweeper/sampler=nsgaii")
    found = study(tmp_path)
    assert [direction.name for direction in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    values = [tuple(trial.values) for trial in found.trials]
    front = [a for a in values if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in values)]
    results = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())["solutions"]
    assert sorted(tuple(one["values"]) for one in results) == sorted(front)
    shown = [cell for cell in progress_table(tmp_path).columns[4].cells if cell.startswith("* ")]
    assert {tuple(map(float, re.findall(r"[\d.]+", cell)[:2])) for cell in shown} == {
        tuple(round(value, 4) for value in one) for one in front
    }
    assert f"best {max(front)[0]:.4f}" in summary(tmp_path)
    assert ("on the Pareto front" in summary(tmp_path)) == (len(shown) > 1)
    run(tmp_path, "hydra.sweeper.n_trials=6", expect=1)  # another objective is another study
    assert "is to ['maximize', 'minimize'], not ['maximize']" in capsys.readouterr().err.splitlines()[-1]


def test_a_study_of_something_else_is_refused(tmp_path, capsys):
    """Another objective, or another fixed override, in a folder whose study has all its trials."""
    run(tmp_path, "hydra.sweeper.n_trials=2", "pooling=gem")
    for changed in (["pooling=mac"], [], ["pooling=gem", "objective=val/P@10"]):
        run(tmp_path, "hydra.sweeper.n_trials=2", *changed, expect=1)
        last = capsys.readouterr().err.splitlines()[-1]
        assert "is of val/mAP" in last
        assert "pooling=gem, not of " in last
        assert "give another hydra.sweep.dir or hydra.sweeper.study_name" in last
    run(tmp_path, "hydra.sweeper.n_trials=3", "pooling=gem", "logger.project=other")  # reports are no matter
    assert len(study(tmp_path).trials) == 3


@pytest.mark.parametrize(
    "now",
    [
        "choice(0.1,0.2,0.3)",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("choice(0.2,0.1)", "interval(0.1,0.2)")),
    ],
)
def test_a_study_keeps_its_choices_and_another_takes_its_trials(now, tmp_path, capsys):
    run(tmp_path, "+cheap.lr=choice(0.1,0.2)", "hydra.sweeper.n_trials=2")
    run(tmp_path, f"+cheap.lr={now}", "hydra.sweeper.n_trials=3", expect=1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "draws +cheap.lr from CategoricalDistribution(choices=('0.1', '0.2')), which" in last
    assert len(study(tmp_path).trials) == 2  # none was asked for
    run(tmp_path, f"+cheap.lr={now}", "hydra.sweeper.n_trials=3", "hydra.sweeper.study_name=wider")
    assert [trial.state for trial in study(tmp_path, "wider").trials] == [COMPLETE] * 3
    assert set(worked(tmp_path).values()) == {1}


@pytest.mark.slow
def test_values_of_another_objective_are_not_told(tmp_path):
    """A folder that the study does not know may hold trials of another objective."""
    run(tmp_path, "hydra.sweeper.n_trials=2")
    for about in read_trials(tmp_path):
        path = tmp_path / about["folder"] / "trial.json"
        assert about["objective"] == ["val/mAP"]
        write_json(
            path, {name: value for name, value in about.items() if name != "folder"} | {"objective": ["val/P@1"]}
        )
    (tmp_path / "study.journal").unlink()
    run(tmp_path, "hydra.sweeper.n_trials=1", "hydra.sweeper.sampler.seed=5")
    assert len(study(tmp_path).trials) == 1


@pytest.mark.slow
def test_studies_in_one_folder_know_their_own_trials(tmp_path):
    """What the first has of a point is not what the second asks for, whose trial has the same number."""
    run(tmp_path, "hydra.sweeper.n_trials=3", "pooling=gem")
    first = study(tmp_path).trials
    other = ("pooling=mac", "hydra.sweeper.study_name=b", "hydra.sweeper.sampler.seed=5")
    run(tmp_path, "hydra.sweeper.n_trials=1", *other)
    assert summary(tmp_path).startswith("1 of 1 trials finished")
    known = study(tmp_path, "b")
    known.enqueue_trial(first[1].params)
    assert known.ask(dict(first[1].distributions)).number == 1
    run(tmp_path, "hydra.sweeper.n_trials=2", *other)
    assert [trial.state for trial in study(tmp_path, "b").trials] == [COMPLETE] * 2
    own = [about for about in read_trials(tmp_path) if about["study"] == "b"]
    assert sorted(about["numbers"] for about in own) == [[0], [1]]
    assert all("pooling=mac" in about["overrides"] for about in own)
    assert summary(tmp_path).startswith("2 of 2 trials finished")
    run(tmp_path, "hydra.sweeper.n_trials=3", "pooling=gem")
    assert study(tmp_path).trials[:3] == first


def test_a_worker_that_dies_after_its_trial_s_end_loses_nothing(tmp_path, monkeypatch):
    launched = Launched.run

    def dies(self, overrides, number):
        launched(self, overrides, number)
        return Job(None)

    monkeypatch.setattr(Launched, "run", dies)
    run(tmp_path, "hydra.sweeper.n_trials=2")
    check(tmp_path, 2)


class FailedJobError(Exception):
    """As submitit calls it, both where sbatch fails and where a job does."""


def launch_trial_1_by(launch, patched) -> None:
    """Lets a cluster's launcher run trial 1."""
    launched = Launched.run

    def run_one(self, overrides, number):
        return launched(Launched(SimpleNamespace(launch=launch)) if number == 1 else self, overrides, number)

    patched.setattr(Launched, "run", run_one)


def test_a_job_of_a_cluster_that_fails_before_it_is_a_trial_leaves_the_others(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise FailedJobError("Job (task=0) failed during processing with trace: No module named 'faiss'")

    with monkeypatch.context() as patched:
        launch_trial_1_by(fails, patched)
        run(tmp_path, "hydra.sweeper.n_trials=3")
    assert "cut off: trial 1" in (said := capsys.readouterr().err)
    assert "No module named 'faiss'" in said
    assert [trial.state for trial in study(tmp_path).trials] == [COMPLETE, RUNNING, COMPLETE]
    run(tmp_path, "hydra.sweeper.n_trials=3")
    check(tmp_path, 3)


@pytest.mark.slow
def test_a_cluster_that_takes_no_job_ends_the_sweep_and_costs_no_trial(tmp_path, monkeypatch, capsys):
    def refuses(*_, **__):
        cause = subprocess.CalledProcessError(1, "sbatch")
        raise FailedJobError("sbatch: error: QOSMaxSubmitJobPerUserLimit") from cause

    with monkeypatch.context() as patched:
        launch_trial_1_by(refuses, patched)
        run(tmp_path, "hydra.sweeper.n_trials=3", expect=1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the cluster takes no job: sbatch: error: QOSMaxSubmitJobPerUserLimit; the same command goes on" in last
    assert [trial.state for trial in study(tmp_path).trials] == [COMPLETE, RUNNING]
    run(tmp_path, "hydra.sweeper.n_trials=3")
    check(tmp_path, 3)


@pytest.mark.parametrize("sweeper", ["optuna", "basic"])
def test_slurm_s_warning_between_two_trials_of_a_process_queues_its_job_again(sweeper, scontrol, tmp_path, monkeypatch):
    folder, begun, trial = tmp_path / "sweep", [], trials.trial
    if sweeper == "optuna":
        command = cheap_sweep.sweep(folder, "hydra.sweeper.n_trials=3")
    else:
        command = ["-m", f"hydra.sweep.dir={folder}", "logger.mode=disabled", "objective=val/mAP"]
        command += ["+cheap.lr=0.1,0.2,0.3", "+cheap.margin=0.5"]

    def warned(config):
        begun.append(config)
        if len(begun) == 2:
            signal.raise_signal(signal.SIGUSR1)
        return trial(config)

    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patched:
        patched.setattr(trials, "trial", warned)
        assert start(*command) == 0
    assert signal.getsignal(signal.SIGUSR1) == before
    assert (tmp_path / "asked").read_text() == "requeue 12\n"
    assert [about["state"] for about in read_trials(folder)] == ["finished"]
    assert start(*command) == 0
    assert [about["state"] for about in read_trials(folder)] == ["finished"] * 3
    assert set(worked(folder).values()) == {1}


def test_a_kill_between_study_and_folder_adds_no_trial_twice(tmp_path, monkeypatch):
    run(tmp_path, "hydra.sweeper.n_trials=2")
    (tmp_path / "study.journal").unlink()

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("simsearch.sweeps.sweeper.write_json", full)
        run(tmp_path, "hydra.sweeper.n_trials=2", expect=1)
    assert len(study(tmp_path).trials) == 1
    run(tmp_path, "hydra.sweeper.n_trials=2")
    check(tmp_path, 2)


@pytest.mark.slow
def test_a_minimised_sweep_marks_its_least_value(tmp_path, capsys):
    run(tmp_path, "hydra.sweeper.n_trials=4", "hydra.sweeper.direction=minimize")
    values = [about["values"] for about in read_trials(tmp_path)]
    assert f"best {min(values):.4f}" in summary(tmp_path)
    assert f"best {max(values):.4f}" not in summary(tmp_path)


def test_what_failed_in_an_earlier_plan_is_not_this_one_s_failure(tmp_path):
    sweep = {"planned": 1, "objective": ["val/mAP"], "ended": False}
    write_json(tmp_path / "sweep.json", sweep | {"grid": {"seed": ["1"]}, "shared": []})
    Trial(tmp_path / "0", ["seed=0"]).write("failed", "it broke")
    Trial(tmp_path / "1", ["seed=1"], values=0.5).write("finished")
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    Sweep().on_multirun_end(config)
    Trial(tmp_path / "1", ["seed=1"]).write("failed", "it broke")
    with pytest.raises(SystemExit):
        Sweep().on_multirun_end(config)


@pytest.mark.parametrize("before", [None, "elsewhere:1"])
@pytest.mark.parametrize("now", [f"{os.uname().nodename}:{os.getppid()}", "elsewhere:2"])
def test_a_left_trial_that_another_process_has_taken_is_not_waited_for(before, now, tmp_path, monkeypatch):
    """Both found it when they began; the other one was first to ask."""
    run(tmp_path, "hydra.sweeper.n_trials=1")
    known = study(tmp_path)
    left = known.ask(dict(known.trials[0].distributions))
    if before:
        left.set_user_attr("process", before)
    catch_up = OptunaSweeper._catch_up

    def then_taken(self, stored):
        catch_up(self, stored)
        assert [trial.number for trial, _ in self._left] == [left.number]
        left.set_user_attr("process", now)

    monkeypatch.setattr(OptunaSweeper, "_catch_up", then_taken)
    run(tmp_path, "hydra.sweeper.n_trials=3")
    assert [trial.state for trial in study(tmp_path).trials] == [COMPLETE, RUNNING, COMPLETE]


@pytest.mark.slow
def test_what_a_left_trial_lacks_comes_from_the_sampler(tmp_path):
    """A kill between the question and its answers leaves a trial without parameters."""
    run(tmp_path / "a", "hydra.sweeper.n_trials=4")
    run(tmp_path / "b", "hydra.sweeper.n_trials=3")
    study(tmp_path / "b").ask()
    run(tmp_path / "b", "hydra.sweeper.n_trials=4")
    assert study(tmp_path / "b").trials[3].params == study(tmp_path / "a").trials[3].params


def test_a_point_that_comes_twice_is_one_folder_and_counts_twice(tmp_path, capsys):
    twice = ("+cheap.lr=choice(0.5)", "+cheap.margin=choice(0.5)", "hydra.sweeper.n_trials=3")
    run(tmp_path, *twice)
    (about,) = read_trials(tmp_path)
    assert about["numbers"] == [0, 1, 2]
    assert set(worked(tmp_path).values()) == {1}
    assert [trial.value for trial in study(tmp_path).trials] == [about["values"]] * 3
    assert "3 of 3 trials finished" in capsys.readouterr().err
    assert not is_open(tmp_path)


def test_the_code_s_version_is_recorded_and_a_difference_said(tmp_path, monkeypatch, capsys):
    run(tmp_path, "hydra.sweeper.n_trials=2")
    assert {about["code"] for about in read_trials(tmp_path)} == {code_version()}
    monkeypatch.setattr("simsearch.sweeps.trials.code_version", lambda: "edited")
    capsys.readouterr()
    run(tmp_path, "hydra.sweeper.n_trials=3")
    assert "2 trials were computed by another version of the code" in capsys.readouterr().err
    assert set(worked(tmp_path).values()) == {1}  # none of them again


@pytest.mark.slow
def test_a_study_on_other_data_is_refused(tmp_path, monkeypatch, capsys):
    run(tmp_path, "hydra.sweeper.n_trials=3")
    for about in read_trials(tmp_path):  # what a training leaves
        parts = dict.fromkeys(MEASURED_ON, 0)
        (tmp_path / about["folder"] / "config.yaml").write_text(yaml.safe_dump(parts))
        write_json(tmp_path / about["folder"] / "metrics.json", {"test": {"fingerprint": "before", "metrics": {}}})
    asked = []
    monkeypatch.setattr(
        "simsearch.sweeps.trials._fingerprint", lambda config: asked.append(json.loads(config)) or "before"
    )
    run(tmp_path, "hydra.sweeper.n_trials=4")
    assert len(asked) == 1  # for all three
    assert asked[0]["data"]["_target_"] == "simsearch.data.datamodule.RenderedDataModule"
    assert set(asked[0]) == set(MEASURED_ON)
    monkeypatch.setattr("simsearch.sweeps.trials._fingerprint", lambda config: "now")
    capsys.readouterr()
    run(tmp_path, "hydra.sweeper.n_trials=5", expect=1)
    assert "was measured on other data (fingerprint before, now now)" in capsys.readouterr().err.splitlines()[-1]
    assert len(study(tmp_path).trials) == 4


def test_what_a_dead_process_left_is_continued_under_its_number(tmp_path):
    run(tmp_path, "hydra.sweeper.n_trials=3")
    gone = subprocess.Popen(["true"])
    gone.wait()
    # As a kill leaves them: one trial that had finished but was not told, one that had begun, one that had not.
    known = study(tmp_path)
    space = known.trials[0].distributions
    points = []
    for process in (f"{os.uname().nodename}:{gone.pid}",) * 3:
        trial = known.ask(dict(space))
        trial.set_user_attr("process", process)
        points.append(trial.params)
    alive = known.ask(dict(space))
    other = f"{os.uname().nodename}:{os.getppid()}"  # another process works on this one
    alive.set_user_attr("process", other)
    with FileLock(tmp_path / f".{other.replace(':', '-')}.lock"):
        run(tmp_path, "hydra.sweeper.n_trials=7")
    trials = study(tmp_path).trials
    assert [trial.params for trial in trials[3:6]] == points
    assert [trial.state for trial in trials] == [COMPLETE] * 6 + [RUNNING]
    run(tmp_path, "hydra.sweeper.n_trials=7")  # the other one has ended since, and its number is that of a third
    assert study(tmp_path).trials[6].state == COMPLETE


# ------------------------------------------------------------------------------------ plans and folders


def test_counts_are_those_of_the_plan(tmp_path):
    sweep = {"planned": 2, "objective": ["val/mAP"], "ended": False}
    write_json(tmp_path / "sweep.json", sweep | {"grid": {"seed": ["0", "1"]}, "shared": ["pooling=gem"]})
    for seed, pooling in ((0, "gem"), (5, "gem"), (6, "gem"), (7, "gem"), (1, "mac")):
        trial = Trial(tmp_path / f"{pooling}{seed}", [f"pooling={pooling}", f"seed={seed}"], values=float(seed))
        trial.write("finished")
    found = summary(tmp_path)
    assert found == "1 of 2 trials finished, 4 of earlier plans, best 0.0000 (gem0)"
    Trial(tmp_path / "gem1", ["seed=1", "pooling=gem"], values=0.5).write("running")
    assert "1 of 2 trials finished, 1 running, 4 of earlier plans" in summary(tmp_path)


def test_the_best_so_far_has_its_interval(tmp_path):
    write_json(tmp_path / "sweep.json", {"planned": 3, "objective": ["val/mAP"], "ended": False, "study": "s"})
    for number, value in enumerate((0.25, 0.5)):
        Trial(tmp_path / str(number), [f"x={number}"], values=value, numbers=[number]).write("finished")
        about = {"metrics": {"mAP": value}, "intervals": {"mAP": [value - 0.125, value + 0.125]}}
        write_json(tmp_path / str(number) / "metrics.json", {"val": about})
    Trial(tmp_path / "2", ["x=2"], numbers=[2]).write("running")
    assert summary(tmp_path) == "2 of 3 trials finished, 1 running, best 0.5000 [0.3750, 0.6250] (1)"
    shown = simsearch("progress", f"folder={tmp_path}").stdout  # once, though a trial runs: this is no terminal
    assert "* 0.5000 [0.3750, 0.6250]" in shown
    names = [list(progress_table(tmp_path, newest_first=newest).columns[0].cells) for newest in (False, True)]
    assert names == [["x=0", "x=1", "x=2"], ["x=2", "x=1", "x=0"]]


def test_what_is_swept_is_shown_by_names_that_tell_it_apart():
    trials = [["optimizer.lr=0.123456", "+b.lr=1", "c/d=x", "seed=0"], ["optimizer.lr=2", "+b.lr=1", "c/d=y", "seed=0"]]
    assert _varying(trials) == [["lr=0.1235", "d=x"], ["lr=2", "d=y"]]
    trials[1][1] = "+b.lr=3"
    assert _varying(trials) == [["optimizer.lr=0.1235", "+b.lr=1", "d=x"], ["optimizer.lr=2", "+b.lr=3", "d=y"]]


@pytest.mark.parametrize("place", ["command line", "list", "file"])
def test_a_folder_shows_what_is_swept_wherever_it_was_given(place, tmp_path):
    others = [f"+cheap.key{number}={number}" for number in range(9)]  # which would fill the name
    (tmp_path / "own" / "sweep").mkdir(parents=True)
    text = "# @package _global_\nhydra: {sweeper: {params: {seed: 'range(2,4)', index: 'choice(flat,sq8)'}}}\n"
    (tmp_path / "own" / "sweep" / "mine.yaml").write_text(text)
    swept = {
        "command line": ["seed=range(2,4)", "index=choice(flat,sq8)"],
        "list": ["hydra.sweeper.params={seed:'range(2,4)',index:'choice(flat,sq8)'}"],
        "file": ["sweep=mine"],
    }[place]
    study = ("-m", "hydra/sweeper=optuna", f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweeper.n_trials=1")
    own = ("--config-dir", str(tmp_path / "own"))
    assert start(*own, *study, "+cheap.lr=0.25", "+cheap.margin=0.5", *others, *swept, "objective=val/mAP") == 0
    (about,) = read_trials(tmp_path / "sweep")
    assert re.match(r"seed-[23]_index-(flat|sq8)_|index-(flat|sq8)_seed-[23]_", about["folder"]), about["folder"]


def test_compare_says_that_a_trial_was_pruned(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    write_json(tmp_path / "run.json", {"pruned": {"objective": "val/mAP", "value": 0.25, "validation": 3, "step": 40}})
    assert read_run(tmp_path) == "it was pruned at step 40, val/mAP 0.25"


# ------------------------------------------------------------------------------------- several processes


def spawn(folder: Path, *overrides: str, wait: float = 0.05, first: float | None = None) -> subprocess.Popen[str]:
    """Starts a cheap sweep in a process group of its own."""
    here = Path(__file__).parent
    environment = os.environ | {cheap_sweep.FIRST: str(wait if first is None else first)}
    environment |= {cheap_sweep.WAIT: str(wait), "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    command = [sys.executable, cheap_sweep.__file__, *cheap_sweep.sweep(folder, *overrides)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def until(ready, process: subprocess.Popen[str], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(folder: Path) -> dict[str, dict]:
    """The trials that had finished or were pruned, by folder."""
    return {about["folder"]: about for about in read_trials(folder) if about["state"] in ("finished", "pruned")}


def workers(folder: Path) -> list[int]:
    """Processes that wrote down what they worked on, newest last."""
    lines = (folder / "work.log").read_text().splitlines() if (folder / "work.log").is_file() else []
    return list(dict.fromkeys(json.loads(line)[2] for line in lines))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_kills_at_random_moments_lose_nothing(seed, tmp_path):
    chance, folder, planned = random.Random(seed), tmp_path / "sweep", 12
    settings = (f"hydra.sweeper.n_trials={planned}", "hydra.sweeper.n_jobs=2", "hydra/sweeper/pruner=halving")
    kept: dict[str, dict] = {}
    for kills in (2, 2, 0):  # of workers, and then of the process that started them
        process = spawn(folder, *settings)
        for _ in range(kills):
            before = len(worked(folder)) if workers(folder) else 0
            until(lambda before=before: workers(folder) and len(worked(folder)) > before, process)
            until(lambda: any(map(is_alive, workers(folder))), process)
            time.sleep(chance.uniform(0, 0.5))
            os.kill(chance.choice([pid for pid in workers(folder) if is_alive(pid)]), signal.SIGKILL)
        if kills:
            time.sleep(chance.uniform(0, 1))
            kept |= ended(folder)
            process.kill()
        said, _ = process.communicate(timeout=600)  # its workers end with it
        assert process.returncode == (-signal.SIGKILL if kills else 0), said
    check(folder, planned)
    now = ended(folder)
    assert len(kept) > 0
    for name, about in kept.items():
        assert [now[name].get(key) for key in ("values", "ended")] == [about.get(key) for key in ("values", "ended")]


@pytest.mark.slow
def test_workers_take_trials_without_waiting_for_each_other(tmp_path):
    folder = tmp_path / "sweep"
    process = spawn(folder, "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2", wait=0.01, first=1.0)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    check(folder, 8)
    trials = read_trials(folder)
    assert len({about["pid"] for about in trials}) == 2
    (long,) = (about for about in trials if about["numbers"] == [0])
    meanwhile = [t for t in trials if long["started"] < t["started"] and t["ended"] < long["ended"]]
    assert len(meanwhile) >= 3  # batches of two would have one
    assert {about["pid"] for about in meanwhile}.isdisjoint({long["pid"]})
    assert set(worked(folder).values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("to_all", [True, False])
def test_a_signal_ends_the_sweep_after_its_workers(number, status, to_all, scontrol, tmp_path, monkeypatch):
    """The trials of this cheap sweep save nothing and end at once. Only the sweep's process asks SLURM."""
    folder = tmp_path / "sweep"
    process = spawn(folder, "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2", wait=0.3)
    until(lambda: len(workers(folder)) == 2, process)
    (os.killpg if to_all else os.kill)(process.pid, number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == status, said
    asked = scontrol / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 12\n" if number == signal.SIGUSR1 else "")
    begun = len(study(folder).trials)
    assert begun < 8
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name)
    again = spawn(folder, "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=2", wait=0.01)
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0, said
    check(folder, 8)


@pytest.mark.slow
def test_two_commands_share_a_study(tmp_path):
    folder = tmp_path / "sweep"
    processes = [spawn(folder, "hydra.sweeper.n_trials=8", wait=0.2) for _ in range(2)]
    for process in processes:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    check(folder, 8)
    assert len({about["pid"] for about in read_trials(folder)}) == 2
    assert set(worked(folder).values()) == {1}
