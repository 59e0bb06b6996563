"""The comparison as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simsearch.comparison.charts import Point, histogram, scatter
from simsearch.comparison.leaderboard import ALPHA, Entry
from simsearch.comparison.markup import Markup, element, joined
from simsearch.comparison.report import Column, duration, over, self_notes
from simsearch.comparison.runs import Missing

DETAILED = 8  # entries with a histogram, a column of classes and regressions
CLASSES = 20
PICTURE_BYTES = 8_000_000
_PNG = b"\x89PNG"
_HERE = Path(__file__).parent
_ROUND = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5)]
_TIMES = [60.0**e * m for e in range(3) for m in (1, 2, 5, 10, 20, 30)] + [86400.0 * m for m in (1, 2, 5, 10, 20)]
_AXES = (
    ("bytes_per_item", "bytes an image", "{:g}".format, [2.0**e for e in range(20)]),
    ("train_seconds", "training time", duration, _TIMES),
    ("index/latency_ms_p50", "median latency, ms a query", "{:.3g}".format, _ROUND),
)


@dataclass(frozen=True)
class Picture:
    """A thumbnail: bytes of a PNG or JPEG, a caption, and right (True), wrong (False) or unjudged (None)."""

    data: bytes
    caption: str
    right: bool | None = None


@dataclass(frozen=True)
class Case:
    """A query that a run ranks worse than the baseline: its values by both and what both found first."""

    query: Picture
    before: float
    after: float
    found_before: Sequence[Picture]
    found_after: Sequence[Picture]


@dataclass(frozen=True)
class Comparison:
    """What the page shows.

    entries: best first. columns: of the leaderboard. metric: the one that ranks. classes: names of the labels, or
    None where unknown. cases: entry name -> worst regressions, or why there are no pictures of them. differences:
    config key -> one text an entry. forced: the entries are of several protocols.
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
    """The page as text."""
    # One line each, so that what the policy's hash covers is what stands between the tags.
    style, script = (Markup((_HERE / name).read_text(encoding="utf-8").strip()) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("title", {}, f"Comparison of {_count(len(comparison.entries), 'run')} by {comparison.metric}"),
        element("style", {}, style),
    )
    sections = (_header, _table, _figures, _histograms, _classes, _definitions, _regressions, _differences, _missing)
    body = element("body", {}, *(section(comparison) for section in (*sections, _notes)), element("script", {}, script))
    return "<!doctype html>\n" + element("html", {"lang": "en"}, head, body) + "\n"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def _section(title: str, *children: str | None) -> Markup:
    return element("section", {}, element("h2", {}, title), *children)


def _header(c: Comparison) -> Markup:
    runs = sum(len(entry.results) for entry in c.entries)
    line = next(entry for entry in c.entries if entry.is_baseline)
    kinds = sorted({(entry.protocol, entry.fingerprint, over(entry)) for entry in c.entries})
    about = [f"{_count(len(c.entries), 'configuration')}, {_count(runs, 'run')}; baseline: {line.name}; "]
    about += [Markup("; ").join(joined(p, " ", element("code", {}, f), f" by {unit}") for p, f, unit in kinds)]
    warning = "These runs are of different protocols or data: their values do not compare, and have no tests across."
    return joined(
        element("h1", {}, f"Comparison by {c.metric}"),
        element("p", {"class": "soft"}, about[0], Markup(about[1])),
        *(element("p", {"class": "soft"}, note) for note in self_notes(c.entries)),
        element("p", {"class": "warning"}, warning) if c.forced else None,
    )


def _heading(title: str, about: str, ascending: bool = False, left: bool = False) -> Markup:
    button = element("button", {"type": "button", "title": about}, title)
    first = "ascending" if ascending else None
    return element("th", {"scope": "col", "data-first": first, "class": "left" if left else None}, button)


def _table(c: Comparison) -> Markup:
    heads = [_heading("#", "rank", True), _heading("run", "the run directory", True, left=True)]
    heads += [_heading(column.title, column.about, column.ascending) for column in c.columns]
    rows = []
    for rank, entry in enumerate(c.entries, start=1):
        cells = [element("td", {"data-sort": rank}, str(rank)), _name_cell(entry)]
        for column in c.columns:
            cell = column.cell(entry)
            detail = element("small", {}, cell.detail) if cell.detail else None
            kind = _judgement(entry) if column.title == "difference" else None
            cells.append(element("td", {"data-sort": cell.sort, "class": kind}, cell.text, detail))
        rows.append(element("tr", {"class": "baseline" if entry.is_baseline else None}, *cells))
    return element("div", {"class": "scroll", "style": "margin-top: 1.25rem"}, _grid(heads, rows))


