"""An index at 10^5, 10^6, 10^7 items: build, save, open, search, filtered search, memory. `make bench-scale`.

    OMP_NUM_THREADS=1 python scale.py items=100000 work=<folder>           all methods, into scale.csv
    ... methods=auto,usearch                                               some of them

Vectors are those of vectors.py, made block by block; queries are further rows. `auto` is index=auto with at most
160 bytes an item and a recall of .95; the others are plain FAISS factory strings (f: their search effort is the least
power of 2 that reaches .95 on 200 other queries, or the largest tried), what index=ivf-pq was (IVF256,PQ16, nprobe 16),
and usearch, if it is installed (pip install usearch). Each is filled in this process and saved; a process of its own
opens and searches it, so that memory is its own. Times are of one thread's wall clock; `cpu` columns count processor
time, which a busy machine does not stretch.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import torch
from vectors import BLOCK, HERE, D, block, load

from simsearch.index.auto import AutoIndex, exact
from simsearch.index.factories import lists_for
from simsearch.index.faiss_index import FaissIndex
from simsearch.index.selection import Selection
from simsearch.search.build import fill_chosen

QUERIES, TUNING, K, WANTED, SAMPLE = 500, 200, 10, 0.95, 20_000
SHARES = (0.001, 0.01, 0.1, 0.5)
QUERY_BLOCK = 2**20  # far behind the items
BUDGET = {"bytes_per_item": 160, "recall": WANTED}


def factories(items: int) -> dict[str, str]:
    lists = lists_for(items)
    return {
        "flat": "Flat",
        "hnsw-sq8": "HNSW24_SQ8",
        "ivf-pq-refine": f"IVF{lists},PQ32x4fsr,Refine(SQ8)",
        "ivf-rabitq": f"IVF{lists},RaBitQfs4",
        "ivf256-pq16": "IVF256,PQ16",
    }


def chosen_items(items: int, share: float) -> Selection:
    """The items that a filter of this share selects."""
    return Selection(items, np.flatnonzero(np.random.default_rng(7).random(items) < share).astype(np.int32))


def counts(items: int) -> list[int]:
    return [min(BLOCK, items - start) for start in range(0, items, BLOCK)]


def truths(fit, items: int, queries: torch.Tensor) -> dict[str, np.ndarray]:
    """The exact K nearest of the queries among all items and under each filter, by one pass."""
    found = {"all": [], **{str(share): [] for share in SHARES}}
    picks = {str(share): chosen_items(items, share).mask() for share in SHARES}
    for number, count in enumerate(counts(items)):
        vectors = torch.from_numpy(block(fit, number, count))
        for name, kept in found.items():
            start = number * BLOCK
            here = torch.arange(count) if name == "all" else picks[name][start : start + count].nonzero()[:, 0]
            if len(here):
                best = exact(queries, [vectors[here]], min(K, len(here)), "ip")
                kept.append((here[best.ids] + start, best.scores))
    merged = {}
    for name, kept in found.items():
        ids, scores = (torch.cat(part, dim=1) for part in zip(*kept, strict=True))
        merged[name] = ids.gather(1, scores.argsort(dim=1, descending=True)[:, :K]).numpy()
    return merged


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float((truth[:, :, None] == found[:, None, :]).any(2).mean())


# ------------------------------------------------------------------------------------------------- building


def built(method: str, items: int, fit, folder: Path, tuning: torch.Tensor, truth: np.ndarray) -> dict[str, object]:
    """Fills and saves an index. Returns what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    wall, cpu = time.perf_counter(), time.process_time()

    def blocks() -> Iterator[np.ndarray]:
        return (block(fit, number, count) for number, count in enumerate(counts(items)))

    about: dict[str, object] = {"effort": ""}
    if method == "usearch":
        from usearch.index import Index

        index = Index(ndim=D, metric="ip", dtype="i8", connectivity=24)
        for number, vectors in enumerate(blocks()):
            index.add(np.arange(len(vectors)) + number * BLOCK, vectors, threads=1)
        index.save(str(folder / "usearch"))
        about["factory"] = "usearch i8, connectivity 24"
    elif method == "auto":
        auto = AutoIndex(BUDGET, sample=SAMPLE)
        filled, frontier = fill_chosen(auto, counts(items), lambda i: torch.from_numpy(block(fit, i, counts(items)[i])))
        filled.save(folder)
        about |= {"factory": filled.factory, "effort": f"{filled.nprobe}, {filled.k_factor}, {filled.ef_search}"}
        about["tried"] = len(frontier.points)
    else:
        factory = factories(items)[method]
        index = faiss.index_factory(D, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            lists = lists_for(items) if "IVF256" not in factory else 256
            few = max(1, -(-39 * lists // BLOCK) + 1)
            train = np.concatenate([block(fit, n, c) for n, c in list(enumerate(counts(items)))[:few]])
            index.train(train[: max(100_000, 39 * lists)])
        for vectors in blocks():
            index.add(vectors)
        about |= {"factory": factory, "effort": tuned(index, factory, tuning.numpy(), truth)}
        faiss.write_index(index, str(folder / "index.faiss"))
    about["build_s"], about["build_cpu_s"] = time.perf_counter() - wall, time.process_time() - cpu
    about["bytes_per_item"] = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / items
    return about


def tuned(index, factory: str, queries: np.ndarray, truth: np.ndarray) -> str:
    space = faiss.ParameterSpace()
    if factory == "Flat":
        return ""
    if factory == "IVF256,PQ16":
        space.set_index_parameter(index, "nprobe", 16)
        return "nprobe=16"
    if "Refine" in factory:
        space.set_index_parameter(index, "k_factor_rf", 8)
    name = "efSearch" if "HNSW" in factory else "nprobe"
    for power in range(4, 10):
        space.set_index_parameter(index, name, 2**power)
        if recall(index.search(queries, K)[1], truth) >= WANTED:
            break
    return f"{name}={2**power}"


# ------------------------------------------------------------------------------------------------- searching


def resident() -> dict[str, float]:
    """MiB of this process: all, and without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {
        line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss") or "VmRSS" in line
    }
    return {"rss": values["VmRSS"], "anon": values["RssAnon"]}


def opened(method: str, items: int, folder: Path, effort: str, mapped: bool):
    """A function (queries, k, selection or None) -> ids."""
    if method == "usearch":
        from usearch.index import Index

        index = Index.restore(str(folder / "usearch"), view=mapped)

        def by_usearch(queries: np.ndarray, k: int, among: Selection | None) -> np.ndarray | None:
            if among is not None:
                return None
            return np.atleast_2d(index.search(queries, k, threads=1).keys.astype(np.int64))

        return by_usearch
    if method == "auto" and not mapped:
        ours = FaissIndex.load(folder)
        return lambda queries, k, among: ours.search(torch.from_numpy(queries), k, among).ids.numpy()
    flags = faiss.IO_FLAG_MMAP_IFC if mapped else 0
    plain = faiss.read_index(str(folder / "index.faiss"), flags)
    name, _, value = effort.partition("=")
    if method == "auto":
        settings = json.loads((folder / "index.json").read_text())
        for key, number in (("nprobe", settings["nprobe"]), ("k_factor_rf", settings["k_factor"])):
            if number:
                faiss.ParameterSpace().set_index_parameter(plain, key, number)
    elif value:
        faiss.ParameterSpace().set_index_parameter(plain, name, int(value))
        if isinstance(plain, faiss.IndexRefine):
            plain.k_factor = 8

    def by_faiss(queries: np.ndarray, k: int, among: Selection | None) -> np.ndarray | None:
        if among is None:
            return plain.search(queries, k)[1]
        sel = faiss.IDSelectorBitmap(among.bitmap)
        parameters = faiss.SearchParameters(sel=sel)
        if "nprobe" in effort:
            parameters = faiss.SearchParametersIVF(sel=sel, nprobe=int(value))
        if "efSearch" in effort:
            parameters = faiss.SearchParametersHNSW(sel=sel, efSearch=int(value))
        if isinstance(plain, faiss.IndexRefine):
            parameters = faiss.IndexRefineSearchParameters(k_factor=8, base_index_params=parameters)
        return plain.search(queries, k, params=parameters)[1]

    return by_faiss


def searched(method: str, items: int, folder: Path, effort: str, mapped: bool) -> dict[str, object]:
    with np.load(folder.parent / "truth.npz", allow_pickle=False) as file:
        queries, truth = file["queries"], {name: file[name] for name in ("all", *map(str, SHARES))}
    before = resident()
    start = time.perf_counter()
    search = opened(method, items, folder, effort, mapped)
    row: dict[str, object] = {"open_s": time.perf_counter() - start}
    found, row["qps"], row["cpu_qps"] = timed(lambda: search(queries, K, None), len(queries))
    row["recall"] = recall(found, truth["all"])
    alone = []
    for number in range(100):
        clock = time.process_time()
        search(queries[number : number + 1], K, None)
        alone.append(1e3 * (time.process_time() - clock))
    row["cpu_ms_alone"] = float(np.median(alone))
    row |= {f"{name}_mib": value - before[name] for name, value in resident().items()}
    for share in SHARES:
        among = chosen_items(items, share)
        found, _, cpu = timed(lambda among=among: search(queries[:100], K, among), 100)
        if found is not None:
            row |= {f"recall_{share:g}": recall(found, truth[str(share)][:100]), f"cpu_qps_{share:g}": cpu}
    return row


def timed(work, count: int):
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, count / (time.perf_counter() - wall), count / max(1e-9, time.process_time() - cpu)


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    items, work = int(given.get("items", 100_000)), Path(given.get("work", "/tmp/bench-scale"))
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.set_num_threads(1)
    if "search" in given:
        print(json.dumps(searched(given["search"], items, work, given["effort"], given["mapped"] == "1")))
        return
    fit = load(HERE / "fitted" / f"{given.get('fit', 'art')}.npz")
    methods = given.get("methods", ",".join(["auto", *factories(items), "usearch"])).split(",")
    folder = work / str(items)
    folder.mkdir(parents=True, exist_ok=True)
    made = torch.from_numpy(block(fit, QUERY_BLOCK, QUERIES + TUNING))
    queries, tuning = made[:QUERIES], made[QUERIES:]
    truth = truths(fit, items, made)
    np.savez(folder / "truth.npz", queries=queries.numpy(), **{name: ids[:QUERIES] for name, ids in truth.items()})
    rows = []
    for method in methods:
        about = built(method, items, fit, folder / method, tuning, truth["all"][QUERIES:])
        for mapped in (False, True):
            given_on = {"search": method, "effort": about["effort"], "items": items, "work": folder / method}
            arguments = [f"{key}={value}" for key, value in (given_on | {"mapped": int(mapped)}).items()]
            done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                print(method, "mapped" if mapped else "", done.stderr[-300:], flush=True)
                continue
            row = {"items": items, "method": method, "mapped": int(mapped), "busy": f"{os.getloadavg()[0]:.1f}"}
            rows.append(row | about | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
        write(rows, Path(given.get("out", HERE / "scale.csv")))


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Adds the rows to those of other numbers of items and other methods."""
    if path.is_file():
        with path.open(newline="") as file:
            new = {(str(row["items"]), row["method"]) for row in rows}
            rows = [row for row in csv.DictReader(file) if (row["items"], row["method"]) not in new] + rows
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
