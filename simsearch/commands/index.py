"""simsearch index: a catalog of a folder or manifest of images, described by a run's encoder, or of shards."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from simsearch import configs, program, run_directory
from simsearch.data.manifest import load_images, read_manifest
from simsearch.data.presence import MOST_GONE, Presence
from simsearch.data.tables import Rejected
from simsearch.files import read_json
from simsearch.images import ImageError, encode_thumbnail
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.catalog import calibrated_for, fill_index, path_table, with_thumbnails, write_catalog
from simsearch.search.engine import encode
from simsearch.search.shards import ShardError, open_shards
from simsearch.text import printable, warn


@dataclass(frozen=True)
class Described:
    """Images that were described, in parts: vectors(i) gives the counts[i] of part i, `items` their tables.

    rejected: rows of the manifest that were not taken. config: what builds the encoder. out: where the catalog goes.
    source: `run` and `images`.
    """

    encoder: nn.Module
    config: dict[str, Any]
    counts: list[int]
    vectors: Callable[[int], Tensor]
    items: Iterable[pa.Table]
    errors: list[ImageError]
    rejected: tuple[Rejected, ...]
    skipped: dict[str, int]
    source: dict[str, str]
    out: Path


@program.command("index")
def main(config: DictConfig) -> None:
    index = configs.build(configs.plain(config)["index"])
    described = from_shards(config, index) if config.shards else from_images(config, index)
    out = described.out
    check_not_fewer(out, sum(described.counts), config.fewer)
    before = calibrated_for(out)
    fill_index(index, described.counts, described.vectors)
    reasons = dict(Counter(error.reason for error in described.errors))
    write_catalog(
        out,
        index=index,
        items=described.items,
        encoder=described.encoder,
        config=described.config,
        about={"source": described.source, "skipped": reasons | described.skipped},
        errors=[*described.errors, *described.rejected],
    )
    report(out, len(index), index.code_bytes, described.errors, described.skipped)
    if before is not None and calibrated_for(out) is None:
        warn(
            f"note: the catalog that was in {out} was calibrated, this one is another and is not: "
            f"simsearch calibrate {shlex.quote(f'catalog={out}')} outside=<images of other things>"
        )


def place(config: DictConfig, usual: Path, count: int) -> Path:
    """The catalog's folder, before the work: says and refuses what a catalog of at most `count` items would cost."""
    out = Path(config.out) if config.out else usual
    check_not_fewer(out, count, config.fewer)
    if calibrated_for(out) is not None:
        warn(f"note: the catalog {out} is calibrated, and another one in its place is to be calibrated again")
    return out


def check_not_fewer(out: Path, count: int, told: bool) -> None:
    """Raises ValueError where a catalog of `count` items would take the place of one of far more, unless `told`."""
    try:
        before = int(read_json(out / "catalog.json").get("items", 0))
    except (OSError, ValueError, TypeError):  # there is none, or none that could be missed
        return
    if count < (1 - MOST_GONE) * before and not told:
        raise ValueError(
            f"the catalog {out} has {before} items, this one would have {count}: see whether all images are there; "
            "if so, say fewer=true, or give another out="
        )


