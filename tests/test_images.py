"""Files from strangers: pixels against oracles, and a named reason for everything that is wrong."""

import io
import os
import pickle
import random
import struct
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scan_bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin, features
from PIL.JpegImagePlugin import JpegImageFile

from simsearch.functional.resize import _resize_uint8_by_axes, resize_square
from simsearch.images import (
    MAX_SCANS,
    REASONS,
    ImageError,
    _with_end,
    count_scans,
    decode_thumbnail,
    encode_thumbnail,
    header_shape,
    read_image,
)
from simsearch.text import printable


def smooth(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A photograph-like picture, uint8 (H, W, C): sums of slow waves."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 16
    waves = [np.sin(rng.normal() * y + rng.normal() * x + rng.uniform(0, 6)) for _ in range(channels)]
    return np.stack([(127.5 + 127 * wave).astype(np.uint8) for wave in waves], axis=-1)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(tensor: torch.Tensor) -> np.ndarray:
    """(3, H, W) to (H, W, 3), after checking the contract."""
    assert tensor.dtype == torch.uint8
    assert tensor.ndim == 3
    assert tensor.shape[0] == 3
    assert tensor.is_contiguous()
    return tensor.permute(1, 2, 0).numpy()


def reason_of(source: Path | bytes, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(source, **options)
    error = caught.value
    assert error.reason in REASONS
    assert error.path == (None if isinstance(source, bytes) else source)
    assert f"{printable(source) if error.path else 'image given as bytes'}: {error.reason}: " in str(error)
    return error.reason


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims its size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# Right pixels


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ],
)
def test_lossless_formats_come_back_exactly(kind, options):
    picture = smooth()
    data = encode(Image.fromarray(picture), kind, **options)
    np.testing.assert_array_equal(pixels(read_image(data)), picture)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP"])
def test_lossy_formats_come_back_nearly(kind):
    picture = smooth()
    data = encode(Image.fromarray(picture), kind, quality=95)
    assert np.abs(pixels(read_image(data)).astype(int) - picture).mean() < 3


def test_content_decides_not_the_ending(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(Image.fromarray(smooth()), "PNG"))
    np.testing.assert_array_equal(pixels(read_image(path)), smooth())
    np.testing.assert_array_equal(pixels(read_image(path.read_bytes())), smooth())


def test_grey_fills_three_channels():
    grey = smooth(channels=1)
    data = encode(Image.fromarray(grey[..., 0]), "PNG")
    np.testing.assert_array_equal(pixels(read_image(data)), np.repeat(grey, 3, axis=2))


def test_one_bit_is_black_and_white():
    bits = smooth(channels=1)[..., 0] > 127
    data = encode(Image.fromarray(bits), "PNG")
    np.testing.assert_array_equal(pixels(read_image(data)), np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_laid_on_white(mode, kind):
    channels = smooth(channels=len(mode))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(channels), kind, **options)
    colour, alpha = channels[..., :-1].astype(float), channels[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (24, 32, 3))
    assert np.abs(pixels(read_image(data)) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(kind):
    image = Image.new("P", (3, 1))
    image.putpalette([200, 10, 20, 30, 210, 40, 50, 60, 220])
    image.putdata([0, 1, 2])
    data = encode(image, kind, transparency=1)
    assert pixels(read_image(data)).tolist() == [[[200, 10, 20], [255, 255, 255], [50, 60, 220]]]


def test_cmyk_jpeg_is_not_inverted():
    cmyk = (30, 160, 200, 40)
    data = encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95)
    expected = [(255 - ink) * (255 - cmyk[3]) / 255 for ink in cmyk[:3]]
    assert np.abs(pixels(read_image(data)) - np.array(expected)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 255, 256, 1000, 32768, 65279, 65280, 65535]], dtype=np.uint16)
    red = pixels(read_image(encode(Image.fromarray(values), kind)))[0, :, 0]
    assert red.tolist() == [0, 0, 1, 3, 128, 254, 255, 255]


def test_sixteen_bit_big_endian_tiff():
    values = np.array([[0, 1000, 65535]], dtype=">u2")
    data = encode(Image.frombytes("I;16B", (3, 1), values.tobytes()), "TIFF")
    assert data.startswith(b"MM")
    assert pixels(read_image(data))[0, :, 1].tolist() == [0, 3, 255]


