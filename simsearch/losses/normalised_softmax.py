"""Classification by cosine: a strong and simple objective for descriptors that are compared by cosine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.losses.classification import check_classifier, check_labels


class NormalisedSoftmaxLoss(nn.Module):
    """Mean cross-entropy of `scale` times the cosines of embeddings (B, D) and learnt class vectors, a scalar.

    labels: (B,) in 0..classes-1. classes: of the data, or more; those that never come cost little. scale: 1 / the
    temperature.

    Zhai and Wu 2019, "Classification is a Strong Baseline for Deep Metric Learning", without its layer norm.
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
        check_labels(labels, self.classes)
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(self.centres, dim=1).T
        return F.cross_entropy(self.scale * cosines, labels)
