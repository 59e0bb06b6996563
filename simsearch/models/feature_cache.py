"""The features of a whole collection under a frozen backbone, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from simsearch.cache import ArrayCache
from simsearch.functional.ragged import Ragged, by_shape
from simsearch.models.backbones import Backbone


def collection_features(
    backbone: Backbone,
    collection: Any,
    size: int,
    cache: ArrayCache,
    *,
    describe: Callable[[Tensor], Tensor] | None = None,
    about: Mapping[str, object] | None = None,
    batch_size: int = 128,
) -> np.ndarray:
    """Features of all images of a collection, float16 (N, ...), read-only, from the cache or computed into it.

    Args:
        backbone: The frozen backbone.
        collection: The Collection.
        size: Image size in pixels.
        cache: The cache.
        describe: Maps images (B, 3, H, W) to what is kept, such as region vectors (B, R, C), by the backbone. Images of
            several shapes need it. None keeps the maps (B, C, h, w).
        about: Plain values that determine the result of `describe`. They become part of the cache key.
        batch_size: Number of images described at once.

    Raises:
        ValueError: If a feature lies beyond float16.
    """
    images, device = collection.images, backbone.mean.device
    parts = backbone.identity(size) | {"data": collection.content, "precision": "float16"} | dict(about or {})
    if device.type == "cuda":
        parts |= {"compute": "bfloat16"}

    def maps(batch: Tensor) -> Tensor:
        return backbone(batch, size)

    def features(batch: Tensor | Ragged) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            return by_shape(describe or maps, batch.to(device))

    def fill(out: np.ndarray, start: int) -> Iterator[int]:
        name = f"{backbone.name} @ {size}px"
        with tqdm(total=len(images), initial=start, unit="img", desc=name, leave=False) as bar:
            for low in range(start, len(images), batch_size):
                block = features(images[low : low + batch_size])
                if not torch.isfinite(block).all() or block.abs().max() > 65504:
                    raise ValueError(f"{backbone.name} gives features beyond float16 in rows from {low}")
                out[low : low + len(block)] = block.cpu().numpy()
                bar.update(len(block))
                yield low + len(block)

    return cache.get(parts, (len(images), *features(images[:1]).shape[1:]), "float16", fill)


class OnMaps(Protocol):
    """A network that describes images by vectors pooled from a backbone's maps.

    Attributes:
        backbone: The backbone.
    """

    backbone: Backbone

    def pool(self, maps: Tensor) -> Tensor:
        """Region vectors (B, R, C).

        Args:
            maps: Feature maps float32 (B, C, h, w).
        """
        ...

    def regions(self, image: Tensor) -> Tensor:
        """Region vectors (B, R, C) of images, averaged over the network's views of an image.

        Args:
            image: uint8 or float (B, 3, H, W) in 0..255.
        """
        ...

    def describe(self, regions: Tensor) -> Tensor:
        """Descriptors (B, D).

        Args:
            regions: Region vectors float32 (B, R, C). The vector of a second backbone follows each (`beside`).
        """
        ...

    def identity(self) -> dict[str, object]:
        """Everything besides the tensors that determines the descriptors, as plain values."""
        ...


def pooled_features(network: OnMaps, collection: Any, cache: ArrayCache) -> Tensor:
    """Region vectors of all images, float16 (N, R, C), as `network.describe` takes them, in memory.

    The cache keeps maps, so that networks with other poolings share them. It keeps region vectors for several views of
    an image, and for images of several shapes (Ragged), whose maps also differ in shape. Images of several shapes must
    have the same number of regions (`one_region`). The features of a second backbone are kept apart.

    Args:
        network: The network. It may have a `second` OnMaps, which gives one vector for each image, or None.
        collection: The Collection.
        cache: The cache.

    Raises:
        ValueError: If a feature lies beyond float16.
    """
    own, second = _own_features(network, collection, cache), getattr(network, "second", None)
    return own if second is None else beside(own, _own_features(second, collection, cache))


def beside(regions: Tensor, others: Tensor) -> Tensor:
    """Region vectors (B, R, C + D), each followed by the other vector of its image.

    Args:
        regions: Region vectors (B, R, C).
        others: One vector of another backbone for each image (B, 1, D).

    Example:
        >>> import torch
        >>> beside(torch.tensor([[[1], [2]]]), torch.tensor([[[3, 4]]])).tolist()
        [[[1, 3, 4], [2, 3, 4]]]
    """
    return torch.cat([regions, others.expand(-1, regions.shape[1], -1)], dim=-1)


def _own_features(network: OnMaps, collection: Any, cache: ArrayCache) -> Tensor:
    """Region vectors float16 (N, R, C) of the network's backbone by `network.regions`."""
    backbone = network.backbone
    identity = network.identity()
    if isinstance(collection.images, Ragged) or "views" in identity:
        about = {"pooled": identity["pooling"], "family": identity["family"]}
        about |= {"views": identity["views"]} if "views" in identity else {}
        found = collection_features(backbone, collection, backbone.size, cache, describe=network.regions, about=about)
        return torch.tensor(found)
    maps = collection_features(backbone, collection, backbone.size, cache)
    pooled, step = [], 512
    with torch.no_grad():
        for low in tqdm(range(0, len(maps), step), desc="pool", unit_scale=step, unit="img", leave=False):
            block = torch.tensor(maps[low : low + step]).to(backbone.mean.device).float()
            pooled.append(network.pool(block).half().cpu())
    return torch.cat(pooled)


def one_region(pool: Callable[[Tensor], Tensor], backbone: Backbone) -> bool:
    """Whether `pool` gives one region vector for a map of any shape.

    Args:
        pool: Maps features (B, C, h, w) to region vectors (B, R, C).
        backbone: The backbone, for channels and device.
    """
    with torch.no_grad():
        return pool(torch.rand(1, backbone.channels, 8, 16, device=backbone.mean.device)).shape[1] == 1
