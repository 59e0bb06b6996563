"""simsearch train: trains and measures a model, and writes a run directory with a catalog."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint
from tqdm import tqdm

from simsearch import (
    configs,
    launch,
    program,
    results,
    run_directory,
    saved_run,
    settings,
    terminal,
    tracking,
    trust,
)
from simsearch.callbacks.evaluation import RetrievalEvaluation
from simsearch.callbacks.interruption import Interruption
from simsearch.callbacks.neighbours import NeighbourFigure
from simsearch.callbacks.precision_recall import PrecisionRecall
from simsearch.callbacks.pruning import Pruning
from simsearch.callbacks.training import LastValidation, last_checkpoint
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.evaluation.evaluate import Evaluation
from simsearch.files import Damaged, check_zip, read_json
from simsearch.identity import same_images, start_config
from simsearch.images import encode_thumbnail
from simsearch.index.faiss_index import FaissIndex
from simsearch.models.encoder import encoder_config
from simsearch.search.item_tables import item_table
from simsearch.search.writing import write_catalog
from simsearch.sweeps import objectives, sweeper, trials
from simsearch.text import warn

THUMBNAIL_SIDE = 128
sweeper.register()
_LOG = logging.getLogger(__name__)


@program.command("train", resumes=True)
def main(config: DictConfig) -> Any:
    """Runs the command `simsearch train`.

    Args:
        config: The config of conf/train.yaml.

    Returns:
        The values that a sweeper optimises.

    Raises:
        ValueError: If the command was started by torchrun.
    """
    _LOG.info("simsearch train %s", shlex.join(sys.argv[1:]))
    if launch.is_rank() and not launch.is_slurm_rank():
        raise ValueError("simsearch train starts its ranks itself: do not use torchrun, give trainer.devices=2 or auto")
    with launch.as_found(), trials.trial(config) as trial:
        if trial is not None and trial.pruned and trial.finished:
            return None
        if trial is not None and trial.finished:
            trials.check_same_data(trial.folder, config)
            trial.values = objectives.values_of(trial.folder, config.objective)
            return trial.values
        if trial is not None and trial.elsewhere:
            return None
        objectives.check(config)
        if not config.resume:
            settings.check_training(configs.plain(config))
        with run_directory.start_run(config) as run:
            ranks = launch.count_devices(run.config["trainer"]["devices"])
            if ranks > 1 and not launch.is_slurm_rank():
                configs.prepare_data(run.config)
                launch.run_ranks(run.folder, ranks, trusted=run.trusted)
            else:
                train_run(run)
        if trial is not None and (pruned := read_json(run.folder / "run.json").get("pruned")):
            trial.pruned = pruned
            return None
        values = objectives.values_of(run.folder, config.objective)
        if trial is not None:
            trial.values = values
        return values


def train_run(run: saved_run.Run) -> None:
    """Trains a run directory as one of its ranks, or as the only one.

    Args:
        run: The run.
    """
    with Interruption(launch.rank()) as interruption:
        data = configs.build_data(run.config)
        note_known_images(run.config, data)
        model = configs.build(run.config["model"])
        note_small_images(run.config, model.encoder.input_size)
        loggers = tracking.build_loggers(run)
        status = "failed"
        try:
            tracking.log_inputs(loggers, run, data.collection)
            train(run, data, model, loggers, [interruption, *pruning_callbacks()])
            status = "success"
        finally:
            tracking.finish_loggers(loggers, status)


def note_small_images(config: Mapping[str, Any], input_size: int) -> None:
    """Says if images are decoded at the size of the backbone, and the network also looks at larger ones.

    Args:
        config: The run's plain config.
        input_size: Side in pixels at which the encoder takes files.
    """
    size, backbone = config["data"].get("size"), config.get("backbone") or {}
    if size is not None and size == backbone.get("size") and size < input_size and launch.rank() == 0:
        warn(
            f"note: the network looks at images of up to {input_size} pixels, and data.size={size} decodes them "
            f"smaller than a search does: give data.size={input_size}"
        )


def note_known_images(config: Mapping[str, Any], data: RetrievalDataModule) -> None:
    """Says how many images that are measured, and that this training leaves out, `model.start` was trained on.

    Args:
        config: The run's plain config.
        data: Its data.
    """
    split, known = data.split, None if config.get("smoke") else start_config(config)
    tasks = [split.test, *([] if split.validation is None else [split.validation])]
    measured = torch.cat([rows for task in tasks for rows in (task.query, task.gallery)]).unique()
    measured = measured[~torch.isin(measured, split.train)]
    while known is not None and launch.rank() == 0 and same_images(known, config):
        if not all(target in trust.ALLOWED for _, target in trust.targets({"protocol": known["protocol"]})):
            return  # the start may come from somebody else
        try:
            trained = configs.build(known["protocol"]).split(data.collection).train
        except ValueError:
            return  # the images have changed since
        if count := int(torch.isin(measured, trained).sum()):
            warn(
                f"note: model.start, or what it starts from, was trained on {count} of the images that are measured "
                "here and that this training leaves out: the numbers are not those of new images, or classes"
            )
            return
        known = start_config(known)


def pruning_callbacks() -> list[Pruning]:
    """The callback that reports this trial of a sweep to its study. Empty if nothing may prune it."""
    about = trials.pruned_by()
    if about is None:
        return []
    if launch.rank() != 0:
        return [Pruning(about["monitor"], lambda value, validation: False)]
    from simsearch.sweeps.journal import Reporter  # Optuna comes with an extra

    reporter = Reporter(about["storage"], about["study"], about["number"], configs.build(about["pruner"]))
    return [Pruning(about["monitor"], reporter)]


def train(
    run: saved_run.Run,
    data: RetrievalDataModule,
    model: pl.LightningModule,
    loggers: list[pl.loggers.Logger],
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Fits the model of a run and tests its best checkpoint. Rank 0 writes figures and catalog and prints the table.

    A trial that is pruned ends after the fit; run.json says so.

    Args:
        run: The run.
        data: Its data.
        model: Its model.
        loggers: Its loggers.
        callbacks: Further callbacks of the Trainer.

    Raises:
        Damaged: If the last checkpoint of a resumed run is damaged.
    """
    trainer = configs.build_trainer(run.config, run.folder, loggers, callbacks)
    if trainer.is_global_zero:
        _LOG.info("%s %s", "goes on with" if run.resumed else "begins", run.folder)
        _LOG.info("versions: %s", ", ".join(f"{name} {value}" for name, value in run_directory.versions().items()))

    best, last = run.folder / "checkpoints" / "best.ckpt", last_checkpoint(run.folder)
    go_on = run.resumed and last.is_file()
    if go_on and not zipfile.is_zipfile(check_zip(last)):
        raise Damaged(f"{last} is not a checkpoint or is damaged: delete it, and resume=true trains from the beginning")
    pruning = next((callback for callback in callbacks if isinstance(callback, Pruning)), None)
    start = time.perf_counter()

    def note() -> None:
        if trainer.is_global_zero:
            pruned = None if pruning is None else pruning.pruned
            run_directory.note_training(run.folder, time.perf_counter() - start, trainer, model, pruned)

    try:
        trainer.fit(model, data, ckpt_path=str(last) if go_on else None, weights_only=True)
    except BaseException:
        with suppress(OSError):  # on a full disk, what ended the fit tells more
            note()
        raise
    note()
    if pruning is not None and pruning.pruned is not None:
        trainer.strategy.barrier()  # run.json says so
        return
    if trainer.strategy.broadcast(not best.is_file() or not _was_chosen(trainer)):
        trainer.save_checkpoint(best, weights_only=False)  # the last weights are the result
    model.requires_grad_(False)  # frozen models run faster
    trainer.test(model, data, ckpt_path=str(check_zip(best)), weights_only=True, verbose=False)
    hooks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    result = next(c for c in hooks if isinstance(c, RetrievalEvaluation)).results["test"]
    index = result.whole_index() if run.config["catalog"]["write"] else None  # with the help of all ranks
    trainer.strategy.barrier()  # metrics.json is written
    if not trainer.is_global_zero:
        return

    tracking.log_summary(loggers, run.folder)
    for callback in hooks:
        if isinstance(callback, NeighbourFigure):
            tracking.log_neighbours(loggers, callback.examples)
        elif isinstance(callback, PrecisionRecall):
            tracking.log_curve(loggers, callback.points)
    if index is not None:
        save_catalog(run, data, model, result, index)
    tracking.log_outputs(loggers, run)
    _LOG.info("finished")
    report(run.folder)


