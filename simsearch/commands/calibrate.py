"""simsearch calibrate: thresholds with which a catalog can reject a query, validated on other queries."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from simsearch import configs, program, terminal
from simsearch.cache import ArrayCache
from simsearch.commands.index import report_errors
from simsearch.data.manifest import Manifest, load_images, read_manifest
from simsearch.data.presence import Presence
from simsearch.files import replacing, write_csv
from simsearch.functional.open_set import least_scores
from simsearch.images import MAX_BYTES
from simsearch.models.encoder import device
from simsearch.search.calibration import (
    Likeness,
    Threshold,
    calibrate,
    curve,
    halves,
    image_a_work,
    leave_work_out,
    neighbours_of,
    promised,
    wilson,
)
from simsearch.search.catalog import Catalog, read_catalog, write_calibration
from simsearch.search.describe import batches_of
from simsearch.search.describe import describe as images_described
from simsearch.search.engine import Engine

_BLOCK = 256  # queries that are searched together


@program.command("calibrate")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch calibrate`.

    Args:
        config: The config of conf/calibrate.yaml.
    """
    least_scores(config.rate, config.certainty)  # checks rate and certainty
    catalog = read_catalog(Path(config.catalog), calibrated=False, trusted=configs.trusts(config))
    engine = Engine(catalog)
    positions = image_a_work(engine, config.sample, config.seed)
    first = halves(work_names(engine, positions))
    outside = read_outside(config) if config.outside else None
    announce(config, engine, first, outside)
    describe = Describer(config, catalog)
    neighbours = neighbours_of(len(catalog))
    vectors = None
    if not catalog.index.keeps_vectors:
        positions, vectors = exact_vectors(config, catalog, positions, describe)
        first = halves(work_names(engine, positions))
    own, match = leave_work_out(engine, positions, neighbours, vectors)
    alone = match.isnan()
    same_work = calibrate(match[~alone], own.sameness, first[~alone], first, config.rate, config.certainty, paired=True)
    thresholds = {"same_work": same_work}
    curves = {}
    if (~alone & ~first).any():
        curves["same_work"] = curve(match[~alone & ~first], own.sameness[~first])
    floor = None
    if outside is not None:
        unrelated, names = outside_likeness(engine, outside, neighbours, describe)
        of_outside, at_home, away = halves(names), own.similarity, unrelated.similarity
        floor = max(0.0, float(unrelated.top.median()))  # half of them exceed it
        thresholds["similar"] = calibrate(at_home, away, first, of_outside, config.rate, config.certainty, paired=False)
        curves["similar"] = curve(at_home[~first], away[~of_outside])
        copies = (unrelated.sameness > same_work.values[0]).nonzero()[:, 0].tolist()
        if len(copies) > thresholds["similar"].rate * len(names):
            say(
                f"{len(copies)} of {len(names)} images from outside are as close as the same work: they may be in "
                "the collection "
                f"({', '.join(names[row] for row in copies[:3])}, ...). If they are, give others"
            )

    write_calibration(
        catalog.folder,
        {
            "catalog": catalog.fingerprint,
            "asked": config.rate,
            "rate": {name: t.rate for name, t in thresholds.items()},
            "certainty": config.certainty,
            "same_work": same_work.values,
            "similar": thresholds["similar"].values if "similar" in thresholds else None,
            "floor": floor,
            "neighbours": neighbours,
            "weights": {name: part.weight for name, part in catalog.parts.items()},
            "units": {name: t.units for name, t in thresholds.items()},
            "held_out": {
                name: {"false": t.false, "of": t.of, "found": t.found, "matches": t.matches}
                for name, t in thresholds.items()
            },
        },
    )
    folder = catalog.folder / "calibration"
    terminal.show(results(thresholds))
    print(f"thresholds: {catalog.folder / 'calibration.json'}")
    if curves:
        write_curves(folder / "curve.csv", curves)
        plot_curves(folder / "curve.png", curves, thresholds)
        print(f"curves: {folder / 'curve.csv'}, {folder / 'curve.png'}")


def announce(config: DictConfig, engine: Engine, first: Tensor, outside: Manifest | None) -> None:
    """Prints on standard error, before the work starts, what the calibration will lack and which rates it can promise.

    Args:
        config: The command's config.
        engine: The engine of the catalog.
        first: bool (n,), which works belong to the calibrating half.
        outside: Unrelated images, or None.
    """
    if engine.work_attribute is None:
        say(
            "the catalog does not record which items show the same work (column work or group_id): copies count as "
            "other works and raise the threshold of the same work"
        )
    counted = {"same work": (int(first.sum()), True, "works")}
    if outside is None:
        say('"similar" gets no threshold without outside=<folder of other images>')
    else:
        counted["similar"] = (int(halves(outside.paths).sum()), False, "images from outside")
    for name, (count, paired, what) in counted.items():
        rate, _ = promised(config.rate, count, config.certainty, paired=paired)
        if rate > config.rate:
            needed = least_scores(config.rate, config.certainty) * (2 if paired else 1)
            say(
                f'"{name}" is calibrated at a rate of {rate:.3g}, not {config.rate:g}: {count} {what} in the '
                f"calibrating half allow no lower rate with a certainty of {config.certainty:g}; it takes {needed}"
            )


