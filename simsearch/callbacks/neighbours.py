"""Queries beside their neighbours, as a figure and as rows for a logger's table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from simsearch.callbacks.evaluation import RetrievalEvaluation
from simsearch.evaluation.evaluate import Evaluation
from simsearch.figures import Tile, save_grid, spared
from simsearch.types import RetrievalTask


@dataclass(frozen=True)
class Example:
    """One query with its neighbours.

    Attributes:
        tiles: The images with their captions, the query first.
        average_precision: Average precision of the query, in [0, 1]; NaN if it has none.
    """

    tiles: list[Tile]
    average_precision: float


class NeighbourFigure(pl.Callback):
    """Draws queries with their neighbours after the test, and saves a few query images to try a search with.

    The figure is figures/neighbours.png, the images lie in figures/queries. The queries are spread over the range of
    average precision, from worst to best, so that failures show.

    Args:
        queries: Number of queries, the rows of the figure.
        k: Number of neighbours in a row.

    Raises:
        ValueError: If `queries` or `k` is below 1.
    """

    def __init__(self, queries: int = 10, k: int = 10) -> None:
        if queries < 1 or k < 1:
            raise ValueError(f"queries and k must be at least 1, got {queries} and {k}")
        self.queries, self.k = queries, k
        self.examples: list[Example] = []

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            with spared():
                self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        evaluation = next(c for c in trainer.callbacks if isinstance(c, RetrievalEvaluation))  # type: ignore[attr-defined]
        data = trainer.datamodule  # type: ignore[attr-defined]
        task: RetrievalTask = data.task("test")
        result = evaluation.results["test"]
        self.examples = choose_examples(result, data.collection, task, self.queries, self.k)
        folder = Path(trainer.default_root_dir) / "figures"
        title = f"{data.collection.name}, {task.name}: mAP {result.metrics['mAP']:.3f}; worst to best queries"
        save_grid(folder / "neighbours.png", [e.tiles for e in self.examples], title=title)
        (folder / "queries").mkdir(exist_ok=True)
        for i, example in enumerate(self.examples):
            picture = example.tiles[0].image.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(picture).save(folder / "queries" / f"{i:02d}.png")


def choose_examples(result: Evaluation, collection: object, task: RetrievalTask, queries: int, k: int) -> list[Example]:
    """Queries at even steps of average precision, worst first, each with its k nearest items.

    Args:
        result: The results of an evaluation.
        collection: The Collection that was evaluated.
        task: The task that was measured.
        queries: Number of queries, or all if there are fewer.
        k: Number of neighbours.
    """
    precision: Tensor = result.per_query["AP"]
    order = torch.argsort(precision.nan_to_num(-1.0))
    count, last = min(queries, len(order)), len(order) - 1
    end = min(round(0.02 * last), (len(order) - count) // 2)  # of the extremes, unless all queries are wanted
    steps = np.linspace(end, last - end, count)
    images: Tensor = collection.images  # type: ignore[attr-defined]
    names = collection.classes[collection.attributes.index(task.attribute)]  # type: ignore[attr-defined]

    def name(label: int) -> str:
        return names[label] if label >= 0 else "unknown"

    examples = []
    for q in order[steps.round().astype(int)].tolist():
        label = int(result.query.label[q])
        ap = float(precision[q])
        tiles = [Tile(images[result.query.index[q]], f"AP {ap:.2f} {name(label)}")]
        for position in result.found.ids[q, :k].tolist():
            if position >= 0:
                other = int(result.gallery.label[position])
                tiles.append(Tile(images[result.gallery.index[position]], name(other), other == label >= 0))
        examples.append(Example(tiles, ap))
    return examples
