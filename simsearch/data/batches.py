"""Batches of decoded images of one shape, in this process or others, none lost to those that cannot be read."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simsearch.functional.resize import Fit

Item = tuple[int, Tensor | ValueError]  # a row, and its pixels or what is wrong with it
ImageBatch = tuple[Tensor, Tensor, list[ValueError]]  # images of one shape, their rows, errors of other rows
Packed = tuple[Tensor, list[tuple[int, tuple[int, ...] | ValueError]]]

# Images of rare shapes wait for others of their shape in at most so many bytes.
PENDING_BYTES = 2**28


class SizedItems(Protocol):
    """A map-style dataset of images of one shape (fit "square"), or of many shapes (fit "longest")."""

    size: int
    fit: Fit

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...


def load_batches(items: SizedItems, *, batch_size: int, workers: int = 0) -> Iterator[ImageBatch]:
    """Batches of images uint8 (B, 3, H, W) of one shape, their rows int64 (B,), and the errors of other rows.

    With fit "square" rows come in order; a batch covers batch_size items and holds fewer images, or none, where
    items are errors. With fit "longest" `batches_by_shape` makes the batches: rows come out of order, each
    once, and nothing is padded. workers: processes that decode beside this one. Raises ValueError for a
    batch_size below 1.
    """
    if items.fit == "longest":
        return batches_by_shape(load_items(items, batch_size=batch_size, workers=workers), batch_size)
    collate = functools.partial(stack, size=items.size)
    return iter(DataLoader(items, batch_size=batch_size, num_workers=workers, collate_fn=collate))  # type: ignore[arg-type]


def load_items(items: SizedItems, *, batch_size: int, workers: int = 0) -> Iterator[Item]:
    """All items in order, one by one. batch_size: how many a worker decodes at a time; workers: as above."""
    loader = DataLoader(items, batch_size=batch_size, num_workers=workers, collate_fn=pack)  # type: ignore[arg-type]
    return unpack(loader)


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


def pack(items: Sequence[Item]) -> Packed:
    """All pixels in one tensor, with the row and the shape or error of each item.

    One, since each tensor that a worker sends keeps a file open for as long as it lives.
    """
    images = [image.flatten() for _, image in items if isinstance(image, Tensor)]
    pixels = torch.cat(images) if images else torch.empty(0, dtype=torch.uint8)
    return pixels, [(row, tuple(item.shape) if isinstance(item, Tensor) else item) for row, item in items]


def unpack(packed: Iterable[Packed]) -> Iterator[Item]:
    """The items that `pack` made one tensor of."""
    for pixels, entries in packed:
        start = 0
        for row, entry in entries:
            if isinstance(entry, ValueError):
                yield row, entry
            else:
                stop = start + math.prod(entry)
                yield row, pixels[start:stop].view(entry).clone()  # a view would keep all the pixels
                start = stop
