"""Images of any aspect, whole and undistorted: the resize, the batches of one shape, the networks, the commands."""

from __future__ import annotations

import io
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from simsearch.commands.instance import describe_all
from simsearch.data.loading import batches_by_shape
from simsearch.data.manifest import Manifest, load_images, read_manifest
from simsearch.data.revisited import Benchmark, Query, load_gallery, load_queries, write_benchmark
from simsearch.functional.resize import longest_shape, resize_longest, resize_square
from simsearch.images import ImageError, read_image
from simsearch.models.backbones import (
    Backbone,
    lite0_backbone,
    timm_backbone,
)
from simsearch.models.dir import RegionNetwork
from simsearch.models.encoder import seen_otherwise
from simsearch.models.frozen import FrozenRetriever
from simsearch.models.hashing import HashNetwork
from simsearch.models.onnx import OnnxNetwork
from simsearch.models.pooling import RMAC, GeM
from simsearch.search.catalog import read_catalog
from simsearch.search.describe import encode
from tests.conftest import simsearch

SHAPES = [(60, 80), (80, 60), (64, 64), (20, 400), (400, 20), (1, 90), (90, 1), (60, 80), (33, 35), (61, 80)]


def blobs(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3), smooth."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


def put(folder: Path, shapes: list[tuple[int, int]] = SHAPES) -> Manifest:
    """PNG files 00.png, ... of these heights and widths, all different."""
    folder.mkdir(exist_ok=True)
    for i, (height, width) in enumerate(shapes):
        Image.fromarray(blobs(height, width, i)).save(folder / f"{i:02}.png")
    return read_manifest(folder)


def frozen(backbone: Backbone) -> Backbone:
    return backbone.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def longest() -> Backbone:
    return frozen(lite0_backbone(size=64, fit="longest", runtime="torch"))


# The resize


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1200))
def test_shape_is_the_nearest_with_that_longest_side(height, width, size):
    found = longest_shape(height, width, size)
    assert max(found) == size
    for side, before in zip(found, (height, width), strict=True):
        exact = Fraction(before * size, max(height, width))
        assert side >= 1
        assert abs(side - exact) <= Fraction(1, 2) or (side == 1 and exact < 1)
    assert longest_shape(*found, size) == found
    assert longest_shape(width, height, size) == found[::-1]


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(0, 3))
def test_pixels_are_those_of_pillow(height, width, size, seed):
    picture = blobs(height, width, seed)
    found = resize_longest(tensor(picture), size)
    shape = tuple(found.shape[1:])
    expected = np.asarray(Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BICUBIC))
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


@pytest.mark.parametrize(("height", "width"), [(240, 360), (300, 97), (40, 31)])
def test_a_circle_stays_a_circle(height, width):
    r = 0.4 * min(height, width)
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    distance = ((y - height / 2) ** 2 + (x - width / 2) ** 2).sqrt()
    picture = (255 * (r - distance + 0.5).clamp(0, 1)).round().to(torch.uint8).expand(3, -1, -1)
    for size in (100, 333):
        found = resize_longest(picture, size)[0] > 127
        across, down = found.any(0).sum().item(), found.any(1).sum().item()
        assert abs(across - down) <= 1 + 0.01 * across
        assert across == pytest.approx(2 * r * size / max(height, width), abs=3)


def test_square_images_are_as_they_were_and_wrong_ones_refused(longest):
    image = tensor(blobs(48, 48))
    assert torch.equal(resize_longest(image, 20), resize_square(image, 20))
    square = frozen(lite0_backbone(size=64, runtime="torch"))
    assert torch.equal(longest(image[None]), square(image[None]))
    with pytest.raises(ValueError, match="size must be at least 1"):
        resize_longest(image, 0)
    with pytest.raises(ValueError, match=r"must be \(..., 3, H, W\)"):
        resize_longest(image[:1], 5)


# Files


def encoded(picture: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_is_read_whole(shape):
    picture = blobs(*shape)
    found = read_image(encoded(picture, "PNG"), size=50, fit="longest")
    assert found.is_contiguous()
    assert torch.equal(found, resize_longest(tensor(picture), 50))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(801, 1204), (1204, 801), (1003, 1000), (31, 40)])
