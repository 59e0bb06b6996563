"""The local_features.npy of a catalog: the local features of each item, in records of one size.

A record has the features of one item: their number, the size of the described image, the places of the features as
fractions of that size, and their descriptors. Records are read by position from a memory map. Digests cover
blocks of records; a block is checked when it is first read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simsearch.data.manifest import ImageFiles, Manifest
from simsearch.data.presence import Presence
from simsearch.data.process_pool import MEMORY, SECONDS, Failure, bounded_map
from simsearch.files import Damaged
from simsearch.functional.regions import Region
from simsearch.images import MAX_PIXELS, ImageError, read_image
from simsearch.search.verification import Verification
from simsearch.text import warn
from simsearch.types import LocalFeatures

NAME = "local_features.npy"
_BLOCK = 256  # records that are checked together
_FULL = 65535  # the fraction 1


def record_type(features: int, dimension: int) -> np.dtype[Any]:
    """The dtype of a record.

    Args:
        features: Largest number of features of an item.
        dimension: Number of bytes in a descriptor.
    """
    fields = [("count", "<u2", ()), ("size", "<u2", (2,)), ("points", "<u2", (features, 2))]
    return np.dtype([*fields, ("descriptors", "i1", (features, dimension))])


def about_local_features(verification: Verification) -> dict[str, Any]:
    """The entry `local_features` of catalog.json: what describes the items, and the size of a record in bytes.

    Args:
        verification: What describes the items, and verifies them.
    """
    size = record_type(verification.item_features, verification.features.dimension).itemsize
    software = {"software": verification.features.software, "sample": sample_digest(verification)}
    return {"verification": verification.config, "bytes_per_item": size, **software}


def sample_digest(verification: Verification) -> str:
    """16 hex digits over the local features of a drawn picture. They differ where images are described otherwise.

    Args:
        verification: What describes items.
    """
    found = verification.item(sample_picture())
    return hashlib.sha256(found.points.tobytes() + found.descriptors.tobytes()).hexdigest()[:16]


def sample_picture() -> Tensor:
    """A drawn picture with many corners, uint8 (3, 320, 320), by which algorithms are compared."""
    steps = torch.arange(64)
    cells = (steps[:, None] ** 2 * 7 + steps**2 * 13 + steps[:, None] * steps * 5) % 251
    return cells.to(torch.uint8).repeat_interleave(5, 0).repeat_interleave(5, 1).expand(3, -1, -1)


def check_software(of_local: Mapping[str, Any], verification: Verification, where: str) -> None:
    """Warns if the local features of items were described otherwise than those of queries will be.

    Args:
        of_local: The entry `local_features` of catalog.json.
        verification: What describes queries.
        where: The catalog, for the message.
    """
    known, own = of_local.get("software"), verification.features.software
    if known not in (None, own) and of_local.get("sample") != sample_digest(verification):
        warn(
            f"the local features of {where} were described by {known}, and {own} finds others: right works may not be "
            "verified. Use that version, or make the catalog again"
        )


def record(found: LocalFeatures, kind: np.dtype[Any]) -> np.ndarray:
    """The record of an item's local features, of shape ().

    Args:
        found: The local features.
        kind: The dtype, as `record_type` returns it.
    """
    out = np.zeros((), kind)
    out["count"], out["size"] = len(found), found.size
    out["points"][: len(found)] = np.round(np.clip(found.points / found.size, 0, 1) * _FULL)
    out["descriptors"][: len(found)] = found.descriptors
    return out


def features_of(one: np.void | np.ndarray) -> LocalFeatures:
    """The local features in a record.

    Args:
        one: The record.

    Raises:
        Damaged: If it holds numbers that no record holds.
    """
    count, size = int(one["count"]), one["size"]
    if count > len(one["points"]) or (count and size.min() < 1):
        raise Damaged(f"a record of local features has {count} features of an image of {size.tolist()} pixels")
    width, height = (int(side) for side in size)
    points = one["points"][:count].astype(np.float32) * (np.array([width, height], np.float32) / _FULL)
    return LocalFeatures(points, one["descriptors"][:count], (width, height))


def describe_items(
    manifest: Manifest, rows: Sequence[int], verification: Verification, *, workers: int, presence: Presence
) -> Iterator[np.ndarray]:
    """The records of some images of a manifest, described in processes that can be ended.

    The record of an image that cannot be read has no features.

    Args:
        manifest: The images.
        rows: Rows of the manifest.
        verification: What describes the images.
        workers: Number of processes; at least one is used.
        presence: The images that existed when the work began.

    Raises:
        Vanished: If images disappear during the work.
    """
    kind = record_type(verification.item_features, verification.features.dimension)
    memory = ImageFiles(manifest, size=verification.item_side).memory
    one = partial(_described, manifest, verification, kind)
    results = bounded_map(one, rows, workers=max(1, workers), seconds=SECONDS, memory=memory)
    for row, found in zip(rows, results, strict=True):
        if isinstance(found, str):
            presence.check(manifest.paths[row], found)
        yield found if isinstance(found, np.ndarray) else np.zeros((), kind)


def describe_queries(
    files: Sequence[Path], verification: Verification, *, region: Region | None = None, workers: int = 0
) -> Iterator[tuple[LocalFeatures, ...]]:
    """The local features of each file as a query, described in processes that can be ended.

    Args:
        files: Image files.
        verification: What describes the images.
        region: The part of each image to take alone, or None.
        workers: Number of processes; at least one is used.

    Raises:
        ImageError: If a file cannot be read.
    """
    for found in queries_or_errors(files, verification, region=region, workers=workers):
        if isinstance(found, ImageError):
            raise found
        yield found


def queries_or_errors(
    files: Sequence[Path], verification: Verification, *, region: Region | None = None, workers: int = 0
) -> Iterator[tuple[LocalFeatures, ...] | ImageError]:
    """The local features of each file as of `describe_queries`, or the error of a file that cannot be read.

    Args:
        files: Image files.
        verification: What describes the images.
        region: The part of each image to take alone, or None.
        workers: Number of processes; at least one is used.
    """
    one = partial(_query_or_error, verification, region)
    results = bounded_map(one, files, workers=max(1, workers), seconds=SECONDS, memory=MEMORY)
    for path, found in zip(files, results, strict=True):
        yield ImageError(path, found.reason, found.detail) if isinstance(found, Failure) else found


def _query_or_error(
    verification: Verification, region: Region | None, path: Path
) -> tuple[LocalFeatures, ...] | ImageError:
    try:
        return query_features(verification, path, region=region)
    except ImageError as error:
        return error


def query_features(
    verification: Verification, source: Path | bytes, *, region: Region | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[LocalFeatures, ...]:
    """The local features of an image file as a query.

    Args:
        verification: What describes the image.
        source: The file, or its bytes.
        region: The part of the image to take alone, or None.
        max_pixels: Largest number of pixels to decode.

    Raises:
        ImageError: If the file cannot be used.
    """
    side = verification.query_side
    image = read_image(source, size=side, fit="longest", enlarge=False, region=region, max_pixels=max_pixels)
    return verification.query(image)


def _described(manifest: Manifest, verification: Verification, kind: np.dtype[Any], row: int) -> np.ndarray | str:
    """The record of an image, or the reason why it cannot be read."""
    path = manifest.root / manifest.paths[row]
    try:
        image = read_image(
            path, size=verification.item_side, fit="longest", enlarge=False, max_pixels=manifest.max_pixels
        )
    except ImageError as error:
        return error.reason
    return record(verification.item(image), kind)


def write_local_features(
    path: Path, count: int, records: Iterable[np.ndarray], verification: Verification
) -> dict[str, Any]:
    """Writes the records of all items and returns the digests of its blocks.

    Args:
        path: The file to write.
        count: Number of items.
        records: Their records, in the order of the index.
        verification: What described them, and will verify them.

    Raises:
        ValueError: If there are fewer or more records than items.
    """
    kind = record_type(verification.item_features, verification.features.dimension)
    stored = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(count,))
    written = 0
    for one in records:
        if written == count:
            raise ValueError(f"there are more records of local features than the {count} items")
        stored[written] = one
        written += 1
    if written != count:
        raise ValueError(f"there are {written} records of local features for {count} items")
    stored.flush()
    blocks = [hashlib.sha256(stored[i : i + _BLOCK].tobytes()).hexdigest() for i in range(0, count, _BLOCK)]
    return {"block": _BLOCK, "sha256": blocks}


class StoredFeatures:
    """The local features of a catalog's items, read by position. Several threads may read.

    Args:
        path: The file.
        about: Entries of `write_local_features`.
        verification: What described the items.
        count: Number of items.

    Raises:
        Damaged: If the file is not what `about` says.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], verification: Verification, count: int) -> None:
        self._path, self._block, self._known = path, int(about["block"]), list(about["sha256"])
        try:
            self._records = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise Damaged(f"{path} cannot be read ({error})") from error
        kind = record_type(verification.item_features, verification.features.dimension)
        if self._records.dtype != kind or self._records.shape != (count,):
            raise Damaged(f"{path} holds {self._records.shape} records, not those of the {count} items")
        if self._block < 1 or len(self._known) != -(-count // self._block):
            raise Damaged(f"there is a wrong number of digests for {path}")
        self._checked: set[int] = set()

    def take(self, positions: Sequence[int]) -> list[LocalFeatures]:
        """The local features of the items at some positions.

        Args:
            positions: Positions of the items.

        Raises:
            Damaged: If the file is damaged.
        """
        self._check(positions)
        return [features_of(self._records[position]) for position in positions]

    def records(self, positions: Sequence[int]) -> Iterator[np.ndarray]:
        """The records of the items at some positions, as they are stored.

        Args:
            positions: Positions of the items.

        Raises:
            Damaged: If the file is damaged.
        """
        for position in positions:
            self._check([position])
            yield self._records[position]

    def _check(self, positions: Sequence[int]) -> None:
        for number in {position // self._block for position in positions} - self._checked:
            content = self._records[number * self._block : (number + 1) * self._block].tobytes()
            if hashlib.sha256(content).hexdigest() != self._known[number]:
                raise Damaged(f"{self._path} is damaged: the SHA-256 of its records is not the recorded one")
            self._checked.add(number)
