"""FaissIndex against brute force written without FAISS."""

import hashlib
import math
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from simsearch.files import read_json, write_json
from simsearch.index import faiss_index, visits
from simsearch.index.factories import lists_for
from simsearch.index.faiss_index import FaissIndex
from simsearch.index.parts import parts_of
from simsearch.index.selection import Selection
from simsearch.index.visits import enough_lists, lists_of_some

CONFIGS = sorted((Path(__file__).parents[1] / "conf" / "index").glob("*.yaml"))
FLOAT_FAMILIES = [
    "Flat",
    "IVF8,Flat",
    "PQ4x4",
    "IVF8,PQ4x4",
    "HNSW16",
    "SQ8",
    "OPQ4,PQ4x4",
    "PCA16,IVF8,Flat",
]
BINARY_FAMILIES = ["BFlat", "BIVF8", "BHNSW16"]

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than the .* that FAISS advises")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The thousands of tiny k-means here wait for each other's threads on a busy machine."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def clustered(n: int, dimension: int = 32, seed: int = 0) -> Tensor:
    """Unit vectors around 20 centres, as descriptors of 20 classes lie."""
    centres = torch.randn(20, dimension, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(20, (n,), generator=generator)
    noise = torch.randn(n, dimension, generator=generator)
    return torch.nn.functional.normalize(centres[which] + 0.5 * noise, dim=1)


def codes(n: int, width: int = 6, seed: int = 0) -> Tensor:
    """Packed signs of clustered vectors: uint8 (n, width)."""
    bits = (clustered(n, 8 * width, seed) > 0).numpy()
    return torch.from_numpy(np.packbits(bits, axis=1))


def similarities(queries: Tensor, items: Tensor, metric: str) -> Tensor:
    """All Q x G scores by plain torch, in float64."""
    if metric == "hamming":
        different = queries[:, None].numpy() ^ items[None].numpy()
        return -torch.from_numpy(np.unpackbits(different, axis=2).sum(2).astype(np.int64)).double()
    if metric == "ip":
        return queries.double() @ items.double().T
    return -torch.cdist(queries.double(), items.double()).square()


def ranked(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    return ids[:, :k], values[:, :k]


def recall(found: Tensor, exact: Tensor) -> float:
    return (found[:, :, None] == exact[:, None, :]).any(2).double().mean().item()


def filled(factory: str, items: Tensor, **options: object) -> FaissIndex:
    index = FaissIndex(factory, **options)  # type: ignore[arg-type]
    index.add(items)
    return index


def family_data(factory: str, n: int = 600) -> tuple[Tensor, Tensor]:
    make = codes if factory.startswith("B") else clustered
    return make(n, seed=1), make(30, seed=2)


class TestExact:
    @pytest.mark.parametrize("metric", ["ip", "l2"])
    @pytest.mark.parametrize(("q", "k"), [(3, 1), (3, 10), (50, 10), (50, 400), (1, 500)])
    def test_flat_is_brute_force(self, metric, q, k):
        items, queries = clustered(500), clustered(q, seed=1)
        result = filled("Flat", items, metric=metric).search(queries, k)
        exact = similarities(queries, items, metric)
        ids, scores = ranked(exact, k)
        torch.testing.assert_close(result.scores.double(), scores, atol=1e-5, rtol=1e-5)
        moved = result.ids != ids  # rounding, which processors do differently, may swap what is as near
        assert moved.double().mean() < 0.01
        torch.testing.assert_close(exact.gather(1, result.ids)[moved], scores[moved], atol=1e-5, rtol=1e-5)
        assert all(len(row.unique()) == k for row in result.ids)

    @pytest.mark.parametrize("k", [1, 7, 150, 500])
    def test_binary_flat_is_popcount_with_ties_in_order(self, k):
        items, queries = codes(500, width=2), codes(40, width=2, seed=1)
        result = filled("BFlat", items).search(queries, k)
        ids, scores = ranked(similarities(queries, items, "hamming"), k)
        assert torch.equal(result.ids, ids)
        assert torch.equal(result.scores.double(), scores)
        assert "-0." not in repr(filled("BFlat", items).search(items[:1], 1).scores)

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_ties(self, data):
        """Small integers tie often and have exact products: order of addition, everywhere it can be had."""
        n, d, q = (data.draw(st.integers(1, high)) for high in (60, 6, 25))
        k = data.draw(st.integers(1, n))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        items = torch.randint(-2, 3, (n, d), generator=generator).float()
        queries = torch.randint(-2, 3, (q, d), generator=generator).float()
        for metric in ("ip", "l2"):
            result = filled("Flat", items, metric=metric).search(queries, k)
            all_scores = similarities(queries, items, metric).round()
            ids, scores = ranked(all_scores, k)
            assert torch.equal(result.scores.double(), scores)
            if metric == "l2":
                assert torch.equal(result.ids, ids)
            else:  # which of those that tie with the k-th are in is FAISS's choice
                assert torch.equal(all_scores.gather(1, result.ids), scores)
                assert all(len(set(row)) == k for row in result.ids.tolist())
                same = result.scores[:, 1:] == result.scores[:, :-1]
                assert (result.ids[:, 1:] > result.ids[:, :-1])[same].all()
                sure = scores > scores[:, -1:]
                assert torch.equal(result.ids[sure], ids[sure])

    @given(n=st.integers(1, 80), d=st.integers(1, 40), seed=st.integers(0, 2**31), share=st.floats(0, 1))
    @settings(max_examples=60, deadline=None)
    def test_flat_ids_for_any_size(self, n, d, seed, share):
        generator = torch.Generator().manual_seed(seed)
        # A permutation beside the noise makes scores distinct well beyond rounding.
        items = torch.randn(n, d, generator=generator)
        items[:, 0] = torch.randperm(n, generator=generator).float() - n / 2
        queries = torch.zeros(5, d)
        queries[:, 0] = torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0])
        k = max(1, round(share * n))
        ids, _ = ranked(similarities(queries, items, "ip"), k)
        assert torch.equal(filled("Flat", items).search(queries, k).ids, ids)

    def test_no_queries(self):
        result = filled("Flat", clustered(20)).search(clustered(0), 3)
        assert result.ids.shape == result.scores.shape == (0, 3)

    def test_foreign_layouts(self):
        items = clustered(100)
        transposed = items.T.contiguous().T.requires_grad_()
        expected = filled("Flat", items).search(items[:5], 4)
        result = filled("Flat", transposed).search(transposed[:5], 4)
        assert torch.equal(result.ids, expected.ids)


