"""Normalises user-supplied attributes: spellings, years and periods."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from simsearch.data.manifest import Column
from simsearch.text import spellings

PERIOD_YEARS = 25
_MISSING = {"nan", "null", "none", "n/a", "<na>", "nat"}
_NOBODY = {"unknown", "unidentified", "not known", "anonymous", "?", "-", "–", "—"}
_NOBODY |= {"unknown artist", "artist unknown", "unidentified artist", "anonymous artist", "unknown maker"}
_YEAR = re.compile(r"(?<!\d)(?<!\d[.,])(1\d{3}|20\d{2})(?!\d)")
_BEFORE_CHRIST = re.compile(r"(?<![^\W\d_])(?:b\.?\s?c(?:\.?\s?e)?|v\.?\s?chr)(?![^\W_])", re.IGNORECASE)


@dataclass(frozen=True)
class Cleaned:
    """Normalised columns, and a record of the changes.

    Attributes:
        columns: The columns.
        merges: For each column the spellings that were kept, each with the replaced spellings and their counts.
        unparsed: Counts of texts in the column `year` that have no year.
        unknown: For each column the number of values that mean "unknown".
    """

    columns: dict[str, Column]
    merges: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    unparsed: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)


def clean(columns: dict[str, Column], categorical: Iterable[str]) -> Cleaned:
    """The columns in NFC and without needless white space. Empty values become None.

    A column `year` keeps the first year in its text. If that loses something, the text is kept as `year_text`. A column
    `period` is added for values with a year.

    Args:
        columns: The columns, by name.
        categorical: Columns whose values name classes. Of values that are equal by `simsearch.text.spelling_key`, the
            most frequent spelling is kept.
    """
    names = set(categorical) & set(columns)
    merges, unknown, cleaned = {}, Counter[str](), {}
    for name, values in columns.items():
        texts = [_text(value) for value in values]
        if name in names:
            unknown[name] = sum(text is not None and text.casefold() in _NOBODY for text in texts)
            texts = [None if text is not None and text.casefold() in _NOBODY else text for text in texts]
            chosen = spellings(Counter(text for text in texts if text is not None))
            changed: dict[str, dict[str, int]] = {}
            for text, count in Counter(text for text in texts if text is not None).items():
                if chosen[text] != text:
                    changed.setdefault(chosen[text], {})[text] = count
            if changed:
                merges[name] = {kept: changed[kept] for kept in sorted(changed)}
            texts = [None if text is None else chosen[text] for text in texts]
        cleaned[name] = tuple(texts)
    unparsed: dict[str, int] = {}
    if "year" in cleaned:
        texts = list(cleaned["year"])
        years = [year_of(text) for text in texts]
        lost = Counter(text for text, year in zip(texts, years, strict=True) if text is not None and year is None)
        unparsed = dict(lost.most_common())
        cleaned["year"] = tuple(None if year is None else str(year) for year in years)
        if "year_text" not in cleaned and any(
            t is not None and t != y for t, y in zip(texts, cleaned["year"], strict=True)
        ):
            cleaned["year_text"] = tuple(texts)
        if "period" not in cleaned:
            cleaned["period"] = tuple(None if year is None else period_of(year) for year in years)
    return Cleaned(cleaned, merges, unparsed, {name: count for name, count in unknown.items() if count})


def year_of(text: str | None) -> int | None:
    """The first year in a text such as "1885", "c. 1885", "1885-90", "1885.0" or "12.5.1885". None without one.

    None also for years before Christ: "1390-1352 B.C.", "1390 v. Chr." or "-1390".

    Args:
        text: The text, or None.
    """
    if text is None or text.startswith(("-", "\N{MINUS SIGN}")):
        return None
    if re.fullmatch(r"\d{3}(\.0+)?", text) and int(float(text)):
        return int(float(text))
    text = re.sub(r"(?<!\d)\d{1,2}[./]\d{1,2}[./](?=\d{4})", "", text)
    found = _YEAR.search(text)
    return int(found[1]) if found and not _BEFORE_CHRIST.search(text, found.end()) else None


def period_of(year: int, years: int = PERIOD_YEARS) -> str:
    """The span of years that a year lies in, such as "1875-1899".

    Args:
        year: The year.
        years: Length of a span.
    """
    start = year // years * years
    return f"{start}-{start + years - 1}"


def _text(value: str | None) -> str | None:
    if value is None:
        return None
    text = " ".join(unicodedata.normalize("NFC", value).split())
    return None if not text or text.casefold() in _MISSING else text