def test_float_grey_is_stretched_and_survives_nan_and_infinity():
    values = np.array([[-2.0, 0.0, 2.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    data = encode(Image.fromarray(values), "TIFF")
    assert pixels(read_image(data))[0, :, 2].tolist() == [0, 128, 255, 0, 255, 0]


@pytest.mark.parametrize("value", [0.25, np.nan, np.inf])
def test_constant_float_grey_is_no_division_by_zero(value):
    data = encode(Image.fromarray(np.full((2, 2), value, dtype=np.float32)), "TIFF")
    assert read_image(data).shape == (3, 2, 2)


def test_32_bit_grey_is_stretched():
    values = np.array([[-1_000_000, 0, 1_000_000]], dtype=np.int32)
    assert pixels(read_image(encode(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation(kind, orientation):
    picture = smooth()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(Image.fromarray(picture), kind, exif=exif, **options)
    found, expected = pixels(read_image(data)), UPRIGHT[orientation](picture)
    assert found.shape == expected.shape
    assert header_shape(data) == expected.shape[:2]
    assert np.abs(found.astype(int) - expected).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize("behind", [True, False])
def test_the_shape_of_a_png_is_found_without_decoding_it(behind, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(smooth()), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4])
    end = data.index(b"IEND") - 4
    moved = data[:start] + data[stop:end] + (data[start:stop] if behind else b"") + data[end:]
    expected = read_image(moved).shape[1:]
    loads = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: loads.append(image))
    assert header_shape(moved) == expected == ((32, 24) if behind else (24, 32))
    assert not loads


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_texts_and_profiles_do_not_refuse_a_png(name, behind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(smooth()), "PNG", exif=exif, icc_profile=wide_profile())
    expected = read_image(data)
    content = {b"tEXt": b"x\0a text", b"iTXt": b"x\0\1\0\0\0"}.get(name, b"x\0\0")
    if name != b"tEXt":
        content += zlib.compress(bytes(2 * 2**20))
    sound = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    place = data.index(b"IEND" if behind else b"IDAT") - 4
    for chunk in (sound, sound[:-1] + bytes([sound[-1] ^ 1])):  # long, and with a wrong checksum
        changed = data[:place] + chunk + data[place:]
        assert torch.equal(read_image(changed), expected)
        assert header_shape(changed) == (32, 24)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_does_not_refuse_the_picture(exif):
    data = encode(Image.fromarray(smooth()), "JPEG", exif=exif)
    assert read_image(data).shape == (3, 24, 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_many(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert np.unique(pixels(read_image(data)).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_one_pixel_is_an_image_unless_min_side_says_otherwise():
    data = encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")
    assert pixels(read_image(data)).tolist() == [[[9, 8, 7]]]
    assert (pixels(read_image(data, size=5)) == [9, 8, 7]).all()
    assert reason_of(data, min_side=2) == "too-small"


def test_trailing_garbage_is_ignored():
    data = encode(Image.fromarray(smooth()), "JPEG")
    assert torch.equal(read_image(data + b"garbage" * 100), read_image(data))


# Large files


def test_big_jpeg_is_decoded_small_and_in_little_memory():
    data = encode(Image.new("L", (12000, 9000), 77), "JPEG")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    except OSError:
        pytest.skip("peak memory cannot be measured here")
    before = peak_memory()
    image = read_image(data, size=64)
    assert peak_memory() - before < 60 * 2**20  # in full it takes 108 MB as grey and 432 MB as RGB
    assert image.shape == (3, 64, 64)
    assert (image.int() - 77).abs().max() <= 1
    assert reason_of(data) == "too-many-pixels"


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def test_reduced_decoding_differs_by_about_a_level():
    data = encode(Image.fromarray(smooth(480, 608)), "JPEG", quality=90)
    reduced, full = read_image(data, size=40), resize_square(read_image(data), 40)
    assert not torch.equal(reduced, full)
    assert (reduced.int() - full.int()).abs().float().mean() < 1.5


def test_a_progressive_jpeg_counts_in_full():
    picture = Image.fromarray(smooth(200, 200))
    plain, progressive = encode(picture, "JPEG"), encode(picture, "JPEG", progressive=True)
    assert read_image(plain, size=10, max_pixels=39_999).shape == (3, 10, 10)
    assert reason_of(progressive, size=10, max_pixels=39_999) == "too-many-pixels"
    assert read_image(progressive, size=10, max_pixels=40_000).shape == (3, 10, 10)


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_001), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("size", [None, 32])
def test_decompression_bombs_are_refused_from_their_header(width, height, size):
    assert reason_of(png_header(width, height), size=size) == "too-many-pixels"


def test_max_bytes(tmp_path):
    data = encode(Image.fromarray(smooth()), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        assert reason_of(source, max_bytes=len(data) - 1) == "too-large-file"
        assert read_image(source, max_bytes=len(data)).shape == (3, 24, 32)


# Wrong files


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just text, renamed to .jpg\n" * 100, "not-an-image"),
        (bytes(1000), "not-an-image"),
        (b"\xff\xd8\xff\xe0" + b"x" * 500, "truncated"),  # a segment longer than the file
        (png_header(4, 4), "truncated"),  # four rows claimed, none there
        (png_header(4, 4)[:29] + bytes(4) + png_header(4, 4)[33:], "decode-failed"),  # a wrong checksum
        (b"II*\0\xff\xff\xff\x7f", "decode-failed"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "unsupported"),
        (b"8BPS" + bytes(100), "unsupported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported"),
    ],
)
def test_named_reasons(tmp_path, data, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    assert reason_of(path) == reason
    assert reason_of(data) == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    assert reason_of(data[: int(len(data) * share)]) == "truncated"
    assert reason_of(data[: int(len(data) * share)], size=8) == "truncated"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_what_is_no_file(tmp_path):
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"x")
    assert reason_of(tmp_path / "absent.jpg") == "missing"
    assert reason_of(tmp_path / "file" / "below.jpg") == "missing"
    assert reason_of(tmp_path / "dangling.jpg") == "missing"
    assert reason_of(tmp_path) == "not-a-file"
    assert reason_of(pipe) == "not-a-file"
    assert reason_of(Path("/dev/zero")) == "not-a-file"
    assert reason_of(tmp_path / ("long" * 1000)) == "unreadable"
    assert reason_of(tmp_path / "zero\0byte.jpg") == "unreadable"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(smooth()), "PNG"))
    path.chmod(0)
    assert reason_of(path) == "unreadable"


def test_warnings_of_pillow_stay_inside():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270] = "x" * 50
    tiff = encode(Image.fromarray(smooth()), "TIFF", tiffinfo=tags)
    damaged = tiff[:8] + b"\xff" * 10 + tiff[18:]
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        assert reason_of(png_header(9_500, 10_600)) == "too-many-pixels"  # Pillow warns above 89 million
        for data in (tiff, damaged, tiff[:-40]):
            try_to_read(data)
        assert warnings.filters == filters
    assert leaked == []


def try_to_read(data: bytes) -> str:
    try:
        return str(read_image(data, size=8, max_pixels=1_000_000).shape)
    except ImageError as error:
        return error.reason


SAMPLES = {
    "jpeg": encode(Image.fromarray(smooth()), "JPEG"),
    "progressive": encode(Image.fromarray(smooth()), "JPEG", progressive=True),
    "cmyk": encode(Image.fromarray(smooth()).convert("CMYK"), "JPEG"),
    "png": encode(Image.fromarray(smooth()), "PNG"),
    "palette": encode(Image.fromarray(smooth()).quantize(16), "PNG", transparency=0),
    "webp": encode(Image.fromarray(smooth()), "WEBP"),
    "gif": encode(Image.fromarray(smooth()), "GIF"),
    "bmp": encode(Image.fromarray(smooth()), "BMP"),
    "tiff": encode(Image.fromarray(smooth()), "TIFF"),
    "float": encode(Image.fromarray(smooth()[..., 0].astype(np.float32)), "TIFF"),
}


@given(name=st.sampled_from(sorted(SAMPLES)), seed=st.integers(0, 2**32), cut=st.booleans(), header=st.booleans())
@settings(max_examples=400, deadline=None)
def test_damage_anywhere_gives_pixels_or_a_reason(name, seed, cut, header):
    data, rng = bytearray(SAMPLES[name]), random.Random(seed)
    for _ in range(rng.choice([1, 2, 8])):
        data[rng.randrange(60 if header else len(data))] = rng.randrange(256)
    if cut:
        del data[rng.randrange(len(data)) :]
    assert try_to_read(bytes(data)) in {"torch.Size([3, 8, 8])", *REASONS}


def test_error_crosses_processes_and_knows_its_reasons():
    error = pickle.loads(pickle.dumps(ImageError(Path("a.jpg"), "truncated", "half of it")))
    assert (error.path, error.reason, error.detail) == (Path("a.jpg"), "truncated", "half of it")
    assert str(error) == "a.jpg: truncated: half of it"
    with pytest.raises(ValueError, match="unknown reason 'bad'"):
        ImageError(None, "bad")


@pytest.mark.parametrize("name", ["size", "max_pixels", "max_bytes", "min_side"])
def test_wrong_arguments(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        read_image(SAMPLES["png"], **{name: 0})


# The resize


def pillow_square(picture: np.ndarray, size: int) -> np.ndarray:
    height, width = picture.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(picture).crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 90), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_resize_square_agrees_with_pillow(height, width, size, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(noise).permute(2, 0, 1)
    found = resize_square(image, size)
    assert found.shape == (3, size, size)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - pillow_square(noise, size)).max() <= 2
    square = image[..., (height - min(height, width)) // 2 :, (width - min(height, width)) // 2 :]
    square = square[..., : min(height, width), : min(height, width)]
    by_axes = _resize_uint8_by_axes(square[None], size, size)[0]  # what other devices compute
    assert (by_axes.int() - found.int()).abs().max() <= 2


def test_resize_of_floats_agrees_with_pillow():
    plane = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    expected = np.asarray(Image.fromarray(plane).resize((17, 17), Image.Resampling.BICUBIC))
    image = torch.from_numpy(plane).expand(3, 40, 40)
    found = resize_square(image, 17)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[1], expected, atol=1e-4)
    assert resize_square(image.double(), 17).dtype == torch.float64
    torch.testing.assert_close(resize_square(image.bfloat16(), 17).float(), found, atol=0.05, rtol=0.05)


def test_resize_square_takes_batches_and_leaves_its_own_size_alone():
    batch = torch.from_numpy(np.stack([smooth(seed=i) for i in range(6)])).permute(0, 3, 1, 2)
    for image in (batch, batch.float() / 255):
        found = resize_square(image.reshape(2, 3, 3, 24, 32), 10)
        assert found.shape == (2, 3, 3, 10, 10)
        for one, single in zip(found.reshape(6, 3, 10, 10), image, strict=True):
            assert torch.equal(one, resize_square(single, 10))
        square = image[..., :24]
        assert torch.equal(resize_square(square, 24), square)
        assert torch.equal(resize_square(image, 24), image[..., 4:28])
    assert resize_square(batch[:0], 10).shape == (0, 3, 10, 10)


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (torch.zeros(3, 4, 4), 0, "size must be at least 1"),
        (torch.zeros(1, 4, 4), 2, "must be"),
        (torch.zeros(4, 4), 2, "must be"),
        (torch.zeros(3, 0, 4), 2, "must be"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), 2, "uint8 or floating"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), 4, "uint8 or floating"),
    ],
)
def test_resize_square_refuses(image, size, message):
    with pytest.raises(ValueError, match=message):
        resize_square(image, size)


