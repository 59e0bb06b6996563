"""What a calibrated catalog answers to photographs whose works are known: found, false or unknown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simsearch.data.manifest import Manifest, read_manifest
from simsearch.functional.significance import mean_interval
from simsearch.search.engine import WORK_ATTRIBUTES, Engine
from simsearch.search.request import Recommendation, Request
from simsearch.search.verdicts import SAME_WORK
from simsearch.types import LocalFeatures

FOUND, FALSE, UNKNOWN = "found", "false", "unknown"
OUTCOMES = (FOUND, FALSE, UNKNOWN)
_DEPTH = 20  # works of an answer that are looked at


@dataclass(frozen=True)
class Photographs:
    """Photographs, and the work that each of them shows.

    Attributes:
        manifest: The files.
        names: The names of the works, as the table has them. None for a work without a name, which the catalog lacks.
        works: The works as in `Engine.works`. None for a work that the catalog lacks.
    """

    manifest: Manifest
    names: tuple[str | None, ...]
    works: tuple[int | None, ...]

    @property
    def strangers(self) -> list[str]:
        """The names of works that the catalog lacks, sorted."""
        return sorted({name for name, work in zip(self.names, self.works, strict=True) if name and work is None})


@dataclass(frozen=True)
class Shares:
    """How often photographs get each outcome.

    Attributes:
        photographs: Number of photographs.
        works: Number of works that they show, the unit of chance.
        shares: For each outcome its share of the photographs, and the 95 % interval: share, low, high.
    """

    photographs: int
    works: int
    shares: dict[str, tuple[float, float, float]]


def read_photographs(source: Path, engine: Engine) -> Photographs:
    """The photographs that a table lists.

    A column `work` (or `group_id`) names the work of each photograph: by the catalog's own column of works, or by the
    id or path of one of its items. A name that the catalog lacks, or none, stands for a work that is not in the
    catalog.

    Args:
        source: The table, as `read_manifest` reads it.
        engine: The engine of the catalog.

    Raises:
        ValueError: If the table has no column of works, or names an id that several items have.
    """
    manifest = read_manifest(source)
    names = next((manifest.attributes[name] for name in WORK_ATTRIBUTES if name in manifest.attributes), None)
    if names is None:
        raise ValueError(
            f"{source} does not say which work each photograph shows: give a table with the columns path and "
            f"{WORK_ATTRIBUTES[0]}, empty for a work that is not in the catalog"
        )
    known: dict[str, int] = {}
    if engine.work_attribute is not None:
        values = engine.catalog.items[engine.work_attribute].cast("string").to_pylist()
        known = {value: work for value, work in zip(values, engine.works.tolist(), strict=True) if value}
    for name in {name for name in names if name} - set(known):
        if (item := engine.names.find(name)) is not None:
            known[name] = int(engine.works[item])
    return Photographs(manifest, names, tuple(known.get(name) if name else None for name in names))


def outcome(answer: Recommendation, works: Sequence[int], own: int | None) -> str:
    """The outcome of one photograph.

    It is "false" if any item of another work is called the same work, else "found" if an item of its own is, else
    "unknown".

    Args:
        answer: The answer to the photograph.
        works: The works of the answer's items.
        own: The work of the photograph. None if the catalog lacks it.
    """
    called = {work for work, verdict in zip(works, answer.verdicts, strict=True) if verdict == SAME_WORK}
    return FALSE if called - {own} else FOUND if called else UNKNOWN


def ask(
    engine: Engine,
    vectors: Tensor,
    works: Sequence[int | None],
    local: Iterable[tuple[LocalFeatures, ...]] | None = None,
) -> tuple[list[Recommendation], list[str]]:
    """The answers of a calibrated catalog to photographs, and the outcomes.

    Args:
        engine: The engine of the catalog.
        vectors: Descriptors of the photographs, as `Request.like` has them.
        works: The work of each photograph. None for a work that the catalog lacks.
        local: The local features of each photograph as a query, for a catalog with local features.
    """
    given = iter(() if local is None else local)
    answers = [engine.recommend(Request(vector[None], k=_DEPTH, local=next(given, ()))) for vector in vectors]
    own = [engine.works[answer.ids.numpy()].tolist() for answer in answers]
    return answers, [outcome(*one) for one in zip(answers, own, works, strict=True)]


def shares(outcomes: Sequence[str], works: Sequence[str]) -> Shares:
    """How often photographs get each outcome, with intervals by work.

    Args:
        outcomes: n outcomes, at least one.
        works: The name of the work of each photograph.

    Example:
        >>> shares(["found", "found", "unknown", "found"], ["a", "a", "b", "c"]).shares["found"][0]
        0.75
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(works))}
    values = torch.tensor([[float(one == name) for name in OUTCOMES] for one in outcomes], dtype=torch.float64)
    intervals = mean_interval(values, torch.tensor([numbers[name] for name in works])).tolist()
    means = values.mean(0).tolist()
    found = {name: (mean, *interval) for name, mean, interval in zip(OUTCOMES, means, intervals, strict=True)}
    return Shares(len(outcomes), len(numbers), found)
