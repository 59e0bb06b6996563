"""Accuracy of the nearest class, for tasks whose labels are classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.functional.reranking import unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.types import RetrievalTask

_BLOCK = 2**12  # vectors that are compared with all means together


class ClassMeans:
    """`class/accuracy`: the share of queries whose own class has the nearest mean in the gallery, by cosine.

    It needs no classifier, so it compares objectives that have none. Codes are vectors of +1 and -1. Where a task takes
    queries out of their own rankings, it takes them out of their class's mean too. A query without another item of its
    class has no value. `class/gallery_accuracy` is the same of the gallery's items, each without itself in the mean.

    Where the gallery was trained on and has few errors, mAP is at least about the first number: all of the class stands
    first for a query that is right. Errors of the gallery take from it.
    """

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The accuracies of a task. Where several ranks measure, every rank must call.

        Args:
            query: The queries of the task.
            gallery: The gallery of the task.
            task: The task.
        """
        stored = unit_vectors(gallery.own.vectors, gallery.bits).double()
        classes, counts = gallery.label[gallery.label >= 0].unique(return_counts=True)
        known = gallery.own.label >= 0
        places = torch.searchsorted(classes, gallery.own.label[known])
        sums = stored.new_zeros(len(classes), stored.shape[1]).index_add_(0, places, stored[known])
        sums = gallery.ranks.sum(sums)

        itself = torch.isin(query.own.index, gallery.index) & task.exclude_self
        right = _is_nearest(
            unit_vectors(query.own.vectors, query.bits).double(), query.own.label, classes, counts, sums, itself
        )
        whole = torch.zeros(len(query), dtype=torch.float64)
        whole[query.position] = right
        measured = Measured.of({"class/accuracy": query.ranks.sum(whole)}, query_units(query, task))

        right = _is_nearest(stored, gallery.own.label, classes, counts, sums, torch.ones_like(known))
        of_all = gallery.ranks.sum(torch.stack([right.nansum(), (~right.isnan()).double().sum()]))
        share = {"class/gallery_accuracy": float(of_all[0] / of_all[1])}
        return replace(measured, metrics=measured.metrics | share)


def _is_nearest(
    vectors: Tensor, label: Tensor, classes: Tensor, counts: Tensor, sums: Tensor, itself: Tensor
) -> Tensor:
    """float64 (N,): 1 where the mean of a vector's own class is the nearest, 0 elsewhere, NaN where there is none.

    Args:
        vectors: float64 (N, D), normalised.
        label: int64 (N,), -1 is unknown.
        classes: int64 (K,), ascending.
        counts: int64 (K,), items of each class.
        sums: float64 (K, D), sums of the vectors of each class.
        itself: bool (N,), whether a vector is part of its class's sum and to be left out.
    """
    own = torch.searchsorted(classes, label).clamp(max=len(classes) - 1)
    there = classes[own] == label
    itself = itself & there
    means, right = torch.nn.functional.normalize(sums), vectors.new_empty(len(vectors))
    for rows in torch.arange(len(vectors)).split(_BLOCK):
        rest = sums[own[rows]] - vectors[rows] * itself[rows, None]
        others = (vectors[rows] @ means.T).scatter_(1, own[rows, None], -torch.inf).amax(1)
        right[rows] = ((vectors[rows] * torch.nn.functional.normalize(rest)).sum(1) > others).double()
    right[~there | (counts[own] == itself)] = torch.nan
    return right
