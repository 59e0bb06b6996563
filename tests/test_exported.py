"""Catalogs that are queried by an exported encoder: the same answers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import simsearch as command
from PIL import Image
from safetensors.torch import load_file, save_file

import simsearch
from simsearch import CatalogError, Untrusted, api
from simsearch.commands.serve import find_sources
from simsearch.files import digests
from simsearch.models.encoder import build_encoder
from simsearch.search.catalog import read_catalog
from simsearch.serving.backend_choice import choose_runtime
from simsearch.serving.library import Library, Source
from simsearch.serving.limits import Limits

N = 10


def model(size: int = 64) -> dict:
    backbone = {"_target_": "simsearch.models.backbones.timm_backbone", "name": "test_resnet", "weights": "random"}
    return {
        "_target_": "simsearch.models.frozen.FrozenRetriever", "backbone": {**backbone, "size": size},
        "pooling": {"_target_": "simsearch.models.pooling.RMAC", "levels": 2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    small = torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 255
    for i, image in enumerate(torch.nn.functional.interpolate(small, (48, 48), mode="bilinear")):
        Image.fromarray(image.permute(1, 2, 0).to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return folder


def catalog_of(images: Path, out: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    encoder = api.LoadedEncoder(build_encoder({"model": model()}), {"model": model()}, "toy")
    simsearch.build_catalog(encoder, images, out, workers=0)
    return out


@pytest.fixture(scope="module")
def catalog(images, tmp_path_factory) -> Path:
    return catalog_of(images, tmp_path_factory.mktemp("catalogs") / "own", 5)


@pytest.fixture(scope="module")
def exported(catalog, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simsearch.commands.export.speed", lambda describe, image, batch: 1.0)
        command("export", f"catalog={catalog}", f"out={folder}", "k=3")
    return folder


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copied"))


def change(folder: Path, **entries: object) -> None:
    """Changes encoder.json as somebody would who computes the digests anew."""
    about = json.loads((folder / "encoder.json").read_text()) | entries
    about.pop("checksum", None)
    names = [name for name in about["sha256"] if (folder / name).is_file()]
    (folder / "encoder.json").write_text(json.dumps(about | {"sha256": digests(folder, names)}))


def test_answers_are_those_of_the_catalogs_own_encoder(catalog, exported, images):
    own, other = simsearch.open_catalog(catalog), simsearch.open_catalog(catalog, encoder=exported)
    for i in range(3):
        query = np.array(Image.open(images / f"{i}.png").rotate(8))
        one, two = own.search(query, k=5), other.search(query, k=5)
        assert one.ids == two.ids
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)
    encoder = other.encoder
    assert (encoder.dimension, encoder.bits) == (own.encoder.dimension, None)
    assert other._catalog.encoder.input_size == 64
    assert not list(other._catalog.encoder.parameters())


def test_the_catalogs_own_encoder_is_not_built(catalog, exported, images, monkeypatch):
    monkeypatch.setattr("simsearch.search.encoder_files.build_encoder", lambda *_, **__: pytest.fail("it is built"))
    assert len(simsearch.open_catalog(catalog, encoder=exported).search(images / "0.png", k=2)) == 2


def test_another_encoders_export_is_refused_before_a_query(catalog, exported, images, tmp_path):
    other = catalog_of(images, tmp_path / "other", 6)
    with pytest.raises(CatalogError, match=r"exported from encoder [0-9a-f]{16}, the catalog .*other was filled by"):
        simsearch.open_catalog(other, encoder=exported)
    done = command("recommend", f"catalog={other}", "id=0.png", f"encoder={exported}", expect=1)
    assert "Export its own: simsearch export catalog=" in done.stderr
    assert done.stderr.count("\n") == 1
    with pytest.raises(CatalogError, match=r"no exported encoder in .*nothing .*simsearch export catalog"):
        simsearch.open_catalog(catalog, encoder=tmp_path / "nothing")


def test_files_that_describe_otherwise_here_are_refused(catalog, copied, images):
    samples = load_file(copied / "samples.safetensors")
    vector = samples["vectors"][1]
    aside = torch.linalg.qr(torch.stack([vector, torch.ones(len(vector))], dim=1)).Q[:, 1]  # orthogonal to it
    samples["vectors"][1] = torch.nn.functional.normalize(vector + 0.02 * aside, dim=0)  # a cosine of .9998
    save_file(samples, copied / "samples.safetensors")
    change(copied)
    with pytest.raises(CatalogError, match=r"other descriptors here than torch .* the cosine of one image is 0\.99"):
        simsearch.open_catalog(catalog, encoder=copied).search(images / "0.png")
    change(copied, sha256={})
    with pytest.raises(CatalogError, match=r"no samples\.safetensors .*export the encoder again"):
        simsearch.open_catalog(catalog, encoder=copied).search(images / "0.png")


def test_damage_is_named(catalog, copied, images):
    data = bytearray((copied / "content.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "content.onnx").write_bytes(data)
    with pytest.raises(CatalogError, match=r"content\.onnx is damaged or belongs to another folder"):
        simsearch.open_catalog(catalog, encoder=copied).search(images / "0.png")
    (copied / "content.onnx").write_bytes(b"no network")
    change(copied)
    with pytest.raises(CatalogError, match=r"content\.onnx is no ONNX file"):
        simsearch.open_catalog(catalog, encoder=copied).search(images / "0.png")
    change(copied, parts={"content": {"start": 0}})
    with pytest.raises(CatalogError, match=r"encoder\.json is damaged"):
        simsearch.open_catalog(catalog, encoder=copied).search(images / "0.png")


def test_nothing_outside_the_folder_is_read(catalog, exported, copied, images):
    about = json.loads((copied / "encoder.json").read_text())
    parts = json.loads(json.dumps(about["parts"]).replace("content.onnx", f"../{exported.name}/content.onnx"))
    change(copied, parts=parts)
    with pytest.raises(CatalogError, match="which is not in the folder"):
        simsearch.open_catalog(catalog, encoder=copied).search(images / "0.png")
    change(copied, parts=about["parts"])
    network = onnx.load(copied / "content.onnx")
    onnx.save(network, copied / "content.onnx", save_as_external_data=True, location="beside", size_threshold=0)
    change(copied)
    with pytest.raises(CatalogError, match="keeps tensors in another file"):
        simsearch.open_catalog(catalog, encoder=copied).search(images / "0.png")
    (copied / "content.onnx").unlink()
    (copied / "content.onnx").symlink_to(exported / "content.onnx")
    with pytest.raises(Untrusted, match="leads out of the folder"):
        simsearch.open_catalog(catalog, encoder=copied)


def test_no_catalog_is_made_by_exported_files(catalog, exported, images, tmp_path):
    encoder = simsearch.open_catalog(catalog, encoder=exported).encoder
    assert encoder.describe(images / "0.png").shape == (1, encoder.dimension)
    with pytest.raises(ValueError, match=r"exported files are not: give one of load_encoder"):
        simsearch.build_catalog(encoder, images, tmp_path / "made")


def test_a_server_takes_one_export_for_all_catalogs_or_one_each(catalog, exported, images):
    assert find_sources(str(catalog), None, str(exported)) == {"own": Source(catalog, None, exported)}
    named = find_sources({"a": catalog, "b": catalog}, None, {"b": str(exported)})
    assert named == {"a": Source(catalog), "b": Source(catalog, None, exported)}
    with pytest.raises(ValueError, match="encoder names c, which is not a catalog here"):
        find_sources({"a": catalog}, None, {"c": str(exported)})
    with pytest.raises(ValueError, match=r"encoder=.*absent is not a folder"):
        find_sources(str(catalog), None, f"{exported}/absent")
    library = Library(named, device=torch.device("cpu"), limits=Limits(), runtime="auto")
    try:
        image = torch.from_numpy(np.array(Image.open(images / "1.png").resize((64, 64)))).permute(2, 0, 1)
        with library.lease("a") as a, library.lease("b") as b:
            assert a.worker is not b.worker
            assert str(exported) in b.runtime.reason
            assert not b.explains
            torch.testing.assert_close(
                a.worker.describe(image).result(), b.worker.describe(image).result(), rtol=0, atol=1e-5
            )
    finally:
        library.close()


def test_exported_files_do_not_run_on_torch(catalog, exported):
    encoder = read_catalog(catalog, exported=exported).encoder
    assert choose_runtime(encoder, 4, "onnx").runtime == "onnx"
    with pytest.raises(ValueError, match=r"runtime=torch: the files .* run in ONNX Runtime alone"):
        choose_runtime(encoder, 4, "torch")
