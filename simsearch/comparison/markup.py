"""HTML and SVG that cannot hold a stranger's markup: every text is escaped when it becomes part of an element."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_VOID = ("img", "meta", "br")  # HTML elements without an end; SVG's always get one


class Markup(str):
    """Text that is markup already. Only element() and joined() make it, and this package's own CSS and script."""


def element(name: str, attributes: Mapping[str, object], *children: str | None) -> Markup:
    """An element; a child that is not Markup is escaped, None leaves nothing. A None attribute is left out."""
    given = "".join(f' {key}="{escape(str(value))}"' for key, value in attributes.items() if value is not None)
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: str | None) -> Markup:
    """The children one after another, escaped where they are not Markup."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))
