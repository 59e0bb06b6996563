"""simsearch data ingest: makes a collection from any images. They are checked, cleaned and decoded, with a report."""

from __future__ import annotations

import hashlib
import shlex
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
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
from simsearch.data.ingest.decisions import COLUMNS, Decisions, group_rows, read_decisions
from simsearch.data.ingest.grouping import (
    FEWEST,
    INLIERS,
    SHARE,
    Evidence,
    SameWork,
    agreement,
    cliques,
    is_weak,
    least_values,
)
from simsearch.data.ingest.pipeline import (
    UNPACKED,
    Decoding,
    Files,
    Kept,
    begin,
    check_place,
    choose,
    decode,
    gather,
    keep,
    write_results,
)
from simsearch.data.ingest.pixel_store import images_of, tensors_sha256
from simsearch.data.ingest.report import SUSPICIOUS_BAND, markdown, summarise
from simsearch.data.ingest.source import read_listing
from simsearch.data.manifest import Manifest
from simsearch.data.near_duplicates import MIN_CORRELATION, hash_pairs_within, pixel_correlations, turned_pairs
from simsearch.data.protocols import ByHash
from simsearch.data.tables import read_table
from simsearch.figures import Tile, save_grid, spared
from simsearch.files import Damaged, read_array, replacing, write_array, write_csv
from simsearch.functional.correlation import aligned_correlation
from simsearch.functional.geometry import Match, support, verify
from simsearch.functional.pooling import gem
from simsearch.functional.ragged import Ragged
from simsearch.functional.reranking import gallery_neighbours
from simsearch.functional.resize import resize
from simsearch.functional.sift import Sift
from simsearch.search.local_features import features_of, record, record_type, sample_picture
from simsearch.text import printable, warn
from simsearch.types import LocalFeatures

GROUPS_TABLE = "groups.csv"
MOST_DESCRIBED = 200_000
_NEIGHBOURS = 20  # of each image that may be of its work
_PROPOSED = 200  # pairs for each image that hashes may propose
_BATCH = 64
_SIDE, _FEATURES = 256, 300  # longest side at which an image is described by local features, and their number
_MATCH = np.dtype([("features", "<u2"), ("inliers", "<u2"), ("share", "<f4"), ("aligned", "<f4"), ("support", "<f4")])
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
    if values["decisions"] is None:
        check_decided(out / GROUPS_TABLE)
    root = Path(values["root"]).resolve() if values["root"] else None
    listing = read_listing(source, root, values["exclude"], unpacked=out / UNPACKED)
    begin(out, listing, decoding, source)
    files = gather(decode(out, listing, decoding, values["workers"]))
    images = images_of(out / "pixels", files.shapes)
    paths = [listing.paths[row] for row in files.rows.tolist()]
    decisions = Decisions() if values["decisions"] is None else read_decisions(Path(values["decisions"]), paths)
    # Blank and equal files are left out first: the number of pairs grows with the square of theirs.
    places, twins, _ = choose(listing, files)
    if not places:
        raise ValueError(f"all {len(files)} images that could be decoded are blank: is images={source} right?")
    part, known = images[places], decisions.among(places, twins)
    assert isinstance(part, Ragged)
    works = same_work(out, files.part(places), part, backbone, values["near"], known, decoding.chunk).among(places)
    kept = keep(listing, files, works.pairs, groups=values["groups"], categorical=values["categorical"])
    if tied := still_tied(kept, decisions.cut):
        one, other = (paths[place] for place in tied[0])
        warn(
            f"{len(tied)} pairs that are cut stay one work (first {printable(one)} and {printable(other)}): equal "
            f"files, or a column of groups=[{','.join(values['groups'])}], tie them: correct it, or leave it out"
        )
    report = summarise(listing, files, kept, works, decoding.size)
    about = {name: values[name] for name in ("groups", "categorical", "near", "decisions")}
    about["backbone"] = None if backbone is None else backbone.identity(values["near"]["size"])  # type: ignore[operator]
    with replacing(out / "report.md") as temporary:
        temporary.write_text(markdown(report, source.name), encoding="utf-8")
    write_suspicious(out / "suspicious.csv", report["suspicious"]["groups"])
    listed = [*(("large", group) for group in works.suspicious), *(("weak", group) for group in works.weak)]
    write_groups(out / GROUPS_TABLE, group_rows(listed, works.evidence, paths, decisions))
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
    if weak := report["suspicious"]["weak"]:
        print(
            f"{len(weak)} works rest on weak evidence: confirm or cut their pairs in a copy of "
            f"{out / GROUPS_TABLE}, and ingest again with decisions=<copy>"
        )
    print(f"look at {out / 'report.md'} and {out / 'contact-sheet.png'}")
    print(f"try next: {shlex.join(['simsearch', 'train', 'data=art', f'data.source={out}', *fitting_protocol(kept)])}")


