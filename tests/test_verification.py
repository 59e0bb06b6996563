"""Catalogs with local features: what is stored, what searches do with it, and what damage does."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import simsearch as run_command
from PIL import Image
from torch import Tensor

import simsearch
from simsearch import api
from simsearch.data.manifest import Manifest
from simsearch.data.presence import Presence, Vanished
from simsearch.data.rendered.paint import paint_work, photograph
from simsearch.files import read_json, write_json
from simsearch.functional.sift import Sift
from simsearch.models.encoder import build_encoder
from simsearch.search.catalog import read_catalog, verifying
from simsearch.search.engine import Engine
from simsearch.search.errors import CatalogError
from simsearch.search.local_features import (
    NAME,
    about_local_features,
    check_software,
    describe_items,
    features_of,
    record,
    record_type,
)
from simsearch.search.request import Request
from simsearch.search.verdicts import NONE, SAME_WORK, UNCALIBRATED
from simsearch.search.verification import Verification
from simsearch.trust import Untrusted
from simsearch.types import LocalFeatures

MODEL = {
    "_target_": "simsearch.models.frozen.FrozenRetriever",
    "backbone": {
        "_target_": "simsearch.models.backbones.timm_backbone", "name": "test_resnet", "weights": "random", "size": 32,
    },
    "pooling": {"_target_": "simsearch.models.pooling.Average"},
}  # fmt: skip
STYLES = (1, 2, 4, 6)  # with corners; SIFT finds none in soft washes
N = 12


FILE = f"segments/1/{NAME}"


@pytest.fixture(scope="module")
def works() -> Tensor:
    places = [(style, 0, work) for style in STYLES for work in range(N // len(STYLES))]
    return torch.from_numpy(np.stack([paint_work(0, *place, size=256) for place in places]))


def saved(image: Tensor, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def built(works, tmp_path_factory) -> Path:
    """A catalog of the works, each with a smaller copy that the attribute `work` ties to it."""
    root = tmp_path_factory.mktemp("works")
    lines = ["path,work,half"]
    for n, work in enumerate(works):
        saved(work, root / f"{n:02d}.png")
        saved(work[:, ::2, ::2], root / f"{n:02d}-small.png")
        lines += [f"{n:02d}.png,w{n},{'left' if n < N // 2 else 'right'}", f"{n:02d}-small.png,w{n},small"]
    (root / "works.csv").write_text("\n".join(lines))
    torch.manual_seed(5)
    encoder = api.LoadedEncoder(build_encoder({"model": MODEL}), {"model": MODEL}, "toy")
    out = tmp_path_factory.mktemp("catalogs") / "catalog"
    simsearch.build_catalog(encoder, root / "works.csv", out, workers=0, verification=Verification(top=2 * N))
    return out


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "catalog"))


@pytest.fixture(scope="module")
def shots(works) -> Tensor:
    return photograph(works, keys=[(0, 0, n, 0) for n in range(N)], seed=0, size=224)


class TestStore:
    def test_records_keep_descriptors_and_places(self, works):
        verification = Verification(item_features=50)
        found = verification.item(works[0])
        kept = features_of(record(found, record_type(50, 32)))
        assert (kept.descriptors == found.descriptors).all()
        assert np.abs(kept.points - found.points).max() <= 256 / 65535
        assert kept.size == found.size == (256, 256)

    def test_an_item_takes_at_most_twelve_kilobytes(self, built):
        about = read_catalog(built).about["local_features"]
        kind = np.load(built / FILE, mmap_mode="r", allow_pickle=False).dtype
        assert about["bytes_per_item"] == kind.itemsize <= 12_000

    def test_images_that_vanish_end_the_work(self, works, tmp_path):
        """One that is gone has no features; a folder that drops ends it, instead of a catalog without features."""
        names = tuple(f"{n}.png" for n in range(N))
        for name, work in zip(names, works, strict=True):
            saved(work[:, ::4, ::4], tmp_path / "images" / name)
        manifest = Manifest(tmp_path / "images", names)
        presence = Presence(manifest.root, names)
        (manifest.root / names[1]).unlink()
        verification = Verification(item_features=20)
        records = [*describe_items(manifest, range(4), verification, workers=1, presence=presence)]
        assert [int(one["count"]) > 0 for one in records] == [True, False, True, True]
        shutil.move(manifest.root, tmp_path / "elsewhere")
        with pytest.raises(Vanished, match="images have disappeared"):
            list(describe_items(manifest, range(4), verification, workers=1, presence=presence))

    def test_features_are_those_of_the_files(self, built, works):
        catalog = read_catalog(built)
        place = catalog.items["path"].to_pylist().index("03.png")
        (kept,) = catalog.local_features([place])
        expected = Verification().item(works[3])
        assert (kept.descriptors == expected.descriptors).all()

    def test_impossible_records_are_refused(self):
        one = np.zeros((), record_type(5, 32))
        one["count"] = 6
        with pytest.raises(ValueError, match="6 features"):
            features_of(one)
        one["count"] = 1
        with pytest.raises(ValueError, match="1 features"):
            features_of(one)  # of an image without a pixel

    def test_a_changed_byte_is_noticed_when_it_is_read(self, copy, works):
        data = bytearray((copy / FILE).read_bytes())
        data[-40] ^= 1
        (copy / FILE).write_bytes(data)
        catalog = simsearch.open_catalog(copy)
        with pytest.raises(CatalogError, match="damaged"):
            catalog.search(works[0])
        assert catalog.search(works[0], verify=False).verdict == UNCALIBRATED

    @pytest.mark.parametrize("damage", ["gone", "cut", "other"])
    def test_a_damaged_file_is_named(self, copy, damage):
        path = copy / FILE
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        else:
            np.save(path, np.zeros((2 * N, 3), np.float32))
        with pytest.raises(CatalogError, match=r"damaged .*local_features\.npy"):
            read_catalog(copy)

    def test_a_pickle_is_not_opened(self, copy):
        class Bad:
            def __reduce__(self):
                return os.system, ("touch /tmp/simsearch-was-here",)

        np.save(copy / FILE, np.array([Bad()], dtype=object), allow_pickle=True)
        with pytest.raises(CatalogError, match="damaged"):
            read_catalog(copy)
        assert not Path("/tmp/simsearch-was-here").exists()

    @pytest.mark.parametrize("key", ["verification", "features"])
    def test_a_config_that_would_run_code_is_refused(self, copy, key):
        about = read_json(copy / "catalog.json")
        config = about["local_features"]["verification"]
        (config if key == "verification" else config["features"])["_target_"] = "os.system"
        write_json(copy / "catalog.json", about)
        with pytest.raises(Untrusted, match=r"os\.system"):
            read_catalog(copy)

    def test_fewer_records_than_items_are_refused(self, tmp_path):
        from simsearch.search.local_features import write_local_features

        kind = record_type(300, 32)
        with pytest.raises(ValueError, match="1 records"):
            write_local_features(tmp_path / NAME, 2, [np.zeros((), kind)], Verification())


class TestSearch:
    def test_photographs_find_their_works_and_no_other(self, built, shots):
        """The network has random weights: what comes first, and is called the same work, is the verification's."""
        catalog = simsearch.open_catalog(built)
        for n, shot in enumerate(shots):
            answer = catalog.search(shot, k=5)
            same = [hit.attributes["work"] for hit in answer if hit.verdict == SAME_WORK]
            assert answer[0].attributes["work"] == f"w{n}"
            assert set(same) == {f"w{n}"}
            assert answer[0].inliers >= 10
            assert answer.verdict == SAME_WORK
            corners = np.array(answer[0].outline)
            assert (corners.max(axis=0) - corners.min(axis=0)).min() > 0.5  # the work fills most of the photograph

    def test_without_verification_the_order_is_that_of_the_scores(self, built, shots):
        answer = simsearch.open_catalog(built).search(shots[0], k=2 * N, verify=False)
        assert answer.scores == sorted(answer.scores, reverse=True)
        assert all(hit.inliers is None and hit.outline is None for hit in answer)

    def test_what_is_not_verified_stays_in_its_order(self, built, shots):
        catalog = simsearch.open_catalog(built)
        plain = catalog.search(shots[4], k=2 * N, verify=False)
        answer = catalog.search(shots[4], k=2 * N)
        verified = [hit.id for hit in answer if hit.inliers]
        assert answer.ids == verified + [name for name in plain.ids if name not in verified]
        counts = [hit.inliers for hit in answer if hit.inliers]
        assert counts == sorted(counts, reverse=True)

    def test_only_the_top_is_compared(self, built, shots):
        catalog = read_catalog(built)
        vector = torch.stack([catalog.index.reconstruct()[0]])
        engine = Engine(verifying(catalog, top=3))
        local = engine.catalog.verification.query(shots[7])
        plain = engine.recommend(Request(vector, k=2 * N, collapse=False))
        answer = engine.recommend(Request(vector, k=2 * N, collapse=False, local=local))
        assert set(answer.ids[:3].tolist()) == set(plain.ids[:3].tolist())
        assert (answer.ids[3:] == plain.ids[3:]).all()

    def test_an_item_finds_its_copy(self, built):
        answer = simsearch.open_catalog(built).search("05.png", k=3)
        assert answer[0].attributes["path"] == "05-small.png"
        assert answer[0].verdict == SAME_WORK

    def test_filters_hold(self, built, shots):
        answer = simsearch.open_catalog(built).search(shots[1], k=30, where="half=right")
        assert len(answer) == N // 2
        assert all(hit.inliers is None for hit in answer)
        assert answer.verdict == UNCALIBRATED

    def test_of_a_work_the_verified_item_is_shown(self, built, shots):
        answer = simsearch.open_catalog(built).search(shots[2], k=N, collapse=True)
        works = [hit.attributes["work"] for hit in answer]
        assert works[0] == "w2"
        assert len(set(works)) == N

    def test_several_examples_find_several_works(self, built, shots):
        answer = simsearch.open_catalog(built).search([shots[1], shots[8]], k=4)
        assert {hit.attributes["work"] for hit in answer if hit.verdict == SAME_WORK} == {"w1", "w8"}

    def test_diversity_leaves_verified_items_ahead(self, built, shots):
        answer = simsearch.open_catalog(built).search(shots[3], k=6, diversity=0.9)
        assert answer[0].attributes["work"] == "w3"

    def test_mirrored_copies_are_found_on_request(self, built, works):
        catalog = read_catalog(built)
        mirrored, vector = works[6].flip(2), catalog.index.reconstruct()[:1]
        for asked, expected in ((False, 0), (True, 2)):  # the work and its small copy
            engine = Engine(verifying(catalog, top=2 * N, mirrored=asked))
            local = engine.catalog.verification.query(mirrored)
            answer = engine.recommend(Request(vector, collapse=False, local=local))
            assert answer.verdicts.count(SAME_WORK) == expected
        match = answer.matches[0]
        assert match.mirrored
        assert np.allclose(match.outline, [[1, 0], [0, 0], [0, 1], [1, 1]], atol=0.02)

    def test_a_calibrated_catalog_calls_nothing_the_same_work_by_cosine_alone(self, copy, shots, works):
        catalog = read_catalog(copy)
        everything = {"same_work": [-2.0], "similar": None, "neighbours": 3, "catalog": catalog.fingerprint}
        (copy / "calibration.json").write_text(json.dumps(everything))
        opened = simsearch.open_catalog(copy)
        assert {hit.verdict for hit in opened.search(shots[0], k=9, verify=False)} == {SAME_WORK}
        answer = opened.search(shots[0], k=9)
        assert {hit.attributes["work"] for hit in answer if hit.verdict == SAME_WORK} == {"w0"}
        assert NONE not in {hit.verdict for hit in answer}

    def test_calibrates_without_the_images_that_cannot_be_read(self, copy, works, tmp_path):
        images = tmp_path / "images"
        for n, work in enumerate(works):
            saved(work, images / f"{n:02d}.png")
            saved(work[:, ::2, ::2], images / f"{n:02d}-small.png")
        for name in ("00.png", "00-small.png", "01.png", "01-small.png"):
            (images / name).write_bytes(b"no image")
        for name in ("02.png", "02-small.png"):
            (images / name).unlink()
        command = ["calibrate", f"catalog={copy}", f"images={images}", "rate=0.3", "workers=0", "device=cpu"]
        done = run_command(*command)
        assert re.search(r"skipped 2 files, .*images/00", done.stderr)
        assert "skipped 1 files, missing (first " in done.stderr
        of = read_catalog(copy).calibration["held_out"]
        assert of["verified"]["of"] < of["same_work"]["of"]
        shutil.rmtree(images)
        saved(works[0], images / "other.png")
        done = run_command(*command, expect=1)
        assert "no item of the catalog" in done.stderr

    def test_a_server_may_verify_otherwise_than_its_catalogs_say(self, built):
        from functools import partial

        from simsearch.serving.library import Library, Limits, Source

        given = {"device": torch.device("cpu"), "limits": Limits()}
        library = Library({"c": Source(built)}, settings=partial(verifying, top=7, regions=0), **given)
        chosen = library.catalogs[0].catalog.verification
        library.close()
        assert (chosen.top, chosen.regions) == (7, 0)

    def test_catalogs_without_local_features_say_so(self, built):
        catalog = verifying(read_catalog(built), verify=False)
        with pytest.raises(CatalogError, match="verify=sift"):
            Engine(catalog).verified(torch.tensor([0]), [])
        with pytest.raises(CatalogError, match="verify=sift"):
            catalog.local_features([0])


