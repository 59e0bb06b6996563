"""Unsupervised binary codes for frozen features, as one linear map each.

A binariser is fitted once and leaves `(weight, bias)`, so that a torch module can carry it and no
FAISS is needed to encode: the code of x is sign(x @ weight.T + bias).
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

from simsearch.types import check_vectors


class ITQ:
    """Returns a binariser by Iterative Quantization: PCA to `bits`, then the rotation nearest to the corners.

    Gong, Lazebnik, Gordo, Perronnin: Iterative Quantization, TPAMI 2013. FAISS subtracts the mean
    and divides each vector by its norm before PCA and rotation. PCA and rotation have no bias, so
    the division changes no sign and a linear map is the same code. (It does weigh all training
    vectors alike while fitting.) Above max(10 D, 32768) vectors FAISS fits on a fixed choice.

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
        array = _checked(x, self.bits)
        itq = faiss.ITQTransform(array.shape[1], self.bits, True)
        itq.itq.max_iter = self.iterations
        itq.itq.seed = self.seed
        itq.train(array)
        return _linear_map(faiss.vector_to_array(itq.pca_then_itq.A), faiss.vector_to_array(itq.mean), self.bits, array)


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
        array = _checked(x, self.bits)
        pca = faiss.PCAMatrix(array.shape[1], self.bits)
        pca.train(array)
        return _linear_map(faiss.vector_to_array(pca.A), faiss.vector_to_array(pca.mean), self.bits, array)


def _checked(x: Tensor, bits: int) -> np.ndarray:
    if not isinstance(x, Tensor) or x.ndim != 2 or x.dtype != torch.float32:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"a binariser is fitted to a float32 tensor (N, D), got {got}")
    n, dimension = x.shape
    if bits > dimension:
        raise ValueError(f"{bits} bits from {dimension} dimensions: at most {dimension} bits can be had")
    if n <= bits:
        raise ValueError(f"{bits} bits need more than {bits} vectors to be fitted, got {n}")
    check_vectors("vectors", x)
    return np.ascontiguousarray(x.detach().cpu().numpy())


def _linear_map(matrix: np.ndarray, mean: np.ndarray, bits: int, x: np.ndarray) -> tuple[Tensor, Tensor]:
    # FAISS keeps all D rows of a PCA and uses the first of them.
    weight = matrix.reshape(-1, len(mean))[:bits].astype(np.float64)
    bias = -(weight @ mean.astype(np.float64))
    projected = x @ weight.T.astype(np.float32) + bias.astype(np.float32)
    variances = np.linalg.eigvalsh(np.atleast_2d(np.cov(projected.T, dtype=np.float64)))
    if not variances[0] > 1e-10 * variances[-1]:
        raise ValueError(f"the vectors vary in fewer than {bits} directions: ask for fewer bits")
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
