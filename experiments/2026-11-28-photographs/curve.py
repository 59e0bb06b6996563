"""What is found against what is falsely called the same work, over the least number of inliers.

    python curve.py --known OUT --unknown OUT [OUT ...] --curve curve.csv --figure curve.png

OUT is an `out=` of `simsearch photographs`: --known one whose photographs show works of the catalog, --unknown those
whose queries have no match. Intervals are Clopper and Pearson's, of 95 %.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path

import matplotlib
import pyarrow.parquet as pq
from scipy.stats import beta

from simsearch.files import replacing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEAST, MOST = 12, 150  # inliers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", type=Path, required=True)
    parser.add_argument("--unknown", type=Path, nargs="+", required=True)
    parser.add_argument("--curve", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args()
    with (args.known / "per_query.csv").open(newline="") as file:
        known = [row for row in csv.DictReader(file) if row["work"] and float(row["rank"] or 0) == 1]
    with (args.known / "per_query.csv").open(newline="") as file:
        total = sum(bool(row["work"]) for row in csv.DictReader(file))
    right = Counter(inliers([float(row["confidence"])]) for row in known)
    false = Counter(
        inliers(scores)
        for folder in args.unknown
        for scores in pq.read_table(folder / "answers.parquet")["confidence"].to_pylist()
    )
    queries = sum(false.values())
    rows = []
    for least in range(LEAST, MOST + 1):
        found = sum(count for found, count in right.items() if found >= least)
        wrong = sum(count for found, count in false.items() if found >= least)
        low, high = interval(wrong, queries)
        rows.append((least, found / total, wrong, wrong / queries, low, high))
    with replacing(args.curve) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("inliers", "first right and found", f"false of {queries}", "rate", "low", "high"))
        writer.writerows(
            [(least, f"{found:.4f}", wrong, *(f"{x:.5f}" for x in rest)) for least, found, wrong, *rest in rows]
        )
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot([row[3] for row in rows], [row[1] for row in rows])
    axes.fill_betweenx([row[1] for row in rows], [row[4] for row in rows], [row[5] for row in rows], alpha=0.2)
    axes.set(
        xlabel=f"called the same work, of {queries} queries without a match", ylabel=f"found, of {total} photographs"
    )
    for least, found, _, rate, _, _ in rows:
        if least in (12, 15, 20, 30, 50, 100):
            axes.annotate(f"{least}", (rate, found), fontsize=7)
    figure.savefig(args.figure, dpi=130)
    for row in rows[::5]:
        print(*row)


def inliers(scores: list[float]) -> int:
    """The inliers of the best answer, 0 if it is not verified: only verified answers score above 1."""
    return int(scores[0]) if scores and scores[0] > 1 else 0


def interval(count: int, of: int) -> tuple[float, float]:
    low = beta.ppf(0.025, count, of - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, of - count) if count < of else 1.0
    return float(low), float(high)


if __name__ == "__main__":
    main()
