"""Catalogs: whole or not at all, nothing but tensors and plain values, one encoder; and the engine on them."""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from simsearch.functional.codes import pack_codes
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.backbones import timm_backbone
from simsearch.models.frozen import FrozenRetriever, Whitening
from simsearch.models.pooling import RMAC, Average, GeM
from simsearch.search import describe, encoder_files, writing
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.describe import encode
from simsearch.search.encoder_files import encoder_fingerprint, load_tensors
from simsearch.search.engine import Engine
from simsearch.search.errors import CatalogError
from simsearch.search.item_tables import item_table
from simsearch.search.writing import write_catalog

N = 40


class Given:
    """A binariser with fixed directions."""

    bits = 12

    def fit(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("not fitted here")


def encoder(pooling: nn.Module | None = None, *, size: int = 32, **arguments) -> FrozenRetriever:
    """An encoder of fixed weights, its whitening and codes filled."""
    torch.manual_seed(1)
    backbone = timm_backbone("test_resnet", weights="random", size=size, runtime="torch")
    backbone.provenance["sha256"] = "fixed"
    model = FrozenRetriever(backbone, pooling or GeM(), **arguments).eval()
    for name, value in model.state_dict().items():
        if not name.startswith(("backbone.", "head.pooling")):
            nn.init.normal_(value)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(N, 3, 4, 4, generator=generator) * 255, (32, 32), mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def model() -> FrozenRetriever:
    return encoder(whitening=Whitening(8))


def table(n: int, mark: str = "") -> pa.Table:
    columns = {"path": [f"{mark}{i}.jpg" for i in range(n)], "artist": [None if i % 7 == 0 else "x" for i in range(n)]}
    return item_table(columns, [f"{mark} thumbnail {i}".encode() for i in range(n)])


def filled(model: FrozenRetriever, images: Tensor) -> FaissIndex:
    index = FaissIndex("Flat" if model.bits is None else "BFlat")
    index.add(encode(model, images))
    return index


@pytest.fixture
def write(model, images, tmp_path) -> Callable[..., Path]:
    def write(folder: Path = tmp_path / "c", mark: str = "", **about) -> Path:
        items = table(N, mark)
        config = {"model": {"scales": [1.0]}}
        write_catalog(folder, index=filled(model, images), items=items, encoder=model, config=config, about=about)
        return folder

    return write


class TestWriting:
    def test_round_trip(self, write, model, images):
        catalog = read_catalog(write(skipped={"truncated": 2}))
        assert len(catalog) == N
        assert catalog.items.column_names == ["path", "artist"]
        assert catalog.items.to_pydict() == table(N).drop_columns(["thumbnail"]).to_pydict()
        assert catalog.about["skipped"] == {"truncated": 2}
        assert catalog.about["items"] == N
        assert catalog.about["bytes_per_item"] == 32
        assert catalog.about["config"] == {"model": {"scales": [1.0]}}
        assert catalog.about["backbone"] == model.backbone.provenance
        assert catalog.about["encoder_fingerprint"] == encoder_fingerprint(model)
        assert torch.equal(catalog.index.reconstruct(), encode(model, images))

    def test_holds_tensors_and_plain_values_only(self, write, model):
        folder = write()
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        assert files == [
            "catalog.json",
            "encoder.safetensors",
            "segments/1/index/index.faiss",
            "segments/1/index/index.json",
            "segments/1/items.arrow",
            "segments/1/segment.json",
            "segments/1/thumbnails.parquet",
        ]
        for path in folder.rglob("*"):
            if path.is_file():
                assert not zipfile.is_zipfile(path)
                with pytest.raises((ValueError, UnicodeDecodeError, IndexError, OverflowError)):
                    list(pickletools.genops(path.read_bytes()))
        with safe_open(folder / "encoder.safetensors", "pt") as file:
            assert set(file.keys()) == set(model.state_dict())

    def test_replaces_a_catalog_and_leaves_nothing_beside_it(self, write, tmp_path):
        write(mark="old")
        folder = write(mark="new")
        assert read_catalog(folder).items["path"][3].as_py() == "new3.jpg"
        assert read_catalog(folder).thumbnails([3]) == [b"new thumbnail 3"]
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    @pytest.mark.parametrize(
        ("module", "place"),
        [
            (pq, "ParquetWriter"),
            (writing, "write_json"),
            (encoder_files, "save"),
            (encoder_files, "encoder_fingerprint"),
        ],
    )
    def test_a_failure_while_writing_leaves_the_old_one(self, module, place, write, tmp_path, monkeypatch):
        folder = write(mark="old")

        def fail(*_: object, **__: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(module, place, fail)
        with pytest.raises(OSError, match="no space"):
            write(mark="new")
        with pytest.raises(OSError, match="no space"):
            write(tmp_path / "other")
        monkeypatch.undo()
        assert read_catalog(folder).items["path"][0].as_py() == "old0.jpg"
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def test_a_failure_of_the_last_move_brings_the_old_one_back(self, write, tmp_path, monkeypatch):
        folder = write(mark="old")
        real = os.replace

        def fail(source: Path, target: Path) -> None:
            if (
                Path(target) == folder
                and (Path(source) / "segments/1/items.arrow").is_file()
                and "-old" not in str(source)
            ):
                raise OSError("device gone")
            real(source, target)

        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr("simsearch.files._exchanged", lambda *_: False)  # a file system that cannot exchange
        with pytest.raises(OSError, match="device gone"):
            write(mark="new")
        assert read_catalog(folder).items["path"][0].as_py() == "old0.jpg"
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def test_what_is_no_catalog_is_not_replaced(self, write, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.txt").write_text("years")
        (tmp_path / "file").write_text("text")
        for name in ("mine", "file"):
            with pytest.raises(FileExistsError, match="give another out="):
                write(tmp_path / name)
        assert (tmp_path / "mine/thesis.txt").read_text() == "years"
        assert (tmp_path / "file").read_text() == "text"
        (tmp_path / "empty").mkdir()
        assert len(read_catalog(write(tmp_path / "empty"))) == N

    def test_through_a_link(self, write, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "latest").symlink_to(tmp_path / "real")
        for mark in ("old", "new"):
            write(tmp_path / "latest", mark=mark)
        assert (tmp_path / "latest").is_symlink()
        assert read_catalog(tmp_path / "real").items["path"][0].as_py() == "new0.jpg"

    def test_items_and_index_must_agree(self, model, images, tmp_path):
        with pytest.raises(ValueError, match=f"the index holds {N} items, the table {N - 1}"):
            write_catalog(
                tmp_path / "c", index=filled(model, images), items=table(N - 1), encoder=model, config={}, about={}
            )
        assert not list(tmp_path.iterdir())


class TestReading:
    def test_thumbnails_come_by_position_and_in_part(self, model, tmp_path, monkeypatch):
        n = 2500
        index = FaissIndex("Flat")
        index.add(torch.randn(n, 8, generator=torch.Generator().manual_seed(0)))
        write_catalog(tmp_path / "c", index=index, items=table(n), encoder=model, config={}, about={})
        catalog = read_catalog(tmp_path / "c")
        groups = []
        real = pq.ParquetFile.read_row_group

        def counting(self: pq.ParquetFile, group: int, **arguments) -> pa.Table:
            groups.append(group)
            return real(self, group, **arguments)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
        positions = [2499, 0, 1023, 1024, 5, 0, 2047, 2048]
        assert catalog.thumbnails(positions) == [f" thumbnail {p}".encode() for p in positions]
        assert sorted(groups) == [0, 1, 2]
        groups.clear()
        assert catalog.thumbnails([1500, 1501]) == [b" thumbnail 1500", b" thumbnail 1501"]
        assert groups == [1]
        assert catalog.thumbnails([]) == []

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda c: (c / "catalog.json").unlink(), "no catalog in .* make one by `simsearch index"),
            (lambda c: (c / "catalog.json").write_text('{"format": 1'), "is damaged .*is not JSON"),
            (lambda c: (c / "catalog.json").write_text("[1]"), "is damaged .*is not a mapping"),
            (
                lambda c: (c / "catalog.json").write_text('{"format": 9}'),
                "catalog format 9, this version reads 1 and",
            ),
            (
                lambda c: (c / "catalog.json").write_text('{"format": 1}'),
                "does not have backbone, config, encoder_fingerprint",
            ),
            (lambda c: (c / "segments/1/items.arrow").unlink(), "is damaged"),
            (lambda c: (c / "segments/1/items.arrow").write_bytes(b"ARROW1"), "is damaged"),
            (lambda c: (c / "segments/1/segment.json").write_text("{}"), "is damaged"),
            (lambda c: (c / "segments/1/index/index.faiss").unlink(), "is damaged"),
            (lambda c: (c / "segments/1/index/index.json").write_text("{}"), "is damaged"),
            (
                lambda c: pq.write_table(table(3), c / "segments/1/thumbnails.parquet"),
                "thumbnails.parquet is damaged or belongs to another catalog",
            ),
        ],
    )
    def test_damage_is_named(self, damage, message, write):
        folder = write()
        damage(folder)
        with pytest.raises(CatalogError, match=message):
            read_catalog(folder)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(CatalogError, match=r"no catalog in .*none"):
            read_catalog(tmp_path / "none")


