"""The callback that measures retrieval in every validation epoch and at test."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn

from simsearch.evaluation.evaluate import (
    Evaluation,
    Search,
    as_stored,
    check_kind,
    check_one_process,
)
from simsearch.evaluation.evaluator import Evaluator, check_ks
from simsearch.evaluation.frontier import write_frontier
from simsearch.evaluation.record import plain_intervals, plain_metrics, write_record
from simsearch.evaluation.sharded_index import GalleryIndex
from simsearch.evaluation.verification import Verified
from simsearch.files import read_json
from simsearch.functional.geometry import Verifier
from simsearch.functional.reranking import Reranker
from simsearch.index.auto import AutoIndex
from simsearch.index.faiss_index import FaissIndex
from simsearch.metrics.retrieval import RetrievalMetrics
from simsearch.types import RetrievalTask

_LOG = logging.getLogger(__name__)
_KEPT = 10  # neighbours of a query in per_query.parquet, as collection rows; -1 if fewer were found


class RetrievalEvaluation(pl.Callback):
    """Measures retrieval in every validation epoch and at test, and logs the metrics on every rank.

    The module's validation and test steps return its embeddings. The DataModule has two loaders, first queries and then
    gallery, and its `task` returns the RetrievalTask. Rank 0 writes the results to the run directory: metrics.json with
    one entry a stage, and per_query.parquet for the test.

    Args:
        index: The index to fill. Each evaluation fills an empty one, or chooses one by its budget for the gallery's
            descriptors: frontier/<stage>.csv and .png say from what.
        ks: Cutoffs of the metrics, ranks from 1.
        seed: Seed of the choice of queries for the recall of the index.
        rerank: Also measure after this re-ranking, at test and in a validation on its own. The epochs of a training
            leave it out, since it would slow them down. None for no re-ranking.
        evaluators: Further measures, by any names. Their numbers join those of the index and the full ranking.
        verify: Also measure after this verification of the first items by geometry, in the same stages as `rerank`.
            None for no verification.

    Raises:
        ValueError: If `ks` is not a list of ranks from 1.
    """

    def __init__(
        self,
        index: GalleryIndex | AutoIndex,
        ks: Sequence[int] = (1, 10, 100),
        seed: int = 0,
        rerank: Reranker | None = None,
        evaluators: Mapping[str, Evaluator] | None = None,
        verify: Verifier | None = None,
    ) -> None:
        check_ks(ks)
        self.index, self.ks, self.seed, self.rerank = index, tuple(ks), seed, rerank
        self.verify, self.evaluators = verify, dict(evaluators or {})
        self.results: dict[str, Evaluation] = {}
        self._metrics: RetrievalMetrics | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_kind(self.index, getattr(pl_module, "bits", None))  # before hours of work, not after
        needing = {"rerank": self.rerank is not None, "verify": self.verify is not None}
        for name, evaluator in self.evaluators.items():
            needing[f"evaluators.{name}"] = getattr(evaluator, "one_process", False)
        for key in (key for key, needs in needing.items() if needs):
            check_one_process(key, trainer.world_size)

    def _start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if trainer.sanity_checking:
            return
        task: RetrievalTask = trainer.datamodule.task(stage)  # type: ignore[attr-defined]
        self._metrics = RetrievalMetrics(self.ks, getattr(module, "bits", None), task.exclude_self).to(module.device)

    def _collect(self, trainer: pl.Trainer, outputs: Any, batch: Any, loader: int, stage: str) -> None:
        if self._metrics is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        task: RetrievalTask = data.task(stage)
        rows = batch["index"]
        label = data.collection.column(task.attribute)[rows.cpu()].to(rows.device)
        group = data.collection.column(task.junk)[rows.cpu()].to(rows.device) if task.junk else None
        self._metrics.update("query" if loader == 0 else "gallery", outputs, label, rows, group)

    def _finish(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self._metrics is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        task: RetrievalTask = data.task(stage)
        query, gallery = self._metrics.sharded("query"), self._metrics.sharded("gallery")
        health = {f"code/{name}": value for name, value in self._metrics.code_statistics(gallery.ranks).items()}
        self._metrics = None
        for role, got, expected in (("query", query, task.query), ("gallery", gallery, task.gallery)):
            if not torch.equal(got.index, expected.sort().values):
                raise RuntimeError(
                    f"{len(got)} {role} items were collected, the protocol {task.name} has {len(expected)}: "
                    "a loader left out or added some"
                )
        rerank, verify = (None, None) if trainer.state.fn == TrainerFn.FITTING else (self.rerank, self.verify)
        verified = None
        if verify is not None:
            verified = Verified(verify, data.collection.images, self.ks, data.num_workers)
        result = Search(self.index, self.ks, rerank, self.seed, verified)(query, gallery, task)
        result.metrics.update(health)
        shown = as_stored(gallery, result.index) if self.evaluators else gallery
        for name, evaluator in self.evaluators.items():
            result.add(evaluator(query, shown, task), name)
        self.results[stage] = result
        prefix = "val" if stage == "validate" else stage
        # Every rank has the values of all queries: nothing to reduce.
        module.log_dict({f"{prefix}/{name}": value for name, value in result.metrics.items()}, rank_zero_only=False)
        if trainer.is_global_zero:
            headline = ", ".join(
                f"{name} {result.metrics[name]:.4f}" for name in ("mAP", "P@1") if name in result.metrics
            )
            _LOG.info("step %d, epoch %d, %s: %s", trainer.global_step, trainer.current_epoch, stage, headline)
            if stage == "validate" and not _is_best(trainer, result.metrics):
                return
            known = hasattr(module, "provenance")
            about = {"identity": module.identity(), **module.provenance} if known else {}  # type: ignore[operator,dict-item]
            folder = Path(trainer.default_root_dir)
            write_results(folder, prefix, task, result, about)
            if result.frontier is not None:
                write_frontier(folder / "frontier", prefix, result.frontier)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module, "validate")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch, dataloader_idx, "validate")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module, "validate")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch, dataloader_idx, "test")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module, "test")


def _is_best(trainer: pl.Trainer, metrics: Mapping[str, float]) -> bool:
    """Whether a validation is the best so far by what the checkpoint monitors: metrics.json is of the one tested."""
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint) and keeper.best_model_score is not None:
            value = metrics.get(str(keeper.monitor).removeprefix("val/"))
            if value is not None:
                best = keeper.best_model_score
                logged = torch.tensor(value).to(best)  # rounded as the trainer logs it: an equal one is no better
                return bool(logged > best if keeper.mode == "max" else logged < best)
    return True


def write_results(folder: Path, stage: str, task: RetrievalTask, result: Evaluation, model: Mapping[str, Any]) -> None:
    """Adds the results of a stage to folder/metrics.json, and writes per_query.parquet for the test.

    Both files are written atomically. In metrics.json a metric without a value is null; `unit` says what the confidence
    intervals resample, and `units` how many of these there are. per_query.parquet has the unit of each query.

    Args:
        folder: The run directory.
        stage: Name of the entry, "test" or "val".
        task: The task that was measured.
        result: The results of the evaluation.
        model: Plain facts about the model and the source of its weights.
    """
    units = result.units
    path = folder / "metrics.json"
    stages = read_json(path) if path.is_file() else {}
    about: dict[str, Any] = {
        "protocol": task.name,
        "fingerprint": task.fingerprint,
        "attribute": task.attribute,
        "junk": task.junk,
        "exclude_self": task.exclude_self,
        "unit": task.unit,
        "units": len(units.unique()),
        "model": dict(model),
        "metrics": plain_metrics(result.metrics),
        "intervals": plain_intervals(result.intervals),
    }
    if result.frontier is not None and isinstance(result.index, FaissIndex):
        about["index"] = result.index.settings
    columns: dict[str, Any] | None = None
    if stage == "test":
        columns = {"index": result.query.index.numpy(), "label": result.query.label.numpy(), "unit": units.numpy()}
        columns |= {name: value.numpy() for name, value in result.per_query.items()}
        ids = result.found.ids[:, :_KEPT]
        rows = result.gallery.index[ids.clamp(min=0)].masked_fill(ids < 0, -1).int()
        columns["found"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.flatten().numpy()), rows.shape[1])
    write_record(folder, {**stages, stage: about}, columns)
