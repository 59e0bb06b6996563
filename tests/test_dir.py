"""The R-MAC triplet network against scikit-learn's PCA and loops; mining from a pool against brute force."""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import simsearch
from sklearn.decomposition import PCA
from test_resume import DATA, DIR
from torch import Tensor, nn

from simsearch.callbacks.mining import TripletMining
from simsearch.data.samplers import MinedTriplets
from simsearch.functional.pooling import rmac_regions
from simsearch.models.backbones import timm_backbone
from simsearch.models.dir import RegionNetwork
from simsearch.models.pooling import MAC, RMAC, Average, GeM


def make(pooling: nn.Module | None = None, dimension: int = 6, size: int = 128, **settings: Any) -> RegionNetwork:
    torch.manual_seed(0)
    network = RegionNetwork(
        timm_backbone("test_efficientnet", "random", size), pooling or RMAC(levels=2), dimension, **settings
    )
    return network.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randint(0, 256, (30, 3, 4, 4), generator=generator).float()
    return F.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0, 255).byte()


def regions(network: RegionNetwork, images: Tensor) -> np.ndarray:
    """L2-normalised maxima of each region, (N, R, C), by loops."""
    with torch.no_grad():
        maps = network.backbone(images).double().numpy()
    found = np.stack(
        [
            [one[:, y : y + side, x : x + side].reshape(len(one), -1).max(1) for y, x, side in grid]
            for one in maps
            for grid in [rmac_regions(*maps.shape[2:], 2)]
        ]
    )
    return found / np.linalg.norm(found, axis=2, keepdims=True)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_projection_starts_as_the_pca_of_the_regions(power, images):
    network = make(power=power)
    network.prepare(images, torch.arange(len(images)))
    vectors = regions(network, images)
    assert vectors.shape[:2] == (30, 5)
    flat = vectors.reshape(-1, vectors.shape[2])
    pca = PCA(6, svd_solver="full").fit(flat)
    scaled = pca.transform(flat) / pca.explained_variance_ ** (power / 2)
    with torch.no_grad():
        got = network.head(torch.from_numpy(flat).float()).numpy()
    signs = np.sign((scaled * got).sum(0))  # a component's sign is free
    np.testing.assert_allclose(got * signs, scaled, atol=1e-3 * np.abs(scaled).max())
    if power == 1:
        np.testing.assert_allclose(np.cov(got.T), np.eye(6), atol=5e-3)


def test_the_descriptor_is_the_papers(images):
    network = make()
    network.prepare(images, torch.arange(len(images)))
    with torch.no_grad():
        network.head.bias.uniform_(-0.1, 0.1)
        got = network(images[:4])
    weight, bias = network.head.weight.detach().double().numpy(), network.head.bias.detach().double().numpy()
    for one, vectors in zip(got.numpy(), regions(network, images[:4]), strict=True):
        total = np.zeros(6)
        for vector in vectors:
            projected = weight @ vector + bias
            total += projected / np.linalg.norm(projected)
        np.testing.assert_allclose(one, total / np.linalg.norm(total), atol=1e-4)
    assert network.bits is None


def test_several_sizes_are_summed_at_test_only(images):
    network = make(size=128, scales=(0.5, 1.0, 1.5))
    network.prepare(images, torch.arange(len(images)))
    total = torch.zeros(4, 6)
    for size in (64, 128, 192):
        alone = make(size=size)
        alone.load_state_dict(network.state_dict())
        with torch.no_grad():
            total += alone(images[:4])
    with torch.no_grad():
        torch.testing.assert_close(network.embed(images[:4]), F.normalize(total, dim=1), rtol=1e-4, atol=1e-5)
        middle = make(size=128)
        middle.load_state_dict(network.state_dict())
        torch.testing.assert_close(network(images[:4]), middle(images[:4]))
    assert network.input_size == 192
    assert len(network.identity()["backbones"]) == 3


@pytest.mark.parametrize("pooling", [Average(), MAC(), GeM(3.0, trainable=True), RMAC(levels=3, whole=True)])
def test_every_pooling_has_its_place_and_learns(pooling, images):
    network = make(pooling)
    network.prepare(images, torch.arange(len(images)))
    network.train()
    out = network(images[:4])
    assert out.shape == (4, 6)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(4))
    (out @ torch.randn(6)).sum().backward()
    learnt = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"descriptor.whitening.weight", "backbone.network.model.conv_stem.weight"} <= learnt
    assert ("descriptor.pooling.p" in learnt) == isinstance(pooling, GeM)


