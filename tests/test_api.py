"""The Python API: catalogs opened and searched, encoders that describe, embeddings measured."""

from __future__ import annotations

import doctest
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import simsearch
from simsearch import api
from simsearch.files import read_json, write_json
from simsearch.images import read_image
from simsearch.models import encoder as encoders
from simsearch.models.backbones import state_fingerprint
from simsearch.models.encoder import build, build_encoder
from simsearch.search import encoder_files
from simsearch.search.engine import Engine
from simsearch.search.rerank import CSLS, AlphaQE
from simsearch.trust import ENCODERS, Untrusted

N = 12
STYLES = ("round", "square", "round & <b>bold</b>")


def pictures(count: int = N, side: int = 48) -> list[np.ndarray]:
    """Smooth pictures uint8 (side, side, 3) that differ."""
    generator = torch.Generator().manual_seed(3)
    small = torch.rand(count, 3, 4, 4, generator=generator) * 255
    large = torch.nn.functional.interpolate(small, (side, side), mode="bilinear")
    return [image.permute(1, 2, 0).to(torch.uint8).numpy() for image in large]


MODEL = {
    "_target_": "simsearch.models.frozen.FrozenRetriever",
    "backbone": {
        "_target_": "simsearch.models.backbones.timm_backbone", "name": "test_resnet", "weights": "random", "size": 32,
    },
    "pooling": {"_target_": "simsearch.models.pooling.GeM", "p": 3.0},
}  # fmt: skip
CODES = {
    "_target_": "simsearch.models.hashing.HashNetwork", "backbone": MODEL["backbone"],
    "pooling": {"_target_": "simsearch.models.pooling.Average"}, "bits": 12,
}  # fmt: skip


