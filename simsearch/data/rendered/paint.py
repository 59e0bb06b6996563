"""Procedural pictures, and photographs of them: pure functions from a seed to pixels.

An artist (a palette and a few traits) paints a picture in a style (one drawing function), at any size, in coordinates
from 0 to 1. Every artist, work and photograph has its own random stream, keyed by (seed, style, artist, work,
photograph), so that a picture does not depend on which others are drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from simsearch.functional.camera import blur, perspective_grid

Array = NDArray[np.floating]

_TRAITS = ("scale", "angle", "weight", "order", "spread", "grain")
# The painter's wheel: hues (of HSV) of red, orange, yellow, green, teal, blue, violet, crimson, red.
_WHEEL = (0.0, 0.07, 0.13, 0.33, 0.49, 0.6, 0.74, 0.93, 1.0)
# Places on the wheel beside the first: analogous, complementary, triad, split complementary.
_SCHEMES = ((0.05, -0.06, 0.11), (0.05, 0.5, 0.45), (0.33, 0.67, 0.04), (0.42, 0.58, -0.05))


@dataclass(frozen=True)
class Artist:
    """The properties that an artist's works share. Traits lie in 0..1.

    Attributes:
        palette: float32 (6, 3) RGB in 0..1. The first colour is the light ground, the last the dark line.
        scale: Size of the forms.
        angle: Preferred direction, 1 for half a turn.
        weight: Thickness of lines.
        order: From wild (0) to regular (1).
        spread: Distance of colours from the palette.
        grain: Coarseness of the canvas.
    """

    palette: Array
    scale: float
    angle: float
    weight: float
    order: float
    spread: float
    grain: float


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random stream of one artist, work or photograph.

    Args:
        seed: Seed of the collection.
        key: Its place (style, artist, ...).
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def invent_artist(seed: int, style: int, artist: int) -> Artist:
    """An artist of a style.

    Base hue and traits follow a Kronecker sequence that starts at a point of the style. The artists of one style then
    lie apart, however many there are, while artists of different styles may share a palette.

    Args:
        seed: Seed of the collection.
        style: Position in `STYLES`.
        artist: Number of the artist, from 0.

    Source:
        Roberts: The unreasonable effectiveness of quasirandom sequences. 2018.
    """
    d = len(_TRAITS) + 1
    step = _plastic_root(d) ** -np.arange(1.0, d + 1)
    start = generator(seed, style).random(d)
    hue, *traits = (start + artist * step) % 1.0
    palette = _palette(generator(seed, style, artist), hue)
    return Artist(palette, **dict(zip(_TRAITS, map(float, traits), strict=True)))


def paint_work(seed: int, style: int, artist: int, work: int, *, size: int) -> NDArray[np.uint8]:
    """One work, uint8 (3, size, size) RGB. The composition is the same at any size.

    Args:
        seed: Seed of the collection.
        style: Position in `STYLES`.
        artist: Number of the artist, from 0 without limit.
        work: Number of the work, from 0 without limit.
        size: Side in pixels.
    """
    rng = generator(seed, style, artist, work)
    hand = _vary(rng, invent_artist(seed, style, artist))
    picture = _PAINTERS[STYLES[style]](rng, hand, size)
    weave = 0.6 * _noise(rng, size, 60) + 0.4 * _noise(rng, size, 24)
    picture = picture * (1.0 + 0.35 * hand.grain**2 * (weave - 0.5))
    return np.rint(picture.clip(0.0, 1.0) * 255).astype(np.uint8)


def photograph(works: Tensor, *, keys: Sequence[tuple[int, ...]], seed: int, size: int) -> Tensor:
    """Photographs of works, uint8 (B, 3, size, size).

    A photograph shows the work or a large part of it (at least about 70% of each side), turned by up to 8 degrees and
    in perspective, under uneven coloured light, at times with a reflection. It has a tone curve, blur and noise, and a
    third of the photographs went through JPEG.

    Args:
        works: uint8 (B, 3, S, S), one entry for each photograph.
        keys: The place (style, artist, work, photograph) of each photograph.
        seed: Seed of the collection.
        size: Side in pixels.
    """
    rngs = [generator(seed, *key) for key in keys]
    shots = [_aim(rng) for rng in rngs]
    noise = torch.from_numpy(np.stack([rng.standard_normal((3, size, size), dtype=np.float32) for rng in rngs]))

    def column(name: str) -> Tensor:
        values = torch.from_numpy(np.stack([shot[name] for shot in shots]).astype(np.float32))
        return values.reshape(len(shots), -1, 1, 1)

    grid = perspective_grid(torch.from_numpy(np.stack([shot["corners"] for shot in shots])), size)
    image = F.grid_sample(works.float() / 255, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Only sums and products from here: their rounding does not depend on how a block is split.
    image = blur(image, column("kernel"))
    axis = torch.linspace(-1.0, 1.0, size)
    y, x = axis[:, None], axis[None, :]
    slope = column("slope")
    image = image * column("light") * (1.0 + slope[:, :1] * x + slope[:, 1:] * y)
    spot = column("spot")
    distance = ((x - spot[:, :1]) ** 2 + (y - spot[:, 1:2]) ** 2) / spot[:, 2:3]
    image = image + column("glare") / (1.0 + distance) ** 2
    image = image.clamp(0.0, 1.0)
    image = image + column("tone") * image * (1.0 - image) + column("noise") * noise
    pixels = (image.clamp(0.0, 1.0) * 255).round().to(torch.uint8)
    for row, shot in enumerate(shots):
        if shot["quality"]:
            pixels[row] = _through_jpeg(pixels[row], int(shot["quality"]))
    return pixels


# ---- photographing ----------------------------------------------------------------------------------


def _aim(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Camera and light of one photograph. `strength` makes some photographs easy and others hard."""
    strength = rng.uniform(0.3, 1.0)
    side = 1.0 - 0.3 * rng.random() * strength
    turn = np.deg2rad(rng.uniform(-8.0, 8.0)) * strength
    square = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    corners = side * (square + rng.uniform(-0.16, 0.16, (4, 2)) * strength) @ rotation
    corners = (corners + (1.0 - side) * rng.uniform(-1.0, 1.0, 2)).clip(-1.0, 1.0)
    cast = 1.0 + rng.uniform(-0.14, 0.14, 3) * strength
    direction = rng.uniform(0.0, 2 * np.pi)
    sigma = 0.2 + 1.1 * rng.random() ** 2 * strength
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    return {
        "corners": corners,
        "light": cast * (1.0 + rng.uniform(-0.25, 0.15) * strength),
        "slope": 0.3 * rng.random() * strength * np.array([np.cos(direction), np.sin(direction)]),
        "tone": rng.uniform(-0.4, 0.4, 1) * strength,
        "kernel": kernel / kernel.sum(),
        "noise": rng.uniform(0.005, 0.05, 1) * strength,
        "spot": np.append(rng.uniform(-0.9, 0.9, 2), rng.uniform(0.02, 0.15)),
        "glare": np.array([rng.uniform(0.3, 0.8) * strength * (rng.random() < 0.2)]),
        "quality": np.array(rng.integers(25, 85) if rng.random() < 1 / 3 else 0),
    }


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


