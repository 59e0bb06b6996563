"""Binary codes on any backbone: pooled features and one linear layer, perhaps beside bits that are not learnt."""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.functional.ragged import Ragged
from simsearch.functional.resize import resize_to_fit
from simsearch.functional.views import Views, weighted_views
from simsearch.models.backbones import Backbone, OnBackbone
from simsearch.models.feature_cache import beside
from simsearch.models.frozen import Binarizer

SAMPLE = 10_000  # training images that fit a binarizer, at most


class PooledBackbone(OnBackbone, nn.Module):
    """Mean region vectors (B, 1, C) of images (B, 3, H, W) by a frozen backbone.

    Args:
        backbone: The backbone. Its tensors are frozen.
        pooling: Maps features (B, C, h, w) to region vectors, which are averaged.
    """

    def __init__(self, backbone: Backbone, pooling: nn.Module) -> None:
        super().__init__()
        self.backbone, self.pooling, self.sizes = backbone.requires_grad_(False), pooling, [backbone.size]

    def pool(self, maps: Tensor) -> Tensor:
        """Mean region vectors (B, 1, C).

        Args:
            maps: Feature maps of the backbone (B, C, h, w).
        """
        return self.pooling(maps).mean(1, keepdim=True)

    def regions(self, image: Tensor) -> Tensor:
        """Mean region vectors (B, 1, C).

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        return self.pool(self.backbone(image))

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the region vectors, as plain values."""
        return {"family": "pooled", "backbone": self.backbone.identity(), "pooling": repr(self.pooling)}


