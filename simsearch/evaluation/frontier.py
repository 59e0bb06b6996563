"""The table and the picture of what an index was chosen from."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from simsearch.figures import save_frontier, spared
from simsearch.files import write_csv
from simsearch.index.auto import Frontier, Point


def write_frontier(folder: Path, name: str, frontier: Frontier) -> None:
    """Writes `<name>.csv`, one row a point, and `<name>.png`, the recall against the costs.

    Args:
        folder: Where to write.
        name: Name of both files.
        frontier: The points.
    """
    names, chosen = [field.name for field in fields(Point)], frontier.chosen
    rows = [[*(_cell(getattr(one, name)) for name in names), int(one == chosen)] for one in frontier.points]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", [*names, "chosen"], rows)
    kinds: dict[str, list[tuple[float, float, float]]] = {}
    for one in frontier.points:
        kinds.setdefault(f"{one.factory}, {one.items} items", []).append((one.recall, one.ms, one.bytes_per_item))
    mark = (chosen.recall, chosen.ms, chosen.bytes_per_item)
    with spared():
        save_frontier(folder / f"{name}.png", kinds, mark, title=f"chosen: {chosen.described()}")


def _cell(value: object) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
