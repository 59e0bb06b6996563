"""Re-ranking against naive loops and sets, examples worked by hand, and inside evaluation and engine."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sklearn.metrics import average_precision_score
from torch import Tensor

from simsearch import configs
from simsearch.evaluation.evaluate import evaluate
from simsearch.functional import reranking
from simsearch.functional.codes import pack_codes
from simsearch.functional.diffusion import affinity_graph, conjugate_gradient, diffuse
from simsearch.functional.k_reciprocal import k_reciprocal, neighbourhoods
from simsearch.functional.ranking import Junk, find_junk, measure_ranking
from simsearch.functional.reranking import (
    Reranker,
    alpha_query_expansion,
    augment_database,
    average_query_expansion,
    csls_gallery,
    gallery_neighbours,
    nearest,
    unit_vectors,
)
from simsearch.functional.superglobal import superglobal
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.engine import Engine
from simsearch.search.rerank import AQE, CSLS, DBA, AlphaQE, Diffusion, KReciprocal, SuperGlobal
from simsearch.types import Descriptors, Part, SearchResult

CONF = Path(configs.CONF) / "rerank"
EVERY = [
    *(AQE(3), AlphaQE(4), DBA(4), DBA(3, expand=2), CSLS(5)),
    *(KReciprocal(6, 3, depth=20), Diffusion(8, 3, depth=20), SuperGlobal(4, 0.5, depth=20)),
]
NAMES = ["aqe", "alpha-qe", "dba", "dba+aqe", "csls", "k-reciprocal", "diffusion", "superglobal"]


def units(n: int, d: int = 6, *, seed: int = 0, spread: float = 0.7) -> Tensor:
    """Unit vectors around 5 centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, d, generator=torch.Generator().manual_seed(99))
    which = torch.randint(0, 5, (n,), generator=generator)
    return F.normalize(centres[which] + spread * torch.randn(n, d, generator=generator))


def on_circle(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def described(vectors: Tensor, first: int, *, seed: int, bits: int | None = None) -> Descriptors:
    generator = torch.Generator().manual_seed(seed)
    n = len(vectors)
    label = torch.randint(-1, 4, (n,), generator=generator)
    group = torch.randint(-1, n // 4, (n,), generator=generator)
    return Descriptors(vectors, label, torch.arange(first, first + n), bits, group)


def some_junk(q: int, g: int, *, seed: int = 5) -> Junk:
    """About a fifth of all pairs."""
    pairs = (torch.rand(q, g, generator=torch.Generator().manual_seed(seed)) < 0.2).nonzero()
    return Junk(pairs[:, 0], pairs[:, 1])


def naive_list(scores: np.ndarray, k: int, barred: set[int]) -> list[int]:
    return sorted((j for j in range(len(scores)) if j not in barred), key=lambda j: -scores[j])[:k]


def barred_of(junk: Junk, q: int) -> set[int]:
    return {int(c) for r, c in zip(junk.rows, junk.columns, strict=True) if int(r) == q}


def naive_unit(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt(sum(v * v for v in vector))


# -------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("block_bytes", [1, 4 * 40 * 3, 2**20])
def test_nearest_equals_a_naive_loop(block_bytes):
    query, gallery, junk = units(13, seed=1), units(40, seed=2), some_junk(13, 40)
    found = nearest(query, gallery, 7, junk, block_bytes=block_bytes)
    scores = (query.double() @ gallery.double().T).numpy()
    for q in range(13):
        expected = naive_list(scores[q], 7, barred_of(junk, q))
        assert found.ids[q].tolist() == expected
        assert found.scores[q].tolist() == pytest.approx(scores[q, expected], abs=1e-6)


def test_nearest_where_junk_leaves_fewer_than_k():
    query, gallery = units(2, seed=1), units(4, seed=2)
    found = nearest(query, gallery, 9, Junk(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 3])))
    assert found.ids.shape == (2, 4)
    assert found.ids[0].tolist() == [2, -1, -1, -1]
    assert sorted(found.ids[1].tolist()) == [0, 1, 2, 3]


def test_an_item_is_not_its_own_neighbour_but_its_double_is():
    gallery = on_circle(0, 0, 50, 90)
    assert gallery_neighbours(gallery, 1).ids[:, 0].tolist() == [1, 0, 3, 2]


@given(st.integers(1, 130), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_codes_as_vectors_keep_the_ties_of_hamming_distances(bits, seed):
    outputs = torch.randn(20, bits, generator=torch.Generator().manual_seed(seed))
    vectors = unit_vectors(pack_codes(outputs), bits)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 20, abs=0.02)
    signs = np.sign(outputs.numpy())
    agreement = torch.from_numpy(signs @ signs.T).double()
    products = vectors @ vectors.T
    c = products[0, 0].double() / bits
    assert torch.equal(products.double(), agreement * c)


# -------------------------------------------------------------------------------------------- new vectors


def test_query_expansions_equal_naive_loops():
    query, gallery, junk = units(9, seed=1), units(30, seed=2), some_junk(9, 30)
    found = nearest(query, gallery, 5, junk)
    plain = average_query_expansion(query, gallery, found).numpy()
    weighted = alpha_query_expansion(query, gallery, found, 2.5).numpy()
    x, y = query.double().numpy(), gallery.double().numpy()
    for q in range(9):
        best = naive_list(y @ x[q], 5, barred_of(junk, q))
        mean = sum((y[j] for j in best), x[q].copy()) / 6
        assert plain[q] == pytest.approx(naive_unit(mean), abs=1e-6)
        total = sum((max(float(x[q] @ y[j]), 0) ** 2.5 * y[j] for j in best), x[q].copy())
        assert weighted[q] == pytest.approx(naive_unit(total), abs=1e-6)


def test_query_expansion_by_hand():
    query, gallery = on_circle(0), on_circle(60, 180)
    # (1, 0) + (1/2, sqrt(3)/2) points to 30 degrees; with weight cos(60)^1 = 1/2 it is (5/4, sqrt(3)/4).
    found = nearest(query, gallery, 1)
    assert torch.allclose(average_query_expansion(query, gallery, found), on_circle(30), atol=1e-6)
    direction = F.normalize(torch.tensor([[5.0, math.sqrt(3)]]), dim=1)
    assert torch.allclose(alpha_query_expansion(query, gallery, found, 1), direction, atol=1e-6)
    # What points away has no weight; and alpha 0 is the plain average of what does not.
    both = nearest(query, gallery, 2)
    assert torch.allclose(alpha_query_expansion(query, gallery, both, 1), direction, atol=1e-6)
    assert torch.allclose(alpha_query_expansion(query, gallery, found, 0), on_circle(30), atol=1e-6)


def test_a_query_without_any_neighbour_stays_as_it_is():
    query, gallery = units(1, seed=1), units(3, seed=2)
    found = nearest(query, gallery, 2, Junk(torch.zeros(3, dtype=torch.int64), torch.arange(3)))
    assert torch.allclose(average_query_expansion(query, gallery, found), query, atol=1e-6)
    assert torch.allclose(alpha_query_expansion(query, gallery, found, 3), query, atol=1e-6)


def test_database_augmentation_equals_a_naive_loop():
    gallery = units(30, seed=2)
    x = gallery.double().numpy()
    augmented = augment_database(gallery, 4).numpy()
    for i in range(30):
        total = x[i].copy()
        for weight, j in zip((3 / 4, 2 / 4, 1 / 4), naive_list(x @ x[i], 3, {i}), strict=True):
            total += weight * x[j]
        assert augmented[i] == pytest.approx(naive_unit(total), abs=1e-6)


def test_database_augmentation_by_hand():
    # k = 2: each item and half its neighbour. 0 and 90 degrees: (1, 1/2) and (1/2, 1).
    expected = F.normalize(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), dim=1)
    assert torch.allclose(augment_database(on_circle(0, 90), 2), expected, atol=1e-6)
    gallery = units(5)
    assert torch.allclose(augment_database(gallery, 1), gallery, atol=1e-6)
    assert augment_database(gallery, 50).shape == (5, 6)