def test_a_rotated_jpeg_keeps_its_shape_at_whatever_scale_it_is_decoded(shape, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(blobs(*shape), "JPEG", exif=exif, quality=95)
    upright = read_image(data)
    for size in (37, 50, 151):
        found, expected = read_image(data, size=size, fit="longest"), resize_longest(upright, size)
        assert found.shape == expected.shape
        assert (found.int() - expected.int()).abs().float().mean() < 2


def test_a_large_jpeg_is_decoded_small():
    data = encoded(np.full((8000, 400, 3), 77, np.uint8), "JPEG")
    found = read_image(data, size=100, fit="longest", max_pixels=8000 * 400 // 64)
    assert found.shape == (3, 100, 5)
    assert (found.int() - 77).abs().max() <= 1
    with pytest.raises(ValueError, match=r"fit must be square .* or longest .*, got 'cover'"):
        read_image(data, size=8, fit="cover")


# Batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_each_file_once_in_one_shape(workers, tmp_path):
    manifest = put(tmp_path / "images")
    (tmp_path / "images" / "04.png").write_bytes(b"no image")
    seen, errors = {}, []
    for images, rows, unreadable in load_images(manifest, size=40, fit="longest", batch_size=3, workers=workers):
        assert images.dtype == torch.uint8
        assert rows.dtype == torch.int64
        assert len(images) == len(rows) <= 3
        errors += unreadable
        assert not seen.keys() & set(rows.tolist())
        seen |= dict(zip(rows.tolist(), images, strict=True))
    assert [(error.path.name, error.reason) for error in errors] == [("04.png", "not-an-image")]
    assert sorted(seen) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    for row, image in seen.items():
        assert torch.equal(image, resize_longest(tensor(blobs(*SHAPES[row], row)), 40))


def test_images_of_equal_shape_share_batches(tmp_path):
    manifest = put(tmp_path / "images")
    batches = [rows.tolist() for _, rows, _ in load_images(manifest, size=40, fit="longest", batch_size=2)]
    assert [0, 7] in batches  # both 30 x 40; the 61 x 80 of row 9 is 31 x 40
    assert [9] in batches
    with pytest.raises(ValueError, match="got 'whole'"):
        load_images(manifest, size=40, fit="whole")
    with pytest.raises(ValueError, match="batch_size"):
        load_images(manifest, size=40, fit="longest", batch_size=0)


@given(
    st.lists(st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 1), (4, 4), None]), max_size=60),
    st.integers(1, 8),
    st.integers(0, 400),
)
def test_waiting_images_stay_within_their_memory(shapes, batch_size, limit):
    fed, given_back = 0, 0

    def items():
        nonlocal fed
        for row, shape in enumerate(shapes):
            if shape is None:
                yield row, ImageError(None, "empty")
            else:
                assert fed - given_back <= limit  # before another comes
                fed += 3 * shape[0] * shape[1]
                yield row, torch.full((3, *shape), row, dtype=torch.uint8)

    rows, errors = [], 0
    for images, batch_rows, batch_errors in batches_by_shape(items(), batch_size, limit):
        given_back += images.nbytes
        assert len(images) <= batch_size
        assert len(images) or batch_errors
        assert (images == batch_rows[:, None, None, None]).all()
        assert all(shapes[row] == images.shape[2:] for row in batch_rows.tolist())
        rows += batch_rows.tolist()
        errors += len(batch_errors)
    assert sorted(rows) == [row for row, shape in enumerate(shapes) if shape is not None]
    assert errors == shapes.count(None)


def test_the_fullest_batch_goes_first_where_memory_is_short():
    shapes = [(1, 4), (2, 2), (2, 2), (1, 4), (2, 2), (4, 1)]
    items = ((row, torch.zeros(3, *shape, dtype=torch.uint8)) for row, shape in enumerate(shapes))
    found = [rows.tolist() for _, rows, _ in batches_by_shape(items, 8, pending_bytes=5 * 12)]
    assert found == [[1, 2, 4], [0, 3], [5]]


# Networks


def test_maps_have_the_aspect_of_the_image(longest):
    assert longest.min_side == 33  # stride 32, so that two cells need one pixel more
    for shape, cells in [((60, 80), (2, 2)), ((80, 60), (2, 2)), ((20, 400), (2, 2)), ((1, 90), (2, 2))]:
        assert longest(tensor(blobs(*shape))[None]).shape == (1, 1280, *cells)
    for shape, cells in [((200, 300), (6, 8)), ((300, 100), (8, 3)), ((50, 1000), (2, 8)), ((1000, 2), (8, 2))]:
        assert longest(tensor(blobs(*shape))[None], 256).shape == (1, 1280, *cells)


