"""simsearch index: builds a catalog from images, described by the encoder of a run, or from shards."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from tqdm import tqdm

from simsearch import configs, program, saved_run
from simsearch.data.manifest import read_manifest
from simsearch.data.presence import MOST_GONE, Presence
from simsearch.evaluation.frontier import write_frontier
from simsearch.files import read_json
from simsearch.index.auto import AutoIndex, check_budget
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.encoder import device, encoder_config
from simsearch.search.build import (
    Filling,
    check_not_fewer,
    filling_of,
    local_records,
    write_filled,
)
from simsearch.search.calibration_file import calibrated_for
from simsearch.search.catalog import MOST_CHANGED, read_catalog
from simsearch.search.change import Change, settings_for, takes, update
from simsearch.search.drift import standing
from simsearch.search.errors import CatalogError
from simsearch.search.item_tables import path_table
from simsearch.search.shards import ShardError, open_shards
from simsearch.search.verification import Verification
from simsearch.search.writing import check_place
from simsearch.text import printable, warn

MANY_SEGMENTS = 16


@program.command("index")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch index`.

    Args:
        config: The config of conf/index.yaml.
    """
    found = from_shards(config) if config.shards else from_images(config)
    if found is None:
        return
    filling, index, out = found
    check_not_fewer(out, sum(filling.counts), config.fewer)
    before = calibrated_for(out)
    index, frontier = write_filled(out, index, filling)
    if frontier is not None:
        write_frontier(out, "frontier", frontier)
        print(f"chose {frontier.chosen.described()} of those in {out / 'frontier.csv'}: {described(index)}")
    report(out, len(index), index, filling.errors, filling.skipped)
    if before is not None and calibrated_for(out) is None:
        warn(
            f"note: the catalog that was in {out} was calibrated; the new one is not: "
            f"simsearch calibrate {shlex.quote(f'catalog={out}')} outside=<images of other things>"
        )


def place(config: DictConfig, usual: Path, count: int) -> Path:
    """The catalog's folder.

    Checks, before the work starts, that a catalog of at most `count` items may replace the one in the folder.

    Args:
        config: The command's config.
        usual: The default folder.
        count: Largest number of items.

    Raises:
        ValueError: If the new catalog would have far fewer items, and the config does not allow it.
    """
    out = Path(config.out).expanduser() if config.out else usual
    check_not_fewer(out, count, config.fewer)
    return out


def check_images(out: Path, root: Path, given: bool) -> None:
    """Checks that the catalog in the usual folder is not that of other images, of which this one would leave none.

    Args:
        out: The catalog's folder.
        root: Folder of the images that are to be indexed.
        given: Whether the user named the catalog's folder; other images are then only told.

    Raises:
        ValueError: If it is, and the user did not name the folder.
    """
    try:
        known = (read_json(out / "catalog.json").get("source") or {}).get("images")
    except (OSError, ValueError):  # there is none, or none that can be read
        return
    if known is None or Path(known).resolve() == root:
        return
    if not given:
        raise ValueError(
            f"{out} is the catalog of the images in {known}, not of those in {root}: give another out=, or this one if "
            "these images take their place"
        )
    warn(f"note: the catalog {out} was of the images in {known}, and is of those in {root} now")


def note_replaced(out: Path) -> None:
    """Warns before a catalog is made anew that its calibration will be lost.

    Args:
        out: The catalog's folder.
    """
    if calibrated_for(out) is not None:
        warn(f"note: the catalog {out} is calibrated; its replacement has to be calibrated again")