def say(what: str) -> None:
    """Prints a line on standard error.

    Args:
        what: The text.
    """
    print(f"note: {what}", file=sys.stderr, flush=True)


def chosen(count: int, at_most: int, seed: int) -> Tensor:
    """A random subset of at most `at_most` positions from range(count), ascending, int64 (n,).

    Args:
        count: Number of positions.
        at_most: Largest size of the subset.
        seed: Seed of the random choice.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:at_most].sort().values


def work_names(engine: Engine, positions: Tensor) -> list[str]:
    """A name for the work of each item: the work's own name, else the item's path.

    Args:
        engine: The engine of the catalog.
        positions: Positions of the items.
    """
    items = engine.catalog.items
    paths = items["path"].take(positions.numpy()).to_pylist()
    if engine.work_attribute is None:
        return paths
    works = items[engine.work_attribute].cast("string").take(positions.numpy()).to_pylist()
    return [work or path for work, path in zip(works, paths, strict=True)]


def read_outside(config: DictConfig) -> Manifest:
    """A random choice of the unrelated images, without duplicates by content.

    Args:
        config: The command's config.
    """
    manifest = read_manifest(Path(config.outside))
    once: dict[str, str] = {}
    for row in chosen(len(manifest), config.sample, config.seed).tolist():
        once.setdefault(content_digest(manifest.root / manifest.paths[row]), manifest.paths[row])
    return Manifest(manifest.root, tuple(once.values()))


class Describer:
    """Describes files with a catalog's encoder, which is built when it is needed. An interrupted run can be continued.

    Args:
        config: The command's config.
        catalog: The catalog.
    """

    def __init__(self, config: DictConfig, catalog: Catalog) -> None:
        self.config, self.catalog = config, catalog

    def __call__(self, manifest: Manifest) -> tuple[list[int], Tensor]:
        """Rows of the files that can be read, ascending, and their descriptors (n, width) in the form of queries."""
        digests = [content_digest(manifest.root / path) for path in manifest.paths]
        catalog, index = self.catalog, self.catalog.index
        kind, width = ("uint8", (index.bits or 0) // 8) if index.is_binary else ("float32", int(index.dimension or 0))
        size = width * np.dtype(kind).itemsize
        # A row: a descriptor's bytes, and whether there is one.
        stored = ArrayCache(self.config.cache).get(
            {"encoder": catalog.about["encoder_fingerprint"], "files": digests},
            (len(manifest), size + 1),
            "uint8",
            lambda rows, start: self._fill(manifest, rows, start),
        )
        readable = np.flatnonzero(stored[:, size])
        missing = [manifest.paths[row] for row in np.flatnonzero(stored[:, size] == 0)]
        if missing:  # again, for the errors of these files
            part = Manifest(manifest.root, tuple(missing))
            report_errors([error for *_, errors in load_images(part, size=32) for error in errors], {})
        vectors = np.ascontiguousarray(stored[readable, :size]).view(kind)
        return readable.tolist(), torch.from_numpy(vectors)

    def _fill(self, manifest: Manifest, rows: np.ndarray, start: int) -> Iterator[int]:
        encoder = self.catalog.encoder.to(device(self.config.device))
        presence = Presence(manifest.root, manifest.paths)
        step = 8 * self.config.batch_size
        with tqdm(total=len(rows), initial=start, unit="img", desc="describe") as bar:
            for begin in range(start, len(rows), step):
                part = Manifest(manifest.root, manifest.paths[begin : begin + step])
                batches = batches_of(encoder, part, batch_size=self.config.batch_size, workers=self.config.workers)
                found = images_described(encoder, batches, presence=presence, advance=bar.update)
                if len(found):
                    data = found.vectors.contiguous().numpy().view(np.uint8)
                    at = begin + found.rows.numpy()
                    rows[at, :-1], rows[at, -1] = data, 1
                yield begin + len(part)


@functools.cache
def content_digest(path: Path) -> str:
    """32 hex digits of an image file's content. The path if it is not a file or too large for an image.

    Args:
        path: The file.
    """
    try:
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError:
        pass
    return f"unreadable {path}"


def exact_vectors(
    config: DictConfig, catalog: Catalog, positions: Tensor, describe: Describer
) -> tuple[Tensor, Tensor]:
    """Positions of the items whose files can be read, and their descriptors in the form of queries, not as stored.

    Args:
        config: The command's config.
        catalog: The catalog.
        positions: int64 (n,), positions of the items.
        describe: Describes files.

    Raises:
        ValueError: If the index stores vectors only approximately and no images are given, or if no item is among them.
    """
    if not config.images:
        raise ValueError(
            f"the index {catalog.index.factory} stores vectors only approximately, unlike those of queries: give "
            "images=<what the catalog was made of>, so that the sampled works are described like queries"
        )
    paths = catalog.items["path"].take(positions.numpy()).to_pylist()
    rows, vectors = describe(Manifest(read_manifest(Path(config.images)).root, tuple(paths)))
    if not rows:
        raise ValueError(f"no item of the catalog {catalog.folder} is in {config.images}: give what it was made of")
    return positions[rows], vectors


def outside_likeness(
    engine: Engine, manifest: Manifest, neighbours: int, describe: Describer
) -> tuple[Likeness, list[str]]:
    """The likeness of unrelated images and the catalog, and the paths of these images.

    Args:
        engine: The engine of the catalog.
        manifest: The unrelated images.
        neighbours: Number of neighbours that a background averages over.
        describe: Describes files.

    Raises:
        ValueError: If no image can be read.
    """
    rows, vectors = describe(manifest)
    if not rows:
        raise ValueError(f"no image of {manifest.root} could be read")
    nothing = torch.empty(0)
    blocks = engine.as_queries(vectors).split(_BLOCK)
    tops, backgrounds = zip(*(engine.stand_out(block, neighbours, nothing) for block in blocks), strict=True)
    return Likeness(torch.cat(tops), torch.cat(backgrounds)), [manifest.paths[row] for row in rows]


def write_curves(path: Path, curves: Mapping[str, np.ndarray]) -> None:
    """Writes the held-out curves as CSV.

    Args:
        path: The file to write.
        curves: Rows as of `simsearch.search.calibration.curve`, by kind of match.
    """
    rows = ((name, *(f"{value:.6f}" for value in row)) for name, curve in curves.items() for row in curve.tolist())
    write_csv(path, ["kind", "threshold", "recall", "false_match_rate", "precision"], rows)


def plot_curves(path: Path, curves: Mapping[str, np.ndarray], thresholds: Mapping[str, Threshold]) -> None:
    """Writes a PNG of recall and precision of the held-out queries against their false-match rate.

    Args:
        path: The file to write.
        curves: Rows as of `simsearch.search.calibration.curve`, by kind of match.
        thresholds: The thresholds by kind of match.
    """
    from matplotlib.figure import Figure  # half a second that --help need not wait

    figure = Figure(figsize=(5.5 * max(1, len(curves)), 4), layout="constrained")
    titles = {"same_work": "the same work", "similar": "similar (against images from outside)"}
    for place, (name, rows) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), place, xlabel="false matches", ylim=(0, 1.02), title=titles[name])
        axes.set_xscale("log")
        least = 1 / max(1, thresholds[name].of)  # one false match
        shown = np.maximum(rows[:, 2], least / 2)  # none is drawn left of one
        axes.plot(shown, rows[:, 1], label="recall")
        axes.plot(shown, rows[:, 3], label="precision")
        rate, value = thresholds[name].rate, thresholds[name].values[0]
        axes.axvline(rate, color="grey", linestyle=":", label=f"rate {rate:.3g}, threshold {value:.3f}")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def results(thresholds: Mapping[str, Threshold]) -> Table:
    """A table of the thresholds and their effect on the held-out half.

    Args:
        thresholds: The thresholds by kind of match.
    """
    table = Table(title="Thresholds for a rate of false matches, and their effect on the held-out half (95%)")
    for name in ("match", "rate", "threshold", "calibrated on", "false matches", "found", "examples"):
        table.add_column(name, justify="left" if name == "match" else "right")
    names = {"same_work": "the same work", "similar": "similar"}
    for name, t in thresholds.items():
        units = f"{t.units} {'pairs of works' if t.per_unit == 2 else 'images'}"
        false, found = _share(t.false, t.of, t.per_unit), _share(t.found, t.matches)
        table.add_row(names[name], f"{t.rate:.3g}", f"{t.values[0]:.4f}", units, false, found, f"{len(t.values)}")
    table.caption = (
        "Each work counts with one image. The same work: found are works with several images; false matches are "
        "measured without the work itself. Similar: found are images that are like other works of the collection; "
        "false "
        "matches are images from outside. Examples: up to this number, a match of any example keeps the rate; of more "
        "examples, several must agree."
    )
    return table


def _share(count: int, of: int, per_unit: int = 1) -> str:
    """A proportion with its interval. `per_unit` of the counted things form one independent draw."""
    if of == 0:
        return "-"
    low, high = wilson(count / per_unit, of / per_unit)
    return f"{count / of:.4f} ({low:.4f}-{high:.4f}) of {of}"


if __name__ == "__main__":
    main()
