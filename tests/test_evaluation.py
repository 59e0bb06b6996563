"""Evaluation of index and ranking against brute force; the callback under a Trainer."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

from simsearch.callbacks.evaluation import RetrievalEvaluation, _is_best, write_results
from simsearch.callbacks.neighbours import NeighbourFigure, choose_examples
from simsearch.data.collection import Collection
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.data.protocols import OfficialSplit
from simsearch.evaluation.evaluate import Evaluation, _index_recall, evaluate
from simsearch.evaluation.sharded_index import ShardedIndex
from simsearch.files import read_json
from simsearch.functional.codes import pack_codes, unpack_codes
from simsearch.functional.ranking import mean_name
from simsearch.functional.sharded import Sharded
from simsearch.functional.significance import mean_interval
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.rerank import AQE
from simsearch.types import Descriptors, RetrievalTask, SearchResult

KS = (1, 5, 20)


def clustered(n: int, *, seed: int, first: int = 0, d: int = 16, groups: bool = False) -> Descriptors:
    """Unit vectors around 6 centres, the label one in ten unknown; with groups of about 4."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, d, generator=torch.Generator().manual_seed(77))
    label = torch.randint(0, 6, (n,), generator=generator)
    vectors = F.normalize(centres[label] + 1.2 * torch.randn(n, d, generator=generator))
    label[torch.rand(n, generator=generator) < 0.1] = -1
    group = torch.randint(-1, max(n // 4, 1), (n,), generator=generator) if groups else None
    return Descriptors(vectors, label, torch.arange(first, first + n), group=group)


def coded(real: Descriptors, bits: int = 12) -> Descriptors:
    outputs = real.vectors @ torch.randn(real.vectors.shape[1], bits, generator=torch.Generator().manual_seed(5))
    return Descriptors(pack_codes(outputs), real.label, real.index, bits, real.group)


def counted(query: Descriptors, gallery: Descriptors, q: int, exclude_self: bool) -> list[int]:
    """Gallery positions that are neither the query itself nor its junk."""
    return [
        j
        for j in range(len(gallery))
        if not (exclude_self and int(query.index[q]) == int(gallery.index[j]))
        and not (query.group is not None and int(query.group[q]) == int(gallery.group[j]) >= 0)
    ]


def brute_force(
    query: Descriptors, gallery: Descriptors, scores: np.ndarray, *, exclude_self: bool = False
) -> dict[str, float]:
    """Means over queries of AP (scikit-learn) and of the metrics of the k best, by plain loops."""
    values: dict[str, list[float]] = {}
    for q in range(len(query)):
        label = int(query.label[q])
        columns = counted(query, gallery, q, exclude_self)
        right = [label >= 0 and int(gallery.label[j]) == label for j in columns]
        if not any(right):
            continue
        order = sorted(range(len(columns)), key=lambda c: -scores[q, columns[c]])
        ranked = [right[c] for c in order]
        row = {"mAP": average_precision_score(right, scores[q, columns])}
        for k in KS:
            best = ranked[:k]
            row[f"P@{k}"] = row[f"index/P@{k}"] = sum(best) / k
            row[f"R@{k}"] = row[f"index/R@{k}"] = float(any(best))
            ap = sum(sum(best[: i + 1]) / (i + 1) for i, hit in enumerate(best) if hit) / min(sum(right), k)
            row[f"mAP@{k}_minRk"] = row[f"index/mAP@{k}_minRk"] = ap
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: float(np.mean(value)) for name, value in values.items()} | {
        "queries_without_relevant": float(len(query) - len(values["mAP"])),
        "queries_in_own_ranking": float(
            sum(
                any(gallery.index[j] == query.index[q] for j in counted(query, gallery, q, exclude_self))
                for q in range(len(query))
            )
        ),
    }


def assert_metrics(found: dict[str, float], expected: dict[str, float], tolerance: float = 1e-9) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=tolerance), name


