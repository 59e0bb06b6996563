"""The recommender against brute force over all items, with floats of several parts, compressed indexes and codes."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.functional.codes import pack_codes
from simsearch.functional.open_set import pairs_once, thresholds_at
from simsearch.functional.ranking import Junk
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.calibration import (
    Likeness,
    calibrate,
    curve,
    halves,
    image_a_work,
    leave_work_out,
    neighbours_of,
    verify_without_work,
    wilson,
)
from simsearch.search.calibration_file import write_calibration
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.engine import Engine
from simsearch.search.errors import CatalogError
from simsearch.search.filters import _Column, parse_filters
from simsearch.search.item_tables import item_table
from simsearch.search.request import Request
from simsearch.search.rerank import KReciprocal
from simsearch.search.verdicts import sameness, similarity
from simsearch.search.writing import write_catalog
from simsearch.types import Part

PARTS = {"content": Part(0, 8, 0.6), "style": Part(8, 12, 0.4)}
N = 400
ARTISTS = ("Monet", "Degas", "Cassatt")

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than the .* that FAISS advises")


def described(n: int, seed: int) -> Tensor:
    """Unit descriptors of PARTS, float32 (n, 12), around 6 centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    x = centres[torch.randint(6, (n,), generator=generator)] + 0.7 * torch.randn(n, 12, generator=generator)
    for part in PARTS.values():
        own = x[:, part.start : part.stop]
        x[:, part.start : part.stop] = math.sqrt(part.weight) * own / own.norm(dim=1, keepdim=True)
    return x


def attributes(n: int) -> pa.Table:
    """Works of four items in a row, the last ten items without a known one."""
    return pa.table(
        {
            "path": [f"{i}.jpg" for i in range(n)],
            "artist": [ARTISTS[i % 3] for i in range(n)],
            "year": [str(1800 + i) for i in range(n)],
            "work": [f"w{i // 4}" if i < n - 10 else None for i in range(n)],
            "sha256": [f"{i % 2:064x}" for i in range(n)],
        }
    )


def opened(
    factory: str = "Flat", stored: Tensor | None = None, items: pa.Table | None = None, **more: object
) -> Engine:
    vectors = described(N, seed=2) if stored is None else stored
    wide = {"nprobe": 8} if "IVF" in factory else {"ef_search": N} if "HNSW" in factory else {}
    index = FaissIndex(factory, **wide)
    index.add(vectors)
    parts = {name: vars(part) for name, part in PARTS.items()}
    about = {} if index.is_binary else {"parts": parts}
    items = attributes(len(vectors)) if items is None else items
    return Engine(Catalog(Path("c"), index, items, about, **more))


@pytest.fixture(scope="module")
def recommender() -> Engine:
    return opened()


def part_cosines(query: Tensor, items: Tensor) -> dict[str, Tensor]:
    return {
        name: torch.nn.functional.cosine_similarity(
            query[None, part.start : part.stop].double(), items[:, part.start : part.stop].double()
        )
        for name, part in PARTS.items()
    }


