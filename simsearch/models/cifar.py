"""A small network for images of 32 pixels that learns from nothing in minutes (after Jordan 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.models.backbones import Backbone


class WhitenedPatches(nn.Module):
    """Patches of 2 x 2 pixels in their principal components, whitened, once with each sign: (B, 24, H - 1, W - 1).

    Not learnt: `prepare` takes the components from training images.
    """

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(24, 3, 2, 2))
        nn.init.orthogonal_(self.weight[:12])
        self.weight[12:] = -self.weight[:12]

    def prepare(self, pixels: Tensor, shrinkage: float = 5e-4) -> None:
        """Takes the components of normalised images (N, 3, H, W); shrinkage is added to their variances."""
        patches = F.unfold(pixels, 2).transpose(1, 2).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        white = (vectors / (values + shrinkage).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        self.weight.copy_(torch.cat([white, -white]))

    def forward(self, pixels: Tensor) -> Tensor:
        return F.conv2d(pixels, self.weight)


class CIFARNetwork(nn.Module):
    """Maps (B, 4 width, 3, 3) of normalised images (B, 3, 32, 32).

    Whitened patches, then three groups of two 3 x 3 convolutions with batch normalisation and GELU, each
    group halving the side after its first. Convolutions start as the identity on their first channels.

    Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = WhitenedPatches()
        layers: list[nn.Module] = []
        channels = 24
        for out in (width, 4 * width, 4 * width):
            layers += [_convolution(channels, out), nn.MaxPool2d(2), _Norm(out), nn.GELU()]
            layers += [_convolution(out, out), _Norm(out), nn.GELU()]
            channels = out
        self.layers = nn.Sequential(*layers)

    def prepare(self, pixels: Tensor) -> None:
        """Takes the patches' components from normalised training images (N, 3, H, W)."""
        self.patches.prepare(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(F.gelu(self.patches(pixels)))


class _Norm(nn.BatchNorm2d):
    """Batch normalisation without a learnt scale, its statistics those of the last few batches."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


def _convolution(channels: int, out: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight[:channels])
    return layer


def cifar_backbone(width: int = 64, size: int = 32, weights: str = "random") -> Backbone:
    """The network with 4 `width` channels, made for images of 32 pixels, on random weights.

    Raises ValueError for a width below 24 or other weights.
    """
    if width < 24:
        raise ValueError(f"backbone.width={width}: the first group takes 24 channels, use 24 or more")
    if weights != "random":
        raise ValueError(f"backbone.weights={weights}: this network has none to load; train it from random ones")
    network = CIFARNetwork(width)
    return Backbone(
        network,
        name=f"cifar/{width}",
        size=size,
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
        provenance={"weights": weights, "source": weights, "library": "simsearch"},
        runtime="torch",
    )
