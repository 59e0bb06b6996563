"""The evaluator of recommendations: lists of ten items, and some ways to make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.functional.diversity import mmr
from simsearch.functional.ranking import find_junk
from simsearch.functional.recommendation import (
    coverage,
    exposure,
    gini,
    intra_list_diversity,
    long_tail_share,
    novelty,
)
from simsearch.functional.reranking import csls_gallery, nearest, unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.types import Descriptors, RetrievalTask

K = 10
SHORTLIST = 100

Recommend = Callable[[Descriptors, Descriptors, RetrievalTask], Tensor]


@dataclass(frozen=True)
class Recommendations:
    """Evaluates the P@10, coverage, Gini coefficient, long-tail share, diversity and novelty of lists.

    Attributes:
        recommend: Makes the lists, int64 (Q, 10), gallery positions, -1 for no item.
        space: Floating point (N, D), descriptors of the collection in which diversity is measured. Use the same for all
            lists that are compared.
        popularity: (G,), of gallery items.
    """

    recommend: Recommend
    space: Tensor
    popularity: Tensor

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The metrics of a task.

        Args:
            query: The queries of the task, in one process.
            gallery: The gallery of the task, in one process.
            task: The task.
        """
        ids = self.recommend(query.whole, gallery.whole, task)
        counts = exposure(ids, len(gallery))
        right = (gallery.label[ids.clamp(min=0)] == query.label[:, None]) & (ids >= 0)
        per_query = {
            f"P@{K}": right.double().mean(1),
            "diversity": intra_list_diversity(ids, self.space[gallery.index]),
            "novelty": novelty(ids, self.popularity),
        }
        shares = {
            "coverage": coverage(counts),
            "gini": gini(counts),
            "long_tail": long_tail_share(counts, self.popularity),
        }
        measured = Measured.of(per_query, query_units(query, task))
        return replace(measured, metrics=measured.metrics | shares)


def nearest_lists(
    query: Descriptors,
    gallery: Descriptors,
    task: RetrievalTask,
    *,
    diversity: float = 0.0,
    hubness: bool = False,
) -> Tensor:
    """The gallery positions of each query's 10 recommendations, int64 (Q, 10), without junk and the query itself.

    Args:
        query: The queries.
        gallery: The gallery.
        task: The task.
        diversity: 1 - lambda of MMR over the 100 nearest items, in [0, 1]. 0 leaves MMR out.
        hubness: Correct for hubs by CSLS.

    Returns:
        Positions in the gallery, -1 where a list is shorter.
    """
    junk = find_junk(query, gallery, exclude_self=task.exclude_self)
    asked, searched = unit_vectors(query.vectors, query.bits), unit_vectors(gallery.vectors, query.bits)
    if hubness:
        asked, searched = F.pad(asked, (0, 1), value=1.0), csls_gallery(searched, K)
    if not diversity:
        return nearest(asked, searched, K, junk).ids
    found = nearest(asked, searched, SHORTLIST, junk)
    chosen = torch.full((len(found.ids), K), -1, dtype=torch.int64)
    for row, (ids, scores) in enumerate(zip(found.ids, found.scores, strict=True)):
        ids, scores = ids[ids >= 0], scores[ids >= 0]
        order = mmr(scores, searched[ids], K, 1 - diversity)
        chosen[row, : len(order)] = ids[order]
    return chosen


def random_lists(query: Descriptors, gallery: Descriptors, task: RetrievalTask, *, items: int, seed: int = 0) -> Tensor:
    """10 random gallery positions for each query, int64 (Q, 10), without junk and the query itself.

    Args:
        query: The queries.
        gallery: The gallery.
        task: The task.
        items: Number of items of the whole collection.
        seed: Seed of the random choice.
    """
    noise = F.normalize(torch.randn(items, 32, generator=torch.Generator().manual_seed(seed)), dim=1)
    asked, searched = (replace(side, vectors=noise[side.index], bits=None) for side in (query, gallery))
    return nearest_lists(asked, searched, task)


def popular_lists(query: Descriptors, gallery: Descriptors, task: RetrievalTask, *, popularity: Tensor) -> Tensor:
    """The 10 most popular gallery positions for each query, int64 (Q, 10), without junk and the query itself.

    Args:
        query: The queries.
        gallery: The gallery.
        task: The task.
        popularity: (G,), of gallery items. Of equally popular items the first comes first.

    Returns:
        Positions in the gallery, -1 where a list is shorter.
    """
    order = popularity.argsort(descending=True, stable=True)
    junk = find_junk(query, gallery, exclude_self=task.exclude_self)
    ids = torch.full((len(query), K), -1, dtype=torch.int64)
    for q in range(len(query)):
        columns = junk.block(q, q + 1)[1]
        first = order[: K + len(columns)]
        kept = first[~torch.isin(first, columns)][:K]
        ids[q, : len(kept)] = kept
    return ids
