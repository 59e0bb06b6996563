"""Images through an encoder: what an index holds of them, and what could not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from simsearch.data.loading import ImageBatch
from simsearch.data.manifest import Manifest, load_images
from simsearch.data.presence import Presence
from simsearch.functional.codes import pack_codes, unpack_codes
from simsearch.images import encode_thumbnail
from simsearch.types import Encoder

# Pixels that a network sees at once. What it holds of them, shallow maps above all, is some hundred times as large:
# 60 MB an image of 224 x 224 through the three parts of model=art.
_PIXELS = 32 * 224 * 224


def encode(encoder: Encoder, images: Tensor) -> Tensor:
    """What an index holds of images uint8 (B, 3, H, W): float32 (B, D), or packed codes (B, bits / 8).

    However large the batch, the network sees few enough at once for their maps to take a limited memory.
    """
    device = next(chain(encoder.parameters(), encoder.buffers()), torch.empty(0)).device  # colour has no weights
    side = encoder.input_size  # to which it enlarges smaller ones
    step = max(1, _PIXELS // max(1, side**2, images.shape[2] * images.shape[3]))
    with torch.inference_mode():
        parts = [encoder.embed(part.to(device)).float().cpu() for part in images.split(step)]
        embedding = torch.cat(parts)
    return pack_codes(embedding) if encoder.bits is not None else embedding.clone()


@dataclass(frozen=True)
class Described:
    """What became of n images that could be read and of those that could not.

    vectors: (n, width) as `encode` gives them. rows: int64 (n,), rising, which of all images they are. thumbnails: n,
    or none where none were asked for. errors: of the others.
    """

    vectors: Tensor
    rows: Tensor
    thumbnails: list[bytes] = field(default_factory=list)
    errors: list[ValueError] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


def batches_of(encoder: Encoder, manifest: Manifest, *, batch_size: int = 64, workers: int = 0) -> Iterator[ImageBatch]:
    """Batches of a manifest's images, decoded as the encoder sees them; see `load_images`."""
    return load_images(manifest, size=encoder.input_size, fit=encoder.fit, batch_size=batch_size, workers=workers)


def describe(
    encoder: Encoder,
    batches: Iterable[ImageBatch],
    *,
    thumbnail: int | None = None,
    presence: Presence | None = None,
    advance: Callable[[int], object] | None = None,
) -> Described:
    """Returns what an encoder gives for all images of some batches, in the order of their rows.

    Args:
        encoder: What describes.
        batches: As `batches_of` and `load_chunks` give them: images uint8 (B, 3, H, W), their rows, errors of others.
        thumbnail: Longest side of a thumbnail of each image; None for none.
        presence: What was there when the work began; it ends the work where images vanish meanwhile.
        advance: Is told after each batch how many images it took, readable or not: a progress bar's `update`.

    Raises:
        Vanished: As `presence` does.
    """
    vectors: list[Tensor] = []
    rows: list[Tensor] = []
    thumbnails: list[bytes] = []
    errors: list[ValueError] = []
    for images, at, unreadable in batches:
        if len(images):
            vectors.append(encode(encoder, images))
            rows.append(at)
            if thumbnail is not None:
                thumbnails += [encode_thumbnail(image, thumbnail) for image in images]
        if presence is not None:
            presence.note(unreadable)
        errors += unreadable
        if advance is not None:
            advance(len(images) + len(unreadable))
    if not rows:
        return Described(torch.empty(0, 0), torch.empty(0, dtype=torch.int64), [], errors)
    order = torch.cat(rows).argsort()  # batches come by shape
    found = [thumbnails[i] for i in order.tolist()] if thumbnails else []
    return Described(torch.cat(vectors)[order], torch.cat(rows)[order], found, errors)


def at_most(batches: Iterable[ImageBatch], limit: int) -> Iterator[ImageBatch]:
    """The first `limit` images of some batches, and the errors that came before the last of them."""
    left = limit
    for images, rows, errors in batches:
        yield images[:left], rows[:left], errors
        left -= len(images)
        if left <= 0:
            return


def as_floats(vectors: Tensor, bits: int | None) -> Tensor:
    """What `encode` gives as float32 (n, D) to compare by inner product: codes as -1 and 1."""
    return vectors if bits is None else 2 * unpack_codes(vectors, bits) - 1
