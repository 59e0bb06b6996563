"""The finished runs of a study's rows: known by what of their configs decides numbers, not by name or place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException

from simsearch import configs, saved_run
from simsearch.files import read_json
from simsearch.identity import run_identity
from simsearch.studies.rows import Row
from simsearch.trust import MEND, Untrusted


@cache
def compose(overrides: tuple[str, ...], *, command: str = "train", trusted: bool = False) -> dict[str, Any]:
    """The plain config of `simsearch train`, or `evaluate`, with these overrides, shared by all callers.

    They are a study's, perhaps somebody else's: raises ValueError where they do not compose, and, unless they are
    `trusted`, where they are more than values, name what a folder's config may not name, or choose where caches lie.
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
        raise Untrusted(f"{line}: it downloads, or chooses where caches lie; {MEND}")
    return values


def train_overrides(book: Mapping[str, Row], name: str, seed: int, start: Path | None) -> tuple[str, ...]:
    """What `simsearch train` is given for a row and a seed, whose start row's run lies in `start`."""
    row = book[name]
    begin = [] if row.start is None else [override("model.start", start)]
    return (*row.train, f"seed={seed}", *begin, "catalog.write=false")


def override(key: str, value: object) -> str:
    """An override whose value Hydra takes as it is, whatever characters it has."""
    text = str(value)
    if re.fullmatch(r"[\w./@+-]+", text):
        return f"{key}={text}"
    escaped = text.replace("'", "\\'")
    return f"{key}='{escaped}'"


def start_seed(book: Mapping[str, Row], name: str, seed: int) -> int:
    """The seed of the run that a row's training starts from: the same, or the start row's first."""
    seeds = book[book[name].start].seeds  # type: ignore[index]
    return seed if seed in seeds else seeds[0]


def finished_runs(root: Path, *, trusted: bool = False) -> dict[str, saved_run.Run]:
    """Identity -> run, of the runs in `root` that were trained and tested, and may be opened."""
    runs: dict[str, saved_run.Run] = {}
    for path in sorted(root.glob("*/config.yaml")):
        try:
            if is_finished(path.parent):
                run = saved_run.open_run(path.parent, trusted=trusted)
                runs.setdefault(run_identity(run.config), run)
        except (ValueError, LookupError, AttributeError):
            continue  # damaged, or of a time when configs were others: no row's run
    return runs


def is_finished(folder: Path) -> bool:
    """Whether a run directory has its checkpoint and its test results."""
    path, checkpoint = folder / "metrics.json", folder / "checkpoints" / "best.ckpt"
    return checkpoint.is_file() and path.is_file() and "test" in read_json(path)


def find_run(
    book: Mapping[str, Row], name: str, seed: int, runs: Mapping[str, saved_run.Run], *, trusted: bool = False
) -> tuple[saved_run.Run | None, dict[str, Any] | None]:
    """The finished run of a row and seed, or None, and the row's config; that is None, too, while its start row has no
    finished run.
    """
    start = None
    if book[name].start is not None:
        begun, _ = find_run(book, book[name].start, start_seed(book, name, seed), runs, trusted=trusted)  # type: ignore[arg-type]
        if begun is None:
            return None, None
        start = begun.folder
    config = compose(train_overrides(book, name, seed, start), trusted=trusted)
    return runs.get(run_identity(config)), config
