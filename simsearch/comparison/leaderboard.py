"""Compares runs: groups seeds, computes values with intervals, and runs paired tests against a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from simsearch.comparison.runs import Queries, Result
from simsearch.functional.significance import (
    holm,
    mean_interval,
    minimum_detectable_effect,
    paired_interval,
    paired_permutation,
)

ALPHA, POWER = 0.05, 0.8
RESAMPLES = 10_000


@dataclass(frozen=True)
class Value:
    """The value of a metric for an entry.

    Attributes:
        mean: Mean over seeds.
        interval: 95% interval over sampling units, or None.
        deviation: Standard deviation between seeds, or None.
    """

    mean: float
    interval: tuple[float, float] | None
    deviation: float | None


@dataclass(frozen=True)
class Paired:
    """A paired comparison, entry minus baseline, over the queries that both have.

    All values are computed over the sampling units of these queries.

    Attributes:
        difference: Mean difference.
        low: Lower end of its 95% interval.
        high: Upper end of its 95% interval.
        p: p-value of the sign-flip test.
        p_holm: p-value adjusted over all comparisons of the leaderboard (Holm).
        detectable: Difference that would be detected with 80% power.
        queries: Number of queries.
        units: Number of sampling units.
    """

    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    detectable: float
    queries: int
    units: int


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard: one configuration, whose runs differ only in the seed.

    Attributes:
        name: Name of the entry.
        results: Results of the runs.
        values: The value of each metric.
        queries: Each query's mean over the seeds, for the metric that ranks. None if a run has no per-query values.
        paired: Comparison with the baseline. None for the baseline itself, and if the queries differ.
        is_baseline: True for the baseline.
    """

    name: str
    results: tuple[Result, ...]
    values: Mapping[str, Value]
    queries: Queries | None
    paired: Paired | None = None
    is_baseline: bool = False

    @property
    def protocol(self) -> str:
        """The protocol of the runs."""
        return self.results[0].protocol

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the task."""
        return self.results[0].fingerprint

    @property
    def unit(self) -> str:
        """The sampling unit of intervals and tests."""
        return self.results[0].unit or "query"

    @property
    def units(self) -> int | None:
        """The number of sampling units among the queries. None if the run did not record it."""
        return self.results[0].units

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the runs."""
        return [result.config.get("seed") for result in self.results]

    def cost(self, name: str) -> float | None:
        """The mean over seeds of a cost. None if no run recorded it.

        Args:
            name: `bytes_per_item`, `index/latency_ms_p50`, `train_seconds` or `parameters`.
        """
        known = [r.facts.get(name, r.metrics.get(name)) for r in self.results]
        given = [float(value) for value in known if value is not None]
        return statistics.fmean(given) if len(given) == len(known) else None