def _was_chosen(trainer: pl.Trainer) -> bool:
    """Whether the best checkpoint was chosen among others, by a validation or another metric."""
    keepers = trainer.checkpoint_callbacks
    validated = any(isinstance(c, LastValidation) and c.validated for c in keepers)
    return any(isinstance(c, ModelCheckpoint) and c.monitor and (validated or c.best_k_models) for c in keepers)


def save_catalog(
    run: saved_run.Run,
    data: RetrievalDataModule,
    model: pl.LightningModule,
    result: Evaluation,
    index: FaissIndex,
) -> None:
    """Writes the test gallery, which the evaluation has already indexed, as the run's catalog.

    Args:
        run: The run.
        data: Its data.
        model: Its model.
        result: The evaluation.
        index: The filled index.
    """
    task = data.task("test")
    collection = data.collection
    rows = result.gallery.index
    columns: dict[str, list] = {"path": [collection.path(row) for row in rows.tolist()]}
    for names, attribute in zip(collection.classes, collection.attributes, strict=True):
        values = collection.column(attribute)[rows].tolist()
        columns[attribute] = [names[value] if value >= 0 else None for value in values]
    images = collection.images[rows]
    bar = tqdm(images, desc="catalog", unit="img", leave=False)
    thumbnails = [encode_thumbnail(image, THUMBNAIL_SIDE) for image in bar]
    write_catalog(
        run.folder / "catalog",
        index=index,
        items=item_table(columns, thumbnails),
        encoder=model.encoder,  # type: ignore[arg-type]
        config=encoder_config(run.config),
        about={
            "source": {"run": run.folder.name, "data": collection.name, "protocol": task.name},
            "label": task.attribute,
        },
    )


def report(folder: Path) -> None:
    """Prints the results of a run and what to do next.

    Args:
        folder: The run directory.
    """
    terminal.show(results.results_table(read_json(folder / "metrics.json")))
    print(f"run directory: {folder}")
    if (picture := folder / "figures" / "neighbours.png").is_file():
        print(f"neighbours:    {picture}")
    if (folder / "catalog").is_dir():
        example = folder / "figures" / "queries" / "00.png"
        query = example if example.is_file() else "<image or folder>"
        arguments = shlex.join([f"catalog={folder / 'catalog'}", f"image={query}"])
        print(f"try next:      {typed()} search {arguments}")
    print(f"your images:   {typed()} index {shlex.quote(f'run={folder}')} images=<folder> out=<catalog>")


def typed() -> str:
    """What to type to run simsearch in this shell: its name, or its path if it is not on PATH."""
    return "simsearch" if shutil.which("simsearch") else os.path.relpath(Path(sys.executable).parent / "simsearch")


if __name__ == "__main__":
    main()
