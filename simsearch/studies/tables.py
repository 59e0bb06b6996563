"""What the finished runs of a study's rows have measured: lines of results.csv and paired.csv, and tables."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from simsearch import results
from simsearch.files import read_json, replacing
from simsearch.functional.significance import holm, paired_interval, paired_permutation
from simsearch.studies.check import evaluation_folder, is_measured, measured_by
from simsearch.studies.rows import Row
from simsearch.studies.runs import Runs, find_run

PAIRED_COLUMNS = (
    *("row_a", "row_b", "protocol", "fingerprint", "metric", "difference", "low", "high", "p", "p_holm"),
    *("queries", "unit", "units", "seeds"),
)
TESTED = {"AP": "mAP", "P@1": "P@1"}  # values of each query, and the metrics that are their means
RESAMPLES, ALPHA = 20_000, 0.05
_T = TypeVar("_T")


@dataclass(frozen=True)
class Measurement:
    """A measurement of a finished run.

    Attributes:
        row: Name of the row.
        change: What the evaluation changes, such as "rerank=aqe", or "".
        seed: The seed.
        folder: The folder with its metrics.json.
        metrics: Names of the metrics that the row expects of it.
        data: Name of the data.
        seconds: Duration of the training.
    """

    row: str
    change: str
    seed: int
    folder: Path
    metrics: tuple[str, ...]
    data: str
    seconds: float

    @property
    def label(self) -> str:
        """The row, with what the evaluation changes behind plus signs: choices of a group, keys with their values."""
        words = [self.row]
        for key, _, value in (word.partition("=") for word in self.change.split()):
            name = key.rpartition(".")[2]
            words.append(value if name == key else f"{name}={value}")
        return "+".join(words)

    @property
    def stage(self) -> dict[str, Any]:
        """The stage "test" of its metrics.json."""
        return read_json(self.folder / "metrics.json")["test"]


def measurements(book: Mapping[str, Row], runs: Runs, *, trusted: bool = False) -> Iterator[Measurement]:
    """What finished runs have measured, in the order of the rows. Tells on standard error what is missing.

    Args:
        book: All rows by name.
        runs: Finished runs by identity.
        trusted: True if the user trusts whoever made the rows.
    """
    for name, row in book.items():
        for seed in row.seeds:
            run, _ = find_run(book, name, seed, runs, trusted=trusted)
            if run is None:
                print(f"{name}, seed {seed}: no finished run", file=sys.stderr)
                continue
            own = read_json(run.folder / "metrics.json")["test"]["protocol"]
            seconds = float(read_json(run.folder / "run.json").get("train_seconds", 0))
            for measurement, metrics in row.expect.items():
                at_home = measurement == own
                folder = run.folder if at_home else evaluation_folder(run, measurement)
                if not at_home and not is_measured(run, measurement):
                    print(f"{name}, seed {seed}: {measurement} is not measured", file=sys.stderr)
                    continue
                change, data = " ".join(measured_by(measurement)), _data_name(run.config["data"])
                yield Measurement(name, change, seed, folder, tuple(metrics), data, seconds)


def _data_name(data: Mapping[str, Any]) -> str:
    place = data.get("source") or data.get("root")
    return Path(place).name if place else str(data["_target_"]).rpartition(".")[2].removesuffix("DataModule").lower()


def result_lines(measured: Iterable[Measurement], names: Sequence[str] | None = None) -> list[list[Any]]:
    """Lines of results.csv (simsearch.results.RESULT_COLUMNS).

    Args:
        measured: The measurements.
        names: Names of the metrics. None for those that the rows expect.
    """
    lines = []
    for m in measured:
        command = f"simsearch reproduce row={m.row} seeds=[{m.seed}]"
        lines += results.result_lines(
            m.stage,
            m.metrics if names is None else names,
            row=m.label,
            data=m.data,
            seconds=m.seconds,
            seed=m.seed,
            command=command,
        )
    return lines


def paired_lines(measured: Iterable[Measurement]) -> list[list[Any]]:
    """Lines of paired.csv (PAIRED_COLUMNS): rows against each other, and changed evaluations against their row.

    Values of each query are means over the seeds that both have. Rows with the same change are compared, and all
    measurements of one row; only those of the same protocol with the same fingerprint and sampling unit. The p-values
    are those of a sign-flip test over the sampling units, and Holm's correction counts all tests of a protocol.

    Args:
        measured: The measurements.

    Raises:
        ValueError: If two measurements of one fingerprint have other queries.
    """
    groups: dict[tuple[str, str, str], dict[tuple[str, str], dict[int, Measurement]]] = {}
    for m in measured:
        if (m.folder / "per_query.parquet").is_file() and {"mAP", "rerank/mAP"} & set(m.metrics):
            about = m.stage
            rows = groups.setdefault((about["protocol"], about["fingerprint"], results.unit(about)[0]), {})
            rows.setdefault((m.row, m.change), {})[m.seed] = m
    lines: list[list[Any]] = []
    for (protocol, fingerprint, unit), rows in groups.items():
        tests = [(a, b) for b, a in itertools.combinations(rows, 2) if a[1] == b[1] or a[0] == b[0]]
        values = {key: {seed: _values(m) for seed, m in seeds.items()} for key, seeds in rows.items()}
        # With more tests than the usual patterns can tell apart, Holm's correction of the least p would exceed ALPHA.
        most = len(tests) * len(TESTED)
        resamples = RESAMPLES if most <= ALPHA * RESAMPLES else math.ceil(4 * most / ALPHA)
        found: list[list[Any]] = []
        for a, b in tqdm(tests, desc=f"paired tests, {protocol}", leave=False):
            seeds = sorted(values[a].keys() & values[b].keys())
            if not seeds:
                continue
            units = results.unit(rows[a][seeds[0]].stage)[1]
            for column, metric in TESTED.items():
                one, other = ([values[key][seed] for seed in seeds] for key in (a, b))
                if not all(column in table for table in (*one, *other)):
                    continue  # such as P@1 where an evaluation has other cut-offs
                if any(not torch.equal(x["index"], y["index"]) for x, y in zip(one, other, strict=True)):
                    raise ValueError(f"{a[0]} and {b[0]} have other queries under {protocol}: they do not compare")
                x, y = (torch.stack([table[column] for table in tables]).mean(0) for tables in (one, other))
                ends = paired_interval(x, y, one[0].get("unit"))
                p = paired_permutation(x, y, one[0].get("unit"), resamples=resamples)
                names = (rows[key][seeds[0]].label for key in (a, b))
                tail = [len(x), unit, units, " ".join(map(str, seeds))]
                found.append([*names, protocol, fingerprint, metric, *ends, p, tail])
        adjusted = holm(torch.tensor([line[-2] for line in found], dtype=torch.float64)).tolist() if found else []
        lines += [[*line[:-1], p, *line[-1]] for line, p in zip(found, adjusted, strict=True)]
    return lines


def _values(m: Measurement) -> dict[str, Tensor]:
    """Query rows, sampling units and values of each query, ordered by query; re-ranked if the row expects only that."""
    table = pq.read_table(m.folder / "per_query.parquet")
    order = torch.from_numpy(table["index"].to_numpy().copy()).argsort()
    prefix = "" if "mAP" in m.metrics else "rerank/"
    columns = {"index": "index", "unit": "unit"} | {name: prefix + name for name in TESTED}
    columns = {name: column for name, column in columns.items() if column in table.column_names}
    read = {name: torch.from_numpy(table[column].to_numpy().copy())[order] for name, column in columns.items()}
    return {name: value.double() if name in TESTED else value for name, value in read.items()}


def markdown_tables(lines: Iterable[Mapping[str, str]]) -> str:
    """A table in Markdown for each protocol: rows, seeds, metrics, minutes of a training.

    A metric is the mean over seeds, with the standard deviation of several seeds (n - 1) and, in brackets, the 95%
    interval by sampling unit, whose ends are means over seeds. There is none if a seed has none, or if seeds were
    measured over different sampling units; a line below the table names the latter.

    Args:
        lines: The lines of results.csv.
    """
    protocols: dict[tuple[str, str], dict[str, dict[str, list[Mapping[str, str]]]]] = {}
    for line in lines:
        rows = protocols.setdefault((line["protocol"], line["fingerprint"]), {})
        rows.setdefault(line["row"], {}).setdefault(line["metric"], []).append(line)
    texts = []
    for (protocol, fingerprint), rows in protocols.items():
        rows = {row: _short(metrics) for row, metrics in rows.items()}
        names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
        body = []
        for row, metrics in rows.items():
            some = next(iter(metrics.values()))
            minutes = statistics.fmean(float(line["seconds"]) for line in some) / 60
            body.append([row, str(len(some)), *(_cell(metrics.get(name, ())) for name in names), f"{minutes:.0f}"])
        header = ["row", "seeds", *names, "minutes"]
        ruled = [header, ["---"] * len(header), *body]
        texts.append("\n".join([f"`{protocol}` ({fingerprint})", "", *(f"| {' | '.join(cells)} |" for cells in ruled)]))
        mixed = [
            f"{row} {name} ({', '.join(over)})"
            for row, metrics in rows.items()
            for name, lines in metrics.items()
            if len(over := _units(lines)) > 1
        ]
        if mixed:
            texts.append(f"No interval, as seeds were measured over different sampling units: {'; '.join(mixed)}")
    return "\n\n".join(texts) + "\n"


def _short(metrics: Mapping[str, _T]) -> dict[str, _T]:
    """The metrics of a row, where those after re-ranking have the names of those before, unless it has both."""
    short = {name: name.removeprefix("rerank/") for name in metrics}
    return {name if short[name] in metrics else short[name]: lines for name, lines in metrics.items()}


def _cell(lines: Sequence[Mapping[str, str]]) -> str:
    values = [float(line["value"]) for line in lines if line["value"]]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    interval = ""
    if all(line["ci_low"] for line in lines if line["value"]) and len(_units(lines)) == 1:
        low, high = (statistics.fmean(float(line[end]) for line in lines if line[end]) for end in ("ci_low", "ci_high"))
        interval = f" [{low:.4f}, {high:.4f}]"
    return f"{statistics.fmean(values):.4f}{spread}{interval}"


def _units(lines: Iterable[Mapping[str, str]]) -> list[str]:
    """The sampling units of the intervals that there are."""
    return sorted({line["unit"] for line in lines if line["ci_low"]})


def write_results(folder: Path, book: Mapping[str, Row], runs: Runs, *, trusted: bool = False) -> int:
    """Writes results.csv, paired.csv and tables.md into a folder. Returns the number of measurements.

    Nothing is written if there is no measurement.

    Args:
        folder: The folder.
        book: The rows by name.
        runs: Finished runs by identity.
        trusted: True if the user trusts whoever made the rows.
    """
    measured = list(measurements(book, runs, trusted=trusted))
    if measured:
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "results.csv", results.RESULT_COLUMNS, result_lines(measured))
        write_csv(folder / "paired.csv", PAIRED_COLUMNS, paired_lines(measured))
        with (folder / "results.csv").open(newline="") as file:
            text = markdown_tables(csv.DictReader(file))
        with replacing(folder / "tables.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return len(measured)


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Writes a table at once, so that a reader finds the old or the new one.

    Args:
        path: The file.
        columns: Names of the columns.
        lines: The lines.
    """
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)