def test_the_network_sees_the_whole_image(longest):
    picture = blobs(100, 150)
    shrunk = np.asarray(Image.fromarray(picture).resize((96, 64), Image.Resampling.BICUBIC)).astype(np.float32)
    pixels = torch.from_numpy((shrunk - 127) / 128).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = longest.network(pixels)
    assert F.cosine_similarity(longest(tensor(picture)[None], 96).flatten(), expected.flatten(), dim=0) > 0.999


def test_thin_images_are_widened_by_their_own_border(longest):
    image = tensor(blobs(10, 100))
    pixels = longest.preprocess(image[None], 90)
    small = (resize_longest(image, 90).float() - 127) / 128
    assert small.shape == (3, 9, 90)
    assert torch.equal(pixels[0], small[:, (torch.arange(33) - 12).clamp(0, 8)])
    assert longest.preprocess(image[None, :, :, :40].mT, 90).shape == (1, 3, 90, 33)


def test_identity_tells_the_fits_apart_and_the_square_one_is_as_it_was(longest):
    square = lite0_backbone(size=64)
    assert square.identity() == {
        "backbone": "efficientnet-lite0",
        "weights": square.provenance["sha256"],
        "size": 64,
        "mean": [127.0] * 3,
        "std": [128.0] * 3,
        "resize": "centre-square bicubic antialias",
    }
    own = longest.identity()
    assert own != square.identity()
    assert own | {"resize": square.identity()["resize"]} == square.identity()
    assert own["resize"] == "longest-side bicubic antialias, >= 33 across"
    for encoder in (FrozenRetriever(longest, GeM()), RegionNetwork(longest, GeM(), 8), HashNetwork(longest, GeM(), 8)):
        assert encoder.fit == "longest"
        assert "longest-side" in str(encoder.identity())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: timm_backbone("vit_tiny_patch16_224", weights="random", size=48, fit="longest"),
            "only square images",
        ),
        (
            lambda: timm_backbone("swin_tiny_patch4_window7_224", weights="random", size=64, fit="longest"),
            "only square images, as transformers do: use backbone.fit=square",
        ),
        (lambda: lite0_backbone(size=64, fit="contain"), "got 'contain'"),
    ],
)
def test_what_takes_squares_only_says_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("build", [lite0_backbone, lambda **options: timm_backbone("resnet10t", "random", **options)])
def test_onnx_equals_torch_on_every_shape(build):
    backbone = frozen(build(size=64, fit="longest"))
    images = [tensor(blobs(*shape, i))[None] for i, shape in enumerate(SHAPES)]
    few = [backbone(image) for image in images]
    assert backbone._onnx == {}
    backbone(torch.cat([images[0], images[7]]).repeat(11, 1, 1, 1))  # the 32nd image
    assert list(backbone._onnx) == [None]
    for image, expected in zip(images, few, strict=True):
        assert (backbone(image) - expected).norm() <= 1e-4 * expected.norm()
    at_another_size = backbone(images[9], 120)
    backbone.runtime = "torch"
    torch.testing.assert_close(backbone(images[9], 120), at_another_size, rtol=1e-3, atol=1e-4)


class Windows(nn.Module):
    """Pools windows of 4 pixels, the last ones padded by sums done in Python."""

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = (int(side) for side in pixels.shape[2:])
        return F.avg_pool2d(F.pad(pixels, (0, -width % 4, 0, -height % 4)), 4)


class Narrowing(nn.Module):
    """Halves the sides three times without padding: 8 pixels make a cell."""

    def forward(self, pixels: Tensor) -> Tensor:
        for _ in range(3):
            pixels = F.avg_pool2d(pixels, 2)
        return pixels


def backbone_of(network: nn.Module, size: int) -> Backbone:
    plain = {"name": "toy", "mean": (0.0,) * 3, "std": (1.0,) * 3, "provenance": {"sha256": "0"}}
    return frozen(Backbone(network, size=size, fit="longest", **plain))


def test_the_least_side_is_that_of_two_cells():
    assert backbone_of(Windows(), 64).min_side == 5
    assert backbone_of(Narrowing(), 64).min_side == 16
    assert backbone_of(Narrowing(), 15).min_side == 8  # where squares have one cell, one is enough
    assert backbone_of(Narrowing(), 64)(tensor(blobs(1, 500))[None]).shape == (1, 3, 2, 8)
    with pytest.raises(ValueError, match="or a larger size"):
        backbone_of(Narrowing(), 16)