class TestApproximate:
    @pytest.mark.parametrize("metric", ["ip", "l2"])
    @pytest.mark.parametrize("factory", ["IVF16,Flat", "RR32,IVF16,Flat"])
    def test_all_lists_probed_is_exact(self, factory, metric):
        items, queries = clustered(800), clustered(40, seed=1)
        result = filled(factory, items, metric=metric, nprobe=16).search(queries, 10)
        ids, _ = ranked(similarities(queries, items, metric), 10)
        assert recall(result.ids, ids) == 1

    def test_all_binary_lists_probed_is_exact(self):
        items, queries = codes(800), codes(40, seed=1)
        result = filled("BIVF16", items, nprobe=16).search(queries, 10)
        _, scores = ranked(similarities(queries, items, "hamming"), 10)
        assert torch.equal(result.scores.double(), scores)

    @pytest.mark.parametrize(
        ("factory", "options"),
        [
            ("IVF16,Flat", {"nprobe": 4}),
            ("RR32,IVF16,Flat", {"nprobe": 4}),
            ("HNSW32", {"ef_search": 64}),
            ("HNSW32", {"ef_search": 64, "metric": "l2"}),
            ("SQ8", {}),
        ],
    )
    def test_recall_on_clustered_data(self, factory, options):
        items, queries = clustered(3000), clustered(100, seed=1)
        result = filled(factory, items, **options).search(queries, 10)
        ids, _ = ranked(similarities(queries, items, options.get("metric", "ip")), 10)
        assert recall(result.ids, ids) > 0.9

    @pytest.mark.parametrize(("factory", "options"), [("BIVF16", {"nprobe": 4}), ("BHNSW32", {"ef_search": 64})])
    def test_binary_recall(self, factory, options):
        items, queries = codes(3000), codes(100, seed=1)
        result = filled(factory, items, **options).search(queries, 10)
        _, exact = ranked(similarities(queries, items, "hamming"), 10)
        # By distance, since ties make ids ambiguous.
        assert (result.scores >= exact[:, -1:]).double().mean() > 0.9

    @pytest.mark.parametrize("factory", ["IVF32,Flat", "RR32,IVF32,Flat", "IVF32,PQ4x4,RFlat", "BIVF32"])
    def test_nprobe_reaches_the_lists(self, factory):
        items, queries = family_data(factory, 1500)
        found = [
            recall(filled(factory, items, nprobe=n).search(queries, 10).ids, exact_ids(items, queries)) for n in (1, 32)
        ]
        assert found[0] < found[1]

    @pytest.mark.parametrize("factory", ["HNSW4", "BHNSW4"])
    def test_ef_search_reaches_the_graph(self, factory):
        items, queries = family_data(factory, 2000)
        metric = "hamming" if factory[0] == "B" else "ip"
        total = [filled(factory, items, ef_search=ef).search(queries, 10).scores.sum() for ef in (1, 500)]
        _, exact = ranked(similarities(queries, items, metric), 10)
        assert total[0] < total[1] <= exact.sum() + 1e-3

    @pytest.mark.parametrize(
        ("factory", "options"),
        [
            ("HNSW8", {"ef_search": 64}),
            ("HNSW8", {"metric": "l2"}),
            ("RR32,HNSW8", {"ef_search": 64}),
            ("HNSW8_SQ8,Refine(Flat)", {"k_factor": 2}),
            ("HNSW8,RFlat", {}),
            ("BHNSW8", {"ef_search": 64}),
            ("BHNSW8", {}),
        ],
    )
    @pytest.mark.parametrize("share", [None, 0.9])
    def test_a_graph_asked_for_more_than_its_candidates(self, factory, options, share, monkeypatch):
        """FAISS ends the walk by the number of candidates: of the nearest 1,000 many are missed."""
        monkeypatch.setattr(visits, "_KEPT_ROWS", 0)  # a filter walks the graph too
        monkeypatch.setattr(FaissIndex, "_search_rows", None)
        generator = torch.Generator().manual_seed(0)
        if factory[0] == "B":
            items = torch.randint(0, 256, (6000, 8), generator=generator, dtype=torch.uint8)
        else:  # no clusters: in these even a short walk meets all
            items = torch.nn.functional.normalize(torch.randn(6000, 32, generator=generator), dim=1)
        queries, metric = items[:20], "hamming" if factory[0] == "B" else options.get("metric", "ip")
        among = None if share is None else torch.rand(6000, generator=generator) < share
        scores = similarities(queries, items, metric)
        if among is not None:
            scores[:, ~among] = -math.inf
        result = filled(factory, items, **options).search(queries, 1000, among)
        last = ranked(scores, 1000)[1][:, -1:]
        assert (result.scores >= last - 1e-5).double().mean() > 0.95  # by score, since ties make ids ambiguous

    def test_a_graph_of_enough_candidates_searches_as_before(self):
        items, queries = clustered(2000), clustered(20, seed=1)
        index = filled("HNSW16", items, ef_search=40)
        for k in (1, 39, 40):
            values, ids = index._index.search(queries.numpy(), k)
            result = index.search(queries, k)
            assert np.array_equal(result.ids.numpy(), ids)
            assert np.array_equal(result.scores.numpy(), values)

    def test_too_few_found(self):
        """One list of many holds fewer than k: the places left are -1 and -inf."""
        for factory in ("IVF32,Flat", "BIVF32"):
            items, queries = family_data(factory, 400)
            result = filled(factory, items, nprobe=1).search(queries, 390)
            empty = result.ids == -1
            assert empty.any()
            assert (result.scores[empty] == -math.inf).all()
            assert torch.isfinite(result.scores[~empty]).all()


def exact_ids(items: Tensor, queries: Tensor) -> Tensor:
    metric = "hamming" if items.dtype == torch.uint8 else "ip"
    return ranked(similarities(queries, items, metric), 10)[0]


class TestReconstruct:
    @pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", *BINARY_FAMILIES])
    def test_uncompressed_is_the_input(self, factory):
        items, _ = family_data(factory)
        index = filled(factory, items)
        assert torch.equal(index.reconstruct(), items)
        assert torch.equal(index.reconstruct(100, 250), items[100:250])
        assert torch.equal(index.reconstruct(590), items[590:])
        assert index.reconstruct(7, 7).shape == (0, items.shape[1])
        assert index.reconstruct(7, 7).dtype == items.dtype

    @pytest.mark.parametrize("metric", ["ip", "l2"])
    @pytest.mark.parametrize("factory", ["PQ4x4", "IVF8,PQ4x4", "OPQ4,PQ4x4", "SQ8", "IVF8,SQ8"])
    def test_rows_give_the_scores_of_search(self, factory, metric):
        """Asymmetric: the query as it is against what is stored."""
        items, queries = family_data(factory)
        index = filled(factory, items, metric=metric)
        stored = torch.cat([index.reconstruct(start, min(start + 250, 600)) for start in range(0, 600, 250)])
        assert stored.dtype == torch.float32
        assert not torch.equal(stored, items)
        result = index.search(queries, 10)
        seen = result.ids >= 0
        expected = similarities(queries, stored, metric).gather(1, result.ids.clamp(min=0))
        torch.testing.assert_close(result.scores.double()[seen], expected[seen], atol=2e-5, rtol=1e-4)

    def test_outside(self):
        index = filled("Flat", clustered(20))
        for start, stop in ((0, 21), (-1, 5), (5, 3)):
            with pytest.raises(ValueError, match=rf"rows {start}:{stop} are not within the 20 items"):
                index.reconstruct(start, stop)

    def test_cannot_decode(self):
        index = filled("PCAW16,Flat", clustered(50))
        for read in (index.reconstruct, lambda: index.rows(torch.tensor([3]))):
            with pytest.raises(ValueError, match="cannot decode the items of 'PCAW16,Flat'"):
                read()