def test_prepare_leaves_mode_and_statistics_alone_and_takes_the_same_sample_each_time(images):
    network = make(sample=12)
    before = {n: v.clone() for n, v in network.backbone.state_dict().items()}
    network.train().prepare(images, torch.arange(len(images)))
    assert all(m.training for m in network.modules())
    assert all(torch.equal(before[n], v) for n, v in network.backbone.state_dict().items())
    first = network.head.weight.clone()
    network.prepare(images, torch.arange(len(images)))
    assert torch.equal(network.head.weight, first)
    few = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:12]
    alone = make(sample=100)
    alone.prepare(images, few)
    torch.testing.assert_close(alone.head.weight, first, rtol=1e-3, atol=1e-3)


def test_too_few_regions_are_named(images):
    with pytest.raises(ValueError, match="PCA to 6 dimensions needs more than 5 region vectors"):
        make().prepare(images, torch.arange(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimension": 0}, "dimension=0 must lie in 1.."),
        ({"dimension": 10_000}, "dimension=10000 must lie in 1.."),
        ({"scales": ()}, "scales must be positive"),
        ({"scales": (1.0, -1.0)}, "scales must be positive"),
        ({"power": 1.5}, "power must lie"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


# ------------------------------------------------------------------------------ mining


class Spy(pl.Callback):
    """Writes down what the network was when triplets were mined, and what each batch held."""

    def __init__(self) -> None:
        self.mined: list[dict[str, Any]] = []
        self.batches: list[Tensor] = []
        self.modes: list[bool] = []

    @staticmethod
    def describe(trainer: pl.Trainer, module: pl.LightningModule, rows: Tensor) -> Tensor:
        modes = [(m, m.training) for m in module.modules()]
        module.eval()
        with torch.no_grad():
            vectors = module.embed(trainer.datamodule.collection.images[rows])
        for part, mode in modes:
            part.training = mode
        return vectors

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        sampler = trainer.train_dataloader.sampler
        if batch_idx == 0:
            train = trainer.datamodule.split.train
            self.mined.append({"triplets": train[sampler._triplets], "vectors": self.describe(trainer, module, train)})
            self.rows, self.labels = train, sampler.labels
        self.batches.append(batch["index"])
        norms = {id(part) for m in module.modules() if isinstance(m, nn.BatchNorm2d) for part in m.modules()}
        self.modes.append(all(m.training != (id(m) in norms) for m in module.modules()))

    def on_train_end(self, trainer, module) -> None:
        torch.save(
            {
                "mined": self.mined, "batches": self.batches, "rows": self.rows, "labels": self.labels,
                "modes": self.modes, "frozen": [n for n, p in module.named_parameters() if not p.requires_grad],
            },
            Path(trainer.default_root_dir) / "spy.pt",
        )  # fmt: skip


@pytest.fixture(scope="module")
def mined(tmp_path_factory) -> Path:
    """A training of two pools, of all 24 training images with the 4 hardest triplets each."""
    run = tmp_path_factory.mktemp("mined") / "run"
    simsearch(
        "train", *DATA, *DIR, f"run_dir={run}", "trainer.max_steps=6", "+callbacks.spy._target_=test_dir.Spy",
        "callbacks.mining.per_query=4", "optimizer.lr=0.01", "trainer.precision=32-true", "callbacks.mining.pool=1000",
        "catalog.write=false", "loss.margin=0.05", "callbacks.mining.batch_size=7", "data.augment=null",
    )  # fmt: skip
    return run


def test_each_batch_holds_hard_triplets_of_the_present_network(mined):
    spy = torch.load(mined / "spy.pt", weights_only=True)
    place = {int(row): i for i, row in enumerate(spy["rows"])}
    labels = spy["labels"].tolist()
    assert len(spy["mined"]) == 2
    for pool, batches in zip(spy["mined"], (spy["batches"][:3], spy["batches"][3:]), strict=True):
        assert torch.equal(torch.cat(batches).reshape(-1, 3), pool["triplets"])
        x = pool["vectors"].double().numpy()
        far = ((x[:, None] - x[None]) ** 2).sum(2)
        for triplet in pool["triplets"].tolist():
            q, p, n = (place[row] for row in triplet)
            everything = [
                0.5 * max(0.0, 0.05 + far[q, i] - far[q, j])
                for i, j in product(range(len(x)), repeat=2)
                if i != q and labels[i] == labels[q] != labels[j]
            ]
            assert labels[q] == labels[p] != labels[n]
            assert q != p
            loss = 0.5 * (0.05 + far[q, p] - far[q, n])
            assert loss > 0
            assert loss >= sorted(everything)[-4] - 1e-6
    assert not torch.equal(spy["mined"][0]["triplets"], spy["mined"][1]["triplets"])


def test_what_was_mined_and_how_stale_it_had_become_is_logged(mined):
    with (mined / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("mining/active")]
        assert [int(row["step"]) for row in rows] == [0, 3]
    with (mined / "metrics.csv").open() as file:
        stale = [row for row in csv.DictReader(file) if row.get("mining/staleness")]
    (row,) = stale
    assert float(row["mining/age"]) == 3
    first, second = (pool["vectors"] for pool in torch.load(mined / "spy.pt", weights_only=True)["mined"])
    drift = (second - first).norm(dim=1).mean()  # the pool holds all training images, in another order
    assert drift > 1e-4
    assert float(row["mining/staleness"]) == pytest.approx(float(drift), rel=1e-3)
    for row in rows:
        assert 0 < float(row["mining/active"]) <= 1
        assert float(row["mining/loss"]) > 0


def test_mining_leaves_modes_and_gradients_as_they_were(mined):
    spy = torch.load(mined / "spy.pt", weights_only=True)
    assert all(spy["modes"])  # everything trains but batch normalisation
    assert spy["frozen"]
    assert all("bn" in name or "classifier" in name for name in spy["frozen"])  # a classifier is never run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sampler=shuffle",), "needs the sampler that takes its triplets: sampler=mined"),
        (("callbacks.mining.pool=1",), "no triplet of the 1 images in the pool is within the margin"),
        (("callbacks.mining.per_query=0",), "callbacks.mining.per_query=0 is too small"),
    ],
)
def test_mining_that_cannot_be_is_named(arguments, message, tmp_path):
    rest = [a for a in DIR if not (arguments[0] == "sampler=shuffle" and a.startswith("sampler."))]
    rest = [a for a in rest if a.partition("=")[0] != arguments[0].partition("=")[0]]
    done = simsearch("train", *DATA, *rest, *arguments, f"run_dir={tmp_path / 'run'}", expect=1)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("select", ["hardest", "semihard"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e19])
def test_a_pool_that_is_no_number_names_step_and_rows(select, value, monkeypatch):
    rows = torch.arange(100, 120)
    split = SimpleNamespace(train=rows, test=SimpleNamespace(attribute="class"))
    collection = SimpleNamespace(column=lambda name: torch.arange(200) % 2)
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(split=split, collection=collection),
        train_dataloader=SimpleNamespace(
            sampler=SimpleNamespace(set_triplets=None, needs_triplets=True, epoch=3, wanted=4)
        ),
        is_global_zero=True, global_step=7, current_epoch=3,
    )  # fmt: skip
    mining = TripletMining(pool=20, select=select)

    def describe(trainer: Any, module: Any, rows: Tensor) -> Tensor:
        vectors = torch.nn.functional.one_hot(rows % 2, 4).float()
        vectors[rows == 111, 3] = value
        return vectors

    monkeypatch.setattr(mining, "_describe", describe)
    with pytest.raises(
        ValueError, match=r"1 of the 20 .*step 7 \(epoch 3, collection rows \[111\]\).*lower optimizer.lr"
    ):
        mining._mine(trainer, None)


