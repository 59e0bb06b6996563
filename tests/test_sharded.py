"""A gallery on several ranks against one process: threads that play ranks, and real processes of 2 and 3 ranks."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import in_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from simsearch.callbacks.evaluation import RetrievalEvaluation
from simsearch.data import datamodule
from simsearch.data.collection import Collection
from simsearch.data.datamodule import OwnPart, RetrievalDataModule
from simsearch.data.protocols import OfficialSplit
from simsearch.evaluation.class_means import ClassMeans
from simsearch.evaluation.evaluate import Evaluation, evaluate
from simsearch.functional.codes import pack_codes
from simsearch.functional.ranking import average_precision_in_index_order, inner_products, measure_ranking, rank
from simsearch.functional.sharded import Ranks, Sharded
from simsearch.index.faiss_index import FaissIndex
from simsearch.metrics.retrieval import RetrievalMetrics
from simsearch.search.rerank import AQE
from simsearch.types import Descriptors, RetrievalTask

KS = (1, 5, 20)
READABLE = os.access("/proc/self/clear_refs", os.W_OK)
TIMED = ("index/build_s", "index/queries_per_s", "index/latency")


def described(
    n: int, *, seed: int, first: int = 0, d: int = 16, bits: int | None = None, classes: int = 4
) -> Descriptors:
    """Vectors of which many are equal and many differ by one unit in the last place; labels -1..; junk groups."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(n // 8, 1), d, generator=torch.Generator().manual_seed(7 * d))
    real = centres[torch.randint(0, len(centres), (n,), generator=generator)]
    real = real + 0.3 * torch.randn(n, d, generator=generator) * (torch.rand(n, 1, generator=generator) < 0.3)
    vectors = F.normalize(real)
    column = torch.randint(0, d, (n,), generator=generator)
    rows = torch.arange(n)
    vectors[rows, column] = torch.nextafter(vectors[rows, column], torch.tensor(2.0) * (column % 2 * 2 - 1))
    label = torch.randint(-1, classes, (n,), generator=generator)
    group = torch.randint(-1, max(n // 4, 1), (n,), generator=generator)
    if bits is not None:
        vectors = pack_codes(real @ torch.randn(d, bits, generator=torch.Generator().manual_seed(5)))
    return Descriptors(vectors, label, rows + first, bits, group)


def part(whole: Descriptors, rows: Tensor) -> Descriptors:
    group = None if whole.group is None else whole.group[rows]
    return Descriptors(whole.vectors[rows], whole.label[rows], whole.index[rows], whole.bits, group)


def deal(n: int, rank: int, world: int, how: str) -> Tensor:
    """Positions of a rank: in one piece; nearly all on rank 0; none on rank 1; mixed; or padded with doubles."""
    every = torch.arange(n)
    match how:
        case "even":
            return every.tensor_split(world)[rank]
        case "uneven":
            cuts = [n - 1 - 2 * (world - 1 - r) for r in range(1, world)]
            return every.tensor_split(cuts)[rank]
        case "empty":
            others = [r for r in range(world) if r != 1]
            return every[:0] if rank == 1 else every.tensor_split(len(others))[others.index(rank)]
        case "mixed":
            return torch.randperm(n, generator=torch.Generator().manual_seed(1)).tensor_split(world)[rank].sort().values
        case "padded":
            return torch.tensor(list(DistributedSampler(every, world, rank, shuffle=False))).sort().values
    raise AssertionError(how)


def near(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Ranks and counts are the same; sums of their fractions may come in another order."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-12, equal_nan=True, msg=name)


# ------------------------------------------------------------------------------- inner products


@pytest.mark.parametrize("d", [3, 64, 129, 512, 2048])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_depends_on_its_two_vectors_alone(d, threads):
    """Not on how many others there are, nor where they lie: or else shards would round otherwise than the whole."""
    generator = torch.Generator().manual_seed(d)
    left = F.normalize(torch.randn(70, d, generator=generator))
    right = F.normalize(torch.randn(3001, d, generator=generator))
    right[2000:2500] = right[:500]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = inner_products(left, right)
        torch.testing.assert_close(whole, (left.double() @ right.double().T).float(), rtol=0, atol=2e-6)
        assert torch.equal(whole[:, 2000:2500], whole[:, :500])
        torch.set_num_threads(threads)
        for rows in (slice(0, 1), slice(3, 6), slice(5, 70)):
            for columns in (slice(0, 1), slice(7, 12), slice(11, 75), slice(1, 1000), slice(999, 3001)):
                assert torch.equal(inner_products(left[rows], right[columns]), whole[rows, columns]), (rows, columns)
        assert torch.equal(inner_products(-left, right), -whole)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------- threads as ranks


@dataclass(frozen=True)
class Threads(Ranks):
    """Ranks that are threads of this process."""

    barrier: threading.Barrier = field(kw_only=True)
    shared: dict = field(kw_only=True)

    def _exchange(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait(30)
        every = [self.shared[r] for r in range(self.world)]
        self.barrier.wait(30)
        return every

    def sum(self, values: Tensor) -> Tensor:
        every = self._exchange(values)
        assert len({(v.shape, v.dtype) for v in every}) == 1
        return torch.stack(every).sum(0, dtype=values.dtype)

    def largest(self, values: Tensor) -> Tensor:
        return torch.stack(self._exchange(values)).amax(0)

    def stack(self, values: Tensor) -> Tensor:
        return torch.stack(self._exchange(values))

    def sum_on_first(self, values: Tensor) -> Tensor | None:
        total = self.sum(values)
        return total if self.rank == 0 else None

    def from_first(self, values: Tensor | None) -> Tensor:
        return self._exchange(values)[0]


def in_threads(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` gives on each of `world` ranks; the first error is raised."""
    barrier, shared = threading.Barrier(world), {}
    results: list[Any] = [None] * world
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, world, barrier=barrier, shared=shared))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    workers = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return results


@st.composite
def shards(draw: st.DrawFn) -> tuple[int, int, int, int | None, list[list[int]], list[list[int]]]:
    """World, queries, gallery items, bits, and for query and gallery which ranks have each row."""
    world, q, g = draw(st.integers(2, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 40))
    holders = st.lists(st.integers(0, world - 1), min_size=1, max_size=2, unique=True)
    deals = [draw(st.lists(holders, min_size=n, max_size=n)) for n in (q, g)]
    return world, q, g, draw(st.sampled_from([None, 7, 300])), *deals


@settings(max_examples=25, deadline=None)
@given(shards(), st.booleans(), st.integers(0, 5))
def test_any_deal_gives_the_rankings_of_one_process(dealt, exclude_self, seed):
    world, q, g, bits, *deals = dealt
    whole = [described(q, seed=seed, first=g - q // 2, bits=bits), described(g, seed=seed + 1, bits=bits)]
    expected = list(rank(*whole, exclude_self=exclude_self, block_bytes=1))
    metrics = measure_ranking(*whole, ks=KS, exclude_self=exclude_self)
    ordered = None if bits is None else average_precision_in_index_order(*whole, exclude_self=exclude_self)

    def work(ranks: Ranks) -> tuple:
        own = [
            part(d, torch.tensor([i for i, have in enumerate(deal) if ranks.rank in have], dtype=torch.int64))
            for d, deal in zip(whole, deals, strict=True)
        ]
        query, gallery = (Sharded.spread(d, ranks) for d in own)
        assert torch.equal(query.rows(torch.arange(q).flip(0)), whole[0].vectors.flip(0))
        assert torch.equal(gallery.group, whole[1].group)
        order = None
        if bits is not None:
            order = average_precision_in_index_order(query, gallery, exclude_self=exclude_self, block_bytes=1)
        rankings = list(rank(query, gallery, exclude_self=exclude_self, block_bytes=1))
        return rankings, measure_ranking(query, gallery, ks=KS, exclude_self=exclude_self), order

    for rankings, found, order in in_threads(world, work):
        for left, right in zip(rankings, expected, strict=True):
            width = min(left.above.shape[1], right.above.shape[1])  # all beyond is padding
            for name in ("relevant", "query", "at", "size", "hits_above", "hits"):
                assert torch.equal(getattr(left, name), getattr(right, name)), name
            assert torch.equal(left.alone[:, :width], right.alone[:, :width])
            assert not left.alone[:, width:].any() | right.alone[:, width:].any()
            there = left.alone[:, :width]
            assert torch.equal(left.above[:, :width][there], right.above[:, :width][there])
        near(found, metrics)
        if bits is not None:
            near({"AP": order}, {"AP": ordered})


@pytest.mark.parametrize("how", ["uneven", "empty", "mixed"])
@pytest.mark.parametrize("bits", [None, 16])
def test_class_means_on_several_ranks_are_those_of_one_process(how, bits, monkeypatch):
    """With junk too, and with the groups of -1 that RetrievalMetrics gives a task without junk."""
    monkeypatch.setattr("simsearch.evaluation.class_means._BLOCK", 11)
    query, gallery = described(30, seed=1, first=60, bits=bits), described(80, seed=2, bits=bits)
    query.group[:3], gallery.group[:3] = 0, 0
    task = RetrievalTask("toy", query.index, gallery.index, "kind", "group", True, "0" * 16)
    for junk in (True, False):
        if not junk:
            query, gallery = (replace(side, group=torch.full_like(side.index, -1)) for side in (query, gallery))
        expected = ClassMeans()(Sharded.of(query), Sharded.of(gallery), task)

        def work(ranks: Ranks, query: Descriptors = query, gallery: Descriptors = gallery) -> Any:
            dealt = (part(side, deal(len(side), ranks.rank, 3, how)) for side in (query, gallery))
            return ClassMeans()(*(Sharded.spread(side, ranks) for side in dealt), task)

        for found in in_threads(3, work):
            assert found.metrics == expected.metrics
            assert found.intervals == expected.intervals
            near(found.per_query, expected.per_query)
        assert 0.2 < expected.metrics["class/accuracy"] < 1


def test_a_row_that_several_ranks_have_stays_with_the_lowest():
    whole = described(6, seed=0)
    held = [[4, 5], [0, 1, 4], [1, 2, 3, 5]]
    spread = in_threads(3, lambda ranks: Sharded.spread(part(whole, torch.tensor(held[ranks.rank])), ranks))
    assert [s.own.index.tolist() for s in spread] == [[4, 5], [0, 1], [2, 3]]
    assert [s.position.tolist() for s in spread] == [[4, 5], [0, 1], [2, 3]]
    for one in spread:
        assert torch.equal(one.label, whole.label)
        assert torch.equal(one.own.vectors, whole.vectors[one.position])


def test_equal_items_beyond_the_spare_candidates_come_in_gallery_order():
    """A collapsed network: all vectors are one, FAISS may return any, the first are right."""
    one = F.normalize(torch.randn(1, 600, generator=torch.Generator().manual_seed(0)))
    n = 3000
    gallery = Descriptors(one.repeat(n, 1), torch.arange(n) % 3, torch.arange(n))
    query = Descriptors(one.repeat(30, 1), torch.arange(30) % 3, n + torch.arange(30))
    for metric in ("ip", "l2"):
        result = evaluate(query, gallery, FaissIndex("Flat", metric=metric), ks=KS)
        assert torch.equal(result.found.ids, torch.arange(20).expand(30, 20))
        assert result.metrics["index/recall@20"] == 1.0


# ------------------------------------------------------------------------------- real processes


HOW = ("even", "uneven", "empty", "mixed", "padded")
INDEXES = {
    "flat": ("Flat", "ip", "mixed"),
    "flat-l2": ("Flat", "l2", "uneven"),
    "ivf": ("IVF8,Flat", "ip", "even"),
    "pq": ("PQ4x4", "ip", "empty"),
    "pq-l2": ("PQ4x4", "l2", "mixed"),
    "sq": ("SQ8", "ip", "uneven"),
    "binary": ("BFlat", "hamming", "mixed"),
    "binary-ivf": ("BIVF4", "hamming", "empty"),
    "graph": ("HNSW8", "ip", "even"),
}


def pair(name: str) -> tuple[Descriptors, Descriptors]:
    bits = 12 if name.startswith("binary") else None
    if name.startswith("flat"):  # so many and so wide that FAISS's rounding depends on where an item lies
        return described(300, seed=1, first=1290, d=520), described(1500, seed=2, d=520)
    return described(60, seed=1, first=380, bits=bits), described(400, seed=2, bits=bits)


def wide(bits: int | None) -> tuple[Descriptors, Descriptors]:
    """As wide as descriptors are, where FAISS's and other kernels add up in blocks."""
    return described(70, seed=3, first=900, d=520, bits=bits), described(911, seed=4, d=520, bits=bits)


def indexed(name: str, query: Any, gallery: Any) -> Evaluation:
    factory, metric, _ = INDEXES[name]
    index = FaissIndex(factory, metric=metric, nprobe=2 if "IVF" in factory else None, train_size=300)
    return evaluate(query, gallery, index, ks=KS, exclude_self=True, index_order=True)


def summary(result: Evaluation) -> dict[str, Any]:
    metrics = {name: value for name, value in result.metrics.items() if not name.startswith(TIMED)}
    return {
        "metrics": metrics,
        "intervals": result.intervals,
        "per_query": result.per_query,
        "ids": result.found.ids,
        "scores": result.found.scores,
        "rows": result.gallery.index,
    }


def feed(metric: RetrievalMetrics, name: str, whole: tuple[Tensor, ...], rows: Tensor) -> None:
    for chosen in rows.split(9):
        metric.update(name, *(column[chosen] for column in whole))


def raw(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, 12, generator=generator)
    return vectors, torch.randint(-1, 4, (n,), generator=generator), torch.arange(n) + 100 * seed


class Pictures(RetrievalDataModule):
    """Noise in 2 classes: 61 training images, 20 in the test."""

    def read(self) -> Collection:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(81) % 2
        images = torch.randint(0, 60, (81, 3, 8, 8), generator=generator) + 40 * labels[:, None, None, None]
        return Collection("noise", images.byte(), labels[:, None], ("class",), (tuple("ab"),), torch.arange(81) >= 61)


class Projection(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(192, 12)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        return self.validation_step(batch, batch_idx).square().mean()

    def validation_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return F.normalize(self.layer(batch["image"].float().flatten(1) / 255 - 0.5))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def under_a_trainer(folder: Path, world: int) -> dict[str, Any]:
    callback = RetrievalEvaluation(FaissIndex("Flat"), ks=KS)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[callback],
        default_root_dir=str(folder),
    )  # fmt: skip
    data = Pictures(OfficialSplit("tiny", gallery="train", exclude_self=True, validation=0.03), eval_batch_size=7)
    model = Projection()
    trainer.fit(model, data)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    trainer.test(model, data, verbose=False)
    return {
        "validate": summary(callback.results["validate"]),
        "test": summary(callback.results["test"]),
        "queries": len(callback.results["validate"].query),
        "logged": logged["val/mAP"],
        "own": len(callback.results["test"].gallery.own),
    }


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def measure(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Everything that is compared with one process."""
    ranks = Ranks.here()
    assert (ranks.rank, ranks.world) == (rank, world)

    def spread(whole: Descriptors, how: str) -> Sharded:
        return Sharded.spread(part(whole, deal(len(whole), rank, world, how)), ranks)

    results: dict[str, Any] = {}
    for how in HOW:
        for bits in (None, 64):
            query, gallery = (spread(whole, how) for whole in wide(bits))
            results[f"ranking {how} {bits}"] = measure_ranking(query, gallery, ks=KS, exclude_self=True)
    for name, (_, _, how) in INDEXES.items():
        query, gallery = pair(name)
        result = indexed(name, spread(query, "uneven"), spread(gallery, how))
        whole = result.whole_index()
        assert (whole is None) == (rank > 0)
        found = whole.search(query.vectors, 20).ids if whole is not None else torch.empty(0)
        results[f"index {name}"] = {**summary(result), "whole": found, "own": len(result.index)}
    for bits in (None, 12):
        metric = RetrievalMetrics(KS, bits=bits)
        query, gallery = raw(31, 1), raw(53, 2)
        # A rank that has no queries at all, and one of them with doubles of its own.
        feed(metric, "query", query, deal(31, rank, world, "empty"))
        mine = deal(53, rank, world, "padded")
        feed(metric, "gallery", gallery, torch.cat([mine, mine[:4]]) if rank == 0 else mine)
        results[f"metric {bits}"] = metric.compute()
    results["errors"] = errors(rank, world)
    results["peak"] = peak(ranks) if READABLE else 0.0
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    results["trainer"] = under_a_trainer(folder / f"run{world}", world)
    return results


def peak(ranks: Ranks) -> float:
    """MiB that a rank's memory grows by at most while a gallery of 117 MiB is collected and evaluated."""

    def memory(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    before = memory("VmRSS")
    metric = RetrievalMetrics((1,))
    generator = torch.Generator().manual_seed(ranks.rank)
    for name, n in (("query", 24), ("gallery", 60_000)):
        for rows in torch.arange(n).tensor_split(ranks.world)[ranks.rank].split(500):
            metric.update(name, F.normalize(torch.randn(len(rows), 512, generator=generator)), rows % 10, rows)
    query, gallery = metric.sharded("query"), metric.sharded("gallery")
    metric.reset()
    evaluate(query, gallery, FaissIndex("Flat"), ks=(1,))
    return memory("VmHWM") - before


def errors(rank: int, world: int) -> list[str]:
    broken, nothing, uneven = (RetrievalMetrics(KS) for _ in range(3))
    vectors, label, index = raw(5, rank)
    broken.update("query", vectors * (torch.nan if rank == 1 else 1.0), label, index)
    uneven.update("query", vectors[:, : 12 - rank], label, index)
    gallery = Sharded.spread(Descriptors(vectors, label, index), Ranks.here())
    few = FaissIndex("IVF64,Flat")
    return [
        message(lambda: broken.sharded("query")),
        message(lambda: nothing.sharded("gallery")),
        message(lambda: uneven.sharded("query")),
        message(lambda: evaluate(gallery, gallery, few, ks=KS)),
        message(lambda: evaluate(gallery, gallery, FaissIndex("Flat"), ks=KS, rerank=AQE(3))),
    ]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            meet = f"file://{folder}/meet{world}"
            dist.init_process_group("gloo", meet, timedelta(seconds=60), world, rank)
            torch.save(measure(rank, world, Path(folder)), f"{folder}/{world}-{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()
    if rank == 0 and READABLE:
        torch.save(peak(Ranks()), f"{folder}/peak.pt")


@pytest.fixture(scope="module")
def processes(folder: Path) -> list[tuple[int, int, dict]]:
    """World, rank and results of the ranks of 3 and of 2 processes."""
    in_ranks(_rank, 3, str(folder))
    return [
        (world, rank, torch.load(folder / f"{world}-{rank}.pt", weights_only=True))
        for world in (2, 3)
        for rank in range(world)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("bits", [None, 64])
def test_rankings_of_wide_descriptors(how, bits, processes):
    expected = measure_ranking(*wide(bits), ks=KS, exclude_self=True)
    assert 0.1 < expected["AP"].nanmean() < 0.9
    for _, _, results in processes:
        near(results[f"ranking {how} {bits}"], expected)


@pytest.mark.filterwarnings("ignore:.*learns .* centroids")
@pytest.mark.parametrize("name", INDEXES)
def test_evaluation_of_an_index(name, processes):
    query, gallery = pair(name)
    result = indexed(name, query, gallery)
    expected = summary(result)
    # Codes of 12 bits tie by dozens, and of those in lists FAISS returns any.
    approximate = name in ("graph", "binary-ivf")
    for world, rank_, results in processes:
        found = results[f"index {name}"]
        for column in ("metrics", "intervals", "per_query"):
            assert found[column].keys() == expected[column].keys()
        for key, value in expected["metrics"].items():
            # Lists have lengths of their own on each rank, and a graph its own links.
            if not (approximate and key.startswith(("index/", "definitions/"))) and key != "index/bytes_per_item":
                assert found["metrics"][key] == pytest.approx(value, rel=0, abs=1e-12, nan_ok=True), (world, key)
        assert torch.equal(found["rows"], expected["rows"])
        assert name == "graph" or torch.equal(found["scores"], expected["scores"])
        if not approximate:
            assert torch.equal(found["ids"], expected["ids"])
            near(found["per_query"], expected["per_query"])
            for key, value in expected["intervals"].items():
                assert found["intervals"][key] == pytest.approx(value, rel=0, abs=1e-12, nan_ok=True), key
        if rank_ == 0:
            assert torch.equal(found["whole"], result.index.search(query.vectors, 20).ids)
    assert sum(results[f"index {name}"]["own"] for world, _, results in processes if world == 3) == len(gallery)
    if "flat" in name or name == "binary":
        for _, _, results in processes:
            assert results[f"index {name}"]["metrics"]["index/bytes_per_item"] == result.metrics["index/bytes_per_item"]


@pytest.mark.parametrize("bits", [None, 12])
def test_a_metric_with_doubles_and_without_queries_on_a_rank(bits, processes):
    metric = RetrievalMetrics(KS, bits=bits)
    for name, whole in (("query", raw(31, 1)), ("gallery", raw(53, 2))):
        feed(metric, name, whole, torch.arange(len(whole[0])))
    expected = metric.compute()
    for _, _, results in processes:
        near(results[f"metric {bits}"], expected)


def test_every_rank_raises_what_one_met(processes):
    for world, rank_, results in processes:
        nan, nothing, uneven, few, rerank = results["errors"]
        assert ("NaN or infinity" in nan) == (rank_ == 1)
        assert rank_ == 1 or nan == "RuntimeError: rank [1] failed: see its message"
        assert nothing == "ValueError: no gallery items were collected"
        assert rank_ == 0 or f"embeddings have {12 - rank_} columns here, 12 on another rank" in uneven
        assert ("needs at least 64 vectors to train" in few) == (rank_ == 0)
        assert f"rerank needs all descriptors in one process, but there are {world}: " in rerank


def test_end_to_end_under_a_trainer(processes, folder, tmp_path):
    one = under_a_trainer(tmp_path, 1)
    assert one["queries"] == 2  # fewer than three ranks: one of them has none
    for world, _, results in processes:
        found = results["trainer"]
        for stage in ("validate", "test"):
            assert found[stage]["metrics"] == pytest.approx(one[stage]["metrics"], rel=0, abs=1e-5)
            assert torch.equal(found[stage]["rows"], one[stage]["rows"])
        assert found["logged"] == pytest.approx(one["logged"], abs=1e-5)
        assert found["own"] in (61 // world, -(-61 // world))
    for world in (2, 3):
        every = [results["trainer"] for w, _, results in processes if w == world]
        assert sum(found["own"] for found in every) == 61
        assert all(found["test"]["metrics"] == every[0]["test"]["metrics"] for found in every)
        written = json.loads((folder / f"run{world}" / "metrics.json").read_text())
        assert {**written["test"]["metrics"], **every[0]["test"]["metrics"]} == written["test"]["metrics"]


@pytest.mark.skipif(not READABLE, reason="peak memory is read from /proc")
def test_peak_memory_falls_with_ranks(processes, folder):
    alone = torch.load(folder / "peak.pt", weights_only=True)
    worst = {world: max(results["peak"] for w, _, results in processes if w == world) for world in (2, 3)}
    print(f"MiB of the largest rank: {alone:.0f} alone, {worst}")
    assert worst[2] < 0.75 * alone
    assert worst[3] < 0.6 * alone


def test_reranking_is_refused_before_anything_runs():
    class Fake:
        world_size = 2

    callback = RetrievalEvaluation(FaissIndex("Flat"), rerank=AQE(3))
    with pytest.raises(ValueError, match=r"there are 2: .*`simsearch evaluate run=... rerank=..."):
        callback.setup(Fake(), Projection(), "fit")


@pytest.mark.parametrize("count", [0, 1, 2, 7, 9])
def test_loaders_deal_out_each_row_once(count, monkeypatch):
    parts = []
    for rank_ in range(4):
        monkeypatch.setattr(datamodule, "rank_and_world", lambda rank_=rank_: (rank_, 4))
        sampler = OwnPart(torch.arange(count))
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    assert [row for own in parts for row in own] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_fewer_gallery_images_than_ranks(monkeypatch):
    data = Pictures(OfficialSplit("tiny", gallery="test", exclude_self=True, validation=0.03))
    data.setup()
    monkeypatch.setattr(datamodule, "world_size", lambda: 21)
    with pytest.raises(ValueError, match="tiny has 20 gallery images, fewer than the 21 processes"):
        data.test_dataloader()
