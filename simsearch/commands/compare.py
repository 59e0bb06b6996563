"""simsearch compare: compares runs, with paired tests against a baseline."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from simsearch import configs, program, saved_run, terminal, tracking
from simsearch.comparison.leaderboard import Entry, check_comparable, config_differences, leaderboard
from simsearch.comparison.page import DETAILED, Case, Comparison, Picture, differences_by_query, page
from simsearch.comparison.report import columns, csv_text, markdown_table, terminal_table
from simsearch.comparison.runs import Missing, Result, expand, read_all, read_wandb, short_names
from simsearch.data.collection import Collection
from simsearch.files import read_json, replacing
from simsearch.identity import run_identity, start_config
from simsearch.images import encode_thumbnail
from simsearch.results import HEADLINES
from simsearch.search.catalog import read_catalog
from simsearch.search.describe import encode
from simsearch.search.engine import Engine
from simsearch.text import cell
from simsearch.trust import check_links

THUMBNAIL_SIDE = 96
# Parts of a config that affect no number: locations and reports.
PLACES = ("run_dir", "run_root", "resume", "logger", "catalog", "data.root", "data.cache", "data.download")


@program.command("compare")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch compare`.

    Args:
        config: The config of conf/compare.yaml.
    """
    values = configs.plain(config)
    trusted = configs.trusts(config)
    results, missing = read(configs.listed(values["runs"]), trusted=trusted)
    if values["baseline"] is None:
        baseline = results[0]
    else:
        baseline, results = find_baseline(str(values["baseline"]), results, trusted=trusted)
    results = without_repeats(results, baseline)
    if not values["force"]:
        check_comparable(results)
    metric = values["metric"]
    headlines = [name for name in dict.fromkeys((metric, *HEADLINES)) if _known(results, name)]
    definitions = list(dict.fromkeys(n for r in results for n in r.metrics if n.startswith("definitions/")))
    seed = values["seed"]
    also = [*headlines, *definitions]
    entries = leaderboard(results, configuration, baseline=baseline, metric=metric, also=also, seed=seed)
    shown = columns(entries, headlines)

    classes, cases = pictures(entries, metric, values["regressions"], values["k"], trusted=trusted)
    comparison = Comparison(
        entries=entries,
        columns=shown,
        metric=metric,
        missing=missing,
        classes=classes,
        cases=cases,
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


# ------------------------------------------------------------------------------------------- the runs


def read(names: Sequence[str], *, trusted: bool = False) -> tuple[list[Result], list[Missing]]:
    """The results of all runs that the names lead to, and the runs without a result.

    Args:
        names: Folders, globs, and addresses in W&B.
        trusted: True if the user trusts whoever made the runs.

    Raises:
        ValueError: If no run has a result.
    """
    remote = [name.removeprefix("wandb:") for name in names if name.startswith("wandb:")]
    results, missing = read_all(folders([name for name in names if not name.startswith("wandb:")], trusted=trusted))
    if remote:
        with tracking.wandb_api() as api:
            for address in remote:
                more, without = read_wandb(api, address)
                results, missing = [*results, *more], [*missing, *without]
    if not results:
        reasons = "".join(f"\n  {m.name}: {m.state}, {m.reason}" for m in missing)
        raise ValueError(f"no run has a finished test:{reasons}")
    return results, missing


def folders(names: Sequence[str], *, trusted: bool = False) -> list[Path]:
    """The folders that the names lead to.

    Args:
        names: Folders and globs.
        trusted: True if the user trusts whoever made the folders.

    Raises:
        ValueError: If a link leads out of a folder that is not trusted.
    """
    found = expand(names)
    for folder in () if trusted else found:
        check_links(folder)
    return found


def find_baseline(wanted: str, results: Sequence[Result], *, trusted: bool = False) -> tuple[Result, list[Result]]:
    """The result of the baseline, and all results including it. The baseline may be a run that is not among `results`.

    Args:
        wanted: Name or folder of the baseline.
        results: The results.
        trusted: True if the user trusts whoever made the runs.

    Raises:
        ValueError: If `wanted` leads to no run, or to a run without a result.
    """
    folder = Path(wanted).expanduser()
    for result in results:
        if wanted in (result.name, result.place) or str(folder.resolve()) == result.place:
            return result, list(results)
    if not folder.is_dir():
        names = ", ".join(result.name for result in results)
        raise ValueError(f"baseline={wanted} is neither a folder nor one of the runs {names}")
    found, missing = read_all(folders([wanted], trusted=trusted))
    if len(found) + len(missing) != 1:
        raise ValueError(f"baseline={wanted} holds {len(found) + len(missing)} runs: give one of them")
    if missing:
        raise ValueError(f"baseline={wanted} is {missing[0].state}: {missing[0].reason}")
    together = [*found, *results]
    short = short_names([result.place for result in together])
    together = [replace(result, name=name) for result, name in zip(together, short, strict=True)]
    return together[0], together


def _known(results: Sequence[Result], name: str) -> bool:
    return any(result.metrics.get(name) is not None for result in results)


def configuration(result: Result) -> str:
    """The part of the config that determines numbers, and the measurement. Runs that share it differ only in the seed.

    Args:
        result: The result.
    """
    measured = "" if result.run is None else Path(result.place).relative_to(result.run)
    try:
        return f"{run_identity(result.config, without=['seed'])} {measured}"
    except (LookupError, TypeError, AttributeError):  # of another time or hand: only equal to itself
        return result.place


def without_repeats(results: Sequence[Result], baseline: Result) -> list[Result]:
    """The results without repetitions of the same configuration and seeds. What is left out is printed.

    A configuration that was run twice with one seed is one draw, not two. The baseline is kept, else the first run.

    Args:
        results: The results.
        baseline: The result of the baseline.
    """
    kept: dict[tuple[Any, ...], Result] = {}
    for result in sorted(results, key=lambda result: result is not baseline):
        key = (configuration(result), result.fingerprint, result.unit, seeds(result.config))
        if kept.setdefault(key, result) is not result:
            terminal.show(f"{cell(result.name)} repeats {cell(kept[key].name)} with the same seed: left out")
    return [result for result in results if any(result is one for one in kept.values())]


def seeds(config: Mapping[str, Any]) -> str:
    """The seeds of a config and of the run that its training starts from, as one text.

    Args:
        config: The plain config.
    """
    found = [str(value) for key, value in _leaves(config) if key == "seed"]
    if (begun := start_config(config)) is not None:
        found.append(seeds(begun))
    return " ".join(found)


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name in sorted(node, key=str):
            yield from _leaves(node[name], str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value)
    else:
        yield key, node


# ---------------------------------------------------------------------------------------- regressions


def pictures(
    entries: Sequence[Entry], metric: str, count: int, k: int, *, trusted: bool = False
) -> tuple[Sequence[str] | None, dict[str, Sequence[Case] | str]]:
    """The names of the labels, and for each entry its worst regressions with images, or why there are none.

    Neighbours are those that the runs stored, else those that their catalogs find now. Images come from the data.

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
    if metric.startswith("rerank/"):
        return None, {e.name: "no pictures: runs do not keep the neighbours after re-ranking" for e in compared}
    try:
        first = line.results[0]
        config = first.config if trusted else saved_run.admitted(first.config, first.place)
        collection = configs.build_data(config).collection
        judge = Judge.of(collection, line)
    except (*program.USER_ERRORS, LookupError) as error:
        reason = program.reason(error)
        print(f"no pictures: {reason}", file=sys.stderr)
        return None, {e.name: f"no pictures: the data cannot be read ({reason})" for e in compared}
    cases: dict[str, Sequence[Case] | str] = {}
    for entry in tqdm(compared, desc="regressions", unit="run", leave=False):
        worst = worst_queries(entry, line, count)
        try:
            found = [neighbours(e.results[0], collection, judge, worst, k, trusted=trusted) for e in (line, entry)]
        except (ValueError, OSError) as error:
            cases[entry.name] = f"no pictures: {error}"
            continue
        cases[entry.name] = [judge.case(row, line, entry, *two) for row, *two in zip(worst, *found, strict=True)]
    return judge.names, cases


def worst_queries(entry: Entry, line: Entry, count: int) -> list[int]:
    """Collection rows of the queries whose value falls most against the baseline, largest fall first.

    Args:
        entry: The entry.
        line: The baseline's entry.
        count: Number of queries.
    """
    change = differences_by_query(entry, line).nan_to_num(0.0)
    order = change.argsort(stable=True)[:count]
    return line.queries.index[order[change[order] < 0]].tolist()  # type: ignore[union-attr]


def neighbours(
    result: Result, collection: Collection, judge: Judge, rows: list[int], k: int, *, trusted: bool = False
) -> list[list[int]]:
    """Collection rows of the first k neighbours of some queries.

    They were stored by the run, or its catalog finds them.

    Args:
        result: The result of the run.
        collection: The collection.
        judge: Relevance in the collection.
        rows: Collection rows of the queries.
        k: Number of neighbours per query.
        trusted: True if the user trusts whoever made the run.

    Raises:
        ValueError: If the run has neither.
    """
    if (kept := result.found(rows)) is not None:
        return [line[:k] for line in kept]
    folder = result.run / "catalog"  # type: ignore[operator]
    if not folder.is_dir():
        raise ValueError(f"{result.name} kept no neighbours of its queries and has no catalog to search")
    catalog = read_catalog(folder, trusted=trusted)
    source = catalog.about.get("source", {})
    if (source.get("data"), source.get("protocol")) != (collection.name, result.protocol):
        raise ValueError(f"the catalog of {result.name} holds {source.get('data')}, {source.get('protocol')}")
    places = {collection.path(row): row for row in range(len(collection))}
    try:
        items = torch.tensor([places[path] for path in catalog.items["path"].to_pylist()])
    except KeyError as error:
        raise ValueError(f"the catalog of {result.name} holds {error}, which is not in the data") from None
    engine = Engine(catalog)
    answers = []
    for row in rows:
        vector = encode(catalog.encoder, collection.images[int(row)][None])
        ids = engine.nearest(vector, k + int(judge.junk(row, items).sum())).ids[0]
        near = items[ids[ids >= 0]]
        answers.append(near[~judge.junk(row, near)][:k].tolist())
    return answers


@dataclass(frozen=True)
class Judge:
    """Relevance in a collection, and its images.

    Attributes:
        collection: The collection.
        label: int64 (N,). Items of one label are relevant to each other.
        group: int64 (N,) or None. Items of one group are junk to each other.
        names: Names of the labels.
        exclude_self: True if a query is junk to itself.
    """

    collection: Collection
    label: Tensor
    group: Tensor | None
    names: Sequence[str]
    exclude_self: bool

    @classmethod
    def of(cls, collection: Collection, line: Entry) -> Judge:
        """The judge of the baseline's test.

        Args:
            collection: The collection.
            line: The baseline's entry.

        Raises:
            ValueError: If the collection has other labels than the test.
        """
        about = read_json(Path(line.results[0].place) / "metrics.json")["test"]
        label = collection.column(about["attribute"])
        queries = line.queries
        assert queries is not None
        if len(label) <= int(queries.index.max()) or not torch.equal(label[queries.index], queries.label):
            raise ValueError("they have changed since the runs")
        group = collection.column(about["junk"]) if about["junk"] else None
        names = collection.classes[collection.attributes.index(about["attribute"])]
        return cls(collection, label, group, names, about["exclude_self"])

    def junk(self, row: int, others: Tensor) -> Tensor:
        """bool (M,), which rows the ranking of a query leaves out.

        Args:
            row: Collection row of the query.
            others: int64 (M,), collection rows.
        """
        itself = (others == row) & self.exclude_self
        if self.group is None or self.group[row] < 0:
            return itself
        return itself | (self.group[others] == self.group[row])

    def picture(self, row: int, query: int | None = None) -> Picture:
        """The thumbnail of a row with the name of its label.

        Args:
            row: Collection row.
            query: Collection row of the query that it is judged for, or None.
        """
        label = int(self.label[row])
        right = None if query is None else label == int(self.label[query]) >= 0
        data = encode_thumbnail(self.collection.images[row], THUMBNAIL_SIDE)
        return Picture(data, self.names[label] if label >= 0 else "unknown", right)

    def case(self, row: int, line: Entry, entry: Entry, before: Sequence[int], after: Sequence[int]) -> Case:
        """A query with what the baseline and the entry found.

        Args:
            row: Collection row of the query.
            line: The baseline's entry.
            entry: The entry.
            before: Collection rows that the baseline found.
            after: Collection rows that the entry found.
        """
        values = []
        for queries in (line.queries, entry.queries):
            assert queries is not None
            values.append(float(queries.value[queries.index == row]))
        found = [[self.picture(other, row) for other in rows] for rows in (before, after)]
        return Case(self.picture(row), values[0], values[1], *found)


if __name__ == "__main__":
    main()