class TestAmong:
    """Search among some of the items is brute force over what is stored of them."""

    FAMILIES = (*FLOAT_FAMILIES, "IVF8,PQ4x4,RFlat", "PQ4x4fs", *BINARY_FAMILIES)

    OTHERS = ("SQfp16", "SQfp16,Refine(SQfp16)", "SQ8,Refine(SQ8)", "IVF8,Flat,Refine(SQ8)", "HNSW16_SQ8")
    OTHERS += ("L2norm,Flat", "RR32,Flat", "RR40,Flat", "PCA32,IVF8,Flat", "Pad40,HNSW16", "OPQ4,Flat")
    OTHERS += ("PCA16,SQ8,RFlat",)

    @pytest.mark.parametrize("factory", [*FAMILIES, *OTHERS])
    def test_it_knows_whether_it_keeps_vectors(self, factory):
        items, _ = family_data(factory)
        items = items if factory[0] == "B" else 3 * items
        index = filled(factory, items)
        kept = index.rows(torch.arange(600))
        assert index.keeps_vectors == torch.allclose(kept.float(), items.float(), atol=1e-5)

    @staticmethod
    def expected(index: FaissIndex, queries: Tensor, mask: Tensor, k: int) -> Tensor:
        """Scores float64 (Q, k), -inf where there are fewer."""
        scores = similarities(queries, index.reconstruct(), index.metric)
        scores[:, ~mask] = -math.inf
        return ranked(scores, k)[1]

    @pytest.mark.parametrize("share", [0.9, 0.2, 0.01])
    @pytest.mark.parametrize("factory", FAMILIES)
    def test_brute_force(self, factory, share):
        items, queries = family_data(factory)
        index = filled(factory, items)
        mask = torch.rand(600, generator=torch.Generator().manual_seed(3)) < share
        result = index.search(queries, 10, mask)
        expected = self.expected(index, queries, mask, 10)
        assert torch.equal(result.ids < 0, expected.isneginf())
        assert mask[result.ids[result.ids >= 0]].all()
        if factory.startswith("PCA"):  # its queries are projected too: the order is that of what is stored
            return
        torch.testing.assert_close(result.scores.double(), expected, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize(("factory", "options"), [("IVF16,Flat", {"nprobe": 2}), ("HNSW16", {"ef_search": 16})])
    def test_recall_of_selecting_inside(self, factory, options, monkeypatch):
        """Where there are too many to compare all: the more selective, the wider the search."""
        monkeypatch.setattr(visits, "_FEW", 0)
        monkeypatch.setattr(visits, "_KEPT_ROWS", 0)
        monkeypatch.setattr(visits, "_DECODE", math.inf)
        monkeypatch.setattr(FaissIndex, "_search_rows", None)
        items, queries = clustered(2000), clustered(30, seed=1)
        index = filled(factory, items, **options)
        for share in (0.5, 0.05):
            mask = torch.rand(2000, generator=torch.Generator().manual_seed(3)) < share
            result = index.search(queries, 10, mask)
            expected = self.expected(index, queries, mask, 10)
            assert (result.scores >= expected[:, -1:] - 1e-5).double().mean() > 0.97

    @pytest.mark.parametrize(("factory", "options"), [("IVF64,Flat", {"nprobe": 1}), ("IVF64,SQ8", {"nprobe": 2})])
    def test_what_is_chosen_lies_far_from_the_query(self, factory, options, monkeypatch):
        """A filter that has to do with the vectors, such as a style: every query still finds k items."""
        monkeypatch.setattr(visits, "_FEW", 0)
        monkeypatch.setattr(visits, "_DECODE", 10**9)
        generator = torch.Generator().manual_seed(0)
        items = torch.randn(4000, 8, generator=generator)
        items[:, 0] = 20 * items[:, 0].sign()
        items /= items.norm(dim=1, keepdim=True)
        far = items[:, 0] < 0
        index, queries = filled(factory, items, **options), items[~far][:40]
        result = index.search(queries, 10, far)
        assert (result.ids >= 0).all()
        assert far[result.ids].all()
        torch.testing.assert_close(result.scores.double(), self.expected(index, queries, far, 10), atol=2e-5, rtol=1e-4)

    def test_blocks_and_ties(self, monkeypatch):
        monkeypatch.setattr(faiss_index, "_BLOCK", 7)
        items = codes(100, width=1)  # ties everywhere
        index, mask = filled("BIVF4", items), torch.arange(100) % 3 == 0
        result = index.search(items[:20], 12, mask)
        scores = similarities(items[:20], items[mask], "hamming")
        ids, values = ranked(scores, 12)
        assert torch.equal(result.scores.double(), values)
        assert torch.equal(result.ids, mask.nonzero()[:, 0][ids])

    def test_all_and_none(self):
        for factory in ("Flat", "IVF8,Flat", "PQ4x4", "BFlat"):
            items, queries = family_data(factory)
            index = filled(factory, items)
            assert (index.search(queries, 3, torch.zeros(600, dtype=torch.bool)).ids == -1).all()
        result = filled("Flat", clustered(50)).search(clustered(5, seed=1), 9, torch.ones(50, dtype=torch.bool))
        assert torch.equal(result.ids, filled("Flat", clustered(50)).search(clustered(5, seed=1), 9).ids)

    @pytest.mark.parametrize("among", [torch.ones(20), torch.ones(19, dtype=torch.bool)])
    def test_wrong(self, among):
        with pytest.raises(ValueError, match=r"among must be bool \(20,\)"):
            filled("Flat", clustered(20)).search(clustered(1), 3, among)


class TestAmongMany:
    """Of many items: what is compared is what was selected, and exact."""

    REFINED = ("IVF16,PQ8x4fsr,Refine(SQ8)", "IVF16,RaBitQfs,Refine(SQ8)", "IVF16,PQ8x4fsr,RFlat")

    def test_few_are_compared_alone(self, monkeypatch):
        items, queries = clustered(5000), clustered(4, seed=1)
        index, read = filled("IVF16,Flat", items, nprobe=1), []
        original = FaissIndex.rows
        monkeypatch.setattr(FaissIndex, "rows", lambda self, at: read.append(len(at)) or original(self, at))
        few = Selection(5000, np.arange(7, 5000, 250))
        found = index.search(queries, 5, few)
        assert read == [20]
        scores = similarities(queries, items[few.positions], "ip")
        assert torch.equal(found.ids, torch.from_numpy(few.positions)[ranked(scores, 5)[0]])

    @pytest.mark.parametrize("factory", [*REFINED, "HNSW16_SQ8"])
    def test_selecting_inside_refined_and_quantised(self, factory, monkeypatch):
        """All lists and all candidates: nothing is lost but what the codes lose."""
        items, queries = clustered(3000), clustered(20, seed=1)
        index = filled(factory, items, **({} if "HNSW" in factory else {"nprobe": 16}))
        if "Refine" in factory or "RFlat" in factory:
            index.tune(k_factor=20)
        monkeypatch.setattr(visits, "_FEW", 0)
        monkeypatch.setattr(visits, "_KEPT_ROWS", 0)
        monkeypatch.setattr(visits, "_DECODE", math.inf)
        monkeypatch.setattr(FaissIndex, "_search_rows", None)
        mask = torch.rand(3000, generator=torch.Generator().manual_seed(3)) < 0.3
        found = index.search(queries, 10, mask)
        assert mask[found.ids].all()
        scores = similarities(queries, items, "ip").masked_fill(~mask, -math.inf)
        assert recall(found.ids, ranked(scores, 10)[0]) > 0.93

    def test_another_index_selects_from_others(self):
        with pytest.raises(ValueError, match="among selects from 19 items, the index has 20"):
            filled("Flat", clustered(20)).search(clustered(1), 3, Selection.everything(19))


class TestFarFromTheQuery:
    """Selected items that have to do with the vectors, such as a style, and queries everywhere."""

    def world(self):
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(8000, 24, generator=generator) * torch.linspace(3, 0.5, 24)
        vectors /= vectors.norm(dim=1, keepdim=True)
        return vectors, vectors[:, 0] > vectors[:, 0].quantile(0.8)

    def found(self, index, queries, mask, monkeypatch):
        monkeypatch.setattr(visits, "_DECODE", math.inf)
        ids = torch.cat([index.search(query, 10, mask).ids for query in queries.split(1)])
        monkeypatch.undo()
        assert mask[ids].all()
        return ids

    def test_recall_holds_up(self, monkeypatch):
        vectors, mask = self.world()
        queries = vectors[~mask][:100]
        index = filled("IVF128,PQ12x4fsr,Refine(SQ8)", vectors, nprobe=2, k_factor=8)
        truth = ranked(similarities(queries, vectors, "ip").masked_fill(~mask, -math.inf), 10)[0]
        reached = recall(self.found(index, queries, mask, monkeypatch), truth)
        monkeypatch.setattr(
            visits, "enough_lists", lambda ivf, queries, among, some, wanted, first: np.full(len(queries), first)
        )
        assert reached > 0.9
        assert recall(self.found(index, queries, mask, monkeypatch), truth) < reached - 0.1

    @pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64,PQ12x4fs,RFlat", "PCA16,IVF64,SQ8"])
    def test_lists_until_they_hold_enough(self, factory):
        vectors, mask = self.world()
        index = filled(factory, vectors)
        *transforms, ivf = [p for p in parts_of(index._index) if isinstance(p, faiss.IndexIVF | faiss.VectorTransform)]
        projected = vectors.numpy()
        for transform in transforms:
            projected = transform.apply(projected)
        items, lists = lists_of_some(ivf)
        assert items.tolist() == list(range(8000))  # all of them, since they are few
        nearest = ivf.quantizer.search(projected, 1)[1][:, 0]
        assert (lists == nearest).all()
        visits = enough_lists(ivf, projected[:50], Selection.of(mask), (items, lists), wanted=200, first=3)
        order = np.argsort(-similarities(torch.from_numpy(projected[:50]), centroids(ivf), "ip").numpy(), axis=1)
        held = np.array([int((mask.numpy() & (lists == number)).sum()) for number in range(64)])
        for row, visited in zip(order, visits.tolist(), strict=True):
            width = 3
            while held[row[:width]].sum() < 100 and width < 64:
                width = min(64, 4 * width)
            assert visited == width


def centroids(ivf) -> torch.Tensor:
    return torch.from_numpy(ivf.quantizer.reconstruct_n(0, ivf.nlist))


class TestRefinement:
    @pytest.mark.parametrize("factory", ["IVF8,PQ8x4fsr,Refine(SQ8)", "IVF8,PQ8x4fsr,RFlat"])
    def test_with_all_candidates_it_ranks_what_it_stores(self, factory):
        items, queries = clustered(600), clustered(20, seed=1)
        index = filled(factory, items, nprobe=8, k_factor=60)
        expected = ranked(similarities(queries, index.reconstruct(), "ip"), 10)[1]
        torch.testing.assert_close(index.search(queries, 10).scores.double(), expected, atol=2e-5, rtol=1e-4)
        assert torch.allclose(index.rows(torch.tensor([5, 17])), items[[5, 17]], atol=0.02)

    def test_it_is_kept(self, tmp_path):
        index = filled("IVF8,PQ8x4fsr,Refine(SQ8)", clustered(600), nprobe=4, k_factor=7)
        index.save(tmp_path)
        read = FaissIndex.load(tmp_path)
        queries = clustered(20, seed=1)
        assert read.k_factor == 7
        assert torch.equal(read.search(queries, 10).ids, index.search(queries, 10).ids)
        read.tune(k_factor=1)
        assert not torch.equal(read.search(queries, 10).scores, index.search(queries, 10).scores)

    def test_an_index_of_before_has_none(self, tmp_path):
        filled("Flat", clustered(50)).save(tmp_path)
        settings_ = read_json(tmp_path / "index.json")
        del settings_["k_factor"]
        write_json(tmp_path / "index.json", settings_)
        assert FaissIndex.load(tmp_path).k_factor is None

    def test_it_needs_one(self):
        with pytest.raises(ValueError, match="k_factor=4 has no meaning for 'IVF8,Flat', which has no Refine"):
            FaissIndex("IVF8,Flat", k_factor=4)

    @pytest.mark.parametrize("factory", ["IVF8,RaBitQ", "IVF8,RaBitQ4", "IVF8,RaBitQfs4", "RaBitQ"])
    def test_what_cannot_be_decoded_is_refused(self, factory):
        """Engines and filters compare decoded items: FAISS's of RaBitQ rank next to nothing right."""
        plain = faiss.index_factory(32, "IVF8,RaBitQ4", faiss.METRIC_INNER_PRODUCT)
        items = clustered(600).numpy()
        plain.train(items)
        plain.add(items)
        plain.make_direct_map()
        decoded = plain.reconstruct_batch(np.arange(600))
        assert ((items * decoded).sum(1) / np.linalg.norm(decoded, axis=1)).mean() < 0.95  # 4 bits keep more
        with pytest.raises(ValueError, match="cannot be decoded"):
            FaissIndex(factory)

    @pytest.mark.parametrize("factory", ["BHash16", "BHash4x8"])
    def test_hash_tables_of_codes_are_refused(self, factory):
        plain = faiss.index_binary_factory(48, factory)
        plain.add(codes(50).numpy())
        with pytest.raises(RuntimeError, match="reconstruct"):
            plain.reconstruct(0)
        with pytest.raises(ValueError, match=f"cannot decode the items of '{factory}': take 'BFlat'"):
            FaissIndex(factory)

    @pytest.mark.parametrize("factory", ["NSG16", "NSG16,PQ4", "NSG16,SQ8"])
    def test_a_graph_that_cannot_grow_is_refused(self, factory):
        plain = faiss.index_factory(32, "NSG16,Flat")
        plain.add(clustered(200).numpy())
        with pytest.raises(RuntimeError, match="incremental"):
            plain.add(clustered(200).numpy())
        with pytest.raises(ValueError, match=f"cannot add further items to '{factory}': take another graph"):
            FaissIndex(factory, "l2")

    @pytest.mark.parametrize("factory", ["HNSW16_PQ16", "HNSW16_2+PQ16", "PCA32,HNSW16_PQ8", "HNSW16_PQ16,RFlat"])
    def test_what_faiss_makes_for_l2_alone_is_refused(self, factory):
        """Else it returns distances, smallest first, where inner products, largest first, are asked for."""
        assert faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT).metric_type == faiss.METRIC_L2
        with pytest.raises(ValueError, match=f"'{re.escape(factory)}' has no metric 'ip': .* take metric=l2"):
            FaissIndex(factory)
        items = clustered(300, 64)
        found = filled(factory, items, metric="l2").search(items[:9], 3)
        assert torch.isfinite(found.scores).all()

    @pytest.mark.parametrize("factory", ["HNSW16_PQ7", "IVF8,ITQ16,SH"])
    def test_such_of_other_widths_when_the_width_is_known(self, factory):
        with pytest.raises(ValueError, match=r"for L2 distances alone|has no metric"):
            FaissIndex(factory).check_width(28)


