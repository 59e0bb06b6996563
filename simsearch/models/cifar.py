"""A small network for images of 32 pixels that trains from random weights in minutes (after Jordan 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.models.backbones import Backbone


class WhitenedPatches(nn.Module):
    """Whitened principal components of patches of 2 x 2 pixels, each with both signs: (B, 24, H - 1, W - 1).

    The components are not learnt: `prepare` computes them from training images.
    """

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(24, 3, 2, 2))
        nn.init.orthogonal_(self.weight[:12])
        self.weight[12:] = -self.weight[:12]

    def prepare(self, pixels: Tensor, shrinkage: float = 5e-4) -> None:
        """Computes the components from training images.

        Args:
            pixels: Normalised images float32 (N, 3, H, W).
            shrinkage: Constant added to the variances.
        """
        patches = F.unfold(pixels, 2).transpose(1, 2).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        white = (vectors / (values + shrinkage).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        self.weight.copy_(torch.cat([white, -white]))

    def forward(self, pixels: Tensor) -> Tensor:
        """The whitened components, float32 (B, 24, H - 1, W - 1).

        Args:
            pixels: Normalised images float32 (B, 3, H, W).
        """
        return F.conv2d(pixels, self.weight)


class CIFARNetwork(nn.Module):
    """A convolutional network for normalised images (B, 3, 32, 32), with maps (B, C, 3, 3).

    Whitened patches are followed by three groups of two or three 3 x 3 convolutions with batch normalisation and GELU.
    Each group halves the side after its first convolution. The third convolution closes a residual around it and the
    second. Convolutions start as the identity on their first channels.

    Args:
        widths: Channels of the three groups. The last number is C.
        convolutions: Convolutions of each group, 2 or 3.

    Raises:
        ValueError: If a group is narrower than the one before it or than 24 channels, or `convolutions` is neither.

    Source:
        Jordan: 94% on CIFAR-10 in 3.29 Seconds on a Single GPU. 2024, section 3, with its code for three
        convolutions.
    """

    def __init__(self, widths: Sequence[int], convolutions: int = 2) -> None:
        super().__init__()
        if len(widths) != 3 or list(widths) != sorted(widths) or widths[0] < 24:
            raise ValueError(
                f"backbone.width={list(widths)}: give three numbers of channels from 24, none below the one before it"
            )
        if convolutions not in (2, 3):
            raise ValueError(f"backbone.convolutions={convolutions}: a group has 2 or 3")
        self.patches = WhitenedPatches()
        layers: list[nn.Module] = []
        channels = 24
        for out in widths:
            layers += [_convolution(channels, out), nn.MaxPool2d(2), _Norm(out), nn.GELU()]
            layers += [_convolution(out, out), _Norm(out), nn.GELU()] if convolutions == 2 else [_Residual(out)]
            channels = out
        self.layers = nn.Sequential(*layers)

    def prepare(self, pixels: Tensor) -> None:
        """Computes the components of the patches from training images.

        Args:
            pixels: Normalised images float32 (N, 3, H, W).
        """
        self.patches.prepare(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Feature maps float32 (B, C, 3, 3).

        Args:
            pixels: Normalised images float32 (B, 3, 32, 32).
        """
        return self.layers(F.gelu(self.patches(pixels)))


class _Norm(nn.BatchNorm2d):
    """Batch normalisation without a learnt scale. Its running statistics follow the last few batches."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


class _Residual(nn.Module):
    """Two convolutions with a path around both: GELU(x + norm(conv(GELU(norm(conv(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(channels, channels),
            _Norm(channels),
            nn.GELU(),
            _convolution(channels, channels),
            _Norm(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return F.gelu(maps + self.layers(maps))


def _convolution(channels: int, out: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight[:channels])
    return layer


def cifar_backbone(
    width: int | Sequence[int] = 64, size: int = 32, weights: str = "random", convolutions: int = 2
) -> Backbone:
    """CIFARNetwork as a Backbone with random weights.

    Args:
        width: Channels of the first group, from 24, where the other two have four times as many; or channels of each of
            the three groups.
        size: Image size in pixels. The network is made for 32.
        weights: "random", the only choice.
        convolutions: Convolutions of each group, 2, or 3 with a residual.

    Raises:
        ValueError: If `width` or `convolutions` is out of range, or `weights` is not "random".
    """
    if isinstance(width, int) and width < 24:
        raise ValueError(f"backbone.width={width}: the first group has 24 channels, so use 24 or more")
    if weights != "random":
        raise ValueError(
            f"backbone.weights={weights}: this network has no pretrained weights; train it from random ones"
        )
    widths = (width, 4 * width, 4 * width) if isinstance(width, int) else tuple(width)
    network = CIFARNetwork(widths, convolutions)
    form = str(width) if isinstance(width, int) else "-".join(map(str, widths))
    return Backbone(
        network,
        name=f"cifar/{form}" if convolutions == 2 else f"cifar/{form}/{convolutions}",
        size=size,
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
        provenance={"weights": weights, "source": weights, "library": "simsearch"},
        runtime="torch",
    )
