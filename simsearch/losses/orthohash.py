"""The loss of OrthoHash: codes are compared by cosine with fixed binary targets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.losses.classification import check_classifier, check_labels


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix (n, n) of +1 and -1 with a first row of ones, or None where no construction here gives one.

    Sylvester's doubling and Paley's two constructions over prime fields, which cover the usual code lengths.
    """
    if n == 1:
        return torch.ones(1, 1)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    if n % 2 == 0 and (half := _hadamard(n // 2)) is not None:
        return torch.kron(pair, half)
    if n % 4:
        return None
    if _is_prime(n - 1):  # n - 1 = 3 mod 4
        matrix = torch.eye(n) + _bordered_jacobsthal(n - 1, corner=-1.0)
    elif _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        core = _bordered_jacobsthal(n // 2 - 1, corner=1.0)
        matrix = torch.kron(core, pair) + torch.kron(torch.eye(n // 2), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
    else:
        return None
    return matrix * matrix[0]


def _bordered_jacobsthal(q: int, corner: float) -> Tensor:
    """Quadratic characters of i - j modulo the prime q, with a row of ones above and a column of `corner` before."""
    character = torch.full((q,), -1.0)
    character[torch.arange(q).square() % q] = 1.0
    character[0] = 0.0
    places = torch.arange(q)
    bordered = torch.zeros(q + 1, q + 1)
    bordered[0, 1:], bordered[1:, 0] = 1.0, corner
    bordered[1:, 1:] = character[(places[:, None] - places[None, :]) % q]
    return bordered


def binary_targets(classes: int, bits: int, seed: int = 0) -> Tensor:
    """Distinct target codes, float32 (classes, bits) of +1 and -1.

    Where classes <= bits and a Hadamard matrix of that size can be built, the targets are rows of the matrix,
    orthogonal to each other. With classes < bits every such row has as many +1 as -1, and one bit is equal in all
    targets if the matrix has a column of ones, as at 12, 24, 48 and 64 bits. Otherwise the targets are random rows with
    bits // 2 entries of +1.

    Args:
        classes: Number of targets.
        bits: b, the width of the codes.
        seed: Seed of the random choice of rows.

    Raises:
        ValueError: If there are fewer such rows than classes.

    Example:
        >>> targets = binary_targets(classes=3, bits=4)
        >>> targets @ targets.T
        tensor([[4., 0., 0.],
                [0., 4., 0.],
                [0., 0., 4.]])
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = _hadamard(bits) if classes <= bits else None
    if matrix is not None:
        first = 0 if classes == bits else 1  # the row of ones is not balanced
        return matrix[first + torch.randperm(bits - first, generator=generator)[:classes]]
    if math.comb(bits, bits // 2) < classes:
        raise ValueError(f"loss.bits={bits}: there are not {classes} balanced codes of that length: use more bits")
    rows: dict[tuple[float, ...], None] = {}
    while len(rows) < classes:
        order = torch.rand(classes, bits, generator=generator).argsort(1)
        rows |= dict.fromkeys(tuple(row) for row in torch.where(order < bits // 2, 1.0, -1.0).tolist())
    return torch.tensor(list(rows)[:classes])


class OrthoHashLoss(nn.Module):
    """Cross-entropy with a margin on the cosines between real-valued codes and fixed targets.

    The logit of class c is scale * (cos(u, t_c) - margin [c = label]), where t are the `binary_targets`. The targets
    are a buffer.

    The network in the paper ends in a batch normalisation, which balances the bits. It belongs to the network, not to
    this loss.

    Args:
        bits: b, the width of the codes.
        classes: Number of classes.
        scale: Factor of the cosines, above 0. The default is that of the authors' release.
        margin: Margin in [0, 2]. The default is that of the authors' release.
        seed: Seed of the targets.

    Raises:
        ValueError: If an argument is out of range, or if there are too few targets of that length.

    Source:
        Hoe, Ng, Zhang, Chan, Song, Xiang: One Loss for All: Deep Hashing with a Single Cosine Similarity based Learning
        Objective. NeurIPS 2021.

    Example:
        >>> loss = OrthoHashLoss(bits=4, classes=2)
        >>> loss(loss.targets, torch.tensor([0, 1]))  # log(1 + exp(-8 * 0.8)): each code equals its target
        tensor(0.0017)
    """

    targets: Tensor

    def __init__(self, bits: int, classes: int, scale: float = 8.0, margin: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        check_classifier("bits", bits, classes)
        if scale <= 0:
            raise ValueError(f"loss.scale={scale} must be positive")
        if not 0 <= margin <= 2:
            raise ValueError(f"loss.margin={margin} must lie in [0, 2], the range of differences of cosines")
        self.classes, self.scale, self.margin = classes, scale, margin
        self.register_buffer("targets", binary_targets(classes, bits, seed))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (B, b), real-valued codes.
            labels: int64 (B,), in 0..classes-1.

        Raises:
            ValueError: If a label is out of range.
        """
        check_labels(labels, self.classes)
        targets = F.normalize(self.targets.to(embeddings.dtype))
        cosine = F.normalize(embeddings) @ targets.T
        own = F.one_hot(labels, self.classes).to(cosine.dtype)
        return F.cross_entropy(self.scale * (cosine - self.margin * own), labels)
