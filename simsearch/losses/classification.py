"""Cross-entropy of a linear classifier: the baseline of every learned code, and DIR's first stage."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def check_classifier(width_name: str, width: int | None, classes: int) -> None:
    """Raises ValueError for a width below 1 or fewer than 2 classes."""
    if width is None or width < 1:
        raise ValueError(f"loss.{width_name}={width}: give the width of the network's output, 1 or more")
    if classes < 2:
        raise ValueError(f"loss.classes={classes}: a classifier needs 2 classes or more")


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises ValueError for labels outside 0..classes-1, which on a GPU would end the process otherwise."""
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels lie in {low}..{high}, outside the classifier's 0..{classes - 1}: set loss.classes to one more "
            "than the largest label, and train on labelled rows only"
        )


class ClassificationLoss(nn.Module):
    """The mean cross-entropy of a learnt linear classifier, a scalar, from embeddings (B, D) and labels (B,) in 0..C-1.

    Embeddings are taken as they are, without sign or norm. smoothing: share of the target spread evenly
    over all classes, in [0, 1).

    With codes it is the baseline in the spirit of Sablayrolles, Douze, Usunier, Jégou 2016, "How should we
    evaluate supervised hashing?", here by the signs of what the classifier reads (theirs encode its output).
    Gordo et al. 2016 train by it before they train by triplets.
    """

    def __init__(self, dimension: int, classes: int, smoothing: float = 0.0) -> None:
        super().__init__()
        check_classifier("dimension", dimension, classes)
        if not 0 <= smoothing < 1:
            raise ValueError(f"loss.smoothing={smoothing} must lie in [0, 1): 0 for none")
        self.classes, self.smoothing = classes, smoothing
        self.classifier = nn.Linear(dimension, classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        check_labels(labels, self.classes)
        return F.cross_entropy(self.classifier(embeddings), labels, label_smoothing=self.smoothing)