def check_decided(path: Path) -> None:
    """Checks that an ingest without decisions does not overwrite any.

    Args:
        path: The groups.csv of an earlier ingest, or no file.

    Raises:
        ValueError: If a person decided something there, or rows cannot be read, which may hold decisions.
    """
    if not path.is_file():
        return
    table = read_table(path)
    if table.rejected or any(value and value.strip() for value in table.columns.get("decision", ())):
        what = f"a row that cannot be read ({table.rejected[0].detail})" if table.rejected else "decisions"
        raise ValueError(
            f"{path} holds {what}, which this ingest would overwrite: copy it and give decisions=<copy>, or delete "
            "it to drop them"
        )


def still_tied(kept: Kept, cut: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs that a person cut and that are of one work all the same.

    Args:
        kept: The images of the collection.
        cut: Pairs of positions of files.
    """
    work = dict(zip(kept.places, kept.columns["work"], strict=True))
    return [(one, other) for one, other in cut if one in work and work[one] == work.get(other)]


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


def write_groups(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Writes groups.csv, or no file if there are no rows.

    Args:
        path: The file to write.
        rows: Its rows, as `group_rows` returns them.
    """
    if rows:
        write_csv(path, COLUMNS, rows)
    else:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------- same works


def same_work(
    out: Path,
    files: Files,
    images: Ragged,
    backbone: nn.Module | None,
    near: dict[str, Any],
    decisions: Decisions,
    chunk: int,
) -> SameWork:
    """Groups the files that show the same work.

    Hashes and descriptors propose pairs. Geometry confirms a pair, or, without verification and for images of few
    features, its pixels do: they must correlate, more so for images that are like many others. A group also needs the
    agreement of its pairs.

    Args:
        out: Output folder.
        files: The files, all different.
        images: Their pixels.
        backbone: The network that proposes pairs, or None.
        near: The config of the search for near-duplicates.
        decisions: What a person decided.
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
        vectors = describe(out / "descriptors", files, images, backbone, near["size"], chunk)
        neighbours = gallery_neighbours(vectors, _NEIGHBOURS)
        near_enough = neighbours.scores >= near["cosine"]
        if near["verify"]:
            near_enough[:, : near["neighbours"]] = True
        rows = torch.arange(len(images))[:, None].expand_as(neighbours.ids)
        near_enough &= neighbours.ids >= 0  # -1: fewer neighbours than that
        rows, columns = rows[near_enough], neighbours.ids[near_enough]
        found = torch.stack([torch.minimum(rows, columns), torch.maximum(rows, columns), torch.zeros_like(rows)], 1)
        proposed["by descriptor"] = found.unique(dim=0)
    turned, which = torch.cat(list(proposed.values())).unique(dim=0, return_inverse=True)
    correlation = pixel_correlations(images, *turned.unbind(1), progress=True)
    # Of a pair that several turns propose, the best counts.
    pairs, place = turned[:, :2].unique(dim=0, return_inverse=True)
    best = torch.full((len(pairs),), -1.0).scatter_reduce(0, place, correlation, "amax")
    none = torch.zeros(len(pairs), dtype=torch.int64)
    zero = none.float()
    evidence = Evidence(pairs, best, none, none, zero, zero, zero, best >= least_values(pairs, best, MIN_CORRELATION))
    if near["verify"]:
        evidence = verified(out / "local_features", files, images, evidence, chunk)
    parts = zip(proposed, which.split([len(part) for part in proposed.values()]), strict=True)
    counts = {name: int(evidence.same[place[part]].sum()) for name, part in parts}
    order = torch.argsort(evidence.inliers + evidence.correlation.double(), descending=True, stable=True)
    surest = [(one, other) for one, other in pairs[order][evidence.same[order]].tolist()]
    groups: dict[int, list[int]] = defaultdict(list)
    for row, root in enumerate(cliques(len(images), surest, decisions.confirmed, decisions.cut)):
        groups[root].append(row)
    several = [group for group in groups.values() if len(group) > 1]
    small = [group for group in several if len(group) <= near["largest"]]
    suspicious = [group for group in several if len(group) > near["largest"]]
    ties = [(group[0], place) for group in small for place in group[1:]] + decisions.confirmed
    doubtful = [group for group in small if near["verify"] and is_weak(group, evidence, decisions.confirmed)]
    return SameWork(ties, counts, suspicious, doubtful, evidence, near["verify"])


def verified(folder: Path, files: Files, images: Ragged, known: Evidence, chunk: int) -> Evidence:
    """The evidence of pairs by geometry, beside that of their pixels.

    Local features are described once for each image, and matched in pieces of `chunk` pairs. Both are stored, so that
    an interruption loses one piece.

    Args:
        folder: Folder of the pieces.
        files: The files.
        images: Their pixels.
        known: The evidence of pixels.
        chunk: Number of images, or of pairs, per piece.
    """
    sift = Sift()
    kind = record_type(_FEATURES, sift.dimension)
    wanted = torch.zeros(len(images), dtype=torch.bool)
    wanted[known.pairs.flatten()] = True
    sample_features, sample_match = algorithms(sift)
    settings = {"pixels": contents(files), "side": _SIDE, "features": _FEATURES, "contrast": sift.contrast}
    settings |= {"chunk": chunk, "wanted": tensors_sha256({"wanted": wanted}), "algorithm": sample_features}

    def described(start: int, stop: int, bar: tqdm) -> np.ndarray:
        found = np.zeros(stop - start, kind)
        for place in range(start, stop):
            if wanted[place]:
                found[place - start] = record(sift.describe(images[place], side=_SIDE, most=_FEATURES), kind)
            bar.update()
        return found

    pieces = in_pieces(folder / cache_key(settings)[:16], len(images), chunk, kind, described, "local features", "img")

    def features(place: int) -> LocalFeatures:
        return features_of(pieces[place // chunk][place % chunk])

    def matched(start: int, stop: int, bar: tqdm) -> np.ndarray:
        found = np.zeros(stop - start, _MATCH)
        for one, group in groupby(range(start, stop), key=lambda number: int(known.pairs[number, 0])):
            numbers = list(group)
            items = [features(int(known.pairs[number, 1])) for number in numbers]
            own = features(one)
            asked, matches = [own] * len(items), verify(own, items)
            # Pixels found mirrored copies; only they are worth a second look.
            doubted = [k for k, number in enumerate(numbers) if known.same[number] and not _agree(matches[k])]
            if doubted and len(own) >= FEWEST:
                mirrored = replace(sift.describe(images[one].flip(2), side=_SIDE, most=_FEATURES), mirrored=True)
                for k, match in zip(doubted, verify(mirrored, [items[k] for k in doubted]), strict=True):
                    if _agree(match):
                        asked[k], matches[k] = mirrored, match
            for number, query, item, match in zip(numbers, asked, items, matches, strict=True):
                inliers, share = (match.inliers, match.least_share) if match else (0, 0.0)
                aligned = agreeing = 0.0
                if match is not None and _agree(match):
                    other, outline = images[int(known.pairs[number, 1])], torch.from_numpy(match.outline)
                    aligned = aligned_correlation(images[one], other, outline)
                    agreeing = support(match, query, item)
                found[number - start] = (min(len(own), len(item)), inliers, share, aligned, agreeing)
            bar.update(len(numbers))
        return found

    settings |= {"pairs": tensors_sha256({"pairs": known.pairs, "alike": known.same}), "matching": sample_match}
    settings |= {"fewest": FEWEST, "inliers": INLIERS, "share": SHARE, "columns": list(_MATCH.names or ())}
    parts = in_pieces(folder / cache_key(settings)[:16], len(known.pairs), chunk, _MATCH, matched, "verify", "pair")
    found = np.concatenate([np.zeros(0, _MATCH), *parts])
    count, inliers = (torch.from_numpy(found[name].astype(np.int64)) for name in ("features", "inliers"))
    share, aligned, agreeing = (torch.from_numpy(found[name].copy()) for name in ("share", "aligned", "support"))
    same = agreement(known.pairs, known.correlation, count, inliers, share, aligned, agreeing)
    return Evidence(known.pairs, known.correlation, count, inliers, share, aligned, agreeing, same)


def contents(files: Files) -> str:
    """The digest of the files' bytes in their order.

    Args:
        files: The files.
    """
    return hashlib.sha256("".join(files.sha256).encode()).hexdigest()


def algorithms(sift: Sift) -> tuple[str, str]:
    """Digests of the features of a sample picture, and of its match with the same picture turned and cut.

    They name the algorithms that made what is stored: after a change of SIFT or of the matching they differ.

    Args:
        sift: What describes images.
    """
    picture = sample_picture()
    own, other = (
        sift.describe(one, side=_SIDE, most=_FEATURES) for one in (picture, picture.rot90(1, (1, 2))[:, 40:, 60:])
    )
    (match,) = verify(own, [other])
    features = {"points": own.points, "descriptors": own.descriptors}
    matched = {} if match is None else {"points": match.points, "outline": match.outline}
    digests = [
        tensors_sha256({name: torch.from_numpy(values).contiguous() for name, values in one.items()})
        for one in (features, matched)
    ]
    return digests[0], digests[1]


def _agree(match: Match | None) -> bool:
    return match is not None and match.inliers >= INLIERS and match.least_share >= SHARE


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
        except ValueError as error:  # more than can be held
            if bits == 0:
                raise ValueError(
                    "too many images have the same perceptual hash: leave most of them out by exclude=[...] or a table"
                ) from error
        bits //= 2


def describe(folder: Path, files: Files, images: Ragged, backbone: nn.Module, size: int, chunk: int) -> Tensor:
    """L2-normalised descriptors float32 (N, C) of whole images, with GeM pooling, p = 3.

    They are stored in pieces of `chunk` images, each described in its own batches, so an interruption changes no value.

    Args:
        folder: Folder of the pieces.
        files: The files.
        images: Their pixels.
        backbone: The network.
        size: Side in pixels of the square that images are resized to.
        chunk: Number of images per piece.
    """
    settings = {"backbone": backbone.identity(size), "pixels": contents(files), "chunk": chunk}  # type: ignore[operator]
    folder = folder / cache_key(settings)[:16]

    def described(start: int, stop: int, bar: tqdm) -> np.ndarray:
        piece, found = images[start:stop], []
        for first in range(0, len(piece), _BATCH):
            squares = torch.stack([resize(image, size, size) for image in piece[first : first + _BATCH]])
            with torch.inference_mode():
                found.append(F.normalize(gem(backbone(squares, size), 3.0)))
            bar.update(len(squares))
        return torch.cat(found).half().numpy()

    parts = in_pieces(folder, len(images), chunk, np.dtype("float16"), described, "describe", "img")
    return F.normalize(torch.from_numpy(np.concatenate(parts)).float())


def in_pieces(
    folder: Path,
    count: int,
    chunk: int,
    dtype: np.dtype[Any],
    make: Callable[[int, int, tqdm], np.ndarray],
    title: str,
    unit: str,
) -> list[np.ndarray]:
    """Arrays of `chunk` rows each, memory-mapped. Those that are missing or damaged in a folder are made.

    Args:
        folder: Folder of the pieces.
        count: Number of rows of all.
        chunk: Number of rows of a piece.
        dtype: The dtype of the arrays.
        make: Returns rows `start` to `stop`, and updates the progress bar.
        title: Title of the progress bar.
        unit: Its unit.
    """
    parts = []
    with tqdm(total=count, unit=unit, desc=title) as bar:
        for number, start in enumerate(range(0, count, chunk)):
            stop = min(start + chunk, count)
            path = folder / f"{number:06d}.npy"
            try:
                if len(read_array(path, dtype)) != stop - start:
                    raise Damaged(f"{path} has another number of rows")
                bar.update(stop - start)
            except (OSError, Damaged):  # not there yet, or of no use
                write_array(path, make(start, stop, bar))
            parts.append(np.load(path, mmap_mode="r", allow_pickle=False))
    return parts


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