def test_csls_ranks_as_its_formula():
    query, gallery = units(9, seed=1), units(30, seed=2)
    x, y = query.double().numpy(), gallery.double().numpy()
    scores = F.pad(query, (0, 1), value=1.0) @ csls_gallery(gallery, 4).T
    for q in range(9):
        similar = y @ x[q]
        r_query = np.mean(sorted(similar)[-4:])
        formula = []
        for j in range(30):
            r_item = np.mean([y[j] @ y[i] for i in naive_list(y @ y[j], 4, {j})])
            formula.append(2 * similar[j] - r_query - r_item)
        assert 2 * scores[q].numpy() - r_query == pytest.approx(np.array(formula), abs=1e-5)
        assert scores[q].argsort(descending=True).tolist() == np.argsort(-np.array(formula)).tolist()


def test_csls_puts_an_item_of_a_crowd_behind_a_lonely_one():
    # The query at 0 is a little nearer to the crowd at 20 than to the lonely item at -21.
    query, gallery = on_circle(0), on_circle(20, 22, 24, 26, -21)
    assert nearest(query, gallery, 1).ids.tolist() == [[0]]
    ready = CSLS(3).fit(gallery)
    assert ready.search(query, 1).ids.tolist() == [[4]]


# -------------------------------------------------------------------------------------------- k-reciprocal


