"""Safe decoding of untrusted image files, the one resize function, and thumbnails.

For any file, `read_image` returns pixels or raises an `ImageError` with a named reason. It never warns, and it limits
the number of pixels and of decoding passes. The decoding time of the rest cannot be bounded, so images from outside are
decoded in processes that can be terminated (simsearch.data.process_pool).
"""

from __future__ import annotations

import io
import math
import random
import re
import stat
import threading
import warnings
import zlib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError, features
from torch import Tensor

from simsearch.errors import SimsearchError
from simsearch.functional.regions import Region, crop
from simsearch.functional.resize import Fit, check_fit, longest_shape, resize, resize_square
from simsearch.text import printable

REASONS = {
    "missing": "there is no such file",
    "not-a-file": "it is a folder, pipe, socket or device",
    "unreadable": "the system cannot read it (permissions, a broken disk or name)",
    "empty": "it is empty",
    "too-large-file": "it has more bytes than max_bytes",
    "not-an-image": "its content is not an image",
    "unsupported": "its image format is not supported",
    "too-many-pixels": "its header claims more pixels than max_pixels",
    "too-many-scans": "a JPEG with so many scans that decoding it would take far too long",
    "too-small": "a side is shorter than min_side",
    "outside": "the requested region reaches beyond the image",
    "truncated": "it is cut off: it ends before its image does",
    "decode-failed": "its content is damaged",
    "too-slow": "it was not decoded within the time allowed for an image",
    "too-much-memory": "decoding it needs more memory than is allowed for an image",
    "crashed": "decoding it crashed the process",
}
MAX_PIXELS = 100_000_000
DECODING = 2  # goes up where read_image gives other pixels of a file than before
MAX_BYTES = 256 * 2**20
MAX_SCANS = 100  # of a JPEG; progressive ones have about ten
_SCANNED = 20  # times max_pixels: most pixels that all scans of a JPEG pass over
_THUMBNAIL_PIXELS = 2**24
THUMBNAIL_LOSSLESS_SIDE = 64

# Formats by content, whatever the ending says. JPEG includes MPO, the stereo and burst files of phones.
_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_FORMATS += ("AVIF",) if features.check("avif") else ()
_FORMATS += ("JPEG2000",) if features.check("jpg_2000") else ()
for _package, _name in (("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")):
    if find_spec(_package) is not None:
        _opener = import_module(_package)
        if hasattr(_opener, "register_heif_opener"):
            _opener.register_heif_opener()
        _FORMATS += (_name,)
