"""Images that clients sent, kept for a limited time under tokens that cannot be guessed: in memory, and in a folder.

The folder makes a link to a search outlive the server. It holds the files as they were sent, and nothing else.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from simsearch.files import is_temporary, replacing
from simsearch.functional.regions import Region
from simsearch.functional.resize import Fit
from simsearch.images import ImageError, encode_thumbnail, header_shape, read_image
from simsearch.types import LocalFeatures

log = logging.getLogger("simsearch.serving")

_PARTS = 16  # regions of one upload whose pixels and descriptors are remembered
_FORGOTTEN_SECONDS = 3600.0  # after this time, a half-written file is nobody's
_NAME = re.compile(r"([A-Za-z0-9_-]{22})\.upload")  # no other file in the folder is touched
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


def decoded(
    data: bytes, size: int, fit: Fit, max_pixels: int, region: Region | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """An image's pixels at an encoder's size and fit, uint8 (3, h, w), and the whole image's own width and height.

    Args:
        data: Bytes of an image file.
        size: Side in pixels.
        fit: How the image is fitted to `size`.
        max_pixels: Largest number of pixels, by the header.
        region: The part of the image to take alone, or None.

    Raises:
        ImageError: If the image cannot be used.
    """
    pixels = read_image(data, size=size, fit=fit, max_pixels=max_pixels, region=region)
    height, width = header_shape(data) or pixels.shape[1:]
    return pixels.numpy(), (width, height)


@dataclass(eq=False)
class Upload:
    """An image file of a client. Pixels and descriptors are added when they are computed.

    Attributes:
        data: Bytes of the file.
        pixels: Pixels at the size and fit of encoders, by (size, fit) and region.
        descriptors: Descriptors by encoder fingerprint, so that a new encoder computes its own, and region.
        local: Local features by the config of the verification, and region.
        regions: Descriptors of regions of a photograph by encoder fingerprint, their number, and region.
    """

    data: bytes
    pixels: dict[tuple[int, Fit, Region | None], Tensor] = field(default_factory=dict)
    descriptors: dict[tuple[str, Region | None], Tensor] = field(default_factory=dict)
    local: dict[tuple[str, Region | None], tuple[LocalFeatures, ...]] = field(default_factory=dict)
    regions: dict[tuple[str, int, Region | None], Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The size of the upload in memory, in bytes."""
        local = sum(one.descriptors.nbytes for found in [*self.local.values()] for one in found)
        tensors = [*self.pixels.values(), *self.descriptors.values(), *self.regions.values()]
        return len(self.data) + local + sum(one.nbytes for one in tensors)

    def make_room(self) -> None:
        """Forgets the oldest regions, so that drawing many rectangles on one image takes no memory."""
        for known in (self.pixels, self.descriptors, self.local, self.regions):
            for key in [key for key in [*known] if key[-1] is not None][:-_PARTS]:  # a copy: other threads add to them
                known.pop(key, None)


