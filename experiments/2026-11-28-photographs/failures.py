"""What keeps a work in a photograph from being recognised: found works and their inliers by what the camera did.

    python failures.py --catalog CATALOG --photographs photographs.csv --measured OUT [OUT ...] --table failures.csv

OUT is an `out=` of `simsearch photographs` of that table and catalog. Each row is a third of the works by one column
of the camera, from the least to the most (equal values stay together): how many are found, the median of their inliers
(0: not found) and the rank correlation of column and inliers over all works, with its p-value by permutation.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import permutation_test, rankdata

from simsearch.files import replacing
from simsearch.search.catalog import Catalog, read_catalog

COLUMNS = ("angle", "share", "visible", "glare", "occluded", "defocus", "motion", "noise", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--measured", type=Path, nargs="+", required=True)
    parser.add_argument("--table", type=Path, required=True)
    args = parser.parse_args()
    with args.photographs.open(newline="") as file:
        works = [row for row in csv.DictReader(file) if row["work"]]
    catalog = read_catalog(args.catalog, calibrated=False)
    written = []
    for folder in args.measured:
        inliers = found(folder, works, catalog)
        print(f"\n{folder.name}: {(inliers > 0).sum()} of {len(works)} works found")
        for name in COLUMNS:
            values = np.array([float(row[name]) for row in works])
            rho, p = spearman(values, inliers)
            for low, high, among in thirds(values):
                share, median = (inliers[among] > 0).mean(), np.median(inliers[among])
                row = (folder.name, name, f"{low:g}", f"{high:g}", among.sum(), f"{share:.4f}", f"{median:g}")
                written.append((*row, f"{rho:.3f}", f"{p:.4f}"))
                print(f"{name:>9} {low:6g} to {high:6g}: {among.sum():4d} works, found {share:.3f}, inliers {median:g}")
            print(f"{'':>9} rank correlation with inliers {rho:+.2f}, p {p:.4f}")
        for row, count in zip(works, inliers, strict=True):
            if count == 0:
                print("not found:", row["path"], *(f"{name}={row[name]}" for name in COLUMNS), f"works={row['works']}")
    with replacing(args.table) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("search", "column", "from", "to", "works", "found", "median inliers", "rank correlation", "p"))
        writer.writerows(written)


def found(folder: Path, works: list[dict[str, str]], catalog: Catalog) -> np.ndarray:
    """The inliers of each work's match in its photograph, 0 if the search does not call it the same work."""
    answers = {row["path"]: row for row in pq.read_table(folder / "answers.parquet").to_pylist()}
    counts = []
    for row in works:
        answer, own = answers[row["path"]], catalog.position(row["work"])
        listed = zip(answer["items"], answer["confidence"], answer["accepted"], strict=True)
        accepted = [confidence for item, confidence, yes in listed if yes and catalog.position(item) == own]
        counts.append(max(accepted, default=0))
    return np.array(counts)


def thirds(values: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """Smallest and largest value and the mask of each third by value. Equal values are not divided."""
    cuts = np.unique(np.quantile(values, (1 / 3, 2 / 3)))
    parts = np.searchsorted(cuts, values)
    return [(values[parts == n].min(), values[parts == n].max(), parts == n) for n in np.unique(parts)]


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    ranks = rankdata(y)

    def correlation(a: np.ndarray) -> float:
        return float(np.corrcoef(a, ranks)[0, 1])

    test = permutation_test(
        (rankdata(x),), correlation, permutation_type="pairings", n_resamples=9_999, rng=np.random.default_rng(0)
    )
    return float(test.statistic), float(test.pvalue)


if __name__ == "__main__":
    main()
