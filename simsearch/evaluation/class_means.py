"""Accuracy of the nearest class, for tasks whose labels are classes."""

from __future__ import annotations

import torch

from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.functional.reranking import unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.types import RetrievalTask


class ClassMeans:
    """`class/accuracy`: the share of queries whose own class has the nearest mean in the gallery, by cosine.

    It needs no classifier, so it compares objectives that have none. Codes are vectors of +1 and -1. Where a task takes
    queries out of their own rankings, it takes them out of their class's mean too. A query without another item of its
    class has no value.

    Where the gallery was trained on, mAP is at least about this number: all of the class stands first for a query that
    is right.
    """

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The accuracy of a task. Where several ranks measure, every rank must call.

        Args:
            query: The queries of the task.
            gallery: The gallery of the task.
            task: The task.
        """
        vectors = unit_vectors(query.own.vectors, query.bits).double()
        stored = unit_vectors(gallery.own.vectors, gallery.bits).double()
        classes, counts = gallery.label[gallery.label >= 0].unique(return_counts=True)
        known = gallery.own.label >= 0
        places = torch.searchsorted(classes, gallery.own.label[known])
        sums = stored.new_zeros(len(classes), stored.shape[1]).index_add_(0, places, stored[known])
        sums = gallery.ranks.sum(sums)

        label = query.own.label
        own = torch.searchsorted(classes, label).clamp(max=len(classes) - 1)
        there = classes[own] == label
        itself = torch.isin(query.own.index, gallery.index) & there & task.exclude_self
        rest = sums[own] - vectors * itself[:, None]
        scores = vectors @ torch.nn.functional.normalize(sums).T
        others = scores.scatter(1, own[:, None], -torch.inf).amax(1)
        right = ((vectors * torch.nn.functional.normalize(rest)).sum(1) > others).double()
        right[~there | (counts[own] == itself)] = torch.nan

        whole = torch.zeros(len(query), dtype=torch.float64)
        whole[query.position] = right
        return Measured.of({"class/accuracy": query.ranks.sum(whole)}, query_units(query, task))
