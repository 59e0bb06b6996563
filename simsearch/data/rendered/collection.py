"""The rendered sample: a collection that simsearch draws itself, without any download."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from simsearch.data.collection import Collection
from simsearch.data.rendered.paint import STYLES, generator, paint_work, photograph

_BLOCK = 128  # photographs at a time: keeps the working memory near the cache


def render_collection(
    *, styles: int = 8, artists: int = 5, works: int = 15, photographs: int = 5, size: int = 96, seed: int = 0
) -> Collection:
    """A collection of styles x artists x works x photographs procedural pictures of size x size pixels.

    Its attributes are style, artist and work. Rows come in random order, because ties in a ranking would favour a
    collection sorted by class. The same arguments give the same bytes (with the same versions of NumPy, PyTorch and
    Pillow on the same kind of processor). A collection with larger counts holds the images of a smaller one.

    Args:
        styles: Number of styles, the first of `STYLES` in paint.py.
        artists: Number of artists of each style.
        works: Number of works of each artist.
        photographs: Number of photographs of each work.
        size: Side of the images in pixels, 16 to 512.
        seed: Seed of everything, from 0.

    Raises:
        ValueError: If a count is below 1, or the number of styles, the size or the seed is out of range.
    """
    counts = {"styles": styles, "artists": artists, "works": works, "photographs": photographs}
    for name, value in counts.items():
        _check_integer(name, value, 1, len(STYLES) if name == "styles" else None)
    _check_integer("size", size, 16, 512)
    _check_integer("seed", seed, 0, None)
    canvas = size * 4 // 3  # a photograph shows as little as 70 % of a side
    shape = (styles, artists, works, photographs)
    keys = list(itertools.product(*map(range, shape)))
    images = torch.empty((len(keys), 3, size, size), dtype=torch.uint8)
    per_block = max(1, _BLOCK // photographs)
    places = keys[::photographs]
    for first in range(0, len(places), per_block):
        painted = np.stack([paint_work(seed, *key[:3], size=canvas) for key in places[first : first + per_block]])
        block = torch.from_numpy(painted).repeat_interleave(photographs, dim=0)
        rows = slice(first * photographs, first * photographs + len(block))
        images[rows] = photograph(block, keys=keys[rows], seed=seed, size=size)

    style, artist, work = np.unravel_index(np.arange(len(keys)) // photographs, shape[:3])
    labels = torch.from_numpy(
        np.stack([style, style * artists + artist, (style * artists + artist) * works + work], axis=1)
    ).long()
    artist_names = tuple(f"{name}-{number + 1}" for name in STYLES[:styles] for number in range(artists))
    work_names = tuple(f"{name}/work-{number + 1:02d}" for name in artist_names for number in range(works))
    order = torch.from_numpy(generator(seed).permutation(len(keys)))
    return Collection(
        name="rendered",
        images=images[order],
        labels=labels[order],
        attributes=("style", "artist", "work"),
        classes=(STYLES[:styles], artist_names, work_names),
        is_test=torch.zeros(len(keys), dtype=torch.bool),
    )


def _check_integer(name: str, value: int, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}: write for example {name}={low}")
    if value < low or (high is not None and value > high):
        rule = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {rule}, got {value}: {'raise' if value < low else 'lower'} it")
