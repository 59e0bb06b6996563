"""Re-ranking: what all methods share, and the methods that make new vectors of queries and gallery.

The methods here are query expansion, database augmentation and hubness correction. The others put a shortlist in a new
order that comes before the rest of the ranking, and have modules of their own: `k_reciprocal`, `diffusion`,
`superglobal`. All methods work on unit vectors and inner products. Similarities are computed in blocks, and only lists
of K neighbours are kept.

`nearest` leaves a query's own copies and its group (junk) out of the query's list. The lists of gallery items are over
the whole gallery, where items that are junk to some query may stand.

No method uses other queries, unless they are items of the gallery. There database augmentation mixes a query's own item
into its neighbours, and the other methods that look at items' neighbours (hubness correction, k-reciprocal, diffusion)
see it too: where queries are in the gallery, such metrics are not quite those of a query from outside.
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


# ------------------------------------------------------------------------------------------- shortlists


def mutual_neighbours(ids: Tensor, *, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """Whether each item is in the list of its neighbour too, bool (G, K). False for an id of -1.

    Args:
        ids: int64 (G, K), the neighbours of each gallery item, from `gallery_neighbours`.
        block_bytes: Memory for a block.

    Example:
        >>> mutual_neighbours(torch.tensor([[1], [0], [0]]))
        tensor([[ True],
                [ True],
                [False]])
    """
    mutual = torch.empty_like(ids, dtype=torch.bool)
    step = max(1, block_bytes // (16 * max(ids.shape[1], 1) ** 2))
    for start in range(0, len(ids), step):
        block = ids[start : start + step]
        own = torch.arange(start, start + len(block))
        mutual[start : start + step] = (ids[block.clamp(min=0)] == own[:, None, None]).any(2) & (block >= 0)
    return mutual


def reordered(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The ids and scores of shortlists, best score first. Equal scores stay in their order.

    Args:
        ids: int64 (Q, K), gallery positions.
        scores: Floating point (Q, K), the new scores.

    Example:
        >>> reordered(torch.tensor([[7, 8, 9]]), torch.tensor([[0.5, 0.5, 0.75]]))
        (tensor([[9, 7, 8]]), tensor([[0.7500, 0.5000, 0.5000]]))
    """
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), scores


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
