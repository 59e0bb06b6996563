"""Speed beside the usual ways, in one run on this machine: `make bench`. Writes bench.csv.

    python bench.py            all
    python bench.py hamming    only those whose name holds the word

A ratio is how many times the usual way takes; `floor` is the work that no way of doing it can leave out.
Trainings are in images a second: their floor is a bare loop over tensors in memory, the usual way the
same loop over a DataLoader of per-image transforms.
Run it on an idle machine: two threads on busy cores wait for each other.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from simsearch.callbacks.training import StepSeed, Throughput
from simsearch.data.collection import Collection
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.data.protocols import OfficialSplit
from simsearch.data.rendered.paint import paint_work, photograph
from simsearch.data.samplers import ShuffledBatches
from simsearch.data.transforms import RandomCropFlip
from simsearch.files import replacing
from simsearch.functional.codes import code_words, pack_codes
from simsearch.functional.ranking import measure_ranking
from simsearch.losses.dsh import DSHLoss
from simsearch.losses.greedyhash import GreedyHashLoss
from simsearch.losses.triplet import BatchHardTripletLoss
from simsearch.models.backbones import lite0_backbone
from simsearch.models.dir import RegionNetwork
from simsearch.models.dsh import DSHNetwork
from simsearch.models.hashing import HashNetwork
from simsearch.models.pooling import RMAC, Average
from simsearch.models.trained import TrainedRetriever
from simsearch.search.verification import Verification
from simsearch.types import Descriptors

HEADER = ("bench", "ours", "peer", "peer_name", "ratio", "floor", "unit", "machine")
Q, G, BITS, D = 10_000, 50_000, 48, 128


def main() -> None:
    wanted = sys.argv[1:]
    rows = []
    if wanted == ["--hamming-json"]:
        print(json.dumps(hamming()))
        return
    benches = (hamming, hamming_plain_sort, cosine, index_ranking, extraction, preprocessing, verification)
    for bench in (*benches, training_dsh, training_hashing, training_dir):
        if not wanted or any(word in bench.__name__ for word in wanted):
            row = bench()
            rows.append(row)
            name, ours, peer, peer_name, ratio, floor, unit = row
            print(f"{name}: ours {ours:.3g} {unit}, {peer_name} {peer:.3g} {unit}: {ratio:.1f} times", flush=True)
            print(f"    floor {floor:.3g} {unit}, {min(ours, floor) / max(ours, floor):.0%} of it", flush=True)
    written = Path(__file__).parent / "bench.csv"
    with written.open(newline="") as file:
        kept = [row for row in list(csv.reader(file))[1:] if row[0] not in {row[0] for row in rows}]
    with replacing(written) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(kept)
        writer.writerows([*(f"{v:.4g}" if isinstance(v, float) else v for v in row), machine()] for row in rows)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{model}; {torch.get_num_threads()} threads; torch {torch.__version__}; numpy {np.__version__}"


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median time of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def hamming() -> tuple:
    """Full-ranking mAP of Hamming distances, all metrics of measure_ranking that belong to AP included."""
    rng = torch.Generator().manual_seed(0)
    query_real, gallery_real = torch.randn(Q, BITS, generator=rng), torch.randn(G, BITS, generator=rng)
    query_label, gallery_label = torch.randint(10, (Q,), generator=rng), torch.randint(10, (G,), generator=rng)
    query = Descriptors(pack_codes(query_real), query_label, torch.arange(Q) + G, bits=BITS)
    gallery = Descriptors(pack_codes(gallery_real), gallery_label, torch.arange(G), bits=BITS)

    def ours() -> torch.Tensor:
        return measure_ranking(query, gallery, ks=())["AP"]

    def usual() -> np.ndarray:
        one_hot_q, one_hot_g = np.eye(10)[query_label], np.eye(10)[gallery_label]
        signs_q, signs_g = np.sign(query_real.numpy()), np.sign(gallery_real.numpy())
        values = np.zeros(Q)
        for i in range(Q):
            relevant = one_hot_q[i] @ one_hot_g.T > 0
            distance = 0.5 * (BITS - signs_q[i] @ signs_g.T)
            relevant = relevant[np.argsort(distance)]
            ranks = np.flatnonzero(relevant) + 1
            values[i] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
        return values

    def floor() -> None:
        words, stored = code_words(query.vectors)[:, 0], code_words(gallery.vectors)[:, 0]
        xor, count = np.empty_like(stored), np.empty(G, np.uint8)
        for word in words:
            np.bitwise_xor(stored, word, out=xor)
            np.bitwise_count(xor, out=count)

    expected = ours()
    start = time.perf_counter()
    got = usual()
    peer = time.perf_counter() - start
    # The loop breaks ties as argsort happens to: its mean is near the expectation, not equal.
    assert abs(expected.mean().item() - got.mean()) < 1e-3
    mine = seconds(ours, 5)
    return (f"hamming-map-{Q}x{G}-{BITS}bit", mine, peer, "argsort loop", peer / mine, seconds(floor, 3), "s")


def hamming_plain_sort() -> tuple:
    """The same with NumPy's AVX2 and AVX-512 kernels off for both sides, as on processors that lack them."""
    settings = os.environ | {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL"}
    command = [sys.executable, __file__, "--hamming-json"]
    out = subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout
    name, *rest = json.loads(out.splitlines()[-1])
    return (f"{name}-plain-numpy", *rest)


def cosine() -> tuple:
    """Full-ranking mAP of cosines in 128 dimensions."""
    query, gallery = _vectors()

    def ours() -> torch.Tensor:
        return measure_ranking(query, gallery, ks=())["AP"]

    def usual() -> np.ndarray:
        q, g = query.vectors.numpy(), gallery.vectors.numpy()
        labels = gallery.label.numpy()
        values = np.zeros(Q)
        for i in range(Q):
            order = np.argsort(-(g @ q[i]))
            ranks = np.flatnonzero((labels == int(query.label[i]))[order]) + 1
            values[i] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
        return values

    start = time.perf_counter()
    got = usual()
    peer = time.perf_counter() - start
    np.testing.assert_allclose(ours().numpy(), got, atol=1e-5)
    mine = seconds(ours, 3)

    def floor() -> None:
        for block in query.vectors.split(500):
            block @ gallery.vectors.T

    return (f"cosine-map-{Q}x{G}-{D}d", mine, peer, "argsort loop", peer / mine, seconds(floor, 3), "s")


def index_ranking() -> tuple:
    """The same ranking asked of FAISS: all 50,000 neighbours of 500 queries, in seconds for 500."""
    import faiss

    query, gallery = _vectors()
    few = Descriptors(query.vectors[:500], query.label[:500], query.index[:500])

    def usual() -> None:
        index = faiss.IndexFlatIP(D)
        index.add(gallery.vectors.numpy())
        _, ids = index.search(few.vectors.numpy(), G)
        right = gallery.label.numpy()[ids] == few.label.numpy()[:, None]
        hits = right.cumsum(1)
        ((hits / np.arange(1, G + 1)) * right).sum(1) / right.sum(1)

    mine = seconds(lambda: measure_ranking(few, gallery, ks=())["AP"], 3)
    peer = seconds(usual, 1)
    floor = seconds(lambda: few.vectors @ gallery.vectors.T, 3)
    return ("cosine-map-500x50000-128d", mine, peer, "faiss k=50000", peer / mine, floor, "s")


def _vectors() -> tuple[Descriptors, Descriptors]:
    rng = torch.Generator().manual_seed(0)
    q, g = (F.normalize(torch.randn(n, D, generator=rng), dim=1) for n in (Q, G))
    labels = [torch.randint(10, (n,), generator=rng) for n in (Q, G)]
    return Descriptors(q, labels[0], torch.arange(Q) + G), Descriptors(g, labels[1], torch.arange(G))


def extraction() -> tuple:
    """Seconds for 256 images of 224 px through EfficientNet-Lite0: ONNX Runtime beside torch channels_last."""
    backbone = lite0_backbone(size=224).requires_grad_(False).eval()
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)

    def run() -> None:
        with torch.inference_mode():
            backbone(images)
            backbone(images)

    run()  # exports
    mine = seconds(run, 3)
    backbone.runtime = "torch"
    run()
    peer = seconds(run, 3)
    pixels = backbone.preprocess(images).numpy()
    session = backbone._onnx[224].session
    floor = 2 * seconds(lambda: session.run(["features"], {"pixels": pixels}), 3)
    return ("lite0-224px-256-images", mine, peer, "torch channels_last", peer / mine, floor, "s")


