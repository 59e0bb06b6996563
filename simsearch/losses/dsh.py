"""The pairwise loss of Deep Supervised Hashing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx


class _Quantisation(torch.autograd.Function):
    """||b| - 1|, entry by entry, with the release's sub-gradient: +1 where b >= 1 or -1 <= b <= 0, else -1."""

    @staticmethod
    def forward(ctx: FunctionCtx, b: Tensor) -> Tensor:
        ctx.save_for_backward(b)
        return (b.abs() - 1).abs()

    @staticmethod
    def backward(ctx: BackwardCFunction, gradient: Tensor) -> Tensor:
        (b,) = ctx.saved_tensors
        up = (b >= 1) | ((b >= -1) & (b <= 0))
        return torch.where(up, gradient, -gradient)


class DSHLoss(nn.Module):
    """The loss over all pairs i < j of a batch, a scalar, from real-valued codes (B, b) and labels (B,).

    With D the Euclidean distance of two codes and m the margin, a pair of one class costs D^2 / 2, a
    pair of two classes max(m - D^2, 0) / 2; each code costs `weight` * sum |abs(b) - 1| a pair. The sum
    is divided by B (B - 1), as in the authors' release, whose gradient this has (the value it prints
    lacks the halves). margin: 2 b where None. weight: the paper's alpha.

    Liu, Wang, Shan, Chen 2016, "Deep Supervised Hashing for Fast Image Retrieval", eq. 4.
    """

    def __init__(self, margin: float | None = None, weight: float = 0.01) -> None:
        super().__init__()
        if margin is not None and margin <= 0:
            raise ValueError(f"loss.margin={margin} must be positive, or null for twice the code's bits")
        if weight < 0:
            raise ValueError(f"loss.weight={weight} must not be negative")
        self.margin, self.weight = margin, weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        count, bits = embeddings.shape
        if count < 2:
            return 0.0 * embeddings.sum()  # no pair
        margin = 2.0 * bits if self.margin is None else self.margin
        square = embeddings.square().sum(1)
        distance = square[:, None] + square[None, :] - 2 * embeddings @ embeddings.T
        same = labels[:, None] == labels[None, :]
        # Each pair stands twice in the matrix, which takes the place of the other half; the diagonal adds nothing.
        pairs = torch.where(same, distance, (margin - distance).clamp(min=0)).fill_diagonal_(0)
        pull_and_push = 0.25 * pairs.sum() / (count * (count - 1))
        return pull_and_push + self.weight / count * _Quantisation.apply(embeddings).sum()
