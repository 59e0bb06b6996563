"""Attributes as strangers write them, made comparable: spellings, years, periods."""

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
_NOBODY = {"unknown", "unidentified", "not known", "?", "-", "–", "—"}
_YEAR = re.compile(r"(?<!\d)(?<!\d[.,])(1\d{3}|20\d{2})(?!\d)")


@dataclass(frozen=True)
class Cleaned:
    """Columns made comparable, and what was done.

    merges: for a column, each spelling that was kept with the others' counts. unparsed: texts without a year, by
    count. unknown: values that say that nothing is known, by column.
    """

    columns: dict[str, Column]
    merges: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    unparsed: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)


def clean(columns: dict[str, Column], categorical: Iterable[str]) -> Cleaned:
    """The columns with their texts in NFC and without needless white space, None where there is nothing in them.

    categorical: columns whose values name classes; of those that are equal by `simsearch.text.spelling_key` the most
    frequent spelling stays. A column `year` becomes the first year that it names; where that loses something the text
    stays as `year_text`. `period` is added where there is a year.
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
    """The first year of a text such as "1885", "c. 1885", "1885-90", "1885.0" or "12.5.1885"; None without one."""
    if text is None:
        return None
    if re.fullmatch(r"\d{3}(\.0+)?", text) and int(float(text)):
        return int(float(text))
    found = _YEAR.search(re.sub(r"(?<!\d)\d{1,2}[./]\d{1,2}[./](?=\d{4})", "", text))
    return int(found[1]) if found else None


def period_of(year: int, years: int = PERIOD_YEARS) -> str:
    """The span of `years` that a year lies in, such as "1875-1899"."""
    start = year // years * years
    return f"{start}-{start + years - 1}"


def _text(value: str | None) -> str | None:
    if value is None:
        return None
    text = " ".join(unicodedata.normalize("NFC", value).split())
    return None if not text or text.casefold() in _MISSING else text
