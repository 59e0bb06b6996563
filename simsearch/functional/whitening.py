"""Principal components and whitening, fitted from moments that can be summed over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simsearch.functional.ranks import sum_over_ranks


@dataclass
class Moments:
    """Running sums over vectors: count, sum float64 (D,) and sum of outer products float64 (D, D)."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def zeros(cls, dimension: int) -> Moments:
        """Moments of no vectors."""
        return cls(
            0,
            torch.zeros(dimension, dtype=torch.float64),
            torch.zeros(dimension, dimension, dtype=torch.float64),
        )

    def add(self, vectors: Tensor) -> None:
        """Adds the vectors (N, D). Raises ValueError for another shape."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self.total):
            raise ValueError(f"vectors must be (N, {len(self.total)}), got {tuple(vectors.shape)}")
        wide = vectors.detach().to("cpu", torch.float64)
        self.count += len(wide)
        self.total += wide.sum(0)
        self.outer += wide.T @ wide

    def reduce(self, device: torch.device) -> None:
        """Adds the vectors of all other ranks; `device` is that of the collectives. Every rank must call."""
        count = torch.tensor([self.count], dtype=torch.int64)
        self.count = int(sum_over_ranks(count, device))
        self.total = sum_over_ranks(self.total, device)
        self.outer = sum_over_ranks(self.outer, device)

    def principal(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (D,), eigenvalues (D,) of the covariance in descending order, eigenvectors (D, D) by row.

        Each eigenvector's largest entry is positive, so that a fit has one result. Raises
        ValueError for fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, got {self.count}")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        values, vectors = torch.linalg.eigh(covariance)
        values, rows = values.flip(0).clamp(min=0), vectors.flip(1).T
        peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        return mean, values, rows * peak.sign()


def whitening_matrix(
    eigenvalues: Tensor, eigenvectors: Tensor, dimension: int, *, power: float, shrinkage: float = 0.0
) -> Tensor:
    """Projection (dimension, D) on the leading components, each divided by eigenvalue^(power / 2).

    power 0 is a rotation (PCA), 1 full whitening, 1/2 in between. `shrinkage` s in [0, 1] first
    moves the covariance towards its mean eigenvalue: (1 - s) l + s mean(l). Eigenvalues below
    1e-9 of the largest are not amplified beyond that.

    Raises ValueError for a dimension, power or shrinkage out of range, and where no eigenvalue is
    positive.
    """
    d = len(eigenvalues)
    if not 1 <= dimension <= d:
        raise ValueError(f"whitening dimension must lie in 1..{d} (the descriptor's width), got {dimension}")
    if not 0 <= power <= 1:
        raise ValueError(f"whitening power must lie in [0, 1], got {power}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
    if power > 0 and not eigenvalues.max() > 0:
        raise ValueError("all vectors are equal: there is no variance to whiten")
    shrunk = (1 - shrinkage) * eigenvalues + shrinkage * eigenvalues.mean()
    shrunk = shrunk.clamp(min=float(shrunk.max()) * 1e-9)
    return eigenvectors[:dimension] * shrunk[:dimension, None] ** (-power / 2)
