"""A catalog that grows: any sequence of changes against a dictionary, and against a catalog made in one go."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import simsearch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_kills import is_change
from torch import Tensor, nn
from tqdm import tqdm

from simsearch.data.manifest import Manifest
from simsearch.data.manifest import read_manifest as read_images
from simsearch.files import sha256, write_json
from simsearch.index.faiss_index import FaissIndex
from simsearch.search import change, drift, segments
from simsearch.search.build import filling_of, write_filled
from simsearch.search.calibration_file import write_calibration
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.engine import Engine
from simsearch.search.errors import CatalogError
from simsearch.search.items import rows_at
from simsearch.search.request import Request
from simsearch.search.verification import Verification
from simsearch.serving.library import Library, Source
from simsearch.serving.limits import Limits

SIDE = 8


class Encoder(nn.Module):
    """As much of an encoder as catalogs ask for: a projection of the pixels."""

    input_size, fit, parts, dimension = SIDE, "square", None, 16

    def __init__(self, bits: int | None = None) -> None:
        super().__init__()
        self.bits = bits
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * SIDE * SIDE, 16, generator=generator), requires_grad=False)
        self.provenance = {"weights": "random"}

    def identity(self) -> dict[str, object]:
        return {"family": "test", "bits": self.bits}

    def embed(self, images: Tensor) -> Tensor:
        vectors = (images.float() - 128).flatten(1) @ self.weight
        return nn.functional.normalize(vectors, dim=1)


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST).save(path, "PNG")


def manifest(root: Path, rows: dict[str, tuple[int, str]]) -> Manifest:
    """The images of rows {path: (seed of the pixels, artist)}, which are drawn."""
    shutil.rmtree(root, ignore_errors=True)
    for path, (seed, _) in rows.items():
        draw(root / path, seed)
    return Manifest(root, tuple(rows), {"artist": tuple(artist for _, artist in rows.values())})


def made(out: Path, images: Manifest, encoder: Encoder, factory: str, **more) -> Catalog:
    filling = filling_of(images, encoder, {"model": {}}, run="r", thumbnail=SIDE, batch_size=64, workers=0, **more)
    write_filled(out, FaissIndex(factory), filling)
    return read_catalog(out)


def content(catalog: Catalog) -> dict[int, tuple[str, str, bytes]]:
    """Path, artist and thumbnail of each item by its number."""
    numbers, items = catalog.names.numbers.tolist(), catalog.items
    thumbnails = catalog.thumbnails(range(len(catalog)))
    return {
        number: (path, artist, thumbnail)
        for number, path, artist, thumbnail in zip(
            numbers, items["path"].to_pylist(), items["artist"].to_pylist(), thumbnails, strict=True
        )
    }


def answers(catalog: Catalog) -> list[dict[str, float]]:
    """Scores by path of the best items, for items as queries, with a filter, and as the index finds them."""
    engine, found = Engine(catalog), []
    paths = catalog.items["path"].to_pylist()
    order = sorted(range(len(catalog)), key=paths.__getitem__)
    for position in order[:3]:
        like = engine.vectors([position])
        for request in (Request(like, k=6, collapse=False), Request(like, k=3, exclude=(position,))):
            answer = engine.recommend(request)
            found.append({paths[i]: s for i, s in zip(answer.ids.tolist(), answer.scores.tolist(), strict=True)})
        nearest = engine.nearest(like, 5)
        found.append({paths[i]: s for i, s in zip(nearest.ids[0].tolist(), nearest.scores[0].tolist(), strict=True)})
    return found


def same_answers(one: list[dict[str, float]], other: list[dict[str, float]], *, ties: bool = False) -> None:
    """ties: codes have equal scores, whose order is that of the positions."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert ties or list(left) == list(right)
        np.testing.assert_allclose(list(left.values()), list(right.values()), atol=1e-6)