class TestListsThatFollow:
    @pytest.mark.parametrize(
        ("count", "lists"), [(1, 1), (100, 2), (3964, 64), (60_000, 1024), (10**6, 4096), (10**7, 16384)]
    )
    def test_lists(self, count, lists):
        assert lists_for(count) == lists
        assert count < 39 or lists <= count / 39

    @pytest.mark.parametrize(("factory", "settled"), [("IVF,Flat", "IVF1024,Flat"), ("BIVF", "BIVF1024")])
    def test_they_are_named_once_there_are_items(self, factory, settled):
        index = FaissIndex(factory)
        index.settle(60_000)
        assert (index.factory, index.nprobe, index.train_size) == (settled, 32, 100_000)
        index.settle(10**6)
        assert index.factory == settled
        index = FaissIndex("IVF,PQ16", nprobe=5)
        index.settle(10**6)
        assert (index.factory, index.nprobe, index.train_size) == ("IVF4096,PQ16", 5, 39 * 4096)

    def test_those_that_are_given_stay(self):
        index = FaissIndex("IVF256,Flat")
        index.settle(10**6)
        assert (index.factory, index.nprobe, index.train_size) == ("IVF256,Flat", None, 100_000)

    @pytest.mark.parametrize("count", [100, 4000, 60_000])
    def test_as_those_of_another(self, count):
        """Its lists are known, not the number of items that it was trained with."""
        for factory, settings_ in (("IVF,Flat", {}), ("PCA16,IVF,PQ4", {"nprobe": 3}), ("BIVF", {"train_size": 100})):
            other, one = FaissIndex(factory, **settings_), FaissIndex(factory, **settings_)
            other.settle(count)
            one.settle_as(other)
            assert one.settings == other.settings
        named = FaissIndex("IVF16,Flat")
        named.settle_as(other)
        assert named.settings == FaissIndex("IVF16,Flat").settings
        follows = FaissIndex("IVF,Flat")
        follows.settle_as(FaissIndex("Flat"))
        assert follows.factory == "IVF,Flat"

    def test_it_is_the_index_that_is_named(self, tmp_path):
        items, queries = clustered(2000), clustered(20, seed=1)
        index = filled("IVF,Flat", items)
        named = filled("IVF32,Flat", items, nprobe=6)
        assert index.factory == "IVF32,Flat"
        assert torch.equal(index.search(queries, 5).ids, named.search(queries, 5).ids)
        assert index.emptied().factory == "IVF32,Flat"
        index.save(tmp_path)
        assert read_json(tmp_path / "index.json")["factory"] == "IVF32,Flat"