def naive_k_reciprocal(
    x: np.ndarray, y: np.ndarray, k1: int, k2: int, lambda_: float, depth: int, barred: list[set[int]]
) -> list[list[tuple[int, float]]]:
    """The method by Python sets and dictionaries: (item, distance) of each query's shortlist, nearest first."""
    g = len(y)
    own = y @ y.T
    half = round(k1 / 2)

    def listed(i: int, k: int) -> list[int]:
        return naive_list(own[i], k, {i})

    def reciprocal(i: int, k: int) -> set[int]:
        return {i} | {j for j in listed(i, k) if i in listed(j, k)}

    inner = [reciprocal(i, half) for i in range(g)]

    def extended(base: set[int]) -> set[int]:
        out = set(base)
        for j in base:
            if len(inner[j] & base) >= 2 / 3 * len(inner[j]) - 1e-12:
                out |= inner[j]
        return out

    plain = [{j: math.exp(own[i, j] - 1) for j in extended(reciprocal(i, k1))} for i in range(g)]

    def mean(rows: list[dict[int, float]]) -> dict[int, float]:
        return {j: sum(row.get(j, 0.0) for row in rows) / len(rows) for row in rows for j in row}

    expanded = [mean([plain[i], *(plain[j] for j in listed(i, k2 - 1))]) for i in range(g)]
    answers = []
    for q in range(len(x)):
        similar = y @ x[q]
        shortlist = naive_list(similar, depth, barred[q])
        base = {j for j in shortlist[:k1] if sum(own[j, i] > similar[j] for i in range(g) if i != j) < k1}
        row = {j: math.exp(similar[j] - 1) for j in extended(base) if j in shortlist}
        row = {j: v for j, v in mean([row, *(plain[j] for j in shortlist[: k2 - 1])]).items() if j in shortlist}
        distance = {}
        for j in shortlist:
            keys = set(row) | set(expanded[j])
            common = sum(min(row.get(i, 0.0), expanded[j].get(i, 0.0)) for i in keys)
            union = sum(max(row.get(i, 0.0), expanded[j].get(i, 0.0)) for i in keys)
            distance[j] = (1 - lambda_) * (1 - common / union) + lambda_ * (1 - similar[j])
        answers.append(sorted(distance.items(), key=lambda pair: pair[1]))
    return answers


@pytest.mark.parametrize("block_bytes", [1, 2**20])
@pytest.mark.parametrize(("k1", "k2", "lambda_", "depth"), [(6, 3, 0.3, 20), (7, 1, 0.0, 12), (20, 6, 0.8, 60)])
def test_k_reciprocal_equals_sets(k1, k2, lambda_, depth, block_bytes):
    query, gallery, junk = units(11, seed=1), units(60, seed=2), some_junk(11, 60)
    barred = [barred_of(junk, q) for q in range(11)]
    expected = naive_k_reciprocal(query.double().numpy(), gallery.double().numpy(), k1, k2, lambda_, depth, barred)
    found = k_reciprocal(
        nearest(query, gallery, depth, junk), neighbourhoods(gallery, k1, k2), lambda_, block_bytes=block_bytes
    )
    moved = 0
    for q, answer in enumerate(expected):
        kept = found.ids[q] >= 0
        assert sorted(found.ids[q][kept].tolist()) == sorted(item for item, _ in answer)
        assert not barred[q] & set(found.ids[q].tolist())
        by_item = dict(answer)
        distances = [by_item[item] for item in found.ids[q][kept].tolist()]
        assert (-found.scores[q][kept]).tolist() == pytest.approx(distances, abs=1e-5)
        moved += found.ids[q].tolist() != nearest(query, gallery, depth, junk).ids[q].tolist()
    assert moved > 5


def test_k_reciprocal_prefers_who_knows_the_query():
    # The three nearest are two of a crowd, whose members have three nearer friends each, and the item at
    # -10.8, which has the query among its three nearest and brings its neighbour along.
    gallery, query = on_circle(10, 10.5, 11, 11.5, -10.8, -13), on_circle(0)
    assert nearest(query, gallery, 3).ids.tolist() == [[0, 1, 4]]
    found = KReciprocal(k1=3, k2=1, lambda_=0.0, depth=6).fit(gallery).search(query, 6)
    assert set(found.ids[0, :2].tolist()) == {4, 5}
    # The query's neighbourhood is {4}, theirs {4, 5}; the crowd's share nothing with it.
    a, b = (math.exp(math.cos(math.radians(angle)) - 1) for angle in (10.8, 2.2))
    assert found.scores[0].tolist() == pytest.approx([a / (1 + b) - 1, a / (1 + b) - 1, -1, -1, -1, -1], abs=1e-6)
    assert found.ids[0, 2:].tolist() == [0, 1, 2, 3]


def test_k_reciprocal_with_lambda_1_keeps_the_order():
    query, gallery = units(5, seed=1), units(30, seed=2)
    found = KReciprocal(5, 2, lambda_=1.0, depth=30).fit(gallery).search(query, 30)
    assert torch.equal(found.ids, nearest(query, gallery, 30).ids)


def test_k_reciprocal_in_a_gallery_smaller_than_its_lists():
    query, gallery = units(5, seed=1), units(4, seed=2)
    found = KReciprocal(20, 6, depth=200).fit(gallery).search(query, 10)
    assert found.ids.sort().values.tolist() == [[0, 1, 2, 3]] * 5


# ----------------------------------------------------------------------------------------------- diffusion


def test_conjugate_gradient_solves_systems_side_by_side():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(4, 7, 7, generator=generator)
    matrix = half @ half.transpose(1, 2) + torch.eye(7)
    right = torch.randn(4, 7, generator=generator)
    right[2] = 0.0
    x = conjugate_gradient(lambda v: (matrix @ v[:, :, None])[:, :, 0], right, 50)
    for b in range(4):
        assert x[b].numpy() == pytest.approx(np.linalg.solve(matrix[b].numpy(), right[b].numpy()), abs=1e-3)
    assert x[2].tolist() == [0.0] * 7


