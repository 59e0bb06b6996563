"""Divides a collection into parts whose works search the others: queries without a match.

    python parts.py --art <art>/metadata.csv --pairs <art>/near_duplicates.csv --out parts
    simsearch index run=<run> images=parts/catalog0.csv root=<art> verify=sift out=catalog0      (1, 2, 3 likewise)
    simsearch photographs catalog=catalog0 photographs=parts/queries0.csv root=<art> k=1 out=out0

Works that share a `group_id` or a row of --pairs (columns image_a, image_b) stay together; works and, within a part,
paintings are in the order of `numpy.random.default_rng`, seed 0 and the part's number. `queriesK.csv` has the
paintings of part K, `catalogK.csv` all others. --count queries of each part are written, those --after a number.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from simsearch.files import replacing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--art", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--count", type=int, default=760)
    args = parser.parse_args()
    with args.art.open(newline="") as file:
        rows = list(csv.DictReader(file))
    works = joined({row["image_path"]: row["group_id"] for row in rows}, args.pairs)
    names = sorted(set(works.values()))
    part = dict(zip(names, np.random.default_rng(0).permutation(len(names)) % args.parts, strict=True))
    paths = list(works)
    parts = np.array([part[works[path]] for path in paths])
    args.out.mkdir(parents=True, exist_ok=True)
    for number in range(args.parts):
        drawn = np.random.default_rng(number).permutation(np.flatnonzero(parts == number))
        queries = [paths[i] for i in drawn[args.after : args.after + args.count]]
        write(args.out / f"queries{number}.csv", ("path", "work", "unit"), [(p, "", works[p]) for p in queries])
        others = [(paths[i],) for i in np.flatnonzero(parts != number)]
        write(args.out / f"catalog{number}.csv", ("path",), others)
        print(f"part {number}: {len(queries)} queries, {len(others)} paintings to search")


def joined(groups: dict[str, str], pairs: Path) -> dict[str, str]:
    """The work of each path: one name for all groups that pairs tie together."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    with pairs.open(newline="") as file:
        for row in csv.DictReader(file):
            parent[root(groups[row["image_b"]])] = root(groups[row["image_a"]])
    return {path: root(group) for path, group in groups.items()}


def write(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
