"""GAP, microAP and mAP@k with distractor queries: naive loops from the definitions, and values of the public code."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import SMALL, simsearch

from simsearch.data.revisited import Benchmark, Query
from simsearch.evaluation.instance import Instance, measure_pooled, pooled_precision
from simsearch.evaluation.revisited import Revisited, benchmark_sides
from simsearch.functional.codes import pack_codes
from simsearch.functional.sharded import Sharded
from simsearch.results import open_set_note
from simsearch.types import Descriptors, RetrievalTask


def example(seed: int, queries: int = 60, items: int = 300, classes: int = 25):
    """Scores float32 (Q, G) of unit queries against the unit vectors of all dimensions, and both sides' labels."""
    r = np.random.default_rng(seed)
    gallery = r.integers(0, classes, items)
    query = r.integers(0, classes + 10, queries)  # of ten classes there is no item
    query[r.random(queries) < 0.15] = -1  # and of these nothing is known
    scores = r.standard_normal((queries, items)) + 2.0 * (query[:, None] == gallery)
    return (scores / np.linalg.norm(scores, axis=1, keepdims=True)).astype(np.float32), query, gallery


def measured(scores: np.ndarray, query: np.ndarray, gallery: np.ndarray, depth: int, **task):
    """What the evaluator finds where the inner products are these scores: the gallery is the identity."""
    q, g = scores.shape
    rows = torch.arange(g + q)
    of_query = Descriptors(torch.from_numpy(scores), torch.from_numpy(query), rows[g:])
    of_gallery = Descriptors(torch.eye(g), torch.from_numpy(gallery), rows[:g])
    settings = {"name": "toy", "attribute": "work", "junk": None, "exclude_self": False, "fingerprint": "0" * 16} | task
    toy = RetrievalTask(query=rows[g:], gallery=rows[:g], **settings)
    return Instance(depth)(Sharded.of(of_query), Sharded.of(of_gallery), toy)


# Each row: seed, depth, and from the public code on example(seed) in float64 (scores are the first G inner products):
# gap, gap_non_distr and classif_accuracy of nikosips/met (code/utils/utils.py, commit dea402c), given the label and the
# score of the best item of each query, -1 for a distractor; average_precision of isc.metrics.evaluate of
# facebookresearch/isc2021 (c6f5528), given the `depth` best items of each query as predictions; the mean of
# ILIAS._compute_AP(k=depth) of ilias-vrg/ilias (evaluation/src/dataset.py, e81029e) over queries with a relevant item.
PUBLIC = [
    (0, 20, 0.7982009451759671, 0.8612144845176128, 0.8918918918918919, 0.3451455865052891, 0.4468493730435156),
    (1, 300, 0.646138926930158, 0.711877607234429, 0.7714285714285715, 0.33350544514473013, 0.5031073603958989),
    (2, 1000, 0.7431204934075814, 0.818730372652481, 0.875, 0.38920611272741096, 0.5188875056296374),
]


@pytest.mark.parametrize("row", PUBLIC, ids=[f"seed{row[0]}" for row in PUBLIC])
def test_values_are_those_of_the_public_code(row):
    seed, depth, *expected = row
    metrics = measured(*example(seed), depth).metrics
    names = ("GAP", "GAP-", "accuracy", "microAP", f"mAP@{depth}_minRk")
    assert [metrics[f"instance/{name}"] for name in names] == pytest.approx(expected, abs=1e-6)
    assert metrics["instance/distractors"] == (23, 25, 20)[seed]


def naive(scores, query, gallery, depth: int, barred=lambda q, g: False, relevant=None) -> dict[str, float]:
    """The measures by loops over sorted lists. Relevant is what has the query's label, or what `relevant` says."""
    answers, firsts, aps, pairs, found = [], [], [], 0, []
    for q in range(len(query)):
        ranked = sorted((g for g in range(len(gallery)) if not barred(q, g)), key=lambda g: -scores[q, g])
        same = relevant or (lambda q, g: query[q] >= 0 and gallery[g] == query[q])
        right = {g for g in ranked if same(q, g)}
        pairs += len(right)
        answers += [(scores[q, g], g in right) for g in ranked[:depth]]
        firsts.append((scores[q, ranked[0]], ranked[0] in right, bool(right)))
        if right:
            found.append(ranked[0] in right)
            hits, total = 0, 0.0
            for rank, g in enumerate(ranked[:depth], 1):
                hits += g in right
                total += hits / rank if g in right else 0.0
            aps.append(total / min(len(right), depth))

    def together(listed, positives: int) -> float:
        hits, total = 0, 0.0
        for rank, (_, correct) in enumerate(sorted(listed, key=lambda answer: -answer[0]), 1):
            hits += correct
            total += hits / rank if correct else 0.0
        return total / positives

    return {
        "GAP": together([answer[:2] for answer in firsts], len(aps)),
        "GAP-": together([answer[:2] for answer in firsts if answer[2]], len(aps)),
        "accuracy": sum(found) / len(found),
        "microAP": together(answers, pairs),
        f"mAP@{depth}_minRk": sum(aps) / len(aps),
        "distractors": len(query) - len(aps),
    }


