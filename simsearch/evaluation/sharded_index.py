"""One gallery in the FAISS indexes of several ranks, searched like a single index."""

from __future__ import annotations

import re
import time
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from simsearch.functional.ranking import Junk, best_first, best_of_all, inner_products
from simsearch.functional.sharded import Sharded
from simsearch.index.faiss_index import FaissIndex
from simsearch.types import SearchResult

_BLOCK = 4096  # queries or items that travel together
_SPARE = 16  # candidates beyond k, among which equal scores are put into gallery order
_ROUNDING = 2e-6  # of |q| |x|, beyond what FAISS's float32 inner products err by


class GalleryIndex(Protocol):
    """What an evaluation in one process fills and searches: a FaissIndex, or a gallery in a store (StoredGallery).

    Attributes:
        factory: What the index is called.
        metric: "ip", "l2" or "hamming".
        is_binary: Whether it is for codes.
    """

    factory: str
    metric: str
    is_binary: bool

    def __len__(self) -> int: ...

    @property
    def keeps_vectors(self) -> bool:
        """Whether `reconstruct` returns the added vectors and not approximations."""
        ...

    @property
    def code_bytes(self) -> int:
        """The size of an item's code alone in bytes."""
        ...

    @property
    def bytes_per_item(self) -> float:
        """The size of an item in bytes, NaN if it is not known."""
        ...

    def add(self, vectors: Tensor) -> None:
        """Fills the index.

        Args:
            vectors: float32 (N, D) or codes uint8 (N, bits / 8).
        """
        ...

    def search(self, vectors: Tensor, k: int) -> SearchResult:
        """The k most similar items of each query by position, best first; -1 where fewer are found.

        Args:
            vectors: float32 (Q, D) or codes uint8 (Q, bits / 8).
            k: Number of items, 1..N.
        """
        ...

    def reconstruct(self) -> Tensor:
        """The vectors as the index stores them."""
        ...

    def emptied(self) -> GalleryIndex:
        """An index with the same settings, without items."""
        ...


