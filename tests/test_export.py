"""Exported encoders: what the files give, what is refused, and which runtime the server takes."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import ExifTags, Image, ImageCms
from safetensors.numpy import load_file
from torch import Tensor, nn

from simsearch import configs
from simsearch.commands.export import Agreement, border, check, main, sample_images, whole_folder
from simsearch.commands.serve import greeting
from simsearch.images import encode_thumbnail, read_image
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.backbones import Backbone
from simsearch.models.colour import ColourLayout
from simsearch.models.export import write_exported
from simsearch.models.exported import ExportedEncoder
from simsearch.models.onnx import OnnxFile, OnnxNetwork, export_network
from simsearch.search.describe import encode
from simsearch.search.item_tables import item_table
from simsearch.search.writing import write_catalog
from simsearch.serving import backend_choice as runtimes
from simsearch.serving.backend_choice import choose_runtime, seconds
from simsearch.serving.library import Library, Source
from simsearch.serving.limits import Limits
from simsearch.types import SearchResult

N = 30
FROZEN = "simsearch.models.frozen.FrozenRetriever"


def backbone(kind: str, **settings) -> dict:
    return {"_target_": f"simsearch.models.backbones.{kind}_backbone", "weights": "random", **settings}


def content(fit: str = "square", size: int = 64, levels: int = 2, **more) -> dict:
    pooling = {"_target_": "simsearch.models.pooling.RMAC", "levels": levels, "whole": True}
    whitening = {"_target_": "simsearch.models.frozen.Whitening", "dimension": 16}
    return {"_target_": FROZEN, "backbone": backbone("timm", name="test_resnet", size=size, fit=fit),
            "pooling": pooling, "whitening": whitening, **more}  # fmt: skip


def colour(fit: str = "square") -> dict:
    layout = {"_target_": "simsearch.models.colour.colour_backbone", "size": 32, "fit": fit}
    return {"_target_": FROZEN, "backbone": layout, "pooling": {"_target_": "simsearch.models.pooling.Average"}}


def parts(fit: str = "square") -> dict:
    style = backbone("lite0", size=32, fit=fit, statistics="moments", stages=[0, 1])
    style = {"_target_": FROZEN, "backbone": style, "pooling": {"_target_": "simsearch.models.pooling.GeM"}}
    encoders = {"content": content(fit), "style": style, "colour": colour(fit)}
    weights = {"content": 2.0, "style": 1.0, "colour": 1.0}
    return {"_target_": "simsearch.models.parts.PartsRetriever", "encoders": encoders, "weights": weights}


def build(model: dict) -> nn.Module:
    torch.manual_seed(3)
    encoder = configs.build(model).eval().requires_grad_(False)
    for name, value in encoder.state_dict().items():
        if name.endswith(("whitening.mean", "whitening.projection", "code_weight")):
            nn.init.normal_(value, std=0.1)
    for module in encoder.modules():
        if isinstance(module, Backbone):
            module.runtime = "torch"
    return encoder


def pictures(*shape: int, n: int = N) -> Tensor:
    small = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = (255 * F.interpolate(small, shape, mode="bilinear")).to(torch.uint8)
    images[0, :, : shape[0] // 2] = 0  # black has no hue
    return images


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return build(parts())


@pytest.fixture(scope="module")
def catalog(encoder, tmp_path_factory) -> Path:
    folder, images = tmp_path_factory.mktemp("export") / "catalog", pictures(64, 64)
    index = FaissIndex("Flat")
    index.add(encode(encoder, images))
    items = item_table({"path": [f"{i}.png" for i in range(N)]}, [encode_thumbnail(image, 48) for image in images])
    write_catalog(folder, index=index, items=items, encoder=encoder, config={"model": parts()}, about={})
    return folder


def settings(catalog: Path, out: Path, **more):
    values = {"images": None, "sample": 20, "k": 5, "tolerance": 1e-3, "batch_size": 8, "seed": 0, **more}
    return OmegaConf.create({"catalog": str(catalog), "out": str(out), **values})


# ------------------------------------------------------------------------------------ what the files give


def described(folder: Path, resized: dict[int, np.ndarray]) -> np.ndarray:
    """Descriptors by numpy and onnxruntime alone, of images that were scaled to each size, as encoder.json says."""
    about = json.loads((folder / "encoder.json").read_text())
    columns = np.zeros((len(next(iter(resized.values()))), about["dimension"]), np.float32)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    for part in about["parts"].values():
        total = 0.0
        for scale in part["scales"]:
            mean, std = (np.array(part[key], np.float32)[:, None, None] for key in ("mean", "std"))
            pixels = (resized[scale["size"]].astype(np.float32) - mean) / std
            session = onnxruntime.InferenceSession(folder / scale["file"], providers=["CPUExecutionProvider"])
            features = session.run(["features"], {"pixels": pixels})[0]
            if (head := part["head"]) is not None:
                features = by_head(head, folder, features, unit)
            total = total + features
        columns[:, part["start"] : part["stop"]] = math.sqrt(part["weight"]) * unit(total)
    return columns


def by_head(head: dict, folder: Path, maps: np.ndarray, unit) -> np.ndarray:
    short, long = sorted(maps.shape[2:])
    overlaps = [abs((short**2 - short * (long - short) / n) / short**2 - head["overlap"]) for n in range(1, 7)]
    extra = 0 if short == long else 1 + int(np.argmin(overlaps))
    regions = [maps] if head["whole"] else []
    for level in range(1, head["levels"] + 1):
        side = 2 * short // (level + 1)
        counts = [level + (extra if s == long and s != short else 0) for s in maps.shape[2:]]
        tops, lefts = (
            [i * (s - side) // max(1, count - 1) for i in range(count)]
            for s, count in zip(maps.shape[2:], counts, strict=True)
        )
        regions += [maps[:, :, t : t + side, w : w + side] for t in tops for w in lefts]
    vectors = unit(np.stack([region.max((2, 3)) for region in regions], 1))
    tensors = load_file(folder / head["file"])
    return unit(unit(vectors @ tensors["weight"].T + tensors["bias"]).sum(1))


def test_numpy_and_onnxruntime_alone_follow_encoder_json(encoder, tmp_path):
    write_exported(tmp_path, encoder)
    images = pictures(64, 64)
    resized = {64: images, 32: encoder.encoders["style"].backbone.preprocess(images)}
    backbone = encoder.encoders["style"].backbone
    resized[32] = (resized[32] * backbone.std + backbone.mean).round()
    found = described(tmp_path, {size: value.numpy() for size, value in resized.items()})
    np.testing.assert_allclose(found, encoder.embed(images).numpy(), atol=2e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["colour.onnx", "content.onnx", "encoder.json", "style.onnx"]
    torch.testing.assert_close(
        ExportedEncoder(tmp_path).embed(images[:1]), encoder.embed(images[:1]), rtol=0, atol=2e-5
    )


def test_whole_images_end_with_maps_where_regions_depend_on_the_shape(tmp_path):
    encoder = build(content("longest", scales=[1.0, 0.75]))
    about = write_exported(tmp_path, encoder)
    assert about["parts"]["content"]["head"]["file"] == "content.safetensors"
    assert [scale["size"] for scale in about["parts"]["content"]["scales"]] == [64, 48]
    exported = ExportedEncoder(tmp_path)
    for shape in ((64, 48), (30, 64), (64, 64), (64, 5)):  # the last is widened
        images = pictures(*shape, n=3)
        torch.testing.assert_close(exported.embed(images), encoder.embed(images), rtol=0, atol=2e-5)
    resized = {size: pictures(64, 48, n=3) for size in (64,)}
    single = build(content("longest"))
    (tmp_path / "single").mkdir()
    write_exported(tmp_path / "single", single)
    found = described(tmp_path / "single", {size: value.numpy() for size, value in resized.items()})
    np.testing.assert_allclose(found, single.embed(resized[64]).numpy(), atol=2e-5)


def test_whole_images_without_regions_have_the_head_in_the_file(tmp_path):
    encoder = build(colour("longest"))
    assert write_exported(tmp_path, encoder)["parts"]["content"]["head"] is None
    images = pictures(32, 21, n=4)
    torch.testing.assert_close(ExportedEncoder(tmp_path).embed(images), encoder.embed(images), rtol=0, atol=2e-5)


def test_scales_of_squares_have_a_file_each(tmp_path):
    encoder = build(content(scales=[1.0, 1.5]))
    write_exported(tmp_path, encoder)
    assert {p.name for p in tmp_path.glob("*.onnx")} == {"content-64.onnx", "content-96.onnx"}
    images = pictures(96, 96, n=4)
    torch.testing.assert_close(ExportedEncoder(tmp_path).embed(images), encoder.embed(images), rtol=0, atol=2e-5)


@pytest.mark.parametrize("levels", [(1, 3), (5,), (7, 2)])
@pytest.mark.parametrize("shape", [(32, 32), (20, 33), (3, 1)])
def test_colour_grids_of_unequal_cells(levels, shape):
    network = ColourLayout(levels)
    exported = OnnxFile(export_network(network, 32, 1), one_shape=False)
    pixels = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    pixels[:, :, 0] = 0  # black
    pixels[0, 0] = 0  # hues on both sides of the half turn
    torch.testing.assert_close(exported(pixels), network(pixels), rtol=0, atol=1e-5)


def test_an_export_leaves_the_exporter_as_it_was():
    pool = nn.AdaptiveAvgPool2d(3)
    export_network(nn.Sequential(nn.Conv2d(3, 2, 1), pool), 32)
    with pytest.raises(Exception, match="adaptive"):  # the exporter's own has no such grids
        torch.onnx.export(pool, (torch.zeros(1, 3, 32, 32),), io.BytesIO(), dynamo=False)


# ------------------------------------------------------------------------------------------- the command


def run(*arguments: str, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["simsearch export", *arguments])
    main()


def test_the_command_writes_what_it_checked(catalog, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr("simsearch.commands.export.speed", lambda describe, image, batch: 2.0 * batch)
    for sample in (20, 6):  # the second takes the place of the first
        run(f"catalog={catalog}", f"out={out}", f"sample={sample}", "k=5", monkeypatch=monkeypatch)
        checked = json.loads((out / "encoder.json").read_text())["checked"]
        assert (checked["images"], checked["k"], checked["same_set"]) == (sample, 5, 1.0)
        assert 0 < checked["descriptor"] < 1e-4
        assert checked["images_per_second"]["8"] == {"torch": 16.0, "onnx": 16.0}
    assert "100.0%" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_check_leaves_what_was_there(catalog, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        run(f"catalog={catalog}", f"out={out}", "tolerance=0", monkeypatch=monkeypatch)
    assert "other descriptors than torch; they differ by up to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", [".", "onnx", "segments/1", ".."])
def test_a_folder_in_the_catalog_is_refused(inside, catalog, monkeypatch, capsys):
    """What lies in a catalog and is not its own would keep it from being made anew."""
    before = sorted(catalog.parent.rglob("*"))
    with pytest.raises(SystemExit):
        run(f"catalog={catalog}", f"out={catalog}/{inside}", monkeypatch=monkeypatch)
    assert "lie in each other: give another out=" in capsys.readouterr().err
    assert sorted(catalog.parent.rglob("*")) == before


def test_it_says_how_images_are_decoded(tmp_path):
    """What is said of colours, turning, transparency and depth is what read_image does with a file of each kind."""
    write_exported(tmp_path, build(content()))
    said = json.loads((tmp_path / "encoder.json").read_text())["steps"][0]
    assert "as its file has it" not in said
    picture = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)

    def decoded(image: Image.Image, **options) -> np.ndarray:
        image.save(data := io.BytesIO(), "PNG", **options)
        return read_image(data.getvalue()).permute(1, 2, 0).numpy()

    plain = Image.fromarray(picture)
    assert "else with its values as they are" in said
    assert np.array_equal(decoded(plain), picture)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert "of its colour model" in said
    assert np.array_equal(decoded(plain, icc_profile=lab), picture)
    assert "upright by its EXIF orientation" in said
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert np.array_equal(decoded(plain, exif=exif), np.rot90(picture, -1))
    assert "transparent pixels on white" in said
    clear = np.dstack([picture, np.where(np.arange(4) < 2, 0, 255) * np.ones((6, 1))]).astype(np.uint8)
    assert np.array_equal(decoded(Image.fromarray(clear)), np.where(clear[..., 3:] == 0, 255, picture))
    assert "of 16-bit values the upper 8 bits" in said
    deep = np.random.default_rng(1).integers(0, 2**16, (6, 4)).astype(np.uint16)
    assert np.array_equal(decoded(Image.fromarray(deep)), np.repeat((deep // 256)[..., None], 3, axis=2))
    assert "decoded to sRGB: by its ICC profile" in said  # what it does with one: tests/test_images.py


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/letter.txt").write_text("dear")
    for folder in (tmp_path / "a", tmp_path / "a/letter.txt"):
        with pytest.raises(FileExistsError, match="give another out="), whole_folder(folder):
            raise AssertionError
    (tmp_path / "a/encoder.json").write_text("{}")  # an export with something beside it
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "a"):
        raise AssertionError
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.onnx").write_text("someone's")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "weights"):
        raise AssertionError
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as temporary:
        (temporary / "encoder.json").write_text("{}")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "empty") as temporary:
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty", "weights"]
    assert (tmp_path / "a/letter.txt").read_text() == "dear"
    assert (tmp_path / "empty/encoder.json").read_text() == "{}"


def test_codes_are_refused(tmp_path):
    binarizer = {"_target_": "simsearch.index.binarize.ITQ", "bits": 8}
    with pytest.raises(ValueError, match="this encoder is of codes"):
        write_exported(tmp_path, build(content(binarizer=binarizer)))


def test_items_at_the_border():
    one = SearchResult(torch.tensor([[4, 2, 7], [1, 2, 3]]), torch.tensor([[0.9, 0.5, 0.4], [0.9, 0.8, 0.7]]))
    other = SearchResult(torch.tensor([[4, 7, 5], [2, 1, 3]]), torch.tensor([[0.9, 0.45, 0.42], [0.9, 0.8, 0.7]]))
    assert border(one, other) == pytest.approx(0.1)  # item 2 lies 0.1 above the last
    assert border(other, one) == 0  # item 5 is the last
    assert border(one, one) == 0
    good = Agreement(images=2, k=3, descriptor=0.01, same_set=0.5, same_order=0.5, border=0.1)
    check(good, 0.05)
    with pytest.raises(ValueError, match=r"other items than torch for 50.0% .* up to 0.1 above"):
        check(good, 0.02)
    with pytest.raises(ValueError, match="differ by up to nan"):
        check(Agreement(2, 3, math.nan, 1.0, 1.0, 0.0), 0.02)


def test_sample_of_files(encoder, catalog, tmp_path, capsys):
    for i, image in enumerate(pictures(40, 56, n=5)):
        (tmp_path / f"{i}.png").write_bytes(encode_thumbnail(image, 64))
    (tmp_path / "broken.png").write_bytes(b"no image")
    config = settings(catalog, tmp_path / "out", images=str(tmp_path))
    batches = list(sample_images(config, None, encoder))
    assert sum(len(batch) for batch in batches) == 5
    assert all(batch.shape[1:] == (3, 64, 64) for batch in batches)
    assert "not-an-image" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the server's choice


def fresh() -> nn.Module:
    return build(parts())


def runs(encoder: nn.Module) -> dict[str, str]:
    return {name: member.backbone.runtime for name, member in encoder.encoders.items()}


@pytest.mark.parametrize("faster", ["torch", "onnx"])
def test_the_faster_runtime_is_taken_and_heat_maps_stay_exact(faster, monkeypatch):
    encoder = fresh()

    def pretend(run):
        run()
        return 1.0 if encoder.encoders["content"].backbone.runtime == faster else 2.0

    monkeypatch.setattr(runtimes, "seconds", pretend)
    choice = choose_runtime(encoder, 4)
    assert choice.runtime == faster
    assert "4 images" in choice.reason
    assert "2000 ms" in choice.reason
    assert runs(encoder) == dict.fromkeys(("content", "style", "colour"), faster)
    image = pictures(64, 64, n=2)
    vector = encoder.embed(image)
    heat = encoder.heat_map(image[0], vector[1])
    assert float(heat.values.sum() + heat.rest) == pytest.approx(float(vector[0] @ vector[1]), abs=1e-5)


def test_what_cannot_run_or_differs_stays_on_torch(monkeypatch):
    def fails(network, size, min_side=None):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("simsearch.models.backbones.OnnxNetwork", fails)
    encoder = fresh()
    choice = choose_runtime(encoder, 2)
    assert choice.runtime == "torch"
    assert "no such operator" in choice.reason
    assert set(runs(encoder).values()) == {"torch"}
    with pytest.raises(ValueError, match=r"runtime=onnx does not fit .* no such operator"):
        choose_runtime(fresh(), 2, "onnx")
    monkeypatch.setattr(
        "simsearch.models.backbones.OnnxNetwork",
        lambda network, size, min_side=None: lambda pixels: 1 - network(pixels),
    )
    encoder = fresh()
    choice = choose_runtime(encoder, 2)
    assert choice.runtime == "torch"
    assert "its descriptors differ in ONNX Runtime by" in choice.reason
    assert set(runs(encoder).values()) == {"torch"}


def test_a_network_that_cannot_be_exported_runs_on_torch_beside_others(monkeypatch):
    network = OnnxNetwork

    def fails(module, size, min_side=None):
        if isinstance(module, ColourLayout):
            raise RuntimeError("no such operator")
        return network(module, size, min_side)

    monkeypatch.setattr("simsearch.models.backbones.OnnxNetwork", fails)
    encoder = fresh()
    monkeypatch.setattr(
        runtimes, "seconds", lambda run: 1.0 + (encoder.encoders["content"].backbone.runtime == "torch")
    )
    choice = choose_runtime(encoder, 2)
    assert "colour-lab/1-3 cannot run in ONNX Runtime" in choice.reason
    assert runs(encoder) == {"content": "onnx", "style": "onnx", "colour": "torch"}
    with pytest.raises(ValueError, match=r"runtime=onnx does not fit .* no such operator"):
        choose_runtime(fresh(), 2, "onnx")


def test_a_wish_is_kept():
    encoder = fresh()
    assert choose_runtime(encoder, 2, "torch").runtime == "torch"
    assert set(runs(encoder).values()) == {"torch"}
    assert "no backbone" in choose_runtime(nn.Identity(), 2).reason
    with pytest.raises(ValueError, match=r"it has no backbone\. Use runtime=auto"):
        choose_runtime(nn.Identity(), 2, "onnx")
    assert choose_runtime(fresh(), 1, "onnx").runtime == "onnx"
    with pytest.raises(ValueError, match="auto, torch or onnx, got 'gpu'"):
        choose_runtime(encoder, 2, "gpu")


def test_the_server_says_what_it_chose(catalog, encoder):
    books = Library(
        {"art": Source(catalog)},
        device=torch.device("cpu"),
        limits=Limits(),
        runtime="onnx",
    )
    try:
        with books.lease("art") as loaded:
            image = pictures(64, 64)[3]
            found = loaded.worker.describe(image).result()
            torch.testing.assert_close(found, encoder.embed(image[None])[0], rtol=0, atol=2e-5)
            assert set(runs(loaded.worker.encoder).values()) == {"onnx"}
        assert "its encoder runs in ONNX Runtime (1 image: " in greeting(books, "127.0.0.1", 8000)
    finally:
        books.close()


def test_seconds_runs_at_least_once():
    calls = []
    assert seconds(lambda: calls.append(1), budget=0.0) >= 0
    assert len(calls) == 1
    seconds(lambda: calls.append(1), budget=10.0)
    assert len(calls) == 21