def test_triplets_are_of_the_samplers_labels_not_of_the_protocols(monkeypatch):
    artist = torch.arange(200) // 2 % 2
    split = SimpleNamespace(train=torch.arange(100, 140), test=SimpleNamespace(attribute="style"))
    collection = SimpleNamespace(column=lambda name: artist if name == "artist" else torch.arange(200) % 2)
    sampler = MinedTriplets(artist[split.train], triplets=3, batches=2)  # those of the loss's first attribute
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(split=split, collection=collection), global_step=0, current_epoch=0, loggers=[],
        train_dataloader=SimpleNamespace(sampler=sampler), is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda mined: mined),
    )  # fmt: skip
    mining = TripletMining(pool=20, margin=1.0)
    monkeypatch.setattr(mining, "_describe", lambda trainer, module, rows: torch.randn(len(rows), 4))
    mining._mine(trainer, None)
    assert not sampler.needs_triplets


@pytest.mark.parametrize(("count", "world"), [(7, 2), (8, 2), (5, 4), (3, 4), (6, 1)])
def test_ranks_share_the_pool(count, world):
    images = torch.arange(100.0)[:, None]
    rows = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:count]

    class Module(pl.LightningModule):
        shares: dict[int, Tensor]
        learnt = 2

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return torch.cat([batch["image"], -batch["image"], 9 * batch["image"]], dim=1)  # the last is not learnt

        def all_gather(self, data: Tensor, *_: Any, **__: Any) -> Tensor:
            self.shares[len(self.shares)] = data
            return torch.zeros(world, *data.shape)

    module, mining = Module(), TripletMining(batch_size=2)
    module.shares = {}
    data = SimpleNamespace(collection=SimpleNamespace(images=images))
    for rank in range(world):
        trainer = SimpleNamespace(datamodule=data, world_size=world, global_rank=rank)
        alone = mining._describe(trainer, module, rows)
    if world > 1:
        assert len({len(share) for share in module.shares.values()}) == 1
        module.all_gather = lambda data: torch.stack(list(module.shares.values()))
        alone = mining._describe(trainer, module, rows)
    assert torch.equal(alone, module({"image": images[rows]})[:, :2])