@given(seed=st.integers(0, 10_000), exponent=st.integers(-30, 30), iterations=st.sampled_from([40, 3000]))
@settings(deadline=None, max_examples=20)
def test_conjugate_gradient_stays_at_the_solution(seed, exponent, iterations):
    """However many steps are asked for, and however small or large the right side is."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(3, 5, 5, generator=generator)
    matrix = half @ half.transpose(1, 2) / 5 + torch.eye(5)
    right = torch.randn(3, 5, generator=generator) * 10.0**exponent
    x = conjugate_gradient(lambda v: (matrix @ v[:, :, None])[:, :, 0], right, iterations)
    exact = np.linalg.solve(matrix.double().numpy(), right.double().numpy()[:, :, None])[:, :, 0]
    np.testing.assert_allclose(x, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize("alpha", [0.5, 0.99, 0.99999])
def test_more_iterations_of_diffusion_change_no_answer(alpha):
    gallery, query = units(40, seed=2), units(5, seed=1)
    enough, many = (
        Diffusion(8, 3, alpha=alpha, iterations=n, depth=40).fit(gallery).search(query, 40) for n in (100, 8000)
    )
    assert torch.equal(enough.ids, many.ids)
    assert torch.equal(enough.scores, many.scores)


@pytest.mark.parametrize("gamma", [3.0, 0.0])
@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_diffusion_equals_a_dense_solution(block_bytes, gamma):
    query, gallery, junk = units(7, seed=1), units(40, seed=2), some_junk(7, 40)
    k, seeds, alpha, depth = 8, 3, 0.9, 20
    y = gallery.double().numpy()
    own = y @ y.T
    affinity = np.zeros((40, 40))
    for i in range(40):
        for j in naive_list(own[i], k, {i}):
            if i in naive_list(own[j], k, {j}):
                affinity[i, j] = max(own[i, j], 0) ** gamma
    degree = affinity.sum(1)
    s = np.array([[affinity[i, j] / math.sqrt(degree[i] * degree[j]) if affinity[i, j] else 0 for j in range(40)]
                  for i in range(40)])  # fmt: skip
    found = nearest(query, gallery, depth, junk)
    graph = affinity_graph(gallery, k, gamma)
    result = diffuse(found, graph, seeds=seeds, alpha=alpha, iterations=200, block_bytes=block_bytes)
    for q in range(7):
        similar = y @ query[q].double().numpy()
        shortlist = naive_list(similar, depth, barred_of(junk, q))
        right = np.array([max(similar[j], 0) ** gamma if r < seeds else 0 for r, j in enumerate(shortlist)])
        f = np.linalg.solve(np.eye(depth) - alpha * s[np.ix_(shortlist, shortlist)], right)
        by_item = {j: value if value > 1e-9 else similar[j] - 2 for j, value in zip(shortlist, f, strict=True)}
        assert sorted(result.ids[q].tolist()) == sorted(shortlist)
        expected = [by_item[j] for j in result.ids[q].tolist()]
        assert result.scores[q].tolist() == pytest.approx(expected, abs=1e-4)


def test_diffusion_follows_a_chain_past_what_is_nearer():
    # A chain from the query's side round to 100 degrees, and a separate crowd at -60 that cosine prefers.
    chain = [5.0 * i for i in range(1, 21)]
    gallery = on_circle(*chain, -60, -62, -64, -66)
    query = on_circle(0)
    by_cosine = nearest(query, gallery, 20).ids[0].tolist()
    assert set(by_cosine) & {20, 21, 22, 23}
    ready = Diffusion(k=2, seeds=1, alpha=0.99, iterations=60, depth=24).fit(gallery)
    found = ready.search(query, 24)
    assert set(found.ids[0, :20].tolist()) == set(range(20))
    assert (found.scores[0, :20] > 0).all()
    # What nothing reaches keeps the order of its cosine, behind.
    assert found.ids[0, 20:].tolist() == [20, 21, 22, 23]
    assert found.scores[0, 20:].tolist() == pytest.approx(
        [math.cos(math.radians(a)) - 2 for a in (60, 62, 64, 66)], abs=1e-6
    )


def test_diffusion_parts_two_moons():
    generator = np.random.default_rng(0)
    t = np.linspace(0, math.pi, 60)
    plane = np.concatenate([np.stack([np.cos(t), np.sin(t)], 1), np.stack([1 - np.cos(t), 0.5 - np.sin(t)], 1)])
    plane += 0.03 * generator.standard_normal(plane.shape)
    # On the sphere: a flat patch around the pole.
    gallery = F.normalize(torch.from_numpy(np.column_stack([0.1 * plane, np.ones(120)])).float(), dim=1)
    moon = torch.arange(120) // 60
    query = gallery[[0, 59, 60, 119]]  # the horns, farthest from most of their own moon
    right = moon[[0, 59, 60, 119]]
    by_cosine = (moon[nearest(query, gallery, 60).ids] == right[:, None]).float().mean()
    ready = Diffusion(k=6, seeds=1, gamma=200.0, alpha=0.999, iterations=200, depth=120).fit(gallery)
    by_diffusion = (moon[ready.search(query, 60).ids] == right[:, None]).float().mean()
    assert by_cosine < 0.8
    assert by_diffusion == 1.0


# --------------------------------------------------------------------------------------------- superglobal


def naive_superglobal(
    x: np.ndarray, y: np.ndarray, k: int, beta: float, depth: int, barred: list[set[int]]
) -> list[dict[int, float]]:
    """The method by loops over single items: the score of each item of each query's shortlist."""
    answers = []
    for q in range(len(x)):
        shortlist = naive_list(y @ x[q], depth, barred[q])
        refined = {}
        for i in shortlist:
            near = naive_list(y @ y[i], k, {i} | (set(range(len(y))) - set(shortlist)))
            total, weights = y[i].copy(), 1.0
            for j in near:
                weight = beta * max(float(y[i] @ y[j]), 0.0)
                total, weights = total + weight * y[j], weights + weight
            refined[i] = total / weights
        first = {i: float(x[q] @ refined[i]) for i in shortlist}
        best = sorted(shortlist, key=lambda i: -first[i])[: k + 1]
        expanded = [max(refined[i][d] for i in best) for d in range(y.shape[1])]
        answers.append({i: (first[i] + float(np.dot(expanded, refined[i]))) / 2 for i in shortlist})
    return answers


