"""Re-ranking by diffusion: similarity that travels along a graph of mutual neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simsearch.functional.ranking import BLOCK_BYTES
from simsearch.functional.reranking import gallery_neighbours, mutual_neighbours, reordered
from simsearch.types import SearchResult


@dataclass(frozen=True)
class Graph:
    """A symmetric normalised affinity S of G items, as lists of neighbours.

    Attributes:
        ids: int64 (G, K).
        weights: float32 (G, K), 0 where two items are not mutual neighbours.
        gamma: The exponent of the similarities.
    """

    ids: Tensor
    weights: Tensor
    gamma: float


def affinity_graph(gallery: Tensor, k: int, gamma: float) -> Graph:
    """The graph of mutual k nearest neighbours with the weights similarity^gamma, divided by the roots of both degrees.

    Args:
        gallery: float32 (G, D), unit vectors.
        k: Number of neighbours.
        gamma: The exponent of the similarities.

    Source:
        Iscen, Tolias, Avrithis, Furon, Chum: Efficient diffusion on region manifolds. CVPR 2017.

    Example:
        >>> affinity_graph(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), k=1, gamma=3.0).weights
        tensor([[1.],
                [1.]])
    """
    found = gallery_neighbours(gallery, k)
    joined = mutual_neighbours(found.ids) & (found.scores > 0)
    affinity = (found.scores.clamp(min=0) ** gamma).masked_fill(~joined, 0.0)  # after the power: 0^0 is 1
    root = affinity.sum(1).rsqrt().nan_to_num(posinf=0.0)
    ids = found.ids.clamp(min=0)
    return Graph(ids, affinity * root[:, None] * root[ids], gamma)


def diffuse(
    found: SearchResult,
    graph: Graph,
    *,
    seeds: int,
    alpha: float,
    iterations: int,
    block_bytes: int = BLOCK_BYTES,
) -> SearchResult:
    """Shortlists, re-ranked by diffusion on the graph of mutual neighbours.

    Items are ordered by f = (I - alpha S)^-1 y, the amount that reaches an item from the query's seeds y.

    The `seeds` nearest items of the query inject similarity^gamma. At most `iterations` steps of conjugate gradients
    approach the steady state. S is truncated to the rows and columns of the shortlist. Float32 leaves an error of about
    1e-7 / (1 - alpha) of f.

    Args:
        found: Shortlists (Q, K) of gallery positions with cosines.
        graph: The affinity graph of the gallery.
        seeds: Number of items that inject.
        alpha: Share that is passed on in each step, in [0, 1).
        iterations: Largest number of steps.
        block_bytes: Memory for a block.

    Returns:
        Shortlists (Q, K) in the new order. Scores are f. Items with f = 0 keep their order and rank last, with the
            score cosine - 2.

    Source:
        Iscen, Tolias, Avrithis, Furon, Chum: Efficient diffusion on region manifolds. CVPR 2017.

    Example:
        >>> from simsearch.functional.reranking import nearest
        >>> gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.6, 0.8]])
        >>> found = nearest(torch.tensor([[1.0, 0.0]]), gallery, k=4)
        >>> graph = affinity_graph(gallery, k=2, gamma=1.0)
        >>> diffuse(found, graph, seeds=1, alpha=0.9, iterations=20).ids
        tensor([[0, 1, 2, 3]])
    """
    q, k = found.ids.shape
    neighbours = graph.ids.shape[1]
    ids, scores = torch.empty_like(found.ids), torch.empty_like(found.scores)
    step = max(1, block_bytes // (8 * len(graph.ids) + 24 * k * neighbours))
    place = torch.empty(min(step, q), len(graph.ids), dtype=torch.int64)
    for start in range(0, q, step):
        one, similarity = found.ids[start : start + step], found.scores[start : start + step]
        b = len(one)
        present = one >= 0
        # Position of each gallery item in the shortlist, the padding slot K where it is not in it.
        row, rank = present.nonzero(as_tuple=True)
        place[:b].fill_(k)
        place[row, one[present]] = rank
        safe = one.clamp(min=0)
        local = place[:b].gather(1, graph.ids[safe].flatten(1))
        weights = graph.weights[safe].masked_fill(~present[:, :, None], 0.0)
        seed = similarity.clamp(min=0) ** graph.gamma
        seed[:, seeds:] = 0.0
        seed[similarity <= 0] = 0.0

        def apply(f: Tensor, local: Tensor = local, weights: Tensor = weights) -> Tensor:
            reached = F.pad(f, (0, 1)).gather(1, local).view_as(weights)
            return f - alpha * (weights * reached).sum(2)

        f = conjugate_gradient(apply, seed, iterations)
        final = torch.where(f > 0, f, similarity - 2).masked_fill(~present, -torch.inf)
        ids[start : start + step], scores[start : start + step] = reordered(one, final)
    return SearchResult(ids, scores)


def conjugate_gradient(apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """The solutions of B symmetric positive definite systems apply(x) = right, side by side, (B, n).

    The method starts from 0 and takes at most `iterations` steps. A system is left as it is once its residual is no
    longer than the rounding error of its right side: the rest is noise, and steps along noise lead away from the
    solution.

    Args:
        apply: The linear map of each system, from (B, n) to (B, n).
        right: Floating point (B, n), the right sides.
        iterations: Largest number of steps.

    Source:
        Hestenes, Stiefel: Methods of conjugate gradients for solving linear systems. 1952.

    Example:
        >>> conjugate_gradient(lambda x: 2 * x, torch.tensor([[4.0, 6.0]]), iterations=1)
        tensor([[2., 3.]])
    """
    scale = right.abs().amax(1, keepdim=True)  # so that squares neither vanish nor overflow
    residual = direction = torch.where(scale > 0, right / scale, 0.0)
    x = torch.zeros_like(right)
    norm = residual.square().sum(1, keepdim=True)
    rounding = norm * torch.finfo(right.dtype).eps ** 2
    for _ in range(iterations):
        unsolved = norm > rounding
        if not unsolved.any():
            break
        image = apply(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(unsolved & (curvature > 0), norm / curvature, 0.0)
        x = x + length * direction
        residual = residual - length * image
        old, norm = norm, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(old > 0, norm / old, 0.0) * direction
    return scale * x
