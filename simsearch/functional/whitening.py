"""Principal components and whitening, fitted from moments that can be summed over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simsearch.functional.collectives import sum_over_ranks
from simsearch.functional.sharded import Ranks
from simsearch.types import check_vectors


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
        """Adds the vectors (N, D). Raises ValueError for another shape, and as `check_vectors` does."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self.total):
            raise ValueError(f"vectors must be (N, {len(self.total)}), got {tuple(vectors.shape)}")
        check_vectors("vectors to whiten", vectors)
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


@dataclass
class ClassMoments(Moments):
    """Moments that also keep the number int64 (L,) and the sum float64 (L, D) of the vectors of each class."""

    sizes: Tensor
    sums: Tensor

    @classmethod
    def zeros(cls, dimension: int) -> ClassMoments:
        """Moments of no vectors and no classes."""
        none = Moments.zeros(dimension)
        empty = torch.zeros(0, dimension, dtype=torch.float64)
        return cls(none.count, none.total, none.outer, torch.zeros(0, dtype=torch.int64), empty)

    def add_labelled(self, vectors: Tensor, labels: Tensor) -> None:
        """Adds the vectors (N, D) of classes int64 (N,) >= 0; those of an unknown class, -1, are left out."""
        known = labels.cpu() >= 0
        labels, wide = labels.cpu()[known], vectors.detach().to("cpu", torch.float64)[known]
        self.add(wide)
        if len(labels):
            self._make_room(int(labels.max()) + 1)
            self.sizes.index_add_(0, labels, torch.ones_like(labels))
            self.sums.index_add_(0, labels, wide)

    def reduce(self, device: torch.device) -> None:
        """Adds the vectors of all other ranks; `device` is that of the collectives. Every rank must call."""
        super().reduce(device)
        self._make_room(int(Ranks.here(device).largest(torch.tensor(len(self.sizes)))))
        self.sizes = sum_over_ranks(self.sizes, device)
        self.sums = sum_over_ranks(self.sums, device)

    def within(self) -> Tensor:
        """The covariance within classes, pooled over them, float64 (D, D).

        Raises ValueError where no class has two vectors.
        """
        present = self.sizes > 0
        freedom = self.count - int(present.sum())
        if freedom < 1:
            raise ValueError("whitening by classes needs a class with 2 training images: use whitening without labels")
        scaled = self.sums[present] / self.sizes[present, None].double().sqrt()
        return (self.outer - scaled.T @ scaled) / freedom

    def _make_room(self, classes: int) -> None:
        more = classes - len(self.sizes)
        if more > 0:
            self.sizes = torch.cat([self.sizes, self.sizes.new_zeros(more)])
            self.sums = torch.cat([self.sums, self.sums.new_zeros(more, self.sums.shape[1])])


def discriminative_projection(moments: ClassMoments, dimension: int, *, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Mean (D,) and projection (dimension, D) that whiten what differs within classes, then keep what varies most.

    Learned whitening (Mikolajczyk and Matas 2007; Radenović, Tolias, Chum 2018, section 3.4): with W the
    covariance within classes, in their case of matching pairs, the rows are the leading eigenvectors of the
    whole covariance in the space W^(-1/2). shrinkage s in [0, 1] first moves W towards its mean eigenvalue,
    which many dimensions and few images need.

    Raises ValueError for a dimension or shrinkage out of range, and where nothing differs within classes.
    """
    d = len(moments.total)
    if not 1 <= dimension <= d:
        raise ValueError(f"whitening dimension must lie in 1..{d} (the descriptor's width), got {dimension}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
    within = moments.within()
    scale = float(within.trace()) / d
    if not scale > 0:
        raise ValueError("the images of each class are equal: there is no variance to whiten")
    values, vectors = torch.linalg.eigh((1 - shrinkage) * within)
    values = (values.clamp(min=0) + shrinkage * scale).clamp(min=1e-9 * scale)
    inverse_root = (vectors / values.sqrt()) @ vectors.T
    mean = moments.total / moments.count
    whole = moments.outer / moments.count - torch.outer(mean, mean)
    leading = torch.linalg.eigh(inverse_root @ whole @ inverse_root)[1].flip(1)[:, :dimension].T
    peak = leading.gather(1, leading.abs().argmax(1, keepdim=True))
    return mean, (leading * peak.sign()) @ inverse_root


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
