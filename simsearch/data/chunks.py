"""Batches of images in chunks of rows, decoded without a pause between chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from simsearch.data.batches import ImageBatch, SizedItems, batched, load_items


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
