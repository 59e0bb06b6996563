"""Retrieval metrics of full rankings, streamed in blocks of queries: no Q x G matrix ever exists.

Real scores: one block of scores is sorted by value only, without an argsort. The rank of each relevant item is then a
binary search of its score, and the same search finds equal scores.

Hamming distances: a ranking is its histogram of b + 1 distances, so that xor, popcount and counting are all the work.

A gallery may be spread over ranks (Sharded). Each block of queries goes to all ranks. Each rank ranks its own items,
and the counts are summed. Every rank gets the rankings that one process would compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simsearch.functional import ties
from simsearch.functional.codes import code_words
from simsearch.functional.sharded import Ranks, Sharded
from simsearch.functional.ties import Rankings
from simsearch.types import Descriptors, SearchResult

BLOCK_BYTES = 2**27
_CHUNK_BYTES = 2**22  # of 64-bit words that stay in a core's cache
_LEAST_COLUMNS = 64
_FEW_ROWS = 64


@dataclass(frozen=True)
class Junk:
    """Pairs of a query and a gallery item that are taken out of the ranking, sorted by query.

    Attributes:
        rows: int64 (P,), query positions.
        columns: int64 (P,), gallery positions.
    """

    rows: Tensor
    columns: Tensor

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The pairs of the queries start..stop-1: rows, counted from `start`, and columns.

        Args:
            start: First query.
            stop: Last query plus one.

        Example:
            >>> Junk(rows=torch.tensor([0, 2]), columns=torch.tensor([5, 7])).block(1, 3)
            (tensor([1]), tensor([7]))
        """
        low, high = torch.searchsorted(self.rows, torch.tensor([start, stop], device=self.rows.device)).tolist()
        return self.rows[low:high] - start, self.columns[low:high]


