"""Smoke runs: a collection reduced to a few hundred images, on which any experiment can be tried in a minute."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from simsearch.data.collection import Collection
from simsearch.data.protocols import Split
from simsearch.types import RetrievalTask

CLASSES, TRAIN, GALLERY, QUERIES = 16, 32, 32, 4  # number of classes, and number of rows of each
LEAST = 320  # rows of a gallery, if it has them: product quantisers train on 256
SUFFIX = "/smoke"


def shrunk(collection: Collection, split: Split) -> tuple[Collection, Split]:
    """A few classes of a collection with a few rows each, and its split, whose tasks are named `<name>/smoke`.

    The most frequent classes are kept, with the same rows in every process. Measurements on them only show that
    everything runs. Their fingerprints differ from those of the whole collection.

    Args:
        collection: The whole collection.
        split: Its split.
    """
    tasks = [task for task in (split.validation, split.test) if task is not None]
    train = _few(split.train, collection.column(split.test.attribute), TRAIN)
    kept = {id(task): _rows(task, collection, train) for task in tasks}
    rows = torch.cat([train, *(row for both in kept.values() for row in both)]).unique()
    small = replace(
        collection,
        images=collection.images[rows],
        labels=collection.labels[rows],
        is_test=collection.is_test[rows],
        paths=None if collection.paths is None else tuple(collection.paths[row] for row in rows.tolist()),
        digest=None if collection.digest is None else _digest(collection.digest, rows),
    )

    def moved(task: RetrievalTask) -> RetrievalTask:
        query, gallery = (torch.searchsorted(rows, part) for part in kept[id(task)])
        units = None if task.units is None else task.units[rows]
        mark = _digest(task.fingerprint, *kept[id(task)])[:16]
        return replace(task, name=task.name + SUFFIX, query=query, gallery=gallery, units=units, fingerprint=mark)

    validation = None if split.validation is None else moved(split.validation)
    return small, Split(torch.searchsorted(rows, train), validation, moved(split.test))


def _rows(task: RetrievalTask, collection: Collection, train: Tensor) -> tuple[Tensor, Tensor]:
    """The queries and gallery rows that are kept. The gallery prefers training rows, kept queries and relevant rows."""
    labels = collection.column(task.attribute)
    known = task.query[torch.isin(labels[task.query], labels[task.gallery])]
    query = _few(known if len(known) else task.query, labels, QUERIES)
    wanted = torch.isin(labels[task.gallery], labels[query])
    near = _few(task.gallery[wanted], labels, GALLERY, first=train)
    others = _few(task.gallery[~wanted], labels, GALLERY, first=train)
    most = max(CLASSES * GALLERY - len(near), 0)
    gallery = torch.cat([near, others[:most]])
    rest = task.gallery[~torch.isin(task.gallery, gallery)]
    return query, torch.cat([gallery, rest[: max(LEAST - len(gallery), 0)]]).sort().values


def _few(rows: Tensor, labels: Tensor, each: int, first: Tensor | None = None) -> Tensor:
    """`each` rows of each of the most frequent labels, ascending. Rows in `first` are preferred."""
    values = labels[rows].numpy()
    classes, counts = np.unique(values[values >= 0], return_counts=True)
    if not len(classes):
        return rows[: CLASSES * each].sort().values
    chosen = classes[np.argsort(-counts, kind="stable")[:CLASSES]]
    early = np.isin(rows.numpy(), [] if first is None else first.numpy())
    order = np.argsort(~early, kind="stable")
    kept = [order[values[order] == value][:each] for value in chosen]
    return rows[torch.from_numpy(np.concatenate(kept))].sort().values


def _digest(known: str, *parts: Tensor) -> str:
    """A hash of the whole's hash and the rows that are kept."""
    text = repr((known, [part.tolist() for part in parts]))
    return hashlib.sha256(text.encode()).hexdigest()
