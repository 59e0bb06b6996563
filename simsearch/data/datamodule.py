"""DataModules for retrieval: one uint8 tensor, a training loader, and query and gallery loaders."""

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
from simsearch.functional.collectives import rank_and_world, world_size
from simsearch.functional.ragged import Ragged
from simsearch.types import Batch, RetrievalTask


class CollectionRows(Dataset):
    """Some rows of a collection; a DataLoader fetches a whole batch by one indexing operation.

    collection: the images. rows: int64 (N,). attribute: the one that becomes `label`, int64 (B,); of several, in a
    list, it is (B, A).
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
        """One item without the batch dimension."""
        row = self.rows[position]
        image = self.images[row]
        assert isinstance(image, Tensor)  # of one row, however many shapes the others have
        return Batch(image=image, label=self.labels[row], index=row)

    def __getitems__(self, positions: list[int]) -> Batch:
        """The batch of the given positions, which DataLoader asks for where this method exists."""
        rows = self.rows[positions]
        images = self.images[rows]
        if isinstance(images, Ragged):  # a view: a worker would send all pixels of the collection
            images = images.packed()
        return Batch(image=images, label=self.labels[rows], index=rows)  # type: ignore[typeddict-item]


class OwnPart(DistributedSampler):
    """This rank's part of a data set's positions, in one piece and without padding; all of them in one process.

    It is a DistributedSampler so that a Trainer does not deal out a second time.
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
    """Loaders of a collection under a protocol; a subclass says in `read` where the collection is from.

    protocol: gives the split. sampler: makes the training batches, as positions 0..N-1, from the training
    labels, int64 (N,); shuffled batches of 128 where None. eval_batch_size: images a batch in evaluation.
    augment: maps uint8 (B, 3, H, W) to the same, on the device, in training only. num_workers: loader
    processes.

    targets: attributes that training labels (B, A) hold, set by a model whose loss wants several before the training
    loader is made; the sampler sees the first. None: the protocol's attribute, (B,), as in evaluation. whole_batches:
    set by a model that learns by gradient: several processes leave out a batch that is not full.

    Raises ValueError for a batch size below 1 or a negative num_workers, TypeError for a protocol that
    cannot split.
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
        """The collection; called once in each process."""
        raise NotImplementedError(f"{type(self).__name__} must define read() -> Collection")

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits, the first time that it is called."""
        if self._split is None:
            self._collection = self.read()
            self._split = self.protocol.split(self._collection)

    def shrink(self) -> None:
        """Goes on with a few hundred images, as data.smoke chooses them; the data must be read."""
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
        """The task that a stage measures. Raises ValueError for another stage, or where nothing is held out."""
        if stage not in ("validate", "test"):
            raise ValueError(f"stage={stage!r} measures nothing: use 'validate' or 'test'")
        if stage == "test":
            return self.split.test
        if self.split.validation is None:
            raise ValueError("protocol.validation=null trains on all rows: there is no validation task to measure")
        return self.split.validation

    def train_dataloader(self) -> ResumableLoader:
        """Loader of the training rows in the sampler's order, which goes on where a run was interrupted."""
        if not len(self.split.train):
            raise ValueError(f"protocol {self.split.test.name} leaves no image to train on: it measures all of them")
        attribute = self.targets or self.split.test.attribute
        first = attribute if isinstance(attribute, str) else attribute[0]
        labels = self.collection.column(first)[self.split.train]
        batches = ShuffledBatches(labels, 128) if self.sampler is None else self.sampler(labels)
        batches.whole = self.whole_batches
        rows = CollectionRows(self.collection, self.split.train, attribute)
        return ResumableLoader(rows, batches, _whole_batch, self.num_workers)

    def val_dataloader(self) -> dict[str, DataLoader]:
        """Loaders `query` (dataloader_idx 0) and `gallery` (1) of the validation task, in its order; or none.

        Of several ranks each gets its own part, as of the test task.
        """
        return {} if self.split.validation is None else self._evaluation_loaders("validate")

    def test_dataloader(self) -> dict[str, DataLoader]:
        """Loaders `query` (dataloader_idx 0) and `gallery` (1) of the test task, in its order.

        Of several ranks each gets its own part of both: in one piece, no row twice, perhaps none. Raises
        ValueError where there are fewer gallery images than ranks.
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
        return Batch(image=self.augment(batch["image"]), label=batch["label"], index=batch["index"])

    def _evaluation_loaders(self, stage: Literal["validate", "test"]) -> dict[str, DataLoader]:
        task = self.task(stage)
        world = world_size()
        if len(task.gallery) < world:  # a rank with nothing at all would leave the others waiting
            raise ValueError(f"{task.name} has {len(task.gallery)} gallery images: use no more processes, not {world}")
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

    root, download, cache: as read_cifar10 has them; the download and the filling of the cache happen in
    one process of a node. The rest: as RetrievalDataModule has it.
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
        """Downloads and fills the cache where either is asked for."""
        if self.download or self.cache is not None:
            read_cifar10(self.root, download=self.download, cache=self.cache)

    def read(self) -> Collection:
        """CIFAR-10, from what lies there. Raises DataError."""
        return read_cifar10(self.root, cache=self.cache)


class RenderedDataModule(RetrievalDataModule):
    """The rendered sample under a protocol.

    styles, artists, works, photographs, size, seed: as render_collection has them. The rest: as
    RetrievalDataModule has it.
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