@pytest.mark.parametrize("block_bytes", [1, 2**20])
@pytest.mark.parametrize(("k", "beta", "depth", "spread"), [(4, 0.5, 20, 0.7), (9, 0.15, 40, 3.0), (30, 2.0, 12, 0.7)])
def test_superglobal_equals_a_naive_loop(k, beta, depth, spread, block_bytes):
    query, gallery, junk = units(11, seed=1, spread=spread), units(60, seed=2, spread=spread), some_junk(11, 60)
    junk = Junk(*(torch.cat(p) for p in zip((junk.rows, junk.columns), bar_all_but(3, 5, 60), strict=True)))
    barred = [barred_of(junk, q) for q in range(11)]
    expected = naive_superglobal(query.double().numpy(), gallery.double().numpy(), k, beta, depth, barred)
    found = nearest(query, gallery, depth, junk)
    result = superglobal(query, found, gallery, k=k, beta=beta, block_bytes=block_bytes)
    moved = 0
    for q, by_item in enumerate(expected):
        kept = result.ids[q] >= 0
        assert sorted(result.ids[q][kept].tolist()) == sorted(by_item)
        assert result.scores[q][kept].tolist() == pytest.approx(
            [by_item[i] for i in result.ids[q][kept].tolist()], abs=2e-6
        )
        assert result.scores[q][kept].tolist() == sorted(result.scores[q][kept].tolist(), reverse=True)
        assert result.scores[q][~kept].isneginf().all()
        moved += result.ids[q].tolist() != found.ids[q].tolist()
    assert 0 < int((result.ids[3] >= 0).sum()) <= 5  # fewer than k + 1 items
    assert moved > 5


def bar_all_but(q: int, few: int, g: int) -> tuple[Tensor, Tensor]:
    """Pairs that leave query q the first few items."""
    return torch.full((g - few,), q), torch.arange(few, g)


def test_superglobal_equals_the_authors_release():
    # Recorded from modules/reranking of ShihaoShao-GH/SuperGlobal, run on these vectors in float64 on a CPU with M=6,
    # K=2, beta=.5. (Its scores on 70 random queries, M=400, K=9, beta=.15, differ by less than 4e-7 in float32.)
    t = torch.arange(9 * 5, dtype=torch.float64).view(9, 5)
    vectors = F.normalize(1.2 + torch.cos(2.0 * t * t + t), dim=1).float()
    query, gallery = vectors[:1], vectors[1:]
    assert nearest(query, gallery, 8).ids.tolist() == [[0, 4, 2, 7, 5, 3, 6, 1]]
    found = SuperGlobal(k=2, beta=0.5, depth=6).fit(gallery).search(query, 6)
    assert found.ids.tolist() == [[2, 0, 4, 5, 7, 3]]
    expected = [0.965863, 0.939305, 0.92582, 0.876991, 0.859148, 0.844784]
    assert found.scores[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_superglobal_prefers_an_item_whose_neighbours_agree():
    # Two items as near as each other: the one at -30 stands alone, the one at 30 has friends that are nearer still.
    gallery, query = on_circle(-30, 30, 24, 20, 120), on_circle(0)
    found = SuperGlobal(k=2, beta=1.0, depth=5).fit(gallery).search(query, 5)
    order = found.ids[0].tolist()
    assert order.index(1) < order.index(0)


def test_superglobal_in_a_gallery_smaller_than_its_lists():
    query, gallery = units(5, seed=1), units(4, seed=2)
    found = SuperGlobal().fit(gallery).search(query, 10)
    assert found.ids.sort().values.tolist() == [[0, 1, 2, 3]] * 5
    alone = SuperGlobal().fit(gallery[:1]).search(query, 1)
    assert alone.scores[:, 0].tolist() == pytest.approx(((query @ gallery[0] + 1) / 2).tolist(), abs=1e-6)


# -------------------------------------------------------------------------------- shortlists in a ranking


def test_shortlists_go_ahead_of_the_ranking():
    query, gallery = described(units(20, seed=1), 30, seed=1), described(units(60, seed=2), 0, seed=2)
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(60, generator=generator)[:8] for _ in range(20)])
    scores = torch.randn(20, 8, generator=generator).sort(dim=1, descending=True).values
    ids[3, 5:], scores[3, 5:] = -1, -torch.inf
    measured = measure_ranking(
        query, gallery, ks=(1, 5), exclude_self=True, ahead=SearchResult(ids, scores), block_bytes=8 * 60 * 4
    )
    cosine = (query.vectors.double() @ gallery.vectors.double().T).numpy()
    junk = find_junk(query, gallery, exclude_self=True)
    valued = 0
    for q in range(20):
        rank_score = dict(enumerate(cosine[q]))
        for place, item in enumerate(ids[q].tolist()):
            if item >= 0:
                rank_score[item] = 100.0 - place
        columns = [j for j in range(60) if j not in barred_of(junk, q)]
        right = [int(query.label[q]) >= 0 and int(gallery.label[j]) == int(query.label[q]) for j in columns]
        if any(right):
            valued += 1
            expected = average_precision_score(right, [rank_score[j] for j in columns])
            assert float(measured["AP"][q]) == pytest.approx(expected, abs=1e-12)
    assert valued > 10