class TestScores:
    @pytest.mark.parametrize("weights", [None, {"content": 0, "style": 1}, {"content": 1.0, "style": 3.0}])
    @pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "SQ8", "IVF8,PQ4x4", "PQ4x4"])
    def test_weighted_cosines_and_their_parts(self, factory, weights):
        recommender = opened(factory)
        stored = recommender.vectors(range(N))
        (like,) = described(1, seed=5)
        answer = recommender.recommend(Request(like[None], k=10, weights=weights, collapse=False))
        chosen = weights or {"content": 0.6, "style": 0.4}
        total = sum(chosen.values())
        # What a compressed index stores of a part is not of unit length: products with it, not cosines.
        cosines = {name: stored[:, p.start : p.stop] @ like[p.start : p.stop] / p.weight for name, p in PARTS.items()}
        if "PQ" not in factory and factory != "SQ8":
            for name, exact in part_cosines(like, stored).items():
                torch.testing.assert_close(cosines[name].double(), exact, atol=1e-5, rtol=0)
        scores = sum(chosen[name] / total * cosine for name, cosine in cosines.items())
        best = scores.sort(descending=True).values[:10]
        torch.testing.assert_close(answer.scores, best.clamp(max=1), atol=1e-5, rtol=0)
        torch.testing.assert_close(answer.scores, scores[answer.ids].clamp(max=1), atol=1e-5, rtol=0)
        shrunk = answer.scores / scores[answer.ids]
        torch.testing.assert_close(sum(answer.parts.values()), answer.scores)
        for name, part in answer.parts.items():
            own = chosen[name] / total * cosines[name][answer.ids]
            torch.testing.assert_close(part, own * shrunk, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("factory", ["Flat", "SQ8", "PQ4x4"])
    def test_no_score_is_above_one(self, factory):
        recommender = opened(factory)
        stored = recommender.vectors(range(N))
        raw = (stored * recommender.as_queries(stored)).sum(1)
        over = raw.topk(20).indices.tolist()
        assert raw.max() > 1  # by rounding, or by lengths that are not kept
        for i in over:
            answer = recommender.recommend(Request(stored[i : i + 1], k=10, collapse=False))
            assert answer.scores.abs().max() <= 1
            assert answer.scores.diff().max() < 1e-6
            torch.testing.assert_close(sum(answer.parts.values()), answer.scores)

    @pytest.mark.parametrize("scale", [1e-308, 1.0, 1e308])
    def test_weights_are_ratios_of_any_size(self, recommender, scale):
        like = described(1, seed=5)
        usual, scaled = (recommender.recommend(Request(like, weights={"content": s, "style": s})) for s in (1.0, scale))
        assert scaled.ids.tolist() == usual.ids.tolist()
        assert torch.equal(scaled.scores, usual.scores)

    def test_a_re_ranker_keeps_the_catalog_s_weights(self, recommender):
        engine = Engine(recommender.catalog, KReciprocal(k1=4, k2=2))
        like = described(1, seed=5)
        usual = engine.recommend(Request(like))
        same = engine.recommend(Request(like, weights={"content": 0.6}))  # its own
        assert same.ids.tolist() == usual.ids.tolist()
        with pytest.raises(ValueError, match="weights= and rerank= do not go together"):
            engine.recommend(Request(like, weights={"content": 1.0, "style": 0.0}))

    @pytest.mark.parametrize("k", [1.5, math.inf, math.nan])
    def test_k_is_a_whole_number(self, k):
        with pytest.raises(ValueError, match="k must be a whole number, got"):
            Request(described(1, seed=5), k=k)

    def test_codes(self):
        signs = torch.randn(N, 20, generator=torch.Generator().manual_seed(3))
        recommender = opened("BFlat", pack_codes(signs))
        recommender.catalog.about["parts"] = {"content": {"start": 0, "stop": 20, "weight": 1.0}}
        recommender = Engine(recommender.catalog)
        like = pack_codes(signs[:1].roll(1, dims=1))
        answer = recommender.recommend(Request(like, k=30, collapse=False))
        distance = ((signs > 0) != (signs[:1].roll(1, dims=1) > 0)).sum(1)
        cosine = 1 - 2 * distance / 20
        torch.testing.assert_close(answer.scores, cosine.sort(descending=True).values[:30])
        torch.testing.assert_close(answer.scores, cosine[answer.ids])
        assert torch.equal(answer.parts["content"], answer.scores)
        order = [(-round(20 * s), i) for s, i in zip(answer.scores.tolist(), answer.ids.tolist(), strict=True)]
        assert order == sorted(order)

    @pytest.mark.parametrize(("likes", "unlikes"), [(1, 1), (2, 0), (2, 1), (4, 0), (4, 3)])
    def test_codes_of_several_examples(self, likes, unlikes):
        """Each example counts, also two that are at odds, and one counter-example."""
        signs = torch.randn(N, 64, generator=torch.Generator().manual_seed(3))
        codes, signed = pack_codes(signs), torch.where(signs > 0, 1.0, -1.0)
        recommender = opened("BFlat", codes)
        unlike = codes[likes : likes + unlikes] if unlikes else None
        answer = recommender.recommend(Request(codes[:likes], unlike, k=20, collapse=False))
        wanted = signed[:likes].mean(0)
        if unlikes:
            wanted = wanted - 0.5 * signed[likes : likes + unlikes].mean(0)
        scores = (signed @ wanted) / (wanted.norm() * 8)
        expected = scores.sort(descending=True, stable=True)
        torch.testing.assert_close(answer.scores, expected.values[:20])
        torch.testing.assert_close(answer.scores, scores[answer.ids])
        alone = recommender.recommend(Request(codes[:1], k=20, collapse=False))
        assert answer.ids.tolist() != alone.ids.tolist()
        with pytest.raises(ValueError, match="holds codes, whose parts cannot be weighted"):
            recommender.recommend(Request(codes[:1], weights={"style": 1.0}))
        assert len(recommender.recommend(Request(codes[:1], weights={"content": 2.0})).ids) == 10

    def test_examples_of_codes_that_say_the_opposite(self):
        codes = pack_codes(torch.tensor([[1.0] * 8, [-1.0] * 8, [1.0, -1.0] * 4]))
        assert opened("BFlat", codes).recommend(Request(codes[:2], k=3)).scores.tolist() == [0.0, 0.0, 0.0]

    def test_counter_examples_push_away(self, recommender):
        like = recommender.vectors([0])
        plain = recommender.recommend(Request(like, k=20, exclude=(0,)))
        bad = int(plain.ids[0])
        pushed = recommender.recommend(Request(like, recommender.vectors([bad]), k=20, exclude=(0, bad)))
        stored = recommender.vectors(range(N))

        def nearness(ids: Tensor) -> float:
            return float((stored[ids] @ stored[bad]).mean())

        assert nearness(pushed.ids) < nearness(plain.ids)
        assert not set(recommender.works[pushed.ids]) & set(recommender.works[[0, bad]])


class TestSelection:
    @pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "PQ4x4", "HNSW16", "BFlat"])
    def test_filters_are_brute_force(self, factory):
        stored = pack_codes(described(N, seed=2)) if factory[0] == "B" else None
        recommender = opened(factory, stored)
        where = parse_filters("artist=monet; year=1850..1999; year!=1900..1950")
        answer = recommender.recommend(Request(recommender.vectors([7]), k=10, where=where, collapse=False))
        allowed = [i for i in range(N) if i % 3 == 0 and 50 <= i < 200 and not 100 <= i <= 150]
        assert answer.candidates == len(allowed)
        assert set(answer.ids.tolist()) <= set(allowed)
        stored = recommender.vectors(torch.tensor(allowed))
        unit = recommender.as_queries(stored) if factory == "BFlat" else stored
        scores = (unit @ recommender.as_queries(recommender.vectors([7]))[0]).sort(descending=True).values
        torch.testing.assert_close(answer.scores, scores[:10], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("factory", ["IVF32,Flat", "HNSW8"])
    @pytest.mark.parametrize("exclude", [(), (3,)])
    def test_an_index_that_runs_short_is_searched_through(self, factory, exclude):
        """Works of 50 items lie close together: the nearest lists hold few works."""
        generator = torch.Generator().manual_seed(0)
        centres = F.normalize(torch.randn(N // 50, 12, generator=generator))
        stored = F.normalize(centres.repeat_interleave(50, dim=0) + 0.05 * torch.randn(N, 12, generator=generator))
        items = pa.table({"work": [str(i // 50) for i in range(N)]})
        recommender = opened(factory, stored, items)
        answer = recommender.recommend(Request(stored[:1], k=N // 50, exclude=exclude))
        works = list(range(1 if exclude else 0, N // 50))
        query = recommender.query(Request(stored[:1]))
        best = torch.stack([(stored[50 * work : 50 * work + 50] @ query).max() for work in works]).clamp(-1, 1)
        assert answer.candidates == N - (50 if exclude else 0)
        torch.testing.assert_close(answer.scores, best.sort(descending=True).values, atol=1e-5, rtol=0)

    def test_one_of_a_work_and_none_of_the_own(self, recommender):
        answer = recommender.recommend(Request(recommender.vectors([9]), k=60, exclude=(9,)))
        stored = recommender.vectors(range(N))
        scores = stored @ stored[9]
        best = {}
        for i in scores.argsort(descending=True).tolist():
            work = f"w{i // 4}" if i < N - 10 else i
            if work != "w2":
                best.setdefault(work, i)
        assert answer.ids.tolist() == list(best.values())[:60]
        assert answer.candidates == N - 4

    def test_own_items_only(self, recommender):
        answer = recommender.recommend(Request(recommender.vectors([9]), k=N, exclude=(9,), collapse=False))
        assert sorted(answer.ids.tolist()) == [i for i in range(N) if i != 9]

    def test_deepens_until_there_are_enough_works(self):
        """150 copies of one work, and 300 others far away."""
        stored = described(450, seed=4)
        stored[:150] = stored[0]
        recommender = opened(stored=stored)
        table = recommender.catalog.items
        works = pa.array(["one"] * 150 + [str(i) for i in range(300)])
        table = table.set_column(table.column_names.index("work"), "work", works)
        recommender = Engine(Catalog(Path("c"), recommender.catalog.index, table, recommender.catalog.about))
        answer = recommender.recommend(Request(stored[:1], k=5))
        scores = stored[150:] @ stored[0]
        assert answer.ids[0] < 150
        assert (answer.ids[1:] - 150).tolist() == scores.argsort(descending=True)[:4].tolist()
        assert len(recommender.recommend(Request(stored[:1], k=450)).ids) == 301

    @pytest.mark.parametrize("where", [None, "artist=Monet|Degas"])
    def test_the_ranking_goes_on_behind_a_shortlist(self, recommender, where):
        method = KReciprocal(5, 2, depth=12)
        reranked, stored = Engine(recommender.catalog, method), recommender.vectors(range(N))
        like, conditions = described(1, seed=5), () if where is None else parse_filters(where)
        left = (~recommender.attributes.select(conditions)).nonzero()[:, 0]
        ready = method.fit(F.normalize(stored, dim=1))
        _, ahead = ready.rerank(like, Junk(torch.zeros_like(left), left))
        first = ahead.ids[0].tolist()
        plain = (stored @ like[0]).argsort(descending=True).tolist()
        order = first + [i for i in plain if i not in {*first, *left.tolist()}]
        assert first != [i for i in plain if i in first]
        answer = reranked.recommend(Request(like, k=N, where=conditions, collapse=False))
        assert answer.ids.tolist() == order
        torch.testing.assert_close(answer.scores, stored[order] @ like[0])
        works = reranked.works.tolist()
        single = [i for place, i in enumerate(order) if works[i] not in {works[j] for j in order[:place]}]
        assert reranked.recommend(Request(like, k=30, where=conditions)).ids.tolist() == single[:30]

    def test_too_many_to_drop_are_masked(self, monkeypatch, recommender):
        request = Request(recommender.vectors([9]), k=20, exclude=(9, 100, 200))
        expected = recommender.recommend(request)
        monkeypatch.setattr("simsearch.search.engine._DROPPED", 5)
        answer = recommender.recommend(request)
        assert torch.equal(answer.ids, expected.ids)
        assert answer.candidates == expected.candidates == N - 12

    def test_nothing_left(self, recommender):
        where = parse_filters("artist=Monet; artist=Degas")
        answer = recommender.recommend(Request(recommender.vectors([9]), where=where))
        assert (answer.ids.tolist(), answer.candidates, answer.verdict) == ([], 0, "none")
        assert set(answer.parts) == {"content", "style"}

    def test_diversity(self, recommender):
        like, stored = recommender.vectors([9]), recommender.vectors(range(N))

        def apart(diversity: float) -> float:
            ids = recommender.recommend(Request(like, k=10, diversity=diversity)).ids
            return 1 - float((stored[ids] @ stored[ids].T).triu(1).sum() / 45)

        assert apart(0.0) < apart(0.5) < apart(1.0)

    def test_hubness(self, recommender):
        like, stored = recommender.vectors([9]), recommender.vectors(range(N))
        answer = recommender.recommend(Request(like, k=15, hubness=True, collapse=False))
        short = (stored @ like[0]).argsort(descending=True)[:150].tolist()
        corrected = {}
        for i in short:
            others = sorted((float(stored[i] @ stored[j]) for j in range(N) if j != i), reverse=True)[:10]
            corrected[i] = float(stored[i] @ like[0]) - 0.5 * sum(others) / 10
        assert answer.ids.tolist() == sorted(short, key=corrected.__getitem__, reverse=True)[:15]
        torch.testing.assert_close(answer.scores, stored[answer.ids] @ like[0])

    def test_threads(self):
        recommender = opened("IVF8,Flat")
        where = parse_filters("artist=Monet|Degas")
        requests = [Request(recommender.vectors([i]), where=where, k=5) for i in range(24)]
        expected = [recommender.recommend(request).ids.tolist() for request in requests]
        fresh = opened("IVF8,Flat")
        with ThreadPoolExecutor(8) as pool:
            assert [answer.ids.tolist() for answer in pool.map(fresh.recommend, requests)] == expected


class TestReasons:
    def test_telling_makes_no_strings(self, monkeypatch):
        monkeypatch.setattr(_Column, "values", property(lambda _: pytest.fail("made a string of each value")))
        assert opened().telling == ["artist"]

    def test_shared(self, recommender):
        assert recommender.telling == ["artist"]
        assert recommender.shared([0, 1, 5], [3, 2]) == [{"artist": "Monet"}, {}, {"artist": "Cassatt"}]
        assert recommender.shared([0], []) == [{}]

    def test_consensus(self, recommender):
        assert recommender.consensus([0, 3, 1]) == {"artist": "Monet"}
        assert recommender.consensus([0, 1]) == recommender.consensus([0]) == recommender.consensus([]) == {}

    def test_position(self, recommender):
        assert [recommender.position(name) for name in ("7.jpg", "position:7", "7", 7)] == [7, 7, 7, 7]
        for name in ("x.jpg", N, f"position:{N}", -1, "007"):
            with pytest.raises(ValueError, match=f"no item '{name}' in the catalog c: give an id or path"):
                recommender.position(name)
        ids = pa.array([f"{N + i}" for i in range(N)])
        own = Engine(
            Catalog(Path("c"), recommender.catalog.index, recommender.catalog.items.append_column("id", ids), {})
        )
        assert own.position(N + 7) == 7
        with pytest.raises(ValueError, match="or position:7 for the item at that place"):
            own.position("7")

    @pytest.mark.parametrize("collapse", [True, False])
    def test_verdicts_of_items_against_loops(self, collapse):
        """Whatever the filters, weights and counter-examples; the item's own cosine beside its query's background."""
        stored = described(N, seed=2)
        works = opened().works.tolist()
        said = set()
        for query, taken in ((stored[9], (9,)), (described(40, seed=3)[1], ()), (-stored[7], ())):
            left_out = {j for j in range(N) if j in taken or (collapse and any(works[j] == works[t] for t in taken))}
            order = sorted(set(range(N)) - left_out, key=lambda j: -float(stored[j] @ query))
            others = [float(stored[j] @ query) for j in order if works[j] != works[order[0]]][:5]
            background = torch.tensor([sum(others) / 5])
            cosines = {j: float(stored[j] @ query) for j in range(N)}
            middle = torch.tensor([cosines[order[3]]])
            calibration = {
                "same_work": [float(sameness(middle, background)) + 1e-5],
                "similar": [float(similarity(torch.tensor([cosines[order[9]]]), background)) + 1e-5],
                "floor": 0.0,
                "neighbours": 5,
            }
            recommender = opened(calibration=calibration)
            for more in ({}, {"where": parse_filters("artist=Monet")}, {"weights": {"style": 9}}):
                request = Request(query[None], k=20, collapse=collapse, exclude=taken, **more)
                answer = recommender.recommend(request)
                for j, score, verdict in zip(answer.ids.tolist(), answer.scores, answer.verdicts, strict=True):
                    close = cosines[j] > max(0, cosines[order[9]] + 1e-5)
                    same = close and cosines[j] > cosines[order[3]] + 1e-5
                    assert verdict == ("same work" if same else "similar" if close and score >= 0 else "none")
                    said.add(verdict)
                best = next(v for v in ("same work", "similar", "none") if v in answer.verdicts)
                assert answer.verdict == best
        assert said == {"same work", "similar", "none"}

    def test_a_leader_that_stands_out_is_called(self):
        """A photograph at .8 among strangers at .2: the mean of its twenty nearest is a stranger's."""
        lone = torch.zeros(N, 12)
        lone[:, 0], lone[torch.arange(N), 1 + torch.arange(N) % 10] = 0.2, 0.96**0.5
        lone[0] = torch.tensor([0.8] + [0.0] * 10 + [0.6])
        index = FaissIndex("Flat")
        index.add(lone)
        calibration = {"same_work": [0.95], "similar": [0.8], "floor": 0.1, "neighbours": 20}
        recommender = Engine(Catalog(Path("c"), index, attributes(N), {}, calibration=calibration))
        query = torch.eye(12)[:1]
        answer = recommender.recommend(Request(query, k=5, collapse=False))
        assert answer.scores.tolist() == pytest.approx([0.8] + [0.2] * 4)
        assert answer.verdicts == ["similar", "none", "none", "none", "none"]
        assert answer.verdict == "similar"

    def test_the_same_work_is_similar(self):
        """So that of images from outside no more than the rate get any verdict."""
        calibration = {"same_work": [-3.0], "similar": [0.7], "floor": 0.0, "neighbours": 5}
        verdicts = opened(calibration=calibration).verdicts(torch.arange(N), described(1, seed=3))
        assert set(verdicts) == {"same work", "none"}
        plain = opened(calibration={**calibration, "similar": None}).verdicts(torch.arange(N), described(1, seed=3))
        assert set(plain) == {"same work"}

    def test_nothing_with_a_negative_score_is_similar(self):
        calibration = {"same_work": [2.0], "similar": [-3.0], "floor": 0.0, "neighbours": 5}
        recommender = opened(calibration=calibration)
        answer = recommender.recommend(Request(described(1, seed=3), k=N, collapse=False))
        assert answer.verdicts == ["similar" if score > 0 else "none" for score in answer.scores.tolist()]
        assert {"similar", "none"} == set(answer.verdicts)
        far = recommender.recommend(
            Request(described(1, seed=3), unlike=described(1, seed=3), k=N, weights={"style": 1})
        )
        assert all(score >= 0 for score, v in zip(far.scores, far.verdicts, strict=True) if v == "similar")

    def test_nothing_far_behind_the_neighbours_is_similar(self):
        """An item at .3 beside twenty at .6, where strangers come to .2: the neighbours do not make it similar."""
        rows = torch.zeros(N, N)
        rows[torch.arange(N), torch.arange(N)] = 1.0
        rows[:, 0] = 0.3 / 0.91**0.5
        rows[:40, 0] = 0.6 / 0.64**0.5
        rows[0] = 0.0
        rows[0, 0] = -1.0
        index = FaissIndex("Flat")
        index.add(F.normalize(rows))
        calibration = {"same_work": [2.0], "similar": [0.5], "floor": 0.2, "neighbours": 20}
        engine = Engine(Catalog(Path("c"), index, attributes(N), {}, calibration=calibration))
        answer = engine.recommend(Request(torch.eye(N)[:1], k=N, collapse=False))
        wanted = {
            round(score, 3): verdict for score, verdict in zip(answer.scores.tolist(), answer.verdicts, strict=True)
        }
        assert wanted == {0.6: "similar", 0.3: "none", -1.0: "none"}
        assert float(similarity(torch.tensor(0.3), torch.tensor(0.6))) == pytest.approx(0.45)
        assert float(similarity(torch.tensor(0.6), torch.tensor(0.3))) == pytest.approx(0.75)

    def test_nothing_at_the_floor_by_its_score_is_similar(self):
        """Counter-examples take from the score, not from the cosine to the example."""
        calibration = {"same_work": [2.0], "similar": [-3.0], "floor": 0.25, "neighbours": 5}
        engine = opened(calibration=calibration)
        like, unlike = described(1, seed=3), described(1, seed=4)
        plain = engine.recommend(Request(like, k=N, collapse=False))
        answer = engine.recommend(Request(like, unlike, k=N, collapse=False))
        close = dict(zip(plain.ids.tolist(), (plain.scores > 0.25).tolist(), strict=True))
        both = [close[i] and score > 0.25 for i, score in zip(answer.ids.tolist(), answer.scores.tolist(), strict=True)]
        assert answer.verdicts == ["similar" if one else "none" for one in both]
        assert both != [close[i] for i in answer.ids.tolist()]

    @pytest.mark.parametrize("more", [{}, {"hubness": True}, {"diversity": 0.5}, {"weights": {"style": 3}}])
    @pytest.mark.parametrize("collapse", [True, False])
    def test_a_least_score_cuts_what_is_below(self, recommender, collapse, more):
        like, unlike = described(2, seed=3), described(1, seed=4)
        whole = recommender.recommend(Request(like, unlike, k=N, collapse=collapse, weights=more.get("weights")))
        least = float(whole.scores.sort().values[-12]) - 1e-6  # below a value, not at it, where rounding decides
        answer = recommender.recommend(Request(like, unlike, k=N, collapse=collapse, min_score=least, **more))
        expected = {i for i, score in zip(whole.ids.tolist(), whole.scores.tolist(), strict=True) if score >= least}
        assert set(answer.ids.tolist()) == expected
        assert len(expected) >= 12
        assert answer.candidates == N
        weights = more.get("weights")
        few = recommender.recommend(Request(like, unlike, k=5, collapse=collapse, weights=weights, min_score=least))
        assert few.ids.tolist() == whole.ids.tolist()[:5]
        assert recommender.recommend(Request(like, min_score=1.1)).verdicts == []

    def test_several_examples_must_agree(self):
        stored = described(N, seed=2)
        calibration = {"same_work": [0.0, 9.0], "similar": None, "neighbours": 5}  # any of two: never
        calibration["same_work"][0] = -3.0
        recommender = opened(calibration=calibration)
        for count, expected in ((1, True), (2, False), (3, False)):
            verdicts = recommender.verdicts(torch.arange(N), stored[:count])
            assert (set(verdicts) == {"same work"}) == expected
        assert [recommender.agreeing(count) for count in (1, 2, 3)] == [{"same work": n} for n in (1, 1, 2)]
        assert opened().agreeing(3) == {}
        assert opened().agreeing(3, verified=True) == {"same work": 1}  # any match is enough
        matches = opened(calibration={**calibration, "verified": [40, 60]})
        assert [matches.agreeing(count, verified=True) for count in (1, 2, 3)] == [{"same work": 1}] * 2 + [{}]
        strict = opened(calibration={**calibration, "same_work": [0.6]})  # each of the examples
        queries = described(3, seed=3)
        _, background = strict.stand_out(queries, 5, torch.empty(0))
        expected = (sameness(stored @ queries.T, background) > 0.6).all(1).tolist()
        assert [v == "same work" for v in strict.verdicts(torch.arange(N), queries)] == expected

    def test_uncalibrated(self, recommender):
        assert recommender.recommend(Request(recommender.vectors([9]))).verdict == "uncalibrated"
        half = opened(calibration={"same_work": [0.6], "similar": None, "neighbours": 20})
        answer = half.recommend(Request(half.vectors([9]), k=2, collapse=False))
        assert answer.verdicts[0] == "same work"
        assert half.verdicts(torch.tensor([200]), -half.vectors([200])) == ["uncalibrated"]
        assert half.verdicts(torch.tensor([], dtype=torch.int64), half.vectors([9])) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: Request(r.vectors([0]), k=0), "k must be at least 1"),
        (lambda r: Request(r.vectors([0]), diversity=1.5), r"diversity must lie in \[0, 1\]"),
        (lambda r: Request(r.vectors([])), "no example"),
        (lambda r: Request(r.vectors([0]), min_score=math.nan), "min_score must be a finite number"),
        (lambda r: Request(r.vectors([0]), min_score="a"), "min_score must be a finite number"),
        (lambda r: r.recommend(Request(r.vectors([0]), exclude=(N,))), "exclude must hold positions from 0 to 399"),
        (lambda r: r.recommend(Request(r.vectors([0]), weights={"colour": 1})), "no part 'colour'"),
        (lambda r: r.recommend(Request(torch.ones(1, 7))), "descriptors of 7 columns"),
        (lambda r: r.recommend(Request(r.vectors([0]), torch.ones(1, 7))), "descriptors of 7 columns"),
    ],
)
def test_wrong_requests(make, message, recommender):
    with pytest.raises(ValueError, match=message):
        make(recommender)


# ------------------------------------------------------------------------------------------ calibration


class Encoder(nn.Module):
    """Stands for one of several parts in a catalog."""

    bits = None
    parts = PARTS
    provenance = {"weights": "none"}  # noqa: RUF012

    def identity(self) -> dict[str, str]:
        return {"family": "none"}


def written(folder: Path) -> Path:
    index = FaissIndex("Flat")
    index.add(described(20, seed=1))
    items = item_table(attributes(20).to_pydict(), [b""] * 20)
    write_catalog(folder, index=index, items=items, encoder=Encoder(), config={}, about={})
    return folder


class TestCalibrationFile:
    def test_round_trip(self, tmp_path):
        catalog = read_catalog(written(tmp_path / "c"))
        assert catalog.calibration is None
        assert catalog.parts == PARTS
        stated = {"rate": {"same_work": 0.01}, "same_work": [0.93], "similar": None, "neighbours": 20}
        write_calibration(catalog.folder, stated)
        assert read_catalog(catalog.folder).calibration == stated

    def test_a_new_catalog_takes_its_place(self, tmp_path):
        folder = written(tmp_path / "c")
        write_calibration(folder, {"same_work": [0.9], "similar": [0.4], "floor": 0.1, "neighbours": 1})
        (folder / "calibration").mkdir()
        (folder / "calibration/curve.csv").write_text("kind")
        assert read_catalog(written(folder)).calibration is None
        assert not (folder / "calibration").exists()

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            "{}",
            json.dumps({"same_work": ["x"], "similar": None, "neighbours": 1}),
            json.dumps({"same_work": [], "similar": None, "neighbours": 1}),
            json.dumps({"same_work": [0.9], "similar": [0.4], "neighbours": 1}),
            json.dumps({"same_work": [0.9], "similar": [0.4], "floor": 0.1, "neighbours": 0}),
        ],
    )
    def test_damage(self, text, tmp_path):
        folder = written(tmp_path / "c")
        (folder / "calibration.json").write_text(text)
        with pytest.raises(CatalogError, match=r"is damaged .* delete it, or calibrate again"):
            read_catalog(folder)

    def test_of_an_earlier_method_it_is_left_out_with_a_word(self, tmp_path, capsys):
        folder = written(tmp_path / "c")
        (folder / "calibration.json").write_text(json.dumps({"same_work": 0.9, "similar": 0.4, "neighbours": 20}))
        assert read_catalog(folder).calibration is None
        said = capsys.readouterr().err
        assert f"note: {folder}/calibration.json was made by an earlier method" in said
        assert "simsearch calibrate makes it anew" in said

    def test_without_what_came_later(self, tmp_path, capsys):
        """A calibration of 0.2: it has no coverage."""
        stated = {"same_work": [0.9], "similar": [0.4], "floor": 0.1, "neighbours": 20, "units": {"same_work": 20}}
        folder = written(tmp_path / "c")
        write_calibration(folder, stated)
        assert read_catalog(folder).calibration == stated
        assert not capsys.readouterr().err


class TestCalibration:
    @pytest.mark.parametrize("factory", ["Flat", "BFlat"])
    def test_scores_against_loops(self, factory):
        recommender = opened(factory, pack_codes(described(N, seed=2)) if factory == "BFlat" else None)
        unit = recommender.as_queries(recommender.vectors(range(N)))
        works = [f"w{i // 4}" if i < N - 10 else i for i in range(N)]
        positions = torch.tensor([0, 3, 50, 200, N - 1])
        own, match = leave_work_out(recommender, positions, 7)

        def led(scores: dict[int, float]) -> tuple[int, float, float]:
            """The leader, its score and the mean of the next seven of other works."""
            order = sorted(scores, key=lambda j: -scores[j])
            behind = [scores[j] for j in order if works[j] != works[order[0]]][:7]
            return order[0], scores[order[0]], sum(behind) / 7

        for place, (i, got) in enumerate(zip(positions.tolist(), match.sameness.tolist(), strict=True)):
            scores = {j: float(unit[j] @ unit[i]) for j in range(N) if j != i}
            _, top, background = led({j: s for j, s in scores.items() if works[j] != works[i]})
            assert float(own.top[place]) == pytest.approx(top, abs=1e-5)
            assert float(own.background[place]) == pytest.approx(background, abs=1e-5)
            mates = [s for j, s in scores.items() if works[j] == works[i]]
            if not mates:
                assert math.isnan(got)
            elif max(mates) > top + 1e-5:
                leader, best, behind = led(scores)
                assert works[leader] == works[i]
                assert got == pytest.approx(float(sameness(torch.tensor(best), torch.tensor(behind))), abs=1e-5)
                assert float(match.top[place]) == pytest.approx(best, abs=1e-5)
                assert float(match.background[place]) == pytest.approx(behind, abs=1e-5)
            elif max(mates) < top - 1e-5:
                assert got == -math.inf

    def test_evidence_against_loops(self):
        """Inliers from a table stand for geometry: of the six nearest, the item with most that is of another work."""
        inliers = torch.randint(0, 20, (N, N), generator=torch.Generator().manual_seed(5)).tolist()

        class Table:
            top, regions, region_top = 3, 0, 1

            def changed(self, *, top, regions, mirrored):
                other = Table()
                other.top = top
                return other

            def verify(self, local, items):
                found = [inliers[local[0]][i] for i in items]
                return [SimpleNamespace(inliers=one) if one > 12 else None for one in found]

        stored = F.normalize(described(N, seed=2) + described(N, seed=9)[torch.arange(N) // 4])
        index = FaissIndex("Flat")
        index.add(stored)
        local = SimpleNamespace(take=lambda positions: positions)
        engine = Engine(Catalog(Path("c"), index, attributes(N), {}, local=local, verification=Table()))
        works = [f"w{i // 4}" if i < N - 10 else i for i in range(N)]
        positions = torch.cat([torch.arange(0, N - 12, 9), torch.tensor([N - 1])])
        strangers, matches = verify_without_work(engine, positions, [(i,) for i in positions.tolist()])
        kinds = set()
        for i, stranger, match in zip(positions.tolist(), strangers.tolist(), matches.tolist(), strict=True):
            # Three are compared as in a search, and as many as the largest work has, less the query itself.
            order = sorted((j for j in range(N) if j != i), key=lambda j: -float(stored[j] @ stored[i]))[:6]
            others = [j for j in order if works[j] != works[i]]
            assert stranger == max([inliers[i][j] for j in others if inliers[i][j] > 12], default=0)
            best = max((inliers[i][j], -place) for place, j in enumerate(order))
            leader = order[-best[1]]
            led = best[0] > 12 and works[leader] == works[i]
            assert math.isnan(match) if i == N - 1 else match == (best[0] if led else -math.inf)
            kinds.add("alone" if i == N - 1 else "led" if led else "not")
        assert kinds == {"alone", "led", "not"}

    def test_a_deeper_search_verifies_nothing_again(self):
        """A large work that collapses makes the search go deeper; what was verified stays."""
        asked = []

        class Table:
            top, regions, region_top = 5, 1, 1

            def verify(self, local, items):
                asked.append(list(items))
                return [SimpleNamespace(inliers=20, outline=np.zeros((4, 2))) if i == 3 else None for i in items]

        stored = described(N, seed=2)
        stored[:300] = stored[0] + 1e-3 * described(300, seed=4)
        index = FaissIndex("Flat")
        index.add(F.normalize(stored))
        works = attributes(N).set_column(3, "work", pa.array(["one" if i < 300 else f"w{i}" for i in range(N)]))
        local = SimpleNamespace(take=lambda positions: positions)
        engine = Engine(Catalog(Path("c"), index, works, {}, local=local, verification=Table()))
        regions: list[int] = []
        one = Request(engine.vectors([0]), k=5, local=(0,), regions=lambda: regions.append(1) or engine.vectors([3]))
        answer = engine.recommend(one)
        assert (len(answer.ids), answer.ids[0], len(regions)) == (5, 3, 1)
        assert len(asked) == 2  # the nearest, and those of the region

    def test_inliers_must_exceed_what_is_calibrated(self):
        matches = [SimpleNamespace(inliers=count) for count in (10, 14, 30)]
        given = [None, *matches]
        calibration = {"same_work": [0.0], "similar": None, "neighbours": 5}

        def said(examples, **more):
            like = described(examples, seed=3)
            return opened(calibration=calibration | more).verdicts(torch.arange(4), like, None, given)

        same = [verdict == "same work" for verdict in said(1)]
        assert same == [False, True, True, True]  # not calibrated: any match
        assert [verdict == "same work" for verdict in said(1, verified=[12.0, 20.0])] == [False, False, True, True]
        assert [verdict == "same work" for verdict in said(2, verified=[12.0, 20.0])] == [False, False, False, True]
        assert "same work" not in said(3, verified=[12.0, 20.0])  # for so many no rate is promised

    def test_a_match_is_led_by_its_work(self):
        stored = described(N, seed=2)
        stored[1] = stored[0]
        own, match = leave_work_out(opened(stored=stored), torch.tensor([0, 1]), 1)
        assert (match.sameness > own.sameness).all()
        assert match.top[0] == pytest.approx(float(match.top[1]), abs=1e-5)

    def test_one_image_a_work(self):
        recommender = opened()
        positions = image_a_work(recommender.works, N, 0)
        assert len(positions) == 98 + 10  # 390 items of works of four (the last of two) and ten of their own
        assert len(set(recommender.works[positions].tolist())) == len(positions)
        assert positions.tolist() == sorted(positions.tolist())
        few = [image_a_work(recommender.works, 5, seed).tolist() for seed in range(300)]
        assert {len(one) for one in few} == {5}
        assert {i % 4 for one in few for i in one if i < 388} == {0, 1, 2, 3}  # any of its images

    def test_large_works_are_no_likelier_than_small_ones(self):
        works = np.concatenate([np.arange(100), np.repeat(np.arange(100, 200), 9)])
        large = [float((works[image_a_work(works, 50, seed)] >= 100).mean()) for seed in range(200)]
        assert np.mean(large) == pytest.approx(0.5, abs=0.02)  # its standard error is .004

    def test_thresholds_and_what_they_do(self):
        scores, match = torch.rand(1001, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0, -1.0, 2.0])
        first = torch.arange(1001) < 501
        of_match = torch.tensor([True, False, False])
        found = calibrate(match, scores, of_match, first, 0.05, 0.95, paired=True)
        assert found.values == thresholds_at(pairs_once(scores[:501]), 0.05)
        assert (found.units, found.of, found.per_unit, found.rate) == (250, 500, 2, 0.05)
        assert found.false == int((scores[501:] > found.values[0]).sum())
        assert (found.found, found.matches) == (1, 2)
        assert found.coverage == pytest.approx(1 - 0.95**0.5)  # at which one or both of two are found in one of 20
        alone = calibrate(match, scores, of_match, first, 0.05, 0.95, paired=False)
        assert (alone.units, alone.per_unit, alone.values) == (501, 1, thresholds_at(scores[:501], 0.05))

    def test_too_few_to_promise(self):
        scores = torch.rand(50)
        first = torch.arange(50) < 30
        found = calibrate(scores, scores, first, first, 0.01, 0.95, paired=True)
        assert found.rate == pytest.approx(1 - 0.05 ** (1 / 15))
        assert found.values == [float(scores[:30].sort().values[-2].double())]
        with pytest.raises(ValueError, match="1 queries without a match in the calibrating half are too few"):
            calibrate(scores, scores[:1], first, first[:1], 0.01, 0.95, paired=True)

    def test_halves_are_stable(self):
        names = [f"{i}.jpg" for i in range(2000)]
        first = halves(names)
        assert torch.equal(first[::2], halves(names[::2]))
        assert 900 < int(first.sum()) < 1100

    def test_curve_is_rising(self):
        match, no_match = torch.tensor([0.9, 0.7, -math.inf]), torch.tensor([0.1, 0.2, 0.8])
        rows = curve(match, no_match)
        assert (rows[1:, 0] > rows[:-1, 0]).all()
        at = {round(row[0], 3): row[1:].tolist() for row in rows}
        assert at[0.2] == pytest.approx([2 / 3, 1 / 3, 2 / 3])
        assert at[0.8] == pytest.approx([1 / 3, 0, 1])

    def test_likeness(self):
        like = Likeness(torch.tensor([0.9, 0.3]), torch.tensor([0.4, -math.inf]))
        assert like.sameness.tolist() == pytest.approx([0.7, 0.8])
        assert like.similarity.tolist() == pytest.approx([1.1, -0.2])

    def test_neighbours_are_a_twentieth(self):
        assert [neighbours_of(count) for count in (1, 39, 60, 400, 10**6)] == [1, 1, 3, 20, 20]

    @pytest.mark.parametrize(
        ("count", "of", "low", "high"), [(0, 100, 0.0, 0.0370), (50, 100, 0.4038, 0.5962), (1, 10, 0.0179, 0.4042)]
    )
    def test_wilson(self, count, of, low, high):
        assert wilson(count, of) == pytest.approx((low, high), abs=1e-4)
        assert wilson(of - count, of) == pytest.approx((1 - high, 1 - low), abs=1e-4)
        assert wilson(0, 0) == (0.0, 1.0)
