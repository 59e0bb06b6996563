"""The frozen family: pretrained features, pooled, whitened and optionally binarised, without gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.cache import ArrayCache
from simsearch.functional.collectives import from_first_rank, gather_batches, world_size
from simsearch.functional.ragged import Ragged, in_order, stacks
from simsearch.functional.whitening import ClassMoments, Moments, discriminative_projection, whitening_matrix
from simsearch.models.backbones import Backbone, OnBackbone
from simsearch.models.feature_cache import collection_features, one_region
from simsearch.models.heat_maps import has_regions, region_heat_map
from simsearch.models.steps import DescribesBatches
from simsearch.types import Batch, Encoder, HeatMap

# ---------------------------------------------------------------------------------- the torch module


class Whitening(nn.Module):
    """PCA-whitening: vectors (..., C), centred, projected and scaled to (..., D).

    Args:
        dimension: D, from 1.
        power: Whitening, in [0, 1]: 0 rotates only, 1 whitens fully.
        shrinkage: Moves the covariance towards its mean eigenvalue, in [0, 1] (simsearch.functional.whitening).

    Raises:
        ValueError: If an argument is out of range.
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, dimension: int, power: float = 0.0, shrinkage: float = 0.0) -> None:
        super().__init__()
        if dimension < 1:
            raise ValueError(f"whitening.dimension must be at least 1, got {dimension}")
        if not 0 <= power <= 1 or not 0 <= shrinkage <= 1:
            raise ValueError(f"whitening power and shrinkage must lie in [0, 1], got {power} and {shrinkage}")
        self.dimension, self.power, self.shrinkage = dimension, power, shrinkage

    def allocate(self, channels: int) -> None:
        """Makes the buffers for vectors of `channels` entries, so that a checkpoint can be loaded.

        Args:
            channels: C.

        Raises:
            ValueError: If `dimension` is larger.
        """
        if self.dimension > channels:
            raise ValueError(
                f"whitening.dimension is {self.dimension}, but the backbone has {channels} channels: lower it"
            )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("projection", torch.zeros(self.dimension, channels))

    def no_moments(self, channels: int) -> Moments:
        """Empty moments, for `collect` to add to.

        Args:
            channels: C.
        """
        return Moments.zeros(channels)

    def collect(self, moments: Moments, vectors: Tensor, label: Tensor) -> None:
        """Adds training vectors to the moments, in place.

        Args:
            moments: From `no_moments`.
            vectors: Region vectors float32 (B, R, C).
            label: Labels of the images, int64 (B,). PCA does not use them.
        """
        moments.add(vectors.flatten(0, 1))

    def fit(self, moments: Moments) -> None:
        """Computes mean and projection from the moments of the training vectors.

        Args:
            moments: What `collect` has gathered.
        """
        mean, values, vectors = moments.principal()
        matrix = whitening_matrix(values, vectors, self.dimension, power=self.power, shrinkage=self.shrinkage)
        if self.power and (used := int(matrix.any(1).sum())) < self.dimension:
            print(
                f"note: the training vectors vary along {used} components, so that {self.dimension - used} of "
                f"whitening.dimension={self.dimension} are 0: give more training images, a lower dimension, or "
                "whitening.shrinkage=0.1",
                file=sys.stderr,
            )
        self.mean.copy_(mean)
        self.projection.copy_(matrix)

    def forward(self, vectors: Tensor) -> Tensor:
        """The whitened vectors (..., D).

        Args:
            vectors: float32 (..., C).

        Raises:
            RuntimeError: If the whitening is not fitted.
        """
        if not self.projection.any():
            raise RuntimeError("the whitening is not fitted: run `simsearch train`, or load a trained run")
        return (vectors - self.mean) @ self.projection.T


class LearnedWhitening(Whitening):
    """Whitening by the covariance within labels: projects vectors so that those of one label lie close together.

    It is fitted in closed form on the labels that the protocol trains on, such as artists. See
    simsearch.functional.whitening.discriminative_projection.

    Args:
        dimension: D, from 1.
        shrinkage: Shrinkage of the covariance within labels, in [0, 1].
    """

    def __init__(self, dimension: int, shrinkage: float = 0.4) -> None:
        super().__init__(dimension, power=1.0, shrinkage=shrinkage)

    def no_moments(self, channels: int) -> ClassMoments:
        """Empty moments by label, for `collect` to add to.

        Args:
            channels: C.
        """
        return ClassMoments.zeros(channels)

    def collect(self, moments: Moments, vectors: Tensor, label: Tensor) -> None:
        """Adds training vectors to the moments, in place.

        Args:
            moments: From `no_moments`.
            vectors: Region vectors float32 (B, R, C).
            label: Labels of the images, int64 (B,). Images with label -1 are left out.
        """
        assert isinstance(moments, ClassMoments)
        moments.add_labelled(vectors.flatten(0, 1), label.repeat_interleave(vectors.shape[1]))

    def fit(self, moments: Moments) -> None:
        """Computes mean and projection from the moments by label.

        Args:
            moments: What `collect` has gathered.
        """
        assert isinstance(moments, ClassMoments)
        mean, matrix = discriminative_projection(moments, self.dimension, shrinkage=self.shrinkage)
        self.mean.copy_(mean)
        self.projection.copy_(matrix)


