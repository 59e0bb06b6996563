"""Files of any aspect as a collection to train on: decoding once, images of many shapes in a batch, whole trainings."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import simsearch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA
from test_resume import numbers
from torch import Tensor, nn

from simsearch.cache import ArrayCache
from simsearch.data import image_folder as module
from simsearch.data.audit import contact_sheet
from simsearch.data.collection import Collection
from simsearch.data.image_folder import FilesDataModule, decode_files
from simsearch.data.manifest import read_manifest
from simsearch.data.near_duplicates import perceptual_hashes
from simsearch.data.protocols import ByAttribute
from simsearch.data.samplers import PKBatches, ShuffledBatches
from simsearch.data.transforms import RandomCropFlip, crop_flip
from simsearch.functional.ragged import Ragged, by_shape, ragged, stacks
from simsearch.images import ImageError, read_image
from simsearch.losses.triplet import BatchHardTripletLoss
from simsearch.models.backbones import Backbone, timm_backbone
from simsearch.models.dir import RegionNetwork
from simsearch.models.frozen import FrozenRetriever, Whitening
from simsearch.models.hashing import HashNetwork
from simsearch.models.pooling import MAC, RMAC, Average
from simsearch.models.trained import TrainedRetriever
from simsearch.search.catalog import read_catalog

SHAPES = [(60, 80), (80, 60), (64, 64), (40, 80), (80, 45), (60, 80)]
SIZE = 64


def write_files(folder: Path, count: int = 36, broken: tuple[int, ...] = (4, 7)) -> Path:
    """A table of `count` PNG files of 3 artists in SHAPES, each in two prints; some are cut off, one is missing."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    colours = random.integers(40, 216, (3, 3))
    rows = []
    for i in range(count):
        height, width = SHAPES[i % len(SHAPES)]
        coarse = colours[i % 3] + random.integers(-40, 40, (6, 6, 3))
        picture = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:02}.png")
        if i in broken:
            data = (folder / f"{i:02}.png").read_bytes()
            (folder / f"{i:02}.png").write_bytes(data[: len(data) // 2])
        rows.append([f"{i:02}.png", f"artist {i % 3}", f"w{i // 2}", "" if i % 5 == 0 else str(1900 + i % 4)])
    (folder / "09.png").unlink()
    table = folder / "paintings.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "artist", "work", "year"], *rows])
    return table


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("files") / "art")


PROTOCOL = ByAttribute("by-artist", attribute="artist", junk=None, group="work", evaluation=0.4, validation=0.2)


def data(table: Path, fit: str = "longest", **arguments) -> FilesDataModule:
    arguments = {"cache": str(table.parent.parent / "cache"), "protocol": PROTOCOL, **arguments}
    datamodule = FilesDataModule(source=str(table), size=SIZE, fit=fit, eval_batch_size=5, **arguments)  # type: ignore[arg-type]
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def backbone(fit: str = "longest", size: int = SIZE) -> Backbone:
    torch.manual_seed(0)
    return timm_backbone("test_efficientnet", "random", size, runtime="torch", fit=fit)  # type: ignore[arg-type]


def trained(network: nn.Module, **arguments) -> TrainedRetriever:
    arguments = {"freeze_batchnorm": True, **arguments}
    return TrainedRetriever(network, BatchHardTripletLoss(), partial(torch.optim.SGD, lr=0.01), **arguments)


def trainer(folder: Path) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


# ------------------------------------------------------------------------------ images of many shapes


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=9),
    st.one_of(st.none(), st.integers(1, 4)),
    st.data(),
)
@settings(max_examples=50, deadline=None)
def test_a_function_of_each_shape_gives_rows_in_order(shapes, most, draw):
    images = [torch.rand(3, *shape) for shape in shapes]
    together = ragged(images)
    sizes = []

    def function(stack: Tensor) -> Tensor:
        sizes.append(len(stack))
        return torch.stack([stack.sum((1, 2, 3)), stack.amax((1, 2, 3))], dim=1)

    rows = draw.draw(st.lists(st.integers(0, len(images) - 1), min_size=1, max_size=12))
    got = by_shape(function, together[rows], most)
    wanted = torch.stack([torch.stack([images[row].sum(), images[row].max()]) for row in rows])
    torch.testing.assert_close(got, wanted)
    chosen = [shapes[row] for row in rows]
    per_shape = [chosen.count(shape) for shape in set(chosen)]
    assert sorted(sizes) == sorted(
        size for n in per_shape for size in ([most] * (n // most) + [n % most] * (n % most > 0) if most else [n])
    )
    for found in (together, together[:], together.packed(), together.to("cpu")):
        assert all(torch.equal(a, b) for a, b in zip(found, images, strict=True))
    places = torch.cat([places for places, _ in stacks(together)])
    assert sorted(places.tolist()) == list(range(len(images)))


def test_a_selection_shares_pixels_and_packing_leaves_the_others_out():
    together = ragged([torch.rand(3, 2, 5), torch.rand(3, 4, 1), torch.rand(3, 2, 2)])
    some = together[torch.tensor([2, 0])]
    assert some.pixels is together.pixels
    assert len(some.packed().pixels) == 3 * (4 + 10)
    assert torch.equal(some[0], together[2])
    assert torch.equal(together[torch.tensor(1)], together[1])
    assert len(together[[]].packed()) == len(together[[]].packed().pixels) == 0
    tensor = torch.rand(5, 3, 2, 2)
    assert [(p.tolist(), len(s)) for p, s in stacks(tensor, 2)] == [([0, 1], 2), ([2, 3], 2), ([4], 1)]
    assert torch.equal(by_shape(lambda x: x.mean((1, 2, 3)), tensor, 2), tensor.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(12), torch.tensor([0]), torch.tensor([[2, 3]])), "goes beyond the 12 pixel values"),
        ((torch.zeros(12), torch.tensor([-1]), torch.tensor([[1, 3]])), "before the pixels"),
        ((torch.zeros(12), torch.tensor([0]), torch.tensor([[0, 3]])), "a side below 1"),
        ((torch.zeros(12), torch.tensor([0, 3]), torch.tensor([[1, 1]])), r"shapes \(N, 2\)"),
    ],
)
def test_pixels_that_are_not_there_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ragged(*arguments)


