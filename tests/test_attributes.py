"""Losses of several attributes at once, against sums by hand, and the labels that reach them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.cache import ArrayCache
from simsearch.data.collection import Collection
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.data.protocols import OfficialSplit
from simsearch.data.samplers import PKBatches
from simsearch.functional.ragged import ragged
from simsearch.losses.attributes import MultiAttribute
from simsearch.losses.classification import ClassificationLoss
from simsearch.losses.dsh import DSHLoss
from simsearch.losses.normalised_softmax import NormalisedSoftmaxLoss
from simsearch.losses.triplet import BatchHardTripletLoss
from simsearch.models.backbones import lite0_backbone, timm_backbone
from simsearch.models.dir import RegionNetwork
from simsearch.models.pooling import RMAC, Average
from simsearch.models.trained import TrainedRetriever


def batch() -> tuple[Tensor, Tensor]:
    embeddings = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    return embeddings.requires_grad_(), torch.tensor([[0, 1], [0, -1], [1, 0], [1, 0], [-1, 1], [2, -1]])


def test_terms_are_of_the_rows_whose_label_is_known():
    embeddings, labels = batch()
    loss = MultiAttribute({"artist": BatchHardTripletLoss(0.3), "style": DSHLoss()}, {"artist": 2.0, "style": 0.5})
    assert loss.attributes == ("artist", "style")
    artist = BatchHardTripletLoss(0.3)(embeddings[[0, 1, 2, 3, 5]], torch.tensor([0, 0, 1, 1, 2]))
    style = DSHLoss()(embeddings[[0, 2, 3, 4]], torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(loss(embeddings, labels), 2 * artist + 0.5 * style)


def test_an_attribute_that_nobody_knows_costs_nothing():
    embeddings, labels = batch()
    loss = MultiAttribute({"a": NormalisedSoftmaxLoss(5, 3), "b": NormalisedSoftmaxLoss(5, 3)})
    labels[:, 1] = -1
    torch.testing.assert_close(
        loss(embeddings, labels), loss.losses[0](embeddings[labels[:, 0] >= 0], labels[labels[:, 0] >= 0, 0])
    )
    found = loss(embeddings, torch.full_like(labels, -1))
    assert found == 0
    found.backward()
    assert not embeddings.grad.any()
    assert not any(parameter.grad.any() for parameter in loss.parameters())  # none is missing, which ranks wait for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": {}}, "loss.losses is empty"),
        ({"losses": {"artist": DSHLoss()}, "weights": {"style": 1.0}}, "names style, loss.losses artist"),
        ({"losses": {"artist": DSHLoss()}, "weights": {"artist": -1.0}}, "loss.weights.artist=-1.0"),
    ],
)
def test_wrong_attributes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiAttribute(**arguments)


def test_labels_of_one_attribute_are_refused():
    loss = MultiAttribute({"artist": DSHLoss(), "style": DSHLoss()})
    with pytest.raises(ValueError, match=r"labels of artist, style must be \(B, 2\), got \(6,\)"):
        loss(batch()[0], torch.zeros(6, dtype=torch.int64))


def test_normalised_softmax_by_loops():
    embeddings, _ = batch()
    embeddings, labels = embeddings.detach() * 3, torch.tensor([0, 3, 1, 1, 2, 0])
    loss = NormalisedSoftmaxLoss(5, 4, scale=7.0)
    total = 0.0
    for vector, label in zip(embeddings.numpy(), labels.tolist(), strict=True):
        cosines = [
            7 * float(vector @ c) / float(np.linalg.norm(vector) * np.linalg.norm(c))
            for c in loss.centres.detach().numpy()
        ]
        total += float(np.log(np.exp(cosines).sum())) - cosines[label]
    assert loss(embeddings, labels).item() == pytest.approx(total / 6, abs=1e-5)
    with pytest.raises(ValueError, match=r"labels lie in 0\.\.4, outside the classifier's 0\.\.3"):
        loss(embeddings, labels.clone().index_fill_(0, torch.tensor([0]), 4))
    with pytest.raises(ValueError, match=r"loss\.scale=0"):
        NormalisedSoftmaxLoss(5, 4, scale=0)


# ------------------------------------------------------------------------------ in a training


class Paintings(RetrievalDataModule):
    """Noise by six artists of two styles, some of unknown style."""

    def __init__(self, shapes: bool = False, **arguments) -> None:
        super().__init__(OfficialSplit("p", gallery="train", exclude_self=True, attribute="artist"), **arguments)
        self.shapes = shapes

    def read(self) -> Collection:
        artist = torch.arange(72) % 6
        images = torch.randint(0, 256, (72, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return Collection(
            name="paintings",
            images=ragged([im[:, : 24 if i % 2 else 32] for i, im in enumerate(images)]) if self.shapes else images,
            labels=torch.stack([artist, torch.where(artist == 5, -1, artist % 2)], dim=1),
            attributes=("artist", "style"),
            classes=(tuple("abcdef"), ("x", "y")),
            is_test=torch.arange(72) >= 60,
        )


class Recording(nn.Module):
    """A loss that notes the labels."""

    def __init__(self, attributes: tuple[str, ...] | None) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        if attributes is not None:
            self.attributes = attributes

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.seen.append(labels)
        return embeddings.square().sum()


def fit(model: TrainedRetriever, data: RetrievalDataModule, folder: Path) -> None:
    pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(folder), limit_val_batches=0,
    ).fit(model, data)  # fmt: skip


def head(loss: nn.Module, pooling: nn.Module | None = None, fit: str = "square", **arguments) -> TrainedRetriever:
    backbone = timm_backbone(
        "test_efficientnet", "random", 32, statistics="moments", stages=[0, 1, 5], fit=fit, runtime="torch"
    )
    if pooling is not None:
        backbone = timm_backbone("test_efficientnet", "random", 32, fit=fit, runtime="torch")
    network = RegionNetwork(backbone, pooling or Average(), 4)
    return TrainedRetriever(network, loss, partial(torch.optim.SGD, lr=0.01), **arguments)


@pytest.mark.filterwarnings("ignore")
def test_a_loss_gets_the_labels_that_it_names(tmp_path):
    data = Paintings(sampler=partial(PKBatches, classes=2, images=4))
    data.setup()
    loss = Recording(("style", "artist"))
    with pytest.raises(ValueError, match="unknown labels"):  # the classes of the sampler are the first's
        fit(head(loss), data, tmp_path)
    loss = Recording(("artist", "style"))
    fit(head(loss), data, tmp_path)
    for labels in loss.seen:
        artist, style = labels.unbind(1)
        assert artist.unique(return_counts=True)[1].tolist() == [4, 4]
        assert torch.equal(style, torch.where(artist == 5, -1, artist % 2))
    assert next(iter(data.test_dataloader()["query"]))["label"].ndim == 1
    plain = Recording(None)
    fit(head(plain), data, tmp_path)
    assert all(labels.shape == (8,) for labels in plain.seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shapes", [False, True])
def test_a_head_learns_on_stored_statistics(shapes, tmp_path):
    data = Paintings(shapes)
    data.setup()
    loss = MultiAttribute({"artist": NormalisedSoftmaxLoss(4, 6), "style": ClassificationLoss(4, 2)})
    model = head(loss, fit="longest" if shapes else "square", cache=ArrayCache(tmp_path / "cache"))
    start = model.network.head.weight.clone()
    fit(model, data, tmp_path)
    assert not torch.equal(model.network.head.weight, start)
    assert len(list(tmp_path.glob("cache/*/array.npy"))) == 1
    rows = torch.arange(5)
    images = data.collection.images[rows]
    with torch.no_grad():
        stored = model.eval().describe_batch({"image": images, "label": rows, "index": rows})
        alone = torch.cat([model.embed(image[None]) for image in images])
    assert F.cosine_similarity(stored, alone).min() > 0.999


@pytest.mark.filterwarnings("ignore")
def test_regions_of_many_shapes_are_not_stored(tmp_path):
    data = Paintings(shapes=True)
    data.setup()
    model = head(Recording(None), RMAC(levels=2), "longest", cache=ArrayCache(tmp_path / "cache"))
    with pytest.raises(ValueError, match="keeps the same number of regions for each image"):
        fit(model, data, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_the_projection_starts_from_stored_features_as_from_images(tmp_path):
    data = Paintings()
    data.setup()
    starts = []
    for cache in (None, ArrayCache(tmp_path / "cache")):
        torch.manual_seed(0)
        model = head(Recording(None), cache=cache)
        model.optimizer = partial(torch.optim.SGD, lr=0.0)
        fit(model, data, tmp_path)
        starts.append(model.network.head.weight.detach() @ model.network.head.weight.detach().T)
    torch.testing.assert_close(*starts, rtol=0.02, atol=0.02 * float(starts[0].abs().max()))


def test_style_and_content_in_one_network():
    backbone = lite0_backbone("random", 64, "torch", statistics="moments", stages=[1, 5])
    network = RegionNetwork(backbone, Average(), 16)
    found = network.embed(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