# Thumbnails


def test_small_thumbnails_are_lossless():
    image = torch.from_numpy(smooth(32, 32)).permute(2, 0, 1)
    data = encode_thumbnail(image, 128)
    assert data.startswith(b"\x89PNG")
    assert torch.equal(decode_thumbnail(data), image)


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((300, 200), 128, (128, 85)),
        ((200, 300), 128, (85, 128)),
        ((100, 90), 128, (100, 90)),
        ((2000, 3), 100, (100, 1)),
    ],
)
def test_thumbnails_keep_the_aspect_and_never_grow(shape, side, expected):
    picture = smooth(*shape)
    data = encode_thumbnail(torch.from_numpy(picture).permute(2, 0, 1), side)
    assert data.startswith(b"\xff\xd8\xff")
    found = pixels(decode_thumbnail(data))
    assert found.shape == (*expected, 3)
    oracle = Image.fromarray(picture).resize(expected[::-1], Image.Resampling.BICUBIC)
    brightness = np.asarray(Image.fromarray(found).convert("L")).astype(int)  # JPEG keeps colour coarsely
    assert np.abs(brightness - np.asarray(oracle.convert("L"))).mean() < 3


def test_thumbnail_refuses():
    with pytest.raises(ValueError, match="image must be uint8"):
        encode_thumbnail(torch.zeros(3, 4, 4), 2)
    with pytest.raises(ValueError, match="side must be at least 1"):
        encode_thumbnail(torch.zeros(3, 4, 4, dtype=torch.uint8), 0)
    with pytest.raises(ImageError, match="not-an-image"):
        decode_thumbnail(b"no thumbnail")