class TestRows:
    @pytest.mark.parametrize("factory", [*FLOAT_FAMILIES, "RR16,IVF8,Flat", *BINARY_FAMILIES])
    def test_are_those_of_reconstruct(self, factory):
        items, _ = family_data(factory)
        index = filled(factory, items)
        positions = torch.tensor([599, 0, 17, 17])
        torch.testing.assert_close(index.rows(positions), index.reconstruct()[positions])
        assert index.rows(positions[:0]).shape == (0, items.shape[1])
        index.add(items[:3])
        torch.testing.assert_close(index.rows(torch.tensor([602, 5])), index.reconstruct()[[602, 5]])

    def test_leave_no_trace_in_the_file(self, tmp_path):
        items, _ = family_data("IVF8,Flat")
        index = filled("IVF8,Flat", items)
        before = index.bytes_per_item
        index.save(tmp_path / "a")
        index.rows(torch.tensor([3]))
        index.save(tmp_path / "b")
        assert index.bytes_per_item == before
        assert (tmp_path / "a/index.faiss").read_bytes() == (tmp_path / "b/index.faiss").read_bytes()
        assert torch.equal(index.rows(torch.tensor([3]))[0], items[3])

    @pytest.mark.parametrize("position", [-1, 20])
    def test_outside(self, position):
        with pytest.raises(ValueError, match=r"positions must lie in 0 \.\. 19"):
            filled("Flat", clustered(20)).rows(torch.tensor([0, position]))


class TestGrowth:
    @pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "PQ4x4", "SQ8", "HNSW16", *BINARY_FAMILIES])
    def test_in_parts_as_at_once(self, factory):
        items, queries = family_data(factory)
        options = {"ef_search": 600} if "HNSW" in factory else {}  # the graphs differ, an exhaustive walk does not
        results = []
        for size in (600, 170):
            index = FaissIndex(factory, **options)
            index.train(items)
            for part in items.split(size):
                index.add(part)
            assert len(index) == 600
            results.append(index.search(queries, 10))
        # Of four neighbours in a graph at once some processors round a score otherwise than of one.
        tolerance = 1e-6 if factory == "HNSW16" else 0.0
        torch.testing.assert_close(results[0].scores, results[1].scores, atol=tolerance, rtol=0.0)
        if not ("HNSW" in factory and factory[0] == "B"):  # tied distances leave the ids open there
            assert torch.equal(results[0].ids, results[1].ids)

    @pytest.mark.parametrize("factory", [*FLOAT_FAMILIES, *BINARY_FAMILIES])
    def test_equal_input_equal_index(self, factory, tmp_path):
        items, _ = family_data(factory)
        for name in ("a", "b"):
            filled(factory, items, train_size=300, seed=3).save(tmp_path / name)
        assert (tmp_path / "a/index.faiss").read_bytes() == (tmp_path / "b/index.faiss").read_bytes()

    @pytest.mark.parametrize("factory", ["IVF8,Flat", "PQ4x4", "OPQ4,PQ4x4", "BIVF8"])
    def test_seed_matters(self, factory):
        items, _ = family_data(factory)
        states = []
        for seed in (0, 1):
            index = FaissIndex(factory, seed=seed)
            index.train(items)
            write = faiss.serialize_index_binary if index.is_binary else faiss.serialize_index
            states.append(write(index._index).tobytes())
        assert states[0] != states[1]

    def test_train_size_is_a_random_choice(self):
        """Training on the first rows only would never see the last cluster."""
        items = torch.cat([torch.zeros(500, 4), torch.ones(500, 4)]) + 0.01 * clustered(1000, 4)
        index = filled("IVF2,Flat", items, metric="l2", train_size=100)
        centroids = faiss.downcast_index(index._index.quantizer).reconstruct_n(0, 2).mean(1)
        assert sorted(centroids.round().tolist()) == [0, 1]

    def test_sizes(self):
        index = FaissIndex("Flat")
        assert (len(index), index.dimension, index.bits, index.is_binary) == (0, None, None, False)
        index.add(clustered(5))
        assert (len(index), index.dimension, index.bits) == (5, 32, None)
        index = filled("BFlat", codes(5))
        assert (len(index), index.dimension, index.bits, index.is_binary) == (5, None, 48, True)

    def test_few_vectors_for_centroids_warn_once(self, capfd):
        """FAISS itself prints a line for each of the 816 k-means of this index."""
        with pytest.warns(UserWarning, match="learns 256 centroids from 300 vectors: fewer than the 9984") as caught:
            FaissIndex("OPQ4,PQ4x4").train(clustered(300))
        assert len(caught) == 1
        assert "WARNING" not in "".join(capfd.readouterr())


