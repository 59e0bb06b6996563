"""The health of binary codes: balance and correlation of bits, distance of real values from their signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class CodeMoments:
    """Running sums over real-valued codes (N, b): count, sums of signs (b,), of sign products (b, b), of errors."""

    count: int
    total: Tensor
    products: Tensor
    error: float

    @classmethod
    def zeros(cls, bits: int) -> CodeMoments:
        """Moments of no codes."""
        return cls(0, torch.zeros(bits, dtype=torch.float64), torch.zeros(bits, bits, dtype=torch.float64), 0.0)

    def add(self, real: Tensor) -> None:
        """Adds real-valued codes (N, b); a bit is set where its value is above 0."""
        values = real.detach().to("cpu", torch.float64)
        signs = torch.where(values > 0, 1.0, -1.0).double()
        self.count += len(values)
        self.total += signs.sum(0)
        self.products += signs.T @ signs
        self.error += float((values - signs).square().mean(1).sum())

    def statistics(self) -> dict[str, float]:
        """balance, worst_balance, correlation, quantisation_error and dead_bits of the codes added.

        balance: mean over bits of 1 - |mean sign|, 1 where each bit halves the images, 0 where all are
        constant; worst_balance the smallest. correlation: mean |Pearson correlation| of pairs of bits that
        are not constant (0 with fewer than two). quantisation_error: mean squared distance of a real value
        from its sign. dead_bits: number of constant bits. Raises ValueError where nothing was added.
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
