"""Expected, pessimistic and optimistic values against every order that the ties allow."""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.functional import ties
from simsearch.functional.codes import pack_codes
from simsearch.functional.ranking import average_precision_in_index_order, measure_ranking, rank
from simsearch.types import Descriptors

KS = (1, 2, 3, 5, 20)


def precisions(order: tuple[bool, ...]) -> list[tuple[int, float]]:
    """Rank and precision of each relevant item."""
    found = [rank for rank, right in enumerate(order, 1) if right]
    return [(rank, hits / rank) for hits, rank in enumerate(found, 1)]


def metrics_of(order: tuple[bool, ...]) -> dict[str, float]:
    """The metrics of one ranking without ties, by their definitions."""
    relevant = sum(order)
    values = {
        "AP": sum(p for _, p in precisions(order)) / relevant,
        "RP": sum(order[:relevant]) / relevant,
    }
    for k in KS:
        within = sum(p for rank, p in precisions(order) if rank <= k)
        gain = sum(1 / math.log2(rank + 1) for rank, _ in precisions(order) if rank <= k)
        best = sum(1 / math.log2(rank + 1) for rank in range(1, min(relevant, k) + 1))
        values |= {
            f"AP@{k}_minRk": within / min(relevant, k),
            f"AP@{k}_R": within / relevant,
            f"P@{k}": sum(order[:k]) / k,
            f"R@{k}": float(any(order[:k])),
            f"NDCG@{k}": gain / best,
        }
    return values


def all_orders(items: list[tuple[int, bool]]) -> list[tuple[bool, ...]]:
    """Every order of (score, relevant) by falling score; within a group each arrangement is as likely."""
    groups = [
        sorted(set(permutations([right for s, right in items if s == score])))
        for score in sorted({s for s, _ in items}, reverse=True)
    ]
    return [tuple(right for group in chosen for right in group) for chosen in product(*groups)]


def as_vectors(items: list[tuple[int, bool]]) -> tuple[Descriptors, Descriptors]:
    """One query whose inner products are exactly the scores."""
    query = Descriptors(torch.tensor([[1.0, 2.0]]), torch.tensor([7]), torch.tensor([1000]))
    scores = torch.tensor([[float(s), 0.0] for s, _ in items])
    label = torch.tensor([7 if right else 3 for _, right in items])
    return query, Descriptors(scores, label, torch.arange(len(items)))


def as_codes(items: list[tuple[int, bool]], bits: int = 5) -> tuple[Descriptors, Descriptors]:
    """One query whose Hamming distances are bits - score."""
    query = Descriptors(torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([7]), torch.tensor([1000]), bits)
    thermometer = torch.arange(bits) < bits - torch.tensor([s for s, _ in items])[:, None]
    label = torch.tensor([7 if right else 3 for _, right in items])
    return query, Descriptors(pack_codes(thermometer.float()), label, torch.arange(len(items)), bits)


drawn_items = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=8).filter(
    lambda items: any(right for _, right in items)
)


@settings(max_examples=60, deadline=None)
@given(items=drawn_items)
def test_every_metric_is_the_mean_over_all_orders(items):
    orders = [metrics_of(order) for order in all_orders(items)]
    expected = {name: np.mean([values[name] for values in orders]) for name in orders[0]}
    for query, gallery in (as_vectors(items), as_codes(items)):
        measured = measure_ranking(query, gallery, ks=KS)
        for name, value in expected.items():
            assert float(measured[name]) == pytest.approx(value, abs=1e-12), name
        assert float(measured["relevant"]) == sum(right for _, right in items)


@settings(max_examples=60, deadline=None)
@given(items=drawn_items, k=st.sampled_from([None, 1, 2, 3, 5, 20]))
def test_the_two_ends_are_the_worst_and_the_best_order(items, k):
    name = "AP" if k is None else f"AP@{k}_R"
    values = [metrics_of(order)[name] for order in all_orders(items)]
    harmonic = ties.harmonic_numbers(len(items))
    for query, gallery in (as_vectors(items), as_codes(items)):
        (ranking,) = rank(query, gallery)
        worst = ties.average_precision(ranking, harmonic, k=k, ties="pessimistic")
        best = ties.average_precision(ranking, harmonic, k=k, ties="optimistic")
        assert float(worst) == pytest.approx(min(values), abs=1e-12)
        assert float(best) == pytest.approx(max(values), abs=1e-12)


def test_measured_ends_of_codes_are_the_unlimited_ones():
    items = [(2, True), (2, False), (2, False), (1, True), (0, True), (0, False)]
    values = [metrics_of(order)["AP"] for order in all_orders(items)]
    measured = measure_ranking(*as_codes(items))
    assert float(measured["AP_pessimistic"]) == pytest.approx(min(values), abs=1e-12)
    assert float(measured["AP_optimistic"]) == pytest.approx(max(values), abs=1e-12)
    assert "AP_optimistic" not in measure_ranking(*as_vectors(items))


