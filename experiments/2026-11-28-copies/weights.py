"""What a weight of the part `copy` costs and gains beside the parts of model=art.

    python weights.py --art <art> --pairs near_duplicates.csv --others CATALOG --copy CATALOG --out weights.csv

The catalogs hold the same images, one described by model=art, one by experiment=art-copy. The score of two images is
the mean of their cosines in the first (weight 1) and in the second (--weights). R@1 and micro-AP of the pairs as in
pairs.py, of the artists that neither was trained on. Style P@10: the share of the 10 nearest images by other artists
that have a query's style, over all images of these artists.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from pairs import TEST, measure, share

from simsearch.files import replacing
from simsearch.search.catalog import Catalog, read_catalog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--art", type=Path, required=True, help="folder with metadata.csv (image_path, artist, style)")
    parser.add_argument("--pairs", type=Path, required=True, help="table of pairs: image_a, image_b")
    parser.add_argument("--others", type=Path, required=True)
    parser.add_argument("--copy", type=Path, required=True)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.6, 0.9, 1.5, 3.0, 9.0])
    parser.add_argument("--out", type=Path, required=True, help="a .csv for the numbers")
    args = parser.parse_args()
    with (args.art / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    at = {row["image_path"]: place for place, row in enumerate(rows)}
    with args.pairs.open(newline="") as file:
        pairs = torch.tensor([(at[row["image_a"]], at[row["image_b"]]) for row in csv.DictReader(file)])
    tested = torch.tensor([share(row["artist"]) < TEST for row in rows])
    others, copy = (vectors(read_catalog(folder, calibrated=False), rows) for folder in (args.others, args.copy))
    styles, artists = (codes([row[name] for row in rows]) for name in ("style", "artist"))
    measured = []
    for weight in args.weights:
        both = torch.cat([others, weight**0.5 * copy], 1) / (1 + weight) ** 0.5
        apart = pairs[tested[pairs].all(1)]
        right, precision = measure(both, torch.zeros(len(both)), apart, pairs)
        measured.append((weight, right, precision, same_style(both[tested], styles[tested], artists[tested])))
        print("weight {:g}: R@1 {:.3f}, micro-AP {:.3f}, style P@10 {:.3f}".format(*measured[-1]), flush=True)
    with replacing(args.out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("weight of copy", "R@1", "microAP", "style P@10"))
        writer.writerows([(f"{weight:g}", *(f"{value:.4f}" for value in rest)) for weight, *rest in measured])


def vectors(catalog: Catalog, rows: list[dict[str, str]]) -> torch.Tensor:
    """The stored vectors of the images in the order of the table."""
    positions = torch.tensor([catalog.position(row["image_path"]) for row in rows])
    return torch.nn.functional.normalize(catalog.index.rows(positions), dim=1)


def codes(values: list[str]) -> torch.Tensor:
    """A number for each value, the same for equal ones."""
    known = {value: number for number, value in enumerate(sorted(set(values)))}
    return torch.tensor([known[value] for value in values])


def same_style(descriptors: torch.Tensor, styles: torch.Tensor, artists: torch.Tensor) -> float:
    """P@10 by style among the images of other artists."""
    scores = (descriptors @ descriptors.T).masked_fill(artists[:, None] == artists, -torch.inf)
    return float((styles[scores.topk(10).indices] == styles[:, None]).double().mean())


if __name__ == "__main__":
    main()
