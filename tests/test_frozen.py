"""The frozen family against scikit-learn and naive loops, with and without the cache of features."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn

from simsearch.cache import ArrayCache
from simsearch.data.collection import Collection
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.data.protocols import OfficialSplit
from simsearch.functional.pooling import rmac_regions
from simsearch.index.binarize import ITQ, Sign
from simsearch.models.backbones import Backbone, timm_backbone
from simsearch.models.frozen import FrozenRetriever, Whitening
from simsearch.models.pooling import MAC, RMAC, Average, GeM

N, TEST, SIDE, SIZE = 90, 20, 24, 96  # the tiny network maps 96 pixels to 3 x 3 x 96


class Pictures(RetrievalDataModule):
    """Patterns of 5 classes under noise."""

    def read(self) -> Collection:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(N) % 5
        patterns = torch.rand(5, 3, 6, 6, generator=generator)
        noise = torch.rand(N, 3, 6, 6, generator=generator)
        images = F.interpolate(0.6 * patterns[labels] + 0.4 * noise, (SIDE, SIDE), mode="bilinear")
        return Collection(
            name="patterns",
            images=(255 * images).to(torch.uint8),
            labels=labels[:, None],
            attributes=("class",),
            classes=(tuple("abcde"),),
            is_test=torch.arange(N) >= N - TEST,
        )


@pytest.fixture(scope="module")
def data() -> Pictures:
    module = Pictures(OfficialSplit("p", gallery="train", exclude_self=True), eval_batch_size=16)
    module.setup()
    return module


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights, with BatchNorm statistics of their own."""
    torch.manual_seed(3)
    network = timm_backbone("test_resnet", weights="random", size=SIZE).network
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.05, 0.2)
    return network.state_dict()


@pytest.fixture
def backbone(state: dict[str, Tensor]) -> Backbone:
    backbone = timm_backbone("test_resnet", weights="random", size=SIZE, runtime="torch")
    backbone.network.load_state_dict(state)
    backbone.provenance |= {"sha256": "of the fixture", "weights": "file"}
    return backbone


