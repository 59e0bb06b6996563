"""One objective of several attributes: each has a loss of its own on the same embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class MultiAttribute(nn.Module):
    """The weighted sum of losses, one an attribute, a scalar, from embeddings (B, D) and labels (B, A).

    losses: by attribute (column names of the data), in the order of the labels' columns; TrainedRetriever asks the
    DataModule for these by `attributes`. weights: of the same attributes, 0 or more; 1 each where None. Rows whose
    label of an attribute is unknown (below 0) are left out of its term; a term without rows is 0.
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
        if labels.ndim != 2 or labels.shape[1] != len(self.losses):
            raise ValueError(
                f"labels of {', '.join(self.attributes)} must be (B, {len(self.losses)}), got {tuple(labels.shape)}"
            )
        total = 0.0 * embeddings.sum()
        for loss, weight, column in zip(self.losses, self.weights, labels.unbind(1), strict=True):
            known = column >= 0
            if weight and known.any():
                total = total + weight * loss(embeddings[known], column[known])
        return total