def _name_cell(entry: Entry) -> Markup:
    seeds = ", ".join(map(str, entry.seeds))
    several = element("small", {}, f"seeds {seeds}") if len(entry.results) > 1 else None
    places = "\n".join(result.place for result in entry.results)
    return element("th", {"scope": "row", "data-sort": entry.name, "title": places}, entry.name, several)


def _judgement(entry: Entry) -> str | None:
    if entry.paired is None or entry.paired.p_holm >= ALPHA:
        return None
    return "better" if entry.paired.difference > 0 else "worse"


def _grid(heads: Sequence[Markup], rows: Sequence[Markup]) -> Markup:
    return element("table", {}, element("thead", {}, element("tr", {}, *heads)), element("tbody", {}, *rows))


def _figures(c: Comparison) -> Markup | None:
    figures = []
    for name, label, text, ticks in _AXES:
        points = []
        for rank, entry in enumerate(c.entries, start=1):
            cost, value = entry.cost(name), entry.values[c.metric]
            if cost is not None and cost > 0:
                low, high = value.interval or (value.mean, value.mean)
                points.append(Point(rank, entry.name, cost, value.mean, low, high, entry.is_baseline))
        if len({point.x for point in points}) > 1:
            figures.append(element("figure", {}, scatter(points, label, c.metric, text, ticks)))
    if not figures:
        return None
    caption = (
        "Numbers are ranks in the table above; the baseline is hollow. Bars: 95% intervals. Dashed: "
        "what none beats at the same cost."
    )
    return _section("Quality and cost", element("p", {"class": "soft"}, caption), _block("figures", figures))


def _block(kind: str, children: Sequence[Markup]) -> Markup:
    return element("div", {"class": kind}, *children)


def differences_by_query(entry: Entry, line: Entry) -> Tensor:
    """Each query's value minus the baseline's, float64 (Q,)."""
    assert entry.queries is not None
    assert line.queries is not None
    return entry.queries.value - line.queries.value


def _compared(c: Comparison) -> tuple[Entry, list[tuple[int, Entry]]]:
    """The baseline's entry, and the best entries that were tested against it with their ranks."""
    line = next(entry for entry in c.entries if entry.is_baseline)
    tested = [(rank, entry) for rank, entry in enumerate(c.entries, start=1) if entry.paired is not None]
    return line, tested[:DETAILED]


def _histograms(c: Comparison) -> Markup | None:
    line, compared = _compared(c)
    if not compared:
        return None
    changes = [differences_by_query(entry, line) for _, entry in compared]
    widest = max(float(values.nan_to_num(0.0).abs().max()) for values in changes) or 1.0
    figures = []
    for (rank, entry), change in zip(compared, changes, strict=True):
        values = change[change.isfinite()]
        shares = [float(part.double().mean()) for part in (values > 0, values < 0, values == 0)]
        caption = "better {:.1%}, worse {:.1%}, equal {:.1%} of queries".format(*shares)
        title = element("h3", {}, f"{rank}. {entry.name}")
        picture = histogram(values, c.metric, widest)
        figures.append(element("figure", {}, title, picture, element("figcaption", {}, caption)))
    about = (
        f"Each query's value minus the one of {line.name}. Equal queries are not drawn; heights go with the "
        "square root of the counts, so that the few great differences show." + _only(c)
    )
    return _section("Differences by query", element("p", {"class": "soft"}, about), _block("figures small", figures))


def _only(c: Comparison) -> str:
    tested = sum(entry.paired is not None for entry in c.entries)
    return f" Shown are the best {DETAILED} of {tested}." if tested > DETAILED else ""


def class_means(entry: Entry) -> dict[int, float]:
    """Mean value of the queries of each known label that has a query with a value."""
    assert entry.queries is not None
    label, value = entry.queries.label, entry.queries.value
    kept = value.isfinite() & (label >= 0)
    found, inverse = label[kept].unique(return_inverse=True)
    sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, inverse, value[kept])
    return dict(zip(found.tolist(), (sums / inverse.bincount(minlength=len(found))).tolist(), strict=True))