class TestBytes:
    @pytest.mark.parametrize(
        ("factory", "code", "item"),
        [
            ("Flat", 128, 128),
            ("IVF8,Flat", 128, 136),
            ("PQ16x4", 8, 8),
            ("IVF8,PQ4x4", 2, 10),
            ("OPQ4,PQ4x4", 2, 2),
            ("SQ8", 32, 32),
            ("PCA16,Flat", 64, 64),
            ("IVF8,PQ4x4,RFlat", 130, 138),
            ("BFlat", 6, 6),
            ("BIVF8", 6, 14),
        ],
    )
    def test_arithmetic(self, factory, code, item):
        index = filled(factory, family_data(factory)[0])
        assert index.code_bytes == code
        shared = 8 * 8 / 600 if "IVF" in factory else 0  # the lengths of 8 lists
        assert index.bytes_per_item == pytest.approx(item, abs=shared + 1e-9)

    @pytest.mark.parametrize(("factory", "code"), [("HNSW16", 128), ("BHNSW16", 6)])
    def test_graph(self, factory, code):
        index = filled(factory, family_data(factory)[0])
        assert index.code_bytes == code
        links = 4 * 2 * 16
        assert code + links < index.bytes_per_item < code + links + 12 + 4 * 16

    def test_before_there_is_anything(self):
        with pytest.raises(ValueError, match="is empty: bytes per item"):
            _ = FaissIndex("Flat").bytes_per_item
        with pytest.raises(ValueError, match="once vectors were added"):
            _ = FaissIndex("Flat").code_bytes


