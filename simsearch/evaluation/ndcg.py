"""The evaluator of graded relevance in an art collection."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simsearch.data.collection import Collection
from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.evaluation.recommendation import K, nearest_lists
from simsearch.functional.ndcg import COLUMNS, count_levels, graded_relevance, ndcg_graded
from simsearch.functional.sharded import Sharded
from simsearch.types import RetrievalTask


@dataclass(frozen=True)
class GradedNDCG:
    """Evaluates the NDCG@10 with grades: 3 same work, 2 same artist, 1 same style and period, 0 otherwise.

    The junk of a task counts as any other item here.

    Attributes:
        collection: The collection, whose attributes decide the grades. One that it lacks is unknown for all items.
    """

    collection: Collection

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The metrics of a task.

        Args:
            query: The queries of the task, in one process.
            gallery: The gallery of the task, in one process.
            task: The task.
        """
        asked, searched = (replace(side.whole, group=None) for side in (query, gallery))
        columns = torch.stack([column_or_unknown(self.collection, name) for name in COLUMNS], dim=1)
        of_query, of_gallery = columns[asked.index], columns[searched.index]
        ids = nearest_lists(asked, searched, task)
        level = graded_relevance(of_query[:, None], of_gallery[ids.clamp(min=0)]).masked_fill(ids < 0, 0)
        counts = count_levels(of_query, of_gallery, exclude_self=task.exclude_self)
        return Measured.of({f"NDCG@{K}_graded": ndcg_graded(level, counts)}, query_units(query, task))


def column_or_unknown(collection: Collection, attribute: str) -> Tensor:
    """The labels int64 (N,) of an attribute, all unknown (-1) where the collection lacks it.

    Args:
        collection: The collection.
        attribute: Name of the attribute.
    """
    if attribute in collection.attributes:
        return collection.column(attribute)
    return torch.full((len(collection),), -1, dtype=torch.int64)
