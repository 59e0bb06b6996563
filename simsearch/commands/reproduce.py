"""simsearch reproduce: trains and measures the rows of a study again and compares the values with the stated ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from simsearch import configs, program, terminal
from simsearch.studies.check import GAP, NOT_RUNNABLE, Outcome, check_composes, reproduce
from simsearch.studies.rows import Row, check_names, read_rows, row_files
from simsearch.studies.runs import Runs, find_run, finished_runs
from simsearch.studies.tables import write_results
from simsearch.text import cell


@program.command("reproduce", resumes=True)
def main(config: DictConfig) -> None:
    """Runs the command `simsearch reproduce`.

    Args:
        config: The config of conf/reproduce.yaml.

    Raises:
        SystemExit: With the status of `exit_status`.
    """
    values = configs.plain(config)
    book = read_rows(row_files(values["rows"]))
    root = Path(values["run_root"]).expanduser().resolve()
    trusted = configs.trusts(values)
    if values["list"]:
        terminal.show(list_table(book, finished_runs(root, trusted=trusted), trusted=trusted))
        return
    folder = values["results"] and Path(values["results"]).expanduser()
    if folder and values["row"] is None:
        write(folder, book, root, trusted)
        return
    names = list(book) if values["row"] == "all" else [values["row"]]
    check_names(names, book)
    for name in names:
        check_composes(book, name, trusted=trusted)  # all of them, before hours are spent on the first
    runs = finished_runs(root, trusted=trusted) if values["reuse"] else {}
    outcomes = []
    for name in names:
        own = book[name].seeds
        seeds = own[:1] if values["seeds"] is None else own if values["seeds"] == "all" else values["seeds"]
        outcome = reproduce(book, name, seeds, root, runs, budget=values["budget"], trusted=trusted)
        print(f"{name}: {outcome.verdict}{f': {outcome.reason}' if outcome.reason else ''}", file=sys.stderr)
        outcomes.append(outcome)
    terminal.show(outcome_table(outcomes))
    if folder:
        write(folder, book, root, trusted)
    raise SystemExit(exit_status(outcomes))


def write(folder: Path, book: Mapping[str, Row], root: Path, trusted: bool) -> None:
    """Writes the tables of what finished runs have measured, and says where.

    Args:
        folder: Folder of the tables.
        book: All rows by name.
        root: Folder of the runs.
        trusted: True if the user trusts whoever made the rows and runs.

    Raises:
        ValueError: If nothing is measured.
    """
    count = write_results(folder, book, finished_runs(root, trusted=trusted), trusted=trusted)
    if not count:
        raise ValueError(f"no finished run in {root} belongs to these rows: train some with row=<name>")
    print(f"{count} measurements in {folder}: results.csv, paired.csv, tables.md", file=sys.stderr)


def exit_status(outcomes: Iterable[Outcome]) -> int:
    """0 if all rows are reproduced, 1 if a value differs, else 2.

    Args:
        outcomes: The outcomes.
    """
    verdicts = {outcome.verdict for outcome in outcomes}
    return 1 if GAP in verdicts else 2 if NOT_RUNNABLE in verdicts else 0


def outcome_table(outcomes: Iterable[Outcome]) -> Table:
    """A table of value, expected value, difference and verdict of each measurement.

    Args:
        outcomes: The outcomes.
    """
    table = Table(title="Rows measured again, and the values that their study states")
    table.add_column("row", overflow="fold")
    table.add_column("measured", overflow="fold")
    for name in ("value", "expected", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for outcome in outcomes:
        for i, m in enumerate(outcome.measured):
            spread = f" ({len(m.values)} seeds: {min(m.values):.4f}-{max(m.values):.4f})" if len(m.values) > 1 else ""
            expected = "nothing yet" if m.expected is None else f"{m.expected.value:.4f} ± {m.expected.tolerance:g}"
            table.add_row(
                cell(outcome.row) if i == 0 else "",
                cell(f"{m.metric}, {m.measurement}{spread}"),
                f"{m.mean:.4f}",
                expected,
                "-" if m.difference is None else f"{m.difference:+.4f}",
                m.verdict,
            )
        if not outcome.measured:
            table.add_row(cell(outcome.row), "-", "-", "-", "-", cell(f"{outcome.verdict}: {outcome.reason}"))
        table.add_section()
    return table


def list_table(book: Mapping[str, Row], runs: Runs, *, trusted: bool = False) -> Table:
    """A table of the rows: description, expected values, cost, and which seeds have finished runs.

    Args:
        book: All rows by name.
        runs: Finished runs by identity.
        trusted: True if the user trusts whoever made the rows.
    """
    table = Table(title="Rows, and the minutes of one training on two cores")
    table.add_column("row", overflow="fold")
    table.add_column("what", overflow="fold")
    table.add_column("expected", overflow="fold")
    for name in ("minutes", "seeds", "finished"):
        table.add_column(name, justify="right")
    for row in book.values():
        stated = [
            cell(f"{measurement} {metric} {'?' if e is None else f'{e.value:.4f} ± {e.tolerance:g}'}")
            for measurement, metrics in row.expect.items()
            for metric, e in metrics.items()
        ]
        finished = [seed for seed in row.seeds if find_run(book, row.name, seed, runs, trusted=trusted)[0] is not None]
        what = cell(row.what) + (f" [dim](starts from {cell(row.start)})[/dim]" if row.start else "")
        listed = (",".join(map(str, numbers)) or "-" for numbers in (row.seeds, finished))
        table.add_row(cell(row.name), what, "\n".join(stated), f"{row.minutes:g}", *listed)
    return table


if __name__ == "__main__":
    main()
