"""Untrusted text (names of files, artists, titles): safe output, and comparison of spellings."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any, TextIO

# What moves a terminal's cursor, gives it orders, turns the order of letters round or breaks a line; and halves of
# surrogate pairs, which stand for the undecodable bytes of a file's name.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
_MARKDOWN = re.compile(r"[\\|`*_\[\]<>&~]")
_FORMULA = re.compile("[=+\\-@＝＋－＠]")  # a cell that begins so is one to a spreadsheet
_NUMBER = re.compile(r"[+-]?\d[\d.,]*(?:[eE][+-]?\d+)?%?")
# Marks of other scripts (dakuten, vowel signs) make other letters.
_ACCENTS = re.compile("[\u0300-\u036f]+")
_JOINTS = re.compile(r"[\s_\u2010-\u2014-]+")  # spaces, underscores, hyphens and dashes


def printable(text: object) -> str:
    r"""The text on one line. Control characters and other invisible characters are escaped.

    Args:
        text: The text.

    Example:
        >>> printable("Monet\x1b[2J.jpg")
        'Monet\\x1b[2J.jpg'
    """
    return _UNSEEN.sub(_escaped, str(text))


def _escaped(found: re.Match[str]) -> str:
    sign = found[0]
    return _SHORT.get(sign) or (f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}")


def one_line(text: object) -> str:
    r"""`printable` text in which every run of spaces and line breaks is one space.

    Args:
        text: The text.

    Example:
        >>> one_line("Water\n  lilies ")
        'Water lilies'
    """
    return printable(" ".join(str(text).split()))


def lines(text: object) -> str:
    """`printable` text, line by line.

    Args:
        text: The text.
    """
    return "\n".join(map(printable, str(text).split("\n")))


def say(text: object, file: TextIO | None = None) -> None:
    """Prints lines that contain untrusted text.

    Args:
        text: The text.
        file: The file to print to. None means standard output.
    """
    print(lines(text), file=file or sys.stdout)


def warn(text: object) -> None:
    """Prints lines that contain untrusted text on standard error.

    Args:
        text: The text.
    """
    say(text, sys.stderr)


def cell(value: object) -> str:
    """Text for a rich table, without markup and control characters.

    Args:
        value: The value.
    """
    from rich.markup import escape

    return escape(printable(value))


def markdown(text: object) -> str:
    """Text on one line, escaped so that Markdown shows it literally.

    Args:
        text: The text.
    """
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def csv_cell(value: Any) -> Any:
    """A cell of a CSV table that people open in a spreadsheet.

    Text that would be a formula gets an apostrophe in front.

    Use it only for tables that no program reads back: the apostrophe stays in the text.

    Args:
        value: The value.

    Example:
        >>> [csv_cell(value) for value in ("=HYPERLINK(1)", "-1.5", -1.5, "Monet")]
        ["'=HYPERLINK(1)", '-1.5', -1.5, 'Monet']
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def folded(text: str) -> str:
    """The text without case, accents and compatibility forms, for word search.

    Accents of Latin, Greek and Cyrillic letters are removed.

    Args:
        text: The text.

    Example:
        >>> folded("Paul CÉZANNE")
        'paul cezanne'
    """
    if text.isascii():
        return text.lower()
    # Compatibility forms hold capitals, as in the sign for "trade mark".
    plain = _ACCENTS.sub("", unicodedata.normalize("NFKD", text.casefold())).casefold()
    return plain if plain.isascii() else unicodedata.normalize("NFC", plain)


def spelling_key(text: str) -> str:
    """A key that all spellings of a text share. Spellings differ only in case, accents, spaces and hyphens.

    Underscores and dashes count as hyphens. Between digits, all of these count as one space, and a minus before a
    leading digit is kept. Thus 1-2 is not 12, and -3 is not 3.

    Args:
        text: The text.

    Example:
        >>> spelling_key("Jean-François  MILLET") == spelling_key("jean francois millet")
        True
        >>> [spelling_key(text) for text in ("1850–1874", "-3", "Ukiyo-e 12")]
        ['1850 1874', '-3', 'ukiyoe12']
    """
    plain = folded(text).strip()
    first, *others = _JOINTS.split(plain)
    key = "-" if plain[:1] == "-" and plain[1:2].isdecimal() else first
    for part in others:
        key += f" {part}" if key[-1:].isdecimal() and part[:1].isdecimal() else part
    return key or text


def spellings(counts: Mapping[str, int]) -> dict[str, str]:
    """For each text, the spelling that represents all texts with the same `spelling_key`.

    This is the most frequent spelling. Among equally frequent ones, mixed case comes first, then more accents, then the
    order of the text.

    Args:
        counts: How often each text occurs.
    """
    groups: dict[str, list[str]] = {}
    for text in counts:
        groups.setdefault(spelling_key(text), []).append(text)
    chosen: dict[str, str] = {}
    for texts in groups.values():
        best = min(texts, key=lambda t: (-counts[t], t.isupper() or t.islower(), -sum(ord(c) > 127 for c in t), t))
        chosen |= dict.fromkeys(texts, best)
    return chosen