def test_images_of_many_shapes_are_augmented_each_as_alone():
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in SHAPES]
    augment = RandomCropFlip(padding=3, flip=True)
    torch.manual_seed(5)
    got = augment(ragged(images))
    torch.manual_seed(5)
    offsets, flips = torch.randint(0, 7, (len(images), 2)), torch.rand(len(images)) < 0.5
    for i, image in enumerate(images):
        assert torch.equal(got[i], crop_flip(image[None], offsets[i : i + 1], flips[i : i + 1], 3)[0])


# ------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("fit", ["longest", "square"])
@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_decoded_once_to_what_reading_gives(fit, workers, table, tmp_path, monkeypatch):
    manifest = read_manifest(table)
    arguments = {"size": 32, "fit": fit, "cache": tmp_path / "cache"}
    decoded = decode_files(manifest, **arguments, workers=workers)
    assert decoded.rows.tolist() == [i for i in range(36) if i not in (4, 7, 9)]
    assert isinstance(decoded.images, Ragged) == (fit == "longest")
    for image, row in zip(decoded.images, decoded.rows.tolist(), strict=True):
        assert torch.equal(image, read_image(table.parent / f"{row:02}.png", size=32, fit=fit))
    assert [(error.path.name, error.reason) for error in decoded.errors] == [
        ("04.png", "truncated"), ("07.png", "truncated"), ("09.png", "missing"),
    ]  # fmt: skip
    monkeypatch.setattr(module, "_decode", None)
    again = decode_files(manifest, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(again.images, decoded.images, strict=True))
    assert again.digest == decoded.digest
    assert [str(error) for error in again.errors] == [str(error) for error in decoded.errors]
    again.images[0][:] = 0  # in memory alone
    assert decode_files(manifest, **arguments).images[0].any()


