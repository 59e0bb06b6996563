"""The loss of GreedyHash: classification of signs, with the gradient passed straight through."""

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
    """Cross-entropy of sign(u) plus `weight` * mean |u - sign(u)|^3, a scalar, from codes u (B, b) and labels (B,).

    A learnt linear classifier without bias reads the signs; sign's gradient is taken as 1. Labels lie in
    0..classes-1. weight: the paper's alpha.

    Su, Zhang, Han, Tian 2018, "Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN".
    """

    def __init__(self, bits: int, classes: int, weight: float = 0.1) -> None:
        super().__init__()
        check_classifier("bits", bits, classes)
        if weight < 0:
            raise ValueError(f"loss.weight={weight} must not be negative")
        self.classes, self.weight = classes, weight
        self.classifier = nn.Linear(bits, classes, bias=False)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        check_labels(labels, self.classes)
        signs = _Sign.apply(embeddings)
        gap = (embeddings - signs.detach()).abs().pow(3).mean()
        return F.cross_entropy(self.classifier(signs), labels) + self.weight * gap
