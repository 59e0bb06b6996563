"""Samplers of whole batches that resume exactly where a run was interrupted, and the loader that keeps count.

A sampler yields lists of positions 0..N-1 of the training rows, which depend only on seed, epoch and batch number. With
W processes a *global* batch is drawn, and each process takes its part, in rank order. All parts together are the batch
that one process with W times the batch size would draw.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from simsearch.functional.collectives import rank_and_world


class Batches(Sampler[list[int]]):
    """Lists of positions, one for each batch. Iterating yields the rest of the epoch.

    Args:
        labels: Labels of the training rows, int64 (N,).
        seed: Seed of the batches.

    Attributes:
        epoch: Epoch of the next batch. `advance` moves it.
        position: Number of the next batch in the epoch. The consumer of a batch calls `advance`, because workers fetch
            batches ahead of it.
        whole: Whether several processes leave out a batch that is not full. Divided over processes, its few rows would
            count as much as a full batch.

    Raises:
        ValueError: If there are no labels or they have another shape.
    """

    def __init__(self, labels: Tensor, seed: int) -> None:
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"labels of the training rows must be (N,) with N > 0, got {tuple(labels.shape)}")
        self.count, self.seed = len(labels), seed
        self._rows = {"count": self.count, "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]}
        self.epoch = self.position = 0
        self.whole = False

    def length(self, world: int) -> int:
        """Number of batches in an epoch.

        Args:
            world: Number of processes.

        Raises:
            ValueError: If there is none.
        """
        raise NotImplementedError

    def global_batch(self, number: int, world: int) -> np.ndarray:
        """Positions of a global batch of the current epoch, in rank order.

        Args:
            number: Number of the batch in the epoch.
            world: Number of processes.
        """
        raise NotImplementedError

    def batches(self, rank: int, world: int) -> Iterator[list[int]]:
        """The rest of the epoch for one process.

        Args:
            rank: Rank of the process.
            world: Number of processes.
        """
        for number in range(self.position, self.length(world)):
            yield np.array_split(self.global_batch(number, world), world)[rank].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches(*rank_and_world())

    def __len__(self) -> int:
        return self.length(rank_and_world()[1])

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch. In the current epoch the position is unchanged.

        Args:
            epoch: The epoch.
        """
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def advance(self) -> None:
        """Moves past one consumed batch. After the last one the next epoch begins."""
        self.position += 1
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, equal on all ranks, and what tells the training rows from others."""
        return {"epoch": self.epoch, "position": self.position, "world": rank_and_world()[1], "rows": self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves to a saved position.

        Args:
            state: The result of `state_dict`.

        Raises:
            ValueError: If the training rows have changed, or within an epoch of another number of processes.
        """
        world = rank_and_world()[1]
        rows = state.get("rows", self._rows)  # older checkpoints do not tell
        if rows != self._rows:
            raise ValueError(
                f"the data have changed since the training was interrupted: it had {rows['count']} training rows, now "
                f"there are {self.count}, or their labels differ. Rows of the validation may have been trained on: put "
                "the data back, or train a new run, which model.start lets begin with this one's weights"
            )
        if state["position"] and state["world"] != world:
            raise ValueError(
                f"the epoch was interrupted with {state['world']} processes and cannot continue with {world}: resume "
                f"with {state['world']}, or from a checkpoint at the end of an epoch"
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *key])


