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
        """
        stored = _unit(gallery.own)
        classes, counts = gallery.label[gallery.label >= 0].unique(return_counts=True)
        known = gallery.own.label >= 0
        places = torch.searchsorted(classes, gallery.own.label[known])
        sums = stored.new_zeros(len(classes), stored.shape[1]).index_add_(0, places, stored[known])
        of_classes = classes, counts, gallery.ranks.sum(sums)

        taken = find_junk(query, gallery, exclude_self=task.exclude_self)
        right = _is_nearest(query, gallery, *of_classes, taken)
        measured = Measured.of({"class/accuracy": right}, query_units(query, task))
        right = _is_nearest(gallery, gallery, *of_classes, find_junk(gallery, gallery, exclude_self=True))
        share = {"class/gallery_accuracy": float(right.nanmean())}
        return replace(measured, metrics=measured.metrics | share)


def _unit(items: Descriptors) -> Tensor:
    return unit_vectors(items.vectors, items.bits).double()


def _is_nearest(asked: Sharded, gallery: Sharded, classes: Tensor, counts: Tensor, sums: Tensor, junk: Junk) -> Tensor:
    """float64 (N,): 1 where the mean of an item's own class is the nearest, 0 elsewhere, NaN where there is none.

    Each rank has the scores of its own items. What is taken out of the means for a block of items is summed over ranks.

    Args:
        asked: N items.
        gallery: G items, part of the sums where their labels are known.
        classes: int64 (K,), ascending.
        counts: int64 (K,), items of each class.
        sums: float64 (K, D), sums of the vectors of each class.
        junk: Pairs of an item and of a gallery item that is left out of the means for it.
    """
    vectors, stored, means = _unit(asked.own), _unit(gallery.own), torch.nn.functional.normalize(sums)
    own, of_item = (torch.searchsorted(classes, side.label).clamp(max=len(classes) - 1) for side in (asked, gallery))
    place_here = torch.full((len(gallery),), -1)  # of each gallery item, -1 where another rank has it
    place_here[gallery.position] = torch.arange(len(stored))
    right = vectors.new_zeros(len(asked))
    for start in range(0, len(asked), _BLOCK):
        stop = start + _BLOCK
        here = (asked.position >= start) & (asked.position < stop)
        rows, some = asked.position[here], vectors[here]
        scores = some @ means.T

        row, item = junk.block(start, stop)
        counted = gallery.label[item] >= 0
        row, item = row[counted], item[counted]
        cell, place, gone = (row * len(classes) + of_item[item]).unique(return_inverse=True, return_counts=True)
        held = place_here[item] >= 0
        pairs = torch.stack([place[held], place_here[item[held]]])
        ones, shape = vectors.new_ones(pairs.shape[1]), (len(cell), len(stored))
        picked = torch.sparse_coo_tensor(pairs, ones, shape, check_invariants=False) @ stored
        row, kind = start + cell // len(classes), cell % len(classes)
        rest = torch.nn.functional.normalize(sums[kind] - gallery.ranks.sum(picked))
        mine = torch.isin(row, rows)
        line, kind, gone = torch.searchsorted(rows, row[mine]), kind[mine], gone[mine]
        scores[line, kind] = (some[line] * rest[mine]).sum(1).masked_fill(counts[kind] == gone, -torch.inf)

        best = scores.gather(1, own[rows, None])[:, 0]
        others = scores.scatter(1, own[rows, None], -torch.inf).amax(1)
        right[rows] = (best > others).double().masked_fill(best == -torch.inf, torch.nan)
    right = asked.ranks.sum(right)
    right[classes[own] != asked.label] = torch.nan
    return right
