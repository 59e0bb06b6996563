"""Re-ranking: query expansion, database augmentation, hubness correction, k-reciprocal neighbours, diffusion.

All methods work on unit vectors and inner products. Two kinds of result serve a full ranking: new vectors of queries
and gallery, or a shortlist in a new order that comes before the rest. Similarities are computed in blocks, and only
lists of K neighbours are kept.

`nearest` leaves a query's own copies and its group (junk) out of the query's list. The lists of gallery items are over
the whole gallery, where items that are junk to some query may stand.

No method uses other queries: the metrics describe what a single user gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.functional.codes import unpack_codes
from simsearch.functional.ranking import BLOCK_BYTES, Junk, best_of_all, inner_products, product_buffer
from simsearch.types import SearchResult


@dataclass(frozen=True)
class RerankedGallery:
    """A gallery that is prepared for one way of re-ranking.

    Attributes:
        vectors: float32 (G, D'), the vectors that queries are ranked against by inner product.
        rerank: A function of unit queries, float32 (Q, D), and their junk or None. It returns the queries (Q, D') for
            that ranking, and shortlists (Q, K) that come before the ranking, or None.
    """

    vectors: Tensor
    rerank: Callable[[Tensor, Junk | None], tuple[Tensor, SearchResult | None]]

    def search(self, query: Tensor, k: int) -> SearchResult:
        """The k best items after re-ranking, or all items where there are fewer.

        Args:
            query: float32 (Q, D), unit vectors.
            k: Number of items.

        Raises:
            ValueError: If the shortlists are shorter than k.
        """
        expanded, ahead = self.rerank(query, None)
        if ahead is None:
            return nearest(expanded, self.vectors, k)
        k, depth = min(k, len(self.vectors)), ahead.ids.shape[1]
        if depth < k:
            raise ValueError(
                f"k={k} is more than the re-ranked shortlists hold ({depth}): raise rerank.depth or lower k"
            )
        return SearchResult(ahead.ids[:, :k], ahead.scores[:, :k])


class Reranker(Protocol):
    """A way of re-ranking and its parameters."""

    def fit(self, gallery: Tensor) -> RerankedGallery:
        """The gallery, prepared for re-ranking.

        Args:
            gallery: float32 (G, D), unit vectors.
        """
        ...


def unit_vectors(vectors: Tensor, bits: int | None = None) -> Tensor:
    """Vectors of length 1, float32 (N, D), whose inner products are cosines.

    Codes become vectors (N, bits). Their entries are + or - 1 / sqrt(bits), rounded to 6 binary digits: the inner
    products are then exact, so that equal Hamming distances stay equal. Lengths lie within 2% of 1.

    Args:
        vectors: float32 (N, D), or packed codes uint8 (N, bytes).
        bits: Width of the codes, None for float vectors.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
        >>> unit_vectors(torch.tensor([[1]], dtype=torch.uint8), bits=4)
        tensor([[ 0.5000, -0.5000, -0.5000, -0.5000]])
    """
    if bits is None:
        return F.normalize(vectors, dim=1)
    mantissa, exponent = math.frexp(bits**-0.5)
    return (2 * unpack_codes(vectors, bits) - 1) * math.ldexp(round(64 * mantissa), exponent - 6)


def nearest(
    query: Tensor, gallery: Tensor, k: int, junk: Junk | None = None, *, block_bytes: int = BLOCK_BYTES
) -> SearchResult:
    """The min(k, G) gallery items of largest inner product with each query, without junk.

    Equal scores come in gallery order, and equal vectors have equal scores at any position.

    Args:
        query: float32 (Q, D).
        gallery: float32 (G, D).
        k: Number of items.
        junk: Pairs to leave out, or None.
        block_bytes: Memory for a block.

    Returns:
        Gallery positions and scores. Where junk leaves fewer items, the id is -1 and the score -inf.

    Example:
        >>> nearest(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0]]), k=1)
        SearchResult(ids=tensor([[1]]), scores=tensor([[1.]]))
    """
    k = min(k, len(gallery))
    ids = torch.empty(len(query), k, dtype=torch.int64)
    scores = torch.empty(len(query), k)
    step = max(1, block_bytes // (4 * len(gallery)))
    buffer = product_buffer(min(step, len(query)), len(gallery))
    for start in range(0, len(query), step):
        stop = min(start + step, len(query))
        block = inner_products(query[start:stop], gallery, buffer)
        if junk is not None:
            rows, columns = junk.block(start, stop)
            block[rows, columns] = -torch.inf
        ids[start:stop], scores[start:stop] = best_of_all(block, k)
    ids[scores.isneginf()] = -1
    return SearchResult(ids, scores)


def gallery_neighbours(gallery: Tensor, k: int) -> SearchResult:
    """The k nearest other items of each gallery item.

    The item itself is left out by its position, so that an equal vector elsewhere is a neighbour.

    Args:
        gallery: float32 (G, D).
        k: Number of neighbours.

    Example:
        >>> gallery_neighbours(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), k=1).ids
        tensor([[1],
                [0],
                [0]])
    """
    own = torch.arange(len(gallery))
    return nearest(gallery, gallery, k, Junk(own, own))


# ------------------------------------------------------------------------------------------ new vectors


def _weighted_sum(vectors: Tensor, gallery: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Unit vectors of vectors (N, D) + sum over k of weights (N, K) times gallery items. An id of -1 adds nothing."""
    weights = weights.masked_fill(ids < 0, 0.0)
    total = vectors.clone()
    for rank in range(ids.shape[1]):  # K steps over all rows: no (N, K, D)
        total.addcmul_(gallery[ids[:, rank].clamp(min=0)], weights[:, rank, None])
    return F.normalize(total, dim=1)


