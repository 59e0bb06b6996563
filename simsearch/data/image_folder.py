"""An image folder as a training collection: decoded once in parallel, then memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from tqdm import tqdm

from simsearch.data.collection import Collection
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.data.ingest.pixel_store import (
    PIXELS,
    Image,
    Refusal,
    Shard,
    gathered,
    map_pixels,
    read_shards,
    whole_shards,
    write_shard,
)
from simsearch.data.loading import Item, load_items
from simsearch.data.manifest import ImageFiles, Manifest, read_ingest, read_manifest
from simsearch.data.presence import Presence
from simsearch.data.protocols import RetrievalProtocol
from simsearch.data.samplers import Batches
from simsearch.files import Damaged, checked
from simsearch.functional.ragged import Ragged
from simsearch.functional.resize import Fit
from simsearch.images import DECODING, ImageError, read_file
from simsearch.text import printable

# Names of the columns of a search result.
RESERVED = ("rank", "score", "thumbnail")
_PER_SHARD = 4096  # images that an interrupted run decodes again, at most


@dataclass(frozen=True)
class DecodedFiles:
    """The readable images of a manifest.

    Attributes:
        images: uint8, memory-mapped: Ragged with fit "longest", (N, 3, size, size) with fit "square".
        rows: int64 (N,), their rows in the manifest, ascending.
        errors: Errors of the other rows.
        digest: Hash of the files' bytes.
    """

    images: Tensor | Ragged
    rows: Tensor
    errors: list[ImageError]
    digest: str


def decode_files(manifest: Manifest, *, size: int, fit: Fit, cache: Path, workers: int = 0) -> DecodedFiles:
    """The images of a manifest at one size, from the cache, or decoded into it with a progress bar.

    Cache entries are keyed by the names, lengths and times of the files, and are written atomically. While one process
    decodes, others wait. Processes that find all images decoded check them at the same time, also in a folder that they
    may not write. After a kill, decoding continues where it stopped.

    Args:
        manifest: The list of files.
        size: Image size in pixels.
        fit: As in ImageFiles.
        cache: Folder of the cache. It is created if needed.
        workers: Number of decoding processes beside this one.

    Raises:
        ValueError: If no file can be read, or ImageFiles refuses an argument.
        Vanished: If files disappear while they are read.
        OSError: If the disk is full.
    """
    items = ImageFiles(manifest, size=size, fit=fit)
    entry = cache.expanduser() / f"files-{_key(manifest, size, fit)}"
    entry.parent.mkdir(parents=True, exist_ok=True)
    count = -(-len(items) // _PER_SHARD)
    presence = Presence(manifest.root, manifest.paths)
    shards = whole_shards(read_shards(entry, count), presence, manifest.paths)
    if len(shards) < count:
        with FileLock(f"{entry}.lock"):
            if entry.exists():  # perhaps another process decoded them meanwhile
                shards = whole_shards(read_shards(entry, count), presence, manifest.paths)
            if len(shards) < count:
                shards = _decode(items, entry, presence, workers)
    return _decoded(manifest, fit, entry / PIXELS, shards)


def _key(manifest: Manifest, size: int, fit: Fit) -> str:
    """24 hex digits of everything that determines the pixels."""
    digest = hashlib.sha256(json.dumps([DECODING, size, fit, os.path.realpath(manifest.root)]).encode())
    for path in manifest.paths:
        file = manifest.root / path
        try:
            status = file.stat()
            facts = [status.st_size, status.st_mtime_ns, os.access(file, os.R_OK)]
        except OSError:
            facts = []
        digest.update(json.dumps([path, facts]).encode())
    return digest.hexdigest()[:24]


def _decode(items: ImageFiles, entry: Path, presence: Presence, workers: int) -> list[Shard]:
    """Decodes all files that an interrupted run or a damaged cache entry has not left decoded."""
    partial = entry.with_name(f"{entry.name}.partial")
    if entry.exists():
        print(f"the decoded images in {entry} are incomplete or damaged: decoding those parts again", file=sys.stderr)
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(entry, partial)
    partial.mkdir(exist_ok=True)
    total = -(-len(items) // _PER_SHARD)
    shards = whole_shards(read_shards(partial, total), presence, items.manifest.paths)
    first = min(len(items), len(shards) * _PER_SHARD)
    if first < len(items):
        with tqdm(total=len(items), initial=first, unit="img", desc="decode files") as bar:
            loaded = load_items(items, range(first, len(items)), workers=workers)
            found = _entries(items.manifest, loaded, presence, bar)
            for number in range(len(shards), total):
                start = shards[-1].stop if shards else 0
                shards.append(write_shard(partial, number, start, islice(found, _PER_SHARD)))
    if not len(gathered(shards, "rows")):
        shutil.rmtree(partial)
        first_error = _errors(items.manifest, shards)[0]
        raise ValueError(f"none of the {len(items)} images in {items.manifest.root} could be read: {first_error}")
    os.replace(partial, entry)
    return shards


def _decoded(manifest: Manifest, fit: Fit, path: Path, shards: Sequence[Shard]) -> DecodedFiles:
    """The content of complete shards, with the pixels mapped from `path`."""
    shapes = gathered(shards, "shapes")
    sizes = 3 * shapes.prod(1)
    pixels = map_pixels(path, int(sizes.sum()))
    if fit == "square":
        images: Tensor | Ragged = pixels.view(len(shapes), 3, *shapes[0].tolist())
    else:
        images = Ragged(pixels, sizes.cumsum(0) - sizes, shapes)
    digest = hashlib.sha256(gathered(shards, "sha256").numpy().tobytes()).hexdigest()
    return DecodedFiles(images, gathered(shards, "rows"), _errors(manifest, shards), digest)


def _errors(manifest: Manifest, shards: Sequence[Shard]) -> list[ImageError]:
    refusals = (refusal for shard in shards for refusal in shard.refusals)
    return [ImageError(manifest.root / manifest.paths[one.row], one.reason, one.detail) for one in refusals]


def _entries(manifest: Manifest, items: Iterable[Item], presence: Presence, bar: tqdm) -> Iterator[Image | Refusal]:
    for row, image in items:
        try:
            content = read_file(manifest.root / manifest.paths[row]) if isinstance(image, Tensor) else b""
        except ImageError as error:  # it disappeared since it was decoded
            image = error
        if isinstance(image, Tensor):
            digest = hashlib.sha256(content).digest()
            yield Image(row, image, {"sha256": torch.tensor(list(digest), dtype=torch.uint8)})
        else:
            assert isinstance(image, ImageError)
            presence.check(manifest.paths[row], image.reason)
            yield Refusal(row, image.reason, image.detail)
        bar.update()


def open_ingest(folder: Path, manifest: Manifest, size: int) -> DecodedFiles:
    """The decoded images of a finished `simsearch data ingest`, as Ragged, at the size of the ingest.

    Args:
        folder: Folder of the ingest.
        manifest: Its manifest.
        size: Least size in pixels.

    Raises:
        ValueError: If the images are smaller than `size`, or the folder is damaged.
    """
    about = read_ingest(folder)
    assert about is not None
    made = about["settings"]["size"]
    if made < size:
        raise ValueError(
            f"{folder} was ingested at {made} pixels, but data.size={size} is larger: ingest again with size={size}, "
            f"or use data.size={made} or less"
        )
    try:
        index = torch.from_numpy(np.load(checked(folder, "pixels/index.npy", about), allow_pickle=False))
        if (known := about.get("pixels")) is not None:
            shards = read_shards(folder / "pixels", len(known))
            if [shard.sha256 for shard in shards] != known:
                raise Damaged(f"{folder / 'pixels' / PIXELS} has changed since it was decoded")
        length = (folder / "pixels" / PIXELS).stat().st_size
        images = Ragged(map_pixels(folder / "pixels" / PIXELS, length), index[:, 0], index[:, 1:])
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"the pixels in {folder} are damaged ({error}): run `simsearch data ingest` again") from error
    if not len(manifest) == len(images) == about["images"]:
        raise ValueError(
            f"{folder} has a manifest of {len(manifest)} images and pixels of {len(images)}, but records "
            f"{about['images']}: "
            "run `simsearch data ingest` again"
        )
    return DecodedFiles(images, torch.arange(len(images)), [], about["digest"])


def files_collection(
    name: str, manifest: Manifest, decoded: DecodedFiles, attributes: Sequence[str] | None = None
) -> Collection:
    """The collection of the readable images, with attributes of the manifest as labels.

    The classes of an attribute are its values among these images, sorted.

    Args:
        name: Name of the collection.
        manifest: The list of files.
        decoded: Its readable images.
        attributes: Names of the attributes, None for all.

    Raises:
        ValueError: If the manifest lacks an attribute.
    """
    rows = decoded.rows.tolist()
    names = tuple(manifest.attributes) if attributes is None else tuple(attributes)
    if missing := [attribute for attribute in names if attribute not in manifest.attributes]:
        have = ", ".join(manifest.attributes) or "none"
        raise ValueError(f"data.attributes: {name} has no column {missing[0]!r}; it has {have}")
    labels, classes = torch.empty(len(rows), len(names), dtype=torch.int64), []
    for column, attribute in enumerate(names):
        values = [manifest.attributes[attribute][row] for row in rows]
        present = sorted({value for value in values if value is not None})
        number: dict[str | None, int] = {value: i for i, value in enumerate(present)} | {None: -1}
        labels[:, column] = torch.tensor([number[value] for value in values], dtype=torch.int64)
        classes.append(tuple(present))
    return Collection(
        name=name,
        images=decoded.images,
        labels=labels,
        attributes=names,
        classes=tuple(classes),
        is_test=torch.zeros(len(rows), dtype=torch.bool),
        paths=tuple(manifest.paths[row] for row in rows),
        digest=decoded.digest,
    )


class FilesDataModule(RetrievalDataModule):
    """The images of a folder or a table (.csv, .parquet), as read by read_manifest, under a protocol.

    Files that cannot be read are left out and reported.

    Args:
        protocol: As in RetrievalDataModule.
        source: The folder or table. It may be the folder of a finished `simsearch data ingest`: with fit "longest" its
            decoded images are used at their own size, `size` or more, and nothing is decoded; with "square" the files
            that it lists are decoded.
        size: Image size in pixels.
        fit: "longest" takes the whole image with its longest side at `size`, so that images have several shapes
            (Ragged). "square" takes the centre square.
        cache: Folder for the decoded images.
        root: Folder that the paths are relative to. None for the default of read_manifest.
        attributes: Names of the attributes to keep, None for all.
        workers: Number of processes that decode the files once.
        sampler: As in RetrievalDataModule.
        eval_batch_size: As in RetrievalDataModule.
        augment: As in RetrievalDataModule.
        num_workers: As in RetrievalDataModule.
    """

    def __init__(
        self,
        protocol: RetrievalProtocol,
        source: str,
        size: int,
        fit: Fit,
        cache: str,
        root: str | None = None,
        attributes: Sequence[str] | None = None,
        workers: int = 0,
        sampler: Callable[[Tensor], Batches] | None = None,
        eval_batch_size: int = 512,
        augment: nn.Module | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(protocol, sampler, eval_batch_size, augment, num_workers)
        self.source, self.root = Path(source), None if root is None else Path(root)
        self.size, self.fit, self.cache = size, fit, Path(cache)
        self.attributes, self.workers = attributes, workers

    def prepare_data(self) -> None:
        """Decodes the files that are not decoded yet.

        Raises:
            ValueError: If a column has the name of a column of search results, or read_manifest refuses the source.
        """
        self._decoded()

    def read(self) -> Collection:
        """The readable images. The others are reported on stderr, and listed beside the cached pixels.

        Raises:
            ValueError: If a column has the name of a column of search results, or read_manifest refuses the source.
        """
        manifest, decoded = self._decoded()
        report(decoded.errors)
        name = self.source.resolve().name if self.source.is_dir() else self.source.stem
        return files_collection(name, manifest, decoded, self.attributes)

    def _decoded(self) -> tuple[Manifest, DecodedFiles]:
        manifest = read_manifest(self.source.resolve(), self.root)
        if reserved := sorted(set(RESERVED) & set(self.attributes or manifest.attributes)):
            raise ValueError(
                f"{self.source} has the columns {', '.join(reserved)}, whose names results use already: rename them"
            )
        if self.fit == "longest" and self.source.is_dir() and read_ingest(self.source):
            return manifest, open_ingest(self.source, manifest, self.size)
        return manifest, decode_files(manifest, size=self.size, fit=self.fit, cache=self.cache, workers=self.workers)


@rank_zero_only
def report(errors: Sequence[ImageError]) -> None:
    """Prints to stderr which files were left out, and why.

    Args:
        errors: Errors of the files.
    """
    for reason, count in Counter(error.reason for error in errors).most_common():
        some = [printable(error.path) for error in errors if error.reason == reason][:3]
        print(f"left out {count} files: {reason} ({', '.join(some)}{' ...' * (count > 3)})", file=sys.stderr)
