"""Collects a finished sweep. README.md beside this file has the question and the commands.

python study.py SWEEP    results.csv and the table of the Pareto front, from a sweep's folder
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from simsearch import results
from simsearch.files import replacing
from simsearch.sweeps.trials import read_trials

SWEPT = ("pooling=", "model.whitening.", "index=")
METRICS = ("mAP", "P@1", "P@10", "R@10", "index/latency_ms_p50")


def main(folder: Path) -> None:
    lines, points = [], []
    for trial in read_trials(folder):
        if trial["state"] != "finished":
            raise SystemExit(f"{trial['folder']} is {trial['state']}: finish the sweep first")
        stages = json.loads((folder / trial["folder"] / "metrics.json").read_text())
        swept = dict(
            override.split("=") for override in trial["overrides"] if override[:5] in ("pooli", "model", "index")
        )
        row = "frozen-lite0-" + "-".join(
            (swept["pooling"], f"{float(swept['model.whitening.power']):.4g}", swept["index"])
        )
        row += f"-{swept['model.whitening.dimension']}d"
        seconds = trial["ended"] - trial["started"]
        command = "simsearch train data=cifar10 backbone.size=64 " + " ".join(f"{k}={v}" for k, v in swept.items())
        for stage in ("val", "test"):
            about = stages[stage]
            lines += results.result_lines(
                about, METRICS, row=row, data="cifar10", seconds=seconds, seed=0, command=command
            )
        bytes_, value = stages["val"]["metrics"]["bytes_per_item"], stages["val"]["metrics"]["mAP"]
        points.append((int(bytes_), value, stages["test"]["metrics"]["mAP"], row))
    with replacing(Path(__file__).parent / "results.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([results.RESULT_COLUMNS, *lines])
    print("| bytes | validation mAP | test mAP | row |\n|---|---|---|---|")
    best = 0.0
    for size, value, test, row in sorted(points, key=lambda point: (point[0], -point[1])):
        if value > best:  # nothing as small is as good
            best = value
            print(f"| {size} | {value:.4f} | {test:.4f} | {row} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
