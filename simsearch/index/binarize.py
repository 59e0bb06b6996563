"""Unsupervised binary codes for frozen features. Each method is a linear map.

A binariser is fitted once and returns `(weight, bias)`, which a torch module can hold. The code of x is sign(x @
weight.T + bias). All computations are in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simsearch.functional.codes import itq_rotation
from simsearch.functional.whitening import Moments
from simsearch.types import check_vectors


class ITQ:
    """A binariser by Iterative Quantization (ITQ): PCA to `bits` dimensions, then a rotation towards a cube's corners.

    As in the paper, vectors are centred but not normalised, so that their lengths matter. The fit uses
    all vectors. Its time grows with N (D^2 + iterations bits^2): a second for 10,000 vectors and 48 bits.

    Args:
        bits: Length of the code, 1 or more.
        iterations: Number of alternations between codes and rotation, 1 or more. The paper uses 50.
        seed: Seed of the first rotation.

    Raises:
        ValueError: If `bits` or `iterations` is below 1.

    Source:
        Gong, Lazebnik, Gordo, Perronnin: Iterative Quantization. TPAMI 2013.

    Example:
        >>> vectors = torch.tensor([[4.0, 3.0], [3.0, -4.0], [-4.0, -3.0], [-3.0, 4.0]])  # a turned square
        >>> weight, bias = ITQ(bits=2).fit(vectors)
        >>> len((vectors @ weight.T + bias > 0).unique(dim=0))  # each corner has its own code
        4
    """

    def __init__(self, bits: int, iterations: int = 50, seed: int = 0) -> None:
        if bits < 1 or iterations < 1:
            raise ValueError(f"bits and iterations must be at least 1, got bits={bits}, iterations={iterations}")
        self.bits = bits
        self.iterations = iterations
        self.seed = seed

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight (bits, D) and the bias (bits,), float32, fitted to vectors.

        Args:
            x: float32 (N, D), N > bits.

        Raises:
            ValueError: If the dtype or shape is wrong, if a value is NaN or infinite, if bits > D or N <= bits, or if
                the vectors vary in fewer than `bits` directions.
        """
        mean, centred, components = _principal(x, self.bits)
        rotation = itq_rotation(centred @ components.T, self.iterations, self.seed)
        return _linear_map(rotation.T @ components, mean)


class Sign:
    """A binariser by the signs of the first `bits` principal components (PCA-sign, "PCAH").

    It is the plain baseline of the ITQ paper: centred PCA without a rotation, so that strong and weak directions get
    one bit each.

    Args:
        bits: Length of the code, 1 or more.

    Raises:
        ValueError: If `bits` is below 1.

    Example:
        >>> vectors = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> Sign(bits=1).fit(vectors)[0].abs()  # the direction of largest variance
        tensor([[1., 0.]])
    """

    def __init__(self, bits: int) -> None:
        if bits < 1:
            raise ValueError(f"bits must be at least 1, got {bits}")
        self.bits = bits

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight (bits, D) and the bias (bits,), float32, fitted to vectors.

        The rows of the weight are orthonormal, in the order of descending variance.

        Args:
            x: float32 (N, D), N > bits.

        Raises:
            ValueError: As `ITQ.fit` does.
        """
        mean, _, components = _principal(x, self.bits)
        return _linear_map(components, mean)


def _principal(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean (D,), centred vectors (N, D) and the first `bits` principal directions (bits, D), float64 on the CPU."""
    if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype != torch.float32:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"a binariser is fitted to a float32 tensor (N, D), got {got}")
    n, dimension = x.shape
    if bits > dimension:
        raise ValueError(f"{bits} bits from {dimension} dimensions: use at most {dimension} bits")
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
