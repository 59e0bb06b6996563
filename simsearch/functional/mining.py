"""Triplet mining: the hardest or the semi-hard triplets of a pool, and the hardest triplets of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from simsearch.types import check_vectors


def hardest_triplets(
    descriptors: Tensor, labels: Tensor, *, margin: float, per_query: int = 25, block: int = 256
) -> tuple[Tensor, Tensor]:
    """The hardest triplets of each item of a pool, int64 (T, 3), and their losses (T,).

    A triplet is (query, positive, negative), positions in the pool. Its loss is max(0, margin + |q - p|^2 - |q - n|^2)
    / 2. For each query up to `per_query` triplets with a loss above 0 are returned, those with the largest loss among
    all triplets of the pool. A query without any is left out: it has no positive, no negative, or no triplet within the
    margin. T may be 0.

    The k largest sums of two sorted lists lie among the first k of each list. So k farthest positives and k nearest
    negatives are enough.

    Args:
        descriptors: Floating point (N, D), the pool.
        labels: int64 (N,), all known (0 or more).
        margin: Margin between squared distances.
        per_query: Largest number of triplets per query, 1 or more.
        block: Number of queries at a time: `block` x N distances are held in memory.

    Returns:
        Triplets and losses, ordered by query, for each query the hardest first.

    Raises:
        ValueError: If a shape is wrong, if `per_query` is below 1, if a label is unknown, or if `check_vectors` refuses
            the descriptors.

    Source:
        Gordo, Almazán, Revaud, Larlus: Deep Image Retrieval. ECCV 2016 (25 triplets per query in 5,000 images).

    Example:
        >>> pool, labels = torch.tensor([[0.0], [1.0], [1.5]]), torch.tensor([0, 0, 1])
        >>> hardest_triplets(pool, labels, margin=0.5)  # (0.5 + 1 - 0.25) / 2
        (tensor([[1, 0, 2]]), tensor([0.6250]))
    """
    n = _check_pool(descriptors, labels, per_query)
    if n == 0:
        return labels.new_zeros(0, 3), descriptors.new_zeros(0)
    short = min(per_query, n)
    take = min(per_query, short * short)
    # Distances do not change, but their rounding does: it grows with the norms.
    centred = descriptors - descriptors.mean(0)
    square = centred.square().sum(1)
    triplets, losses = [], []
    for query in torch.arange(n, device=labels.device).split(block):
        positive, negative = _positive_and_negative(centred, square, labels, query)
        far, p = positive.topk(short)
        near, q = negative.topk(short, largest=False)
        sums = 0.5 * (margin + far[:, :, None] - near[:, None, :])
        hardest, place = sums.flatten(1).topk(take)
        row, column = torch.where(hardest > 0)
        place = place[row, column]
        triplets.append(torch.stack([query[row], p[row, place // short], q[row, place % short]], dim=1))
        losses.append(hardest[row, column])
    return torch.cat(triplets), torch.cat(losses)


def semihard_triplets(
    descriptors: Tensor,
    labels: Tensor,
    *,
    margin: float,
    per_query: int = 25,
    generator: torch.Generator,
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    """Semi-hard triplets of each item of a pool, int64 (T, 3), and their losses (T,), ordered by query.

    Each query gets `per_query` positives drawn with replacement. Each positive is joined by the nearest negative that
    is farther from the query than the positive. Triplets whose negative is not within the margin are left out. A pair
    that is drawn twice is kept twice. The loss is that of `hardest_triplets`.

    Where labels are classes, not objects, the farthest positive is often an outlier and the nearest negative is
    often not a mistake. Learning from these alone pulls everything into one point.

    Args:
        descriptors: Floating point (N, D), the pool.
        labels: int64 (N,), all known (0 or more).
        margin: Margin between squared distances.
        per_query: Number of positives drawn per query, 1 or more.
        generator: Random generator of the CPU.
        block: Number of queries at a time: `block` x N distances are held in memory.

    Raises:
        ValueError: As `hardest_triplets` does.

    Source:
        Schroff, Kalenichenko, Philbin: FaceNet. CVPR 2015, section 3.2.

    Example:
        >>> pool, labels = torch.tensor([[0.0], [1.0], [1.5]]), torch.tensor([0, 0, 1])
        >>> semihard_triplets(pool, labels, margin=2.0, per_query=1, generator=torch.Generator())
        (tensor([[0, 1, 2]]), tensor([0.3750]))
    """
    n = _check_pool(descriptors, labels, per_query)
    centred = descriptors - descriptors.mean(0)
    square = centred.square().sum(1)
    order = labels.argsort(stable=True)
    ordered = labels[order].contiguous()
    low, high = torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)
    place = order.argsort()
    triplets, losses = [labels.new_zeros(0, 3)], [descriptors.new_zeros(0)]
    for query in torch.arange(n, device=labels.device).split(block):
        positive, negative = _positive_and_negative(centred, square, labels, query)
        nearest, name = negative.sort(dim=1)
        others = (high - low)[query, None] - 1
        draw = torch.rand(len(query), per_query, dtype=torch.float64, generator=generator).to(labels.device)
        other = low[query, None] + (draw * others).long().clamp(max=n - 1)
        p = order[(other + (other >= place[query, None]).long()).clamp(max=n - 1)]  # all of the class but itself
        far = positive.gather(1, p)
        next_one = torch.searchsorted(nearest, far, right=True).clamp(max=n - 1)
        near = nearest.gather(1, next_one)
        loss = 0.5 * (margin + far - near)
        row, column = torch.where((others > 0) & (near > far) & (loss > 0))
        triplets.append(torch.stack([query[row], p[row, column], name[row, next_one[row, column]]], dim=1))
        losses.append(loss[row, column])
    return torch.cat(triplets), torch.cat(losses)


def _check_pool(descriptors: Tensor, labels: Tensor, per_query: int) -> int:
    """The number of items in the pool.

    Raises:
        ValueError: If a shape is wrong, if a label is unknown, if `per_query` is below 1, or if `check_vectors` refuses
            the descriptors. A NaN is nearer to nothing and would read as well separated.
    """
    if descriptors.ndim != 2 or labels.shape != (len(descriptors),):
        raise ValueError(
            f"descriptors must be (N, D) and labels (N,), got {tuple(descriptors.shape)} and {tuple(labels.shape)}"
        )
    if per_query < 1:
        raise ValueError(f"per_query={per_query}: keep at least 1 triplet per query")
    if (labels < 0).any():
        raise ValueError("the pool holds unknown labels (below 0): mine labelled items only")
    check_vectors("the pool's descriptors", descriptors)
    return len(descriptors)


def _positive_and_negative(x: Tensor, square: Tensor, labels: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of some rows of x (N, D) to all: -inf except for positives, and inf except for negatives."""
    distance = (square[query, None] + square - 2 * x[query] @ x.T).clamp_(min=0)
    same = labels[query, None] == labels
    negative = distance.masked_fill(same, float("inf"))
    same[torch.arange(len(query), device=query.device), query] = False
    return distance.masked_fill_(~same, float("-inf")), negative


