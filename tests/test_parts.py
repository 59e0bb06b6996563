"""Descriptors of several parts: weights, fitting, checkpoints, catalogs, heat maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simsearch import configs
from simsearch.cache import ArrayCache
from simsearch.data.collection import Collection
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.data.protocols import OfficialSplit
from simsearch.functional.heat_map import overlaps, regrid, spread_regions
from simsearch.functional.pooling import rmac_regions
from simsearch.functional.ragged import ragged
from simsearch.models.backbones import WeightsError, timm_backbone
from simsearch.models.colour import colour_backbone
from simsearch.models.dir import RegionNetwork
from simsearch.models.encoder import build_encoder, encoder_config
from simsearch.models.frozen import FrozenRetriever, Whitening
from simsearch.models.parts import PartsRetriever, TrainedPart
from simsearch.models.pooling import RMAC, Average, GeM
from simsearch.search.encoder_files import encoder_fingerprint, load_tensors, write_encoder
from simsearch.types import Part, can_explain, parts_of

N, SIDE = 60, 48


class Pictures(RetrievalDataModule):
    """Noise of three classes; of two shapes where `shapes`."""

    def __init__(self, shapes: bool = False) -> None:
        super().__init__(OfficialSplit("p", gallery="train", exclude_self=True), eval_batch_size=16)
        self.shapes = shapes

    def read(self) -> Collection:
        generator = torch.Generator().manual_seed(0)
        small = torch.rand(N, 3, 6, 6, generator=generator)
        images = (255 * F.interpolate(small, (SIDE, SIDE), mode="bilinear")).to(torch.uint8)
        return Collection(
            name="noise",
            images=ragged([im[:, : 32 if i % 2 else SIDE] for i, im in enumerate(images)]) if self.shapes else images,
            labels=(torch.arange(N) % 3)[:, None],
            attributes=("class",),
            classes=(tuple("abc"),),
            is_test=torch.arange(N) >= N - 15,
        )


def content(fit: str = "square", **arguments) -> FrozenRetriever:
    torch.manual_seed(7)
    backbone = timm_backbone("test_resnet", "random", 96, fit=fit, runtime="torch")
    backbone.provenance |= {"sha256": "of the test", "weights": "file"}
    return FrozenRetriever(backbone, RMAC(levels=2), Whitening(8, power=0.5), **arguments)


def colour(fit: str = "square", **arguments) -> FrozenRetriever:
    return FrozenRetriever(colour_backbone(32, fit=fit), Average(), Whitening(6, power=0.5), **arguments)


def both(fit: str = "square", **arguments) -> PartsRetriever:
    encoders = {"content": content(fit, **arguments), "colour": colour(fit, **arguments)}
    return PartsRetriever(encoders, {"colour": 1.0, "content": 3.0})


def trainer(tmp_path: Path) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Pictures:
    module = Pictures()
    module.setup()
    return module


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory) -> PartsRetriever:
    model = both()
    trainer(tmp_path_factory.mktemp("fit")).fit(model, data)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------- the descriptor


def test_parts_lie_side_by_side_and_scores_are_weighted_cosines(fitted, data):
    assert fitted.parts == {"content": Part(0, 8, 0.75), "colour": Part(8, 14, 0.25)}
    assert parts_of(fitted) == fitted.parts
    assert (fitted.dimension, fitted.bits, fitted.input_size, fitted.fit) == (14, None, 96, "square")
    images = data.collection.images[:9]
    vectors = fitted.embed(images)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(9))
    alone = [encoder.embed(images) for encoder in fitted.encoders.values()]
    expected = 0.75 * alone[0] @ alone[0].T + 0.25 * alone[1] @ alone[1].T
    torch.testing.assert_close(vectors @ vectors.T, expected)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 5), st.floats(0.1, 5))
def test_other_weights_are_a_factor_of_the_query(fitted, data, content, colour):
    images = data.collection.images[:5]
    stored = fitted.embed(images)
    wanted = {"content": content / (content + colour), "colour": colour / (content + colour)}
    query = stored[:1].clone()
    for name, part in fitted.parts.items():
        query[:, part.start : part.stop] *= wanted[name] / part.weight
    expected = sum(
        wanted[name] * F.cosine_similarity(encoder.embed(images[:1]), encoder.embed(images))
        for name, encoder in fitted.encoders.items()
    )
    torch.testing.assert_close((query @ stored.T)[0], expected, rtol=0, atol=1e-5)


def test_an_encoder_without_parts_has_one(data):
    plain = content()
    assert parts_of(plain) == {"content": Part(0, 8, 1.0)}
    assert can_explain(plain)
    assert not can_explain(FrozenRetriever(plain.backbone, GeM()))
    assert not can_explain(FrozenRetriever(plain.backbone, RMAC(levels=2), whiten_regions=False))
    assert can_explain(RegionNetwork(plain.backbone, RMAC(levels=2), 8))
    assert not can_explain(nn.Identity())


@pytest.mark.parametrize(
    ("encoders", "weights", "message"),
    [
        ({}, {}, "model.encoders has nothing"),
        ({"content": content}, {"style": 1.0}, "model.weights has style, model.encoders has content"),
        ({"content": content, "colour": colour}, {"content": 1.0, "colour": 0.0}, "model.weights.colour=0.0 must be"),
        ({"content": content}, {"content": float("nan")}, "model.weights.content=nan"),
        ({"my part": content}, {"my part": 1.0}, "'my part' is not a valid name"),
        (
            {"content": content, "colour": lambda: colour("longest")},
            {"content": 1.0, "colour": 1.0},
            "got content square, colour longest",
        ),
    ],
)
def test_wrong_parts_are_named(encoders, weights, message):
    with pytest.raises(ValueError, match=message):
        PartsRetriever({name: make() for name, make in encoders.items()}, weights)


# ------------------------------------------------------------------------ fitting and evaluation


def test_each_part_is_fitted_as_if_it_were_alone(fitted, data, tmp_path):
    for name, alone in (("content", content()), ("colour", colour())):
        trainer(tmp_path).fit(alone, data)
        whitening = fitted.encoders[name].head.whitening
        assert whitening.projection.any()
        torch.testing.assert_close(whitening.projection, alone.head.whitening.projection)
        torch.testing.assert_close(whitening.mean, alone.head.whitening.mean)


def test_the_features_of_all_parts_are_cached(data, tmp_path):
    model = both(cache=ArrayCache(tmp_path / "cache"))
    trainer(tmp_path).fit(model, data)
    shapes = sorted(np.load(path).shape for path in tmp_path.glob("cache/*/array.npy"))
    assert shapes == [(N, 96, 3, 3), (N, 680, 1, 1)]
    predicted = torch.cat(trainer(tmp_path).predict(model, data))
    with torch.no_grad():
        expected = model.eval().embed(data.collection.images)
    assert F.cosine_similarity(predicted, expected).min() > 0.999
    assert all(encoder._stored is None for encoder in model.encoders.values())


def test_images_of_many_shapes(tmp_path):
    data = Pictures(shapes=True)
    data.setup()
    model = both("longest", cache=ArrayCache(tmp_path / "cache"))
    trainer(tmp_path).fit(model, data)
    predicted = torch.cat(trainer(tmp_path).predict(model, data))
    assert predicted.shape == (N, 14)
    assert len(list(tmp_path.glob("cache/*/array.npy"))) == 1  # of the colour, which has one region
    with torch.no_grad():
        for row in (0, 1, 17):
            alone = model.embed(data.collection.images[row][None])[0]
            assert F.cosine_similarity(predicted[row], alone, dim=0) > 0.999


def test_nothing_trains_and_nothing_drifts(fitted, data):
    fitted.train()
    assert not any(module.training for e in fitted.encoders.values() for module in e.backbone.modules())
    assert fitted.configure_optimizers() is None
    fitted.eval()


# ------------------------------------------------------------------------- checkpoints and catalogs


def test_a_checkpoint_holds_what_was_fitted(fitted, data, tmp_path):
    worker = trainer(tmp_path)
    model = both()
    worker.fit(model, data)
    worker.save_checkpoint(tmp_path / "best.ckpt")
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {
        f"encoders.{name}.head.whitening.{tensor}"
        for name in ("content", "colour")
        for tensor in ("mean", "projection")
    }
    other = both()
    other.on_load_checkpoint(saved)
    other.load_state_dict(saved["state_dict"])
    images = data.collection.images[:4]
    torch.testing.assert_close(other.eval().embed(images), model.eval().embed(images))
    changed = both()
    changed.encoders["content"].backbone.provenance["sha256"] = "others"
    with pytest.raises(ValueError, match="fitted on weights of the test"):
        changed.on_load_checkpoint(torch.load(tmp_path / "best.ckpt", weights_only=True))


def catalog_config() -> dict:
    """The node of a config, as a run has it."""
    whitening = {"_target_": "simsearch.models.frozen.Whitening", "dimension": 8, "power": 0.5}
    backbones = {
        "content": {"_target_": "simsearch.models.backbones.timm_backbone", "name": "test_resnet", "size": 96},
        "colour": {"_target_": "simsearch.models.colour.colour_backbone", "size": 32},
    }
    backbones["content"] |= {"weights": "random", "runtime": "torch"}
    poolings = {"content": {"_target_": "simsearch.models.pooling.RMAC", "levels": 2}}
    encoders = {
        name: {
            "_target_": "simsearch.models.frozen.FrozenRetriever",
            "backbone": backbone,
            "pooling": poolings.get(name, {"_target_": "simsearch.models.pooling.Average"}),
            "whitening": whitening,
            "cache": {"_target_": "simsearch.cache.ArrayCache", "root": "nowhere"},
        }
        for name, backbone in backbones.items()
    }
    target = "simsearch.models.parts.PartsRetriever"
    return {"model": {"_target_": target, "weights": {"content": 2, "colour": 1}, "encoders": encoders}}


def fill(whitening: Whitening) -> None:
    generator = torch.Generator().manual_seed(1)
    whitening.projection.copy_(torch.randn(whitening.projection.shape, generator=generator))


def test_a_catalog_builds_it_again(data, tmp_path):
    config = catalog_config()
    model = configs.build(config["model"]).eval().requires_grad_(False)
    for encoder in model.encoders.values():
        fill(encoder.head.whitening)
    about = write_encoder(tmp_path, model)
    assert about["backbone"]["weights"] == "random"
    assert about["backbone"]["colour.weights"] == "none"
    again = build_encoder(encoder_config(config))
    assert encoder_fingerprint(again) != about["encoder_fingerprint"]
    load_tensors(tmp_path, about, again)
    assert encoder_fingerprint(again) == about["encoder_fingerprint"]
    assert again.provenance == model.provenance
    assert again.parts == model.parts
    torch.testing.assert_close(again.embed(data.collection.images[:3]), model.embed(data.collection.images[:3]))


# --------------------------------------------------------------------------------- trained parts


def network() -> RegionNetwork:
    return RegionNetwork(timm_backbone("test_resnet", "random", 96, runtime="torch"), RMAC(levels=2), 5)


@pytest.fixture
def run(tmp_path) -> tuple[Path, RegionNetwork]:
    trained = network().eval()
    nn.init.normal_(trained.head.weight)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    state = {f"network.{name}": value for name, value in trained.state_dict().items()} | {"loss.centres": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "run" / "checkpoints" / "best.ckpt")
    return tmp_path / "run", trained


def test_a_trained_network_is_a_part(run, data, tmp_path):
    start, trained = run
    images = data.collection.images[:6]

    def model() -> PartsRetriever:
        parts = {"content": TrainedPart(network(), str(start)), "colour": colour()}
        return PartsRetriever(parts, {"content": 1.0, "colour": 1.0})

    first, worker = model(), trainer(tmp_path)
    worker.fit(first, data)
    first.eval()
    with torch.no_grad():
        torch.testing.assert_close(first.embed(images)[:, :5] * 2**0.5, trained.embed(images))
    assert not any(p.requires_grad for p in first.parameters())
    assert first.provenance["content.weights"] == "trained"
    assert first.provenance["content.start"] == str(start)
    worker.save_checkpoint(tmp_path / "best.ckpt")
    (start / "checkpoints" / "best.ckpt").unlink()  # is not needed any more
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    second = model()
    second.on_load_checkpoint(saved)
    second.load_state_dict(saved["state_dict"])
    torch.testing.assert_close(second.eval().embed(images), first.embed(images))
    assert second.provenance == first.provenance
    with pytest.raises(WeightsError, match="no weights at"):
        trainer(tmp_path).fit(model(), data)


def test_tensors_of_another_network_are_refused(run):
    other = RegionNetwork(timm_backbone("test_resnet", "random", 96, runtime="torch"), RMAC(levels=2), 6)
    with pytest.raises(WeightsError, match="are not those of this network"):
        TrainedPart(other, str(run[0])).load()
    with pytest.raises(WeightsError, match="needs its run"):
        TrainedPart(other, None).load()


# -------------------------------------------------------------------------------------- heat maps


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40),
    st.floats(0, 0.4), st.floats(0.6, 1), st.integers(0, 99),
)  # fmt: skip
def test_a_new_grid_keeps_the_sum(h, w, tall, wide, start, stop, seed):
    values = torch.randn(h, w, generator=torch.Generator().manual_seed(seed))
    found = regrid(values, (tall, wide), (start, stop, 0.0, 1.0))
    assert found.shape == (tall, wide)
    assert float(found.sum()) == pytest.approx(float(values.sum()), abs=1e-4)
    torch.testing.assert_close(regrid(values, (h, w)), values)


def test_shares_by_hand():
    expected = [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]
    torch.testing.assert_close(overlaps(0, 1, 3, 2), torch.tensor(expected, dtype=torch.float64))
    inner = overlaps(0.25, 0.75, 1, 4)[:, 0]
    torch.testing.assert_close(inner, torch.tensor([0, 0.5, 0.5, 0], dtype=torch.float64))


def naive_heat_map(model: FrozenRetriever, image: Tensor, vector: Tensor) -> np.ndarray:
    """Region by region, of one scale and an image that is seen whole."""
    maps = model.backbone.network(model.backbone.preprocess(image[None]))[0].numpy()
    regions = rmac_regions(*maps.shape[1:], 2)
    mean, matrix = (t.numpy() for t in (model.head.whitening.mean, model.head.whitening.projection))
    units = []
    for top, left, side in regions:
        pooled = maps[:, top : top + side, left : left + side].max((1, 2))
        whitened = matrix @ (pooled / np.linalg.norm(pooled) - mean)
        units.append(whitened / np.linalg.norm(whitened))
    norm = np.linalg.norm(sum(units))
    heat = np.zeros(maps.shape[1:])
    for (top, left, side), unit in zip(regions, units, strict=True):
        for y in range(top, top + side):
            for x in range(left, left + side):
                heat[y, x] += unit @ vector.numpy() / norm / side**2
    return heat


def fitted_content(fit: str, scales: tuple[float, ...] = (1.0,)) -> FrozenRetriever:
    model = content(fit, scales=scales).eval()
    fill(model.head.whitening)
    return model


def test_heat_map_is_a_naive_loops():
    model = fitted_content("longest")
    image = torch.randint(0, 256, (3, 70, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    vector = torch.randn(8, generator=torch.Generator().manual_seed(3))
    heat = model.heat_map(image, vector)
    assert heat.values.dtype == torch.float32
    assert heat.rest == 0
    np.testing.assert_allclose(heat.values.numpy(), naive_heat_map(model, image, vector), atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(60, 150), st.integers(60, 150), st.sampled_from(["square", "longest"]), st.booleans())
def test_heat_maps_sum_to_the_score(height, width, fit, many):
    model = fitted_content(fit, (1.0, 0.7, 1.5) if many else (1.0,))
    generator = torch.Generator().manual_seed(height * width)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    vector = F.normalize(torch.randn(8, generator=generator), dim=0)
    heat = model.heat_map(image, vector)
    score = float(model.embed(image[None])[0] @ vector)
    assert float(heat.values.sum()) + heat.rest == pytest.approx(score, abs=1e-5)
    rows, columns = heat.values.shape
    cell = max(height, width) / max(rows, columns)  # a grid over the whole image, whose last cells may stand over
    assert abs(rows - height / cell) <= 1
    assert abs(columns - width / cell) <= 1


def test_nothing_outside_the_square_that_was_seen():
    model = fitted_content("square")
    image = torch.randint(0, 256, (3, 96, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    heat = model.heat_map(image, torch.ones(8)).values
    assert heat.shape == (3, 6)
    used = heat.abs().sum(0) > 1e-7
    assert used.tolist() == [False, True, True, True, True, False]  # 3 cells, half a cell off the grid


def test_parts_without_regions_are_the_rest(fitted, data):
    image, vector = data.collection.images[3], fitted.embed(data.collection.images[4:5])[0]
    heat = fitted.heat_map(image, vector)
    score = float(fitted.embed(image[None])[0] @ vector)
    assert float(heat.values.sum()) + heat.rest == pytest.approx(score, abs=1e-5)
    own = [encoder.embed(data.collection.images[3:5]) for encoder in fitted.encoders.values()]
    assert heat.rest == pytest.approx(0.25 * float(own[1][0] @ own[1][1]), abs=1e-5)
    assert fitted.explains


def test_spread_by_hand():
    found = spread_regions(torch.tensor([4.0, 1.0]), [(0, 0, 2, 2), (1, 1, 1, 1)], 2, 3)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0]]))