def from_images(config: DictConfig) -> tuple[Filling, FaissIndex | AutoIndex, Path] | None:
    """Describes the images of a folder or manifest now. Returns them, their empty index and the catalog's folder.

    If the folder holds a catalog of the same encoder, index and local features, only what is new or has changed is
    described, the catalog is changed, and None is returned. Index and local features that are not given are its own.

    Args:
        config: The command's config.

    Raises:
        FileExistsError: If the folder holds something other than a catalog.
        ValueError: If run or images are missing, if the index does not fit the run, or if the folder has the catalog of
            other images.
    """
    if not config.run or not config.images:
        raise ValueError("give run=<run> and images=<folder or manifest>, or shards=<out of simsearch extract>")
    run = saved_run.open_run(Path(config.run), trusted=configs.trusts(config))
    source = Path(config.images).resolve()
    manifest = read_manifest(source, Path(config.root).expanduser().resolve() if config.root else None)
    for note in manifest.notes:
        warn(f"note: {source.name}: {note}")
    path_table(manifest)  # refuses columns before the work
    usual = run.folder / "catalogs" / (source.name if source.is_dir() else source.stem)
    out = place(config, usual, len(manifest))
    check_images(out, manifest.root, bool(config.out))
    given = given_index(config)
    verification = configs.build(config.verify) if config.get("verify") else None
    encoder = saved_run.load_model(run).encoder.to(device(config.device))
    index, verification = settings_for(out, encoder, given, verification)
    settings = {"thumbnail": config.thumbnail, "batch_size": config.batch_size, "workers": config.workers}
    if takes(out, encoder, index, verification):
        change = update(out, manifest, encoder, remove=True, fewer=config.fewer, **settings)
        report_change(out, change, manifest.skipped)
        return None
    check_place(out)
    note_replaced(out)
    filling = filling_of(
        manifest,
        encoder,
        encoder_config(run.config),
        run=run.folder.name,
        verification=verification,
        **settings,
        label=(run.config.get("protocol") or {}).get("attribute"),
    )
    return filling, index, out


def given_index(config: DictConfig) -> FaissIndex | AutoIndex | None:
    """The empty index that the user asked for, or what chooses one. None if the user left it to the command.

    Args:
        config: The command's config.

    Raises:
        ValueError: If there is a budget for an index that does not choose by it.
    """
    index = configs.build(configs.plain(config)["index"]) if config.get("index") else None
    check_budget(config.budget, isinstance(index, AutoIndex))
    return index


def described(index: FaissIndex) -> str:
    """The settings of an index as the arguments that give it again.

    Args:
        index: The index.
    """
    named = {name: getattr(index, name) for name in ("factory", "metric", "nprobe", "ef_search", "k_factor")}
    return " ".join(
        ["index=factory", *(f"index.{name}='{value}'" for name, value in named.items() if value is not None)]
    )


def from_shards(config: DictConfig) -> tuple[Filling, FaissIndex | AutoIndex, Path]:
    """The output of `simsearch extract`, read piece by piece when needed, its empty index and the catalog's folder.

    Args:
        config: The command's config.

    Raises:
        ValueError: If the arguments contradict each other, if the index does not fit the run, or if shards are missing,
            damaged or without images.
    """
    verification = configs.build(config.verify) if config.get("verify") else None
    if config.run or (config.images and verification is None):
        raise ValueError("shards= record their run and images: leave run= and images= out")
    if verification is not None and not config.images:
        raise ValueError("shards hold no local features: verify= needs images=<what they were made of> too")
    trusted = configs.trusts(config)
    shards = open_shards(Path(config.shards), trusted=trusted)
    if missing := shards.missing():
        raise ValueError(
            f"{len(missing)} of the {len(shards)} shards in {shards.folder} are missing; this command makes them: "
            f"{shards.about['command']}"
        )
    out = place(config, shards.folder / "catalog", len(shards.items))
    check_place(out)
    note_replaced(out)
    index, kept = settings_for(out, shards.encoder, given_index(config), verification)
    if kept is not None and verification is None:
        warn(f"note: the catalog in {out} has local features; for the new one give verify= and images=, too")
    numbers = tqdm(range(len(shards)), unit="shard", desc="check")
    try:
        checked = [(number, shards.check(number)) for number in numbers]
    except ShardError as error:
        raise ValueError(f"{error}; this command makes it again: {shards.about['command']}") from error
    errors = [error for number in range(len(shards)) for error in shards.errors(number)]
    seen = dict(zip(shards.items["path"].to_pylist(), (shards.sizes >= 0).tolist(), strict=True))
    root = Path(shards.about["source"]["images"])
    lost = [e for e in errors if e.reason == "missing" and e.path and seen[str(e.path.relative_to(root))]]
    if len(lost) > MOST_GONE * sum(seen.values()):
        raise ValueError(
            f"{len(lost)} images were lost while they were described, such as {printable(lost[0].path)}; this "
            f"command describes them again: {shards.about['command']}"
        )
    filled = [(number, count) for number, count in checked if count]
    if not filled:
        raise ValueError(f"none of the {len(shards.items)} images of the shards could be read: {errors[0]}")
    local: Iterable[np.ndarray] = ()
    if verification is not None:
        described = [path for number, _ in filled for path in shards.described(number)]
        local = local_of_shards(config, described, verification)
    filling = Filling(
        encoder=shards.encoder,
        config=shards.about["config"],
        counts=[count for _, count in filled],
        vectors=lambda part: shards.vectors(filled[part][0]),
        items=(shards.catalog_items(number) for number, _ in filled),
        errors=errors,  # type: ignore[arg-type]
        rejected=(),
        skipped=shards.about["skipped"],
        source=shards.about["source"],
        verification=verification,
        local=local,
        thumbnail=shards.about["thumbnail"],
    )
    return filling, index, out


