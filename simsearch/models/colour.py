"""Colour and composition: histograms of colour on grids over the image, without any learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simsearch.functional.colour import colour_shares, hellinger_pyramid, lab
from simsearch.functional.resize import Fit
from simsearch.models.backbones import Backbone


class ColourLayout(nn.Module):
    """Soft CIELAB histograms on a pyramid of grids, as a map float32 (B, S, 1, 1) of norm 1.

    The inner product of two maps is the mean Bhattacharyya coefficient of their cells (simsearch.functional.colour).

    Args:
        levels: Cells along each side of the grids. A grid of 1 describes only colours, a grid of 3 also their places.

    Raises:
        ValueError: If `levels` is empty or holds a number below 1.
    """

    lightness, chroma, hues = (12.5, 37.5, 62.5, 87.5), (20.0, 50.0), 8

    def __init__(self, levels: Sequence[int] = (1, 3)) -> None:
        super().__init__()
        if not levels or min(levels) < 1:
            raise ValueError(f"backbone.levels={list(levels)}: give the sides of the grids, each 1 or more")
        self.levels = tuple(levels)

    def forward(self, pixels: Tensor) -> Tensor:
        """The histograms, float32 (B, S, 1, 1).

        Args:
            pixels: sRGB images float32 (B, 3, H, W) in 0..1.
        """
        shares = colour_shares(lab(pixels.clamp(0, 1)), self.lightness, self.chroma, self.hues)
        return hellinger_pyramid(shares, self.levels)[:, :, None, None]


def colour_backbone(size: int = 64, levels: Sequence[int] = (1, 3), fit: Fit = "square") -> Backbone:
    """ColourLayout as a Backbone, to be followed by average pooling.

    Args:
        size: Image size in pixels.
        levels: As in ColourLayout.
        fit: As in Backbone.

    Raises:
        ValueError: As ColourLayout and Backbone do.
    """
    network = ColourLayout(levels)
    return Backbone(
        network,
        name=f"colour-lab/{'-'.join(map(str, network.levels))}",
        size=size,
        mean=(0.0, 0.0, 0.0),
        std=(255.0, 255.0, 255.0),
        provenance={"weights": "none", "source": "CIELAB histograms", "library": f"torch {torch.__version__}"},
        runtime="torch",
        fit=fit,
    )