class TestSettings:
    @pytest.mark.parametrize(
        "given",
        [
            {"top": 0}, {"ratio": 0}, {"ratio": 1.5}, {"tolerance": 0}, {"inliers": 4}, {"spread": 2},
            {"item_features": 4}, {"item_features": 10**6}, {"item_side": 3}, {"query_features": 2**31},
            {"top": 20.5}, {"regions": "8"}, {"query_side": True},
        ],
    )  # fmt: skip
    def test_impossible_numbers_are_named(self, given):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must"):
            Verification(**given)

    def test_impossible_changes_are_named(self):
        for given in ({"top": 0}, {"regions": -1}, {"regions": 1.5}):
            with pytest.raises(ValueError, match=f"{next(iter(given))} must"):
                Verification().changed(**given)
        assert Verification(top=7).changed(regions=0).config == Verification(top=7, regions=0).config

    def test_the_config_builds_an_equal_one(self):
        from simsearch.models.encoder import build
        from simsearch.trust import VERIFIERS

        made = Verification(top=7, inliers=12, mirrored=True)
        assert build(made.config, VERIFIERS).config == made.config

    def test_a_small_spread_is_not_enough(self):
        rng = np.random.default_rng(0)
        places = rng.uniform(90, 102, (30, 2)).astype(np.float32)  # a signature
        item = LocalFeatures(places, rng.integers(-127, 128, (30, 32), dtype=np.int8), (200, 200))
        assert Verification(spread=0.0).verify([item], [item])[0].inliers > 20
        assert Verification().verify([item], [item]) == [None]


