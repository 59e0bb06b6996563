"""The images that a calibration takes its scores from: works of the catalog, and images from elsewhere."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from simsearch.cache import ArrayCache
from simsearch.data.manifest import Manifest, load_images, read_manifest
from simsearch.data.presence import Presence
from simsearch.images import MAX_BYTES, ImageError
from simsearch.models.encoder import device
from simsearch.search.calibration import Likeness, image_a_work
from simsearch.search.catalog import Catalog
from simsearch.search.describe import batches_of, describe
from simsearch.search.engine import WORK_ATTRIBUTES, Engine
from simsearch.search.local_features import queries_or_errors
from simsearch.search.verification import Verification
from simsearch.types import LocalFeatures

_BLOCK = 256  # queries that are searched together


def chosen(count: int, at_most: int, seed: int) -> Tensor:
    """A random subset of at most `at_most` positions from range(count), ascending, int64 (n,).

    Args:
        count: Number of positions.
        at_most: Largest size of the subset.
        seed: Seed of the random choice.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:at_most].sort().values


def work_names(engine: Engine, positions: Tensor) -> list[str]:
    """A name for the work of each item: the work's own name, else the item's path.

    Args:
        engine: The engine of the catalog.
        positions: Positions of the items.
    """
    items = engine.catalog.items
    paths = items["path"].take(positions.numpy()).to_pylist()
    if engine.work_attribute is None:
        return paths
    works = items[engine.work_attribute].cast("string").take(positions.numpy()).to_pylist()
    return [work or path for work, path in zip(works, paths, strict=True)]


def outside_sample(source: Path, at_most: int, seed: int) -> Manifest:
    """A random choice of the unrelated images, one of each work where they name works, without duplicates by content.

    Args:
        source: Their folder or table.
        at_most: Largest number of images.
        seed: Seed of the random choice.
    """
    manifest = read_manifest(source)
    column = next((manifest.attributes[name] for name in WORK_ATTRIBUTES if name in manifest.attributes), None)
    if column is None:
        rows = chosen(len(manifest), at_most, seed)
    else:
        works = np.array([f"work {work}" if work else path for work, path in zip(column, manifest.paths, strict=True)])
        rows = image_a_work(works, at_most, seed)
    once: dict[str, str] = {}
    for row in rows.tolist():
        once.setdefault(content_digest(manifest.root / manifest.paths[row]), manifest.paths[row])
    return Manifest(manifest.root, tuple(once.values()), max_pixels=manifest.max_pixels)


