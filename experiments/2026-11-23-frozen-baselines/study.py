"""Frozen features on CIFAR-10: pooling x whitening x storage. README.md beside this file has the question.

    python study.py columns backbone=lite0 backbone.size=64      one head, all storages
    python study.py grid backbone=lite0 backbone.size=224        all heads, all storages
    python study.py grid backbone=lite0 backbone.size=224 pooling=mac storage=float,pq16    some of them
    python study.py report                                       figure.png and the tables, from results.csv

The backbone's features come from the descriptor cache, or are computed into it once. Each row of the
table is also one run of `simsearch train`: the column `command` says which. Rows that results.csv holds
already are not measured again.
"""

from __future__ import annotations

import csv
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tqdm import tqdm

from simsearch import configs, results
from simsearch.evaluation.evaluate import evaluate
from simsearch.functional.codes import pack_codes
from simsearch.functional.ranking import measure_ranking
from simsearch.functional.whitening import Moments, whitening_matrix
from simsearch.index.binarize import ITQ
from simsearch.index.faiss_index import FaissIndex
from simsearch.types import Descriptors

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
POOLINGS = ("average", "mac", "gem", "rmac")
HEADS = [None, *itertools.product((32, 64, 128, 512), (0.0, 0.5, 1.0))]
STORAGES = ("float", "itq48", "pq16", "pq64")
METRICS = ("mAP", "P@1", "P@10", "R@10", "NDCG@10", "RP", "index/recall@10", "index/latency_ms_p50")
BLOCK = 2000
TRAIN_SIZE = 20_000  # vectors that train a product quantiser


def main() -> None:
    mode, overrides = sys.argv[1], [a for a in sys.argv[2:] if not a.startswith(("pooling=", "storage="))]
    poolings, storages = restricted("pooling", POOLINGS), restricted("storage", STORAGES)
    if mode == "report":
        report()
        return
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        base = ["data=cifar10", "run_dir=unused", *overrides]
        composed = {p: compose([*base, f"pooling={p}"]) for p in POOLINGS}
    data = configs.build_data(composed["average"])
    if mode == "columns":
        poolings = ["average"]
    heads = HEADS if mode == "grid" else [None, (128, 0.0), (128, 0.5), (128, 1.0)]
    for pooling in poolings:
        measure_pooling(composed[pooling], data, pooling, heads, storages, " ".join(overrides))


def restricted(name: str, known: tuple[str, ...]) -> list[str]:
    """The values of an argument like pooling=mac,rmac, or all that are known."""
    given = next((a.partition("=")[2].split(",") for a in sys.argv[2:] if a.startswith(f"{name}=")), known)
    return [value for value in known if value in given]


def compose(overrides: list[str]) -> dict:
    values = OmegaConf.to_container(hydra.compose("train", overrides), resolve=True)
    return {str(k): v for k, v in values.items()}


def measure_pooling(config: dict, data, pooling: str, heads: list, storages: list[str], overrides: str) -> None:
    """All heads and storages over one pooling of the cached features."""
    done = {line["row"] for line in read_results()}
    network = config["backbone"].get("name", "lite0")
    prefix = f"frozen-{network}@{config['backbone']['size']}-{pooling}"
    jobs = [(h, s) for h in heads for s in storages if row_name(prefix, h, s) not in done and possible(h, s)]
    if not jobs:
        return
    model = configs.build(config["model"])
    model.cpu()
    stored, maps = model._features(data.collection, model.sizes[0])
    regions = []
    for low in tqdm(range(0, len(stored), BLOCK), desc=f"pool {prefix}"):
        features = torch.from_numpy(stored[low : low + BLOCK]).float()
        regions.append((model.head.regions(features) if maps else features).half())
    regions = torch.cat(regions)  # (N, R, C) float16
    moments = Moments.zeros(regions.shape[2])
    for rows in tqdm(data.split.train.split(BLOCK), desc="moments"):
        moments.add(regions[rows].float().flatten(0, 1))
    mean, values, vectors = moments.principal()
    width = max((h[0] for h in heads if h), default=1)
    rotated = torch.cat([((r.float() - mean.float()) @ vectors[:width].T.float()) for r in regions.split(BLOCK)])

    for head, group in itertools.groupby(jobs, key=lambda job: job[0]):
        if head is None:
            descriptors = torch.cat([F.normalize(r.float().sum(1), dim=-1) for r in regions.split(BLOCK)])
        else:
            scale = whitening_matrix(values, torch.eye(len(values), dtype=torch.float64), head[0], power=head[1])
            scale = scale.diagonal()[: head[0]].float()
            parts = [F.normalize(r[..., : head[0]] * scale, dim=-1).sum(1) for r in rotated.split(BLOCK)]
            descriptors = F.normalize(torch.cat(parts), dim=-1)
        for _, storage in group:
            measure(descriptors, data, row_name(prefix, head, storage), pooling, head, storage, overrides)


def possible(head: tuple[int, float] | None, storage: str) -> bool:
    """48 bits need 48 dimensions, 64 sub-quantisers need 64."""
    dimension = head[0] if head else 1280
    return not (storage == "itq48" and dimension < 48) and not (storage == "pq64" and dimension < 64)


def row_name(prefix: str, head: tuple[int, float] | None, storage: str) -> str:
    return f"{prefix}-{f'pca{head[0]}-w{head[1]:g}' if head else 'raw'}-{storage}"