class TestEvaluate:
    @pytest.mark.parametrize("exclude_self", [False, True])
    @pytest.mark.parametrize("groups", [False, True])
    def test_flat_inner_product(self, exclude_self, groups):
        query = clustered(40, seed=0, first=30, groups=groups)
        gallery = clustered(90, seed=1, groups=groups)
        gallery.vectors[30:70] = query.vectors  # the queries are in the gallery
        if groups:
            gallery.group[30:70] = query.group
        result = evaluate(query, gallery, FaissIndex("Flat"), ks=KS, exclude_self=exclude_self)
        scores = (query.vectors.double() @ gallery.vectors.double().T).numpy()
        assert_metrics(result.metrics, brute_force(query, gallery, scores, exclude_self=exclude_self))
        assert result.metrics["queries_without_relevant"] >= 1
        assert result.metrics["queries"] == 40
        assert result.metrics["gallery"] == 90
        assert result.metrics["bytes_per_item"] == 64
        assert [result.metrics[f"index/recall@{k}"] for k in KS] == [1.0] * 3
        for name in ("build_s", "queries_per_s", "latency_ms_p50", "latency_ms_p95", "latency_ms_p99"):
            assert 0 < result.metrics[f"index/{name}"] < math.inf
        # What was found is the ranking without what does not count.
        for q in range(40):
            columns = counted(query, gallery, q, exclude_self)
            best = sorted(columns, key=lambda j: -scores[q, j])[:20]
            assert result.found.ids[q].tolist() == best

    def test_flat_l2_of_vectors_of_unequal_length(self):
        query, gallery = clustered(30, seed=0, first=100), clustered(80, seed=1)
        gallery.vectors.mul_(torch.rand(80, 1, generator=torch.Generator().manual_seed(2)) + 0.5)
        result = evaluate(query, gallery, FaissIndex("Flat", metric="l2"), ks=KS)
        scores = -torch.cdist(query.vectors.double(), gallery.vectors.double()).numpy()
        assert_metrics(result.metrics, brute_force(query, gallery, scores))
        product = evaluate(query, gallery, FaissIndex("Flat"), ks=KS)
        assert product.metrics["mAP"] != pytest.approx(result.metrics["mAP"], abs=1e-3)

    @pytest.mark.parametrize("metric", ["ip", "l2"])
    @pytest.mark.parametrize("factory", ["PQ4x4", "SQ8", "SQ4", "OPQ4,PQ4x4"])
    def test_compressed_vectors_are_ranked_as_stored(self, factory, metric):
        query, gallery = clustered(30, seed=0, first=1000), clustered(400, seed=1)
        result = evaluate(query, gallery, FaissIndex(factory, metric=metric), ks=KS)
        stored = result.index.reconstruct().double()
        assert result.index.code_bytes < 64
        assert not torch.allclose(stored.float(), gallery.vectors)
        wanted = query.vectors.double()
        scores = (wanted @ stored.T if metric == "ip" else -torch.cdist(wanted, stored)).numpy()
        # Few codes: equal stored vectors tie, and rounding may part them in one of the two ways.
        assert_metrics(result.metrics, brute_force(query, gallery, np.round(scores, 6)), tolerance=0.01)
        assert result.metrics["bytes_per_item"] == result.index.code_bytes
        exact = evaluate(query, gallery, FaissIndex("Flat", metric=metric), ks=KS)
        # Of the items that tie with the 20th the first count; FAISS's own choice is another.
        truth, found = (r.index.search(query.vectors, 36).ids[:, :20] for r in (exact, result))
        overlap = np.mean([len(set(t) & set(f)) / 20 for t, f in zip(truth.tolist(), found.tolist(), strict=True)])
        assert result.metrics["index/recall@20"] == pytest.approx(overlap, abs=1e-6)
        assert result.metrics["index/recall@20"] < 1

    @pytest.mark.parametrize("factory", ["SQfp16,Refine(SQfp16)", "IVF4,Flat,Refine(SQ4)"])
    def test_refined_by_codes_vectors_are_ranked_as_the_codes_say(self, factory):
        """Base and codes together take as much as the vectors, but what the index compares last are the codes."""
        query, gallery = clustered(30, seed=0, first=1000), clustered(400, seed=1)
        wide = {"nprobe": 4} if "IVF" in factory else {}
        result = evaluate(query, gallery, FaissIndex(factory, k_factor=40, **wide), ks=KS)
        stored = result.index.reconstruct()
        assert not torch.equal(stored, gallery.vectors)
        scores = (query.vectors.double() @ stored.double().T).numpy()
        assert_metrics(result.metrics, brute_force(query, gallery, np.round(scores, 6)), tolerance=0.01)
        assert torch.equal(ShardedIndex(result.index, Sharded.of(gallery)).stored, stored)

    def test_a_graph_has_less_recall_but_the_full_ranking_is_exact(self):
        query, gallery = clustered(40, seed=0, first=5000, d=32), clustered(3000, seed=1, d=32)
        result = evaluate(query, gallery, FaissIndex("HNSW4", ef_search=4), ks=KS)
        exact = evaluate(query, gallery, FaissIndex("Flat"), ks=KS)
        for name in ("mAP", "P@20", "R@5"):
            assert result.metrics[name] == exact.metrics[name]
        truth = exact.index.search(query.vectors, 20).ids
        for k in KS:  # as a searcher asks, since a graph keeps as many candidates as are wanted
            found = result.index.search(query.vectors, k).ids
            expected = np.mean(
                [len(set(t[:k].tolist()) & set(f[:k].tolist())) / k for t, f in zip(truth, found, strict=True)]
            )
            assert result.metrics[f"index/recall@{k}"] == pytest.approx(expected, abs=1e-6)
        assert result.metrics["index/recall@20"] < 0.95
        assert result.metrics["index/P@20"] != result.metrics["P@20"]

    def test_the_recall_of_long_lists_needs_little_memory(self):
        query, gallery = clustered(60, seed=0, first=5000), clustered(1500, seed=1)
        index = ShardedIndex(FaissIndex("IVF40,Flat", nprobe=20), Sharded.of(gallery))
        with torch.profiler.profile(profile_memory=True) as profile:
            recall = _index_recall(index, Sharded.of(query), (1, 1500), 0)
        found = index.index.search(query.vectors, 1500).ids
        assert recall["index/recall@1500"] == pytest.approx(float((found >= 0).double().mean()), abs=1e-6)
        assert 0 < recall["index/recall@1500"] < 1
        assert max(event.cpu_memory_usage for event in profile.events()) < 20e6  # all pairs of ids take 135 MB

    def test_lists_that_were_not_visited_count_as_wrong(self):
        query, gallery = clustered(40, seed=0, first=5000), clustered(200, seed=1)
        gallery.label[[0, -1]] = 2  # what an id of -1 might be taken for
        result = evaluate(query, gallery, FaissIndex("IVF40,Flat", nprobe=1), ks=KS)
        assert (result.found.ids < 0).any()
        precision = []
        for q in range(40):
            label = int(query.label[q])
            if label in gallery.label.tolist() and label >= 0:
                precision.append(
                    sum(j >= 0 and int(gallery.label[j]) == label for j in result.found.ids[q].tolist()) / 20
                )
        assert result.metrics["index/P@20"] == pytest.approx(np.mean(precision))

    def test_codes_in_expectation_and_in_index_order(self):
        query, gallery = coded(clustered(30, seed=0, first=40)), coded(clustered(70, seed=1))
        result = evaluate(query, gallery, FaissIndex("BFlat"), ks=KS, exclude_self=True, index_order=True)
        bits = unpack_codes(query.vectors, 12), unpack_codes(gallery.vectors, 12)
        distance = (bits[0][:, None] != bits[1][None]).sum(2).numpy()
        in_order, sampled = [], []
        rng = np.random.default_rng(0)
        for q in range(30):
            columns = counted(query, gallery, q, True)
            right = np.array([int(query.label[q]) >= 0 and gallery.label[j] == query.label[q] for j in columns], bool)
            if not right.any():
                continue

            def ap(order: np.ndarray, right: np.ndarray = right) -> float:
                hits = right[order]
                return float((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())

            d = distance[q, columns]
            in_order.append(ap(np.argsort(d, kind="stable")))
            sampled.append(np.mean([ap(np.lexsort((rng.random(len(d)), d))) for _ in range(300)]))
        assert result.metrics["mAP_index_order"] == pytest.approx(np.mean(in_order), abs=1e-12)
        assert result.metrics["mAP"] == pytest.approx(np.mean(sampled), abs=3e-3)
        assert result.metrics["mAP"] != pytest.approx(np.mean(in_order), abs=1e-6)
        assert result.metrics["mAP_pessimistic"] < result.metrics["mAP"] < result.metrics["mAP_optimistic"]
        assert [result.metrics[f"index/recall@{k}"] for k in KS] == [1.0] * 3
        assert result.metrics["bytes_per_item"] == 2
        plain = evaluate(query, gallery, FaissIndex("BFlat"), ks=KS)
        assert "mAP_index_order" not in plain.metrics

    def test_empty_balls_are_by_exact_search_among_all_other_items(self):
        real = clustered(300, seed=1, groups=True)
        whole = coded(real, 24)
        codes = unpack_codes(whole.vectors, 24)
        distance = (codes[:, None] != codes[None]).sum(2).fill_diagonal_(99)
        expected = float((distance.amin(1) > 2).double().mean())
        for factory in ("BFlat", "BIVF32"):
            result = evaluate(whole, whole, FaissIndex(factory), ks=(1,), exclude_self=True)
            assert result.metrics["code/empty_ball@2"] == pytest.approx(expected)
        assert 0 < expected < 1

    def test_k_beyond_the_gallery(self):
        query, gallery = clustered(10, seed=0, first=50), clustered(7, seed=1)
        result = evaluate(query, gallery, FaissIndex("Flat"), ks=KS)
        scores = (query.vectors.double() @ gallery.vectors.double().T).numpy()
        assert result.found.ids.shape == (10, 7)
        assert_metrics(result.metrics, brute_force(query, gallery, scores))
        assert result.metrics["index/P@20"] <= 7 / 20
        assert "index/recall@7" in result.metrics

    def test_nothing_relevant_at_all(self):
        query, gallery = clustered(5, seed=0, first=50), clustered(30, seed=1)
        query.label.fill_(-1)
        gallery.label[:5] = -1  # unknown is not relevant to unknown
        result = evaluate(query, gallery, FaissIndex("Flat"), ks=KS)
        assert result.metrics["queries_without_relevant"] == 5
        for name in ("mAP", "P@1", "index/P@1", "index/R@20"):
            assert math.isnan(result.metrics[name]), name
            assert result.per_query[{"mAP": "AP"}.get(name, name)].isnan().all()

    def test_intervals_hold_the_means_and_repeat(self):
        query, gallery = clustered(60, seed=0, first=500), clustered(200, seed=1)
        first, second = (evaluate(query, gallery, FaissIndex("Flat"), ks=KS, seed=3) for _ in range(2))
        assert first.intervals == second.intervals
        assert set(first.intervals) == {n for n in first.metrics if n in first.intervals}
        for name in ("mAP", "P@5", "index/P@5", "NDCG@20"):
            low, high = first.intervals[name]
            assert low < first.metrics[name] < high

    def test_intervals_go_by_the_units(self):
        query, gallery = clustered(60, seed=0, first=500), clustered(200, seed=1)
        units = torch.arange(60) // 6
        result = evaluate(query, gallery, FaissIndex("Flat"), ks=KS, units=units)
        for name, values in result.per_query.items():
            expected = mean_interval(values[:, None], units)[0].tolist()
            assert result.intervals[mean_name(name)] == pytest.approx(tuple(expected), nan_ok=True)
        by_query = evaluate(query, gallery, FaissIndex("Flat"), ks=KS)
        assert by_query.metrics["mAP"] == result.metrics["mAP"]
        assert by_query.intervals["mAP"] != result.intervals["mAP"]

    def test_an_index_of_the_other_kind(self):
        real = clustered(20, seed=0)
        with pytest.raises(ValueError, match=r"'BFlat' does not fit .*float descriptors: use index=flat"):
            evaluate(real, real, FaissIndex("BFlat"))
        with pytest.raises(ValueError, match=r"'Flat' does not fit .*codes: use index=binary-flat"):
            evaluate(coded(real), coded(real), FaissIndex("Flat"))


# ------------------------------------------------------------------------------------- under a Trainer


class Pictures(RetrievalDataModule):
    """Noise in 4 classes; pairs of neighbouring rows are one work."""

    def read(self) -> Collection:
        generator = torch.Generator().manual_seed(0)
        n = 80
        labels = torch.arange(n) % 4
        images = torch.randint(0, 60, (n, 3, 8, 8), generator=generator) + 40 * labels[:, None, None, None]
        return Collection(
            name="noise",
            images=images.to(torch.uint8),
            labels=torch.stack([labels, torch.arange(n) // 8], dim=1),
            attributes=("class", "work"),
            classes=(tuple("abcd"), tuple(f"w{i}" for i in range(10))),
            is_test=torch.arange(n) >= 60,
        )


class Projection(pl.LightningModule):
    """A linear map of pixels that `training_step` changes to another one each epoch."""

    bits: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 12)
        self.modes: list[bool] = []

    def embed(self, image: Tensor) -> Tensor:
        return F.normalize(self.layer(image.float().flatten(1) / 255 - 0.5))

    def training_step(self, batch: dict, batch_idx: int) -> None:
        self.modes.append(self.training)
        if batch_idx == 0:
            torch.manual_seed(self.current_epoch)
            nn.init.normal_(self.layer.weight)

    def validation_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.embed(batch["image"])

    test_step = validation_step

    def configure_optimizers(self) -> None:
        return None


@pytest.fixture
def data() -> Pictures:
    protocol = OfficialSplit("tiny", gallery="train", exclude_self=True, validation=0.3)
    return Pictures(protocol, eval_batch_size=7)


def trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 1, sanity: int = 0) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), num_sanity_val_steps=sanity,
        callbacks=list(callbacks), default_root_dir=str(folder),
    )  # fmt: skip


