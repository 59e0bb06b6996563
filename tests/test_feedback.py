"""Rocchio, weights of parts and maximal marginal relevance, against loops and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from simsearch.functional.diversity import mmr
from simsearch.functional.feedback import contributions, query_weights, reweight, reweight_both, rocchio
from simsearch.types import Part

PARTS = {"content": Part(0, 4, 0.5), "style": Part(4, 7, 0.3), "colour": Part(7, 9, 0.2)}


def described(n: int, seed: int) -> Tensor:
    """Unit descriptors of PARTS, float32 (n, 9)."""
    x = torch.randn(n, 9, generator=torch.Generator().manual_seed(seed))
    for part in PARTS.values():
        own = x[:, part.start : part.stop]
        x[:, part.start : part.stop] = math.sqrt(part.weight) * own / own.norm(dim=1, keepdim=True)
    return x


def cosines(a: Tensor, b: Tensor) -> dict[str, float]:
    """By part."""
    found = {}
    for name, part in PARTS.items():
        x, y = a[part.start : part.stop].double(), b[part.start : part.stop].double()
        found[name] = float(x @ y / (x.norm() * y.norm()))
    return found


class TestRocchio:
    def test_one_example_is_the_query(self):
        (x,) = described(1, seed=1)
        torch.testing.assert_close(rocchio(x[None], None, PARTS), x)
        torch.testing.assert_close(rocchio(torch.stack([x, x]), torch.empty(0, 9), PARTS), x)

    def test_by_hand(self):
        parts = {"content": Part(0, 2, 1.0)}
        like, unlike = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        expected = torch.tensor([2.0, -1.0]) / math.sqrt(5)
        torch.testing.assert_close(rocchio(like, unlike, parts), expected)
        torch.testing.assert_close(rocchio(like, unlike, parts, beta=0.0), like[0])

    def test_each_part_keeps_its_weight(self):
        query = rocchio(described(4, seed=1), described(3, seed=2), PARTS)
        for part in PARTS.values():
            assert float(query[part.start : part.stop].square().sum()) == pytest.approx(part.weight, abs=1e-6)

    def test_against_loops(self):
        like, unlike = described(3, seed=3), described(2, seed=4)
        query = rocchio(like, unlike, PARTS)
        for part in PARTS.values():
            columns = range(part.start, part.stop)
            mean = [sum(float(x[c]) for x in like) / 3 - 0.5 * sum(float(x[c]) for x in unlike) / 2 for c in columns]
            norm = math.sqrt(sum(value * value for value in mean))
            expected = [math.sqrt(part.weight) * value / norm for value in mean]
            assert query[part.start : part.stop].tolist() == pytest.approx(expected, abs=1e-6)

    @given(st.integers(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_counter_examples_push_away(self, seed):
        like, unlike = described(2, seed), described(1, seed + 5000)
        with_, without = rocchio(like, unlike, PARTS), rocchio(like, None, PARTS)
        assert float(with_ @ unlike[0]) < float(without @ unlike[0])

    def test_no_example(self):
        with pytest.raises(ValueError, match="no example"):
            rocchio(torch.empty(0, 9), None, PARTS)


class TestWeights:
    def test_own_where_not_given_and_sum_to_one(self):
        assert query_weights(PARTS, None) == pytest.approx({"content": 0.5, "style": 0.3, "colour": 0.2})
        weights = query_weights(PARTS, {"content": 1.5, "colour": 0})
        assert weights == pytest.approx({"content": 1.5 / 1.8, "style": 0.3 / 1.8, "colour": 0.0})

    @pytest.mark.parametrize("weights", [{"style": 1.0, "content": 0, "colour": 0}, {"content": 3}, {}, {"style": 0}])
    def test_inner_products_are_weighted_cosines(self, weights):
        (query,), items = described(1, seed=1), described(20, seed=2)
        chosen = query_weights(PARTS, weights)
        scores = items @ reweight(query, PARTS, chosen)
        expected = [sum(chosen[n] * c for n, c in cosines(query, item).items()) for item in items]
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        both = reweight_both(torch.cat([query[None], items]), PARTS, chosen)
        torch.testing.assert_close(both[1:] @ both[0], scores)
        of_parts = contributions(reweight(query, PARTS, chosen), items, PARTS)
        torch.testing.assert_close(sum(of_parts.values()), scores)
        assert of_parts["style"].tolist() == pytest.approx(
            [chosen["style"] * cosines(query, item)["style"] for item in items], abs=1e-5
        )

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({"styel": 1}, "no part 'styel' in these descriptors: there are content, style, colour"),
            ({"style": -1}, "the weight of style must be a number of at least 0, got -1"),
            ({"style": math.nan}, "got nan"),
            ({"style": math.inf}, "got inf"),
            ({"content": 0, "style": 0, "colour": 0}, "are all 0: raise one"),
        ],
    )
    def test_wrong(self, weights, message):
        with pytest.raises(ValueError, match=message):
            query_weights(PARTS, weights)

    def test_a_part_that_is_not_there(self):
        parts = {"content": Part(0, 2, 1.0), "style": Part(2, 4, 0.0)}
        with pytest.raises(ValueError, match="style has weight 0 in these descriptors"):
            query_weights(parts, {"style": 0.5})
        weights = query_weights(parts, {"style": 0, "content": 3})
        assert weights == {"content": 1.0, "style": 0.0}
        assert reweight(torch.tensor([1.0, 2.0, 0.0, 0.0]), parts, weights).tolist() == [1, 2, 0, 0]


def naive_mmr(relevance: list[float], similarity: list[list[float]], k: int, lambda_: float) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < min(k, len(relevance)):
        left = [i for i in range(len(relevance)) if i not in chosen]
        if chosen:
            value = {i: lambda_ * relevance[i] - (1 - lambda_) * max(similarity[i][j] for j in chosen) for i in left}
        else:
            value = {i: relevance[i] for i in left}
        chosen.append(max(left, key=value.__getitem__))
    return chosen


class TestMMR:
    @given(st.integers(1, 12), st.integers(1, 15), st.floats(0, 1), st.integers(0, 10_000))
    @settings(max_examples=60, deadline=None)
    def test_against_loops(self, s, k, lambda_, seed):
        generator = torch.Generator().manual_seed(seed)
        relevance = torch.rand(s, dtype=torch.float64, generator=generator)
        vectors = torch.randn(s, 3, dtype=torch.float64, generator=generator)
        similarity = (vectors @ vectors.T).tolist()
        assert mmr(relevance, vectors, k, lambda_).tolist() == naive_mmr(relevance.tolist(), similarity, k, lambda_)

    @given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.floats(0, 1), st.integers(0, 10_000))
    @settings(max_examples=40, deadline=None)
    def test_what_was_chosen_before_counts(self, c, s, k, lambda_, seed):
        generator = torch.Generator().manual_seed(seed)
        relevance = torch.rand(s, dtype=torch.float64, generator=generator)
        vectors = torch.randn(s, 3, dtype=torch.float64, generator=generator)
        before = torch.randn(c, 3, dtype=torch.float64, generator=generator)
        wanted: list[int] = []
        while len(wanted) < min(k, s):
            known = torch.cat([before, vectors[wanted]])
            value = {
                i: lambda_ * float(relevance[i]) - (1 - lambda_) * max((known @ vectors[i]).tolist())
                for i in range(s)
                if i not in wanted
            }
            wanted.append(max(value, key=value.__getitem__))
        assert mmr(relevance, vectors, k, lambda_, before).tolist() == wanted

    def test_ends(self):
        relevance, vectors = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([[-1.0, 0], [1, 0], [1, 0]])
        assert mmr(relevance, vectors, 3, 1.0).tolist() == [1, 2, 0]
        assert mmr(relevance, vectors, 3, 0.0).tolist() == [1, 0, 2]
        assert mmr(torch.empty(0), torch.empty(0, 4), 3, 0.5).tolist() == []

    @pytest.mark.parametrize(("count", "d"), [(403, 100), (37, 33), (1013, 257)])
    def test_of_equal_items_the_first(self, count, d):
        distinct = torch.nn.functional.normalize(torch.randn(20, d, generator=torch.Generator().manual_seed(d)))
        places = torch.arange(count) % 20
        order = mmr(torch.ones(count), distinct[places], 20, 0.5).tolist()
        assert sorted(order) == list(range(20))  # the first copy of each, then none is left that is new

    @pytest.mark.parametrize(("k", "lambda_", "message"), [(0, 0.5, "k must be"), (1, 1.5, "lambda_ must lie")])
    def test_wrong(self, k, lambda_, message):
        with pytest.raises(ValueError, match=message):
            mmr(torch.ones(2), torch.eye(2), k, lambda_)