class HashNetwork(OnBackbone, nn.Module):
    """Real-valued codes (B, bits) of images (B, 3, H, W): backbone, pooling, linear layer.

    Args:
        backbone: The network below.
        pooling: Maps features (B, C, h, w) to region vectors, which are averaged.
        bits: Width of the codes, from 1.
        hidden: Width of a layer with ReLU before the last one, None for no such layer.
        views: Views of an image whose pooled features `embed` averages: "one", "mirror" (two), or "mirror-shift" (six),
            as `weighted_views` says. A backbone that learns sees one in training.
        binarizer: Its bits follow the learnt ones. It is fitted to the pooled features of at most 10,000 training
            images, drawn by a fixed seed. None for no such bits.
        second: A second backbone, whose pooled features the binarizer takes. None if it takes those of `backbone`.

    Attributes:
        bits: b, the width of the whole code.
        learnt: Number of learnt bits, which come first.

    Raises:
        ValueError: If `bits` or `hidden` is below 1, `views` is unknown, the binarizer has more bits than its backbone
            has channels, or a second backbone has no binarizer or sees another part of an image than the first.
    """

    code_weight: Tensor
    code_bias: Tensor

    def __init__(
        self,
        backbone: Backbone,
        pooling: nn.Module,
        bits: int,
        hidden: int | None = None,
        views: Views = "one",
        binarizer: Binarizer | None = None,
        second: PooledBackbone | None = None,
    ) -> None:
        super().__init__()
        if bits < 1:
            raise ValueError(f"model.network.bits={bits}: a code needs at least 1 bit")
        if views not in get_args(Views):
            raise ValueError(f"model.network.views={views!r}: use {', '.join(get_args(Views))}")
        self.backbone, self.pooling, self.views = backbone, pooling, views
        self.learnt, self.binarizer = bits, binarizer
        self.bits = self.dimension = bits + (0 if binarizer is None else binarizer.bits)
        self.sizes = [backbone.size] if second is None else [backbone.size, second.backbone.size]
        if hidden is not None and hidden < 1:
            raise ValueError(f"model.network.hidden={hidden}: give a width, or null for no hidden layer")
        self.hidden = (
            nn.Identity() if hidden is None else nn.Sequential(nn.Linear(backbone.channels, hidden), nn.ReLU())
        )
        self.head = nn.Linear(hidden or backbone.channels, bits)
        self.second = second
        if second is not None and binarizer is None:
            raise ValueError("model.network.second is a backbone for a binarizer: set model.network.binarizer too")
        if second is not None and second.fit != self.fit:
            raise ValueError(
                f"model.network.second.backbone.fit={second.fit} sees another part of an image than "
                f"backbone.fit={self.fit}: use one for both"
            )
        if second is not None and hasattr(second.backbone.network, "prepare"):
            raise ValueError(
                f"model.network.second.backbone={second.backbone.name} has random weights that nothing trains: name a "
                "pretrained one"
            )
        if binarizer is not None:
            channels = self._binarized.channels
            if binarizer.bits > channels:
                raise ValueError(
                    f"model.network.binarizer.bits={binarizer.bits}: the backbone has {channels} channels, so use at "
                    "most as many"
                )
            self.register_buffer("code_weight", torch.zeros(binarizer.bits, channels))
            self.register_buffer("code_bias", torch.zeros(binarizer.bits))

    @property
    def _binarized(self) -> Backbone:
        """The backbone whose features the binarizer takes."""
        return self.backbone if self.second is None else self.second.backbone

    def prepare(self, images: Tensor | Ragged, rows: Tensor) -> None:
        """Lets the backbone compute statistics of training images, if it needs any.

        Args:
            images: All images uint8 (N, 3, H, W), or Ragged.
            rows: Rows of the training images, int64 (T,).

        Raises:
            ValueError: If there is a binarizer, whose features would change while the backbone learns.
        """
        if self.binarizer is not None:
            raise ValueError(
                "model.network.binarizer makes codes of the features of a frozen backbone: set model.cache, as "
                "experiment=hashing-frozen does, or model.network.binarizer=null"
            )
        self.backbone.prepare(images, rows)

    def prepare_regions(self, regions: Tensor, rows: Tensor) -> None:
        """Fits the binarizer, if there is one.

        Args:
            regions: Region vectors (N, R, C) of all images, as `describe` takes them.
            rows: Rows of the training images, int64 (T,).

        Raises:
            ValueError: As the binarizer does, such as for too few images.
        """
        if self.binarizer is not None:
            few = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLE]]
            weight, bias = self.binarizer.fit(regions[few].float().mean(1)[:, -self._binarized.channels :])
            self.code_weight.copy_(weight)
            self.code_bias.copy_(bias)

    def pool(self, maps: Tensor) -> Tensor:
        """Region vectors (B, R, C).

        Args:
            maps: Feature maps of the backbone (B, C, h, w).
        """
        return self.pooling(maps)

    def regions(self, image: Tensor) -> Tensor:
        """Region vectors (B, R, C), the weighted mean over `views`.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        if self.views == "one":
            return self.pool(self.backbone(image))
        seen = resize_to_fit(image, self.backbone.size, self.fit).float()  # a shift is a pixel of what the network sees
        views = weighted_views(seen, self.views)
        return torch.stack([weight * self.pool(self.backbone(view)) for weight, view in views]).sum(0)

    def describe(self, regions: Tensor) -> Tensor:
        """Real-valued codes (B, b).

        Args:
            regions: Region vectors (B, R, C). With a second backbone, its mean region vector follows each one.
        """
        pooled = regions.mean(1)
        code = self.head(self.hidden(pooled[:, : self.backbone.channels]))
        if self.binarizer is None:
            return code
        further = F.linear(pooled[:, -self._binarized.channels :], self.code_weight, self.code_bias)
        return torch.cat([code, further.to(code.dtype)], dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """The learnt bits (B, learnt) of one view, real-valued, as training sees them.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        return self.head(self.hidden(self.pool(self.backbone(image)).mean(1)))

    def embed(self, image: Tensor) -> Tensor:
        """Real-valued codes (B, b), of features averaged over `views`.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        regions = self.regions(image)
        return self.describe(regions if self.second is None else beside(regions, self.second.regions(image)))

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the codes, as plain values."""
        return {
            "family": "hashing",
            "backbone": self.backbone.identity(),
            "pooling": repr(self.pooling),
            "hidden": repr(self.hidden),
            "bits": self.bits,
            **({} if self.views == "one" else {"views": self.views}),
            **({} if self.second is None else {"second": self.second.identity()}),
        }

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights that training started from; those of the second backbone have its name."""
        second = {} if self.second is None else self.second.provenance
        return self.backbone.provenance | {f"second_{name}": fact for name, fact in second.items()}

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        second = {name.removeprefix("second_"): fact for name, fact in facts.items() if name.startswith("second_")}
        self.backbone.provenance = {name: fact for name, fact in facts.items() if not name.startswith("second_")}
        if self.second is not None:
            self.second.provenance = second
