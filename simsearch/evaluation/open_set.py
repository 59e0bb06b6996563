"""The evaluator of an open set: images whose work has no other image, and images from elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from simsearch.evaluation.evaluator import Measured, query_units
from simsearch.functional.codes import pack_codes
from simsearch.functional.open_set import global_average_precision, jackknifed_average_precision, stand_out
from simsearch.functional.ranking import find_junk
from simsearch.functional.reranking import nearest, unit_vectors
from simsearch.functional.sharded import Sharded
from simsearch.functional.significance import jackknife_difference
from simsearch.types import RetrievalTask

_BLOCK = 256  # queries whose backgrounds are found together


@dataclass(frozen=True)
class OpenSet:
    """Evaluates the GAP, the GAP- and the accuracy of the nearest item, as in the Met benchmark.

    All gallery images of an instance task are queries, each without itself. An image is a distractor where its label
    has no other image, or is not known. GAP- leaves the distractors out. Without any other image all of this is NaN.

    With `beta`, each of these GAPs is measured also with normalised scores, as `GAP_normalised` and so on: a query's
    score less `beta` times its background, the mean score of its nearest `neighbours` items of other works than the one
    that leads. A query that is like everything is trusted less. `GAP_gain` is what this adds to GAP, with its interval
    over the sampling units and the p-value `GAP_gain_p` (jackknife).

    Attributes:
        one_process: It needs all descriptors in one process.
        outside: Floating point (M, D), descriptors of images from elsewhere, which are distractors too, or None.
        beta: Share of the background that is subtracted, 0 or more. 0 measures without.
        neighbours: Number of items that a background averages over, 1 or more.

    Raises:
        ValueError: If `beta` is negative or not finite, or `neighbours` is below 1.

    Source:
        Ypsilantis et al.: The Met Dataset: Instance-level Recognition for Artworks. NeurIPS 2021. Normalised scores:
        Pizzi et al.: A Self-Supervised Descriptor for Image Copy Detection. CVPR 2022, whose background is a set of its
        own.
    """

    one_process: ClassVar[bool] = True

    outside: Tensor | None = None
    beta: float = 0.0
    neighbours: int = 10

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta must be a finite number of 0 or more, such as 0.5, got {self.beta}")
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")

    def __call__(self, query: Sharded, gallery: Sharded, task: RetrievalTask) -> Measured:
        """The metrics of the gallery of a task.

        Args:
            query: Not used.
            gallery: The gallery of the task, in one process.
            task: The task.
        """
        whole = replace(gallery.whole, group=None)
        bits, own = whole.bits, torch.arange(len(whole.label))
        label = torch.where(whole.label < 0, -1 - own, whole.label)  # an unknown label is one of its own
        junk = find_junk(whole, whole, exclude_self=True)
        unit = unit_vectors(whole.vectors, bits)
        found = nearest(unit, unit, 1, junk)
        correct = label[found.ids[:, 0]] == label
        sizes = label.unique(return_inverse=True, return_counts=True)
        has_match = sizes[2][sizes[1]] > 1
        confidence, right = found.scores[:, 0], correct & has_match
        outer = outer_unit = None
        if self.outside is not None:
            outer_unit = unit_vectors(self.outside if bits is None else pack_codes(self.outside), bits)
            outer = nearest(outer_unit, unit, 1).scores[:, 0]
        metrics = _gaps(confidence, right, has_match, outer)
        metrics["accuracy"] = float(right[has_match].double().mean())
        if outer is not None:
            metrics["outside"] = float(len(outer))
        units, intervals = query_units(gallery, task), {}
        if self.beta > 0 and not has_match.any():
            names = [f"{name}_normalised" for name in metrics if name.startswith("GAP")]
            metrics |= dict.fromkeys([*names, "GAP_gain", "GAP_gain_p"], math.nan)
        elif self.beta > 0:
            normal = confidence - self.beta * self._background(unit, unit, label, own)
            if outer is not None and outer_unit is not None:
                outer = outer - self.beta * self._background(outer_unit, unit, label, None)
            gaps = _gaps(normal, right, has_match, outer)
            metrics |= {f"{name}_normalised": value for name, value in gaps.items()}
            metrics["GAP_gain"] = gaps["GAP"] - metrics["GAP"]
            number = units.unique(return_inverse=True)[1]
            held = torch.zeros(int(number.max()) + 1, dtype=torch.int64).index_add_(0, number, has_match.long())
            one, other = (jackknifed_average_precision(c, right, number, held) for c in (normal, confidence))
            without = (one - other).nan_to_num(metrics["GAP_gain"])
            low, high, metrics["GAP_gain_p"] = jackknife_difference(metrics["GAP_gain"], without, held)
            intervals["GAP_gain"] = low, high
        return Measured(metrics, units, intervals)

    def _background(self, query: Tensor, gallery: Tensor, label: Tensor, own: Tensor | None) -> Tensor:
        """The background of each query (Q,), whose own place (Q,) in the gallery does not count."""
        depth = 1 + int(label.unique(return_counts=True)[1].max()) + self.neighbours
        backgrounds = []
        for rows in torch.arange(len(query)).split(_BLOCK):
            found = nearest(query[rows], gallery, depth)
            taken = torch.zeros_like(found.ids, dtype=torch.bool) if own is None else found.ids == own[rows][:, None]
            backgrounds.append(stand_out(found.scores, label[found.ids], taken, self.neighbours)[1].clamp(min=-1))
        return torch.cat(backgrounds)


def _gaps(confidence: Tensor, right: Tensor, has_match: Tensor, outside: Tensor | None) -> dict[str, float]:
    """GAP-, GAP and, with confidences (M,) of images from elsewhere, GAP_outside. NaN if no image has a match."""
    rankings = {"GAP-": (confidence[has_match], right[has_match]), "GAP": (confidence, right)}
    if outside is not None:
        none = torch.zeros(len(outside), dtype=torch.bool)
        rankings["GAP_outside"] = torch.cat([confidence, outside]), torch.cat([right, none])
    positives = int(has_match.sum())
    return {name: global_average_precision(*r, positives) if positives else math.nan for name, r in rankings.items()}
