"""The frozen family: pretrained features, pooled, whitened, optionally binarised; no gradient."""

from __future__ import annotations

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
    """Centred, projected and scaled vectors (..., D) of vectors (..., C): PCA-whitening, once fitted.

    power 0 rotates only, 1 whitens fully; shrinkage moves the covariance towards its mean
    eigenvalue (simsearch.functional.whitening). Before `fit`, forward raises RuntimeError.
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
        """Makes room for vectors of `channels` entries, so that a checkpoint can be loaded."""
        if self.dimension > channels:
            raise ValueError(
                f"whitening.dimension is {self.dimension}, the backbone gives {channels} channels: lower it"
            )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("projection", torch.zeros(self.dimension, channels))

    def no_moments(self, channels: int) -> Moments:
        """What `collect` adds to, of no vectors of `channels` entries."""
        return Moments.zeros(channels)

    def collect(self, moments: Moments, vectors: Tensor, label: Tensor) -> None:
        """Adds training vectors (B, R, C) of images with these labels, int64 (B,)."""
        moments.add(vectors.flatten(0, 1))

    def fit(self, moments: Moments) -> None:
        """Takes mean and projection from the moments of training vectors."""
        mean, values, vectors = moments.principal()
        matrix = whitening_matrix(values, vectors, self.dimension, power=self.power, shrinkage=self.shrinkage)
        self.mean.copy_(mean)
        self.projection.copy_(matrix)

    def forward(self, vectors: Tensor) -> Tensor:
        if not self.projection.any():
            raise RuntimeError("the whitening is not fitted: run `simsearch train`, or load a trained run")
        return (vectors - self.mean) @ self.projection.T


class LearnedWhitening(Whitening):
    """Centred vectors projected so that those of one label lie close: whitening by what differs within labels.

    Fitted in closed form on the labels that the protocol trains on, such as artists; see
    simsearch.functional.whitening.discriminative_projection. shrinkage: of the covariance within labels.
    """

    def __init__(self, dimension: int, shrinkage: float = 0.4) -> None:
        super().__init__(dimension, power=1.0, shrinkage=shrinkage)

    def no_moments(self, channels: int) -> ClassMoments:
        """What `collect` adds to, of no vectors of `channels` entries."""
        return ClassMoments.zeros(channels)

    def collect(self, moments: Moments, vectors: Tensor, label: Tensor) -> None:
        """Adds training vectors (B, R, C) of images with these labels, int64 (B,); -1 is left out."""
        assert isinstance(moments, ClassMoments)
        moments.add_labelled(vectors.flatten(0, 1), label.repeat_interleave(vectors.shape[1]))

    def fit(self, moments: Moments) -> None:
        """Takes mean and projection from the moments of training vectors by label."""
        assert isinstance(moments, ClassMoments)
        mean, matrix = discriminative_projection(moments, self.dimension, shrinkage=self.shrinkage)
        self.mean.copy_(mean)
        self.projection.copy_(matrix)


class Binarizer(Protocol):
    """What turns descriptors into codes of `bits` bits: sign(x @ weight.T + bias)."""

    bits: int

    def fit(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """weight (bits, D) and bias (bits,) from training descriptors (N, D)."""
        ...


class DescriptorHead(nn.Module):
    """Descriptors (B, D) of feature maps (B, C, h, w): pool, L2, whiten, L2, sum over regions, L2.

    With one region this is L2 - whiten - L2; with several each region is whitened by itself (Tolias
    et al. 2016), or, where `whiten_regions` is False, their sum is.
    """

    whitening: Any  # Whitening, or a layer that learns

    def __init__(
        self, pooling: nn.Module, whitening: Whitening | nn.Linear | None, whiten_regions: bool = True
    ) -> None:
        super().__init__()
        self.pooling, self.whitening, self.whiten_regions = pooling, whitening, whiten_regions

    def regions(self, features: Tensor) -> Tensor:
        """L2-normalised vectors (B, R, C) that the whitening is fitted on."""
        vectors = F.normalize(self.pooling(features.float()), dim=-1)
        if not self.whiten_regions:
            vectors = F.normalize(vectors.sum(1, keepdim=True), dim=-1)
        return vectors

    def unit_regions(self, regions: Tensor) -> Tensor:
        """What is summed: the region vectors (B, R, C) whitened and L2-normalised again, (B, R, D)."""
        return regions if self.whitening is None else F.normalize(self.whitening(regions), dim=-1)

    def aggregate(self, regions: Tensor) -> Tensor:
        """L2-normalised descriptors (B, D) of region vectors (B, R, C)."""
        return F.normalize(self.unit_regions(regions).sum(1), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        return self.aggregate(self.regions(features))


# ------------------------------------------------------------------------------- the LightningModule


class FrozenRetriever(OnBackbone, DescribesBatches):
    """Descriptors of a frozen backbone. `fit` takes one pass over the training split for whitening and codes.

    scales: the image sizes, relative to the backbone's, whose descriptors are summed (multi-scale at
    test). binarizer: makes `embed` return real-valued codes before sign(), `bits` wide. cache: keeps
    the backbone's features of a whole collection, float16, so that later runs with another head
    don't compute them again; as maps where all maps together take at most `maps_limit_gb`, else
    pooled. sample: at most so many training descriptors fit the binarizer.

    Images of many shapes (Ragged) are described shape by shape; the cache keeps their features where each
    has one region (not with R-MAC, whose regions depend on the shape).
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
                raise ValueError(f"a code of {binarizer.bits} bits needs a descriptor at least as wide, got {width}")
            self.register_buffer("code_weight", torch.zeros(binarizer.bits, width))
            self.register_buffer("code_bias", torch.zeros(binarizer.bits))
        self.dimension = self.bits or width
        self.sizes = [max(1, round(backbone.size * scale)) for scale in scales]
        self.cache, self.maps_limit = cache, maps_limit_gb * 2**30
        self.extract_batch_size, self.sample = extract_batch_size, sample
        self._stored: list[tuple[np.ndarray, bool]] | None = None  # per scale: array, are these maps?
        self._moments: Moments | None = None
        self._kept: list[list[tuple[Tensor, list[Tensor]]]] = []  # of each batch: places, regions by scale
        self._seen = 0

    # What a searcher calls

    def embed(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors (B, D), or real-valued codes (B, bits), of images (B, 3, H, W)."""
        return self.describe([self.head.regions(self.backbone(image, size)) for size in self.sizes])

    def describe(self, regions: list[Tensor]) -> Tensor:
        """Descriptors or real-valued codes of the region vectors (B, R, C) at each scale."""
        # A descriptor is float32 whatever the trainer's precision.
        with torch.autocast(self.backbone.mean.device.type, enabled=False):
            descriptor = self._descriptor(regions)
            if self.binarizer is None:
                return descriptor
            if not self.code_weight.any():
                raise RuntimeError("the binarizer is not fitted: run `simsearch train`, or load a trained run")
            return descriptor @ self.code_weight.T + self.code_bias

    def _descriptor(self, regions: list[Tensor]) -> Tensor:
        """L2-normalised descriptors (B, D) of the region vectors (B, R, C) at each scale."""
        parts = [self.head.aggregate(vectors.to(self.backbone.mean.device)) for vectors in regions]
        return F.normalize(torch.stack(parts).sum(0), dim=-1)

    @property
    def explains(self) -> bool:
        """Whether `heat_map` can say where a similarity comes from."""
        return self.binarizer is None and has_regions(self.head)

    def heat_map(self, image: Tensor, vector: Tensor) -> HeatMap:
        """Contributions of the places of an image (3, H, W) to the inner product of its descriptor with `vector`.

        Where `explains` is True.
        """
        return region_heat_map(self.backbone, self.head, self.sizes, image, vector)

    @property
    def encoder(self) -> Encoder:
        """The module that a catalog keeps."""
        return self

    def identity(self) -> dict[str, object]:
        """What decides the descriptors besides the tensors, as plain values."""
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
            raise ValueError("data.augment changes images that model.cache keeps the features of: set one to null")
        if self.cache is not None and collection is not None and self._stored is None:
            self.to(self.trainer.strategy.root_device)  # Lightning moves the module after this hook only
            if not isinstance(collection.images, Ragged) or one_region(self.head.regions, self.backbone):
                self._stored = [self._features(collection, size) for size in self.sizes]

    def teardown(self, stage: str) -> None:
        self._stored = None

    def _features(self, collection: Any, size: int) -> tuple[np.ndarray, bool]:
        """The collection's features at one size, float16: maps (N, C, h, w), or regions (N, R, C)."""
        assert self.cache is not None
        with torch.no_grad():
            probe = self.backbone(collection.images[0][None].to(self.device), size)
        ragged = isinstance(collection.images, Ragged)
        maps = not ragged and len(collection) * probe[0].numel() * 2 <= self.maps_limit
        pool = None if maps else self.head.regions
        about = {} if maps else {"pooled": repr(self.head.pooling), "whiten_regions": self.head.whiten_regions}
        batch_size = self.extract_batch_size
        array = collection_features(
            self.backbone, collection, size, self.cache, pool=pool, about=about, batch_size=batch_size
        )
        return array, maps

    def _regions(self, batch: Batch) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Places in the batch and region vectors (b, R, C) at each scale, by shape of image.

        From the stored features, then all at once, or through the backbone.
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
        """Descriptors or real-valued codes of a batch, in its order, of its stored features where there are any."""
        return in_order(*zip(*((places, self.describe(parts)) for places, parts in self._regions(batch)), strict=True))

    # Fitting and evaluation under a Trainer

    def train(self, mode: bool = True) -> FrozenRetriever:
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
        """Nothing: there is no gradient."""

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
        """Fits whitening and binarizer to what all ranks saw, as one process would."""
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

    # Checkpoints hold what was fitted; the backbone comes again from where its weights came from

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        if self.backbone.provenance["weights"] != "random":  # these are nowhere else
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
