"""Diversity: answers whose items differ from each other."""

from __future__ import annotations

import torch
from torch import Tensor


def mmr(relevance: Tensor, vectors: Tensor, k: int, lambda_: float, before: Tensor | None = None) -> Tensor:
    """The positions of a shortlist in the order of maximal marginal relevance (MMR), int64 (min(k, S),).

    The first item is the most relevant, unless there are items before it. Each next item has the largest lambda_ *
    relevance - (1 - lambda_) * (its largest inner product with an item chosen before). The first of several equal items
    is taken.

    Args:
        relevance: Floating point (S,).
        vectors: Floating point (S, D). Their inner products are on the scale of `relevance`.
        k: Number of items, 1 or more.
        lambda_: Weight of the relevance in [0, 1]. With 1 the order is that of the relevance alone.
        before: Floating point (C, D), items that were chosen before all of these. None for none.

    Raises:
        ValueError: If `lambda_` lies outside [0, 1], or if `k` is below 1.

    Source:
        Carbonell, Goldstein: The use of MMR, diversity-based reranking for reordering documents and producing
        summaries. SIGIR 1998.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the first two items are equal
        >>> mmr(torch.tensor([1.0, 0.9, 0.5]), vectors, k=2, lambda_=0.5)
        tensor([0, 2])
    """
    if not 0 <= lambda_ <= 1:
        raise ValueError(f"lambda_ must lie in [0, 1] (1: relevance alone), got {lambda_}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    chosen: list[int] = []
    gain = relevance.clone()
    nearest = torch.full_like(relevance, -torch.inf)
    # Not matrix products, whose rounding of a row depends on its place: equal items must tie.
    for other in () if before is None else before:
        nearest = torch.maximum(nearest, (vectors * other).sum(1))
    if before is not None and len(before):
        gain = lambda_ * relevance - (1 - lambda_) * nearest
    for _ in range(min(k, len(relevance))):
        best = int(gain.argmax())
        chosen.append(best)
        nearest = torch.maximum(nearest, (vectors * vectors[best]).sum(1))
        gain = lambda_ * relevance - (1 - lambda_) * nearest
        gain[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64)
