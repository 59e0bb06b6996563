"""Unit vectors in any number that behave like real descriptors, and the fit to descriptors that they come from.

    python vectors.py fit cifar=<features.npy> art=<catalog>     fitted/<name>.npz and vectors.csv

The model is a tree. A vector is the centre of one of 64 clusters, plus offsets that shrink by the factor `ratio` from
level to level: at each level a node has `branches` children, the first of which are the most popular. Items that share
many levels are near each other, so the tree gives clusters within clusters. Offsets have the spectrum of what the
clusters leave over. From the data come the mean, the principal axes, the clusters with their sizes, and the spectrum;
`ratio`, `branches` and the popularity are those of a small grid whose sample, as large as the data, is nearest to it in
intrinsic dimension, hubness and the distance to the 10th neighbour.

Rows come in blocks of 2^16 that depend only on seed and number, so that ten million of them need no memory.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import faiss
import numpy as np

HERE = Path(__file__).parent
BLOCK = 2**16
D, CLUSTERS, LEVELS, TABLE, NEIGHBOURS = 128, 64, 10, 2**14, 10
GRID = {"ratio": (0.7, 0.8, 0.9), "branches": (2, 4, 8, 16, 32), "popularity": (1.0, 2.0, 3.0)}


@dataclass(frozen=True)
class Fit:
    """What the generator needs. Rows of `basis` are principal axes; centres and spread are in their coordinates."""

    mean: np.ndarray  # (D,)
    basis: np.ndarray  # (D, D)
    centres: np.ndarray  # (CLUSTERS, D)
    shares: np.ndarray  # (CLUSTERS,)
    spread: np.ndarray  # (D,), deviations within clusters
    ratio: float
    branches: int
    popularity: float

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, **{k: np.asarray(v, dtype=np.float32) for k, v in asdict(self).items()})


def load(path: Path) -> Fit:
    with np.load(path, allow_pickle=False) as file:
        values = {name: file[name] for name in file.files}
    numbers = {name: float(values.pop(name)) for name in ("ratio", "popularity")}
    return Fit(branches=int(values.pop("branches")), **numbers, **values)


def _scales(ratio: float) -> np.ndarray:
    scales = ratio ** np.arange(LEVELS + 1)
    return scales / np.sqrt((scales**2).sum())


@cache
def _offsets(spread: bytes, ratio: float, seed: int) -> list[np.ndarray]:
    """The offsets of children at each level, float32 (TABLE, D) each."""
    rng = np.random.default_rng([seed, 2**31])
    offsets = rng.standard_normal((TABLE, D), dtype=np.float32) * np.frombuffer(spread, np.float32)
    return [np.float32(scale) * offsets for scale in _scales(ratio)[:-1]]


def block(fit: Fit, number: int, count: int = BLOCK, seed: int = 0) -> np.ndarray:
    """Rows number * 2^16 .. of the endless matrix, float32 (count, D), unit vectors."""
    rng = np.random.default_rng([seed, number])
    shares = fit.shares.astype(np.float64)
    node = rng.choice(CLUSTERS, size=count, p=shares / shares.sum())
    x = fit.centres[node]
    key = node.astype(np.uint64) + np.uint64(1)
    for scaled in _offsets(fit.spread.tobytes(), fit.ratio, seed):
        child = (fit.branches * rng.random(count) ** fit.popularity).astype(np.uint64)
        key = (key * np.uint64(fit.branches) + child + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x += scaled[((key >> np.uint64(40)) % np.uint64(TABLE)).astype(np.int32)]
    x += np.float32(_scales(fit.ratio)[-1]) * rng.standard_normal((count, D), dtype=np.float32) * fit.spread
    x = x @ fit.basis + fit.mean
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def take(fit: Fit, count: int, seed: int = 0) -> np.ndarray:
    """The first rows, float32 (count, D)."""
    parts = [block(fit, i, min(BLOCK, count - i * BLOCK), seed) for i in range(-(-count // BLOCK))]
    return np.concatenate(parts)


def reduced(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors of D principal components, as a whitening-free descriptor of D columns."""
    vectors = vectors.astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    mean = vectors.mean(0)
    _, axes = np.linalg.eigh(np.cov((vectors - mean).T.astype(np.float64)))
    x = (vectors - mean) @ axes[:, ::-1][:, :D].astype(np.float32)
    return np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def described(vectors: np.ndarray, queries: int = 4000) -> dict[str, float]:
    """What an index feels: eigenvalue decay, intrinsic dimension, hubness, how far neighbours are."""
    n, k = len(vectors), NEIGHBOURS
    values = np.linalg.eigvalsh(np.cov(vectors.T.astype(np.float64)))[::-1]
    share = values.cumsum() / values.sum()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    asked = np.random.default_rng(0).permutation(n)[: min(n, queries)]
    cosines, ids = index.search(vectors[asked], k + 11)
    cosines, ids = cosines[:, 1:], ids[:, 1:]
    distance = np.sqrt((2 - 2 * cosines).clip(1e-9))
    ratios = np.log(distance[:, -1:] / distance[:, :-1])
    counts = np.bincount(ids[:, :k].ravel(), minlength=n).astype(float)
    far = vectors[asked[:500]] @ vectors[asked[500:1000]].T
    return {
        "items": n,
        "variance_of_8": share[7],
        "variance_of_32": share[31],
        "participation": values.sum() ** 2 / (values**2).sum(),
        "intrinsic_dimension": float(np.median((k + 9) / ratios.sum(1))),  # Levina and Bickel 2004
        "skew_of_10_occurrence": float(((counts - counts.mean()) ** 3).mean() / counts.std() ** 3),
        "largest_10_occurrence": float(counts.max() / counts.mean()),
        "cosine_of_neighbour_10": float(np.median(cosines[:, k - 1])),
        "cosine_of_any": float(np.median(far)),
    }


