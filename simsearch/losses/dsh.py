"""The pairwise loss of Deep Supervised Hashing (DSH)."""

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
    """The contrastive loss over all pairs of a batch of codes, with a penalty that pulls their values towards +1 or -1.

    Let d be the Euclidean distance of two codes and m the margin. A pair of one class costs d^2 / 2. A pair of two
    classes costs max(m - d^2, 0) / 2. Each code of a pair costs `weight` * sum |abs(b) - 1| in addition.

    The sum over the pairs i < j is divided by B (B - 1), as in the authors' release. The gradient is that of the
    release; the value that the release prints lacks the factors 1/2.

    Args:
        margin: m, above 0. None gives 2 b, twice the number of bits.
        weight: Weight of the penalty, 0 or more; alpha in the paper.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Liu, Wang, Shan, Chen: Deep Supervised Hashing for Fast Image Retrieval. CVPR 2016, eq. 4.

    Example:
        >>> codes = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # d^2 is 4
        >>> DSHLoss()(codes, torch.tensor([0, 0]))
        tensor(1.)
        >>> DSHLoss()(codes, torch.tensor([0, 1]))  # as far apart as the margin asks
        tensor(0.)
    """

    def __init__(self, margin: float | None = None, weight: float = 0.01) -> None:
        super().__init__()
        if margin is not None and margin <= 0:
            raise ValueError(f"loss.margin={margin} must be positive, or null for twice the code's bits")
        if weight < 0:
            raise ValueError(f"loss.weight={weight} must not be negative")
        self.margin, self.weight = margin, weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar. A batch of one image costs 0.

        Args:
            embeddings: Floating point (B, b), real-valued codes.
            labels: int64 (B,).
        """
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
