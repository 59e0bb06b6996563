"""The loss of GreedyHash: signs are classified, and the gradient passes straight through the sign."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from simsearch.losses.classification import check_classifier, check_labels


class _Sign(torch.autograd.Function):
    """+1 where x > 0, else -1, as codes are packed; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


class GreedyHashLoss(nn.Module):
    """Cross-entropy of the signs of real-valued codes u, plus `weight` * mean |u - sign(u)|^3.

    A learned linear classifier without bias reads the signs. The gradient of the sign is taken as 1.

    Args:
        bits: b, the width of the codes.
        classes: Number of classes.
        weight: Weight of the second term, 0 or more; alpha in the paper.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Su, Zhang, Han, Tian: Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN. NeurIPS 2018.

    Example:
        >>> loss = GreedyHashLoss(bits=2, classes=2)
        >>> _ = nn.init.zeros_(loss.classifier.weight)
        >>> round(loss(torch.tensor([[1.0, -1.0]]), torch.tensor([0])).item(), 4)  # log 2: the values are signs already
        0.6931
    """

    def __init__(self, bits: int, classes: int, weight: float = 0.1) -> None:
        super().__init__()
        check_classifier("bits", bits, classes)
        if weight < 0:
            raise ValueError(f"loss.weight={weight} must not be negative")
        self.classes, self.weight = classes, weight
        self.classifier = nn.Linear(bits, classes, bias=False)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (B, b), real-valued codes.
            labels: int64 (B,), in 0..classes-1.

        Raises:
            ValueError: If a label is out of range.
        """
        check_labels(labels, self.classes)
        signs = _Sign.apply(embeddings)
        gap = (embeddings - signs.detach()).abs().pow(3).mean()
        return F.cross_entropy(self.classifier(signs), labels) + self.weight * gap