def test_equal_scores_of_a_shortlist_tie():
    gallery = Descriptors(on_circle(0, 10, 20, 30), torch.tensor([0, 1, 1, 0]), torch.arange(4))
    query = Descriptors(on_circle(0), torch.tensor([1]), torch.tensor([9]))
    ahead = SearchResult(torch.tensor([[3, 2]]), torch.tensor([[0.5, 0.5]]))
    # {3, 2} tie, then 0, then 1: the relevant are one of the first two and the last.
    measured = measure_ranking(query, gallery, ks=(1,), ahead=ahead)
    assert float(measured["P@1"]) == 0.5
    assert float(measured["AP"]) == pytest.approx(((1 + 2 / 4) / 2 + (1 / 2 + 2 / 4) / 2) / 2)


def test_shortlists_do_not_go_with_packed_codes():
    some = described(pack_codes(torch.randn(5, 8)), 0, seed=0, bits=8)
    ahead = SearchResult(torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="unpack the codes"):
        measure_ranking(some, some, ahead=ahead)


# ------------------------------------------------------------------------------------- inside evaluation


@pytest.mark.parametrize("rerank", EVERY, ids=NAMES)
def test_evaluation_equals_brute_force_over_the_reranked(rerank):
    query, gallery = described(units(20, seed=1), 30, seed=1), described(units(80, seed=2), 0, seed=2)
    gallery.vectors[30:50] = query.vectors  # the queries are in the gallery
    plain = evaluate(query, gallery, FaissIndex("Flat"), ks=(1, 5), exclude_self=True)
    result = evaluate(query, gallery, FaissIndex("Flat"), ks=(1, 5), exclude_self=True, rerank=rerank)
    for name, value in plain.per_query.items():
        assert torch.equal(result.per_query[name].nan_to_num(-1), value.nan_to_num(-1)), name
    junk = find_junk(query, gallery, exclude_self=True)
    ready = rerank.fit(gallery.vectors)
    wanted, ahead = ready.rerank(query.vectors, junk)
    scores = (wanted.double() @ ready.vectors.double().T).numpy()
    precision = []
    for q in range(20):
        if ahead is not None:
            assert not barred_of(junk, q) & set(ahead.ids[q].tolist())
            for place, item in enumerate(ahead.ids[q].tolist()):
                scores[q, item] = 100.0 - place
        columns = [j for j in range(80) if j not in barred_of(junk, q)]
        right = [int(query.label[q]) >= 0 and int(gallery.label[j]) == int(query.label[q]) for j in columns]
        if any(right):
            precision.append(average_precision_score(right, scores[q, columns]))
    assert result.metrics["rerank/mAP"] == pytest.approx(np.mean(precision), abs=1e-5)
    assert result.metrics["rerank/mAP"] != result.metrics["mAP"]
    low, high = result.intervals["rerank/mAP"]
    assert low < result.metrics["rerank/mAP"] < high
    assert {"rerank/P@5", "rerank/R@1", "rerank/NDCG@5"} <= set(result.metrics)
    assert {"rerank/AP", "rerank/P@5"} <= set(result.per_query)
    assert result.metrics["rerank/seconds_per_query"] > 0
    assert result.metrics["rerank/fit_s"] >= 0
    assert "rerank/relevant" not in result.metrics
    assert not any(name.startswith("rerank/") for name in plain.metrics)


@pytest.mark.parametrize("rerank", [AQE(3), AlphaQE(4)], ids=["aqe", "alpha-qe"])
def test_a_query_does_not_expand_with_itself_or_its_group(rerank):
    query, gallery = described(units(20, seed=1), 30, seed=1), described(units(80, seed=2), 0, seed=2)
    gallery.vectors[30:50] = query.vectors
    junk = find_junk(query, gallery, exclude_self=True)
    expanded, _ = rerank.fit(gallery.vectors).rerank(query.vectors, junk)
    careless, _ = rerank.fit(gallery.vectors).rerank(query.vectors, None)
    for q in range(20):
        without = [j for j in range(80) if j not in barred_of(junk, q)]
        alone, _ = rerank.fit(gallery.vectors[without]).rerank(query.vectors[q : q + 1], None)
        assert torch.allclose(expanded[q], alone[0], atol=1e-6)
        assert not torch.allclose(expanded[q], careless[q], atol=1e-3)