@pytest.mark.parametrize("depth", [1, 7, 500])
def test_values_are_those_of_naive_loops(depth):
    scores, query, gallery = example(3, 40, 80, 15)
    metrics = measured(scores, query, gallery, depth).metrics
    expected = naive(scores.astype(float), query, gallery, depth)
    assert metrics == {f"instance/{name}": pytest.approx(value, abs=1e-12) for name, value in expected.items()}


def test_junk_is_no_answer_and_not_relevant():
    """Queries are gallery rows too; images of a query's group are junk, which makes distractors of some."""
    generator = torch.Generator().manual_seed(4)
    vectors = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    label, group = torch.arange(50) % 12, torch.arange(50) // 20
    rows, some = torch.arange(50), torch.arange(0, 50, 3)
    task = RetrievalTask("toy", some, rows, "work", "artist", True, "0" * 16)
    query = Descriptors(vectors[some], label[some], some, group=group[some])
    found = Instance(9)(Sharded.of(query), Sharded.of(Descriptors(vectors, label, rows, group=group)), task)
    scores = (vectors[some].double() @ vectors.double().T).numpy()
    expected = naive(scores, label[some].tolist(), label.tolist(), 9, lambda q, g: group[3 * q] == group[g])
    assert found.metrics == {f"instance/{name}": pytest.approx(value, abs=1e-9) for name, value in expected.items()}


def test_equal_scores_lie_between_the_orders_that_favour_and_disfavour():
    """Codes of 6 bits: DISC puts the wrong of equal scores first, which is the lower end."""
    generator = torch.Generator().manual_seed(5)
    label = torch.arange(90) % 20
    outputs = torch.randn(20, 6, generator=generator)[label] + 0.3 * torch.randn(90, 6, generator=generator)
    label[80:] = 99  # distractors
    rows = torch.arange(90)
    task = RetrievalTask("toy", rows[60:], rows[:60], "work", None, False, "0" * 16)
    query, gallery = (Descriptors(pack_codes(outputs[r]), label[r], r, bits=6) for r in (rows[60:], rows[:60]))
    metrics = Instance(60)(Sharded.of(query), Sharded.of(gallery), task).metrics
    signs = (outputs > 0).double() * 2 - 1
    scores = signs[60:] @ signs[:60].T
    right = label[60:, None] == label[:60]
    ends = [
        pooled_precision(scores + 1e-6 * favour * right.double(), right, right.sum(1))["microAP"] for favour in (-1, 1)
    ]
    assert ends[0] + 0.01 < metrics["instance/microAP"] < ends[1] - 0.01


