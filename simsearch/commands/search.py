"""simsearch search: finds similar items of a catalog for images. The output is a table or JSON lines, and a picture."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from simsearch import configs, program, terminal
from simsearch.data.manifest import Manifest, read_manifest
from simsearch.figures import Tile, save_grid
from simsearch.files import json_line
from simsearch.functional.geometry import Match
from simsearch.functional.regions import Region, read_region
from simsearch.images import decode_thumbnail
from simsearch.models.encoder import device
from simsearch.search.catalog import Catalog, read_catalog, verifying
from simsearch.search.describe import batches_of, encode
from simsearch.search.engine import Engine
from simsearch.search.items import rows_at
from simsearch.search.local_features import describe_queries
from simsearch.search.query_regions import regions_of
from simsearch.search.request import check_min_score
from simsearch.search.stores.stored_index import stored
from simsearch.search.verdicts import NONE, UNCALIBRATED, best_verdict
from simsearch.text import cell, warn
from simsearch.types import SearchResult


@dataclass(frozen=True)
class Answer:
    """The answer for one query image.

    Attributes:
        query: Name of the query.
        verdict: The best verdict among the items, as `simsearch recommend` gives it.
        items: The items, best first, each with rank, score, verdict and attributes.
        positions: Positions of the items.
        image: Pixels of the query, or None if no picture shows it.
    """

    query: str
    verdict: str
    items: list[dict[str, Any]]
    positions: list[int]
    image: Tensor | None = None


@program.command("search")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch search`.

    Args:
        config: The config of conf/search.yaml.

    Raises:
        ValueError: If a value is invalid.
    """
    if config.format not in ("table", "json"):
        raise ValueError(f"format must be table or json, got {config.format!r}")
    check_min_score(config.min_score)
    if config.k < 1:
        raise ValueError(f"k must be at least 1, got {config.k}")
    if min(config.rows, config.batch_size) < 1:
        raise ValueError(f"rows and batch_size must be at least 1, got {config.rows} and {config.batch_size}")
    exported = Path(config.encoder) if config.encoder else None
    catalog = read_catalog(Path(config.catalog), trusted=configs.trusts(config), exported=exported)
    chosen = config.verification
    settings = {"top": chosen.top, "regions": chosen.regions, "mirrored": chosen.mirrored}
    catalog = verifying(catalog, chosen.enabled, **settings)
    catalog = stored(catalog, configs.build(config.store) if config.get("store") else None)
    catalog.encoder.to(device(config.device))
    rerank = configs.build(config.rerank) if config.get("rerank") else None
    region = read_region(configs.plain(config)["region"])
    engine, source = Engine(catalog, rerank), Path(config.image)
    pictures = config.rows if config.figure else 0
    answers = search(engine, source, config.k, config.batch_size, region, config.min_score, pictures)
    shown: list[Answer] = []
    count, seconds, start = 0, 0.0, time.perf_counter()
    for answer in answers:
        count += 1
        seconds += time.perf_counter() - start
        if config.format == "json":
            line = {"query": answer.query, "verdict": answer.verdict, "results": answer.items}
            print(json_line(line), flush=True)
        else:
            terminal.show(answer_table(answer, terminal.console().width))
        if answer.image is not None:
            shown.append(answer)
        start = time.perf_counter()
    if config.format == "table":
        print(f"{count} queries against {len(catalog)} items, {1e3 * seconds / count:.1f} ms each with decoding")
        if not config.figure:
            print("to see them, give the same command with figure=neighbours.png", file=sys.stderr)
    if config.figure:
        save_grid(Path(config.figure), [answer_tiles(catalog, answer) for answer in shown])
        print(f"picture: {config.figure}", file=sys.stderr)


def search(
    engine: Engine,
    source: Path,
    k: int,
    batch_size: int,
    region: Region | None = None,
    min_score: float | None = None,
    pictures: int = 0,
) -> Iterator[Answer]:
    """Yields the answers for all readable images in their order, batch by batch where they are read in that order.

    Unreadable images are listed on standard error. The scores of verified searches are cosines, even after re-ranking,
    since items that regions bring have no others.

    Args:
        engine: The engine of the catalog.
        source: A file or folder.
        k: Number of items per query.
        batch_size: Number of images per forward pass.
        region: The part of each image to search with. None searches with whole images.
        min_score: Least score of an item. None for any.
        pictures: Number of answers, the first ones, that keep the pixels of their queries.

    Raises:
        ValueError: If no image can be read.
    """
    # Any single file is taken for an image, whatever its name; its content decides.
    listed = source.is_dir() or source.suffix.lower() in (".csv", ".parquet") or not source.exists()
    manifest = read_manifest(source) if listed else Manifest(source.parent, (source.name,))
    least = -torch.inf if min_score is None else min_score
    encoder, verification = engine.catalog.encoder, engine.catalog.verification
    answers: dict[int, Answer] = {}  # by row
    pixels: dict[int, Tensor] = {}
    count = 0
    for images, rows, unreadable in batches_of(encoder, manifest, region=region, batch_size=batch_size):
        for error in unreadable:
            warn(f"skipped: {error}")
        if not len(images):
            continue
        count += len(images)
        vectors = encode(encoder, images)
        nearest = engine.nearest(vectors, k if verification is None else max(k, verification.top))
        found = per_query(nearest, min_score if verification is None else None)
        files = [manifest.root / manifest.paths[row] for row in rows.tolist()]
        local = iter(()) if verification is None else describe_queries(files, verification, region=region)
        for image, row, vector, (ids, scores) in zip(images, rows.tolist(), vectors, found, strict=True):
            matches = None
            if verification is not None:
                regions = regions_of(manifest.root / manifest.paths[row], encoder, verification, region)
                ids = ids[engine.scores(vector, ids) >= least]
                ids, matches = engine.verified(ids, next(local), regions)
                scores = engine.scores(vector, ids)
                kept = (scores >= least).nonzero()[:k, 0]
                ids, scores, matches = ids[kept], scores[kept], [matches[place] for place in kept.tolist()]
            verdicts = engine.verdicts(ids, vector[None], None, matches)
            items, positions = rows_of(engine.catalog, ids, scores, verdicts, matches)
            answers[row] = Answer(manifest.paths[row], best_verdict(verdicts), items, positions)
            pixels[row] = image.clone()  # alone, without its batch
            if len(pixels) > pictures:
                del pixels[max(pixels)]
        if encoder.fit == "square":  # else images come by their shapes
            yield from _in_order(answers, pixels)
            answers.clear()
    yield from _in_order(answers, pixels)
    if not count:
        raise ValueError(f"no image of {source} could be read")


