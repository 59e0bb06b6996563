"""Binary codes on any backbone: pooled features and one linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simsearch.models.backbones import Backbone


class HashNetwork(nn.Module):
    """Real-valued codes (B, bits) of images (B, 3, H, W): backbone, pooling, linear layer.

    pooling: feature maps to region vectors, whose mean is taken.
    """

    def __init__(self, backbone: Backbone, pooling: nn.Module, bits: int) -> None:
        super().__init__()
        if bits < 1:
            raise ValueError(f"model.network.bits={bits}: a code needs at least 1 bit")
        self.backbone, self.pooling = backbone, pooling
        self.bits = self.dimension = bits
        self.head = nn.Linear(backbone.channels, bits)

    @property
    def input_size(self) -> int:
        """Side in pixels to which files are best decoded."""
        return self.backbone.size

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights that training started from."""
        return self.backbone.provenance

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        self.backbone.provenance = facts

    def prepare(self, images: Tensor) -> None:
        """Nothing is taken from the training images before training."""

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.pooling(self.backbone(image)).mean(1))

    embed = forward

    def identity(self) -> dict[str, object]:
        """What decides the codes besides the tensors, as plain values."""
        return {
            "family": "hashing",
            "backbone": self.backbone.identity(),
            "pooling": repr(self.pooling),
            "bits": self.bits,
        }
