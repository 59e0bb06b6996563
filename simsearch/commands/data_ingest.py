"""simsearch data ingest: a collection of images from anywhere, checked, cleaned and decoded, with a report."""

from __future__ import annotations

import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from simsearch import runtime
from simsearch.cache import cache_key
from simsearch.data.audit import near_pairs_by_descriptor
from simsearch.data.ingest import (
    Decoding,
    Files,
    Kept,
    begin,
    decode,
    gather,
    keep,
    write_results,
)
from simsearch.data.ingest_report import SUSPICIOUS_BAND, markdown, summarise
from simsearch.data.listing import read_listing
from simsearch.data.pixels import images_of
from simsearch.data.works import agreeing, hash_distances, hash_pairs
from simsearch.figures import Tile, save_grid
from simsearch.files import Damaged, read_array, replacing, write_array
from simsearch.functional.pooling import gem
from simsearch.functional.ragged import Ragged
from simsearch.functional.resize import resize

MOST_DESCRIBED = 200_000
_BATCH = 64
_COLUMNS = 12  # of the contact sheet


@runtime.command("data_ingest")
def main(config: DictConfig) -> None:
    values = runtime.plain(config)
    source, out = Path(values["images"]).resolve(), Path(values["out"]).resolve()
    if source.is_dir() and out.is_relative_to(source):
        raise ValueError(f"out={out} lies in the folder of images, of which it would become a part: give another place")
    backbone = None
    if values["near"]["descriptors"]:
        backbone = runtime.build(values["backbone"]).eval().requires_grad_(False)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            ingest(values, source, out, backbone)
    except Timeout:
        raise ValueError(f"another process ingests into {out}: wait for it, or give another place by out=") from None


def ingest(values: dict[str, Any], source: Path, out: Path, backbone: nn.Module | None) -> None:
    """Decodes what is not decoded yet, finds the works and writes all results."""
    decoding = Decoding(
        size=values["size"],
        min_side=values["min_side"],
        seconds=float(values["seconds"]),
        memory=int(values["memory"] * 2**30),
        chunk=values["chunk"],
    )
    listing = read_listing(source, Path(values["root"]).resolve() if values["root"] else None)
    begin(out, listing, decoding, source)
    files = gather(decode(out, listing, decoding, values["workers"]))
    images = images_of(out / "pixels", files.shapes)
    pairs, counts = same_work(out, files, images, backbone, values["near"], decoding.chunk)
    kept = keep(listing, files, pairs, groups=values["groups"], categorical=values["categorical"])
    report = summarise(listing, files, kept, counts, decoding.size)
    about = {name: values[name] for name in ("groups", "categorical", "near")}
    about["backbone"] = None if backbone is None else backbone.identity(values["near"]["size"])  # type: ignore[operator]
    with replacing(out / "report.md") as temporary:
        temporary.write_text(markdown(report, source.name), encoding="utf-8")
    contact_sheet(out / "contact-sheet.png", files, kept, images)
    write_results(out, listing, files, kept, about, report)
    refused = {reason: entry["count"] for reason, entry in report["rejected"].items()}
    print(f"{len(kept.places)} images of {report['works']['count']} works in {out}")
    for reason, count in refused.items():
        print(f"refused {count}: {reason}")
    print(f"look at {out / 'report.md'} and {out / 'contact-sheet.png'}")
    print(f"try next: simsearch train data=art {shlex.quote(f'data.source={out}')}")


# --------------------------------------------------------------------------------------------- same works


