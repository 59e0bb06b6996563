"""The health of binary codes: balance and correlation of the bits, and the distance of real values from their signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class CodeMoments:
    """Running sums over real-valued codes (N, b).

    Attributes:
        count: N, the number of codes.
        total: float64 (b,), the sum of the signs, +1 or -1.
        products: float64 (b, b), the sum of the outer products of the signs.
        error: The sum over codes of the mean squared distance between a value and its sign.

    Example:
        >>> moments = CodeMoments.zeros(bits=2)
        >>> moments.add(torch.tensor([[1.0, 0.5], [-1.0, 0.5]]))  # the second bit never changes
        >>> moments.statistics()
        {'balance': 0.5, 'worst_balance': 0.0, 'correlation': 0.0, 'quantisation_error': 0.125, 'dead_bits': 1.0}
    """

    count: int
    total: Tensor
    products: Tensor
    error: float

    @classmethod
    def zeros(cls, bits: int) -> CodeMoments:
        """The sums of no codes.

        Args:
            bits: b, the width of the codes.
        """
        return cls(0, torch.zeros(bits, dtype=torch.float64), torch.zeros(bits, bits, dtype=torch.float64), 0.0)

    def add(self, real: Tensor) -> None:
        """Adds codes to the sums.

        Args:
            real: Floating point (N, b), real-valued codes. A bit is set where its value is above 0.
        """
        values = real.detach().to("cpu", torch.float64)
        signs = torch.where(values > 0, 1.0, -1.0).double()
        self.count += len(values)
        self.total += signs.sum(0)
        self.products += signs.T @ signs
        self.error += float((values - signs).square().mean(1).sum())

    def statistics(self) -> dict[str, float]:
        """Five statistics of the codes, by name.

        - `balance`: the mean over bits of 1 - |mean sign|. It is 1 where each bit splits the images in half, and 0
          where all bits are constant.
        - `worst_balance`: the smallest balance of a bit.
        - `correlation`: the mean absolute Pearson correlation over pairs of bits that are not constant, 0 with fewer
          than two such bits.
        - `quantisation_error`: the mean squared distance between a real value and its sign.
        - `dead_bits`: the number of constant bits.

        Raises:
            ValueError: If no codes were added.
        """
        if self.count == 0:
            raise ValueError("there are no codes to describe")
        mean = self.total / self.count
        balance = 1 - mean.abs()
        alive = balance > 0
        deviation = (1 - mean.square()).sqrt()[alive]
        covariance = (self.products / self.count - torch.outer(mean, mean))[alive][:, alive]
        correlation = (covariance / torch.outer(deviation, deviation)).abs()
        pairs = len(correlation) * (len(correlation) - 1)
        off = float(correlation.sum() - correlation.diagonal().sum()) / pairs if pairs else 0.0
        return {
            "balance": float(balance.mean()),
            "worst_balance": float(balance.min()),
            "correlation": off,
            "quantisation_error": self.error / self.count,
            "dead_bits": float((~alive).sum()),
        }
