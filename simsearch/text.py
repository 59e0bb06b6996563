"""Text from strangers (names of files, artists, titles) where people see it: in terminals, reports and spreadsheets."""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

# What moves a terminal's cursor, gives it orders, turns the order of letters round or breaks a line; and halves of
# surrogate pairs, which stand for the undecodable bytes of a file's name.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
_MARKDOWN = re.compile(r"[\\|`*_\[\]<>&~]")
_FORMULA = re.compile("[=+\\-@＝＋－＠]")  # a cell that begins so is one to a spreadsheet
_NUMBER = re.compile(r"[+-]?\d[\d.,]*(?:[eE][+-]?\d+)?%?")


def printable(text: object) -> str:
    r"""The text on one line, with control characters and what else cannot be seen as escapes.

    >>> printable("Monet\x1b[2J.jpg")
    'Monet\\x1b[2J.jpg'
    """
    return _UNSEEN.sub(_escaped, str(text))


def _escaped(found: re.Match[str]) -> str:
    sign = found[0]
    return _SHORT.get(sign) or (f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}")


def one_line(text: object) -> str:
    r"""`printable` text in which each space and line break, or several, is one space.

    >>> one_line("Water\n  lilies ")
    'Water lilies'
    """
    return printable(" ".join(str(text).split()))


def lines(text: object) -> str:
    """`printable` line by line."""
    return "\n".join(map(printable, str(text).split("\n")))


def say(text: object, file: TextIO | None = None) -> None:
    """Prints lines that hold text from strangers, to standard output by default."""
    print(lines(text), file=file or sys.stdout)


def warn(text: object) -> None:
    """`say` to standard error."""
    say(text, sys.stderr)


def cell(value: object) -> str:
    """Text for a table of rich's, in which neither it nor the terminal finds orders."""
    from rich.markup import escape

    return escape(printable(value))


def markdown(text: object) -> str:
    """Text on one line that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text))


def csv_cell(value: Any) -> Any:
    """A cell of a table that people open in a spreadsheet; what would be a formula there begins with an apostrophe.

    Only for tables that nobody reads back: the apostrophe stays in the text.

    >>> [csv_cell(value) for value in ("=HYPERLINK(1)", "-1.5", -1.5, "Monet")]
    ["'=HYPERLINK(1)", '-1.5', -1.5, 'Monet']
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
