"""Every definition of mAP@k against loops over the ranks, and the toy ranking whose number they disagree about."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.functional.definitions import average_precision_definitions
from simsearch.functional.ranking import measure_ranking
from simsearch.types import Descriptors


def by_loops(relevance: list[bool], total: int) -> dict[str, float]:
    """As papers write them, one rank at a time."""
    k = len(relevance)
    precisions, area, found, last = [], 0.0, 0, (0.0, 1.0)
    for rank, right in enumerate(relevance, start=1):
        found += right
        if right:
            precisions.append(found / rank)
        recall, precision = found / total, found / rank
        area += (recall - last[0]) * (precision + last[1]) / 2
        last = recall, precision
    summed = sum(precisions)
    return {
        f"AP@{k}_found": np.mean(precisions) if precisions else 0.0,
        f"AP@{k}_found_only": np.mean(precisions) if precisions else np.nan,
        f"AP@{k}_R": summed / total,
        f"AP@{k}_minRk": summed / min(total, k),
        f"AP@{k}_trapezoid": area,
    }


def test_one_ranking_scores_722_or_217():
    """Hits at ranks 1, 3 and 6 of 10, ten relevant items in all."""
    relevance = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 0, 0, 0]]).bool()
    found = {
        name: round(float(v), 3) for name, v in average_precision_definitions(relevance, torch.tensor([10])).items()
    }
    # precisions 1, 2/3, 1/2; trapezoids (1 + 1) / 2, (1/2 + 2/3) / 2, (2/5 + 1/2) / 2
    assert found == {
        "AP@10_found": 0.722,
        "AP@10_found_only": 0.722,
        "AP@10_R": 0.217,
        "AP@10_minRk": 0.217,
        "AP@10_trapezoid": 0.203,
    }


@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=7, max_size=7), st.integers(0, 12)), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_equals_loops(queries):
    rows = [(row, sum(row) + more) for row, more in queries]
    found = average_precision_definitions(
        torch.tensor([row for row, _ in rows]), torch.tensor([total for _, total in rows])
    )
    for i, (row, total) in enumerate(rows):
        expected = by_loops(row, total) if total else dict.fromkeys(found, np.nan)
        np.testing.assert_allclose([float(found[name][i]) for name in expected], list(expected.values()), rtol=1e-12)


def test_agrees_with_the_full_ranking_where_nothing_ties():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1)
    label = torch.randint(0, 5, (60,), generator=generator)
    query, gallery = (Descriptors(vectors[s], label[s], torch.arange(60)[s]) for s in (slice(0, 12), slice(12, 60)))
    order = (query.vectors @ gallery.vectors.T).argsort(dim=1, descending=True)
    relevance = gallery.label[order] == query.label[:, None]
    found = average_precision_definitions(relevance[:, :10], relevance.sum(1))
    expected = measure_ranking(query, gallery, ks=(10,))
    for name in ("AP@10_R", "AP@10_minRk"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0, equal_nan=True)


def test_what_it_refuses():
    right, count = torch.ones(2, 3, dtype=torch.bool), torch.tensor([3, 3])
    for relevance in (right.long(), right[0], right[:, :0]):
        with pytest.raises(ValueError, match=r"bool \(Q, k\)"):
            average_precision_definitions(relevance, count)
    for relevant in (count[:1], count.double()):
        with pytest.raises(ValueError, match=r"int64 \(2,\)"):
            average_precision_definitions(right, relevant)
    with pytest.raises(ValueError, match="query 1 found 3 relevant items of 2"):
        average_precision_definitions(right, torch.tensor([3, 2]))
