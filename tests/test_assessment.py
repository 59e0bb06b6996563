"""An art collection measured in many ways, against loops over items; simsearch assess from a user's side."""

from __future__ import annotations

import csv
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import simsearch
from PIL import Image
from sklearn.metrics import average_precision_score, ndcg_score

from simsearch import configs, saved_run
from simsearch.commands.assess import check_unknown
from simsearch.commands.evaluate import trained_rows
from simsearch.data.collection import Collection
from simsearch.data.protocols import ByHash, Everything
from simsearch.evaluation import assessment
from simsearch.evaluation.evaluator import Evaluator, Measured, sides
from simsearch.evaluation.ndcg import GradedNDCG
from simsearch.evaluation.open_set import OpenSet
from simsearch.evaluation.ranking import FullRanking
from simsearch.evaluation.recommendation import Recommend, nearest_lists, popular_lists, random_lists
from simsearch.files import read_json
from simsearch.functional.sharded import Sharded
from simsearch.functional.significance import holm, jackknife_difference, mean_interval
from simsearch.search.calibration_sample import outside_sample
from simsearch.search.describe import batches_of
from simsearch.trust import Untrusted
from simsearch.types import Descriptors, RetrievalTask

ATTRIBUTES = ("artist", "style", "period", "work")
N, D = 40, 6


@pytest.fixture(scope="module")
def collection() -> Collection:
    generator = torch.Generator().manual_seed(0)
    work = torch.arange(N) // 2
    work[30:] = torch.arange(30, N)  # the last ten are alone
    artist = work % 5
    style, period = artist % 3, torch.randint(-1, 2, (N,), generator=generator)
    artist[7] = -1
    labels = torch.stack([artist, style, period, work], dim=1)
    classes = tuple(tuple(f"{name} {i}" for i in range(N)) for name in ATTRIBUTES)
    images = torch.randint(0, 256, (N, 3, 8, 8), generator=generator).byte()
    return Collection("toy", images, labels, ATTRIBUTES, classes, torch.zeros(N, dtype=torch.bool))


@pytest.fixture(scope="module")
def vectors(collection: Collection) -> torch.Tensor:
    """Descriptors that know a little of the artist."""
    generator = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(6, D, generator=generator), dim=1)
    return F.normalize(centres[collection.column("artist")] + 0.4 * torch.randn(N, D, generator=generator), dim=1)


def task(attribute: str, junk: str | None) -> RetrievalTask:
    rows = torch.arange(4, N)
    return RetrievalTask(f"art-{attribute}", rows, rows, attribute, junk, True, "0" * 16)


def measure(
    evaluator: Evaluator, vectors: torch.Tensor, collection: Collection, asked: RetrievalTask, bits: int | None = None
) -> Measured:
    return evaluator(*sides(vectors, bits, collection, asked), asked)


def made(
    way: Recommend, vectors: torch.Tensor, collection: Collection, asked: RetrievalTask, bits: int | None = None
) -> torch.Tensor:
    query, gallery = sides(vectors, bits, collection, asked)
    return way(query.whole, gallery.whole, asked)


def answers(vectors: torch.Tensor, collection: Collection, asked: RetrievalTask) -> dict[int, list[int]]:
    """Collection rows of each query's answers, best first, without itself and junk; a loop."""
    found = {}
    for q in asked.query.tolist():
        group = None if asked.junk is None else collection.column(asked.junk)
        allowed = [
            g for g in asked.gallery.tolist() if g != q and (group is None or group[g] != group[q] or group[q] < 0)
        ]
        found[q] = sorted(allowed, key=lambda g: -float(vectors[q] @ vectors[g]))
    return found