def _classes(c: Comparison) -> Markup | None:
    line, compared = _compared(c)
    if line.queries is None:
        return None
    shown = [(c.entries.index(line) + 1, line), *compared]
    means = [class_means(entry) for _, entry in shown]
    reference = means[0]
    if len(reference) < 2:
        return None
    spread = {label: max(abs(m[label] - reference[label]) for m in means) for label in reference}
    order = sorted(reference, key=lambda label: (-spread[label], label))[:CLASSES]
    order.sort(key=lambda label: _class_name(c, label))
    heads = [_heading("class", "the label that makes items relevant", True, left=True)]
    heads += [_heading(f"{rank}. {entry.name}", entry.name) for rank, entry in shown]
    widest = max(max(spread[label] for label in order), 1e-9)
    rows = []
    for label in order:
        name = _class_name(c, label)
        cells = [element("th", {"scope": "row", "data-sort": name}, name)]
        for i, mean in enumerate(means):
            change = mean[label] - reference[label]
            side = "good" if change > 0 else "bad"
            tint = f"background: rgba(var(--{side}-tint), {0.45 * abs(change) / widest:.2f})" if i and change else None
            detail = element("small", {}, f"{change:+.3f}") if i else None
            cells.append(
                element("td", {"data-sort": f"{mean[label]:.6f}", "style": tint}, f"{mean[label]:.3f}", detail)
            )
        rows.append(element("tr", {}, *cells))
    about = f"Mean {c.metric} of the queries of a class; small: difference to {line.name}, by which cells are tinted."
    if len(reference) > CLASSES:
        about += f" Shown are the {CLASSES} of {len(reference)} classes that differ most."
    about += _only(c)
    table = element("div", {"class": "scroll"}, _grid(heads, rows))
    return _section(f"{c.metric} by class", element("p", {"class": "soft"}, about), table)


def _class_name(c: Comparison, label: int) -> str:
    return c.classes[label] if c.classes is not None and label < len(c.classes) else str(label)


def _definitions(c: Comparison) -> Markup | None:
    """The same ranking by each definition of mAP@k, where the runs measured that."""
    prefix = "definitions/"
    names = list(dict.fromkeys(n for e in c.entries for n in e.values if n.startswith(prefix)))
    if not names:
        return None
    heads = [_heading("#", "rank", True), _heading("run", "the run directory", True, left=True)]
    heads += [_heading(name.removeprefix(prefix), name) for name in names]
    rows = []
    for rank, entry in enumerate(c.entries, start=1):
        values = [entry.values.get(name) for name in names]
        cells = [
            element("td", {"data-sort": None if v is None else v.mean}, "-" if v is None else f"{v.mean:.4f}")
            for v in values
        ]
        rows.append(element("tr", {}, element("td", {"data-sort": rank}, str(rank)), _name_cell(entry), *cells))
    about = (
        "The index's answers by every definition of mAP@k in use, so that a paper's number finds its column. With S "
        "the sum of the precisions at the ranks of the relevant items among the first k: found, S / number found; "
        "found_only, the same over the queries that found something; R, S / all relevant; minRk, S / min(R, k); "
        "trapezoid, the area of Oxford Buildings' program."
    )
    table = element("div", {"class": "scroll"}, _grid(heads, rows))
    return _section("One ranking, five numbers", element("p", {"class": "soft"}, about), table)


def _regressions(c: Comparison) -> Markup | None:
    line, compared = _compared(c)
    if not c.cases or not compared:
        return None
    reasons = [cases for cases in c.cases.values() if isinstance(cases, str)]
    if len(reasons) == len(c.cases) and len(set(reasons)) == 1:
        return _section("Worst regressions", element("p", {"class": "soft"}, reasons[0]))
    left = PICTURE_BYTES
    blocks = []
    for rank, entry in compared:
        cases = c.cases.get(entry.name)
        if cases is None:
            continue
        if not isinstance(cases, str):
            size = sum(len(p.data) for case in cases for p in (case.query, *case.found_before, *case.found_after))
            if size > left:
                cases = f"left out: the page holds at most {PICTURE_BYTES / 1e6:.0f} MB of pictures"
            else:
                left -= size
        if isinstance(cases, str):
            blocks.append(element("p", {}, element("strong", {}, f"{rank}. {entry.name}: "), cases))
            continue
        rows = [_case(case, line, entry, c.metric) for case in cases]
        title = element("summary", {}, f"{rank}. {entry.name}")
        none = "No query is worse." if not rows else None
        blocks.append(element("details", {"open": "" if not blocks else None}, title, none, *rows))
    about = (
        f"Queries whose {c.metric} falls most against {line.name}, and what both found first. A solid frame is right, "
        "a dashed one wrong." + _only(c)
    )
    return _section("Worst regressions", element("p", {"class": "soft"}, about), *blocks)