class TestEncoder:
    def test_fingerprint_is_the_same_for_the_same_encoder(self, model):
        assert encoder_fingerprint(model) == encoder_fingerprint(encoder(whitening=Whitening(8)))
        assert len(encoder_fingerprint(model)) == 16

    def test_fingerprint_sees_every_tensor(self):
        model = encoder(whitening=Whitening(16), binarizer=Given())
        seen = {encoder_fingerprint(model)}
        state = model.state_dict()
        kinds = [next(n for n in state if n.startswith("backbone.") and n.endswith(end)) for end in ("weight", "var")]
        kinds += ["head.pooling.p", "head.whitening.mean", "head.whitening.projection", "code_weight", "code_bias"]
        for name in kinds:
            state[name][(-1,) * state[name].ndim] += 0.25
            seen.add(encoder_fingerprint(model))
        assert len(seen) == len(kinds) + 1

    def test_fingerprint_sees_settings(self):
        models = [
            encoder(), encoder(GeM(p=2.5)), encoder(Average()),
            encoder(RMAC(levels=1)), encoder(RMAC(levels=2), size=64),
            encoder(RMAC(levels=2), size=64, whiten_regions=False), encoder(scales=(1.0, 2.0)), encoder(scales=(2.0,)),
            encoder(size=64, scales=(1.0, 2.0)),
        ]  # fmt: skip
        assert len({encoder_fingerprint(model) for model in models}) == len(models)

    def test_its_tensors_bring_another_to_the_same_descriptors(self, write, model, images):
        catalog = read_catalog(write())
        blank = encoder(whitening=Whitening(8))
        for value in blank.state_dict().values():
            value.zero_()
        blank.backbone.provenance = {"sha256": "of random weights"}
        assert encoder_fingerprint(blank) != catalog.about["encoder_fingerprint"]
        load_tensors(catalog.folder, catalog.about, blank)
        assert torch.equal(blank.embed(images[:4]), model.embed(images[:4]))
        assert blank.backbone.provenance == model.backbone.provenance

    def test_another_encoder_is_refused(self, write, model):
        catalog = read_catalog(write())
        other = encoder(GeM(p=4), whitening=Whitening(8))
        about = catalog.about | {"encoder_fingerprint": encoder_fingerprint(other)}
        with pytest.raises(CatalogError, match=encoder_fingerprint(other)) as error:
            load_tensors(catalog.folder, about, encoder(whitening=Whitening(8)))
        assert encoder_fingerprint(model) in str(error.value)
        assert "Search with the catalog's own encoder" in str(error.value)
        with pytest.raises(CatalogError, match="cannot load the encoder"):
            load_tensors(catalog.folder, catalog.about, encoder(whitening=Whitening(9)))
        load_tensors(catalog.folder, catalog.about, other)  # p comes with the tensors: it is the catalog's encoder now
        with pytest.raises(CatalogError, match="cannot be compared"):
            load_tensors(catalog.folder, catalog.about, encoder(whitening=Whitening(8), scales=(2.0,)))

    @pytest.mark.parametrize("damage", [Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:1000])])
    def test_damaged_tensors(self, damage, write):
        folder = write()
        damage(folder / "encoder.safetensors")
        with pytest.raises(CatalogError, match="cannot load the encoder of"):
            load_tensors(folder, read_catalog(folder).about, encoder(whitening=Whitening(8)))


