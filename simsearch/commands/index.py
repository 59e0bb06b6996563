"""simsearch index: a catalog of a folder or manifest of images, described by a run's encoder."""

from __future__ import annotations

import csv
import shlex
import sys
from collections import Counter
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from simsearch import runtime
from simsearch.data.manifest import load_images, read_manifest
from simsearch.files import replacing
from simsearch.images import ImageError, encode_thumbnail
from simsearch.search.catalog import THUMBNAIL, item_table, write_catalog
from simsearch.search.engine import encode


@runtime.command("index")
def main(config: DictConfig) -> None:
    run = runtime.open_run(Path(config.run))
    source = Path(config.images).resolve()
    manifest = read_manifest(source, Path(config.root) if config.root else None)
    if reserved := sorted({"rank", "score", THUMBNAIL} & set(manifest.attributes)):
        raise ValueError(f"{config.images} has the columns {', '.join(reserved)}, which a result has too: rename them")
    name = source.name if source.is_dir() else source.stem
    out = Path(config.out) if config.out else run.folder / "catalogs" / name
    index = runtime.build(runtime.plain(config)["index"])
    encoder = runtime.load_model(run).encoder.to(runtime.device(config.device))
    if index.is_binary != (encoder.bits is not None):
        kind = "codes: index=binary-flat" if encoder.bits else "float descriptors: index=flat"
        raise ValueError(f"index={index.factory} does not fit this run, which gives {kind} or another of that kind")

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
            errors += batch_errors
            bar.update(len(images) + len(batch_errors))
    if not rows:
        raise ValueError(f"none of the {len(manifest)} images of {config.images} could be read: {errors[0]}")

    order = sorted(range(len(rows)), key=rows.__getitem__)  # batches come by shape, a catalog as the manifest
    rows, thumbnails = [rows[i] for i in order], [thumbnails[i] for i in order]
    index.add(torch.cat(parts)[order])
    columns = {"path": [manifest.paths[row] for row in rows]}
    for name, values in manifest.attributes.items():
        columns[name] = [values[row] for row in rows]
    reasons = dict(Counter(error.reason for error in errors))
    write_catalog(
        out,
        index=index,
        items=item_table(columns, thumbnails),
        encoder=encoder,
        config=runtime.encoder_config(run.config),
        about={
            "source": {"run": run.folder.name, "images": str(manifest.root)},
            "skipped": reasons | manifest.skipped,
        },
    )
    report(out, len(rows), index.code_bytes, errors, manifest.skipped)


def report(out: Path, count: int, code_bytes: int, errors: list[ImageError], skipped: dict[str, int]) -> None:
    """Prints what was indexed and what was not; unreadable files are listed in <out>/skipped.csv."""
    print(f"{count} images, {code_bytes} bytes each, in the catalog {out}")
    for reason, n in Counter(error.reason for error in errors).most_common():
        example = next(error.path for error in errors if error.reason == reason)
        print(f"skipped {n} files, {reason} (first {example})", file=sys.stderr)
    for reason, n in skipped.items():
        print(f"left out {n} entries of the folder: {reason}", file=sys.stderr)
    if errors:
        with replacing(out / "skipped.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "reason", "detail"])
            writer.writerows([error.path, error.reason, error.detail] for error in errors)
    print(f"try next: simsearch search {shlex.quote(f'catalog={out}')} image=<image or folder>")


if __name__ == "__main__":
    main()
