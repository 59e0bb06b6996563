"""Which runs are compared: those that names lead to, the baseline among them, and each configuration and seed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from simsearch.comparison.runs import Missing, Result, expand, read_all, read_wandb, short_names
from simsearch.identity import run_identity, start_config
from simsearch.trust import check_links


def read(
    names: Sequence[str], wandb_api: Callable[[], AbstractContextManager[Any]], *, trusted: bool = False
) -> tuple[list[Result], list[Missing]]:
    """The results of all runs that the names lead to, and the runs without a result.

    Args:
        names: Folders, globs, and addresses in W&B.
        wandb_api: Opens W&B's API, if a name is an address in W&B.
        trusted: True if the user trusts whoever made the runs.

    Raises:
        ValueError: If no run has a result.
    """
    remote = [name.removeprefix("wandb:") for name in names if name.startswith("wandb:")]
    results, missing = read_all(folders([name for name in names if not name.startswith("wandb:")], trusted=trusted))
    if remote:
        with wandb_api() as api:
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
    local = [result.place for result in together if result.run is not None]
    short = dict(zip(local, short_names(local), strict=True))  # runs in W&B keep their names
    together = [replace(result, name=short.get(result.place, result.name)) for result in together]
    return together[0], together


def has_value(results: Sequence[Result], name: str) -> bool:
    """Whether a result has a value of a metric.

    Args:
        results: The results.
        name: Name of the metric.
    """
    return any(result.metrics.get(name) is not None for result in results)


def configuration(result: Result) -> str:
    """The part of the config that determines numbers, and the measurement. Runs that share it differ only in the seed.

    Args:
        result: The result.
    """
    own = "" if result.run is None else Path(result.place).relative_to(result.run)
    measured = result.measured_by or own  # older ones do not say by what
    try:
        return f"{run_identity(result.config, without=['seed'])} {measured}"
    except (LookupError, TypeError, AttributeError):  # of another time or hand: only equal to itself
        return result.place


def without_repeats(results: Sequence[Result], baseline: Result) -> tuple[list[Result], list[tuple[Result, Result]]]:
    """The results without repetitions of the same configuration and seeds, and each repetition with what it repeats.

    A configuration that was run twice with one seed is one draw, not two. The baseline is kept, else the first run.

    Args:
        results: The results.
        baseline: The result of the baseline.
    """
    kept: dict[tuple[Any, ...], Result] = {}
    repeats = []
    for result in sorted(results, key=lambda result: result is not baseline):
        key = (configuration(result), result.fingerprint, result.unit or "query", seeds(result.config))
        if kept.setdefault(key, result) is not result:
            repeats.append((result, kept[key]))
    return [result for result in results if any(result is one for one in kept.values())], repeats


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
