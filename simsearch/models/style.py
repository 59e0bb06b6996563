"""Style: statistics of a network's layers over the whole image, without places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from simsearch.functional.style_statistics import gram, moments, signed_root_unit

Statistics = Literal["moments", "gram"]


class LayerStatistics(nn.Module):
    """Statistics of a timm network's stages, as a map float32 (B, S, 1, 1) of norm 1.

    Each stage gives signed square roots of its statistics, L2-normalised, so that no stage dominates.

    Args:
        model: A timm network with intermediate maps.
        statistics: "moments" or "gram". "moments" are the mean and standard deviation of each channel over positions, 2
            C numbers a stage. "gram" are the inner products of all pairs of channels, averaged over positions, C (C +
            1) / 2 numbers a stage; it suits shallow stages, which have few channels.
        stages: Numbers of the stages as in timm's `forward_intermediates`, 0 for the shallowest. The number after the
            last stage is the final map.

    Raises:
        ValueError: If the network has no intermediate maps, the statistic is unknown, or there is no such stage.

    Source:
        Moments: Huang, Belongie: Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization. ICCV 2017.
        Gram matrices: Gatys, Ecker, Bethge: Image Style Transfer Using Convolutional Neural Networks. CVPR 2016.
    """

    def __init__(self, model: nn.Module, statistics: Statistics, stages: Sequence[int]) -> None:
        super().__init__()
        if statistics not in ("moments", "gram"):
            raise ValueError(f"backbone.statistics must be moments or gram, got {statistics!r}")
        if not hasattr(model, "forward_intermediates"):
            raise ValueError("backbone.statistics: this network does not return its intermediate maps: choose another")
        self.final = len(model.feature_info)  # type: ignore[arg-type]
        wrong = [stage for stage in stages if not 0 <= stage <= self.final]
        if wrong or not stages or len(set(stages)) < len(stages):
            raise ValueError(
                f"backbone.stages={list(stages)}: name each of 0..{self.final} (the final map) at most once, and at "
                "least one"
            )
        self.model, self.statistics, self.stages = model, statistics, tuple(sorted(stages))

    def forward(self, pixels: Tensor) -> Tensor:
        """The statistics, float32 (B, S, 1, 1).

        Args:
            pixels: Normalised images float32 (B, 3, H, W) of any sides.
        """
        inner = [stage for stage in self.stages if stage < self.final]
        last, maps = self.model.forward_intermediates(pixels, indices=inner or [0])  # type: ignore[operator]
        maps = maps[: len(inner)]
        if self.final in self.stages:
            maps.append(last.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "") == "NHWC" else last)
        measure = moments if self.statistics == "moments" else gram
        blocks = [signed_root_unit(measure(features)) for features in maps]
        return torch.cat(blocks, dim=1)[:, :, None, None] / len(blocks) ** 0.5
