"""How the chosen index grows with the number of items, and what a billion would take: growth.csv and growth.png.

    OMP_NUM_THREADS=1 python growth.py costs work=<folder of scale.py>    measures searches, into costs.csv
    python growth.py                                                      from costs.csv and scale.csv

A power law through two sizes foretold nothing at the third, so each quantity is a sum of parts whose counts are known:

- a query in a batch: comparisons with the lists' centres, codes in the visited lists, candidates that are refined, each
  of which costs more with each decade of items, since its code lies further from the processor, and a constant;
- building: the same products for the training of the centres (10 turns over 39 items a list) and for the assignment of
  all items, at a rate of BLAS that is measured here; the rest grows with the items; choosing costs a constant;
- bytes of the file and of memory: so many for each item.

What the parts cost is fitted to the two smaller sizes. The largest is the check: `error` is the share by which it
differs. A billion is the same sum, as far as the model goes.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import faiss
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from vectors import HERE, D

from simsearch.index.factories import lists_for
from simsearch.index.faiss_index import FaissIndex

PROBES, FACTORS, K, FAR = (1, 4, 16, 64), (4, 16, 64, 128), 10, 1_000_000_000
FAR_PROBES, FAR_FACTOR = 8, 512  # of a billion, if candidates go on to double from size to size
TURNS, PER_LIST = 10, 39
PARTS = ("centres", "codes", "candidates", "candidates, by decades above 10^5", "constant")


def counts(items: float, lists: float, nprobe: float, factor: float) -> np.ndarray:
    """How much of each part a query in a batch costs, float64 (5,)."""
    visited = nprobe * items / lists
    refined = min(factor * K, visited)
    return np.array([lists, visited, refined, refined * np.log10(items / 1e5), 1.0])


def costs(work: Path) -> None:
    rows = []
    for folder in sorted((f for f in work.iterdir() if (f / "auto/index.json").is_file()), key=lambda f: int(f.name)):
        index = FaissIndex.load(folder / "auto", mapped=True)
        with np.load(folder / "truth.npz", allow_pickle=False) as file:
            queries = torch.from_numpy(file["queries"])
        lists = int(index.factory.partition("IVF")[2].partition(",")[0])
        for nprobe in PROBES:
            for factor in FACTORS:
                index.tune(nprobe=nprobe, k_factor=factor)
                index.search(queries, K)  # brings its pages into memory
                times = []
                for _ in range(3):
                    start = time.process_time()
                    index.search(queries, K)
                    times.append(1e3 * (time.process_time() - start) / len(queries))
                rows.append([len(index), lists, nprobe, factor, min(times)])
                print(*rows[-1], flush=True)
    with (HERE / "costs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["items", "lists", "nprobe", "k_factor", "cpu_ms"])
        writer.writerows([*row[:4], f"{row[4]:.4g}"] for row in rows)


def blas_rate() -> float:
    """Multiplications a second of a product of float32 matrices as large as those of an assignment, one thread."""
    torch.set_num_threads(1)
    a, b = torch.randn(4096, D), torch.randn(1024, D)
    rates = []
    for _ in range(20):
        start = time.process_time()
        a @ b.T
        rates.append(a.shape[0] * b.shape[0] * D / (time.process_time() - start))
    return max(rates)


def products(items: float) -> float:
    """Multiplications of training the centres and of the assignment."""
    lists = lists_for(int(items))
    return D * lists * (items + TURNS * PER_LIST * lists)


def fitted(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Costs of the parts, not negative, with the least relative errors."""
    from scipy.optimize import nnls

    return nnls(rows / values[:, None], np.ones(len(values)))[0]


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if "costs" in sys.argv[1:]:
        faiss.omp_set_num_threads(1)
        costs(Path(given["work"]))
        return
    with (HERE / "costs.csv").open(newline="") as file:
        measured = np.array([[float(v) for v in row.values()] for row in csv.DictReader(file)])
    with (HERE / "scale.csv").open(newline="") as file:
        scale = {(int(r["items"]), r["mapped"]): r for r in csv.DictReader(file) if r["method"] == "auto"}
    sizes = sorted({items for items, _ in scale})
    last = sizes[-1]
    table: list[dict[str, object]] = []
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2))

    rows = np.stack([counts(*row[:4]) for row in measured])
    known = measured[:, 0] < last
    parts = fitted(rows[known], measured[known, 4])
    model = rows @ parts
    errors = model[~known] / measured[~known, 4] - 1
    axes[0].loglog(measured[known, 4], model[known], "o", color="C0", label="fitted")
    axes[0].loglog(measured[~known, 4], model[~known], "s", color="C3", label=f"check, {last:.0e}")
    span = [measured[:, 4].min(), measured[:, 4].max()]
    axes[0].loglog(span, span, ":", color="grey")
    axes[0].set(xlabel="measured", ylabel="model", title="cpu ms of a query in a batch")
    axes[0].legend(fontsize=7)
    far = counts(FAR, lists_for(FAR), FAR_PROBES, FAR_FACTOR) * parts
    table.append(
        {"quantity": "cpu ms of a query in a batch", "error": f"median {np.median(errors):+.2f}, worst "
         f"{max(errors, key=abs):+.2f} of {len(errors)} settings", f"model_{FAR:.0e}": float(far.sum())}
    )  # fmt: skip
    for name, cost, share in zip(PARTS, parts, far, strict=True):
        table.append({"quantity": f"  of it {name}", "ns_each": 1e6 * float(cost), f"model_{FAR:.0e}": float(share)})

    rate = blas_rate()
    build = {n: float(scale[n, "1"]["build_cpu_s"]) for n in sizes}
    rest = {n: build[n] - products(n) / rate for n in sizes}
    each = (rest[sizes[1]] - rest[sizes[0]]) / (sizes[1] - sizes[0])
    quantities = {
        "cpu seconds to build": (
            build,
            lambda n: products(n) / rate + rest[sizes[0]] + each * (n - sizes[0]),
        )
    }
    for title, column, factor in (("bytes of the file", "bytes_per_item", None), ("MiB in memory", "anon_mib", 1)):
        values = {n: float(scale[n, "1"][column]) * (factor or n) for n in sizes}
        slope = values[sizes[1]] / sizes[1]
        quantities[title] = values, lambda n, slope=slope: slope * n
    for axis, (title, (values, foretold)) in zip(axes[1:], quantities.items(), strict=True):
        row: dict[str, object] = {"quantity": title} | {f"{n:.0e}": values[n] for n in sizes}
        row |= {f"expected_{last:.0e}": foretold(last), "error": f"{foretold(last) / values[last] - 1:+.2f}"}
        table.append(row | {f"model_{FAR:.0e}": foretold(FAR)})
        axis.loglog(reach := np.geomspace(sizes[0], FAR), [foretold(n) for n in reach], ":", color="grey")
        axis.loglog(sizes[:-1], [values[n] for n in sizes[:-1]], "o", color="C0")
        axis.loglog(last, values[last], "s", color="C3")
        axis.set(title=title, xlabel="items")
    figure.tight_layout()
    figure.savefig(HERE / "growth.png", dpi=110)
    table.append({"quantity": "BLAS, multiplications a second", "ns_each": 1e9 / rate})
    with (HERE / "growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in table for k in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in table)
    print(*table, sep="\n")


if __name__ == "__main__":
    main()