@pytest.mark.parametrize(("attribute", "junk"), [("artist", "work"), ("style", "artist"), ("work", None)])
def test_average_precision(attribute, junk, collection, vectors):
    asked = task(attribute, junk)
    measured = measure(FullRanking(), vectors, collection, asked)
    label = collection.column(attribute)
    for place, (q, found) in enumerate(answers(vectors, collection, asked).items()):
        right = [bool(label[g] == label[q] and label[q] >= 0) for g in found]
        got = float(measured.per_query["AP"][place])
        if any(right):
            assert got == pytest.approx(average_precision_score(right, -np.arange(len(right))), abs=1e-9)
        else:
            assert math.isnan(got)
    assert measured.metrics["mAP"] == pytest.approx(float(measured.per_query["AP"].nanmean()))
    low, high = measured.intervals["mAP"]
    assert low < measured.metrics["mAP"] < high
    assert measured.units.tolist() == asked.query.tolist()
    by_artist = replace(asked, unit="artist", units=collection.column("artist"))
    wider = measure(FullRanking(), vectors, collection, by_artist)
    assert wider.metrics == pytest.approx(measured.metrics, nan_ok=True)
    expected = mean_interval(measured.per_query["AP"][:, None], collection.column("artist")[asked.query])[0]
    assert wider.intervals["mAP"] == pytest.approx(tuple(expected.tolist()))


def test_graded(collection, vectors):
    """Same work 3, same artist 2, same style and period 1; gains 2 ** level - 1 of scikit-learn's NDCG."""
    asked = task("artist", "work")
    measured = measure(GradedNDCG(collection), vectors, collection, asked)
    columns = {name: collection.column(name).tolist() for name in ATTRIBUTES}

    def level(q: int, g: int) -> int:
        def same(name: str) -> bool:
            return columns[name][q] == columns[name][g] >= 0

        return 3 if same("work") else 2 if same("artist") else int(same("style") and same("period"))

    whole = RetrievalTask("art-artist", asked.query, asked.gallery, "artist", None, True, "0" * 16)
    expected = []
    for q, found in answers(vectors, collection, whole).items():
        gains = [2.0 ** level(q, g) - 1 for g in found]
        expected.append(ndcg_score([gains], [-np.arange(len(gains))], k=10) if any(gains) else math.nan)
    got = measured.per_query["NDCG@10_graded"].tolist()
    assert got == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_open_set(collection, vectors):
    """GAP by its definition: all answers ranked by confidence, precision at each right one over the positives."""
    asked = task("work", None)
    outside = F.normalize(torch.randn(20, D, generator=torch.Generator().manual_seed(2)), dim=1)
    measured = measure(OpenSet(outside), vectors, collection, asked)
    work = collection.column("work").tolist()
    rows = asked.gallery.tolist()
    pairs = []  # confidence, right, has a match
    for q, found in answers(vectors, collection, asked).items():
        pairs.append(
            (
                float(vectors[q] @ vectors[found[0]]),
                work[q] == work[found[0]],
                [work[r] for r in rows].count(work[q]) > 1,
            )
        )
    positives = sum(has for _, _, has in pairs)

    def gap(kept: list[tuple[float, bool, bool]]) -> float:
        ranked = sorted(kept, key=lambda pair: -pair[0])
        hits = [sum(r for _, r, _ in ranked[: i + 1]) / (i + 1) for i, pair in enumerate(ranked) if pair[1]]
        return sum(hits) / positives

    others = [(float((vectors[4:] @ o).max()), False, False) for o in outside]
    assert measured.metrics["GAP-"] == pytest.approx(gap([pair for pair in pairs if pair[2]]), abs=1e-6)
    assert measured.metrics["GAP"] == pytest.approx(gap(pairs), abs=1e-6)
    assert measured.metrics["GAP_outside"] == pytest.approx(gap(pairs + others), abs=1e-6)
    assert measured.metrics["accuracy"] == pytest.approx(sum(r for _, r, has in pairs if has) / positives)
    assert measured.metrics["outside"] == 20


