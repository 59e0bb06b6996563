"""Ingest of a user-supplied collection: decodes each file once within limits of time and memory, leaves out duplicate
and blank images, cleans attributes, and groups the images of one work.

    plan.json          settings and fingerprint of the files; after a kill, the same command continues
    unpacked/          files of images that were inside a table
    pixels/            decoded images (pixel_store.py) and index.npy: the start of each image of the manifest
    manifest.parquet   path, id, attributes, work, sha256, width, height of the accepted images
    rejected.csv       the other images, and why
    ingest.json        root, settings, digests; written last, so that it marks a finished ingest
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from simsearch.data.ingest.cleaning import Cleaned, clean
from simsearch.data.ingest.grouping import connected, equal_pairs
from simsearch.data.ingest.pixel_store import Image, Refusal, Shard, gathered, read_shards, whole_shards, write_shard
from simsearch.data.ingest.source import Listing
from simsearch.data.manifest import INGEST, INGEST_PLAN, INGEST_TABLE
from simsearch.data.near_duplicates import perceptual_hashes
from simsearch.data.presence import Presence
from simsearch.data.process_pool import Failure, bounded_map
from simsearch.data.tables import Column, Rejected
from simsearch.files import digests, read_json, replacing, write_csv, write_json
from simsearch.images import MAX_BYTES, MAX_PIXELS, ImageError, header_shape, read_file, read_image

UNPACKED = "unpacked"  # the folder of images that were inside a table
FORMAT = 2  # version of the rules for pixels and facts
GROUPS = ("work", "work_id", "group", "group_id")
CATEGORICAL = ("artist", "style", "genre", "medium", "museum", "school", "movement", "technique", "license")
REASONS = {
    "duplicate": "it is identical to another file, which is kept",
    "blank": "nearly all of it has one colour",
}
# Columns that the manifest adds itself, and columns of a search result.
_OWN = ("id", "work", "sha256", "width", "height")
_TAKEN = ("sha256", "width", "height", "rank", "score", "thumbnail")
_BLANK = 2.0  # standard deviation of grey, of 255
# Levels by which rows of a uniform band may differ from its first. JPEG is not exact, above all at its end.
_FLAT_MEAN, _FLAT_MOST = 4, 12


@dataclass(frozen=True)
class Decoding:
    """Settings that determine the pixels and which files are refused.

    Attributes:
        size: Longest side in pixels. Larger images are reduced.
        min_side: Shortest accepted side, in pixels.
        max_pixels: As in read_image.
        max_bytes: As in read_image.
        seconds: Time limit for a file.
        memory: Memory limit for a file, in bytes.
        chunk: Images in a shard, which is what a kill can lose.

    Raises:
        ValueError: If a value is not positive.
    """

    size: int = 256
    min_side: int = 32
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    seconds: float = 30.0
    memory: int = 2 * 2**30
    chunk: int = 4096

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")


# ------------------------------------------------------------------------------------------- decoding


def begin(out: Path, listing: Listing, decoding: Decoding, source: Path) -> None:
    """Writes the plan of an ingest, or checks that the same ingest was begun there.

    Args:
        out: Folder of the ingest.
        listing: The listed files.
        decoding: The settings.
        source: The folder or table of the listing.

    Raises:
        FileExistsError: If `out` holds something else.
        ValueError: If an ingest was begun there with other settings or files.
    """
    plan = out / INGEST_PLAN
    about = {
        "format": FORMAT,
        "source": str(source),
        "root": os.path.realpath(listing.root),
        "images": len(listing.paths),
        "settings": asdict(decoding),
        "fingerprint": _fingerprint(listing, decoding),
    }
    if not plan.exists():
        check_place(out)
        write_json(plan, about)
        return
    try:
        before = read_json(plan)
        differing = [
            name for name in ("format", "root", "settings", "images", "fingerprint") if before[name] != about[name]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{plan} is damaged ({error}): delete {out} or give another out=") from error
    if differing:
        what = {"settings": f"settings {before['settings']}", "fingerprint": "files that have changed since then"}
        raise ValueError(
            f"{out} was begun with another {what.get(differing[0], differing[0])}: give another out=, "
            f"or delete {out} to start over"
        )


def check_place(out: Path) -> None:
    """Checks that a folder is new, or holds an ingest.

    Args:
        out: The folder.

    Raises:
        FileExistsError: If it holds something else.
    """
    if (out / INGEST_PLAN).exists() or not out.exists():
        return
    if foreign := sorted(path.name for path in out.iterdir() if path.name[0] != "." and path.name != UNPACKED):
        raise FileExistsError(f"{out} holds other files ({foreign[0]}): give another out=")


def _fingerprint(listing: Listing, decoding: Decoding) -> str:
    """32 hex digits of what determines the shards: settings, and names, lengths and times of the files."""
    digest = hashlib.sha256(json.dumps([FORMAT, os.path.realpath(listing.root), asdict(decoding)]).encode())
    for path in listing.paths:
        try:
            status = os.stat(listing.root / path)
            facts = [status.st_size, status.st_mtime_ns]
        except OSError:
            facts = []
        digest.update(json.dumps([path, facts]).encode())
    return digest.hexdigest()[:32]


def decode(out: Path, listing: Listing, decoding: Decoding, workers: int) -> list[Shard]:
    """The shards of all files. Missing ones are decoded with a progress bar.

    Args:
        out: Folder of the ingest.
        listing: The listed files.
        decoding: The settings.
        workers: Number of decoding processes.

    Raises:
        Vanished: If files disappear while they are read.
    """
    folder, count = out / "pixels", len(listing.paths)
    folder.mkdir(exist_ok=True)
    total = -(-count // decoding.chunk)
    presence = Presence(listing.root, listing.paths)
    shards = whole_shards(read_shards(folder, total), presence, listing.paths)
    for leftover in folder.glob(".*.safetensors"):
        leftover.unlink()
    first = len(shards) * decoding.chunk
    if first >= count:
        return shards
    with tqdm(total=count, initial=first, unit="img", desc="ingest") as bar:
        results = bounded_map(
            partial(decode_file, decoding=decoding),
            (str(listing.root / path) for path in listing.paths[first:]),
            workers=workers,
            seconds=decoding.seconds,
            memory=decoding.memory,
        )
        items = _items(results, first, listing.paths, presence, bar)
        for number in range(len(shards), total):
            start = shards[-1].stop if shards else 0
            shards.append(write_shard(folder, number, start, islice(items, decoding.chunk)))
    return shards


def _items(
    results: Iterable[Any], first: int, paths: Sequence[str], presence: Presence, bar: tqdm
) -> Iterator[Image | Refusal]:
    for row, result in enumerate(results, start=first):
        if isinstance(result, Failure):
            yield Refusal(row, result.reason, result.detail)
        elif len(result) == 2 and isinstance(result[0], str):
            presence.check(paths[row], result[0])
            yield Refusal(row, *result)
        else:
            pixels, facts = result
            yield Image(row, torch.from_numpy(pixels), {name: torch.from_numpy(fact) for name, fact in facts.items()})
        bar.update()


def decode_file(path: str, decoding: Decoding) -> tuple[np.ndarray, dict[str, np.ndarray]] | tuple[str, str]:
    """Pixels uint8 (3, h, w) and facts of a file, or the reason and detail of its refusal. Runs in a decoding process.

    The facts are:

    - sides: int64 (2,), height and width in the file.
    - sha256: uint8 (32,).
    - hash: uint8 (8,), perceptual hash.
    - turned: uint8 (3, 8), hashes of the image turned counter-clockwise by 1, 2 and 3 quarters.
    - spread: float32 (), standard deviation of grey.
    - band: float32 (), the result of `band`.

    Args:
        path: The file.
        decoding: The settings.
    """
    try:
        data = read_file(Path(path), decoding.max_bytes)
        shape = header_shape(data)
        reduced = shape is None or max(shape) > decoding.size
        image = read_image(
            data,
            size=decoding.size if reduced else None,
            fit="longest",
            max_pixels=decoding.max_pixels,
            max_bytes=decoding.max_bytes,
            min_side=decoding.min_side,
        )
    except ImageError as error:
        return error.reason, error.detail
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return "too-much-memory", f"more than {decoding.memory / 2**30:g} GiB"
        raise
    grey = image.float().mean(0)
    facts: dict[str, np.ndarray] = {
        "sides": np.array(shape or image.shape[1:], dtype=np.int64),
        "sha256": np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8).copy(),
        "hash": perceptual_hashes(image[None])[0].numpy(),
        "turned": np.concatenate([perceptual_hashes(image.rot90(by, (1, 2))[None]).numpy() for by in (1, 2, 3)]),
        "spread": np.array(float(grey.std(correction=0)), dtype=np.float32),
        "band": np.array(band(image), dtype=np.float32),
    }
    return image.numpy(), facts


def band(image: Tensor) -> float:
    """Height of the uniform band at the bottom minus the one at the top, as a fraction of the image height, from 0.

    A positive value suggests a truncated file that was filled up. A print on a page has margins on all sides.

    Args:
        image: uint8 (3, H, W).
    """

    def height(rows: Tensor) -> int:
        off = (rows - rows[:, 0].median(1).values[:, None, None]).abs()
        near = (off.amax((0, 2)) <= _FLAT_MOST) & (off.float().mean((0, 2)) <= _FLAT_MEAN)
        return int(near.int().cumprod(0).sum())

    pixels = image.to(torch.int16)
    below, above = height(pixels.flip(1)), height(pixels)
    return max(0, below - above) / image.shape[1]


# ------------------------------------------------------------------------------------------ what is kept


@dataclass(frozen=True)
class Files:
    """All decoded files, N in the order of the listing.

    Attributes:
        rows: int64 (N,), rows of the listing.
        shapes: int64 (N, 2), height and width of the decoded images.
        sides: int64 (N, 2), height and width in the files.
        hashes: uint8 (N, 8), perceptual hashes.
        turned: uint8 (N, 3, 8), perceptual hashes of the images turned by 1, 2 and 3 quarters.
        spread: float32 (N,), standard deviation of grey, of 255.
        band: float32 (N,), as in `band`.
        sha256: SHA-256 of each file's bytes, in hex.
        refusals: The files without an image.
        pixels: Digest of each shard's pixels, None in shards of an older version.
    """

    rows: Tensor
    shapes: Tensor
    sides: Tensor
    hashes: Tensor
    turned: Tensor
    spread: Tensor
    band: Tensor
    sha256: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    pixels: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, places: Sequence[int]) -> Files:
        """Some of the files, with all refusals.

        Args:
            places: Their positions.
        """
        rows = list(places)
        return replace(
            self,
            rows=self.rows[rows],
            shapes=self.shapes[rows],
            sides=self.sides[rows],
            hashes=self.hashes[rows],
            turned=self.turned[rows],
            spread=self.spread[rows],
            band=self.band[rows],
            sha256=tuple(self.sha256[place] for place in places),
        )


def gather(shards: Sequence[Shard]) -> Files:
    """The files of all shards.

    Args:
        shards: The shards.

    Raises:
        ValueError: If there is none.
    """
    refusals = tuple(refusal for shard in shards for refusal in shard.refusals)
    if not any(len(shard.columns["rows"]) for shard in shards):
        counts = Counter(refusal.reason for refusal in refusals).most_common()
        why = ", ".join(f"{count} {reason}" for reason, count in counts)
        raise ValueError(f"none of the {len(refusals)} files could be taken ({why}): is root= right?")
    digests = gathered(shards, "sha256").numpy().tobytes().hex()
    return Files(
        rows=gathered(shards, "rows"),
        shapes=gathered(shards, "shapes"),
        sides=gathered(shards, "sides"),
        hashes=gathered(shards, "hash"),
        turned=gathered(shards, "turned"),
        spread=gathered(shards, "spread"),
        band=gathered(shards, "band"),
        sha256=tuple(digests[start : start + 64] for start in range(0, len(digests), 64)),
        refusals=refusals,
        pixels=tuple(shard.sha256 for shard in shards),
    )


@dataclass(frozen=True)
class Kept:
    """The N images that an ingest accepts.

    Attributes:
        places: Their positions among the files.
        columns: The columns of the manifest, in order.
        cleaned: The cleaned attributes.
        twins: For each duplicate that is left out, the position of the equal file that is kept.
        blank: Positions of blank files.
        notes: Remarks for the user.
    """

    places: tuple[int, ...]
    columns: dict[str, Column]
    cleaned: Cleaned
    twins: dict[int, int]
    blank: tuple[int, ...]
    notes: tuple[str, ...]


def choose(listing: Listing, files: Files) -> tuple[list[int], dict[int, int], list[int]]:
    """Positions of the files to keep, ascending; the kept twin of each duplicate; positions of blank files.

    Of equal files, the one with most known attributes is kept, or else the first.

    Args:
        listing: The listed files.
        files: The decoded files.
    """
    rows = files.rows.tolist()
    blank = [place for place, spread in enumerate(files.spread.tolist()) if spread < _BLANK]
    known = [sum(values[row] is not None for values in listing.attributes.values()) for row in rows]
    best: dict[str, int] = {}
    left_out = set(blank)
    sound = [place for place in range(len(files)) if place not in left_out]
    for place in sound:
        before = best.setdefault(files.sha256[place], place)
        if known[place] > known[before]:
            best[files.sha256[place]] = place
    kept = sorted(best.values())
    twins = {place: best[files.sha256[place]] for place in sound if best[files.sha256[place]] != place}
    return kept, twins, blank


def keep(
    listing: Listing,
    files: Files,
    pairs: Iterable[tuple[int, int]],
    *,
    groups: Sequence[str] = GROUPS,
    categorical: Sequence[str] = CATEGORICAL,
) -> Kept:
    """The accepted images, with cleaned attributes and the work of each.

    Args:
        listing: The listed files.
        files: The decoded files.
        pairs: Positions of files that show the same work.
        groups: Columns in which a shared value means the same work.
        categorical: As in `clean`.
    """
    rows = files.rows.tolist()
    kept, twins, blank = choose(listing, files)
    given = {name: values for name, values in listing.attributes.items() if name not in ("work", *_TAKEN)}
    notes = [
        f"the column {name!r} is left out, since results use its name" for name in listing.attributes if name in _TAKEN
    ]
    cleaned = clean({name: tuple(values[rows[place]] for place in kept) for name, values in given.items()}, categorical)
    same = [*twins.items(), *pairs]
    for name in groups:
        if name in listing.attributes:
            same += equal_pairs([_group(listing.attributes[name][row]) for row in rows])
    root = connected(len(files), same)
    names: dict[int, str] = {}
    for place in kept:
        names[root[place]] = min(names.get(root[place], "~"), files.sha256[place])
    ids = _ids(cleaned.columns.get("id"), [files.sha256[place] for place in kept], notes)
    sides = files.sides[kept].tolist()
    columns: dict[str, Column] = {
        "path": tuple(listing.paths[rows[place]] for place in kept),
        "id": tuple(ids),
        **{name: values for name, values in cleaned.columns.items() if name not in _OWN},
        "work": tuple(f"w{names[root[place]][:12]}" for place in kept),
        "sha256": tuple(files.sha256[place] for place in kept),
        "width": tuple(str(width) for _, width in sides),
        "height": tuple(str(height) for height, _ in sides),
    }
    return Kept(tuple(kept), columns, cleaned, twins, tuple(blank), tuple(notes))


def _group(value: str | None) -> str | None:
    return clean({"group": (value,)}, ("group",)).columns["group"][0]


def _ids(given: Column | None, digests: Sequence[str], notes: list[str]) -> list[str]:
    """A unique id for each image: the given one, with a number if it is used already, or else from the file's bytes."""
    ids, used, doubled = [], set[str](), 0
    numbers: dict[str, int] = {}  # the next one of each id, since a column may hold the same id everywhere
    for place, digest in enumerate(digests):
        wanted = name = (given[place] if given else None) or digest[:12]
        number = numbers.get(wanted, 2)
        while name in used:
            name, number = f"{wanted}-{number}", number + 1
        numbers[wanted] = number
        doubled += name != wanted
        used.add(name)
        ids.append(name)
    if doubled:
        notes.append(f"{doubled} ids were in use already and got a number appended")
    return ids


