"""What all evaluators share: means by sampling units, and the place of further ones in an evaluation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from simsearch.evaluation.class_means import ClassMeans
from simsearch.evaluation.evaluate import Search
from simsearch.evaluation.evaluator import Measured, check_ks, query_units, sides
from simsearch.evaluation.ranking import FullRanking
from simsearch.evaluation.record import plain_metrics
from simsearch.functional.codes import pack_codes
from simsearch.functional.sharded import Ranks, Sharded
from simsearch.index.faiss_index import FaissIndex
from simsearch.types import Descriptors, RetrievalTask

ROWS = torch.arange(24)
TASK = RetrievalTask("toy", ROWS[:10], ROWS, "kind", None, True, "0" * 16, unit="artist", units=ROWS // 3)


@pytest.fixture(scope="module")
def both() -> tuple[Sharded, Sharded]:
    """Ten queries, and a gallery that holds them too."""
    vectors = torch.nn.functional.normalize(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = Descriptors(vectors, ROWS % 4, ROWS)
    some = Descriptors(vectors[:10], (ROWS % 4)[:10], ROWS[:10])
    return Sharded.of(some), Sharded.of(whole)


def test_means_leave_out_queries_without_a_value_and_rename_ap():
    per_query = {"AP": torch.tensor([0.2, math.nan, 0.7]).double(), "P@1": torch.tensor([1.0, 0.0, math.nan]).double()}
    measured = Measured.of(per_query, torch.tensor([5, 5, 6]))
    assert measured.metrics == {"mAP": pytest.approx(0.45), "P@1": 0.5}
    assert set(measured.intervals) == {"mAP", "P@1"}
    assert all(low <= measured.metrics[name] <= high for name, (low, high) in measured.intervals.items())
    assert list(measured.per_query) == ["AP", "P@1"]


def test_the_search_evaluator_takes_the_rules_of_the_task(both):
    """No query finds itself, intervals are over artists, the index of the caller stays empty."""
    index = FaissIndex("Flat")
    found = Search(index, ks=(1, 5))(*both, TASK)
    assert len(index) == 0
    assert found.units.tolist() == [row // 3 for row in range(10)]
    assert all(row not in near for row, near in enumerate(found.found.ids.tolist()))
    ranking = FullRanking(ks=(1, 5))(*both, TASK)
    assert ranking.metrics.items() <= found.metrics.items()
    assert ranking.intervals.items() <= found.intervals.items()
    assert found.metrics["queries_in_own_ranking"] == 0
    own = Search(index, ks=(1, 5))(*both, replace(TASK, exclude_self=False))
    assert own.metrics["P@1"] == 1


def test_further_numbers_join_under_names_of_their_own(both):
    found = Search(FaissIndex("Flat"), ks=(1,))(*both, TASK)
    units = query_units(both[0], TASK)
    found.add(Measured.of({"luck": torch.arange(10).double()}, units), "luck")
    found.add(Measured({"GAP": 0.25}, torch.arange(3)), "gap")  # of other queries: a number alone
    assert (found.metrics["luck"], found.metrics["GAP"]) == (4.5, 0.25)
    assert found.per_query["luck"].tolist() == list(range(10))
    with pytest.raises(ValueError, match=r"evaluators\.again measures luck, which is measured already"):
        found.add(Measured({"luck": 1.0}, units), "again")
    with pytest.raises(ValueError, match=r"evaluators\.few has values of other queries"):
        found.add(Measured.of({"few": torch.ones(3).double()}, torch.arange(3)), "few")


def test_what_needs_all_descriptors_refuses_those_of_several_ranks(both):
    assert both[1].whole is both[1].own
    with pytest.raises(ValueError, match="all descriptors in one process, and they are spread over 2"):
        _ = replace(both[1], ranks=Ranks(0, 2)).whole


@pytest.mark.parametrize("ks", [(), 5, (1, 0), (1, 100.0)])  # Hydra reads 1e2 as 100.0
def test_cutoffs_are_whole_ranks(ks):
    with pytest.raises(ValueError, match="ks must be a list of ranks from 1"):
        check_ks(ks)


def test_a_metric_without_a_value_is_null_in_json():
    assert plain_metrics({"a": 0.5, "b": math.nan}) == {"a": 0.5, "b": None}


def test_sides_take_the_labels_and_junk_of_the_task(collection_of_two):
    vectors = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([4, 1])
    task = RetrievalTask("t", rows, torch.arange(6), "artist", "work", True, "0" * 16)
    query, gallery = sides(vectors, 12, collection_of_two, task)
    assert query.label.tolist() == collection_of_two.column("artist")[rows].tolist()
    assert query.group.tolist() == collection_of_two.column("work")[rows].tolist()
    bits = np.unpackbits(query.whole.vectors.numpy(), axis=1, bitorder="little")[:, :12]
    np.testing.assert_array_equal(bits, vectors[rows].numpy() > 0)
    assert gallery.bits == 12
    assert sides(vectors, None, collection_of_two, replace(task, junk=None))[0].group is None


@pytest.fixture
def collection_of_two():
    from simsearch.data.collection import Collection

    labels = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3], [1, 3], [-1, -1]])
    names = (("a", "b"), ("p", "q", "r", "s"))
    images = torch.zeros(6, 3, 1, 1, dtype=torch.uint8)
    return Collection("two", images, labels, ("artist", "work"), names, torch.zeros(6, dtype=torch.bool))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bits", [None, 16])
def test_the_nearest_class_mean_equals_a_loop(bits, grouped, monkeypatch):
    monkeypatch.setattr("simsearch.evaluation.class_means._BLOCK", 7)
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 4, (60,), generator=generator)
    label[5], label[6], label[7] = -1, 9, 8  # unknown, alone in the gallery, and only a query
    real = torch.randn(60, 16, generator=generator) + 0.8 * torch.randn(10, 16, generator=generator)[label]
    rows = torch.arange(60)
    group = torch.randint(-1, 8, (60,), generator=generator) if grouped else None
    if group is not None:
        group[label == 9] = 8
        label[8], group[8], group[9] = 9, 8, 8  # the whole class is junk to its items, and another item
    vectors = real if bits is None else pack_codes(real)
    stored = torch.nn.functional.normalize(real) if bits is None else real.sign()
    inside = torch.cat([rows[:7], rows[8:]])

    def part(chosen: torch.Tensor) -> Sharded:
        junk = None if group is None else group[chosen]
        return Sharded.of(Descriptors(vectors[chosen], label[chosen], chosen, bits=bits, group=junk))

    def is_nearest(row: int, without: bool) -> float:
        means = {}
        for kind in label[inside].unique().tolist():
            junk = [r for r in range(60) if group is not None and group[r] == group[row] >= 0] + [row] * without
            own = [r for r in inside.tolist() if label[r] == kind and r not in junk]
            if kind >= 0 and own:
                mean = stored[own].double().mean(0)
                means[kind] = float(stored[row].double() @ mean / mean.norm())
        kind = int(label[row])
        return float(max(means, key=means.__getitem__) == kind) if kind in means else math.nan

    for exclude in (True, False):
        expected = [is_nearest(row, exclude) for row in range(20)]
        task = RetrievalTask("toy", rows[:20], inside, "kind", "group" if grouped else None, exclude, "0" * 16)
        measured = ClassMeans()(part(rows[:20]), part(inside), task)
        np.testing.assert_array_equal(measured.per_query["class/accuracy"].numpy(), expected)
        assert measured.metrics["class/accuracy"] == pytest.approx(np.nanmean(expected))
        assert 0.3 < measured.metrics["class/accuracy"] < 1
        assert set(measured.intervals) == {"class/accuracy"}
        found = np.nanmean([is_nearest(row, True) for row in inside.tolist()])
        assert measured.metrics["class/gallery_accuracy"] == pytest.approx(found)
