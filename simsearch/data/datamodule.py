"""DataModules for retrieval: one uint8 tensor, a training loader, and loaders of queries and gallery."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from simsearch.data.cifar10 import read_cifar10
from simsearch.data.collection import Collection
from simsearch.data.protocols import RetrievalProtocol, Split
from simsearch.data.samplers import Batches, ResumableLoader, ShuffledBatches, end_workers_at_exit, leave_signals
from simsearch.data.smoke import shrunk
from simsearch.data.transforms import RowAugmentation
from simsearch.functional.collectives import rank_and_world, world_size
from simsearch.functional.ragged import Ragged
from simsearch.types import Batch, RetrievalTask


class CollectionRows(Dataset):
    """Some rows of a collection. A DataLoader fetches a whole batch by one indexing operation.

    Args:
        collection: The collection.
        rows: int64 (N,).
        attribute: The attribute that becomes `label`, int64 (B,). A list of attributes gives labels (B, A).
    """

    def __init__(self, collection: Collection, rows: Tensor, attribute: str | Sequence[str]) -> None:
        self.images = collection.images
        names = [attribute] if isinstance(attribute, str) else attribute
        columns = [collection.column(name) for name in names]
        self.labels = columns[0] if isinstance(attribute, str) else torch.stack(columns, dim=1)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Batch:
        """One item, without the batch dimension."""
        row = self.rows[position]
        image = self.images[row]
        assert isinstance(image, Tensor)  # a single row is never Ragged
        return Batch(image=image, label=self.labels[row], index=row)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of the given positions. DataLoader calls this method if it exists."""
        rows = self.rows[positions]
        images = self.images[rows]
        if isinstance(images, Ragged):  # it is a view: a worker would send all pixels of the collection
            images = images.packed()
        return Batch(image=images, label=self.labels[rows], index=rows)  # type: ignore[typeddict-item]


