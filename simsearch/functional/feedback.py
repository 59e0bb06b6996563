"""What a searcher says beyond one image: further examples, counter-examples, and how much each part counts.

A descriptor made of parts is the concatenation of sqrt(w_p) times the unit vector of part p, the weights w summing
to 1: the inner product of two is sum_p w_p cos_p, the weighted mean of the parts' cosines.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.types import Part

BETA = 0.5


def rocchio(like: Tensor, unlike: Tensor | None, parts: Mapping[str, Part], beta: float = BETA) -> Tensor:
    """A query float32 (D,) towards the mean of examples (M, D) and away from that of counter-examples (U, D).

    Part by part: the unit vector along mean(like) - beta mean(unlike), all of unit vectors, times sqrt(weight), so that
    no part gains or loses weight by how well the examples agree in it. Rocchio: Relevance feedback in information
    retrieval, 1971, with the query itself among the examples; beta near 0.5 is the custom.

    Raises ValueError where there is no example.
    """
    if len(like) == 0:
        raise ValueError("no example: give at least one image or item to be like")
    direction = unit_parts(like, parts).mean(0)
    if unlike is not None and len(unlike):
        direction = direction - beta * unit_parts(unlike, parts).mean(0)
    return unit_parts(direction[None], parts)[0]


def unit_parts(vectors: Tensor, parts: Mapping[str, Part]) -> Tensor:
    """Vectors float32 (N, D) with each part at the length that a descriptor's has, the square root of its weight."""
    scaled = [part.weight**0.5 * F.normalize(vectors[:, part.start : part.stop], dim=1) for part in parts.values()]
    return torch.cat(scaled, dim=1)


def query_weights(parts: Mapping[str, Part], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weight of every part in a search, summing to 1: `weights` where given, a part's own elsewhere.

    Raises ValueError for an unknown part, a weight below 0 or not finite, weights that are all 0, and for a weight
    above 0 of a part that descriptors hold with weight 0, which is not in them.
    """
    given = dict(weights or {})
    if unknown := sorted(given.keys() - parts.keys()):
        raise ValueError(f"no part {unknown[0]!r} in these descriptors: there are {', '.join(parts)}")
    for name, value in given.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"the weight of {name} must be a number of at least 0, got {value}")
        if value > 0 and parts[name].weight == 0:
            raise ValueError(
                f"{name} has weight 0 in these descriptors, which can't be raised: make them with a weight"
            )
    chosen = {name: float(given.get(name, part.weight)) for name, part in parts.items()}
    if not (largest := max(chosen.values())) > 0:
        raise ValueError(f"the weights of {', '.join(parts)} are all 0: raise one")
    shares = {name: value / largest for name, value in chosen.items()}  # whose sum is finite whatever the weights are
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def reweight(vectors: Tensor, parts: Mapping[str, Part], weights: Mapping[str, float]) -> Tensor:
    """Vectors float32 (..., D) whose inner product with a stored descriptor is sum_p weights_p cos_p.

    Part p is multiplied by weights_p over its own weight: the stored side stays as it is. weights: of all parts, as
    `query_weights` gives them.
    """
    return vectors * _factors(vectors.shape[-1], parts, weights)


def reweight_both(vectors: Tensor, parts: Mapping[str, Part], weights: Mapping[str, float]) -> Tensor:
    """Vectors float32 (..., D) whose inner products with each other are sum_p weights_p cos_p."""
    return vectors * _factors(vectors.shape[-1], parts, weights).sqrt()


def _factors(width: int, parts: Mapping[str, Part], weights: Mapping[str, float]) -> Tensor:
    factors = torch.zeros(width)
    for name, part in parts.items():
        if part.weight:
            factors[part.start : part.stop] = weights[name] / part.weight
    return factors


def contributions(query: Tensor, vectors: Tensor, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The inner products (N,) of each part of a query (D,) and vectors (N, D); they sum to the whole inner product."""
    return {name: vectors[:, part.start : part.stop] @ query[part.start : part.stop] for name, part in parts.items()}
