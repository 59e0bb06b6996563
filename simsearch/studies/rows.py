"""The rows of a study from its rows.yaml: what to train, what to measure, and which values to expect."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simsearch import configs

_KINDS = {str: "text", int | float: "a number", dict: "a mapping", list: "a list"}


@dataclass(frozen=True)
class Expected:
    """An expected value and its tolerance, both in units of the metric.

    Attributes:
        value: The value.
        tolerance: Largest accepted distance of a new measurement.
    """

    value: float
    tolerance: float

    @classmethod
    def of(cls, text: str) -> Expected:
        """Parses `0.61 ± 0.01` (or `0.61 +- 0.01`).

        Args:
            text: The text.

        Raises:
            ValueError: If the text has another form.
        """
        number = r"(-?\d*\.?\d+(?:[eE][-+]?\d+)?)"
        match = re.fullmatch(rf"{number}\s*(?:±|\+-)\s*{number}", str(text).strip())
        if not match or float(match[2]) < 0:
            raise ValueError(f"{text!r} is not an expected value: write `0.61 ± 0.01`, or null until it is known")
        return cls(float(match[1]), float(match[2]))


@dataclass(frozen=True)
class Row:
    """One row of a study.

    Attributes:
        name: family-variant-size.
        what: One line for readers.
        train: Overrides of `simsearch train`.
        start: The row whose run `model.start` names, or None.
        seeds: The seeds that the study ran.
        minutes: Duration of one training on two cores.
        expect: measurement -> metric -> Expected, or None if not known yet. A measurement is a protocol's name as in
            reports, optionally with overrides of `simsearch evaluate`: `10k-50k rerank=aqe`.
        fingerprints: protocol -> fingerprint of the data that the values belong to.
    """

    name: str
    what: str
    train: tuple[str, ...]
    start: str | None
    seeds: tuple[int, ...]
    minutes: float
    expect: dict[str, dict[str, Expected | None]]
    fingerprints: dict[str, str]

    @classmethod
    def of(cls, name: str, fields: Mapping[str, Any], fingerprints: Mapping[str, str]) -> Row:
        """The row that a mapping of a file describes.

        Args:
            name: Name of the row.
            fields: The mapping.
            fingerprints: protocol -> fingerprint.

        Raises:
            ValueError: If a key is missing or unknown, or its value is of another kind. The error names row and key.
        """
        required, optional = {"what", "train", "minutes", "expect"}, {"start", "seeds"}
        if missing := sorted(required - set(fields)):
            raise ValueError(f"row {name} does not have {', '.join(missing)}")
        if unknown := sorted(set(fields) - required - optional):
            raise ValueError(f"row {name} has unknown keys {', '.join(unknown)}: choose from {required | optional}")
        kinds = {"what": str, "train": str, "minutes": int | float, "expect": dict, "start": str, "seeds": list}
        for key, kind in kinds.items():
            if key in fields and not isinstance(fields[key], kind):
                raise ValueError(f"row {name} has {key}={fields[key]!r}, which is not {_KINDS[kind]}")
        if not fields["expect"] or not all(isinstance(m, dict) and m for m in fields["expect"].values()):
            raise ValueError(
                f"row {name} has expect={fields['expect']!r}: name a protocol and its metrics, such as "
                "`10k-50k: {mAP: null}`; a value may be null"
            )
        if not fields.get("seeds", [0]) or not all(type(seed) is int for seed in fields.get("seeds", [0])):
            raise ValueError(f"row {name} has seeds={fields['seeds']!r}: give whole numbers such as [0, 1]")
        return cls(
            name=name,
            what=fields["what"],
            train=tuple(shlex.split(fields["train"])),
            start=fields.get("start"),
            seeds=tuple(fields.get("seeds", (0,))),
            minutes=float(fields["minutes"]),
            expect={
                measurement: {metric: None if text is None else Expected.of(text) for metric, text in metrics.items()}
                for measurement, metrics in fields["expect"].items()
            },
            fingerprints=dict(fingerprints),
        )


def row_files(given: str | None) -> list[Path]:
    """The files that hold rows.

    Args:
        given: A file, or a folder of studies. None means experiments/ of this checkout.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(configs.CONF).parent / "experiments" if given is None else Path(given).expanduser()
    if given is None and not folder.is_dir():
        raise ValueError(
            "the studies are in experiments/ of the repository, which is not installed with simsearch: "
            "give rows=<experiments of a checkout, or one rows.yaml>"
        )
    if not folder.is_dir():
        return [folder]
    files = [*folder.glob("rows.yaml"), *sorted(folder.glob("*/rows.yaml"))]
    if not files:
        raise ValueError(f"no study in {folder} has a rows.yaml: name one with rows=<file>")
    return files


def read_rows(files: Iterable[Path]) -> dict[str, Row]:
    """All rows by name, in the order of the files.

    Args:
        files: The files.

    Raises:
        ValueError: If a file is damaged, or if rows do not fit together.
    """
    book: dict[str, Row] = {}
    for path in files:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            rows, fingerprints = content["rows"], content.get("fingerprints") or {}
            parsed = {name: Row.of(name, fields, fingerprints) for name, fields in rows.items()}
        except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of rows: {error}") from error
        if twice := [name for name in parsed if name in book]:
            raise ValueError(
                f"{path} repeats rows of another file: {', '.join(twice)}; choose one file with rows=<file>"
            )
        book |= parsed
    for row in book.values():
        chain = [row.name]
        while (start := book[chain[-1]].start) is not None:
            if start not in book:
                raise ValueError(f"row {chain[-1]} starts from {start}, which is not a row")
            if start in chain:
                raise ValueError(f"row {start} starts from itself: {' <- '.join([*chain, start])}")
            chain.append(start)
    return book


def check_names(names: Iterable[str | None], book: Mapping[str, Row]) -> None:
    """Checks that all names are names of rows.

    Args:
        names: The names.
        book: All rows by name.

    Raises:
        ValueError: If a name is not.
    """
    for name in names:
        if name not in book:
            wrong = "which row? row=<name>" if name is None else f"there is no row {name!r}"
            raise ValueError(f"{wrong}; there are {', '.join(book)}, and row=all; list=true shows more")