def measure(descriptors: torch.Tensor, data, row: str, pooling: str, head, storage: str, overrides: str) -> None:
    """Measures one cell under the test protocol, and floats under the validation protocol too."""
    start = time.perf_counter()
    label = data.collection.column("class")
    task, check = data.task("test"), data.task("validate")
    bits = None
    vectors = descriptors
    if storage == "itq48":
        bits = 48
        sample = data.split.train[torch.randperm(len(data.split.train), generator=torch.Generator().manual_seed(0))]
        weight, bias = ITQ(bits, seed=0).fit(descriptors[sample[:10_000]])
        vectors = pack_codes(descriptors @ weight.T + bias)

    def part(rows: torch.Tensor) -> Descriptors:
        return Descriptors(vectors[rows].contiguous(), label[rows], rows, bits=bits)

    factory = {"float": "Flat", "itq48": "BFlat", "pq16": "PQ16", "pq64": "PQ64"}[storage]
    index = FaissIndex(factory, metric="hamming" if bits else "ip", train_size=TRAIN_SIZE)
    result = evaluate(part(task.query), part(task.gallery), index, ks=(1, 10), exclude_self=task.exclude_self)
    seconds = time.perf_counter() - start
    whitening = (
        f"model.whitening.dimension={head[0]} model.whitening.power={head[1]:g}" if head else "model.whitening=null"
    )
    chosen = {"float": "", "itq48": "model=frozen-itq"}
    chosen |= {pq: f"index={pq} index.train_size={TRAIN_SIZE}" for pq in ("pq16", "pq64")}
    command = " ".join(
        f"simsearch train data=cifar10 {overrides} pooling={pooling} {chosen[storage]} {whitening}".split()
    )
    about = {"protocol": task.name, "fingerprint": task.fingerprint}
    about |= {"metrics": result.metrics, "intervals": result.intervals}
    facts = {"row": row, "data": "cifar10", "seconds": seconds, "seed": 0, "command": command}
    lines = results.result_lines(about, METRICS, **facts)
    if storage == "float":
        values = measure_ranking(part(check.query), part(check.gallery), ks=(1,), exclude_self=check.exclude_self)
        about = {"protocol": check.name, "fingerprint": check.fingerprint, "intervals": {}}
        sizes = {"queries": len(check.query), "bytes_per_item": index.code_bytes}
        about["metrics"] = sizes | {"mAP": float(values["AP"].nanmean())}
        lines += results.result_lines(about, ["mAP"], **facts)
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([*([results.RESULT_COLUMNS] if fresh else []), *lines])
    print(
        f"{row}: mAP {result.metrics['mAP']:.4f}, P@10 {result.metrics['P@10']:.4f}, {seconds:.0f} s",
        flush=True,
    )


def read_results() -> list[dict[str, str]]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def cells(lines: list[dict[str, str]], metric: str, protocol: str) -> Iterator[tuple[str, float, int]]:
    for line in lines:
        if line["metric"] == metric and line["protocol"] == protocol:
            yield line["row"], float(line["value"]), int(line["bytes_per_item"])


def report() -> None:
    """Prints the tables of README.md in Markdown and draws quality against bytes an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_results()
    values = {row: (value, size) for row, value, size in cells(lines, "mAP", "10k-50k")}
    nets = sorted({row.split("-")[1] for row in values}, key=lambda n: (n.split("@")[0], int(n.split("@")[1])))
    for net in nets:
        poolings = [p for p in POOLINGS if any(r.startswith(f"frozen-{net}-{p}-") for r in values)]
        print(f"\n### {net}, mAP\n\n| head | " + " | ".join(f"{p} {s}" for p in poolings for s in STORAGES) + " |")
        print("|---" * (1 + len(poolings) * len(STORAGES)) + "|")
        for head in HEADS:
            names = [row_name(f"frozen-{net}-{p}", head, s) for p in poolings for s in STORAGES]
            if any(name in values for name in names):
                got = [f"{values[n][0]:.3f}".lstrip("0") if n in values else "-" for n in names]
                print(f"| {'raw' if head is None else f'{head[0]}, {head[1]:g}'} | " + " | ".join(got) + " |")

    figure, axes = plt.subplots(figsize=(8, 5))
    colours = dict(zip(POOLINGS, ("#4477aa", "#ee6677", "#228833", "#aa3377"), strict=True))
    marks = {"float": "o", "itq48": "s", "pq16": "^", "pq64": "v"}
    best_net = max(nets, key=lambda n: sum(r.startswith(f"frozen-{n}-") for r in values))
    for row, (value, size) in values.items():
        _, net, pooling, *_, storage = row.split("-")
        if net == best_net:
            axes.plot(size, value, marks[storage], color=colours[pooling], alpha=0.65, markersize=6)
    pairs = sorted((size, value) for r, (value, size) in values.items() if r.startswith(f"frozen-{best_net}-"))
    sizes = sorted({size for size, _ in pairs})
    front = np.maximum.accumulate([max(v for s, v in pairs if s == size) for size in sizes])
    axes.step(sizes, front, where="post", color="black", linewidth=1, label="best at most so many bytes")
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for name, mark in marks.items():
        axes.plot([], [], mark, color="grey", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes an image")
    axes.set_ylabel("mAP (full ranking, 10k-50k)")
    axes.set_title(f"CIFAR-10 (JPEG q75), frozen {best_net}: quality against bytes")
    axes.legend(fontsize=8, ncol=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(HERE / "figure.png", dpi=120)


if __name__ == "__main__":
    main()
