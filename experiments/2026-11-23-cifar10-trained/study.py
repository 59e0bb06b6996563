"""What networks that learn to search gain on CIFAR-10. README.md beside this file has the question.

    simsearch reproduce row=<name> run_root=ROOT    trains and measures a row of rows.yaml (one after another)
    python study.py collect ROOT                    results.csv and paired.csv, from the finished runs in ROOT
    python study.py curves ROOT ROW ...             curves.csv: precision-recall of some rows, described anew
    python study.py figures                         the three pictures, from the .csv files
    python study.py table                           the tables of README.md, from the .csv files

Runs are found by their config, whatever their folders are called. `collect` says what it did not find.
"""

from __future__ import annotations

import csv
import itertools
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra

from simsearch import configs, saved_run
from simsearch.callbacks.evaluation import RetrievalEvaluation
from simsearch.files import replacing
from simsearch.functional.curves import RECALL_LEVELS, precision_recall_curve
from simsearch.results import RESULT_COLUMNS
from simsearch.studies.rows import check_names, read_rows
from simsearch.studies.runs import compose, find_run, finished_runs
from simsearch.studies.tables import PAIRED_COLUMNS, measurements, paired_lines, result_lines, write_csv

HERE = Path(__file__).parent
RESULTS, PAIRED, CURVES, README = (HERE / n for n in ("results.csv", "paired.csv", "curves.csv", "README.md"))
CURVE_COLUMNS = ("row", "protocol", "fingerprint", "recall", "precision")
METRICS = (
    *("mAP", "mAP_index_order", "mAP_pessimistic", "mAP_optimistic", "P@1", "P@10", "P@100", "R@10", "index/P@10"),
    *("code/balance", "code/worst_balance", "code/correlation", "code/quantisation_error", "code/dead_bits"),
    *("code/empty_ball@2", "index/latency_ms_p50", "queries_without_relevant"),
    *("rerank/mAP", "rerank/P@1", "rerank/P@10", "rerank/fit_s", "rerank/seconds_per_query"),
)
MAIN, RELEASE = "10k-50k", "dsh-release"
FROZEN = "frozen-lite0-rmac-128d"  # the line to beat
PAPER = {12: 0.6157, 24: 0.6512, 36: 0.6607, 48: 0.6755}  # DSH, Liu et al. 2016


def main() -> None:
    mode, *arguments = sys.argv[1:] or ["help"]
    if mode == "collect" and len(arguments) == 1:
        collect(Path(arguments[0]))
    elif mode == "curves" and len(arguments) > 1:
        curves(Path(arguments[0]), arguments[1:])
    elif mode == "figures" and not arguments:
        figures()
    elif mode == "table" and not arguments:
        tables()
    else:
        print(__doc__)
        raise SystemExit(2)


# -------------------------------------------------------------------------------------------- collect


def collect(root: Path) -> None:
    """Writes results.csv and paired.csv."""
    book = {name: row for name, row in read_rows([HERE / "rows.yaml"]).items() if not name.startswith("smoke-")}
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        measured = list(measurements(book, finished_runs(root)))
    lines, pairs = result_lines(measured, METRICS), paired_lines(measured)
    write_csv(RESULTS, RESULT_COLUMNS, lines)
    write_csv(PAIRED, PAIRED_COLUMNS, pairs)
    print(f"{len(lines)} values of {len({m.label for m in measured})} rows, {len(pairs)} pairs")


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------- precision and recall


def curves(root: Path, names: Sequence[str]) -> None:
    """Writes curves.csv: mean precision at levels of recall under the run's own protocol, seed 0 of each row."""
    book = read_rows([HERE / "rows.yaml"])
    check_names(names, book)
    runs = finished_runs(root)
    lines = []
    for name in names:
        with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
            run, _ = find_run(book, name, book[name].seeds[0], runs)
        if run is None:
            raise SystemExit(f"{name} has no finished run in {root}")
        result, task = described(run)
        means = precision_recall_curve(result.query, result.gallery, exclude_self=task.exclude_self).tolist()
        lines += [[name, task.name, task.fingerprint, *pair] for pair in zip(RECALL_LEVELS, means, strict=True)]
    write_csv(CURVES, CURVE_COLUMNS, lines)


