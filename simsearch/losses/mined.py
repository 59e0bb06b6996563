"""A loss of pytorch-metric-learning over the pairs or triplets that one of its miners selects."""

from __future__ import annotations

from torch import Tensor, nn


class MinedLoss(nn.Module):
    """A loss over the pairs or triplets that a miner selects in each batch.

    Both objects must work on pairs or triplets of the batch. A miner does nothing for a classification loss.

    Args:
        loss: A loss with the call of pytorch-metric-learning: loss(embeddings, labels, tuples).
        miner: A miner with the call of pytorch-metric-learning: miner(embeddings, labels).

    Example:
        >>> import torch
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> from pytorch_metric_learning.miners import BatchHardMiner
        >>> loss = MinedLoss(TripletMarginLoss(margin=2.0), BatchHardMiner())
        >>> loss(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]))  # 2 + 0 - sqrt(2)
        tensor(0.5858)
    """

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (B, D).
            labels: int64 (B,).
        """
        return self.loss(embeddings, labels, self.miner(embeddings, labels))
