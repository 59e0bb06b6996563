"""Converts the images of a caller (files, Pillow images, arrays, tensors) to the form that a network expects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simsearch.data.loading import ImageBatch, Item, batched, load_items
from simsearch.functional.regions import Region, crop
from simsearch.functional.resize import resize_to_fit
from simsearch.images import ImageError, picture_pixels, read_image
from simsearch.types import Encoder, Fit

Given = str | Path | Image.Image | np.ndarray | Tensor


def pixels_of(image: Given) -> Tensor:
    """The pixels of an image in memory, uint8 (3, H, W).

    Args:
        image: A Pillow image, an array uint8 (H, W, 3) or a tensor uint8 (3, H, W).

    Raises:
        ValueError: If `image` is anything else.
    """
    if isinstance(image, Image.Image):
        return picture_pixels(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
        return image.cpu()
    what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, np.ndarray | Tensor) else type(image).__name__
    raise ValueError(
        f"{what} is not an image: give a path, a Pillow image, an array uint8 (H, W, 3) or a tensor uint8 (3, H, W)"
    )


class GivenImages:
    """The images of a caller. Item i is i with the pixels uint8 (3, h, w), or i with the error.

    Args:
        images: Files, Pillow images, arrays uint8 (H, W, 3) or tensors uint8 (3, H, W).
        size: Side in pixels that images are scaled to.
        fit: How images are fitted to `size`.
        region: The part of each image to take alone. None takes the whole image.
    """

    def __init__(self, images: Sequence[Given], *, size: int, fit: Fit, region: Region | None = None) -> None:
        self.images, self.size, self.fit, self.region = images, size, fit, region

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> Path:
        """The path of item i. Progress messages ask for it; only files take long enough for one.

        Args:
            i: Position of the item.
        """
        return Path(str(self.images[i]))

    def __getitem__(self, i: int) -> Item:
        image = self.images[i]
        try:
            if isinstance(image, str | Path):
                path = Path(image).expanduser()
                return i, read_image(path, size=self.size, fit=self.fit, region=self.region)
            return i, resize_to_fit(crop(pixels_of(image), self.region), self.size, self.fit)
        except ImageError as error:
            return i, ImageError(error.path, error.reason, error.detail)  # without what its traceback keeps alive

    def batches(self, *, batch_size: int, workers: int = 0) -> Iterator[ImageBatch]:
        """Batches, as `load_batches` returns them. Files are decoded in worker processes that can be terminated.

        Args:
            batch_size: Number of images per batch, 1 or more.
            workers: Number of additional processes, 0 or more.

        Raises:
            ValueError: If `batch_size` is below 1, or if an item is not an image.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        rows = range(len(self))
        on_disk = any(isinstance(image, str | Path) for image in self.images)
        items = load_items(self, rows, workers=workers) if on_disk else map(self.__getitem__, rows)
        return batched(iter(items), self, batch_size)


def given_images(images: Sequence[Given], encoder: Encoder, region: Region | None = None) -> GivenImages:
    """The images at the size and fit of the encoder.

    Args:
        images: Files, Pillow images, arrays uint8 (H, W, 3) or tensors uint8 (3, H, W).
        encoder: The encoder that will describe them.
        region: The part of each image to take alone. None takes the whole image.
    """
    return GivenImages(images, size=encoder.input_size, fit=encoder.fit, region=region)
