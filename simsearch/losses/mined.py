"""A loss of pytorch-metric-learning over what one of its miners finds."""

from __future__ import annotations

from torch import Tensor, nn


class MinedLoss(nn.Module):
    """`loss` of the pairs or triplets that `miner` chooses in a batch, a scalar, from (B, D) and labels (B,).

    loss, miner: called as pytorch-metric-learning's are, loss(embeddings, labels, tuples) and miner(embeddings,
    labels). Both must look at pairs or triplets of the batch; a loss by class has no use for a miner.
    """

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss of embeddings (B, D) with labels int64 (B,)."""
        return self.loss(embeddings, labels, self.miner(embeddings, labels))