class TestSaving:
    @pytest.mark.parametrize("factory", [*FLOAT_FAMILIES, *BINARY_FAMILIES])
    def test_round_trip(self, factory, tmp_path):
        items, queries = family_data(factory)
        options = {"nprobe": 3} if "IVF" in factory else {"ef_search": 20} if "HNSW" in factory else {}
        index = filled(factory, items, seed=7, **options)
        index.save(tmp_path / "deep" / "index")
        loaded = FaissIndex.load(tmp_path / "deep" / "index")
        before, after = index.search(queries, 10), loaded.search(queries, 10)
        assert torch.equal(before.ids, after.ids)
        assert torch.equal(before.scores, after.scores)
        for name in ("factory", "metric", "nprobe", "ef_search", "train_size", "seed", "is_binary"):
            assert getattr(loaded, name) == getattr(index, name)
        assert loaded.bytes_per_item == index.bytes_per_item
        assert sorted(os.listdir(tmp_path / "deep" / "index")) == ["index.faiss", "index.json"]
        loaded.add(items)
        assert len(loaded) == 2 * len(index)

    def test_replaces(self, tmp_path):
        filled("Flat", clustered(10)).save(tmp_path)
        filled("Flat", clustered(20)).save(tmp_path)
        assert len(FaissIndex.load(tmp_path)) == 20
        assert sorted(os.listdir(tmp_path)) == ["index.faiss", "index.json"]

    @pytest.mark.parametrize(("factory", "name"), [("IVF8,Flat", "nprobe"), ("BHNSW16", "ef_search")])
    def test_settings_file_rules(self, factory, name, tmp_path):
        """An edited nprobe or ef_search in index.json is the one that searches."""
        items, queries = family_data(factory)
        filled(factory, items, **{name: 1}).save(tmp_path)
        write_json(tmp_path / "index.json", read_json(tmp_path / "index.json") | {name: 600})
        metric = "hamming" if factory[0] == "B" else "ip"
        found = FaissIndex.load(tmp_path).search(queries, 10).scores.double()
        torch.testing.assert_close(found, ranked(similarities(queries, items, metric), 10)[1], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("room", [8, 4000])
    def test_a_full_disk(self, room, tmp_path):
        """Also where only the last bytes find no room, which FAISS notices when it closes the file and prints."""
        filled("Flat", clustered(10)).save(tmp_path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(OSError, match=r"cannot write .*/index\.faiss: "):
                filled("Flat", clustered(31)).save(tmp_path)  # 4,013 bytes
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(FaissIndex.load(tmp_path)) == 10
        assert sorted(os.listdir(tmp_path)) == ["index.faiss", "index.json"]

    def test_failure_leaves_the_old_one(self, tmp_path, monkeypatch):
        filled("Flat", clustered(10)).save(tmp_path)

        def full_disk(index: object, path: str) -> None:
            Path(path).write_bytes(b"half")
            raise RuntimeError("no space left")

        other = filled("Flat", clustered(20))
        monkeypatch.setattr(faiss, "write_index", full_disk)
        with pytest.raises(OSError, match=r"cannot write .*/index\.faiss: no space left"):
            other.save(tmp_path)
        assert len(FaissIndex.load(tmp_path)) == 10
        assert sorted(os.listdir(tmp_path)) == ["index.faiss", "index.json"]

    def test_nothing_to_save(self, tmp_path):
        with pytest.raises(ValueError, match="nothing to save"):
            FaissIndex("Flat").save(tmp_path / "x")
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize("name", ["index.faiss", "index.json"])
    def test_missing_file(self, name, tmp_path):
        filled("Flat", clustered(10)).save(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            FaissIndex.load(tmp_path)

    def test_truncated_file(self, tmp_path):
        filled("Flat", clustered(10)).save(tmp_path)
        file = tmp_path / "index.faiss"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"damaged index file .*index\.faiss"):
            FaissIndex.load(tmp_path)

    @pytest.mark.parametrize("text", ["{", "{}", "[]", '{"factory": 3}'])
    def test_damaged_settings(self, text, tmp_path):
        filled("Flat", clustered(10)).save(tmp_path)
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"damaged index settings .*index\.json"):
            FaissIndex.load(tmp_path)

    def test_file_of_another_kind(self, tmp_path):
        """Right checksum, but FAISS cannot make sense of it."""
        filled("Flat", clustered(10)).save(tmp_path)
        (tmp_path / "index.faiss").write_bytes(b"nonsense")
        digest = hashlib.sha256(b"nonsense").hexdigest()
        write_json(tmp_path / "index.json", read_json(tmp_path / "index.json") | {"sha256": digest})
        with pytest.raises(ValueError, match=r"FAISS cannot read .*index\.faiss"):
            FaissIndex.load(tmp_path)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"factory": ""}, "must be a FAISS factory string"),
            ({"factory": None}, "must be a FAISS factory string"),
            ({"factory": "Flatt"}, "cannot parse the factory 'Flatt' .*examples: 'Flat'"),
            ({"factory": "BFlatt"}, "cannot parse the factory 'BFlatt' .*examples: 'BFlat'"),
            ({"factory": "IDMap,Flat"}, "leave IDMap out"),
            ({"factory": "Flat", "metric": "cosine"}, "must be one of ip, l2, got 'cosine'"),
            ({"factory": "Flat", "metric": "hamming"}, "must be one of ip, l2, got 'hamming'"),
            ({"factory": "BFlat", "metric": "cosine"}, "must be one of ip, l2, hamming"),
            ({"factory": "IVF4,Flat", "nprobe": 0}, "nprobe must be at least 1, got 0"),
            ({"factory": "HNSW8", "ef_search": -1}, "ef_search must be at least 1, got -1"),
            ({"factory": "Flat", "nprobe": 4}, "nprobe=4 has no meaning for 'Flat'"),
            ({"factory": "IVF4,Flat", "ef_search": 4}, "ef_search=4 has no meaning for 'IVF4,Flat'"),
            ({"factory": "PQ4", "train_size": 0}, "train_size must be at least 1"),
        ],
    )
    def test_constructor(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FaissIndex(**arguments)

    @pytest.mark.parametrize(
        ("factory", "vectors", "message"),
        [
            ("Flat", np.zeros((3, 4), np.float32), "got ndarray: use torch.from_numpy"),
            ("Flat", torch.zeros(3, 4).double(), r"got torch.float64 \(3, 4\): call .float\(\)"),
            ("Flat", torch.zeros(3, 4).half(), r"call .float\(\)"),
            ("Flat", torch.zeros(3, 4, dtype=torch.uint8), "codes need a binary factory such as 'BFlat'"),
            ("BFlat", torch.zeros(3, 12), "pad with zeros to a multiple of 8 bits"),
            ("BFlat", torch.zeros(3, 12, dtype=torch.bool), "pad with zeros to a multiple of 8 bits"),
            ("Flat", torch.zeros(4), r"must be \(N, D\), got shape \(4,\); for a single one write x\[None\]"),
            ("BFlat", torch.zeros(4, dtype=torch.uint8), r"must be \(N, bits / 8\), got shape \(4,\)"),
            ("Flat", torch.zeros(4, 0), r"got shape \(4, 0\)"),
            (
                "Flat",
                torch.tensor([[0.0], [math.nan], [1.0], [-math.inf]]),
                r"NaN or infinity, first in rows \[1, 3\]",
            ),
            (
                "PQ7x4",
                torch.zeros(50, 32),
                "PQ7 cuts .* one of 1, 2, 4, 8, 16, 32 parts, or put OPQ7_28 in front",
            ),
            ("LSH", torch.zeros(50, 32), "FAISS refuses the factory 'LSH' for dimension 32 and metric 'ip'"),
            (
                "IVF64,Flat",
                torch.rand(50, 32),
                "'IVF64,Flat' needs at least 64 vectors to train, got 50: give more",
            ),
            ("IVF8,PQ4", torch.rand(50, 32), "needs at least 256 vectors"),
            ("OPQ4,SQ8", torch.rand(50, 32), "needs at least 256 vectors"),
            ("SQ8", torch.rand(0, 32), "needs at least 1 vectors to train, got 0"),
            ("BIVF64", codes(50), "needs at least 64 vectors to train, got 50"),
        ],
    )
    def test_vectors(self, factory, vectors, message):
        index = FaissIndex(factory)
        for method in (index.train, index.add):
            with pytest.raises(ValueError, match=message):
                method(vectors)
        assert len(index) == 0
        assert index.dimension is None  # a refused first batch leaves the index as it was

    def test_advice_for_pq_works(self):
        assert len(filled("OPQ7_28,PQ7x4", clustered(300))) == 300

    def test_dimension_differs(self):
        index = filled("Flat", clustered(20, 32))
        for method in (index.add, lambda x: index.search(x, 1)):
            with pytest.raises(ValueError, match="the index has 32 dimensions, the vectors have 16"):
                method(clustered(3, 16))
        with pytest.raises(ValueError, match="the index has 48 bits, the vectors have 16"):
            filled("BFlat", codes(20)).add(codes(3, width=2))

    def test_k(self):
        index, queries = filled("Flat", clustered(20)), clustered(3)
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            index.search(queries, 0)
        with pytest.raises(ValueError, match="k=21 neighbours are more than the index's 20 items"):
            index.search(queries, 21)

    def test_empty(self):
        for index in (FaissIndex("Flat"), FaissIndex("BFlat")):
            with pytest.raises(ValueError, match="the index is empty"):
                index.search(codes(3) if index.is_binary else clustered(3), 1)
        index = FaissIndex("IVF4,Flat")
        index.train(clustered(200))
        with pytest.raises(ValueError, match="the index is empty"):
            index.search(clustered(3), 1)

    def test_trained_twice(self):
        index = filled("Flat", clustered(20))
        with pytest.raises(ValueError, match="trained already"):
            index.train(clustered(20))

    def test_train_size_too_small(self):
        """Also where the vectors are those that were drawn already, as from a collection in several parts."""
        for count in (100, 30):
            with pytest.raises(ValueError, match=r"64 vectors to train, got 30: raise index.train_size \(now 30\)"):
                FaissIndex("IVF64,Flat", train_size=30).add(clustered(count))
        with pytest.raises(ValueError, match=r"64 vectors to train, got 29: give more vectors"):
            FaissIndex("IVF64,Flat", train_size=30).add(clustered(29))

    @pytest.mark.parametrize(
        ("factory", "width", "needed"), [("IVF64,Flat", 32, 64), ("OPQ4,IVF8,PQ4", 32, 256), ("BIVF64", 6, 64)]
    )
    def test_train_size_too_small_is_known_before_there_are_vectors(self, factory, width, needed):
        FaissIndex(factory, train_size=needed).check_width(width)
        with pytest.raises(ValueError, match=rf"at least {needed} vectors to train: raise index.train_size \(now 63\)"):
            FaissIndex(factory, train_size=63).check_width(width)

    @pytest.mark.parametrize(("factory", "width"), [("IVF,Flat", 32), ("IVF,PQ4", 32), ("BIVF", 6), ("HNSW8", 32)])
    def test_train_size_of_lists_that_follow_is_raised_with_them(self, factory, width):
        FaissIndex(factory, train_size=1).check_width(width)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem != "auto"], ids=lambda path: path.stem)
def test_every_config(path):
    config = OmegaConf.load(path)
    assert path.read_text().startswith("# ")
    if OmegaConf.is_missing(config, "factory"):
        config.factory = "PCA64,IVF8,PQ16"
    index = instantiate(config)
    items = codes(400, 8) if index.is_binary else clustered(400, 128)
    index.add(items)
    result = index.search(items[:50], 5)
    assert result.ids.shape == (50, 5)
    exact = ranked(similarities(items[:50], items, index.metric), 5)[1]
    first = similarities(items[:50], items, index.metric).gather(1, result.ids[:, :1].clamp(min=0))
    # Even 16 bytes put an item itself, or one hardly further, first.
    assert (first >= exact[:, -1:]).double().mean() > 0.9
    assert index.bytes_per_item > 0


def test_there_are_configs():
    assert {"flat", "ivf", "pq16", "hnsw", "binary-flat", "factory"} <= {path.stem for path in CONFIGS}


