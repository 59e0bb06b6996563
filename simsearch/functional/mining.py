"""Which triplets to learn from: the hardest or the semi-hard of a pool, the hardest of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from simsearch.types import check_vectors


def hardest_triplets(
    descriptors: Tensor, labels: Tensor, *, margin: float, per_query: int = 25, block: int = 256
) -> tuple[Tensor, Tensor]:
    """The hardest triplets of each item of a pool, int64 (T, 3), and their losses (T,), by query, hardest first.

    descriptors: float (N, D). labels: int64 (N,). A triplet is (query, positive, negative), positions in
    the pool; its loss is max(0, margin + |q - p|^2 - |q - n|^2) / 2, and up to `per_query` of each query
    whose loss is above 0 are returned, the largest among all triplets of the pool. Queries that have
    none (no positive, no negative, or nothing within the margin) are left out; T may be 0. No more than
    `block` x N distances are held at a time.

    The k largest sums of two sorted lists lie among the first k of each, so k farthest positives and k
    nearest negatives are enough.

    Raises ValueError for wrong shapes, per_query < 1, negative (unknown) labels, and as `check_vectors` does.

    Gordo, Almazán, Revaud, Larlus 2016, "Deep Image Retrieval" (25 a query in 5,000 images).
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
    """Semi-hard triplets of each item of a pool, int64 (T, 3), and their losses (T,), by query.

    descriptors, labels, margin, block and the loss: as hardest_triplets has them. A query gets `per_query`
    positives drawn with replacement, each with the nearest negative that is farther away than it; pairs whose
    negative is not within the margin are left out, and a pair drawn twice stays twice. generator: of the CPU.

    Where labels are classes, not objects, the farthest positive is often an outlier and the nearest
    negative no mistake at all: learning from these alone pulls everything into one point.

    Raises ValueError as hardest_triplets does.

    Schroff, Kalenichenko, Philbin 2015, "FaceNet", section 3.2.
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
    """The pool's number of items. Raises ValueError for wrong shapes, unknown labels, per_query < 1, and vectors that
    `check_vectors` refuses: a NaN is nearer to nothing, so that it would read as well separated.
    """
    if descriptors.ndim != 2 or labels.shape != (len(descriptors),):
        raise ValueError(
            f"descriptors must be (N, D) and labels (N,), got {tuple(descriptors.shape)} and {tuple(labels.shape)}"
        )
    if per_query < 1:
        raise ValueError(f"per_query={per_query}: keep 1 triplet a query or more")
    if (labels < 0).any():
        raise ValueError("the pool holds unknown labels (below 0): mine labelled items only")
    check_vectors("the pool's descriptors", descriptors)
    return len(descriptors)


def _positive_and_negative(x: Tensor, square: Tensor, labels: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of some rows of x (N, D) to all: -inf but for positives, and inf but for negatives."""
    distance = (square[query, None] + square - 2 * x[query] @ x.T).clamp_(min=0)
    same = labels[query, None] == labels
    negative = distance.masked_fill(same, float("inf"))
    same[torch.arange(len(query), device=query.device), query] = False
    return distance.masked_fill_(~same, float("-inf")), negative


def draw_triplets(triplets: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` triplets, int64 (count, 3): a query drawn uniformly, then one of its triplets, with replacement.

    triplets: int64 (T, 3), those of a query together, as hardest_triplets gives them. generator: of the CPU.

    Raises ValueError where there is none to draw.
    """
    if len(triplets) == 0:
        raise ValueError("there is no triplet to draw: none in the pool violates the margin, or no class has two items")
    _, counts = triplets[:, 0].cpu().unique_consecutive(return_counts=True)
    group = torch.randint(len(counts), (count,), generator=generator)
    member = (torch.rand(count, dtype=torch.float64, generator=generator) * counts[group]).long()
    starts = counts.cumsum(0) - counts
    return triplets[(starts[group] + member).to(triplets.device)]


@torch.no_grad()
def batch_hard(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors with their farthest positive and nearest negative, three times int64 (A,), positions in the batch.

    embeddings: float (B, D). labels: int64 (B,). Rows without a positive or a negative are no anchors. Where a distance
    is NaN or infinite the row stays an anchor: its loss shall say so.

    Hermans, Beyer, Leibe 2017, "In Defense of the Triplet Loss for Person Re-Identification" ("batch hard").
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