@pytest.mark.parametrize("bits", [None, 12])
def test_reranking_that_changes_nothing_changes_no_metric(bits):
    vectors = [units(30, 12, seed=s) for s in (1, 2)]
    if bits:
        vectors = [pack_codes(v) for v in vectors]
    query, gallery = described(vectors[0], 30, seed=1, bits=bits), described(vectors[1], 0, seed=2, bits=bits)
    index = FaissIndex("BFlat" if bits else "Flat")
    nothing = KReciprocal(5, 2, lambda_=1.0, depth=11)
    metrics = evaluate(query, gallery, index, ks=(1, 5), exclude_self=True, rerank=nothing).metrics
    # Ties of codes that the shortlist's end cuts through are the exception.
    tolerance = 0.03 if bits else 1e-9
    for name in ("mAP", "P@1", "P@5", "NDCG@5"):
        assert metrics[f"rerank/{name}"] == pytest.approx(metrics[name], abs=tolerance if name == "mAP" else 1e-9)
    whole = KReciprocal(5, 2, lambda_=1.0, depth=30)
    index = FaissIndex("BFlat" if bits else "Flat")
    query, gallery = (Descriptors(d.vectors, d.label, d.index, d.bits) for d in (query, gallery))
    metrics = evaluate(query, gallery, index, ks=(1, 5), rerank=whole).metrics
    assert metrics["rerank/mAP"] == pytest.approx(metrics["mAP"], abs=1e-9)


@pytest.mark.parametrize("rerank", EVERY, ids=NAMES)
def test_codes_are_reranked_as_vectors(rerank):
    outputs = units(20, 12, seed=1), units(80, 12, seed=2)
    query, gallery = (described(pack_codes(o), f, seed=f, bits=12) for f, o in zip((80, 0), outputs, strict=True))
    metrics = evaluate(query, gallery, FaissIndex("BFlat"), ks=(1, 5), rerank=rerank).metrics
    signs = [torch.where(o > 0, 1.0, -1.0) / math.sqrt(12) for o in outputs]
    real = [Descriptors(s, d.label, d.index, group=d.group) for s, d in zip(signs, (query, gallery), strict=True)]
    expected = evaluate(*real, FaissIndex("Flat"), ks=(1, 5), rerank=rerank).metrics
    # Ties are cut elsewhere, and the vectors of codes are a little longer.
    assert metrics["rerank/mAP"] == pytest.approx(expected["rerank/mAP"], abs=0.06)
    assert "rerank/mAP_pessimistic" not in metrics


@pytest.mark.filterwarnings("ignore:.*learns 16 centroids")
def test_what_a_compressing_index_stores_is_reranked():
    query, gallery = described(units(20, 8, seed=1), 500, seed=1), described(units(300, 8, seed=2), 0, seed=2)
    index = FaissIndex("PQ2x4")
    result = evaluate(query, gallery, index, ks=(1, 5), rerank=AQE(3))
    stored = F.normalize(result.index.reconstruct(), dim=1)
    decoded = Descriptors(stored, gallery.label, gallery.index, group=gallery.group)
    expected = evaluate(query, decoded, FaissIndex("Flat"), ks=(1, 5), rerank=AQE(3))
    assert result.metrics["rerank/mAP"] == pytest.approx(expected.metrics["rerank/mAP"], abs=1e-3)
    exact = evaluate(query, gallery, FaissIndex("Flat"), ks=(1, 5), rerank=AQE(3))
    assert result.metrics["rerank/mAP"] != pytest.approx(exact.metrics["rerank/mAP"], abs=1e-3)


# ------------------------------------------------------------------------------------------ in the engine


class Shelf:
    """A catalog of vectors without a folder."""

    def __init__(self, vectors: Tensor, factory: str = "Flat", bits: int = 0) -> None:
        self.index = FaissIndex(factory)
        self.index.add(vectors)
        self.parts = {"content": Part(0, bits or vectors.shape[1], 1.0)}
        self.items = pa.table({"path": [f"{i}.png" for i in range(len(vectors))]})

    def __len__(self) -> int:
        return len(self.index)


def test_scores_of_the_engine_are_cosines():
    gallery = units(200, seed=2)
    raw = FaissIndex("Flat")
    raw.add(gallery)
    assert raw.search(gallery, 1).scores.max() > 1  # by rounding
    found = Engine(Shelf(gallery)).nearest(gallery, 5)
    assert found.scores.max() == 1
    assert torch.equal(found.ids, raw.search(gallery, 5).ids)


