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
    """Running sums over vectors (N, D).

    Attributes:
        count: N, the number of vectors.
        total: float64 (D,), the sum of the vectors.
        outer: float64 (D, D), the sum of their outer products.

    Example:
        >>> moments = Moments.zeros(dimension=2)
        >>> moments.add(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        >>> moments.principal()[1]  # the variances along the axes
        tensor([2.6667, 0.6667], dtype=torch.float64)
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def zeros(cls, dimension: int) -> Moments:
        """The sums of no vectors.

        Args:
            dimension: D, the width of the vectors.
        """
        return cls(
            0,
            torch.zeros(dimension, dtype=torch.float64),
            torch.zeros(dimension, dimension, dtype=torch.float64),
        )

    def add(self, vectors: Tensor) -> None:
        """Adds vectors to the sums.

        Args:
            vectors: Floating point (N, D).

        Raises:
            ValueError: If the shape is wrong, or if `check_vectors` refuses the vectors.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.total):
            raise ValueError(f"vectors must be (N, {len(self.total)}), got {tuple(vectors.shape)}")
        check_vectors("vectors to whiten", vectors)
        wide = vectors.detach().to("cpu", torch.float64)
        self.count += len(wide)
        self.total += wide.sum(0)
        self.outer += wide.T @ wide

    def reduce(self, device: torch.device) -> None:
        """Adds the vectors of all other ranks. Every rank must call.

        Args:
            device: Device of the collectives, a GPU for NCCL.
        """
        count = torch.tensor([self.count], dtype=torch.int64)
        self.count = int(sum_over_ranks(count, device))
        self.total = sum_over_ranks(self.total, device)
        self.outer = sum_over_ranks(self.outer, device)

    def principal(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean (D,), and the eigenvalues (D,) and eigenvectors (D, D) of the covariance.

        Eigenvalues are in descending order, and each row is an eigenvector.

        The largest entry of each eigenvector is positive, so that a fit has one result.

        Raises:
            ValueError: If there are fewer than two vectors.
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
    """Moments that also hold the number and the sum of the vectors of each class.

    Attributes:
        sizes: int64 (L,), the number of vectors of each class.
        sums: float64 (L, D), the sum of the vectors of each class.
    """

    sizes: Tensor
    sums: Tensor

    @classmethod
    def zeros(cls, dimension: int) -> ClassMoments:
        """The sums of no vectors and no classes.

        Args:
            dimension: D, the width of the vectors.
        """
        none = Moments.zeros(dimension)
        empty = torch.zeros(0, dimension, dtype=torch.float64)
        return cls(none.count, none.total, none.outer, torch.zeros(0, dtype=torch.int64), empty)

    def add_labelled(self, vectors: Tensor, labels: Tensor) -> None:
        """Adds the vectors of known classes to the sums.

        Args:
            vectors: Floating point (N, D).
            labels: int64 (N,), classes from 0. Vectors of an unknown class, -1, are left out.

        Raises:
            ValueError: As `add` does.
        """
        known = labels.cpu() >= 0
        labels, wide = labels.cpu()[known], vectors.detach().to("cpu", torch.float64)[known]
        self.add(wide)
        if len(labels):
            self._make_room(int(labels.max()) + 1)
            self.sizes.index_add_(0, labels, torch.ones_like(labels))
            self.sums.index_add_(0, labels, wide)

    def reduce(self, device: torch.device) -> None:
        """Adds the vectors of all other ranks. Every rank must call.

        Args:
            device: Device of the collectives, a GPU for NCCL.
        """
        super().reduce(device)
        self._make_room(int(Ranks.here(device).largest(torch.tensor(len(self.sizes)))))
        self.sizes = sum_over_ranks(self.sizes, device)
        self.sums = sum_over_ranks(self.sums, device)

    def within(self) -> Tensor:
        """The covariance within classes, pooled over them, float64 (D, D).

        Raises:
            ValueError: If no class has two vectors.
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
    """The mean (D,) and the projection (dimension, D) of learned whitening.

    The projection whitens the variation within classes, then keeps the directions of largest variation. Let W be the
    covariance within classes; in the papers the classes are matching pairs. The rows of the projection are the leading
    eigenvectors of the whole covariance in the space W^(-1/2).

    Args:
        moments: The moments of the training vectors.
        dimension: Number of rows, 1..D.
        shrinkage: s in [0, 1]. W is first moved towards its mean eigenvalue by the share s, which many dimensions and
            few images need.

    Raises:
        ValueError: If `dimension` or `shrinkage` is out of range, if no class has two vectors, or if the vectors of
            each class are equal.

    Source:
        Mikolajczyk, Matas 2007; Radenović, Tolias, Chum 2018, section 3.4.

    Example:
        >>> moments = ClassMoments.zeros(dimension=2)
        >>> vectors = torch.tensor([[2.0, 0.0], [2.0, 1.0], [-2.0, 0.0], [-2.0, 1.0]])
        >>> moments.add_labelled(vectors, torch.tensor([0, 0, 1, 1]))  # the second column differs within classes
        >>> vectors @ discriminative_projection(moments, 1, shrinkage=1.0)[1].float().T
        tensor([[ 4.],
                [ 4.],
                [-4.],
                [-4.]])
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
    """The projection (dimension, D) on the leading components, each divided by eigenvalue^(power / 2).

    With a power, components whose eigenvalue is not above 1e-9 of the largest become 0: no vector varies along them,
    and divided by next to nothing they would outweigh all others in new vectors.

    Args:
        eigenvalues: Floating point (D,), in descending order.
        eigenvectors: Floating point (D, D), one per row.
        dimension: Number of rows, 1..D.
        power: 0 for a rotation (PCA), 1 for full whitening, 1/2 for half of it; in [0, 1].
        shrinkage: s in [0, 1]. The eigenvalues l are first moved towards their mean: (1 - s) l + s mean(l).

    Raises:
        ValueError: If `dimension`, `power` or `shrinkage` is out of range, or if no eigenvalue is positive.

    Example:
        >>> whitening_matrix(torch.tensor([4.0, 1.0]), torch.eye(2), dimension=1, power=1.0)
        tensor([[0.5000, 0.0000]])
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
    if power == 0:
        return eigenvectors[:dimension]
    varies = shrunk > shrunk.max() * 1e-9
    return eigenvectors[:dimension] * torch.where(varies, shrunk ** (-power / 2), 0.0)[:dimension, None]