def draw_triplets(triplets: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random triplets, int64 (count, 3), drawn with replacement.

    Each draw takes a query uniformly, then one of its triplets uniformly.

    Args:
        triplets: int64 (T, 3), the triplets of each query together, as `hardest_triplets` orders them.
        count: Number of triplets to draw.
        generator: Random generator of the CPU.

    Raises:
        ValueError: If there are no triplets.

    Example:
        >>> draw_triplets(torch.tensor([[1, 0, 2]]), count=2, generator=torch.Generator())
        tensor([[1, 0, 2],
                [1, 0, 2]])
    """
    if len(triplets) == 0:
        raise ValueError(
            "there is no triplet to draw: no triplet in the pool violates the margin, or no class has two items"
        )
    _, counts = triplets[:, 0].cpu().unique_consecutive(return_counts=True)
    group = torch.randint(len(counts), (count,), generator=generator)
    member = (torch.rand(count, dtype=torch.float64, generator=generator) * counts[group]).long()
    starts = counts.cumsum(0) - counts
    return triplets[(starts[group] + member).to(triplets.device)]


@torch.no_grad()
def batch_hard(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The anchors of a batch, their farthest positives and their nearest negatives.

    The result is three tensors, int64 (A,), of positions in the batch.

    Rows without a positive or without a negative are not anchors. A row with a NaN or infinite distance stays an
    anchor, so that its loss shows the problem.

    Args:
        embeddings: Floating point (B, D).
        labels: int64 (B,).

    Source:
        Hermans, Beyer, Leibe: In Defense of the Triplet Loss for Person Re-Identification. 2017 ("batch hard").

    Example:
        >>> batch_hard(torch.tensor([[0.0], [1.0], [1.5]]), torch.tensor([0, 0, 1]))
        (tensor([0, 1]), tensor([1, 0]), tensor([2, 2]))
    """
    if len(labels) == 0:
        return labels.clone(), labels.clone(), labels.clone()
    centred = embeddings - embeddings.mean(0)
    rows = torch.arange(len(labels), device=labels.device)
    positive, negative = _positive_and_negative(centred, centred.square().sum(1), labels, rows)
    p, n = positive.argmax(1), negative.argmin(1)
    alike = (labels[:, None] == labels).sum(1)
    anchors = torch.where((alike > 1) & (alike < len(labels)))[0]
    return anchors, p[anchors], n[anchors]