def test_an_export_that_takes_one_shape_for_all_is_found_out():
    with pytest.raises(RuntimeError, match=r"other features for \d+ x \d+ pixels than on torch: .*runtime=torch"):
        OnnxNetwork(Windows(), 64, 8)
    backbone = backbone_of(Windows(), 64)
    image = tensor(blobs(40, 57))[None].expand(32, -1, -1, -1)
    with pytest.warns(UserWarning, match="toy runs on torch"):
        found = backbone(image)
    torch.testing.assert_close(found[:1], backbone(image[:1]))


def encoders(backbone: Backbone) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    scales = (0.6875, 1, 1.3125)
    return {
        "frozen": FrozenRetriever(backbone, RMAC(3), scales=scales).eval(),
        "dir": RegionNetwork(backbone, RMAC(3), 16, scales=scales).eval(),
        "hashing": HashNetwork(backbone, GeM(), 16).eval(),
    }


@pytest.mark.parametrize("family", ["frozen", "dir", "hashing"])
def test_a_descriptor_is_that_of_the_image_alone(family, longest, tmp_path):
    encoder = encoders(longest)[family]
    assert encoder.input_size == (64 if family == "hashing" else 84)
    manifest = put(tmp_path / "images")
    alone = []
    for row in range(len(manifest)):
        one = Manifest(manifest.root, (manifest.paths[row],))
        ((image, _, _),) = load_images(one, size=encoder.input_size, fit=encoder.fit)
        with torch.no_grad():
            alone.append(encoder.embed(image))
    expected = torch.cat(alone)
    for batch_size in (2, 64):
        batches = load_images(manifest, size=encoder.input_size, fit=encoder.fit, batch_size=batch_size)
        for images, rows, _ in batches:
            with torch.no_grad():
                torch.testing.assert_close(encoder.embed(images), expected[rows], rtol=0, atol=1e-4)
    if family != "hashing":
        torch.testing.assert_close(expected.norm(dim=1), torch.ones(len(manifest)))
        assert (expected @ expected.T).fill_diagonal_(0).max() < 0.9999


def test_scales_are_summed_over_longest_sides(longest):
    """The multi-resolution descriptor against its definition, from images resized by Pillow."""
    model = encoders(longest)["frozen"]
    picture = blobs(63, 84)
    total = torch.zeros(1280)
    for size in (44, 64, 84):
        shape = longest_shape(63, 84, size)
        small = np.asarray(Image.fromarray(picture).resize(shape[::-1], Image.Resampling.BICUBIC)).astype(np.float32)
        pixels = torch.from_numpy((small - 127) / 128).permute(2, 0, 1)[None]
        assert shape[0] >= longest.min_side  # none is widened
        with torch.no_grad():
            regions = F.normalize(model.head.pooling(longest.network(pixels))[0], dim=1)
        total += F.normalize(regions.sum(0), dim=0)
    with torch.no_grad():
        found = model.embed(tensor(picture)[None])[0]
    assert F.cosine_similarity(found, total, dim=0) > 0.9995


# Commands


def seen_whole(run: Path, folder: Path) -> Path:
    """The run with fit=longest: its whitening, fitted on squares, serves."""
    shutil.copytree(run, folder)
    config = OmegaConf.load(folder / "config.yaml")
    config.model.backbone.fit = "longest"
    OmegaConf.save(config, folder / "config.yaml")
    return folder


def test_index_and_search_keep_the_order_of_the_files(small_run, tmp_path):
    run = seen_whole(small_run, tmp_path / "run")
    put(tmp_path / "images")
    (tmp_path / "images" / "03.png").write_bytes(b"no image")
    out, images = tmp_path / "catalog", tmp_path / "images"
    simsearch("index", f"run={run}", f"images={images}", f"out={out}", "batch_size=2", "workers=0")
    catalog = read_catalog(out)
    names = [f"{i:02}.png" for i in range(10) if i != 3]
    assert catalog.items["path"].to_pylist() == names
    done = simsearch("search", f"catalog={out}", f"image={images}", "k=1", "format=json", "figure=null", "batch_size=3")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["query"] for answer in answers] == names
    assert [answer["results"][0]["path"] for answer in answers] == names
    assert all(answer["results"][0]["score"] > 0.9999 for answer in answers)
    thumbnail = read_image(catalog.thumbnails([3])[0])
    assert thumbnail.shape == (3, 64, 3)  # 04.png, 400 x 20
    square = tmp_path / "squares"
    simsearch("index", f"run={small_run}", f"images={images}", f"out={square}", "workers=0")
    other = read_catalog(square).about["encoder_fingerprint"]
    assert catalog.about["encoder_fingerprint"] != other


