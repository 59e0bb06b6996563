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
    pool: Callable[[Tensor], Tensor] | None = None,
    about: Mapping[str, object] | None = None,
    batch_size: int = 128,
) -> np.ndarray:
    """Maps of all images of a collection, float16 (N, C, h, w), read-only: from the cache, or computed into it.

    pool: maps to what is kept in their place, such as regions (N, R, C), which images of many shapes need;
    about: what that depends on, as plain values, by which the cache knows it.

    Raises ValueError where a feature lies beyond float16.
    """
    images, device = collection.images, backbone.mean.device
    parts = backbone.identity(size) | {"data": collection.content, "precision": "float16"} | dict(about or {})
    if device.type == "cuda":
        parts |= {"compute": "bfloat16"}

    def described(batch: Tensor) -> Tensor:
        maps = backbone(batch, size)
        return maps if pool is None else pool(maps)

    def features(batch: Tensor | Ragged) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            return by_shape(described, batch.to(device))

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
    """A network that describes what it pools of a backbone's maps.

    pool: maps float32 (B, C, h, w) to regions (B, R, C). describe: regions to descriptors (B, D).
    """

    backbone: Backbone

    def pool(self, maps: Tensor) -> Tensor: ...

    def describe(self, regions: Tensor) -> Tensor: ...

    def identity(self) -> dict[str, object]: ...


def pooled_features(network: OnMaps, collection: Any, cache: ArrayCache) -> Tensor:
    """What `network.pool` makes of the maps of all images, float16 (N, R, C), in memory.

    Of images of many shapes (Ragged), whose maps differ too, what is pooled is cached; R must be one for all
    (`one_region`).
    """
    backbone = network.backbone
    if isinstance(collection.images, Ragged):
        identity = network.identity()
        about = {"pooled": identity["pooling"], "family": identity["family"]}
        found = collection_features(backbone, collection, backbone.size, cache, pool=network.pool, about=about)
        return torch.tensor(found)
    maps = collection_features(backbone, collection, backbone.size, cache)
    pooled, step = [], 512
    with torch.no_grad():
        for low in tqdm(range(0, len(maps), step), desc="pool", unit_scale=step, unit="img", leave=False):
            block = torch.tensor(maps[low : low + step]).to(backbone.mean.device).float()
            pooled.append(network.pool(block).half().cpu())
    return torch.cat(pooled)


def one_region(pool: Callable[[Tensor], Tensor], backbone: Backbone) -> bool:
    """Whether `pool` makes one region vector of a map of any shape."""
    with torch.no_grad():
        return pool(torch.rand(1, backbone.channels, 8, 16, device=backbone.mean.device)).shape[1] == 1
