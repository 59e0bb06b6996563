"""Accuracy of the nearest class, for tasks whose labels are classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.functional.ranking import Junk, find_junk
from simsearch.functional.reranking import unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.types import Descriptors, RetrievalTask

_BLOCK = 2**12  # vectors that are compared with all means together


class ClassMeans:
    """`class/accuracy`: the share of queries whose own class has the nearest mean in the gallery, by cosine.

    It needs no classifier, so it compares objectives that have none. Codes are vectors of +1 and -1. What a task takes
    out of a query's ranking, junk and the query itself, is taken out of the means for it too. A query without another
    item of its class has no value. `class/gallery_accuracy` is the same of the gallery's items, each without itself and
    its junk in the means.

    Where the gallery was trained on and has few errors, mAP is at least about the first number: all of the class stands
    first for a query that is right. Errors of the gallery take from it.
    """

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The accuracies of a task. Where several ranks measure, every rank must call.

        Args:
            query: The queries of the task.
            gallery: The gallery of the task.
            task: The task.

        Raises:
            ValueError: If the task has junk and several ranks measure.
        """
        taken = _taken(query, gallery, exclude_self=task.exclude_self)
        stored = _unit(gallery.own)
        classes, counts = gallery.label[gallery.label >= 0].unique(return_counts=True)
        known = gallery.own.label >= 0
        places = torch.searchsorted(classes, gallery.own.label[known])
        sums = stored.new_zeros(len(classes), stored.shape[1]).index_add_(0, places, stored[known])
        sums = gallery.ranks.sum(sums)

        right = _is_nearest(query.own, classes, counts, sums, *taken)
        whole = torch.zeros(len(query), dtype=torch.float64)
        whole[query.position] = right
        measured = Measured.of({"class/accuracy": query.ranks.sum(whole)}, query_units(query, task))

        right = _is_nearest(gallery.own, classes, counts, sums, *_taken(gallery, gallery, exclude_self=True))
        of_all = gallery.ranks.sum(torch.stack([right.nansum(), (~right.isnan()).double().sum()]))
        share = {"class/gallery_accuracy": float(of_all[0] / of_all[1])}
        return replace(measured, metrics=measured.metrics | share)


def _taken(side: Sharded, gallery: Sharded, *, exclude_self: bool) -> tuple[Junk, Descriptors]:
    """The pairs of an item of this rank and of what its means are without, and what these pairs count among."""
    if gallery.group is not None:
        return find_junk(side, gallery.whole, exclude_self=exclude_self), gallery.whole
    own = (torch.isin(side.own.index, gallery.index) & exclude_self).nonzero()[:, 0]
    return Junk(own, own), side.own


def _unit(items: Descriptors) -> Tensor:
    return unit_vectors(items.vectors, items.bits).double()


def _is_nearest(
    asked: Descriptors, classes: Tensor, counts: Tensor, sums: Tensor, junk: Junk, items: Descriptors
) -> Tensor:
    """float64 (N,): 1 where the mean of an item's own class is the nearest, 0 elsewhere, NaN where there is none.

    Args:
        asked: N items.
        classes: int64 (K,), ascending.
        counts: int64 (K,), items of each class.
        sums: float64 (K, D), sums of the vectors of each class.
        junk: Pairs of an item and of one of `items` that is left out of the means for it.
        items: M items, part of the sums where their labels are known.
    """
    vectors, taken = _unit(asked), _unit(items)
    own = torch.searchsorted(classes, asked.label).clamp(max=len(classes) - 1)
    of_item = torch.searchsorted(classes, items.label).clamp(max=len(classes) - 1)
    counted = classes[of_item] == items.label
    means, right = torch.nn.functional.normalize(sums), vectors.new_empty(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        rows = slice(start, start + _BLOCK)
        scores = vectors[rows] @ means.T
        row, item = junk.block(start, start + _BLOCK)
        row, item = row[counted[item]], item[counted[item]]
        cell, place, gone = (row * len(classes) + of_item[item]).unique(return_inverse=True, return_counts=True)
        ones, shape = vectors.new_ones(len(item)), (len(cell), len(taken))
        picked = torch.sparse_coo_tensor(torch.stack([place, item]), ones, shape, check_invariants=False)
        row, kind = cell // len(classes), cell % len(classes)
        rest = torch.nn.functional.normalize(sums[kind] - picked @ taken)
        score = (vectors[rows][row] * rest).sum(1)
        scores[row, kind] = score.masked_fill(counts[kind] == gone, -torch.inf)
        best = scores.gather(1, own[rows, None])[:, 0]
        others = scores.scatter(1, own[rows, None], -torch.inf).amax(1)
        right[rows] = (best > others).double().masked_fill(best == -torch.inf, torch.nan)
    right[classes[own] != asked.label] = torch.nan
    return right