def from_images(config: DictConfig, index: FaissIndex) -> Described:
    """Describes the images of a folder or manifest now."""
    if not config.run or not config.images:
        raise ValueError("give run=<run> and images=<folder or manifest>, or shards=<out of simsearch extract>")
    run = run_directory.open_run(Path(config.run), trusted=configs.trusts(config))
    source = Path(config.images).resolve()
    manifest = read_manifest(source, Path(config.root) if config.root else None)
    for note in manifest.notes:
        warn(f"note: {source.name}: {note}")
    table, presence = path_table(manifest), Presence(manifest.root, manifest.paths)
    usual = run.folder / "catalogs" / (source.name if source.is_dir() else source.stem)
    out = place(config, usual, len(manifest))
    encoder = run_directory.load_model(run).encoder.to(configs.device(config.device))
    check_kind(index, encoder)
    parts, rows, thumbnails, errors = [], [], [], []
    batches = load_images(
        manifest,
        size=encoder.input_size,
        fit=encoder.fit,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    with tqdm(total=len(manifest), unit="img", desc="index") as bar:
        for images, batch_rows, batch_errors in batches:
            if len(images):
                parts.append(encode(encoder, images))
            rows += batch_rows.tolist()
            thumbnails += [encode_thumbnail(image, config.thumbnail) for image in images]
            presence.note(batch_errors)
            errors += batch_errors
            bar.update(len(images) + len(batch_errors))
    if not rows:
        raise ValueError(f"none of the {len(manifest)} images of {config.images} could be read: {errors[0]}")

    order = sorted(range(len(rows)), key=rows.__getitem__)  # batches come by shape, a catalog as the manifest
    vectors = torch.cat(parts)[order]
    return Described(
        encoder=encoder,
        config=configs.encoder_config(run.config),
        counts=[len(rows)],
        vectors=lambda _: vectors,
        items=[with_thumbnails(table.take([rows[i] for i in order]), [thumbnails[i] for i in order])],
        errors=errors,
        rejected=manifest.rejected,
        skipped=manifest.skipped,
        source={"run": run.folder.name, "images": str(manifest.root)},
        out=out,
    )


def from_shards(config: DictConfig, index: FaissIndex) -> Described:
    """What `simsearch extract` left; it is read piece by piece when it is needed."""
    if config.run or config.images:
        raise ValueError("shards= know their run and images: leave run= and images= out")
    trusted = configs.trusts(config)
    shards = open_shards(Path(config.shards), trusted=trusted)
    if missing := shards.missing():
        raise ValueError(
            f"{len(missing)} of the {len(shards)} shards in {shards.folder} are missing; this goes on with them: "
            f"{shards.about['command']}"
        )
    out = place(config, shards.folder / "catalog", len(shards.items))
    encoder = configs.build_encoder(shards.about["config"], trusted=trusted)
    shards.load_encoder_state(encoder)
    check_kind(index, encoder)
    numbers = tqdm(range(len(shards)), unit="shard", desc="check")
    try:
        checked = [(number, shards.check(number)) for number in numbers]
    except ShardError as error:
        raise ValueError(f"{error}; this does it again: {shards.about['command']}") from error
    errors = [error for number in range(len(shards)) for error in shards.errors(number)]
    seen = dict(zip(shards.items["path"].to_pylist(), (shards.sizes >= 0).tolist(), strict=True))
    root = Path(shards.about["source"]["images"])
    lost = [e for e in errors if e.reason == "missing" and e.path and seen[str(e.path.relative_to(root))]]
    if len(lost) > MOST_GONE * sum(seen.values()):
        raise ValueError(
            f"{len(lost)} images were lost while they were described, as {printable(lost[0].path)}; this does them "
            f"again: {shards.about['command']}"
        )
    filled = [(number, count) for number, count in checked if count]
    if not filled:
        raise ValueError(f"none of the {len(shards.items)} images of the shards could be read: {errors[0]}")
    return Described(
        encoder=encoder,
        config=shards.about["config"],
        counts=[count for _, count in filled],
        vectors=lambda part: shards.vectors(filled[part][0]),
        items=(shards.catalog_items(number) for number, _ in filled),
        errors=errors,
        rejected=(),
        skipped=shards.about["skipped"],
        source=shards.about["source"],
        out=out,
    )


def check_kind(index: FaissIndex, encoder: nn.Module) -> None:
    """Raises ValueError for an index of floats with an encoder that gives codes, or the other way."""
    if index.is_binary != (encoder.bits is not None):
        kind = "codes: index=binary-flat" if encoder.bits else "float descriptors: index=flat"
        raise ValueError(f"index={index.factory} does not fit this run, which gives {kind} or another of that kind")


def report(out: Path, count: int, code_bytes: int, errors: list[ImageError], skipped: dict[str, int]) -> None:
    """Prints what was indexed and what was not; the catalog lists unreadable files in skipped.csv."""
    print(f"{count} images, {code_bytes} bytes each, in the catalog {out}")
    report_errors(errors, skipped)
    print(f"try next: simsearch search {shlex.quote(f'catalog={out}')} image=<image or folder>")


def report_errors(errors: list[ImageError], skipped: dict[str, int]) -> None:
    """Says on standard error how many files were left out, by reason."""
    for reason, n in Counter(error.reason for error in errors).most_common():
        example = next(error.path for error in errors if error.reason == reason)
        warn(f"skipped {n} files, {reason} (first {printable(example)})")
    for reason, n in skipped.items():
        print(f"left out {n} entries of the folder or table: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