def _join(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of all pairs with left[i] == right[j] >= 0, as int64 (P,) i and j."""
    order = right.argsort(stable=True)
    ordered = right[order]
    low = torch.searchsorted(ordered, left)
    count = torch.searchsorted(ordered, left, right=True) - low
    count = count.masked_fill(left < 0, 0)
    rows = torch.arange(len(left), device=left.device).repeat_interleave(count)
    offset = torch.arange(len(rows), device=left.device) - (count.cumsum(0) - count).repeat_interleave(count)
    return rows, order[low.repeat_interleave(count) + offset]


def find_junk(query: Descriptors | Sharded, gallery: Descriptors | Sharded, *, exclude_self: bool) -> Junk:
    """The pairs that no ranking counts.

    These are, with `exclude_self`, the pairs with an equal `index`, and, where both sides have groups, the pairs of one
    `group`.

    Args:
        query: Q queries.
        gallery: G gallery items.
        exclude_self: Take each query's own collection row out of its ranking.

    Example:
        >>> query = Descriptors(torch.ones(1, 2), torch.tensor([0]), index=torch.tensor([8]))
        >>> gallery = Descriptors(torch.ones(2, 2), torch.tensor([0, 0]), index=torch.tensor([7, 8]))
        >>> find_junk(query, gallery, exclude_self=True)
        Junk(rows=tensor([0]), columns=tensor([1]))
    """
    g = len(gallery)
    empty = query.index.new_empty(0)
    keys = [empty]
    if exclude_self:
        rows, columns = _join(query.index, gallery.index)
        keys.append(rows * g + columns)
    if query.group is not None and gallery.group is not None:
        rows, columns = _join(query.group, gallery.group)
        keys.append(rows * g + columns)
    pairs = torch.unique(torch.cat(keys))
    return Junk(rows=pairs // max(g, 1), columns=pairs % max(g, 1))


def _in_threads(work: Callable[[np.ndarray], None], n: int) -> None:
    """Runs `work` on the positions 0..n-1, divided among torch's number of threads."""
    threads = min(torch.get_num_threads(), max(n // 8, 1))
    if threads == 1:
        work(np.arange(n))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, np.array_split(np.arange(n), threads)))


@dataclass(frozen=True)
class _ByLabel:
    """A gallery in label order, in which the relevant items of a query are neighbours."""

    vectors: Tensor
    label: np.ndarray
    place: Tensor  # where each gallery position went

    @classmethod
    def of(cls, gallery: Descriptors) -> _ByLabel:
        order = gallery.label.argsort(stable=True)
        return cls(gallery.vectors[order], gallery.label[order].numpy(), order.argsort())

    def relevant(self, label: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """First and last-plus-one position of the items with each label, (B,) and (B,)."""
        wanted = label.numpy()
        low = np.searchsorted(self.label, wanted)
        return low, np.where(wanted < 0, low, np.searchsorted(self.label, wanted, "right"))


def inner_products(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The inner products of all rows, float32 (B, N), each depends only on its two vectors.

    Equal vectors have equal products at any position, and a part of the rows has the products of the whole, bit for
    bit. Matrix kernels guarantee this once there are a few rows per thread and a few columns; with fewer they sum in
    another order. This was tested with MKL; the tests show it for other kernels.

    Args:
        left: float32 (B, D).
        right: float32 (N, D).
        out: float32 (>= B, >= N), contiguous, to write into; see `product_buffer`.

    Example:
        >>> inner_products(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 2.]])
    """
    b, n = len(left), len(right)
    unit = _row_unit()
    left = torch.nn.functional.pad(left, (0, 0, 0, -b % unit))
    right = torch.nn.functional.pad(right, (0, 0, 0, max(_LEAST_COLUMNS - n, 0))) if n < _LEAST_COLUMNS else right
    if out is not None:
        out = out[: len(left)]
    return torch.mm(left, right.T, out=out)[:b, :n]


def product_buffer(rows: int, columns: int) -> Tensor:
    """An uninitialised tensor that `inner_products` can write into.

    Args:
        rows: Largest number of rows, B.
        columns: Largest number of columns, N.

    Example:
        >>> buffer = product_buffer(rows=1, columns=2)
        >>> inner_products(torch.ones(1, 3), torch.ones(2, 3), out=buffer)
        tensor([[3., 3.]])
    """
    return torch.empty(rows + _row_unit(), max(columns, _LEAST_COLUMNS))


def _row_unit() -> int:
    return 4 * torch.get_num_threads()


def best_first(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and scores, (B, K) each, by descending score; equal scores by ascending id, ids of -1 last.

    Args:
        ids: int64 (B, K), -1 where there is no item.
        scores: Floating point (B, K).

    Example:
        >>> best_first(torch.tensor([[4, 2, 3]]), torch.tensor([[0.5, 0.5, 0.75]]))
        (tensor([[3, 2, 4]]), tensor([[0.7500, 0.5000, 0.5000]]))
    """
    by_id = ids.masked_fill(ids < 0, torch.iinfo(torch.int64).max).argsort(dim=1)
    order = by_id.gather(1, scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True))
    return ids.gather(1, order), scores.gather(1, order)