def _case(case: Case, line: Entry, entry: Entry, metric: str) -> Markup:
    change = f"{metric.replace('mAP', 'AP')} {case.before:.3f} to {case.after:.3f}"
    text = element("div", {}, case.query.caption, element("br", {}), change)
    query = element("div", {"class": "query"}, _picture(case.query), text)
    found = [
        joined(
            element("div", {"class": "found"}, name),
            element("div", {"class": "strip"}, *map(_neighbour, pictures)),
        )
        for name, pictures in ((line.name, case.found_before), (entry.name, case.found_after))
    ]
    return element("div", {"class": "case"}, query, element("div", {}, *found))


def _neighbour(picture: Picture) -> Markup:
    kind = {True: "right", False: "wrong", None: None}[picture.right]
    return element("span", {"class": kind}, _picture(picture))


def _picture(picture: Picture) -> Markup:
    png = picture.data.startswith(_PNG)
    data = base64.b64encode(picture.data).decode()
    judged = {True: "right: ", False: "wrong: ", None: ""}[picture.right]
    about = judged + picture.caption
    given = {"src": f"data:image/{'png' if png else 'jpeg'};base64,{data}", "alt": about, "title": about}
    return element("img", {**given, "class": "tiny" if png else None, "loading": "lazy"})


def _differences(c: Comparison) -> Markup | None:
    if len(c.entries) < 2:
        return None
    if not c.differences:
        return _section("Config differences", element("p", {}, "The configs differ in nothing but seeds and places."))
    labels = [f"{rank}. {entry.name}" for rank, entry in enumerate(c.entries, start=1)]
    keys = list(c.differences)
    if len(keys) > len(labels):
        heads, names, lines = labels, keys, [c.differences[key] for key in keys]
    else:
        heads, names = keys, labels
        lines = [[c.differences[key][i] for key in keys] for i in range(len(labels))]
    head = [_heading("key" if heads is labels else "run", "", True, left=True)]
    head += [_heading(name, name, True, left=True) for name in heads]
    rows = []
    for i, (name, line) in enumerate(zip(names, lines, strict=True)):
        cells = [element("td", {"class": "left wrap", "data-sort": text, "title": text}, _clip(text)) for text in line]
        rows.append(
            element(
                "tr", {}, element("th", {"scope": "row", "data-sort": name if heads is labels else i}, name), *cells
            )
        )
    table = element("div", {"class": "scroll"}, _grid(head, rows))
    about = f"{_count(len(keys), 'key')} with other values; seeds, places and copies of a key are left out."
    if len(keys) > 24:
        table = element("details", {}, element("summary", {}, _count(len(keys), "key")), table)
    return _section("Config differences", element("p", {"class": "soft"}, about), table)


def _clip(text: str, length: int = 90) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _missing(c: Comparison) -> Markup | None:
    if not c.missing:
        return None
    rows = [
        element(
            "tr",
            {},
            element("th", {"scope": "row", "data-sort": m.name}, m.name),
            element("td", {"class": "left", "data-sort": m.state}, m.state),
            element("td", {"class": "left wrap"}, m.reason),
        )
        for m in c.missing
    ]
    heads = [_heading("run", "", True, left=True), _heading("state", "", True, left=True)]
    heads.append(element("th", {"scope": "col", "class": "left"}, "why"))
    return _section("Runs without a result", element("div", {"class": "scroll"}, _grid(heads, rows)))


def _notes(c: Comparison) -> Markup:
    notes = [
        "Intervals and tests go by the unit of chance that the protocol names: by artist, all queries of an artist are "
        "one draw. Intervals come from the jackknife over units; those of shares are binomial, with the effective "
        "number of trials (Korn and Graubard 1998). Two of them may overlap where the paired difference is clear: the "
        "same queries are hard for both. Read the difference.",
        "p-values are of a sign-flip permutation test of the differences by unit (10,000 draws), adjusted by Holm "
        f"over all comparisons with the baseline here; a difference is coloured where the adjusted p is below {ALPHA}.",
        "MDE 80% is the true difference that this pairing detects with a chance of 80% at Holm's strictest step. "
        "Where no difference was found, one below it may well be there.",
        "Several seeds of one configuration are one line: values and tests are of each query's mean over the seeds. "
        "The tests tell these trained networks apart; what another training would bring, only ± (the standard "
        "deviation between seeds) says.",
        "The order is by the test value itself: whoever picks the best of many runs by it sees a value that is too "
        "high. Pick on validation.",
    ]
    if all(entry.cost("train_seconds") is None for entry in c.entries):
        notes.append("These runs did not record how long they trained, so there is no column of it.")
    if any(entry.queries is None for entry in c.entries):
        notes.append("Runs read from W&B bring summaries only: no values by query, so no paired test.")
    return _section("How to read this", *(element("p", {}, note) for note in notes))
