"""The leaderboard as a table for the terminal, as CSV and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from simsearch.comparison.leaderboard import Entry, Value
from simsearch.comparison.runs import Missing
from simsearch.files import to_csv
from simsearch.text import cell as shown_cell
from simsearch.text import markdown

COSTS = ("bytes_per_item", "index/latency_ms_p50", "train_seconds", "parameters")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: The text.
        detail: Small text below it.
        sort: Value to sort by. None sorts last.
    """

    text: str
    detail: str = ""
    sort: float | str | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Title of the column.
        about: One sentence that describes the content.
        cell: Function that returns an entry's cell.
        ascending: True if small values are good.
    """

    title: str
    about: str
    cell: Callable[[Entry], Cell]
    ascending: bool = False


NOTHING = Cell("-")


def columns(entries: Sequence[Entry], metrics: Sequence[str]) -> list[Column]:
    """The columns with content: metrics, the comparison with the baseline, costs.

    Args:
        entries: The entries.
        metrics: The metrics to show.
    """
    made = [Column(name, f"{name}, with its 95% interval by sampling unit", _metric(name)) for name in metrics]
    made += [
        Column("difference", f"{metrics[0]} minus the baseline's, paired by query, with its 95% interval", _difference),
        Column("p Holm", "two-sided sign-flip test of the difference, adjusted for all comparisons here", _p, True),
        Column("MDE 80%", "the difference that this pairing detects with a probability of 80%", _detectable, True),
        Column("bytes", "bytes per image in the index", _cost("bytes_per_item", _count), True),
        Column("ms/query", "median latency of a single query", _cost("index/latency_ms_p50", "{:.2f}".format), True),
        Column("training", "wall time of the training, validation included", _cost("train_seconds", duration), True),
        Column("params", "parameters of the encoder", _cost("parameters", _short), True),
        Column("protocol", "queries, gallery and rules; do not compare numbers of different fingerprints", _protocol),
    ]
    if len({entry.fingerprint for entry in entries}) == 1:
        made.pop()
    return [column for column in made if any(column.cell(entry) != NOTHING for entry in entries)]


def _metric(name: str) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        value = entry.values.get(name)
        return NOTHING if value is None else Cell(f"{value.mean:.4f}", spread(value), value.mean)

    return cell


def spread(value: Value) -> str:
    """A value's interval over sampling units, and its deviation between seeds, as text.

    Args:
        value: The value.
    """
    between = "" if value.deviation is None else f"± {value.deviation:.4f} seeds"
    over = "" if value.interval is None else f"{value.interval[0]:.4f}-{value.interval[1]:.4f}"
    return "\n".join(part for part in (over, between) if part)


def _difference(entry: Entry) -> Cell:
    if entry.is_baseline:
        return Cell("baseline", sort=0.0)
    if entry.paired is None:
        return NOTHING
    return Cell(
        f"{entry.paired.difference:+.4f}",
        f"{entry.paired.low:+.4f}..{entry.paired.high:+.4f}",
        entry.paired.difference,
    )


def _p(entry: Entry) -> Cell:
    if entry.paired is None:
        return NOTHING
    return Cell(p_text(entry.paired.p_holm), "", entry.paired.p_holm)


def p_text(p: float) -> str:
    """A p-value as text.

    Args:
        p: The p-value.
    """
    return f"{p:.3f}" if p >= 0.001 else "< .001"


def _detectable(entry: Entry) -> Cell:
    return NOTHING if entry.paired is None else Cell(f"{entry.paired.detectable:.4f}", "", entry.paired.detectable)


def _cost(name: str, text: Callable[[float], str]) -> Callable[[Entry], Cell]:
    def cell(entry: Entry) -> Cell:
        value = entry.cost(name)
        if value is None:
            return NOTHING
        devices = {str(result.facts["device"]) for result in entry.results if "device" in result.facts}
        return Cell(text(value), ", ".join(sorted(devices)) if name == "train_seconds" else "", value)

    return cell


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _short(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A duration in the unit that fits.

    Args:
        seconds: The duration.
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def _protocol(entry: Entry) -> Cell:
    return Cell(entry.protocol, entry.fingerprint, entry.protocol)


# ---------------------------------------------------------------------------------------------- outputs


NAME_WIDTH = 32  # of a run, in a terminal; longer names are folded
_FIRST = ("difference", "p Holm", "protocol", "bytes", "ms/query", "training", "params", "MDE 80%")


def terminal_table(entries: Sequence[Entry], shown: Sequence[Column], width: int = 120) -> Table:
    """The leaderboard for a terminal. The only metric in it is the one that ranks.

    The names of the runs stay readable. Other columns without room are left out and listed.

    Args:
        entries: The entries.
        shown: The columns.
        width: Width of the terminal in columns.
    """
    kept = [shown[0], *(column for column in shown if column.title not in entries[0].values)]
    frame = len(str(len(entries))) + 4
    longest = min(max(len(shown_cell(entry.name)) for entry in entries), NAME_WIDTH)
    room = width - frame - longest - 3
    fits: list[str] = []
    left_out: list[str] = []
    for column in sorted(kept, key=lambda c: _FIRST.index(c.title) if c.title in _FIRST else -1):
        texts = [column.title]
        for entry in entries:
            cell = column.cell(entry)
            texts += [cell.text, *cell.detail.split("\n")]
        needs = max(map(len, texts)) + 3
        (fits if needs <= room else left_out).append(column.title)
        room -= needs if needs <= room else 0
    kept = [column for column in kept if column.title in fits]
    notes = [stated(entries), *([f"the table has no room for {', '.join(left_out)}: see the page"] if left_out else [])]
    table = Table(title="Runs, best first (95% intervals by sampling unit)", caption=shown_cell("; ".join(notes)))
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("run", overflow="fold", min_width=min(longest, max(width - frame - 3, 1)))
    for column in kept:
        table.add_column(column.title, justify="right", no_wrap=True)
    for rank, entry in enumerate(entries, start=1):
        cells = [column.cell(entry) for column in kept]
        texts = [shown_cell(c.text) + (f"\n[dim]{shown_cell(c.detail)}[/dim]" if c.detail else "") for c in cells]
        name = shown_cell(entry.name)
        table.add_row(str(rank), f"[bold]{name}[/bold]" if entry.is_baseline else name, *texts)
    return table


def stated(entries: Sequence[Entry]) -> str:
    """The protocols, fingerprints and sampling units of the entries, and which queries stand in their own rankings.

    Args:
        entries: The entries.
    """
    kinds = {f"protocol {e.protocol}, fingerprint {e.fingerprint}, by {over(e)}" for e in entries}
    return "; ".join([*sorted(kinds), *self_notes(entries)])


def over(entry: Entry) -> str:
    """The sampling unit of an entry's intervals and tests, and the number of units.

    Args:
        entry: The entry.
    """
    if entry.results[0].unit is None:
        return "query (measured before sampling units were named)"
    return f"{entry.unit} ({entry.units})"


def self_notes(entries: Sequence[Entry]) -> list[str]:
    """A note for each protocol whose queries stand in their own rankings.

    Args:
        entries: The entries.
    """
    names = {entry.protocol for entry in entries if entry.results[0].metrics.get("queries_in_own_ranking")}
    return [f"{name}: each query is in its own ranking: P@1 and R@k count it" for name in sorted(names)]


def markdown_table(entries: Sequence[Entry], shown: Sequence[Column], missing: Sequence[Missing]) -> str:
    """The leaderboard as Markdown, followed by the runs without a result.

    Args:
        entries: The entries.
        shown: The columns.
        missing: Runs without a result.
    """
    lines = [
        _line(["#", "run", *(column.title for column in shown)]),
        _line(["--:", "---", *("---" if column.title == "protocol" else "--:" for column in shown)]),
    ]
    for rank, entry in enumerate(entries, start=1):
        cells = [column.cell(entry) for column in shown]
        texts = [c.text + (f" ({c.detail})" if c.detail else "") for c in cells]
        lines.append(_line([str(rank), entry.name, *texts]))
    lines += ["", markdown(stated(entries))]
    if missing:
        lines += ["", *(f"- {markdown(m.name)}: {m.state}, {markdown(m.reason)}" for m in missing)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(markdown, cells)) + " |"


def csv_text(entries: Sequence[Entry], metrics: Sequence[str], missing: Sequence[Missing]) -> str:
    """The leaderboard as CSV at full precision: one line per entry, and one per run without a result.

    Args:
        entries: The entries.
        metrics: The metrics to write.
        missing: Runs without a result.
    """
    values = [f"{name}{end}" for name in metrics for end in ("", "_low", "_high", "_seed_deviation")]
    paired = ("difference", "difference_low", "difference_high", "p", "p_holm", "detectable", "queries", "paired_units")
    head = ["rank", "run", "state", "runs", "seeds", "baseline", *values, *paired]
    head += [*COSTS, "protocol", "fingerprint", "unit", "units", "places", "reason"]
    rows: list[list[Any]] = []
    for rank, entry in enumerate(entries, start=1):
        line = [rank, entry.name, "finished", len(entry.results), " ".join(map(str, entry.seeds)), entry.is_baseline]
        for name in metrics:
            value = entry.values.get(name)
            low, high = (value and value.interval) or ("", "")
            line += [value and value.mean, low, high, value and value.deviation]
        p = entry.paired
        line += [p.difference, p.low, p.high, p.p, p.p_holm, p.detectable, p.queries, p.units] if p else [""] * 8
        line += [entry.cost(name) for name in COSTS]
        line += [entry.protocol, entry.fingerprint, entry.unit, entry.units]
        line += ["; ".join(r.place for r in entry.results), ""]
        rows.append(line)
    blank = len(values) + len(paired) + len(COSTS) + 5
    rows += [["", m.name, m.state, "", "", "", *[""] * blank, m.reason] for m in missing]
    return to_csv(head, rows)
