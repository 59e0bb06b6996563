"""Pictures that people look at: queries beside their neighbours, right and wrong ones framed; curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simsearch.files import replacing

# DejaVu Sans has accents and other scripts, which Pillow's own font lacks.
_FONT = str(Path(str(find_spec("matplotlib").origin)).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")  # type: ignore[union-attr]

RIGHT, WRONG, NEUTRAL = (46, 139, 87), (200, 55, 55), (150, 150, 150)


@dataclass(frozen=True)
class Tile:
    """One image of a grid: uint8 (3, H, W), a caption, and right (True), wrong (False) or unjudged (None)."""

    image: Tensor
    caption: str
    right: bool | None = None


def save_grid(path: Path, rows: Sequence[Sequence[Tile]], *, title: str = "", side: int = 96) -> None:
    """Writes the picture of `draw_grid` as a PNG."""
    picture = draw_grid(rows, title=title, side=side)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG")


def draw_grid(rows: Sequence[Sequence[Tile]], *, title: str = "", side: int = 96) -> Image.Image:
    """A picture of rows of tiles, each row a query followed by its neighbours, best first.

    Tiles are `side` pixels wide, aspect kept; green frames are right, red wrong, grey unjudged.
    """
    gap, frame, text = 6, 4, 15
    cell, head = side + 2 * frame + gap, 30 if title else 0
    columns = max(len(row) for row in rows)
    width = columns * cell + 3 * gap
    canvas = Image.new("RGB", (width, head + len(rows) * (cell + text) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    small, large = ImageFont.truetype(_FONT, 11), ImageFont.truetype(_FONT, 15)
    if title:
        draw.text((gap, 7), _clip(draw, title, large, width - 2 * gap), fill="black", font=large)
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
            caption = _clip(draw, tile.caption, small, side + 2 * frame)
            draw.text((left + frame, top + side + 2 * frame), caption, fill="black", font=small)
    return canvas


def save_curve(path: Path, points: Sequence[tuple[float, float]], *, title: str) -> None:
    """Writes a PNG of precision against recall; points: (recall, precision), both in [0, 1], by recall."""
    from matplotlib.figure import Figure  # half a second that searching need not wait

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision", title=title)
    axes.title.set_size(9)
    axes.grid(alpha=0.3)
    axes.plot(*zip(*points, strict=True), marker=".")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _clip(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