# --------------------------------------------------------------------------------------------- scans


def naive_scans(data: bytes) -> int:
    """By a walk over each byte (ITU-T T.81, B.1): segments are skipped by their length, coded data byte by byte."""
    count, i = 0, 2
    while i < len(data) - 1:
        if data[i] != 0xFF or data[i + 1] < 0xC0 or data[i + 1] == 0xFF or 0xD0 <= data[i + 1] <= 0xD8:
            i += 1
        elif data[i + 1] == 0xD9:
            break
        else:
            count += data[i + 1] == 0xDA
            i += 2 + int.from_bytes(data[i + 2 : i + 4], "big")
    return count


def jpeg(**how) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", **how)
    return buffer.getvalue()


def test_scans_are_counted():
    inner = jpeg(progressive=True)
    exif = Image.Exif()
    exif[0x010E] = (b"\xff\xda" * 3000).decode("latin-1")
    for data, scans in (
        (jpeg(), 1),
        (jpeg(restart_marker_blocks=1), 1),
        (inner, naive_scans(inner)),
        (jpeg(comment=inner), 1),  # as thumbnails lie in metadata
        (jpeg(exif=exif), 1),
        (jpeg() + inner, 1),  # as MPO and moving pictures have more behind the first
        (b"", 0),
    ):
        assert count_scans(data) == naive_scans(data) == scans
    assert 8 <= naive_scans(inner) <= 14
    assert count_scans(scan_bomb(20_000, (40, 30)), most=10**6) == naive_scans(scan_bomb(20_000, (40, 30))) > 1000
    assert count_scans(scan_bomb(20_000, (40, 30))) == MAX_SCANS + 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0x00, 0x01, 0x02, 0x05, 0xC4, 0xD0, 0xD9, 0xDA, 0xE1, 0xFF]), max_size=60))
