"""A memory of past embeddings for any pair-based loss (XBM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossBatchMemory(nn.Module):
    """`loss` of a batch against the last `size` embeddings of training, a scalar, from (B, D) and labels (B,).

    The batch enters the memory first, without gradient, then each row is paired with all that the memory
    holds but its own copy (Algorithm 1): gradients reach the batch as anchors only. loss: called the
    pytorch-metric-learning way, loss(embeddings, labels, pairs, reference embeddings, reference labels).
    size: rows of the memory, at least a batch. dimension: D. start: so many first training batches are
    held against themselves alone and not remembered, while embeddings still move fast. Outside of
    training the batch is held against itself and the memory stays as it is. On several ranks gather their
    embeddings (model.gather=true): buffers are those of rank 0, whose memory would be the only one.

    Memory, fill and counts are buffers. The library's own CrossBatchMemory keeps its place in the queue
    and whether it is full as plain attributes, which no state dict holds, so that a resumed run would
    forget all that it remembers; it has no start, and fills in evaluation too.

    Wang, Zhang, Huang, Scott 2020, "Cross-Batch Memory for Embedding Learning".
    """

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