def test_an_entry_is_there_whole_and_a_kill_costs_a_shard(tmp_path, monkeypatch):
    manifest = read_manifest(write_files(tmp_path / "art", 12))
    arguments = {"size": 16, "fit": "longest", "cache": tmp_path / "cache"}
    wanted = decode_files(manifest, **arguments | {"cache": tmp_path / "straight"})
    monkeypatch.setattr(module, "_PER_SHARD", 3)
    real, asked = module.load_items, []

    def interrupted(items, rows, **named):
        asked.append(len(rows))
        for i, item in enumerate(real(items, rows, **named)):
            if len(asked) == 1 and i == 8:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(module, "load_items", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_files(manifest, **arguments)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ".partial"}
    resumed = decode_files(manifest, **arguments)
    assert asked == [12, 6]  # the third shard was not finished
    assert resumed.digest == wanted.digest
    assert resumed.rows.tolist() == wanted.rows.tolist()
    assert [str(error) for error in resumed.errors] == [str(error) for error in wanted.errors]
    decoded = [image.clone() for image in resumed.images]
    assert all(torch.equal(a, b) for a, b in zip(decoded, wanted.images, strict=True))
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    for name, damage in (("pixels.bin", b"short"), ("000001.safetensors", b"")):
        (entry / name).write_bytes(damage)
        mended = decode_files(manifest, **arguments)
        assert all(torch.equal(a, b) for a, b in zip(mended.images, decoded, strict=True)), name


def test_what_is_decoded_is_checked_without_waiting_also_where_nothing_can_be_written(tmp_path, monkeypatch):
    manifest = read_manifest(write_files(tmp_path / "art", 12))
    arguments = {"size": 16, "fit": "square", "cache": tmp_path / "cache"}
    digest = decode_files(manifest, **arguments).digest

    def refused(path):
        raise PermissionError(path)

    monkeypatch.setattr(module, "FileLock", refused)
    assert decode_files(manifest, **arguments).digest == digest


def test_a_file_that_goes_when_it_was_decoded_is_missing(tmp_path, monkeypatch):
    manifest, real = read_manifest(write_files(tmp_path / "art", 12)), module.load_items

    def later(items, rows, **named):
        for row, image in real(items, rows, **named):
            if row == 3:
                (tmp_path / "art" / "03.png").unlink()
            yield row, image

    monkeypatch.setattr(module, "load_items", later)
    decoded = decode_files(manifest, size=16, fit="square", cache=tmp_path / "cache")
    assert 3 not in decoded.rows
    assert ("03.png", "missing") in [(error.path.name, error.reason) for error in decoded.errors]