@pytest.mark.parametrize(("beta", "neighbours"), [(0.5, 3), (1.0, 1), (0.25, 1000)])
def test_open_set_with_normalised_scores(beta, neighbours, collection, vectors):
    """Each query's best score less a share of the mean of the best scores of other works, by a loop; GAP by a loop."""
    asked = replace(task("work", None), unit="artist", units=collection.column("artist"))
    outside = F.normalize(torch.randn(20, D, generator=torch.Generator().manual_seed(2)), dim=1)
    work = [-1 - row if name < 0 else name for row, name in enumerate(collection.column("work").tolist())]
    rows = asked.gallery.tolist()

    def answer(vector: torch.Tensor, allowed: list[int]) -> tuple[int, float, float]:
        ranked = sorted(((float(vector @ vectors[g]), g) for g in allowed), key=lambda pair: -pair[0])
        score, first = ranked[0]
        others = [s for s, g in ranked if work[g] != work[first]][:neighbours]
        return first, score, score - beta * sum(others) / len(others)

    def gap(pairs: list[tuple[float, bool]], positives: int) -> float:
        ranked = [right for _, right in sorted(pairs, key=lambda pair: -pair[0])]
        return sum(sum(ranked[: i + 1]) / (i + 1) for i, right in enumerate(ranked) if right) / positives

    found = [answer(vectors[q], [g for g in rows if g != q]) for q in rows]
    has = [[work[g] for g in rows].count(work[q]) > 1 for q in rows]
    right = [work[one[0]] == work[q] for one, q in zip(found, rows, strict=True)]
    normal = [(one[2], r) for one, r in zip(found, right, strict=True)]
    others = [(answer(vector, rows)[2], False) for vector in outside]
    metrics = measure(OpenSet(outside, beta, neighbours), vectors, collection, asked)
    got, positives = metrics.metrics, sum(has)
    assert got["GAP_normalised"] == pytest.approx(gap(normal, positives), abs=1e-6)
    assert got["GAP-_normalised"] == pytest.approx(gap([p for p, h in zip(normal, has, strict=True) if h], positives))
    assert got["GAP_outside_normalised"] == pytest.approx(gap(normal + others, positives), abs=1e-6)
    plain = measure(OpenSet(outside), vectors, collection, asked).metrics
    assert plain == {name: got[name] for name in plain}
    assert not any("normalised" in name or "gain" in name for name in plain)

    # Each artist left out in turn: the gain without it.
    units = asked.units[asked.gallery].tolist()
    before = [(one[1], r) for one, r in zip(found, right, strict=True)]
    gain = gap(normal, positives) - gap(before, positives)
    without, held = [], []
    for name in sorted(set(units)):
        kept = [place for place, unit in enumerate(units) if unit != name]
        left = sum(has[place] for place in kept)
        without.append(gap([normal[p] for p in kept], left) - gap([before[p] for p in kept], left))
        held.append(positives - left)
    low, high, p = jackknife_difference(gain, torch.tensor(without, dtype=torch.float64), torch.tensor(held))
    assert got["GAP_gain"] == pytest.approx(gain, abs=1e-6)
    assert metrics.intervals == {"GAP_gain": pytest.approx((low, high), abs=1e-5)}
    assert got["GAP_gain_p"] == pytest.approx(p, abs=1e-4)


def test_a_query_that_is_like_everything_is_trusted_less():
    """Without a match it scores higher than some with one; against its background it stands out least."""
    hub, axes = torch.full((8,), 8**-0.5), torch.eye(8)
    near = [axes[i] + 1.5 * hub + of * 0.1 * axes[6] for i in range(3) for of in (0, 1)]  # three works like the hub
    apart = [axes[i] + 0.2 * hub + of * 0.6 * axes[7] for i in range(3, 6) for of in (0, 1)]  # two photographs each
    vectors = F.normalize(torch.stack([*near, *apart, hub]))
    label = torch.tensor([*torch.arange(6).repeat_interleave(2).tolist(), -1])
    rows = torch.arange(13)
    both = Sharded.of(Descriptors(vectors, label, rows))
    asked = RetrievalTask("works", rows, rows, "work", None, True, "0" * 16)
    got = OpenSet(beta=1.0, neighbours=3)(both, both, asked).metrics
    assert got["GAP"] < 0.96
    assert got["GAP_normalised"] == got["GAP-"] == got["accuracy"] == 1.0


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_an_open_set_without_any_match_has_no_value(beta):
    """One image of each work: nothing can be found."""
    rows = torch.arange(6)
    both = Sharded.of(Descriptors(F.normalize(torch.eye(6) + 0.1, dim=1), rows, rows))
    asked = RetrievalTask("works", rows, rows, "work", None, True, "0" * 16)
    got = OpenSet(torch.eye(6)[:2], beta, 2)(both, both, asked)
    assert got.metrics.pop("outside") == 2
    assert {"GAP", "GAP-", "GAP_outside", "accuracy"} <= got.metrics.keys()
    assert ("GAP_gain_p" in got.metrics) == (beta > 0)
    assert all(math.isnan(value) for value in got.metrics.values())
    assert got.intervals == {}


