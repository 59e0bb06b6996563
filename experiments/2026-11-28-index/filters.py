"""Milliseconds of processor time of a filtered search, by the share that the filter selects: the least of 50 queries.

    OMP_NUM_THREADS=1 python experiments/2026-11-28-index/filters.py items=100000 out=filters.csv

Each attribute has values of one share; each query asks for another value, so that no filter is remembered. Vectors are
unit vectors around 500 centres. The index is the first argument of FaissIndex. `before` in filters.csv is the same
script on the commit before the inverted lists.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import pyarrow as pa
import torch
import torch.nn.functional as F

from simsearch.index.faiss_index import FaissIndex
from simsearch.search.filters import Attributes, Condition

SHARES = (0.001, 0.01, 0.1, 0.5)
INDEXES = {"Flat": {}, "IVF1024,SQ8": {"nprobe": 32}}
D, K, QUERIES = 128, 10, 50


def main(items: int, out: Path, state: str) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(500, D, generator=generator)
    which = torch.randint(500, (items,), generator=generator)
    vectors = F.normalize(centres[which] + torch.randn(items, D, generator=generator), dim=1)
    values = {f"{share:g}": torch.randint(round(1 / share), (items,), generator=generator) for share in SHARES}
    attributes = Attributes(
        pa.table({name: pa.array(value.numpy()).cast(pa.string()) for name, value in values.items()})
    )
    queries = vectors[torch.randint(items, (QUERIES,), generator=generator)]
    rows = []
    for name, settings in INDEXES.items():
        index = FaissIndex(name, **settings)
        index.train(vectors[:100_000])
        index.add(vectors)
        for share in SHARES:
            start = time.process_time()
            column = attributes.column(f"{share:g}")
            attributes.select([Condition(f"{share:g}", (column.values[0],))])
            first = time.process_time() - start
            filtering, searching = [], []
            for number in range(QUERIES):
                condition = Condition(f"{share:g}", (column.values[number % len(column.values)],))
                forget(attributes)
                start = time.process_time()
                among = choose(attributes, [condition])
                filtered = time.process_time()
                index.search(queries[number : number + 1], K, among)
                searched = time.process_time()
                filtering.append(filtered - start)
                searching.append(searched - filtered)
            both = [sum(pair) for pair in zip(filtering, searching, strict=True)]
            times = [1e3 * min(values) for values in (filtering, searching, both)]
            rows.append([state, items, name, share, *(f"{value:.4g}" for value in times), f"{1e3 * first:.4g}"])
            print(*rows[-1], flush=True)
    new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["state", "items", "index", "share", "filter_ms", "search_ms", "both_ms", "first_ms"])
        writer.writerows(rows)


def choose(attributes: Attributes, conditions: list[Condition]):
    return attributes.selection(conditions)


def forget(attributes: Attributes) -> None:
    attributes._selections.clear()


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(int(given.get("items", 100_000)), Path(given.get("out", "filters.csv")), given.get("state", "after"))
