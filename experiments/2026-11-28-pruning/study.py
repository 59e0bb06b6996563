"""Sweeps with and without pruning, in pairs. README.md beside this file has the question and the protocol.

python study.py run OUT CIFAR10    runs the sweeps into OUT; given again after a kill, it goes on
python study.py table OUT          results.csv and the table, from the sweeps in OUT, also while they run
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from simsearch.files import read_json, replacing
from simsearch.sweeps.trials import read_trials

TRAIN, TEST = 10_000, 1_000  # images, as many of each class
REPETITIONS = 3
ENDED = ("finished", "pruned", "failed")
SWEPT = ("optimizer.lr", "optimizer.weight_decay", "model.network.hidden", "loss")
SETTING = (
    *("experiment=hashing-frozen", "protocol.validation=0.1", "backbone.size=64"),
    *("callbacks.neighbours=null", "callbacks.precision_recall=null"),
    *("callbacks.evaluation.ks=[1]", "callbacks.progress.refresh_rate=0", "catalog.write=false"),
    *("logger.mode=disabled", "objective=val/mAP"),
    *("optimizer.lr=tag(log,interval(0.001,1.0))", "optimizer.weight_decay=tag(log,interval(1e-6,1e-2))"),
    "loss=choice(greedyhash,orthohash,hashnet)",
)
PRUNER = "hydra/sweeper/pruner=halving"


@dataclass(frozen=True)
class Series:
    """Sweeps to compare: the first one prunes nothing."""

    steps: int  # of a trial; an epoch has 45, since 9,000 images are learnt from and 1,000 are validation queries
    setting: tuple[str, ...]  # overrides of all its sweeps
    kinds: dict[str, tuple[int, tuple[str, ...]]]  # for each sweep its trials and its overrides


SERIES = (
    Series(
        405,
        ("trainer.check_val_every_n_epoch=1", "model.network.hidden=choice(128,256,512,1024)"),
        {"full": (40, ()), "pruned": (40, (PRUNER,)), "late": (40, (PRUNER, "hydra.sweeper.pruner.min_resource=3"))},
    ),
    Series(
        1215,
        (
            *("trainer.check_val_every_n_epoch=3", "model.network.hidden=256", "scheduler=constant", "callbacks=ema"),
            *("callbacks.ema.decay=0.95", "callbacks.ema.use_buffers=false"),
        ),
        {"steady-full": (40, ()), "steady-pruned": (60, (PRUNER,))},
    ),
)


def subset(source: Path, target: Path) -> None:
    """Writes the first images of each class of CIFAR-10, as Parquet files of the same form."""
    for part, wanted in (("train", TRAIN), ("test", TEST)):
        (path,) = source.glob(f"{part}-*.parquet")
        table = pq.read_table(path)
        labels = table["label"].to_numpy()
        rows = np.concatenate([np.flatnonzero(labels == label)[: wanted // 10] for label in range(10)])
        target.mkdir(parents=True, exist_ok=True)
        with replacing(target / path.name) as temporary:
            pq.write_table(table.take(np.sort(rows)), temporary)


def run(out: Path, source: Path) -> None:
    """Runs all sweeps, two trials at a time."""
    if not (out / "cifar10").is_dir():
        subset(source, out / "cifar10")
    for series in SERIES:
        for repetition in range(REPETITIONS):
            for kind, (trials, more) in series.kinds.items():
                name = f"{kind}-{repetition}"
                command = [sys.executable, "-m", "simsearch", "train", "-m", *SETTING, *series.setting, *more]
                command += ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.n_jobs=2"]
                command += [f"hydra.sweeper.sampler.seed={repetition}", f"seed={repetition}"]
                command += [f"trainer.max_steps={series.steps}", f"data.root={out / 'cifar10'}"]
                with (out / f"{name}.log").open("a") as log:
                    where = [f"hydra.sweep.dir={out / name}"]
                    subprocess.run([*command, *where], stdout=log, stderr=log, check=False)  # 1 where a trial failed
                if not read_json(out / name / "sweep.json").get("ended"):
                    raise SystemExit(f"{name} stopped: the end of {name}.log says why")
                table(out)


def table(out: Path) -> None:
    """Writes what came of each trial, and prints a line for each sweep."""
    lines: list[dict[str, Any]] = []
    print("| sweep | trials | pruned | failed | steps | of full's | best val/mAP | full's best reached after | idle |")
    print("|---|---|---|---|---|---|---|---|---|")
    for series in SERIES:
        for repetition in range(REPETITIONS):
            full, whole = 0.0, 0  # the best value and the steps of the sweep that prunes nothing
            for number, kind in enumerate(series.kinds):
                folder = out / f"{kind}-{repetition}"
                if not (folder / "sweep.json").is_file():
                    continue
                trials = [about for about in read_trials(folder) if about["state"] in ENDED]
                if not trials:
                    continue
                trials.sort(key=lambda about: about["ended"])
                own = [_line(about, folder, series.steps) for about in trials]
                lines += [{"repetition": repetition, "sweep": kind} | line | {"seed": repetition} for line in own]
                spent = np.cumsum([line["steps"] for line in own])
                best = np.maximum.accumulate([line["val/mAP"] if line["state"] == "finished" else 0.0 for line in own])
                if not number:
                    full, whole, told = best[-1], spent[-1], "-"
                else:
                    told = f"{spent[np.argmax(best >= full)] / whole:.1%}" if best[-1] >= full else "not reached"
                counts = [sum(line["state"] == state for line in own) for state in ("pruned", "failed")]
                print(
                    f"| {kind} {repetition} | {len(trials)} | {counts[0]} | {counts[1]} | {spent[-1]} | "
                    f"{spent[-1] / whole:.1%} | {best[-1]:.4f} | {told} | {idle(trials):.1%} |"
                )
    if lines:
        with replacing(Path(__file__).parent / "results.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


def _line(about: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """What came of a trial."""
    pruned, failed = about.get("pruned"), about["state"] == "failed"
    low = high = None
    if failed:  # the loss became infinite; the error names the step
        steps = int(re.search(r"at step (\d+)", about["error"])[1])
    else:
        low, high = read_json(folder / about["folder"] / "metrics.json")["val"]["intervals"]["mAP"]
    swept = dict(text.split("=", 1) for text in about["overrides"])
    return {
        "number": about["numbers"][0],
        "state": about["state"],
        "steps": pruned["step"] if pruned else steps,
        "val/mAP": pruned["value"] if pruned else about["values"],
        "ci_low": low,
        "ci_high": high,
        **{key: swept[key] for key in SWEPT},
        "seconds": round(about["ended"] - about["started"], 2),
    }


def idle(trials: list[dict[str, Any]]) -> float:
    """The share of time in which a worker had no trial, from its first trial to its last: asking and composing."""
    spent = whole = 0.0
    for pid in {about["pid"] for about in trials}:
        own = [about for about in trials if about["pid"] == pid]
        spent += sum(about["ended"] - about["started"] for about in own)
        whole += max(about["ended"] for about in own) - min(about["started"] for about in own)
    return 1 - spent / whole


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]).absolute(), Path(sys.argv[3]))
    table(Path(sys.argv[2]).absolute())