def test_alone_and_tied_items_of_several_queries_in_one_block():
    scores = torch.randint(0, 4, (20, 7), generator=torch.Generator().manual_seed(0))
    right = [True, False, True, False, False, True, False]
    # One-hot queries: query i reads column i of the gallery.
    query = Descriptors(torch.eye(20), torch.full((20,), 7), torch.arange(100, 120))
    label = torch.tensor([7 if r else 3 for r in right])
    measured = measure_ranking(query, Descriptors(scores.T.float(), label, torch.arange(7)), ks=KS)
    for i, row in enumerate(scores.tolist()):
        orders = [metrics_of(order) for order in all_orders(list(zip(row, right, strict=True)))]
        for name in orders[0]:
            expected = np.mean([values[name] for values in orders])
            assert float(measured[name][i]) == pytest.approx(expected, abs=1e-12), name


def test_toy_ranking_of_the_five_definitions():
    """Relevant at ranks 1, 3 and 6 of ten, ten relevant in all: .722 over the found, .217 over all."""
    right = {1, 3, 6}
    items = [(30 - rank, rank in right or rank > 10) for rank in range(1, 18)]
    (ranking,) = rank(*as_vectors(items))
    harmonic = ties.harmonic_numbers(len(items))
    over_all = ties.average_precision(ranking, harmonic, k=10, normaliser="R")
    over_best = ties.average_precision(ranking, harmonic, k=6, normaliser="min(R,k)")
    assert float(ranking.relevant) == 10
    assert round(float(over_all), 3) == 0.217
    assert round(float(over_all) * 10 / 3, 3) == 0.722
    assert float(over_best) == pytest.approx((1 + 2 / 3 + 3 / 6) / 6, abs=1e-12)


def test_expectation_is_the_mean_over_shuffled_galleries():
    """12-bit codes of classes: pessimistic < expected < optimistic, and shuffling finds the expectation."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 12, generator=generator)
    label = torch.arange(10).repeat(40)
    codes = pack_codes(centres[label] + 1.5 * torch.randn(400, 12, generator=generator))
    gallery = Descriptors(codes, label, torch.arange(400), 12)
    query = Descriptors(codes[:20], label[:20], torch.arange(1000, 1020), 12)
    measured = {name: float(value.mean()) for name, value in measure_ranking(query, gallery).items()}
    shuffled = []
    for _ in range(150):
        order = torch.randperm(400, generator=generator)
        moved = Descriptors(codes[order], label[order], torch.arange(400), 12)
        shuffled.append(float(average_precision_in_index_order(query, moved).mean()))
    error = np.std(shuffled) / math.sqrt(len(shuffled))
    assert abs(measured["AP"] - np.mean(shuffled)) < 4 * error
    assert error < 0.002
    assert measured["AP_pessimistic"] < min(shuffled) <= max(shuffled) < measured["AP_optimistic"]


def test_large_groups_keep_their_precision():
    """100,000 items of one score, a tenth relevant: each metric has a closed value."""
    n, r = 100_000, 10_000
    label = torch.where(torch.arange(n) < r, 7, 3)
    query = Descriptors(torch.zeros(1, 6, dtype=torch.uint8), torch.tensor([7]), torch.tensor([n]), 48)
    gallery = Descriptors(torch.zeros(n, 6, dtype=torch.uint8), label, torch.arange(n), 48)
    measured = measure_ranking(query, gallery, ks=(10,))
    miss = math.prod((n - r - i) / (n - i) for i in range(10))
    assert float(measured["P@10"]) == pytest.approx(0.1, abs=1e-12)
    assert float(measured["RP"]) == pytest.approx(0.1, abs=1e-12)
    assert float(measured["R@10"]) == pytest.approx(1 - miss, abs=1e-9)
    assert float(measured["NDCG@10"]) == pytest.approx(0.1, abs=1e-12)
    # The mean precision at rank i of a relevant item there: (1 + (i - 1)(r - 1)/(n - 1)) / i.
    ranks = np.arange(1, n + 1)
    assert float(measured["AP"]) == pytest.approx(np.mean((1 + (ranks - 1) * (r - 1) / (n - 1)) / ranks), abs=1e-12)


def test_no_relevant_item_is_nan_and_disturbs_nobody():
    query, gallery = as_codes([(3, True), (2, False), (2, True), (0, False)])
    alone = measure_ranking(query, gallery, ks=KS)
    strangers = Descriptors(torch.zeros(3, 1, dtype=torch.uint8), torch.tensor([99, 7, -1]), torch.arange(50, 53), 5)
    together = measure_ranking(strangers, gallery, ks=KS)
    for name, value in together.items():
        assert torch.equal(value[1:2], alone[name])
        if name != "relevant":
            assert value[[0, 2]].isnan().all(), name
    assert together["relevant"].tolist() == [0, 2, 0]


def test_harmonic_numbers():
    assert ties.harmonic_numbers(0).tolist() == [0]
    assert ties.harmonic_numbers(4).tolist() == pytest.approx([0, 1, 1.5, 11 / 6, 25 / 12])