class ShuffledBatches(Batches):
    """Each training row once per epoch, in random order, with `batch_size` rows for each batch and process.

    Without `drop_last`, ranks share the last global batch as evenly as possible. If it has fewer rows than ranks, or a
    single row, its rows join the previous batch.

    Args:
        labels: Labels of the training rows, int64 (N,).
        batch_size: Rows for each batch and process, from 1.
        seed: Seed of the order.
        drop_last: Whether to leave out the last global batch if it is not full.

    Raises:
        ValueError: If `batch_size` is below 1.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__(labels, seed)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: use 1 or more")
        self.batch_size, self.drop_last = batch_size, drop_last
        self._order: tuple[int, np.ndarray] | None = None

    def length(self, world: int) -> int:
        """Number of batches in an epoch.

        Args:
            world: Number of processes.

        Raises:
            ValueError: If the rows do not fill a batch.
        """
        full, rest = divmod(self.count, self.batch_size * world)
        length = full + (rest >= max(world, 2 if full else 1) and not self._drops(world))
        if length == 0:
            raise ValueError(
                f"{self.count} training rows do not fill a batch of {self.batch_size} on {world} processes: "
                "use a smaller batch_size"
            )
        return length

    def global_batch(self, number: int, world: int) -> np.ndarray:
        """Positions of a global batch of the current epoch, in rank order.

        Args:
            number: Number of the batch in the epoch.
            world: Number of processes.
        """
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self._generator().permutation(self.count)
        size = self.batch_size * world
        last = number + 1 == self.length(world) and not self._drops(world)
        return self._order[1][number * size : None if last else (number + 1) * size]

    def _drops(self, world: int) -> bool:
        return self.drop_last or (self.whole and 1 < world <= self.count // self.batch_size)


class ViewBatches(ShuffledBatches):
    """Each training row once per epoch, in random order, several times in a row: its views, once augmented.

    A batch that is not full may divide the views of a row between processes.

    Args:
        labels: Labels of the training rows, int64 (N,).
        images: Different rows for each batch and process, from 2. A batch holds images x views rows.
        views: Number of times that a batch holds each row, from 2.
        seed: Seed of the order.

    Raises:
        ValueError: If a number is below 2.
    """

    def __init__(self, labels: Tensor, images: int, views: int = 2, seed: int = 0) -> None:
        if images < 2 or views < 2:
            raise ValueError(f"images={images} x views={views}: use 2 or more of both")
        super().__init__(labels, images, seed)
        self.views = views

    def global_batch(self, number: int, world: int) -> np.ndarray:
        """Positions of a global batch of the current epoch, in rank order.

        Args:
            number: Number of the batch in the epoch.
            world: Number of processes.
        """
        return super().global_batch(number, world).repeat(self.views)


class PKBatches(Batches):
    """Batches of random classes with random rows of each, for each process, with the rows of a class together.

    A global batch holds world * classes different classes, so that each process mines in classes of its own. A class
    with fewer rows than `images` uses each row equally often, give or take one. An epoch has N // (classes * images *
    world) batches. Each batch is drawn independently.

    Args:
        labels: Labels of the training rows, int64 (N,), from 0.
        classes: Number of classes in a batch, from 2.
        images: Number of rows of each class, from 2.
        seed: Seed of the draw.

    Raises:
        ValueError: If a number is below 2, or a label is negative (unknown).

    Source:
        Hermans, Beyer, Leibe: In Defense of the Triplet Loss for Person Re-Identification. 2017 (P x K).
    """

    def __init__(self, labels: Tensor, classes: int, images: int, seed: int = 0) -> None:
        super().__init__(labels, seed)
        if classes < 2 or images < 2:
            raise ValueError(
                f"classes={classes} x images={images}: a batch without two classes, or two rows of a class, has no "
                "triplet; use 2 or more of both"
            )
        _check_known(labels)
        self.classes, self.images = classes, images
        _, counts = labels.unique(return_counts=True)
        self._members = np.split(labels.argsort(stable=True).numpy(), counts.cumsum(0)[:-1].numpy())

    def length(self, world: int) -> int:
        """Number of batches in an epoch.

        Args:
            world: Number of processes.

        Raises:
            ValueError: If there are too few classes or rows.
        """
        if self.classes * world > len(self._members):
            raise ValueError(
                f"classes={self.classes} on {world} processes need {self.classes * world} classes, the training rows "
                f"have {len(self._members)}: use classes={len(self._members) // world} or fewer"
            )
        length = self.count // (self.classes * self.images * world)
        if length == 0:
            raise ValueError(
                f"{self.count} training rows do not fill a batch of classes={self.classes} x images={self.images} "
                f"on {world} processes: use fewer images"
            )
        return length

    def global_batch(self, number: int, world: int) -> np.ndarray:
        """Positions of a global batch of the current epoch, in rank order.

        Args:
            number: Number of the batch in the epoch.
            world: Number of processes.
        """
        random = self._generator(number)
        chosen = random.choice(len(self._members), self.classes * world, replace=False)
        return np.concatenate([self._some(random, self._members[c]) for c in chosen])

    def _some(self, random: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        if len(rows) < self.images:
            return np.resize(random.permutation(rows), self.images)
        return random.choice(rows, self.images, replace=False)


class MinedTriplets(Batches):
    """Batches of mined triplets, as rows q, p, n, q, p, n, ... An epoch is one mining.

    For each epoch a mining callback describes a new pool and passes its triplets to `set_triplets`. It checks
    `needs_triplets` when training starts and when an epoch starts, because the trainer skips the second if a run is
    resumed just after an epoch's last batch. The triplets are part of the state, so that an interrupted epoch continues
    with its own.

    Args:
        labels: Labels of the training rows, int64 (N,), from 0.
        triplets: Number of triplets for each batch and process, from 1.
        batches: Number of batches in an epoch, from 1.

    Raises:
        ValueError: If `triplets` or `batches` is below 1, or a label is negative (unknown).
    """

    def __init__(self, labels: Tensor, triplets: int = 64, batches: int = 64) -> None:
        super().__init__(labels, seed=0)
        if triplets < 1 or batches < 1:
            raise ValueError(f"triplets={triplets} per batch and batches={batches} per mining: use 1 or more of each")
        _check_known(labels)
        self.labels = labels
        self.per_batch, self.per_epoch = triplets, batches
        self._triplets = torch.zeros(0, 3, dtype=torch.int64)
        self._mined_for = -1

    def length(self, world: int) -> int:
        """Number of batches in an epoch.

        Args:
            world: Number of processes.
        """
        return self.per_epoch

    @property
    def wanted(self) -> int:
        """Number of triplets that all processes use in an epoch."""
        return self.per_epoch * self.per_batch * rank_and_world()[1]

    @property
    def needs_triplets(self) -> bool:
        """Whether the triplets of the current epoch are not set yet."""
        return self._mined_for != self.epoch

    def set_triplets(self, triplets: Tensor) -> None:
        """Sets the triplets of the current epoch.

        Args:
            triplets: int64 (`wanted`, 3), positions 0..N-1 of query, positive and negative, equal on all ranks.

        Raises:
            ValueError: If their number differs, a position is out of range, or labels are not those of query, positive
                and negative.
        """
        if triplets.shape != (self.wanted, 3):
            raise ValueError(f"an epoch needs triplets of shape ({self.wanted}, 3), got {tuple(triplets.shape)}")
        triplets = triplets.cpu().long()
        if triplets.min() < 0 or triplets.max() >= self.count:
            raise ValueError(
                f"triplets must be positions in 0..{self.count - 1}, got "
                f"{int(triplets.min())}..{int(triplets.max())}: convert pool positions to training positions"
            )
        query, positive, negative = self.labels[triplets].unbind(1)
        wrong = (query != positive) | (query == negative) | (triplets[:, 0] == triplets[:, 1])
        if wrong.any():
            first = triplets[wrong.nonzero()[0, 0]].tolist()
            raise ValueError(
                f"a triplet must hold a query, another row of its class and a row of another class, got {first}"
            )
        self._triplets, self._mined_for = triplets, self.epoch

    def global_batch(self, number: int, world: int) -> np.ndarray:
        """Positions of a global batch of the current epoch, in rank order.

        Args:
            number: Number of the batch in the epoch.
            world: Number of processes.

        Raises:
            RuntimeError: If no triplets are set for this epoch.
        """
        if self.needs_triplets:
            raise RuntimeError(
                f"no triplets were mined for epoch {self.epoch}: add the mining callback, which calls set_triplets"
            )
        size = self.per_batch * world
        return self._triplets[number * size : (number + 1) * size].flatten().numpy()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "triplets": self._triplets, "mined_for": self._mined_for}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._triplets, self._mined_for = state["triplets"], state["mined_for"]


def _check_known(labels: Tensor) -> None:
    if (labels < 0).any():
        raise ValueError(
            "the training rows hold unknown labels (below 0): train on labelled rows only, or name another attribute "
            "first in loss.losses"
        )


class ResumableLoader:
    """Batches of a data set in a sampler's order, with a count of the consumed ones. state_dict() resumes exactly.

    Iterating yields the rest of the epoch, len() is that of a whole epoch. It is no DataLoader, so that the trainer
    does not replace the sampler (ours divides work over ranks itself) yet saves and restores its state. Workers start
    with the first batch, after the callbacks of the epoch's start.

    Args:
        dataset: The data set.
        batches: The sampler.
        collate_fn: Makes a batch of the items, as in DataLoader.
        num_workers: Number of loader processes.
    """

    def __init__(
        self, dataset: Dataset, batches: Batches, collate_fn: Callable[[Any], Any], num_workers: int = 0
    ) -> None:
        end_workers_at_exit()
        self.sampler = batches
        self.dataset = dataset
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=collate_fn,
            worker_init_fn=leave_signals,
            # A DataLoader draws a number for its workers each time. With the global generator this would
            # shift all that is random after a resume.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves the sampler to a saved state. Raises ValueError as the sampler does."""
        self.sampler.load_state_dict(state)


def leave_signals(worker: int) -> None:
    """Makes a loader's worker ignore the signals that stop a run. The process that started it decides about them.

    Ctrl-C and SIGTERM reach the whole process group, and without its workers that process could not finish its batch.

    Args:
        worker: Number of the worker, which is not used.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@cache
def end_workers_at_exit() -> None:
    """Makes this process kill its daemon processes when it ends, since its workers ignore the usual SIGTERM."""
    atexit.register(_end_workers)


def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for a worker that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
