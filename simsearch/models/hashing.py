"""Binary codes on any backbone: pooled features and one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from simsearch.functional.ragged import Ragged
from simsearch.models.backbones import Backbone, OnBackbone


class HashNetwork(OnBackbone, nn.Module):
    """Real-valued codes (B, bits) of images (B, 3, H, W): backbone, pooling, linear layer.

    Args:
        backbone: The network below.
        pooling: Maps features (B, C, h, w) to region vectors, which are averaged.
        bits: Width of the codes, from 1.
        hidden: Width of a layer with ReLU before the last one, None for no such layer.

    Raises:
        ValueError: If `bits` or `hidden` is below 1.
    """

    def __init__(self, backbone: Backbone, pooling: nn.Module, bits: int, hidden: int | None = None) -> None:
        super().__init__()
        if bits < 1:
            raise ValueError(f"model.network.bits={bits}: a code needs at least 1 bit")
        self.backbone, self.pooling = backbone, pooling
        self.bits = self.dimension = bits
        self.sizes = [backbone.size]
        if hidden is not None and hidden < 1:
            raise ValueError(f"model.network.hidden={hidden}: give a width, or null for no hidden layer")
        self.hidden = (
            nn.Identity() if hidden is None else nn.Sequential(nn.Linear(backbone.channels, hidden), nn.ReLU())
        )
        self.head = nn.Linear(hidden or backbone.channels, bits)

    def prepare(self, images: Tensor | Ragged) -> None:
        """Lets the backbone compute statistics of training images, if it needs any.

        Args:
            images: Training images uint8 (N, 3, H, W), or Ragged.
        """
        self.backbone.prepare(images)

    def pool(self, maps: Tensor) -> Tensor:
        """Region vectors (B, R, C).

        Args:
            maps: Feature maps of the backbone (B, C, h, w).
        """
        return self.pooling(maps)

    def describe(self, regions: Tensor) -> Tensor:
        """Real-valued codes (B, bits).

        Args:
            regions: Region vectors (B, R, C).
        """
        return self.head(self.hidden(regions.mean(1)))

    def forward(self, image: Tensor) -> Tensor:
        """Real-valued codes (B, bits).

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        return self.describe(self.pool(self.backbone(image)))

    embed = forward

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the codes, as plain values."""
        return {
            "family": "hashing",
            "backbone": self.backbone.identity(),
            "pooling": repr(self.pooling),
            "hidden": repr(self.hidden),
            "bits": self.bits,
        }