class Describer:
    """Describes files with a catalog's encoder, which is built when it is needed. An interrupted run can be continued.

    Args:
        catalog: The catalog.
        cache: Folder of descriptors.
        device: Name of the encoder's device.
        batch_size: Number of images per batch, 1 or more.
        workers: Number of additional processes that decode files, 0 or more.
        report: Called with the errors of files that cannot be read.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        cache: Path | str,
        device: str,
        batch_size: int,
        workers: int,
        report: Callable[[Sequence[ValueError]], None],
    ) -> None:
        self.catalog, self.cache, self.device, self.report = catalog, cache, device, report
        self.batch_size, self.workers = batch_size, workers

    def __call__(self, manifest: Manifest) -> tuple[list[int], Tensor]:
        """Rows of the files that can be read, ascending, and their descriptors (n, width) in the form of queries."""
        digests = [content_digest(manifest.root / path) for path in manifest.paths]
        catalog, index = self.catalog, self.catalog.index
        kind, width = ("uint8", (index.bits or 0) // 8) if index.is_binary else ("float32", int(index.dimension or 0))
        size = width * np.dtype(kind).itemsize
        # A row: a descriptor's bytes, and whether there is one.
        stored = ArrayCache(self.cache).get(
            {"encoder": catalog.about["encoder_fingerprint"], "files": digests},
            (len(manifest), size + 1),
            "uint8",
            lambda rows, start: self._fill(manifest, rows, start),
        )
        readable = np.flatnonzero(stored[:, size])
        missing = [manifest.paths[row] for row in np.flatnonzero(stored[:, size] == 0)]
        if missing:  # again, for the errors of these files
            unread = load_images(Manifest(manifest.root, tuple(missing)), size=32)
            self.report([error for *_, errors in unread for error in errors])
        vectors = np.ascontiguousarray(stored[readable, :size]).view(kind)
        return readable.tolist(), torch.from_numpy(vectors)

    def _fill(self, manifest: Manifest, rows: np.ndarray, start: int) -> Iterator[int]:
        encoder = self.catalog.encoder.to(device(self.device))
        presence = Presence(manifest.root, manifest.paths)
        step = 8 * self.batch_size
        with tqdm(total=len(rows), initial=start, unit="img", desc="describe") as bar:
            for begin in range(start, len(rows), step):
                piece = Manifest(manifest.root, manifest.paths[begin : begin + step])
                batches = batches_of(encoder, piece, batch_size=self.batch_size, workers=self.workers)
                found = describe(encoder, batches, presence=presence, advance=bar.update)
                if len(found):
                    data = found.vectors.contiguous().numpy().view(np.uint8)
                    at = begin + found.rows.numpy()
                    rows[at, :-1], rows[at, -1] = data, 1
                yield begin + len(piece)


@functools.cache
def content_digest(path: Path) -> str:
    """32 hex digits of an image file's content. The path if it is not a file or too large for an image.

    Args:
        path: The file.
    """
    try:
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError:
        pass
    return f"unreadable {path}"


def exact_vectors(
    catalog: Catalog, images: str | None, positions: Tensor, describer: Describer
) -> tuple[Tensor, Tensor]:
    """Positions of the items whose files can be read, and their descriptors in the form of queries, not as stored.

    Args:
        catalog: The catalog.
        images: The folder or table of images that the catalog was made of, or None.
        positions: int64 (n,), positions of the items.
        describer: Describes files.

    Raises:
        ValueError: If the index stores vectors only approximately and no images are given, or if no item is among them.
    """
    if not images:
        raise ValueError(
            f"the index {catalog.index.factory} stores vectors only approximately, unlike those of queries: give "
            "images=<what the catalog was made of>, so that the sampled works are described like queries"
        )
    paths = catalog.items["path"].take(positions.numpy()).to_pylist()
    rows, vectors = describer(Manifest(read_manifest(Path(images)).root, tuple(paths)))
    if not rows:
        raise ValueError(f"no item of the catalog {catalog.folder} is in {images}: give what it was made of")
    return positions[rows], vectors


def local_queries(
    catalog: Catalog,
    verification: Verification,
    images: str,
    positions: Tensor,
    workers: int,
    report: Callable[[Sequence[ValueError]], None],
) -> Iterator[tuple[LocalFeatures, ...] | None]:
    """The local features of items as queries, from their files. None for a file that cannot be read.

    Args:
        catalog: The catalog.
        verification: What describes them.
        images: The folder or table of images that the catalog was made of.
        positions: int64 (n,), positions of the items.
        workers: Number of processes; at least one is used.
        report: Called at the end with the errors of files that cannot be read.
    """
    root = read_manifest(Path(images)).root
    files = [root / path for path in catalog.items["path"].take(positions.numpy()).to_pylist()]
    errors: list[ValueError] = []
    results = queries_or_errors(files, verification, workers=workers)
    for found in tqdm(results, total=len(files), unit="img", desc="verify", disable=None):
        if isinstance(found, ImageError):
            errors.append(found)
        yield None if isinstance(found, ImageError) else found
    report(errors)


def outside_likeness(
    engine: Engine, manifest: Manifest, neighbours: int, describer: Describer
) -> tuple[Likeness, list[str]]:
    """The likeness of unrelated images and the catalog, and the paths of these images.

    Args:
        engine: The engine of the catalog.
        manifest: The unrelated images.
        neighbours: Number of neighbours that a background averages over.
        describer: Describes files.

    Raises:
        ValueError: If no image can be read.
    """
    rows, vectors = describer(manifest)
    if not rows:
        raise ValueError(f"no image of {manifest.root} could be read")
    nothing = torch.empty(0)
    blocks = engine.as_queries(vectors).split(_BLOCK)
    tops, backgrounds = zip(*(engine.stand_out(block, neighbours, nothing) for block in blocks), strict=True)
    return Likeness(torch.cat(tops), torch.cat(backgrounds)), [manifest.paths[row] for row in rows]