def check_comparable(results: Sequence[Result]) -> None:
    """Checks that all results share the protocol, the fingerprint and the sampling unit.

    Args:
        results: The results.

    Raises:
        ValueError: If they do not.
    """
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        kinds.setdefault((result.protocol, result.fingerprint, result.unit or "query"), []).append(result.name)
    if len(kinds) > 1:
        lines = [f"  {protocol} {mark} by {unit}: {_some(names)}" for (protocol, mark, unit), names in kinds.items()]
        raise ValueError(
            "these runs cannot be compared: their queries, gallery, data, rules or sampling unit differ\n"
            + "\n".join(lines)
            + "\nGive runs of one protocol (or measurements in a run's evaluations/; `simsearch evaluate run=<run>` "
            "measures an older run again), or force=true to list them in one table anyway"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def leaderboard(
    results: Sequence[Result],
    configuration: Callable[[Result], Hashable],
    *,
    baseline: Result,
    metric: str,
    also: Sequence[str],
    seed: int = 0,
) -> list[Entry]:
    """The entries, best mean of `metric` first.

    Tests compare each query's mean over seeds. They tell these trained networks apart, but say nothing about further
    trainings; only the deviation between seeds does.

    Args:
        results: The results, all comparable.
        configuration: Function that returns what the runs of one entry share, besides fingerprint and sampling unit.
        baseline: A run of the entry that the others are tested against.
        metric: The metric that ranks.
        also: Further metrics to list, if a run has them.
        seed: Seed of intervals and tests.

    Raises:
        ValueError: If a result lacks the metric.
    """
    for result in results:
        if result.metrics.get(metric) is None:
            there = [name for name in result.metrics if result.has_queries(name) or result.run is None]
            raise ValueError(f"{result.name} has no {metric}; it has {', '.join(there)}")
    groups: dict[Hashable, list[Result]] = {}
    for result in results:
        groups.setdefault((configuration(result), result.fingerprint, result.unit or "query"), []).append(result)
    entries = [_entry(tuple(group), (metric, *also), any(r is baseline for r in group)) for group in groups.values()]
    line = next(entry for entry in entries if entry.is_baseline)
    tested = [entry for entry in entries if not entry.is_baseline and _pairs(entry, line)]
    found = dict(zip(map(id, tested), _tests(tested, line, seed), strict=True))
    entries = [replace(entry, paired=found.get(id(entry))) for entry in entries]
    return sorted(entries, key=lambda entry: -entry.values[metric].mean)


def _entry(group: tuple[Result, ...], metrics: Sequence[str], is_baseline: bool) -> Entry:
    values = {}
    for name in metrics:
        numbers = [result.metrics.get(name) for result in group]
        given = [number for number in numbers if number is not None]
        if len(given) < len(group):
            continue
        interval = group[0].intervals.get(name)
        if len(group) > 1:
            interval = None
            if queries := _mean_queries(group, name):
                interval = mean_interval(queries.value[:, None], queries.units)[0].tolist()
        deviation = statistics.stdev(given) if len(given) > 1 else None
        values[name] = Value(
            statistics.fmean(given), None if interval is None else (interval[0], interval[1]), deviation
        )
    seeds = len({result.config.get("seed") for result in group})
    several = f" ({len(group)} {'seeds' if seeds == len(group) else 'runs'})" if len(group) > 1 else ""
    queries = _mean_queries(group, metrics[0])
    return Entry(group[0].name + several, group, values, queries, is_baseline=is_baseline)


def _mean_queries(group: Sequence[Result], metric: str) -> Queries | None:
    if not all(result.has_queries(metric) for result in group):
        return None
    parts = [result.per_query(metric) for result in group]
    for result, part in zip(group, parts, strict=True):
        if not _same(part, parts[0]):
            raise ValueError(
                f"{result.name} and {group[0].name} have the same fingerprint but other queries: is one damaged?"
            )
    return replace(parts[0], value=torch.stack([part.value for part in parts]).mean(0))


def _pairs(entry: Entry, line: Entry) -> bool:
    if entry.queries is None or line.queries is None:
        return False
    if (entry.fingerprint, entry.unit) != (line.fingerprint, line.unit):
        return False
    if not _same(entry.queries, line.queries):
        raise ValueError(f"{entry.name} and {line.name} have the same fingerprint but other queries: is one damaged?")
    return True


def _same(ours: Queries, theirs: Queries) -> bool:
    """Whether two sets of queries have the same queries and units."""
    return torch.equal(ours.index, theirs.index) and torch.equal(ours.units, theirs.units)


def _tests(entries: Sequence[Entry], line: Entry, seed: int) -> list[Paired]:
    """Paired comparisons of the entries with the baseline's entry. They form one family for Holm's correction."""
    # With more tests than the usual patterns can tell apart, Holm's correction of the least p-value would exceed ALPHA.
    resamples = RESAMPLES if len(entries) <= ALPHA * RESAMPLES else math.ceil(4 * len(entries) / ALPHA)
    rows = []
    for entry in entries:
        assert entry.queries is not None
        assert line.queries is not None
        pair = entry.queries.value, line.queries.value, line.queries.units
        p = paired_permutation(*pair, resamples=resamples, seed=seed)
        # Holm's strictest step, so that such a difference is found whatever the others show.
        detectable = minimum_detectable_effect(*pair, alpha=ALPHA / len(entries), power=POWER)
        both = (pair[0] - pair[1]).isfinite()
        counts = int(both.sum()), len(pair[2][both].unique())
        rows.append((*paired_interval(*pair), p, detectable, *counts))
    adjusted = holm(torch.tensor([row[3] for row in rows], dtype=torch.float64)).tolist()
    return [
        Paired(difference, low, high, p, p_holm, detectable, *counts)
        for (difference, low, high, p, detectable, *counts), p_holm in zip(rows, adjusted, strict=True)
    ]


# ------------------------------------------------------------------------------------- config differences


def config_differences(entries: Sequence[Entry], without: Sequence[str]) -> dict[str, list[str]]:
    """The dotted config keys whose values differ between entries.

    Each has one text per entry, "-" if the key is missing.

    Seeds are left out. So are copies by interpolation: keys that end in another key with the same differences
    (model.optimizer.lr beside optimizer.lr).

    Args:
        entries: The entries.
        without: Keys to leave out, with all keys below them.
    """
    flat = [_flat(entry.results[0].config) for entry in entries]
    keys = sorted(set().union(*flat), key=lambda key: (key.count("."), key))
    kept: dict[str, list[str]] = {}
    for key in keys:
        if key.split(".")[-1] == "seed" or any(key == w or key.startswith(f"{w}.") for w in without):
            continue
        texts = [_text(key, values[key]) if key in values else "-" for values in flat]
        if len(set(texts)) > 1 and not any(key.endswith(f".{k}") and texts == kept[k] for k in kept):
            kept[key] = texts
    return kept


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in node.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return pairs


def _text(key: str, value: Any) -> str:
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
