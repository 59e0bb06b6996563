"""DataModules: what arrives in training, validation and test, alone and under a Trainer."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from simsearch.data import datamodule as module
from simsearch.data.cifar10 import DataError
from simsearch.data.collection import Collection
from simsearch.data.datamodule import CIFAR10DataModule, RenderedDataModule, RetrievalDataModule
from simsearch.data.protocols import ByAttribute, OfficialSplit, RetrievalProtocol
from simsearch.data.samplers import ShuffledBatches
from simsearch.data.transforms import RowAugmentation

CONF = Path(__file__).parents[1] / "conf" / "data"
PROTOCOL = OfficialSplit("p", gallery="train", exclude_self=True, validation=0.2)


def random_collection() -> Collection:
    """100 training and 23 test images of 5 classes, with a second attribute before the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.arange(123) % 3, torch.arange(123) % 5], dim=1)
    return Collection(
        name="random",
        images=torch.randint(0, 256, (123, 3, 8, 8), dtype=torch.uint8, generator=generator),
        labels=labels,
        attributes=("other", "class"),
        classes=(tuple("xyz"), tuple("abcde")),
        is_test=torch.arange(123) >= 100,
    )


class RandomDataModule(RetrievalDataModule):
    reads = 0

    def read(self) -> Collection:
        self.reads += 1
        return random_collection()