@pytest.mark.parametrize("depth", [3, 400])
def test_a_benchmark_has_them_for_each_setup(depth):
    """Easy, hard and junk lists: what a setup ignores is no answer, and a query with nothing right is a distractor."""
    r = np.random.default_rng(6)
    grade = r.choice(4, (20, 50), p=[0.8, 0.07, 0.06, 0.07])  # nothing, easy, hard, junk
    grade[15:, :], grade[10:15][grade[10:15] == 2] = 0, 0  # five have nothing right, five have nothing hard
    lists = [[tuple(np.flatnonzero(row == g).tolist()) for g in (1, 2, 3)] for row in grade]
    queries = tuple(Query(f"q_{i}", None, *listed) for i, listed in enumerate(lists))
    benchmark = Benchmark("toy", tuple(f"b_{i}" for i in range(50)), queries)
    vectors = torch.nn.functional.normalize(torch.randn(70, 8, generator=torch.Generator().manual_seed(6)), dim=1)
    rows = torch.arange(70)
    task = RetrievalTask("toy", rows[50:], rows[:50], "", None, False, "0" * 16, "landmark", rows)
    measured = Revisited(benchmark, (1,), depth)(*benchmark_sides(vectors[50:], vectors[:50], task), task)
    scores = (vectors[50:].double() @ vectors[:50].double().T).numpy()
    for setup, right in (("easy", (1,)), ("medium", (1, 2)), ("hard", (2,))):
        expected = naive(
            scores,
            np.arange(20),
            np.arange(50),
            depth,
            barred=lambda q, g, right=right: grade[q, g] > 0 and grade[q, g] not in right,
            relevant=lambda q, g, right=right: grade[q, g] in right,
        )
        for name in ("GAP", "GAP-", "microAP", f"mAP@{depth}_minRk"):
            assert measured.metrics[f"{setup}/{name}"] == pytest.approx(expected[name], abs=1e-9), (setup, name)
        assert set(measured.intervals) >= {f"{setup}/GAP", f"{setup}/microAP"}
    plain = Revisited(benchmark, (1,))(*benchmark_sides(vectors[50:], vectors[:50], task), task)
    assert plain.metrics.items() <= measured.metrics.items()
    assert not any("GAP" in name for name in plain.metrics)


def test_without_any_relevant_item_there_is_no_value():
    scores, query, gallery = example(0, 5, 20)
    metrics = measured(scores, query * 0 + 99, gallery, 10)
    assert all(math.isnan(value) for name, value in metrics.metrics.items() if name != "instance/distractors")
    assert "instance/GAP" not in metrics.intervals
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Instance(0)
    with pytest.raises(ValueError, match="depth must be at least 1, or null to measure without, got 0"):
        Revisited(Benchmark("toy", ("b",), (Query("q", None, (0,), (), ()),)), depth=0)


def test_intervals_hold_the_true_value_as_often_as_they_say():
    """300 units, more than are left out one by one: nearly all samples hold the value of 100,000 queries."""
    generator = torch.Generator().manual_seed(0)

    def answers(count: int):
        """Four answers to each query, whose qualities are alike; some queries are distractors."""
        quality = torch.randn(count, 1, generator=generator)
        right = torch.rand(count, 4, generator=generator) < torch.sigmoid(quality)
        right &= torch.rand(count, 1, generator=generator) > 0.3
        scores = quality + torch.randn(count, 4, generator=generator) + 1.5 * right
        scores, order = scores.sort(1, descending=True)
        return scores, right.gather(1, order), right.sum(1) + (quality[:, 0] > 0).long()

    truth = pooled_precision(*answers(100_000))
    held, values, errors = dict.fromkeys(truth, 0), {name: [] for name in truth}, {name: [] for name in truth}
    for _ in range(60):
        found, intervals = measure_pooled(*answers(300), torch.arange(300))
        for name, value in found.items():
            low, high = intervals[name]
            held[name] += low <= truth[name] <= high
            values[name].append(value)
            errors[name].append((high - low) / 3.92)
    assert all(count >= 54 for count in held.values()), held
    assert all(np.mean(errors[name]) < 2 * np.std(values[name]) for name in truth)  # and not because they are wide


def test_what_is_printed():
    """In one line, beside the table: the command's end-to-end test is slow."""
    metrics = measured(*example(0), 20)
    about = {"protocol": "toy", "metrics": metrics.metrics | {"queries": 60.0}, "intervals": metrics.intervals}
    note = open_set_note(about, "instance/")
    assert note.startswith("instances of toy: GAP 0.7982 (0.")
    assert "GAP- 0.8612 (" in note
    assert "microAP 0.3451 (" in note
    assert "mAP@20_minRk 0.4468 (" in note
    assert note.endswith("; 23 of 60 queries are distractors")


@pytest.mark.slow
def test_a_user_reads_them(tmp_path):
    run, given = tmp_path / "run", ("evaluators=instance", "evaluators.instance.depth=5")
    simsearch("train", *SMALL, "protocol=rendered-work", f"run_dir={run}", "logger.mode=disabled")
    done = simsearch("evaluate", f"run={run}", *given, f"run_dir={tmp_path}/e")
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())["test"]["metrics"]
    assert {"instance/GAP", "instance/microAP", "instance/mAP@5_minRk"} <= set(metrics)
    said = " ".join(done.stdout.split())
    assert f"instances of rendered-work: GAP {metrics['instance/GAP']:.4f}" in said
    assert f"0 of {metrics['queries']:.0f} queries are distractors" in said
