"""simsearch photographs: measures what a catalog answers to photographs whose works are known, and to others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from simsearch import configs, program, terminal
from simsearch.data.photograph_tables import (
    Photograph,
    photograph_units,
    photographs_fingerprint,
    read_photograph,
    read_photographs,
)
from simsearch.evaluation.evaluator import Measured
from simsearch.evaluation.photographs import (
    NOTHING,
    Answers,
    Paired,
    compare_photographs,
    judge,
    measure_photographs,
)
from simsearch.files import check_writable, checked, digests, read_json, replacing, write_csv, write_json
from simsearch.functional.resize import resize_to_fit
from simsearch.functional.significance import holm
from simsearch.models.encoder import device
from simsearch.search.catalog import read_catalog, verifying
from simsearch.search.describe import encode
from simsearch.search.encoder_files import encoder_fingerprint
from simsearch.search.engine import Engine
from simsearch.search.query_regions import regions_of
from simsearch.search.stores.stored_index import stored
from simsearch.search.works import ask, works_named
from simsearch.text import cell, warn

PROTOCOL = "photographs"
_ANSWERS = "answers.parquet"
_STAGES = ("read", "describe", "features", "search")  # of a query; the search includes the verification


@dataclass(frozen=True)
class Asked:
    """What was answered to Q photographs.

    Attributes:
        items: For each photograph the names of the items, best first.
        answers: The answers by works.
        milliseconds: float64 (Q, 4), the times of reading the file, of its descriptor, of its local features, and of
            searching and verifying.
    """

    items: list[list[str]]
    answers: Answers
    milliseconds: Tensor


@program.command("photographs")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch photographs`.

    Args:
        config: The config of conf/photographs.yaml.
    """
    table = Path(config.photographs)
    catalog = read_catalog(Path(config.catalog), trusted=configs.trusts(config))
    chosen = config.verification
    settings = {"top": chosen.top, "regions": chosen.regions, "mirrored": chosen.mirrored}
    catalog = verifying(catalog, chosen.enabled, **settings)
    catalog = stored(catalog, configs.build(config.store) if config.get("store") else None)
    catalog.encoder.to(device(config.device))
    engine = Engine(catalog, configs.build(config.rerank) if config.get("rerank") else None)
    photographs = read_photographs(table)
    root = Path(config.root) if config.root else table.parent
    right = shown_works(engine, photographs)
    if not any(right) and catalog.verification is None and catalog.calibration is None:
        raise ValueError(NOTHING)
    fingerprint = protocol_fingerprint(engine, photographs, root, right)
    baseline = read_answers(Path(config.against), photographs, fingerprint, engine) if config.against else None

    check_writable(folder := Path(config.out), "out")
    asked = ask_all(engine, photographs, root, config.k)
    units = photograph_units(photographs)
    measured = measure_photographs(asked.answers, right, units)
    pairs = [] if baseline is None else compare_photographs(asked.answers, baseline, right, units)

    about = summary(fingerprint, measured, asked, right)
    about["catalog"] = {"items": len(catalog), "encoder": encoder_fingerprint(catalog.encoder)}
    about["asked"] = {"k": config.k, "rerank": configs.plain(config).get("rerank")}
    about["asked"]["verify"] = None if catalog.verification is None else catalog.verification.config
    write_results(folder, photographs, right, asked, measured, about)
    terminal.show(results_table(about))
    if pairs:
        write_csv(folder / "paired.csv", ["metric", "difference", "low", "high", "p", "p_holm"], paired_rows(pairs))
        terminal.show(paired_table(pairs, config.against))
    print(f"results: {folder / 'metrics.json'}, {folder / 'per_query.csv'}")


def shown_works(engine: Engine, photographs: Sequence[Photograph]) -> list[list[int]]:
    """The numbers of the works of the catalog that each photograph shows, and a warning on names that it lacks.

    Args:
        engine: The engine of the catalog.
        photographs: The photographs.
    """
    names = [name for one in photographs for name in one.works]
    known = works_named(engine, names)
    if lacking := sorted(set(names) - set(known)):
        warn(
            f"{len(lacking)} works of the photographs are not in the catalog ({', '.join(lacking[:3])}"
            f"{', ...' if len(lacking) > 3 else ''}): nothing is right for them"
        )
    return [sorted({known[name] for name in one.works if name in known}) for one in photographs]


