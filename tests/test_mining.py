"""Triplet mining against all triplets written out."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.functional.mining import batch_hard, draw_triplets, hardest_triplets, semihard_triplets
from simsearch.losses.triplet import BatchHardTripletLoss


def all_triplets(x: torch.Tensor, labels: torch.Tensor, margin: float) -> dict[int, list[tuple[float, int, int]]]:
    """Each query's violating triplets (loss, positive, negative), hardest first."""
    x = x.double()
    found = {}
    for q, p, n in product(range(len(x)), repeat=3):
        if q != p and labels[q] == labels[p] and labels[q] != labels[n]:
            loss = 0.5 * (margin + float(((x[q] - x[p]) ** 2).sum()) - float(((x[q] - x[n]) ** 2).sum()))
            if loss > 0:
                found.setdefault(q, []).append((loss, p, n))
    return {q: sorted(rows, reverse=True) for q, rows in found.items()}


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=11),
    seed=st.integers(0, 10**6),
    per_query=st.sampled_from([1, 2, 3, 7, 40]),
    block=st.sampled_from([1, 3, 64]),
    margin=st.sampled_from([0.5, 4.5]),
)
def test_hardest_triplets_are_the_hardest_of_all(labels, seed, per_query, block, margin):
    y = torch.tensor(labels)
    # Small integers: many ties; losses are odd multiples of 1/4, so that rounding leaves none near 0.
    x = torch.randint(-3, 4, (len(y), 3), generator=torch.Generator().manual_seed(seed)).float()
    triplets, losses = hardest_triplets(x, y, margin=margin, per_query=per_query, block=block)
    expected = all_triplets(x, y, margin)
    assert triplets.shape == (len(losses), 3)
    assert triplets.dtype == torch.int64
    assert triplets[:, 0].unique_consecutive().tolist() == sorted(expected)
    assert len({tuple(row) for row in triplets.tolist()}) == len(triplets)
    for q, rows in expected.items():
        mine = triplets[:, 0] == q
        wanted = torch.tensor([loss for loss, _, _ in rows[:per_query]])
        torch.testing.assert_close(losses[mine], wanted, rtol=1e-5, atol=1e-4)
        values = {(p, n): loss for loss, p, n in rows}
        for (_, p, n), loss in zip(triplets[mine].tolist(), losses[mine].tolist(), strict=True):
            assert values[p, n] == pytest.approx(loss, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=11),
    seed=st.integers(0, 10**6),
    block=st.sampled_from([1, 3, 64]),
    margin=st.sampled_from([0.5, 4.5]),
)
def test_semihard_triplets_are_each_positives_next_negative(labels, seed, block, margin):
    y = torch.tensor(labels)
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(seed))  # rounding decides no tie
    generator = torch.Generator().manual_seed(seed)
    triplets, losses = semihard_triplets(x, y, margin=margin, per_query=200, generator=generator, block=block)

    def distance(a: int, b: int) -> float:
        return float(((x[a].double() - x[b].double()) ** 2).sum())

    expected = {}  # of 200 draws among at most 10 positives none is left out
    for q, p in product(range(len(y)), repeat=2):
        farther = [distance(q, n) for n in range(len(y)) if y[n] != y[q] and distance(q, n) > distance(q, p)]
        if q != p and y[q] == y[p] and farther and (loss := 0.5 * (margin + distance(q, p) - min(farther))) > 0:
            expected[q, p] = loss
    assert {(q, p) for q, p, _ in triplets.tolist()} == set(expected)
    assert triplets[:, 0].tolist() == sorted(triplets[:, 0].tolist())
    for (q, p, n), loss in zip(triplets.tolist(), losses.tolist(), strict=True):
        assert y[n] != y[q]
        assert distance(q, n) > distance(q, p)
        assert loss == pytest.approx(expected[q, p], abs=1e-4)
        assert loss == pytest.approx(0.5 * (margin + distance(q, p) - distance(q, n)), abs=1e-4)


def test_semihard_positives_are_drawn_evenly():
    x = torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.35]])
    y = torch.tensor([0, 0, 0, 0, 1])
    generator = torch.Generator().manual_seed(0)
    triplets, _ = semihard_triplets(x, y, margin=1.0, per_query=3000, generator=generator)
    positives = triplets[triplets[:, 0] == 0, 1]
    assert torch.bincount(positives).tolist()[1:] == pytest.approx([1000, 1000, 1000], abs=120)


