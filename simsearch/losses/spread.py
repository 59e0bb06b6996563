"""A loss that also spreads the descriptors of different classes over the sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpreadLoss(nn.Module):
    """A loss plus a weight times the differential entropy's estimate by nearest neighbours (KoLeo).

    The term is the mean over the batch of -log of the distance from each L2-normalised embedding to the nearest one of
    another class. It keeps descriptors of different pictures apart, also far from any boundary, so that one threshold
    serves all queries. Embeddings without one of another class are left out.

    Args:
        loss: A loss of embeddings and labels, such as NTXentLoss of pytorch-metric-learning (InfoNCE).
        weight: Weight of the term, 0 or more.

    Raises:
        ValueError: If the weight is negative.

    Source:
        Sablayrolles, Douze, Schmid, Jégou: Spreading vectors for similarity search. ICLR 2019, equation 2; by other
        classes alone as in Pizzi et al.: A Self-Supervised Descriptor for Image Copy Detection. CVPR 2022, section 4.1.

    Example:
        >>> loss = SpreadLoss(lambda embeddings, labels: embeddings.sum() * 0, weight=1.0)
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
        >>> loss(x, torch.tensor([0, 0, 1]))  # all are 2 away from the other class: -log(2)
        tensor(-0.6931)
    """

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"loss.weight={weight} must not be negative")
        self.loss, self.weight = loss, weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (B, D), of any length.
            labels: int64 (B,).
        """
        value = self.loss(embeddings, labels)
        unit = F.normalize(embeddings, dim=1)
        same = labels[:, None] == labels[None, :]
        has_other = ~same.all(1)
        if not has_other.any():
            return value
        with torch.no_grad():  # the nearest is a choice; gradients flow through its distance alone
            nearest = (unit @ unit.T).masked_fill(same, -2.0).argmax(1)
        distance = (unit - unit[nearest]).norm(dim=1)
        return value - self.weight * torch.log(distance + 1e-8)[has_other].mean()