def loaded(model: dict = MODEL) -> api.LoadedEncoder:
    torch.manual_seed(5)
    return api.LoadedEncoder(build_encoder({"model": model}), {"model": model}, "toy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images in sub-folders that name a style, one with a name that a page must escape."""
    root = tmp_path_factory.mktemp("images")
    for i, picture in enumerate(pictures()):
        place = root / STYLES[i % 3].replace("/", "-slash-")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def encoder() -> api.LoadedEncoder:
    return loaded()


@pytest.fixture(scope="module")
def catalog(folder, encoder, tmp_path_factory) -> api.OpenCatalog:
    table = tmp_path_factory.mktemp("table") / "images.csv"
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    lines = [f'"{path}","{Path(path).parent}",work-{i // 2}' for i, path in enumerate(paths)]
    table.write_text("\n".join(["path,style,work", *lines]))
    return simsearch.build_catalog(encoder, table, tmp_path_factory.mktemp("c") / "catalog", root=folder, workers=0)


def brute_force(encoder: api.LoadedEncoder, folder: Path, paths: list[str], query: Tensor) -> list[tuple[str, float]]:
    """Paths and cosines by numpy, best first."""
    images = torch.stack([read_image(folder / path, size=32) for path in paths])
    with torch.inference_mode():
        vectors = encoder.encoder.embed(images).double().numpy()
        wanted = encoder.encoder.embed(query[None]).double().numpy()[0]
    cosines = vectors @ wanted / np.linalg.norm(vectors, axis=1) / np.linalg.norm(wanted)
    return [(paths[i], cosines[i]) for i in np.argsort(-cosines)]


# --------------------------------------------------------------------------------------------- searching


class TestGrowing:
    def test_images_come_and_go_and_ids_stay(self, folder, encoder, tmp_path):
        images = Path(shutil.copytree(folder, tmp_path / "images"))
        catalog = simsearch.build_catalog(encoder, images, tmp_path / "c", workers=0)
        other = simsearch.open_catalog(tmp_path / "c")
        Image.fromarray(pictures(20)[19]).save(images / "late.png")
        change = catalog.add(images / "late.png", workers=0)
        assert (change.added, change.version) == ((N,), 2)
        assert catalog.items["path"].to_pylist()[-1] == "late.png"
        assert catalog.search(images / "late.png", k=1).ids == [str(N)]
        assert (len(catalog), len(other)) == (N + 1, N)
        before = catalog.search("3", k=5)
        assert catalog.search(np.int64(3), k=5).ids == before.ids  # as columns of numbers give it
        assert catalog.remove(np.int64(N)).removed == (N,)
        assert catalog.remove(["0"]).removed == (0,)
        catalog.compact()
        assert catalog.ids == [str(i) for i in range(1, N)]
        assert catalog.search("3", k=3).ids == [i for i in before.ids if i not in ("0", str(N))][:3]
        with pytest.raises(ValueError, match=r"the item 12 was removed from the catalog"):
            catalog.search(str(N))
        assert catalog.verify() == []
        assert catalog.standing() is None
        again = simsearch.build_catalog(encoder, images, tmp_path / "c", workers=0)
        assert again.ids == [*(str(i) for i in range(1, N)), str(N + 1), str(N + 2)]
        assert len(other.search(other.ids[0], k=3)) == 3  # of the version that it has opened


class TestSearch:
    def test_finds_what_brute_force_finds(self, catalog, encoder, folder):
        paths = catalog.items["path"].to_pylist()
        query = folder / paths[4]
        expected = brute_force(encoder, folder, paths, read_image(query, size=32))
        answer = catalog.search(query, k=5)
        assert [hit.attributes["path"] for hit in answer] == [path for path, _ in expected[:5]]
        assert answer.ids == [str(paths.index(path)) for path, _ in expected[:5]]
        np.testing.assert_allclose(answer.scores, [cosine for _, cosine in expected[:5]], atol=1e-5)
        assert [hit.rank for hit in answer] == [1, 2, 3, 4, 5]
        assert answer.verdict == "uncalibrated"
        assert answer.candidates == N

    def test_every_form_of_an_image_is_one(self, catalog, encoder, folder):
        path = folder / catalog.items["path"][4].as_py()
        picture = Image.open(path)
        array = np.array(picture)
        forms = [path, picture, array, torch.from_numpy(array).permute(2, 0, 1), encoder.describe(path)[0]]
        forms += [encoder.describe(path)[0].numpy(), str(path)]
        answers = [catalog.search(form, k=4) for form in forms]
        assert len({tuple(answer.ids) for answer in answers}) == 1
        for answer in answers[1:]:
            np.testing.assert_allclose(answer.scores, answers[0].scores, atol=1e-5)

    def test_transparency_and_orientation_are_those_of_a_file(self, catalog, tmp_path):
        picture = Image.fromarray(pictures(1)[0][:20]).convert("RGBA")
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(tmp_path / "x.png", exif=exif)
        with Image.open(tmp_path / "x.png") as opened:
            assert catalog.search(opened, k=3).scores == catalog.search(tmp_path / "x.png", k=3).scores

    def test_an_item_is_known_by_its_id_and_left_out(self, catalog):
        own = catalog.ids[4]
        answer = catalog.search(own, k=N)
        assert catalog.search(int(own), k=N).ids == answer.ids
        assert catalog.search([int(own)], k=N).ids == answer.ids
        assert own not in answer.ids
        assert len(answer) == N - 1
        assert answer.query == (own,)
        style = catalog.items["style"][4].as_py()
        assert {hit.shared.get("style") for hit in answer if hit.attributes["style"] == style} == {style}
        assert all("style" not in hit.shared for hit in answer if hit.attributes["style"] != style)

    def test_several_and_unlike_are_one_query(self, catalog, encoder, folder):
        one, other, bad = (folder / catalog.items["path"][i].as_py() for i in (0, 5, 9))
        vectors = encoder.describe([one, other, bad]).double()
        direction = vectors[:2].mean(0) - 0.5 * vectors[2]  # Rocchio
        gallery = encoder.describe([folder / path for path in catalog.items["path"].to_pylist()]).double()
        expected = (gallery @ (direction / direction.norm())).argsort(descending=True)[:6]
        answer = catalog.search([one, other], unlike=bad, k=6)
        assert answer.ids == [catalog.ids[i] for i in expected]
        assert answer.query[-1] == f"not: {bad}"
        stacked = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in (one, other)])
        assert catalog.search(stacked, unlike=[bad], k=6).ids == answer.ids
        assert catalog.search(vectors[:2].float(), unlike=vectors[2:].float(), k=6).ids == answer.ids

    def test_filters_works_and_weights(self, catalog, folder):
        path = folder / catalog.items["path"][0].as_py()
        styles = [hit.attributes["style"] for hit in catalog.search(path, k=N, where="style!=round")]
        assert len(styles) == 2 * N // 3
        assert "round" not in styles
        works = [hit.attributes["work"] for hit in catalog.search(path, k=N, collapse=True)]
        assert len(works) == len(set(works)) == N // 2
        assert catalog.search(path, weights={"content": 2.0}).ids == catalog.search(path).ids
        with pytest.raises(ValueError, match="no part"):
            catalog.search(path, weights={"colour": 1.0})
        with pytest.raises(ValueError, match="did you mean style"):
            catalog.search(path, where="stile=round")

    def test_re_ranking_decides_the_order_within_filters(self, catalog, encoder, folder):
        paths = catalog.items["path"].to_pylist()
        gallery = encoder.describe([folder / path for path in paths]).double().numpy()
        kept = [i for i, style in enumerate(catalog.items["style"].to_pylist()) if style != "round"]
        query = gallery[0]
        near = sorted(kept, key=lambda i: -(gallery[i] @ query))[:3]
        weights = np.array([max(gallery[i] @ query, 0) ** 3 for i in near])
        expanded = query + (weights[:, None] * gallery[near]).sum(0)
        order = sorted(kept, key=lambda i: -(gallery[i] @ expanded))
        answer = catalog.search(folder / paths[0], k=len(kept), where="style!=round", rerank=AlphaQE(3))
        assert answer.ids == [catalog.ids[i] for i in order]
        np.testing.assert_allclose(answer.scores, gallery[order] @ query, atol=1e-5)

    def test_codes(self, folder, tmp_path):
        encoder = loaded(CODES)
        catalog = simsearch.build_catalog(encoder, folder, tmp_path / "c", workers=0)
        path = folder / catalog.items["path"][4].as_py()
        codes = encoder.describe([folder / path for path in catalog.items["path"].to_pylist()])
        bits = np.unpackbits(codes.numpy(), axis=1, bitorder="little")[:, :12]
        distance = (bits != bits[4]).sum(1)
        answer = catalog.search(path, k=N)
        np.testing.assert_allclose(answer.scores, 1 - 2 * np.sort(distance) / 12, atol=1e-6)
        assert catalog.search(codes[4], k=N).ids == answer.ids
        assert catalog.search(encoder.describe(path), k=N).ids == answer.ids  # as `describe` returns it
        both = catalog.search(codes[[4, 7]].numpy(), k=N)
        signs = 2.0 * bits - 1
        expected = signs @ (signs[4] + signs[7]) / (np.linalg.norm(signs[4] + signs[7]) * 12**0.5)
        np.testing.assert_allclose(both.scores, -np.sort(-expected), atol=1e-6)

    def test_mistakes_are_named(self, catalog, folder, tmp_path):
        with pytest.raises(ValueError, match=r"'nowhere\.jpg' is neither a file nor an item of"):
            catalog.search("nowhere.jpg")
        (tmp_path / "bad.jpg").write_bytes(b"no image")
        for bad in (tmp_path / "bad.jpg", str(tmp_path / "bad.jpg")):
            with pytest.raises(simsearch.ImageError, match="not-an-image"):
                catalog.search(bad)
        for bad in (np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8), torch.zeros(4, 4, 3, dtype=torch.uint8), 7.5):
            with pytest.raises(ValueError, match=r"is not an image: give a path|not iterable"):
                catalog.search([bad])
        with pytest.raises(ValueError, match="columns do not compare"):
            catalog.search(np.zeros(3))
        with pytest.raises(ValueError, match="no example"):
            catalog.search([])
        with pytest.raises(ValueError, match="k must be at least 1"):
            catalog.search(folder / catalog.items["path"][0].as_py(), k=0)