def local_of_shards(config: DictConfig, paths: Sequence[str], verification: Verification) -> Iterator[np.ndarray]:
    """The records of the local features of images that shards describe, read from the images that the user gave.

    Args:
        config: The command's config.
        paths: Paths of the images, in the order of the index.
        verification: What describes them.

    Raises:
        ValueError: If an image is not among those that the user gave.
    """
    manifest = read_manifest(Path(config.images), Path(config.root) if config.root else None)
    rows = {path: row for row, path in enumerate(manifest.paths)}
    if lacking := [path for path in paths if path not in rows]:
        raise ValueError(
            f"{len(lacking)} of {len(paths)} images of the shards are not in images={config.images}, first "
            f"{printable(lacking[0])}: give what the shards were made of"
        )
    presence = Presence(manifest.root, manifest.paths)
    return local_records(manifest, [rows[path] for path in paths], verification, config.workers, presence)


def report_change(out: Path, change: Change, skipped: dict[str, int], *, trusted: bool = False) -> None:
    """Prints what a change did to a catalog, and whether its calibration still stands.

    Args:
        out: The catalog's folder.
        change: The change.
        skipped: Number of files left out, by reason.
        trusted: Allow links to lead out of the folder.
    """
    try:
        catalog = read_catalog(out, trusted=trusted)
    except CatalogError as error:  # of a calibration that is damaged
        warn(f"note: {error}")
        catalog = read_catalog(out, calibrated=False, trusted=trusted)
    report(out, len(catalog), catalog.segments[0].index, change.errors, skipped)
    print(change)
    if len(catalog.segments) >= MANY_SEGMENTS:
        merge = f"simsearch catalog compact {shlex.quote(f'catalog={out}')}"
        print(f"{len(catalog.segments)} segments: {merge} merges them")
    found = standing(catalog)
    if found is not None and not found.stands and found.share <= MOST_CHANGED:  # else opening it has said so
        warn(f"note: the calibration {found}")


def report(out: Path, count: int, index: FaissIndex, errors: Sequence[Any], skipped: dict[str, int]) -> None:
    """Prints what was indexed and what was not. The catalog lists unreadable files in skipped.csv.

    Args:
        out: The catalog's folder.
        count: Number of items.
        index: Its index, or that of one of its segments.
        errors: Errors of files that could not be read.
        skipped: Number of files left out, by reason.
    """
    print(f"{count} images, {index.code_bytes} bytes each ({index.factory}), in the catalog {out}")
    report_errors(errors, skipped)
    print(f"try next: simsearch search {shlex.quote(f'catalog={out}')} image=<image or folder>")


def report_errors(errors: Sequence[Any], skipped: dict[str, int]) -> None:
    """Prints on standard error how many files were left out, by reason.

    Args:
        errors: Errors of files that could not be read.
        skipped: Number of files left out, by reason.
    """
    for reason, n in Counter(error.reason for error in errors).most_common():
        example = next(error.path for error in errors if error.reason == reason)
        warn(f"skipped {n} files, {reason} (first {printable(example)})")
    for reason, n in skipped.items():
        print(f"left out {n} entries of the folder or table: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
