"""The frozen family: pretrained features, pooled, whitened, optionally binarised; no gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsearch.cache import ArrayCache
from simsearch.functional.resize import Fit
from simsearch.functional.whitening import Moments, whitening_matrix
from simsearch.models.backbones import Backbone
from simsearch.models.features import collection_features
from simsearch.types import Batch

# ---------------------------------------------------------------------------------- the torch module


class Whitening(nn.Module):
    """Centred, projected and scaled vectors (..., D) of vectors (..., C): PCA-whitening, once fitted.

    power 0 rotates only, 1 whitens fully; shrinkage moves the covariance towards its mean
    eigenvalue (simsearch.functional.whitening). Before `fit`, forward raises RuntimeError.
    """

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

    def __init__(self, pooling: nn.Module, whitening: Whitening | None, whiten_regions: bool = True) -> None:
        super().__init__()
        self.pooling, self.whitening, self.whiten_regions = pooling, whitening, whiten_regions

    def regions(self, features: Tensor) -> Tensor:
        """L2-normalised vectors (B, R, C) that the whitening is fitted on."""
        vectors = F.normalize(self.pooling(features.float()), dim=-1)
        if not self.whiten_regions:
            vectors = F.normalize(vectors.sum(1, keepdim=True), dim=-1)
        return vectors

    def aggregate(self, regions: Tensor) -> Tensor:
        """L2-normalised descriptors (B, D) of region vectors (B, R, C)."""
        if self.whitening is not None:
            regions = F.normalize(self.whitening(regions), dim=-1)
        return F.normalize(regions.sum(1), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        return self.aggregate(self.regions(features))


# ------------------------------------------------------------------------------- the LightningModule


class FrozenRetriever(pl.LightningModule):
    """Descriptors of a frozen backbone. `fit` takes one pass over the training split for whitening and codes.

    scales: the image sizes, relative to the backbone's, whose descriptors are summed (multi-scale at
    test). binarizer: makes `embed` return real-valued codes before sign(), `bits` wide. cache: keeps
    the backbone's features of a whole collection, float16, so that later runs with another head
    don't compute them again; as maps where all maps together take at most `maps_limit_gb`, else
    pooled. sample: at most so many training descriptors fit the binarizer.
    """

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
        self._kept: list[list[Tensor]] = []

    # What a searcher calls

    def embed(self, image: Tensor) -> Tensor:
        """L2-normalised descriptors (B, D), or real-valued codes (B, bits), of images (B, 3, H, W)."""
        return self.describe([self.head.regions(self.backbone(image, size)) for size in self.sizes])

    def describe(self, regions: list[Tensor]) -> Tensor:
        """Descriptors or real-valued codes of the region vectors (B, R, C) at each scale."""
        with torch.autocast(
            self.device.type, enabled=False
        ):  # a descriptor is float32 whatever the trainer's precision
            descriptor = F.normalize(torch.stack([self.head.aggregate(r) for r in regions]).sum(0), dim=-1)
            if self.binarizer is None:
                return descriptor
            if not self.code_weight.any():
                raise RuntimeError("the binarizer is not fitted: run `simsearch train`, or load a trained run")
            return descriptor @ self.code_weight.T + self.code_bias

    @property
    def encoder(self) -> nn.Module:
        """The module that a catalog keeps."""
        return self

    @property
    def provenance(self) -> dict[str, str]:
        """Plain facts about the weights, for every result."""
        return self.backbone.provenance

    @provenance.setter
    def provenance(self, facts: dict[str, str]) -> None:
        self.backbone.provenance = facts

    @property
    def input_size(self) -> int:
        """Side in pixels (by `fit`) to which files are best decoded: that of the largest scale."""
        return max(self.sizes)

    @property
    def fit(self) -> Fit:
        """What of an image is seen: its centre square, or the whole at its longest side."""
        return self.backbone.fit

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
            self._stored = [self._features(collection, size) for size in self.sizes]

    def teardown(self, stage: str) -> None:
        self._stored = None

    def _features(self, collection: Any, size: int) -> tuple[np.ndarray, bool]:
        """The collection's features at one size, float16: maps (N, C, h, w), or regions (N, R, C)."""
        assert self.cache is not None
        with torch.no_grad():
            probe = self.backbone(collection.images[:1].to(self.device), size)
        maps = len(collection) * probe[0].numel() * 2 <= self.maps_limit
        pool = None if maps else self.head.regions
        about = {} if maps else {"pooled": repr(self.head.pooling), "whiten_regions": self.head.whiten_regions}
        batch_size = self.extract_batch_size
        array = collection_features(
            self.backbone, collection, size, self.cache, pool=pool, about=about, batch_size=batch_size
        )
        return array, maps

    def _regions(self, batch: Batch) -> list[Tensor]:
        """Region vectors (B, R, C) at each scale: from the stored features, or through the backbone."""
        if self._stored is None:
            return [self.head.regions(self.backbone(batch["image"], size)) for size in self.sizes]
        rows = batch["index"].cpu().numpy()
        regions = []
        for array, maps in self._stored:
            features = torch.from_numpy(array[rows]).to(self.device).float()
            regions.append(self.head.regions(features) if maps else features)
        return regions

    # Fitting and evaluation under a Trainer

    def train(self, mode: bool = True) -> FrozenRetriever:
        super().train(mode)
        self.backbone.eval()
        return self

    def configure_optimizers(self) -> None:
        return None

    def on_train_epoch_start(self) -> None:
        self._moments, self._kept = Moments.zeros(self.backbone.channels), []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.no_grad():
            regions = self._regions(batch)
        if self.head.whitening is not None:
            assert self._moments is not None
            for vectors in regions:
                self._moments.add(vectors.flatten(0, 1))
        if self.binarizer is not None and sum(len(kept[0]) for kept in self._kept) < self.sample:
            self._kept.append([vectors.cpu() for vectors in regions])
        if self.trainer.is_last_batch:  # before the validation of this epoch
            self._fit_head()

    def _fit_head(self) -> None:
        if self.head.whitening is not None:
            assert self._moments is not None
            self.head.whitening.fit(self._moments)
        if self.binarizer is not None:
            scales = [torch.cat(parts)[: self.sample].to(self.device) for parts in zip(*self._kept, strict=True)]
            descriptor = F.normalize(torch.stack([self.head.aggregate(s) for s in scales]).sum(0), dim=-1)
            weight, bias = self.binarizer.fit(descriptor.cpu())
            self.code_weight.copy_(weight)
            self.code_bias.copy_(bias)
        self._moments, self._kept = None, []

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.describe(self._regions(batch))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.describe(self._regions(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.describe(self._regions(batch))

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
