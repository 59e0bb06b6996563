"""Triplets at instance level. README.md beside this file has the question.

    simsearch reproduce row=<name> seeds=[0,1,2] run_root=ROOT    trains and measures a row of rows.yaml
    python study.py collect ROOT                                  results.csv and paired.csv, of finished runs in ROOT
    python study.py table                                         the tables of README.md, from the .csv files

Runs are found by their config, whatever their folders are called. `collect` says what it did not find.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import hydra
import pyarrow.parquet as pq
import torch
from torch import Tensor

from simsearch import configs, results
from simsearch.functional.significance import holm, paired_interval, paired_permutation
from simsearch.studies.check import evaluation_folder
from simsearch.studies.rows import read_rows
from simsearch.studies.runs import find_run, finished_runs

HERE = Path(__file__).parent
RESULTS, PAIRED = HERE / "results.csv", HERE / "paired.csv"
PAIRED_COLUMNS = ("row_a", "row_b", "protocol", "fingerprint", "metric", "difference", "low", "high", "p", "p_holm")
METRICS = ("mAP", "P@1", "P@10", "rerank/mAP", "rerank/P@1", "rerank/P@10", "GAP", "GAP-", "accuracy")
TESTED = ("AP", "P@1")


def measurements(root: Path) -> Iterator[tuple[str, int, str, Path, float]]:
    """Row, seed, measurement, its folder and the seconds of the training, of all finished runs in a folder."""
    book, runs = read_rows([HERE / "rows.yaml"]), finished_runs(root)
    with hydra.initialize_config_dir(str(configs.CONF), version_base=None):
        for name, row in book.items():
            for seed in row.seeds:
                run, _ = find_run(book, name, seed, runs)
                if run is None:
                    print(f"not found: {name}, seed {seed}", file=sys.stderr)
                    continue
                seconds = json.loads((run.folder / "run.json").read_text()).get("train_seconds", 0.0)
                for measurement in row.expect:
                    folder = evaluation_folder(run, measurement) if " " in measurement else run.folder
                    if (folder / "metrics.json").is_file():
                        yield name, seed, measurement, folder, seconds
                    else:
                        print(f"not measured: {name}, seed {seed}, {measurement}", file=sys.stderr)


def collect(root: Path) -> None:
    lines, values = [], {}
    for name, seed, measurement, folder, seconds in measurements(root):
        about = json.loads((folder / "metrics.json").read_text())["test"]
        changed = "+".join(measurement.split()[1:])
        row = f"{name}+{changed}" if changed else name
        command = f"simsearch reproduce row={name} seeds=[{seed}]"
        data = "rendered" if name.startswith("works") else "paintings"
        wanted = "rerank/" if changed.startswith("rerank") else ""
        shown = [m for m in METRICS if m.startswith("rerank/") == bool(wanted) and m in about["metrics"]]
        if "evaluators" in changed:
            shown = [m for m in shown if m in ("GAP", "GAP-", "accuracy")]
        lines += results.result_lines(about, shown, row=row, data=data, seconds=seconds, seed=seed, command=command)
        if "evaluators" not in changed:
            table = pq.read_table(folder / "per_query.parquet").to_pydict()
            order = torch.tensor(table["index"]).argsort()
            found = {m: torch.tensor(table[wanted + m], dtype=torch.float64)[order] for m in TESTED}
            values[row, seed] = about["protocol"], about["fingerprint"], found, torch.tensor(table["unit"])[order]
    write(RESULTS, results.RESULT_COLUMNS, lines)
    write(PAIRED, PAIRED_COLUMNS, paired(values))


def paired(values: dict[tuple[str, int], tuple[str, str, dict[str, Tensor], Tensor]]) -> list[list]:
    """Lines of paired.csv: means over the seeds of each row against those of each other row of its data."""
    rows = sorted({row for row, _ in values})
    lines = []
    for i, a in enumerate(rows):
        for b in rows[:i]:
            if values[first(values, a)][1] != values[first(values, b)][1]:
                continue
            for metric in TESTED:
                one, other = (
                    torch.stack([v[2][metric] for (r, _), v in values.items() if r == row]).mean(0) for row in (a, b)
                )
                protocol, fingerprint, _, units = values[first(values, a)]
                ends = paired_interval(one, other, units)
                lines.append([a, b, protocol, fingerprint, metric, *ends, paired_permutation(one, other, units)])
    corrected = holm(torch.tensor([line[-1] for line in lines])).tolist() if lines else []
    return [[*line, p] for line, p in zip(lines, corrected, strict=True)]


def first(values: dict[tuple[str, int], tuple], row: str) -> tuple[str, int]:
    return next(key for key in values if key[0] == row)


def write(path: Path, columns: tuple[str, ...], lines: list[list]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *lines])


def table() -> None:
    """Mean over seeds, their spread (half of the range), and the interval of the first seed."""
    with RESULTS.open() as file:
        cells = defaultdict(list)
        for line in csv.DictReader(file):
            cells[line["row"], line["metric"].removeprefix("rerank/")].append(line)
    names = ("mAP", "P@1", "P@10", "GAP")
    print("| row | seeds | " + " | ".join(names) + " |\n|" + "---|" * (2 + len(names)))
    for row in dict.fromkeys(row for row, _ in cells):
        shown, seeds = [], 0
        for name in names:
            lines = cells.get((row, name), [])
            found = [float(line["value"]) for line in lines]
            seeds = max(seeds, len(found))
            spread = f" ± {(max(found) - min(found)) / 2:.3f}" if len(found) > 1 else ""
            ends = (
                f" [{float(lines[0]['ci_low']):.3f}, {float(lines[0]['ci_high']):.3f}]"
                if lines and lines[0]["ci_low"]
                else ""
            )
            shown.append(f"{statistics.fmean(found):.3f}{spread}{ends}" if found else "-")
        print(f"| {row} | {seeds} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["collect", root]:
            collect(Path(root))
        case ["table"]:
            table()
        case _:
            print(__doc__)
            raise SystemExit(2)