def rejections(listing: Listing, files: Files, kept: Kept) -> list[Rejected]:
    """Everything that is not accepted: rows of the listing, then files in its order.

    Args:
        listing: The listed files.
        files: The decoded files.
        kept: The accepted images.
    """
    rows, paths = files.rows.tolist(), listing.paths
    found = {refusal.row: Rejected(paths[refusal.row], refusal.reason, refusal.detail) for refusal in files.refusals}
    for place in kept.blank:
        detail = f"its grey values have a standard deviation of {float(files.spread[place]):.1f} of 255"
        found[rows[place]] = Rejected(paths[rows[place]], "blank", detail)
    for place, twin in kept.twins.items():
        found[rows[place]] = Rejected(paths[rows[place]], "duplicate", f"kept: {paths[rows[twin]]}")
    return [*listing.rejected, *(found[row] for row in sorted(found))]


# ---------------------------------------------------------------------------------------------- writing


def write_results(
    out: Path, listing: Listing, files: Files, kept: Kept, about: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
    """Writes the manifest, rejected.csv, the index of the pixels, report.json and, last, ingest.json.

    Args:
        out: Folder of the ingest.
        listing: The listed files.
        files: The decoded files.
        kept: The accepted images.
        about: More plain values for ingest.json.
        report: Content of report.json.
    """
    (out / INGEST).unlink(missing_ok=True)
    table = {"width": pa.int32(), "height": pa.int32()}
    columns = {
        name: pa.array(values, pa.string()).cast(table[name]) if name in table else pa.array(values, pa.string())
        for name, values in kept.columns.items()
    }
    with replacing(out / INGEST_TABLE) as temporary:
        pq.write_table(pa.table(columns), temporary)
    rejected = ((one.path, one.reason, one.detail) for one in rejections(listing, files, kept))
    write_csv(out / "rejected.csv", ["path", "reason", "detail"], rejected)
    sizes = 3 * files.shapes.prod(1)
    index = torch.cat([(sizes.cumsum(0) - sizes)[:, None], files.shapes], dim=1)[list(kept.places)]
    with replacing(out / "pixels" / "index.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, index.numpy(), allow_pickle=False)
    write_json(out / "report.json", report)
    digest = hashlib.sha256(bytes.fromhex("".join(kept.columns["sha256"]))).hexdigest()  # type: ignore[arg-type]
    about = {**read_json(out / INGEST_PLAN), **about, "images": len(kept.places), "digest": digest}
    about |= {"sha256": digests(out, [INGEST_TABLE, "pixels/index.npy"]), "pixels": files.pixels}
    write_json(out / INGEST, about)
