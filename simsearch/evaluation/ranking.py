"""The evaluator of full rankings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.functional.ranking import measure_ranking
from simsearch.functional.sharded import Sharded
from simsearch.types import RetrievalTask


@dataclass(frozen=True)
class FullRanking:
    """Evaluates the mAP, P@k, R@k and the other metrics of full rankings (see `measure_ranking`).

    Attributes:
        ks: Cutoffs k, 1 or more.
    """

    ks: Sequence[int] = (1, 10, 100)

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The metrics of a task.

        Args:
            query: The queries of the task.
            gallery: The gallery of the task.
            task: The task.
        """
        per_query = measure_ranking(query, gallery, ks=self.ks, exclude_self=task.exclude_self)
        del per_query["relevant"]
        return Measured.of(per_query, query_units(query, task))
