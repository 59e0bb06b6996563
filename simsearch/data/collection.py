"""A collection of images, in memory or memory-mapped, with the attributes of each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from simsearch.functional.ragged import Ragged


@dataclass(frozen=True)
class Collection:
    """N images with their attributes.

    Attributes:
        name: Name in reports.
        images: uint8 (N, 3, H, W) RGB, or Ragged if shapes differ.
        labels: int64 (N, A), one column for each attribute, -1 if unknown.
        attributes: Names of the A columns.
        classes: For each attribute the names of its values: labels[i, a] == c means `classes[a][c]`.
        is_test: bool (N,), the official test part. All False if there is none.
        paths: The files of the images, or None.
        digest: Hash of these files, or None. It replaces the pixels in the fingerprint: files decoded to another size
            are the same data.

    Raises:
        ValueError: If shapes, dtypes or label ranges disagree.
    """

    name: str
    images: Tensor | Ragged
    labels: Tensor
    attributes: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...]
    is_test: Tensor
    paths: tuple[str, ...] | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        n, a = len(self.images), len(self.attributes)
        if isinstance(self.images, Ragged):
            if self.images.pixels.dtype != torch.uint8:
                raise ValueError(f"images must be uint8, got {self.images.pixels.dtype}")
        elif self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (N, 3, H, W), got {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != (n, a):
            raise ValueError(f"labels must be int64 ({n}, {a}), got {self.labels.dtype} {tuple(self.labels.shape)}")
        if self.is_test.dtype != torch.bool or self.is_test.shape != (n,):
            raise ValueError(f"is_test must be bool ({n},), got {self.is_test.dtype}")
        if len(self.classes) != a:
            raise ValueError(f"{a} attributes but class names for {len(self.classes)}")
        if self.paths is not None and len(self.paths) != n:
            raise ValueError(f"{n} images but {len(self.paths)} paths")
        for column, (attribute, names) in enumerate(zip(self.attributes, self.classes, strict=True)):
            if n and not -1 <= int(self.labels[:, column].min()) <= int(self.labels[:, column].max()) < len(names):
                raise ValueError(f"labels of {attribute!r} must lie in -1..{len(names) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    def column(self, attribute: str) -> Tensor:
        """Labels of one attribute, int64 (N,).

        Args:
            attribute: Name of the attribute.

        Raises:
            ValueError: If the collection lacks it.
        """
        if attribute not in self.attributes:
            raise ValueError(f"no attribute {attribute!r} in {self.name}; it has {', '.join(self.attributes)}")
        return self.labels[:, self.attributes.index(attribute)]

    def path(self, row: int) -> str:
        """The name of an image in reports: its file, or the collection's name and the row.

        Args:
            row: Row of the image.
        """
        return f"{self.name}/{row}" if self.paths is None else self.paths[row]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over pixels (or files), labels, attributes and the test part."""
        images, pixels = self.digest or self._shape, []
        if self.digest is None:
            pixels = [self.images.packed().pixels if isinstance(self.images, Ragged) else self.images]
        digest = hashlib.sha256(repr((images, self.attributes, self.classes)).encode())
        for tensor in (*pixels, self.labels, self.is_test):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()[:16]

    @cached_property
    def content(self) -> str:
        """The key of cached features: the fingerprint and, for files, the shapes they were decoded to."""
        if self.digest is None:
            return self.fingerprint
        return hashlib.sha256(repr((self.fingerprint, self._shape)).encode()).hexdigest()[:16]

    @property
    def _shape(self) -> tuple[int, ...] | list[list[int]]:
        return self.images.shapes.tolist() if isinstance(self.images, Ragged) else tuple(self.images.shape)