def test_another_file_size_or_fit_is_decoded_anew(tmp_path):
    table = write_files(tmp_path / "art", 12)
    cache = tmp_path / "cache"
    first = decode_files(read_manifest(table), size=16, fit="longest", cache=cache)
    assert decode_files(read_manifest(table), size=17, fit="longest", cache=cache).images[0].shape != (3, 12, 16)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "art" / "00.png")
    changed = decode_files(read_manifest(table), size=16, fit="longest", cache=cache)
    assert changed.images[0].shape == (3, 8, 16)
    assert changed.digest != first.digest


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"none of the 1 images.*a.png: not-an-image"):
        decode_files(read_manifest(tmp_path), size=16, fit="longest", cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


# ------------------------------------------------------------------------------ the collection


def test_the_collection_holds_what_can_be_read_with_its_columns(table, capsys):
    collection = data(table).collection
    message = capsys.readouterr().err
    assert "left out 2 files: truncated" in message
    assert "04.png" in message
    assert "left out 1 files: missing" in message
    rows = [i for i in range(36) if i not in (4, 7, 9)]
    assert collection.attributes == ("artist", "work", "year")
    assert collection.paths == tuple(f"{i:02}.png" for i in rows)
    assert collection.path(4) == "05.png"
    artists = [collection.classes[0][label] for label in collection.column("artist").tolist()]
    assert artists == [f"artist {i % 3}" for i in rows]
    years = [collection.classes[2][label] if label >= 0 else "" for label in collection.column("year").tolist()]
    assert years == ["" if i % 5 == 0 else str(1900 + i % 4) for i in rows]


def test_the_fingerprint_is_that_of_the_files_and_features_are_kept_by_what_they_were_decoded_to(table, tmp_path):
    cache = str(tmp_path / "cache")
    one, square = data(table, cache=cache).collection, data(table, "square", cache=cache).collection
    assert one.fingerprint == square.fingerprint
    assert one.content != square.content
    assert data(table, cache=cache, attributes=["artist", "work"]).collection.fingerprint != one.fingerprint
    other = data(write_files(tmp_path / "other", broken=(4,)), cache=cache).collection
    assert other.fingerprint != one.fingerprint
    plain = Collection("n", one.images, one.labels, one.attributes, one.classes, one.is_test)
    assert plain.content == plain.fingerprint != one.fingerprint
    assert plain.path(3) == "n/3"
    assert Collection("n", one.images[:], *(getattr(one, f) for f in ("labels", "attributes", "classes", "is_test"))
                      ).fingerprint == plain.fingerprint  # fmt: skip


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("sampler", [partial(ShuffledBatches, batch_size=6), partial(PKBatches, classes=3, images=2)])
def test_batches_keep_the_contract_with_any_sampler(sampler, num_workers, table):
    datamodule = data(table, sampler=sampler, num_workers=num_workers)
    loaders = [datamodule.train_dataloader(), *datamodule.val_dataloader().values()]
    for batch in (batch for loader in loaders for batch in loader):
        assert set(batch) == {"image", "label", "index"}
        assert len(batch["image"]) == len(batch["label"]) == len(batch["index"])
        assert len(batch["image"].pixels) == 3 * int(batch["image"].shapes.prod(1).sum())  # and no others
        for image, label, row in zip(batch["image"], batch["label"], batch["index"].tolist(), strict=True):
            assert torch.equal(image, datamodule.collection.images[row])
            assert label == datamodule.collection.column("artist")[row]


def test_without_a_group_every_image_is_its_own(table):
    protocol = ByAttribute("by-artist", attribute="artist", junk=None, group=None)
    split = data(table, protocol=protocol).split
    assert torch.equal(split.test.query, split.test.gallery)
    assert len(split.test.query) == round(0.5 * 33)
    rows = [*split.train.tolist(), *split.validation.gallery.tolist(), *split.test.gallery.tolist()]
    assert sorted(rows) == list(range(33))


def test_the_audit_looks_at_images_of_many_shapes(table, tmp_path):
    images = data(table).collection.images
    hashes = perceptual_hashes(images)
    assert torch.equal(hashes[3:4], perceptual_hashes(images[3][None]))
    from simsearch.data.audit import Duplicates

    pair = Duplicates(
        torch.tensor([0]), torch.tensor([1]), torch.tensor([0.9]), torch.tensor([0.9]), torch.tensor([3]),
        ("gallery",), ("hash",),
    )  # fmt: skip
    contact_sheet(images, pair, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 96 + 12, 96 + 24)


# ------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("slices", [None, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["dir", "hashing"])
def test_an_embedding_and_its_gradient_do_not_depend_on_the_batch(family, training, slices, table):
    body = backbone()
    network = RegionNetwork(body, RMAC(2), 8) if family == "dir" else HashNetwork(body, MAC(), 8)
    images = data(table).collection.images
    network.prepare(images, torch.arange(len(images)))
    model = trained(network, slices=slices).train(training)
    rows = torch.tensor([0, 3, 1, 6, 12, 2, 4])
    weight = torch.rand(len(rows), 8, generator=torch.Generator().manual_seed(0))

    def gradients(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        embeddings = torch.cat([model({"image": images[part].packed(), "index": part}) for part in parts])
        (embeddings * weight).sum().backward()
        return embeddings.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone, wanted = gradients(list(rows.split(1)))
    together, got = gradients([rows])
    assert alone.std() > 1e-3
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (got - wanted).norm() / wanted.norm() < 1e-4
    for row, embedding in zip(rows.tolist(), alone, strict=True):  # nor on how it is kept
        torch.testing.assert_close(network(images[row][None])[0], embedding, rtol=1e-4, atol=1e-5)


def test_the_projection_starts_from_the_regions_of_all_shapes(table):
    images = data(table).collection.images
    network = RegionNetwork(backbone(size=192), RMAC(2), 6, power=1.0)
    network.prepare(images, torch.arange(len(images)))
    with torch.no_grad():
        vectors = torch.cat([network.eval().pool(network.backbone(image[None]))[0] for image in images])
        assert len({network.pool(network.backbone(image[None])).shape[1] for image in images}) > 1
        got = network.head(vectors).double().numpy()
    pca = PCA(6, svd_solver="full", whiten=True).fit(vectors.double().numpy())
    wanted = pca.transform(vectors.double().numpy())
    np.testing.assert_allclose(got * np.sign((got * wanted).sum(0)), wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(("pooling", "stored"), [(Average(), True), (RMAC(2), False)])
def test_frozen_features_are_whitened_over_all_shapes(pooling, stored, table, tmp_path):
    datamodule = data(table, sampler=partial(ShuffledBatches, batch_size=7))
    cache = ArrayCache(tmp_path / "cache")
    model = FrozenRetriever(backbone(size=192), pooling, Whitening(5), cache=cache, extract_batch_size=6)
    trainer(tmp_path).fit(model, datamodule)
    images, train = datamodule.collection.images, datamodule.split.train.tolist()
    with torch.no_grad():
        vectors = [model.head.regions(model.backbone(image[None]))[0].double().numpy() for image in images]
    pca = PCA(5, svd_solver="full").fit(np.concatenate([vectors[row] for row in train]))
    signs = np.sign((pca.components_ * model.head.whitening.projection.numpy()).sum(1))
    predicted = torch.cat(trainer(tmp_path).predict(model.eval(), datamodule))
    assert (cache.root.is_dir() and len(list(cache.root.glob("*/array.npy"))) == 1) == stored
    for found, own in zip(predicted, vectors, strict=True):
        projected = signs * pca.transform(own)
        total = (projected / np.linalg.norm(projected, axis=1, keepdims=True)).sum(0)
        np.testing.assert_allclose(found.numpy(), total / np.linalg.norm(total), atol=5e-3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: trained(HashNetwork(backbone(), MAC(), 8), freeze_batchnorm=False), "model.freeze_batchnorm=true"),
        (lambda: trained(HashNetwork(backbone("square"), MAC(), 8)), "use backbone.fit=longest, or data.fit=square"),
        (lambda: trained(RegionNetwork(backbone(), RMAC(2), 8), cache=ArrayCache("unused")), "pooling with one region"),
    ],
)
def test_what_cannot_train_on_many_shapes_says_so(model, message, table, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(model(), data(table))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attributes": ["genre"]}, "no column 'genre'; it has artist, work, year"),
        ({"attributes": ["artist", "score"]}, "has the columns score, whose names results use already"),
    ],
)
def test_wrong_columns_are_named(arguments, message, table):
    with pytest.raises(ValueError, match=message):
        data(table, **arguments)