def fitted(vectors: np.ndarray) -> Fit:
    mean = vectors.mean(0)
    _, axes = np.linalg.eigh(np.cov((vectors - mean).T.astype(np.float64)))
    basis = np.ascontiguousarray(axes[:, ::-1].T.astype(np.float32))
    x = np.ascontiguousarray((vectors - mean) @ basis.T)
    means = faiss.Kmeans(D, CLUSTERS, niter=20, seed=0)
    means.train(x)
    nearest = means.index.search(x, 1)[1][:, 0]
    shares = np.bincount(nearest, minlength=CLUSTERS) / len(x)
    spread = (x - means.centroids[nearest]).std(0)
    real = described(vectors)
    compared = ("intrinsic_dimension", "skew_of_10_occurrence", "cosine_of_neighbour_10")
    best: tuple[float, Fit] | None = None
    for ratio, branches, popularity in product(*GRID.values()):
        fit = Fit(mean, basis, means.centroids, shares, spread, ratio, branches, popularity)
        made = described(take(fit, min(len(vectors), 4000)))
        wanted = real if len(vectors) <= 4000 else described(vectors[:4000])
        error = sum(abs(np.log(max(made[name], 0.01) / max(wanted[name], 0.01))) for name in compared)
        if best is None or error < best[0]:
            best = (error, fit)
    assert best is not None
    return best[1]


def read(source: str) -> np.ndarray:
    """The descriptors in a .npy (maps are averaged) or in a catalog."""
    if source.endswith(".npy"):
        array = np.load(source, mmap_mode="r", allow_pickle=False)
        array = array.reshape(*array.shape[:2], -1)
        return np.concatenate([array[i : i + 1000].astype(np.float32).mean(2) for i in range(0, len(array), 1000)])
    import torch

    from simsearch.search.catalog import read_catalog

    catalog = read_catalog(Path(source), calibrated=False)
    return catalog.index.rows(torch.arange(len(catalog))).numpy()


def main() -> None:
    command, *sources = sys.argv[1:] or [""]
    if command != "fit":
        sys.exit(__doc__)
    rows = []
    for name, source in (argument.split("=", 1) for argument in sources):
        vectors = reduced(read(source))
        np.random.default_rng(0).shuffle(vectors)
        fit = fitted(vectors)
        fit.save(HERE / "fitted" / f"{name}.npz")
        settings = {key: getattr(fit, key) for key in GRID}
        for kind, some in (("real", vectors), ("generated", take(fit, len(vectors)))):
            rows.append({"descriptors": name, "kind": kind, **described(some), **settings})
        rotated = np.random.default_rng(1).standard_normal((len(vectors), D)).astype(np.float32)
        noise = rotated / np.linalg.norm(rotated, axis=1, keepdims=True)
        rows.append({"descriptors": name, "kind": "isotropic", **described(noise)})
        print(*rows[-3:], sep="\n", flush=True)
    with (HERE / "vectors.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
