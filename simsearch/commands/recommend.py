"""simsearch recommend: artworks similar to some examples and unlike others, with reasons.

The output is a table, or a JSON line, and a picture.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from simsearch import configs, program, terminal
from simsearch.data.loading import load_image
from simsearch.figures import Tile, save_grid
from simsearch.files import json_line
from simsearch.functional.regions import Region, read_region
from simsearch.images import decode_thumbnail
from simsearch.models.encoder import device
from simsearch.search.catalog import Catalog, read_catalog, verifying
from simsearch.search.describe import encode
from simsearch.search.engine import Engine
from simsearch.search.filters import parse_filters
from simsearch.search.local_features import describe_queries
from simsearch.search.query_regions import joined, regions_of
from simsearch.search.request import Recommendation, Regions, Request
from simsearch.search.stores.stored_index import stored
from simsearch.search.verdicts import NONE, UNCALIBRATED
from simsearch.text import cell
from simsearch.types import Encoder, LocalFeatures

_SHOWN = ("artist", "title", "year", "period", "style", "genre", "museum")  # columns of the table


@dataclass(frozen=True)
class Example:
    """One example or counter-example: an item of the catalog, or a file.

    Attributes:
        name: Its name.
        image: Its pixels.
        vector: Its descriptor.
        position: Position of the item, or None for a file.
        local: Its local features, if the catalog has local features.
        regions: The descriptors of its regions, for a file.
    """

    name: str
    image: Tensor
    vector: Tensor
    position: int | None = None
    local: tuple[LocalFeatures, ...] = ()
    regions: Regions | None = None


@program.command("recommend")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch recommend`.

    Args:
        config: The config of conf/recommend.yaml.

    Raises:
        ValueError: If a value is invalid or there is no example.
    """
    if config.format not in ("table", "json"):
        raise ValueError(f"format must be table or json, got {config.format!r}")
    values = configs.plain(config)
    exported = Path(config.encoder) if config.encoder else None
    catalog = read_catalog(Path(config.catalog), trusted=configs.trusts(config), exported=exported)
    chosen = config.verification
    settings = {"top": chosen.top, "regions": chosen.regions, "mirrored": chosen.mirrored}
    catalog = verifying(catalog, chosen.enabled, **settings)
    catalog = stored(catalog, configs.build(config.store) if config.get("store") else None)
    engine = Engine(catalog)
    reader = Examples(engine, device(config.device))
    region, images = read_region(values["region"]), configs.listed(values["image"])
    if region is not None and not images:
        raise ValueError(f"region={region} is a part of an image: give image=<file>")
    like = [reader.file(name, region) for name in images]
    like += [reader.item(engine.position(name)) for name in configs.listed(values["id"], reader.is_item)]
    unlike = [reader.any(name) for name in configs.listed(values["unlike"], reader.is_known)]
    if not like:
        raise ValueError("no example: give image=<file> or id=<id or path of an item>")
    positions = [example.position for example in like + unlike if example.position is not None]
    request = Request(
        like=torch.stack([example.vector for example in like]),
        unlike=torch.stack([example.vector for example in unlike]) if unlike else None,
        k=config.k,
        weights=given_weights(values["weights"], engine),
        where=parse_filters(config.where),
        diversity=config.diversity,
        collapse=config.collapse,
        hubness=config.hubness,
        exclude=tuple(positions),
        local=tuple(one for example in like for one in example.local),
        regions=joined([example.regions for example in like]),
        min_score=config.min_score,
    )
    answer = engine.recommend(request)
    kept = list(range(len(answer.ids))) if config.force or answer.verdict != NONE else []
    items = [asdict(hit) for hit in engine.hits(answer, [e.position for e in like if e.position is not None], kept)]
    if config.format == "json":
        query = {"like": [example.name for example in like], "unlike": [example.name for example in unlike]}
        about = {
            "verdict": answer.verdict,
            "agreeing": engine.agreeing(len(like), verified=bool(request.local)),
            "candidates": answer.candidates,
        }
        print(json_line({**query, **about, "results": items}))
    elif not len(answer.ids):
        relaxed = "min_score=" if answer.candidates else "where="
        print(f"none of {len(catalog)} items is left to recommend: relax {relaxed}")
    elif not kept:
        print(
            "no similar work: the nearest works are no closer than they are to unrelated images. The best of "
            f"{answer.candidates} items scores {float(answer.scores.max()):.4f}; force=true shows it"
        )
    else:
        names = [e.name for e in like], [e.name for e in unlike]
        terminal.show(answer_table(engine, *names, items, answer, verified=bool(request.local)))
    if config.figure:
        save_grid(Path(config.figure), tiles(catalog, like, unlike, items, answer.ids[kept].tolist()), side=128)
        print(f"picture: {config.figure}", file=sys.stderr)


