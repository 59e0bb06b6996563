"""Figures: queries beside their neighbours, with right and wrong results framed, and curves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simsearch.files import replacing
from simsearch.text import one_line, warn

# DejaVu Sans has accents and other scripts, which Pillow's own font lacks.
_FONT = str(Path(str(find_spec("matplotlib").origin)).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")  # type: ignore[union-attr]
_NO_GLYPH = "▯"  # stands for characters that no font of this machine has

RIGHT, WRONG, NEUTRAL = (46, 139, 87), (200, 55, 55), (150, 150, 150)


@contextmanager
def spared() -> Iterator[None]:
    """Inside the block, errors are reported but not raised.

    For figures that a command draws in addition to its work.
    """
    try:
        yield
    except Exception as error:
        warn(f"a picture could not be drawn and is left out: {one_line(error) or type(error).__name__}")


@dataclass(frozen=True)
class Tile:
    """One image of a grid.

    Attributes:
        image: uint8 (3, H, W).
        caption: Text below the image.
        right: True if right, False if wrong, None if not judged.
    """

    image: Tensor
    caption: str
    right: bool | None = None


def save_grid(path: Path, rows: Sequence[Sequence[Tile]], *, title: str = "", side: int = 96) -> None:
    """Writes the picture of `draw_grid` as a PNG.

    Args:
        path: The file to write.
        rows: Rows of tiles.
        title: Title of the picture.
        side: Width of a tile in pixels.
    """
    picture = draw_grid(rows, title=title, side=side)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")


def draw_grid(rows: Sequence[Sequence[Tile]], *, title: str = "", side: int = 96) -> Image.Image:
    """A picture of rows of tiles. Each row is a query followed by its neighbours, best first.

    Tiles keep their aspect ratio. Frames are green if right, red if wrong and grey if not judged. Title and captions
    may be any untrusted text; each is cut to one line that fits. Without rows, the picture shows the title only.

    Args:
        rows: Rows of tiles.
        title: Title of the picture.
        side: Width of a tile in pixels.
    """
    gap, frame, text = 6, 4, 15
    cell, head = side + 2 * frame + gap, 30 if title else 0
    columns = max((len(row) for row in rows), default=4)
    width = columns * cell + 3 * gap
    canvas = Image.new("RGB", (width, head + len(rows) * (cell + text) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        _write(draw, (gap, 7), title, 15, width - 2 * gap)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            left = gap + x * cell + (2 * gap if x else 0)
            top = head + y * (cell + text)
            picture = Image.fromarray(tile.image.permute(1, 2, 0).contiguous().numpy())
            scale = side / max(picture.size)
            size = tuple(max(1, round(s * scale)) for s in picture.size)
            # Tiny images are shown as they are, pixel by pixel, not smoothed into something nicer.
            kind = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
            picture = picture.resize((size[0], size[1]), kind)
            if x:
                colour = NEUTRAL if tile.right is None else RIGHT if tile.right else WRONG
                draw.rectangle((left, top, left + side + 2 * frame - 1, top + side + 2 * frame - 1), fill=colour)
            place = (left + frame + (side - size[0]) // 2, top + frame + (side - size[1]) // 2)
            canvas.paste(picture, place)
            _write(draw, (left + frame, top + side + 2 * frame), tile.caption, 11, side + 2 * frame)
    return canvas


def save_curve(path: Path, points: Sequence[tuple[float, float]], *, title: str) -> None:
    """Writes a precision-recall curve as a PNG.

    Args:
        path: The file to write.
        points: Pairs (recall, precision), both in [0, 1], ascending in recall.
        title: Title of the figure.
    """
    from matplotlib.figure import Figure  # half a second that searching need not wait

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
    plain = "".join(text if path == _FONT else _NO_GLYPH for path, text in _runs(one_line(title)))
    axes.set_title(plain, size=9, parse_math=False)  # $ is no formula
    axes.grid(alpha=0.3)
    axes.plot(*zip(*points, strict=True), marker=".")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def save_frontier(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    chosen: tuple[float, float, float],
    *,
    title: str,
) -> None:
    """Writes a PNG of what kinds of index find against what they cost.

    Args:
        path: The file to write.
        lines: For each kind, points (recall, milliseconds of a query, bytes of an item).
        chosen: The point to mark.
        title: Title of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    figure.suptitle(title, size=9, parse_math=False)
    by_time, by_size = figure.subplots(1, 2)
    for axes, place, label in ((by_time, 1, "milliseconds of a query alone"), (by_size, 2, "bytes of an item")):
        for name, points in lines.items():
            ordered = sorted(points)
            axes.plot([p[0] for p in ordered], [p[place] for p in ordered], ".", label=name)
        axes.plot(chosen[0], chosen[place], "o", markersize=11, markerfacecolor="none", color="black")
        axes.set(xlabel="recall against exact search", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
    figure.legend(*by_time.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, width: int) -> None:
    """Writes text on one line of at most `width` pixels. Each character is drawn in a font that contains it."""
    left, base = place[0], place[1] + _font(_FONT, size).getmetrics()[0]
    for path, part in _runs(_clip(one_line(text), size, width)):
        font = _font(path, size)
        draw.text((left, base), part, fill="black", font=font, anchor="ls")
        left += round(font.getlength(part))


def _clip(text: str, size: int, width: int) -> str:
    """The start of the text that fits, with an ellipsis if it was cut."""
    head = text[: max(0, width)]  # a character is a pixel wide or more, except accents; untrusted text may be very long
    if head == text and _length(text, size) <= width:
        return text
    fits = bisect_right(range(1, len(head) + 1), float(width), key=lambda n: float(_length(head[:n] + "…", size)))
    return head[:fits] + "…"


def _length(text: str, size: int) -> float:
    return sum(_font(path, size).getlength(part) for path, part in _runs(text))


def _runs(text: str) -> list[tuple[str, str]]:
    """The text in runs, each with the file of a font that contains it.

    Characters without a font become one _NO_GLYPH.
    """
    known = ((path, "".join(signs)) if path else (_FONT, _NO_GLYPH) for path, signs in groupby(text, _font_of))
    return [(path, "".join(part for _, part in parts)) for path, parts in groupby(known, itemgetter(0))]


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _font_of(sign: str) -> str | None:
    """The file of a font with this character: the default font, else one of this machine, else None."""
    return next((path for path, signs in _fonts() if ord(sign) in signs), None)


def _fonts() -> Iterator[tuple[str, frozenset[int]]]:
    yield _FONT, _signs(_FONT)
    yield from ((path, signs) for path in _system_fonts() if (signs := _signs(path)))


@cache
def _system_fonts() -> list[str]:
    from matplotlib.font_manager import findSystemFonts

    return sorted(findSystemFonts())


@cache
def _signs(path: str) -> frozenset[int]:
    """The characters of a font file. Empty if the file cannot be used (damaged, bitmaps only, ...)."""
    from matplotlib.ft2font import FT2Font

    try:
        _font(path, 11)
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
