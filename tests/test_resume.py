"""A run that is interrupted goes on as if it had not been; what it leaves can be measured and searched."""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import simsearch, start_forkserver
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

from simsearch.callbacks.training import OwnCheckpoints, WholeCheckpoints
from simsearch.commands import train
from simsearch.files import check_zip, read_json
from simsearch.identity import measurement_identity
from simsearch.run_directory import _check_unplanned
from simsearch.saved_run import Run, read_config
from simsearch.search.catalog import read_catalog
from simsearch.studies.runs import is_finished

DATA = (
    "data.styles=3",
    "data.artists=2",
    "data.works=4",
    "data.photographs=3",
    "data.size=32",
    "protocol=rendered-style",
    "protocol.evaluation=0.4",
    "logger.mode=disabled",
    "data.eval_batch_size=8",
    "callbacks.evaluation.ks=[1,5]",
    "callbacks.neighbours=null",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",  # bf16 is slow on processors without it
    "+data.augment._target_=simsearch.data.transforms.RandomCropFlip",
    "+data.augment.padding=2",
    "+data.augment.flip=true",
)
RANDOM = ("backbone=timm", "backbone.name=test_efficientnet", "backbone.weights=random")  # 0.4 million parameters
DSH = ("model=dsh", "optimizer.lr=1e-7", "sampler.batch_size=8")
HASHING = ("model=hashing", *RANDOM, "backbone.size=32", "sampler.batch_size=8", "model.network.bits=8")
DIR = (
    *("model=dir", *RANDOM, "backbone.size=64", "pooling.levels=2"),
    *("model.network.dimension=8", "sampler.triplets=3", "sampler.batches=3", "callbacks.mining.pool=24"),
)


STATUS = {"Ctrl-C": signal.SIGINT}


class Stop(pl.Callback):
    """Ends a run once, after the batch of that number, by a signal or as a crash would."""

    def __init__(self, batch: int, how: str) -> None:
        self.batch, self.how = batch, how
        self.seen = dict.fromkeys(("train", "validation", "test"), 0)

    def count(self, trainer: pl.Trainer, stage: str) -> None:
        self.seen[stage] += 1
        wanted = stage == (self.how if self.how in ("validation", "test") else "train")
        done = Path(trainer.default_root_dir) / "stopped"
        if wanted and self.seen[stage] == self.batch and not done.exists():
            done.touch()
            if self.how == "crash":
                raise ValueError("the power failed")
            for worker in multiprocessing.active_children():  # a signal to the group reaches them too
                os.kill(worker.pid, STATUS.get(self.how, signal.SIGTERM))
            os.kill(os.getpid(), STATUS.get(self.how, signal.SIGTERM))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.count(trainer, "train")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.count(trainer, "validation")

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.count(trainer, "test")


def stop(batch: int, how: str) -> list[str]:
    return [
        "+callbacks.stop._target_=test_resume.Stop",
        f"+callbacks.stop.batch={batch}",
        f"+callbacks.stop.how={how}",
    ]


def numbers(folder: Path) -> dict[str, Any]:
    """metrics.json without what a clock measured."""
    stages = read_json(folder / "metrics.json")
    for stage in stages.values():
        clock = [n for n in stage["metrics"] if "latency" in n or "per_s" in n or n.endswith("_s")]
        assert clock
        for name in clock:
            del stage["metrics"][name]
    return stages


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same(first: Any, second: Any, where: str = "") -> None:
    """Asserts that two nested values are equal, tensors to the last bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            same(one, other, f"{where}/{i}")
    else:
        assert first == second, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs a training without interruption, once for each set of arguments."""
    done: dict[tuple[str, ...], Path] = {}

    def run(*arguments: str) -> Path:
        if arguments not in done:
            folder = tmp_path_factory.mktemp("whole") / "run"
            said = simsearch("train", *DATA, *arguments, f"run_dir={folder}").stdout
            (folder.parent / "stdout").write_text(said)
            done[arguments] = folder
        return done[arguments]

    return run