@pytest.mark.parametrize("wrong", [{"beta": -0.1}, {"beta": math.nan}, {"neighbours": 0}])
def test_wrong_numbers_of_an_open_set_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        OpenSet(**wrong)


def test_lists(collection, vectors):
    asked = task("artist", "work")
    found = made(nearest_lists, vectors, collection, asked)
    for row, expected in zip(found, answers(vectors, collection, asked).values(), strict=True):
        assert asked.gallery[row].tolist() == expected[:10]
    diverse = made(partial(nearest_lists, diversity=0.6), vectors, collection, asked)
    assert torch.equal(diverse[:, 0], found[:, 0])  # the best item stays the first

    def spread(ids: torch.Tensor) -> float:
        rows = vectors[asked.gallery][ids]
        return float((rows @ rows.transpose(1, 2)).mean())

    assert spread(diverse) < spread(found)


def test_lists_of_codes_and_of_everything(collection):
    """Codes as real values; a gallery with fewer items than are asked for fills up with -1."""
    codes = torch.randn(N, 16, generator=torch.Generator().manual_seed(3))
    rows = torch.arange(4, 12)
    asked = RetrievalTask("art-artist", rows, rows, "artist", "work", True, "0" * 16)
    for diversity in (0.0, 0.3):
        found = made(partial(nearest_lists, diversity=diversity), codes, collection, asked, 16)
        assert (found >= 0).sum(1).tolist() == [6] * 8  # not itself and not its work
        assert all(len(set(row[row >= 0].tolist())) == 6 for row in found)


def test_lists_without_a_query(collection):
    """By popularity the same ten but for junk; by chance ten others for each."""
    asked = task("artist", "work")
    popularity = torch.arange(len(asked.gallery)).flip(0)
    popular = made(partial(popular_lists, popularity=popularity), torch.zeros(N, 1), collection, asked)
    work = collection.column("work")[asked.gallery].tolist()
    for place, row in enumerate(popular.tolist()):
        expected = [g for g in range(len(work)) if work[g] != work[place]][:10]
        assert row == expected
    chance = made(partial(random_lists, items=N), torch.zeros(N, 1), collection, asked)
    assert (chance >= 0).all()
    assert len({tuple(row) for row in chance.tolist()}) == len(chance)