# ---- the artist's means -------------------------------------------------------------------------------


def _plastic_root(d: int) -> float:
    """The positive root of x^(d+1) = x + 1."""
    x = 2.0
    for _ in range(40):
        x = (1.0 + x) ** (1.0 / (d + 1))
    return x


def _palette(rng: np.random.Generator, base: float) -> Array:
    """Six colours in harmony about a base hue (a place on the painter's wheel in 0..1)."""
    turns = base + np.array([0.0, 0.0, *_SCHEMES[rng.integers(len(_SCHEMES))], 0.0])
    turns[[0, 5]] += rng.uniform(-0.1, 0.1, 2)
    hue = np.interp(turns % 1.0, np.linspace(0.0, 1.0, len(_WHEEL)), _WHEEL)
    vivid = rng.uniform(0.6, 1.0)
    saturation = np.array([rng.uniform(0.04, 0.25), *vivid * rng.uniform(0.4, 0.95, 4), rng.uniform(0.2, 0.7)])
    value = np.array([rng.uniform(0.85, 0.97), *rng.uniform(0.4, 0.95, 4), rng.uniform(0.1, 0.28)])
    # HSV to RGB in closed form.
    k = (np.array([5.0, 3.0, 1.0]) + 6.0 * hue[:, None]) % 6.0
    chroma = (value * saturation)[:, None]
    return (value[:, None] - chroma * np.minimum(k, 4.0 - k).clip(0.0, 1.0)).astype(np.float32)


