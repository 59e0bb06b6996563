"""Rankings with verified items, compared with loops over queries and items."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor

from simsearch.callbacks.evaluation import RetrievalEvaluation
from simsearch.data.process_pool import Failure
from simsearch.data.rendered.paint import paint_work, photograph
from simsearch.evaluation import verification
from simsearch.evaluation.evaluate import Search, as_stored
from simsearch.evaluation.evaluator import Measured
from simsearch.evaluation.instance import Instance
from simsearch.evaluation.open_set import OpenSet
from simsearch.evaluation.verification import Verified
from simsearch.functional.codes import pack_codes
from simsearch.functional.geometry import Match, Pairs
from simsearch.functional.sharded import Sharded
from simsearch.functional.significance import paired_permutation
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.verification import Verification
from simsearch.types import Descriptors, LocalFeatures, RetrievalTask

N, TOP = 70, 6
NONE = np.zeros(0, np.int64)
IMAGES = torch.arange(N, dtype=torch.uint8)[:, None, None, None].expand(N, 3, 2, 2)


def inliers(query: int, item: int) -> int:
    """What the stand-in below finds of two rows."""
    return 5 + (query + item) % 3 if (7 * query + 3 * item) % 5 == 0 else 0


@dataclass
class StandIn:
    """Verifies by the rows, which the images hold."""

    top: int = TOP
    some: bool = True

    def item(self, image: Tensor) -> LocalFeatures:
        return LocalFeatures(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.int8), (int(image[0, 0, 0]), 1))

    def query(self, image: Tensor) -> tuple[LocalFeatures, ...]:
        return (self.item(image),)

    def pair(self, queries, items) -> list[list[Pairs]]:
        return [[(NONE, NONE)] * len(items) for _ in queries]

    def fit(self, queries, items, pairs) -> list[Match | None]:
        assert [len(part) for part in pairs] == [len(items)] == [len(items)] * len(queries)
        counts = [inliers(queries[0].size[0], item.size[0]) if self.some else 0 for item in items]
        return [Match(n, 1.0, 0.0, np.zeros((4, 2)), np.zeros((n, 4))) if n else None for n in counts]


def described(rows: range, moved: float = 0.0) -> Descriptors:
    """Items of a small collection; the vectors of queries are moved a little, so that no two pairs are equally near."""
    rng = torch.Generator().manual_seed(0)
    label, group = torch.randint(-1, 8, (N,), generator=rng), torch.randint(-1, 25, (N,), generator=rng)
    centres = torch.randn(9, 8, generator=rng)
    vectors = F.normalize(centres[label] + torch.randn(N, 8, generator=rng), dim=1)
    vectors = F.normalize(vectors + moved * torch.randn(N, 8, generator=rng), dim=1)
    some = torch.tensor(rows)
    return Descriptors(vectors[some], label[some], some, group=group[some])


def task(exclude_self: bool = True) -> RetrievalTask:
    rows = torch.arange(N)
    return RetrievalTask("t", rows, rows, "work", None, exclude_self, "0" * 16, unit="half", units=rows // 2)


def measured(query: Descriptors, gallery: Descriptors, exclude_self: bool = True, **given) -> Measured:
    verified = Verified(StandIn(**given), IMAGES, ks=(5,), workers=2)
    return verified(Sharded.of(query), Sharded.of(gallery), task(exclude_self))


def looped(query: Descriptors, gallery: Descriptors, exclude_self: bool, verified: bool) -> dict[str, object]:
    """AP and R@1 of each query, GAP, microAP and the accepted queries, by loops."""
    out: dict[str, list] = {"AP": [], "R@1": [], "accepted": [], "accepted_wrong": []}
    firsts, pairs, relevant = [], [], 0
    for q, row in enumerate(query.index.tolist()):
        cosine = (gallery.vectors @ query.vectors[q]).tolist()
        allowed = [
            g for g in range(len(gallery))
            if not (exclude_self and int(gallery.index[g]) == row)
            and not (query.group is not None and 0 <= int(query.group[q]) == int(gallery.group[g]))
        ]  # fmt: skip
        order = sorted(allowed, key=lambda g: -cosine[g])
        evidence = {g: inliers(row, int(gallery.index[g])) if verified else 0 for g in order[:TOP]}
        head = sorted(evidence, key=lambda g: (-evidence[g], -cosine[g]))
        right = [0 <= int(gallery.label[g]) == int(query.label[q]) for g in (*head, *order[TOP:])]
        ranks = [rank for rank, hit in enumerate(right, 1) if hit]
        out["AP"].append(np.mean([(n + 1) / rank for n, rank in enumerate(ranks)]) if ranks else math.nan)
        out["R@1"].append(float(right[0]) if ranks else math.nan)
        best = max(evidence.values())
        out["accepted"].append(float(best > 0))
        out["accepted_wrong"].append(float(best > 0 and not right[0]))
        relevant += len(ranks)
        scores = [(evidence[g], cosine[g]) for g in head]
        firsts.append((scores[0], right[0]))
        pairs += list(zip(scores, right, strict=False))

    def pooled(entries: list, positives: int) -> float:
        entries = sorted(entries, reverse=True)
        assert all(a[0] != b[0] for a, b in pairwise(entries))
        hits = [hit for _, hit in entries]
        found = average_precision_score(hits, -np.arange(len(hits)))
        return found * sum(hits) / positives

    return out | {"GAP": pooled(firsts, int(np.isfinite(out["AP"]).sum())), "microAP": pooled(pairs, relevant)}


@pytest.mark.parametrize(
    ("exclude_self", "groups", "own"), [(True, False, True), (True, True, True), (False, True, False)]
)
def test_verified_rankings_are_those_of_a_loop(exclude_self, groups, own):
    gallery = described(range(N) if own else range(20, N))
    query = described(range(N) if own else range(20), moved=0.1)
    if not groups:
        query, gallery = replace(query, group=None), replace(gallery, group=None)
    got = measured(query, gallery, exclude_self)
    for verified, end in ((True, ""), (False, "_without")):
        expected = looped(query, gallery, exclude_self, verified)
        for name in ("GAP", "microAP"):
            assert got.metrics[f"verify/{name}{end}"] == pytest.approx(expected[name], abs=1e-9)
        if verified:
            for name in ("AP", "R@1", "accepted", "accepted_wrong"):
                assert np.allclose(got.per_query[f"verify/{name}"], expected[name], equal_nan=True, atol=1e-9), name
                mean = got.metrics["verify/mAP" if name == "AP" else f"verify/{name}"]
                assert mean == pytest.approx(np.nanmean(expected[name]), abs=1e-9)
            assert sum(expected["accepted"]) > sum(expected["accepted_wrong"]) > 0
            after = expected
    for key, name in (("mAP", "AP"), ("R@1", "R@1")):
        gain = np.subtract(after[name], expected[name])
        assert got.metrics[f"verify/{key}_gain"] == pytest.approx(np.nanmean(gain), abs=1e-9)
        low, high = got.intervals[f"verify/{key}_gain"]
        assert low < np.nanmean(gain) < high
        a, b = (torch.tensor(part[name], dtype=torch.float64) for part in (after, expected))
        assert got.metrics[f"verify/{key}_p"] == pytest.approx(paired_permutation(a, b, query.index // 2), abs=1e-9)
    assert torch.equal(got.units, query.index // 2)
    assert {"verify/P@5", "verify/P@1"} <= set(got.metrics)


@pytest.mark.parametrize("bits", [None, 12])
def test_what_verifies_nothing_changes_nothing(bits):
    sides = [described(range(N)), described(range(N))]
    if bits is not None:
        sides = [replace(side, vectors=pack_codes(F.pad(side.vectors, (0, 4)) - 0.1), bits=bits) for side in sides]
    plain = Search(FaissIndex("Flat" if bits is None else "BFlat"), ks=(1, 5))
    query, gallery = map(Sharded.of, sides)
    base = plain(query, gallery, task())
    got = replace(plain, verified=Verified(StandIn(some=False), IMAGES, (1, 5)))(query, gallery, task())
    for name in ("mAP", "R@1", "P@5"):
        assert got.metrics[f"verify/{name}"] == pytest.approx(base.metrics[name], abs=1e-9)
    for name in ("GAP", "microAP"):
        assert got.metrics[f"verify/{name}"] == got.metrics[f"verify/{name}_without"]
    assert (got.metrics["verify/mAP_gain"], got.metrics["verify/mAP_p"]) == (0, 1)
    assert got.metrics["verify/accepted"] == 0
    assert {name for name in got.metrics if not name.startswith("verify/")} == set(base.metrics)


def test_a_compressing_index_is_verified_as_it_stores():
    query, gallery = (Sharded.of(described(range(N))) for _ in range(2))
    verified = Verified(StandIn(some=False), IMAGES, (1, 5))
    got = Search(FaissIndex("SQ4"), ks=(1, 5), verified=verified)(query, gallery, task()).metrics
    assert got["verify/mAP"] == pytest.approx(got["mAP"], abs=0.02)
    exact = Search(FaissIndex("Flat"), ks=(1, 5))(query, gallery, task()).metrics
    assert got["verify/mAP"] != pytest.approx(exact["mAP"], abs=1e-6)


def test_tasks_without_a_relevant_item_have_no_value():
    query, gallery = described(range(20)), described(range(20, N))
    got = measured(replace(query, label=torch.full((20,), -1)), gallery)
    assert all(math.isnan(got.metrics[f"verify/{name}"]) for name in ("mAP", "GAP", "microAP"))
    assert got.metrics["verify/accepted"] == got.metrics["verify/accepted_wrong"] > 0


def test_several_ranks_are_refused(monkeypatch):
    class Two:
        world_size = 2

    callback = RetrievalEvaluation(FaissIndex("Flat"), verify=StandIn())
    with pytest.raises(ValueError, match=r"verify needs all descriptors in one process, but there are 2: .*"):
        callback.setup(Two(), torch.nn.Identity(), "test")


@pytest.mark.parametrize("evaluator", [Instance(), OpenSet()])
def test_measures_of_one_process_are_refused_before_a_training(evaluator):
    callback = RetrievalEvaluation(FaissIndex("Flat"), evaluators={"mine": evaluator})
    with pytest.raises(ValueError, match=r"evaluators.mine needs all descriptors in one process, but there are 2"):
        callback.setup(SimpleNamespace(world_size=2), torch.nn.Identity(), "fit")
    callback.setup(SimpleNamespace(world_size=1), torch.nn.Identity(), "fit")


def test_further_measures_are_of_what_a_compressing_index_stores():
    query, gallery = (Sharded.of(described(range(N))) for _ in range(2))
    result = Search(FaissIndex("SQ4"), ks=(1, 5))(query, gallery, task())
    found = Instance(5)(query, as_stored(gallery, result.index), task()).metrics["instance/mAP@5_minRk"]
    assert found == pytest.approx(result.metrics["mAP@5_minRk"], abs=0.005)  # cosines of decoded vectors, not products
    assert found != pytest.approx(Instance(5)(query, gallery, task()).metrics["instance/mAP@5_minRk"], abs=1e-9)


def test_photographs_of_works_are_verified_by_sift():
    """Descriptors that are noise: only geometry can say which work a photograph shows."""
    places = [(style, 0, work) for style in (1, 2, 4, 6) for work in range(3)]
    works = torch.from_numpy(np.stack([paint_work(0, *place, size=224) for place in places]))
    shots = photograph(works, keys=[(0, 0, n, 0) for n in range(12)], seed=0, size=224)
    images, label = torch.cat([works, shots]), torch.arange(24) % 12
    noise = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    gallery = Descriptors(noise[:12], label[:12], torch.arange(12))
    query = Descriptors(noise[12:], label[12:], torch.arange(12, 24))
    asked = RetrievalTask("t", torch.arange(12, 24), torch.arange(12), "work", None, True, "0" * 16)
    verified = Verified(Verification(top=12), images, (1,), workers=1)
    got = verified(Sharded.of(query), Sharded.of(gallery), asked).metrics
    assert got["verify/R@1"] >= 0.75
    assert got["verify/R@1_gain"] > 0.5
    assert got["verify/accepted_wrong"] == 0
    assert got["verify/GAP"] >= 0.75 > got["verify/GAP_without"]
    assert got["verify/microAP"] >= 0.75 > got["verify/microAP_without"]
    parts = [got[f"verify/{part}_ms"] for part in ("features", "matching", "fitting")]
    assert min(parts) > 0
    assert got["verify/ms_per_query"] == pytest.approx(sum(parts))


def test_an_image_that_cannot_be_verified_is_named(monkeypatch):
    failed = Failure("too-slow", "more than 30 s")
    monkeypatch.setattr(verification, "bounded_map", lambda function, todo, **_: (failed for _ in todo))
    with pytest.raises(ValueError, match=r"row 7 of the collection cannot be verified \(too-slow: more than 30 s\)"):
        Verified(StandIn(), IMAGES).inliers(torch.tensor([3]), torch.tensor([[7, 9]]))
