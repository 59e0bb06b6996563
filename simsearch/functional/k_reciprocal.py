"""Re-ranking by k-reciprocal neighbours: items are near where they know each other's neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simsearch.functional.ranking import BLOCK_BYTES
from simsearch.functional.reranking import gallery_neighbours, mutual_neighbours, reordered
from simsearch.types import SearchResult


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


def _with_itself(ids: Tensor) -> Tensor:
    """Reciprocal neighbours of ids (G, K) as sets (G, K + 1): the item first, -1 for what is not reciprocal."""
    return torch.cat([torch.arange(len(ids))[:, None], ids.masked_fill(~mutual_neighbours(ids), -1)], dim=1)


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
        >>> from simsearch.functional.reranking import nearest
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
        ids[start : start + step], scores[start : start + step] = reordered(one, final)
    return SearchResult(ids, scores)
