"""simsearch calibrate: thresholds with which a catalog can reject a query, validated on other queries."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from simsearch import configs, program, terminal
from simsearch.commands.index import report_errors
from simsearch.data.manifest import Manifest
from simsearch.files import replacing, write_csv
from simsearch.functional.open_set import least_scores
from simsearch.search.calibration import (
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
from simsearch.search.calibration_sample import Describer, exact_vectors, outside_likeness, outside_sample, work_names
from simsearch.search.catalog import read_catalog, write_calibration
from simsearch.search.engine import Engine


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
    outside = outside_sample(Path(config.outside), config.sample, config.seed) if config.outside else None
    announce(config, engine, first, outside)
    describer = Describer(
        catalog,
        cache=config.cache,
        device=config.device,
        batch_size=config.batch_size,
        workers=config.workers,
        report=lambda errors: report_errors(errors, {}),
    )
    neighbours = neighbours_of(len(catalog))
    vectors = None
    if not catalog.index.keeps_vectors:
        positions, vectors = exact_vectors(catalog, config.images, positions, describer)
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
        unrelated, names = outside_likeness(engine, outside, neighbours, describer)
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
