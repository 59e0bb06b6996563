"""Regions of a photograph as further queries: works in it are small, framed and seen at an angle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simsearch.data.process_pool import MEMORY, SECONDS, Failure, bounded_map
from simsearch.functional.proposals import proposals, rectified
from simsearch.functional.regions import Region, crop
from simsearch.functional.resize import resize_longest, resize_to_fit
from simsearch.images import MAX_PIXELS, ImageError, read_image
from simsearch.search.describe import encode
from simsearch.search.request import Regions
from simsearch.search.verification import Verification
from simsearch.types import Encoder, Fit


def regions_of(
    source: Path | Tensor, encoder: Encoder, verification: Verification, region: Region | None = None
) -> Regions | None:
    """A function that returns the descriptors of a photograph's regions. None if the verification asks for none.

    Args:
        source: The file, or the pixels uint8 (3, H, W).
        encoder: The encoder of the catalog.
        verification: Says how many regions there are.
        region: The part of the photograph to take alone, or None.
    """
    if verification.regions == 0:
        return None

    def describe() -> Tensor:
        one = partial(region_pixels, verification, size=encoder.input_size, fit=encoder.fit, region=region)
        if isinstance(source, Tensor):
            return described(encoder, one(source))
        (found,) = bounded_map(one, [source], workers=1, seconds=SECONDS, memory=MEMORY)
        if isinstance(found, Failure):
            raise ImageError(source, found.reason, found.detail)
        return described(encoder, found)

    return describe


def joined(regions: Sequence[Regions | None]) -> Regions | None:
    """A function that returns the descriptors of the regions of several examples. None if no example has regions.

    Args:
        regions: The functions of the examples; None for an example without regions.
    """
    known = [one for one in regions if one is not None]
    return (lambda: torch.cat([one() for one in known])) if known else None


def region_pixels(
    verification: Verification,
    source: Path | bytes | Tensor,
    *,
    size: int,
    fit: Fit,
    region: Region | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[np.ndarray]:
    """The regions of a photograph at the size and fit of an encoder, uint8 (3, h, w) each.

    They are arrays, which processes send to each other; each tensor would keep a file open.

    Args:
        verification: Says how many regions there are, and at which side they are sought.
        source: The file, its bytes, or the pixels uint8 (3, H, W).
        size: Side in pixels that the encoder sees.
        fit: How images are fitted to it.
        region: The part of the photograph to take alone, or None.
        max_pixels: Largest number of pixels to decode.

    Raises:
        ImageError: If the file cannot be used.
    """
    side = verification.query_side
    if isinstance(source, Tensor):
        image = crop(source, region)
        image = resize_longest(image, side) if max(image.shape[1:]) > side else image
    else:
        image = read_image(source, size=side, fit="longest", enlarge=False, region=region, max_pixels=max_pixels)
    quads = proposals(image, most=verification.regions) if verification.regions else []
    return [resize_to_fit(rectified(image, quad), size, fit).numpy() for quad in quads]


def described(encoder: Encoder, pixels: Sequence[np.ndarray]) -> Tensor:
    """The descriptors of regions in the form that an index stores, (R, width).

    A region whose descriptor is not finite, such as one of a single colour, is left out.

    Args:
        encoder: The encoder.
        pixels: The regions, uint8 (3, h, w) each, one or more.
    """
    images = [torch.from_numpy(one) for one in pixels]
    if len({image.shape for image in images}) == 1:
        found = encode(encoder, torch.stack(images))
    else:
        found = torch.cat([encode(encoder, image[None]) for image in images])
    return found[found.isfinite().all(1)]