def protocol_fingerprint(
    engine: Engine, photographs: Sequence[Photograph], root: Path, right: Sequence[Sequence[int]]
) -> str:
    """The fingerprint of the photographs and the items that they search.

    Args:
        engine: The engine of the catalog.
        photographs: The photographs.
        root: Folder that their paths are relative to.
        right: Numbers of the works that each photograph shows.

    Raises:
        FileNotFoundError: If photographs are missing.
    """
    names = engine.names.of(range(len(engine.catalog)))
    items: dict[int, list[str]] = {}
    for name, work in zip(names, engine.works.tolist(), strict=True):
        items.setdefault(work, []).append(name)
    shown = [[name for work in own for name in items[work]] for own in right]
    return photographs_fingerprint(photographs, root, shown, names)


def ask_all(engine: Engine, photographs: Sequence[Photograph], root: Path, k: int) -> Asked:
    """The answers to all photographs, one after the other as a user asks, with a progress bar.

    Args:
        engine: The engine of the catalog.
        photographs: The photographs.
        root: Folder that their paths are relative to.
        k: Number of works of an answer.

    Raises:
        ValueError: If a file cannot be read, or a box does not fit. Without it the numbers would be of other queries.
    """
    encoder, verification = engine.catalog.encoder, engine.catalog.verification
    items, rows, times = [], [], []
    for one in tqdm(photographs, unit="photo", desc="photographs", disable=None):
        clock = [time.perf_counter()]
        image = read_photograph(root / one.path, one.box)
        clock.append(time.perf_counter())
        vector = encode(encoder, resize_to_fit(image, encoder.input_size, encoder.fit)[None])[0]
        clock.append(time.perf_counter())
        local = () if verification is None else verification.query(image)
        clock.append(time.perf_counter())
        regions = None if verification is None else regions_of(image, encoder, verification)
        ids, confidence, accepted = ask(engine, vector, local, k, regions)
        clock.append(time.perf_counter())
        items.append(engine.names.of(ids.tolist()))
        rows.append((torch.from_numpy(engine.works[ids.numpy()]), confidence, accepted))
        times.append([1e3 * (end - start) for start, end in pairwise(clock)])
    return Asked(items, stacked(rows), torch.tensor(times, dtype=torch.float64))


