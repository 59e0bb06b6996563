"""Batches of images, decoded in processes that can be ended. An image that fails costs no other image."""

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
from simsearch.functional.regions import Region
from simsearch.functional.resize import Fit
from simsearch.images import ImageError, read_image

Item = tuple[int, Tensor | ValueError]  # a row, and its pixels or its error
ImageBatch = tuple[Tensor, Tensor, list[ValueError]]  # images of one shape, their rows, errors of other rows

# Memory for images of rare shapes that wait for others of their shape.
PENDING_BYTES = 2**28


class SizedItems(Protocol):
    """A map-style dataset of images of one shape (fit "square"), or of several shapes (fit "longest").

    Attributes:
        size: Image size in pixels.
        fit: "square" or "longest".
    """

    size: int
    fit: Fit

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...

    def path(self, i: int) -> Path:
        """The file of an item.

        Args:
            i: Row of the item.
        """
        ...


def load_batches(items: SizedItems, *, batch_size: int, workers: int = 0) -> Iterator[ImageBatch]:
    """Batches of images uint8 (B, 3, H, W) of one shape, their rows int64 (B,), and the errors of other rows.

    With fit "square" rows come in order. A batch covers batch_size items, and holds fewer images, or none, if items are
    errors. With fit "longest" `batches_by_shape` makes the batches: rows come out of order, each once, without padding.

    Args:
        items: The images.
        batch_size: Number of items in a batch, from 1.
        workers: As in `load_items`.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return batched(load_items(items, range(len(items)), workers=workers), items, batch_size)


def batched(found: Iterator[Item], items: SizedItems, batch_size: int) -> Iterator[ImageBatch]:
    """Batches of loaded items, as `load_batches` makes them.

    Args:
        found: Items as `load_items` returns them.
        items: The dataset they are from.
        batch_size: Number of items in a batch.
    """
    if items.fit == "longest":
        return batches_by_shape(found, batch_size)
    return (stack(batch, items.size) for batch in iter(lambda: list(islice(found, batch_size)), []))


def load_items(items: SizedItems, rows: Iterable[int], *, workers: int = 0) -> Iterator[Item]:
    """The items of these rows, in order. An item that takes too long, or ends its process, becomes an ImageError.

    Args:
        items: The images.
        rows: Rows of the items.
        workers: Number of decoding processes beside this one. There is always at least one: an untrusted image may
            block its decoder for minutes or crash it, and that process must be ended.
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


def load_image(path: Path, *, size: int, fit: Fit, region: Region | None = None) -> Tensor:
    """The pixels of one file as `read_image` gives them, decoded in a process that can be ended.

    Args:
        path: The file.
        size: Image size in pixels.
        fit: "square" or "longest".
        region: The part of the image to return alone, or None.

    Raises:
        ImageError: If the file cannot be read.
    """
    one = partial(_read, size=size, fit=fit, region=region)
    (found,) = bounded_map(one, [path], workers=1, seconds=SECONDS, memory=MEMORY)
    if isinstance(found, Failure):
        raise ImageError(path, found.reason, found.detail)
    return torch.from_numpy(found)


def _decoded(items: SizedItems, row: int) -> np.ndarray | ValueError:
    """An item as a process sends it. Pixels are numpy arrays, which are copied; each tensor would keep a file open."""
    _, image = items[row]
    return image.numpy() if isinstance(image, Tensor) else image


def _read(path: Path, size: int, fit: Fit, region: Region | None) -> np.ndarray:
    return read_image(path, size=size, fit=fit, region=region).numpy()


def batches_by_shape(
    items: Iterable[Item], batch_size: int, pending_bytes: int = PENDING_BYTES
) -> Iterator[ImageBatch]:
    """Batches of images of exactly one shape. A batch is returned as soon as it has batch_size images.

    If the images that wait for others of their shape take more than pending_bytes, the fullest batches are returned
    early. At the end the remaining images follow, shape by shape. An error is returned at once, in a batch of its own
    with images (0, 3, 0, 0).

    Args:
        items: Items as `load_items` returns them.
        batch_size: Number of images in a full batch.
        pending_bytes: Memory for the images that wait.
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
    """A batch of items of one shape.

    Args:
        items: The items.
        size: Side of the empty batch (0, 3, size, size) if all items are errors.
    """
    images = [image for _, image in items if isinstance(image, Tensor)]
    rows = [row for row, image in items if isinstance(image, Tensor)]
    errors = [error for _, error in items if isinstance(error, ValueError)]
    stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return stacked, torch.tensor(rows, dtype=torch.int64), errors


def load_chunks(
    items: SizedItems, chunks: Iterable[range], *, batch_size: int, workers: int = 0
) -> Iterator[tuple[range, Iterator[ImageBatch]]]:
    """Each chunk of rows with its batches, made as `load_batches` makes those of these rows alone.

    The decoding processes live through all chunks. `chunks` is asked for the next chunk while the last is still being
    decoded. The batches of a chunk must be consumed before the next chunk.

    Args:
        items: The images.
        chunks: Ranges of rows.
        batch_size: Number of items in a batch, from 1.
        workers: As in `load_items`.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    asked: deque[range] = deque()  # the chunk of each row that is being decoded; rows arrive in order

    def rows() -> Iterator[int]:
        for chunk in chunks:
            for row in chunk:
                asked.append(chunk)
                yield row

    arrived = ((asked.popleft(), item) for item in load_items(items, rows(), workers=workers))
    for chunk, group in groupby(arrived, key=itemgetter(0)):
        yield chunk, batched((item for _, item in group), items, batch_size)
