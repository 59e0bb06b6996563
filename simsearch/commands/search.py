"""simsearch search: images in, similar items of a catalog out, as a table, JSON lines and a picture."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from simsearch import runtime
from simsearch.data.manifest import Manifest, load_images, read_manifest
from simsearch.figures import Tile, save_grid
from simsearch.images import decode_thumbnail
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.engine import Engine
from simsearch.types import SearchResult


@dataclass(frozen=True)
class Answer:
    """What was found for one query image: items best first, each with rank, score and its attributes."""

    query: str
    items: list[dict[str, Any]]
    positions: list[int]
    image: Tensor


@runtime.command("search")
def main(config: DictConfig) -> None:
    if config.format not in ("table", "json"):
        raise ValueError(f"format must be table or json, got {config.format!r}")
    catalog = read_catalog(Path(config.catalog))
    encoder = runtime.build_encoder(catalog.about["config"])
    catalog.load_encoder_state(encoder)
    encoder.to(runtime.device(config.device))
    rerank = runtime.build(config.rerank) if config.get("rerank") else None
    engine = Engine(catalog, encoder, rerank)
    answers, milliseconds = search(engine, Path(config.image), config.k, config.batch_size)
    if config.format == "json":
        for answer in answers:
            print(json.dumps({"query": answer.query, "results": answer.items}))
    else:
        for answer in answers:
            runtime.show(answer_table(answer))
        print(f"{len(answers)} queries against {len(catalog)} items, {milliseconds:.1f} ms each with decoding")
        if not config.figure:
            print("see them: the same command with figure=neighbours.png", file=sys.stderr)
    if config.figure:
        save_grid(Path(config.figure), [answer_tiles(catalog, answer) for answer in answers[: config.rows]])
        print(f"picture: {config.figure}", file=sys.stderr)


def search(engine: Engine, source: Path, k: int, batch_size: int) -> tuple[list[Answer], float]:
    """Answers for the readable images of `source`, a file or folder, and milliseconds a query.

    Unreadable ones are named on standard error. Raises ValueError where none can be read.
    """
    # Any single file is taken for an image, whatever its name; its content decides.
    listed = source.is_dir() or source.suffix.lower() in (".csv", ".parquet") or not source.exists()
    manifest = read_manifest(source) if listed else Manifest(source.parent, (source.name,))
    answers: dict[int, Answer] = {}
    errors = []
    start = time.perf_counter()
    fit = engine.encoder.fit
    batches = load_images(manifest, size=engine.encoder.input_size, fit=fit, batch_size=batch_size)
    for images, rows, unreadable in batches:
        errors += unreadable
        if len(images):
            found = engine.search(images, k)
            for image, row, one in zip(images, rows.tolist(), per_query(found), strict=True):
                items, positions = describe(engine.catalog, one)
                answers[row] = Answer(manifest.paths[row], items, positions, image)
    for error in errors:
        print(f"skipped: {error}", file=sys.stderr)
    if not answers:
        raise ValueError(f"no image of {source} could be read")
    milliseconds = 1e3 * (time.perf_counter() - start) / len(answers)
    return [answers[row] for row in sorted(answers)], milliseconds


def per_query(found: SearchResult) -> list[tuple[Tensor, Tensor]]:
    """ids (K,) and scores (K,) of each query, what an approximate index did not find left out."""
    return [(i[i >= 0], s[i >= 0]) for i, s in zip(found.ids, found.scores, strict=True)]


def describe(catalog: Catalog, found: tuple[Tensor, Tensor]) -> tuple[list[dict[str, Any]], list[int]]:
    """Rank, score and attributes of the items found, and their positions in the catalog."""
    ids, scores = found[0].tolist(), found[1].tolist()
    rows = catalog.items.take(torch.tensor(ids).numpy()).to_pylist()
    numbered = enumerate(zip(scores, rows, strict=True), start=1)
    return [{"rank": rank, "score": score, **row} for rank, (score, row) in numbered], ids


def answer_table(answer: Answer) -> Table:
    """An answer as a table, one row an item."""
    table = Table(title=escape(answer.query), title_justify="left")
    names = list(answer.items[0]) if answer.items else ["rank", "score", "path"]
    for name in names:
        table.add_column(escape(name), justify="right" if name in ("rank", "score") else "left", overflow="fold")
    for item in answer.items:
        cells = [f"{v:.4f}" if isinstance(v, float) else "" if v is None else escape(str(v)) for v in item.values()]
        table.add_row(*cells)
    return table


def answer_tiles(catalog: Catalog, answer: Answer) -> list[Tile]:
    """The query and its items' thumbnails as a row of a picture."""
    tiles = [Tile(answer.image, Path(answer.query).name)]
    for item, data in zip(answer.items, catalog.thumbnails(answer.positions), strict=True):
        name = item.get(catalog.about.get("label", "label")) or Path(item["path"]).name
        tiles.append(Tile(decode_thumbnail(data), f"{item['score']:.2f} {name}"))
    return tiles


if __name__ == "__main__":
    main()
