"""The engine: an image in, the similar items of a catalog out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simsearch.functional.codes import pack_codes
from simsearch.search.catalog import Catalog
from simsearch.types import SearchResult


def encode(encoder: nn.Module, images: Tensor) -> Tensor:
    """What an index holds of images uint8 (B, 3, H, W): float32 (B, D), or packed codes (B, bits / 8)."""
    device = next(encoder.parameters()).device
    with torch.inference_mode():
        embedding = encoder.embed(images.to(device)).float().cpu()  # type: ignore[operator]
    return pack_codes(embedding) if encoder.bits is not None else embedding.clone()


class Engine:
    """Searches a catalog with the encoder that filled it. Raises CatalogError for another encoder."""

    def __init__(self, catalog: Catalog, encoder: nn.Module) -> None:
        catalog.check_encoder(encoder)
        self.catalog, self.encoder = catalog, encoder.eval()

    def search(self, images: Tensor, k: int) -> SearchResult:
        """The k most similar items, or all where there are fewer, of images uint8 (B, 3, H, W)."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return self.catalog.index.search(encode(self.encoder, images), min(k, len(self.catalog)))
