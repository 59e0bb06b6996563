"""simsearch data ingest: makes a collection from any images. They are checked, cleaned and decoded, with a report."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from simsearch import configs, program
from simsearch.cache import cache_key
from simsearch.data.image_folder import DecodedFiles, files_collection
from simsearch.data.ingest.grouping import (
    SameWork,
    cliques,
    least_correlation,
)
from simsearch.data.ingest.pipeline import (
    UNPACKED,
    Decoding,
    Files,
    Kept,
    begin,
    check_place,
    decode,
    gather,
    keep,
    write_results,
)
from simsearch.data.ingest.pixel_store import images_of
from simsearch.data.ingest.report import SUSPICIOUS_BAND, markdown, summarise
from simsearch.data.ingest.source import read_listing
from simsearch.data.manifest import Manifest
from simsearch.data.near_duplicates import hash_pairs_within, pixel_correlations, turned_pairs
from simsearch.data.protocols import ByHash
from simsearch.figures import Tile, save_grid, spared
from simsearch.files import Damaged, read_array, replacing, write_array, write_csv
from simsearch.functional.pooling import gem
from simsearch.functional.ragged import Ragged
from simsearch.functional.reranking import gallery_neighbours
from simsearch.functional.resize import resize
from simsearch.types import SearchResult

MOST_DESCRIBED = 200_000
_NEIGHBOURS = 20  # of each image that may be of its work
_OF_ONE_WORK = 5  # of them that may well be: the others tell how alike unlike images are
_PROPOSED = 200  # pairs for each image that hashes may propose
_BACKGROUND = 2000  # pairs that do
_BATCH = 64
_COLUMNS = 12  # of the contact sheet


@program.command("data_ingest")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch data ingest`.

    Args:
        config: The config of conf/data_ingest.yaml.

    Raises:
        ValueError: If `out` lies among the images, or if another process ingests into it.
    """
    values = configs.plain(config)
    source, out = Path(values["images"]).resolve(), Path(values["out"]).resolve()
    if source.is_dir() and out.is_relative_to(source):
        raise ValueError(f"out={out} lies in the folder of images and would become part of it: give another out=")
    backbone = None
    if values["near"]["descriptors"]:
        backbone = configs.build(values["backbone"]).eval().requires_grad_(False)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            ingest(values, source, out, backbone)
    except Timeout:
        raise ValueError(f"another process ingests into {out}: wait for it, or give another out=") from None


def ingest(values: dict[str, Any], source: Path, out: Path, backbone: nn.Module | None) -> None:
    """Decodes the images that are not decoded yet, groups them into works and writes all results.

    Args:
        values: The plain config.
        source: Folder or table of images.
        out: Output folder.
        backbone: The network that finds near-duplicates, or None.
    """
    decoding = Decoding(
        size=values["size"],
        min_side=values["min_side"],
        seconds=float(values["seconds"]),
        memory=int(values["memory"] * 2**30),
        chunk=values["chunk"],
        max_pixels=int(values["megapixels"] * 1e6),
    )
    check_place(out)
    root = Path(values["root"]).resolve() if values["root"] else None
    listing = read_listing(source, root, values["exclude"], unpacked=out / UNPACKED)
    begin(out, listing, decoding, source)
    files = gather(decode(out, listing, decoding, values["workers"]))
    images = images_of(out / "pixels", files.shapes)
    works = same_work(out, files, images, backbone, values["near"], decoding.chunk)
    kept = keep(listing, files, works.pairs, groups=values["groups"], categorical=values["categorical"])
    report = summarise(listing, files, kept, works, decoding.size)
    about = {name: values[name] for name in ("groups", "categorical", "near")}
    about["backbone"] = None if backbone is None else backbone.identity(values["near"]["size"])  # type: ignore[operator]
    with replacing(out / "report.md") as temporary:
        temporary.write_text(markdown(report, source.name), encoding="utf-8")
    write_suspicious(out / "suspicious.csv", report["suspicious"]["groups"])
    with spared():
        contact_sheet(out / "contact-sheet.png", files, kept, images)
    write_results(out, listing, files, kept, about, report)
    refused = {reason: entry["count"] for reason, entry in report["rejected"].items()}
    print(f"{len(kept.places)} images of {report['works']['count']} works in {out}")
    for reason, count in refused.items():
        print(f"refused {count}: {reason}")
    if groups := report["suspicious"]["groups"]:
        print(
            f"{len(groups)} groups of images look like one work each, but are too large to be joined: "
            f"{out / 'suspicious.csv'}"
        )
    print(f"look at {out / 'report.md'} and {out / 'contact-sheet.png'}")
    print(f"try next: {shlex.join(['simsearch', 'train', 'data=art', f'data.source={out}', *fitting_protocol(kept)])}")


