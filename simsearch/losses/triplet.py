"""Triplet losses: of mined triplets, and of the hardest ones in a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simsearch.functional.mining import batch_hard


def _check_margin(margin: float) -> None:
    if margin <= 0:
        raise ValueError(f"loss.margin={margin} must be positive: without one all embeddings may be equal")


class TripletLoss(nn.Module):
    """Mean over triplets of max(0, margin + |q - p|^2 - |q - n|^2) / 2, a scalar, from (3T, D) and labels (3T,).

    Rows are consecutive triplets q, p, n, q, p, n, ... of one query, one positive and one negative each,
    as the sampler of mined triplets gives them. The paper's descriptors are L2-normalised.

    Raises ValueError for rows whose labels are not of this form.

    Gordo, Almazán, Revaud, Larlus 2016, "Deep Image Retrieval: Learning global representations for image
    search".
    """

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__()
        _check_margin(margin)
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if len(labels) == 0 or len(labels) % 3 or not _are_triplets(labels):
            raise ValueError(
                f"a batch of {len(labels)} rows is not made of triplets query, positive, negative: use the sampler "
                "MinedTriplets with its mining callback, or loss=batch-hard, which takes any batch"
            )
        query, positive, negative = embeddings.unflatten(0, (-1, 3)).unbind(1)
        near, far = (query - positive).square().sum(1), (query - negative).square().sum(1)
        return 0.5 * (self.margin + near - far).clamp(min=0).mean()


def _are_triplets(labels: Tensor) -> bool:
    query, positive, negative = labels.unflatten(0, (-1, 3)).unbind(1)
    return bool(((query == positive) & (query != negative)).all())


class BatchHardTripletLoss(nn.Module):
    """Mean over anchors of max(0, margin + max |a - p| - min |a - n|), a scalar, from (B, D) and labels (B,).

    Each row is an anchor with the farthest row of its class and the nearest row of another; rows that lack
    either are left out, and a batch without any costs 0. Distances are Euclidean, not squared.

    Hermans, Beyer, Leibe 2017, "In Defense of the Triplet Loss for Person Re-Identification" ("batch hard").
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        _check_margin(margin)
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        anchors, positives, negatives = batch_hard(embeddings, labels)
        if len(anchors) == 0:
            return 0.0 * embeddings.sum()
        far = torch.linalg.vector_norm(embeddings[anchors] - embeddings[positives], dim=1)
        near = torch.linalg.vector_norm(embeddings[anchors] - embeddings[negatives], dim=1)
        return (self.margin + far - near).clamp(min=0).mean()
