"""The evaluator of an open set: images whose work has no other image, and images from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.functional.codes import pack_codes
from simsearch.functional.open_set import global_average_precision
from simsearch.functional.ranking import find_junk
from simsearch.functional.reranking import nearest, unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.types import RetrievalTask


@dataclass(frozen=True)
class OpenSet:
    """Evaluates the GAP, the GAP- and the accuracy of the nearest item, as in the Met benchmark.

    All gallery images of an instance task are queries, each without itself. An image is a distractor where its label
    has no other image. GAP- leaves the distractors out.

    Attributes:
        outside: Floating point (M, D), descriptors of images from elsewhere, which are distractors too, or None.

    Source:
        Ypsilantis et al.: The Met Dataset: Instance-level Recognition for Artworks. NeurIPS 2021.
    """

    outside: Tensor | None = None

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The metrics of the gallery of a task.

        Args:
            query: Not used.
            gallery: The gallery of the task, in one process.
            task: The task.
        """
        whole = replace(gallery.whole, group=None)
        label, bits = whole.label, whole.bits
        junk = find_junk(whole, whole, exclude_self=True)
        unit = unit_vectors(whole.vectors, bits)
        found = nearest(unit, unit, 1, junk)
        correct = label[found.ids[:, 0]] == label
        sizes = label.unique(return_inverse=True, return_counts=True)
        has_match = sizes[2][sizes[1]] > 1
        confidence, right, positives = found.scores[:, 0], correct & has_match, int(has_match.sum())
        metrics = {
            "GAP-": global_average_precision(confidence[has_match], right[has_match], positives),
            "GAP": global_average_precision(confidence, right, positives),
            "accuracy": float(right[has_match].double().mean()),
        }
        if self.outside is not None:
            other = nearest(unit_vectors(self.outside if bits is None else pack_codes(self.outside), bits), unit, 1)
            everything = torch.cat([confidence, other.scores[:, 0]])
            none = torch.zeros(len(other.ids), dtype=torch.bool)
            metrics["GAP_outside"] = global_average_precision(everything, torch.cat([right, none]), positives)
            metrics["outside"] = float(len(none))
        return Measured(metrics, query_units(gallery, task))
