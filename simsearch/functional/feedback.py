"""Relevance feedback: further examples, counter-examples, and the weight of each part of a descriptor.

A descriptor made of parts is the concatenation of sqrt(w_p) times the unit vector of part p. The weights w sum to 1.
The inner product of two descriptors is sum_p w_p cos_p, the weighted mean of the cosines of their parts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.types import Part

BETA = 0.5


def rocchio(like: Tensor, unlike: Tensor | None, parts: Mapping[str, Part], beta: float = BETA) -> Tensor:
    """A query vector, float32 (D,), towards the mean of the examples and away from the mean of the counter-examples.

    Each part is computed separately: the unit vector along mean(like) - beta mean(unlike), where all means are of unit
    vectors, times the square root of the part's weight. A part therefore keeps its weight, however well the examples
    agree in it.

    Args:
        like: float32 (M, D), descriptors of the examples, M > 0. Count the query image among them.
        unlike: float32 (U, D), descriptors of the counter-examples, or None.
        parts: The parts of a descriptor, by name.
        beta: Weight of the counter-examples. Values near 0.5 are common.

    Raises:
        ValueError: If there is no example.

    Source:
        Rocchio: Relevance feedback in information retrieval. 1971.

    Example:
        >>> parts = {"content": Part(start=0, stop=2, weight=1.0)}
        >>> rocchio(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), parts)
        tensor([ 0.8944, -0.4472])
    """
    if len(like) == 0:
        raise ValueError("no example: give at least one image or item to be like")
    direction = unit_parts(like, parts).mean(0)
    if unlike is not None and len(unlike):
        direction = direction - beta * unit_parts(unlike, parts).mean(0)
    return unit_parts(direction[None], parts)[0]


def unit_parts(vectors: Tensor, parts: Mapping[str, Part]) -> Tensor:
    """The vectors with each part scaled to its length in a descriptor, the square root of its weight, float32 (N, D).

    Args:
        vectors: float32 (N, D).
        parts: The parts of a descriptor, by name.

    Example:
        >>> parts = {"content": Part(start=0, stop=1, weight=0.25), "style": Part(start=1, stop=2, weight=0.75)}
        >>> unit_parts(torch.tensor([[7.0, -3.0]]), parts)
        tensor([[ 0.5000, -0.8660]])
    """
    scaled = [part.weight**0.5 * F.normalize(vectors[:, part.start : part.stop], dim=1) for part in parts.values()]
    return torch.cat(scaled, dim=1)


def query_weights(parts: Mapping[str, Part], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weight of every part in a search; the weights sum to 1.

    Args:
        parts: The parts of a descriptor, by name.
        weights: New weights of some parts, 0 or more. Other parts keep their own weight. None changes nothing.

    Raises:
        ValueError: If a part is unknown, if a weight is negative or not finite, if all weights are 0, or if a weight
            above 0 is given to a part that has weight 0 in the descriptors and is therefore not in them.

    Example:
        >>> parts = {"content": Part(start=0, stop=1, weight=0.25), "style": Part(start=1, stop=2, weight=0.75)}
        >>> query_weights(parts, {"content": 0.25, "style": 0.25})
        {'content': 0.5, 'style': 0.5}
    """
    given = dict(weights or {})
    if unknown := sorted(given.keys() - parts.keys()):
        raise ValueError(f"no part {unknown[0]!r} in these descriptors: there are {', '.join(parts)}")
    for name, value in given.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"the weight of {name} must be a number of at least 0, got {value}")
        if value > 0 and parts[name].weight == 0:
            raise ValueError(
                f"{name} has weight 0 in these descriptors, which a query cannot raise: make the catalog with a weight"
            )
    chosen = {name: float(given.get(name, part.weight)) for name, part in parts.items()}
    if not (largest := max(chosen.values())) > 0:
        raise ValueError(f"the weights of {', '.join(parts)} are all 0: raise one")
    shares = {name: value / largest for name, value in chosen.items()}  # whose sum is finite whatever the weights are
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def reweight(vectors: Tensor, parts: Mapping[str, Part], weights: Mapping[str, float]) -> Tensor:
    """Vectors, float32 (..., D), whose inner product with a stored descriptor is sum_p weights_p cos_p.

    Part p is multiplied by weights_p over its own weight. The stored descriptors stay as they are.

    Args:
        vectors: float32 (..., D), descriptors of queries.
        parts: The parts of a descriptor, by name.
        weights: The weights of all parts, from `query_weights`.

    Example:
        >>> parts = {"content": Part(start=0, stop=1, weight=0.25), "style": Part(start=1, stop=2, weight=0.75)}
        >>> reweight(torch.tensor([0.5, 0.8660]), parts, {"content": 1.0, "style": 0.0})
        tensor([2., 0.])
    """
    return vectors * _factors(vectors.shape[-1], parts, weights)


def reweight_both(vectors: Tensor, parts: Mapping[str, Part], weights: Mapping[str, float]) -> Tensor:
    """Vectors, float32 (..., D), whose inner products with each other are sum_p weights_p cos_p.

    Args:
        vectors: float32 (..., D), descriptors.
        parts: The parts of a descriptor, by name.
        weights: The weights of all parts, from `query_weights`.

    Example:
        >>> parts = {"content": Part(start=0, stop=1, weight=0.25), "style": Part(start=1, stop=2, weight=0.75)}
        >>> reweight_both(torch.tensor([0.5, 0.8660]), parts, {"content": 1.0, "style": 0.0})
        tensor([1., 0.])
    """
    return vectors * _factors(vectors.shape[-1], parts, weights).sqrt()


def _factors(width: int, parts: Mapping[str, Part], weights: Mapping[str, float]) -> Tensor:
    factors = torch.zeros(width)
    for name, part in parts.items():
        if part.weight:
            factors[part.start : part.stop] = weights[name] / part.weight
    return factors


def contributions(query: Tensor, vectors: Tensor, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The inner products of a query and some vectors in each part, (N,) by name. They sum to the whole inner product.

    Args:
        query: float32 (D,).
        vectors: float32 (N, D).
        parts: The parts of a descriptor, by name.

    Example:
        >>> parts = {"content": Part(start=0, stop=1, weight=0.25), "style": Part(start=1, stop=2, weight=0.75)}
        >>> contributions(torch.tensor([2.0, 3.0]), torch.tensor([[1.0, -1.0]]), parts)
        {'content': tensor([2.]), 'style': tensor([-3.])}
    """
    return {name: vectors[:, part.start : part.stop] @ query[part.start : part.stop] for name, part in parts.items()}
