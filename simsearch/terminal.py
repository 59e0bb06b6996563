"""The output of commands: tables and text that cannot control the terminal."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from simsearch.text import lines


def console() -> Console:
    """The terminal at its own width or that of COLUMNS. 120 columns if the output is not a terminal."""
    width_is_known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console() if width_is_known else Console(width=120)


def show(*what: Any) -> None:
    """Prints text and tables to the terminal. Control characters in them are escaped.

    Args:
        what: Text, tables and other objects of rich.
    """
    terminal = console()
    terminal.push_render_hook(_Harmless())
    for item in what:
        terminal.print(item)


class _Harmless(RenderHook):
    """Escapes control characters in the output."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


@dataclass(frozen=True)
class _Shown:
    renderable: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else lines(text), style, control)
