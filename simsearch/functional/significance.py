"""How sure a mean over queries is, and a difference of two."""

from __future__ import annotations

from statistics import NormalDist

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


def paired_bootstrap(
    a: Tensor, b: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b over queries and its percentile bootstrap interval: difference, low, high.

    a, b: float64 (Q,), values of the same queries, resampled together; queries for which either is NaN are
    left out. Raises ValueError as paired_permutation does, and for what bootstrap_interval refuses.
    """
    difference = _paired(a, b)
    bounds = bootstrap_interval(difference[:, None], confidence=confidence, resamples=resamples, seed=seed)
    low, high = bounds[0].tolist()
    return float(difference.mean()), low, high


def paired_permutation(a: Tensor, b: Tensor, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the sign-flip test that a - b has mean 0 over queries, in (0, 1].

    a, b: float64 (Q,), values of the same queries; those for which either is NaN are left out. Where
    neither system is better, a query's difference has either sign with equal chance (Fisher 1935): the
    p-value is the share of sign patterns whose mean is at least as far from 0 as the one seen. All 2^n
    patterns of the n differences other than 0 are counted where they are at most `resamples`; else so many
    are drawn, and the one seen is counted among them (Phipson and Smyth 2010): no p-value is below
    1 / (resamples + 1).

    Raises ValueError for shapes that are not both (Q,), for no query with both values, and no resamples.
    """
    if resamples < 1:
        raise ValueError(f"a permutation test needs at least 1 resample, got {resamples}")
    difference = _paired(a, b)
    values = difference[difference != 0].numpy()
    n = len(values)
    total = values.sum()
    # The same sum in another order differs by rounding: patterns that tie with the one seen must count.
    bound = abs(total) - 1e-12 * np.abs(values).sum()
    exact = n < 63 and 2**n <= resamples
    patterns = 2**n if exact else resamples
    rng = np.random.default_rng(seed)
    step = max(1, 2**21 // max(n, 1))
    beyond = 0
    for start in range(0, patterns, step):
        rows = min(step, patterns - start)
        if exact:
            signs = (np.arange(start, start + rows)[:, None] >> np.arange(n) & 1).astype(np.float64)
        else:
            raw = rng.integers(0, 256, (rows, -(-n // 8)), dtype=np.uint8)
            signs = np.unpackbits(raw, axis=1, count=n).astype(np.float64)
        beyond += int((np.abs(total - 2 * (signs @ values)) >= bound).sum())
    return beyond / patterns if exact else (beyond + 1) / (patterns + 1)


def minimum_detectable_effect(a: Tensor, b: Tensor, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true mean of a - b that a two-sided paired test at level `alpha` finds with the chance `power`.

    a, b: float64 (Q,), values of the same queries; those for which either is NaN are left out. In units of the
    metric, by the normal approximation (z(1 - alpha / 2) + z(power)) s / sqrt(n), s the standard deviation of the
    differences of the n queries (Cohen 1988): a smaller difference may be real and is likely to be missed.

    Raises ValueError for shapes that are not both (Q,), fewer than 2 queries with both values, an alpha outside
    (0, 1) and a power outside (alpha, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if not alpha < power < 1:
        raise ValueError(f"power must lie between alpha ({alpha}) and 1, got {power}")
    difference = _paired(a, b)
    if len(difference) < 2:
        raise ValueError("one query has no spread: a detectable effect needs at least 2")
    normal = NormalDist()
    steps = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
    return steps * float(difference.std()) / len(difference) ** 0.5


def _paired(a: Tensor, b: Tensor) -> Tensor:
    """a - b, float64 (n,), of the queries for which both have a value."""
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"paired values must both be (Q,) of the same queries, got {tuple(a.shape)}, {tuple(b.shape)}")
    difference = a.double() - b.double()
    difference = difference[~difference.isnan()]
    if len(difference) == 0:
        raise ValueError("no query has both values: there is nothing to compare")
    return difference


def holm(p: Tensor) -> Tensor:
    """Adjusted p-values, float64 (M,): below alpha, they hold together with an error chance of at most alpha.

    p: float64 (M,), p-values of M tests. The i-th smallest is multiplied by M + 1 - i, and none is smaller
    than one before it (Holm 1979). Raises ValueError where p is not (M,) or holds values outside [0, 1].
    """
    if p.ndim != 1 or not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"p must be (M,) with values in [0, 1], got shape {tuple(p.shape)}: {p.tolist()}")
    if len(p) == 0:
        return p.double()
    order = p.argsort()
    factor = torch.arange(len(p), 0, -1, dtype=torch.float64)
    adjusted = (p.double()[order] * factor).cummax(0).values.clamp(max=1.0)
    return torch.empty_like(adjusted).scatter_(0, order, adjusted)
