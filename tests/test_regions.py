"""Parts of images: what is cut out, and that every way to search with a part equals searching with a file of it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import simsearch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simsearch import api
from simsearch.functional.regions import Region, crop, read_region
from simsearch.functional.resize import resize, resize_to_fit
from simsearch.images import ImageError, read_image
from simsearch.models.encoder import build_encoder


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


@given(st.integers(1, 50), st.integers(1, 50), st.data())
def test_a_crop_is_pillows(height, width, data):
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    wide, high = data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top))
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(picture).crop((left, top, left + wide, top + high)))
    fractions = Region(left / width, top / height, wide / width, high / height)
    regions = [fractions] + ([Region(left, top, wide, high)] if max(left, top, wide, high) > 1 else [])
    for region in regions:
        found = crop(torch.from_numpy(picture).permute(2, 0, 1), region)
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_at_least_a_pixel_and_never_beyond():
    image = torch.arange(12).reshape(1, 3, 4)
    assert crop(image, Region(0.999, 0.999, 0.001, 0.001)).tolist() == [[[11]]]
    assert crop(image, Region(0.5, 0, 0.5005, 1)).shape == (1, 3, 2)  # as fractions of few digits add up
    assert crop(image, None) is image


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0.1,0.2,0.3", "four numbers"),
        ("a,b,c,d", "four numbers"),
        (5, "four numbers"),
        ((0, 0, 0, 1), "w and h above 0"),
        ((-0.1, 0, 1, 1), "at least 0"),
        ((0, 0, math.nan, 1), "at least 0"),
        ((0, 0, math.inf, 1), "at least 0"),
        ((0.5, 0, 0.6, 1), "at most 1"),
        ("0,0.2,1,0.9", "at most 1"),
    ],
)
def test_what_is_no_region(given, said):
    with pytest.raises(ValueError, match=r"x,y,w,h of the upright image.*" + said):
        read_region(given)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_regions_are_of_the_upright_image(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(40, 60), kind, exif=exif)
    whole = read_image(data)
    height, width = whole.shape[1:]
    top, left, high, wide = height // 4, width // 5, height // 2, width // 3
    part = whole[:, top : top + high, left : left + wide]
    for region in (Region(left, top, wide, high), Region(left / width, top / height, wide / width, high / height)):
        np.testing.assert_array_equal(read_image(data, region=region), part)
        for fit in ("square", "longest"):
            expected = resize_to_fit(part, 8, fit)
            found = read_image(data, size=8, fit=fit, region=region)
            assert found.shape == expected.shape
            if kind == "PNG":
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fit", ["square", "longest"])
def test_a_small_part_of_a_large_photograph_keeps_its_detail(fit):
    fine = np.random.default_rng(1).integers(0, 255, (150, 200, 3), dtype=np.uint8)
    picture = smooth(1600, 2400)
    picture = np.array(picture)
    picture[600:900, 1000:1400] = np.asarray(Image.fromarray(fine).resize((400, 300), Image.Resampling.BICUBIC))
    data, region = encoded(picture, "JPEG", quality=95, subsampling=0), Region(1000, 600, 400, 300)
    exact = resize_to_fit(crop(read_image(data), region), 100, fit).float()
    found = read_image(data, size=100, fit=fit, region=region).float()
    assert found.shape == exact.shape
    assert (found - exact).abs().mean() < 2.5
    # Decoded as small as the whole would be, the part would be blurred beyond that.
    blurred = crop(read_image(data, size=200, fit="longest"), Region(1000 / 2400, 600 / 1600, 400 / 2400, 300 / 1600))
    if fit == "longest":
        assert (resize(blurred, *exact.shape[1:]).float() - exact).abs().mean() > 10


def test_pixels_beyond_the_image_are_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(smooth(40, 60)))
    with pytest.raises(ImageError, match=r"a\.png: outside: the region 30,10,31,20 .* an image of 60 x 40"):
        read_image(path, region=Region(30, 10, 31, 20))


# ------------------------------------------------------------------------------------------ every way to search

MODEL = {
    "_target_": "simsearch.models.frozen.FrozenRetriever",
    "backbone": {
        "_target_": "simsearch.models.backbones.timm_backbone", "name": "test_resnet", "weights": "random", "size": 32,
    },
    "pooling": {"_target_": "simsearch.models.pooling.GeM", "p": 3.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine paintings, a catalog of them, and a wall of all of them with the parts where each hangs as files."""
    folder = tmp_path_factory.mktemp("regions")
    wall = np.full((150, 180, 3), 230, dtype=np.uint8)
    (folder / "paintings").mkdir()
    for i in range(9):
        picture, (row, column) = smooth(40, 48, i), divmod(i, 3)
        Image.fromarray(picture).save(folder / f"paintings/{i}.png")
        wall[5 + 50 * row : 45 + 50 * row, 6 + 60 * column : 54 + 60 * column] = picture
    Image.fromarray(wall).save(folder / "wall.png")
    torch.manual_seed(5)
    encoder = api.LoadedEncoder(build_encoder({"model": MODEL}), {"model": MODEL}, "toy")
    api.build_catalog(encoder, folder / "paintings", folder / "catalog", workers=0)
    return folder


def box(i: int) -> list[int]:
    row, column = divmod(i, 3)
    return [6 + 60 * column, 5 + 50 * row, 48, 40]


def test_a_part_of_a_wall_finds_its_painting(folder):
    catalog, wall = api.open_catalog(folder / "catalog", device="cpu"), folder / "wall.png"
    with Image.open(wall) as image:
        forms = (wall, image.copy(), np.array(image))
    for i in (0, 5, 7):
        x, y, w, h = box(i)
        for form in forms:
            for region in (box(i), (x / 180, y / 150, w / 180, h / 150), ",".join(map(str, box(i)))):
                answer = catalog.search(form, region=region, k=3)
                assert answer.rows()[0]["path"] == f"{i}.png"
                assert answer.scores[0] == pytest.approx(1, abs=1e-5)
    assert catalog.search(wall, k=1).scores[0] < 0.999
    with pytest.raises(ValueError, match="like has no image"):
        catalog.search("3.png", region=box(1))
    with pytest.raises(ValueError, match="reaches beyond an image of 180 x 150"):
        catalog.search(forms[2], region=(170, 0, 20, 20))


@pytest.mark.parametrize("command", ["search", "recommend"])
def test_commands_search_with_a_part(folder, command):
    given = [command, f"catalog={folder / 'catalog'}", f"image={folder / 'wall.png'}", "format=json", "device=cpu"]
    for i in (2, 4):
        for written in (str(box(i)).replace(" ", ""), ",".join(map(str, box(i)))):
            answer = json.loads(simsearch(*given, f"region={written}").stdout)
            assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-5)
            first = answer["results"][0]
            assert (first.get("path") or first["attributes"]["path"]) == f"{i}.png"
    assert "at most 1" in simsearch(*given, "region=[0.5,0,0.7,1]", expect=1).stderr
    assert "reaches beyond" in simsearch(*given, "region=[0,0,500,20]", expect=1).stderr
    if command == "recommend":
        only = [command, f"catalog={folder / 'catalog'}", "id=3.png"]
        assert "give image=<file>" in simsearch(*only, "region=[0,0,0.5,0.5]", expect=1).stderr