class TestAnswer:
    @pytest.fixture
    def answer(self, catalog, folder):
        return catalog.search(folder / catalog.items["path"][2].as_py(), k=4)

    def test_prints_as_a_table(self, answer):
        text = str(answer)
        assert all(path in text.replace("\n", "") for path in ("rank", "score", "style"))
        assert f"{answer.scores[1]:.4f}" in text
        assert repr(answer) == text

    def test_shows_pictures_and_escapes_text(self, catalog, folder, answer):
        found: list[str] = []

        class Parser(HTMLParser):
            def handle_starttag(self, tag, attributes):
                found.append(tag)
                if tag == "img":
                    assert dict(attributes)["src"].startswith("data:image/png;base64,")

        Parser().feed(answer._repr_html_())
        assert found.count("img") == 5  # the query and four items
        assert set(found) <= {"p", "br", "img", "table", "tr", "th", "td"}
        page = catalog.search(folder / catalog.items["path"][2].as_py(), k=N)._repr_html_()
        assert "&lt;b&gt;bold" in page
        assert "<b>" not in page

    def test_becomes_a_table(self, answer):
        table = answer.to_arrow()
        assert table.column_names[:4] == ["rank", "id", "score", "verdict"]
        assert table["style"].to_pylist() == [hit.attributes["style"] for hit in answer]
        pandas = pytest.importorskip("pandas")
        assert isinstance(answer.to_pandas(), pandas.DataFrame)