def average_query_expansion(query: Tensor, gallery: Tensor, found: SearchResult) -> Tensor:
    """Expanded queries, float32 (Q, D): the unit vector along the mean of the query and its K results.

    Args:
        query: float32 (Q, D), unit vectors.
        gallery: float32 (G, D), unit vectors.
        found: The K results of each query, from `nearest`.

    Source:
        Chum, Philbin, Sivic, Isard, Zisserman: Total Recall: Automatic query expansion with a generative feature model
        for object retrieval. ICCV 2007 (there after spatial verification). With global descriptors as in Gordo et al.,
        IJCV 2017.

    Example:
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> average_query_expansion(query, gallery, nearest(query, gallery, k=1))
        tensor([[0.7071, 0.7071]])
    """
    return _weighted_sum(query, gallery, found.ids, torch.ones_like(found.scores))


def alpha_query_expansion(query: Tensor, gallery: Tensor, found: SearchResult, alpha: float) -> Tensor:
    """Expanded queries, float32 (Q, D): each result has the weight similarity^alpha, and the query the weight 1.

    Args:
        query: float32 (Q, D), unit vectors.
        gallery: float32 (G, D), unit vectors.
        found: The K results of each query, from `nearest`.
        alpha: The exponent. 0 is the average. Similarities below 0 count as 0.

    Source:
        Radenović, Tolias, Chum: Fine-tuning CNN image retrieval with no human annotation. TPAMI 2019 (arXiv 2018).

    Example:
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
        >>> alpha_query_expansion(query, gallery, nearest(query, gallery, k=1), alpha=1.0)
        tensor([[0.9430, 0.3328]])
    """
    return _weighted_sum(query, gallery, found.ids, found.scores.clamp(min=0) ** alpha)


def augment_database(gallery: Tensor, k: int) -> Tensor:
    """An augmented gallery, float32 (G, D): each item is joined by its k - 1 nearest items.

    The item itself has the weight 1, the others (k-1)/k, ..., 1/k. The sum is scaled to length 1.

    Args:
        gallery: float32 (G, D), unit vectors.
        k: Number of items in the sum, with the item itself.

    Source:
        Gordo, Almazán, Revaud, Larlus: End-to-end learning of deep visual representations for image retrieval. IJCV
        2017; after Turcot and Lowe (2009).

    Example:
        >>> augment_database(torch.eye(2), k=2)  # 1 of itself and 1/2 of the other
        tensor([[0.8944, 0.4472],
                [0.4472, 0.8944]])
    """
    found = gallery_neighbours(gallery, k - 1)
    weights = 1 - torch.arange(1, found.ids.shape[1] + 1) / k
    return _weighted_sum(gallery, gallery, found.ids, weights.expand(len(gallery), -1))


