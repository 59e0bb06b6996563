"""Sweeps with and without pruning, in pairs. README.md beside this file has the question and the protocol.

python study.py run OUT CIFAR10 [1 2 3 4]      runs the sweeps of these series, or of all, into OUT; killed, it goes on
python study.py table OUT                      results.csv and the table, from the sweeps in OUT, also while they run
python study.py winners OUT CIFAR10 [1 2 3 4]  trains the best trial of each sweep again, and writes winners.csv
python study.py replay OUT                     what halving with 35 % of the steps keeps of the sweeps of whole trials,
                                               and writes replay.csv

The tables keep the lines of sweeps that OUT does not have.
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
from scipy.stats import spearmanr

from simsearch.files import read_json, replacing
from simsearch.sweeps.trials import read_trials

TEST = 1_000  # images, as many of each class
AGAIN = (100, 101, 102, 103, 104)  # seeds of the best trials' further trainings
ENDED = ("finished", "pruned", "failed")
SWEPT = (
    *("optimizer.lr", "optimizer.weight_decay", "model.network.hidden", "loss"),
    *("optimizer.momentum", "loss.margin", "loss.scale"),
)
SETTING = (
    *("experiment=hashing-frozen", "protocol.validation=0.1", "backbone.size=64"),
    *("callbacks.neighbours=null", "callbacks.precision_recall=null"),
    *("callbacks.evaluation.ks=[1]", "callbacks.progress.refresh_rate=0", "catalog.write=false"),
    "logger.mode=disabled",
)
RATES = ("optimizer.lr=tag(log,interval(0.001,1.0))", "optimizer.weight_decay=tag(log,interval(1e-6,1e-2))")
LOSSES = "loss=choice(greedyhash,orthohash,hashnet)"
STEADY = ("scheduler=constant", "callbacks=ema", "callbacks.ema.decay=0.95", "callbacks.ema.use_buffers=false")
PRUNER = "hydra/sweeper/pruner=halving"


@dataclass(frozen=True)
class Series:
    """Sweeps to compare: the first one prunes nothing."""

    images: int  # training images, as many of each class; a tenth of them are validation queries
    steps: int  # of a trial
    setting: tuple[str, ...]  # overrides of all its sweeps
    space: tuple[str, ...]  # what they search
    kinds: dict[str, tuple[int, tuple[str, ...]]]  # for each sweep its trials and its overrides
    repetitions: int = 3


SERIES = (
    Series(
        10_000,
        405,  # 9 epochs of 45
        ("trainer.check_val_every_n_epoch=1",),
        (*RATES, LOSSES, "model.network.hidden=choice(128,256,512,1024)"),
        {"full": (40, ()), "pruned": (40, (PRUNER,)), "late": (40, (PRUNER, "hydra.sweeper.pruner.min_resource=3"))},
    ),
    Series(
        10_000,
        1215,  # 27 epochs of 45
        ("trainer.check_val_every_n_epoch=3", "model.network.hidden=256", *STEADY),
        (*RATES, LOSSES),
        {"steady-full": (40, ()), "steady-pruned": (60, (PRUNER,))},
    ),
    Series(
        20_000,
        972,  # 27 epochs of 36
        (
            *("trainer.check_val_every_n_epoch=3", "sampler.batch_size=500", "model.network.hidden=256"),
            *("loss=orthohash", *STEADY),
        ),
        (
            *(*RATES, "optimizer.momentum=interval(0.5,0.99)"),
            *("loss.margin=interval(0.0,0.5)", "loss.scale=tag(log,interval(2.0,32.0))"),
        ),
        {"one-full": (40, ()), "one-pruned": (50, (PRUNER,))},
        repetitions=1,
    ),
    Series(
        20_000,
        972,
        (
            *("trainer.check_val_every_n_epoch=3", "sampler.batch_size=500", "model.network.hidden=256"),
            *("loss=orthohash", *STEADY),
        ),
        (*RATES, "optimizer.momentum=interval(0.5,0.99)"),
        {"rates-full": (40, ()), "rates-pruned": (50, (PRUNER,))},
        repetitions=2,
    ),
)


def subset(source: Path, target: Path, images: int) -> None:
    """Writes the first images of each class of CIFAR-10, as Parquet files of the same form."""
    for part, wanted in (("train", images), ("test", TEST)):
        (path,) = source.glob(f"{part}-*.parquet")
        table = pq.read_table(path)
        labels = table["label"].to_numpy()
        rows = np.concatenate([np.flatnonzero(labels == label)[: wanted // 10] for label in range(10)])
        target.mkdir(parents=True, exist_ok=True)
        with replacing(target / path.name) as temporary:
            pq.write_table(table.take(np.sort(rows)), temporary)


def run(out: Path, source: Path, chosen: list[Series]) -> None:
    """Runs the sweeps of some series, two trials at a time."""
    for series in chosen:
        for repetition in range(series.repetitions):
            for kind, (trials, more) in series.kinds.items():
                name = f"{kind}-{repetition}"
                search = ["objective=val/mAP", *series.space, *more]
                search += ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.n_jobs=2"]
                search += [f"hydra.sweeper.sampler.seed={repetition}", f"seed={repetition}"]
                train(out, source, name, series, search)
                if not read_json(out / name / "sweep.json").get("ended"):
                    raise SystemExit(f"{name} stopped: the end of {name}.log says why")
                table(out)


def train(out: Path, source: Path, name: str, series: Series, overrides: list[str]) -> None:
    """Runs a sweep into a folder of OUT, with a log beside it."""
    root = out / f"cifar10-{series.images}"
    if not root.is_dir():
        subset(source, root, series.images)
    command = [sys.executable, "-m", "simsearch", "train", "-m", *SETTING, *series.setting, *overrides]
    command += [f"trainer.max_steps={series.steps}", f"data.root={root}", f"hydra.sweep.dir={out / name}"]
    with (out / f"{name}.log").open("a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=False)  # its status is 1 where a trial failed


def winners(out: Path, source: Path, chosen: list[Series]) -> None:
    """Trains the best trial of each sweep again with other seeds: the best value of many is also the luckiest."""
    with (Path(__file__).parent / "results.csv").open(newline="") as file:
        found = [line for line in csv.DictReader(file) if line["state"] == "finished"]
    lines: list[dict[str, Any]] = []
    print("| sweep | best val/mAP | again: val/mAP | beside full's | again: test/mAP | beside full's |")
    print("|---|---|---|---|---|---|")
    for series in chosen:
        searched = [text.partition("=")[0] for text in series.space]
        for repetition in range(series.repetitions):
            full: list[np.ndarray] = []
            for kind in series.kinds:
                own = [line for line in found if (line["sweep"], line["repetition"]) == (kind, str(repetition))]
                if not own:
                    continue
                best = max(own, key=lambda line: float(line["val/mAP"]))
                name = f"winner-{kind}-{repetition}"
                seeds = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"seed={','.join(map(str, AGAIN))}"]
                train(out, source, name, series, [*(f"{key}={best[key]}" for key in searched), *seeds])
                for seed in AGAIN:
                    (path,) = (out / name).glob(f"seed-{seed}[_-]*/metrics.json")
                    values = {f"{stage}/mAP": about["metrics"]["mAP"] for stage, about in read_json(path).items()}
                    about = {"repetition": repetition, "sweep": kind, **{key: best[key] for key in SWEPT}}
                    lines.append(about | {"seed": seed, "val/mAP": values["val/mAP"], "test/mAP": values["test/mAP"]})
                stages = [np.array([line[f"{s}/mAP"] for line in lines[-len(AGAIN) :]]) for s in ("val", "test")]
                full = full or stages
                cells = [f"{kind} {repetition}", f"{float(best['val/mAP']):.4f}"]
                for values, whole in zip(stages, full, strict=True):
                    cells += [f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"]
                    cells += ["-" if full is stages else f"{(values - whole).mean():+.4f}"]
                print(f"| {' | '.join(cells)} |")
    write(lines, "winners.csv")


def table(out: Path) -> None:
    """Writes what came of each trial, and prints a line for each sweep."""
    lines: list[dict[str, Any]] = []
    print("| sweep | trials | pruned | failed | steps | of full's | best val/mAP | full's best reached after | idle |")
    print("|---|---|---|---|---|---|---|---|---|")
    for series in SERIES:
        for repetition in range(series.repetitions):
            full, whole = 0.0, 0  # the best value and the steps of the sweep that prunes nothing
            for number, kind in enumerate(series.kinds):
                folder = out / f"{kind}-{repetition}"
                if not (folder / "sweep.json").is_file():
                    continue
                trials = [about for about in read_trials(folder) if about["state"] in ENDED]
                if not trials:
                    continue
                trials.sort(key=lambda about: about["ended"])
                workers = list(dict.fromkeys(about["pid"] for about in trials))
                first = min(about["started"] for about in trials)
                own = [
                    _line(about, folder, series.steps)
                    | {"started": round(about["started"] - first, 2), "worker": workers.index(about["pid"])}
                    for about in trials
                ]
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
    write(lines, "results.csv")


# Rungs as (validations of 9, trials of 40 that go on): each has at most 35 % of the steps of 40 whole trials.
RUNGS = (((1, 10),), ((2, 6),), ((3, 1),), ((1, 13), (3, 10)))


def replay(out: Path) -> None:
    """Prints for each sweep of whole trials how early they show their end, and how far below its best halving ends."""
    lines: list[dict[str, Any]] = []
    print("| sweep | rank correlation with the end after 1, 2, 3 of 9 | trials before the best | kept, less the best |")
    print("|---|---|---|---|")
    wholes = [(next(iter(series.kinds)), repetition) for series in SERIES for repetition in range(series.repetitions)]
    for kind, repetition in wholes:
        folder = out / f"{kind}-{repetition}"
        if not (folder / "sweep.json").is_file() or not read_json(folder / "sweep.json").get("ended"):
            continue
        curves = [
            validations(folder / about["folder"]) for about in read_trials(folder) if about["state"] == "finished"
        ]
        values = np.array(curves)
        end = values[:, -1]
        best = int(end.argmax())
        told = [f"{spearmanr(values[:, at], end).statistic:.2f}" for at in range(3)]
        before = [str((values[:, at] > values[best, at]).sum()) for at in range(3)]
        lost = []
        for rungs in RUNGS:
            kept = np.arange(len(values))
            for at, most in rungs:
                kept = kept[np.argsort(-values[kept, at - 1])[:most]]
            lost.append(f"{end[kept].max() - end[best]:.4f}")
        print(f"| {kind} {repetition} | {', '.join(told)} | {', '.join(before)} | {', '.join(lost)} |")
        named = [" then ".join(f"{most} after {at}" for at, most in rungs) for rungs in RUNGS]
        lines.append(
            {"repetition": repetition, "sweep": kind}
            | {f"correlation after {at}": one for at, one in zip((1, 2, 3), told, strict=True)}
            | {f"before the best after {at}": one for at, one in zip((1, 2, 3), before, strict=True)}
            | {f"less the best by {name}": one for name, one in zip(named, lost, strict=True)}
        )
    write(lines, "replay.csv")


def validations(run: Path) -> list[float]:
    """val/mAP of a run at each of its nine validations."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(line["val/mAP"]) for line in csv.DictReader(file) if line["val/mAP"]][:9]


def write(lines: list[dict[str, Any]], name: str) -> None:
    """Writes lines into the CSV file beside this one, in place of those of the same sweeps."""
    path = Path(__file__).parent / name
    if lines:
        new = {(line["sweep"], str(line["repetition"])) for line in lines}
        if path.is_file():
            with path.open(newline="") as file:
                kept = [line for line in csv.DictReader(file) if (line["sweep"], line["repetition"]) not in new]
            lines = kept + lines
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[-1]), lineterminator="\n")
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
        **{key: swept.get(key, "") for key in SWEPT},
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
    folder = Path(sys.argv[2]).absolute()
    if sys.argv[1] in ("table", "replay"):
        {"table": table, "replay": replay}[sys.argv[1]](folder)
    else:
        chosen = [SERIES[int(number) - 1] for number in sys.argv[4:]] or list(SERIES)
        {"run": run, "winners": winners}[sys.argv[1]](folder, Path(sys.argv[3]).absolute(), chosen)
