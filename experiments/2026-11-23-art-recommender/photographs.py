"""Photographs of works against their catalog: is the work found, and is it called the same work?

    python experiments/2026-11-23-art-recommender/photographs.py --catalogs <catalog> ... --images outputs/art

Nobody photographed these works for us: `simsearch.data.rendered.paint.photograph` does it to the square centres of
their files (perspective, a part of the work cut away, light, reflection, blur, noise, JPEG), the same ones for every
catalog, one a work. Each is asked twice: with its work in the catalog, and with all images of its work left out,
where nothing may be called the same work. Writes photographs.csv, with 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from simsearch.data.manifest import Manifest, load_images, read_manifest
from simsearch.data.rendered.paint import photograph
from simsearch.models.encoder import device as device_of
from simsearch.search.calibration import image_a_work, wilson
from simsearch.search.catalog import read_catalog
from simsearch.search.describe import encode
from simsearch.search.engine import Engine
from simsearch.search.request import Request
from simsearch.search.verdicts import NONE, SAME_WORK, best_verdict

SIZE = 224
SHARES = ("first", "same_work", "answered", "first_and_none", "false_same_work")


def measure(folder: Path, manifest: Manifest, rows: list[int], device: str) -> dict[str, tuple[int, int]]:
    """Counts (hits, of) by share.

    first: an image of the photographed work leads. same_work: it leads and is called the same work. answered: an item
    is called the same work or similar. first_and_none: it leads, and nothing is. false_same_work: another work is
    called the same with the photographed one left out.
    """
    catalog = read_catalog(folder)
    thresholds = catalog.calibration
    if thresholds is None or thresholds["similar"] is None:
        raise ValueError(f"{folder} has no threshold of similar: simsearch calibrate catalog={folder} outside=<folder>")
    recommender = Engine(catalog)
    place = {path: number for number, path in enumerate(catalog.items["path"].to_pylist())}
    encoder = catalog.encoder.to(device_of(device))

    hits = dict.fromkeys(SHARES, 0)
    part = Manifest(manifest.root, tuple(manifest.paths[row] for row in rows))
    batches = load_images(part, size=SIZE, batch_size=32, workers=0)
    for images, local, unreadable in tqdm(batches, total=-(-len(rows) // 32), desc=str(folder), disable=None):
        if unreadable:
            raise ValueError(f"cannot be read: {unreadable}")
        of = [rows[number] for number in local.tolist()]
        shots = photograph(images, keys=[(row,) for row in of], seed=0, size=SIZE)
        own = [place[manifest.paths[row]] for row in of]
        for name, count in counts(recommender, encode(encoder, shots), own).items():
            hits[name] += count
    return {name: (count, len(rows)) for name, count in hits.items()}


def counts(recommender: Engine, vectors: Tensor, own: list[int]) -> dict[str, int]:
    """The hits of one batch of photographs, each of the work of the item at that position."""
    works = recommender.works
    hits = dict.fromkeys(SHARES, 0)
    for vector, item in zip(vectors, own, strict=True):
        answer = recommender.recommend(Request(vector[None]))
        right = works[answer.ids[0]] == works[item]
        hits["first"] += right
        hits["same_work"] += right and answer.verdicts[0] == SAME_WORK
        hits["answered"] += best_verdict(answer.verdicts) != NONE
        hits["first_and_none"] += right and best_verdict(answer.verdicts) == NONE
        without = recommender.recommend(Request(vector[None], exclude=(item,)))
        hits["false_same_work"] += best_verdict(without.verdicts) == SAME_WORK
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--catalogs", nargs="+", type=Path, required=True, help="calibrated catalogs of the images")
    parser.add_argument("--images", type=Path, required=True, help="what they were made of: a folder or a manifest")
    parser.add_argument("--count", type=int, default=1000, help="works to photograph (default 1000)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("photographs.csv"))
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.images)
    first = read_catalog(arguments.catalogs[0])
    row = {path: number for number, path in enumerate(manifest.paths)}
    taken = image_a_work(Engine(first).works, arguments.count, 0)
    rows = sorted(row[path] for path in first.items["path"].take(taken.numpy()).to_pylist())
    with arguments.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["catalog", "share", "value", "low", "high", "of"])
        for folder in arguments.catalogs:
            for name, (count, of) in measure(folder, manifest, rows, arguments.device).items():
                low, high = wilson(count, of)
                writer.writerow([folder.name, name, f"{count / of:.4f}", f"{low:.4f}", f"{high:.4f}", of])
    sys.stdout.write(arguments.out.read_text())


if __name__ == "__main__":
    main()
