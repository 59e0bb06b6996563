"""Cross-entropy of a linear classifier: the baseline of every learned code, and the first stage of DIR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def check_classifier(width_name: str, width: int | None, classes: int) -> None:
    """Checks the sizes of a linear classifier.

    Args:
        width_name: The name of the width in the config, for the message.
        width: Width of the network's output.
        classes: Number of classes.

    Raises:
        ValueError: If `width` is None or below 1, or if `classes` is below 2.
    """
    if width is None or width < 1:
        raise ValueError(f"loss.{width_name}={width}: give the width of the network's output, 1 or more")
    if classes < 2:
        raise ValueError(f"loss.classes={classes}: a classifier needs 2 classes or more")


def check_labels(labels: Tensor, classes: int) -> None:
    """Checks that all labels name a class. On a GPU a wrong label would otherwise end the process.

    Args:
        labels: int64 (B,).
        classes: Number of classes.

    Raises:
        ValueError: If a label lies outside 0..classes-1.
    """
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels lie in {low}..{high}, outside the classifier's 0..{classes - 1}: set loss.classes to one more "
            "than the largest label, and train on labelled rows only"
        )


class ClassificationLoss(nn.Module):
    """The mean cross-entropy of a learned linear classifier.

    The classifier reads the embeddings as they are, without sign or normalisation. Gordo et al. (2016) train with this
    loss before they train with triplets.

    For binary codes this is the baseline in the spirit of Sablayrolles et al. Their codes encode the classifier's
    output; ours are the signs of its input.

    Args:
        dimension: D, the width of the embeddings.
        classes: Number of classes.
        smoothing: Share of the target that is spread evenly over all classes, in [0, 1).

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Sablayrolles, Douze, Usunier, Jégou: How should we evaluate supervised hashing? 2016.

    Example:
        >>> loss = ClassificationLoss(dimension=2, classes=2)
        >>> for parameter in loss.parameters():
        ...     _ = nn.init.zeros_(parameter)
        >>> import torch
        >>> round(loss(torch.eye(2), torch.tensor([0, 1])).item(), 4)  # both classes are equally likely: log 2
        0.6931
    """

    def __init__(self, dimension: int, classes: int, smoothing: float = 0.0) -> None:
        super().__init__()
        check_classifier("dimension", dimension, classes)
        if not 0 <= smoothing < 1:
            raise ValueError(f"loss.smoothing={smoothing} must lie in [0, 1): 0 for none")
        self.classes, self.smoothing = classes, smoothing
        self.classifier = nn.Linear(dimension, classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (B, D).
            labels: int64 (B,), in 0..classes-1.

        Raises:
            ValueError: If a label is out of range.
        """
        check_labels(labels, self.classes)
        return F.cross_entropy(self.classifier(embeddings), labels, label_smoothing=self.smoothing)
