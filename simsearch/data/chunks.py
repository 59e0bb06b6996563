"""Batches of images in chunks of rows, decoded without a pause between chunks."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from torch.utils.data import DataLoader

from simsearch.data.batches import ImageBatch, SizedItems, batches_by_shape, pack, stack, unpack


def load_chunks(
    items: SizedItems, chunks: Iterable[range], *, batch_size: int, workers: int = 0
) -> Iterator[tuple[range, Iterator[ImageBatch]]]:
    """Each chunk of rows with its batches, made as `load_batches` makes those of a list of these rows alone.

    The processes that decode live through all chunks: `chunks` is asked for its next while the last is still
    being decoded, up to two batches ahead a worker. A chunk's batches must be taken before the next chunk.
    Raises ValueError for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    asked: deque[range] = deque()  # the chunk of each batch that is on its way; they arrive in order

    def batches() -> Iterator[range]:
        for chunk in chunks:
            for start in range(0, len(chunk), batch_size):
                asked.append(chunk)
                yield chunk[start : start + batch_size]

    square = items.fit == "square"
    collate = functools.partial(stack, size=items.size) if square else pack
    loader = DataLoader(items, batch_sampler=batches(), num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]
    arrived = ((asked.popleft(), batch) for batch in loader)
    for chunk, group in groupby(arrived, key=itemgetter(0)):
        own = (batch for _, batch in group)
        yield chunk, own if square else batches_by_shape(unpack(own), batch_size)
