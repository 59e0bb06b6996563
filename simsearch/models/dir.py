"""Deep Image Retrieval: R-MAC whose projection learns (Gordo, Almazán, Revaud, Larlus 2016, 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.functional.ragged import Ragged, stacks
from simsearch.functional.whitening import Moments, whitening_matrix
from simsearch.models.backbones import Backbone, OnBackbone
from simsearch.models.frozen import DescriptorHead
from simsearch.models.heat_maps import has_regions, region_heat_map
from simsearch.types import HeatMap


class RegionNetwork(OnBackbone, nn.Module):
    """L2-normalised descriptors (B, dimension) of images (B, 3, H, W).

    Backbone, regions of `pooling`, L2, a shift and a fully connected layer, L2, sum over regions, L2.
    `prepare` initialises shift and layer by PCA of the regions of `sample` training images, whitened
    with `power` (0 rotates only, 1 whitens fully; simsearch.functional.whitening). Another pooling
    (GeM, ...) has one region. scales: `embed` sums the descriptors at these factors of the image size
    and normalises them again (the papers test at 550, 800 and 1,050 pixels); training uses one size.
    """

    bits = None

    def __init__(
        self,
        backbone: Backbone,
        pooling: nn.Module,
        dimension: int,
        power: float = 1.0,
        scales: Sequence[float] = (1.0,),
        sample: int = 2000,
    ) -> None:
        super().__init__()
        if not 1 <= dimension <= backbone.channels:
            raise ValueError(
                f"model.network.dimension={dimension} must lie in 1..{backbone.channels}, the backbone's channels"
            )
        if not scales or min(scales) <= 0:
            raise ValueError(f"model.network.scales must be positive factors of the image size, got {list(scales)}")
        if not 0 <= power <= 1:
            raise ValueError(f"model.network.power must lie in [0, 1], got {power}")
        self.backbone, self.dimension, self.power, self.sample = backbone, dimension, power, sample
        self.scales = tuple(scales)
        self.sizes = [max(1, round(backbone.size * scale)) for scale in scales]
        self.descriptor = DescriptorHead(pooling, nn.Linear(backbone.channels, dimension))

    @property
    def head(self) -> nn.Linear:
        """The projection: shift and fully connected layer in one."""
        assert isinstance(self.descriptor.whitening, nn.Linear)
        return self.descriptor.whitening

    def prepare(self, images: Tensor | Ragged) -> None:
        """Initialises the projection by PCA of the region vectors of the training images, uint8 (N, 3, H, W)
        or Ragged.

        Raises ValueError where there are fewer region vectors than dimensions.
        """
        self.backbone.prepare(images)
        few = self._few(len(images))
        moments = Moments.zeros(self.backbone.channels)
        training = self.training
        self.eval()
        with torch.no_grad():
            for rows in few.split(64):
                for _, stack in stacks(images[rows].to(self.head.weight.device)):
                    moments.add(self.pool(self.backbone(stack)).flatten(0, 1))
        self.train(training)
        self._start_projection(moments)

    def prepare_regions(self, regions: Tensor) -> None:
        """As `prepare` does, of the region vectors (N, R, C) of all training images. Raises ValueError like it."""
        moments = Moments.zeros(self.backbone.channels)
        moments.add(regions[self._few(len(regions))].float().flatten(0, 1))
        self._start_projection(moments)

    def _few(self, count: int) -> Tensor:
        """The images, of so many, that PCA sees."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: self.sample]

    def _start_projection(self, moments: Moments) -> None:
        if moments.count <= self.dimension:
            raise ValueError(
                f"PCA to {self.dimension} dimensions needs more than {moments.count} region vectors: lower "
                "model.network.dimension or give more training images"
            )
        mean, values, vectors = moments.principal()
        matrix = whitening_matrix(values, vectors, self.dimension, power=self.power)
        with torch.no_grad():
            self.head.weight.copy_(matrix)
            self.head.bias.copy_(-(matrix @ mean))

    def pool(self, maps: Tensor) -> Tensor:
        """L2-normalised region vectors (B, R, C) of the backbone's maps (B, C, h, w)."""
        return self.descriptor.regions(maps)

    def describe(self, regions: Tensor) -> Tensor:
        """L2-normalised descriptors (B, dimension) of region vectors (B, R, C)."""
        return self.descriptor.aggregate(regions)

    def forward(self, image: Tensor) -> Tensor:
        return self.describe(self.pool(self.backbone(image)))

    def embed(self, image: Tensor) -> Tensor:
        """Descriptors summed over `scales`, L2-normalised, (B, dimension)."""
        parts = [self.descriptor(self.backbone(image, size)) for size in self.sizes]
        return parts[0] if len(parts) == 1 else F.normalize(torch.stack(parts).sum(0), dim=-1)

    @property
    def explains(self) -> bool:
        """Whether `heat_map` can say where a similarity comes from."""
        return has_regions(self.descriptor)

    def heat_map(self, image: Tensor, vector: Tensor) -> HeatMap:
        """Contributions of the places of an image (3, H, W) to the inner product of its descriptor with `vector`.

        Where `explains` is True.
        """
        return region_heat_map(self.backbone, self.descriptor, self.sizes, image, vector)

    def identity(self) -> dict[str, object]:
        """What decides the descriptors besides the tensors, as plain values."""
        return {
            "family": "dir",
            "backbones": [self.backbone.identity(size) for size in self.sizes],
            "pooling": repr(self.descriptor.pooling),
            "dimension": self.dimension,
        }
