"""What commands print: tables and text that give the terminal no orders."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from simsearch.text import lines


def console() -> Console:
    """The terminal, as wide as it is or COLUMNS says; 120 columns where it is none."""
    told = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console() if told else Console(width=120)


def show(*what: Any) -> None:
    """Prints to the terminal, tables included; whatever their text holds gives the terminal no orders."""
    terminal = console()
    terminal.push_render_hook(_Harmless())
    for item in what:
        terminal.print(item)


class _Harmless(RenderHook):
    """Writes control characters in what is shown as escapes."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


@dataclass(frozen=True)
class _Shown:
    renderable: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else lines(text), style, control)
