"""The precision-recall curve of the test."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from simsearch.callbacks.evaluation import RetrievalEvaluation
from simsearch.evaluation.evaluate import Evaluation
from simsearch.evaluation.sharded_index import ShardedIndex
from simsearch.figures import save_curve, spared
from simsearch.files import write_csv
from simsearch.functional.curves import RECALL_LEVELS, precision_recall_curve
from simsearch.types import RetrievalTask


class PrecisionRecall(pl.Callback):
    """Writes the precision-recall curve after the test: figures/precision-recall.csv and .png.

    The curve is the mean precision at 21 levels of recall. Like mAP it is that of the full ranking over the vectors or
    codes that the index stores, without re-ranking. The callback ranks a second time for it.
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        evaluation = next(c for c in trainer.callbacks if isinstance(c, RetrievalEvaluation))  # type: ignore[attr-defined]
        data = trainer.datamodule  # type: ignore[attr-defined]
        task: RetrievalTask = data.task("test")
        result = evaluation.results["test"]
        self.points = curve(result, exclude_self=task.exclude_self)  # with the help of all ranks
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "figures" / "precision-recall.csv"
        write_csv(path, ("recall", "precision"), self.points)
        title = f"{data.collection.name}, {task.name}: mAP {result.metrics['mAP']:.3f}"
        with spared():
            save_curve(path.with_suffix(".png"), self.points, title=title)


def curve(result: Evaluation, *, exclude_self: bool) -> list[tuple[float, float]]:
    """Points (recall, mean precision) of the full ranking of an evaluation. Every rank must call this function.

    Args:
        result: The results of the evaluation.
        exclude_self: Whether a query itself is left out of its ranking.
    """
    ranked = ShardedIndex(result.index, result.gallery).as_ranked(result.query)
    precision = precision_recall_curve(*ranked, exclude_self=exclude_self)
    return list(zip(RECALL_LEVELS, precision.tolist(), strict=True))
