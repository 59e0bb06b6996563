"""Classification by cosine: a strong and simple objective for descriptors that are compared by cosine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.losses.classification import check_classifier, check_labels


class NormalisedSoftmaxLoss(nn.Module):
    """The mean cross-entropy of `scale` times the cosines between embeddings and learned class vectors.

    Args:
        dimension: D, the width of the embeddings.
        classes: Number of classes of the data, or more. Classes without images cost little.
        scale: Factor of the cosines, above 0; the inverse of the temperature.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Zhai, Wu: Classification is a Strong Baseline for Deep Metric Learning. BMVC 2019. Its layer normalisation is
        left out.

    Example:
        >>> loss = NormalisedSoftmaxLoss(dimension=2, classes=2, scale=1.0)
        >>> loss.centres.data = torch.eye(2)
        >>> round(loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0])).item(), 4)  # log(1 + exp(-1)): only angles count
        0.3133
    """

    def __init__(self, dimension: int, classes: int, scale: float = 20.0) -> None:
        super().__init__()
        check_classifier("dimension", dimension, classes)
        if scale <= 0:
            raise ValueError(f"loss.scale={scale} must be positive")
        self.classes, self.scale = classes, scale
        # Only directions count: short vectors turn fast, so that random ones don't pull the embeddings to them first.
        self.centres = nn.Parameter(0.1 * torch.randn(classes, dimension) / dimension**0.5)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (B, D), of any length.
            labels: int64 (B,), in 0..classes-1.

        Raises:
            ValueError: If a label is out of range.
        """
        check_labels(labels, self.classes)
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(self.centres, dim=1).T
        return F.cross_entropy(self.scale * cosines, labels)