def preprocessing() -> tuple:
    """Seconds to resize and normalise 2,048 images from 32 to 128 px: one batch beside Pillow, image by image."""
    from PIL import Image
    from torchvision.transforms.functional import normalize, pil_to_tensor, resize

    backbone = lite0_backbone(size=128)
    images = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def usual() -> None:
        for picture in pictures:
            pixels = pil_to_tensor(resize(picture, [128, 128], interpolation=3)).float()
            normalize(pixels, [127.0] * 3, [128.0] * 3)

    def ours() -> None:
        for block in images.split(128):
            backbone.preprocess(block)

    mine, peer = seconds(ours, 3), seconds(usual, 1)
    out = torch.empty(2048, 3, 128, 128)
    floor = seconds(lambda: out.fill_(0.5), 3)  # writing the result once
    return ("preprocess-2048-images-128px", mine, peer, "per-image transforms", peer / mine, floor, "s")


def verification() -> tuple:
    """Seconds of one core to verify 20 items for one query, a photograph of a work: ours, and a loop of OpenCV's calls.

    Both find 500 features of the query, and have 300 features of each item ready: ours in 32 bytes each, the usual ones
    in 128 floats. Floor: finding the query's features, by OpenCV alone.
    """
    import cv2

    works = torch.from_numpy(np.stack([paint_work(0, 1 + n % 6, n // 6, 0, size=384) for n in range(20)]))
    ours_by = Verification()
    side = ours_by.query_side
    shot = photograph(works[7:8], keys=[(0, 0, 7, 0)], seed=1, size=side)[0]
    detector = cv2.SIFT.create(nfeatures=500, contrastThreshold=0.02)
    stored = [ours_by.item(work) for work in works]

    def described(image: torch.Tensor, most: int) -> tuple:
        grey = cv2.cvtColor(image.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY)
        return cv2.SIFT.create(nfeatures=most, contrastThreshold=0.02).detectAndCompute(grey, None)

    items = [described(work, 300) for work in works]
    parts: dict[str, list[float]] = {"features": [], "matching": [], "fitting": []}

    def ours() -> list[int]:
        clock = [time.perf_counter()]
        queries = ours_by.query(shot)
        clock.append(time.perf_counter())
        pairs = ours_by.pair(queries, stored)
        clock.append(time.perf_counter())
        found = ours_by.fit(queries, stored, pairs)
        clock.append(time.perf_counter())
        for part, before, after in zip(parts.values(), clock, clock[1:], strict=False):
            part.append(after - before)
        return [place for place, match in enumerate(found) if match]

    def usual() -> list[int]:
        points, found = described(shot, 500)
        matcher, verified = cv2.BFMatcher(cv2.NORM_L2), []
        for place, (item_points, item_found) in enumerate(items):
            best = [two for two in matcher.knnMatch(found, item_found, k=2) if len(two) == 2]
            near = [first for first, second in best if first.distance <= 0.85 * second.distance]
            if len(near) < 4:
                continue
            from_ = np.float32([item_points[match.trainIdx].pt for match in near])
            to = np.float32([points[match.queryIdx].pt for match in near])
            homography, inlier = cv2.findHomography(from_, to, cv2.RANSAC, 0.006 * side)
            if homography is not None and inlier.sum() >= ours_by.inliers:
                verified.append(place)
        return verified

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert ours() == [7], ours()
        assert 7 in usual(), usual()
        for part in parts.values():
            part.clear()
        mine, peer = seconds(ours, 9), seconds(usual, 5)
        grey = cv2.cvtColor(shot.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY)
        floor = seconds(lambda: detector.detectAndCompute(grey, None), 5)
    finally:
        torch.set_num_threads(threads)
    print("verification:", ", ".join(f"{name} {1e3 * statistics.median(t):.1f} ms" for name, t in parts.items()))
    return (f"verify-20-items-{side}px", mine, peer, "OpenCV pair by pair", peer / mine, floor, "s")


def training_dsh() -> tuple:
    """Images a second of the DSH network and loss, batches of 200, bf16 autocast."""
    return _training("train-dsh-32px-batch200", lambda: DSHNetwork(12), DSHLoss(), 200, 60, "bf16-mixed")


def training_hashing() -> tuple:
    """Images a second of GreedyHash codes on EfficientNet-Lite0 at 64 px, batches of 64, float32."""

    def network() -> HashNetwork:
        return HashNetwork(lite0_backbone(size=64), Average(), 48)

    return _training("train-hashing-lite0-64px-batch64", network, GreedyHashLoss(48, 10), 64, 30, "32-true")


def training_dir() -> tuple:
    """Images a second of the R-MAC network on EfficientNet-Lite0 at 64 px, hardest triplets in batches of 64."""

    def network() -> RegionNetwork:
        return RegionNetwork(lite0_backbone(size=64), RMAC(levels=2), 128, sample=100)

    return _training("train-dir-lite0-64px-batch64", network, BatchHardTripletLoss(0.1), 64, 30, "32-true")


def _training(
    name: str, make: Callable[[], nn.Module], loss: nn.Module, size: int, steps: int, precision: str
) -> tuple:
    """Images a second of `simsearch train`'s loop, of a loop with per-image transforms, and of a bare loop."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    warm, autocast = 3, precision.startswith("bf16")
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size * (steps + warm + 2), 3, 32, 32), dtype=torch.uint8, generator=rng)
    labels = torch.randint(10, (len(images),), generator=rng)
    augment = RandomCropFlip(4, True)
    optimizer = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)

    class InMemory(RetrievalDataModule):
        def read(self) -> Collection:
            names = (tuple("0123456789"),)
            test = torch.arange(len(images)) >= len(images) - size
            return Collection("bench", images, labels[:, None], ("class",), names, test)

    class Clock(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.global_step == warm:
                self.start = time.perf_counter()
            self.end = time.perf_counter()

    def step(network: nn.Module, update: torch.optim.Optimizer, batch: torch.Tensor, label: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            embeddings = network(batch)
        update.zero_grad()
        loss(embeddings.float(), label).backward()
        update.step()

    def timed(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        network = make().train()
        update = optimizer([*network.parameters(), *loss.parameters()])
        for number, (batch, label) in enumerate(batches, start=1):
            step(network, update, batch, label)
            if number == warm:
                start = time.perf_counter()
            if number == warm + steps:
                return steps * size / (time.perf_counter() - start)
        raise AssertionError("too few batches")

    def bare() -> float:
        order = torch.randperm(len(images)).split(size)
        return timed((augment(images[rows]), labels[rows]) for rows in order)

    class PerImage(Dataset):
        change = transforms.Compose(
            [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        )

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return self.change(Image.fromarray(images[i].permute(1, 2, 0).numpy())), int(labels[i])

    def usual() -> float:
        return timed(DataLoader(PerImage(), batch_size=size, shuffle=True))

    def ours() -> float:
        clock = Clock()
        data = InMemory(
            OfficialSplit("bench", gallery="train", exclude_self=True, validation=None),
            sampler=partial(ShuffledBatches, batch_size=size),
            augment=augment,
        )
        with tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                max_steps=warm + steps,
                precision=precision,
                accelerator="cpu",
                callbacks=[StepSeed(), Throughput(), clock],
                logger=CSVLogger(folder),
                default_root_dir=folder,
                enable_checkpointing=False,
                enable_model_summary=False,
            )
            trainer.fit(TrainedRetriever(make(), loss, optimizer), data)
        return steps * size / (clock.end - clock.start)

    rounds = [(ours(), bare(), usual()) for _ in range(3)]  # side by side: the machine's speed drifts
    mine, floor, peer = (statistics.median(values) for values in zip(*rounds, strict=True))
    return (name, mine, peer, "per-image transforms", mine / peer, floor, "img/s")


if __name__ == "__main__":
    main()