def described(run: saved_run.Run):
    """The evaluation of a run's checkpoint under MAIN, done anew, and its task."""
    config = dict(run.config)
    with hydra.initialize_config_dir(configs.CONF, version_base="1.3"):
        config["protocol"] = compose(("data=cifar10", f"protocol={MAIN}"))["protocol"]
    config["callbacks"] = {"evaluation": config["callbacks"]["evaluation"] | {"rerank": None}}
    data, model = configs.build_data(config), saved_run.load_model(run)
    with tempfile.TemporaryDirectory() as folder:
        trainer = configs.build_trainer(config, Path(folder), [])
        trainer.test(model, data, verbose=False)
    evaluation = next(c for c in trainer.callbacks if isinstance(c, RetrievalEvaluation))
    return evaluation.results["test"], data.task("test")


# ---------------------------------------------------------------------------------- reading the results


@dataclass(frozen=True)
class Value:
    """A metric of a row under a protocol, over the seeds that ran; low and high: means of the seeds' intervals over
    queries."""

    seeds: tuple[float, ...]
    low: float | None
    high: float | None
    bytes: int
    minutes: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def spread(self) -> tuple[float, float]:
        """Ends of the seeds where there are several, else of the interval over queries."""
        if len(self.seeds) > 1 or self.low is None:
            return min(self.seeds), max(self.seeds)
        return self.low, self.high

    def __str__(self) -> str:
        if len(self.seeds) > 1:
            return f"{self.mean:.4f} ± {statistics.stdev(self.seeds):.4f} ({len(self.seeds)} seeds)"
        return f"{self.mean:.4f}"


Table = dict[tuple[str, str, str], Value]