STEPS = ("trainer.max_steps=9", "trainer.check_val_every_n_epoch=1")  # an epoch has 4 steps, or 3 with triplets
RARE = ("trainer.max_steps=17", "trainer.check_val_every_n_epoch=2")
PLATEAU = (  # the rate falls each time, as nothing gets better by 1
    *("scheduler=plateau", "scheduler.patience=0", "scheduler.threshold=1", "scheduler.factor=0.5"),
    *("trainer.max_steps=14", "trainer.check_val_every_n_epoch=1", "loss=greedyhash"),
)
WITHIN = "callbacks.last.every_n_train_steps=2"
CASES = {
    "dsh in an epoch": ((*DSH, *STEPS), 2, "signal"),
    "dsh in an epoch, bf16": ((*DSH, *STEPS, "trainer.precision=bf16-mixed"), 2, "signal"),
    "dsh in an epoch after a validation": ((*DSH, *STEPS), 6, "signal"),
    "dsh at the end of an epoch": ((*DSH, *STEPS), 4, "signal"),
    "dsh at the last step": ((*DSH, *STEPS), 9, "signal"),
    "dsh in a validation": ((*DSH, *STEPS), 2, "validation"),
    "dsh in the test": ((*DSH, *STEPS), 2, "test"),
    "dsh crashed": ((*DSH, *STEPS), 6, "crash"),
    "dsh that takes its last checkpoint, crashed": (
        (*DSH, *STEPS, "callbacks.checkpoint.monitor=null", "callbacks.checkpoint.save_on_train_epoch_end=true"),
        6,
        "crash",
    ),
    "dsh in an epoch, Ctrl-C, which the loader's workers hear too": ((*DSH, *STEPS, "data.num_workers=1"), 6, "Ctrl-C"),
    "dsh with checkpoints within an epoch, crashed after its end": ((*DSH, *STEPS, WITHIN), 5, "crash"),
    "dsh with checkpoints within an epoch, crashed": ((*DSH, *STEPS, WITHIN), 7, "crash"),
    "dsh with rare validations at the end of an epoch": ((*DSH, *RARE), 4, "signal"),
    "dsh with rare validations crashed": ((*DSH, *RARE), 6, "crash"),
    "hashing, plateau of the loss, crashed after an epoch": ((*HASHING, *PLATEAU, "scheduler.mode=min"), 9, "crash"),
    "hashing, plateau of the loss, in an epoch": ((*HASHING, *PLATEAU, "scheduler.mode=min"), 7, "signal"),
    "hashing, plateau of the validation, in the last batch of an epoch": ((*HASHING, *PLATEAU), 8, "signal"),
    "hashing, plateau of the validation, crashed": ((*HASHING, *PLATEAU, *RARE), 10, "crash"),
    "hashing, accumulation cut in two, averaged weights, a loss with a count": (
        (
            *(*HASHING, "loss=hashnet", "callbacks=ema", "callbacks.ema.decay=0.5"),
            *("trainer.max_steps=6", "trainer.accumulate_grad_batches=3", "trainer.gradient_clip_val=1.0"),
        ),
        5,
        "signal",
    ),
    "hashing, averaged weights, in a validation": (
        (*HASHING, "callbacks=ema", "callbacks.ema.decay=0.5", *STEPS, "loss=greedyhash"),
        2,
        "validation",
    ),
    "hashing, lookahead and alternating mirrors": (
        (
            *(*HASHING, "callbacks=lookahead", "callbacks.lookahead.every=2", "loss=greedyhash"),
            *("data.augment._target_=simsearch.data.transforms.AlternatingCropFlip", "~data.augment.flip", *STEPS),
            *("callbacks.lookahead.decay=0.9", "optimizer.lr=1e-3", "scheduler=constant", "trainer.precision=32-true"),
        ),
        5,
        "signal",
    ),
    "hashing, memory bank": (
        (*HASHING, "loss=xbm", "loss.start=1", "loss.size=20", "trainer.max_steps=6", "trainer.precision=32-true"),
        3,
        "signal",
    ),
    "dir in a pool": ((*DIR, *STEPS), 5, "signal"),
    "dir between pools": ((*DIR, *STEPS), 3, "signal"),
    "dir crashed in a pool": ((*DIR, *STEPS), 5, "crash"),
}


