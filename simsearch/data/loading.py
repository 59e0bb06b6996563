"""Batches of decoded images of one shape, decoded by processes that may be ended, none lost to those that fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from simsearch.data.process_pool import MEMORY, SECONDS, Failure, bounded_map
from simsearch.functional.resize import Fit
from simsearch.images import ImageError, read_image

Item = tuple[int, Tensor | ValueError]  # a row, and its pixels or what is wrong with it
ImageBatch = tuple[Tensor, Tensor, list[ValueError]]  # images of one shape, their rows, errors of other rows

# Images of rare shapes wait for others of their shape in at most so many bytes.
PENDING_BYTES = 2**28


class SizedItems(Protocol):
    """A map-style dataset of images of one shape (fit "square"), or of many shapes (fit "longest")."""

    size: int
    fit: Fit

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...

    def path(self, i: int) -> Path: ...


def load_batches(items: SizedItems, *, batch_size: int, workers: int = 0) -> Iterator[ImageBatch]:
    """Batches of images uint8 (B, 3, H, W) of one shape, their rows int64 (B,), and the errors of other rows.

    With fit "square" rows come in order; a batch covers batch_size items and holds fewer images, or none, where
    items are errors. With fit "longest" `batches_by_shape` makes the batches: rows come out of order, each
    once, and nothing is padded. workers: as `load_items` has them. Raises ValueError for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return batched(load_items(items, range(len(items)), workers=workers), items, batch_size)


def batched(found: Iterator[Item], items: SizedItems, batch_size: int) -> Iterator[ImageBatch]:
    """Batches of what was found of `items`, as `load_batches` has them."""
    if items.fit == "longest":
        return batches_by_shape(found, batch_size)
    return (stack(batch, items.size) for batch in iter(lambda: list(islice(found, batch_size)), []))


def load_items(items: SizedItems, rows: Iterable[int], *, workers: int = 0) -> Iterator[Item]:
    """The items of these rows in order, one by one; an ImageError stands for one that took too long.

    workers: processes that decode beside this one. One does at least: an image from outside may hold its decoder for
    minutes or bring it down, and such a process is ended.
    """
    asked: deque[int] = deque()

    def noted() -> Iterator[int]:
        for row in rows:
            asked.append(row)
            yield row

    one = partial(_decoded, items)
    memory = getattr(items, "memory", MEMORY)
    for found in bounded_map(one, noted(), workers=max(1, workers), seconds=SECONDS, memory=memory):
        row = asked.popleft()
        if isinstance(found, Failure):
            yield row, ImageError(items.path(row), found.reason, found.detail)
        else:
            yield row, torch.from_numpy(found) if isinstance(found, np.ndarray) else found


def load_image(path: Path, *, size: int, fit: Fit) -> Tensor:
    """The pixels of one file as `read_image` gives them, decoded by a process that may be ended. Raises ImageError."""
    one = partial(_read, size=size, fit=fit)
    (found,) = bounded_map(one, [path], workers=1, seconds=SECONDS, memory=MEMORY)
    if isinstance(found, Failure):
        raise ImageError(path, found.reason, found.detail)
    return torch.from_numpy(found)


def _decoded(items: SizedItems, row: int) -> np.ndarray | ValueError:
    """An item as a process sends it: numpy copies pixels, each tensor would keep a file open."""
    _, image = items[row]
    return image.numpy() if isinstance(image, Tensor) else image


def _read(path: Path, size: int, fit: Fit) -> np.ndarray:
    return read_image(path, size=size, fit=fit).numpy()


def batches_by_shape(
    items: Iterable[Item], batch_size: int, pending_bytes: int = PENDING_BYTES
) -> Iterator[ImageBatch]:
    """Batches of images that have exactly one shape, each as soon as it has batch_size of them.

    When those that wait for others of their shape take more than pending_bytes, the fullest batches go early;
    at the end follows what is left, shape by shape. An error goes at once, in a batch of its own (0, 3, 0, 0).
    """
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    pending = 0
    for row, image in items:
        if isinstance(image, ValueError):
            yield torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), [image]
            continue
        shape = tuple(image.shape)
        waiting.setdefault(shape, []).append((row, image))
        pending += image.nbytes
        while pending > pending_bytes or len(waiting.get(shape, ())) == batch_size:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]))
            batch = waiting.pop(fullest)
            pending -= len(batch) * batch[0][1].nbytes
            yield stack(batch)
    while waiting:
        yield stack(waiting.pop(next(iter(waiting))))


def stack(items: Sequence[Item], size: int = 0) -> ImageBatch:
    """A batch of items of one shape, that of squares of `size` where all are errors."""
    images = [image for _, image in items if isinstance(image, Tensor)]
    rows = [row for row, image in items if isinstance(image, Tensor)]
    errors = [error for _, error in items if isinstance(error, ValueError)]
    stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return stacked, torch.tensor(rows, dtype=torch.int64), errors


def load_chunks(
    items: SizedItems, chunks: Iterable[range], *, batch_size: int, workers: int = 0
) -> Iterator[tuple[range, Iterator[ImageBatch]]]:
    """Each chunk of rows with its batches, made as `load_batches` makes those of a list of these rows alone.

    The processes that decode live through all chunks: `chunks` is asked for its next while the last is still
    being decoded. A chunk's batches must be taken before the next chunk. Raises ValueError for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    asked: deque[range] = deque()  # the chunk of each row that is on its way; they arrive in order

    def rows() -> Iterator[int]:
        for chunk in chunks:
            for row in chunk:
                asked.append(chunk)
                yield row

    arrived = ((asked.popleft(), item) for item in load_items(items, rows(), workers=workers))
    for chunk, group in groupby(arrived, key=itemgetter(0)):
        yield chunk, batched((item for _, item in group), items, batch_size)
