"""simsearch calibrate: thresholds with which a catalog can reject a query, validated on other queries."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
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
    verify_without_work,
    wilson,
)
from simsearch.search.calibration_sample import (
    Describer,
    exact_vectors,
    local_queries,
    outside_likeness,
    outside_sample,
    work_names,
)
from simsearch.search.catalog import read_catalog, write_calibration
from simsearch.search.engine import Engine
from simsearch.search.local_features import describe_queries
from simsearch.search.outcomes import OUTCOMES, Photographs, Shares, ask, read_photographs, shares
from simsearch.search.query_regions import regions_of
from simsearch.search.request import Regions
from simsearch.types import LocalFeatures

# What the rate of each kind of match is a rate of.
_UNITS = {
    "same_work": "works that are not in the catalog, asked for by one image each",
    "verified": "works that are not in the catalog, asked for by one image each",
    "similar": "images from outside, one of each work where the table names works",
}
T = TypeVar("T")


@program.command("calibrate")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch calibrate`.

    Args:
        config: The config of conf/calibrate.yaml.
    """
    least_scores(config.rate, config.certainty)  # checks rate and certainty
    catalog = read_catalog(Path(config.catalog), calibrated=False, trusted=configs.trusts(config))
    engine = Engine(catalog)
    positions = image_a_work(engine.works, config.sample, config.seed)
    first = halves(work_names(engine, positions))
    outside = outside_sample(Path(config.outside), config.sample, config.seed) if config.outside else None
    photographs = read_photographs(Path(config.photographs), engine) if config.photographs else None
    announce(config, engine, first, outside, photographs)
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
    alone = match.top.isnan()
    same, floor = match.sameness, None
    thresholds: dict[str, Threshold] = {}
    curves = {}
    if outside is not None:
        unrelated, names = outside_likeness(engine, outside, neighbours, describer)
        of_outside, at_home, away = halves(names), own.similarity, unrelated.similarity
        floor = max(0.0, float(unrelated.top.median()))  # half of them exceed it
        similar = calibrate(at_home, away, first, of_outside, config.rate, config.certainty, paired=False)
        thresholds["similar"], curves["similar"] = similar, curve(at_home[~first], away[~of_outside])
        same = same.masked_fill(~match.similar(similar, floor), -torch.inf)  # not called the same work
    thresholds["same_work"] = calibrate(
        same[~alone], own.sameness, first[~alone], first, config.rate, config.certainty, paired=True
    )
    if catalog.verification is not None and config.images:
        local = local_queries(catalog, catalog.verification, config.images, positions, config.workers)
        strangers, verified = verify_without_work(engine, positions, local, vectors)
        thresholds["verified"] = calibrate(
            verified[~alone], strangers, first[~alone], first, config.rate, config.certainty, paired=True
        )
    if (~alone & ~first).any():
        curves["same_work"] = curve(same[~alone & ~first], own.sameness[~first])
    if outside is not None:
        copies = (unrelated.sameness > thresholds["same_work"].values[0]).nonzero()[:, 0].tolist()
        if len(copies) > thresholds["similar"].rate * len(names):
            say(
                f"{len(copies)} of {len(names)} images from outside are as close as the same work: they may be in "
                "the collection "
                f"({', '.join(names[row] for row in copies[:3])}, ...). If they are, give others"
            )

    thresholds, curves = in_order(thresholds), in_order(curves)
    calibration = {
        "catalog": catalog.fingerprint,
        "asked": config.rate,
        "rate": {name: t.rate for name, t in thresholds.items()},
        "of": {name: _UNITS[name] for name in thresholds},
        "certainty": config.certainty,
        "same_work": thresholds["same_work"].values,
        "similar": thresholds["similar"].values if "similar" in thresholds else None,
        "floor": floor,
        "neighbours": neighbours,
        "weights": {name: part.weight for name, part in catalog.parts.items()},
        "units": {name: t.units for name, t in thresholds.items()},
        "held_out": {
            name: {"false": t.false, "of": t.of, "found": t.found, "matches": t.matches}
            for name, t in thresholds.items()
        },
        "coverage": {name: t.coverage for name, t in thresholds.items()},
    }
    if "verified" in thresholds:
        calibration["verified"] = thresholds["verified"].values
    folder = catalog.folder / "calibration"
    tables = [results(thresholds, config.certainty)]
    (folder / "photographs.csv").unlink(missing_ok=True)  # of an earlier calibration
    if photographs is not None:
        calibrated = Engine(replace(catalog, calibration=calibration))
        groups = measure_photographs(calibrated, photographs, describer, folder / "photographs.csv")
        calibration["photographs"] = {name: asdict(group) for name, group in groups.items()}
        tables.append(photographs_table(groups))
    write_calibration(catalog.folder, calibration)
    for table in tables:
        terminal.show(table)
    print(f"thresholds: {catalog.folder / 'calibration.json'}")
    if photographs is not None:
        print(f"photographs: {folder / 'photographs.csv'}")
    if curves:
        write_curves(folder / "curve.csv", curves)
        plot_curves(folder / "curve.png", curves, thresholds)
        print(f"curves: {folder / 'curve.csv'}, {folder / 'curve.png'}")


def in_order(kinds: Mapping[str, T]) -> dict[str, T]:
    """The values by kind of match, the same work first.

    Args:
        kinds: Values by kind of match.
    """
    return {name: kinds[name] for name in _UNITS if name in kinds}


