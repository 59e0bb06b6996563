"""The picture of queries and neighbours, read back pixel by pixel."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import simsearch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont
from torch import Tensor

from simsearch import figures
from simsearch.figures import NEUTRAL, RIGHT, WRONG, Tile, _clip, save_curve, save_grid, spared

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"


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
    font = ImageFont.truetype(str(FONTS / "DejaVuSans.ttf"), 11)
    text = "Vincent van Gogh"
    assert _clip(text, 11, 1000) == text
    whole = font.getlength(text)
    for width in range(20, int(whole)):
        clipped = _clip(text, 11, width)
        assert clipped.endswith("…")
        assert text.startswith(clipped[:-1])
        assert font.getlength(clipped) <= width
        longer = text[: len(clipped)] + "…"
        assert font.getlength(longer) > width
    assert _clip(text, 11, 0) == "…"


@given(st.text(st.characters(codec=None, categories=None)))
@settings(max_examples=50, deadline=None)
def test_any_text_may_be_a_caption(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.png"
    picture = saved(path, [[Tile(plain(BLUE), text), Tile(plain(PINK), text + "\n" + text)]], title=text + "\r")
    assert box(picture, PINK)[3] < len(picture) - 15  # a line, whatever it holds


@pytest.mark.parametrize("title", ["$\\frac{1}$ 睡蓮\nb", "\ud800 $", "^_{"])
def test_the_title_of_a_curve_is_text(tmp_path, caplog, title):
    with caplog.at_level(logging.WARNING):
        save_curve(tmp_path / "c.png", [(0, 1), (1, 0)], title=title)
    assert not caplog.records


def test_a_caption_is_one_line(tmp_path):
    broken, whole = ([Tile(plain(BLUE), "q"), Tile(plain(PINK), t)] for t in ("a\nb\r\n c\u2028", "a b c"))
    pictures = [saved(tmp_path / "f.png", [row], title=row[1].caption) for row in (broken, whole)]
    assert np.array_equal(*pictures)


def test_the_cost_of_a_caption_does_not_grow_with_it(monkeypatch):
    measured: list[int] = []
    length = figures._length
    monkeypatch.setattr(figures, "_length", lambda text, size: measured.append(len(text)) or length(text, size))
    costs = []
    for count in (1_000, 1_000_000):
        assert _clip("x" * count, 11, 104).endswith("x…")
        costs.append(sum(measured))
        measured.clear()
    assert costs[0] == costs[1] < 104 * 10


def test_signs_that_no_font_has_stand_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_system_fonts", list)
    figures._font_of.cache_clear()
    texts = ("睡蓮", "睡蓮 Monet 印象", "▯", "▯ Monet ▯")
    pictures = [saved(tmp_path / "f.png", [[Tile(plain(BLUE), text)]], title=text) for text in texts]
    assert np.array_equal(pictures[0], pictures[2])
    assert np.array_equal(pictures[1], pictures[3])
    figures._font_of.cache_clear()


def test_a_font_of_the_machine_helps_out(tmp_path, monkeypatch):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    other = str(FONTS / "STIXGeneral.ttf")
    monkeypatch.setattr(figures, "_system_fonts", lambda: [str(tmp_path / "broken.ttf"), other])
    figures._font_of.cache_clear()
    sign = chr(next(iter(sorted(figures._signs(other) - figures._signs(figures._FONT)))))
    assert list(figures._runs(f"a{sign}b")) == [(figures._FONT, "a"), (other, sign), (figures._FONT, "b")]
    pictures = [saved(tmp_path / "f.png", [[Tile(plain(BLUE), text)]]) for text in (sign, "▯", "")]
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])
    figures._font_of.cache_clear()


def test_a_picture_that_fails_costs_nothing_else(capsys):
    with spared():
        raise KeyError("label\nof two lines")
    assert capsys.readouterr().err == "a picture could not be drawn and is left out: 'label\\nof two lines'\n"
    with pytest.raises(KeyboardInterrupt), spared():
        raise KeyboardInterrupt


def test_a_grid_without_rows_is_a_picture(tmp_path):
    assert saved(tmp_path / "f.png", [], title="nothing taken").shape[0] < 60


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


@pytest.mark.slow
def test_line_breaks_in_names_and_labels_cost_no_run(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = ["path,label"]
    for i in range(24):
        name = f"a\nb {i}.png" if i % 2 else f"{i}.png"
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / name)
        lines.append(f'"{name}","of\n\nkind {i % 3}"')
    (folder / "table.csv").write_text("\n".join(lines))
    run, protocol = tmp_path / "run", ("protocol=by-attribute", "protocol.attribute=label")
    trained = simsearch(
        *("train", "data=files", f"data.source={folder / 'table.csv'}", *protocol, "backbone.size=32"),
        *("model.whitening.dimension=4", f"run_dir={run}", "logger.mode=disabled"),
    )
    assert "left out" not in trained.stderr
    assert (run / "figures/neighbours.png").is_file()
    assert (run / "figures/precision-recall.png").is_file()
    picture, catalog = tmp_path / "answer.png", f"catalog={run / 'catalog'}"
    simsearch("recommend", catalog, f"image={folder / 'a'}\nb 1.png", f"figure={picture}")
    with Image.open(picture) as shown:
        assert shown.width > 500
    picture.unlink()
    simsearch("search", catalog, f"image={folder}", "rows=5", f"figure={picture}")
    assert picture.is_file()
    out = tmp_path / "ingested"
    ingested = simsearch("data", "ingest", f"images={folder}", f"out={out}", "near.descriptors=false", "workers=1")
    assert "left out" not in ingested.stderr
    assert (out / "contact-sheet.png").is_file()
