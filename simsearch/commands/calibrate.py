"""simsearch calibrate: thresholds with which a catalog can reject a query, validated on other queries."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from simsearch import configs, program, terminal
from simsearch.commands.index import report_errors
from simsearch.commands.photographs import Asked, ask_all, protocol_fingerprint, shown_works
from simsearch.data.manifest import Manifest
from simsearch.data.photograph_tables import Photograph, photograph_units, read_photographs
from simsearch.evaluation.evaluator import means
from simsearch.evaluation.photographs import measure_queries
from simsearch.files import replacing, write_csv
from simsearch.functional.open_set import least_scores
from simsearch.models.encoder import device
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
from simsearch.search.calibration_file import write_calibration
from simsearch.search.calibration_sample import (
    Describer,
    exact_vectors,
    local_queries,
    outside_likeness,
    outside_sample,
    work_names,
)
from simsearch.search.catalog import read_catalog
from simsearch.search.engine import Engine

# What the rate of each kind of match is a rate of.
_UNITS = {
    "same_work": "works that are not in the catalog, asked for by one image each",
    "verified": "works that are not in the catalog, asked for by one image each",
    "similar": "images from outside, one of each work where the table names works",
}
OUTCOMES = ("found", "false", "unknown")
_DEPTH = 20  # works of an answer to a photograph that are looked at
T = TypeVar("T")


@dataclass(frozen=True)
class Shares:
    """How often photographs are found, false and unknown.

    Attributes:
        photographs: Number of photographs.
        works: Number of sampling units: the works that they show.
        shares: For each of the three its mean over the photographs, and the 95 % interval by work: share, low, high.
    """

    photographs: int
    works: int
    shares: dict[str, tuple[float, float, float]]


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
    announce(config, engine, first, outside)
    photographs: list[Photograph] = []
    if config.photographs:
        table = Path(config.photographs)
        photographs = read_photographs(table)
        right = shown_works(engine, photographs)
        fingerprint = protocol_fingerprint(engine, photographs, table.parent, right)
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
        local = local_queries(catalog, catalog.verification, config.images, positions, config.workers, describer.report)
        strangers, verified = verify_without_work(engine, positions, local, vectors)
        read = ~strangers.isnan()
        several = read & ~alone
        if not read.any():
            raise ValueError(f"no item of the catalog {catalog.folder} is in {config.images}: give what it was made of")
        thresholds["verified"] = calibrate(
            verified[several], strangers[read], first[several], first[read], config.rate, config.certainty, paired=True
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
        "items": len(catalog),
        "next_id": catalog.names.given,
        "changed": int(catalog.about.get("changed") or 0),
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
    write_calibration(catalog.folder, calibration)
    if curves:
        write_curves(folder / "curve.csv", curves)
        plot_curves(folder / "curve.png", curves, thresholds)
    if photographs:
        calibrated = Engine(replace(catalog, calibration=calibration))
        calibrated.catalog.encoder.to(device(config.device))
        asked = ask_all(calibrated, photographs, table.parent, _DEPTH)
        write_photographs(folder / "photographs.csv", photographs, right, asked)
        groups = photograph_shares(asked, right, photograph_units(photographs))
        known = {"fingerprint": fingerprint} | {name: asdict(group) for name, group in groups.items()}
        write_calibration(catalog.folder, calibration | {"photographs": known})
        tables.append(photographs_table(groups))
    for shown in tables:
        terminal.show(shown)
    print(f"thresholds: {catalog.folder / 'calibration.json'}")
    if photographs:
        print(f"photographs: {folder / 'photographs.csv'}")
    if curves:
        print(f"curves: {folder / 'curve.csv'}, {folder / 'curve.png'}")


def in_order(kinds: Mapping[str, T]) -> dict[str, T]:
    """The values by kind of match, the same work first.

    Args:
        kinds: Values by kind of match.
    """
    return {name: kinds[name] for name in _UNITS if name in kinds}


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


def photograph_shares(asked: Asked, right: Sequence[Sequence[int]], units: Tensor) -> dict[str, Shares]:
    """How often photographs are found, false and unknown: those of works "in_catalog", and those of works "elsewhere".

    Args:
        asked: What a calibrated catalog answered to Q photographs.
        right: Numbers of the works of the catalog that each photograph shows.
        units: int64 (Q,), the sampling unit of each photograph.
    """
    measured = measure_queries(asked.answers, right)
    wrong = measured["no_match/false"]
    kinds = {"in_catalog": {name: measured[name] for name in OUTCOMES}, "elsewhere": {"false": wrong}}
    kinds["elsewhere"]["unknown"] = 1 - wrong
    groups = {}
    for kind, values in kinds.items():
        picked = ~values["false"].isnan()
        if picked.any():
            found, ends = means({name: value[picked] for name, value in values.items()}, units[picked])
            shares = {name: (share, *ends[name]) for name, share in found.items()}
            groups[kind] = Shares(int(picked.sum()), len(units[picked].unique()), shares)
    return groups


def write_photographs(
    path: Path, photographs: Sequence[Photograph], right: Sequence[Sequence[int]], asked: Asked
) -> None:
    """Writes what was answered to each photograph as CSV.

    Args:
        path: The file to write.
        photographs: The photographs.
        right: Numbers of the works of the catalog that each photograph shows.
        asked: What was answered.
    """
    measured = measure_queries(asked.answers, right)
    false = measured["false"].nan_to_num(0.0) + measured["no_match/false"].nan_to_num(0.0)
    found = measured["found"].nan_to_num(0.0)
    rows = []
    for row, one in enumerate(photographs):
        shares = (found[row], false[row], 1 - found[row] - false[row])
        first = (
            (asked.items[row][0], f"{float(asked.answers.confidence[row, 0]):.6f}") if asked.items[row] else ("", "")
        )
        rows.append(
            [
                one.path,
                *(one.box or [""] * 4),
                "; ".join(one.works),
                *(f"{float(share):.6g}" for share in shares),
                *first,
            ]
        )
    write_csv(path, ["path", "x", "y", "w", "h", "work", *OUTCOMES, "first", "confidence"], rows)


def photographs_table(groups: Mapping[str, Shares]) -> Table:
    """A table of what is found, false and unknown of photographs.

    Args:
        groups: Their shares, as `photograph_shares` returns them.
    """
    table = Table(title="Photographs whose works are known: what the catalog says (95%, by work)")
    table.add_column("works are", no_wrap=True)
    for name in ("works", "photographs", *OUTCOMES):
        table.add_column(name, justify="right")
    names = {"in_catalog": "in the catalog", "elsewhere": "elsewhere"}
    for name, group in groups.items():
        said = {key: f"{mean:.4f} ({low:.4f}-{high:.4f})" for key, (mean, low, high) in group.shares.items()}
        values = (said.get(key, "-") for key in OUTCOMES)
        table.add_row(names[name], f"{group.works}", f"{group.photographs}", *values)
    table.caption = (
        "false: another work is called the same. found: the photograph's own work is, and no other; of several works, "
        "their share. unknown: the rest"
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
