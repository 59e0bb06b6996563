"""A run's metrics as a table, and as the lines of a study's results.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from simsearch import terminal
from simsearch.text import cell

HEADLINES = ("mAP", "P@1", "P@10", "R@10")


RESULT_COLUMNS = (
    *("row", "data", "protocol", "fingerprint", "metric", "value", "ci_low", "ci_high", "unit", "units"),
    *("queries", "bytes_per_item", "seconds", "seed", "command"),
)


def results_table(
    stages: Mapping[str, Any], only: tuple[str, ...] = ("val", "test"), also: tuple[str, ...] = ("rerank", "verify")
) -> Table:
    """The headline numbers of metrics.json as a table: values, 95% intervals, bytes and latency.

    Args:
        stages: Content of metrics.json.
        only: Stages to show.
        also: Further rows to show if they were measured: "rerank" for results after re-ranking, "verify" for those
            after geometric verification, "index" for the lists that the index returns.
    """
    width = terminal.console().width
    padding = 0 if width < 90 else 1  # else numbers break where a terminal has 80 columns
    table = Table(title="Retrieval results (95% intervals by sampling unit)", padding=(0, padding))
    table.add_column("protocol", no_wrap=True)
    table.add_column("unit", justify="right", overflow="fold")
    for name in (*HEADLINES, "bytes\n/image", "ms/\nquery\np50"):
        table.add_column(name, justify="right", overflow="fold")
    dash = "-" if width >= 118 else "-\n"
    notes: dict[str, None] = {}  # each once, in order
    for stage in only:
        if stage not in stages:
            continue
        about = stages[stage]
        metrics = about["metrics"]
        first = f"{cell(about['protocol'])}\n[dim]{cell(about['fingerprint'])}[/dim]"
        costs = [f"{metrics['bytes_per_item']:.0f}", f"{metrics['index/latency_ms_p50']:.2f}"]
        table.add_row(first, "{}\n[dim]{}[/dim]".format(*unit(about)), *_headlines(about, "", dash), *costs)
        for name in also:
            cells = _headlines(about, f"{name}/", dash)
            if set(cells) != {"-"}:
                table.add_row(
                    {"rerank": "  re-ranked", "verify": "  verified", "index": "  by the index"}[name],
                    "",
                    *cells,
                    "",
                    "",
                )
        if "verify" in also and metrics.get("verify/ms_per_query") is not None:
            notes[verification_note(metrics)] = None
        if "index" in also and metrics.get("index/recall@10") is not None:
            notes[f"the index returns {metrics['index/recall@10']:.1%} of the ten nearest by exact search"] = None
        if (about.get("model") or {}).get("weights") == "random":
            notes["random weights: these numbers say nothing about a trained network"] = None
        for prefix in ("", "instance/"):
            if metrics.get(f"{prefix}GAP") is not None:
                notes[open_set_note(about, prefix)] = None
        if metrics.get("queries_in_own_ranking"):
            notes[f"{about['protocol']}: each query is in its own ranking: P@1 and R@k count it"] = None
    table.caption = "\n".join(notes) or None
    return table


def verification_note(metrics: Mapping[str, Any]) -> str:
    """What geometric verification changes and costs, in one sentence.

    Args:
        metrics: The metrics of a stage, with those under `verify/`.
    """
    v = {name: math.nan if value is None else value for name, value in metrics.items()}
    gains = ", ".join(
        f"{name} {v[f'verify/{name}_without']:.4f} to {v[f'verify/{name}']:.4f}" for name in ("GAP", "microAP")
    )
    costs = ", ".join(f"{part} {v[f'verify/{part}_ms']:.0f}" for part in ("features", "matching", "fitting"))
    tested = f"mAP {v['verify/mAP_gain']:+.4f}, p {v['verify/mAP_p']:.4f}; " if "verify/mAP_gain" in v else ""
    return f"verification: {tested}{gains}; it adds {v['verify/ms_per_query']:.0f} ms a query ({costs})"


def open_set_note(about: Mapping[str, Any], prefix: str) -> str:
    """GAP and what belongs to it, with intervals where there are any, in one sentence.

    Args:
        about: One stage of metrics.json.
        prefix: What the names start with: "" for the gallery as an open set, "instance/" for the protocol's queries.
    """
    metrics, parts = about["metrics"], []
    named = [f"{prefix}{name}" for name in ("GAP", "GAP-", "accuracy")]
    named += [name for name in metrics if prefix and name.startswith((f"{prefix}microAP", f"{prefix}mAP@"))]
    for name in named:
        if metrics.get(name) is not None:
            low, high = about["intervals"].get(name) or (None, None)
            ends = "" if low is None else f" ({low:.4f}-{high:.4f})"
            parts.append(f"{name.removeprefix(prefix)} {metrics[name]:.4f}{ends}")
    if not prefix:
        return f"the gallery of {about['protocol']} as an open set: {', '.join(parts)}"
    count = f"{metrics['instance/distractors']:.0f} of {metrics['queries']:.0f} queries are distractors"
    return f"instances of {about['protocol']}: {', '.join(parts)}; {count}"


def _headlines(about: Mapping[str, Any], prefix: str, dash: str) -> list[str]:
    cells = []
    for name in (f"{prefix}{headline}" for headline in HEADLINES):
        value, ends = about["metrics"].get(name), about["intervals"].get(name)
        interval = f"\n[dim]{ends[0]:.4f}{dash}{ends[1]:.4f}[/dim]" if ends else ""
        cells.append("-" if value is None else f"{value:.4f}{interval}")
    return cells


def result_lines(
    about: Mapping[str, Any], names: Sequence[str], *, row: str, data: str, seconds: float, seed: int, command: str
) -> list[list[Any]]:
    """Lines of a study's results.csv (RESULT_COLUMNS) for one stage, one line per metric that the stage has.

    Args:
        about: One stage of metrics.json.
        names: Names of the metrics.
        row: Name of the study's row.
        data: Name of the data.
        seconds: Duration of the training.
        seed: Seed of the training.
        command: The command that made the result.
    """
    metrics, intervals = about["metrics"], about["intervals"]
    head = [row, data, about["protocol"], about["fingerprint"]]
    over = unit(about)
    tail = [int(metrics["queries"]), int(metrics["bytes_per_item"]), round(seconds, 1), seed, command]
    ends = {name: (*intervals[name], *over) if name in intervals else [""] * 4 for name in names}
    return [[*head, name, metrics[name], *ends[name], *tail] for name in names if name in metrics]


def unit(about: Mapping[str, Any]) -> tuple[str, int]:
    """The sampling unit of one stage and the number of units. Older results do not name it; their unit is the query.

    Args:
        about: One stage of metrics.json.
    """
    return (about["unit"], about["units"]) if "unit" in about else ("query", int(about["metrics"]["queries"]))