@pytest.mark.parametrize("items", [1_000, 100_000])
def test_popular_lists_of_large_collections_are_those_of_a_sort(items):
    labels = torch.stack([torch.arange(items) % 50, torch.arange(items) // 4], dim=1)
    none = tuple(tuple(f"{name} {i}" for i in range(items)) for name in ("artist", "work"))
    images = torch.zeros(items, 3, 1, 1, dtype=torch.uint8)
    large = Collection("large", images, labels, ("artist", "work"), none, torch.zeros(items, dtype=torch.bool))
    rows, generator = torch.arange(items), torch.Generator().manual_seed(2)
    popularity = torch.randperm(items, generator=generator)
    first = popularity.argsort(descending=True)
    query = torch.cat([first[:5], rows[:5]]).unique()
    asked = RetrievalTask("art-artist", query, rows, "artist", "work", True, "0" * 16)
    found = made(partial(popular_lists, popularity=popularity), torch.zeros(items, 1), large, asked)
    for q, row in zip(query.tolist(), found.tolist(), strict=True):
        assert row == [g for g in first[:40].tolist() if g // 4 != q // 4][:10]


def test_popularity_is_that_of_the_artist(collection):
    asked = task("artist", None)
    artist = collection.column("artist")[asked.gallery].tolist()
    expected = [1 if a < 0 else artist.count(a) for a in artist]
    assert assessment.artist_popularity(collection, asked).tolist() == expected


def test_further_evaluators_add_only_what_is_new(collection, vectors, capsys):
    run = assessment.Assessed("one", vectors, None, None, 0.0)
    tasks = {"artist": task("artist", "work"), "work": task("work", None)}
    first = assessment.measure(run, collection, tasks)
    further = {"again": FullRanking(ks=(1, 3)), "deeper": FullRanking(ks=(3, 4)), "open": OpenSet(beta=0.5)}
    every = assessment.measure(run, collection, tasks, further)
    named = [(f.task.name, metric) for f in every for metric in f.measured.metrics]
    assert len(named) == len(set(named))
    assert {("art-artist", "P@3"), ("art-work", "P@4"), ("art-work", "GAP_normalised")} <= set(named)
    assert named[: sum(len(f.measured.metrics) for f in first)] == [
        (f.task.name, m) for f in first for m in f.measured.metrics
    ]
    said = capsys.readouterr().err
    assert "evaluators.again of one: art-artist has NDCG@1, P@1, R@1" in said
    assert "evaluators.open of one: art-work has GAP, GAP-, accuracy already, left out" in said
    other = replace(run, name="two", vectors=vectors.flip(1) + 0.3 * torch.eye(N, D))
    compared = assessment.compare({r.name: assessment.measure(r, collection, tasks, further) for r in (run, other)})
    assert [line["protocol"] for line in compared] == ["art-artist", "art-work"]
    p = torch.tensor([line["p"] for line in compared], dtype=torch.float64)
    assert [line["p_holm"] for line in compared] == holm(p).tolist()


def test_random_lists_are_those_of_the_seed(collection, vectors):
    run = assessment.Assessed("one", vectors, None, None, 0.0)
    asked = task("artist", "work")
    same, again, other = (
        assessment.recommend([run], collection, asked, seed)["random"].measured.metrics for seed in (3, 3, 4)
    )
    assert same == again
    assert same != other


def test_most_changed():
    ours = torch.tensor([0.1, 0.9, math.nan, 0.5, 0.4, 0.6])
    theirs = torch.tensor([0.3, 0.1, 0.5, math.nan, 0.4, 0.5])
    assert assessment.most_changed(ours, theirs, 1).tolist() == [1, 0]
    assert assessment.most_changed(ours, theirs, 2).tolist() == [1, 5, 4, 0]


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs on a rendered sample: content and colour."""
    folder = tmp_path_factory.mktemp("assessed")
    sample = [f"data.{name}" for name in ("styles=4", "artists=4", "works=3", "photographs=2", "size=48")]
    colour = ["backbone=colour", "pooling=average"]
    for name, own in (("content", []), ("colour", colour)):
        size = [f"backbone.size={64 if name == 'content' else 48}", "model.whitening.dimension=16"]
        simsearch(
            "train", *sample, *own, *size, "catalog.write=false", "logger.mode=disabled", f"run_dir={folder / name}"
        )
    return [folder / "content", folder / "colour"]


def test_assess(runs, tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    for i in range(6):
        Image.new("RGB", (20, 20 + i), (40 * i, 0, 0)).save(outside / f"{i}.png")
    drawn, described = outside_sample(outside, 3, 7).paths, []

    def spied(encoder, manifest):
        described.append(manifest.paths)
        return batches_of(encoder, manifest)

    monkeypatch.setattr("simsearch.commands.assess.batches_of", spied)
    out = tmp_path / "out"
    asked = ("outside_limit=3", "seed=7", "verify=sift", f"out={out}", "evaluators=class-means")
    done = simsearch("assess", f"runs=[{runs[0]},{runs[1]}]", f"outside={outside}", *asked)
    assert described == [drawn, drawn]
    assert sorted(drawn) == list(drawn) != ["0.png", "1.png", "2.png"]
    assert "left out: protocol art-genre needs the attribute 'genre'" in done.stderr
    assert "colour - content, art-artist mAP: -" in done.stdout
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = {(row["row"], row["protocol"], row["metric"]): float(row["value"]) for row in rows}
    assert len(named) == len(rows)
    data = configs.build_data(saved_run.open_run(runs[0]).config)
    protocols = (
        ByHash("art-artist", "artist", part="artist", junk="work"),
        ByHash("art-work", "work", part="artist", junk=None, least=1),
    )
    for protocol in protocols:
        name, query = protocol.name, protocol.split(data.collection).test.query
        measured = [row for row in rows if row["row"] == "colour" and not row["metric"].startswith("lists/")]
        trained = {row["trained_queries"] for row in measured if row["protocol"] == name}
        (count,) = map(int, trained)
        assert count == len(set(query.tolist()) & set(data.split.train.tolist())) > 0
        for run in ("content", "colour"):
            told = f"note: {count} of {len(query)} queries of {name} were in the training of {run}: the numbers"
            assert done.stderr.count(told) == 1
    assert {row["trained_queries"] for row in rows if row["row"] == "random"} == {""}
    assert {row["row"] for row in rows} >= {"content", "colour", "random", "popular", "colour hubness"}
    over = {(row["protocol"], row["unit"]) for row in rows if row["ci_low"]}
    assert over == {("art-artist", "artist"), ("art-style", "artist"), ("art-work", "artist")}
    assert all(int(row["units"]) < int(row["queries"]) for row in rows if row["ci_low"])
    assert "artist: " in done.stdout
    assert named["content", "art-artist", "mAP"] > named["colour", "art-artist", "mAP"] > 0
    assert named["content", "art-work", "outside"] == 3
    assert 0 < named["content", "art-work", "GAP_outside"] <= named["content", "art-work", "GAP"] <= 1
    for run in ("content", "colour"):
        assert 0 < named[run, "art-work", "verify/GAP"] <= 1
        gain = named[run, "art-work", "verify/R@1"] - named[run, "art-work", "R@1"]
        assert named[run, "art-work", "verify/R@1_gain"] == pytest.approx(gain, abs=1e-9)
    assert not any(metric.startswith("verify/") for _, protocol, metric in named if protocol != "art-work")
    assert "the best items verified by geometry" in done.stdout
    with (out / "paired.csv").open() as file:
        (paired,) = (row for row in csv.DictReader(file) if row["protocol"] == "art-artist")
    difference = named["colour", "art-artist", "mAP"] - named["content", "art-artist", "mAP"]
    assert float(paired["difference"]) == pytest.approx(difference, abs=1e-9)
    assert float(paired["low"]) < difference < float(paired["high"])
    assert paired["unit"] == "artist"
    assert 1 < int(paired["units"]) < int(paired["queries"])
    assert float(paired["p"]) >= 2.0 ** (1 - int(paired["units"]))
    for name in ("artist", "style", "work"):
        with Image.open(out / f"gallery-art-{name}.png") as picture:
            assert picture.height > 2 * 10 * 96  # five that gain and five that lose, by both


def test_evaluate_counts_trained_queries_of_the_same_images_alone(runs, tmp_path):
    sample = ["data=rendered", *(f"data.{name}" for name in ("styles=4", "artists=4", "works=3", "photographs=2"))]
    for seed, counted in ((0, True), (1, False)):
        asked = (*sample, f"data.seed={seed}", "protocol=art-artist", f"run_dir={tmp_path / str(seed)}")
        done = simsearch("evaluate", f"run={runs[1]}", *asked)
        stage = read_json(tmp_path / str(seed) / "metrics.json")["test"]
        assert (stage.get("queries_trained_on", 0) > 0) == counted
        assert ("the run, or one that it starts from, was fitted on" in done.stderr) == counted
        assert ("queries_trained_on" in stage) == counted


def test_what_a_start_was_trained_on_counts(runs, tmp_path):
    own = saved_run.open_run(runs[1])
    collection = configs.build_data(own.config, Everything()).collection
    known = trained_rows(own, own.config, collection)
    other = own.config["data"] | {"seed": 1}
    begun = own.config["model"] | {"start": str(runs[1])}
    middle = tmp_path / "middle"
    middle.mkdir()
    (middle / "config.yaml").write_text(yaml.safe_dump(own.config | {"data": other, "model": begun}))
    for start, expected in ((None, None), (runs[1], known), (middle, known)):
        model = begun | {"start": None if start is None else str(start)}
        found = trained_rows(replace(own, config=own.config | {"data": other, "model": model}), own.config, collection)
        assert found is expected is None or torch.equal(found, expected)
    config = own.config | {"protocol": {"_target_": "os.mkdir", "path": str(tmp_path / "mark")}}
    (middle / "config.yaml").write_text(yaml.safe_dump(config))
    child = replace(own, config=own.config | {"model": begun | {"start": str(middle)}})
    with pytest.raises(Untrusted, match="starts from"):
        trained_rows(child, own.config, collection)


def test_assess_says_what_is_wrong(runs, tmp_path, monkeypatch):
    done = simsearch("assess", f"runs=[{runs[0]},{runs[1]}]", "names=[a,a]", expect=1)
    assert "give a different name for each of the 2 runs" in done.stderr
    done = simsearch("assess", f"runs={tmp_path}", expect=1)
    assert str(tmp_path) in done.stderr
    (tmp_path / "file").touch()
    monkeypatch.setattr("simsearch.commands.assess.describe", lambda *_: 1 / 0)
    done = simsearch("assess", f"runs={runs[0]}", f"out={tmp_path}/file/a", expect=1)
    assert "give another out=" in done.stderr
    hostile = tmp_path / "hostile"
    shutil.copytree(runs[0], hostile)
    config = yaml.safe_load((hostile / "config.yaml").read_text())
    config["protocol"] = {"_target_": "os.mkdir", "path": str(tmp_path / "mark")}
    (hostile / "config.yaml").write_text(yaml.safe_dump(config))
    done = simsearch("assess", f"runs=[{runs[0]},{hostile}]", f"out={tmp_path / 'out'}", expect=1)
    assert "protocol._target_" in done.stderr
    assert not (tmp_path / "mark").exists()


def test_runs_know_their_data_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "art").mkdir()
    files = {"_target_": "simsearch.data.image_folder.FilesDataModule", "root": None}
    run = saved_run.Run(tmp_path / "run", {"data": files | {"source": "art/table.csv"}})
    (tmp_path / "link").symlink_to(tmp_path / "art")
    for source in ("art/table.csv", str(tmp_path / "art/table.csv"), "./art/../art/table.csv", "link/table.csv"):
        for root in (None, "art"):
            with pytest.raises(ValueError, match="was trained on a part of these data"):
                check_unknown(files | {"source": source, "root": root}, [run])
    check_unknown(files | {"source": "other/table.csv"}, [run])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(run.config | {"model": {}}))
    follower = saved_run.Run(tmp_path, {"data": files | {"source": "new"}, "model": {"start": str(tmp_path / "run")}})
    with pytest.raises(ValueError, match="was trained on a part of these data"):
        check_unknown(files | {"source": "art/table.csv"}, [follower])
    rendered = {"_target_": "simsearch.data.datamodule.RenderedDataModule"}
    check_unknown(rendered, [run])
    with pytest.raises(ValueError, match="was trained on a part of these data"):
        check_unknown(rendered, [saved_run.Run(tmp_path, {"data": rendered})])


def test_all_of_a_collection_that_the_runs_do_not_know(runs, tmp_path):
    folder = tmp_path / "new [1]"
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = ["path,artist,work"]
    for i in range(24):
        Image.fromarray(generator.integers(0, 255, (30, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,artist {i % 4},work {i // 2}" if i else f"{i}.png,a hermit,work of his own")
    (folder / "table.csv").write_text("\n".join(lines))
    new, out = ("data=art", f"data.source={folder / 'table.csv'}", "data.workers=0"), tmp_path / "out"
    simsearch("assess", f"runs={runs[0]}", *new, "part=all", f"out={out}")
    with (out / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["row"] == "content"]
    queries = {row["protocol"]: int(row["queries"]) for row in rows if row["metric"] == "mAP"}
    assert queries == {"art-artist": 23, "art-work": 22}  # all but those without another of their artist, or work
    done = simsearch("assess", f"runs={runs[0]}", "part=all", f"out={out}", expect=1)
    assert "was trained on a part of these data" in done.stderr


def test_all_of_a_collection_is_evaluated_where_nothing_trains(collection):
    protocol = ByHash("art-artist", "artist", part="artist", junk="work", evaluation=1, validation=None, least=1)
    whole = protocol.split(collection)
    known = (collection.column("artist") >= 0).nonzero()[:, 0]
    assert len(whole.train) == 0
    assert whole.validation is None
    assert torch.equal(whole.test.gallery, known)
    with pytest.raises(ValueError, match="evaluation=1 is not a share"):
        replace(protocol, validation=0.2)
    assert len(replace(protocol, evaluation=0.5, least=1).split(collection).train)
