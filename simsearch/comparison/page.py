"""The comparison as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from simsearch.comparison.charts import Point, histogram, scatter
from simsearch.comparison.leaderboard import ALPHA, Entry
from simsearch.comparison.report import Column, duration, over, self_notes
from simsearch.comparison.runs import Missing
from simsearch.comparison.templates import ENVIRONMENT, HERE

DETAILED = 8  # entries with a histogram, a column of classes and regressions
CLASSES = 20
PICTURE_BYTES = 8_000_000
_PNG = b"\x89PNG"
_ROUND = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5)]
_TIMES = [60.0**e * m for e in range(3) for m in (1, 2, 5, 10, 20, 30)] + [86400.0 * m for m in (1, 2, 5, 10, 20)]
_AXES = (
    ("bytes_per_item", "bytes per image", "{:g}".format, [2.0**e for e in range(20)]),
    ("train_seconds", "training time", duration, _TIMES),
    ("index/latency_ms_p50", "median latency, ms per query", "{:.3g}".format, _ROUND),
)


@dataclass(frozen=True)
class Picture:
    """A thumbnail.

    Attributes:
        data: Bytes of a PNG or JPEG.
        caption: Text below the image.
        right: True if right, False if wrong, None if not judged.
    """

    data: bytes
    caption: str
    right: bool | None = None


@dataclass(frozen=True)
class Case:
    """A query that a run ranks worse than the baseline.

    Attributes:
        query: The query.
        before: Its value for the baseline.
        after: Its value for the run.
        found_before: The first results of the baseline.
        found_after: The first results of the run.
    """

    query: Picture
    before: float
    after: float
    found_before: Sequence[Picture]
    found_after: Sequence[Picture]


@dataclass(frozen=True)
class Comparison:
    """The content of the page.

    Attributes:
        entries: The entries, best first.
        columns: Columns of the leaderboard.
        metric: The metric that ranks.
        missing: Runs without a result.
        classes: Names of the labels. None if unknown.
        cases: For each entry name the worst regressions, or the reason why there are no pictures.
        differences: For each config key one text per entry.
        forced: True if the entries have several protocols.
    """

    entries: Sequence[Entry]
    columns: Sequence[Column]
    metric: str
    missing: Sequence[Missing]
    classes: Sequence[str] | None
    cases: Mapping[str, Sequence[Case] | str]
    differences: Mapping[str, Sequence[str]]
    forced: bool


def page(comparison: Comparison) -> str:
    """The page as text, rendered from page.html.j2.

    Args:
        comparison: The content.
    """
    c = comparison
    # One line each, so that what the policy's hash covers is what stands between the tags.
    style, script = (Markup((HERE / name).read_text(encoding="utf-8").strip()) for name in ("page.css", "page.js"))
    definitions = dict.fromkeys(name for e in c.entries for name in e.values if name.startswith("definitions/"))
    text = ENVIRONMENT.get_template("page.html.j2").render(
        c=c,
        baseline=_baseline(c),
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        kinds=sorted({(entry.protocol, entry.fingerprint, over(entry)) for entry in c.entries}),
        self_notes=self_notes(c.entries),
        only=_only(c),
        timed=any(entry.cost("train_seconds") is not None for entry in c.entries),
        scatter_figures=_scatters(c),
        histogram_figures=_histograms(c),
        class_table=_classes(c),
        definition_names=list(definitions),
        regression_blocks=_regressions(c),
        difference_table=_differences(c),
        judgement=_judgement,
        base64=lambda data: base64.b64encode(data).decode(),
        PNG=_PNG,
        ALPHA=ALPHA,
    )
    return text.lstrip() + "\n"


def _baseline(c: Comparison) -> Entry:
    return next(entry for entry in c.entries if entry.is_baseline)


def _compared(c: Comparison) -> list[tuple[int, Entry]]:
    """The best entries that were tested against the baseline, with their ranks."""
    tested = [(rank, entry) for rank, entry in enumerate(c.entries, start=1) if entry.paired is not None]
    return tested[:DETAILED]


def _only(c: Comparison) -> str:
    tested = sum(entry.paired is not None for entry in c.entries)
    return f" Shown are the best {DETAILED} of {tested}." if tested > DETAILED else ""


def _judgement(entry: Entry) -> str | None:
    if entry.paired is None or entry.paired.p_holm >= ALPHA:
        return None
    return "better" if entry.paired.difference > 0 else "worse"


def _scatters(c: Comparison) -> list[Markup]:
    """Scatter plots of quality against each cost that is known and differs."""
    figures = []
    for name, label, text, ticks in _AXES:
        points = []
        for rank, entry in enumerate(c.entries, start=1):
            cost, value = entry.cost(name), entry.values[c.metric]
            if cost is not None and cost > 0:
                low, high = value.interval or (value.mean, value.mean)
                points.append(Point(rank, entry.name, cost, value.mean, low, high, entry.is_baseline))
        if len({point.x for point in points}) > 1:
            figures.append(scatter(points, label, c.metric, text, ticks))
    return figures


def differences_by_query(entry: Entry, line: Entry) -> Tensor:
    """Each query's value minus the baseline's, float64 (Q,).

    Args:
        entry: The entry.
        line: The baseline's entry.
    """
    assert entry.queries is not None
    assert line.queries is not None
    return entry.queries.value - line.queries.value


def _histograms(c: Comparison) -> list[dict[str, Any]]:
    line, compared = _baseline(c), _compared(c)
    changes = [differences_by_query(entry, line) for _, entry in compared]
    widest = max((float(values.nan_to_num(0.0).abs().max()) for values in changes), default=0.0) or 1.0
    figures = []
    for (rank, entry), change in zip(compared, changes, strict=True):
        values = change[change.isfinite()]
        better, worse, equal = (float(part.double().mean()) for part in (values > 0, values < 0, values == 0))
        figure = {"rank": rank, "name": entry.name, "picture": histogram(values, c.metric, widest)}
        figures.append(figure | {"better": better, "worse": worse, "equal": equal})
    return figures


def class_means(entry: Entry) -> dict[int, float]:
    """The mean value of the queries of each known label. Labels without a value are left out.

    Args:
        entry: The entry.
    """
    assert entry.queries is not None
    label, value = entry.queries.label, entry.queries.value
    kept = value.isfinite() & (label >= 0)
    found, inverse = label[kept].unique(return_inverse=True)
    sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, inverse, value[kept])
    return dict(zip(found.tolist(), (sums / inverse.bincount(minlength=len(found))).tolist(), strict=True))


def _classes(c: Comparison) -> dict[str, Any] | None:
    """Class means of the baseline and the compared entries, for the classes that differ most.

    Classes without a value of one of them are left out. None with fewer than two.
    """
    line = _baseline(c)
    if line.queries is None:
        return None
    shown = [(c.entries.index(line) + 1, line), *_compared(c)]
    means = [class_means(entry) for _, entry in shown]
    reference = {label: mean for label, mean in means[0].items() if all(label in others for others in means)}
    if len(reference) < 2:
        return None
    spread = {label: max(abs(m[label] - reference[label]) for m in means) for label in reference}
    order = sorted(reference, key=lambda label: (-spread[label], label))[:CLASSES]
    widest = max(max(spread[label] for label in order), 1e-9)
    rows = []
    for name, label in sorted((_class_name(c, label), label) for label in order):
        changes = [mean[label] - reference[label] for mean in means]
        cells = [
            {"mean": mean[label], "change": change, "tint": 0.45 * abs(change) / widest}
            for mean, change in zip(means, changes, strict=True)
        ]
        rows.append((name, cells))
    return {"entries": shown, "rows": rows, "count": len(reference)}


def _class_name(c: Comparison, label: int) -> str:
    return c.classes[label] if c.classes is not None and label < len(c.classes) else str(label)


def _regressions(c: Comparison) -> str | list[tuple[int, Entry, Sequence[Case] | str]]:
    """For each compared entry its rank and its cases, or why it has none. A single text if that applies to all."""
    reasons = [cases for cases in c.cases.values() if isinstance(cases, str)]
    if reasons and len(reasons) == len(c.cases) and len(set(reasons)) == 1 and _compared(c):
        return reasons[0]
    left = PICTURE_BYTES
    blocks: list[tuple[int, Entry, Sequence[Case] | str]] = []
    for rank, entry in _compared(c):
        cases = c.cases.get(entry.name)
        if cases is None:
            continue
        if not isinstance(cases, str):
            size = sum(len(p.data) for case in cases for p in (case.query, *case.found_before, *case.found_after))
            if size > left:
                cases = f"left out: the page holds at most {PICTURE_BYTES / 1e6:.0f} MB of pictures"
            else:
                left -= size
        blocks.append((rank, entry, cases))
    return blocks


def _differences(c: Comparison) -> dict[str, Any] | None:
    """The config keys that differ, as lines if there are more keys than entries. None if there are none."""
    if not c.differences:
        return None
    labels = [f"{rank}. {entry.name}" for rank, entry in enumerate(c.entries, start=1)]
    keys = list(c.differences)
    if len(keys) > len(labels):
        corner, heads, rows = "key", labels, list(c.differences.items())
    else:
        corner, heads = "run", keys
        rows = [(label, [c.differences[key][i] for key in keys]) for i, label in enumerate(labels)]
    return {"corner": corner, "heads": heads, "rows": rows, "number": len(keys)}
