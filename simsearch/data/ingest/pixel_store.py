"""Decoded images in one file of pixels that grows shard by shard, so that a kill loses at most one shard.

    pixels.bin            the pixels of all images, uint8, in order
    000017.safetensors    shard 17: tensors with one row an image, among them `rows` and `shapes`; the reasons why other
                          rows have no image; start and end of its pixels; digests of both. It is written last, so it
                          proves that the pixels are there

There is one file of pixels because a tensor is one mapped piece of memory, and the images of all shards form one
Ragged.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from simsearch.data.presence import Presence
from simsearch.files import from_json, replacing, to_json
from simsearch.files import sha256 as file_sha256
from simsearch.functional.ragged import Ragged
from simsearch.text import printable

PIXELS = "pixels.bin"
# Python's mmap has it from 3.13.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class Image:
    """An image of a shard.

    Attributes:
        row: Its row in the listing.
        pixels: uint8 (3, h, w).
        facts: Tensors with the same names and shapes for all images.
    """

    row: int
    pixels: Tensor
    facts: dict[str, Tensor]


@dataclass(frozen=True)
class Refusal:
    """A row without an image.

    Attributes:
        row: Its row in the listing.
        reason: A key of simsearch.images.REASONS.
        detail: More about the reason.
    """

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Shard:
    """The n images of a shard, without their pixels.

    Attributes:
        start: First byte in pixels.bin.
        stop: Byte after the last in pixels.bin.
        sha256: Digest of these bytes, None in shards of an older version.
        columns: `rows` int64 (n,), `shapes` int64 (n, 2) and the facts, (n, ...) each.
        refusals: The other rows.
    """

    start: int
    stop: int
    sha256: str | None
    columns: dict[str, Tensor]
    refusals: tuple[Refusal, ...]


def write_shard(folder: Path, number: int, start: int, items: Iterable[Image | Refusal]) -> Shard:
    """Writes a shard, streaming its pixels into pixels.bin, and returns it.

    Bytes from `start` on, left by a killed process, are cut off first.

    Args:
        folder: Folder of the shards.
        number: Number of the shard.
        start: First byte of its pixels.
        items: Its images and refusals, in order. All images have the same facts.
    """
    rows, shapes, facts, refusals = [], [], [], []
    digest = hashlib.sha256()
    path = folder / PIXELS
    path.touch()
    with path.open("r+b") as file:
        file.truncate(start)
        file.seek(start)
        for item in items:
            if isinstance(item, Refusal):
                refusals.append(item)
                continue
            pixels = item.pixels.contiguous().numpy()
            file.write(pixels.data)
            digest.update(pixels.data)
            rows.append(item.row)
            shapes.append(tuple(item.pixels.shape[1:]))
            facts.append(item.facts)
        file.flush()
        os.fsync(file.fileno())
        stop = file.tell()
    columns = {
        "rows": torch.tensor(rows, dtype=torch.int64),
        "shapes": torch.tensor(shapes, dtype=torch.int64).view(-1, 2),
        **({name: torch.stack([fact[name] for fact in facts]) for name in facts[0]} if facts else {}),
    }
    about = {"start": start, "stop": stop, "refusals": [[r.row, r.reason, r.detail] for r in refusals]}
    about |= {"sha256": digest.hexdigest(), "columns": tensors_sha256(columns)}
    with replacing(_path(folder, number)) as temporary:
        temporary.write_bytes(save(columns, {"shard": to_json(about)}))
    return Shard(start, stop, digest.hexdigest(), columns, tuple(refusals))


def read_shards(folder: Path, count: int) -> list[Shard]:
    """The shards before the first one that is missing or damaged. A damaged shard is reported on stderr.

    The pixels of all of them are read, at about a GB per second and core.

    Args:
        folder: Folder of the shards.
        count: Number of shards.
    """
    path = folder / PIXELS
    length = path.stat().st_size if path.is_file() else 0
    shards: list[Shard] = []
    for number in range(count):
        try:
            with safe_open(_path(folder, number), "pt") as file:
                about = from_json((file.metadata() or {})["shard"], _path(folder, number))
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            refusals = tuple(Refusal(*refusal) for refusal in about["refusals"])
            shard = Shard(about["start"], about["stop"], about.get("sha256"), columns, refusals)
            sizes = 3 * columns["shapes"].prod(1)
            if about.get("columns") not in (None, tensors_sha256(columns)):
                break
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            break
        before = shards[-1].stop if shards else 0
        if shard.start != before or shard.start + int(sizes.sum()) != shard.stop or shard.stop > length:
            break
        shards.append(shard)
    with ThreadPoolExecutor() as pool:
        sound = list(pool.map(lambda s: s.sha256 in (None, file_sha256(path, (s.start, s.stop))), shards))
    shards = shards[: (*sound, False).index(False)]
    if len(shards) < count and (damaged := _path(folder, len(shards))).exists():
        print(f"{damaged} or its part of {PIXELS} is damaged", file=sys.stderr)
    return shards


def whole_shards(shards: Sequence[Shard], presence: Presence, paths: Sequence[str]) -> list[Shard]:
    """The shards before the first one that refuses a file which was lost earlier and exists again.

    Args:
        shards: The shards.
        presence: The files that exist.
        paths: Paths of all rows, as in `presence`.
    """
    for number, shard in enumerate(shards):
        back = [paths[one.row] for one in shard.refusals if presence.is_back(paths[one.row], one.reason)]
        if back:
            print(
                f"{len(back)} images are readable again, such as {printable(back[0])}: decoding them", file=sys.stderr
            )
            return list(shards[:number])
    return list(shards)


def gathered(shards: Iterable[Shard], name: str) -> Tensor:
    """One column of all shards, (N, ...). Shards without images have no facts.

    Args:
        shards: The shards.
        name: Name of the column.
    """
    return torch.cat([shard.columns[name] for shard in shards if name in shard.columns])


def images_of(folder: Path, shapes: Tensor) -> Ragged:
    """All images of the shards in a folder, memory-mapped.

    Args:
        folder: Folder of the shards.
        shapes: int64 (N, 2), height and width of all images in order.
    """
    sizes = 3 * shapes.prod(1)
    return Ragged(map_pixels(folder / PIXELS, int(sizes.sum())), sizes.cumsum(0) - sizes, shapes)


def map_pixels(path: Path, length: int) -> Tensor:
    """The first bytes of a file as uint8 (length,), memory-mapped. Changes stay in memory.

    Args:
        path: The file.
        length: Number of bytes.

    Raises:
        ValueError: If the file is shorter.
    """
    if path.stat().st_size < length:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes instead of {length:,}: it was cut off")
    if not length:
        return torch.empty(0, dtype=torch.uint8)
    with path.open("rb") as file:
        # A tensor must be writable, and a private writable mapping larger than the memory is refused unless
        # nothing is reserved for it.
        flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        mapped = mmap.mmap(file.fileno(), length, flags=flags, prot=access)
    return torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors, in hex.

    Args:
        tensors: The tensors by name.
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"