class ShardedIndex:
    """The indexes of all ranks, each filled with its rank's part of a gallery. With one rank it is a single index.

    Centroids and codebooks are trained on rank 0, with the vectors that one process would take (at most the index's
    train_size), and shared. Flat and BFlat then answer exactly like one index of the whole gallery. IVF, PQ and scalar
    quantisers do so up to rounding at the borders of lists and codes, and up to FAISS's choice where more than 16 items
    tie with the k-th. Several HNSW graphs are a different index from a single graph.

    Every rank must call each method.

    Args:
        index: An empty index, or an index that is filled with this rank's part on every rank. Several ranks need a
            FaissIndex.
        gallery: The gallery, with this rank's part.

    Raises:
        ValueError: As FaissIndex does.
    """

    def __init__(self, index: GalleryIndex, gallery: Sharded) -> None:
        self.index, self.gallery, self.ranks = index, gallery, gallery.ranks
        start = time.perf_counter()
        if not int(self.ranks.sum(torch.tensor(len(index)))):
            self._fill()
        self.build_seconds = self._slowest(torch.tensor([time.perf_counter() - start]))[0]

    @property
    def narrows(self) -> bool:
        """Whether fewer items to find make the index search less thoroughly: graphs, and what refines candidates."""
        return re.search("HNSW|RFlat|Refine", self.index.factory) is not None

    def search(
        self, query: Sharded, k: int, *, chosen: Tensor | None = None, junk: Junk | None = None
    ) -> tuple[SearchResult, float]:
        """The k best items of the whole gallery without junk, and the seconds that the slowest rank took for its part.

        The answers are equal on all ranks.

        Args:
            query: All queries.
            k: Number of items, at most the size of the gallery.
            chosen: int64 (n,), positions of the queries to search; None for all.
            junk: The junk of all queries among this rank's items, or None. It needs `chosen` to be None.
        """
        chosen = torch.arange(len(query)) if chosen is None else chosen
        most = int(torch.bincount(junk.rows).max()) if junk is not None and len(junk.rows) else 0
        answers, seconds = [], 0.0
        for start in range(0, len(chosen), _BLOCK):
            wanted = query.rows(chosen[start : start + _BLOCK])
            ids, scores, took = self._nearest(wanted, k + most)
            seconds += took
            if junk is not None and most:
                ids, scores = _without(ids, scores, *junk.block(start, start + len(wanted)), len(self.index))
            answers.append(self._merged(ids[:, :k], scores[:, :k], k))
        found = SearchResult(*(torch.cat(parts) for parts in zip(*answers, strict=True)))
        return found, self._slowest(torch.tensor([seconds]))[0]

    def seconds_alone(self, query: Sharded, count: int, k: int) -> list[float]:
        """The seconds of each of the first `count` queries, searched one at a time, on the rank that is slowest for it.

        Args:
            query: All queries.
            count: Number of queries.
            k: Number of items.
        """
        wanted = query.rows(torch.arange(min(count, len(query))))
        seconds = torch.zeros(len(wanted))
        for i in range(len(wanted)):
            start = time.perf_counter()
            if len(self.index):
                self.index.search(wanted[i : i + 1], min(k, len(self.index)))
            seconds[i] = time.perf_counter() - start
        return self._slowest(seconds)

    def as_ranked(self, query: Sharded) -> tuple[Sharded, Sharded]:
        """The query and the gallery with vectors whose inner products rank as the index's own (decoded) scores do.

        Args:
            query: All queries.
        """
        if self.index.is_binary:
            return query, self.gallery
        return query.with_vectors(self._lifted(query.own.vectors)), self._ranked

    @cached_property
    def stored(self) -> Tensor:
        """This rank's vectors as the index stores them: decoded where the index compresses."""
        own = self.gallery.own.vectors
        return own if self.index.keeps_vectors or not len(own) else self.index.reconstruct()

    @property
    def code_bytes(self) -> float:
        """The size of an item's code in bytes."""
        own = self.index.code_bytes if len(self.index) else 0
        return float(self.ranks.largest(torch.tensor(own)))

    @property
    def bytes_per_item(self) -> float:
        """The size of the indexes of all ranks per item in bytes, without what an empty index takes."""
        n = len(self.index)
        bytes_ = n * self.index.bytes_per_item if n else 0.0
        total, items = self.ranks.sum(torch.tensor([bytes_, n], dtype=torch.float64)).tolist()
        return total / items

    def _fill(self) -> None:
        if isinstance(self.index, FaissIndex):
            self.index.settle(len(self.gallery))
            if self.ranks.world > 1 and self.index.learns(self.gallery.columns):
                self._learn(self.index)
        elif self.ranks.world > 1:
            raise ValueError(f"a store is filled by one process, but there are {self.ranks.world}: evaluate in one")
        if len(self.gallery.own):
            self.index.add(self.gallery.own.vectors)

    def _learn(self, index: FaissIndex) -> None:
        rows = index.sample(len(self.gallery))
        blocks = [self.gallery.rows_on_first(positions) for positions in rows.split(_BLOCK)]
        state, error = None, None
        if self.ranks.rank == 0:
            try:
                index.train(torch.cat([block for block in blocks if block is not None]))
                state = index.trained()
            except ValueError as problem:
                error = problem
        self.ranks.raise_together(error)
        state = self.ranks.from_first(state)
        if self.ranks.rank:
            index.load_trained(state)

    def _slowest(self, seconds: Tensor) -> list[float]:
        return self.ranks.largest(seconds.double()).tolist()

    @cached_property
    def _ranked(self) -> Sharded:
        if self.index.metric == "ip":
            return self.gallery.with_vectors(self.stored)
        # -|q - x|^2 orders as q.x - |x|^2 / 2: one more column.
        half = -0.5 * self.stored.square().sum(1, keepdim=True)
        return self.gallery.with_vectors(torch.cat([self.stored, half], dim=1))

    def _lifted(self, queries: Tensor) -> Tensor:
        return queries if self.index.metric == "ip" else pad(queries, (0, 1), value=1.0)

    def _nearest(self, wanted: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
        """Ids and scores (B, <= k) of this rank's part, equal scores in gallery order, and its seconds."""
        if len(self.index) == 0:
            return torch.zeros(len(wanted), 0, dtype=torch.int64), torch.zeros(len(wanted), 0), 0.0
        # More candidates would make a graph, and what refines candidates, another index; BFlat keeps the first.
        spare = 0 if self.narrows or self.index.factory == "BFlat" else _SPARE
        start = time.perf_counter()
        found = self.index.search(wanted, min(k + spare, len(self.index)))
        seconds = time.perf_counter() - start
        ids, scores = found.ids, found.scores
        if self.index.factory == "Flat":
            ids, scores = self._rescored(wanted, ids, scores, k)
        return ids[:, :k], scores[:, :k], seconds

    def _rescored(self, wanted: Tensor, ids: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The candidates (B, K) of an exact search, in the order of the full ranking's own scores.

        FAISS rounds an inner product by the position of its vectors in a block. Equal items would not tie, and another
        division among ranks would order near items differently.
        """
        queries, items = self._lifted(wanted), self._ranked.own.vectors
        norm = queries.norm(dim=1) * items.norm(dim=1).max()
        square = wanted.square().sum(1) if self.index.metric == "l2" else torch.zeros(len(wanted))
        last = scores[:, -1] if self.index.metric == "ip" else (scores[:, -1] + square) / 2
        exact = torch.empty_like(scores)
        for start in range(0, len(wanted), 8):  # the products of few queries with all their candidates
            some = ids[start : start + 8]
            products = inner_products(queries[start : start + 8], items[some.flatten()])
            b = len(some)
            exact[start : start + b] = products.view(b, b, -1)[torch.arange(b), torch.arange(b)]
        ids, exact = best_first(ids, exact)
        if ids.shape[1] < len(items):
            # So near to the last candidate, that others beyond it may be as good.
            unsure = (exact[:, k - 1] - last <= _ROUNDING * norm).nonzero()[:, 0]
            for rows in unsure.split(8):
                ids[rows], exact[rows] = best_of_all(inner_products(queries[rows], items), ids.shape[1])
        if self.index.metric == "l2":  # rounds once more: what became equal is put in order
            return best_first(ids, (2 * exact - square[:, None]).clamp(max=0.0))
        return ids, exact

    def _merged(self, ids: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of all ranks' answers, as positions in the whole gallery."""
        if self.ranks.world == 1:
            return ids, scores
        missing = k - ids.shape[1]
        there = ids >= 0
        ids = pad(self.gallery.position[ids.clamp(min=0)].masked_fill(~there, -1), (0, missing), value=-1)
        scores = pad(scores, (0, missing), value=-torch.inf)
        every_ids, every_score = (self.ranks.stack(part).transpose(0, 1).flatten(1) for part in (ids, scores))
        every_ids, every_score = best_first(every_ids, every_score)
        return every_ids[:, :k], every_score[:, :k]


def whole_index(index: FaissIndex, gallery: Sharded) -> FaissIndex | None:
    """An index of the whole gallery, in its order, on rank 0; None on the other ranks. Every rank must call.

    Vectors come to rank 0 one block at a time.

    Args:
        index: The index of this rank, filled with its part.
        gallery: The gallery.
    """
    if gallery.ranks.world == 1:
        return index
    whole = index.emptied() if gallery.ranks.rank == 0 else None
    for positions in torch.arange(len(gallery)).split(_BLOCK):
        vectors = gallery.rows_on_first(positions)
        if whole is not None and vectors is not None:
            whole.add(vectors)
    return whole


def _without(ids: Tensor, scores: Tensor, rows: Tensor, columns: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """Ids and scores (B, K) without the pairs (rows, columns); the rest moves up."""
    keys = torch.arange(len(ids))[:, None] * g + ids
    bad = torch.isin(keys, rows * g + columns) & (ids >= 0)
    order = bad.long().argsort(dim=1, stable=True)
    return ids.masked_fill(bad, -1).gather(1, order), scores.masked_fill(bad, -torch.inf).gather(1, order)
