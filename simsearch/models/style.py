"""How a network's layers respond on the whole image, without where: the statistics that tell style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from simsearch.functional.style_statistics import gram, moments, signed_root_unit

Statistics = Literal["moments", "gram"]


class LayerStatistics(nn.Module):
    """Statistics of a timm network's stages as a map float32 (B, S, 1, 1) of images (B, 3, H, W) of any sides.

    statistics: "moments", each channel's mean and standard deviation over places (Huang and Belongie 2017), 2 C
    numbers a stage; "gram", the inner products of all pairs of channels, averaged over places (Gatys, Ecker,
    Bethge 2016), C (C + 1) / 2 numbers, for shallow stages, which have few channels. Of each stage the signed
    square roots, L2-normalised, so that none dominates; the whole has norm 1. stages: as timm numbers what
    `forward_intermediates` gives, 0 the shallowest; one more is the final map.

    Raises ValueError for a network without intermediate maps, an unknown statistic and stages that there aren't.
    """

    def __init__(self, model: nn.Module, statistics: Statistics, stages: Sequence[int]) -> None:
        super().__init__()
        if statistics not in ("moments", "gram"):
            raise ValueError(f"backbone.statistics must be moments or gram, got {statistics!r}")
        if not hasattr(model, "forward_intermediates"):
            raise ValueError("backbone.statistics: this network does not give its intermediate maps; choose another")
        self.final = len(model.feature_info)  # type: ignore[arg-type]
        wrong = [stage for stage in stages if not 0 <= stage <= self.final]
        if wrong or not stages or len(set(stages)) < len(stages):
            raise ValueError(
                f"backbone.stages={list(stages)}: name each of 0..{self.final} (the final map) at most once, and one "
                "at least"
            )
        self.model, self.statistics, self.stages = model, statistics, tuple(sorted(stages))

    def forward(self, pixels: Tensor) -> Tensor:
        inner = [stage for stage in self.stages if stage < self.final]
        last, maps = self.model.forward_intermediates(pixels, indices=inner or [0])  # type: ignore[operator]
        maps = maps[: len(inner)]
        if self.final in self.stages:
            maps.append(last.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "") == "NHWC" else last)
        measure = moments if self.statistics == "moments" else gram
        blocks = [signed_root_unit(measure(features)) for features in maps]
        return torch.cat(blocks, dim=1)[:, :, None, None] / len(blocks) ** 0.5