class TestCatalog:
    def test_hashes_the_encoder_once(self, catalog, monkeypatch):
        calls = []
        for module in (encoder_files, encoders, sys.modules["simsearch.models.backbones"]):
            if hasattr(module, "state_fingerprint"):
                monkeypatch.setattr(module, "state_fingerprint", lambda m: calls.append(m) or state_fingerprint(m))
        opened = simsearch.open_catalog(catalog.folder)
        assert not calls
        for image in pictures(3):
            opened.search(image)
        assert len(calls) == 1

    def test_opens_without_its_encoder(self, catalog, tmp_path):
        shutil.copytree(catalog.folder, tmp_path / "c")
        (tmp_path / "c" / "encoder.safetensors").unlink()
        opened = simsearch.open_catalog(tmp_path / "c")
        assert len(opened.search(opened.ids[0], k=3)) == 3
        with pytest.raises(simsearch.CatalogError, match="cannot load the encoder"):
            opened.search(pictures(1)[0])
        with pytest.raises(simsearch.SimsearchError, match="no catalog in"):
            simsearch.open_catalog(tmp_path)

    def test_trusts_nobody_by_default(self, catalog, tmp_path):
        shutil.copytree(catalog.folder, tmp_path / "c")
        about = read_json(tmp_path / "c/catalog.json")
        about["config"]["model"]["pooling"] = {"_target_": "os.system", "command": f"touch {tmp_path}/made"}
        write_json(tmp_path / "c/catalog.json", about)
        opened = simsearch.open_catalog(tmp_path / "c")
        with pytest.raises(simsearch.Untrusted, match=r"model.pooling._target_ wants to call 'os.system'.*trust=true"):
            opened.search(pictures(1)[0])
        assert not (tmp_path / "made").exists()

    def test_what_cannot_be_read_is_left_out_with_a_warning(self, folder, encoder, tmp_path):
        shutil.copytree(folder, tmp_path / "images")
        (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
        with pytest.warns(UserWarning, match=r"1 of 13 images could not be read: see .*skipped.csv"):
            catalog = simsearch.build_catalog(encoder, tmp_path / "images", tmp_path / "out", workers=0)
        assert len(catalog) == N
        (tmp_path / "one").mkdir()
        shutil.copy(next(folder.rglob("*.png")), tmp_path / "one")
        with pytest.raises(ValueError, match="the new one would have 1"):
            simsearch.build_catalog(encoder, tmp_path / "one", tmp_path / "out", workers=0)
        with pytest.raises(ValueError, match="does not fit"):
            simsearch.build_catalog(encoder, folder, tmp_path / "codes", index="BFlat", workers=0)
        assert not (tmp_path / "codes").exists()


class TestThreads:
    """What another thread does in between happens here inside a call."""

    @pytest.fixture
    def opened(self, catalog, tmp_path) -> api.OpenCatalog:
        return simsearch.open_catalog(shutil.copytree(catalog.folder, tmp_path / "c"))

    def test_a_search_sees_one_version(self, opened, monkeypatch):
        query, recommend = opened.ids[-1], Engine.recommend
        expected = opened.search(query, k=5)

        def interrupted(engine, request):
            found = recommend(engine, request)
            monkeypatch.undo()
            opened.remove(opened.ids[:4])
            return found

        monkeypatch.setattr(Engine, "recommend", interrupted)
        answer = opened.search(query, k=5)
        assert len(opened) == N - 4
        assert (answer.ids, answer.pictures) == (expected.ids, expected.pictures)

    def test_the_later_of_two_changes_stays_open(self, opened, monkeypatch):
        """One thread has read its version when the other changes the catalog again."""
        read, has_read, done = api.read_catalog, threading.Event(), threading.Event()

        def slow(*given, **named):
            found = read(*given, **named)
            if not has_read.is_set():
                has_read.set()
                done.wait(1)
            return found

        monkeypatch.setattr(api, "read_catalog", slow)
        ids = opened.ids
        other = threading.Thread(target=opened.remove, args=(ids[0],))
        other.start()
        assert has_read.wait(60)
        opened.remove(ids[1])
        done.set()
        other.join()
        assert len(opened) == N - 2

    def test_each_search_has_its_own_re_ranking(self, opened, monkeypatch):
        query, own, other = opened.ids[-1], AlphaQE(3), CSLS(2)
        expected = opened.search(query, k=N, rerank=own).ids
        assert opened.search(query, k=N, rerank=other).ids != expected

        def interrupted(catalog, name, value):
            object.__setattr__(catalog, name, value)
            if name == "_reranked" and value[0] is own:
                catalog.search(query, rerank=other)

        monkeypatch.setattr(api.OpenCatalog, "__setattr__", interrupted)
        assert opened.search(query, k=N, rerank=own).ids == expected

    def test_no_re_ranking_of_an_old_version_stays(self, opened, monkeypatch):
        (gone, *_, query), own = opened.ids, AlphaQE(3)

        def interrupted(catalog, rerank):
            engine = Engine(catalog, rerank)
            monkeypatch.undo()
            opened.remove(gone)
            return engine

        monkeypatch.setattr(api, "Engine", interrupted)
        assert gone in opened.search(query, k=N, rerank=own).ids
        assert gone not in opened.search(query, k=N, rerank=own).ids


# ---------------------------------------------------------------------------------------------- encoders


class TestEncoder:
    def test_describes_in_the_order_given(self, encoder, folder):
        paths = sorted(folder.rglob("*.png"))[::-1]
        vectors = encoder.describe([*paths, paths[0]], batch_size=5)
        for path, vector in zip([*paths, paths[0]], vectors, strict=True):
            image = read_image(path, size=32)
            torch.testing.assert_close(vector, encoder.encoder.embed(image[None])[0], rtol=0, atol=1e-5)
        assert "of toy: " in repr(encoder)

    def test_names_what_it_cannot_read(self, encoder, folder, tmp_path):
        with pytest.raises(simsearch.ImageError, match=r"none\.jpg: missing"):
            encoder.describe([next(folder.rglob("*.png")), tmp_path / "none.jpg"])
        with pytest.raises(ValueError, match="there is no image"):
            encoder.describe([])

    def test_of_a_run_gives_what_its_catalog_holds(self, small_run):
        encoder = simsearch.load_encoder(small_run)
        catalog = simsearch.open_catalog(small_run)
        query = small_run / "figures/queries/00.png"
        vector = encoder.describe(query)
        torch.testing.assert_close(vector, catalog.encoder.describe(query), rtol=0, atol=1e-6)
        assert encoder.dimension == vector.shape[1] == 16
        assert catalog.search(query, k=1).scores[0] == pytest.approx(1, abs=1e-4)
        with pytest.raises(simsearch.RunError, match="is not a run directory"):
            simsearch.load_encoder(small_run / "catalog")

    def test_of_a_hostile_run_is_refused(self, small_run, tmp_path):
        shutil.copytree(small_run, tmp_path / "run", symlinks=True)
        config = (tmp_path / "run/config.yaml").read_text()
        target = "simsearch.models.frozen.FrozenRetriever"
        assert target in config
        (tmp_path / "run/config.yaml").write_text(config.replace(target, "os.system"))
        with pytest.raises(simsearch.Untrusted, match="trust=true"):
            simsearch.load_encoder(tmp_path / "run")

    def test_build_calls_what_the_table_has(self):
        node = {"_target_": "simsearch.models.pooling.GeM", "p": 2.0}
        assert build(node, ENCODERS).p == 2.0
        for bad in (
            "os.system",
            "simsearch.files.write_json",
            "simsearch.models.backbones.torch.hub.load",
            None,
            ["x"],
        ):
            for place in (node | {"_target_": bad}, {"a": [node | {"_target_": bad}]}, node | {"p": {"_target_": bad}}):
                with pytest.raises(Untrusted, match="trust=true"):
                    build(place, ENCODERS)

    def test_build_names_the_node_that_is_wrong(self):
        with pytest.raises(ValueError, match=r"^pooling: GeM's p must be positive, got -1"):
            build(MODEL | {"pooling": {"_target_": "simsearch.models.pooling.GeM", "p": -1}}, ENCODERS)
        with pytest.raises(ValueError, match=r"^pooling: .*unexpected keyword argument 'q'"):
            build(MODEL | {"pooling": {"_target_": "simsearch.models.pooling.GeM", "q": 1}}, ENCODERS)
        with pytest.raises(simsearch.WeightsError, match=r"^backbone: no weights at nowhere"):
            build(MODEL | {"backbone": MODEL["backbone"] | {"weights": "nowhere"}}, ENCODERS)

    def test_a_trusted_config_may_call_anything_and_be_partial(self):
        made = build({"_target_": "types.SimpleNamespace", "a": [1, {"b": 2}], "_args_": []}, None)
        assert made.a == [1, {"b": 2}]
        later = build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}, None)
        assert later.keywords == {"lr": 0.5}
        assert build({"_target_": "pathlib.Path.cwd"}, None) == Path.cwd()
        with pytest.raises(ValueError, match=r"nowhere\.Nothing does not exist"):
            build({"_target_": "nowhere.Nothing"}, None)

    def test_weights_that_are_loaded_over_are_not_hashed(self, monkeypatch):
        monkeypatch.setattr("simsearch.models.backbones.state_fingerprint", lambda _: pytest.fail("hashed"))
        build_encoder({"model": MODEL})

    def test_a_network_s_hash_is_of_the_weights_before_they_train(self):
        from functools import partial

        from simsearch.losses.dsh import DSHLoss
        from simsearch.models.trained import TrainedRetriever

        network = build(CODES, ENCODERS)
        before = state_fingerprint(network.backbone.network)[:32]
        model = TrainedRetriever(network, DSHLoss(), partial(torch.optim.SGD, lr=0.1))
        with torch.no_grad():
            next(network.backbone.parameters()).add_(1)
        assert model.provenance["sha256"] == before