class OwnPart(DistributedSampler):
    """This rank's part of a data set: a contiguous range of positions without padding. One process has all positions.

    It is a DistributedSampler so that a Trainer does not divide the data a second time.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Sized) -> None:
        rank, world = rank_and_world()
        super().__init__(dataset, world, rank, shuffle=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self._part)

    def __len__(self) -> int:
        return len(self._part)

    @property
    def _part(self) -> range:
        count = len(self.dataset)  # type: ignore[arg-type]
        return range(count * self.rank // self.num_replicas, count * (self.rank + 1) // self.num_replicas)


class RetrievalDataModule(pl.LightningDataModule):
    """Loaders of a collection under a protocol. A subclass defines `read`, which returns the collection.

    Args:
        protocol: The protocol, which splits the collection.
        sampler: Makes the training batches, as positions 0..N-1, from the training labels, int64 (N,). None for
            shuffled batches of 128.
        eval_batch_size: Number of images in a batch of evaluation, from 1.
        augment: Maps images uint8 (B, 3, H, W) to the same type, on the device, in training only. A RowAugmentation
            gets their rows and the epoch too. None for no augmentation.
        num_workers: Number of loader processes.

    Attributes:
        targets: Attributes that training labels (B, A) hold. A model whose loss needs several sets them before the
            training loader is made. The sampler sees the first. None for the protocol's attribute, (B,), as in
            evaluation.
        whole_batches: Whether several processes leave out a batch that is not full. A model that learns by gradient
            sets it.

    Raises:
        ValueError: If the batch size is below 1 or `num_workers` is negative.
        TypeError: If the protocol has no `split`.
    """

    def __init__(
        self,
        protocol: RetrievalProtocol,
        sampler: Callable[[Tensor], Batches] | None = None,
        eval_batch_size: int = 512,
        augment: nn.Module | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not callable(getattr(protocol, "split", None)):
            raise TypeError(
                f"protocol must be an object with split(collection), got {type(protocol).__name__}: Hydra "
                "turns a dataclass among instantiate's arguments into a config, so build the DataModule by "
                "instantiate(config, _partial_=True)(protocol=protocol)"
            )
        for name, value, least in (
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is too small: use {least} or more")
        self.protocol = protocol
        self.eval_batch_size = eval_batch_size
        self.augment = augment
        self.num_workers = num_workers
        self.sampler = sampler
        self.targets: Sequence[str] | None = None
        self.whole_batches = False
        self.allow_zero_length_dataloader_with_multiple_devices = True  # few queries on many ranks
        self._collection: Collection | None = None
        self._split: Split | None = None

    def read(self) -> Collection:
        """The collection. Each process calls this method once."""
        raise NotImplementedError(f"{type(self).__name__} must define read() -> Collection")

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the data at the first call."""
        if self._split is None:
            self._collection = self.read()
            self._split = self.protocol.split(self._collection)

    def shrink(self) -> None:
        """Reduces the data to a few hundred images, as data.smoke chooses them. The data must be read already."""
        self._collection, self._split = shrunk(self.collection, self.split)

    @property
    def collection(self) -> Collection:
        """The collection. Raises RuntimeError before setup()."""
        if self._collection is None:
            raise RuntimeError("the data are not read yet: call prepare_data() and setup() first")
        return self._collection

    @property
    def split(self) -> Split:
        """The protocol's split. Raises RuntimeError before setup()."""
        if self._split is None:
            raise RuntimeError("the data are not split yet: call prepare_data() and setup() first")
        return self._split

    def task(self, stage: Literal["validate", "test"]) -> RetrievalTask:
        """The task of a stage.

        Args:
            stage: "validate" or "test".

        Raises:
            ValueError: If the stage is unknown, or nothing is held out for validation.
        """
        if stage not in ("validate", "test"):
            raise ValueError(f"stage={stage!r} has no task to measure: use 'validate' or 'test'")
        if stage == "test":
            return self.split.test
        if self.split.validation is None:
            raise ValueError("protocol.validation=null trains on all rows: there is no validation task to measure")
        return self.split.validation

    def train_dataloader(self) -> ResumableLoader:
        """Loader of the training rows in the sampler's order. After an interruption it continues where it stopped.

        Raises:
            ValueError: If the protocol leaves no image to train on.
        """
        if not len(self.split.train):
            raise ValueError(
                f"protocol {self.split.test.name} leaves no image to train on, since it uses all images for the test"
            )
        attribute = self.targets or self.split.test.attribute
        first = attribute if isinstance(attribute, str) else attribute[0]
        labels = self.collection.column(first)[self.split.train]
        batches = ShuffledBatches(labels, 128) if self.sampler is None else self.sampler(labels)
        batches.whole = self.whole_batches
        rows = CollectionRows(self.collection, self.split.train, attribute)
        return ResumableLoader(rows, batches, _whole_batch, self.num_workers)

    def val_dataloader(self) -> dict[str, DataLoader]:
        """Loaders `query` (dataloader_idx 0) and `gallery` (1) of the validation task, in its order.

        There are none without a validation task. Each rank gets its own part, as of the test task.
        """
        return {} if self.split.validation is None else self._evaluation_loaders("validate")

    def test_dataloader(self) -> dict[str, DataLoader]:
        """Loaders `query` (dataloader_idx 0) and `gallery` (1) of the test task in its order.

        Each rank gets a contiguous part of both, perhaps empty. No row comes twice.

        Raises:
            ValueError: If there are fewer gallery images than ranks.
        """
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader:
        """Loader of the whole collection in row order."""
        rows = torch.arange(len(self.collection))
        return self._loader(rows, self.split.test.attribute, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch on the device, augmented in training."""
        if self.augment is None or self.trainer is None or not self.trainer.training:
            return batch
        if isinstance(self.augment, RowAugmentation):
            image = self.augment(batch["image"], batch["index"], self.trainer.current_epoch)
        else:
            image = self.augment(batch["image"])
        return Batch(image=image, label=batch["label"], index=batch["index"])

    def _evaluation_loaders(self, stage: Literal["validate", "test"]) -> dict[str, DataLoader]:
        task = self.task(stage)
        world = world_size()
        if len(task.gallery) < world:  # the other ranks would wait for a rank without any data
            raise ValueError(
                f"{task.name} has {len(task.gallery)} gallery images, fewer than the {world} processes: use fewer "
                "processes"
            )
        return {
            "query": self._loader(task.query, task.attribute, self.eval_batch_size, shared=True),
            "gallery": self._loader(task.gallery, task.attribute, self.eval_batch_size, shared=True),
        }

    def _loader(
        self,
        rows: Tensor,
        attribute: str,
        batch_size: int,
        shared: bool = False,
    ) -> DataLoader:
        data = CollectionRows(self.collection, rows, attribute)
        end_workers_at_exit()
        return DataLoader(
            data,
            batch_size=batch_size,
            sampler=OwnPart(data) if shared else None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_whole_batch,  # type: ignore[arg-type]
            worker_init_fn=leave_signals,
        )


class CIFAR10DataModule(RetrievalDataModule):
    """CIFAR-10 under a protocol.

    One process on each node downloads the data and fills the cache.

    Args:
        protocol: As in RetrievalDataModule.
        root: As in read_cifar10.
        download: As in read_cifar10.
        cache: As in read_cifar10.
        sampler: As in RetrievalDataModule.
        eval_batch_size: As in RetrievalDataModule.
        augment: As in RetrievalDataModule.
        num_workers: As in RetrievalDataModule.
    """

    def __init__(
        self,
        protocol: RetrievalProtocol,
        root: str,
        download: bool = False,
        cache: str | None = None,
        sampler: Callable[[Tensor], Batches] | None = None,
        eval_batch_size: int = 512,
        augment: nn.Module | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(protocol, sampler, eval_batch_size, augment, num_workers)
        self.root = Path(root)
        self.download = download
        self.cache = None if cache is None else Path(cache)

    def prepare_data(self) -> None:
        """Downloads the data and fills the cache, if asked to."""
        if self.download or self.cache is not None:
            read_cifar10(self.root, download=self.download, cache=self.cache)

    def read(self) -> Collection:
        """CIFAR-10 from the files in `root`.

        Raises:
            DataError: If they are missing, damaged or unexpected.
        """
        return read_cifar10(self.root, cache=self.cache)


class RenderedDataModule(RetrievalDataModule):
    """The rendered sample under a protocol.

    Args:
        protocol: As in RetrievalDataModule.
        styles: As in render_collection.
        artists: As in render_collection.
        works: As in render_collection.
        photographs: As in render_collection.
        size: As in render_collection.
        seed: As in render_collection.
        sampler: As in RetrievalDataModule.
        eval_batch_size: As in RetrievalDataModule.
        augment: As in RetrievalDataModule.
        num_workers: As in RetrievalDataModule.
    """

    def __init__(
        self,
        protocol: RetrievalProtocol,
        styles: int = 8,
        artists: int = 5,
        works: int = 15,
        photographs: int = 5,
        size: int = 96,
        seed: int = 0,
        sampler: Callable[[Tensor], Batches] | None = None,
        eval_batch_size: int = 512,
        augment: nn.Module | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(protocol, sampler, eval_batch_size, augment, num_workers)
        self.styles = styles
        self.artists = artists
        self.works = works
        self.photographs = photographs
        self.size = size
        self.seed = seed

    def read(self) -> Collection:
        """The rendered collection, the same in every process."""
        from simsearch.data.rendered.collection import render_collection

        return render_collection(
            styles=self.styles,
            artists=self.artists,
            works=self.works,
            photographs=self.photographs,
            size=self.size,
            seed=self.seed,
        )


def _whole_batch(batch: Batch) -> Batch:
    return batch