def read_values(lines: Iterable[dict[str, str]]) -> Table:
    """(row, protocol, metric) -> Value, in the order of results.csv."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for line in lines:
        if line["value"]:
            groups.setdefault((line["row"], line["protocol"], line["metric"]), []).append(line)
    values = {}
    for key, group in groups.items():
        ends = [[float(line[end]) for line in group if line[end]] for end in ("ci_low", "ci_high")]
        low, high = (statistics.fmean(end) if end else None for end in ends)
        seeds = tuple(float(line["value"]) for line in group)
        values[key] = Value(seeds, low, high, int(group[0]["bytes_per_item"]), float(group[0]["seconds"]) / 60)
    return values


def rows_of(values: Table, protocol: str, metric: str = "mAP") -> list[str]:
    """Rows that have a metric under a protocol, those apart whose evaluation re-ranked."""
    had = [row for row, p, m in values if p == protocol and m == metric]
    return [row for row in had if (row, protocol, "rerank/mAP") not in values]


def bits_of(row: str) -> int | None:
    match = re.search(r"-(\d+)bit$", row)
    return int(match[1]) if match else None


def cell(values: Table, row: str, protocol: str, metric: str, digits: int = 4) -> str:
    value = values.get((row, protocol, metric))
    if value is None:
        return "-"
    return str(value) if digits == 4 else f"{value.mean:.{digits}f}"


def interval(values: Table, row: str, protocol: str, metric: str) -> str:
    value = values.get((row, protocol, metric))
    if value is None:
        return "-"
    return f"{value} [{value.low:.4f}, {value.high:.4f}]" if value.low is not None else str(value)


# ---------------------------------------------------------------------------------------------- tables


def tables() -> None:
    """Writes the tables between their markers in README.md."""
    values = read_values(read_csv(RESULTS))
    pairs = [pair for pair in read_csv(PAIRED) if pair.get("metric", "mAP") == "mAP"]
    text = README.read_text(encoding="utf-8")
    made = {
        "dsh": dsh_table(values),
        "objectives": objectives_table(values),
        "floats": floats_table(values, pairs),
        "rerank": rerank_table(values, pairs),
        "paired": paired_table(values, pairs),
    }
    for name, table in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no place for the table {name}: <!-- {name} --> <!-- /{name} -->")
        text = pattern.sub(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", text)
    with replacing(README) as temporary:
        temporary.write_text(text, encoding="utf-8")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [f"| {' | '.join(row)} |" for row in rows] or ["nothing measured yet"]
    return "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *body, ""])


def dsh_table(values: Table) -> str:
    """DSH beside the paper."""
    rows = []
    for bits, paper in PAPER.items():
        row = f"dsh-paper-{bits}bit"
        ours = values.get((row, RELEASE, "mAP_index_order"))
        ends = [cell(values, row, RELEASE, f"mAP_{end}", 3) for end in ("pessimistic", "optimistic")]
        rows.append(
            [
                *(str(bits), f"{paper:.4f}", cell(values, row, RELEASE, "mAP_index_order")),
                "-" if ours is None else f"{ours.mean - paper:+.4f}",
                *(cell(values, row, RELEASE, "mAP"), "-".join(ends) if ours else "-"),
                *(interval(values, row, MAIN, "mAP"), cell(values, row, MAIN, "P@10", 3)),
                "-" if ours is None else f"{ours.minutes:.0f}",
            ]
        )
    header = ("bits", "paper", "ours, as the release breaks ties", "difference", "ours, ties in expectation")
    header += ("pessimistic-optimistic", f"{MAIN} mAP [95%]", f"{MAIN} P@10", "minutes")
    return markdown(header, rows)


def unseen(values: Table, row: str) -> str:
    """Mean mAP over the folds of the unseen classes, trained as rows `<row>-unseen0` and so on."""
    folds = [values.get((f"{row}-unseen{fold}", f"unseen-classes/{fold}", "mAP")) for fold in range(3)]
    means = [value.mean for value in folds if value is not None]
    return f"{statistics.fmean(means):.4f}" if len(means) == 3 else "-"


def objectives_table(values: Table) -> str:
    """Codes by objective and network, and their health."""
    health = ("code/balance", "code/correlation", "code/quantisation_error", "code/empty_ball@2")
    rows = []
    for row in rows_of(values, MAIN):
        if bits_of(row) is not None:
            ends = [cell(values, row, MAIN, f"mAP_{end}", 3) for end in ("pessimistic", "optimistic")]
            minutes = f"{values[row, MAIN, 'mAP'].minutes:.0f}"
            rows.append(
                [
                    *(row, interval(values, row, MAIN, "mAP"), "-".join(ends), cell(values, row, MAIN, "P@10", 3)),
                    *(cell(values, row, MAIN, name, 3) for name in health),
                    *(unseen(values, row), minutes),
                ]
            )
    header = ("row", f"{MAIN} mAP [95%]", "pessimistic-optimistic", "P@10", "balance", "correlation")
    header += ("quantisation error", "empty balls", "unseen classes mAP", "minutes")
    return markdown(header, rows)


def floats_table(values: Table, pairs: list[dict[str, str]]) -> str:
    """Float descriptors against frozen."""
    rows = []
    for row in rows_of(values, MAIN):
        if bits_of(row) is None and not re.search(r"-unseen\d$", row):
            value = values[row, MAIN, "mAP"]
            rows.append(
                [
                    *(row, str(value.bytes), interval(values, row, MAIN, "mAP")),
                    *(cell(values, row, MAIN, "P@1", 3), cell(values, row, MAIN, "P@10", 3)),
                    *(against(pairs, row, FROZEN), unseen(values, row), f"{value.minutes:.0f}"),
                ]
            )
    header = ("row", "bytes", f"{MAIN} mAP [95%]", "P@1", "P@10", f"mAP against {FROZEN} [95%], p")
    return markdown((*header, "unseen classes mAP", "minutes"), rows)


def rerank_table(values: Table, pairs: list[dict[str, str]]) -> str:
    """What re-ranking buys and costs."""
    rows = []
    for row, protocol, metric in values:
        if metric == "rerank/mAP":
            base = row.partition("+")[0]
            seconds = values[row, protocol, "rerank/seconds_per_query"].mean
            rows.append(
                [
                    *(base, row.partition("+")[2], protocol),
                    *(cell(values, row, protocol, name) for name in ("mAP", "rerank/mAP")),
                    against(pairs, row, base, protocol),
                    *(cell(values, row, protocol, name, 3) for name in ("P@10", "rerank/P@10")),
                    *(cell(values, row, protocol, "rerank/fit_s", 1), f"{1000 * seconds:.2f}"),
                ]
            )
    header = ("row", "re-ranking", "protocol", "mAP", "re-ranked", "difference [95%], p", "P@10", "re-ranked")
    return markdown((*header, "gallery once, s", "a query, ms"), rows)


def paired_table(values: Table, pairs: list[dict[str, str]]) -> str:
    """Each row beside frozen, and which pairs do not differ."""
    line = values.get((FROZEN, MAIN, "mAP"))
    rows = []
    for row in rows_of(values, MAIN):
        value = values[row, MAIN, "mAP"]
        if row != FROZEN and line is not None:
            apart = "yes" if value.low > line.high or value.high < line.low else "no"
            rows.append([row, str(value.bytes), interval(values, row, MAIN, "mAP"), apart, against(pairs, row, FROZEN)])
    header = ("row", "bytes", f"{MAIN} mAP [95%]", "apart from frozen's interval", "difference to frozen [95%], p")
    same = [
        f"{p['row_a']} and {p['row_b']} (p {float(p['p_holm']):.2g})"
        for p in pairs
        if p["protocol"] == MAIN and "+" not in p["row_a"] and float(p["p_holm"]) >= 0.05
    ]
    closing = f"Not told apart at .05 after Holm: {'; '.join(same) or 'none'}.\n"
    return markdown(header, rows) + "\n" + (closing if pairs else "")


def against(pairs: list[dict[str, str]], a: str, b: str, protocol: str = MAIN) -> str:
    """Difference of a to b with its paired interval and Holm-adjusted p."""
    for pair in pairs:
        if (pair["row_a"], pair["row_b"], pair["protocol"]) in ((a, b, protocol), (b, a, protocol)):
            sign = 1 if pair["row_a"] == a else -1
            difference, *ends = (sign * float(pair[name]) for name in ("difference", "low", "high"))
            p = float(pair["p_holm"])
            return f"{difference:+.4f} [{min(ends):+.4f}, {max(ends):+.4f}], {f'{p:.2g}' if p >= 0.001 else '< .001'}"
    return "-"


# --------------------------------------------------------------------------------------------- figures

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5500", "#332288", "#888888")
FAMILIES = {"frozen": ("#555555", "s"), "dsh": ("#4477aa", "o"), "hash": ("#ee6677", "^"), "dir": ("#228833", "D")}


def figures() -> None:
    """Draws map-against-bits.png, precision-recall.png and quality-against-bytes.png."""
    import matplotlib

    matplotlib.use("Agg")
    values = read_values(read_csv(RESULTS))
    draw_bits(values, HERE / "map-against-bits.png")
    draw_curves(read_csv(CURVES), HERE / "precision-recall.png")
    draw_bytes(values, HERE / "quality-against-bytes.png")


def draw_bits(values: Table, path: Path) -> None:
    """mAP against the bits of a code: the release's protocol with the paper's line, and 10k-50k."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    names = {re.sub(r"-\d+bit$", "", row) for p in (RELEASE, MAIN) for row in rows_of(values, p) if bits_of(row)}
    styles = {name: (PALETTE[i % len(PALETTE)], "o^sDvP"[i // len(PALETTE)]) for i, name in enumerate(sorted(names))}
    left.plot(list(PAPER), list(PAPER.values()), "k--o", markerfacecolor="white", label="DSH, the paper")
    for axes, protocol, metric in ((left, RELEASE, "mAP_index_order"), (right, MAIN, "mAP")):
        rows = {
            name: [r for r in rows_of(values, protocol, metric) if re.fullmatch(rf"{name}-\d+bit", r)]
            for name in styles
        }
        lone = [name for name, mine in rows.items() if len(mine) == 1]
        for name, (colour, mark) in styles.items():
            mine = sorted(rows[name], key=bits_of)
            if mine:
                aside = 1.1 * (lone.index(name) - len(lone) / 2 + 0.5) if name in lone else 0  # or they hide each other
                points = [values[row, protocol, metric] for row in mine]
                error_bars(
                    axes, [bits_of(row) + aside for row in mine], points, fmt=f"{mark}-", color=colour, label=name
                )
        axes.set_xticks(sorted({*PAPER, *(bits for row, *_ in values if (bits := bits_of(row)))}))
        axes.set_xlabel("bits")
        axes.grid(alpha=0.3)
    frozen = values.get((FROZEN, MAIN, "mAP"))
    if frozen is not None:
        right.axhline(frozen.mean, color="#555555", linestyle=":", label=f"frozen, {frozen.bytes} bytes")
    left.set_ylabel("mAP over the full ranking")
    left.set_title("dsh-release: test among test, ties in index order", fontsize=10)
    right.set_title("10k-50k, ties in expectation", fontsize=10)
    drawn = {}
    for axes in (left, right):
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    figure.legend(drawn.values(), drawn, loc="lower center", ncol=3, fontsize=8, frameon=False)
    save(figure, path, bottom=0.01 + 0.037 * -(-len(drawn) // 3))


def error_bars(axes, x: Sequence[float], drawn: Sequence[Value], **style) -> None:
    """Means with the ends of the seeds, or of the interval over queries where one seed ran."""
    means = [value.mean for value in drawn]
    below = [max(value.mean - value.spread[0], 0) for value in drawn]
    above = [max(value.spread[1] - value.mean, 0) for value in drawn]
    axes.errorbar(x, means, yerr=[below, above], capsize=2.5, markersize=5, linewidth=1.4, **style)


def draw_curves(lines: list[dict[str, str]], path: Path) -> None:
    """Mean precision over queries at levels of recall."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    groups: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        groups.setdefault(line["row"], []).append((float(line["recall"]), float(line["precision"])))
    for (row, points), colour in zip(groups.items(), itertools.cycle(PALETTE)):
        axes.plot(*zip(*points, strict=True), "-", color=colour, linewidth=1.8, label=row)
    axes.set_xlabel("recall")
    axes.set_ylabel("mean precision over queries")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_title("CIFAR-10 (JPEG q75), 10k-50k: precision against recall", fontsize=10)
    axes.grid(alpha=0.3)
    if groups:
        axes.legend(fontsize=8)
    save(figure, path)


def draw_bytes(values: Table, path: Path) -> None:
    """mAP against bytes an image; rows are numbered from the best to the worst."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6.4))
    points = sorted(((values[row, MAIN, "mAP"], row) for row in rows_of(values, MAIN)), key=lambda p: -p[0].mean)
    top, low = (end((value.mean for value, _ in points), default=i) for i, end in ((1, max), (0, min)))
    sizes = sorted({value.bytes for value, _ in points}) or [1]
    for size in sizes:
        group = [(value, row, number) for number, (value, row) in enumerate(points, 1) if value.bytes == size]
        heights = spread_out([value.mean for value, _, _ in group][::-1], gap=0.035 * (top - low + 0.02))[::-1]
        for i, ((value, row, number), height) in enumerate(zip(group, heights, strict=True)):
            colour, mark = FAMILIES.get(row.partition("-")[0], ("#aa3377", "v"))
            error_bars(axes, [size], [value], fmt=mark, color=colour)
            side = -1 if i % 2 and len(group) > 6 else 1  # numbers on both sides where there are many
            axes.annotate(str(number), (size, value.mean), xytext=(size * 1.13**side, height), fontsize=8, color=colour,
                          va="center", ha="left" if side > 0 else "right",
                          arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5})  # fmt: skip
    for name, (colour, mark) in FAMILIES.items():
        axes.plot([], [], mark, color=colour, label=name)
    for number, (value, row) in enumerate(points, 1):
        axes.plot([], [], " ", label=f"{number}  {row}  {value.mean:.3f}")
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("bytes an image")
    axes.set_ylabel("mAP over the full ranking")
    axes.set_title("CIFAR-10 (JPEG q75), 10k-50k: quality against bytes", fontsize=10)
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=1)
    axes.grid(alpha=0.3)
    save(figure, path)


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least `gap`, their middle kept."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    shift = statistics.fmean(moved) - statistics.fmean(heights)
    return [height - shift for height in moved]


def save(figure, path: Path, bottom: float | None = None) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout(rect=(0, bottom or 0, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png", bbox_inches="tight")  # or legends beside the axes are cut
    plt.close(figure)


if __name__ == "__main__":
    main()