# -------------------------------------------------------------------------------------------- evaluation


def naive(query, labels, gallery, others, *, exclude_self=False):
    """AP and P@3 of each query by loops; no ties."""
    ap, precision = [], []
    for i, vector in enumerate(query):
        cosines = [v @ vector / np.linalg.norm(v) / np.linalg.norm(vector) for v in gallery]
        order = [j for j in np.argsort(-np.array(cosines)) if not (exclude_self and i == j)]
        right = [others[j] == labels[i] and labels[i] is not None for j in order]
        found = [sum(right[: n + 1]) / (n + 1) for n, ok in enumerate(right) if ok]
        ap.append(np.mean(found) if found else np.nan)
        precision.append(np.mean(right[:3]) if found else np.nan)
    return ap, precision


class TestEvaluate:
    rng = np.random.default_rng(2)
    query, gallery = rng.normal(size=(9, 5)), rng.normal(size=(30, 5))
    labels = ("a", "b", None, "c", "a", "b", "x", "c", "a")
    others = tuple("abc"[i % 3] for i in range(30))

    @pytest.mark.parametrize("form", [np.asarray, torch.as_tensor, lambda v: v.tolist(), lambda v: 7 * v])
    def test_equals_loops(self, form):
        report = simsearch.evaluate(form(self.query), self.labels, form(self.gallery), self.others, ks=(1, 3))
        ap, precision = naive(self.query, self.labels, self.gallery, self.others)
        np.testing.assert_allclose(report.per_query["AP"].numpy(), ap, atol=1e-6)
        assert report["mAP"] == pytest.approx(np.nanmean(ap), abs=1e-6)
        assert report["P@3"] == pytest.approx(np.nanmean(precision), abs=1e-6)
        assert report.without_relevant == 2
        low, high = report.intervals["mAP"]
        assert low < report["mAP"] < high

    @pytest.mark.parametrize("wrapped", [np.int64, np.float32, torch.tensor, np.array])
    def test_labels_of_arrays_are_those_of_plain_numbers(self, wrapped):
        """Unknown ones equal none, and equal ones each other, also in a list or an array of objects."""
        queries, items = [i % 4 - 1 for i in range(9)], [i % 4 - 1 for i in range(30)]
        plain = simsearch.evaluate(self.query, queries, self.gallery, items, ks=(1,))
        own, others = [wrapped(label) for label in queries], [wrapped(label) for label in items]
        assert simsearch.evaluate(self.query, own, self.gallery, others, ks=(1,)).metrics == plain.metrics
        objects = np.empty(9, dtype=object)
        objects[:] = own
        assert simsearch.evaluate(self.query, objects, self.gallery, items, ks=(1,)).metrics == plain.metrics
        assert plain.without_relevant == 3

    def test_leaves_a_query_out_of_its_own_ranking(self):
        report = simsearch.evaluate(self.gallery, self.others, self.gallery, self.others, ks=(3,), exclude_self=True)
        ap, _ = naive(self.gallery, self.others, self.gallery, self.others, exclude_self=True)
        assert report["mAP"] == pytest.approx(np.mean(ap), abs=1e-6)
        assert simsearch.evaluate(self.gallery, self.others, self.gallery, self.others, ks=(1,))["P@1"] == 1
        with pytest.raises(ValueError, match="9 queries and 30 items"):
            simsearch.evaluate(self.query, self.labels, self.gallery, self.others, exclude_self=True)

    def test_codes_of_either_form(self):
        labels, others = np.arange(9) % 3, np.arange(30) % 3
        bits = [np.where(part > 0, 1, 0).astype(np.uint8) for part in (self.query, self.gallery)]
        packed = [np.packbits(part, axis=1, bitorder="little") for part in bits]
        report = simsearch.evaluate(packed[0], labels, packed[1], others, bits=5, ks=(1,))
        for query, gallery in ((self.query, self.gallery), bits, [part == 1 for part in bits]):
            assert simsearch.evaluate(query, labels, gallery, others, bits=5, ks=(1,)).metrics == report.metrics
        distance = (bits[0][:, None] != bits[1][None]).sum(2)
        expected = []  # P@1 in expectation over ties
        for row, label in zip(distance, labels, strict=True):
            nearest = others[row == row.min()]
            expected.append(np.mean(nearest == label))
        assert report["P@1"] == pytest.approx(np.mean(expected))

    def test_intervals_are_over_units(self):
        args = (self.gallery, self.others, self.gallery, self.others)
        each = simsearch.evaluate(*args, exclude_self=True, ks=(1,))
        units = simsearch.evaluate(*args, exclude_self=True, ks=(1,), units=["xyz"[i // 10] for i in range(30)])
        assert each.metrics == units.metrics
        assert each.intervals != units.intervals
        assert (each.units, units.units) == (30, 3)

    def test_what_is_missing_in_a_table_of_pandas_is_unknown(self):
        pandas = pytest.importorskip("pandas")
        plain = simsearch.evaluate(self.query, self.labels, self.gallery, [*self.others[:29], None], ks=(1,))
        for kind in ("string", "category", object):
            labels, others = (
                pandas.Series(list(values), dtype=kind) for values in (self.labels, [*self.others[:29], pandas.NA])
            )
            assert simsearch.evaluate(self.query, labels, self.gallery, others, ks=(1,)).metrics == plain.metrics

    @pytest.mark.parametrize("missing", [None, np.nan])
    def test_a_query_of_no_known_unit_is_one_of_its_own(self, missing):
        args = (self.query, self.labels, self.gallery, self.others)
        named = simsearch.evaluate(*args, ks=(1,), units=[-1, -1, -2, -2, "a", "b", "c", "d", "e"])
        found = simsearch.evaluate(*args, ks=(1,), units=[-1, -1, -2, -2, *[missing] * 5])
        assert found.units == named.units == 7
        assert found.intervals == named.intervals

    def test_shows_itself(self):
        report = simsearch.evaluate(self.query, self.labels, self.gallery, self.others, ks=(1,))
        assert f"{report['mAP']:.4f}" in str(report)
        assert f"<td>{report['mAP']:.4f}</td>" in report._repr_html_()
        assert report.to_arrow()["metric"].to_pylist()[0] == "mAP"

    def test_mistakes_are_named(self):
        column = [[label] for label in self.labels]
        for arguments, message in (
            ((self.query, column, self.gallery, self.others), r"query_labels must be numbers or texts, .*got \['a'\]"),
            ((self.query, self.labels, 1e30 * self.gallery, self.others), "gallery_vectors have a norm of"),
            ((self.query, self.labels, self.gallery[:, :4], self.others), "5 columns, but gallery_vectors have 4"),
            (
                (self.query, self.labels[:3], self.gallery, self.others),
                "query_labels must have one value for each of the 9",
            ),
            ((self.query, ["?"] * 9, self.gallery, self.others), "no query has a relevant item"),
            ((self.query[0], self.labels, self.gallery, self.others), r"query_vectors must be \(N, D\)"),
            ((self.query * np.nan, self.labels, self.gallery, self.others), "query_vectors hold NaN"),
        ):
            with pytest.raises(ValueError, match=message):
                simsearch.evaluate(*arguments)
        with pytest.raises(ValueError, match=r"packed, uint8 \(N, 2\), or real \(N, 9\)"):
            simsearch.evaluate(self.query, self.labels, self.gallery, self.others, bits=9)


# ------------------------------------------------------------------------------------------ the package


def test_hydra_is_not_needed(catalog, folder):
    code = (
        "import sys, simsearch\n"
        "class Missing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'hydra': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"catalog = simsearch.open_catalog({str(catalog.folder)!r})\n"
        f"print(catalog.search({str(next(folder.rglob('*.png')))!r}, k=3).scores[0])\n"
        "from simsearch import saved_run, load_encoder, build_catalog, evaluate\n"
        "print('hydra' in sys.modules)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) == pytest.approx(1, abs=1e-4)
    assert out[1] == "False"


def test_names_are_there_and_no_others():
    for name in simsearch.__all__:
        assert getattr(simsearch, name).__name__ == name
        assert name in dir(simsearch)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = simsearch.nothing
    errors = {name for name in simsearch.__all__ if name.endswith("Error") or name == "Untrusted"}
    assert all(issubclass(getattr(simsearch, name), simsearch.SimsearchError) for name in errors)


def test_the_examples_run(small_run, tmp_path, monkeypatch):
    (tmp_path / "outputs").mkdir()
    shutil.copytree(small_run, tmp_path / "outputs/run", symlinks=True)
    (tmp_path / "folder").mkdir()
    for name, picture in zip(("photo", "a", "b", "c", "d", "e"), pictures(6, side=64), strict=True):
        Image.fromarray(picture).save(tmp_path / f"{name}.jpg")
        Image.fromarray(picture).save(tmp_path / f"folder/{name}.jpg")
    lines = ["path,artist", *(f"{name}.jpg,Claude Monet" for name in "ab"), *(f"{name}.jpg,x" for name in "cde")]
    (tmp_path / "folder/art.csv").write_text("\n".join(lines))
    simsearch.build_catalog(loaded(), tmp_path / "folder/art.csv", tmp_path / "outputs/art-catalog", workers=0)
    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    count, names = 0, {"simsearch": simsearch, "evaluate": simsearch.evaluate}
    for name in ("LoadedEncoder", "OpenCatalog", "build_catalog", "evaluate"):
        for test in finder.find(getattr(api, name), name, globs=names):
            count += len(test.examples)
            assert not runner.run(test).failed, test.name
    assert count >= 8


def test_weights_of_a_run_s_catalog_come_from_the_catalog(tmp_path, folder):
    """A catalog opens where the file of its backbone's weights is gone."""
    weights = tmp_path / "w.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    model = MODEL | {"backbone": MODEL["backbone"] | {"weights": str(weights)}}
    encoder = api.LoadedEncoder(build(model, ENCODERS).eval().requires_grad_(False), {"model": model}, "toy")
    made = simsearch.build_catalog(encoder, folder, tmp_path / "c", workers=0)
    weights.unlink()
    path = folder / made.items["path"][0].as_py()
    torch.testing.assert_close(simsearch.open_catalog(tmp_path / "c").encoder.describe(path), encoder.describe(path))


def test_a_file_comes_before_an_item_of_its_name(catalog, encoder, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, other = (catalog.items["path"][row].as_py() for row in (0, 5))
    assert catalog.search(own, k=1).query == (catalog.ids[0],)  # the item itself, which is left out
    Path(own).parent.mkdir(parents=True)
    shutil.copy(folder / other, own)
    assert catalog.search(own, k=1).ids == [catalog.ids[5]]
