"""A run that is interrupted goes on as if it had not been; what it leaves can be measured and searched."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import simsearch
from PIL import Image

from simsearch.files import read_json
from simsearch.search.catalog import read_catalog

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
            os.kill(os.getpid(), signal.SIGTERM)

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
            simsearch("train", *DATA, *arguments, f"run_dir={folder}")
            done[arguments] = folder
        return done[arguments]

    return run


STEPS = ("trainer.max_steps=9", "trainer.check_val_every_n_epoch=1")  # an epoch has 4 steps, or 3 with triplets
RARE = ("trainer.max_steps=17", "trainer.check_val_every_n_epoch=2")
CASES = {
    "dsh in an epoch": ((*DSH, *STEPS), 2, "signal"),
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
    "dsh with rare validations at the end of an epoch": ((*DSH, *RARE), 4, "signal"),
    "dsh with rare validations crashed": ((*DSH, *RARE), 6, "crash"),
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
    status = 1 if how == "crash" else 128 + signal.SIGTERM
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


def test_throughput_of_a_resumed_run_counts_from_its_start(tmp_path):
    run = tmp_path / "run"
    simsearch("train", *DATA, *DSH, *STEPS, *stop(2, "signal"), f"run_dir={run}", expect=128 + signal.SIGTERM)
    simsearch("train", "resume=true", f"run_dir={run}", "trust=true")
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/images_per_s")]
    assert float(rows[0]["train/images_per_s"]) > 1  # and not of all the seconds since the machine started
    assert all(0 <= float(row["train/data_share"]) <= 1 for row in rows)


@pytest.mark.slow
def test_a_signal_from_outside_ends_a_run_that_can_go_on(tmp_path):
    arguments = (*DATA, *DSH, "trainer.max_steps=400", "trainer.check_val_every_n_epoch=40")
    wanted, run = tmp_path / "wanted", tmp_path / "run"
    program = [sys.executable, "-m", "simsearch", "train"]
    subprocess.run([*program, *arguments, f"run_dir={wanted}"], check=True, capture_output=True, timeout=300)
    with subprocess.Popen([*program, *arguments, f"run_dir={run}"], stderr=subprocess.DEVNULL) as process:
        start = time.monotonic()
        while not (run / "checkpoints" / "last.ckpt").is_file():  # the first epoch's
            assert time.monotonic() - start < 200
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 128 + signal.SIGTERM
    assert 0 < checkpoint(run)["global_step"] < 400
    subprocess.run([*program, "resume=true", f"run_dir={run}"], check=True, capture_output=True, timeout=300)
    assert numbers(run) == numbers(wanted)
    same(checkpoint(run)["state_dict"], checkpoint(wanted)["state_dict"])


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
        if name == "test":  # the last validation was not that of the best checkpoint
            assert again == numbers(run)[name]
        else:
            best = max(float(row["val/mAP"]) for row in history(run) if row.get("val/mAP"))
            assert again["metrics"]["mAP"] == pytest.approx(best, abs=1e-7)


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
    kind = "flat" if family == "dir" else "binary-flat"
    simsearch("index", f"run={run}", f"images={folder}", f"out={tmp_path / 'catalog'}", "workers=0", f"index={kind}")
    own = read_catalog(tmp_path / "catalog")
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
