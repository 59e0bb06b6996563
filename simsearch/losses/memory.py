"""A memory of past embeddings for any pair-based loss (cross-batch memory, XBM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossBatchMemory(nn.Module):
    """A pair-based loss between a batch and the last `size` embeddings of training.

    The batch first enters the memory without gradient. Each of its rows is then paired with every row of the memory
    except its own copy (Algorithm 1). The batch gets gradients as anchors only.

    In evaluation mode the batch is compared with itself, and the memory stays as it is.

    With several processes, their embeddings must be gathered first (model.gather=true). Buffers are those of rank 0, so
    that its memory would otherwise be the only one.

    The memory, its fill and its counts are buffers. pytorch-metric-learning's CrossBatchMemory keeps the position in
    the queue and whether the queue is full as plain attributes, which are not in the state dict: a resumed run would
    forget the memory. It also has no `start` and fills in evaluation.

    Args:
        loss: A loss with the call of pytorch-metric-learning: loss(embeddings, labels, pairs, reference embeddings,
            reference labels).
        size: Number of rows in the memory, at least one batch.
        dimension: D, the width of the embeddings.
        start: Number of first training batches that are compared only with themselves and not remembered, while the
            embeddings still move fast.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Wang, Zhang, Huang, Scott: Cross-Batch Memory for Embedding Learning. CVPR 2020.

    Example:
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> loss = CrossBatchMemory(ContrastiveLoss(), size=4, dimension=2)
        >>> _ = loss(torch.eye(2), torch.tensor([0, 1]))
        >>> loss.memory_labels[: int(loss.stored)]
        tensor([0, 1])
    """

    needs_all_ranks = True  # the training asks for it
    memory: Tensor
    memory_labels: Tensor
    stored: Tensor
    step: Tensor

    def __init__(self, loss: nn.Module, size: int, dimension: int, start: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"loss.size={size}: the memory must hold at least one batch")
        if dimension is None or dimension < 1:
            raise ValueError(f"loss.dimension={dimension}: give the width of the network's output, 1 or more")
        if start < 0:
            raise ValueError(f"loss.start={start}: give a number of batches, 0 or more")
        self.loss, self.size, self.start = loss, size, start
        self.register_buffer("memory", torch.zeros(size, dimension))
        self.register_buffer("memory_labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("stored", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar. In training mode the batch enters the memory.

        Args:
            embeddings: Floating point (B, D).
            labels: int64 (B,).

        Raises:
            ValueError: If the batch is larger than the memory.
        """
        if len(embeddings) > self.size:
            raise ValueError(f"loss.size={self.size} is less than a batch of {len(embeddings)}: use a larger memory")
        if not self.training:
            return self.loss(embeddings, labels)
        self.step += 1
        if self.step <= self.start:
            return self.loss(embeddings, labels)
        rows = torch.arange(len(labels), device=labels.device)
        places = (self.stored + rows) % self.size
        self.memory[places] = embeddings.detach().to(self.memory.dtype)
        self.memory_labels[places] = labels
        self.stored += len(labels)
        filled = min(int(self.stored), self.size)
        known = self.memory_labels[:filled]
        same = labels[:, None] == known[None, :]
        other = ~same
        same[rows, places] = False
        pairs = (*torch.where(same), *torch.where(other))
        return self.loss(embeddings, labels, pairs, self.memory[:filled].to(embeddings.dtype), known)