@pytest.mark.parametrize("rerank", EVERY, ids=NAMES)
def test_engine_finds_what_evaluation_ranks_first(rerank):
    query, gallery = units(6, seed=1), units(50, seed=2)
    engine = Engine(Shelf(gallery), rerank)
    found = engine.nearest(query, 9)
    wanted, ahead = rerank.fit(gallery).rerank(query, None)
    scores = wanted @ rerank.fit(gallery).vectors.T
    expected = scores.argsort(descending=True)[:, :9] if ahead is None else ahead.ids[:, :9]
    assert torch.equal(found.ids, expected)
    assert found.ids.tolist() != Engine(Shelf(gallery)).nearest(query, 9).ids.tolist()
    # One query alone is answered as among others.
    alone = torch.cat([engine.nearest(one[None], 9).ids for one in query])
    assert torch.equal(alone, found.ids)


def test_engine_reranks_codes():
    outputs = units(50, 12, seed=2)
    engine = Engine(Shelf(pack_codes(outputs), "BFlat", bits=12), AQE(1))
    found = engine.nearest(pack_codes(outputs[:5]), 1)
    # The nearest is the item itself or its double: the expansion is the code.
    signs = outputs > 0
    assert torch.equal(signs[found.ids[:, 0]], signs[:5])


def test_engine_asks_no_more_than_a_shortlist_holds():
    gallery = units(50, seed=2)
    engine = Engine(Shelf(gallery), KReciprocal(5, 2, depth=8))
    assert engine.nearest(gallery[:2], 8).ids.shape == (2, 8)
    with pytest.raises(ValueError, match=r"k=9 is more than the re-ranked shortlists hold \(8\): raise rerank\.depth"):
        engine.nearest(gallery[:2], 9)
    small = Engine(Shelf(gallery[:6]), KReciprocal(5, 2, depth=8))
    assert small.nearest(gallery[:2], 100).ids.shape == (2, 6)


def test_the_gallery_is_made_ready_once(monkeypatch):
    gallery = units(50, seed=2)
    engine = Engine(Shelf(gallery), DBA(3))
    monkeypatch.setattr(reranking, "augment_database", lambda *_: pytest.fail("made ready again"))
    assert engine.nearest(gallery[:2], 3).ids.shape == (2, 3)


# ------------------------------------------------------------------------------------- classes and configs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AQE(0), "k must be at least 1, got 0"),
        (lambda: AlphaQE(0), "k must be at least 1, got 0"),
        (lambda: AlphaQE(alpha=-1), "alpha must be at least 0"),
        (lambda: AlphaQE(alpha=math.nan), "alpha must be at least 0"),
        (lambda: DBA(1), "k counts the item itself"),
        (lambda: DBA(expand=-1), "expand must be at least 0"),
        (lambda: CSLS(0), "k must be at least 1, got 0"),
        (lambda: KReciprocal(k2=0), "k2 must be at least 1"),
        (lambda: KReciprocal(k1=5, k2=6), "k2 <= k1 <= depth must hold, got k2=6, k1=5"),
        (lambda: KReciprocal(depth=10), "k2 <= k1 <= depth must hold"),
        (lambda: KReciprocal(lambda_=1.5), r"lambda_ must lie in \[0, 1\]"),
        (lambda: Diffusion(iterations=0), "iterations must be at least 1"),
        (lambda: Diffusion(seeds=10, depth=5), "raise depth=5 to at least seeds=10"),
        (lambda: Diffusion(alpha=1.0), "alpha must lie above 0 and at most at 0.99999"),
        (lambda: Diffusion(alpha=1 - 1e-9), "alpha must lie above 0 and at most at 0.99999"),
        (lambda: Diffusion(alpha=math.nan), "alpha must lie above 0"),
        (lambda: Diffusion(gamma=-1), "gamma must be at least 0"),
        (lambda: SuperGlobal(k=0), "k must be at least 1, got 0"),
        (lambda: SuperGlobal(k=9, depth=9), "raise depth=9 above k"),
        (lambda: SuperGlobal(beta=-0.1), r"beta must be a finite number of 0 or more .* got -0\.1"),
        (lambda: SuperGlobal(beta=math.inf), "beta must be a finite number"),
        (lambda: SuperGlobal(beta=math.nan), "beta must be a finite number"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("path", sorted(set(CONF.glob("*.yaml")) - {CONF / "none.yaml"}), ids=lambda p: p.stem)
def test_configs_are_the_classes_defaults(path):
    rerank: Reranker = configs.build(OmegaConf.load(path))
    assert vars(rerank) == vars(type(rerank)())
    ready = rerank.fit(units(30, seed=2))
    assert ready.search(units(3, seed=1), 5).ids.shape == (3, 5)


def test_every_way_has_a_config():
    built = {type(configs.build(OmegaConf.load(path))) for path in CONF.glob("*.yaml") if path.stem != "none"}
    assert built == {type(rerank) for rerank in EVERY}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_equal_items_are_found_in_gallery_order(k, threads):
    distinct, query = units(25, 96, seed=1), units(5, 96, seed=2)
    gallery = distinct.repeat(41, 1)[:1013]
    scores = query.double() @ distinct.double().T
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for block_bytes in (1, 4 * 1013 * 3, 2**27):
            found = nearest(query, gallery, k, block_bytes=block_bytes)
            for row, ids in zip(scores.tolist(), found.ids.tolist(), strict=True):
                order = sorted(range(25), key=lambda i: -row[i])
                assert ids == [place for one in order for place in range(one, 1013, 25)][:k]
    finally:
        torch.set_num_threads(before)
