"""Shards: descriptors of many images in a folder. Any number of processes write them; an index is built from them.

    plan/plan.json             format, chunk, fingerprints of the images and the encoder, the encoder's config
    plan/items.parquet         one row per image: path, attributes
    plan/sizes.npy             bytes of each file, -1 if it did not exist
    plan/encoder.safetensors   all tensors of the encoder
    shards/000017.safetensors  vectors, thumbnails and failures of chunk 17: rows 17 * chunk .. 18 * chunk - 1
    claims/17                  the process that works on chunk 17

There are no pickles. The plan is written atomically and never changes. A shard is written atomically, and its content
does not depend on which process writes it or how many processes there are.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from simsearch.cache import cache_key
from simsearch.data.ingest.pixel_store import tensors_sha256
from simsearch.data.manifest import Manifest
from simsearch.data.presence import Presence, file_sizes
from simsearch.errors import SimsearchError
from simsearch.files import checked, digests, read_json, replacing, write_json
from simsearch.images import ImageError
from simsearch.search.encoder_files import encoder_fingerprint, read_encoder, write_encoder
from simsearch.search.item_tables import path_table, with_thumbnails
from simsearch.trust import check_links
from simsearch.types import Encoder

FORMAT = 1
_DECIDING = ("format", "listing", "encoder_fingerprint", "chunk", "thumbnail")
_ENDING = ".safetensors"


class ShardError(SimsearchError, ValueError):
    """The folder has no plan, the plan was made for something else, or a shard is damaged."""


@dataclass(frozen=True)
class Shards:
    """An opened folder of shards, finished or not.

    Attributes:
        folder: The folder.
        about: The content of plan.json.
        items: Path and attributes of N images.
        trusted: True if the user trusts whoever made the folder.
    """

    folder: Path
    about: dict[str, Any]
    items: pa.Table
    trusted: bool = False

    def __len__(self) -> int:
        """The number of chunks."""
        return -(-len(self.items) // self.about["chunk"])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over everything that determines the content of the shards."""
        return cache_key({name: self.about[name] for name in _DECIDING})[:16]

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 (N,), the size in bytes of each file when the shards were begun. -1 if the file did not exist."""
        return np.load(checked(self.folder / "plan", "sizes.npy", self.about), allow_pickle=False)

    def presence(self, root: Path) -> Presence:
        """The image files below `root` that existed when the shards were begun.

        Args:
            root: Folder of the images.
        """
        return Presence(root, self.items["path"].to_pylist(), self.sizes)

    def rows(self, number: int) -> range:
        """The rows of `items` that a chunk covers.

        Args:
            number: Number of the chunk.
        """
        start = number * self.about["chunk"]
        return range(start, min(start + self.about["chunk"], len(self.items)))

    def path(self, number: int) -> Path:
        """The file of a chunk. It may not exist yet.

        Args:
            number: Number of the chunk.
        """
        return self.folder / "shards" / f"{number:06d}{_ENDING}"

    def missing(self) -> list[int]:
        """The chunks that have no shard yet."""
        found = _names(self.folder / "shards")
        return [number for number in range(len(self)) if self.path(number).name not in found]

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of the plan. The first access builds, loads and checks it. Raises as Catalog.encoder does."""
        return read_encoder(self.folder / "plan", self.about, trusted=self.trusted)

    def check_encoder(self, encoder: Encoder) -> None:
        """Checks that an encoder is the one of the plan.

        Args:
            encoder: The encoder.

        Raises:
            ShardError: If it is another one.
        """
        own, other = self.about["encoder_fingerprint"], encoder_fingerprint(encoder)
        if own != other:
            raise ShardError(
                f"{self.folder} was begun with encoder {own} (run {self.about['source']['run']}), but this one is "
                f"{other}: "
                "their descriptors cannot be compared. Continue with that run, or give another out="
            )

    def write(
        self, number: int, rows: Tensor, vectors: Tensor, thumbnails: Sequence[bytes], errors: Sequence[ImageError]
    ) -> None:
        """Writes the shard of a chunk atomically.

        Args:
            number: Number of the chunk.
            rows: int64 (n,), rows of the images that could be read, in any order.
            vectors: (n, D), in the form that an index takes, in the order of `rows`.
            thumbnails: Image bytes, n of them, in the order of `rows`.
            errors: Errors of the other images, with their paths as in `items`.

        Raises:
            ValueError: If an image of the chunk is missing or occurs twice, or if the encoder returned NaN or infinity.
        """
        span = self.rows(number)
        row_of = dict(zip(self.items["path"][span.start : span.stop].to_pylist(), span, strict=True))
        failed = sorted((row_of[str(error.path)], error.reason, error.detail) for error in errors)
        if sorted([*rows.tolist(), *(row for row, _, _ in failed)]) != list(span):
            raise ValueError(f"chunk {number} does not hold each of its {len(span)} images once")
        if vectors.is_floating_point() and not (finite := torch.isfinite(vectors).all(1)).all():
            path = self.items["path"][int(rows[~finite][0])].as_py()
            raise ValueError(f"the encoder returned NaN or infinity for {path}, which cannot be indexed")
        order = rows.argsort()
        sizes = [len(thumbnails[i]) for i in order.tolist()]
        tensors = {
            "rows": rows[order],
            "vectors": vectors[order].contiguous(),
            "thumbnails": _bytes(b"".join(thumbnails[i] for i in order.tolist())),
            "ends": torch.tensor(sizes, dtype=torch.int64).cumsum(0),
            "errors": _bytes(json.dumps(failed).encode()),
        }
        # One entry: safetensors writes several in any order, and equal work should give equal bytes.
        about = {"plan": self.fingerprint, "chunk": number, "sha256": tensors_sha256(tensors)}
        path = self.path(number)
        try:
            with replacing(path) as temporary:
                # save_file would keep it from other users
                temporary.write_bytes(save(tensors, {"shard": json.dumps(about)}))
        except FileNotFoundError:  # `clear` of another, for whom all was finished, took it for a left-over
            if not path.is_file():
                raise

    def clear(self) -> None:
        """Removes temporary files that killed processes left behind. For finished shards only."""
        for path in [*(self.folder / "claims").glob("*"), *(self.folder / "shards").glob(".*")]:
            path.unlink(missing_ok=True)
        for path in self.folder.glob(".plan.*"):
            shutil.rmtree(path, ignore_errors=True)

    def check(self, number: int) -> int:
        """Reads the whole shard of a chunk and returns its number of vectors.

        Args:
            number: Number of the chunk.

        Raises:
            ShardError: If the shard is missing, damaged or of another plan, or does not hold each image of the chunk
                once.
        """
        path = self.path(number)
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["shard"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if about != {"plan": self.fingerprint, "chunk": number, "sha256": tensors_sha256(tensors)}:
                raise ShardError("it belongs to another plan, or its content has changed")
            failed = [row for row, _, _ in json.loads(tensors["errors"].numpy().tobytes())]
            if sorted([*tensors["rows"].tolist(), *failed]) != list(self.rows(number)):
                raise ShardError("it does not hold each of its images once")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"the shard {path} is damaged or missing: {error}") from error
        return len(tensors["rows"])

    def vectors(self, number: int) -> Tensor:
        """The vectors of a checked shard, (n, D), in the order of its rows.

        Args:
            number: Number of the chunk.
        """
        return self._read(number, "vectors")[0]

    def described(self, number: int) -> list[str]:
        """Paths of the images that a checked shard has vectors of, in their order.

        Args:
            number: Number of the chunk.
        """
        return self.items["path"].take(self._read(number, "rows")[0].numpy()).to_pylist()

    def catalog_items(self, number: int) -> pa.Table:
        """Path, attributes and thumbnail of the images that a checked shard has vectors of.

        Args:
            number: Number of the chunk.
        """
        rows, ends, data = self._read(number, "rows", "ends", "thumbnails")
        content, cuts = data.numpy().tobytes(), [0, *ends.tolist()]
        thumbnails = [content[start:stop] for start, stop in pairwise(cuts)]
        return with_thumbnails(self.items.take(rows.numpy()), thumbnails)

    def errors(self, number: int) -> list[ImageError]:
        """The errors of the images that could not be read. Their paths are relative to the folder of images.

        Args:
            number: Number of the chunk, whose shard has been checked.
        """
        root, paths = Path(self.about["source"]["images"]), self.items["path"]
        failed = json.loads(self._read(number, "errors")[0].numpy().tobytes())
        return [ImageError(root / paths[row].as_py(), reason, detail) for row, reason, detail in failed]

    def _read(self, number: int, *names: str) -> list[Tensor]:
        try:
            with safe_open(self.path(number), "pt") as file:
                return [file.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise ShardError(f"the shard {self.path(number)} is damaged or missing: {error}") from error


def begin(
    folder: Path,
    manifest: Manifest,
    *,
    encoder: Encoder,
    config: Mapping[str, Any],
    chunk: int,
    thumbnail: int,
    source: Mapping[str, str],
    command: str,
    trusted: bool = False,
) -> Shards:
    """Opens the shards of a manifest's images, and creates their plan if there is none.

    Any number of processes may call this at once; only one plan is made.

    Args:
        folder: Folder of the shards.
        manifest: The images and their attributes.
        encoder: The encoder that describes the images.
        config: The plain config that builds the encoder.
        chunk: Number of images per shard, 1 or more.
        thumbnail: Longest side in pixels of each thumbnail, 1 or more.
        source: `run`, the name of the run, and `images`, the folder that paths are relative to.
        command: The command that continues the extraction.
        trusted: True if the user trusts whoever made the folder.

    Raises:
        ValueError: If `chunk` or `thumbnail` is below 1.
        FileExistsError: If `folder` holds something else.
        ShardError: If the folder was begun with other images, another encoder, chunk or thumbnail.
    """
    for name, value in (("chunk", chunk), ("thumbnail", thumbnail)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    items, sizes = path_table(manifest), file_sizes(manifest.root, manifest.paths)
    listing = cache_key({"columns": items.to_pydict(), "sizes": sizes.tolist()})
    plan = folder / "plan"
    if not plan.exists():
        if foreign := sorted(n for n in _names(folder) if n[0] != "." and n not in ("plan", "shards", "claims")):
            raise FileExistsError(f"{folder} holds other files ({foreign[0]}): give another out=")
        temporary = folder / f".plan.{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        try:
            pq.write_table(items, temporary / "items.parquet")
            np.save(temporary / "sizes.npy", sizes)
            about = {"format": FORMAT, "images": len(items), "listing": listing, "chunk": chunk, "thumbnail": thumbnail}
            about |= write_encoder(temporary, encoder)
            about |= {"config": config, "source": source, "skipped": manifest.skipped, "command": command}
            about["sha256"] = digests(temporary, ["items.parquet", "sizes.npy", "encoder.safetensors"])
            write_json(temporary / "plan.json", about)
            os.rename(temporary, plan)
        except OSError:  # a folder that is not empty is not replaced: another process was first
            if not (plan / "plan.json").is_file():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    shards = open_shards(folder, trusted=trusted)
    shards.check_encoder(encoder)
    if shards.about["listing"] != listing:
        change = _change(shards, items, sizes)
        raise ShardError(
            f"the images have changed since {folder} was begun ({change}): put them back, or give another out="
        )
    for name, value in (("chunk", chunk), ("thumbnail", thumbnail)):
        if shards.about[name] != value:
            raise ShardError(
                f"{folder} was begun with {name}={shards.about[name]}, not {value}: give the same, or another out="
            )
    return shards


def open_shards(folder: Path, *, trusted: bool = False) -> Shards:
    """The shards in a folder.

    Args:
        folder: Folder of the shards.
        trusted: Allow links to lead out of the folder.

    Raises:
        ShardError: If there is no plan, or if it is damaged.
    """
    if not trusted and folder.is_dir():
        check_links(folder)
    plan = folder / "plan"
    try:
        about = read_json(plan / "plan.json")
        items = pq.read_table(checked(plan, "items.parquet", about))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShardError(f"no shards in {folder} ({error}): give the out= of `simsearch extract`") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ShardError(f"the plan of {folder} is damaged ({error}): delete {folder}") from error
    if about.get("format") != FORMAT:
        raise ShardError(f"{folder} has shard format {about.get('format')}, this version reads {FORMAT}")
    if missing := sorted({*_DECIDING, "images", "backbone", "config", "source", "skipped", "command"} - set(about)):
        raise ShardError(
            f"the plan of {folder} is damaged (plan.json does not have {', '.join(missing)}): delete {folder}"
        )
    if about["images"] != len(items):
        raise ShardError(f"the plan of {folder} is damaged: {len(items)} of {about['images']} rows: delete {folder}")
    return Shards(folder, about, items, trusted)


def _change(shards: Shards, items: pa.Table, sizes: np.ndarray) -> str:
    """How a list of images differs from the plan's, in words."""
    old = dict(zip(shards.items["path"].to_pylist(), shards.sizes.tolist(), strict=True))
    new = dict(zip(items["path"].to_pylist(), sizes.tolist(), strict=True))
    found = {
        "new": new.keys() - old.keys(),
        "gone": old.keys() - new.keys(),
        "of another size": {path for path in new.keys() & old.keys() if new[path] != old[path]},
    }
    words = [f"{len(paths)} {kind}, first {min(paths)}" for kind, paths in found.items() if paths]
    return "; ".join(words) or "other attributes or another order"


def _names(folder: Path) -> set[str]:
    """The names in a folder. Empty if the folder does not exist."""
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
