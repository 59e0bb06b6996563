"""Counts what `simsearch data ingest` joined: different works that became one, and copies that joined their work.

python count.py --pictures pictures --ingested ingested --table works.csv
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq
from scipy.stats import beta

from simsearch.files import replacing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--ingested", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    args = parser.parse_args()
    truth = read(args.pictures / "pictures.csv")
    work = {row["path"]: row["work"] for row in pq.read_table(args.ingested / "manifest.parquet").to_pylist()}
    images, doubles, works = Counter(), defaultdict(list), defaultdict(list)
    for row in truth:
        images[row["set"]] += 1
        doubles[row["set"], row["truth"]].append(row["path"])
        if row["path"] in work:
            works[work[row["path"]]].append(row)
    wrong = Counter()
    for rows in works.values():
        for one, other in combinations(rows, 2):
            if one["truth"] != other["truth"]:
                wrong[one["set"]] += 1
                print("joined:", one["path"], other["path"])
    written = []
    for kind, count in images.items():
        twice = [paths for (of, _), paths in doubles.items() if of == kind and len(paths) > 1]
        found = sum(paths[0] in work and work[paths[0]] == work.get(paths[1]) for paths in twice)
        low, high = interval(found, len(twice))
        written.append((kind, count, wrong[kind], len(twice), found, f"{low:.3f}", f"{high:.3f}"))
        print(f"{kind:>17}: {count} images, {wrong[kind]} wrong pairs; {found} of {len(twice)} copies joined")
    with replacing(args.table) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("set", "images", "wrong pairs", "copies", "joined", "low", "high"))
        writer.writerows(written)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def interval(count: int, total: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of 95 %."""
    low = beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


if __name__ == "__main__":
    main()