class Oracle:
    """What a catalog must hold after a sequence of changes."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, str]] = {}
        self.ids: dict[str, int] = {}
        self.next_id = 0

    def set(self, rows: dict[str, tuple[int, str]]) -> None:
        for path in rows:
            if path not in self.ids:
                self.ids[path] = self.next_id
                self.next_id += 1
        self.ids = {path: self.ids[path] for path in rows}
        self.rows = rows


INDEXES = [("Flat", None, True), ("BFlat", 16, True), ("HNSW8", None, False), ("IVF2,SQ8", None, False)]


@pytest.mark.filterwarnings("ignore:.*learns")
@pytest.mark.parametrize(
    ("factory", "bits", "whole", "seed", "rounds"),
    [
        *((*index, seed, 1) for seed, index in enumerate(INDEXES) if index[0] != "HNSW8"),
        *(pytest.param(*index, seed, 4, marks=pytest.mark.slow) for seed in (10, 11, 12) for index in INDEXES),
    ],
)
def test_any_sequence_of_changes(factory, bits, whole, seed, rounds, tmp_path, monkeypatch):
    if not whole:  # as large files are opened
        monkeypatch.setattr(segments, "_READ_WHOLE", 0)
    random_, encoder, root, out = random.Random(seed), Encoder(bits), tmp_path / "images", tmp_path / "c"
    oracle = Oracle()
    start = {f"{i}.png": (i, random_.choice("ab")) for i in range(10)}
    oracle.set(start)
    made(out, manifest(root, start), encoder, factory)
    pixels, kinds = itertools.count(100), ["sync", "sync", "add", "remove", "compact"]
    for kind in [kind for _ in range(rounds) for kind in random_.sample(kinds, len(kinds))]:
        before = read_catalog(out)
        was = content(before)
        answered = answers(before)
        rows = dict(oracle.rows)
        if kind == "sync":  # some go, some come, some change their pixels or attributes
            for path in random_.sample(list(rows), random_.randint(0, min(2, len(rows) - 4))):
                del rows[path]
            for path in random_.sample(list(rows), 2):
                rows[path] = random_.choice([(next(pixels), rows[path][1]), (rows[path][0], random_.choice("ab"))])
            for _ in range(random_.randint(0, 3)):
                rows[f"{random_.randint(0, 20)}.png"] = (next(pixels), random_.choice("ab"))
            done = change.update(out, manifest(root, rows), encoder, remove=True, fewer=True)
            described = {path for path, row in rows.items() if oracle.rows.get(path, (None,))[0] != row[0]}
            assert len(done.added) + len(done.changed) == len(described)
        elif kind == "add":
            some = {f"{random_.randint(0, 20)}.png": (next(pixels), "c") for _ in range(2)}
            change.update(out, manifest(root, some), encoder, remove=False)
            rows |= some
        elif kind == "remove":
            for path in random_.sample(list(rows), 1):
                change.remove(out, [path if random_.random() < 0.5 else oracle.ids[path]])
                del rows[path]
        else:
            change.compact(out)
        oracle.set(rows)
        assert content(before) == was, "a reader of the old version lost it"
        same_answers(answers(before), answered)
        catalog = read_catalog(out)
        found = content(catalog)
        assert {path: number for number, (path, _, _) in found.items()} == oracle.ids
        assert {path: artist for path, artist, _ in found.values()} == {path: row[1] for path, row in rows.items()}
        assert catalog.names.given == oracle.next_id
        fresh = made(tmp_path / "fresh", manifest(root, rows), encoder, "BFlat" if bits else "Flat")
        shutil.rmtree(tmp_path / "fresh")
        of_fresh = {path: thumbnail for path, _, thumbnail in content(fresh).values()}
        assert {path: thumbnail for path, _, thumbnail in found.values()} == of_fresh
        if factory in ("Flat", "BFlat", "HNSW8"):  # for so few, the graph finds all
            same_answers(answers(catalog), answers(fresh), ties=bits is not None)
        for number in set(range(oracle.next_id)) - set(oracle.ids.values()):
            assert catalog.names.find(str(number)) is None
            assert catalog.names.is_gone(str(number))
        assert change.problems(out) == []
        if kind == "compact":
            assert len(catalog.segments) == 1
            assert [path.name for path in (out / "segments").iterdir()] == [catalog.segments[0].folder.name]
            assert not (out / "removed").exists()
            same_answers(answers(catalog), answers(before))


ROWS = {f"{i}.png": (i, "ab"[i % 2]) for i in range(8)}
OTHERS = {
    **{f"{i}.png": (i, "ab"[i % 2]) for i in range(2, 8)},
    "3.png": (50, "b"),
    "4.png": (4, "c"),
    "9.png": (9, "a"),
}


@pytest.fixture
def living(tmp_path) -> Callable[..., Path]:
    """Makes a catalog of ROWS in a folder."""

    def make(name: str = "c", **more) -> Path:
        made(tmp_path / name, manifest(tmp_path / f"{name}-images", ROWS), Encoder(), "Flat", **more)
        return tmp_path / name

    return make


class TestUpdate:
    def test_only_what_is_new_or_changed_is_described(self, living, tmp_path, monkeypatch):
        out, seen, encoder = living(), [], Encoder()
        real = encoder.embed
        monkeypatch.setattr(encoder, "embed", lambda images: seen.append(len(images)) or real(images))
        done = change.update(out, manifest(tmp_path / "i", OTHERS), encoder, remove=True, fewer=True)
        assert (done.added, done.changed, done.edited, done.removed, done.kept) == ((8,), (3,), (4,), (0, 1), 4)
        assert sum(seen) == 2
        assert str(done) == "version 2: 1 added, 1 changed, 1 edited, 2 removed, 4 as they were"
        again = change.update(out, manifest(tmp_path / "i", OTHERS), encoder, remove=True, fewer=True)
        assert (again.version, again.kept, sum(seen)) == (2, 7, 2)
        assert read_catalog(out).names.of(range(7)) == ["2", "5", "6", "7", "4", "3", "8"]

    def test_an_image_that_was_renamed_keeps_its_id(self, living, tmp_path):
        out = living()
        rows = {("new/1.png" if path == "1.png" else path): row for path, row in ROWS.items()}
        done = change.update(out, manifest(tmp_path / "i", rows), remove=True)  # needs no encoder
        assert (done.edited, done.added, done.removed) == ((1,), (), ())
        assert read_catalog(out).names.find("new/1.png") == read_catalog(out).names.find("1")

    def test_a_calibration_stays(self, living, tmp_path, capsys):
        out = living()
        catalog = read_catalog(out)
        kept = {"catalog": catalog.fingerprint, "same_work": [0.9], "similar": None, "neighbours": 1}
        write_calibration(out, kept | {"items": 8, "next_id": 8})
        change.update(out, manifest(tmp_path / "i", OTHERS), Encoder(), remove=True, fewer=True)
        change.compact(out)
        catalog = read_catalog(out)
        assert catalog.calibration is not None
        found = drift.standing(catalog)
        assert (found.came, found.went, found.p) == (2, 3, None)  # one of each has another image
        assert found.share == pytest.approx(5 / 10)
        assert not found.stands
        assert "2 items of the catalog" in capsys.readouterr().err  # whenever it is opened
        assert "no longer stands for the collection (2 items came and 3 went since, 50 % of all)" in str(found)
        write_calibration(out, kept | {"items": 7, "next_id": 9, "changed": 1})
        assert drift.standing(read_catalog(out)).share == 0

    def test_an_unreadable_image_goes_with_remove_and_stays_without(self, living, tmp_path):
        out = living()
        images = manifest(tmp_path / "i", ROWS)
        (images.root / "2.png").write_bytes(b"no image")
        done = change.update(out, images, Encoder(), remove=False)
        assert (done.kept, [error.reason for error in done.errors]) == (8, ["not-an-image"])
        done = change.update(out, images, Encoder(), remove=True, fewer=True)
        assert (done.removed, done.kept) == ((2,), 7)
        assert "2.png" in (out / "skipped.csv").read_text()

    def test_what_was_skipped_stays_listed_until_it_is_read(self, living, tmp_path):
        def skipped() -> list[str]:
            path = out / "skipped.csv"
            lines = path.read_text().splitlines()[1:] if path.is_file() else []
            return [line.partition(",")[0].rpartition("/")[2] for line in lines]

        out, images = living(), manifest(tmp_path / "i", ROWS)
        for name in ("1.png", "2.png"):
            (images.root / name).write_bytes(b"no image")
        change.update(out, images, Encoder(), remove=True, fewer=True)
        assert skipped() == ["1.png", "2.png"]
        more = manifest(tmp_path / "more", {"a.png": (60, "a"), "b.png": (61, "a")})
        (more.root / "a.png").write_bytes(b"no image")
        change.update(out, more, Encoder(), remove=False)
        assert skipped() == ["1.png", "2.png", "a.png"]
        draw(images.root / "1.png", 1)
        change.update(out, Manifest(images.root, ("1.png",), {}), Encoder(), remove=False)
        assert skipped() == ["2.png", "a.png"]
        draw(more.root / "a.png", 60)
        owned = Manifest(more.root, ("a.png",), {"id": ("x",)})
        with pytest.raises(CatalogError), change.changing(out):
            change.update(out, owned, Encoder(), remove=False)
        assert skipped() == ["2.png", "a.png"]  # as the catalog is
        change.update(out, manifest(tmp_path / "i", ROWS), Encoder(), remove=True)
        assert not (out / "skipped.csv").exists()

    def test_a_collection_that_moved_is_known_where_it_is_now(self, tmp_path):
        out, images = tmp_path / "c", manifest(tmp_path / "i", ROWS)
        made(out, images, Encoder(), "Flat")
        assert change.usual_root(out, images.root / "x") == images.root
        shutil.move(images.root, tmp_path / "j")
        done = change.update(out, replace(images, root=tmp_path / "j"), remove=True)  # needs no encoder
        assert (done.kept, done.version) == (len(ROWS), 2)
        assert change.usual_root(out, tmp_path / "j/x") == tmp_path / "j"
        assert change.update(out, replace(images, root=tmp_path / "j"), remove=True).version == 2

    def test_labels_of_added_images_are_those_of_the_whole_folder(self, tmp_path):
        root, out = tmp_path / "i", tmp_path / "c"
        names = ["0.png", "a/0.png", "a/b/0.png", "c/0.png"]
        for seed, name in enumerate(names):
            draw(root / name, seed)
        made(out, read_images(root), Encoder(), "Flat")
        for seed, name in enumerate(["a/1.png", "a/b/1.png", "d/1.png"]):
            draw(root / name, 10 + seed)
        whole = dict(zip(read_images(root).paths, read_images(root).attributes["label"], strict=True))
        for source, added in (("a", 2), ("d/1.png", 1), ("a/b", 0)):
            done = change.update(out, change.manifest_to_add(out, root / source, None), Encoder(), remove=False)
            assert (len(done.added), done.changed, done.edited) == (added, (), ())
        items = read_catalog(out).items
        assert dict(zip(items["path"].to_pylist(), items["label"].to_pylist(), strict=True)) == whole
        outside = tmp_path / "o"
        draw(outside / "e/f.png", 50)
        assert change.manifest_to_add(out, outside, None) == read_images(outside)

    def test_labels_of_a_table_are_not_changed_by_folders(self, tmp_path):
        root, out = tmp_path / "i", tmp_path / "c"
        images = manifest(root, {"a/0.png": (0, "-"), "a/1.png": (1, "-")})
        made(out, Manifest(root, images.paths, {"label": ("cat", "dog")}), Encoder(), "Flat")
        draw(root / "a/b/2.png", 2)
        done = change.update(out, change.manifest_to_add(out, root / "a", None), Encoder(), remove=False)
        assert (done.added, done.edited) == ((2,), ())
        assert read_catalog(out).items["label"].to_pylist() == ["cat", "dog", None]

    def test_far_fewer_images_are_refused(self, living, tmp_path):
        out = living()
        images = manifest(tmp_path / "i", {"1.png": (1, "a")})
        with pytest.raises(ValueError, match=r"has 8 items, but the new one would have 1\..*fewer=true"):
            change.update(out, images, remove=True)
        assert len(read_catalog(out)) == 8
        assert change.update(out, images, remove=True, fewer=True).kept == 0  # another artist
        assert len(read_catalog(out)) == 1

    def test_own_ids_stay_distinct(self, tmp_path):
        def of(ids: dict[str, str | None]) -> Manifest:
            images = manifest(tmp_path / "i", {path: ROWS[path] for path in ids})
            return Manifest(images.root, images.paths, {"id": tuple(ids.values())})

        out = tmp_path / "c"
        made(out, of({"0.png": "7", "1.png": "0", "3.png": "x"}), Encoder(), "Flat")
        assert read_catalog(out).names.of([0, 1, 2]) == ["7", "0", "x"]
        for wrong, message in (({"2.png": "7"}, "two images have the id '7'"), ({"2.png": None}, "has no id")):
            with pytest.raises(ValueError, match=message):
                change.update(out, of(wrong), Encoder(), remove=False)
        change.update(out, of({"2.png": "1", "1.png": "9"}), Encoder(), remove=False)
        catalog = read_catalog(out)
        assert {catalog.names.of([i])[0]: p for i, p in enumerate(catalog.items["path"].to_pylist())} == {
            "7": "0.png", "9": "1.png", "1": "2.png", "x": "3.png",
        }  # fmt: skip
        assert [name for name in ("7", "0", "1", "9", "8") if catalog.names.is_gone(name)] == ["0"]
        change.remove(out, ["7"])
        with pytest.raises(ValueError, match="the item 7 was removed from the catalog"):
            change.remove(out, ["7"])

    def test_local_features_move_along(self, tmp_path):
        rows, out = {f"{i}.png": (i, "a") for i in range(4)}, tmp_path / "c"
        verification = Verification(item_side=48, item_features=20)
        made(out, manifest(tmp_path / "i", rows), Encoder(), "Flat", verification=verification)
        rows = {**rows, "1.png": (1, "b"), "2.png": (22, "a"), "5.png": (5, "a")}
        del rows["0.png"]
        change.update(out, manifest(tmp_path / "i", rows), Encoder(), remove=True, fewer=True)
        fresh = made(tmp_path / "f", manifest(tmp_path / "i", rows), Encoder(), "Flat", verification=verification)
        want = dict(zip(fresh.items["path"].to_pylist(), fresh.local_features(range(4)), strict=True))
        assert any(len(one) for one in want.values())
        for _ in range(2):
            catalog = read_catalog(out)
            found = dict(zip(catalog.items["path"].to_pylist(), catalog.local_features(range(4)), strict=True))
            for path, features in want.items():
                assert np.array_equal(found[path].points, features.points)
                assert np.array_equal(found[path].descriptors, features.descriptors)
            change.compact(out)

    def test_one_writer_at_a_time(self, living):
        out = living()
        with change.changing(out), pytest.raises(CatalogError, match="another process changes the catalog"):
            change.remove(out, ["1"])
        assert len(read_catalog(out)) == 8

    def test_what_cannot_be_removed(self, living):
        out = living()
        change.remove(out, [3, "4.png"])
        with pytest.raises(ValueError, match="the item 3 was removed from the catalog"):
            change.remove(out, [3])
        with pytest.raises(ValueError, match=r"no item '8' in the catalog"):
            change.remove(out, [8])
        with pytest.raises(ValueError, match=r"no item of the catalog .* would be left"):
            change.remove(out, [0, 1, 2, 5, 6, 7])
        assert len(read_catalog(out)) == 6

    def test_a_catalog_that_is_made_anew_keeps_the_ids_of_its_paths(self, living, tmp_path):
        out = living()
        change.remove(out, [0])
        rows = {path: ROWS[path] for path in ("5.png", "0.png", "3.png")} | {"x.png": (70, "a")}
        catalog = made(out, manifest(tmp_path / "i", rows), Encoder(16), "BFlat")  # another encoder
        assert catalog.names.of(range(4)) == ["5", "8", "3", "9"]

    def test_a_damaged_catalog_that_is_made_anew_gives_no_id_again(self, living, tmp_path, capsys):
        out = living()
        change.remove(out, [7])
        (out / "segments/1/items.arrow").write_bytes(b"x")
        catalog = made(out, manifest(tmp_path / "i", ROWS), Encoder(), "Flat")
        assert catalog.names.of(range(8)) == [str(number) for number in range(8, 16)]
        assert "cannot be read, so all get new ids, from 8" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*learns")
class TestSettings:
    def test_those_that_are_not_given_are_those_of_the_catalog(self, tmp_path):
        rows, out = {f"{i}.png": (i, "a") for i in range(4)}, tmp_path / "c"
        floats, codes, graph = Encoder(), Encoder(16), FaissIndex("HNSW8", ef_search=20)
        found = [change.settings_for(out, encoder, None, None) for encoder in (floats, codes)]
        assert [(index.factory, of_local) for index, of_local in found] == [("Flat", None), ("BFlat", None)]
        verification = Verification(item_side=48, item_features=20)
        filling = {"run": "r", "thumbnail": SIDE, "batch_size": 64, "workers": 0, "verification": verification}
        write_filled(out, graph, filling_of(manifest(tmp_path / "i", rows), floats, {"model": {}}, **filling))
        index, of_local = change.settings_for(out, floats, None, None)
        assert (index.settings, len(index)) == (graph.settings, 0)
        assert of_local.config == verification.config
        assert change.takes(out, floats, index, of_local)
        given = (FaissIndex("SQ8"), Verification(item_side=64))
        assert change.settings_for(out, floats, *given) == given
        index, of_local = change.settings_for(out, codes, None, None)  # a graph of floats does not fit
        assert (index.factory, of_local.config) == ("BFlat", verification.config)
        other = nn.Module.requires_grad_(Encoder(), False)
        other.weight.data += 1
        assert change.settings_for(out, other, None, None)[0].settings == graph.settings  # made anew as it was
        assert not change.takes(out, other, *change.settings_for(out, other, None, None))

    @pytest.mark.parametrize(("factory", "bits", "lists"), [("IVF,Flat", None, "IVF1"), ("BIVF", 16, "BIVF1")])
    def test_lists_of_before_fit_a_collection_that_has_grown(self, factory, bits, lists, tmp_path):
        """After `compact` one segment holds so many items that a new index would have more lists."""
        few, many = ({f"{i}.png": (i, "a") for i in range(count)} for count in (40, 100))
        out, encoder = tmp_path / "c", Encoder(bits)
        made(out, manifest(tmp_path / "i", few), encoder, factory)
        change.update(out, manifest(tmp_path / "i", many), encoder, remove=True)
        change.compact(out)
        assert len(read_catalog(out).segments[0]) == 100
        fresh = FaissIndex(factory)
        fresh.settle(100)
        assert fresh.factory != read_catalog(out).index.factory == lists + factory[len(lists) - 1 :]
        assert change.takes(out, encoder, FaissIndex(factory), None)
        assert not change.takes(out, encoder, FaissIndex(factory, nprobe=7), None)
        assert not change.takes(out, encoder, fresh, None)  # its number of lists was named

    @pytest.mark.parametrize(
        ("factory", "bits", "message"),
        [
            ("IVF64,Flat", None, r"at least 64 vectors to train: raise index.train_size \(now 63\)"),
            ("Flat", 16, "gives codes: take binary-flat, binary-hnsw or so"),
            ("BFlat", None, "gives float descriptors: take flat, hnsw, ivf-pq or so"),
            ("PQ5", None, "PQ5 cuts a vector into 5 equal parts, which 16 dimensions"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, factory, bits, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            change.settings_for(tmp_path, Encoder(bits), FaissIndex(factory, train_size=63), None)

    def test_lists_that_follow_the_items_fit(self, tmp_path):
        for factory, bits in (("IVF,PQ4", None), ("BIVF", 16)):
            assert change.settings_for(tmp_path, Encoder(bits), FaissIndex(factory), None)[0].factory == factory


# ---------------------------------------------------------------------------------------- kills, damage


def run(work: Callable[[], object], below: Path, at: int = 0, after: float | None = None) -> tuple[int, int]:
    """Exit status of `work` in a process of its own, and how many changes of files below a folder it made.

    at: it is killed before its at-th change. after: it is killed after so many seconds.
    """
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)

    def target() -> None:
        def strike(event: str, values: tuple) -> None:
            if is_change(event, values, str(below)):
                count.value += 1
                if count.value == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        tqdm.set_lock(threading.RLock())  # a kill would leave the one that is shared with this process locked
        sys.addaudithook(strike)
        work()

    process = context.Process(target=target)
    process.start()
    process.join(120 if after is None else after)
    if after is not None:
        process.kill()
        process.join(120)
    assert process.exitcode is not None
    return process.exitcode, count.value


def named(folder: Path) -> set[str]:
    """The files that a catalog's present version names, which are all that it may have."""
    about = json.loads((folder / "catalog.json").read_text())
    found = {"catalog.json", "encoder.safetensors"}
    if about["removed"] is not None:
        found.add(f"removed/{about['removed']['version']}.npy")
    for entry in about["segments"]:
        inner = ("segment.json", "items.arrow", "thumbnails.parquet", "index/index.faiss", "index/index.json")
        found |= {f"{entry['folder']}/{name}" for name in inner}
    return found


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "kills"),
    [*((kind, 4) for kind in ("sync", "remove", "compact"))]
    + [pytest.param(kind, 100, marks=pytest.mark.slow) for kind in ("sync", "add", "remove", "compact")],
)
def test_a_kill_leaves_the_old_version_or_the_new_one(kind, kills, living, tmp_path):
    base, images, encoder = living("base"), manifest(tmp_path / "i", OTHERS), Encoder()
    change.update(base, images, encoder, remove=False)  # several segments, removed rows
    work = {
        "sync": lambda out: change.update(out, images, encoder, remove=True, fewer=True),
        "add": lambda out: change.update(out, manifest(tmp_path / "j", {"x.png": (80, "a")}), encoder, remove=False),
        "remove": lambda out: change.remove(out, ["2", "3"]),
        "compact": change.compact,
    }[kind]
    whole, began = Path(shutil.copytree(base, tmp_path / "whole")), time.monotonic()
    _, changes = run(lambda: work(whole), whole)
    seconds, old, new = time.monotonic() - began, content(read_catalog(base)), content(read_catalog(whole))
    random_, struck, timed = random.Random(kills), 0, 0
    for number in range(kills):
        out = Path(shutil.copytree(base, tmp_path / "killed"))
        by_time = kills > changes and number % 2  # between changes too, as while a file is written
        at, after = (0, random_.uniform(0, seconds)) if by_time else (random_.randint(1, changes), None)
        code, _ = run(lambda out=out: work(out), out, at, after)
        struck += code == -signal.SIGKILL
        timed += bool(by_time)
        assert change.problems(out) == []
        found = content(read_catalog(out))
        assert found in (old, new), f"killed at change {at} of {changes}"
        change.update(out, manifest(tmp_path / "k", {"y.png": (90, "a")}), encoder, remove=False)
        assert files(out) == named(out), f"killed at change {at} of {changes}, it leaves files"
        shutil.rmtree(out)
    assert struck >= kills - timed
    print(f"{kind}: {struck} kills, {timed} of them at random times, the others at {changes} changes")


