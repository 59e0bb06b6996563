"""An index at 10^5, 10^6, 10^7 items: build, save, open, search, filtered search, memory. `make bench-scale`.

    OMP_NUM_THREADS=1 python scale.py items=100000 work=<folder>           all methods, into scale.csv
    ... methods=auto,usearch                                               some of them

Vectors are those of vectors.py, made block by block; queries are further rows. `auto` is index=auto with at most
160 bytes an item and a recall of .95, opened and searched as users do, by FaissIndex. The others are plain factories of
FAISS, tuned on 200 other queries: the fastest of the tried numbers of lists and candidates (powers of 2) that reaches
.95, or the one that finds most; what index=ivf-pq was (IVF256,PQ16, nprobe 16); and usearch, if it is installed
(pip install usearch; the least power of 2 of its expansion). Each is filled in this process and saved; a process of its
own opens and searches it, so that memory is its own. What is built stays in the work folder: a run that was ended goes
on, and one that is repeated only searches. Times are of one thread; `cpu` columns count processor time, which a busy
machine does not stretch.
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

from simsearch.files import read_json, replacing, write_json
from simsearch.index.auto import AutoIndex
from simsearch.index.factories import lists_for
from simsearch.index.faiss_index import FaissIndex
from simsearch.index.selection import Selection
from simsearch.search.build import fill_chosen

QUERIES, TUNING, K, WANTED, SAMPLE, PLENTY = 500, 200, 10, 0.95, 20_000, 5_000_000
FACTORS = (4, 8, 16, 32, 64)
SHARES = (0.001, 0.01, 0.1, 0.5)
QUERY_BLOCK = 2**20  # far behind the items
BUDGET = {"bytes_per_item": 160, "recall": WANTED}


def factories(items: int) -> dict[str, str]:
    lists = lists_for(items)
    ivf = f"IVF{lists}" + ("_HNSW32" if items > PLENTY else "")
    return {
        "flat": "Flat",
        "hnsw-sq8": "HNSW24_SQ8",
        "ivf-pq-refine": f"{ivf},PQ32x4fsr,Refine(SQ8)",
        "ivf-rabitq": f"{ivf},RaBitQfs4",
        "ivf256-pq16": "IVF256,PQ16",
    }


def chosen_items(items: int, share: float) -> Selection:
    """The items that a filter of this share selects."""
    return Selection(items, np.flatnonzero(np.random.default_rng(7).random(items) < share).astype(np.int32))


def counts(items: int) -> list[int]:
    return [min(BLOCK, items - start) for start in range(0, items, BLOCK)]


def truths(fit, items: int, queries: torch.Tensor) -> dict[str, np.ndarray]:
    """The exact K nearest of the queries among all items and under each filter, by one pass."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    picks = {"all": None, **{str(share): chosen_items(items, share).mask() for share in SHARES}}
    for number, count in enumerate(counts(items)):
        start = number * BLOCK
        scores = queries @ torch.from_numpy(block(fit, number, count)).T
        for name, mask in picks.items():
            here = torch.arange(count) if mask is None else mask[start : start + count].nonzero()[:, 0]
            best, places = (scores if mask is None else scores[:, here]).topk(min(K, len(here)))
            before = found.get(name, (scores[:, :0], here[:0].expand(len(queries), 0)))
            both, ids = torch.cat([before[0], best], 1), torch.cat([before[1], here[places] + start], 1)
            kept = both.argsort(dim=1, descending=True)[:, :K]
            found[name] = both.gather(1, kept), ids.gather(1, kept)
    return {name: ids.numpy() for name, (_, ids) in found.items()}


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
        for power in range(4, 10):
            index.expansion_search = 2**power
            if recall(np.atleast_2d(index.search(tuning.numpy(), K, threads=1).keys.astype(np.int64)), truth) >= WANTED:
                break
        about["effort"] = f"expansion={2**power}"
    elif method == "auto":
        auto = AutoIndex(BUDGET, sample=SAMPLE)
        filled, frontier = fill_chosen(auto, counts(items), lambda i: torch.from_numpy(block(fit, i, counts(items)[i])))
        filled.save(folder)
        about |= {"factory": filled.factory, "effort": f"{filled.nprobe}, {filled.k_factor}, {filled.ef_search}"}
        about["tried"] = len(frontier.points)
        print(*(p.described() + f" {p.nprobe} {p.k_factor} {p.items}" for p in frontier.points), sep="\n", flush=True)
    else:
        factory = factories(items)[method]
        index = faiss.index_factory(D, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            lists = lists_for(items) if "IVF256" not in factory else 256
            few = max(1, -(-39 * lists // BLOCK) + 1)
            train = np.concatenate([block(fit, n, c) for n, c in list(enumerate(counts(items)))[:few]])
            index.train(train[: max(100_000, 39 * lists)])
            del train
        for vectors in blocks():
            index.add(vectors)
        about |= {"factory": factory, "effort": tuned(index, factory, tuning.numpy(), truth)}
        faiss.write_index(index, str(folder / "index.faiss"))
    about["build_s"], about["build_cpu_s"] = time.perf_counter() - wall, time.process_time() - cpu
    about["bytes_per_item"] = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / items
    return about


def tuned(index, factory: str, queries: np.ndarray, truth: np.ndarray) -> str:
    """The fastest settings that reach the wanted recall, or those that find most."""
    if factory == "Flat":
        return ""
    if factory == "IVF256,PQ16":
        return "nprobe=16"
    best: tuple[float, float, str] = (-1.0, 0.0, "")
    for factor in FACTORS if "Refine" in factory else (0,):
        before = -1.0
        for power in range(3, 10):
            effort = f"efSearch={2**power}" if "HNSW24" in factory else f"nprobe={2**power}"
            effort += f" k_factor={factor}" * (factor > 0)
            widen(index, 2**power)
            start = time.process_time()
            found = index.search(queries, K, params=parameters(effort, None))[1]
            cpu, reached = time.process_time() - start, recall(found, truth)
            print(factory, effort, f"recall {reached:.3f}, {1e3 * cpu / len(queries):.2f} ms", flush=True)
            best = max(best, (min(reached, WANTED), -cpu, effort))
            if reached >= WANTED or reached < before + 0.002:
                break
            before = reached
    return best[2]


def widen(index, most: int) -> None:
    """Lets the graph over the centroids, if there is one, find as many lists as are visited."""
    inner = faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index
    coarse = faiss.downcast_index(inner.quantizer) if isinstance(inner, faiss.IndexIVF) else None
    if hasattr(coarse, "hnsw"):
        coarse.hnsw.efSearch = max(32, 2 * most)


def parameters(effort: str, sel):
    """Plain FAISS's search parameters of an effort such as "nprobe=16 k_factor=8"."""
    given = dict(setting.split("=") for setting in effort.split())
    chosen = {} if sel is None else {"sel": sel}
    made = faiss.SearchParameters(**chosen)
    if "nprobe" in given:
        made = faiss.SearchParametersIVF(nprobe=int(given["nprobe"]), **chosen)
    if "efSearch" in given:
        made = faiss.SearchParametersHNSW(efSearch=int(given["efSearch"]), **chosen)
    if "k_factor" in given:
        made = faiss.IndexRefineSearchParameters(k_factor=int(given["k_factor"]), base_index_params=made)
    return made


# ------------------------------------------------------------------------------------------------- searching


def resident() -> dict[str, float]:
    """MiB of this process: all, without mapped files, and their pages (the page cache's, which the kernel may drop)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {
        line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss") or "VmRSS" in line
    }
    return {"rss": values["VmRSS"], "anon": values["RssAnon"], "mapped": values["RssFile"]}


def opened(method: str, items: int, folder: Path, effort: str, mapped: bool):
    """A function (queries, k, selection or None) -> ids."""
    if method == "usearch":
        from usearch.index import Index

        index = Index.restore(str(folder / "usearch"), view=mapped)
        index.expansion_search = int(effort.partition("=")[2])

        def by_usearch(queries: np.ndarray, k: int, among: Selection | None) -> np.ndarray | None:
            if among is not None:
                return None
            return np.atleast_2d(index.search(queries, k, threads=1).keys.astype(np.int64))

        return by_usearch
    if method == "auto":
        ours = FaissIndex.load(folder, mapped=mapped)
        return lambda queries, k, among: ours.search(torch.from_numpy(queries), k, among).ids.numpy()
    plain = faiss.read_index(str(folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    if "nprobe" in effort:
        widen(plain, int(effort.split()[0].partition("=")[2]))

    def by_faiss(queries: np.ndarray, k: int, among: Selection | None) -> np.ndarray | None:
        sel = None if among is None else faiss.IDSelectorBitmap(among.bitmap)
        return plain.search(queries, k, params=parameters(effort, sel) if effort or sel else None)[1]

    return by_faiss


def searched(method: str, items: int, folder: Path, effort: str, mapped: bool) -> dict[str, object]:
    with np.load(folder.parent / "truth.npz", allow_pickle=False) as file:
        queries, truth = file["queries"], {name: file[name] for name in ("all", *map(str, SHARES))}
    before = resident()
    start = time.perf_counter()
    search = opened(method, items, folder, effort, mapped)
    row: dict[str, object] = {"open_s": time.perf_counter() - start}
    _, row["qps_first"], row["cpu_qps_first"] = timed(lambda: search(queries, K, None), len(queries))  # maps pages
    found, row["qps"], row["cpu_qps"] = timed(lambda: search(queries, K, None), len(queries))
    row["recall"] = recall(found, truth["all"])
    times = [timed(lambda n=n: search(queries[n : n + 1], K, None), 1)[1:] for n in range(200)]
    row["ms_alone"], row["cpu_ms_alone"] = (1e3 / np.median(times, axis=0)).tolist()
    row |= {f"{name}_mib": value - before[name] for name, value in resident().items()}
    for share in SHARES:
        among = chosen_items(items, share)
        found, wall, cpu = timed(lambda among=among: search(queries, K, among), len(queries))
        if found is not None:
            row |= {f"recall_{share:g}": recall(found, truth[str(share)])}
            row |= {f"qps_{share:g}": wall, f"cpu_qps_{share:g}": cpu}
    row |= {f"{name}_after_filters_mib": value - before[name] for name, value in resident().items()}
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
    tuning = made[QUERIES:]
    if not (folder / "truth.npz").is_file():
        truth = truths(fit, items, made)
        tuned_on = {"tuning_truth": truth["all"][QUERIES:]}
        found = {name: ids[:QUERIES] for name, ids in truth.items()}
        with replacing(folder / "truth.npz") as path, path.open("wb") as file:
            np.savez(file, queries=made[:QUERIES].numpy(), **tuned_on, **found)
    with np.load(folder / "truth.npz", allow_pickle=False) as file:
        truth_of_tuning = file["tuning_truth"]
    rows = []
    for method in methods:
        done = folder / method / "about.json"
        settings = (
            {"budget": BUDGET, "sample": SAMPLE} if method == "auto" else {"factory": factories(items).get(method)}
        )
        about = read_json(done) if done.is_file() else {}
        if about.pop("settings", None) != settings:
            about = built(method, items, fit, folder / method, tuning, truth_of_tuning)
            write_json(done, about | {"settings": settings})
        for mapped in (False, True):
            given_on = {"search": method, "effort": about["effort"], "items": items, "work": folder / method}
            arguments = [f"{key}={value}" for key, value in (given_on | {"mapped": int(mapped)}).items()]
            ended = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
            if ended.returncode:
                print(method, "mapped" if mapped else "", ended.stderr[-300:], flush=True)
                continue
            row = {"items": items, "method": method, "mapped": int(mapped), "busy": f"{os.getloadavg()[0]:.1f}"}
            rows.append(row | about | json.loads(ended.stdout.splitlines()[-1]))
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
