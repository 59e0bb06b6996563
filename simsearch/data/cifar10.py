"""CIFAR-10 from torchvision's archive or from Hugging Face parquet files, as one Collection."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from simsearch.data.collection import Collection
from simsearch.data.pickles import read_pickle
from simsearch.errors import SimsearchError
from simsearch.files import Damaged, read_array, replacing, write_array

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"

_ROW = np.dtype([("image", np.uint8, (3, 32, 32)), ("label", np.uint8), ("is_test", np.bool_)])


class DataError(SimsearchError, ValueError):
    """Data that cannot be read. The message names the file and what to do."""


def read_cifar10(root: Path, *, download: bool = False, cache: Path | None = None) -> Collection:
    """CIFAR-10 as a Collection with the attribute `class`: the training rows in order, then the test rows.

    The first source found is read: torchvision's folder, its archive, then parquet files. Parquet files may hold a
    subset. Folder and archive must have the published checksums.

    Args:
        root: A folder with torchvision's `cifar-10-batches-py` or `cifar-10-python.tar.gz`, or with Hugging Face's
            `train-*.parquet` and `test-*.parquet` (also in its `data` or `plain_text`).
        download: Whether to download the archive if none of these exists.
        cache: A folder for the decoded pixels, keyed by the content of the source files. A damaged entry is rebuilt.
            None for no cache.

    Raises:
        DataError: If a file is missing, damaged or unexpected.

    Source:
        Krizhevsky: Learning multiple layers of features from tiny images. 2009.
    """
    root = Path(root).expanduser()
    files = _source_files(root)
    if not files and download:
        _download(root)
        files = _source_files(root)
    if not files:
        raise DataError(
            f"no CIFAR-10 in {root}: expected {BATCHES}/, {ARCHIVE} or train-*.parquet and test-*.parquet; "
            "set the data root (SIMSEARCH_DATA is the folder above cifar10) or allow the download with "
            "download=true"
        )
    entry = None if cache is None else Path(cache).expanduser() / f"cifar10-{_content_key(files)}.npy"
    rows = None if entry is None else _load(entry)
    if rows is None:
        rows = _read_parquet(files) if files[0].suffix == ".parquet" else _read_batches(files)
        if entry is not None:
            _store(entry, rows)
    return Collection(
        name="cifar10",
        images=torch.from_numpy(np.ascontiguousarray(rows["image"])),
        labels=torch.from_numpy(rows["label"].astype(np.int64))[:, None],
        attributes=("class",),
        classes=(CLASSES,),
        is_test=torch.from_numpy(np.ascontiguousarray(rows["is_test"])),
    )


def _source_files(root: Path) -> list[Path]:
    """Files of the first layout found under root, training files first. Empty if there is none."""
    if (root / BATCHES).is_dir():
        files = [root / BATCHES / name for name in _batch_checksums()]
        for path in files:
            if not path.is_file():
                raise DataError(f"{path} is missing: delete the folder and unpack {ARCHIVE} again")
        return files
    if (root / ARCHIVE).is_file():
        return [root / ARCHIVE]
    for folder in (root, root / "data", root / "plain_text"):
        parts = {part: sorted(folder.glob(f"{part}-*.parquet")) for part in ("train", "test")}
        if not any(parts.values()):
            continue
        for part, paths in parts.items():
            shards = {int(m[1]) for path in paths if (m := re.search(r"-of-(\d+)\.parquet$", path.name))}
            if not paths or (shards and shards != {len(paths)}):
                raise DataError(
                    f"{folder} holds {len(paths)} of {max(shards, default=1)} {part}-*.parquet files: "
                    "copy all files of one release there, and no others"
                )
        return parts["train"] + parts["test"]
    return []


def _batch_checksums() -> dict[str, str]:
    from torchvision.datasets import CIFAR10  # imports slowly, and parquet readers never need it

    return dict(tuple(pair) for pair in CIFAR10.train_list + CIFAR10.test_list)


def _download(root: Path) -> None:
    from torchvision.datasets import CIFAR10, utils

    try:
        with replacing(root / ARCHIVE) as temporary:
            utils.download_url(CIFAR10.url, root, temporary.name, CIFAR10.tgz_md5)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(
            f"cannot download CIFAR-10 to {root / ARCHIVE} ({error}): put the file there by hand from {CIFAR10.url}"
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): check that it exists and is readable") from error


def _content_key(files: Sequence[Path]) -> str:
    """32 hex digits over the content of the files and the versions that decode it."""
    digest = hashlib.sha256(f"{_ROW} Pillow {PIL.__version__}".encode())
    for path in files:
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(_read_bytes(path)).digest())
    return digest.hexdigest()[:32]


# torchvision's archive: pickled batches


def _read_batches(files: Sequence[Path]) -> np.ndarray:
    checksums = _batch_checksums()
    parts = []
    for path, content in _batch_contents(files, list(checksums)):
        _check_md5(path, content, checksums[path.name])
        try:
            batch = read_pickle(content)
            images, labels = np.asarray(batch["data"]), np.asarray(batch["labels"], dtype=np.int64)
        except Exception as error:  # a damaged pickle may raise any error
            raise DataError(f"{path} is not a CIFAR-10 batch ({error}): unpack {ARCHIVE} again") from error
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
            raise DataError(
                f"{path} holds {images.dtype} pixels {images.shape} for {len(labels)} labels, expected uint8 "
                f"({len(labels)}, 3072): unpack {ARCHIVE} again"
            )
        _check_labels(path, labels)
        rows = np.empty(len(labels), _ROW)
        rows["image"], rows["label"] = images.reshape(-1, 3, 32, 32), labels
        rows["is_test"] = path.name == "test_batch"
        parts.append(rows)
    return np.concatenate(parts)


def _batch_contents(files: Sequence[Path], names: Sequence[str]) -> Iterator[tuple[Path, bytes]]:
    """Path and content of each batch, from the folder or directly from the archive."""
    if files[0].name != ARCHIVE:
        yield from ((path, _read_bytes(path)) for path in files)
        return
    from torchvision.datasets import CIFAR10

    path = files[0]
    content = _read_bytes(path)
    _check_md5(path, content, CIFAR10.tgz_md5)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            members = ((member, archive.extractfile(member)) for member in archive if member.isfile())
            found = {Path(member.name).name: file.read() for member, file in members if file}
        yield from ((path / BATCHES / name, found[name]) for name in names)
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        raise DataError(f"cannot unpack {path} ({error}): delete it and download it again") from error


def _check_md5(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} has MD5 {found}, expected {expected}: it is truncated or altered; delete it and "
            "download the archive again (re-encoded images belong in parquet files)"
        )


def _check_labels(path: Path, labels: np.ndarray) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
    if len(wrong):
        raise DataError(
            f"{path} row {wrong[0]} has label {labels[wrong[0]]}, expected 0..{len(CLASSES) - 1}: "
            "is this CIFAR-10? Fetch the file again"
        )


# Hugging Face's layout: encoded images in parquet files


def _read_parquet(files: Sequence[Path]) -> np.ndarray:
    from rich.console import Console
    from rich.progress import Progress

    tables = [(path, *_read_columns(path)) for path in files]
    parts = []
    # No threads: for 32x32 images, Python holds its lock most of the time.
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("decode CIFAR-10", total=sum(len(labels) for _, _, labels in tables))
        for path, blobs, labels in tables:
            rows = np.empty(len(labels), _ROW)
            rows["label"], rows["is_test"] = labels, path.name.startswith("test-")
            for row, blob in enumerate(blobs):
                rows["image"][row] = _decode(blob, path, row)
                if row % 500 == 499:
                    progress.advance(bar, 500)
            parts.append(rows)
    return np.concatenate(parts)


def _read_columns(path: Path) -> tuple[list[bytes | None], np.ndarray]:
    """Encoded images and int64 labels of one parquet file."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image = next((name for name in ("img", "image") if name in schema.names), None)
            if image is None or "label" not in schema.names:
                raise DataError(
                    f"{path} has the columns {', '.join(schema.names)}, expected img (or image) and label: "
                    "fetch CIFAR-10 in the Hugging Face layout"
                )
            kind = schema.field(image).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise DataError(
                    f"{path} column {image} is {kind}, expected struct<bytes, path>: fetch CIFAR-10 in the "
                    "Hugging Face layout"
                )
            table = file.read(columns=[image, "label"])
        blobs = pc.struct_field(table[image], "bytes").to_pylist()
        labels = table["label"].cast(pa.int64()).fill_null(-1).to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} ({error}): it is truncated or damaged; fetch it again") from error
    if not blobs:
        raise DataError(f"{path} has no rows: fetch it again")
    _check_labels(path, labels)
    return blobs, labels


def _decode(blob: bytes | None, path: Path, row: int) -> np.ndarray:
    """Pixels of one PNG or JPEG image, uint8 (3, 32, 32)."""
    try:
        with Image.open(io.BytesIO(blob or b""), formats=("PNG", "JPEG")) as image:
            if image.size != (32, 32):
                raise ValueError(f"it is {image.width}x{image.height}, expected 32x32")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except Exception as error:  # decoders raise any error on damaged bytes
        raise DataError(f"{path} row {row} holds no readable image ({error}): fetch the file again") from error


def _load(path: Path) -> np.ndarray | None:
    """Rows of a cache entry, or None if it is missing or damaged."""
    try:
        return read_array(path, _ROW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (Damaged, OSError):  # the entry is rebuilt whatever the damage
        warnings.warn(f"the cache entry {path} is damaged: building it again", stacklevel=3)
        return None


def _store(path: Path, rows: np.ndarray) -> None:
    try:
        write_array(path, rows)
    except OSError as error:
        warnings.warn(f"cannot write the cache entry {path} ({error}): the images are decoded each time", stacklevel=3)
