"""What a calibrated catalog answers to photographs whose works are known: found, false or unknown."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simsearch.data import photographs
from simsearch.data.manifest import Manifest
from simsearch.functional.significance import mean_interval
from simsearch.search.engine import Engine
from simsearch.search.photographs import works_named
from simsearch.search.request import Recommendation, Regions, Request
from simsearch.search.verdicts import SAME_WORK
from simsearch.types import LocalFeatures

FOUND, FALSE, UNKNOWN = "found", "false", "unknown"
OUTCOMES = (FOUND, FALSE, UNKNOWN)
_DEPTH = 20  # works of an answer that are looked at


@dataclass(frozen=True)
class Photographs:
    """Photographs, and the works that each of them shows.

    Attributes:
        manifest: The files.
        names: The names of the works, as the table has them. Empty for works without a name, which no catalog has.
        works: The works as in `Engine.works`. Empty if the catalog has none of them.
        units: int64 (n,), the sampling units: photographs of one work are not independent.
    """

    manifest: Manifest
    names: tuple[tuple[str, ...], ...]
    works: tuple[frozenset[int], ...]
    units: Tensor

    def missing(self, engine: Engine) -> list[str]:
        """The names of works that the catalog lacks, sorted.

        Args:
            engine: The engine of the catalog.
        """
        names = {name for of in self.names for name in of}
        return sorted(names - works_named(engine, names).keys())


@dataclass(frozen=True)
class Shares:
    """How often photographs get each outcome.

    Attributes:
        photographs: Number of photographs.
        works: Number of sampling units: the works that they show.
        shares: For each outcome its share of the photographs, and the 95 % interval: share, low, high.
    """

    photographs: int
    works: int
    shares: dict[str, tuple[float, float, float]]


def read_photographs(source: Path, engine: Engine) -> Photographs:
    """The photographs that a table lists (see simsearch.data.photographs), without boxes.

    Args:
        source: The table.
        engine: The engine of the catalog.

    Raises:
        ValueError: If the table is wrong or has boxes, or names an id that several items have.
    """
    listed = photographs.read_photographs(source)
    if any(one.box is not None for one in listed):
        raise ValueError(f"{source} has boxes: leave x, y, w and h out, or measure them with simsearch photographs")
    known = works_named(engine, (name for one in listed for name in one.works))
    return Photographs(
        Manifest(source.parent, tuple(one.path for one in listed)),
        tuple(one.works for one in listed),
        tuple(frozenset(known[name] for name in one.works if name in known) for one in listed),
        photographs.photograph_units(listed),
    )


def outcome(answer: Recommendation, works: Sequence[int], own: Collection[int]) -> str:
    """The outcome of one photograph.

    It is "false" if any item of another work is called the same work, else "found" if an item of its own works is, else
    "unknown".

    Args:
        answer: The answer to the photograph.
        works: The works of the answer's items.
        own: The works of the photograph that the catalog has.
    """
    called = {work for work, verdict in zip(works, answer.verdicts, strict=True) if verdict == SAME_WORK}
    return FALSE if called - set(own) else FOUND if called else UNKNOWN


def ask(
    engine: Engine,
    vectors: Tensor,
    works: Sequence[Collection[int]],
    local: Iterable[tuple[LocalFeatures, ...]] = (),
    regions: Iterable[Regions | None] = (),
) -> tuple[list[Recommendation], list[str]]:
    """The answers of a calibrated catalog to photographs, and the outcomes.

    Args:
        engine: The engine of the catalog.
        vectors: Descriptors of the photographs, as `Request.like` has them.
        works: The works of each photograph that the catalog has.
        local: The local features of each photograph as a query, for a catalog with local features.
        regions: The descriptors of each photograph's regions.
    """
    of_points, of_regions = iter(local), iter(regions)
    answers = [
        engine.recommend(Request(vector[None], k=_DEPTH, local=next(of_points, ()), regions=next(of_regions, None)))
        for vector in vectors
    ]
    own = [engine.works[answer.ids.numpy()].tolist() for answer in answers]
    return answers, [outcome(*one) for one in zip(answers, own, works, strict=True)]


def shares(outcomes: Sequence[str], works: Sequence[Hashable]) -> Shares:
    """How often photographs get each outcome, with intervals by work.

    Args:
        outcomes: n outcomes, at least one.
        works: The sampling unit of each photograph: its work.

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
