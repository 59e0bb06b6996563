"""Sweeps with and without pruning, in pairs. README.md beside this file has the question and the protocol.

python study.py run OUT CIFAR10    runs the sweeps into OUT; given again after a kill, it goes on
python study.py table OUT          results.csv and the table, from the sweeps in OUT, also while they run
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from simsearch import sweeps
from simsearch.files import read_json, replacing

TRAIN, TEST = 10_000, 1_000  # images, as many of each class
EPOCHS, STEPS = 9, 405  # 45 steps an epoch: 9,000 images in batches of 200, the other 1,000 are validation queries
TRIALS, REPETITIONS = 40, 3
ENDED = ("finished", "pruned", "failed")
PRUNER = "hydra/sweeper/pruner=halving"
KINDS = {"full": (), "pruned": (PRUNER,), "late": (PRUNER, "hydra.sweeper.pruner.min_resource=3")}
SETTING = (
    *("experiment=hashing-frozen", "protocol.validation=0.1", "backbone.size=64", f"trainer.max_steps={STEPS}"),
    *("trainer.check_val_every_n_epoch=1", "callbacks.neighbours=null", "callbacks.precision_recall=null"),
    *("callbacks.evaluation.ks=[1]", "callbacks.progress.refresh_rate=0", "catalog.write=false"),
    *("logger.mode=disabled", "objective=val/mAP"),
)
SPACE = (
    *("optimizer.lr=tag(log,interval(0.001,1.0))", "optimizer.weight_decay=tag(log,interval(1e-6,1e-2))"),
    *("model.network.hidden=choice(128,256,512,1024)", "loss=choice(greedyhash,orthohash,hashnet)"),
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
    for repetition in range(REPETITIONS):
        for kind, more in KINDS.items():
            command = [sys.executable, "-m", "simsearch", "train", "-m", *SETTING, *SPACE, *more]
            command += ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={TRIALS}", "hydra.sweeper.n_jobs=2"]
            command += [
                f"hydra.sweeper.sampler.seed={repetition}",
                f"seed={repetition}",
                f"data.root={out / 'cifar10'}",
            ]
            with (out / f"{kind}-{repetition}.log").open("a") as log:
                where = [f"hydra.sweep.dir={out / f'{kind}-{repetition}'}"]
                subprocess.run([*command, *where], stdout=log, stderr=log, check=False)  # 1 where a trial failed
            if not read_json(out / f"{kind}-{repetition}" / "sweep.json").get("ended"):
                raise SystemExit(f"{kind}-{repetition} stopped: the end of {kind}-{repetition}.log says why")
            table(out)


def table(out: Path) -> None:
    """Writes what came of each trial, and prints a line for each sweep."""
    lines: list[dict[str, Any]] = []
    print("| sweep | trials | pruned | failed | steps | of full's | best val/mAP | full's best reached after | idle |")
    print("|---|---|---|---|---|---|---|---|---|")
    for repetition in range(REPETITIONS):
        full, whole = 0.0, 0  # the best value and the steps of the sweep that prunes nothing
        for kind in KINDS:
            folder = out / f"{kind}-{repetition}"
            if not (folder / "sweep.json").is_file():
                continue
            trials = [about for about in sweeps.read_trials(folder) if about["state"] in ENDED]
            if not trials:
                continue
            trials.sort(key=lambda about: about["ended"])
            spent, best, reached = 0, 0.0, None
            for about in trials:
                pruned, failed = about.get("pruned"), about["state"] == "failed"
                steps = pruned["step"] if pruned else STEPS
                if failed:  # the loss became infinite; the error names the step
                    steps = int(re.search(r"at step (\d+)", about["error"])[1])
                value = pruned["value"] if pruned else about["values"]
                low = high = None
                if not failed:
                    low, high = read_json(folder / about["folder"] / "metrics.json")["val"]["intervals"]["mAP"]
                spent += steps
                best = max(best, 0.0 if pruned or failed else value)
                if reached is None and full and best >= full:
                    reached = spent
                swept = dict(text.split("=", 1) for text in about["overrides"])
                lines.append(
                    {"repetition": repetition, "sweep": kind, "number": about["numbers"][0], "state": about["state"]}
                    | {"steps": steps, "val/mAP": value, "ci_low": low, "ci_high": high}
                    | {key: swept[key] for key in (text.partition("=")[0] for text in SPACE)}
                    | {"seconds": round(about["ended"] - about["started"], 2), "seed": repetition}
                )
            full, whole = (best, spent) if kind == "full" else (full, whole)
            told = "-" if kind == "full" else "not reached" if reached is None else f"{reached / whole:.1%}"
            counts = [sum(about["state"] == state for about in trials) for state in ("pruned", "failed")]
            print(
                f"| {kind} {repetition} | {len(trials)} | {counts[0]} | {counts[1]} | {spent} | {spent / whole:.1%} | "
                f"{best:.4f} | {told} | {idle(trials):.1%} |"
            )
    if lines:
        with replacing(Path(__file__).parent / "results.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


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
