"""What a person decided on pairs of images in groups.csv: that they show one work, or that they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from simsearch.data.ingest.grouping import Evidence, connected
from simsearch.data.tables import read_table
from simsearch.text import csv_cell

_SCORES = ("inliers", "share", "aligned", "support", "correlation")
COLUMNS = ("group", "why", "path_a", "path_b", *_SCORES, "same", "decision")
CONFIRM, CUT = "confirm", "cut"
_Pair = tuple[int, int]


@dataclass(frozen=True)
class Decisions:
    """Pairs of positions of files, the smaller first.

    Attributes:
        confirmed: Pairs that show one work.
        cut: Pairs that do not.
    """

    confirmed: list[_Pair] = field(default_factory=list)
    cut: list[_Pair] = field(default_factory=list)

    def among(self, places: Sequence[int], twins: Mapping[int, int]) -> Decisions:
        """The decisions on some of the files, by their positions among these.

        Args:
            places: The positions of these files.
            twins: For files that are not among them, an equal one that is. A decision on a file is one on its twin.
        """
        position = {place: number for number, place in enumerate(places)}
        position |= {place: position[twin] for place, twin in twins.items()}

        def moved(pairs: list[_Pair]) -> list[_Pair]:
            known = ((position[one], position[other]) for one, other in pairs if {one, other} <= position.keys())
            return list(dict.fromkeys((min(pair), max(pair)) for pair in known if pair[0] != pair[1]))

        return Decisions(moved(self.confirmed), moved(self.cut))


def read_decisions(path: Path, paths: Sequence[str]) -> Decisions:
    """The decisions in a table. Rows without one say nothing.

    Args:
        path: The table, with columns `path_a`, `path_b` and `decision` at least.
        paths: Paths of the files.

    Raises:
        ValueError: If a column is missing, a row cannot be read or names an unknown file or decision, one file twice,
            or a pair that another row decided otherwise, or if confirmed pairs tie a pair that is cut.
    """
    table = read_table(path)
    if table.rejected:
        raise ValueError(f"{path} has a row that cannot be read ({table.rejected[0].detail}): correct or delete it")
    columns = table.columns
    if lacking := [name for name in ("path_a", "path_b", "decision") if name not in columns]:
        raise ValueError(f"{path} has no column {lacking[0]!r}: give a groups.csv with decisions filled in")
    place = {csv_cell(name): number for number, name in enumerate(paths)}
    place |= {name: number for number, name in enumerate(paths)}
    found: dict[_Pair, str] = {}
    rows = zip(columns["path_a"], columns["path_b"], columns["decision"], strict=True)
    for number, (one, other, said) in enumerate(rows, start=1):
        decision = (said or "").strip().casefold()
        if not decision:
            continue
        where = f"{path}, row {number}:"
        if decision not in (CONFIRM, CUT):
            raise ValueError(f"{where} the decision is {said!r}: write {CONFIRM}, {CUT} or nothing")
        for name in (one, other):
            if name not in place:
                raise ValueError(f"{where} {name!r} is no decoded image: correct the path or delete the row")
        first, second = sorted((place[str(one)], place[str(other)]))
        if first == second:
            raise ValueError(f"{where} both paths are {one!r}: name two images")
        if found.setdefault((first, second), decision) != decision:
            raise ValueError(f"{where} {one!r} and {other!r} were decided otherwise before: keep one of the rows")
    confirmed, cut = ([pair for pair, said in found.items() if said == kind] for kind in (CONFIRM, CUT))
    tied = connected(len(paths), confirmed)
    for first, second in cut:
        if tied[first] == tied[second]:
            raise ValueError(f"{path}: {paths[first]!r} and {paths[second]!r} are cut, but confirmed pairs tie them")
    return Decisions(confirmed, cut)


def group_rows(
    groups: Sequence[tuple[str, Sequence[int]]], evidence: Evidence, paths: Sequence[str], decisions: Decisions
) -> list[tuple[object, ...]]:
    """The rows of groups.csv: the pairs of each group with their evidence, and the decision or room for one.

    Decided pairs that are in no listed group follow, so that no decision is lost when the table is read again.

    Args:
        groups: For each group, why it is listed and the positions of its files.
        evidence: The evidence of all candidate pairs.
        paths: Paths of the files.
        decisions: The decisions so far.
    """
    known = dict.fromkeys(decisions.confirmed, CONFIRM) | dict.fromkeys(decisions.cut, CUT)
    rows: list[tuple[object, ...]] = []
    for number, (why, group) in enumerate(groups, start=1):
        for place in evidence.within(group):
            one, other = evidence.pairs[place].tolist()
            shares = (evidence.share, evidence.aligned, evidence.support, evidence.correlation)
            scores = (int(evidence.inliers[place]), *(f"{float(values[place]):.3f}" for values in shares))
            same = "yes" if evidence.same[place] else "no"
            rows.append((number, why, paths[one], paths[other], *scores, same, known.pop((one, other), "")))
    rest = (
        ("", "decided", paths[one], paths[other], *[""] * (len(_SCORES) + 1), said)
        for (one, other), said in known.items()
    )
    return [*rows, *rest]
