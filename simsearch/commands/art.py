"""simsearch art: from a folder of paintings to a recommender in the browser. Each step is a command that is printed."""

from __future__ import annotations

import contextlib
import csv
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from simsearch import program
from simsearch.data.collection import Collection
from simsearch.data.image_folder import files_collection, open_ingest
from simsearch.data.manifest import INGEST_PLAN, read_manifest
from simsearch.data.protocols import ByHash
from simsearch.files import read_json, write_csv, write_json
from simsearch.saved_run import read_config

SAMPLE = ("data.works=7", "data.photographs=3", "data.size=128")
HELD_OUT = 2  # styles of the sample that the catalog lacks
FEW = 1000  # images to train on, below which their covariance is not to be trusted
MEASURABLE = ("artist", "style", "genre", "period")
LEAST_TRAINED = 10
OUTSIDE = "outside.json"  # what the catalog was calibrated with


@program.command("art")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch art`.

    Args:
        config: The config of conf/art.yaml.

    Raises:
        ValueError: If a value is invalid or a path does not exist.
    """
    if config.serve not in (True, False, None):
        raise ValueError(f"serve must be true, false or null, got {config.serve!r}")
    images = None if config.images is None else Path(config.images)
    outside = None if config.outside is None else Path(config.outside)
    for path in (images, outside):
        if path is not None and not path.exists():
            raise ValueError(f"{path} does not exist: give a folder of images, or a table that lists them")
    name = images.resolve().stem if images else "rendered"
    out = Path(config.out or Path(os.environ.get("SIMSEARCH_OUTPUTS", "outputs")) / "art" / name)
    make(images, outside, out, config.size)
    print(f"\npictures: {out / 'recommendations.png'}, {out / 'collection' / 'contact-sheet.png'}")
    serve(out, config.port, now=sys.stdout.isatty() if config.serve is None else config.serve)


def make(images: Path | None, outside: Path | None, out: Path, size: int | None) -> None:
    """Writes the collection, the run, the catalog and a picture of recommendations to `out`.

    Args:
        images: Folder or table of images. None means the rendered sample.
        outside: Folder or table of images that are not in the collection, for calibration. None keeps a calibration
            that is there.
        out: Output folder. Steps that are already finished there are skipped.
        size: Side in pixels at which the network sees images. None means that of a finished run, or else 224, or 128
            for the sample.

    Raises:
        ValueError: If `out` belongs to other images or another size, or if a step fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    usual = 224 if images else 128
    if images is None:
        images, outside = out / "paintings.csv", out / "others.csv"
        if not outside.exists():
            step("draw a sample", "data", "export", "data=rendered", *SAMPLE, f"out={out}")
            divide(out / "manifest.csv", images, outside)
    collection, run, catalog = out / "collection", out / "run", out / "catalog"
    if done := (collection / "ingest.json").is_file():
        if (before := read_json(collection / "ingest.json")["source"]) != str(images.resolve()):
            raise ValueError(f"{out} was made of the images in {before}: give another out=")
        print(f"exists already: {collection}")
        tell_of_new(images, collection)
    else:
        step("check, clean and decode", "data", "ingest", f"images={images}", f"out={collection}")
    done = done and (run / "metrics.json").is_file()
    if done:
        print(f"exists already: {run}")
        if size is not None and size != (before := read_config(run / "config.yaml")["backbone"]["size"]):
            raise ValueError(f"{out} was made with size={before}: leave size= out, or give another out=")
    else:
        shutil.rmtree(run, ignore_errors=True)  # an interrupted run; its descriptors are in the cache
        arguments = ["data=art", f"data.source={collection}", "model=art", f"backbone.size={size or usual}"]
        arguments += [*describe_split(collection), "catalog.write=false", "logger.mode=disabled", f"run_dir={run}"]
        step("learn what tells artworks apart", "train", *arguments)
    if done := done and (catalog / "catalog.json").is_file():
        print(f"exists already: {catalog}")
    else:
        step("describe all images", "index", f"run={run}", f"images={collection}", "verify=sift", f"out={catalog}")
    asked = None if outside is None else str(outside.resolve())
    calibrated = done and (catalog / "calibration.json").is_file()
    if not calibrated or (asked is not None and asked != _outside(out)):
        arguments = [f"catalog={catalog}"]
        if outside is None:
            print("\nwithout outside= the catalog can recognise the same work, but has no threshold for similar works")
        else:
            arguments.append(f"outside={outside}")
        step("calibrate when to say no", "calibrate", *arguments)
        write_json(out / OUTSIDE, {"outside": asked})
    if not done or not (out / "recommendations.png").is_file():
        step(
            "recommend",
            "recommend",
            f"catalog={catalog}",
            "id=position:0",
            "force=true",
            f"figure={out}/recommendations.png",
        )


def tell_of_new(images: Path, collection: Path) -> None:
    """Says on standard error if a folder has more images than when the collection was made.

    Args:
        images: Folder or table of images.
        collection: The collection that was made of them.
    """
    if not images.is_dir():
        return
    before, now = read_json(collection / INGEST_PLAN)["images"], len(read_manifest(images).paths)
    if now > before:
        print(
            f"note: {images} has {now} images, and had {before} when {collection} was made: give another out= for all",
            file=sys.stderr,
        )


def _outside(out: Path) -> str | None:
    """The images from outside with which the catalog was calibrated. None if there were none, or if it is not known."""
    return read_json(out / OUTSIDE)["outside"] if (out / OUTSIDE).is_file() else None


def step(what: str, *command: str) -> None:
    """Prints and runs a simsearch command, then prints its duration.

    Args:
        what: What the step does.
        command: The command and its arguments.

    Raises:
        ValueError: If the command fails.
    """
    print(f"\n--- {what}\n$ {shlex.join(['simsearch', *command])}", flush=True)
    start = time.perf_counter()
    if status := subprocess.run([sys.executable, "-m", "simsearch", *command]).returncode:
        raise ValueError(f"that step failed with status {status}; give the same command again to continue from there")
    print(f"--- {time.perf_counter() - start:.1f} s", flush=True)


def divide(manifest: Path, inside: Path, outside: Path) -> None:
    """Splits a table into two: one without the last styles, one with only these.

    Args:
        manifest: The table.
        inside: Table to write, without the last styles.
        outside: Table to write, with the last styles.
    """
    with manifest.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    held = sorted({row["style"] for row in rows})[-HELD_OUT:]
    for path, kept in ((inside, False), (outside, True)):
        chosen = (row.values() for row in rows if (row["style"] in held) == kept)
        write_csv(path, reader.fieldnames or (), chosen, exact=True)


# -------------------------------------------------------------------------------- what can be measured


def describe_split(folder: Path) -> list[str]:
    """The arguments of `simsearch train` by which this collection can be split and measured. The choice is printed.

    The first that fits is taken: disjoint artists (the default); an artist, a style, a genre or a period on both sides;
    or, without any of these, a run that is not measured and trains on most images.

    Args:
        folder: Folder of the collection.

    Raises:
        ValueError: If there are too few works.
    """
    manifest = read_manifest(folder)
    collection = files_collection(folder.name, manifest, open_ingest(folder, manifest, 1))
    if trained := trains(collection, "artist", "artist"):
        arguments, said = [], "with artists kept apart: no artist of a query was trained on (protocol=art-artist)"
    else:
        for attribute in MEASURABLE:
            if trained := trains(collection, attribute, None):
                arguments = ["protocol=art-artist-random"]
                if attribute != "artist":
                    arguments += [f"protocol.attribute={attribute}", f"protocol.name=art-{attribute}-random"]
                said = f"by {attribute}, whose works are trained on and searched: too few to keep them apart"
                break
        else:
            arguments = ["protocol=by-attribute", "protocol.attribute=work", "protocol.group=work"]
            arguments += ["protocol.evaluation=0.2", "protocol.validation=0.2"]
            works = len(collection.classes[collection.attributes.index("work")])
            if works < 4:
                raise ValueError(f"{works} works are too few for a recommender: give at least 4")
            trained = round(0.6 * len(collection))
            said = f"not by artist or style, known of too few of the {len(collection)} images: nothing to measure"
    print(f"\nmeasured {said}; {trained} images train", flush=True)
    if trained < FEW:
        arguments += [f"+model.encoders.{part}.whitening.shrinkage=0.1" for part in ("content", "style", "colour")]
    return arguments


def trains(collection: Collection, attribute: str, part: str | None) -> int:
    """The number of training images if an attribute defines relevance. 0 if it cannot be measured or leaves too few.

    Args:
        collection: The collection.
        attribute: The attribute.
        part: The attribute that is split, or None.
    """
    try:
        split = ByHash(name="", attribute=attribute, part=part, junk="work").split(collection)
    except ValueError:
        return 0
    return len(split.train) if len(split.train) >= LEAST_TRAINED else 0


# ----------------------------------------------------------------------------------------- the browser


def serve(out: Path, port: int, *, now: bool) -> None:
    """Serves the catalog until Ctrl-C, or prints how to.

    Args:
        out: Output folder of `make`.
        port: Port of the server.
        now: Serve now.
    """
    root = read_json(out / "collection" / "ingest.json")["root"]
    command = ["serve", f"catalog={out / 'catalog'}", f"root={root}", f"port={port}"]
    if now:
        with contextlib.suppress(KeyboardInterrupt):
            step("serve, until Ctrl-C", *command)
    else:
        print(f"your recommender in the browser: {shlex.join(['simsearch', *command])}")


if __name__ == "__main__":
    main()
