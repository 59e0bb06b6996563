"""Measurements of this study beyond simsearch's commands: codes of a run on both devices, images a second.

python measure.py evaluation --run <run directory> --out evaluation.json
python measure.py throughput --out throughput.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simsearch import configs, saved_run
from simsearch.metrics.retrieval import RetrievalMetrics
from simsearch.models.backbones import lite0_backbone, torchvision_backbone

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SOME = {"query": 1000, "gallery": 4000}  # images that the CPU describes too, which takes it minutes for all


def evaluation(folder: Path, save: Callable[[dict[str, Any]], None]) -> None:
    """Codes of some of the test's images by this machine's accelerator and by its CPU, and what they rank; then all."""
    run = saved_run.open_run(folder, trusted=True)
    model = saved_run.load_model(run)
    data = configs.build_data(run.config)
    task = data.task("test")  # type: ignore[attr-defined]
    collection = data.collection  # type: ignore[attr-defined]
    whole = {"query": task.query, "gallery": task.gallery}
    some = {part: places[: SOME[part]] for part, places in whole.items()}

    def describe(device: str, rows: dict[str, Tensor] = some) -> tuple[dict[str, Tensor], float]:
        model.to(device)
        begun = time.perf_counter()
        with torch.inference_mode():
            found = {
                part: torch.cat([model.embed(collection.images[few].to(device)).cpu() for few in places.split(1000)])
                for part, places in rows.items()
            }
        return found, time.perf_counter() - begun

    def rank(
        vectors: dict[str, Tensor], device: str, rows: dict[str, Tensor] = some
    ) -> tuple[dict[str, Tensor], float]:
        """Metrics of each query of descriptors that lie on a device: it packs their codes, and the CPU ranks them."""
        metrics = RetrievalMetrics((1, 10), model.bits, task.exclude_self).to(device)
        begun = time.perf_counter()
        for part, places in rows.items():
            label = collection.column(task.attribute)[places]
            metrics.update(part, vectors[part].to(device), label.to(device), places.to(device))  # type: ignore[arg-type]
        return metrics.per_query(), time.perf_counter() - begun

    report: dict[str, Any] = {"run": folder.name, "protocol": task.name, "device": DEVICE, "torch": torch.__version__}
    reference, seconds = describe("cpu")
    ranked, ranking = rank(reference, "cpu")
    report["cpu"] = {"mAP": float(ranked["AP"].nanmean()), "describe_s": seconds, "rank_s": ranking}
    same, ranking = rank(reference, DEVICE)
    equal = all(torch.equal(same[name].nan_to_num(-1), ranked[name].nan_to_num(-1)) for name in ranked)
    report["equal ranks and counts from equal codes on the device"] = equal
    report["rank_s of codes on the device"] = ranking
    save(report)
    for name, tf32 in (("float32", False), ("tf32", True)):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        describe(DEVICE)  # warms up
        own, seconds = describe(DEVICE)
        mine, _ = rank(own, DEVICE)
        codes = {part: (own[part] > 0) != (reference[part] > 0) for part in some}
        report[name] = {
            "mAP": float(mine["AP"].nanmean()),
            "describe_s": seconds,
            "largest difference of a real-valued code": max(float((own[p] - reference[p]).abs().max()) for p in some),
            "bits that differ": sum(int(c.sum()) for c in codes.values()),
            "of bits": sum(c.numel() for c in codes.values()),
            "queries with another AP": int(((mine["AP"] - ranked["AP"]).abs() > 1e-12).sum()),
            "largest difference of an AP": float((mine["AP"] - ranked["AP"]).abs().nan_to_num(0).max()),
        }
        save(report)
    own, seconds = describe(DEVICE, whole)
    mine, ranking = rank(own, DEVICE, whole)
    report["all images"] = {"mAP": float(mine["AP"].nanmean()), "describe_s": seconds, "rank_s": ranking}
    save(report)


def images_per_second(step: Callable[[], Any], images: int, seconds: float) -> float:
    """Images a second of a step that takes `images`, after three to warm up."""

    def wait() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    begun, count = time.perf_counter(), 0
    while (now := time.perf_counter() - begun) < seconds or count < 3:
        step()
        count += 1
        if count % 4 == 0:
            wait()
    wait()
    now = time.perf_counter() - begun
    return count * images / now


def throughput(small: bool, save: Callable[[dict[str, Any]], None]) -> None:
    """Images a second through a backbone without and with gradients, images on the device already."""
    seconds, batch, size = (0.1, 2, 64) if small else (2.0, 256, 224)
    makers: dict[str, Callable[[], nn.Module]] = {
        "lite0": lambda: lite0_backbone("random", size, "torch"),
        "resnet50": lambda: torchvision_backbone("resnet18" if small else "resnet50", "random", size, "torch"),
    }
    report: dict[str, Any] = {"device": DEVICE, "size": size, "batch": batch}
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=DEVICE)
    labels = torch.arange(batch, device=DEVICE) % max(batch // 4, 1)
    for name, make in makers.items():
        for precision, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16))[: 1 if small else 2]:
            network = make().to(DEVICE).eval()
            network.requires_grad_(False)

            def extract(network: nn.Module = network, kind: torch.dtype = kind) -> None:
                with torch.inference_mode(), torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
                    network(images).mean((2, 3))

            report[f"{name} extract {precision}"] = images_per_second(extract, batch, seconds)
            network.train().requires_grad_(True)
            optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-6)

            def train(network: nn.Module = network, kind: torch.dtype = kind, optimizer: Any = optimizer) -> None:
                with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
                    scores = network(images).mean((2, 3))
                nn.functional.cross_entropy(scores.float(), labels).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            report[f"{name} train {precision}"] = images_per_second(train, batch, seconds)
            if DEVICE == "cuda":
                report[f"{name} {precision} peak GB"] = torch.cuda.max_memory_allocated() / 1e9
                torch.cuda.reset_peak_memory_stats()
            save(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("evaluation", "throughput"))
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()

    def save(report: dict[str, Any]) -> None:
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    if given.what == "evaluation":
        evaluation(given.run, save)
    else:
        throughput(given.small, save)