class Invert(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 255 - images


def ready(**arguments) -> RandomDataModule:
    arguments = {"sampler": partial(ShuffledBatches, batch_size=16), **arguments}
    data = RandomDataModule(PROTOCOL, eval_batch_size=10, **arguments)
    data.setup()
    return data


def check(batch: dict, collection: Collection) -> None:
    assert set(batch) == {"image", "label", "index"}
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    for image, label, row in zip(batch["image"], batch["label"].tolist(), batch["index"].tolist(), strict=True):
        assert torch.equal(image, collection.images[row])
        assert label == row % 5


def test_training_batches_hold_every_row_once_in_a_new_order():
    data = ready()
    epochs = []
    loader = data.train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["label"]) for batch in batches] == [16] * 5
        for batch in batches:
            check(batch, data.collection)
        epochs.append(torch.cat([batch["index"] for batch in batches]).tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == data.split.train.tolist()
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_the_last_training_batch_is_kept():
    data = ready(sampler=partial(ShuffledBatches, batch_size=32))
    assert [len(batch["label"]) for batch in data.train_dataloader()] == [32, 32, 16]


def test_batches_of_128_without_a_sampler():
    data = ready(sampler=None)
    assert [len(batch["label"]) for batch in data.train_dataloader()] == [80]
    assert data.train_dataloader().sampler.batch_size == 128


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_loaders_hold_the_task_in_its_order(stage, num_workers):
    data = ready(num_workers=num_workers)
    loaders = data.val_dataloader() if stage == "validate" else data.test_dataloader()
    assert list(loaders) == ["query", "gallery"]
    for part, loader in loaders.items():
        batches = list(loader)
        for batch in batches:
            check(batch, data.collection)
        assert torch.equal(torch.cat([b["index"] for b in batches]), getattr(data.task(stage), part))


def test_one_item_equals_its_place_in_a_batch():
    dataset = ready().train_dataloader().dataset
    batch = dataset.__getitems__([3, 1])
    for place, position in enumerate((3, 1)):
        assert all(torch.equal(dataset[position][key], batch[key][place]) for key in batch)


def test_the_label_is_the_attribute_of_the_protocol():
    protocol = OfficialSplit("p", gallery="train", exclude_self=True, attribute="other")
    data = RandomDataModule(protocol)
    data.setup()
    loaders = [data.train_dataloader(), *data.val_dataloader().values(), *data.test_dataloader().values()]
    for loader in loaders:
        for batch in loader:
            assert torch.equal(batch["label"], batch["index"] % 3)


def test_a_sampler_replaces_shuffling():
    seen = []

    class OneClass(ShuffledBatches):
        def global_batch(self, number, world):
            rows = super().global_batch(number, world)
            return rows[self.labels[rows] == 2]

    def sampler(labels: Tensor) -> OneClass:
        seen.append(labels)
        batches = OneClass(labels, batch_size=16)
        batches.labels = labels
        return batches

    data = ready(sampler=sampler)
    labels = torch.cat([batch["label"] for batch in data.train_dataloader()])
    assert torch.equal(seen[0], data.split.train % 5)
    assert labels.tolist() == [2] * 16


def test_setup_reads_once():
    data = ready()
    for stage in ("fit", "validate", "test", None):
        data.setup(stage)
    assert data.reads == 1


class Recorder(pl.LightningModule):
    """Keeps what each step was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[tuple[str, int], list[dict]] = {}

    def keep(self, stage: str, batch: dict, dataloader_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.seen.setdefault((stage, dataloader_idx), []).append(batch)

    def training_step(self, batch, batch_idx):
        self.keep("train", batch, 0)
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.keep("validate", batch, dataloader_idx)

    def test_step(self, batch, batch_idx, dataloader_idx):
        self.keep("test", batch, dataloader_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_under_a_trainer(tmp_path):
    data = ready(augment=Invert())
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    model = Recorder()
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert data.reads == 1
    assert set(model.seen) == {("train", 0), ("validate", 0), ("validate", 1), ("test", 0), ("test", 1)}
    for (stage, loader), batches in model.seen.items():
        for batch in batches:
            plain = dict(batch) if stage != "train" else {**batch, "image": 255 - batch["image"]}
            check(plain, data.collection)
        rows = torch.cat([batch["index"] for batch in batches])
        if stage == "train":
            assert sorted(rows.tolist()) == sorted(data.split.train.tolist() * 2)
        else:
            task = data.task(stage)
            expected = (task.query, task.gallery)[loader]
            assert torch.equal(rows, expected.repeat(2 if stage == "validate" else 1))


class RowAndEpoch(RowAugmentation):
    """Images whose every value is the row plus 100 times the epoch."""

    def forward(self, images, rows, epoch):
        return torch.zeros_like(images, dtype=torch.int64) + (rows + 100 * epoch)[:, None, None, None]


def test_an_augmentation_by_rows_gets_each_images_row_and_the_epoch(tmp_path):
    data = ready(augment=RowAndEpoch())
    model = Recorder()
    pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    ).fit(model, data)
    batches = model.seen["train", 0]
    for number, batch in enumerate(batches):
        epoch = number // (len(batches) // 3)
        assert torch.equal(batch["image"][:, 0, 0, 0], batch["index"] + 100 * epoch)
    assert len(batches) % 3 == 0


class RowsOfRanks(Recorder):
    """Writes the rows that each rank was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_test_end(self):
        self.write()

    def on_train_end(self):
        self.write()

    def write(self):
        for (stage, loader), batches in self.seen.items():
            rows = torch.cat([batch["index"] for batch in batches]).numpy()
            np.save(self.folder / f"{stage}-{loader}-{self.global_rank}.npy", rows)


def test_two_ranks_share_each_loader(tmp_path):
    data = ready()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    model = RowsOfRanks(tmp_path)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    data.setup()
    expected = {"train-0": data.split.train}
    for stage in ("validate", "test"):
        task = data.task(stage)
        expected |= {f"{stage}-0": task.query, f"{stage}-1": task.gallery}
    for name, rows in expected.items():
        ranks = [np.load(tmp_path / f"{name}-{rank}.npy").tolist() for rank in range(2)]
        assert abs(len(ranks[0]) - len(ranks[1])) <= 1
        assert sorted(ranks[0] + ranks[1]) == sorted(rows.tolist())  # no padding counted twice


# CIFAR-10 and the rendered sample


def build(name: str, protocol: RetrievalProtocol) -> RetrievalDataModule:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    config.pop("defaults", None)  # the choice of a protocol, which is Hydra's
    config.sampler = None  # another group's
    return instantiate(config, _convert_="all", _partial_=True)(protocol=protocol)


def write_cifar10(root: Path) -> None:
    root.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    blobs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        blobs.append({"bytes": buffer.getvalue(), "path": None})
    for part, rows in (("train", slice(0, 40)), ("test", slice(40, 50))):
        table = {"img": blobs[rows], "label": [*range(10)] * (len(blobs[rows]) // 10)}
        pq.write_table(pa.table(table), root / f"{part}-00000-of-00001.parquet")


def test_cifar10_of_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMSEARCH_DATA", str(tmp_path))
    monkeypatch.setenv("SIMSEARCH_CACHE", str(tmp_path / "cache"))
    write_cifar10(tmp_path / "cifar10")
    data = build("cifar10", PROTOCOL)
    assert isinstance(data, CIFAR10DataModule)
    data.prepare_data()
    assert len(os.listdir(tmp_path / "cache" / "images")) == 1
    data.setup("fit")
    assert len(data.collection) == 50
    assert len(data.split.test.query) == 10


def test_cifar10_config_without_variables(monkeypatch):
    monkeypatch.delenv("SIMSEARCH_DATA", raising=False)
    monkeypatch.delenv("SIMSEARCH_CACHE", raising=False)
    config = OmegaConf.load(CONF / "cifar10.yaml")
    assert (config.root, config.cache) == ("data/cifar10", "~/.cache/simsearch/images")


def test_only_prepare_data_downloads(tmp_path, monkeypatch):
    calls = []

    def read_cifar10(root, *, download=False, cache=None):
        calls.append((root, download, cache))
        return random_collection()

    monkeypatch.setattr(module, "read_cifar10", read_cifar10)
    data = CIFAR10DataModule(PROTOCOL, root=str(tmp_path), download=True)
    data.prepare_data()
    data.setup()
    assert calls == [(tmp_path, True, None), (tmp_path, False, None)]
    CIFAR10DataModule(PROTOCOL, root=str(tmp_path)).prepare_data()
    assert len(calls) == 2


def test_missing_cifar10_is_named_at_setup(tmp_path):
    with pytest.raises(DataError, match=f"no CIFAR-10 in {tmp_path}"):
        CIFAR10DataModule(PROTOCOL, root=str(tmp_path)).setup()


def test_rendered_sample():
    protocol = ByAttribute("rendered-artist", attribute="artist", junk="work")
    data = RenderedDataModule(protocol, styles=2, artists=2, works=5, photographs=3, size=16)
    data.setup()
    assert data.collection.images.shape == (60, 3, 16, 16)
    task = data.task("test")
    assert (len(task.query), len(task.gallery)) == (10, 30)
    batch = next(iter(data.test_dataloader()["query"]))
    assert torch.equal(batch["label"], data.collection.column("artist")[task.query])
    with pytest.raises(ValueError, match=r"p needs the attribute 'class', but .* has style, artist, work"):
        PROTOCOL.split(data.collection)


def test_rendered_config_has_the_defaults():
    data = build("rendered", PROTOCOL)
    default = RenderedDataModule(PROTOCOL)
    for name in (
        "styles",
        "artists",
        "works",
        "photographs",
        "size",
        "seed",
        "eval_batch_size",
    ):
        assert getattr(data, name) == getattr(default, name)


# Errors


def test_use_before_setup():
    data = RandomDataModule(PROTOCOL)
    for use in (
        lambda: data.collection,
        lambda: data.split,
        lambda: data.task("test"),
        data.train_dataloader,
    ):
        with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) first"):
            use()


def test_wrong_values_are_refused():
    for argument, value in (("eval_batch_size", -1), ("num_workers", -1)):
        with pytest.raises(ValueError, match=f"{argument}={value} is too small"):
            RandomDataModule(PROTOCOL, **{argument: value})
    with pytest.raises(ValueError, match="stage='fit' has no task to measure: use 'validate' or 'test'"):
        ready().task("fit")


def test_a_protocol_that_hydra_turned_into_a_config_is_refused():
    config = OmegaConf.load(CONF / "rendered.yaml")
    config.sampler = None
    with pytest.raises(InstantiationException, match=r"got DictConfig: .*_partial_=True\)\(protocol=protocol\)"):
        instantiate(config, protocol=PROTOCOL)
