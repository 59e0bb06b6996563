"""Graded relevance and its NDCG, against if-else and scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import dcg_score

from simsearch.functional.ndcg import count_levels, graded_relevance, ndcg_graded

ROW = st.tuples(*[st.integers(-1, 2)] * 4)
ROWS = st.lists(ROW, min_size=1, max_size=12)


def level(query, item) -> int:
    work, artist, style, period = (a == b and a != -1 for a, b in zip(query, item, strict=True))
    if work:
        return 3
    if artist:
        return 2
    return 1 if style and period else 0


@given(ROWS, ROWS)
@settings(max_examples=80, deadline=None)
def test_levels_and_their_counts_against_if_else(query, gallery):
    q, g = torch.tensor(query), torch.tensor(gallery)
    naive = [[level(a, b) for b in gallery] for a in query]
    levels = graded_relevance(q[:, None], g)
    assert levels.dtype == torch.int64
    assert levels.tolist() == naive
    assert count_levels(q, g).tolist() == [[row.count(n) for n in range(4)] for row in naive]
    own = [[level(a, b) for j, b in enumerate(query) if i != j] for i, a in enumerate(query)]
    counts = count_levels(q, q, exclude_self=True)
    assert counts.tolist() == [[row.count(n) for n in range(4)] for row in own]


@given(st.lists(ROWS, min_size=1, max_size=3), ROW, st.integers(1, 14), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_ndcg_against_scikit_learn(galleries, query, k, random):
    for gallery in galleries:
        random.shuffle(gallery)
        levels = [level(query, item) for item in gallery]
        counts = count_levels(torch.tensor([query]), torch.tensor(gallery))
        ranked = torch.zeros(1, k, dtype=torch.int64)  # 0 where the gallery is shorter than k
        ranked[0, : len(levels)] = torch.tensor(levels[:k])
        ours = ndcg_graded(ranked, counts)
        assert ours.dtype == torch.float64
        gains = [2**n - 1 for n in levels]
        if not any(gains):
            assert math.isnan(ours[0])
            continue
        # Places are the scores; a lone item is no ranking to scikit-learn, so a worthless one comes last.
        places = [[-place for place in range(len(gains) + 1)]]
        best = dcg_score([[*sorted(gains, reverse=True), 0]], places, k=k)
        assert ours[0] == pytest.approx(dcg_score([[*gains, 0]], places, k=k) / best)


def test_ndcg_by_hand():
    """Gains 7, 3, 1: found 2, 0, 3 of a gallery with one 3, two 2 and one 1."""
    counts = torch.tensor([[5, 1, 2, 1], [9, 0, 0, 0]])
    found = torch.tensor([[2, 0, 3], [0, 0, 0]])
    best = 7 + 3 / math.log2(3) + 3 / 2
    value, none = ndcg_graded(found, counts).tolist()
    assert value == pytest.approx((3 + 7 / 2) / best)
    assert math.isnan(none)
    assert ndcg_graded(torch.tensor([[3, 2, 2]]), counts[:1]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: graded_relevance(torch.ones(2, 3), torch.ones(2, 3)), "work, artist, style, period; got"),
        (lambda: count_levels(torch.ones(4), torch.ones(2, 4)), r"must be \(Q, 4\) and \(G, 4\)"),
        (lambda: ndcg_graded(torch.ones(2), torch.ones(2, 4)), r"must be \(Q, K\) and \(Q, L\)"),
        (lambda: ndcg_graded(torch.ones(2, 1), torch.ones(3, 4)), r"must be \(Q, K\) and \(Q, L\)"),
        (lambda: ndcg_graded(torch.tensor([[4]]), torch.ones(1, 4)), r"levels must lie in 0\.\.3, got 4"),
        (lambda: ndcg_graded(torch.tensor([[-1]]), torch.ones(1, 4)), r"levels must lie in 0\.\.3, got -1"),
        (lambda: ndcg_graded(torch.tensor([[2, 2]]), torch.tensor([[5, 5, 1, 0]])), "items of level 2 or above"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
