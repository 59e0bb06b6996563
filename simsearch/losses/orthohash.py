"""The loss of OrthoHash: cosine similarity with fixed binary targets."""

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
    """Distinct targets float32 (classes, bits) of +1 and -1, drawn by `seed`.

    Rows of a Hadamard matrix, orthogonal to each other, where there is one of that size and
    classes <= bits; with classes < bits each has as many ones as minus ones. Otherwise random rows of
    bits // 2 ones.

    Raises ValueError where there are fewer such rows than classes.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = _hadamard(bits) if classes <= bits else None
    if matrix is not None:
        first = 0 if classes == bits else 1  # the row of ones is not balanced
        return matrix[first + torch.randperm(bits - first, generator=generator)[:classes]]
    if math.comb(bits, bits // 2) < classes:
        raise ValueError(f"loss.bits={bits}: there are not {classes} balanced codes of that length, use more bits")
    rows: dict[tuple[float, ...], None] = {}
    while len(rows) < classes:
        order = torch.rand(classes, bits, generator=generator).argsort(1)
        rows |= dict.fromkeys(tuple(row) for row in torch.where(order < bits // 2, 1.0, -1.0).tolist())
    return torch.tensor(list(rows)[:classes])


class OrthoHashLoss(nn.Module):
    """Margin cross-entropy on cosine similarities with fixed targets, a scalar, from codes (B, b) and labels (B,).

    The logits are scale * (cos(u, t_c) - margin [c = label]) for the targets t of `binary_targets`, which
    are a buffer. Labels lie in 0..classes-1. scale, margin: the authors' release's.

    The paper's network ends in a batch normalisation, by which bits are balanced; it belongs to the network.

    Hoe, Ng, Zhang, Chan, Song, Xiang 2021, "One Loss for All: Deep Hashing with a Single Cosine Similarity
    based Learning Objective".
    """

    targets: Tensor

    def __init__(self, bits: int, classes: int, scale: float = 8.0, margin: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        check_classifier("bits", bits, classes)
        if scale <= 0:
            raise ValueError(f"loss.scale={scale} must be positive")
        if not 0 <= margin <= 2:
            raise ValueError(f"loss.margin={margin} must lie in [0, 2], as far as cosines are apart")
        self.classes, self.scale, self.margin = classes, scale, margin
        self.register_buffer("targets", binary_targets(classes, bits, seed))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        check_labels(labels, self.classes)
        targets = F.normalize(self.targets.to(embeddings.dtype))
        cosine = F.normalize(embeddings) @ targets.T
        own = F.one_hot(labels, self.classes).to(cosine.dtype)
        return F.cross_entropy(self.scale * (cosine - self.margin * own), labels)
