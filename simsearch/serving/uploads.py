"""Images that clients sent, kept in memory for a limited time under tokens that cannot be guessed."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from simsearch.functional.resize import Fit
from simsearch.images import ImageError, encode_thumbnail, header_shape, read_image

STATUS = {"too-large-file": 413, "not-an-image": 415, "unsupported": 415, "empty": 415}  # others: 422


def status_of(error: ImageError) -> int:
    """The HTTP status for an image that cannot be used.

    Args:
        error: The error.
    """
    return STATUS.get(error.reason, 422)


def viewable(data: bytes, side: int, max_pixels: int) -> bytes:
    """An image file scaled to at most `side` pixels, as JPEG (PNG if it is tiny).

    Args:
        data: Bytes of an image file.
        side: Longest side in pixels.
        max_pixels: Largest number of pixels, by the header.

    Raises:
        ImageError: If the image cannot be used.
    """
    longest = min(side, max(header_shape(data) or (side,)))
    return encode_thumbnail(read_image(data, size=longest, fit="longest", max_pixels=max_pixels), side)


def decoded(data: bytes, size: int, fit: Fit, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """An image's pixels at an encoder's size and fit, uint8 (3, h, w), and its own width and height.

    Args:
        data: Bytes of an image file.
        size: Side in pixels.
        fit: How the image is fitted to `size`.
        max_pixels: Largest number of pixels, by the header.

    Raises:
        ImageError: If the image cannot be used.
    """
    pixels = read_image(data, size=size, fit=fit, max_pixels=max_pixels)
    height, width = header_shape(data) or pixels.shape[1:]
    return pixels.numpy(), (width, height)


@dataclass(eq=False)
class Upload:
    """An image file of a client. Pixels and descriptors are added when they are computed.

    Attributes:
        data: Bytes of the file.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        pixels: Pixels at the size and fit of encoders, by (size, fit).
        descriptors: Descriptors by encoder fingerprint, so that a new encoder computes its own.
    """

    data: bytes
    width: int
    height: int
    pixels: dict[tuple[int, Fit], Tensor] = field(default_factory=dict)
    descriptors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The size of the upload in memory, in bytes."""
        return len(self.data) + sum(p.nbytes for p in (*self.pixels.values(), *self.descriptors.values()))


class Uploads:
    """Uploads by token, with limits on number, size and age. Not thread-safe.

    Args:
        count: Largest number of uploads.
        nbytes: Largest total size in bytes.
        seconds: How long an upload is kept after its last use, in seconds.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, count: int, nbytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._bytes, self.seconds, self._clock = count, nbytes, seconds, clock
        self._kept: OrderedDict[str, tuple[Upload, float]] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, upload: Upload) -> str:
        """Adds an upload and returns its token. Older uploads may be dropped.

        Args:
            upload: The upload.
        """
        token = secrets.token_urlsafe(16)
        self._kept[token] = upload, self._clock()
        self.sweep()
        return token

    def get(self, token: str) -> Upload | None:
        """The upload of a token. None if there is none, or if it has been dropped.

        Args:
            token: The token.
        """
        self.sweep()
        if token not in self._kept:
            return None
        upload, _ = self._kept.pop(token)
        self._kept[token] = upload, self._clock()
        return upload

    def sweep(self) -> None:
        """Drops uploads that have expired or exceed the limits."""
        oldest = self._clock() - self.seconds
        total = sum(upload.nbytes for upload, _ in self._kept.values())
        while self._kept:
            token, (upload, used) = next(iter(self._kept.items()))
            if used > oldest and len(self._kept) <= self._count and (total <= self._bytes or len(self._kept) == 1):
                return
            del self._kept[token]
            total -= upload.nbytes
