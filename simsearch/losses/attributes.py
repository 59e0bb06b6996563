"""A loss over several attributes: each attribute has its own loss on the same embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class MultiAttribute(nn.Module):
    """The weighted sum of one loss per attribute.

    The labels have one column per attribute. Rows whose label of an attribute is unknown (below 0) are left out of that
    attribute's term. A term without rows is 0.

    Args:
        losses: The loss of each attribute, by the attribute's name in the data. Their order is the order of the label
            columns; TrainedRetriever reads it from `attributes` and asks the DataModule for these columns.
        weights: The weight of each attribute, 0 or more, with the same names as `losses`. None gives each weight 1.

    Raises:
        ValueError: If `losses` is empty, if `weights` has other names than `losses`, or if a weight is negative.

    Example:
        >>> import torch
        >>> from simsearch.losses.triplet import BatchHardTripletLoss
        >>> loss = MultiAttribute({"artist": BatchHardTripletLoss(2.0), "style": BatchHardTripletLoss(2.0)})
        >>> labels = torch.tensor([[0, -1], [0, -1], [1, -1]])  # all styles are unknown
        >>> loss(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), labels)
        tensor(0.5000)
    """

    def __init__(self, losses: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("loss.losses is empty: give a loss for each attribute, such as artist")
        weights = dict.fromkeys(losses, 1.0) if weights is None else weights
        if set(weights) != set(losses):
            raise ValueError(
                f"loss.weights names {', '.join(weights)}, loss.losses {', '.join(losses)}: give each a weight"
            )
        if bad := [name for name, weight in weights.items() if weight < 0]:
            raise ValueError(f"loss.weights.{bad[0]}={weights[bad[0]]} must not be negative")
        self.attributes = tuple(losses)
        self.weights = tuple(float(weights[name]) for name in losses)
        # By place, as a column may have any name, which a module's may not.
        self.losses = nn.ModuleList(losses.values())

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            embeddings: Floating point (B, D).
            labels: int64 (B, A), one column per attribute, -1 where unknown.

        Raises:
            ValueError: If `labels` does not have one column per attribute.
        """
        if labels.ndim != 2 or labels.shape[1] != len(self.losses):
            raise ValueError(
                f"labels of {', '.join(self.attributes)} must be (B, {len(self.losses)}), got {tuple(labels.shape)}"
            )
        total = 0.0 * embeddings.sum()
        for parameter in self.parameters():  # ranks wait for the gradients of all, also where a batch knows no value
            total = total + 0.0 * parameter.sum()
        for loss, weight, column in zip(self.losses, self.weights, labels.unbind(1), strict=True):
            known = column >= 0
            if weight and known.any():
                total = total + weight * loss(embeddings[known], column[known])
        return total