def test_hardest_triplets_by_hand():
    x = torch.tensor([[0.0], [1.0], [3.0], [2.0]])
    y = torch.tensor([0, 0, 0, 1])
    triplets, losses = hardest_triplets(x, y, margin=0.5, per_query=1)
    # |0-3|^2 - |0-2|^2 = 5; |1-3|^2 - |1-2|^2 = 3; |3-0|^2 - |3-2|^2 = 8; row 3 has no positive
    assert triplets.tolist() == [[0, 2, 3], [1, 2, 3], [2, 0, 3]]
    assert losses.tolist() == [2.75, 1.75, 4.25]


def test_a_common_offset_does_not_blur_the_distances():
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 3
    _, exact = hardest_triplets(x, y, margin=0.1, per_query=5)
    _, far = hardest_triplets((x + 1000).float(), y, margin=0.1, per_query=5)
    torch.testing.assert_close(far.double(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(0, 2), []),
        (torch.randn(4, 2), [0, 0, 0, 0]),
        (torch.randn(3, 2), [0, 1, 2]),
        (torch.tensor([[0.0], [0.1], [9.0], [9.1]]), [0, 0, 1, 1]),
    ],
    ids=["empty", "no negative", "no positive", "none within the margin"],
)
def test_nothing_to_mine(x, y):
    triplets, losses = hardest_triplets(x, torch.tensor(y, dtype=torch.int64), margin=0.1)
    assert triplets.shape == (0, 3)
    assert losses.shape == (0,)
    with pytest.raises(ValueError, match="no triplet to draw"):
        draw_triplets(triplets, 4, torch.Generator())


def test_drawing_takes_queries_evenly_however_many_triplets_they_have():
    triplets = torch.tensor([[5, 0, 1]] * 1 + [[2, 0, i] for i in range(9)] + [[7, 1, i] for i in range(2)])
    drawn = draw_triplets(triplets, 30_000, torch.Generator().manual_seed(1))
    assert drawn.shape == (30_000, 3)
    for q in (2, 5, 7):
        assert (drawn[:, 0] == q).float().mean() == pytest.approx(1 / 3, abs=0.012)  # 4 standard deviations
    of_two = drawn[drawn[:, 0] == 2, 2]
    torch.testing.assert_close(of_two.bincount() / len(of_two), torch.full((9,), 1 / 9), rtol=0, atol=0.014)
    again = draw_triplets(triplets, 30_000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 3), max_size=12), seed=st.integers(0, 10**6))
def test_batch_hard_against_loops(labels, seed):
    y = torch.tensor(labels, dtype=torch.int64)
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(seed))
    expected = []
    for a in range(len(y)):
        positives = [(float((x[a] - x[j]).norm()), j) for j in range(len(y)) if j != a and y[j] == y[a]]
        negatives = [(float((x[a] - x[j]).norm()), j) for j in range(len(y)) if y[j] != y[a]]
        if positives and negatives:
            expected.append((a, max(positives)[1], min(negatives)[1]))
    anchors, positives, negatives = batch_hard(x.requires_grad_(), y)
    assert list(zip(anchors.tolist(), positives.tolist(), negatives.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hardest_triplets(torch.zeros(3), torch.zeros(3), margin=0.1), r"\(N, D\)"),
        (lambda: hardest_triplets(torch.zeros(3, 2), torch.zeros(2), margin=0.1), r"\(N,\)"),
        (lambda: hardest_triplets(torch.zeros(3, 2), torch.zeros(3), margin=0.1, per_query=0), "per_query=0"),
        (lambda: hardest_triplets(torch.zeros(2, 2), torch.tensor([0, -1]), margin=0.1), "unknown labels"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e19])
@pytest.mark.parametrize("mine", [hardest_triplets, semihard_triplets])
def test_a_pool_that_cannot_be_compared_is_no_pool_without_triplets(mine, value):
    x, labels = torch.eye(6), torch.arange(6) % 2
    x[4, 2] = value
    more = {"generator": torch.Generator()} if mine is semihard_triplets else {}
    with pytest.raises(ValueError, match=r"the pool's descriptors .* \[?4"):
        mine(x, labels, margin=0.1, **more)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e19])
def test_a_batch_that_cannot_be_compared_costs_no_finite_loss(value):
    x, labels = torch.eye(6), torch.arange(6) % 2
    x[4, 2] = value
    assert not BatchHardTripletLoss()(x, labels).isfinite()