# ------------------------------------------------------------------------------ as a user


@pytest.mark.slow
def test_a_training_on_files_of_any_aspect_and_what_it_leaves(table, tmp_path):
    run = tmp_path / "run"
    done = simsearch(
        "train", "data=files", f"data.source={table}", "protocol.attribute=artist", "protocol.group=work",
        "protocol.junk=work", "backbone=timm", "backbone.name=test_efficientnet", "backbone.weights=random",
        "backbone.fit=longest", "backbone.size=64", "model=dir", "pooling.levels=2", "model.network.dimension=8",
        "sampler.triplets=3", "loss.margin=3", "sampler.batches=2", "callbacks.mining.pool=24", "trainer.max_steps=3",
        "trainer.precision=32-true", "callbacks.evaluation.ks=[1,5]", "logger.mode=disabled", "data.workers=0",
        "data.eval_batch_size=4", f"run_dir={run}", "+data.augment.padding=2", "+data.augment.flip=true",
        "+data.augment._target_=simsearch.data.transforms.RandomCropFlip", f"data.cache={tmp_path / 'cache'}",
    )  # fmt: skip
    assert "left out 2 files: truncated" in done.stderr
    assert {"val", "test"} <= set(json.loads((run / "metrics.json").read_text()))
    with (run / "metrics.csv").open() as file:
        assert any(row.get("mining/active") for row in csv.DictReader(file))
    simsearch("evaluate", f"run={run}", f"run_dir={tmp_path / 'again'}")
    wanted, again = (numbers(folder)["test"]["metrics"] for folder in (run, tmp_path / "again"))
    assert again == pytest.approx(wanted, abs=1e-6)
    catalog = read_catalog(run / "catalog")
    assert len(catalog.index) == int(wanted["gallery"])
    with Image.open(run / "figures" / "queries" / "00.png") as picture:
        assert max(picture.size) == 64
    shapes = {Image.open(path).size for path in (run / "figures" / "queries").glob("*.png")}
    assert len(shapes) > 1


def test_an_imageerror_of_the_cache_is_as_it_was(table, tmp_path):
    manifest = read_manifest(table)
    first, second = (decode_files(manifest, size=8, fit="square", cache=tmp_path).errors for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert isinstance(two, ImageError)
        assert (one.path, one.reason, one.detail) == (two.path, two.reason, two.detail)