class UploadFolder:
    """Image files by token in a folder of one's own, with limits on number, size and age.

    Several servers may share it. Only files with the name of an upload are read and removed.

    Args:
        folder: The folder. It is made, for its owner alone, if it does not exist.
        count: Largest number of files.
        nbytes: Largest total size in bytes.
        seconds: How long a file is kept after its last use, in seconds.
        clock: Function that returns the time in seconds since the epoch.

    Raises:
        OSError: If the folder cannot be made or written to.
    """

    def __init__(
        self, folder: Path, count: int, nbytes: int, seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied", str(folder))
        self.folder, self._count, self._bytes, self._seconds, self._clock = folder, count, nbytes, seconds, clock

    def write(self, token: str, data: bytes) -> None:
        """Keeps a file. Older ones may be removed.

        Args:
            token: Its token.
            data: Its bytes.
        """
        path = self._path(token)
        assert path is not None
        with replacing(path) as temporary:
            temporary.write_bytes(data)
            self._touch(temporary)
        self.sweep()

    def read(self, token: str) -> bytes | None:
        """The bytes of a file, which count as used now. None if there is no such file, or if it has expired.

        Args:
            token: Its token. It may be any text.
        """
        path = self._path(token)
        try:
            if path is None or path.is_symlink() or self._is_old(path.stat().st_mtime):
                return None
            self._touch(path)
            return path.read_bytes()
        except OSError:
            return None

    def use(self, token: str) -> None:
        """Counts a file as used now.

        Args:
            token: Its token.
        """
        with suppress(OSError):
            if (path := self._path(token)) is not None:
                self._touch(path)

    def sweep(self) -> None:
        """Removes files that have expired or exceed the limits, the longest unused first."""
        kept = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    about = entry.stat(follow_symlinks=False)
                    if _NAME.fullmatch(entry.name):
                        kept.append((about.st_mtime, about.st_size, entry.path))
                    elif is_temporary(entry.name) and about.st_mtime < self._clock() - _FORGOTTEN_SECONDS:
                        os.unlink(entry.path)
        total = sum(size for _, size, _ in kept)
        for place, (used, size, path) in enumerate(sorted(kept)):
            left = len(kept) - place
            if not self._is_old(used) and left <= self._count and (total <= self._bytes or left == 1):
                return
            with suppress(OSError):  # another server was first
                os.unlink(path)
            total -= size

    def _is_old(self, used: float) -> bool:
        return used <= self._clock() - self._seconds

    def _touch(self, path: Path) -> None:
        os.utime(path, (self._clock(), self._clock()))

    def _path(self, token: str) -> Path | None:
        name = f"{token}.upload"
        return self.folder / name if _NAME.fullmatch(name) else None


class Uploads:
    """Uploads by token, with limits on number, size and age. Several threads may use it at once.

    Args:
        count: Largest number of uploads.
        nbytes: Largest total size in bytes.
        seconds: How long an upload is kept after its last use, in seconds.
        folder: The folder in which they outlive this process. None keeps them in memory only.
        clock: Function that returns the time in seconds.
    """

    def __init__(
        self,
        count: int,
        nbytes: int,
        seconds: float,
        folder: UploadFolder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count, self._bytes, self.seconds, self.folder, self._clock = count, nbytes, seconds, folder, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Upload, float]] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, upload: Upload) -> str:
        """Adds an upload and returns its token. Older uploads may be dropped.

        Args:
            upload: The upload.
        """
        token = secrets.token_urlsafe(16)
        self._keep(token, upload)
        if self.folder is not None:
            try:
                self.folder.write(token, upload.data)
            except OSError as error:  # a full disk costs the next server the image, not this one
                log.warning("an upload is kept in memory only: %s", error)
        return token

    def get(self, token: str) -> Upload | None:
        """The upload of a token. None if there is none, or if it has been dropped.

        Args:
            token: The token. It may be any text.
        """
        with self._lock:
            self._drop()
            upload, _ = self._kept.pop(token, (None, 0.0))
            if upload is not None:
                self._kept[token] = upload, self._clock()
        if self.folder is None:
            return upload
        if upload is not None:
            self.folder.use(token)
        elif (data := self.folder.read(token)) is not None:
            upload = Upload(data)
            self._keep(token, upload)
        return upload

    def sweep(self) -> None:
        """Drops uploads that have expired or exceed the limits."""
        with self._lock:
            self._drop()
        if self.folder is not None:
            self.folder.sweep()

    def _keep(self, token: str, upload: Upload) -> None:
        with self._lock:
            self._kept[token] = upload, self._clock()
            self._drop()

    def _drop(self) -> None:
        oldest = self._clock() - self.seconds
        total = sum(upload.nbytes for upload, _ in self._kept.values())
        while self._kept:
            token, (upload, used) = next(iter(self._kept.items()))
            if used > oldest and len(self._kept) <= self._count and (total <= self._bytes or len(self._kept) == 1):
                return
            del self._kept[token]
            total -= upload.nbytes
