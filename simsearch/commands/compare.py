"""simsearch compare: compares runs, with paired tests against a baseline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from simsearch import configs, program, saved_run, terminal, tracking
from simsearch.comparison.leaderboard import Entry, check_comparable, config_differences, leaderboard
from simsearch.comparison.page import DETAILED, Case, Comparison, page
from simsearch.comparison.regressions import Judge, cases
from simsearch.comparison.report import columns, csv_text, markdown_table, terminal_table
from simsearch.comparison.runs import Result
from simsearch.comparison.selection import configuration, find_baseline, has_value, read, without_repeats
from simsearch.files import replacing
from simsearch.results import HEADLINES
from simsearch.sweeps.objectives import is_cost
from simsearch.text import cell

# Parts of a config that affect no number: locations and reports.
PLACES = ("run_dir", "run_root", "resume", "logger", "catalog", "data.root", "data.cache", "data.download")


@program.command("compare")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch compare`.

    Args:
        config: The config of conf/compare.yaml.

    Raises:
        ValueError: If the metric that ranks is a cost.
    """
    values = configs.plain(config)
    trusted = configs.trusts(config)
    metric = values["metric"]
    if is_cost(metric):
        raise ValueError(
            f"metric={metric} is a cost: give what should be large, such as mAP; costs have columns beside it"
        )
    results, missing = read(configs.listed(values["runs"]), tracking.wandb_api, trusted=trusted)
    if values["baseline"] is None:
        baseline = results[0]
    else:
        baseline, results = find_baseline(str(values["baseline"]), results, trusted=trusted)
    results, repeats = without_repeats(results, baseline)
    for result, kept in repeats:
        terminal.show(f"{cell(result.name)} repeats {cell(kept.name)} with the same seed: left out")
    if not values["force"]:
        check_comparable(results)
    headlines = [name for name in dict.fromkeys((metric, *HEADLINES)) if has_value(results, name)]
    definitions = list(dict.fromkeys(n for r in results for n in r.metrics if n.startswith("definitions/")))
    seed = values["seed"]
    also = [*headlines, *definitions]
    entries = leaderboard(results, configuration, baseline=baseline, metric=metric, also=also, seed=seed)
    shown = columns(entries, headlines)

    classes, shown_cases = pictures(entries, metric, values["regressions"], values["k"], trusted=trusted)
    comparison = Comparison(
        entries=entries,
        columns=shown,
        metric=metric,
        missing=missing,
        classes=classes,
        cases=shown_cases,
        differences=config_differences(entries, PLACES),
        forced=len({(entry.fingerprint, entry.unit) for entry in entries}) > 1,
    )
    out = Path(values["out"])
    for name, text in (
        ("leaderboard.csv", csv_text(entries, also, missing)),
        ("leaderboard.md", markdown_table(entries, shown, missing)),
        ("index.html", page(comparison)),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    show(comparison, baseline)
    print(f"page:  {out / 'index.html'}\ntable: {out / 'leaderboard.csv'}, {out / 'leaderboard.md'}")


def show(comparison: Comparison, baseline: Result) -> None:
    """Prints the leaderboard and the runs that are not in it.

    Args:
        comparison: The comparison.
        baseline: The result of the baseline.
    """
    terminal.show(terminal_table(comparison.entries, comparison.columns, terminal.console().width))
    tested = sum(entry.paired is not None for entry in comparison.entries)
    terminal.show(f"baseline {cell(baseline.name)}; {tested} paired tests, p adjusted by Holm; the page says more")
    if comparison.forced:
        terminal.show("[red]these runs have different protocols or data: their values cannot be compared[/red]")
    for m in comparison.missing:
        terminal.show(f"{cell(m.name)}: {m.state}, {cell(m.reason)}")


def pictures(
    entries: Sequence[Entry], metric: str, count: int, k: int, *, trusted: bool = False
) -> tuple[Sequence[str] | None, dict[str, Sequence[Case] | str]]:
    """The names of the labels, and for each entry its worst regressions with images, or why there are none.

    Args:
        entries: The entries.
        metric: The metric that ranks.
        count: Number of regressions per entry.
        k: Number of neighbours per query.
        trusted: True if the user trusts whoever made the runs.
    """
    line = next(entry for entry in entries if entry.is_baseline)
    compared = [entry for entry in entries if entry.paired is not None][:DETAILED]
    if count < 1 or not compared:
        return None, {}
    if metric.startswith(("rerank/", "verify/")):
        way = "re-ranking" if metric.startswith("rerank/") else "verification"
        return None, {e.name: f"no pictures: runs do not keep the neighbours after {way}" for e in compared}
    try:
        first = line.results[0]
        config = first.config if trusted else saved_run.admitted(first.config, first.place)
        judge = Judge.of(configs.build_data(config).collection, line)
    except program.user_errors(LookupError) as error:
        reason = program.reason(error)
        print(f"no pictures: {reason}", file=sys.stderr)
        return None, {e.name: f"no pictures: the data cannot be read ({reason})" for e in compared}
    shown = tqdm(compared, desc="regressions", unit="run", leave=False)
    return judge.names, cases(judge, line, shown, count, k, trusted=trusted)


if __name__ == "__main__":
    main()
