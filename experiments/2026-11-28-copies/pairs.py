"""R@1 and micro-AP of known pairs of copies in a collection, for one or several runs.

    python pairs.py --art <art> --pairs near_duplicates.csv --out results.csv RUN [RUN ...]

Queries are the images of the pairs, the gallery is the whole collection without the query. R@1: the share of queries
whose nearest image is a partner. Micro-AP: the average precision of all pairs of images in one ranking by score, of
which the known ones are right (Pizzi et al. 2022). Both are given for all pairs, and for those of the artists that no
run was trained on (protocol art-artist), where the other known pairs are left out; these once more with scores from
which the means over the nearest images of the background are taken off. The background are the images of the other
artists.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from pathlib import Path

import numpy as np
import torch

import simsearch
from simsearch.files import replacing

TEST = 0.5  # share of the artists, by hash, as in conf/protocol/art-artist.yaml
BACKGROUND = 3  # nearest images of the background whose mean similarity is taken off
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="runs of simsearch train")
    parser.add_argument("--art", type=Path, required=True, help="folder with metadata.csv (image_path, artist)")
    parser.add_argument("--pairs", type=Path, required=True, help="table of pairs: image_a, image_b")
    parser.add_argument("--out", type=Path, required=True, help="a .csv for the numbers")
    args = parser.parse_args()
    with (args.art / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with args.pairs.open(newline="") as file:
        given = [(row["image_a"], row["image_b"]) for row in csv.DictReader(file)]
    at = {row["image_path"]: place for place, row in enumerate(rows)}
    pairs = torch.tensor([(at[a], at[b]) for a, b in given])
    tested = torch.tensor([share(row["artist"]) < TEST for row in rows])
    measured = []
    for run in args.runs:
        encoder = simsearch.load_encoder(run)
        vectors = encoder.describe([args.art / row["image_path"] for row in rows], batch_size=BATCH)
        apart = tested[pairs].all(1)
        for kind, chosen, background in (
            ("all", pairs, False),
            ("apart", pairs[apart], False),
            ("apart", pairs[apart], True),
        ):
            bias = mean_of_nearest(vectors, vectors[~tested], ~tested) if background else torch.zeros(len(vectors))
            right, precision = measure(vectors, bias, chosen, pairs)
            measured.append((run.name, kind, len(chosen), background, right, precision))
            print(*measured[-1], flush=True)
    with replacing(args.out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "pairs of", "pairs", "normalised", "R@1", "microAP"))
        writer.writerows([(*row[:4], *(f"{value:.4f}" for value in row[4:])) for row in measured])


def share(artist: str) -> float:
    """The number in [0, 1) by which art-artist divides the artists."""
    return (int.from_bytes(hashlib.sha256(f"part/0/{artist}".encode()).digest()[:8], "big") >> 11) / 2.0**53


def mean_of_nearest(vectors: torch.Tensor, background: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """The mean similarity of each vector to its nearest background images, without itself."""
    similarity = vectors @ background.T
    similarity[member.nonzero().flatten(), torch.arange(len(background))] = -torch.inf
    return similarity.topk(BACKGROUND).values.mean(1)


def measure(vectors: torch.Tensor, bias: torch.Tensor, pairs: torch.Tensor, known: torch.Tensor) -> tuple[float, float]:
    """R@1 and micro-AP of `pairs`; other known pairs are neither right nor wrong."""
    scores = vectors @ vectors.T - (bias[:, None] + bias[None, :]) / 2
    scores.fill_diagonal_(-torch.inf)
    kept = scores[pairs[:, 0], pairs[:, 1]]
    scores[known[:, 0], known[:, 1]] = scores[known[:, 1], known[:, 0]] = -torch.inf
    scores[pairs[:, 0], pairs[:, 1]] = scores[pairs[:, 1], pairs[:, 0]] = kept
    right = torch.zeros(scores.shape, dtype=torch.bool)
    right[pairs[:, 0], pairs[:, 1]] = right[pairs[:, 1], pairs[:, 0]] = True
    queries = torch.unique(pairs)
    first = right[queries, scores[queries].argmax(1)].double().mean()
    upper = torch.triu_indices(*scores.shape, 1)
    order = scores[upper[0], upper[1]].argsort(descending=True, stable=True)
    places = np.flatnonzero(right[upper[0], upper[1]][order].numpy())
    return float(first), float((np.arange(1, len(places) + 1) / (places + 1)).mean())


if __name__ == "__main__":
    main()
