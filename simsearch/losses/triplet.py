"""Triplet losses: over mined triplets, and over the hardest triplet of each image in a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simsearch.functional.mining import batch_hard


def _check_margin(margin: float) -> None:
    if margin <= 0:
        raise ValueError(f"loss.margin={margin} must be positive: without one all embeddings may be equal")


class TripletLoss(nn.Module):
    """The mean over triplets of max(0, margin + |q - p|^2 - |q - n|^2) / 2.

    The rows of a batch are consecutive triplets q, p, n, q, p, n, ... of a query, a positive and a negative, as the
    sampler MinedTriplets orders them. The descriptors of the paper are L2-normalised.

    Args:
        margin: Margin between squared distances, above 0.

    Raises:
        ValueError: If `margin` is not positive.

    Source:
        Gordo, Almazán, Revaud, Larlus: Deep Image Retrieval: Learning global representations for image search. ECCV
        2016.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> TripletLoss(margin=0.1)(rows, torch.tensor([5, 5, 7]))  # (0.1 + 1 - 1) / 2
        tensor(0.0500)
    """

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__()
        _check_margin(margin)
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (3T, D), T triplets.
            labels: int64 (3T,).

        Raises:
            ValueError: If the labels are not those of consecutive triplets.
        """
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
    """The mean over anchors of max(0, margin + max |a - p| - min |a - n|).

    Each row is an anchor a. Its positive is the farthest row of its class, its negative the nearest row of another
    class. Rows that lack either are left out. A batch without anchors costs 0. Distances are Euclidean, not squared.

    Args:
        margin: Margin between distances, above 0.

    Raises:
        ValueError: If `margin` is not positive.

    Source:
        Hermans, Beyer, Leibe: In Defense of the Triplet Loss for Person Re-Identification. 2017 ("batch hard").

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
        >>> BatchHardTripletLoss(margin=2.0)(rows, torch.tensor([0, 0, 1]))  # the mean of 2 + 1 - 3 and 2 + 1 - 2
        tensor(0.5000)
    """

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        _check_margin(margin)
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (B, D).
            labels: int64 (B,).
        """
        anchors, positives, negatives = batch_hard(embeddings, labels)
        if len(anchors) == 0:
            return 0.0 * embeddings.sum()
        far = torch.linalg.vector_norm(embeddings[anchors] - embeddings[positives], dim=1)
        near = torch.linalg.vector_norm(embeddings[anchors] - embeddings[negatives], dim=1)
        return (self.margin + far - near).clamp(min=0).mean()
