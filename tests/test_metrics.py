"""The torchmetrics module against measure_ranking; doubles, states, and two processes against one."""

import pickle
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import in_ranks

from simsearch.functional.codes import pack_codes
from simsearch.functional.ranking import mean_name, measure_ranking
from simsearch.metrics.retrieval import RetrievalMetrics
from simsearch.types import Descriptors

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
KS = (1, 5)


def make(n: int, *, seed: int, first: int = 0) -> Part:
    """Embeddings (n, 12), labels, rows and junk groups."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(-1, 4, (n,), generator=generator)
    group = torch.randint(-1, n // 3, (n,), generator=generator)
    return torch.randn(n, 12, generator=generator), label, torch.arange(first, first + n), group


def feed(metric: RetrievalMetrics, name: str, part: Part, rows: torch.Tensor, batch: int = 8) -> None:
    for chosen in rows.split(batch):
        metric.update(name, *(column[chosen] for column in part))


def expected(query: Part, gallery: Part, bits: int | None) -> dict[str, torch.Tensor]:
    left, right = (
        Descriptors(vectors if bits is None else pack_codes(vectors), label, index, bits, group)
        for vectors, label, index, group in (query, gallery)
    )
    values = measure_ranking(left, right, ks=KS, exclude_self=True)
    del values["relevant"]
    return {mean_name(name): value[~value.isnan()].mean() for name, value in values.items()}


@pytest.mark.parametrize("bits", [None, 12])
def test_equals_measure_ranking(bits):
    query, gallery = make(30, seed=0, first=20), make(50, seed=1)
    metric = RetrievalMetrics(KS, bits=bits, exclude_self=True)
    feed(metric, "gallery", gallery, torch.randperm(50, generator=torch.Generator().manual_seed(2)))
    feed(metric, "query", query, torch.arange(30))
    values = metric.compute()
    assert values.keys() >= {"mAP", "RP", "P@1", "R@5", "NDCG@5", "mAP@5_minRk", "mAP@5_R"}
    assert ("mAP_pessimistic" in values) == (bits is not None)
    for name, value in expected(query, gallery, bits).items():
        assert values[name].dtype == torch.float64
        torch.testing.assert_close(values[name], value, rtol=0, atol=1e-12)


def test_without_groups_there_is_no_junk():
    vectors, label, index, _ = make(20, seed=0)
    metric = RetrievalMetrics(KS)
    metric.update("query", vectors, label, index)
    metric.update("gallery", vectors, label, index)
    alone = measure_ranking(Descriptors(vectors, label, index), Descriptors(vectors, label, index), ks=KS)
    assert torch.equal(metric.per_query()["AP"].nan_to_num(-1), alone["AP"].nan_to_num(-1))


def test_rows_that_came_twice_count_once_and_first():
    query, gallery = make(30, seed=0, first=20), make(50, seed=1)
    metric = RetrievalMetrics(KS, exclude_self=True)
    feed(metric, "query", query, torch.cat([torch.arange(30), torch.arange(7)]))
    feed(metric, "gallery", gallery, torch.cat([torch.arange(50), torch.arange(40, 50), torch.tensor([3, 3])]))
    changed = torch.full((50, 12), 9.0), *gallery[1:]
    feed(metric, "gallery", changed, torch.arange(10))
    kept = metric.descriptors("gallery")
    assert torch.equal(kept.vectors, gallery[0])
    assert torch.equal(kept.index, gallery[2])
    values = metric.compute()
    for name, value in expected(query, gallery, None).items():
        torch.testing.assert_close(values[name], value, rtol=0, atol=1e-12)


def test_descriptors_come_by_row():
    gallery = make(40, seed=1)
    metric = RetrievalMetrics(KS)
    feed(metric, "gallery", gallery, torch.randperm(40, generator=torch.Generator().manual_seed(0)))
    for ours, theirs in zip(("vectors", "label", "index", "group"), gallery, strict=True):
        assert torch.equal(getattr(metric.descriptors("gallery"), ours), theirs)


def test_computed_again_after_more_updates_and_after_a_reset():
    query, gallery = make(30, seed=0, first=20), make(50, seed=1)
    metric = RetrievalMetrics(KS, exclude_self=True)
    feed(metric, "query", query, torch.arange(30))
    feed(metric, "gallery", gallery, torch.arange(20))
    part = metric.compute()
    torch.testing.assert_close(
        part["mAP"], expected(query, tuple(c[:20] for c in gallery), None)["mAP"], rtol=0, atol=1e-12
    )
    feed(metric, "gallery", gallery, torch.arange(20, 50))
    whole = metric.compute()
    torch.testing.assert_close(whole["mAP"], expected(query, gallery, None)["mAP"], rtol=0, atol=1e-12)
    metric.reset()
    with pytest.raises(ValueError, match="no query items were collected"):
        metric.descriptors("query")


def test_forward_collects():
    query, gallery = make(30, seed=0, first=20), make(50, seed=1)
    metric = RetrievalMetrics(KS, exclude_self=True)
    assert metric("query", *query) is None
    assert metric("gallery", *gallery) is None
    torch.testing.assert_close(metric.compute()["mAP"], expected(query, gallery, None)["mAP"], rtol=0, atol=1e-12)


def test_states_travel_but_stay_out_of_checkpoints():
    query, gallery = make(30, seed=0, first=20), make(50, seed=1)
    metric = RetrievalMetrics(KS, bits=12)
    feed(metric, "query", query, torch.arange(30))
    feed(metric, "gallery", gallery, torch.arange(50))
    assert metric.state_dict() == {}
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert copy.compute() == metric.compute()
    assert metric.clone().ks == KS


def test_no_query_with_relevant_items_is_nan():
    metric = RetrievalMetrics(KS)
    metric.update("query", torch.ones(2, 3), torch.tensor([5, -1]), torch.arange(2))
    metric.update("gallery", torch.ones(2, 3), torch.tensor([1, 2]), torch.arange(2))
    assert all(value.isnan() for value in metric.compute().values())


def test_half_precision_and_gradients_are_left_behind():
    vectors, label, index, _ = make(10, seed=0)
    metric = RetrievalMetrics(KS)
    metric.update("query", vectors.half().requires_grad_(), label, index)
    kept = metric.descriptors("query").vectors
    assert kept.dtype == torch.float32
    assert not kept.requires_grad


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_errors():
    vectors, label, index, _ = make(4, seed=0)
    for ks in ((), (0, 1)):
        with pytest.raises(ValueError, match="ks must be ranks from 1"):
            RetrievalMetrics(ks)
    metric = RetrievalMetrics(KS, bits=16)
    with pytest.raises(ValueError, match="role must be query or gallery, got 'train'"):
        metric.update("train", vectors, label, index)
    with pytest.raises(ValueError, match="codes of 16 bits need embeddings as wide, got 12"):
        metric.update("query", vectors, label, index)
    with pytest.raises(ValueError, match="no query items were collected"):
        metric.compute()
    metric = RetrievalMetrics(KS)
    metric.update("query", vectors, label, index)
    with pytest.raises(ValueError, match="no gallery items were collected"):
        metric.compute()
    metric.update("gallery", torch.full((4, 12), torch.nan), label, index)
    with pytest.raises(ValueError, match="NaN or infinity"):
        metric.compute()


@pytest.mark.parametrize(
    ("name", "mean"),
    [("AP", "mAP"), ("AP@10_R", "mAP@10_R"), ("index/AP@10", "index/mAP@10"), ("P@1", "P@1"), ("RP", "RP")],
)
def test_mean_names(name, mean):
    assert mean_name(name) == mean


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    query, gallery = make(31, seed=0, first=20), make(53, seed=1)
    results = []
    for bits in (None, 12):
        metric = RetrievalMetrics(KS, bits=bits, exclude_self=True)
        # Unequal shards that share rows, as a padded sampler deals them, in other batch sizes.
        feed(metric, "query", query, [torch.arange(0, 20), torch.arange(18, 31)][rank], batch=8 - rank)
        feed(metric, "gallery", gallery, [torch.arange(10, 53), torch.arange(0, 12)][rank], batch=9 + rank)
        results.append(metric.compute())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    in_ranks(_rank, 2, str(tmp_path))
    query, gallery = make(31, seed=0, first=20), make(53, seed=1)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for bits, values in zip((None, 12), results, strict=True):
            for name, value in expected(query, gallery, bits).items():
                torch.testing.assert_close(values[name], value, rtol=0, atol=1e-12)