def opened(model: FrozenRetriever, images: Tensor, folder: Path) -> Catalog:
    write_catalog(folder, index=filled(model, images), items=table(N), encoder=model, config={}, about={})
    return read_catalog(folder)


class TestEngine:
    def test_floats_equal_brute_force(self, model, images, tmp_path):
        engine = Engine(opened(model, images, tmp_path / "c"))
        queries = images[[3, 17]].roll(2, dims=3)
        found = engine.nearest(encode(model, queries), 7)
        scores = model.embed(queries).double() @ model.embed(images).double().T
        assert torch.equal(found.ids, scores.argsort(descending=True)[:, :7])
        torch.testing.assert_close(found.scores.double(), scores.sort(descending=True).values[:, :7], rtol=0, atol=1e-5)
        assert engine.nearest(encode(model, images[5:6]), 1).ids.tolist() == [[5]]

    def test_codes_equal_brute_force(self, images, tmp_path):
        model = encoder(whitening=Whitening(16), binarizer=Given())
        engine = Engine(opened(model, images, tmp_path / "c"))
        assert engine.catalog.about["bytes_per_item"] == 2
        found = engine.nearest(encode(model, images[:5]), 6)
        signs = (model.embed(images) > 0).numpy()
        assert torch.equal(encode(model, images), pack_codes(model.embed(images)))
        distance = (signs[:5, None] != signs[None]).sum(2)
        for query in range(5):
            order = np.lexsort((np.arange(N), distance[query]))[:6]
            assert found.ids[query].tolist() == order.tolist()
            assert found.scores[query].tolist() == (-distance[query][order]).tolist()

    def test_k(self, model, images, tmp_path):
        engine = Engine(opened(model, images, tmp_path / "c"))
        assert engine.nearest(encode(model, images[:2]), 1000).ids.shape == (2, N)
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            engine.nearest(encode(model, images[:2]), 0)

    def test_searches_without_gradients(self, model, images, tmp_path):
        catalog = opened(model, images, tmp_path / "c")
        engine = Engine(catalog)
        vectors = encode(model, images[:2])
        assert not vectors.requires_grad
        assert not vectors.is_inference()
        assert vectors.dtype == torch.float32
        assert engine.nearest(encode(model, images[:2]), 1).ids.tolist() == [[0], [1]]


def test_a_network_sees_so_many_images_at_once_that_their_maps_fit(model, images, monkeypatch):
    seen: list[int] = []
    real = model.embed

    def embed(part: Tensor) -> Tensor:
        seen.append(len(part))
        return real(part)

    whole = encode(model, images)
    monkeypatch.setattr(model, "embed", embed)
    monkeypatch.setattr(describe, "_PIXELS", 7 * 32 * 32)
    torch.testing.assert_close(encode(model, images), whole, rtol=0, atol=1e-5)
    assert seen == [7] * 5 + [5]
    seen.clear()
    encode(model, F.interpolate(images[:4], (40, 80)))  # 2.2 at once
    assert seen == [2, 2]
    encode(model, F.interpolate(images[:2], (400, 800)))  # one at least
    assert seen == [2, 2, 1, 1]
    assert describe._PIXELS < 10**7