def instances(folder: Path) -> Benchmark:
    """Images 00 .. 09; the queries are framed parts of them, cut out by their boxes, in reverse order."""
    put(folder)
    queries = []
    for i in (9, 3, 2, 1, 0):
        height, width = SHAPES[i]
        canvas = np.full((height + 30, width + 20, 3), 255, np.uint8)
        canvas[10 : 10 + height, 5 : 5 + width] = blobs(height, width, i)
        Image.fromarray(canvas).save(folder / f"query_{i}.png")
        queries.append(Query(f"query_{i}.png", (5.0, 10.0, 5.0 + width, 10.0 + height), (i,), (), ()))
    return Benchmark("mixed", tuple(f"{i:02}.png" for i in range(10)), tuple(queries))


def test_instance_keeps_the_order_of_the_benchmark(longest, small_run, tmp_path):
    root = tmp_path / "images"
    benchmark = instances(root)
    encoder = encoders(longest)["dir"]
    options = {"size": encoder.input_size, "fit": "longest", "batch_size": 2}
    query = describe_all(encoder, load_queries(benchmark, root, **options), 5, "queries")
    gallery = describe_all(encoder, load_gallery(benchmark, root, **options), 10, "gallery")
    torch.testing.assert_close(query, gallery[[9, 3, 2, 1, 0]], rtol=0, atol=1e-4)
    image = resize_longest(tensor(blobs(*SHAPES[8], 8)), encoder.input_size)
    torch.testing.assert_close(gallery[8:9], encode(encoder, image[None]), rtol=0, atol=1e-4)

    run = seen_whole(small_run, tmp_path / "run")
    config = (small_run / "config.yaml").read_text()
    write_benchmark(tmp_path / "mixed.json", benchmark)
    simsearch(
        "instance", f"run={run}", f"gnd={tmp_path / 'mixed.json'}", f"images={root}", f"run_dir={tmp_path / 'out'}",
        "workers=0", "batch_size=2", "ks=[1]",
    )  # fmt: skip
    about = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]
    assert about["metrics"]["easy/mAP"] == 1
    assert "longest-side" in json.dumps(about["model"])
    images = pq.read_table(tmp_path / "out" / "per_query.parquet")["image"].to_pylist()
    assert images == [query.image for query in benchmark.queries]

    def again(*arguments: str, expect: int = 0) -> tuple[dict, str]:
        done = simsearch(
            "instance", f"run={small_run}", f"gnd={tmp_path / 'mixed.json'}", f"images={root}",
            f"run_dir={tmp_path / 'again'}", "workers=0", "ks=[1]", *arguments, expect=expect,
        )  # fmt: skip
        return json.loads((tmp_path / "again" / "metrics.json").read_text())["test"], done.stderr

    squares, warning = again()
    assert re.search(r"fit=square crops away \d+% of the images", warning)
    assert "centre-square" in json.dumps(squares["model"])
    whole, silence = again("fit=longest")
    assert "leaves out" not in silence
    assert whole["model"]["identity"] == about["model"]["identity"]
    assert whole["metrics"] == pytest.approx(about["metrics"], abs=1e-9)
    scaled, _ = again("fit=longest", "size=48", "scales=[1.0,1.5]")
    assert [b["size"] for b in scaled["model"]["identity"]["backbones"]] == [48, 72]
    assert config == (small_run / "config.yaml").read_text()
    with pytest.raises(ValueError, match="size=64: the network of this run has no setting size"):
        seen_otherwise({"model": {"network": {"bits": 12}}}, 64, None, None)


def test_an_unreadable_image_of_a_benchmark_is_an_error(tmp_path):
    benchmark = instances(tmp_path / "images")
    (tmp_path / "images" / "05.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"05\.png"):
        list(load_gallery(benchmark, tmp_path / "images", size=30, fit="longest"))
    outside = Benchmark("outside", ("00.png",), (Query("query_1.png", (0, 0, 500, 5), (0,), (), ()),))
    with pytest.raises(ValueError, match="is not inside its"):
        list(load_queries(outside, tmp_path / "images", size=30, fit="longest"))