def test_the_commands_index_search_and_recommend(small_run, works, shots, tmp_path):
    for n, work in enumerate(works):
        saved(work, tmp_path / "works" / f"{n:02d}.png")
    saved(shots[5], tmp_path / "photo.png")
    out = f"catalog={tmp_path / 'catalog'}"
    run_command(
        "index", f"run={small_run}", f"images={tmp_path / 'works'}", "verify=sift", f"out={tmp_path / 'catalog'}",
        "workers=0",
    )  # fmt: skip
    photo = f"image={tmp_path / 'photo.png'}"
    found = json.loads(run_command("search", out, photo, "format=json", "verification.top=12").stdout)
    assert found["results"][0]["path"] == "05.png"
    assert found["results"][0]["inliers"] >= 10
    assert found["verdict"] == SAME_WORK
    assert len(found["results"]) == 10
    plain = json.loads(run_command("search", out, photo, "format=json", "verification.enabled=false").stdout)
    assert "inliers" not in plain["results"][0]
    assert plain["verdict"] == UNCALIBRATED
    given = json.loads(run_command("recommend", out, photo, "format=json", "verification.top=12").stdout)
    assert given["results"][0]["attributes"]["path"] == "05.png"
    assert given["results"][0]["verdict"] == SAME_WORK
    assert "inliers" in run_command("search", out, photo).stdout
    cosines = {one["path"]: one["score"] for one in plain["results"]}
    reranked = ("search", out, photo, "format=json", "verification.top=12", "k=12", "rerank=csls", "rerank.k=3")
    scores = {one["path"]: one["score"] for one in json.loads(run_command(*reranked).stdout)["results"]}
    assert scores == pytest.approx(scores | cosines, abs=1e-5)
    least = sorted(scores.values())[6] - 1e-5
    cut = json.loads(run_command(*reranked, f"min_score={least}").stdout)["results"]
    assert {one["path"] for one in cut} == {path for path, score in scores.items() if score >= least}
    for k in (0, -1):
        assert f"k must be at least 1, got {k}" in run_command("search", out, photo, f"k={k}", expect=1).stderr
    run_command("index", f"run={small_run}", f"images={tmp_path / 'works'}", f"out={tmp_path / 'plain'}", "workers=0")
    assert read_catalog(tmp_path / "plain").verification is None


def test_other_software_that_finds_other_features_is_said(monkeypatch, capsys):
    ours, weaker = Verification(), Verification(Sift(contrast=0.05))
    of_local = about_local_features(ours)
    check_software(of_local, ours, "c")
    monkeypatch.setattr(Sift, "software", "OpenCV 9")
    check_software(of_local, ours, "c")  # another version, the same features
    check_software({"verification": {}, "bytes_per_item": 1}, ours, "c")  # from before it was recorded
    assert not capsys.readouterr().err
    check_software(of_local, weaker, "the catalog c")
    said = f"the local features of the catalog c were described by {of_local['software']}, and OpenCV 9 finds others"
    assert said in capsys.readouterr().err
