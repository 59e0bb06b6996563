"""The feature maps of a whole collection under a frozen backbone, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from simsearch.cache import ArrayCache
from simsearch.models.backbones import Backbone


def feature_maps(
    backbone: Backbone, collection: Any, size: int, cache: ArrayCache, *, batch_size: int = 128
) -> np.ndarray:
    """Maps of all images of a collection, float16 (N, C, h, w), read-only: from the cache, or computed into it.

    Raises ValueError where a feature lies beyond float16.
    """
    images, device = collection.images, backbone.mean.device
    with torch.no_grad():
        shape = (len(images), *backbone(images[:1].to(device), size).shape[1:])

    def fill(out: np.ndarray, start: int) -> Iterator[int]:
        bar = tqdm(total=len(images), initial=start, unit="img", desc=f"{backbone.name} @ {size}px", leave=False)
        with torch.no_grad(), bar:
            for low in range(start, len(images), batch_size):
                batch = images[low : low + batch_size].to(device)
                features = backbone(batch, size)
                if not torch.isfinite(features).all() or features.abs().max() > 65504:
                    raise ValueError(f"{backbone.name} gives features beyond float16 in rows from {low}")
                out[low : low + len(batch)] = features.cpu().numpy()
                bar.update(len(batch))
                yield low + len(batch)

    return cache.get(feature_parts(backbone, collection, size), shape, "float16", fill)


def feature_parts(backbone: Backbone, collection: Any, size: int) -> dict[str, object]:
    """What the maps depend on, by which the cache knows them."""
    parts = backbone.identity(size) | {"data": collection.fingerprint, "precision": "float16"}
    return parts | ({"compute": "bfloat16"} if backbone.mean.device.type == "cuda" else {})


def pooled_features(network: nn.Module, collection: Any, cache: ArrayCache) -> Tensor:
    """What `network.pool` makes of the maps of all images, float16 (N, R, C), in memory.

    network: has `backbone` and `pool`, maps float32 (B, C, h, w) to regions (B, R, C).
    """
    maps = feature_maps(network.backbone, collection, network.backbone.size, cache)  # type: ignore[arg-type, union-attr]
    device, pooled, step = network.backbone.mean.device, None, 512  # type: ignore[union-attr]
    with torch.no_grad():
        for low in tqdm(range(0, len(maps), step), desc="pool", unit_scale=step, unit="img", leave=False):
            block = torch.from_numpy(maps[low : low + step]).to(device).float()
            regions = network.pool(block).half().cpu()  # type: ignore[operator]
            if pooled is None:
                pooled = torch.empty((len(maps), *regions.shape[1:]), dtype=torch.float16)
            pooled[low : low + len(regions)] = regions
    assert pooled is not None
    return pooled