def test_scans_of_anything_are_counted_as_a_walk_counts_them(content):
    data = b"\xff\xd8" + bytes(content)
    found = data.count(b"\xff\xda")  # one that stands alone counts wherever it is
    assert count_scans(data, most=10**6) == (naive_scans(data) if found > 1 else found)


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize("size", [None, 64])
def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(progressive, size, monkeypatch):
    monkeypatch.setattr(JpegImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="too-many-scans: more than 100 scans of 4000 x 3000 pixels") as caught:
        read_image(scan_bomb(280_000, progressive=progressive), size=size)
    assert caught.value.reason == "too-many-scans"
    monkeypatch.undo()
    few = scan_bomb(len(scan_bomb(0, (40, 30), progressive=progressive)) + 400, (40, 30), progressive=progressive)
    assert 30 < count_scans(few) <= MAX_SCANS
    if progressive:
        assert read_image(few).shape == (3, 30, 40)
    with pytest.raises(ImageError, match="too-many-scans: more than 25 scans of 40 x 30"):
        read_image(few, max_pixels=1500)


def test_thumbnails_are_small_and_of_few_formats():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    with pytest.raises(ImageError, match="not-an-image: a thumbnail is JPEG, PNG or WEBP"):
        decode_thumbnail(buffer.getvalue())
    buffer = io.BytesIO()
    Image.new("1", (5000, 4000)).save(buffer, "PNG")
    with pytest.raises(ImageError, match="too-many-pixels"):
        decode_thumbnail(buffer.getvalue())


# ------------------------------------------------------------------- ends, profiles, formats, huge images


