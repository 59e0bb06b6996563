"""The engine: an image in, the similar items of a catalog out."""

from __future__ import annotations

from itertools import chain
from numbers import Integral

import torch
from torch import Tensor, nn

from simsearch.functional.codes import pack_codes
from simsearch.functional.reranking import Reranker, unit_vectors
from simsearch.search.catalog import Catalog
from simsearch.types import SearchResult

# Pixels that a network sees at once. What it holds of them, shallow maps above all, is some hundred times as large:
# 60 MB an image of 224 x 224 through the three parts of model=art.
_PIXELS = 32 * 224 * 224


def encode(encoder: nn.Module, images: Tensor) -> Tensor:
    """What an index holds of images uint8 (B, 3, H, W): float32 (B, D), or packed codes (B, bits / 8).

    However large the batch, the network sees few enough at once for their maps to take a limited memory.
    """
    device = next(chain(encoder.parameters(), encoder.buffers()), torch.empty(0)).device  # colour has no weights
    side = int(getattr(encoder, "input_size", 1))  # to which it enlarges smaller ones
    step = max(1, _PIXELS // max(1, side**2, images.shape[2] * images.shape[3]))
    with torch.inference_mode():
        parts = [encoder.embed(part.to(device)).float().cpu() for part in images.split(step)]  # type: ignore[operator]
        embedding = torch.cat(parts)
    return pack_codes(embedding) if encoder.bits is not None else embedding.clone()


class Engine:
    """Searches a catalog with the encoder that filled it. Raises CatalogError for another encoder.

    With `rerank` all vectors that the index stores are read into memory as float32, and a query is
    compared with each of them: exact whatever the index, at the cost of a full pass.
    """

    def __init__(self, catalog: Catalog, encoder: nn.Module, rerank: Reranker | None = None) -> None:
        catalog.check_encoder(encoder)
        self.catalog, self.encoder = catalog, encoder.eval()
        self._bits: int | None = encoder.bits  # type: ignore[assignment]
        self._reranked = rerank and rerank.fit(unit_vectors(catalog.index.reconstruct(), self._bits))

    def search(self, images: Tensor, k: int) -> SearchResult:
        """The k most similar items, or all where there are fewer, of images uint8 (B, 3, H, W).

        Scores of float descriptors are cosines, of codes minus Hamming distances. After re-ranking they are the
        method's own: inner products of its vectors, or what orders its shortlist. Raises ValueError for k < 1, and for
        more than a shortlist holds.
        """
        return self.nearest(encode(self.encoder, images), k)

    def nearest(self, vectors: Tensor, k: int) -> SearchResult:
        """The same of descriptors (B, width), as `encode` gives them."""
        if not isinstance(k, Integral):
            raise ValueError(f"k must be a whole number, got {k}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if self._reranked is not None:
            return self._reranked.search(unit_vectors(vectors, self._bits), k)
        found = self.catalog.index.search(vectors, min(k, len(self.catalog)))
        if self.catalog.index.metric != "ip":
            return found
        # Rounding, and lengths that a compressed index does not keep, lead out of what a cosine can be.
        return SearchResult(found.ids, torch.where(found.ids < 0, found.scores, found.scores.clamp(-1, 1)))
