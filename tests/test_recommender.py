"""The recommender against brute force over all items, with floats of several parts, compressed indexes and codes."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from simsearch.functional.codes import pack_codes
from simsearch.functional.open_set import threshold_at
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.calibration import (
    Likeness,
    calibrate,
    curve,
    halves,
    leave_work_out,
    likeness,
    neighbours_of,
    wilson,
)
from simsearch.search.catalog import Catalog, CatalogError, item_table, read_catalog, write_calibration, write_catalog
from simsearch.search.filters import parse_filters
from simsearch.search.recommender import Recommender, Request
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


def opened(factory: str = "Flat", stored: Tensor | None = None, **more: object) -> Recommender:
    vectors = described(N, seed=2) if stored is None else stored
    wide = {"nprobe": 8} if "IVF" in factory else {"ef_search": N} if "HNSW" in factory else {}
    index = FaissIndex(factory, **wide)
    index.add(vectors)
    parts = {name: vars(part) for name, part in PARTS.items()}
    about = {} if index.is_binary else {"parts": parts}
    return Recommender(Catalog(Path("c"), index, attributes(len(vectors)), about, **more))


@pytest.fixture(scope="module")
def recommender() -> Recommender:
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
        torch.testing.assert_close(answer.scores, scores.sort(descending=True).values[:10], atol=1e-5, rtol=0)
        torch.testing.assert_close(answer.scores, scores[answer.ids], atol=1e-5, rtol=0)
        torch.testing.assert_close(sum(answer.parts.values()), answer.scores)
        for name, part in answer.parts.items():
            torch.testing.assert_close(part, chosen[name] / total * cosines[name][answer.ids], atol=1e-5, rtol=0)

    def test_codes(self):
        signs = torch.randn(N, 20, generator=torch.Generator().manual_seed(3))
        recommender = opened("BFlat", pack_codes(signs))
        recommender.catalog.about["parts"] = {"content": {"start": 0, "stop": 20, "weight": 1.0}}
        recommender = Recommender(recommender.catalog)
        like = pack_codes(signs[:1].roll(1, dims=1))
        answer = recommender.recommend(Request(like, k=30, collapse=False))
        distance = ((signs > 0) != (signs[:1].roll(1, dims=1) > 0)).sum(1)
        cosine = 1 - 2 * distance / 20
        torch.testing.assert_close(answer.scores, cosine.sort(descending=True).values[:30])
        torch.testing.assert_close(answer.scores, cosine[answer.ids])
        assert torch.equal(answer.parts["content"], answer.scores)
        order = [(-round(20 * s), i) for s, i in zip(answer.scores.tolist(), answer.ids.tolist(), strict=True)]
        assert order == sorted(order)

    def test_codes_of_several_examples_are_a_vote(self):
        signs = torch.randn(N, 16, generator=torch.Generator().manual_seed(3))
        recommender = opened("BFlat", pack_codes(signs))
        query = recommender.query(Request(pack_codes(signs[:4]), pack_codes(signs[4:5])))
        vote = 8 * torch.where(signs[:4] > 0, 1, -1).sum(0) - 16 * torch.where(signs[4] > 0, 1, -1)
        expected = torch.where(vote == 0, torch.where(signs[0] > 0, 1, -1), vote.sign())
        assert torch.equal(query.sign(), expected.float())
        with pytest.raises(ValueError, match="holds codes, which have no parts to weigh"):
            recommender.recommend(Request(pack_codes(signs[:1]), weights={"style": 1.0}))
        assert len(recommender.recommend(Request(pack_codes(signs[:1]), weights={"content": 2.0})).ids) == 10

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
        recommender = Recommender(Catalog(Path("c"), recommender.catalog.index, table, recommender.catalog.about))
        answer = recommender.recommend(Request(stored[:1], k=5))
        scores = stored[150:] @ stored[0]
        assert answer.ids[0] < 150
        assert (answer.ids[1:] - 150).tolist() == scores.argsort(descending=True)[:4].tolist()
        assert len(recommender.recommend(Request(stored[:1], k=450)).ids) == 301

    def test_too_many_to_drop_are_masked(self, monkeypatch, recommender):
        request = Request(recommender.vectors([9]), k=20, exclude=(9, 100, 200))
        expected = recommender.recommend(request)
        monkeypatch.setattr("simsearch.search.recommender._DROPPED", 5)
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
    def test_shared(self, recommender):
        assert recommender.telling == ["artist"]
        assert recommender.shared([0, 1, 5], [3, 2]) == [{"artist": "Monet"}, {}, {"artist": "Cassatt"}]
        assert recommender.shared([0], []) == [{}]

    def test_consensus(self, recommender):
        assert recommender.consensus([0, 3, 1]) == {"artist": "Monet"}
        assert recommender.consensus([0, 1]) == recommender.consensus([0]) == recommender.consensus([]) == {}

    def test_position(self, recommender):
        assert [recommender.position(name) for name in (7, "7", "7.jpg")] == [7, 7, 7]
        for name in ("x.jpg", N, -1):
            with pytest.raises(ValueError, match=f"no item '{name}' in the catalog c: give a position, 0 to {N - 1}"):
                recommender.position(name)

    def test_same_work_is_of_the_plain_cosine(self):
        stored = described(N, seed=2)
        cosines = (stored @ stored[9]).sort(descending=True).values
        calibration = {"same_work": float(cosines[2]), "similar": 2.0, "neighbours": 5}
        recommender = opened(calibration=calibration)
        answer = recommender.recommend(Request(stored[9:10], k=8, collapse=False))
        assert answer.verdicts == ["same work"] * 2 + ["similar"] * 6  # a copy is at home, whatever else is near
        assert answer.verdict == "same work"
        weighed = recommender.recommend(Request(stored[9:10], k=8, collapse=False, weights={"style": 50}))
        expected = (stored[weighed.ids] @ stored[9] > calibration["same_work"]).tolist()
        assert [verdict == "same work" for verdict in weighed.verdicts] == expected

    def test_similar_is_of_the_neighbours_in_the_whole_catalog(self):
        """Whatever the filters, weights and counter-examples; one example that is at home is enough."""
        stored, queries = described(N, seed=2), described(40, seed=3)
        familiar = (queries @ stored.T).topk(5, dim=1).values.mean(1)
        threshold = float(familiar.sort().values[19:21].mean())
        recommender = opened(calibration={"same_work": 2.0, "similar": threshold, "neighbours": 5})
        only = parse_filters("artist=Monet")
        for place, query in enumerate(queries):
            expected = ["similar" if float(familiar[place]) > threshold else "none"] * 4
            for more in ({}, {"where": only}, {"weights": {"style": 9}}, {"unlike": stored[:1]}):
                assert recommender.recommend(Request(query[None], k=4, **more)).verdicts == expected
        best, worst = int(familiar.argmax()), int(familiar.argmin())
        assert recommender.recommend(Request(queries[[worst]])).verdict == "none"
        assert recommender.recommend(Request(queries[[worst, best]])).verdict == "similar"

    def test_uncalibrated(self, recommender):
        assert recommender.recommend(Request(recommender.vectors([9]))).verdict == "uncalibrated"
        half = opened(calibration={"same_work": 0.99, "similar": None, "neighbours": 20})
        assert half.recommend(Request(half.vectors([9]), k=2, collapse=False)).verdicts == ["same work", "uncalibrated"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: Request(r.vectors([0]), k=0), "k must be at least 1"),
        (lambda r: Request(r.vectors([0]), diversity=1.5), r"diversity must lie in \[0, 1\]"),
        (lambda r: Request(r.vectors([])), "no example"),
        (lambda r: r.recommend(Request(r.vectors([0]), exclude=(N,))), "exclude must be positions 0 to 399"),
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
        stated = {"rate": 0.01, "same_work": 0.93, "similar": None, "neighbours": 20}
        write_calibration(catalog.folder, stated)
        assert read_catalog(catalog.folder).calibration == stated

    def test_a_new_catalog_takes_its_place(self, tmp_path):
        folder = written(tmp_path / "c")
        write_calibration(folder, {"same_work": 0.9, "similar": 0.4, "neighbours": 1})
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
            json.dumps({"same_work": "x", "similar": None, "neighbours": 1}),
            json.dumps({"same_work": 0.9, "similar": 0.4}),  # of the best score, as it was once
            json.dumps({"same_work": 0.9, "similar": 0.4, "neighbours": 0}),
        ],
    )
    def test_damage(self, text, tmp_path):
        folder = written(tmp_path / "c")
        (folder / "calibration.json").write_text(text)
        with pytest.raises(CatalogError, match=r"is damaged .* delete it, or calibrate again"):
            read_catalog(folder)


class TestCalibration:
    @pytest.mark.parametrize("factory", ["Flat", "BFlat"])
    def test_scores_against_loops(self, factory):
        recommender = opened(factory, pack_codes(described(N, seed=2)) if factory == "BFlat" else None)
        unit = recommender.as_queries(recommender.vectors(range(N)))
        works = [f"w{i // 4}" if i < N - 10 else i for i in range(N)]
        positions = torch.tensor([0, 3, 50, 200, N - 1])
        own, match = leave_work_out(recommender, positions, 7)
        for place, (i, got) in enumerate(zip(positions.tolist(), match.tolist(), strict=True)):
            scores = {j: float(unit[j] @ unit[i]) for j in range(N) if j != i}
            others = sorted((s for j, s in scores.items() if works[j] != works[i]), reverse=True)
            other = others[0]
            assert float(own.top[place]) == pytest.approx(other, abs=1e-5)
            assert float(own.familiar[place]) == pytest.approx(sum(others[:7]) / 7, abs=1e-5)
            mates = [s for j, s in scores.items() if works[j] == works[i]]
            if not mates:
                assert math.isnan(got)
            elif max(mates) > other + 1e-5:
                assert got == pytest.approx(max(mates), abs=1e-5)
            elif max(mates) < other - 1e-5:
                assert got == -math.inf

    def test_a_match_is_led_by_its_work(self):
        stored = described(N, seed=2)
        stored[1] = stored[0]
        _, match = leave_work_out(opened(stored=stored), torch.tensor([0, 1]), 1)
        assert match.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)

    def test_rate_holds_for_new_queries(self):
        """In about 95 of 100 draws, and not in all, the rate of false matches is at most what was promised."""
        generator = torch.Generator().manual_seed(0)
        rates = []
        for _ in range(200):
            scores = torch.rand(1000, generator=generator)
            first = torch.arange(1000) < 500
            none = torch.empty(0)
            threshold = calibrate(none, scores, none.bool(), first, 0.05, 0.95)
            assert threshold.value == threshold_at(scores[:500], 0.05, 0.95)
            assert (threshold.negatives, threshold.of) == (500, 500)
            assert threshold.false == int((scores[500:] > threshold.value).sum())
            rates.append(1 - threshold.value)  # of uniform scores
        assert 0.90 < sum(rate <= 0.05 for rate in rates) / len(rates) < 1
        assert sum(rates) / len(rates) > 0.03

    def test_too_few_to_promise(self):
        scores = torch.rand(50)
        with pytest.raises(ValueError, match=r"50 queries .* a rate of 0.01 with a certainty of 0.95: it takes 299"):
            calibrate(scores, scores, torch.ones(50).bool(), torch.ones(50).bool(), 0.01, 0.95)

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
        inf = math.inf
        scores = torch.tensor([[0.9, 0.5, 0.1], [0.3, 0.1, -inf], [0.2, -inf, -inf], [-inf, -inf, -inf]])
        found = likeness(scores, 2)
        assert found.top.tolist() == pytest.approx([0.9, 0.3, 0.2, -inf])
        assert found.familiar.tolist() == pytest.approx([0.7, 0.2, 0.2, -inf])
        assert found.at_home(0.25).tolist() == pytest.approx([inf, inf, 0.2, -inf])

    def test_neighbours_are_a_twentieth(self):
        assert [neighbours_of(count) for count in (1, 39, 60, 400, 10**6)] == [1, 1, 3, 20, 20]

    def test_outsiders_that_are_copies(self):
        copies = Likeness(torch.ones(400), torch.zeros(400)).at_home(0.9)
        half = torch.arange(400) < 300
        with pytest.raises(ValueError, match=r"more than 0.01 of 300 images from outside are works of the collection"):
            calibrate(torch.rand(400), copies, half, half, 0.01, 0.95)

    @pytest.mark.parametrize(
        ("count", "of", "low", "high"), [(0, 100, 0.0, 0.0370), (50, 100, 0.4038, 0.5962), (1, 10, 0.0179, 0.4042)]
    )
    def test_wilson(self, count, of, low, high):
        assert wilson(count, of) == pytest.approx((low, high), abs=1e-4)
        assert wilson(of - count, of) == pytest.approx((1 - high, 1 - low), abs=1e-4)
        assert wilson(0, 0) == (0.0, 1.0)
