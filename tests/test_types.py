"""What the vocabulary refuses."""

import re

import pytest
import torch

from simsearch.types import Descriptors, SearchResult, check_vectors, comparable


def floats(**changes) -> Descriptors:
    fields = {"vectors": torch.ones(3, 4), "label": torch.tensor([0, 1, -1]), "index": torch.tensor([5, 2, 9])}
    return Descriptors(**(fields | changes))


def codes(bits: int, rows: list[list[int]]) -> Descriptors:
    n = len(rows)
    return Descriptors(torch.tensor(rows).byte(), torch.zeros(n).long(), torch.arange(n), bits)


def test_good_descriptors_pass():
    assert len(floats()) == 3
    assert len(floats(group=torch.tensor([-1, 0, 0]))) == 3
    assert len(codes(8, [[255], [0]])) == 2
    assert len(codes(12, [[255, 15]])) == 1
    empty = Descriptors(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).long())
    assert len(empty) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": torch.ones(3)}, r"must be \(N, D\), got shape \(3,\)"),
        ({"vectors": torch.tensor(1.0)}, r"must be \(N, D\), got shape \(\)"),
        ({"vectors": torch.ones(3, 4).double()}, "must be float32, got torch.float64"),
        ({"vectors": torch.tensor([[1.0], [torch.nan], [1.0]])}, r"NaN or infinity, first in rows \[1\]"),
        ({"vectors": torch.tensor([[torch.inf], [0.0], [-torch.inf]])}, r"first in rows \[0, 2\]"),
        ({"label": torch.tensor([0, 1])}, r"label must be int64 \(3,\), got torch.int64 \(2,\)"),
        ({"label": torch.zeros(3)}, r"label must be int64 \(3,\), got torch.float32"),
        ({"label": torch.zeros(3, 1).long()}, r"label must be int64 \(3,\)"),
        ({"index": torch.arange(3).int()}, r"index must be int64 \(3,\), got torch.int32"),
        ({"index": torch.tensor([5, 2, 5])}, "index holds a collection row twice: drop duplicates first"),
        ({"group": torch.arange(4)}, r"group must be int64 \(3,\), got torch.int64 \(4,\)"),
    ],
)
def test_bad_descriptors(changes, message):
    with pytest.raises(ValueError, match=message):
        floats(**changes)


@pytest.mark.parametrize(
    ("bits", "rows", "message"),
    [
        (12, [[1]], r"codes of 12 bits must be uint8 \(N, 2\), got torch.uint8 \(1, 1\)"),
        (8, [[1, 0]], r"codes of 8 bits must be uint8 \(N, 1\)"),
        (12, [[0, 0], [0, 16]], "codes of 12 bits have further bits set"),
        (0, [[]], "at least 1 bit, got 0"),
    ],
)
def test_bad_codes(bits, rows, message):
    with pytest.raises(ValueError, match=message):
        codes(bits, rows)


def test_codes_must_be_bytes():
    with pytest.raises(ValueError, match=r"must be uint8 \(N, 1\), got torch.float32"):
        floats(vectors=torch.ones(3, 1), bits=8)


def test_good_results_pass():
    SearchResult(torch.tensor([[3, 1, -1]]), torch.tensor([[0.5, 0.5, -torch.inf]]))
    SearchResult(torch.zeros(0, 5).long(), torch.zeros(0, 5))
    SearchResult(torch.tensor([[3], [1]]), torch.tensor([[0.1], [0.2]]))


@pytest.mark.parametrize(
    ("ids", "scores", "message"),
    [
        ([[1, 2]], [[1.0]], r"must both be \(Q, K\), got \(1, 2\) and \(1, 1\)"),
        ([1, 2], [1.0, 0.5], r"must both be \(Q, K\), got \(2,\)"),
        ([[1.0]], [[1.0]], "ids must be int64 and scores float32, got torch.float32"),
        ([[1]], [[1]], "scores float32, got torch.int64 and torch.int64"),
        ([[1, 2], [1, 2]], [[1.0, 0.5], [0.5, 1.0]], "sorted best first"),
        ([[1, 2]], [[1.0, torch.nan]], "sorted best first, without NaN"),
        ([[1]], [[torch.nan]], "without NaN"),
        ([[1, -1]], [[1.0, 0.5]], "go together"),
        ([[1, 2]], [[1.0, -torch.inf]], "go together"),
        ([[1, -2]], [[1.0, -torch.inf]], "no other id is negative"),
    ],
)
def test_bad_results(ids, scores, message):
    with pytest.raises(ValueError, match=message):
        SearchResult(torch.tensor(ids), torch.tensor(scores))


@pytest.mark.parametrize("size", [1.0, 1e-14, 1e14, 0.0])
def test_vectors_of_any_usual_length_can_be_compared(size):
    assert comparable(torch.full((2, 4), size / 2)).all()
    check_vectors("vectors", torch.full((2, 4), size / 2))


@pytest.mark.parametrize("size", [3e19, 1e15, 1e-20, 1e-40, torch.inf, torch.nan])
def test_vectors_whose_squares_float32_lacks_are_named_wherever_they_stand(size):
    vectors = torch.ones(2**14 + 3, 2)
    vectors[-2, 1] = size
    vectors[-2, 0] = 0.0
    assert comparable(vectors).logical_not().nonzero().tolist() == [[2**14 + 1]]
    message = (
        "NaN or infinity, first in rows" if not abs(size) < torch.inf else re.escape(f"a norm of {size:.4g} in row")
    )
    with pytest.raises(ValueError, match=rf"vectors (hold|have) {message} \[?{2**14 + 1}"):
        check_vectors("vectors", vectors)