def _vary(rng: np.random.Generator, artist: Artist) -> Artist:
    """The artist as in one work: traits vary a little, colours are weighted differently and shifted.

    The middle colours of the palette are redrawn with repetition, so that a work uses some of them, in its own
    proportions.
    """
    shift = rng.normal(0.0, 0.12, len(_TRAITS)).tolist()
    traits = {name: min(max(getattr(artist, name) + s, 0.0), 1.0) for name, s in zip(_TRAITS, shift, strict=True)}
    middle = rng.choice([1, 2, 3, 4], size=4, p=rng.dirichlet(np.full(4, 1.2)))
    palette = artist.palette[[0, *middle, 5]] + rng.normal(0.0, 0.05, (6, 3)) + rng.normal(0.0, 0.05, 3)
    return replace(artist, palette=palette.clip(0.02, 0.98).astype(np.float32), **traits)


def _mix(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _plane(size: int) -> tuple[Array, Array]:
    """Coordinates x (1, size) and y (size, 1) of the pixel centres, in 0..1."""
    at = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return at[None, :], at[:, None]


def _turned(size: int, angle: float) -> tuple[Array, Array]:
    """Coordinates (size, size) about the centre, turned by an angle in radians."""
    x, y = _plane(size)
    c, s = math.cos(angle), math.sin(angle)
    return c * (x - 0.5) + s * (y - 0.5), c * (y - 0.5) - s * (x - 0.5)


def _window(size: int, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
    """Rows and columns of the pixels that a box in 0..1 touches."""

    def span(low: float, high: float) -> slice:
        return slice(max(0, int(low * size) - 1), max(0, min(size, int(high * size) + 2)))

    return span(top, bottom), span(left, right)


def _ground(colour: Array, size: int) -> Array:
    return np.repeat(colour, size * size).reshape(3, size, size)


def _over(picture: Array, colour: Array, coverage: Array) -> None:
    """Lays a colour, (3,) or (3, H, W), over a picture (3, H, W) in place."""
    change = (colour if colour.ndim == 3 else colour[:, None, None]) - picture
    change *= coverage
    picture += change


def _inside(distance: Array, size: int, softness: float = 0.0) -> Array:
    """Coverage in 0..1 of the area at negative signed distance. Edges are one pixel wide, or more."""
    return (0.5 - distance / max(1.0 / size, softness)).clip(0.0, 1.0)


def _look_up(colours: Array, index: NDArray[np.intp]) -> Array:
    """Image (3, H, W) of the colours (n, 3) at an index (H, W)."""
    return colours.T.take(index, axis=1)


def _tints(rng: np.random.Generator, hand: Artist, shape: tuple[int, ...], chance: Array | None = None) -> Array:
    """Colours (*shape, 3): palette entries, from the lightest to the middle ones, with jitter.

    `chance` (*shape) in 0..1 picks the entry. None draws it.
    """
    share = rng.random(shape) if chance is None else chance
    pick = (share * 5).astype(np.intp).clip(0, 4)
    jitter = rng.normal(0.0, 1.0, (*shape, 1)) + 0.5 * rng.normal(0.0, 1.0, (*shape, 3))
    return (hand.palette[pick] + _mix(0.01, 0.09, hand.spread) * jitter).clip(0.0, 1.0).astype(np.float32)


def _noise(rng: np.random.Generator, size: int, cells: int, octaves: int = 1) -> Array:
    """Fractal value noise (size, size) in 0..1, `cells` bumps across."""
    total = np.zeros((size, size), np.float32)
    at = _plane(size)[0][0]
    for octave in range(octaves):
        n = cells * 2**octave
        values = rng.random((n + 1, n + 1), dtype=np.float32)
        low = (at * n).astype(np.intp)
        part = at * n - low
        part = part * part * (3 - 2 * part)
        rows = values[low] + part[:, None] * (values[low + 1] - values[low])
        total += (rows[:, low] + part * (rows[:, low + 1] - rows[:, low])) * 0.5**octave
    return total / (2 - 2.0 ** (1 - octaves))


def _masses(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """A soft composition (size, size) in 0..1: noise, in layers if the artist's order is high."""
    _, y = _plane(size)
    field = _noise(rng, size, round(_mix(4, 2, hand.scale)), 2)
    field = field + _mix(0.0, 0.8, hand.order) * (y - 0.5) * (1 if rng.random() < 0.5 else -1)
    low, high = field.min(), field.max()
    return (field - low) / (high - low) * 0.999


def _lattice(
    rng: np.random.Generator, *, size: int, cells: int, reach: int, jitter: float
) -> tuple[Array, Array, tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """A point in each cell of a lattice with `reach` cells of margin on each side.

    Returns column and row of the points in units of cells, float32 (n, n) with n = cells + 2 reach, and their pixels
    (rows, columns); for points in the margin these are the nearest pixels.
    """
    n = cells + 2 * reach
    row, column = np.mgrid[:n, :n] - reach + 0.5 + rng.uniform(-jitter, jitter, (2, n, n))
    row_at, column_at = ((place / cells * size).astype(np.intp).clip(0, size - 1) for place in (row, column))
    return column.astype(np.float32), row.astype(np.float32), (row_at, column_at)


def _neighbours(fields: Array, *, size: int, cells: int, reach: int) -> Iterator[Array]:
    """The fields (F, n, n) of each neighbouring cell up to `reach` away, at each pixel: (F, size, size).

    Offsets come in raster order. Layers that are painted in this order look as if painted cell by cell, because
    subtracting the pixel's own cell does not change the order of two cells.
    """
    own = (np.arange(size) * cells // size).astype(np.intp)
    for row in range(2 * reach + 1):
        rows = fields.take(own + row, axis=1)
        for column in range(2 * reach + 1):
            yield rows.take(own + column, axis=2)


def _marks(
    rng: np.random.Generator,
    hand: Artist,
    picture: Array,
    *,
    cells: int,
    length: float,
    width: float,
    angle: Array,
    chance: Array,
    cover: float,
) -> None:
    """Paints one oval mark for each cell of a jittered lattice, in place.

    `length` and `width` are half axes in cells. `angle` (radians) and `chance` (see `_tints`) are fields (size, size),
    read at the mark. `cover` is the fraction of cells that get a mark.
    """
    size = picture.shape[-1]
    reach = 2 if length > 1.0 else 1
    column, row, at = _lattice(rng, size=size, cells=cells, reach=reach, jitter=_mix(0.5, 0.1, hand.order))
    turn = angle[at] + rng.normal(0.0, 0.25, row.shape)
    grow = rng.uniform(0.7, 1.2, row.shape)
    there = rng.random(row.shape) < cover
    tints = _tints(rng, hand, row.shape, (chance[at] + rng.normal(0.0, 0.08, row.shape)).clip(0.0, 1.0))
    along, across = 1 / (length * grow), 1 / (width * grow)
    fields = [
        column,
        row,
        np.cos(turn) * along,
        np.sin(turn) * along,
        np.cos(turn) * across,
        np.sin(turn) * across,
    ]
    marks = np.concatenate([np.stack([*fields, there]), np.moveaxis(tints, 2, 0)]).astype(np.float32)
    x, y = (axis * cells for axis in _plane(size))
    edge = width * size / cells
    for cx, cy, cos_l, sin_l, cos_w, sin_w, drawn, *tint in _neighbours(marks, size=size, cells=cells, reach=reach):
        dx, dy = x - cx, y - cy
        radius = np.sqrt((cos_l * dx + sin_l * dy) ** 2 + (cos_w * dy - sin_w * dx) ** 2)
        _over(picture, np.stack(tint), ((1 - radius) * edge + 0.5).clip(0.0, 1.0) * drawn)


# ---- the styles ---------------------------------------------------------------------------------------


def _stripes(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Hard-edge bands, straight or bent."""
    u, v = _turned(size, math.pi * hand.angle)
    bend = _mix(0.12, 0.0, hand.order) * rng.uniform(0.5, 1.5)
    u = u + bend * np.sin(rng.uniform(3, 9) * v + rng.uniform(0, 6))
    count = round(_mix(26, 6, hand.scale))
    widths = rng.dirichlet(np.full(count, _mix(1.2, 30.0, hand.order)))
    edges = (1.5 * (np.cumsum(widths) - 0.5)).tolist()
    tints = _tints(rng, hand, (int(rng.integers(3, 6)) if hand.order > 0.4 else count,))
    line = _mix(-0.006, 0.008, hand.weight)
    picture = _ground(tints[-1], size)
    for band, edge in reversed(list(enumerate(edges[:-1]))):
        _over(picture, tints[band % len(tints)], _inside(u - edge, size, 0.03 * hand.spread**2))
        if line > 0:
            _over(picture, hand.palette[5], _inside(np.abs(u - edge) - line, size))
    return picture


def _pointillism(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Dots of pure colour over soft masses."""
    masses = _masses(rng, hand, size)
    picture = _ground(hand.palette[0], size)
    cells = round(_mix(32, 14, hand.scale))
    radius = _mix(0.38, 0.75, hand.weight)
    flat = np.zeros_like(masses)
    other = 1 - np.abs(2 * masses - 1)
    _marks(rng, hand, picture, cells=cells, length=radius, width=radius, angle=flat, chance=masses, cover=1.0)
    share = _mix(0.15, 0.6, hand.spread)
    _marks(
        rng,
        hand,
        picture,
        cells=cells + 3,
        length=radius,
        width=radius,
        angle=flat,
        chance=other,
        cover=share,
    )
    return picture


def _grid(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Rectangles between black bars (neoplasticism), upright or tilted."""
    tilted = hand.angle > 0.7
    u, v = _turned(size, math.pi / 4 if tilted else 0.0)
    half = 0.71 if tilted else 0.5
    boxes = [(-half, -half, half, half)]
    done: list[tuple[float, float, float, float]] = []
    smallest = _mix(0.13, 0.42, hand.scale)
    while boxes:
        left, top, right, bottom = boxes.pop()
        wide = (right - left) * rng.uniform(0.7, 1.4) > bottom - top
        extent = right - left if wide else bottom - top
        if extent < 2 * smallest or (len(done) > 2 and rng.random() < 0.08):
            done.append((left, top, right, bottom))
            continue
        margin = smallest / extent
        free = rng.random() > hand.order
        cut = extent * (rng.uniform(margin, 1 - margin) if free else (1 / 3, 1 / 2, 2 / 3)[rng.integers(3)])
        if wide:
            boxes += [(left, top, left + cut, bottom), (left + cut, top, right, bottom)]
        else:
            boxes += [(left, top, right, top + cut), (left, top + cut, right, bottom)]
    picture = _ground(hand.palette[5], size)
    tints = _tints(rng, hand, (len(done),))
    plain = rng.random(len(done)) < _mix(0.7, 0.1, hand.spread)
    bar = _mix(0.004, 0.03, hand.weight)
    for (left, top, right, bottom), tint, blank in zip(done, tints, plain, strict=True):
        across = np.abs(u - (left + right) / 2) - (right - left) / 2
        down = np.abs(v - (top + bottom) / 2) - (bottom - top) / 2
        _over(picture, hand.palette[0] if blank else tint, _inside(np.maximum(across, down) + bar, size))
    return picture


def _landscape(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Ridges behind one another under a sky, at times with a sun or a lake."""
    x, y = _plane(size)
    horizon = _mix(0.25, 0.55, hand.angle) + rng.uniform(-0.05, 0.05)
    light, sky, sun, near = hand.palette[[0, 1, 2, 5]]
    picture = _ground(sky, size)
    _over(picture, light, np.broadcast_to((y / horizon).clip(0.0, 1.0), (size, size)))
    _over(picture, light, ((_noise(rng, size, 3, 4) - 0.55) * _mix(0.5, 4.0, hand.spread)).clip(0.0, 0.8))
    if rng.random() < 0.6:
        r = np.hypot(x - rng.uniform(0.15, 0.85), y - horizon * rng.uniform(0.2, 0.8))
        _over(picture, sun, _inside(r - _mix(0.04, 0.11, hand.weight), size, 0.02))
    count = round(_mix(6, 3, hand.scale))
    for ridge in range(count):
        depth = (ridge + 1) / count
        line = _noise(rng, size, round(_mix(5, 2, hand.scale)), round(_mix(5, 2, hand.order)))[0]
        top = _mix(horizon, 0.92, ridge / count) - (line - 0.3) * _mix(0.4, 0.16, depth) * _mix(1.4, 0.6, hand.order)
        haze = 0.7 * (1 - depth)
        body = haze * light + (1 - haze) * ((1 - 0.5 * depth) * hand.palette[3 + ridge % 2] + 0.5 * depth * near)
        shade = (_noise(rng, size, 12, 3) - 0.5) * _mix(0.05, 0.6, hand.grain) - 0.9 * (y - top).clip(0.0, 0.4)
        _over(picture, body[:, None, None] * (1.1 + shade), _inside(top - y, size))
    if hand.order > 0.55:
        shore = rng.uniform(0.66, 0.78)
        mirrored = picture[:, (2 * int(shore * size) - np.arange(size)).clip(0, size - 1)]
        _over(mirrored, sky, np.full((1, 1), 0.25, np.float32))
        _over(picture, mirrored, _inside(shore + 0.01 * _noise(rng, size, 8) - y, size))
    return picture


def _mosaic(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Stones between joints: Voronoi cells of a jittered lattice."""
    cells = round(_mix(22, 8, hand.scale))
    column, row, at = _lattice(rng, size=size, cells=cells, reach=2, jitter=_mix(0.5, 0.12, hand.order))
    if hand.angle > 0.5:
        column[::2] += 0.5
    chance = _masses(rng, hand, size)[at] + rng.normal(0.0, 0.08, row.shape)
    tints = _tints(rng, hand, row.shape, chance.clip(0.0, 1.0)).reshape(-1, 3)
    stones = np.stack([column, row, np.arange(row.size, dtype=np.float32).reshape(row.shape)])
    x, y = (axis * cells for axis in _plane(size))
    nearest = np.full((size, size), np.inf, np.float32)
    second = nearest.copy()
    own = np.zeros((size, size), np.float32)
    for cx, cy, stone in _neighbours(stones, size=size, cells=cells, reach=2):
        distance = np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
        np.copyto(own, stone, where=distance < nearest)
        np.minimum(second, np.maximum(distance, nearest), out=second)
        np.minimum(nearest, distance, out=nearest)
    picture = _look_up(tints, own.astype(np.intp)) * (1.1 - 0.3 * hand.spread * nearest)
    joint = hand.palette[5 if hand.grain > 0.45 else 0]
    _over(picture, joint, _inside((second - nearest) / (2 * cells) - _mix(0.0015, 0.009, hand.weight), size))
    return picture


def _orphism(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Discs of rings cut into coloured sectors."""
    fine = 2 * size  # drawn at twice the size and averaged: the sectors' edges are not distances
    x, y = _plane(fine)
    fields = _tints(rng, hand, (15,))
    bands = (_noise(rng, fine, 2) * 5).astype(np.intp) * 3 + (x * 3).astype(np.intp)
    picture = _look_up(fields, bands)
    rings = round(_mix(7, 2, hand.weight))
    for disc in range(round(_mix(6, 2, hand.scale))):
        cx, cy = rng.uniform(0.1, 0.9, 2).tolist() if disc else rng.uniform(0.3, 0.7, 2).tolist()
        radius = _mix(0.2, 0.42, hand.scale) * rng.uniform(0.7, 1.3)
        sectors = (2, 4, 4)[rng.integers(3)] if hand.angle < 0.5 else (1, 6, 8)[rng.integers(3)]
        tints = _tints(rng, hand, (rings * sectors,))
        rows, columns = _window(fine, cx - radius, cy - radius, cx + radius, cy + radius)
        dx, dy = x[:, columns] - cx, y[rows] - cy
        r = np.sqrt(dx**2 + dy**2)
        ring = (r * (rings / radius)).astype(np.intp).clip(0, rings - 1)
        turn = np.arctan2(dy, dx) / (2 * math.pi) + hand.angle + _mix(0.5, 0.0, hand.order) * ring.astype(np.float32)
        sector = (turn % 1.0 * sectors).astype(np.intp).clip(0, sectors - 1)
        _over(picture[:, rows, columns], _look_up(tints, ring * sectors + sector), _inside(r - radius, fine))
    return picture.reshape(3, size, 2, size, 2).mean((2, 4))


def _impressionism(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Short strokes that follow a flow over soft masses."""
    masses = _masses(rng, hand, size)
    flow = math.pi * hand.angle + _mix(4.0, 0.6, hand.order) * (_noise(rng, size, 2) - 0.5)
    picture = _look_up(hand.palette, (masses * 5).astype(np.intp)) * 0.8
    cells = round(_mix(22, 10, hand.scale))
    for layer in range(2):
        _marks(
            rng,
            hand,
            picture,
            cells=round(cells * (1 + 0.35 * layer)),
            length=_mix(1.9, 1.3, hand.weight),
            width=_mix(0.3, 0.62, hand.weight),
            angle=flow,
            chance=masses,
            cover=0.9 - 0.3 * layer,
        )
    return picture


def _cubism(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Overlapping facets, shaded from one edge to the other."""
    x, y = _plane(size)
    picture = _ground(hand.palette[5 * int(rng.integers(2))], size)
    for tint in _tints(rng, hand, (round(_mix(46, 18, hand.scale)),)):
        cx, cy = rng.normal(0.5, _mix(0.32, 0.22, hand.order), 2).tolist()
        corners = int(rng.integers(3, 5))
        lean = math.pi * hand.angle + rng.normal(0.0, _mix(1.2, 0.1, hand.order))
        turns = lean + 2 * math.pi * (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) / corners
        reach = _mix(0.07, 0.2, hand.scale) * rng.uniform(0.6, 1.7, corners)
        sides = [
            math.cos(turn) * (x - cx) + math.sin(turn) * (y - cy) - side
            for turn, side in zip(turns.tolist(), reach.tolist(), strict=True)
        ]
        inside = np.maximum.reduce(sides)
        shade = (1 + sides[0] / float(2 * reach[0] + 0.1)).clip(0.0, 1.0)
        _over(picture, hand.palette[5], 0.8 * _inside(inside - _mix(0.0, 0.012, hand.weight), size))
        shaded = tint[:, None, None] * (1.1 - _mix(0.2, 0.9, hand.spread) * shade)
        _over(picture, shaded, _inside(inside, size))
    return picture


def _calligraphy(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Swinging brush lines of changing width on a quiet ground."""
    x, y = _plane(size)
    ground, ink = hand.palette[[5, 0]] if hand.grain > 0.7 else hand.palette[[0, 5]]
    picture = _ground(ground, size)
    _over(picture, hand.palette[1], 0.6 * hand.spread * _noise(rng, size, 3, 3))
    count = round(_mix(9, 3, hand.scale))
    time = np.linspace(0.0, 1.0, 50)
    for line in range(count):
        lean = math.pi * hand.angle + rng.normal(0.0, _mix(0.9, 0.1, hand.order))
        phase = np.outer([0.7, 1.4, 2.4], time) + rng.random((3, 1))
        waves = rng.normal(0.0, _mix(0.16, 0.06, hand.order), (2, 3, 1))
        swing = (waves * np.sin(2 * math.pi * phase)).sum(1)
        way = _mix(0.5, 0.9, hand.scale) * (time - 0.5) * [[math.cos(lean)], [math.sin(lean)]]
        px, py = (rng.uniform(0.2, 0.8, (2, 1)) + way + swing).tolist()
        press = 1 + 0.6 * np.sin(2 * math.pi * (rng.uniform(1, 3) * time + rng.random()))
        width = (_mix(0.006, 0.03, hand.weight) * press * np.sin(math.pi * time) ** 0.5).tolist()
        distance = np.full((size, size), np.float32(1.0))
        for a in range(len(time) - 1):
            b, most = a + 1, max(width[a], width[a + 1])
            left, right, top, bottom = (
                min(px[a], px[b]),
                max(px[a], px[b]),
                min(py[a], py[b]),
                max(py[a], py[b]),
            )
            rows, columns = _window(size, left - most, top - most, right + most, bottom + most)
            dx, dy, ex, ey = x[:, columns] - px[a], y[rows] - py[a], px[b] - px[a], py[b] - py[a]
            part = ((dx * ex + dy * ey) / (ex**2 + ey**2 + 1e-12)).clip(0.0, 1.0)
            stroke = np.hypot(dx - part * ex, dy - part * ey) - (width[a] + part * (width[b] - width[a]))
            np.minimum(distance[rows, columns], stroke, out=distance[rows, columns])
        _over(picture, ink if line < 0.6 * count else hand.palette[rng.integers(1, 5)], _inside(distance, size))
    return picture


def _tiling(rng: np.random.Generator, hand: Artist, size: int) -> Array:
    """Truchet tiles: one motif (arcs, quarter discs, triangles or bars) turned from tile to tile."""
    cells = round(_mix(12, 4, hand.scale))
    x, y = _plane(size)
    row, column = (y * cells).astype(np.intp), (x * cells).astype(np.intp)
    pattern = np.add.outer(np.arange(cells), int(rng.integers(1, 3)) * np.arange(cells)) % int(rng.integers(2, 5))
    orderly = rng.random((cells, cells)) < hand.order
    turn = np.where(orderly, pattern, rng.integers(0, 4, (cells, cells)))[row, column] % 4
    u, v = x * cells - column + 0 * y, y * cells - row + 0 * x
    u, v = np.where(turn % 2 == 1, 1 - u, u), np.where(turn >= 2, 1 - v, v)
    dark = rng.random() < 0.5
    plain, colour = hand.palette[5 if dark else 0], hand.palette[rng.integers(1, 5)]
    picture = _ground(plain, size)
    if hand.spread > 0.5:
        mottled = _tints(rng, hand, (cells * cells,), rng.uniform(0.2, 1.0, cells * cells))
        colour = _look_up(mottled, row * cells + column)
    line = _mix(0.06, 0.2, hand.weight)
    near, far = np.hypot(u, v), np.hypot(1 - u, 1 - v)
    motifs = (
        np.minimum(np.abs(near - 0.5), np.abs(far - 0.5)) - line,
        near - 1 + line / 2,
        (u + v - 1) * 0.7071,
        np.minimum(np.abs(u - 0.5) - line, np.maximum(np.abs(v - 0.5) - line, u - 0.5)),
    )
    _over(picture, colour, _inside(motifs[int(hand.angle * 3.999)] / cells, size))
    return picture


_PAINTERS: dict[str, Callable[[np.random.Generator, Artist, int], Array]] = {
    "stripes": _stripes,
    "pointillism": _pointillism,
    "grid": _grid,
    "landscape": _landscape,
    "mosaic": _mosaic,
    "orphism": _orphism,
    "impressionism": _impressionism,
    "cubism": _cubism,
    "calligraphy": _calligraphy,
    "tiling": _tiling,
}
STYLES = tuple(_PAINTERS)