class Examples:
    """Reads examples for an engine. The encoder is built when the first file is read.

    Args:
        engine: The engine of the catalog.
        device: Device of the encoder.
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.engine, self.device = engine, device

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of the catalog."""
        return self.engine.catalog.encoder.to(self.device)

    def file(self, name: str, region: Region | None = None) -> Example:
        """The image in a file.

        Args:
            name: The file.
            region: The part of the image to take alone, or None.

        Raises:
            ImageError: If it cannot be read.
        """
        image = load_image(Path(name), size=self.encoder.input_size, fit=self.encoder.fit, region=region)
        verification = self.engine.catalog.verification
        local = () if verification is None else next(describe_queries([Path(name)], verification, region=region))
        regions = None if verification is None else regions_of(Path(name), self.encoder, verification, region)
        return Example(name, image, encode(self.encoder, image[None])[0], local=local, regions=regions)

    def item(self, position: int) -> Example:
        """An item of the catalog.

        Args:
            position: Position of the item.
        """
        catalog = self.engine.catalog
        (name,) = self.engine.names.of([position])
        image = decode_thumbnail(catalog.thumbnails([position])[0])
        local = () if catalog.local is None else tuple(catalog.local_features([position]))
        return Example(name, image, self.engine.vectors([position])[0], position, local)

    def is_item(self, name: str) -> bool:
        """Whether an item of the catalog has that name.

        Args:
            name: The name.
        """
        return self.engine.names.find(name) is not None

    def is_known(self, name: str) -> bool:
        """Whether an item of the catalog or a file has that name.

        Args:
            name: The name.
        """
        return self.is_item(name) or configs.is_there(name)

    def any(self, name: str) -> Example:
        """An item of the catalog by its name, or else a file.

        Args:
            name: The name.
        """
        position = self.engine.names.find(name)
        return self.file(name) if position is None else self.item(position)


def given_weights(weights: Mapping[str, float | None], engine: Engine) -> dict[str, float] | None:
    """The weights that are set. None if there are none.

    Args:
        weights: Weights of the parts; None for a part that is not set.
        engine: The engine of the catalog.
    """
    return {name: weight for name, weight in weights.items() if weight is not None} or None


def answer_table(
    engine: Engine,
    like: Sequence[str],
    unlike: Sequence[str],
    items: Sequence[Mapping[str, Any]],
    answer: Recommendation,
    *,
    verified: bool = False,
) -> Table:
    """A table of the items. Above it stands what most of them share with each other or with the examples.

    Args:
        engine: The engine of the catalog.
        like: Names of the examples.
        unlike: Names of the counter-examples.
        items: The items found.
        answer: The answer of the engine.
        verified: Whether the items were verified.
    """
    title = cell(", ".join(like)) + (f"  (not like {cell(', '.join(unlike))})" if unlike else "")
    consensus = engine.consensus(answer.ids[[item["rank"] - 1 for item in items]])
    if consensus:
        title += "\n" + cell("most are of " + ", ".join(f"{name} {value}" for name, value in consensus.items()))
    judged = "" if answer.verdict == UNCALIBRATED else f"{answer.verdict}, "
    title += f"\n{judged}of {answer.candidates} items"
    if len(like) > 1 and (needed := engine.agreeing(len(like), verified)):
        said = ", ".join(f'"{verdict}" where {count} agree' for verdict, count in needed.items())
        title += f"\nof the {len(like)} examples: {said}"
    table = Table(title=title, title_justify="left")
    names = engine.attributes.names
    shown = [name for name in _SHOWN if name in names]
    parts = list(answer.parts) if len(answer.parts) > 1 else []
    for name in ("rank", "score", *parts):
        table.add_column(cell(name), justify="right", no_wrap=True)
    if judged:
        table.add_column("verdict", no_wrap=True)
    table.add_column("work", overflow="fold")  # a path is copied into id=: never cut
    for item in items:
        cells = [str(item["rank"]), f"{item['score']:.4f}", *(f"{item['parts'][name]:.3f}" for name in parts)]
        cells += [item["verdict"]] if judged else []
        words = {name: cell(value) for name in shown if (value := item["attributes"][name])}
        said = ", ".join(f"[bold]{word}[/bold]" if name in item["shared"] else word for name, word in words.items())
        path = cell(item["attributes"]["path"])
        table.add_row(*cells, f"{said}\n[dim]{path}[/dim]" if said else path)
    if any(item["shared"] for item in items):
        table.caption = "bold: the same as an example's"
    return table


def tiles(
    catalog: Catalog,
    like: Sequence[Example],
    unlike: Sequence[Example],
    items: Sequence[Mapping[str, Any]],
    positions: Sequence[int],
) -> list[list[Tile]]:
    """Rows of a picture: the first example with the items, then a row per further example and counter-example.

    Args:
        catalog: The catalog.
        like: The examples.
        unlike: The counter-examples.
        items: The items found.
        positions: Their positions.
    """
    found = []
    for item, data in zip(items, catalog.thumbnails(positions), strict=True):
        about = [item["attributes"].get(name) for name in ("artist", "title", "year")]
        words = ", ".join(str(word) for word in about if word) or Path(item["attributes"]["path"]).name
        said = "" if item["verdict"] == UNCALIBRATED else f"{item['verdict']}, "
        found.append(Tile(decode_thumbnail(data), f"{item['score']:.2f} {said}{words}"))
    rows = [[Tile(example.image, Path(example.name).name)] for example in like]
    rows += [[Tile(example.image, f"not: {Path(example.name).name}")] for example in unlike]
    return [[*rows[0], *found], *rows[1:]]


if __name__ == "__main__":
    main()
