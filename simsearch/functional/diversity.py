"""Answers whose items differ from each other."""

from __future__ import annotations

import torch
from torch import Tensor


def mmr(relevance: Tensor, vectors: Tensor, k: int, lambda_: float) -> Tensor:
    """Positions int64 (min(k, S),) of a shortlist in the order of maximal marginal relevance.

    The first is the most relevant; each next one has the largest lambda_ * relevance - (1 - lambda_) * (its largest
    inner product with those chosen), the first of several. Carbonell, Goldstein: The use of MMR, diversity-based
    reranking for reordering documents and producing summaries, SIGIR 1998.

    relevance: float (S,); vectors: float (S, D), whose inner products are on the same scale. lambda_: 1 is the order
    of relevance alone.

    Raises ValueError for lambda_ outside [0, 1] or k < 1.
    """
    if not 0 <= lambda_ <= 1:
        raise ValueError(f"lambda_ must lie in [0, 1] (1: relevance alone), got {lambda_}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    chosen: list[int] = []
    gain = relevance.clone()
    nearest = torch.full_like(relevance, -torch.inf)
    for _ in range(min(k, len(relevance))):
        best = int(gain.argmax())
        chosen.append(best)
        # Not a matrix product, whose rounding of a row depends on its place: equal items must tie.
        nearest = torch.maximum(nearest, (vectors * vectors[best]).sum(1))
        gain = lambda_ * relevance - (1 - lambda_) * nearest
        gain[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.int64)