_PNG = b"\x89PNG"
# Signatures (offset, bytes, name) say why Pillow found no image: a damaged header, another format, or none.
_OPENED = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, _PNG, "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftypheic", "HEIF"),
    (4, b"jP  ", "JPEG2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000"),
)
_NOT_OPENED = (
    (4, b"ftypavi", "AVIF, which this Pillow cannot open"),
    (4, b"ftyp", "HEIC or a film; with pip install pillow-heif, HEIC can be opened"),
    (4, b"jP  ", "JPEG 2000, which this Pillow does not open"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000, which this Pillow does not open"),
    (4, b"JXL ", "JPEG XL; pip install pillow-jxl-plugin to open it"),
    (0, b"\xff\x0a", "JPEG XL; pip install pillow-jxl-plugin to open it"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
)
# The markers of a JPEG that a length follows, and the end of the image. 0xFF in coded data is followed by 0x00 or by a
# restart, so that these are found there as a decoder finds them.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_END, _RESTARTS = b"\xff\xd9", b"\xff\xdd"
_NOISE = bytes(random.Random(0).choices(range(255), k=512))  # bits of other pixels, no marker among them
# The colour space of a profile by Pillow's mode; and the largest profile that is read. Those of printers have 2 MB.
_COLOURS = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_MOST_PROFILE = 2**23
_GUARD = threading.Lock()


class ImageError(SimsearchError, ValueError):
    """An image cannot be used.

    Args:
        path: The file. None for an image given as bytes.
        reason: A key of REASONS.
        detail: Details. By default the text of the reason.
    """

    def __init__(self, path: Path | None, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}: it must be one of {', '.join(REASONS)}")
        super().__init__(path, reason, detail)  # all arguments: the error crosses process borders by pickle
        self.path = path
        self.reason = reason
        self.detail = detail or REASONS[reason]

    def __str__(self) -> str:
        name = "image given as bytes" if self.path is None else printable(self.path)
        return f"{name}: {self.reason}: {printable(self.detail)}"


def read_image(
    source: Path | bytes,
    *,
    size: int | None = None,
    fit: Fit = "square",
    enlarge: bool = True,
    region: Region | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    min_side: int = 1,
) -> Tensor:
    """The pixels of an image file, uint8 (3, H, W) sRGB, upright.

    The format is detected from the content: JPEG (and MPO), PNG, WEBP, GIF, BMP and TIFF; AVIF and JPEG 2000 if Pillow
    supports them; HEIC and JPEG XL if pillow-heif and pillow-jxl-plugin are installed. Of an animation or a stack, the
    first frame is read. A JPEG that only lacks its end marker counts as complete.

    The EXIF orientation is applied. Transparent pixels are composited on white. 16-bit values keep their upper 8 bits.
    32-bit grey has no fixed white; it is stretched from its own minimum to its maximum. Colours are converted from the
    file's ICC profile to sRGB; a profile that is damaged, above 8 MB (in a PNG 1 MB) or belongs to another colour model
    is ignored.

    With `size`, a JPEG whose sides have at least 4 times the needed pixels is decoded at 1/2, 1/4 or 1/8 scale, but to
    no less than twice the needed size. This is many times faster. Pixels differ by about one level on average, and
    shift by less than half a pixel. It also admits JPEGs above `max_pixels`, up to Pillow's own limit of 2 *
    PIL.Image.MAX_IMAGE_PIXELS, 179 million, unless they are progressive, since these are held in full while they are
    decoded.

    Args:
        source: The file, or its bytes.
        size: Returns the image at this side in pixels instead: with fit "square" the centre square (3, size, size) by
            `resize_square`; with fit "longest" the whole image, (3, h, w) as in `longest_shape`.
        fit: "square" or "longest".
        enlarge: Enlarge an image whose longest side is below `size`. False leaves it as it is (with fit "longest").
        region: The part of the upright image to return alone. `size` and `fit` are then of this part. None returns the
            whole image.
        max_pixels: Largest number of pixels to decode. It is checked in the header, before decoding. At the default,
            the worst file needs about 1.5 GiB for a moment. The scans of a JPEG may pass over at most 20 times as many
            pixels, and there may be at most 100 scans.
        max_bytes: Largest file size in bytes.
        min_side: Shortest accepted side in pixels.

    Raises:
        ImageError: If the file cannot be used.
        ValueError: If an argument is out of range, or `enlarge` is False with fit "square".
    """
    limits = {"size": size, "max_pixels": max_pixels, "max_bytes": max_bytes, "min_side": min_side}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_fit(fit)
    if not enlarge and fit == "square":
        raise ValueError("enlarge=False needs fit=longest: a square has all its pixels")
    path = None if isinstance(source, bytes) else Path(source)
    data = source if isinstance(source, bytes) else read_file(Path(source), max_bytes)
    if not data:
        raise ImageError(path, "empty")
    if len(data) > max_bytes:
        raise ImageError(path, "too-large-file", f"{len(data):,} bytes, at most {max_bytes:,} are read")
    try:
        # Narrow on purpose: filters are global to the process, so that threads may undo each other's.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            settings = {"path": path, "size": size, "fit": fit, "region": region, "max_pixels": max_pixels}
            settings["min_side"] = min_side
            try:
                pixels, shape = _decode(data, **settings)  # type: ignore[arg-type]
            except ImageError:
                raise
            except (OSError, ValueError) as error:
                if (mended := _mended(data, error)) is None:
                    raise
                pixels, shape = _decode(mended, **settings)  # type: ignore[arg-type]
        if size is not None and (enlarge or max(pixels.shape[1:]) > size):
            pixels = resize_square(pixels, size) if fit == "square" else resize(pixels, *shape)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on damaged files
        raise ImageError(path, *_explain(error, data)) from error
    return pixels.contiguous()


def picture_pixels(picture: Image.Image) -> Tensor:
    """The pixels of a Pillow image as `read_image` returns them: uint8 (3, H, W) sRGB, upright, on white.

    Args:
        picture: The Pillow image.
    """
    picture = picture.copy()
    _turn_upright(picture)
    pixels = np.array(_to_rgb(picture))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def encode_thumbnail(image: Tensor, side: int) -> bytes:
    """A small copy of an image as the bytes of an image file.

    The aspect ratio is kept, and smaller images are not enlarged.

    The format is PNG, hence lossless, if the thumbnail's longer side is at most 64 pixels, else JPEG of quality 90.

    Args:
        image: uint8 (3, H, W).
        side: Longest side in pixels, 1 or more.

    Raises:
        ValueError: If the image has another dtype or shape, or if `side` is below 1.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be uint8 (3, H, W) with H, W >= 1, got {image.dtype} {tuple(image.shape)}")
    if side < 1:
        raise ValueError(f"side must be at least 1, got {side}")
    height, width = image.shape[1:]
    scale = min(1.0, side / max(height, width))
    small = resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    picture = Image.fromarray(small.permute(1, 2, 0).contiguous().cpu().numpy())
    buffer = io.BytesIO()
    if max(picture.size) <= THUMBNAIL_LOSSLESS_SIDE:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decode_thumbnail(data: bytes) -> Tensor:
    """The pixels of a thumbnail, uint8 (3, H, W). The bytes may be untrusted.

    Args:
        data: Bytes of an image file.

    Raises:
        ImageError: If the bytes are damaged or no thumbnail: in another format, or larger than 16 million pixels.
    """
    if not data.startswith((b"\xff\xd8\xff", b"\x89PNG")) and data[8:12] != b"WEBP":
        raise ImageError(None, "not-an-image", "a thumbnail is JPEG, PNG or WEBP")
    return read_image(data, max_pixels=_THUMBNAIL_PIXELS)


def count_scans(data: bytes, most: int = MAX_SCANS) -> int:
    """The number of scans of a JPEG. Each scan is a pass of the decoder over all pixels.

    Thumbnails inside metadata, and data after the end of the image, do not count. The function searches the bytes once.
    A decoder would take minutes for a few hundred kilobytes of empty scans.

    Args:
        data: Bytes of the file.
        most: The count stops at most + 1.
    """
    if (count := data.count(b"\xff\xda")) < 2:
        return count
    count, place = 0, 2
    while count <= most and (found := _MARKER.search(data, place)):
        code, place = data[found.end() - 1], found.end()
        if code == _END_OF_IMAGE:
            break
        count += code == _START_OF_SCAN
        place += int.from_bytes(data[place : place + 2])
    return count


def header_shape(data: bytes) -> tuple[int, int] | None:
    """Height and width of the upright image, by the header. None if it cannot be determined.

    Args:
        data: Bytes of an image file.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            return _header_shape(data)
    except Exception as error:  # read_image says what is wrong
        mended = _mended(data, error)
        return None if mended is None else header_shape(mended)


def _header_shape(data: bytes) -> tuple[int, int]:
    with _opened(data) as image:
        width, height = image.size
        return (width, height) if _is_turned_by_header(image, data) else (height, width)


def read_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file. b"" for an empty file.

    Args:
        path: The file.
        max_bytes: Largest file size in bytes.

    Raises:
        ImageError: If `read_image` would not read the file.
    """
    try:
        status = path.stat()
        regular, length = stat.S_ISREG(status.st_mode), status.st_size
        # Opening a pipe would wait for its writer for ever, and a device may have no end.
        data = path.read_bytes() if regular and length <= max_bytes else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(path, "missing") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ImageError(path, "unreadable", getattr(error, "strerror", None) or str(error)) from error
    if not regular:
        raise ImageError(path, "not-a-file")
    if length > max_bytes:
        raise ImageError(path, "too-large-file", f"{length:,} bytes, at most {max_bytes:,} are read")
    return data


def _decode(
    data: bytes,
    *,
    path: Path | None,
    size: int | None,
    fit: Fit,
    region: Region | None,
    max_pixels: int,
    min_side: int,
) -> tuple[Tensor, tuple[int, int]]:
    """The pixels of the region, perhaps at a reduced scale, and the height and width that they must have upright."""
    with _opened(data) as image:
        width, height = image.size
        if min(width, height) < min_side:
            raise ImageError(path, "too-small", f"{width} x {height} pixels; both sides must be at least {min_side}")
        if region is not None:
            # Of other formats metadata may follow the pixels, which are not to be decoded yet.
            turned = image.format in ("JPEG", "MPO") and _is_on_its_side(image)
            zoom = _zoom(region, *((width, height) if turned else (height, width)))
        else:
            zoom = 1.0
        needed = height, width
        if size is not None:
            # By the header: decoding at a smaller scale rounds both sides.
            needed = (size, size) if fit == "square" else longest_shape(height, width, size)
            # Does something to JPEG only.
            image.draft(None, (math.ceil(2 * zoom * needed[1]), math.ceil(2 * zoom * needed[0])))
        scans = count_scans(data) if image.format in ("JPEG", "MPO") else 1
        # A JPEG of several scans is held in full while it is decoded, at whatever scale.
        several = scans > 1 or "progressive" in image.info
        held = width * height if several else image.width * image.height
        if held > max_pixels:
            detail = f"{width} x {height}, at most {max_pixels:,} pixels are decoded"
            raise ImageError(path, "too-many-pixels", detail)
        if several and scans > (allowed := min(MAX_SCANS, _SCANNED * max_pixels // (width * height))):
            detail = f"more than {allowed} scans of {width} x {height} pixels"
            raise ImageError(path, "too-many-scans", detail)
        image.load()
        on_its_side = _is_on_its_side(image)
        _turn_upright(image)
        pixels = torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)
    if region is None:
        return pixels, needed[::-1] if on_its_side else needed
    upright = (width, height) if on_its_side else (height, width)
    try:
        part = region.of(*upright)
    except ValueError as error:
        raise ImageError(path, "outside", str(error)) from None
    top, left, bottom, right = part.box(*upright)
    whole = bottom - top, right - left
    shape = whole if size is None else (size, size) if fit == "square" else longest_shape(*whole, size)
    return crop(pixels, part), shape


def _zoom(region: Region, height: int, width: int) -> float:
    """How many times larger the whole image must be decoded, so that a region of it has the pixels that are needed."""
    try:
        part = region.of(height, width)
    except ValueError:  # is told once the orientation is known
        return 1.0
    return 1 / min(part.width, part.height)


def _opened(data: bytes) -> Image.Image:
    """The image in a file's bytes, not yet decoded. The caller must check its size.

    Pillow's own guard, one limit for the whole process, refuses images of more than 179 million pixels.
    """
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        with _GUARD:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(io.BytesIO(data), formats=_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _mended(data: bytes, error: Exception) -> bytes | None:
    """The file without a damage that costs no pixel, for which Pillow raised an error. None if there is none."""
    if data.startswith(_PNG):
        spare = isinstance(error, ValueError | UnidentifiedImageError) and (bare := _bare(data)) != data
        return bare if spare else None
    return _with_end(data) if isinstance(error, OSError) and "truncated" in str(error) else None


def _bare(data: bytes) -> bytes:
    """A PNG without texts, and without damaged or long chunks that it can do without.

    Pillow refuses a whole file for a wrong checksum of one, and for a text or a profile that expands to more than 1 MB.
    """

    def is_needed(name: bytes, chunk: bytes) -> bool:
        if name[:1].isupper():
            return True
        if name not in (b"tRNS", b"eXIf", b"iCCP") or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
            return False
        return name != b"iCCP" or _expands(chunk[8:-4].partition(b"\0")[2][1:]) <= PngImagePlugin.MAX_TEXT_CHUNK

    return b"".join([data[:8], *(chunk for name, chunk in _chunks(data) if is_needed(name, chunk))])


def _expands(compressed: bytes) -> int:
    """The length of compressed bytes, counted up to a little more than Pillow accepts of a PNG. 0 if damaged."""
    try:
        return len(zlib.decompressobj().decompress(compressed, PngImagePlugin.MAX_TEXT_CHUNK + 1))
    except zlib.error:
        return 0


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes of each chunk of a PNG: length, name, content, checksum. The last may be cut off."""
    place = 8
    while place < len(data):
        stop = place + 12 + int.from_bytes(data[place : place + 4])
        yield data[place + 4 : place + 8], data[place:stop]
        place = stop


def _with_end(data: bytes) -> bytes | None:
    """A JPEG that only lacks its end marker, with the marker. None if it lacks pixels too.

    Data between the last pixel and the marker change no pixel. Therefore two versions with different endings are
    decoded; they are equal if no pixel is missing.
    """
    if not data.startswith(b"\xff\xd8\xff") or _RESTARTS in data:  # between restarts other bits are passed over
        return None
    body = data.removesuffix(b"\xff")  # half a marker

    def ending(filling: bytes) -> np.ndarray:
        with _opened(body + filling + _END) as image:
            if "progressive" not in image.info:  # of a progressive one the details come last
                image.draft(None, (1, 1))
            return np.asarray(image)

    try:
        is_whole = np.array_equal(ending(b""), ending(_NOISE))
    except Exception:  # what is wrong with it was said
        return None
    return body + _END if is_whole else None


def _explain(error: Exception, data: bytes) -> tuple[str, str]:
    """Reason and detail for an exception that Pillow raised on a file."""
    detail = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return "too-many-pixels", detail
    if isinstance(error, MemoryError) or "allocate memory" in detail:  # the latter is torch's
        return "too-much-memory", REASONS["too-much-memory"]
    if data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") > len(data) - 8:
        return "truncated", "the file is shorter than its RIFF header says"
    if not isinstance(error, UnidentifiedImageError):
        truncated = isinstance(error, EOFError) or "truncated" in detail.lower()
        return ("truncated" if truncated else "decode-failed"), detail
    for offset, signature, name in _OPENED:
        if name in _FORMATS and data.startswith(signature, offset):
            return "decode-failed", f"its {name} header is damaged or cut off"
    for offset, signature, name in _NOT_OPENED:
        if data.startswith(signature, offset):
            return "unsupported", f"{name}; convert it to one of {', '.join(_FORMATS)}"
    return "not-an-image", f"it does not begin like any of {', '.join(_FORMATS)}"


def _turn_upright(image: Image.Image) -> None:
    """Turns an image in place according to its metadata."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged metadata is no reason to refuse sound pixels
        pass


def _is_turned_by_header(image: Image.Image, data: bytes) -> bool:
    """Whether width and height of an image that is not decoded yet must be swapped. Nothing is decoded."""
    if image.format == "TIFF":  # Pillow swaps them itself
        return False
    if _is_on_its_side(image) or image.format != "PNG":
        return _is_on_its_side(image)
    try:
        with _opened(_without_pixels(data)) as metadata:
            return _is_on_its_side(metadata)
    except Exception:  # damaged metadata
        return False


def _without_pixels(data: bytes) -> bytes:
    """A PNG without its pixels, so that metadata behind them are part of its header."""
    return b"".join([data[:8], *(chunk for name, chunk in _chunks(data) if name != b"IDAT")])


def _is_on_its_side(image: Image.Image) -> bool:
    """Whether the EXIF orientation that has been read so far swaps width and height."""
    try:
        # PNG's own method would decode the pixels for metadata behind them.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # damaged metadata
        return False


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in sRGB, on white."""
    profile, of_cmyk = image.info.get("icc_profile"), image.mode == "CMYK"
    if not isinstance(profile, bytes) or not profile or len(profile) > _MOST_PROFILE:
        return _flattened(image)
    if of_cmyk or image.mode == "L":
        return _converted(image, profile) or _flattened(image)
    rgb = _flattened(image)
    return _converted(rgb, profile) or rgb


def _converted(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The image in sRGB by its profile. None if the profile is sRGB, damaged, or of another colour model."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _COLOURS[image.mode]:
            return None
        if "sRGB" in (source.profile.profile_description or ""):
            return None
        target, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        found = ImageCms.profileToProfile(image, source, target, renderingIntent=intent, outputMode="RGB")
    except Exception:  # a profile may be anything
        return None
    return found


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey_to_rgb(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba, opaque = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        opaque.paste(rgba, mask=rgba)
        return opaque
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    # Before Pillow 11, 16-bit PNG came as mode I. The upper byte is what Pillow keeps of 16-bit RGB.
    if image.mode not in ("I", "F") or image.format == "PNG":
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
    else:
        stretched = np.array(image, dtype=np.float64)
        finite = np.isfinite(stretched)
        low = stretched.min(where=finite, initial=np.inf) if finite.any() else 0.0
        high = stretched.max(where=finite, initial=-np.inf) if finite.any() else 0.0
        stretched -= low  # in place: eight bytes a pixel are enough
        stretched *= 255 / (high - low if high > low else 1.0)
        np.nan_to_num(stretched, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        grey = np.rint(stretched, out=stretched).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
