"""Samplers of whole batches that go on exactly where a run was interrupted, and the loader that keeps count.

A sampler gives lists of positions 0..N-1 of the training rows. What it gives is a function of seed, epoch
and batch number. With W processes a *global* batch is drawn and each takes its part, in rank order, so
that all parts together are what one process with W times the batch would have got.
"""

from __future__ import annotations

import atexit
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
    """Lists of positions, one a batch; iterating gives what is left of the epoch.

    epoch, position: which batch comes next. They move by `advance`, which the consumer of a batch calls,
    because workers fetch ahead of it. whole: whether several processes leave out a batch that is not full; shared out,
    it is a few rows each, which would count as much as a whole one.
    """

    def __init__(self, labels: Tensor, seed: int) -> None:
        if labels.ndim != 1 or len(labels) == 0:
            raise ValueError(f"labels of the training rows must be (N,) with N > 0, got {tuple(labels.shape)}")
        self.count, self.seed = len(labels), seed
        self.epoch = self.position = 0
        self.whole = False

    def length(self, world: int) -> int:
        """Batches of an epoch with `world` processes. Raises ValueError where there is none."""
        raise NotImplementedError

    def global_batch(self, number: int, world: int) -> np.ndarray:
        """Positions of a global batch of the present epoch, in rank order."""
        raise NotImplementedError

    def batches(self, rank: int, world: int) -> Iterator[list[int]]:
        """What is left of the epoch for one process of `world`."""
        for number in range(self.position, self.length(world)):
            yield np.array_split(self.global_batch(number, world), world)[rank].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches(*rank_and_world())

    def __len__(self) -> int:
        return self.length(rank_and_world()[1])

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch; stays where it is in the present one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def advance(self) -> None:
        """One batch was consumed; after the last one the next epoch begins."""
        self.position += 1
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, equal on all ranks."""
        return {"epoch": self.epoch, "position": self.position, "world": rank_and_world()[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved place. Raises ValueError in the middle of an epoch of another number of processes."""
        world = rank_and_world()[1]
        if state["position"] and state["world"] != world:
            raise ValueError(
                f"the epoch was interrupted with {state['world']} processes and cannot go on with {world}: resume "
                f"with {state['world']}, or from a checkpoint of the end of an epoch"
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *key])