def same_work(
    out: Path, files: Files, images: Ragged, backbone: nn.Module | None, near: dict[str, Any], chunk: int
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Pairs of places of files that show the same work, and how many each criterion gave."""
    rows, columns, _ = hash_pairs(files.hashes, near["hash"])
    pairs = set(zip(rows.tolist(), columns.tolist(), strict=True))
    counts = {"by hash": len(pairs)}
    if backbone is not None:
        if len(images) > MOST_DESCRIBED:
            raise ValueError(
                f"{len(images):,} images are too many to compare each with each by descriptor (at most "
                f"{MOST_DESCRIBED:,}): find near-duplicates by perceptual hash alone with near.descriptors=false"
            )
        vectors = describe(out / "descriptors", images, backbone, near["size"], chunk)
        rows, columns, similarity = near_pairs_by_descriptor(vectors, vectors, near["loose"])
        once = rows < columns
        rows, columns, similarity = rows[once], columns[once], similarity[once]
        distance = hash_distances(files.hashes, rows, columns)
        sure = agreeing(similarity, distance, strict=near["strict"], loose=near["loose"], bits=near["bits"])
        found = set(zip(rows[sure].tolist(), columns[sure].tolist(), strict=True))
        counts["by descriptor"] = len(found)
        pairs |= found
    return sorted(pairs), counts


def describe(folder: Path, images: Ragged, backbone: nn.Module, size: int, chunk: int) -> Tensor:
    """Descriptors float32 (N, C), L2-normalised, of whole images drawn to squares of `size`; GeM, p = 3.

    They are kept in pieces of `chunk` images, each described in batches of its own: a kill changes nothing.
    """
    folder = folder / cache_key({"backbone": backbone.identity(size), "images": len(images), "chunk": chunk})[:16]  # type: ignore[operator]
    parts = []
    with tqdm(total=len(images), unit="img", desc="describe") as bar:
        for number, start in enumerate(range(0, len(images), chunk)):
            piece = images[start : start + chunk]
            path = folder / f"{number:06d}.npy"
            try:
                described = read_array(path, np.dtype("float16"))
                bar.update(len(piece))
            except (OSError, Damaged):  # not there yet, or of no use
                found = []
                for first in range(0, len(piece), _BATCH):
                    squares = torch.stack([resize(image, size, size) for image in piece[first : first + _BATCH]])
                    with torch.inference_mode():
                        found.append(F.normalize(gem(backbone(squares, size), 3.0)))
                    bar.update(len(squares))
                described = torch.cat(found).half().numpy()
                write_array(path, described)
            parts.append(torch.from_numpy(described))
    return F.normalize(torch.cat(parts).float())


# ----------------------------------------------------------------------------------------------- pictures


def contact_sheet(path: Path, files: Files, kept: Kept, images: Ragged) -> None:
    """Writes a PNG: a sample of what was taken, what was refused and can be shown, suspicious ones, works."""
    name = {place: Path(str(file)).name for place, file in zip(kept.places, kept.columns["path"], strict=True)}
    step = max(1, len(kept.places) // (3 * _COLUMNS))
    rows = _lines([Tile(images[place], name[place]) for place in kept.places[::step][: 3 * _COLUMNS]])  # type: ignore[arg-type]
    rows += _lines([Tile(images[place], "blank", False) for place in kept.blank[:_COLUMNS]])  # type: ignore[arg-type]
    for place, twin in list(kept.twins.items())[: _COLUMNS // 2]:
        rows.append([Tile(images[twin], name[twin]), Tile(images[place], "duplicate", False)])  # type: ignore[arg-type]
    odd = sorted((p for p in kept.places if files.band[p] >= SUSPICIOUS_BAND), key=lambda p: -float(files.band[p]))
    rows += _lines([Tile(images[p], f"band {float(files.band[p]):.0%}") for p in odd[: 2 * _COLUMNS]])  # type: ignore[arg-type]
    members = defaultdict(list)
    for place, work in zip(kept.places, kept.columns["work"], strict=True):
        members[work].append(place)
    several = sorted((m for m in members.values() if len(m) > 1), key=lambda m: (-len(m), m[0]))
    rows += [[Tile(images[p], name[p], True) for p in m[:_COLUMNS]] for m in several[:20]]  # type: ignore[arg-type]
    save_grid(path, rows, title=f"{len(kept.places)} images taken; then refused (red), suspicious; works (green)")


def _lines(tiles: list[Tile]) -> list[list[Tile]]:
    return [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]


if __name__ == "__main__":
    main()