SLOW = {
    "dsh at the end of an epoch",
    "dsh crashed",
    "dsh that takes its last checkpoint, crashed",
    "dsh in an epoch, Ctrl-C, which the loader's workers hear too",
    "dsh with checkpoints within an epoch, crashed",
    "dsh with rare validations at the end of an epoch",
    "hashing, lookahead and alternating mirrors",
    "dir between pools",
    "dsh with checkpoints within an epoch, crashed after its end",
    "dsh in an epoch after a validation",
    "dsh at the last step",
    "dsh in the test",
    "dsh with rare validations crashed",
    "hashing, memory bank",
    "dir crashed in a pool",
}


@pytest.mark.parametrize(
    ("arguments", "batch", "how"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in CASES.items()],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(arguments, batch, how, whole, tmp_path):
    wanted = whole(*arguments)
    run = tmp_path / "run"
    status = 1 if how == "crash" else 128 + STATUS.get(how, signal.SIGTERM)
    simsearch("train", *DATA, *arguments, *stop(batch, how), f"run_dir={run}", expect=status)
    assert not (run / "catalog").exists()
    saved = checkpoint(run)
    steps = checkpoint(wanted)["global_step"]
    assert saved["global_step"] <= steps
    simsearch("train", "resume=true", f"run_dir={run}", "trust=true")  # Stop is none of ours

    assert numbers(run) == numbers(wanted)
    for name in ("best", "last"):
        got, want = checkpoint(run, name), checkpoint(wanted, name)
        for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step"):
            same(got.get(key), want.get(key), f"{name}/{key}")
    if saved["global_step"] < steps:  # then there was something to learn
        before, after = (c.get("current_model_state", c["state_dict"]) for c in (saved, checkpoint(run)))
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_resumed_is_measured_again_to_the_same(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole(*DSH, *STEPS), run)
    before = checkpoint(run)
    (run / "metrics.json").unlink()
    simsearch("train", "resume=true", f"run_dir={run}")
    assert numbers(run)["test"] == numbers(whole(*DSH, *STEPS))["test"]
    same(checkpoint(run)["state_dict"], before["state_dict"])


@pytest.mark.parametrize("now", ["run/checkpoints", "../elsewhere/run/checkpoints"])
def test_a_run_under_another_path_keeps_its_best_checkpoint(now, tmp_path, monkeypatch):
    """A resume by a relative path, and a run that was moved: Lightning would replace the best one by the next."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before, score = "/then/run/checkpoints", torch.tensor(0.9)
    callback = ModelCheckpoint(monitor="val/mAP", mode="max")
    callback.dirpath = now
    state = {"dirpath": before, "best_model_score": score, "kth_value": score, "last_model_path": ""}
    state |= dict.fromkeys(("best_model_path", "kth_best_model_path"), f"{before}/best.ckpt")
    state["best_k_models"] = {f"{before}/best.ckpt": score, "/then/other.ckpt": score, "local:///home": score}
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[callback])
    OwnCheckpoints().on_load_checkpoint(trainer, None, {"callbacks": {"a": state, "b": {"steps": 1}}})  # type: ignore[arg-type]
    callback.load_state_dict(state)
    assert callback.best_model_score == score
    assert callback.best_k_models == {f"{now}/best.ckpt": score}
    assert callback.best_model_path == callback.kth_best_model_path == f"{now}/best.ckpt"
    assert not callback.last_model_path


@pytest.mark.parametrize(  # within an epoch, and at its end
    "first", ["trainer.max_steps=6", pytest.param("trainer.max_steps=8", marks=pytest.mark.slow)]
)
def test_a_run_trains_longer_as_if_it_had_been_told_at_first(first, whole, tmp_path, monkeypatch):
    wanted, run = whole(*DSH, *STEPS), tmp_path / "run"
    simsearch("train", *DATA, *DSH, *STEPS, first, f"run_dir={run}")
    assert is_finished(run)
    evaluation = run / "evaluations" / "again"
    evaluation.mkdir(parents=True)
    for name in ("metrics.json", "per_query.parquet", "notes.txt"):
        (evaluation / name).write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("simsearch.commands.train.train_run", lambda run: (run.folder / "none").read_text())  # dies
        simsearch("train", "resume=true", f"run_dir={run}", "trainer.max_steps=9", expect=1)
    assert not is_finished(run)  # its test was of the former length
    assert "val" in numbers(run)
    assert not (run / "per_query.parquet").exists()
    assert [path.name for path in evaluation.iterdir()] == ["notes.txt"]  # of the former length too
    done = simsearch("train", "resume=true", f"run_dir={run}", "trainer.max_steps=9", "seed=7", "sampler.batch_size=2")
    assert "ignores seed=7 (it" in done.stderr
    assert "max_steps" not in done.stderr
    got, want = checkpoint(run), checkpoint(wanted)
    for key in ("state_dict", "optimizer_states", "global_step", "epoch"):
        same(got[key], want[key], key)
    again = simsearch(
        "train", "resume=true", f"run_dir={run}"
    )  # it has the length from now on, and no note of a change
    assert again.stderr.startswith(f"resuming {run} with its own config\n")  # without a note of a change
    assert checkpoint(run)["global_step"] == 9


def test_a_plateau_watches_the_mean_loss_of_an_epoch(whole):
    run = whole(*HASHING, *PLATEAU, "scheduler.mode=min")
    losses = [float(row["train/loss"]) for row in history(run) if row["train/loss"]]
    (scheduler,) = checkpoint(run)["lr_schedulers"]
    assert len(losses) == 14
    assert scheduler["best"] == pytest.approx(sum(losses[:4]) / 4, abs=1e-5)  # nothing falls by 1 afterwards
    assert scheduler["last_epoch"] == 3  # epochs of 4 steps; the fourth is not whole
    assert scheduler["_last_lr"][0] == pytest.approx(checkpoint(run)["optimizer_states"][0]["param_groups"][0]["lr"])


@pytest.mark.slow
def test_a_run_without_validation_that_trains_longer_has_its_new_end_as_result(tmp_path):
    run = tmp_path / "run"
    simsearch("train", *DATA, *DSH, "trainer.max_steps=2", "protocol.validation=null", f"run_dir={run}")
    simsearch("train", "resume=true", f"run_dir={run}", "trainer.max_steps=3")
    assert checkpoint(run, "best")["global_step"] == 3
    same(checkpoint(run, "best")["state_dict"], checkpoint(run)["state_dict"])


def test_a_learning_rate_that_was_planned_is_not_stretched(tmp_path):
    run = tmp_path / "run"
    arguments = (*DSH, "trainer.max_steps=2", "scheduler=one-cycle", "callbacks.precision_recall=null")
    simsearch("train", *DATA, *arguments, f"run_dir={run}")
    done = simsearch("train", "resume=true", f"run_dir={run}", "trainer.max_steps=9", expect=1)
    assert done.stderr.endswith(
        f"simsearch train: {run} has a learning rate schedule that was planned for its length "
        f"(scheduler.total_steps=2): start a new run from it by model.start={run}\n"
    )
    simsearch("train", "resume=true", f"run_dir={run}", "trainer.max_time=00:01:00:00")  # plans nothing
    assert read_config(run / "config.yaml")["trainer"]["max_time"] == "00:01:00:00"
    nodes = {"lookahead": {"_target_": "simsearch.callbacks.training.Lookahead"}, "other": None}
    with pytest.raises(ValueError, match="has Lookahead, which ends on the slow average at its length"):
        _check_unplanned(Run(run, {"callbacks": nodes}))


@pytest.mark.slow
def test_throughput_of_a_resumed_run_counts_from_its_start(tmp_path):
    run = tmp_path / "run"
    simsearch("train", *DATA, *DSH, *STEPS, *stop(2, "signal"), f"run_dir={run}", expect=128 + signal.SIGTERM)
    simsearch("train", "resume=true", f"run_dir={run}", "trust=true")
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/images_per_s")]
    assert float(rows[0]["train/images_per_s"]) > 1  # and not of all the seconds since the machine started
    assert all(0 <= float(row["train/data_share"]) <= 1 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_ends_a_run_that_can_go_on(workers, number, tmp_path):
    length = 400 if workers == 0 else 100
    arguments = (*DATA, *DSH, f"trainer.max_steps={length}", "trainer.check_val_every_n_epoch=40")
    arguments = (*arguments, f"data.num_workers={workers}")
    wanted, run = tmp_path / "wanted", tmp_path / "run"
    program = [sys.executable, "-m", "simsearch", "train"]
    simsearch("train", *arguments, f"run_dir={wanted}")
    with subprocess.Popen(
        [*program, *arguments, f"run_dir={run}"], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        start = time.monotonic()
        while not (run / "checkpoints" / "last.ckpt").is_file():  # the first epoch's
            assert time.monotonic() - start < 400
            time.sleep(0.05)
        os.killpg(process.pid, number)  # as a terminal and a scheduler do
        _, err = process.communicate(timeout=300)
        assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert "Error" not in err
    assert 0 < checkpoint(run)["global_step"] < length
    simsearch("train", "resume=true", f"run_dir={run}")
    assert numbers(run) == numbers(wanted)
    same(checkpoint(run)["state_dict"], checkpoint(wanted)["state_dict"])


@pytest.mark.slow
def test_workers_of_joblib_load_by_processes_of_their_own(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = (*DATA, *DSH, "trainer.max_steps=2", "data.num_workers=1", "callbacks.precision_recall=null")
    program = [sys.executable, "-m", "simsearch", "train", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [*program, *arguments, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2


@pytest.mark.slow
def test_a_run_is_resumed_by_one_process_at_a_time(tmp_path):
    run = tmp_path / "run"
    arguments = (*DATA, *DSH, "trainer.max_steps=100000", "trainer.check_val_every_n_epoch=100000")
    program = [sys.executable, "-m", "simsearch", "train"]
    for more in (arguments, ["resume=true"]):
        with subprocess.Popen(
            [*program, *more, f"run_dir={run}"], stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            before = time.time()
            path = run / "checkpoints" / "last.ckpt"
            while not (path.is_file() and path.stat().st_mtime > before):
                assert process.poll() is None
                time.sleep(0.05)
            rows = (run / "metrics.csv").read_text().count("\n")
            done = simsearch("train", "resume=true", f"run_dir={run}", expect=1)
            assert done.stderr == f"simsearch train: another process works on {run} already: wait for it, or end it\n"
            assert not list(run.glob("metrics-1.csv"))
            assert (run / "metrics.csv").read_text().count("\n") >= rows
            process.kill()


# --------------------------------------------------------------------------------- what a training ends with

EPOCHS = ("trainer.max_steps=-1", "trainer.max_epochs=2")
TIME = ("trainer.max_time={milliseconds: 1}", "trainer.max_steps=1000")
SEVEN = ("trainer.max_steps=-1", "trainer.max_epochs=7")
STOP = (
    *("+callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping", "+callbacks.stop.monitor=train/loss"),
    *("+callbacks.stop.stopping_threshold=1e9", "+callbacks.stop.check_on_train_epoch_end=true"),
)
ENDS = {  # the steps after which it is validated, 4 an epoch and every 5 epochs by default
    "epochs": (EPOCHS, [8]),
    "epochs after a validation": (SEVEN, [20, 28]),
    "epochs that end with one": ((*SEVEN, "trainer.max_epochs=5"), [20]),
    "steps": (("trainer.max_steps=6",), [6]),
    "steps of many validations": (("trainer.max_steps=6", "trainer.check_val_every_n_epoch=1"), [4, 6]),
    "steps without a metric to choose by": ((*STEPS, "callbacks.checkpoint.monitor=null"), [4, 8, 9]),
    "time": (TIME, [1]),
    "an early stop": (STOP, [4]),
    "epochs without validation": ((*EPOCHS, "protocol.validation=null"), []),
    "steps without validation": (("trainer.max_steps=6", "protocol.validation=null"), []),
}


QUICK = {"time", "epochs without validation"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ENDS])
def test_a_training_s_end_is_validated_or_is_the_result(name, tmp_path):
    arguments, steps = ENDS[name]
    run = tmp_path / "run"
    simsearch("train", *DATA, *DSH, "callbacks.precision_recall=null", *arguments, f"run_dir={run}")
    rows = [row for row in history(run) if row.get("val/mAP")]
    assert [int(row["step"]) + 1 for row in rows] == steps
    assert [int(row["epoch"]) for row in rows] == [(step - 1) // 4 for step in steps]
    best, last = checkpoint(run, "best"), checkpoint(run)
    if not steps:
        same(best["state_dict"], last["state_dict"])
        steps_an_epoch = 6 if "protocol.validation=null" in arguments else 4  # nothing is held out
        assert (
            best["global_step"] == last["global_step"] == (6 if "max_steps=6" in arguments[0] else 2 * steps_an_epoch)
        )
    else:
        values = [float(row["val/mAP"]) for row in rows]
        chosen = -1 if "callbacks.checkpoint.monitor=null" in arguments else values.index(max(values))
        assert best["global_step"] == steps[chosen]
        assert last["global_step"] == steps[-1]
        stages = read_json(run / "metrics.json")
        assert set(stages) == {"val", "test"}
        assert stages["val"]["metrics"]["mAP"] == pytest.approx(values[chosen], abs=1e-7)
    assert (run / "catalog").is_dir()
    simsearch("train", "resume=true", f"run_dir={run}", "trust=true")  # trains and validates nothing once more
    assert not [row for row in history(run) if row.get("val/mAP")]
    same(checkpoint(run, "best")["state_dict"], best["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["epochs", "epochs without validation"])
def test_a_run_of_before_that_ended_without_a_best_is_no_loss(name, tmp_path):
    run = tmp_path / "run"
    simsearch("train", *DATA, *DSH, *ENDS[name][0], "callbacks.last_validation=null", f"run_dir={run}")
    assert checkpoint(run, "best")["global_step"] == {"epochs": 8, "epochs without validation": 12}[name]
    (run / "checkpoints" / "best.ckpt").unlink()
    (run / "metrics.json").unlink()
    simsearch("train", "resume=true", f"run_dir={run}")
    same(checkpoint(run, "best")["state_dict"], checkpoint(run)["state_dict"])


# -------------------------------------------------------------------------------------------- kills


def _save(path: Path, number: int) -> None:
    WholeCheckpoints().save_checkpoint({"number": number, "tensor": torch.full((500_000,), number)}, path)


def _save_until_killed(path: Path) -> None:
    tempfile.tempdir = "/dev/shm"  # another file system than that of the checkpoint, as a cluster's /tmp is
    for number in range(10_000):
        _save(path, number)


def _save_and_die(path: Path, moment: str) -> None:
    _save(path, 0)
    setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    _save(path, 1)


def _start(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    start_forkserver()
    process = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
    process.start()
    return process


def check_whole(path: Path) -> None:
    saved = torch.load(check_zip(path), weights_only=True)
    assert (saved["tensor"] == saved["number"]).all()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(moment, tmp_path):
    path = tmp_path / "last.ckpt"
    process = _start(_save_and_die, path, moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(check_zip(path), weights_only=True)["number"] == 0


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    _save(path, 0)
    random = np.random.default_rng(0)
    for _ in range(12):
        before = path.stat().st_mtime_ns
        process = _start(_save_until_killed, path)
        while path.stat().st_mtime_ns == before and process.is_alive():
            time.sleep(0.001)
        time.sleep(0.02 * random.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        check_whole(path)


def test_a_full_disk_leaves_the_checkpoint_before_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    _save(path, 3)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; the checkpoint before it is complete: '.*last.ckpt'"):
        _save(path, 4)
    check_whole(path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_does_not_hide_what_ended_a_training(tmp_path, monkeypatch):
    def fail(error: Exception) -> Callable[..., None]:
        def failing(*_: Any, **__: Any) -> None:
            raise error

        return failing

    trainer = SimpleNamespace(is_global_zero=True, fit=fail(ValueError("the loss is nan")))
    monkeypatch.setattr("simsearch.configs.build_trainer", lambda *_: trainer)
    monkeypatch.setattr("simsearch.run_directory.note_training", fail(OSError(errno.ENOSPC, "full")))
    with pytest.raises(ValueError, match="the loss is nan"):
        train.train(Run(tmp_path, {}), None, None, [])  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [0, 3, 5000])
def test_a_checkpoint_that_an_earlier_version_left_cut_off_is_named(kept, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole(*DSH, *STEPS), run)
    path = run / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:kept])
    done = simsearch("train", "resume=true", f"run_dir={run}", expect=1)
    assert re.search(rf"simsearch train: {re.escape(str(path))} is (not a checkpoint or is )?damaged: ", done.stderr)


def _train_and_die(arguments: Sequence[str], count: int) -> None:
    """Trains, and dies just before the file of that number is put in place."""
    left, replace = count, os.replace

    def die(*names: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    os.replace = die  # type: ignore[assignment]
    simsearch("train", *arguments)


@pytest.mark.slow
def test_a_training_that_is_killed_at_any_of_its_files_goes_on(whole, tmp_path):
    arguments = (*DATA, *DSH, *STEPS)
    wanted = whole(*DSH, *STEPS)
    for count in range(100):
        run = tmp_path / str(count)
        process = _start(_train_and_die, (*arguments, f"run_dir={run}"), count)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, count
        began = any(run.glob("checkpoints/*.ckpt"))
        simsearch("train", *(["resume=true"] if began else arguments), f"run_dir={run}")
        assert numbers(run) == numbers(wanted), count
        same(checkpoint(run)["state_dict"], checkpoint(wanted)["state_dict"], str(count))
        shutil.rmtree(run)
    assert count > 8  # config, results, and a checkpoint or two an epoch


# ------------------------------------------------------------------------------ what a trained run leaves

FAMILIES = {
    "dsh": (*DSH, *STEPS),
    "hashing": CASES["hashing, averaged weights, in a validation"][0],
    "dir": (*DIR, *STEPS),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_run_is_measured_again_to_the_same_numbers(family, whole, tmp_path):
    run = whole(*FAMILIES[family])
    for stage, name in (("test", "test"), ("validate", "val")):
        simsearch("evaluate", f"run={run}", f"run_dir={tmp_path / stage}", f"stage={stage}")
        again = numbers(tmp_path / stage)[name]
        assert again.pop("queries_trained_on") == 0
        assert again.pop("measured_by") == measurement_identity(read_config(run / "config.yaml"))
        assert again == numbers(run)[name]


def history(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_run_s_catalogs_answer(family, whole, tmp_path):
    run = whole(*FAMILIES[family])
    folder = tmp_path / "mine"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, shape in enumerate([(40, 60, 3), (70, 50, 3), (32, 32, 3)]):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(shape[1::-1], Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    hint = (run.parent / "stdout").read_text().rstrip().splitlines()[-1]
    _, command, *told = shlex.split(hint.removeprefix("your images:"))
    given = {"images=<folder>": f"images={folder}", "out=<catalog>": f"out={tmp_path / 'catalog'}"}
    simsearch(command, *(given.get(argument, argument) for argument in told), "workers=0")
    own = read_catalog(tmp_path / "catalog")
    assert own.index.factory == ("Flat" if family == "dir" else "BFlat")
    assert len(own) == 3
    gallery = read_catalog(run / "catalog")
    assert gallery.about["label"] == "style"
    assert {"path", "artist", "style"} <= set(gallery.items.column_names)
    assert len(set(gallery.items["style"].to_pylist())) > 1
    for catalog, paths in ((tmp_path / "catalog", ["0.png", "1.png", "2.png"]), (run / "catalog", None)):
        found = simsearch(
            "search", f"catalog={catalog}", f"image={folder}", "k=3", "format=json", "figure=null", cwd=tmp_path
        )
        answers = [json.loads(line) for line in found.stdout.splitlines()]
        assert len(answers) == 3
        for answer, path in zip(answers, paths or [None] * 3, strict=True):
            assert len(answer["results"]) == 3
            if path is not None:
                best = answer["results"][0]["score"]
                assert path in [item["path"] for item in answer["results"] if item["score"] >= best - 1e-5]
    wrong = "binary-flat" if family == "dir" else "flat"
    refused = simsearch("index", f"run={run}", f"images={folder}", f"index={wrong}", "workers=0", expect=1)
    assert "does not fit this run" in refused.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_codes_reports_their_health(family, whole):
    metrics = numbers(whole(*FAMILIES[family]))["test"]["metrics"]
    health = {name for name in metrics if name.startswith("code/")}
    names = ("balance", "worst_balance", "correlation", "quantisation_error", "dead_bits", "empty_ball@2")
    assert health == (set() if family == "dir" else {f"code/{name}" for name in names})
    assert metrics["bytes_per_item"] == {"dsh": 2, "hashing": 1, "dir": 32}[family]
