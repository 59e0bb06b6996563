"""Re-ranking by refined global descriptors: the best items and the query are described anew from their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from simsearch.functional.ranking import BLOCK_BYTES, best_of_all
from simsearch.functional.reranking import reordered
from simsearch.types import SearchResult


def superglobal(
    query: Tensor, found: SearchResult, gallery: Tensor, *, k: int, beta: float, block_bytes: int = BLOCK_BYTES
) -> SearchResult:
    """Shortlists, re-ranked by the mean of two scores: of the query and of the expanded query, with refined items.

    An item is refined to the weighted mean of its descriptor and those of its k nearest within the shortlist. It has
    the weight 1 itself, the others beta times their similarity to it. The first score is the inner product of the query
    and the refined item. The k + 1 refined items that score best make the expanded query, by the maximum in each
    dimension. The second score is the inner product of the expanded query and the refined item. Neither is normalised.

    These are the rules of the authors' release, with two differences. Similarities below 0 count as 0: there they give
    negative weights. An item has the weight 1 wherever it stands among its own nearest: there the nearest has it, which
    may be an item of an equal descriptor.

    Args:
        query: float32 (Q, D), unit vectors.
        found: Shortlists (Q, M) of gallery positions, from `nearest`.
        gallery: float32 (G, D), unit vectors.
        k: Number of neighbours that refine, 1 or more.
        beta: Weight of the neighbours, 0 or more.
        block_bytes: Memory for a block.

    Returns:
        Shortlists (Q, M) in the new order. Scores are the means, which may exceed 1. Ids of -1 rank last, with -inf.

    Source:
        Shao, Chen, Karpur, Cui, Araujo, Cao: Global features are all you need for image retrieval and reranking. ICCV
        2023.

    Example:
        >>> from simsearch.functional.reranking import nearest
        >>> gallery = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.0, 0.8], [0.6, 0.8, 0.0]])
        >>> query = torch.tensor([[1.0, 0.0, 0.0]])
        >>> found = nearest(query, gallery, k=3)
        >>> found.ids, superglobal(query, found, gallery, k=1, beta=1.0).ids  # the last has a near neighbour
        (tensor([[0, 1, 2]]), tensor([[0, 2, 1]]))
    """
    m, d = found.ids.shape[1], gallery.shape[1]
    ids, scores = torch.empty_like(found.ids), torch.empty_like(found.scores)
    step = max(1, block_bytes // (4 * m * (3 * m + 3 * d)))
    for start in range(0, len(query), step):
        one, asked = found.ids[start : start + step], query[start : start + step]
        b, absent, own = len(one), one < 0, torch.eye(m)
        items = gallery[one.clamp(min=0)].masked_fill(absent[:, :, None], 0.0)

        similarity = items @ items.mT
        similarity.masked_fill_(absent[:, None] | (own > 0), -torch.inf)
        near, weight = (part.view(b, m, -1) for part in best_of_all(similarity.flatten(0, 1), k))
        weights = own + torch.zeros(b, m, m).scatter_(2, near, beta * weight.clamp(min=0))
        refined = (weights @ items) / weights.sum(2, keepdim=True)

        first = (refined @ asked[:, :, None])[:, :, 0].masked_fill(absent, -torch.inf)
        leading, leads = best_of_all(first, k + 1)
        leaders = refined.gather(1, leading[:, :, None].expand(-1, -1, d))
        expanded = leaders.masked_fill(leads.isneginf()[:, :, None], -torch.inf).amax(1)
        second = (refined @ expanded[:, :, None])[:, :, 0]
        final = ((first + second) / 2).masked_fill(absent, -torch.inf)
        ids[start : start + step], scores[start : start + step] = reordered(one, final)
    return SearchResult(ids, scores)