def announce(
    config: DictConfig, engine: Engine, first: Tensor, outside: Manifest | None, photographs: Photographs | None
) -> None:
    """Prints on standard error, before the work starts, what the calibration will lack and which rates it can promise.

    Args:
        config: The command's config.
        engine: The engine of the catalog.
        first: bool (n,), which works belong to the calibrating half.
        outside: Unrelated images, or None.
        photographs: Photographs whose works are known, or None.
    """
    if engine.work_attribute is None:
        say(
            "the catalog does not record which items show the same work (column work or group_id): copies count as "
            "other works and raise the threshold of the same work"
        )
    if photographs is not None and (names := photographs.missing(engine)):
        say(
            f"{len(names)} works of the photographs are not in the catalog ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}): whatever is called the same work as they are is false"
        )
    if engine.catalog.verification is not None and not config.images:
        say(
            "the rate is that of cosines alone: what verification calls the same work needs images=<what the catalog "
            "was made of> to be calibrated, since queries are described from whole images"
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


def measure_photographs(
    engine: Engine, photographs: Photographs, describer: Describer, path: Path
) -> dict[str, Shares]:
    """How often photographs of works are found, by whether the catalog has the work. Writes the outcome of each as CSV.

    Args:
        engine: The engine of the calibrated catalog.
        photographs: The photographs.
        describer: Describes files.
        path: The CSV file to write.

    Raises:
        ValueError: If no photograph can be read.
    """
    rows, vectors = describer(photographs.manifest)
    if not rows:
        raise ValueError(f"no photograph of {photographs.manifest.root} could be read")
    own = [photographs.works[row] for row in rows]
    verification = engine.catalog.verification
    files = [photographs.manifest.root / photographs.manifest.paths[row] for row in rows]
    local: Iterable[tuple[LocalFeatures, ...]] = ()
    regions: Iterable[Regions | None] = ()
    if verification is not None:
        local = describe_queries(files, verification)
        regions = [regions_of(file, engine.catalog.encoder, verification) for file in files]
    answers, outcomes = ask(engine, vectors, own, local, regions)
    names = [photographs.manifest.paths[row] for row in rows]
    units = photographs.units[rows].tolist()
    table = []
    for row, name, answer, said in zip(rows, names, answers, outcomes, strict=True):
        best = engine.names.of(answer.ids[:1].tolist())
        score = [f"{value:.6f}" for value in answer.scores[:1].tolist()]
        table.append(
            [name, "; ".join(photographs.names[row]), said, *(best or [""]), *(score or [""]), *answer.verdicts[:1]]
        )
    write_csv(path, ["path", "work", "outcome", "first", "score", "verdict"], table)
    groups = {}
    for group, kept in (
        ("in_catalog", [bool(works) for works in own]),
        ("elsewhere", [not works for works in own]),
    ):
        if any(kept):
            picked = ([one for one, keep in zip(values, kept, strict=True) if keep] for values in (outcomes, units))
            groups[group] = shares(*picked)
    return groups


def photographs_table(groups: Mapping[str, Shares]) -> Table:
    """A table of the outcomes of photographs.

    Args:
        groups: The shares of the outcomes, as `measure_photographs` returns them.
    """
    table = Table(title="Photographs whose works are known: what the catalog says (95%, by work)")
    table.add_column("works are", no_wrap=True)
    for name in ("works", "photographs", *OUTCOMES):
        table.add_column(name, justify="right")
    names = {"in_catalog": "in the catalog", "elsewhere": "elsewhere"}
    for name, group in groups.items():
        said = {key: f"{mean:.4f} ({low:.4f}-{high:.4f})" for key, (mean, low, high) in group.shares.items()}
        if name == "elsewhere":
            said["found"] = "-"
        table.add_row(names[name], f"{group.works}", f"{group.photographs}", *said.values())
    table.caption = (
        "false: another work is called the same. found: the photograph's own work is, and no other. "
        "unknown: nothing is called the same work"
    )
    return table


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


def results(thresholds: Mapping[str, Threshold], certainty: float) -> Table:
    """A table of the thresholds and their effect on the held-out half.

    Args:
        thresholds: The thresholds by kind of match.
        certainty: Probability of the promises.
    """
    table = Table(title="Thresholds for a rate of false matches, and their effect on the held-out half (95%)")
    for name in ("match", "rate", "threshold", "calibrated on", "false matches", "found", "at least", "examples"):
        table.add_column(name, justify="left" if name == "match" else "right")
    names = {"same_work": "the same work", "verified": "... by inliers", "similar": "similar"}
    for name, t in thresholds.items():
        units = f"{t.units} {'pairs of works' if t.per_unit == 2 else 'images'}"
        false, found = _share(t.false, t.of, t.per_unit), _share(t.found, t.matches)
        least = f"{t.coverage:.4f}" if t.matches else "-"
        values = (f"{t.rate:.3g}", f"{t.values[0]:.4f}", units, false, found, least, f"{len(t.values)}")
        table.add_row(names[name], *values)
    table.caption = (
        "Each work counts with one image. The same work: found are works with several images; false matches are "
        "measured without the work itself. Similar: found are images that are like other works of the collection; "
        "false matches are images from outside. At least: the share that new queries find, with a certainty of "
        f"{certainty:g}. Examples: up to this number, a match of any example keeps the rate; of more examples, several "
        "must agree."
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
