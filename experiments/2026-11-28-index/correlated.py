"""Filters that have to do with the vectors: recall and cost of a built index under them, into correlated.csv.

    OMP_NUM_THREADS=1 python correlated.py items=1000000 work=<folder of scale.py> name=<what this run is called>

A filter takes the items that lie furthest along a direction: an axis of the descriptors, the first or the fourth, or a
generated item. Queries are everywhere, so that most lie far from what is chosen. `near` counts the tenth of the queries
that lie furthest along the same direction, `far` the others. Times are processor time of 200 queries in a batch, and
the median alone.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from scale import HERE, K, block, counts, recall
from vectors import load

from simsearch.index.faiss_index import FaissIndex
from simsearch.index.selection import Selection

SHARES, QUERIES = (0.003, 0.01, 0.03, 0.1, 0.3, 0.5), 200


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    items, work = int(given.get("items", 1_000_000)), Path(given["work"])
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    fit = load(HERE / "fitted" / "art.npz")
    with np.load(work / str(items) / "truth.npz", allow_pickle=False) as file:
        queries = file["queries"][:QUERIES]
    index = FaissIndex.load(work / str(items) / "auto")
    generated = block(fit, 2**21, 1)[0]
    directions = {"axis 1": fit.basis[0], "axis 4": fit.basis[3], "an item": generated}
    parts = [block(fit, number, count) for number, count in enumerate(counts(items))]
    rows = []
    for name, direction in directions.items():
        along, of_queries = np.concatenate([part @ direction for part in parts]), queries @ direction
        near = of_queries >= np.quantile(of_queries, 0.9)
        for share in SHARES:
            mask = along >= np.partition(along, -int(share * items))[-int(share * items)]
            starts = np.cumsum([0, *(len(part) for part in parts)])
            flat = np.concatenate([p[mask[s : s + len(p)]] for p, s in zip(parts, starts, strict=False)])
            truth = np.flatnonzero(mask)[faiss.knn(queries, flat, K, metric=faiss.METRIC_INNER_PRODUCT)[1]]
            among = Selection.of(torch.from_numpy(mask))
            found, cpu = timed(index, queries, among)
            alone = [timed(index, queries[n : n + 1], among) for n in range(QUERIES)]
            rows.append(
                {
                    "name": given["name"],
                    "items": items,
                    "direction": name,
                    "share": share,
                    "recall": recall(found, truth),
                    "recall_near": recall(found[near], truth[near]),
                    "recall_far": recall(found[~near], truth[~near]),
                    "cpu_ms": 1e3 * cpu / QUERIES,
                    "cpu_ms_alone": 1e3 * float(np.median([cpu for _, cpu in alone])),
                    "recall_alone": recall(np.concatenate([found for found, _ in alone]), truth),
                }
            )
            print(rows[-1], flush=True)
    path = HERE / "correlated.csv"
    if path.is_file():
        with path.open(newline="") as file:
            new = (given["name"], str(items))
            rows = [row for row in csv.DictReader(file) if (row["name"], row["items"]) != new] + rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def timed(index: FaissIndex, queries: np.ndarray, among: Selection) -> tuple[np.ndarray, float]:
    start = time.process_time()
    found = index.search(torch.from_numpy(queries), K, among).ids.numpy()
    return found, time.process_time() - start


if __name__ == "__main__":
    main()
