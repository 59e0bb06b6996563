"""Unsupervised binary codes for frozen features, as one linear map each.

A binariser is fitted once and leaves `(weight, bias)`, so that a torch module can carry it: the code of
x is sign(x @ weight.T + bias). Everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simsearch.functional.codes import itq_rotation
from simsearch.functional.whitening import Moments
from simsearch.types import check_vectors


class ITQ:
    """Returns a binariser by Iterative Quantization: PCA to `bits`, then the rotation nearest to the corners.

    Gong, Lazebnik, Gordo, Perronnin: Iterative Quantization, TPAMI 2013. As in the paper vectors are centred
    and nothing else: their lengths weigh in PCA and rotation. The fit takes all vectors, and time with
    N (D^2 + iterations bits^2): a second for 10,000 vectors and 48 bits.

    bits: length of the code. iterations: alternations of code and rotation; the paper uses 50.
    seed: of the first rotation.

    Raises ValueError for bits < 1 or iterations < 1.
    """

    def __init__(self, bits: int, iterations: int = 50, seed: int = 0) -> None:
        if bits < 1 or iterations < 1:
            raise ValueError(f"bits and iterations must be at least 1, got bits={bits}, iterations={iterations}")
        self.bits = bits
        self.iterations = iterations
        self.seed = seed

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight (bits, D) and bias (bits,), float32, fitted to x, float32 (N, D).

        Raises ValueError for another dtype or shape, NaN or infinity, bits > D, N <= bits, and
        vectors that vary in fewer than `bits` directions.
        """
        mean, centred, components = _principal(x, self.bits)
        rotation = itq_rotation(centred @ components.T, self.iterations, self.seed)
        return _linear_map(rotation.T @ components, mean)


class Sign:
    """Returns a binariser by the signs of the first `bits` principal components (PCA-sign, "PCAH").

    The plain baseline of the ITQ paper: centred PCA, no rotation, so that strong and weak
    directions get a bit each. Raises ValueError for bits < 1.
    """

    def __init__(self, bits: int) -> None:
        if bits < 1:
            raise ValueError(f"bits must be at least 1, got {bits}")
        self.bits = bits

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weight (bits, D), orthonormal rows of falling variance, and bias (bits,), float32.

        Raises ValueError as ITQ.fit does.
        """
        mean, _, components = _principal(x, self.bits)
        return _linear_map(components, mean)


def _principal(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), centred vectors (N, D) and the first `bits` principal directions (bits, D), float64 on the CPU."""
    if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype != torch.float32:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"a binariser is fitted to a float32 tensor (N, D), got {got}")
    n, dimension = x.shape
    if bits > dimension:
        raise ValueError(f"{bits} bits from {dimension} dimensions: at most {dimension} bits can be had")
    if n <= bits:
        raise ValueError(f"{bits} bits need more than {bits} vectors to be fitted, got {n}")
    check_vectors("vectors", x)
    wide = x.detach().to("cpu", torch.float64)
    mean = wide.mean(0)
    centred = wide - mean  # first, so that a mean far from 0 costs the covariance no digits
    moments = Moments.zeros(dimension)
    moments.add(centred)
    _, variances, components = moments.principal()
    if not variances[bits - 1] > 1e-10 * variances[0]:
        raise ValueError(f"the vectors vary in fewer than {bits} directions: ask for fewer bits")
    return mean, centred, components[:bits]


def _linear_map(weight: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    return weight.float(), -(weight @ mean).float()