def trainer(tmp_path, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip


def fitted(model: FrozenRetriever, data: Pictures, tmp_path, epochs: int = 1) -> FrozenRetriever:
    trainer(tmp_path, epochs).fit(model, data)
    return model.eval()


def maps(backbone: Backbone, data: Pictures, rows: Tensor | None = None, size: int = SIZE) -> Tensor:
    """Feature maps of some rows (or all) by the network itself."""
    images = data.collection.images if rows is None else data.collection.images[rows]
    with torch.no_grad():
        return backbone.network(backbone.preprocess(images, size))


def descriptors(model: FrozenRetriever, data: Pictures) -> Tensor:
    with torch.no_grad():
        return model.embed(data.collection.images)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


class TestEmbed:
    @pytest.mark.parametrize("pooling", [Average(), MAC(), GeM(), RMAC(levels=2)])
    def test_unit_float32_descriptors(self, pooling, backbone, data):
        model = FrozenRetriever(backbone, pooling).eval()
        embedding = descriptors(model, data)
        assert embedding.shape == (N, model.dimension) == (N, 96)
        assert embedding.dtype == torch.float32
        assert model.bits is None
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(N))
        assert (embedding @ embedding.T).std() > 1e-3  # and they differ

    def test_nothing_drifts_in_training_mode(self, backbone, data):
        model = FrozenRetriever(backbone, GeM(trainable=True))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        first = model.embed(data.collection.images[:8])
        assert model.training
        assert not any(module.training for module in model.backbone.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not first.requires_grad
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        torch.testing.assert_close(model.eval().embed(data.collection.images[:8]), first)

    def test_scales_are_summed(self, backbone, data):
        model = FrozenRetriever(backbone, Average(), scales=(1.0, 0.7071, 1.4142)).eval()
        assert model.sizes == [96, 68, 136]
        assert model.input_size == 136
        images = data.collection.images[:9]
        expected = np.zeros((9, 96))
        for size in (96, 68, 136):
            with torch.no_grad():
                features = backbone.network(backbone.preprocess(images, size))
            expected += unit(features.mean((2, 3)).numpy())
        torch.testing.assert_close(model.embed(images), torch.from_numpy(unit(expected)).float())

    def test_identity_says_what_decides_the_descriptors(self, backbone):
        def identity(pooling: nn.Module | None = None, **arguments) -> dict:
            return FrozenRetriever(backbone, pooling or GeM(), **arguments).identity()

        base = identity()
        assert identity() == base
        for other in (
            identity(GeM(p=3.1)), identity(Average()), identity(RMAC(levels=2)), identity(scales=(1.0, 2.0)),
            identity(whiten_regions=False), identity(whitening=Whitening(8)), identity(binarizer=Sign(8)),
        ):  # fmt: skip
            assert other != base


class TestWhitening:
    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    def test_equals_scikit_learn_on_the_training_split(self, power, backbone, data, tmp_path):
        model = fitted(FrozenRetriever(backbone, Average(), Whitening(8, power=power)), data, tmp_path)
        pooled = unit(maps(backbone, data).mean((2, 3)).double().numpy())
        pca = PCA(8, svd_solver="full").fit(pooled[data.split.train.numpy()])
        projected = pca.transform(pooled) / pca.explained_variance_ ** (power / 2)
        signs = np.sign((pca.components_ * model.head.whitening.projection.numpy()).sum(1))
        np.testing.assert_allclose(descriptors(model, data).numpy(), unit(projected) * signs, atol=2e-4)
        np.testing.assert_allclose(model.head.whitening.mean.numpy(), pca.mean_, atol=1e-6)

    def test_is_fitted_anew_in_every_epoch(self, backbone, data, tmp_path):
        one, two = (
            fitted(FrozenRetriever(backbone, Average(), Whitening(8), binarizer=Sign(8)), data, tmp_path, epochs)
            for epochs in (1, 2)
        )
        torch.testing.assert_close(one.head.whitening.projection, two.head.whitening.projection)
        torch.testing.assert_close(one.code_weight, two.code_weight)

    @pytest.mark.parametrize("each", [True, False])
    def test_regions_equal_a_naive_loop(self, each, backbone, data, tmp_path):
        model = FrozenRetriever(backbone, RMAC(levels=2), Whitening(6, power=0.5), whiten_regions=each)
        fitted(model, data, tmp_path)
        regions = rmac_regions(3, 3, 2)
        assert len(regions) == 5

        def vectors(image: np.ndarray) -> list[np.ndarray]:
            found = [unit(image[:, top : top + s, left : left + s].max((1, 2))) for top, left, s in regions]
            return found if each else [unit(np.sum(found, axis=0))]

        features = maps(backbone, data).double().numpy()
        pca = PCA(6, svd_solver="full").fit([v for row in data.split.train.tolist() for v in vectors(features[row])])
        signs = np.sign((pca.components_ * model.head.whitening.projection.numpy()).sum(1))
        found = descriptors(model, data).numpy()
        for row in range(0, N, 7):
            total = np.zeros(6)
            for vector in vectors(features[row]):
                total += unit(signs * (pca.components_ @ (vector - pca.mean_)) / pca.explained_variance_**0.25)
            np.testing.assert_allclose(found[row], unit(total), atol=5e-4)

    def test_with_one_region_both_ways_are_one(self, backbone, data, tmp_path):
        left, right = (
            fitted(FrozenRetriever(backbone, MAC(), Whitening(8), whiten_regions=each), data, tmp_path)
            for each in (True, False)
        )
        torch.testing.assert_close(descriptors(left, data), descriptors(right, data))

    def test_scales_share_one_whitening_fitted_on_all(self, backbone, data, tmp_path):
        model = fitted(FrozenRetriever(backbone, Average(), Whitening(8), scales=(1.0, 0.7)), data, tmp_path)
        pooled = [unit(maps(backbone, data, size=size).mean((2, 3)).double().numpy()) for size in (96, 67)]
        train = data.split.train.numpy()
        pca = PCA(8, svd_solver="full").fit(np.concatenate([p[train] for p in pooled]))
        signs = np.sign((pca.components_ * model.head.whitening.projection.numpy()).sum(1))
        expected = unit(sum(unit(pca.transform(p)) for p in pooled)) * signs
        np.testing.assert_allclose(descriptors(model, data).numpy(), expected, atol=2e-4)

    def test_use_before_fitting(self, backbone, data):
        model = FrozenRetriever(backbone, Average(), Whitening(8)).eval()
        with pytest.raises(RuntimeError, match="whitening is not fitted: run `simsearch train`"):
            model.embed(data.collection.images[:2])


class Counting(nn.Module):
    """Counts the images that pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return self.network(pixels)


class TestStoredFeatures:
    @pytest.mark.parametrize("limit", [1.0, 0.0])
    @pytest.mark.parametrize("pooling", [RMAC(levels=2), GeM()])
    def test_give_the_same_and_are_computed_once(self, limit, pooling, backbone, data, tmp_path):
        def model(cache: ArrayCache | None) -> FrozenRetriever:
            return FrozenRetriever(
                backbone, pooling, Whitening(8), scales=(1.0, 0.7), cache=cache, maps_limit_gb=limit,
                extract_batch_size=40,
            )  # fmt: skip

        plain = descriptors(fitted(model(None), data, tmp_path), data)
        backbone.network = counting = Counting(backbone.network)
        cache = ArrayCache(tmp_path / "cache")
        first = fitted(model(cache), data, tmp_path)
        assert 2 * N <= counting.images <= 2 * N + 4  # probes of the shape
        arrays = sorted(np.load(path).shape for path in tmp_path.glob("cache/*/array.npy"))
        regions = 5 if isinstance(pooling, RMAC) else 1
        assert arrays == ([(N, 96, 3, 3), (N, 96, 3, 3)] if limit else [(N, regions, 96)] * 2)
        counting.images = 0
        second = fitted(model(cache), data, tmp_path)
        predicted = torch.cat(trainer(tmp_path).predict(second, data))
        assert counting.images <= 8
        torch.testing.assert_close(first.head.whitening.projection, second.head.whitening.projection)
        assert predicted.shape == plain.shape
        assert F.cosine_similarity(predicted, descriptors(second, data)).min() > 0.999
        assert F.cosine_similarity(predicted @ predicted.T, plain @ plain.T).min() > 0.999

    def test_another_head_shares_maps_but_not_regions(self, backbone, data, tmp_path):
        backbone.network = counting = Counting(backbone.network)
        for folder, limit, total in (("maps", 1.0, N), ("regions", 0.0, 2 * N)):
            counting.images = 0
            for pooling in (Average(), MAC()):
                model = FrozenRetriever(backbone, pooling, cache=ArrayCache(tmp_path / folder), maps_limit_gb=limit)
                trainer(tmp_path).predict(model, data)
            assert counting.images == total + 4

    def test_other_weights_do_not_share(self, backbone, data, tmp_path):
        cache = ArrayCache(tmp_path / "cache")
        for sha256 in ("one", "two"):
            backbone.provenance["sha256"] = sha256
            trainer(tmp_path).predict(FrozenRetriever(backbone, Average(), cache=cache), data)
        assert len(list(tmp_path.glob("cache/*/array.npy"))) == 2

    def test_features_beyond_float16_are_refused(self, backbone, data, tmp_path):
        class Huge(nn.Module):
            def forward(self, pixels: Tensor) -> Tensor:
                return torch.full((len(pixels), 96, 3, 3), 1e5)

        backbone.network = Huge()
        model = FrozenRetriever(backbone, Average(), cache=ArrayCache(tmp_path / "cache"))
        with pytest.raises(ValueError, match="beyond float16 in rows from 0"):
            trainer(tmp_path).predict(model, data)

    def test_predictions_without_a_cache_are_embeddings(self, backbone, data, tmp_path):
        model = FrozenRetriever(backbone, GeM(), scales=(1.0, 0.7))
        predicted = torch.cat(trainer(tmp_path).predict(model, data))
        torch.testing.assert_close(predicted, descriptors(model.eval(), data), rtol=1e-4, atol=1e-5)


class Recording:
    """A binariser that keeps what it was given."""

    bits = 5

    def fit(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        self.vectors = vectors
        generator = torch.Generator().manual_seed(1)
        return torch.randn(5, vectors.shape[1], generator=generator), torch.randn(5, generator=generator)


class TestCodes:
    @pytest.mark.parametrize("binarizer", [ITQ(8), Sign(8)])
    def test_equal_a_binariser_fitted_by_hand(self, binarizer, backbone, data, tmp_path):
        model = FrozenRetriever(backbone, Average(), Whitening(12), binarizer=binarizer)
        fitted(model, data, tmp_path)
        embedding = descriptors(model, data)
        assert model.bits == model.dimension == 8
        assert embedding.shape == (N, 8)
        assert not torch.allclose(embedding.norm(dim=1), torch.ones(N))
        pooled = F.normalize(maps(backbone, data).mean((2, 3)))
        described = F.normalize(model.head.whitening(pooled))
        weight, bias = binarizer.fit(described[data.split.train])
        expected = described @ weight.T + bias
        assert ((embedding > 0) == (expected > 0)).float().mean() > 0.99
        assert 0.2 < (embedding > 0).float().mean() < 0.8

    def test_the_map_is_applied_to_the_descriptor_and_fitted_on_a_sample(self, backbone, data, tmp_path):
        binarizer = Recording()
        model = FrozenRetriever(backbone, RMAC(levels=2), Whitening(8), binarizer=binarizer, sample=20)
        fitted(model, data, tmp_path)
        assert binarizer.vectors.shape == (20, 8)
        alone = FrozenRetriever(backbone, RMAC(levels=2), Whitening(8))
        alone.head = model.head
        described = descriptors(alone.eval(), data)
        weight, bias = binarizer.fit(described)
        torch.testing.assert_close(descriptors(model, data), described @ weight.T + bias)

    def test_use_before_fitting(self, backbone, data):
        model = FrozenRetriever(backbone, Average(), binarizer=Sign(8)).eval()
        with pytest.raises(RuntimeError, match="binarizer is not fitted: run `simsearch train`"):
            model.embed(data.collection.images[:2])


class TestCheckpoint:
    def test_round_trip_of_tensors_without_the_backbone(self, backbone, data, tmp_path):
        def model() -> FrozenRetriever:
            return FrozenRetriever(backbone, GeM(), Whitening(8), binarizer=Sign(6))

        worker = trainer(tmp_path)
        first = model()
        worker.fit(first, data)
        worker.save_checkpoint(tmp_path / "c.ckpt")
        checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=True)
        assert set(checkpoint["state_dict"]) == {
            "head.pooling.p", "head.whitening.mean", "head.whitening.projection", "code_weight", "code_bias",
        }  # fmt: skip
        assert checkpoint["backbone"] == backbone.provenance
        second = model()
        predicted = trainer(tmp_path).predict(second, data, ckpt_path=tmp_path / "c.ckpt", weights_only=True)
        torch.testing.assert_close(torch.cat(predicted), descriptors(first.eval(), data), rtol=1e-4, atol=1e-5)

    def test_other_weights_are_refused(self, backbone, data, tmp_path):
        worker = trainer(tmp_path)
        worker.fit(FrozenRetriever(backbone, Average(), Whitening(8)), data)
        worker.save_checkpoint(tmp_path / "c.ckpt")
        other = timm_backbone("test_resnet", weights="random", size=SIZE)
        with pytest.raises(ValueError, match=r"fitted on weights of the fixture .* give backbone.weights the same"):
            trainer(tmp_path).predict(
                FrozenRetriever(other, Average(), Whitening(8)), data, ckpt_path=tmp_path / "c.ckpt"
            )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda b: FrozenRetriever(b, Average(), scales=()), r"model.scales .* got \[\]"),
        (lambda b: FrozenRetriever(b, Average(), scales=(1.0, -0.5)), r"got \[1.0, -0.5\]"),
        (lambda b: FrozenRetriever(b, Average(), Whitening(97)), "dimension is 97, but the backbone has 96 channels"),
        (
            lambda b: FrozenRetriever(b, Average(), binarizer=Sign(97)),
            "97 bits needs a descriptor of at least as many dimensions",
        ),
        (lambda b: FrozenRetriever(b, Average(), Whitening(8), binarizer=ITQ(9)), "at least as many dimensions, got 8"),
        (lambda b: Whitening(0), "dimension must be at least 1, got 0"),
        (lambda b: Whitening(8, power=2), r"power and shrinkage must lie in \[0, 1\], got 2 and"),
        (lambda b: Whitening(8, shrinkage=-1), r"must lie in \[0, 1\]"),
    ],
)
def test_wrong_values_are_named(build, message, backbone):
    with pytest.raises(ValueError, match=message):
        build(backbone)