def noisy(size: tuple[int, int] = (96, 80), seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (10, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("size", [None, 8])
def test_a_jpeg_without_its_last_marker_is_whole_and_one_without_pixels_is_not(options, size):
    data = saved(noisy(), quality=90, **options)
    whole = read_image(data, size=size)
    assert data.endswith(b"\xff\xd9")
    for cut in (1, 2):
        assert torch.equal(read_image(data[:-cut], size=size), whole)
    for cut in (40, len(data) // 3, len(data) // 2):
        with pytest.raises(ImageError) as error:
            read_image(data[:-cut], size=size)
        assert error.value.reason == "truncated", cut


def test_no_jpeg_with_pixels_missing_is_whole():
    data = saved(noisy(), quality=90)
    wrong = [cut for cut in range(3, len(data) - 700, 7) if _with_end(data[:-cut]) is not None]
    assert wrong == []
    restarts = saved(noisy(), quality=90, restart_marker_blocks=3)  # where that cannot be told
    assert _with_end(restarts[:-2]) is None


def wide_profile() -> bytes:
    """A profile of primaries like Adobe RGB's: that of sRGB with its green moved, gamma and all else as they are."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    for tag in range(count):
        place = 132 + 12 * tag
        name, offset = bytes(profile[place : place + 4]), int.from_bytes(profile[place + 4 : place + 8], "big")
        if name == b"rXYZ":
            values = (0.6097, 0.3111, 0.0195)
        elif name == b"gXYZ":
            values = (0.2053, 0.6257, 0.0609)
        elif name == b"bXYZ":
            values = (0.1492, 0.0632, 0.7446)
        elif name == b"desc":
            profile[offset:] = bytes(profile[offset:]).replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))
            continue
        else:
            continue
        for i, value in enumerate(values):
            profile[offset + 8 + 4 * i : offset + 12 + 4 * i] = round(value * 65536).to_bytes(4, "big")
    return bytes(profile)


def test_colours_are_converted_from_the_profile():
    """Against the matrices, by hand."""
    colours = np.random.default_rng(0).integers(60, 200, (6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(colours)
    found = read_image(saved(image, "PNG", icc_profile=wide_profile())).permute(1, 2, 0).numpy().astype(float)

    def linear(v):
        return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)

    def coded(v):
        return np.where(v <= 0.0031308, v * 12.92, 1.055 * v.clip(0) ** (1 / 2.4) - 0.055)

    wide = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
    srgb = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    expected = coded(linear(colours / 255) @ wide.T @ np.linalg.inv(srgb).T).clip(0, 1) * 255
    assert np.abs(found - expected).max() < 2.5
    assert np.abs(found - colours).max() > 10


def test_profiles_that_change_nothing_or_are_nothing():
    image = noisy()
    plain = read_image(saved(image, "PNG"))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"damaged", bytes(5000), srgb[:300]):
        assert torch.equal(read_image(saved(image, "PNG", icc_profile=profile)), plain)
    grey = image.convert("L")
    assert torch.equal(read_image(saved(grey, "PNG", icc_profile=wide_profile())), read_image(saved(grey, "PNG")))


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
def test_formats_that_pillow_may_have(kind):
    if not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}[kind]):
        pytest.skip(f"this Pillow has no {kind}: SKIPPED")
    data = saved(noisy(), kind, **({"quality": 95} if kind == "AVIF" else {}))
    difference = read_image(data).int() - torch.from_numpy(np.array(noisy())).permute(2, 0, 1).int()
    assert difference.abs().float().mean() < 6
    with pytest.raises(ImageError):
        read_image(data[: len(data) // 3])
    with pytest.raises(ImageError) as error:
        read_image(data, max_pixels=1000)
    assert error.value.reason == "too-many-pixels"


def test_a_file_of_a_format_that_is_not_opened_says_what_opens_it():
    for data, what in ((b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"), (b"\0\0\0\x18ftypheic" + bytes(90), "pillow-heif")):
        if find_spec({"jxl": "pillow_jxl", "pillow-heif": "pillow_heif"}[what]):
            continue
        with pytest.raises(ImageError) as error:
            read_image(data)
        assert error.value.reason == "unsupported"
        assert what in error.value.detail


def test_more_pixels_than_pillows_own_guard_are_a_question_of_the_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = saved(noisy())  # 7,680 pixels, more than twice as many
    assert read_image(data).shape == (3, 80, 96)
    assert read_image(saved(noisy((960, 800))), size=24, max_pixels=20_000).shape == (3, 24, 24)  # at 1/8
    with pytest.raises(ImageError) as error:
        read_image(data, max_pixels=7000)
    assert error.value.reason == "too-many-pixels"
    assert Image.MAX_IMAGE_PIXELS == 1000