def by_hand(model: Projection, data: Pictures, task: RetrievalTask) -> Evaluation:
    parts = []
    for rows in (task.query.sort().values, task.gallery.sort().values):
        with torch.no_grad():
            vectors = model.embed(data.collection.images[rows])
        parts.append(Descriptors(vectors, data.collection.column(task.attribute)[rows], rows))
    return evaluate(*parts, FaissIndex("Flat"), ks=KS, exclude_self=task.exclude_self)


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    timed = ("index/build_s", "index/queries_per_s", "index/latency")
    return {name: value for name, value in metrics.items() if not name.startswith(timed)}


class TestCallback:
    def test_every_epoch_is_measured_afresh_and_can_be_monitored(self, data, tmp_path):
        seen: list[dict[str, float]] = []
        indexes = []

        class Watch(pl.Callback):
            def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                if trainer.sanity_checking:
                    return
                seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})
                indexes.append(callback.results["validate"].index)
                expected = by_hand(pl_module, data, data.task("validate"))
                found = timeless(callback.results["validate"].metrics)
                assert found == pytest.approx(timeless(expected.metrics), abs=1e-6)

        index = FaissIndex("Flat")
        callback = RetrievalEvaluation(index, ks=KS)
        best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/mAP", mode="max", filename="best")
        model = Projection()
        worker = trainer(tmp_path, callback, best, Watch(), epochs=3, sanity=2)
        worker.fit(model, data)
        assert len(seen) == 3
        values = [epoch["val/mAP"] for epoch in seen]
        assert len(set(values)) == 3
        assert float(best.best_model_score) == pytest.approx(max(values))
        assert (tmp_path / "checkpoints/best.ckpt").is_file()
        assert model.modes == [True] * len(model.modes)  # evaluation gave the training mode back
        assert len(index) == 0, "the callback's own index was filled"
        assert len({id(i) for i in indexes}) == 3
        assert [len(i) for i in indexes] == [len(data.task("validate").gallery)] * 3

    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_a_value_like_the_best_is_no_better(self, mode):
        """The trainer keeps the best in float32, so that .9 is above it by rounding, and .3 below."""
        keeper = ModelCheckpoint(monitor="val/P@1", mode=mode)
        worker = SimpleNamespace(checkpoint_callbacks=[keeper])
        assert _is_best(worker, {"P@1": 0.9})  # the first
        for value in (0.9, 0.3):
            keeper.best_model_score = torch.tensor(value)
            assert not _is_best(worker, {"P@1": value})
            assert _is_best(worker, {"P@1": value + 1e-6}) == (mode == "max")

    def test_sanity_checking_is_skipped(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr("simsearch.evaluation.evaluate.evaluate", lambda *_, **__: pytest.fail("evaluated"))
        callback = RetrievalEvaluation(FaissIndex("Flat"), ks=KS)
        worker = trainer(tmp_path, callback, epochs=0, sanity=1)
        worker.fit(Projection(), data)
        assert callback.results == {}
        worker = trainer(tmp_path, callback, epochs=1, sanity=1)
        with pytest.raises(pytest.fail.Exception, match="evaluated"):
            worker.fit(Projection(), data)

    def test_results_are_written_stage_by_stage(self, data, tmp_path):
        callback = RetrievalEvaluation(FaissIndex("Flat"), ks=KS)
        model = Projection()
        trainer(tmp_path, callback).fit(model, data)
        before = read_json(tmp_path / "metrics.json")
        assert set(before) == {"val"}
        assert not (tmp_path / "per_query.parquet").exists()
        worker = trainer(tmp_path, callback)
        logged = {k: v for loader in worker.test(model, data, verbose=False) for k, v in loader.items()}
        stages = read_json(tmp_path / "metrics.json")
        assert stages["val"] == before["val"]
        task = data.task("test")
        about = stages["test"]
        expected = {"protocol": "tiny", "fingerprint": task.fingerprint, "attribute": "class", "exclude_self": True}
        assert about.items() >= expected.items()
        assert about["fingerprint"] != before["val"]["fingerprint"]
        assert about["metrics"] == callback.results["test"].metrics
        assert logged["test/mAP"] == pytest.approx(about["metrics"]["mAP"])
        assert timeless(about["metrics"]) == pytest.approx(
            timeless(by_hand(model.eval(), data, task).metrics), abs=1e-6
        )
        table = pq.read_table(tmp_path / "per_query.parquet")
        assert table["index"].to_pylist() == task.query.sort().values.tolist()
        assert table["label"].to_pylist() == [row % 4 for row in table["index"].to_pylist()]
        for name in ("AP", "P@5", "index/P@5"):
            mean = about["metrics"]["mAP" if name == "AP" else name]
            assert np.nanmean(table[name].to_numpy()) == pytest.approx(mean, abs=1e-12)
        assert table.schema.metadata[b"protocol"] == b"tiny"
        assert table.schema.metadata[b"unit"] == b"query"
        assert table["unit"].to_pylist() == table["index"].to_pylist()
        assert (about["unit"], about["units"]) == ("query", len(task.query))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "per_query.parquet"]

    def test_an_interrupted_write_leaves_the_old_results(self, data, tmp_path, monkeypatch):
        callback = RetrievalEvaluation(FaissIndex("Flat"), ks=KS)
        trainer(tmp_path, callback).test(Projection(), data, verbose=False)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

        def full(table: object, path: Path) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("no space left")

        monkeypatch.setattr("simsearch.evaluation.record.pq.write_table", full)
        result = copy.copy(callback.results["test"])
        with pytest.raises(OSError, match="no space"):
            write_results(tmp_path, "test", data.task("test"), result, {})
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("part", ["query", "gallery"])
    def test_a_loader_that_leaves_items_out(self, part, data, tmp_path):
        class Short(Pictures):
            def test_dataloader(self) -> dict[str, DataLoader]:
                loaders = super().test_dataloader()
                loaders[part].dataset.rows = loaders[part].dataset.rows[:-1]
                return loaders

        callback = RetrievalEvaluation(FaissIndex("Flat"), ks=KS)
        short = Short(data.protocol, eval_batch_size=7)
        with pytest.raises(RuntimeError, match=rf"\d+ {part} items were collected, the protocol tiny has \d+"):
            trainer(tmp_path, callback).test(Projection(), short, verbose=False)
        assert not (tmp_path / "metrics.json").exists()
        # The next run of the same callback starts anew.
        trainer(tmp_path, callback).test(Projection(), data, verbose=False)
        assert callback.results["test"].metrics["queries"] == 20

    def test_a_module_of_codes_and_the_dsh_release_s_order(self, data, tmp_path):
        class Codes(Projection):
            bits = 12

            def embed(self, image: Tensor) -> Tensor:
                return self.layer(image.float().flatten(1) / 255 - 0.5)

        for name in ("dsh-release", "tiny"):
            ordered = name == "dsh-release"
            protocol = OfficialSplit(name, gallery="test", exclude_self=False, index_order=ordered, validation=0.3)
            callback = RetrievalEvaluation(FaissIndex("BFlat"), ks=KS)
            trainer(tmp_path, callback).test(Codes(), Pictures(protocol), verbose=False)
            result = callback.results["test"]
            assert result.gallery.bits == 12
            assert ("mAP_index_order" in result.metrics) == ordered
            assert result.metrics["index/recall@1"] == 1.0
            itself = result.found.ids[:, 0] == torch.arange(20)
            assert itself.float().mean() > 0.5  # the others have a double before them

    @pytest.mark.parametrize("exclude_self", [True, False])
    def test_the_task_says_whether_a_query_finds_itself(self, exclude_self, tmp_path):
        protocol = OfficialSplit("tiny", gallery="test", exclude_self=exclude_self, validation=0.3)
        callback = RetrievalEvaluation(FaissIndex("Flat"), ks=KS)
        trainer(tmp_path, callback).test(Projection(), Pictures(protocol), verbose=False)
        itself = (callback.results["test"].found.ids == torch.arange(20)[:, None]).any(1)
        assert itself.any() != exclude_self
        assert itself.all() != exclude_self

    def test_junk_of_the_task_does_not_count(self, data, tmp_path):
        data.setup()
        task = replace(data.task("test"), gallery=torch.arange(40, 80), junk="work")
        data._split = replace(data.split, test=task)
        callback = RetrievalEvaluation(FaissIndex("Flat"), ks=KS)
        trainer(tmp_path, callback).test(Projection(), data, verbose=False)
        found = callback.results["test"].found.ids
        assert found.shape == (20, 20)
        for query, row in enumerate(found.tolist()):
            assert all((40 + position) // 8 != (60 + query) // 8 for position in row)
        assert json.loads((tmp_path / "metrics.json").read_text())["test"]["junk"] == "work"

    def test_reranking_is_measured_at_test_and_when_validating_but_not_in_training(self, tmp_path):
        data = Pictures(OfficialSplit("tiny", gallery="train", exclude_self=True, validation=0.3))
        callback = RetrievalEvaluation(FaissIndex("Flat"), ks=KS, rerank=AQE(3))
        model = Projection()
        trainer(tmp_path, callback).fit(model, data)
        assert not any(name.startswith("rerank/") for name in callback.results["validate"].metrics)
        for stage, key in (("validate", "val"), ("test", "test")):
            worker = trainer(tmp_path, callback)
            logged = getattr(worker, stage)(model, data, verbose=False)[0]
            metrics = callback.results[stage].metrics
            assert logged[f"{key}/rerank/mAP"] == pytest.approx(metrics["rerank/mAP"])
            about = json.loads((tmp_path / "metrics.json").read_text())[key]
            assert about["metrics"]["rerank/P@5"] == metrics["rerank/P@5"]
            assert "rerank/mAP" in about["intervals"]
        table = pq.read_table(tmp_path / "per_query.parquet")
        assert np.nanmean(table["rerank/AP"].to_numpy()) == pytest.approx(metrics["rerank/mAP"], abs=1e-12)


class TestNeighbours:
    def test_figure_and_queries_to_try(self, data, tmp_path):
        evaluation = RetrievalEvaluation(FaissIndex("Flat"), ks=KS)
        figure = NeighbourFigure(queries=4, k=3)
        trainer(tmp_path, evaluation, figure).test(Projection(), data, verbose=False)
        assert len(figure.examples) == 4
        precision = [example.average_precision for example in figure.examples]
        assert precision == sorted(precision)
        with Image.open(tmp_path / "figures/neighbours.png") as picture:
            assert picture.height > 4 * 96
        assert sorted(p.name for p in (tmp_path / "figures/queries").iterdir()) == [f"0{i}.png" for i in range(4)]
        with Image.open(tmp_path / "figures/queries/00.png") as picture:
            assert np.array_equal(np.asarray(picture), figure.examples[0].tiles[0].image.permute(1, 2, 0).numpy())

    def test_examples_run_from_worst_to_best_with_right_and_wrong(self):
        # A gallery whose positions are not its rows.
        data = Pictures(OfficialSplit("tiny", gallery="test", exclude_self=True, validation=0.3))
        data.setup()
        task, collection = data.task("test"), data.collection
        result = by_hand(Projection(), data, task)
        examples = choose_examples(result, collection, task, queries=10, k=5)
        ordered = result.per_query["AP"].sort().values
        assert examples[0].average_precision <= ordered[1]
        assert examples[-1].average_precision >= ordered[-2]
        for example in examples:
            query, *found = example.tiles
            assert query.right is None
            assert query.caption.startswith(f"AP {example.average_precision:.2f} ")
            assert len(found) == 5
            label = query.caption[-1]
            assert [tile.right for tile in found] == [tile.caption == label for tile in found]
            for tile in example.tiles:
                row = next(i for i in range(80) if torch.equal(collection.images[i], tile.image))
                assert row >= 60
                assert tile.caption[-1] == "abcd"[row % 4]
        assert any(tile.right for e in examples for tile in e.tiles)
        assert any(tile.right is False for e in examples for tile in e.tiles)

    def test_fewer_queries_than_asked(self, data):
        data.setup()
        result = by_hand(Projection(), data, data.task("test"))
        assert len(choose_examples(result, data.collection, data.task("test"), queries=500, k=2)) == 20

    @pytest.mark.parametrize(("count", "queries"), [(1, 5), (26, 26), (30, 29), (100, 99), (100, 100), (100, 7)])
    def test_no_query_is_drawn_twice(self, count, queries):
        rows = torch.arange(count)
        images = rows.byte().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
        collection = Collection("grey", images, rows[:, None] * 0, ("class",), (("a",),), rows < 0)
        side = Sharded.of(Descriptors(F.normalize(torch.rand(count, 2)), rows * 0, rows))
        result = SimpleNamespace(
            per_query={"AP": torch.rand(count).double()}, query=side, gallery=side,
            found=SearchResult(rows[:, None], torch.ones(count, 1)),
        )  # fmt: skip
        task = RetrievalTask("t", rows, rows, "class", None, False, "")
        examples = choose_examples(result, collection, task, queries, k=1)
        assert len({int(example.tiles[0].image[0, 0, 0]) for example in examples}) == min(queries, count)

    @pytest.mark.parametrize("arguments", [{"queries": 0}, {"k": 0}])
    def test_wrong_values(self, arguments):
        with pytest.raises(ValueError, match="must be at least 1"):
            NeighbourFigure(**arguments)