def stacked(rows: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Answers:
    """The answers to Q photographs as one.

    Args:
        rows: Works (K,), confidence (K,) and acceptance (K,) or None of each photograph; K may differ.
    """
    length = max(1, *(len(works) for works, _, _ in rows))

    def padded(values: Sequence[Tensor], filling: float) -> Tensor:
        return torch.stack([torch.nn.functional.pad(one, (0, length - len(one)), value=filling) for one in values])

    taken = [accepted for _, _, accepted in rows if accepted is not None]
    return Answers(
        padded([works for works, _, _ in rows], -1),
        padded([confidence for _, confidence, _ in rows], -torch.inf),
        padded(taken, False) if len(taken) == len(rows) else None,
    )


# ------------------------------------------------------------------------------------------- results


def summary(fingerprint: str, measured: Measured, asked: Asked, right: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The content of metrics.json.

    Args:
        fingerprint: The fingerprint of the protocol.
        measured: What was measured.
        asked: What was answered.
        right: Numbers of the works that each photograph shows.
    """
    matches = sum(bool(own) for own in right)
    times = asked.milliseconds
    cost = {f"{stage}_ms": round(value, 2) for stage, value in zip(_STAGES, times.mean(0).tolist(), strict=True)}
    cost |= {"ms": round(float(times.sum(1).mean()), 2), "ms_95": round(float(times.sum(1).quantile(0.95)), 2)}
    return {
        "protocol": PROTOCOL,
        "fingerprint": fingerprint,
        "unit": "work",
        "units": len(measured.units.unique()),
        "metrics": measured.metrics | {"photographs": len(right), "matches": matches, "no_match": len(right) - matches},
        "intervals": measured.intervals,
        "cost": cost,
    }


def write_results(
    folder: Path,
    photographs: Sequence[Photograph],
    right: Sequence[Sequence[int]],
    asked: Asked,
    measured: Measured,
    about: dict[str, Any],
) -> None:
    """Writes per_query.csv, answers.parquet and metrics.json, each atomically.

    Args:
        folder: Folder to write to.
        photographs: The photographs.
        right: Numbers of the works that each photograph shows.
        asked: What was answered.
        measured: What was measured.
        about: The content of metrics.json.
    """
    answers = asked.answers
    hits = judge(answers, right)
    names = list(measured.per_query)
    header = ["path", "x", "y", "w", "h", "work", "unit", "first", "confidence", "rank", *names, "ms"]
    rows = []
    for row, one in enumerate(photographs):
        box = one.box or ("", "", "", "")
        found = hits[row].nonzero()[:, 0].tolist()
        first = (asked.items[row][0], f"{float(answers.confidence[row, 0]):.6f}") if asked.items[row] else ("", "")
        values = [float(measured.per_query[name][row]) for name in names]
        shown = ["" if value != value else f"{value:.6g}" for value in values]
        ms = f"{float(asked.milliseconds[row].sum()):.1f}"
        unit = int(measured.units[row])
        rows.append([one.path, *box, "; ".join(one.works), unit, *first, found[0] + 1 if found else "", *shown, ms])
    write_csv(folder / "per_query.csv", header, rows)

    kept = [answers.confidence[row, : len(items)].tolist() for row, items in enumerate(asked.items)]
    columns: dict[str, Any] = {"path": [one.path for one in photographs], "box": [one.box for one in photographs]}
    columns |= {"items": asked.items, "confidence": kept}
    if answers.accepted is not None:
        accepted = [answers.accepted[row, : len(items)].tolist() for row, items in enumerate(asked.items)]
        columns["accepted"] = accepted
    table = pa.table(columns).replace_schema_metadata({"fingerprint": about["fingerprint"]})
    with replacing(folder / _ANSWERS) as temporary:
        pq.write_table(table, temporary)
    write_json(folder / "metrics.json", {"test": about | {"sha256": digests(folder, [_ANSWERS, "per_query.csv"])}})


def read_answers(folder: Path, photographs: Sequence[Photograph], fingerprint: str, engine: Engine) -> Answers:
    """The answers of another measurement of the same photographs.

    Args:
        folder: Its folder.
        photographs: The photographs.
        fingerprint: The fingerprint that it must have.
        engine: The engine of a catalog with the same items.

    Raises:
        ValueError: If there is none, or if it is of other photographs or items.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(f"against={folder} holds no metrics.json: give the out= of another simsearch photographs")
    about = read_json(path).get("test", {})
    if about.get("fingerprint") != fingerprint:
        raise ValueError(
            f"against={folder} has the fingerprint {about.get('fingerprint')}, this has {fingerprint}: measurements of "
            "other photographs or other items do not compare"
        )
    rows = pq.read_table(checked(folder, _ANSWERS, about)).to_pylist()
    place = {(row["path"], tuple(row["box"]) if row["box"] else None): row for row in rows}
    found = []
    for one in photographs:
        row = place[one.path, one.box]
        works = torch.tensor([int(engine.works[engine.position(name)]) for name in row["items"]], dtype=torch.int64)
        confidence = torch.tensor(row["confidence"], dtype=torch.float64)
        found.append((works, confidence, torch.tensor(row["accepted"]).bool() if "accepted" in row else None))
    return stacked(found)


def results_table(about: dict[str, Any]) -> Table:
    """A table of the metrics with their intervals.

    Args:
        about: The content of metrics.json.
    """
    metrics, over = about["metrics"], f"95% intervals by {about['unit']}: {about['units']}"
    table = Table(title=f"{about['protocol']} {about['fingerprint']} ({over})", title_justify="left")
    for name in ("metric", "value", "interval", "of"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, (low, high) in about["intervals"].items():
        of = metrics["photographs" if name in ("GAP", "microAP") else "no_match" if "no_match" in name else "matches"]
        table.add_row(name, f"{metrics[name]:.4f}", f"{low:.4f}-{high:.4f}", str(of))
    cost = about["cost"]
    stages = ", ".join(f"{stage} {cost[f'{stage}_ms']:.0f}" for stage in _STAGES)
    table.caption = f"{cost['ms']:.0f} ms a photograph ({stages}), 95% within {cost['ms_95']:.0f} ms"
    return table


def paired_rows(pairs: Sequence[Paired]) -> list[list[str]]:
    """Metric, difference, ends of the interval, p and p adjusted by Holm of each pair.

    Args:
        pairs: The differences.
    """
    adjusted = holm(torch.tensor([pair.p for pair in pairs], dtype=torch.float64)).tolist()
    values = [
        (pair.difference, pair.low, pair.high, pair.p, p_holm) for pair, p_holm in zip(pairs, adjusted, strict=True)
    ]
    return [[pair.metric, *(f"{value:.4f}" for value in own)] for pair, own in zip(pairs, values, strict=True)]


def paired_table(pairs: Sequence[Paired], against: str) -> Table:
    """A table of the differences to another measurement.

    Args:
        pairs: The differences.
        against: Folder of the other measurement.
    """
    table = Table(title=f"less {cell(against)}: paired by unit, p adjusted by Holm", title_justify="left")
    for name in ("metric", "difference", "interval", "p"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric, difference, low, high, _, p_holm in paired_rows(pairs):
        table.add_row(metric, difference, f"{low} to {high}", p_holm)
    return table


if __name__ == "__main__":
    main()
