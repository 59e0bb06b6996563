"""Images of many shapes in one flat tensor, and functions of one shape at a time applied to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """N images (3, h, w), each of a shape of its own, where a tensor (N, 3, H, W) would need one for all.

    pixels: uint8 or floating, flat, in which each image lies in one piece. starts: int64 (N,), where it begins.
    shapes: int64 (N, 2), heights and widths.

    An int gives an image (3, h, w), everything else that indexes a tensor's rows gives a Ragged; neither copies.

    Raises ValueError where shapes disagree or an image does not lie within the pixels.
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

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor | Ragged:
        starts, shapes = self.starts[rows], self.shapes[rows]
        if starts.ndim:
            return Ragged(self.pixels, starts, shapes)
        height, width = shapes.tolist()
        return self.pixels[int(starts) : int(starts) + 3 * height * width].view(3, height, width)

    def __iter__(self) -> Iterator[Tensor]:
        """The images, views (3, h, w)."""
        for start, (height, width) in zip(self.starts.tolist(), self.shapes.tolist(), strict=True):
            yield self.pixels[start : start + 3 * height * width].view(3, height, width)

    def packed(self) -> Ragged:
        """The same images, copied, in order, without pixels that belong to none."""
        return ragged(list(self)) if len(self) else Ragged(self.pixels[:0].clone(), self.starts, self.shapes)

    def to(self, device: torch.device | str) -> Ragged:
        """The images with their pixels, and no others, on a device; starts and shapes stay on the CPU."""
        packed = self.packed()
        return Ragged(packed.pixels.to(device), packed.starts, packed.shapes)


def ragged(images: Sequence[Tensor]) -> Ragged:
    """One Ragged of images (3, h, w) of one dtype, N > 0."""
    shapes = torch.tensor([tuple(image.shape[1:]) for image in images], dtype=torch.int64)
    sizes = 3 * shapes.prod(1)
    return Ragged(torch.cat([image.flatten() for image in images]), sizes.cumsum(0) - sizes, shapes)


def stacks(images: Tensor | Ragged, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Places int64 (B,), on the CPU, and images (B, 3, h, w) of one shape, until each image came once.

    images: (N, 3, H, W), which come in order, or Ragged. most: images in a stack; as many as there are where None.
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
    """What a function of images (B, 3, h, w) gives for all of them, (N, ...) in their order; differentiable.

    A result that depends on one image alone is what it would be without the others: nothing is padded.
    most: images at a time.
    """
    if isinstance(images, Tensor) and (most is None or len(images) <= most):
        return function(images)
    places, results = zip(*((places, function(stack)) for places, stack in stacks(images, most)), strict=True)
    return in_order(places, results)


def in_order(places: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, row i that whose place is i. places: int64 (B,) each, together 0..N-1."""
    order = torch.cat(list(places)).argsort()
    rows = torch.cat(list(parts))
    return rows[order.to(rows.device)]
