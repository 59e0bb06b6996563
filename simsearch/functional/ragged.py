"""Images of many shapes in one flat tensor, and functions that run on one shape at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """N images (3, h, w) of different shapes in one flat tensor.

    An int as index returns an image (3, h, w). Any other index of a tensor's rows returns a Ragged. Neither copies
    pixels.

    Attributes:
        pixels: uint8 or floating point (P,). Each image is one contiguous piece.
        starts: int64 (N,), the position in `pixels` where each image begins.
        shapes: int64 (N, 2), heights and widths.

    Raises:
        ValueError: If the shapes disagree, or if an image does not lie within the pixels.

    Example:
        >>> images = ragged([torch.zeros(3, 1, 2), torch.ones(3, 4, 5)])
        >>> len(images), images[1].shape
        (2, torch.Size([3, 4, 5]))
    """

    pixels: Tensor
    starts: Tensor
    shapes: Tensor

    def __post_init__(self) -> None:
        n = len(self.starts)
        if self.pixels.ndim != 1 or self.starts.shape != (n,) or self.shapes.shape != (n, 2):
            got = ", ".join(str(tuple(t.shape)) for t in (self.pixels, self.starts, self.shapes))
            raise ValueError(f"pixels must be (P,), starts (N,) and shapes (N, 2), got {got}")
        if n and (self.shapes.min() < 1 or self.starts.min() < 0):
            raise ValueError("an image has a side below 1, or starts before the pixels do")
        if n and int((self.starts + 3 * self.shapes.prod(1)).max()) > len(self.pixels):
            raise ValueError(f"an image goes beyond the {len(self.pixels)} pixel values that there are")

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, rows: int) -> Tensor: ...

    @overload
    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Tensor | Ragged: ...

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor | Ragged:
        starts, shapes = self.starts[rows], self.shapes[rows]
        if starts.ndim:
            return Ragged(self.pixels, starts, shapes)
        height, width = shapes.tolist()
        return self.pixels[int(starts) : int(starts) + 3 * height * width].view(3, height, width)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the images as views (3, h, w)."""
        for start, (height, width) in zip(self.starts.tolist(), self.shapes.tolist(), strict=True):
            yield self.pixels[start : start + 3 * height * width].view(3, height, width)

    def packed(self) -> Ragged:
        """A copy of the same images in the same order, without pixels that belong to no image."""
        return ragged(list(self)) if len(self) else Ragged(self.pixels[:0].clone(), self.starts, self.shapes)

    def to(self, device: torch.device | str) -> Ragged:
        """The packed images with their pixels on a device. Starts and shapes stay on the CPU.

        Args:
            device: Device of the pixels.
        """
        packed = self.packed()
        return Ragged(packed.pixels.to(device), packed.starts, packed.shapes)


def ragged(images: Sequence[Tensor]) -> Ragged:
    """A Ragged of some images.

    Args:
        images: N > 0 images (3, h, w) of one dtype.

    Example:
        >>> ragged([torch.zeros(3, 1, 2), torch.ones(3, 4, 5)]).shapes
        tensor([[1, 2],
                [4, 5]])
    """
    shapes = torch.tensor([tuple(image.shape[1:]) for image in images], dtype=torch.int64)
    sizes = 3 * shapes.prod(1)
    return Ragged(torch.cat([image.flatten() for image in images]), sizes.cumsum(0) - sizes, shapes)


def stacks(images: Tensor | Ragged, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields all images in stacks of one shape: their positions, int64 (B,) on the CPU, and the images (B, 3, h, w).

    Args:
        images: (N, 3, H, W), which come in order, or Ragged.
        most: Largest number of images in a stack; None sets no limit.

    Example:
        >>> images = ragged([torch.zeros(3, 1, 2), torch.ones(3, 4, 5), torch.ones(3, 1, 2)])
        >>> [(places.tolist(), tuple(stack.shape)) for places, stack in stacks(images)]
        [([0, 2], (2, 3, 1, 2)), ([1], (1, 3, 4, 5))]
    """
    if isinstance(images, Tensor):
        for places in torch.arange(len(images)).split(most or max(1, len(images))):
            yield places, images[int(places[0]) : int(places[-1]) + 1] if len(places) else images
        return
    _, shape = images.shapes.unique(dim=0, return_inverse=True)
    order = shape.argsort(stable=True)
    for group in order.split(shape.bincount().tolist()):
        for places in group.split(most or len(group)):
            yield places, torch.stack(list(images[places]))


def by_shape(function: Callable[[Tensor], Tensor], images: Tensor | Ragged, most: int | None = None) -> Tensor:
    """The results of a function for all images, (N, ...) in the order of the images. Gradients pass.

    Nothing is padded: where a result depends on one image alone, it is the same as without the other images.

    Args:
        function: A function of images (B, 3, h, w) of one shape that returns (B, ...).
        images: (N, 3, H, W) or Ragged.
        most: Largest number of images in a call; None sets no limit.

    Example:
        >>> images = ragged([torch.zeros(3, 1, 2), torch.ones(3, 4, 5)])
        >>> by_shape(lambda stack: stack.mean((1, 2, 3)), images)
        tensor([0., 1.])
    """
    if isinstance(images, Tensor) and (most is None or len(images) <= most):
        return function(images)
    places, results = zip(*((places, function(stack)) for places, stack in stacks(images, most)), strict=True)
    return in_order(places, results)


def in_order(places: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, ordered so that row i is the one with position i.

    Args:
        places: int64 (B,) each, positions that are together 0..N-1.
        parts: (B, ...) each, the rows at these positions.

    Example:
        >>> in_order([torch.tensor([1]), torch.tensor([0])], [torch.tensor([10.0]), torch.tensor([20.0])])
        tensor([20., 10.])
    """
    order = torch.cat(list(places)).argsort()
    rows = torch.cat(list(parts))
    return rows[order.to(rows.device)]
