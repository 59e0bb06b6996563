"""Decoded images as one file of pixels that grows shard by shard, so that a kill costs a shard at most.

    pixels.bin            the pixels of all images, uint8, in order
    000017.safetensors    of shard 17: one row an image in each tensor, among them `rows` and `shapes`; why other
                          rows have none; where its pixels begin and end; digests of both. It is written last, so it
                          says that the pixels are there

One file of pixels, since a tensor is one mapped piece of memory: images of all shards make one Ragged.
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
# Not in every Python's mmap: 3.13 brought it.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class Image:
    """An image of a shard: its row, pixels uint8 (3, h, w), and facts, tensors of one shape for all images."""

    row: int
    pixels: Tensor
    facts: dict[str, Tensor]


@dataclass(frozen=True)
class Refusal:
    """A row without an image, and why. reason: a key of simsearch.images.REASONS."""

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Shard:
    """What is known of n images. start, stop: their bytes in pixels.bin; sha256: the digest of these, None of an older
    version's. columns: `rows` int64 (n,), `shapes` int64 (n, 2) and the facts, (n, ...) each. refusals: of the other
    rows."""

    start: int
    stop: int
    sha256: str | None
    columns: dict[str, Tensor]
    refusals: tuple[Refusal, ...]


def write_shard(folder: Path, number: int, start: int, items: Iterable[Image | Refusal]) -> Shard:
    """Shard `number` of items in order, its pixels written from byte `start` of pixels.bin on, streamed.

    What lies beyond `start` (left by a kill) is cut off. Items must all have the same facts.
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
    """The first shards of `count` up to the first that is missing or damaged, which is said on standard error.

    All of them is read, a GB of pixels a second and core.
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
    """The first of these shards, up to one that refuses a file which an earlier command lost and is there again.

    paths: of all rows, as `presence` knows them.
    """
    for number, shard in enumerate(shards):
        back = [paths[one.row] for one in shard.refusals if presence.is_back(paths[one.row], one.reason)]
        if back:
            print(f"{len(back)} images are back, as {printable(back[0])}: they are decoded", file=sys.stderr)
            return list(shards[:number])
    return list(shards)


def gathered(shards: Iterable[Shard], name: str) -> Tensor:
    """One column of all shards, (N, ...); those without images have none of the facts."""
    return torch.cat([shard.columns[name] for shard in shards if name in shard.columns])


def images_of(folder: Path, shapes: Tensor) -> Ragged:
    """All images of the shards in a folder, mapped. shapes: int64 (N, 2), all of them in order."""
    sizes = 3 * shapes.prod(1)
    return Ragged(map_pixels(folder / PIXELS, int(sizes.sum())), sizes.cumsum(0) - sizes, shapes)


def map_pixels(path: Path, length: int) -> Tensor:
    """uint8 (length,), a file's first bytes mapped into memory; what is written to it stays in memory.

    Raises ValueError for a file that is shorter.
    """
    if path.stat().st_size < length:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, {length:,} are wanted: it was cut off")
    if not length:
        return torch.empty(0, dtype=torch.uint8)
    with path.open("rb") as file:
        # A tensor must be writable, and a private writable mapping larger than the memory is refused unless
        # nothing is reserved for it.
        flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        mapped = mmap.mmap(file.fileno(), length, flags=flags, prot=access)
    return torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"