def best_of_all(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids and scores of the k best items, (B, min(k, N)) each, best first. Of equal items the first is taken.

    Args:
        scores: Floating point (B, N), the scores of all items.
        k: Number of items.

    Example:
        >>> best_of_all(torch.tensor([[0.5, 0.75, 0.5]]), k=2)
        (tensor([[1, 0]]), tensor([[0.7500, 0.5000]]))
    """
    k = min(k, scores.shape[1])
    best, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    last, beyond = best[:, k - 1 : k], best[:, k:]
    ids, best = best_first(ids[:, :k], best[:, :k])
    if k == 0 or beyond.shape[1] == 0:
        return ids, best
    # Of items that are as good as the last one topk takes any.
    for row in ((last == beyond) & (last > -torch.inf)).nonzero()[:, 0].split(_FEW_ROWS):
        some, least = scores[row], last[row]
        above, equal = some > least, some == least
        taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        ids[row], best[row] = best_first(taken.nonzero()[:, 1].view(-1, k), some[taken].view(-1, k))
    return ids, best


def rank_vectors(
    query: Descriptors | Sharded,
    gallery: Descriptors | Sharded,
    *,
    exclude_self: bool = False,
    block_bytes: int = BLOCK_BYTES,
    ahead: SearchResult | None = None,
) -> Iterator[Rankings]:
    """Yields rankings by inner product, one Rankings per block of queries, in order.

    An item is relevant where it shares the query's label. Labels below 0 are relevant to nothing.

    Args:
        query: Q queries with float vectors.
        gallery: G gallery items with float vectors.
        exclude_self: Take each query's own collection row out of its ranking.
        block_bytes: Memory for a block.
        ahead: Re-ranked shortlists (Q, K) of gallery positions. Their items come before all others, in the order of
            their own scores.

    Example:
        >>> query = Descriptors(torch.ones(1, 1), torch.tensor([0]), torch.tensor([9]))
        >>> gallery = Descriptors(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> next(rank_vectors(query, gallery)).above  # items above each relevant item
        tensor([[0, 2]])
    """
    query, gallery = Sharded.of(query), Sharded.of(gallery)
    ranks, g = gallery.ranks, len(gallery.own)
    junk = find_junk(query, gallery.own, exclude_self=exclude_self)
    stored = _ByLabel.of(gallery.own)
    step = _block_rows(query, gallery, block_bytes)
    buffer = product_buffer(min(step, len(query)), g)
    for start in range(0, len(query), step):
        stop = min(start + step, len(query))
        # Negative scores, so that the best sort first.
        keys = inner_products(-query.rows(torch.arange(start, stop)), stored.vectors, buffer)
        if ahead is not None:
            _put_ahead(keys, ahead.ids[start:stop], ahead.scores[start:stop], stored.place)
        rows, columns = junk.block(start, stop)
        keys[rows, stored.place[columns]] = torch.inf
        yield _rank_keys(keys.numpy(), *stored.relevant(query.label[start:stop]), np.inf, ranks)


def _block_rows(query: Sharded, gallery: Sharded, block_bytes: int) -> int:
    """Queries in a block, the same on all ranks: by the longest shard, or by the most relevant items of a query."""
    _, counts = gallery.label[gallery.label >= 0].unique(return_counts=True)
    widest = max(len(gallery.own), int(counts.max()) if len(counts) else 0, 1)
    unit = _row_unit()
    widest, unit = gallery.ranks.largest(torch.tensor([widest, unit])).tolist()
    return max(block_bytes // (8 * widest) // unit, 1) * unit


def _put_ahead(keys: Tensor, ids: Tensor, new: Tensor, place: Tensor) -> None:
    """Sets the shortlisted items' keys (B, G) before all others, equal where the new scores (B, K) are equal."""
    lower = torch.nn.functional.pad(new[:, 1:] < new[:, :-1], (1, 0))
    level = new.shape[1] - lower.cumsum(1)
    rows, columns = (ids >= 0).nonzero(as_tuple=True)
    # Exact in float32, and no inner product of descriptors is near 2^100.
    keys[rows, place[ids[rows, columns]]] = level[rows, columns] * -(2.0**100)


def _rank_keys(keys: np.ndarray, low: np.ndarray, high: np.ndarray, nothing: float, ranks: Ranks) -> Rankings:
    """Rankings of a block by ascending keys (B, g) of each rank's items, relevant low[i]:high[i].

    `nothing`, above all keys, marks junk. Between ranks travel the keys of relevant items, and of each how
    many items come before it and how many share its key. Sorts `keys` in place.
    """
    wanted = _all_relevant(keys, low, high, nothing, ranks)
    relevant = (wanted < nothing).sum(1)
    counts = np.zeros((2, *wanted.shape), np.int32)

    def work(part: np.ndarray) -> None:
        for i in part:
            row, own = keys[i], wanted[i, : relevant[i]]
            if len(row) == 0 or len(own) == 0:
                continue
            row.sort()
            first = np.searchsorted(row, own)
            above, size = counts[:, i, : relevant[i]]
            above[:] = first
            size[:] = row.take(first, mode="clip") == own
            more = row.take(first + 1, mode="clip") == own
            if more.any():
                size[more] = np.searchsorted(row, own[more], "right") - first[more]

    _in_threads(work, len(keys))
    above, size = ranks.sum(torch.from_numpy(counts)).long()
    tied = size > 1
    start = tied.numpy().copy()
    start[:, 1:] &= wanted[:, 1:] != wanted[:, :-1]
    first = torch.from_numpy(start)
    query, slot = first.nonzero(as_tuple=True)
    return Rankings(
        torch.from_numpy(relevant),
        above,
        size == 1,
        query,
        above[query, slot],
        size[query, slot],
        slot,
        torch.bincount(first[tied].cumsum(0) - 1, minlength=len(query)),
    )


def _all_relevant(keys: np.ndarray, low: np.ndarray, high: np.ndarray, nothing: float, ranks: Ranks) -> np.ndarray:
    """The keys of the relevant items of all ranks (B, T), ascending, `nothing` where a query has fewer."""
    width = int(ranks.largest(torch.tensor((high - low).max())))
    own = np.full((len(keys), width), nothing, keys.dtype)

    def work(part: np.ndarray) -> None:
        for i in part:
            row = own[i, : high[i] - low[i]]
            row[:] = keys[i, low[i] : high[i]]
            row.sort()

    _in_threads(work, len(keys))
    if ranks.world == 1:
        return own
    every = ranks.stack(torch.from_numpy(own)).transpose(0, 1).flatten(1).numpy()
    every.sort(axis=1)
    return every[:, : int((every < nothing).sum(1).max())]


def _common_width(query: Sharded, gallery: Sharded) -> int:
    if gallery.bits is None or query.bits != gallery.bits:
        raise ValueError(f"query and gallery must be codes of one width, got {query.bits} and {gallery.bits} bits")
    return gallery.bits


def rank_codes(
    query: Descriptors | Sharded,
    gallery: Descriptors | Sharded,
    *,
    exclude_self: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Rankings]:
    """Yields rankings by Hamming distance, one Rankings per block of queries, with a tie group for each distance 0..b.

    Args:
        query: Q queries with codes.
        gallery: G gallery items with codes of the same width.
        exclude_self: Take each query's own collection row out of its ranking.
        block_bytes: Memory for a block.

    Raises:
        ValueError: If the two sides are not codes of one width.

    Example:
        >>> query = Descriptors(torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([0]), torch.tensor([9]), bits=8)
        >>> codes = torch.tensor([[1], [2]], dtype=torch.uint8)  # both at distance 1
        >>> ranking = next(rank_codes(query, Descriptors(codes, torch.tensor([0, 1]), torch.arange(2), bits=8)))
        >>> ranking.size, ranking.hits
        (tensor([2]), tensor([1]))
    """
    query, gallery = Sharded.of(query), Sharded.of(gallery)
    bins = _common_width(query, gallery) + 1
    own, ranks = gallery.own, gallery.ranks
    junk = find_junk(query, own, exclude_self=exclude_self)
    stored = _ByLabel.of(own)
    planes = np.ascontiguousarray(code_words(stored.vectors).T)  # (W, G)
    step = max(1, block_bytes // (128 * bins))
    for start in range(0, len(query), step):
        stop = min(start + step, len(query))
        codes, label = query.rows(torch.arange(start, stop)), query.label[start:stop]
        total, hits = _distance_histograms(code_words(codes), planes, bins, *stored.relevant(label))
        rows, columns = junk.block(start, stop)
        if len(rows):
            distance = hamming_pairs(codes[rows], own.vectors[columns])
            counted = (label[rows] == own.label[columns]) & (label[rows] >= 0)
            total.index_put_((rows, distance), -torch.ones_like(rows), accumulate=True)
            hits.index_put_((rows, distance), -counted.long(), accumulate=True)
        total, hits = ranks.sum(total), ranks.sum(hits)
        row, bin_ = hits.nonzero(as_tuple=True)
        yield Rankings(
            relevant=hits.sum(1),
            above=total.new_empty(len(total), 0),
            alone=torch.empty(len(total), 0, dtype=torch.bool),
            query=row,
            at=(total.cumsum(1) - total)[row, bin_],
            size=total[row, bin_],
            hits_above=(hits.cumsum(1) - hits)[row, bin_],
            hits=hits[row, bin_],
        )


def _distance_histograms(
    words: np.ndarray, planes: np.ndarray, bins: int, low: np.ndarray, high: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Histograms int64 (B, bins) of the distances to all items and to the relevant low[i]:high[i]."""
    b, g = len(words), planes.shape[1]
    total = np.zeros((b, bins), np.int64)
    hits = np.zeros((b, bins), np.int64)
    dtype = np.uint8 if bins <= 256 else np.int16
    rows = max(1, _CHUNK_BYTES // (8 * max(g, 256 * bins)))  # the joint histogram has 256 * bins counts a row

    # Few, long calls: threads that fetch the interpreter lock for short ones wait for it instead. So
    # queries go in chunks, and side by side where they have the same relevant items.
    order = np.lexsort((high, low))

    def work(part: np.ndarray) -> None:
        xor = np.empty((rows, g), np.uint64)
        count = np.empty((rows, g), np.uint8)
        padded = np.zeros((rows, g + g % 2), dtype)
        for start in range(0, len(part), rows):
            chunk = order[part[start : start + rows]]
            c = len(chunk)
            distance = padded[:c, :g]
            for w, plane in enumerate(planes):
                np.bitwise_xor(plane, words[chunk, w, None], out=xor[:c])
                if w == 0:
                    np.bitwise_count(xor[:c], out=distance)
                else:
                    distance += np.bitwise_count(xor[:c], out=count[:c])
            total[chunk] = _histograms_of_all(padded[:c], bins)
            first = np.flatnonzero(np.diff(low[chunk], prepend=-1) | np.diff(high[chunk], prepend=-1))
            for i, j in zip(first, [*first[1:], c], strict=True):
                relevant = distance[i:j, low[chunk[i]] : high[chunk[i]]]
                hits[chunk[i:j]] = _histograms(relevant, bins)

    _in_threads(work, b)
    total[:, 0] -= g % 2  # the padding's distance is 0
    return torch.from_numpy(total), torch.from_numpy(hits)


def _histograms(values: np.ndarray, bins: int) -> np.ndarray:
    """Histograms int64 (c, bins) of the rows of `values` (c, n), in one call of torch.bincount.

    It counts 32-bit integers as they are; NumPy's widens them first.
    """
    c = len(values)
    keys = np.add(values, np.arange(0, c * bins, bins, dtype=np.int32)[:, None], dtype=np.int32)
    return torch.bincount(torch.from_numpy(keys.ravel()), minlength=c * bins).numpy().reshape(c, bins)


def _histograms_of_all(distance: np.ndarray, bins: int) -> np.ndarray:
    """Histograms int64 (c, bins) of whole rows (c, even).

    Bytes are counted in pairs, which halves the counting; the joint histograms' margins add up.
    """
    if distance.dtype != np.uint8:
        return _histograms(distance, bins)
    joint = _histograms(distance.view(np.uint16), bins << 8).reshape(len(distance), bins, 256)[:, :, :bins]
    return joint.sum(1) + joint.sum(2)


def hamming_pairs(left: Tensor, right: Tensor) -> Tensor:
    """The Hamming distances of paired codes, int64 (P,).

    Args:
        left: uint8 (P, bytes), packed codes.
        right: uint8 (P, bytes), packed codes.

    Example:
        >>> hamming_pairs(torch.tensor([[5]], dtype=torch.uint8), torch.tensor([[6]], dtype=torch.uint8))
        tensor([2])
    """
    table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int64, device=left.device)
    return table[(left ^ right).long()].sum(1)


def rank(
    query: Descriptors | Sharded,
    gallery: Descriptors | Sharded,
    *,
    exclude_self: bool = False,
    block_bytes: int = BLOCK_BYTES,
    ahead: SearchResult | None = None,
) -> Iterator[Rankings]:
    """Yields all rankings in blocks of queries: by Hamming distance for codes, by inner product for float vectors.

    Where query or gallery are spread over ranks, every rank must call and take all blocks.

    Args:
        query: Q queries.
        gallery: G gallery items.
        exclude_self: Take each query's own collection row out of its ranking.
        block_bytes: Memory for a block.
        ahead: Re-ranked shortlists (Q, K) that come before all other items.

    Raises:
        ValueError: If the gallery is empty, if the two sides differ in width or kind, or if `ahead` is given with codes
            or with a gallery on several ranks.

    Example:
        >>> query = Descriptors(torch.ones(1, 1), torch.tensor([0]), torch.tensor([9]))
        >>> gallery = Descriptors(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> next(rank(query, gallery)).relevant
        tensor([2])
    """
    query, gallery = Sharded.of(query), Sharded.of(gallery)
    if len(gallery) == 0:
        raise ValueError("the gallery is empty: there is nothing to rank")
    if query.bits != gallery.bits or query.columns != gallery.columns:
        raise ValueError(
            f"query and gallery differ: {query.columns} columns, bits {query.bits} against "
            f"{gallery.columns} columns, bits {gallery.bits}"
        )
    if ahead is not None and gallery.ranks.world > 1:
        raise ValueError("re-ranked shortlists need the whole gallery in one process")
    if gallery.bits is not None:
        if ahead is not None:
            raise ValueError("re-ranked shortlists need vectors: unpack the codes first")
        return rank_codes(query, gallery, exclude_self=exclude_self, block_bytes=block_bytes)
    return rank_vectors(query, gallery, exclude_self=exclude_self, block_bytes=block_bytes, ahead=ahead)


def measure_ranking(
    query: Descriptors | Sharded,
    gallery: Descriptors | Sharded,
    *,
    ks: Sequence[int] = (1, 10, 100),
    exclude_self: bool = False,
    block_bytes: int = BLOCK_BYTES,
    ahead: SearchResult | None = None,
) -> dict[str, Tensor]:
    """The metrics of each query over its full ranking: name -> float64 (Q,).

    - `relevant`: the number of relevant items.
    - `AP`: average precision over the whole ranking; its mean is mAP.
    - `AP@k_minRk` and `AP@k_R`: average precision of the first k ranks, divided by min(R, k) or R.
    - `P@k`: precision.
    - `R@k`: hit rate.
    - `NDCG@k`: normalised discounted cumulative gain with binary relevance.
    - `RP`: R-precision.
    - `AP_pessimistic` and `AP_optimistic`, for codes only: the relevant items of each tie group last or first.

    All values are expectations over the order of ties. Memory beyond the descriptors peaks at about `block_bytes`.

    Where query or gallery are spread over ranks, every rank must call. All ranks get the values of all queries that one
    process would compute, except for the order in which float64 fractions are summed.

    Args:
        query: Q queries.
        gallery: G gallery items.
        ks: Cutoffs k, 1 or more. Where k is beyond the gallery, the missing ranks count as wrong.
        exclude_self: Take each query's own collection row out of its ranking.
        block_bytes: Memory for a block.
        ahead: Re-ranked shortlists (Q, K) that come before all other items.

    Returns:
        One tensor per name, NaN for a query without relevant items.

    Raises:
        ValueError: If a k is below 1, if there are no queries, or as `rank` does.

    Example:
        >>> query = Descriptors(torch.ones(1, 1), torch.tensor([0]), torch.tensor([9]))
        >>> gallery = Descriptors(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> measure_ranking(query, gallery, ks=(1,))["AP"]  # (1 + 2/3) / 2
        tensor([0.8333], dtype=torch.float64)
    """
    for k in ks:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
    harmonic = ties.harmonic_numbers(len(gallery))
    metrics: dict[str, Tensor] = {}  # filled in place: small results between large blocks fragment the heap
    start = 0
    for ranking in rank(query, gallery, exclude_self=exclude_self, block_bytes=block_bytes, ahead=ahead):
        block = {
            "relevant": ranking.relevant.double(),
            "AP": ties.average_precision(ranking, harmonic),
            "RP": ties.r_precision(ranking),
        }
        if gallery.bits is not None:
            for end in ("pessimistic", "optimistic"):
                block[f"AP_{end}"] = ties.average_precision(ranking, harmonic, ties=end)
        for k in ks:
            block[f"P@{k}"] = ties.precision_at(ranking, k)
            block[f"R@{k}"] = ties.hit_rate_at(ranking, k)
            block[f"NDCG@{k}"] = ties.ndcg_at(ranking, k)
            block[f"AP@{k}_minRk"] = ties.average_precision(ranking, harmonic, k=k, normaliser="min(R,k)")
            block[f"AP@{k}_R"] = ties.average_precision(ranking, harmonic, k=k)
        stop = start + len(ranking.relevant)
        for name, value in block.items():
            if start == 0:
                metrics[name] = torch.empty(len(query), dtype=torch.float64)
            metrics[name][start:stop] = value
        start = stop
    if not metrics:
        raise ValueError("there are no queries to measure")
    return metrics


def average_precision_in_index_order(
    query: Descriptors | Sharded,
    gallery: Descriptors | Sharded,
    *,
    exclude_self: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """The AP of each query with equal Hamming distances ranked in gallery order, float64 (Q,).

    The evaluation of the DSH release breaks ties in this way. The value depends on the order of the gallery: report it
    only to compare with numbers measured in the same way.

    Args:
        query: Q queries with codes.
        gallery: G gallery items with codes of the same width.
        exclude_self: Take each query's own collection row out of its ranking.
        block_bytes: Memory for a block.

    Returns:
        One value per query, NaN for a query without relevant items.

    Raises:
        ValueError: If the two sides are not codes of one width.

    Example:
        >>> query = Descriptors(torch.zeros(1, 1, dtype=torch.uint8), torch.tensor([0]), torch.tensor([9]), bits=8)
        >>> codes = torch.tensor([[1], [2]], dtype=torch.uint8)  # both at distance 1
        >>> average_precision_in_index_order(query, Descriptors(codes, torch.tensor([1, 0]), torch.arange(2), bits=8))
        tensor([0.5000], dtype=torch.float64)
    """
    query, gallery = Sharded.of(query), Sharded.of(gallery)
    bins = _common_width(query, gallery) + 1
    junk = find_junk(query, gallery.own, exclude_self=exclude_self)
    stored = _ByLabel.of(gallery.own)
    planes = np.ascontiguousarray(code_words(stored.vectors).T)  # (W, g)
    # A distance and a position in one integer, of which no two are equal.
    dtype = np.int32 if bins * len(gallery) < 2**31 else np.int64
    position = np.empty(len(gallery.own), dtype)
    position[stored.place.numpy()] = gallery.position.numpy()
    step = _block_rows(query, gallery, block_bytes)
    values = torch.empty(len(query), dtype=torch.float64)
    for start in range(0, len(query), step):
        stop = min(start + step, len(query))
        words = code_words(query.rows(torch.arange(start, stop)))
        keys = np.zeros((len(words), len(position)), dtype)

        def work(part: np.ndarray, words: np.ndarray = words, keys: np.ndarray = keys) -> None:
            for i in part:
                for w, plane in enumerate(planes):
                    keys[i] += np.bitwise_count(plane ^ words[i, w])
                keys[i] *= len(gallery)
                keys[i] += position

        _in_threads(work, len(words))
        rows, columns = junk.block(start, stop)
        nothing = np.iinfo(dtype).max
        keys[rows.numpy(), stored.place[columns].numpy()] = nothing
        ranking = _rank_keys(keys, *stored.relevant(query.label[start:stop]), nothing, gallery.ranks)
        values[start:stop] = ties.average_precision(ranking, ties.harmonic_numbers(0))
    return values


def mean_name(name: str) -> str:
    """The name of the mean of a per-query metric.

    AP becomes mAP, also within a path such as rerank/AP. Other names stay as they are.

    Args:
        name: Name of the per-query metric.

    Example:
        >>> mean_name("AP"), mean_name("rerank/AP@10_R"), mean_name("P@10")
        ('mAP', 'rerank/mAP@10_R', 'P@10')
    """
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{'m' if last.startswith('AP') else ''}{last}"
