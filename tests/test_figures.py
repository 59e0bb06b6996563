"""The picture of queries and neighbours, read back pixel by pixel."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simsearch.figures import NEUTRAL, RIGHT, WRONG, Tile, _clip, save_grid


def plain(colour: tuple[int, int, int], height: int = 40, width: int = 40) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()


def box(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom (inclusive) of all pixels of exactly this colour."""
    rows, columns = np.nonzero((picture == colour).all(2))
    assert len(rows), f"no pixel is {colour}"
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def saved(path, rows: list[list[Tile]], **arguments) -> np.ndarray:
    save_grid(path, rows, **arguments)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


BLUE, PINK, CYAN, GOLD = (0, 0, 250), (250, 0, 250), (0, 250, 250), (250, 200, 0)


def test_frames_have_their_colours_and_stand_around_their_tiles(tmp_path):
    rows = [
        [Tile(plain(BLUE), "q"), Tile(plain(PINK), "a", True), Tile(plain(CYAN), "b", False), Tile(plain(GOLD), "c")]
    ]
    picture = saved(tmp_path / "f.png", rows, side=50)
    for tile, frame in ((PINK, RIGHT), (CYAN, WRONG), (GOLD, NEUTRAL)):
        left, top, right, bottom = box(picture, tile)
        assert (right - left + 1, bottom - top + 1) == (50, 50)
        assert box(picture, frame) == (left - 4, top - 4, right + 4, bottom + 4)
        inside = picture[top - 4 : bottom + 5, left - 4 : right + 5].reshape(-1, 3)
        assert {tuple(c) for c in np.unique(inside, axis=0).tolist()} == {tile, frame}
    left, top, right, bottom = box(picture, BLUE)
    assert (picture[top - 4 : bottom + 5, [left - 1, right + 1]] == 255).all(), "the query has a frame"
    lefts = [box(picture, colour)[0] for colour in (BLUE, PINK, CYAN, GOLD)]
    gaps = [b - a for a, b in pairwise(lefts)]
    assert gaps[0] > gaps[1] == gaps[2]  # the query stands a little apart


def test_rows_follow_each_other_and_may_be_of_unequal_length(tmp_path):
    rows = [
        [Tile(plain(BLUE), "q"), Tile(plain(PINK), "a", True)],
        [Tile(plain(CYAN), "q"), Tile(plain(GOLD), "a", False), Tile(plain((10, 90, 10)), "b", None)],
    ]
    picture = saved(tmp_path / "f.png", rows, side=48)
    assert box(picture, BLUE)[0] == box(picture, CYAN)[0]
    assert box(picture, PINK)[0] == box(picture, GOLD)[0]
    assert box(picture, CYAN)[1] > box(picture, BLUE)[3] + 15  # room for the caption
    assert box(picture, (10, 90, 10))[2] < picture.shape[1]


@pytest.mark.parametrize(("height", "width", "shown"), [(20, 80, (48, 12)), (300, 100, (16, 48)), (1, 1, (48, 48))])
def test_aspect_is_kept_and_the_tile_centred(height, width, shown, tmp_path):
    square = Tile(plain(BLUE), "q")
    picture = saved(tmp_path / "f.png", [[square, Tile(plain(PINK, height, width), "a", True)]], side=48)
    left, top, right, bottom = box(picture, PINK)
    assert (right - left + 1, bottom - top + 1) == shown
    frame = box(picture, RIGHT)
    assert abs((left - frame[0]) - (frame[2] - right)) <= 1
    assert abs((top - frame[1]) - (frame[3] - bottom)) <= 1
    assert frame[2] - frame[0] == frame[3] - frame[1] == 55


def test_small_images_are_shown_pixel_by_pixel(tmp_path):
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = saved(tmp_path / "f.png", [[Tile(image, "q"), Tile(plain(PINK), "", True)]], side=48)
    left, top = 6 + 4, box(picture, PINK)[1]  # beside the edge and where a frame would be
    shown = picture[top : top + 48, left : left + 48]
    assert np.array_equal(shown, image.permute(1, 2, 0).numpy().repeat(6, axis=0).repeat(6, axis=1))


def test_captions_stay_under_their_tile(tmp_path):
    long = "an artist whose name goes on and on, of the school of somebody else"
    rows = [[Tile(plain(BLUE), ""), Tile(plain(PINK), long, True), Tile(plain(CYAN), "", False)]]
    picture = saved(tmp_path / "f.png", rows, side=60)
    left, _, right, bottom = box(picture, RIGHT)
    strip = picture[bottom + 1 : bottom + 16]
    inked = np.nonzero((strip < 128).all(2))[1]
    assert len(inked) > 50
    assert left <= inked.min()
    assert inked.max() <= right + 4  # a letter may lean over by the frame's width


def test_clipping_keeps_what_fits():
    draw = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    font = ImageFont.load_default(11)
    text = "Vincent van Gogh"
    assert _clip(draw, text, font, 1000) == text
    whole = draw.textlength(text, font)
    for width in range(20, int(whole)):
        clipped = _clip(draw, text, font, width)
        assert clipped.endswith("…")
        assert text.startswith(clipped[:-1])
        assert draw.textlength(clipped, font) <= width
        longer = text[: len(clipped)] + "…"
        assert draw.textlength(longer, font) > width
    assert _clip(draw, text, font, 0) == "…"


def test_title_stands_above(tmp_path):
    rows = [[Tile(plain(BLUE), "q"), Tile(plain(PINK), "a", True)]]
    plain_picture = saved(tmp_path / "a.png", rows)
    titled = saved(tmp_path / "b.png", rows, title="CIFAR-10, 10k-50k: mAP 0.318, worst to best, and more than fits")
    assert box(titled, BLUE)[1] == box(plain_picture, BLUE)[1] + 30
    ink = np.nonzero((titled[:30] < 128).all(2))[1]
    assert len(ink) > 50
    assert ink.max() < titled.shape[1] - 6


def test_makes_its_folder_and_leaves_no_half_picture(tmp_path, monkeypatch):
    path = tmp_path / "figures/f.png"
    rows = [[Tile(plain(BLUE), "q"), Tile(plain(PINK), "a", True)]]
    before = saved(path, rows)

    def fail(self: Image.Image, file: object, *_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_grid(path, rows[::-1], title="another")
    assert [p.name for p in path.parent.iterdir()] == ["f.png"]
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), before)