def test_faiss_before_torch():
    """Two OpenMP runtimes in a process are a known crash; pytest itself covers torch before faiss."""
    code = (
        "import faiss, numpy as np, torch\n"
        "x = np.random.default_rng(0).standard_normal((3000, 32), dtype=np.float32)\n"
        "index = faiss.index_factory(32, 'IVF16,Flat'); index.train(x); index.add(x)\n"
        "t = torch.from_numpy(x); (t @ t.T).sort(1); index.search(x, 10); torch.linalg.svd(t)\n"
        "from simsearch.index.faiss_index import FaissIndex\n"
        "index = FaissIndex('HNSW16'); index.add(t); print(index.search(t[:1], 1).ids.item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit()


KINDS = ["Flat", "SQ8", "PQ4", "IVF4,Flat", "IVF4,PQ4", "OPQ4,IVF4,PQ4", "HNSW8", "PQ4,RFlat", "IVF4,PQ4x4fs"]


@pytest.mark.filterwarnings("ignore:.*learns")
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("factory", [*KINDS, "BFlat", "BIVF4"])
def test_some_items_of_several_indexes_joined(factory, mapped, tmp_path):
    """The joined index decodes to the same rows, and ranks them as numpy ranks the decoded rows."""
    generator = torch.Generator().manual_seed(0)
    if factory[0] == "B":
        vectors = torch.randint(0, 256, (500, 4), generator=generator, dtype=torch.uint8)
    else:
        vectors = torch.randn(500, 16, generator=generator)
    settings = {"nprobe": 4} if "IVF" in factory else {"ef_search": 500} if "HNSW" in factory else {}
    one = FaissIndex(factory, **settings)
    one.add(vectors[:400])
    other = one.emptied()
    other.add(vectors[400:])
    kept = torch.arange(0, 400, 3), torch.arange(1, 100, 2)
    rows = torch.cat([one.rows(kept[0]), other.rows(kept[1])])
    if mapped and "fs" not in factory:  # FAISS cannot decode such lists once they were read from a file
        one.save(tmp_path)
        one = FaissIndex.load(tmp_path, mapped=True)
    joined = FaissIndex.joined([(one, kept[0]), (other, kept[1])])
    assert len(joined) == len(rows)
    assert torch.equal(joined.rows(torch.arange(len(rows))), rows)
    joined.add(vectors[:2])  # it goes on with the same training
    queries, stored = vectors[5:9], torch.cat([rows, joined.rows(torch.arange(len(rows), len(rows) + 2))])
    found = joined.search(queries, 10)
    if factory[0] == "B":
        bits = [np.unpackbits(part.numpy(), axis=1).astype(int) for part in (queries, stored)]
        scores = -np.abs(bits[0][:, None] - bits[1][None]).sum(2)
    else:
        scores = queries.double().numpy() @ stored.double().numpy().T
    if "fs" not in factory and "RFlat" not in factory:  # fast-scan scores roughly, the other refines what PQ finds
        np.testing.assert_allclose(found.scores, np.sort(scores)[:, ::-1][:, :10], atol=1e-4)
    joined.save(tmp_path / "joined")
    again = FaissIndex.load(tmp_path / "joined", mapped=mapped).search(queries, 10)
    assert torch.equal(again.ids, found.ids)


@pytest.mark.filterwarnings("ignore:.*learns")
@pytest.mark.parametrize("refined", ["SQ8", "Flat"])
def test_codes_that_refine_fast_scan_lists_stay_on_the_disk(refined, tmp_path):
    """The file's bytes decide the answer of an index that was opened before they changed, which no copy would do."""
    vectors = clustered(2000, 64)
    index = filled(f"IVF4,PQ16x4fsr,Refine({refined})", vectors, nprobe=4, k_factor=8)
    index.save(tmp_path)
    mapped = FaissIndex.load(tmp_path, mapped=True)
    before = index.search(vectors[:9], 10)
    assert torch.equal(mapped.search(vectors[:9], 10).ids, before.ids)
    assert torch.equal(mapped.rows(torch.arange(5)), index.rows(torch.arange(5)))
    some = torch.arange(2000) % 3 == 0
    assert torch.equal(mapped.search(vectors[:9], 10, some).ids, index.search(vectors[:9], 10, some).ids)
    assert len(FaissIndex.joined([(mapped, torch.arange(0, 2000, 2))])) == 1000
    width = 64 if refined == "SQ8" else 256
    with (tmp_path / "index.faiss").open("r+b") as file:
        file.seek(-len(vectors) * width - 4, 2)  # the last item's codes end near the end
        file.write(bytes(len(vectors) * width // 2))
    assert not torch.equal(mapped.rows(torch.arange(900)), index.rows(torch.arange(900)))


@pytest.mark.filterwarnings("ignore:.*learns")
@pytest.mark.parametrize("factory", [
    *KINDS, "IVF4,SQ8", "SQ8,Refine(SQfp16)", "HNSW8_SQ8", "PCA8,Flat", "IVF4_HNSW8,PQ4x4", "IVF4,PQ4x4fs,RFlat",
    "IVF4,PQ4x4,Refine(SQ8)", "IVF4,RaBitQfs,Refine(SQ8)", "RQ2x4", "PCA8,IVF4,PQ4x4", "BFlat", "BIVF4",
])  # fmt: skip
def test_a_mapped_index_without_its_items_is_the_trained_one(factory, tmp_path):
    """Byte by byte what FAISS makes of the file when it reads all of it and forgets the items; and it can be filled."""
    items = codes(700, 4) if factory[0] == "B" else clustered(700, 16)
    filled(factory, items).save(tmp_path)
    binary = factory[0] == "B"
    read, write = (
        (faiss.read_index_binary, faiss.serialize_index_binary) if binary else (faiss.read_index, faiss.serialize_index)
    )
    mapped = FaissIndex.load(tmp_path, mapped=True)
    before = mapped.search(items[:9], 5)
    empty, whole = mapped.emptied(), read(str(tmp_path / "index.faiss"))
    whole.reset()
    for _ in range(2):
        if empty._index is None:  # it learns nothing
            assert whole.is_trained
        else:
            assert write(empty._index).tobytes() == write(whole).tobytes()
        empty.add(items[:200])
        whole.add(items[:200].numpy())
    again = mapped.search(items[:9], 5)
    assert torch.equal(again.ids, before.ids)
    assert torch.equal(again.scores, before.scores)


@pytest.mark.filterwarnings("ignore:.*learns")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not say what a process reads")
@pytest.mark.parametrize(
    "factory",
    ["IVF4,Flat", "SQ8", "PQ16", "IVF4,SQ8", "HNSW8_SQ8", "IVF4,PQ4x4fs,Refine(SQ8)", "OPQ4_32,IVF4,PQ16", "BIVF4"],
)
def test_items_of_a_mapped_index_are_not_read_to_go_without_them(factory, tmp_path):
    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # bytes, mapped ones do not count

    filled(factory, codes(20_000, 32) if factory[0] == "B" else clustered(20_000)).save(tmp_path)
    mapped = FaissIndex.load(tmp_path, mapped=True)
    start = read()
    assert len(mapped.emptied()) == 0
    assert read() - start < (tmp_path / "index.faiss").stat().st_size / 3
