"""simsearch calibrate: thresholds by which a catalog says no, and what they do to queries that did not choose them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from simsearch import runtime
from simsearch.commands.index import report_errors
from simsearch.data.manifest import Manifest, load_images, read_manifest
from simsearch.files import replacing
from simsearch.search.calibration import (
    Likeness,
    Threshold,
    calibrate,
    curve,
    halves,
    leave_work_out,
    likeness,
    neighbours_of,
    wilson,
)
from simsearch.search.catalog import Catalog, read_catalog, write_calibration
from simsearch.search.engine import encode
from simsearch.search.recommender import Recommender


@runtime.command("calibrate")
def main(config: DictConfig) -> None:
    catalog = read_catalog(Path(config.catalog), calibrated=False)
    recommender = Recommender(catalog)
    positions = chosen(len(catalog), config.sample, config.seed)
    neighbours = neighbours_of(len(catalog))
    own, match = leave_work_out(recommender, positions, neighbours)
    first = halves(work_names(recommender, positions))
    alone = match.isnan()
    if recommender.work_attribute is None:
        print(
            "note: the catalog does not say which items are of the same work (a column work or group_id): copies "
            "count as other works and raise the threshold of the same work",
            file=sys.stderr,
        )
    same_work = calibrate(match[~alone], own.top, first[~alone], first, config.rate, config.certainty)
    thresholds = {"same_work": same_work}
    curves = {}
    if (~alone & ~first).any():
        curves["same_work"] = curve(match[~alone & ~first], own.top[~first])

    if config.outside:
        strange, names = outside_likeness(config, catalog, recommender, neighbours)
        of_outside = halves(names)
        inside, outside = own.at_home(same_work.value), strange.at_home(same_work.value)
        thresholds["similar"] = calibrate(inside, outside, first, of_outside, config.rate, config.certainty)
        curves["similar"] = curve(inside[~first], outside[~of_outside])
    else:
        print("note: without outside=<folder of other images> there is no threshold for similar", file=sys.stderr)

    write_calibration(
        catalog.folder,
        {
            "catalog": catalog.fingerprint,
            "rate": config.rate,
            "certainty": config.certainty,
            "same_work": thresholds["same_work"].value,
            "similar": thresholds["similar"].value if "similar" in thresholds else None,
            "neighbours": neighbours,
            "weights": {name: part.weight for name, part in catalog.parts.items()},
            "negatives": {name: threshold.negatives for name, threshold in thresholds.items()},
            "held_out": {
                name: {"false": t.false, "of": t.of, "found": t.found, "matches": t.matches}
                for name, t in thresholds.items()
            },
        },
    )
    folder = catalog.folder / "calibration"
    runtime.show(results(thresholds, config.rate))
    print(f"thresholds: {catalog.folder / 'calibration.json'}")
    if curves:
        write_curves(folder / "curve.csv", curves)
        plot_curves(folder / "curve.png", curves, thresholds, config.rate)
        print(f"curves: {folder / 'curve.csv'}, {folder / 'curve.png'}")


def chosen(count: int, at_most: int, seed: int) -> Tensor:
    """Rising positions int64 (n,) of at most so many of `count` things, by chance."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:at_most].sort().values


def work_names(recommender: Recommender, positions: Tensor) -> list[str]:
    """A name for the work of each of these items: its own, or else the item's path."""
    items = recommender.catalog.items
    paths = items["path"].take(positions.numpy()).to_pylist()
    if recommender.work_attribute is None:
        return paths
    works = items[recommender.work_attribute].cast("string").take(positions.numpy()).to_pylist()
    return [work or path for work, path in zip(works, paths, strict=True)]


def outside_likeness(
    config: DictConfig, catalog: Catalog, recommender: Recommender, neighbours: int
) -> tuple[Likeness, list[str]]:
    """How images from outside and the catalog are alike, and their paths."""
    encoder = runtime.build_encoder(catalog.about["config"])
    catalog.load_encoder_state(encoder)
    encoder.to(runtime.device(config.device))
    manifest = read_manifest(Path(config.outside))
    rows = chosen(len(manifest), config.sample, config.seed).tolist()
    manifest = Manifest(manifest.root, tuple(manifest.paths[row] for row in rows))
    scores, names, errors = [], [], []
    batches = load_images(
        manifest,
        size=encoder.input_size,  # type: ignore[arg-type]
        fit=encoder.fit,  # type: ignore[arg-type]
        batch_size=config.batch_size,
        workers=config.workers,
    )
    for images, rows, unreadable in batches:
        errors += unreadable
        if len(images):
            queries = recommender.as_queries(encode(encoder, images))
            scores.append(recommender.search(queries, neighbours).scores)
            names += [manifest.paths[row] for row in rows.tolist()]
    report_errors(errors, {})
    if not names:
        raise ValueError(f"no image of {config.outside} could be read")
    return likeness(torch.cat(scores), neighbours), names


def write_curves(path: Path, curves: Mapping[str, np.ndarray]) -> None:
    """Writes the held-out curves as CSV."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "threshold", "recall", "false_match_rate", "precision"])
        for name, rows in curves.items():
            writer.writerows([name, *(f"{value:.6f}" for value in row)] for row in rows.tolist())


def plot_curves(path: Path, curves: Mapping[str, np.ndarray], thresholds: Mapping[str, Threshold], rate: float) -> None:
    """Writes a PNG: recall and precision of the held-out queries against their rate of false matches."""
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
        axes.axvline(rate, color="grey", linestyle=":", label=f"rate {rate:g}, score {thresholds[name].value:.3f}")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def results(thresholds: Mapping[str, Threshold], rate: float) -> Table:
    """Thresholds and what they do to the held-out half."""
    table = Table(title=f"At most {rate:g} false matches: thresholds, and what they do to the held-out half (95%)")
    for name in ("match", "threshold", "calibrated on", "false matches", "found"):
        table.add_column(name, justify="left" if name == "match" else "right")
    names = {"same_work": "the same work", "similar": "similar"}
    for name, t in thresholds.items():
        cells = [_share(t.false, t.of), _share(t.found, t.matches)]
        table.add_row(names[name], f"{t.value:.4f}", f"{t.negatives} queries", *cells)
    table.caption = (
        "the same work: found among items of works with more than one; false: items without their work. "
        "similar: found is how many items of the collection are like its other works; false: images from outside"
    )
    return table


def _share(count: int, of: int) -> str:
    if of == 0:
        return "-"
    low, high = wilson(count, of)
    return f"{count / of:.4f} ({low:.4f}-{high:.4f}) of {of}"


if __name__ == "__main__":
    main()
