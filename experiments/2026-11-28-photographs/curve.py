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
    known = [row for row in read(args.known) if row["work"]]
    total = len(known)
    right = Counter(inliers(row) for row in known if row["rank"] == "1")
    false = Counter(inliers(row) for folder in args.unknown for row in read(folder) if not row["work"])
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


def read(folder: Path) -> list[dict[str, str]]:
    """The rows of each photograph."""
    with (folder / "per_query.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def inliers(row: dict[str, str]) -> int:
    """The inliers of the best answer, 0 if it is not verified: only verified answers score above 1."""
    best = float(row["confidence"] or 0)
    return int(best) if best > 1 else 0


def interval(count: int, of: int) -> tuple[float, float]:
    low = beta.ppf(0.025, count, of - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, of - count) if count < of else 1.0
    return float(low), float(high)


if __name__ == "__main__":
    main()
