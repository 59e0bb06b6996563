"""Binary codes on any backbone: pooled features and one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from simsearch.functional.resize import Fit
from simsearch.models.backbones import Backbone


class HashNetwork(nn.Module):
    """Real-valued codes (B, bits) of images (B, 3, H, W): backbone, pooling, linear layer.

    pooling: feature maps to region vectors, whose mean is taken. hidden: width of a layer with ReLU
    between, or None for none.
    """

    def __init__(self, backbone: Backbone, pooling: nn.Module, bits: int, hidden: int | None = None) -> None:
        super().__init__()
        if bits < 1:
            raise ValueError(f"model.network.bits={bits}: a code needs at least 1 bit")
        self.backbone, self.pooling = backbone, pooling
        self.bits = self.dimension = bits
        if hidden is not None and hidden < 1:
            raise ValueError(f"model.network.hidden={hidden}: give a width, or null for no hidden layer")
        self.hidden = (
            nn.Identity() if hidden is None else nn.Sequential(nn.Linear(backbone.channels, hidden), nn.ReLU())
        )
        self.head = nn.Linear(hidden or backbone.channels, bits)

    @property
    def input_size(self) -> int:
        """Side in pixels (by `fit`) to which files are best decoded."""
        return self.backbone.size

    @property
    def fit(self) -> Fit:
        """What of an image is seen: its centre square, or the whole at its longest side."""
        return self.backbone.fit

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights that training started from."""
        return self.backbone.provenance

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        self.backbone.provenance = facts

    def prepare(self, images: Tensor) -> None:
        """Lets the backbone take from the training images uint8 (N, 3, H, W) what it computes."""
        self.backbone.prepare(images)

    def pool(self, maps: Tensor) -> Tensor:
        """Region vectors (B, R, C) of the backbone's maps (B, C, h, w)."""
        return self.pooling(maps)

    def describe(self, regions: Tensor) -> Tensor:
        """Real-valued codes (B, bits) of region vectors (B, R, C)."""
        return self.head(self.hidden(regions.mean(1)))

    def forward(self, image: Tensor) -> Tensor:
        return self.describe(self.pool(self.backbone(image)))

    embed = forward

    def identity(self) -> dict[str, object]:
        """What decides the codes besides the tensors, as plain values."""
        return {
            "family": "hashing",
            "backbone": self.backbone.identity(),
            "pooling": repr(self.pooling),
            "hidden": repr(self.hidden),
            "bits": self.bits,
        }