def fitting_protocol(kept: Kept) -> list[str]:
    """The overrides that a training needs besides the data. Empty if artists can be kept apart, as by default.

    Args:
        kept: The images of the collection.
    """
    count = len(kept.places)
    columns = {name: kept.columns.get(name, (None,) * count) for name in ("artist", "work")}
    known = DecodedFiles(torch.empty(count, 3, 1, 1, dtype=torch.uint8), torch.arange(count), [], "")
    collection = files_collection("", Manifest(Path(), tuple(map(str, kept.columns["path"])), columns), known)
    try:
        ByHash("", attribute="artist", part="artist", junk="work").split(collection)
    except ValueError:
        parts = ["protocol.evaluation=0.2", "protocol.validation=0.2"]
        return ["protocol=by-attribute", "protocol.attribute=work", "protocol.group=work", *parts]
    return []


def write_suspicious(path: Path, groups: Sequence[Sequence[str]]) -> None:
    """Writes the images of each suspicious group as CSV, one line per image. Writes no file if there are no groups.

    Args:
        path: The file to write.
        groups: Paths of each group.
    """
    if not groups:
        path.unlink(missing_ok=True)
        return
    rows = ((number, name) for number, group in enumerate(groups, start=1) for name in group)
    write_csv(path, ["group", "path"], rows)


# --------------------------------------------------------------------------------------------- same works


def same_work(
    out: Path, files: Files, images: Ragged, backbone: nn.Module | None, near: dict[str, Any], chunk: int
) -> SameWork:
    """Groups the files that show the same work.

    Hashes and descriptors propose pairs. A pair is confirmed by its pixels: their correlation must exceed that of
    unrelated images of this collection. A group also needs the agreement of its pairs.

    Args:
        out: Output folder.
        files: The files.
        images: Their pixels.
        backbone: The network that proposes pairs, or None.
        near: The config of the search for near-duplicates.
        chunk: Number of images per piece of descriptors.

    Raises:
        ValueError: If there are too many images to compare each with each.
    """
    proposed = by_hash(files, near["hash"])
    neighbours = None
    if backbone is not None:
        if len(images) > MOST_DESCRIBED:
            raise ValueError(
                f"{len(images):,} images are too many to compare every pair by descriptor (at most "
                f"{MOST_DESCRIBED:,}): find near-duplicates by perceptual hash alone with near.descriptors=false"
            )
        vectors = describe(out / "descriptors", images, backbone, near["size"], chunk)
        neighbours = gallery_neighbours(vectors, _NEIGHBOURS)
        near_enough = neighbours.scores >= near["cosine"]
        rows = torch.arange(len(images))[:, None].expand_as(neighbours.ids)[near_enough]
        columns = neighbours.ids[near_enough]
        found = torch.stack([torch.minimum(rows, columns), torch.maximum(rows, columns), torch.zeros_like(rows)], 1)
        proposed["by descriptor"] = found.unique(dim=0)
    pairs, which = torch.cat(list(proposed.values())).unique(dim=0, return_inverse=True)
    least = least_correlation(background(images, neighbours), len(pairs))
    correlation = pixel_correlations(images, *pairs.unbind(1), progress=True)
    kept = correlation >= least
    parts = zip(proposed, which.split([len(part) for part in proposed.values()]), strict=True)
    counts = {name: int(kept[part].sum()) for name, part in parts}
    order = torch.argsort(correlation[kept], descending=True, stable=True)
    surest = dict.fromkeys((one, other) for one, other, _ in pairs[kept][order].tolist())
    groups: dict[int, list[int]] = defaultdict(list)
    for place, root in enumerate(cliques(len(images), list(surest))):
        groups[root].append(place)
    several = [group for group in groups.values() if len(group) > 1]
    contents = [len({files.sha256[place] for place in group}) for group in several]  # equal files are one
    tied = [group for group, n in zip(several, contents, strict=True) if n <= near["largest"]]
    suspicious = [group for group, n in zip(several, contents, strict=True) if n > near["largest"]]
    return SameWork([(group[0], place) for group in tied for place in group[1:]], counts, least, suspicious)


