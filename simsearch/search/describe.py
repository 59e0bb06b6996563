"""Runs images through an encoder: descriptors for an index, and a list of the images that could not be read."""

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
from simsearch.functional.regions import Region
from simsearch.images import encode_thumbnail
from simsearch.types import Encoder

# Pixels that a network sees at once. What it holds of them, shallow maps above all, is some hundred times as large:
# 60 MB an image of 224 x 224 through the three parts of model=art.
_PIXELS = 32 * 224 * 224


def encode(encoder: Encoder, images: Tensor) -> Tensor:
    """The descriptors of images in the form that an index stores: float32 (B, D), or packed codes (B, ceil(bits / 8)).

    A large batch is split, so that the activations of the network fit a limited memory.

    Args:
        encoder: The encoder.
        images: uint8 (B, 3, H, W).
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
    """The descriptors of the n images that could be read, and the errors of the others.

    Attributes:
        vectors: (n, width), as `encode` returns them.
        rows: int64 (n,), ascending, the row of each image among all images.
        thumbnails: Image bytes, n of them, or none if thumbnails were not requested.
        errors: Errors of the images that could not be read.
    """

    vectors: Tensor
    rows: Tensor
    thumbnails: list[bytes] = field(default_factory=list)
    errors: list[ValueError] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


def batches_of(
    encoder: Encoder, manifest: Manifest, *, region: Region | None = None, batch_size: int = 64, workers: int = 0
) -> Iterator[ImageBatch]:
    """Batches of a manifest's images, decoded at the encoder's size and fit (see `load_images`).

    Args:
        encoder: The encoder that will describe the images.
        manifest: The images.
        region: The part of each image to take alone, or None.
        batch_size: Number of images per batch, 1 or more.
        workers: Number of additional processes that decode files, 0 or more.
    """
    size, fit = encoder.input_size, encoder.fit
    return load_images(manifest, size=size, fit=fit, region=region, batch_size=batch_size, workers=workers)


def describe(
    encoder: Encoder,
    batches: Iterable[ImageBatch],
    *,
    thumbnail: int | None = None,
    presence: Presence | None = None,
    advance: Callable[[int], object] | None = None,
) -> Described:
    """The descriptors of all images of some batches, in the order of their rows.

    Args:
        encoder: The encoder.
        batches: Batches of `batches_of` or `load_chunks`: images uint8 (B, 3, H, W), their rows, and the errors of
            images that could not be read.
        thumbnail: Longest side in pixels of each thumbnail. None makes no thumbnails.
        presence: The files that existed at the start. The work stops if they disappear.
        advance: Called after each batch with the number of images in it, readable or not, such as the `update` of a
            progress bar.

    Raises:
        Vanished: If files disappear during the work (see `presence`).
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


def as_floats(vectors: Tensor, bits: int | None) -> Tensor:
    """Descriptors as float32 (n, D), for inner products. The bits of codes become -1 and 1.

    Args:
        vectors: (n, width), as `encode` returns them.
        bits: Number of bits in a code. None for real-valued descriptors.
    """
    return vectors if bits is None else 2 * unpack_codes(vectors, bits) - 1