def _in_order(answers: Mapping[int, Answer], pixels: Mapping[int, Tensor]) -> Iterator[Answer]:
    return (replace(answers[row], image=pixels.get(row)) for row in sorted(answers))


def per_query(found: SearchResult, min_score: float | None = None) -> list[tuple[Tensor, Tensor]]:
    """ids (K,) and scores (K,) of each query, without the places that an approximate index left empty.

    Args:
        found: The search result.
        min_score: Least score of an item. None for any.
    """
    kept = (found.ids >= 0) & (found.scores >= (-torch.inf if min_score is None else min_score))
    return [(i[keep], s[keep]) for i, s, keep in zip(found.ids, found.scores, kept, strict=True)]


def rows_of(
    catalog: Catalog, ids: Tensor, scores: Tensor, verdicts: list[str], matches: list[Match | None] | None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Rank, id, score, verdict and attributes of the items of one query, and their positions in the catalog.

    Verified items add their inliers, and the outline in the query.

    Args:
        catalog: The catalog.
        ids: int64 (K,).
        scores: (K,).
        verdicts: The verdicts on the items.
        matches: The matches of the items, if they were verified.
    """
    rows = rows_at(catalog.items, ids.tolist())
    items = [
        {"rank": rank, "id": name, "score": score, "verdict": verdict}
        for rank, (name, score, verdict) in enumerate(
            zip(catalog.names.of(ids.tolist()), scores.tolist(), verdicts, strict=True), start=1
        )
    ]
    for item, match in zip(items, matches or (), strict=matches is not None):
        item["inliers"] = None if match is None else match.inliers
        item["outline"] = None if match is None else match.outline.tolist()
    others = [{n: v for n, v in row.items() if n != "id"} for row in rows]
    return [item | other for item, other in zip(items, others, strict=True)], ids.tolist()


def answer_table(answer: Answer, width: int = 120) -> Table:
    """An answer as a table, one row per item. A calibrated catalog adds verdicts.

    Columns without a value are left out. If the terminal is too narrow, columns whose values are all equal are left out
    next, then the last columns.

    Args:
        answer: The answer.
        width: Width of the terminal in columns.
    """
    judged = answer.verdict != UNCALIBRATED
    said = ("no similar work" if answer.verdict == NONE else answer.verdict) if judged else ""
    table = Table(title=cell(answer.query) + (f"\n{said}" if said else ""), title_justify="left")
    names = list(answer.items[0]) if answer.items else ["rank", "score", "path"]
    names = [name for name in names if (judged or name != "verdict") and name != "outline"]
    texts = {name: [_shown(item[name]) for item in answer.items] for name in names}
    kept = [name for name in names if name in _ALWAYS or any(texts[name])]
    while _table_width(kept, texts) > width and (more := [name for name in kept if name not in _ALWAYS]):
        same = [name for name in more if len(answer.items) > 1 and len(set(texts[name])) == 1]
        kept.remove((same or more)[-1])
    for name in kept:
        table.add_column(cell(name), justify="right" if name in ("rank", "score") else "left", overflow="fold")
    for row in zip(*(texts[name] for name in kept), strict=True):
        table.add_row(*row)
    if left_out := [name for name in names if name not in kept and any(texts[name])]:
        table.caption = f"the table has no room for {cell(', '.join(left_out))}: format=json shows all columns"
    return table


_ALWAYS = ("rank", "score", "verdict", "path")


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else cell(value)


def _table_width(names: list[str], texts: dict[str, list[str]]) -> int:
    return 1 + sum(3 + max(map(len, [name, *texts[name]])) for name in names)


def answer_tiles(catalog: Catalog, answer: Answer) -> list[Tile]:
    """The query and the thumbnails of its items as a row of a picture, with verdicts if there are any.

    Args:
        catalog: The catalog.
        answer: The answer. Without pixels of its query, the row begins with the items.
    """
    tiles = [] if answer.image is None else [Tile(answer.image, Path(answer.query).name)]
    for item, data in zip(answer.items, catalog.thumbnails(answer.positions), strict=True):
        name = item.get(catalog.about.get("label", "label")) or Path(item["path"]).name
        said = "" if item["verdict"] == UNCALIBRATED else f"{item['verdict']}, "
        tiles.append(Tile(decode_thumbnail(data), f"{item['score']:.2f} {said}{name}"))
    return tiles


if __name__ == "__main__":
    main()
