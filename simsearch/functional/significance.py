"""How sure a mean over queries is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def bootstrap_interval(values: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> Tensor:
    """Percentile bootstrap intervals over queries of the column means, float64 (M, 2): low, high.

    values: float64 (Q, M); NaN (a query without a value) is left out of its column's means.
    Queries are resampled with replacement, the same resamples for all columns (Efron 1979).
    Raises ValueError for an empty input, a confidence outside (0, 1) or no resamples.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values must be (Q, M) with Q > 0, got {tuple(values.shape)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"a bootstrap needs at least 1 resample, got {resamples}")
    rng = np.random.default_rng(seed)
    q = len(values)
    there = torch.isfinite(values).double()
    filled = values.double().nan_to_num(0.0)
    means = []
    step = max(1, 2**21 // q)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, q, (rows, q)) + np.arange(rows)[:, None] * q
        weights = np.bincount(drawn.ravel(), minlength=rows * q).reshape(rows, q)
        weight = torch.from_numpy(weights).double()
        means.append((weight @ filled) / (weight @ there))
    tail = (1 - confidence) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    return torch.nanquantile(torch.cat(means), levels, dim=0).T