class ShuffledBatches(Batches):
    """Each training row once an epoch, in random order, `batch_size` a batch and process.

    labels: int64 (N,). drop_last: leave out the last global batch where it is not full. Otherwise ranks
    share it as evenly as can be; where fewer rows are left than ranks, or a single one, they join the batch before.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__(labels, seed)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: use 1 or more")
        self.batch_size, self.drop_last = batch_size, drop_last
        self._order: tuple[int, np.ndarray] | None = None

    def length(self, world: int) -> int:
        full, rest = divmod(self.count, self.batch_size * world)
        length = full + (rest >= max(world, 2 if full else 1) and not self._drops(world))
        if length == 0:
            raise ValueError(
                f"{self.count} training rows do not fill a batch of {self.batch_size} on {world} processes: "
                "use a smaller batch_size"
            )
        return length

    def global_batch(self, number: int, world: int) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self._generator().permutation(self.count)
        size = self.batch_size * world
        last = number + 1 == self.length(world) and not self._drops(world)
        return self._order[1][number * size : None if last else (number + 1) * size]

    def _drops(self, world: int) -> bool:
        return self.drop_last or (self.whole and 1 < world <= self.count // self.batch_size)


class PKBatches(Batches):
    """`classes` random classes with `images` random rows each a batch and process, rows of a class together.

    labels: int64 (N,). A global batch holds world * classes different classes, so that each process mines
    in classes of its own. A class of fewer rows gives each as often as another, give or take one. An epoch
    has N // (classes * images * world) batches; rows are drawn anew for each.

    Raises ValueError where there are too few classes or rows, and for negative (unknown) labels.

    Hermans, Beyer, Leibe 2017, "In Defense of the Triplet Loss for Person Re-Identification" (P x K).
    """

    def __init__(self, labels: Tensor, classes: int, images: int, seed: int = 0) -> None:
        super().__init__(labels, seed)
        if classes < 2 or images < 2:
            raise ValueError(
                f"classes={classes} x images={images}: a batch without two classes, or two rows of a class, has no "
                "triplet; use 2 or more of both"
            )
        if (labels < 0).any():
            raise ValueError("the training rows hold unknown labels (below 0): train on labelled rows only")
        self.classes, self.images = classes, images
        _, counts = labels.unique(return_counts=True)
        self._members = np.split(labels.argsort(stable=True).numpy(), counts.cumsum(0)[:-1].numpy())

    def length(self, world: int) -> int:
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
        random = self._generator(number)
        chosen = random.choice(len(self._members), self.classes * world, replace=False)
        return np.concatenate([self._some(random, self._members[c]) for c in chosen])

    def _some(self, random: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        if len(rows) < self.images:
            return np.resize(random.permutation(rows), self.images)
        return random.choice(rows, self.images, replace=False)


class MinedTriplets(Batches):
    """The rows q, p, n, q, p, n, ... of `triplets` mined triplets a batch and process; an epoch is one mining.

    labels: int64 (N,). batches: of an epoch, for each of which a mining callback describes a new pool and
    hands over its triplets by `set_triplets`. It asks `needs_triplets` when training starts and when an
    epoch starts: the trainer leaves out the latter where a run is resumed just after an epoch's last batch.
    The triplets belong to the state, so that an interrupted epoch goes on with its own.
    """

    def __init__(self, labels: Tensor, triplets: int = 64, batches: int = 64) -> None:
        super().__init__(labels, seed=0)
        if triplets < 1 or batches < 1:
            raise ValueError(f"triplets={triplets} a batch, batches={batches} a mining: use 1 or more of both")
        self.labels = labels
        self.per_batch, self.per_epoch = triplets, batches
        self._triplets = torch.zeros(0, 3, dtype=torch.int64)
        self._mined_for = -1

    def length(self, world: int) -> int:
        return self.per_epoch

    @property
    def wanted(self) -> int:
        """Triplets that an epoch of all processes takes."""
        return self.per_epoch * self.per_batch * rank_and_world()[1]

    @property
    def needs_triplets(self) -> bool:
        """Whether the triplets of the present epoch are still to be set."""
        return self._mined_for != self.epoch

    def set_triplets(self, triplets: Tensor) -> None:
        """Takes the triplets of the present epoch, int64 (`wanted`, 3), positions 0..N-1, equal on all ranks.

        Raises ValueError for another number, for positions out of range and for rows that are not query,
        positive, negative by their labels.
        """
        if triplets.shape != (self.wanted, 3):
            raise ValueError(f"an epoch takes triplets of shape ({self.wanted}, 3), got {tuple(triplets.shape)}")
        triplets = triplets.cpu().long()
        if triplets.min() < 0 or triplets.max() >= self.count:
            raise ValueError(
                f"triplets must be positions in 0..{self.count - 1}, got "
                f"{int(triplets.min())}..{int(triplets.max())}: translate pool positions to training positions"
            )
        query, positive, negative = self.labels[triplets].unbind(1)
        wrong = (query != positive) | (query == negative) | (triplets[:, 0] == triplets[:, 1])
        if wrong.any():
            first = triplets[wrong.nonzero()[0, 0]].tolist()
            raise ValueError(f"triplets must be a query, another row of its class and one of another, got {first}")
        self._triplets, self._mined_for = triplets, self.epoch

    def global_batch(self, number: int, world: int) -> np.ndarray:
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


class ResumableLoader:
    """Batches of a data set in a sampler's order, counting what was consumed; state_dict() continues exactly.

    Iterating gives what is left of the epoch, len() is that of a whole one. It is no DataLoader, so that the
    trainer leaves the sampler alone (ours already deal out to ranks) yet saves and restores its state. Workers
    start with the first batch, after callbacks had their say about the epoch.
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
            # A DataLoader draws a number for its workers each time; from the global generator this would
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
        """The sampler's place."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved place. Raises ValueError as the sampler does."""
        self.sampler.load_state_dict(state)


def leave_signals(worker: int) -> None:
    """Makes a loader's worker deaf to what stops a run, which the process that started it decides about.

    Ctrl-C and SIGTERM reach the whole group of processes, and without its workers that one could not end its batch.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@cache
def end_workers_at_exit() -> None:
    """Has this process kill its daemons, as such workers are, when it ends: SIGTERM, as usual, would not end them."""
    atexit.register(_end_workers)


def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for a worker that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