def by_hash(files: Files, bits: int) -> dict[str, Tensor]:
    """Pairs by perceptual hash, by method: int64 (P, 3) with two places and the quarter turns of the first image.

    Args:
        files: The files.
        bits: Largest distance in bits. It is halved until there are not too many pairs, if images of the collection are
            so similar that hashes hardly separate them.
    """
    while True:
        try:
            rows, columns, _ = hash_pairs_within(files.hashes, bits)
            turned = torch.stack(turned_pairs(files.hashes, files.turned, bits), 1)
            if bits == 0 or len(rows) + len(turned) <= _PROPOSED * len(files.hashes):
                return {"by hash": torch.stack([rows, columns, torch.zeros_like(rows)], 1), "turned": turned}
        except ValueError:  # more than can be held
            if bits == 0:
                raise
        bits //= 2


def background(images: Ragged, neighbours: SearchResult | None) -> Tensor:
    """Correlations of neighbouring pairs that do not show the same work: how similar the collection is to itself.

    Args:
        images: The pixels.
        neighbours: The nearest neighbours of each image, or None.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(images), (_BACKGROUND,), generator=generator)
    if neighbours is not None and neighbours.ids.shape[1] > _OF_ONE_WORK:
        rank = torch.randint(_OF_ONE_WORK, neighbours.ids.shape[1], (_BACKGROUND,), generator=generator)
        columns = neighbours.ids[rows, rank]
    else:
        columns = torch.randint(len(images), (_BACKGROUND,), generator=generator)
    low, high = torch.minimum(rows, columns), torch.maximum(rows, columns)
    pairs = torch.stack([low, high], 1)[(low >= 0) & (low < high)].unique(dim=0)  # -1: fewer neighbours than that
    return pixel_correlations(images, *pairs.unbind(1))


def describe(folder: Path, images: Ragged, backbone: nn.Module, size: int, chunk: int) -> Tensor:
    """L2-normalised descriptors float32 (N, C) of whole images, with GeM pooling, p = 3.

    They are stored in pieces of `chunk` images, each described in its own batches, so an interruption changes no value.

    Args:
        folder: Folder of the pieces.
        images: The pixels.
        backbone: The network.
        size: Side in pixels of the square that images are resized to.
        chunk: Number of images per piece.
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
    """Writes a PNG with samples of accepted images, refused images that can be shown, suspicious images, and works.

    Args:
        path: The file to write.
        files: The files.
        kept: The accepted images.
        images: The pixels.
    """
    name = {place: Path(str(file)).name for place, file in zip(kept.places, kept.columns["path"], strict=True)}
    step = max(1, len(kept.places) // (3 * _COLUMNS))
    rows = _lines([Tile(images[place], name[place]) for place in kept.places[::step][: 3 * _COLUMNS]])
    rows += _lines([Tile(images[place], "blank", False) for place in kept.blank[:_COLUMNS]])
    for place, twin in list(kept.twins.items())[: _COLUMNS // 2]:
        rows.append([Tile(images[twin], name[twin]), Tile(images[place], "duplicate", False)])
    odd = sorted((p for p in kept.places if files.band[p] >= SUSPICIOUS_BAND), key=lambda p: -float(files.band[p]))
    rows += _lines([Tile(images[p], f"band {float(files.band[p]):.0%}") for p in odd[: 2 * _COLUMNS]])
    members = defaultdict(list)
    for place, work in zip(kept.places, kept.columns["work"], strict=True):
        members[work].append(place)
    several = sorted((m for m in members.values() if len(m) > 1), key=lambda m: (-len(m), m[0]))
    rows += [[Tile(images[p], name[p], True) for p in m[:_COLUMNS]] for m in several[:20]]
    save_grid(path, rows, title=f"{len(kept.places)} images taken; then refused (red), suspicious; works (green)")


def _lines(tiles: list[Tile]) -> list[list[Tile]]:
    return [tiles[start : start + _COLUMNS] for start in range(0, len(tiles), _COLUMNS)]


if __name__ == "__main__":
    main()
