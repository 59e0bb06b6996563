"""Precision against recall, beside sums over every order of equal scores."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_sharded import deal, described, in_threads, part
from torch import Tensor

from simsearch.callbacks.precision_recall import curve
from simsearch.evaluation.evaluate import evaluate
from simsearch.evaluation.sharded_index import ShardedIndex
from simsearch.figures import save_curve
from simsearch.functional.codes import pack_codes
from simsearch.functional.curves import RECALL_LEVELS, precision_at_recall, precision_recall_curve
from simsearch.functional.ranking import measure_ranking, rank
from simsearch.functional.sharded import Sharded
from simsearch.index.faiss_index import FaissIndex
from simsearch.types import Descriptors


def naive(scores: list[float], right: list[bool], level: float) -> float:
    """Precision at a level, from the expected number found after each rank, over all orders of equal scores."""
    if not any(right):
        return math.nan
    groups = [[right[i] for i in range(len(scores)) if scores[i] == s] for s in sorted(set(scores), reverse=True)]
    found = [0.0]
    for group in groups:
        orders = [np.cumsum(order) for order in itertools.permutations(group)]
        found += [found[-1] + float(value) for value in np.mean(orders, axis=0)]
    t = max(math.ceil(level * sum(right) - 1e-9), 1)
    after = next(d for d in range(len(found)) if found[d] >= t - 1e-9)
    before = found[after - 1]
    return t / (after - 1 + (t - before) / (found[after] - before))


@st.composite
def tied(draw: st.DrawFn) -> tuple[list[list[int]], list[bool], bool]:
    """Distances 0..3 of a gallery to each query, what is right, and whether as codes."""
    g = draw(st.integers(1, 7))
    rows = st.lists(st.integers(0, 3), min_size=g, max_size=g)
    right = draw(st.lists(st.booleans(), min_size=g, max_size=g))
    return draw(st.lists(rows, min_size=1, max_size=3)), right, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(tied(), st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.8, 1.0]))
def test_a_level_is_where_so_many_are_found_in_expectation(case, level):
    distances, right, as_codes = case
    label = torch.tensor([0 if r else 1 for r in right])
    expected = []
    for row in distances:
        expected.append(naive([-d for d in row], right, level))
        if as_codes:
            bits = torch.tensor([[1.0 if i < d else -1.0 for i in range(3)] for d in row])
            one, many, width = pack_codes(-torch.ones(1, 3)), pack_codes(bits), 3
        else:
            one, many, width = torch.tensor([[-1.0, 0.0]]), torch.tensor([[float(d), 1.0] for d in row]), None
        query = Descriptors(one, torch.zeros(1, dtype=torch.int64), torch.tensor([99]), width)
        gallery = Descriptors(many, label, torch.arange(len(row)), width)
        (ranking,) = rank(query, gallery)
        got = precision_at_recall(ranking, level)
        torch.testing.assert_close(
            got, torch.tensor(expected[-1:], dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True
        )
        mean = precision_recall_curve(query, gallery, levels=[level, 1.0])
        assert mean.shape == (2,)
        torch.testing.assert_close(mean[:1], got, rtol=0, atol=1e-12, equal_nan=True)


def test_the_mean_over_all_found_items_is_average_precision():
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(130, 8, generator=generator))
    label = torch.arange(130) % 5
    query = Descriptors(vectors[:30], label[:30], torch.arange(30))
    gallery = Descriptors(vectors[30:], label[30:], torch.arange(30, 130))  # 20 of each label
    precision = precision_recall_curve(query, gallery, levels=[t / 20 for t in range(1, 21)])
    assert float(precision.mean()) == pytest.approx(float(measure_ranking(query, gallery)["AP"].mean()), abs=1e-12)


def test_queries_without_relevant_items_do_not_count_and_self_is_left_out():
    vectors = torch.eye(4)
    near = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 1, 0, 0], [0.1, 0.9, 0, 0]])
    data = Descriptors(near, torch.tensor([0, 0, 1, -1]), torch.arange(4))
    assert precision_recall_curve(data, data, exclude_self=False).isfinite().all()
    alone = precision_recall_curve(data, data, exclude_self=True)  # of the four two have another of their label
    torch.testing.assert_close(alone[[0, -1]], torch.tensor([1.0, 1.0], dtype=torch.float64))
    lost = Descriptors(vectors, torch.full((4,), -1), torch.arange(4))
    assert precision_recall_curve(lost, data).isnan().all()


@pytest.mark.parametrize("bits", [None, 12])
def test_ranks_together_have_the_curve_of_one(bits):
    query, gallery = described(20, seed=1, first=60, bits=bits), described(80, seed=2, bits=bits)
    whole = precision_recall_curve(query, gallery, exclude_self=True)

    def work(ranks) -> Tensor:
        shards = [
            Sharded.spread(part(d, deal(len(d), ranks.rank, 3, how)), ranks)
            for d, how in ((query, "mixed"), (gallery, "empty"))
        ]
        return precision_recall_curve(*shards, exclude_self=True)

    for got in in_threads(3, work):
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("factory", "metric"), [("Flat", "ip"), ("Flat", "l2"), ("SQ4", "ip"), ("BFlat", "hamming")])
def test_the_curve_of_an_evaluation_is_of_what_its_index_stores(factory, metric):
    query, gallery = (
        described(n, seed=n, first=f, bits=8 if factory[0] == "B" else None) for n, f in ((9, 90), (90, 0))
    )
    if metric == "l2":
        scale = torch.linspace(0.5, 2, len(gallery))[:, None]
        gallery = Descriptors(gallery.vectors * scale, gallery.label, gallery.index, group=gallery.group)
    result = evaluate(query, gallery, FaissIndex(factory, metric=metric))
    points = curve(result, exclude_self=False)
    assert len(result.index) == 90  # not filled twice
    assert [recall for recall, _ in points] == list(RECALL_LEVELS)
    shown = gallery
    if factory == "SQ4":
        shown = Descriptors(result.index.reconstruct(), gallery.label, gallery.index, group=gallery.group)
    if metric == "l2":
        far = torch.cdist(query.vectors.double(), gallery.vectors.double()).square().float()
        # One-hot queries read their row of scores.
        rows = Descriptors(torch.eye(9), query.label, query.index, group=query.group)
        scores = Descriptors(-far.T.contiguous(), gallery.label, gallery.index, group=gallery.group)
        expected = precision_recall_curve(rows, scores)
    else:
        expected = precision_recall_curve(query, shown)
    assert [p for _, p in points] == pytest.approx(expected.tolist(), abs=1e-6)
    if factory == "SQ4":
        assert [p for _, p in points] != pytest.approx(precision_recall_curve(query, gallery).tolist(), abs=1e-6)


def test_an_index_that_is_filled_answers_as_before():
    gallery = Sharded.of(described(50, seed=3))
    index = FaissIndex("Flat")
    first = ShardedIndex(index, gallery).search(gallery, 5)[0]
    again = ShardedIndex(index, gallery).search(gallery, 5)[0]
    assert torch.equal(first.ids, again.ids)


def test_the_picture_shows_where_the_curve_lies(tmp_path):
    heights = []
    for precision in (0.2, 0.8):
        save_curve(tmp_path / "c.png", [(0.0, precision), (1.0, precision)], title="t")
        with Image.open(tmp_path / "c.png") as picture:
            assert picture.format == "PNG"
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        rows, columns = np.nonzero((pixels[..., 2] > 150) & (pixels[..., 0] < 60))
        assert np.ptp(columns) > 0.7 * pixels.shape[1]
        heights.append(rows.mean() / pixels.shape[0])
    assert heights[0] - heights[1] > 0.4  # rows count from the top
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
