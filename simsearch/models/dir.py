"""Deep Image Retrieval: R-MAC with a learnt projection (Gordo, Almazán, Revaud, Larlus 2016, 2017)."""

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

    The steps are: backbone, region vectors by `pooling`, L2 normalisation, a shift and a fully connected layer, L2
    normalisation, sum over regions, L2 normalisation. `prepare` initialises shift and layer by PCA of the region
    vectors of some training images.

    Args:
        backbone: The network below.
        pooling: Maps features (B, C, h, w) to region vectors (B, R, C). RMAC has several regions, another pooling (GeM,
            ...) has one.
        dimension: Width of the descriptors, 1 to the channels of the backbone.
        power: Whitening of the PCA, in [0, 1]: 0 rotates only, 1 whitens fully (simsearch.functional.whitening).
        scales: Factors of the image size. `embed` sums the descriptors of all scales and normalises them again (the
            papers test at 550, 800 and 1,050 pixels). Training uses one size.
        sample: Number of training images for the PCA, at most.

    Raises:
        ValueError: If `dimension`, `scales` or `power` is out of range.

    Source:
        Gordo, Almazán, Revaud, Larlus: Deep Image Retrieval: Learning global representations for image search. ECCV
        2016.
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

    def prepare(self, images: Tensor | Ragged, rows: Tensor) -> None:
        """Initialises the projection by PCA of the region vectors of training images.

        Args:
            images: All images uint8 (N, 3, H, W), or Ragged.
            rows: Rows of the training images, int64 (T,).

        Raises:
            ValueError: If there are not more region vectors than dimensions.
        """
        self.backbone.prepare(images, rows)
        moments = Moments.zeros(self.backbone.channels)
        training = self.training
        self.eval()
        with torch.no_grad():
            for some in self._few(rows).split(64):
                for _, stack in stacks(images[some].to(self.head.weight.device)):
                    moments.add(self.pool(self.backbone(stack)).flatten(0, 1))
        self.train(training)
        self._start_projection(moments)

    def prepare_regions(self, regions: Tensor, rows: Tensor) -> None:
        """Initialises the projection as `prepare` does, from region vectors that are already computed.

        Args:
            regions: Region vectors (N, R, C) of all images.
            rows: Rows of the training images, int64 (T,).

        Raises:
            ValueError: If there are not more region vectors than dimensions.
        """
        moments = Moments.zeros(self.backbone.channels)
        moments.add(regions[self._few(rows)].float().flatten(0, 1))
        self._start_projection(moments)

    def _few(self, rows: Tensor) -> Tensor:
        """The rows that the PCA uses, drawn at random."""
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: self.sample]]

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
        """L2-normalised region vectors (B, R, C).

        Args:
            maps: Feature maps of the backbone (B, C, h, w).
        """
        return self.descriptor.regions(maps)

    def regions(self, image: Tensor) -> Tensor:
        """L2-normalised region vectors (B, R, C) at the size of the backbone.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        return self.pool(self.backbone(image))

    def describe(self, regions: Tensor) -> Tensor:
        """L2-normalised descriptors (B, dimension).

        Args:
            regions: Region vectors (B, R, C).
        """
        return self.descriptor.aggregate(regions)

    def forward(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors (B, dimension) at the size of the backbone.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        return self.describe(self.regions(image))

    def embed(self, image: Tensor) -> Tensor:
        """Descriptors (B, dimension), summed over `scales` and L2-normalised.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        parts = [self.descriptor(self.backbone(image, size)) for size in self.sizes]
        return parts[0] if len(parts) == 1 else F.normalize(torch.stack(parts).sum(0), dim=-1)

    @property
    def explains(self) -> bool:
        """Whether `heat_map` can show which places of an image a similarity comes from."""
        return has_regions(self.descriptor)

    def heat_map(self, image: Tensor, vector: Tensor) -> HeatMap:
        """Contributions of the places of an image to the inner product of its descriptor with a vector.

        It needs `explains` to be True.

        Args:
            image: uint8 or float (3, H, W) in 0..255.
            vector: Descriptor float32 (dimension,).
        """
        return region_heat_map(self.backbone, self.descriptor, self.sizes, image, vector)

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the descriptors, as plain values."""
        return {
            "family": "dir",
            "backbones": [self.backbone.identity(size) for size in self.sizes],
            "pooling": repr(self.descriptor.pooling),
            "dimension": self.dimension,
        }
