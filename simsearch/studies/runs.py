"""The finished runs of a study's rows. A run is identified by the part of its config that determines the numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException

from simsearch import configs, saved_run
from simsearch.files import read_json
from simsearch.identity import run_identity
from simsearch.studies.rows import Row
from simsearch.trust import TRUST_HINT, Untrusted

Runs = Mapping[str, Sequence[saved_run.Run]]  # by identity; those of one may have been trained on different data


@cache
def compose(overrides: tuple[str, ...], *, command: str = "train", trusted: bool = False) -> dict[str, Any]:
    """The plain config of `simsearch train` or `evaluate` with some overrides. Callers share it and must not modify it.

    Args:
        overrides: The overrides of a study, which may come from somebody else.
        command: Name of the command.
        trusted: True if the user trusts whoever made the study.

    Raises:
        ValueError: If the overrides do not compose. Unless `trusted`, also if they are more than values, name an object
            that a config from a folder may not name, or choose the location of caches.
    """
    line = f"`simsearch {command} {' '.join(overrides)}`"
    if not trusted:
        configs.check_overrides(overrides, line)
    places = ["run_dir=unused"] if command == "train" else ["run=unused", "run_dir=unused"]
    try:
        values = configs.plain(hydra.compose(command, [*places, *overrides]))
    except HydraException as error:
        raise ValueError(f"{line}: {error}") from error
    if not trusted and saved_run.admitted(values, line) != values:
        raise Untrusted(f"{line}: it downloads, or chooses the place of caches; {TRUST_HINT}")
    return values


def train_overrides(book: Mapping[str, Row], name: str, seed: int, start: Path | None) -> tuple[str, ...]:
    """The arguments of `simsearch train` for a row and a seed.

    Args:
        book: All rows by name.
        name: Name of the row.
        seed: The seed.
        start: Folder of the start row's run, or None.
    """
    row = book[name]
    begin = [] if row.start is None else [override("model.start", start)]
    return (*row.train, f"seed={seed}", *begin, "catalog.write=false")


def override(key: str, value: object) -> str:
    """An override whose value Hydra accepts unchanged, whatever characters it has.

    Args:
        key: The key.
        value: The value.
    """
    text = str(value)
    if re.fullmatch(r"[\w./@+-]+", text):
        return f"{key}={text}"
    escaped = text.replace("'", "\\'")
    return f"{key}='{escaped}'"


def start_seed(book: Mapping[str, Row], name: str, seed: int) -> int:
    """The seed of the run that a row's training starts from: the same seed, or the start row's first.

    Args:
        book: All rows by name.
        name: Name of the row.
        seed: The seed.
    """
    seeds = book[book[name].start].seeds  # type: ignore[index]
    return seed if seed in seeds else seeds[0]


def finished_runs(root: Path, *, trusted: bool = False) -> dict[str, list[saved_run.Run]]:
    """The runs in a folder that were trained and tested and may be opened, by identity, the last measured first.

    Args:
        root: The folder.
        trusted: True if the user trusts whoever made the runs.
    """
    found: list[tuple[float, str, saved_run.Run]] = []
    for path in root.glob("*/config.yaml"):
        try:
            if is_finished(path.parent):
                run = saved_run.open_run(path.parent, trusted=trusted)
                found.append((path.with_name("metrics.json").stat().st_mtime, run_identity(run.config), run))
        except (ValueError, LookupError, AttributeError):
            continue  # damaged, or of a time when configs were others: no row's run
    runs: dict[str, list[saved_run.Run]] = {}
    for _, name, run in sorted(found, key=itemgetter(0), reverse=True):
        runs.setdefault(name, []).append(run)
    return runs


def is_finished(folder: Path) -> bool:
    """Whether a run directory has its checkpoint and its test results.

    Args:
        folder: The run directory.
    """
    path, checkpoint = folder / "metrics.json", folder / "checkpoints" / "best.ckpt"
    return checkpoint.is_file() and path.is_file() and "test" in read_json(path)


def find_run(
    book: Mapping[str, Row],
    name: str,
    seed: int,
    runs: Runs,
    *,
    trusted: bool = False,
) -> tuple[saved_run.Run | None, dict[str, Any] | None]:
    """The finished run of a row and seed, and the row's config.

    Args:
        book: All rows by name.
        name: Name of the row.
        seed: The seed.
        runs: Finished runs by identity.
        trusted: True if the user trusts whoever made the rows.

    Returns:
        The run, or None if it is not finished; and the config, or None while the start row has no finished run.
    """
    start = None
    if book[name].start is not None:
        begun, _ = find_run(book, book[name].start, start_seed(book, name, seed), runs, trusted=trusted)  # type: ignore[arg-type]
        if begun is None:
            return None, None
        start = begun.folder
    config = compose(train_overrides(book, name, seed, start), trusted=trusted)
    return run_on_its_data(book[name], runs.get(run_identity(config), ())), config


def run_on_its_data(row: Row, runs: Sequence[saved_run.Run]) -> saved_run.Run | None:
    """The first run that was tested on the data to which a row's values belong, as far as the row states them.

    Args:
        row: The row.
        runs: Finished runs of the row's config.
    """
    for run in runs:
        test = read_json(run.folder / "metrics.json")["test"]
        if row.fingerprints.get(test["protocol"], test["fingerprint"]) == test["fingerprint"]:
            return run
    return None