def csls_gallery(gallery: Tensor, k: int) -> Tensor:
    """A gallery with one more column, -r(x) / 2, for queries with a column of 1, float32 (G, D + 1).

    Cross-domain similarity local scaling (CSLS) ranks by 2 cos(q, x) - r(q) - r(x), where r is the mean similarity to
    the k nearest. r(q) is the same for all items of a ranking and is left out, and the score is halved. r(x) is over
    the gallery's own items; in the paper it is over the other side, which would be all queries at once.

    Args:
        gallery: float32 (G, D), unit vectors.
        k: Number of neighbours in r.

    Source:
        Conneau, Lample, Ranzato, Denoyer, Jégou: Word translation without parallel data. ICLR 2018.

    Example:
        >>> csls_gallery(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), k=1)
        tensor([[ 1.0000,  0.0000, -0.5000],
                [ 1.0000,  0.0000, -0.5000]])
    """
    found = gallery_neighbours(gallery, k)
    kept = found.ids >= 0
    r = found.scores.masked_fill(~kept, 0.0).sum(1) / kept.sum(1).clamp(min=1)
    return torch.cat([gallery, -0.5 * r[:, None]], dim=1)


# -------------------------------------------------------------------------------- k-reciprocal neighbours


@dataclass(frozen=True)
class _Rows:
    """Sparse non-negative rows: the entries of row i are start[i]:start[i + 1] of column and weight, (P,) each."""

    start: Tensor
    column: Tensor
    weight: Tensor

    @classmethod
    def of(cls, rows: int, row: Tensor, column: Tensor, weight: Tensor) -> _Rows:
        """Rows from entries that are sorted by row."""
        return cls(torch.searchsorted(row, torch.arange(rows + 1)), column, weight)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of rows (n,) one after another: position in `rows`, column and weight of each."""
        count = self.start[rows + 1] - self.start[rows]
        owner = torch.arange(len(rows)).repeat_interleave(count)
        entry = torch.arange(len(owner)) + (self.start[rows] - count.cumsum(0) + count)[owner]
        return owner, self.column[entry], self.weight[entry]


@dataclass(frozen=True)
class Neighbourhoods:
    """The k-reciprocal neighbourhoods of a gallery, from `neighbourhoods`.

    Attributes:
        k1: Number of nearest items that must be mutual.
        k2: Number of nearest items that the weights are averaged over.
        reach: float32 (G,), the similarity of each item to the last of its k1 nearest. A query at least as similar is
            among them.
        inner: int64 (G, h + 1), the item and its h = k1 / 2 nearest, -1 where they are not reciprocal.
        plain: The neighbourhood of each item as weights over the gallery.
        expanded: The same weights, averaged over the item and its k2 - 1 nearest.
        total: float32 (G,), the sums of the expanded weights.
    """

    k1: int
    k2: int
    reach: Tensor
    inner: Tensor
    plain: _Rows
    expanded: _Rows
    total: Tensor


def _mutual(ids: Tensor, *, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """Whether i is in the list of its neighbour too, as bool (G, K), from ids int64 (G, K). False for an id of -1."""
    mutual = torch.empty_like(ids, dtype=torch.bool)
    step = max(1, block_bytes // (16 * max(ids.shape[1], 1) ** 2))
    for start in range(0, len(ids), step):
        block = ids[start : start + step]
        own = torch.arange(start, start + len(block))
        mutual[start : start + step] = (ids[block.clamp(min=0)] == own[:, None, None]).any(2) & (block >= 0)
    return mutual


def _with_itself(ids: Tensor) -> Tensor:
    """Reciprocal neighbours of ids (G, K) as sets (G, K + 1): the item first, -1 for what is not reciprocal."""
    return torch.cat([torch.arange(len(ids))[:, None], ids.masked_fill(~_mutual(ids), -1)], dim=1)


def _extended(sets: Tensor, inner: Tensor) -> Tensor:
    """Sets int64 (B, m) joined by the inner sets (h,) of members that lie two thirds within: (B, m + m h), -1 empty.

    An item may come more than once.
    """
    candidates = inner[sets.clamp(min=0)]
    present = (candidates >= 0) & (sets >= 0)[:, :, None]
    common = (candidates[..., None] == sets[:, None, None, :]).any(3) & present
    accepted = 3 * common.sum(2) >= 2 * present.sum(2)
    more = candidates.masked_fill(~(present & accepted[:, :, None]), -1)
    return torch.cat([sets, more.flatten(1)], dim=1)


def _extension_step(m: int, h: int, block_bytes: int = BLOCK_BYTES) -> int:
    """How many sets of m members `_extended` takes at once."""
    return max(1, block_bytes // (m * h * (m + 16)))


def _entries(sets: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the distinct members of sets (B, m), sorted."""
    keys = (torch.arange(len(sets))[:, None] * g + sets)[sets >= 0].unique()
    return keys // g, keys % g