def test_verify_names_each_damaged_file(living, tmp_path):
    out = living()
    change.update(out, manifest(tmp_path / "i", OTHERS), Encoder(), remove=True, fewer=True)
    catalog = read_catalog(out)
    kept = {"catalog": catalog.fingerprint, "same_work": [0.9], "similar": None, "neighbours": 1}
    write_calibration(out, kept)
    assert change.problems(out) == []
    random_, count = np.random.default_rng(0), 0
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content_ = path.read_bytes()
        flipped = []
        for _ in range(6):
            changed = bytearray(content_)
            changed[random_.integers(len(changed))] ^= int(random_.integers(1, 256))
            flipped.append(bytes(changed))
        for changed in (*flipped, content_[:-1], content_[: len(content_) // 2], b""):
            path.write_bytes(changed)
            found = change.problems(out)
            if path.suffix == ".json" and not found:  # white space
                assert json.loads(changed) == json.loads(content_)
                continue
            assert any(path.name in problem for problem in found), (path, found)
            count += 1
        path.unlink()
        assert (path.name == "calibration.json") == (change.problems(out) == [])
        path.write_bytes(content_)
    assert count > 80
    assert change.problems(out) == []


def test_a_large_file_that_was_cut_does_not_open(living, monkeypatch):
    monkeypatch.setattr(segments, "_READ_WHOLE", 0)
    out = living()
    for name in ("items.arrow", "index/index.faiss"):
        path = out / "segments/1" / name
        kept = path.read_bytes()
        path.write_bytes(kept[:-1])
        with pytest.raises(CatalogError, match=f"{path.name} is damaged or belongs to another catalog: .* bytes"):
            read_catalog(out)
        path.write_bytes(kept)


def test_a_segment_outside_of_the_folder_is_not_opened(living, tmp_path):
    out = living()
    about = json.loads((out / "catalog.json").read_text())
    for name in ("../base/segments/1", "/etc", "segments/../../x", "segments/1/../1"):
        about["segments"][0]["folder"] = name
        (out / "catalog.json").write_text(json.dumps({k: v for k, v in about.items() if k != "checksum"}))
        with pytest.raises(CatalogError, match="which is none"):
            read_catalog(out)


def sign(out: Path, files: dict[str, dict]) -> None:
    """Gives a catalog digests of other files, so that all are right: as somebody else may write it."""
    path = out / "segments/1/segment.json"
    about = json.loads(path.read_text())
    write_json(path, about | {"files": about["files"] | files})
    whole = json.loads((out / "catalog.json").read_text())
    whole["segments"][0]["sha256"] = sha256(path)
    write_json(out / "catalog.json", whole)


def test_a_file_that_no_segment_has_is_not_read(living, tmp_path):
    out = living()
    (tmp_path / "secret").write_text("key")
    sign(out, {"../../../secret": {"bytes": 3, "sha256": "0"}})
    with pytest.raises(CatalogError, match=r"names the file '../../../secret', which no segment has"):
        read_catalog(out)
    assert "which no segment has" in change.problems(out)[0]


def test_texts_that_point_outside_of_their_file_are_refused(living):
    out = living()
    path = out / "segments/1/items.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    offsets, data = (table["path"].chunk(0).buffers()[i] for i in (1, 2))
    wild = np.frombuffer(offsets, np.int32).copy()
    wild[3] = 10**9
    texts = pa.StringArray.from_buffers(len(table), pa.py_buffer(wild), data)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        try:
            writer.write_table(table.set_column(table.column_names.index("path"), "path", texts))
        except pa.ArrowInvalid:
            pytest.skip("this release of Arrow does not write it")
    sign(out, {"items.arrow": {"bytes": path.stat().st_size, "sha256": sha256(path)}})
    with pytest.raises(CatalogError, match=r"damaged .*Invalid"):
        read_catalog(out)
    assert any("Invalid" in problem for problem in change.problems(out))


def test_a_reader_whose_segments_are_merged_meanwhile_reads_again(living, tmp_path, monkeypatch):
    out = living()
    change.update(out, manifest(tmp_path / "i", OTHERS), Encoder(), remove=True, fewer=True)
    from simsearch.search import catalog as module

    real, once = module.read_segment, []

    def read(*arguments):
        if not once:
            once.append(True)
            change.compact(out)
        return real(*arguments)

    monkeypatch.setattr(module, "read_segment", read)
    assert len(read_catalog(out)) == 7
    assert once


# -------------------------------------------------------------------------------- server, Python, commands


def test_a_server_takes_a_new_version(living, tmp_path, monkeypatch):
    monkeypatch.setattr("simsearch.search.encoder_files.build_encoder", lambda *_, **__: Encoder())
    out = living()
    library = Library({"c": Source(out)}, device=torch.device("cpu"), limits=Limits())
    try:
        with library.lease("c") as before:
            assert library.refresh() == []
            change.update(out, manifest(tmp_path / "i", OTHERS), Encoder(), remove=True, fewer=True)
            assert library.refresh() == ["c"]
            with library.lease("c") as now:
                assert now.worker is before.worker  # the encoder is not loaded again
                assert [item["id"] for item in now.describe(range(7))] == ["2", "5", "6", "7", "4", "3", "8"]
                assert now.now("7", None, before.version) == "7"
                assert now.now(None, 7, before.version) == "7"
                assert now.now("0", None, before.version) is None
                assert now.engine.names.is_gone("0")
                assert now.thumbnails[6]
            change.compact(out)
            assert [item["id"] for item in before.describe([0, 7])] == ["0", "7"]
            assert before.thumbnails[0]
            assert library.refresh() == ["c"]
    finally:
        library.close()


def test_the_test_of_scores_is_right_about_as_often_as_it_says(tmp_path):
    """Old and new items of one distribution: false alarms at the level of the test; of another one: an alarm."""
    generator, alarms, shifted = torch.Generator().manual_seed(0), 0, 0
    for trial in range(60):
        for shift in (0.0, 2.0):
            count, new = 60, 30
            vectors = torch.randn(count + new, 8, generator=generator)
            vectors[count:, 0] += shift * 4
            index = FaissIndex("Flat")
            index.add(nn.functional.normalize(vectors, dim=1))
            table = pa.table({"path": [f"{i}" for i in range(count + new)]})
            calibration = {"items": count, "next_id": count, "neighbours": 3}
            about = {"next_id": count + new, "own_ids": False}
            catalog = Catalog(
                Path("c"), index, table, about, calibration=calibration, ids=np.arange(count + new)
            )  # fmt: skip
            found = drift.standing(catalog, seed=trial)
            alarms += shift == 0 and found.p < 0.05
            shifted += shift > 0 and found.p < 0.05
    assert alarms <= 9  # of 60: binomial(60, .05) exceeds it once in a thousand
    assert shifted >= 57


def test_commands(small_run, tmp_path):
    images, out = tmp_path / "images", tmp_path / "c"
    for i in range(6):
        draw(images / f"{i}.png", i)
    index = ("index", f"run={small_run}", f"images={images}", f"out={out}", "workers=0", "device=cpu")
    simsearch(*index, "index=sq8")
    draw(images / "new.png", 30)
    (images / "0.png").unlink()
    draw(images / "1.png", 40)
    done = simsearch(*index)
    assert "6 images, " in done.stdout
    assert "version 2: 1 added, 1 changed, 1 removed, 4 as they were" in done.stdout
    assert {segment.index.factory for segment in read_catalog(out).segments} == {"SQ8"}  # and not the usual one
    draw(images / "late.png", 50)
    done = simsearch("catalog", "add", f"catalog={out}", f"images={images}/late.png", "workers=0", "device=cpu")
    assert "version 3: 1 added, 6 as they were" in done.stdout
    done = simsearch("search", f"catalog={out}", f"image={images}/late.png", "k=1", "format=json", "device=cpu")
    assert [json.loads(done.stdout)["results"][0][name] for name in ("id", "path")] == ["7", "late.png"]
    found = json.loads(simsearch("recommend", f"catalog={out}", "id=7", "k=9", "format=json", "force=true").stdout)
    assert found["like"] == ["7"]
    assert {item["id"] for item in found["results"]} == {"1", "2", "3", "4", "5", "6"}
    simsearch("catalog", "remove", f"catalog={out}", "id=[7,2.png]")
    done = simsearch("recommend", f"catalog={out}", "id=7", expect=1)
    assert "the item 7 was removed from the catalog" in done.stderr
    about = json.loads(simsearch("catalog", "info", f"catalog={out}", "format=json").stdout)
    assert (about["items"], about["next_id"], about["version"], about["removed_rows"]) == (5, 8, 4, 3)
    assert "5" in simsearch("catalog", "info", f"catalog={out}").stdout
    assert "each file" in simsearch("catalog", "verify", f"catalog={out}").stdout
    assert "in one segment" in simsearch("catalog", "compact", f"catalog={out}").stdout
    assert "already" in simsearch("catalog", "migrate", f"catalog={out}").stdout
    (out / "segments/5/items.arrow").write_bytes(b"x")
    done = simsearch("catalog", "verify", f"catalog={out}", expect=1)
    assert "items.arrow" in done.stdout
    assert "damaged in 1 places" in done.stderr


@pytest.mark.parametrize("place", ["save", "write_json", "write_array"])
def test_a_full_disk_leaves_the_old_version(place, living, tmp_path, monkeypatch):
    out, images = living(), manifest(tmp_path / "i", OTHERS)
    old = content(read_catalog(out))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FaissIndex if place == "save" else change, place, fail)
    with pytest.raises(OSError, match="No space left"):
        change.update(out, images, Encoder(), remove=True, fewer=True)
    monkeypatch.undo()
    assert content(read_catalog(out)) == old
    assert change.problems(out) == []
    change.update(out, images, Encoder(), remove=True, fewer=True)
    assert files(out) == named(out)
    assert len(read_catalog(out)) == 7


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
@settings(deadline=None)
def test_items_without_removed_rows_and_single_rows(lengths, data):
    total = sum(lengths)
    rows = pa.table({"path": [f"{i}.jpg" for i in range(total)], "year": [None if i % 3 else i for i in range(total)]})
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    parts = [rows.slice(start, length) for start, length in zip(starts, lengths, strict=True)]
    removed = data.draw(st.lists(st.integers(0, total - 1), unique=True, max_size=total - 1).map(sorted))
    places = segments.Places(lengths, np.array(removed, dtype=np.int64))
    found = []
    for most in (segments._DROPPED, -1):
        with mock.patch.object(segments, "_DROPPED", most):
            found.append(segments.items_of([SimpleNamespace(items=part) for part in parts], places))
    expected = [row for i, row in enumerate(rows.to_pylist()) if i not in removed]
    assert found[0].to_pylist() == found[1].to_pylist() == expected
    positions = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=9))
    assert rows_at(found[0], positions) == [expected[position] for position in positions]
