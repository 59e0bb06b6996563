"""The views of an image whose features are averaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Views = Literal["one", "mirror", "mirror-shift"]


def weighted_views(image: Tensor, views: Views) -> Iterator[tuple[float, Tensor]]:
    """The forms in which an image is described, with weights that sum to 1.

    "mirror" adds the mirrored image. "mirror-shift" adds both, moved by one pixel down and right and up and left with
    reflected borders; these four have half of the weight together.

    Args:
        image: (B, C, H, W).
        views: Which views.

    Source:
        Jordan: 94% on CIFAR-10 in 3.29 Seconds on a Single GPU. 2024, section 3.5.

    Example:
        >>> import torch
        >>> [(weight, view.tolist()) for weight, view in weighted_views(torch.tensor([[[[1, 2]]]]), "mirror")]
        [(0.5, [[[[1, 2]]]]), (0.5, [[[[2, 1]]]])]
    """
    shifted = []
    if views == "mirror-shift":
        height, width = image.shape[-2:]
        padded = F.pad(image, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[..., start : start + height, start : start + width] for start in (0, 2)]
    for weight, view in ((0.5 if shifted else 1.0, image), *((0.25, view) for view in shifted)):
        if views == "one":
            yield weight, view
        else:
            yield from ((weight / 2, view), (weight / 2, view.flip(-1)))