def _pair_products(vectors: Tensor, left: Tensor, right: Tensor, *, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """Inner products of vectors[left] and vectors[right], (P,)."""
    step = max(1, block_bytes // (8 * vectors.shape[1]))
    parts = [
        (vectors[a] * vectors[b]).sum(1) for a, b in zip(left.split(step), right.split(step), strict=True)
    ]  # split of an empty tensor is one empty part
    return torch.cat(parts)


def neighbourhoods(gallery: Tensor, k1: int, k2: int) -> Neighbourhoods:
    """The k-reciprocal neighbourhoods of a gallery, as `k_reciprocal` needs them.

    Args:
        gallery: float32 (G, D), unit vectors.
        k1: Number of nearest items that must be mutual.
        k2: Number of nearest items that the weights are averaged over.

    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> neighbourhoods(gallery, k1=1, k2=1).inner  # the third item is nobody's nearest
        tensor([[ 0,  1],
                [ 1,  0],
                [ 2, -1]])
    """
    g = len(gallery)
    found = gallery_neighbours(gallery, k1)
    inner = _with_itself(found.ids[:, : max(round(k1 / 2), 1)])
    outer = _with_itself(found.ids)
    rows, columns, weights = [], [], []
    step = _extension_step(outer.shape[1], inner.shape[1])
    for start in range(0, g, step):
        row, column = _entries(_extended(outer[start : start + step], inner), g)
        rows.append(row + start)
        columns.append(column)
        weights.append(torch.exp(_pair_products(gallery, row + start, column) - 1))
    plain = _Rows.of(g, torch.cat(rows), torch.cat(columns), torch.cat(weights))

    members = torch.cat([torch.arange(g)[:, None], found.ids[:, : k2 - 1]], dim=1)
    rows, columns, weights = [], [], []
    step = max(1, BLOCK_BYTES * g // (40 * k2 * max(len(plain.column), 1)))
    for start in range(0, g, step):
        block = members[start : start + step]
        present = block >= 0
        owner, column, weight = plain.take(block[present])
        keys, place = (present.nonzero()[:, 0][owner] * g + column).unique(return_inverse=True)
        rows.append(keys // g + start)
        columns.append(keys % g)
        total = torch.zeros(len(keys)).index_add_(0, place, weight)
        weights.append(total / present.sum(1)[keys // g])
    row, weight = torch.cat(rows), torch.cat(weights)
    expanded = _Rows.of(g, row, torch.cat(columns), weight)
    total = torch.zeros(g).index_add_(0, row, weight)
    return Neighbourhoods(k1, k2, found.scores[:, -1], inner, plain, expanded, total)


def k_reciprocal(
    found: SearchResult, gallery: Neighbourhoods, lambda_: float, *, block_bytes: int = BLOCK_BYTES
) -> SearchResult:
    """Shortlists, re-ranked by (1 - lambda_) times the Jaccard distance of neighbourhoods plus lambda_ (1 - cosine).

    A neighbourhood holds the items that have each other among their k1 nearest. It is joined by the half as large
    neighbourhoods of members, where two thirds of one lie within it. Its weights are exp(-d), averaged over the k2
    nearest with the item itself first. Neighbourhoods are compared by the weighted Jaccard distance.

    Differences from the paper and the authors' release (Python):

    - d is 1 - cosine, half the squared distance.
    - The release divides the squared distances of an item by the largest of them, here and in the term with lambda, and
      each neighbourhood's weights by their sum. The paper does not.
    - In the release a member's neighbourhood joins where more than two thirds of it lie within, in the paper and here
      where two thirds do.
    - The neighbours of gallery items are searched in the gallery alone. The release has all queries among them. A query
      is a neighbour of an item where it is nearer than the last of the item's neighbours.
    - A query's neighbourhood lies within its shortlist, so that junk has no part in it. K should be several times k1.

    Args:
        found: Shortlists (Q, K) of gallery positions with cosines.
        gallery: The neighbourhoods of the gallery.
        lambda_: Weight of the cosine in [0, 1].
        block_bytes: Memory for a block.

    Returns:
        Shortlists (Q, K) in the new order. Scores are minus the combined distance.

    Source:
        Zhong, Zheng, Cao, Li: Re-ranking person re-identification with k-reciprocal encoding. CVPR 2017.

    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> found = nearest(torch.tensor([[0.6, 0.8]]), gallery, k=3)
        >>> k_reciprocal(found, neighbourhoods(gallery, k1=2, k2=1), lambda_=1.0).ids  # the cosine alone
        tensor([[1, 2, 0]])
    """
    g, (q, k) = len(gallery.total), found.ids.shape
    ids, scores = torch.empty_like(found.ids), torch.empty_like(found.scores)
    per_item = 40 * max(len(gallery.expanded.column) // g, 1)
    m = min(gallery.k1, k)
    step = min(max(1, block_bytes // (9 * g + k * per_item)), _extension_step(m, gallery.inner.shape[1], block_bytes))
    for start in range(0, q, step):
        one, similarity = found.ids[start : start + step], found.scores[start : start + step]
        b = len(one)
        present = one >= 0
        near, nearness = one[:, :m], similarity[:, :m]
        reciprocal = near.masked_fill(nearness < gallery.reach[near.clamp(min=0)], -1)
        row, column = _entries(_extended(reciprocal, gallery.inner), g)

        inside = torch.zeros(b, g)  # exp(-d) of the shortlist, 0 elsewhere
        short_row, short_rank = present.nonzero(as_tuple=True)
        short = one[present]
        inside[short_row, short] = torch.exp(similarity[present] - 1)
        weight = torch.zeros(b, g)
        weight[row, column] = inside[row, column]

        friends = one[:, : gallery.k2 - 1]
        friend_row = (friends >= 0).nonzero()[:, 0]
        owner, column, value = gallery.plain.take(friends[friends >= 0])
        weight.index_put_((friend_row[owner], column), value, accumulate=True)
        weight[inside == 0] = 0.0
        weight /= 1 + (friends >= 0).sum(1, keepdim=True)

        owner, column, value = gallery.expanded.take(short)
        shared = torch.minimum(weight[short_row[owner], column], value)
        common = torch.zeros(len(short)).index_add_(0, owner, shared)
        union = weight.sum(1)[short_row] + gallery.total[short] - common
        final = torch.full((b, k), -torch.inf)
        final[short_row, short_rank] = (1 - lambda_) * (common / union - 1) + lambda_ * (similarity[present] - 1)
        ids[start : start + step], scores[start : start + step] = _sorted(one, final)
    return SearchResult(ids, scores)


def _sorted(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and scores, best first; equal scores stay in their order."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), scores


# ---------------------------------------------------------------------------------------------- diffusion


@dataclass(frozen=True)
class Graph:
    """A symmetric normalised affinity S of G items, as lists of neighbours.

    Attributes:
        ids: int64 (G, K).
        weights: float32 (G, K), 0 where two items are not mutual neighbours.
        gamma: The exponent of the similarities.
    """

    ids: Tensor
    weights: Tensor
    gamma: float


def affinity_graph(gallery: Tensor, k: int, gamma: float) -> Graph:
    """The graph of mutual k nearest neighbours with the weights similarity^gamma, divided by the roots of both degrees.

    Args:
        gallery: float32 (G, D), unit vectors.
        k: Number of neighbours.
        gamma: The exponent of the similarities.

    Source:
        Iscen, Tolias, Avrithis, Furon, Chum: Efficient diffusion on region manifolds. CVPR 2017.

    Example:
        >>> affinity_graph(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), k=1, gamma=3.0).weights
        tensor([[1.],
                [1.]])
    """
    found = gallery_neighbours(gallery, k)
    affinity = found.scores.clamp(min=0).masked_fill(~_mutual(found.ids), 0.0) ** gamma
    affinity = affinity.masked_fill(found.scores <= 0, 0.0)  # 0^0 would be 1
    root = affinity.sum(1).rsqrt().nan_to_num(posinf=0.0)
    ids = found.ids.clamp(min=0)
    return Graph(ids, affinity * root[:, None] * root[ids], gamma)


def diffuse(
    found: SearchResult,
    graph: Graph,
    *,
    seeds: int,
    alpha: float,
    iterations: int,
    block_bytes: int = BLOCK_BYTES,
) -> SearchResult:
    """Shortlists, re-ranked by diffusion on the graph of mutual neighbours.

    Items are ordered by f = (I - alpha S)^-1 y, the amount that reaches an item from the query's seeds y.

    The `seeds` nearest items of the query inject similarity^gamma. At most `iterations` steps of conjugate gradients
    approach the steady state. S is truncated to the rows and columns of the shortlist. Float32 leaves an error of about
    1e-7 / (1 - alpha) of f.

    Args:
        found: Shortlists (Q, K) of gallery positions with cosines.
        graph: The affinity graph of the gallery.
        seeds: Number of items that inject.
        alpha: Share that is passed on in each step, in [0, 1).
        iterations: Largest number of steps.
        block_bytes: Memory for a block.

    Returns:
        Shortlists (Q, K) in the new order. Scores are f. Items with f = 0 keep their order and rank last, with the
            score cosine - 2.

    Source:
        Iscen, Tolias, Avrithis, Furon, Chum: Efficient diffusion on region manifolds. CVPR 2017.

    Example:
        >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.6, 0.8]])
        >>> found = nearest(torch.tensor([[1.0, 0.0]]), gallery, k=4)
        >>> graph = affinity_graph(gallery, k=2, gamma=1.0)
        >>> diffuse(found, graph, seeds=1, alpha=0.9, iterations=20).ids
        tensor([[0, 1, 2, 3]])
    """
    q, k = found.ids.shape
    neighbours = graph.ids.shape[1]
    ids, scores = torch.empty_like(found.ids), torch.empty_like(found.scores)
    step = max(1, block_bytes // (8 * len(graph.ids) + 24 * k * neighbours))
    place = torch.empty(min(step, q), len(graph.ids), dtype=torch.int64)
    for start in range(0, q, step):
        one, similarity = found.ids[start : start + step], found.scores[start : start + step]
        b = len(one)
        present = one >= 0
        # Position of each gallery item in the shortlist, the padding slot K where it is not in it.
        row, rank = present.nonzero(as_tuple=True)
        place[:b].fill_(k)
        place[row, one[present]] = rank
        safe = one.clamp(min=0)
        local = place[:b].gather(1, graph.ids[safe].flatten(1))
        weights = graph.weights[safe].masked_fill(~present[:, :, None], 0.0)
        seed = similarity.clamp(min=0) ** graph.gamma
        seed[:, seeds:] = 0.0
        seed[similarity <= 0] = 0.0

        def apply(f: Tensor, local: Tensor = local, weights: Tensor = weights) -> Tensor:
            reached = F.pad(f, (0, 1)).gather(1, local).view_as(weights)
            return f - alpha * (weights * reached).sum(2)

        f = conjugate_gradient(apply, seed, iterations)
        final = torch.where(f > 0, f, similarity - 2).masked_fill(~present, -torch.inf)
        ids[start : start + step], scores[start : start + step] = _sorted(one, final)
    return SearchResult(ids, scores)


def conjugate_gradient(apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """The solutions of B symmetric positive definite systems apply(x) = right, side by side, (B, n).

    The method starts from 0 and takes at most `iterations` steps. A system is left as it is once its residual is no
    longer than the rounding error of its right side: the rest is noise, and steps along noise lead away from the
    solution.

    Args:
        apply: The linear map of each system, from (B, n) to (B, n).
        right: Floating point (B, n), the right sides.
        iterations: Largest number of steps.

    Source:
        Hestenes, Stiefel: Methods of conjugate gradients for solving linear systems. 1952.

    Example:
        >>> conjugate_gradient(lambda x: 2 * x, torch.tensor([[4.0, 6.0]]), iterations=1)
        tensor([[2., 3.]])
    """
    scale = right.abs().amax(1, keepdim=True)  # so that squares neither vanish nor overflow
    residual = direction = torch.where(scale > 0, right / scale, 0.0)
    x = torch.zeros_like(right)
    norm = residual.square().sum(1, keepdim=True)
    rounding = norm * torch.finfo(right.dtype).eps ** 2
    for _ in range(iterations):
        unsolved = norm > rounding
        if not unsolved.any():
            break
        image = apply(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(unsolved & (curvature > 0), norm / curvature, 0.0)
        x = x + length * direction
        residual = residual - length * image
        old, norm = norm, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(old > 0, norm / old, 0.0) * direction
    return scale * x