class Binarizer(Protocol):
    """A way to turn descriptors into codes: sign(x @ weight.T + bias).

    Attributes:
        bits: Width of the codes.
    """

    bits: int

    def fit(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The weight (bits, D) and bias (bits,).

        Args:
            vectors: Training descriptors float32 (N, D).
        """
        ...


class DescriptorHead(nn.Module):
    """Descriptors (B, D) of feature maps (B, C, h, w): pool, L2, whiten, L2, sum over regions, L2.

    With one region this is L2, whiten, L2.

    Args:
        pooling: Maps features (B, C, h, w) to region vectors (B, R, C).
        whitening: Whitening, a linear layer that learns, or None for none.
        whiten_regions: Whether each region is whitened separately (Tolias et al. 2016). Otherwise the sum of the
            regions is.
    """

    whitening: Any  # Whitening, or a layer that learns

    def __init__(
        self, pooling: nn.Module, whitening: Whitening | nn.Linear | None, whiten_regions: bool = True
    ) -> None:
        super().__init__()
        self.pooling, self.whitening, self.whiten_regions = pooling, whitening, whiten_regions

    def regions(self, features: Tensor) -> Tensor:
        """L2-normalised vectors (B, R, C), which the whitening is fitted on. R is 1 without `whiten_regions`.

        Args:
            features: Feature maps (B, C, h, w).
        """
        vectors = F.normalize(self.pooling(features.float()), dim=-1)
        if not self.whiten_regions:
            vectors = F.normalize(vectors.sum(1, keepdim=True), dim=-1)
        return vectors

    def unit_regions(self, regions: Tensor) -> Tensor:
        """Region vectors whitened and L2-normalised again, (B, R, D). A descriptor is their normalised sum.

        Args:
            regions: L2-normalised region vectors (B, R, C).
        """
        return regions if self.whitening is None else F.normalize(self.whitening(regions), dim=-1)

    def aggregate(self, regions: Tensor) -> Tensor:
        """L2-normalised descriptors (B, D).

        Args:
            regions: L2-normalised region vectors (B, R, C).
        """
        return F.normalize(self.unit_regions(regions).sum(1), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """L2-normalised descriptors (B, D).

        Args:
            features: Feature maps (B, C, h, w).
        """
        return self.aggregate(self.regions(features))


# ------------------------------------------------------------------------------- the LightningModule


class FrozenRetriever(OnBackbone, DescribesBatches):
    """Descriptors of a frozen backbone. `fit` takes one pass over the training split for whitening and codes.

    Images of several shapes (Ragged) are described one shape at a time. The cache keeps their features if each image
    has one region. It does not with R-MAC, whose regions depend on the shape.

    Args:
        backbone: The backbone. It is frozen here.
        pooling: Maps features (B, C, h, w) to region vectors (B, R, C).
        whitening: The whitening, None for none.
        whiten_regions: As in DescriptorHead.
        binarizer: Makes `embed` return real-valued codes, the values before sign(). None for descriptors.
        scales: Factors of the backbone's image size. The descriptors of all scales are summed.
        cache: Keeps the backbone's features of a whole collection as float16, so that later runs with another head do
            not compute them again. None for no cache.
        maps_limit_gb: The cache keeps maps if all of them together take at most this many GiB, otherwise pooled
            vectors.
        extract_batch_size: Number of images described at once to fill the cache.
        sample: Number of training descriptors that fit the binarizer, at most.

    Raises:
        ValueError: If `scales` are not positive, the whitening is wider than the backbone or the codes wider than the
            descriptors.
    """

    code_weight: Tensor
    code_bias: Tensor

    def __init__(
        self,
        backbone: Backbone,
        pooling: nn.Module,
        whitening: Whitening | None = None,
        whiten_regions: bool = True,
        binarizer: Binarizer | None = None,
        scales: Sequence[float] = (1.0,),
        cache: ArrayCache | None = None,
        maps_limit_gb: float = 8.0,
        extract_batch_size: int = 128,
        sample: int = 10_000,
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise ValueError(f"model.scales must be positive factors of the image size, got {list(scales)}")
        self.backbone = backbone.requires_grad_(False).eval()
        self.head = DescriptorHead(pooling.requires_grad_(False), whitening, whiten_regions)
        if whitening is not None:
            whitening.allocate(backbone.channels)
        width = whitening.dimension if whitening is not None else backbone.channels
        self.binarizer = binarizer
        self.bits = binarizer.bits if binarizer is not None else None
        if binarizer is not None:
            if binarizer.bits > width:
                raise ValueError(
                    f"a code of {binarizer.bits} bits needs a descriptor of at least as many dimensions, got {width}"
                )
            self.register_buffer("code_weight", torch.zeros(binarizer.bits, width))
            self.register_buffer("code_bias", torch.zeros(binarizer.bits))
        self.dimension = self.bits or width
        self.sizes = [max(1, round(backbone.size * scale)) for scale in scales]
        self.cache, self.maps_limit = cache, maps_limit_gb * 2**30
        self.extract_batch_size, self.sample = extract_batch_size, sample
        self._stored: list[tuple[np.ndarray, bool]] | None = None  # per scale: array, are these maps?
        self._moments: Moments | None = None
        self._kept: list[list[tuple[Tensor, list[Tensor]]]] = []  # for each batch: positions, regions by scale
        self._seen = 0

    # Called by searches

    def embed(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors (B, D), or real-valued codes (B, bits).

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.

        Raises:
            RuntimeError: If whitening or binarizer is not fitted.
        """
        return self.describe([self.head.regions(self.backbone(image, size)) for size in self.sizes])

    def describe(self, regions: list[Tensor]) -> Tensor:
        """L2-normalised descriptors (B, D), or real-valued codes (B, bits).

        Args:
            regions: Region vectors (B, R, C), one tensor for each scale.

        Raises:
            RuntimeError: If whitening or binarizer is not fitted.
        """
        # A descriptor is float32 whatever the trainer's precision.
        with torch.autocast(self.backbone.mean.device.type, enabled=False):
            descriptor = self._descriptor(regions)
            if self.binarizer is None:
                return descriptor
            if not self.code_weight.any():
                raise RuntimeError("the binarizer is not fitted: run `simsearch train`, or load a trained run")
            return descriptor @ self.code_weight.T + self.code_bias

    def _descriptor(self, regions: list[Tensor]) -> Tensor:
        """L2-normalised descriptors (B, D) of region vectors (B, R, C) at each scale."""
        parts = [self.head.aggregate(vectors.to(self.backbone.mean.device)) for vectors in regions]
        return F.normalize(torch.stack(parts).sum(0), dim=-1)

    @property
    def explains(self) -> bool:
        """Whether `heat_map` can show which places of an image a similarity comes from."""
        return self.binarizer is None and has_regions(self.head)

    def heat_map(self, image: Tensor, vector: Tensor) -> HeatMap:
        """Contributions of the places of an image to the inner product of its descriptor with a vector.

        It needs `explains` to be True.

        Args:
            image: uint8 or float (3, H, W) in 0..255.
            vector: Descriptor float32 (D,).
        """
        return region_heat_map(self.backbone, self.head, self.sizes, image, vector)

    @property
    def encoder(self) -> Encoder:
        """The module that a catalog keeps."""
        return self

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the descriptors, as plain values."""
        return {
            "family": "frozen",
            "backbones": [self.backbone.identity(size) for size in self.sizes],
            "pooling": repr(self.head.pooling),
            "whiten_regions": self.head.whiten_regions,
            "dimension": self.dimension,
            "bits": self.bits,
        }

    # The features of a whole collection, computed once

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        collection = getattr(data, "collection", None)
        if self.cache is not None and getattr(data, "augment", None) is not None:
            raise ValueError("data.augment changes images whose features model.cache keeps: set one of the two to null")
        if self.cache is not None and collection is not None and self._stored is None:
            self.to(self.trainer.strategy.root_device)  # Lightning moves the module only after this hook
            if not isinstance(collection.images, Ragged) or one_region(self.head.regions, self.backbone):
                self._stored = [self._features(collection, size) for size in self.sizes]

    def teardown(self, stage: str) -> None:
        self._stored = None

    def _features(self, collection: Any, size: int) -> tuple[np.ndarray, bool]:
        """The collection's float16 features at one size, maps (N, C, h, w) or regions (N, R, C); True for maps."""
        assert self.cache is not None
        with torch.no_grad():
            probe = self.backbone(collection.images[0][None].to(self.device), size)
        ragged = isinstance(collection.images, Ragged)
        maps = not ragged and len(collection) * probe[0].numel() * 2 <= self.maps_limit
        describe = None if maps else lambda images: self.head.regions(self.backbone(images, size))
        about = {} if maps else {"pooled": repr(self.head.pooling), "whiten_regions": self.head.whiten_regions}
        batch_size = self.extract_batch_size
        array = collection_features(
            self.backbone, collection, size, self.cache, describe=describe, about=about, batch_size=batch_size
        )
        return array, maps

    def _regions(self, batch: Batch) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yields positions in the batch with region vectors (b, R, C) at each scale, one pair for each image shape.

        Stored features come in one piece; otherwise the images go through the backbone.
        """
        if self._stored is None:
            for places, images in stacks(batch["image"]):
                yield places, [self.head.regions(self.backbone(images, size)) for size in self.sizes]
            return
        rows = batch["index"].cpu().numpy()
        regions = []
        for array, maps in self._stored:
            features = torch.from_numpy(array[rows]).to(self.device).float()
            regions.append(self.head.regions(features) if maps else features)
        yield torch.arange(len(rows)), regions

    def describe_batch(self, batch: Batch) -> Tensor:
        """Descriptors or real-valued codes of a batch, in its order, from the stored features if there are any.

        Args:
            batch: The batch.
        """
        return in_order(*zip(*((places, self.describe(parts)) for places, parts in self._regions(batch)), strict=True))

    # Fitting and evaluation under a Trainer

    def train(self, mode: bool = True) -> FrozenRetriever:
        """Sets the mode of the module. The backbone stays in evaluation mode.

        Args:
            mode: True for training, False for evaluation.
        """
        super().train(mode)
        self.backbone.eval()
        return self

    def configure_optimizers(self) -> None:
        return None

    def on_train_epoch_start(self) -> None:
        whitening = self.head.whitening
        self._moments = None if whitening is None else whitening.no_moments(self.backbone.channels)
        self._kept, self._seen = [], 0

    def backward(self, loss: Tensor) -> None:
        """Does nothing, since there is no gradient.

        Args:
            loss: Ignored.
        """

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        with torch.no_grad():
            found = list(self._regions(batch))
        if (whitening := self.head.whitening) is not None:
            assert self._moments is not None
            label = batch["label"] if batch["label"].ndim == 1 else batch["label"][:, 0]
            for places, regions in found:
                for vectors in regions:
                    whitening.collect(self._moments, vectors, label.cpu()[places])
        if self.binarizer is not None and world_size() * self._seen < self.sample:
            self._kept.append([(places, [vectors.cpu() for vectors in regions]) for places, regions in found])
            self._seen += len(batch["index"])
        if self.trainer.is_last_batch:  # before the validation of this epoch
            self._fit_head()
        return None if self.trainer.world_size == 1 else torch.zeros((), device=self.device)  # None: for one rank only

    def _fit_head(self) -> None:
        """Fits whitening and binarizer to the data of all ranks, with the result of a single process."""
        if (whitening := self.head.whitening) is not None:
            assert self._moments is not None
            self._moments.reduce(self.device)
            whitening.fit(self._moments)
            from_first_rank(whitening.mean)
            from_first_rank(whitening.projection)
        if self.binarizer is not None:
            batches = [in_order(*zip(*((p, self._descriptor(r)) for p, r in kept), strict=True)) for kept in self._kept]
            weight, bias = self.binarizer.fit(gather_batches(batches, self.code_weight.shape[1])[: self.sample])
            from_first_rank(self.code_weight.copy_(weight))
            from_first_rank(self.code_bias.copy_(bias))
        self._moments, self._kept = None, []

    # Checkpoints hold what was fitted. The backbone's weights are loaded again from their source.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        if self.backbone.provenance["weights"] != "random":  # random weights exist nowhere else
            checkpoint["state_dict"] = {n: v for n, v in state.items() if not n.startswith("backbone.")}
        checkpoint["backbone"] = dict(self.backbone.provenance)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        saved, own = checkpoint["backbone"], self.backbone.provenance
        if saved["weights"] == own["weights"] == "random":
            self.backbone.provenance = dict(saved)
            return
        if saved["sha256"] != own["sha256"]:
            raise ValueError(
                f"the checkpoint was fitted on weights {saved['sha256']} ({saved['source']}), "
                f"this backbone has {own['sha256']} ({own['source']}): give backbone.weights the same ones"
            )
        for name, value in self.backbone.state_dict(prefix="backbone.").items():
            checkpoint["state_dict"].setdefault(name, value)
