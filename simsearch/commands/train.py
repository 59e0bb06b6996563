"""simsearch train: fit, measure, leave a run directory with a catalog."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig
from tqdm import tqdm

from simsearch import runtime
from simsearch.callbacks.evaluation import RetrievalEvaluation
from simsearch.callbacks.neighbours import NeighbourFigure
from simsearch.images import encode_thumbnail
from simsearch.search.catalog import item_table, write_catalog

THUMBNAIL_SIDE = 128


@runtime.command("train")
def main(config: DictConfig) -> None:
    run = runtime.start_run(config)
    data = runtime.build_data(run.config)
    model = runtime.build(run.config["model"])
    loggers = runtime.build_loggers(run)
    status = "failed"
    try:
        train(run, data, model, loggers)
        status = "success"
    finally:
        runtime.finish_loggers(loggers, status)


def train(
    run: runtime.Run,
    data: pl.LightningDataModule,
    model: pl.LightningModule,
    loggers: list[pl.loggers.Logger],
) -> None:
    """Fits the model of `run`, tests its best checkpoint, writes figures and catalog, prints the table."""
    trainer = runtime.build_trainer(run.config, run.folder, loggers)

    best, last = (run.folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    go_on = run.resumed and last.is_file()
    trainer.fit(model, data, ckpt_path=str(last) if go_on else None, weights_only=True)
    model.requires_grad_(False)  # what is frozen runs faster
    trainer.test(model, data, ckpt_path=str(best), weights_only=True, verbose=False)

    evaluation = next(c for c in trainer.callbacks if isinstance(c, RetrievalEvaluation))
    figure = next((c for c in trainer.callbacks if isinstance(c, NeighbourFigure)), None)
    runtime.log_summary(loggers, run.folder / "metrics.json")
    if figure is not None:
        runtime.log_neighbours(loggers, figure.examples)
    if run.config["catalog"]["write"] and trainer.is_global_zero:
        save_catalog(run, data, model, evaluation)
        if run.config["catalog"]["log"]:
            runtime.log_catalog(loggers, run.folder / "catalog")
    if trainer.is_global_zero:
        report(run.folder)


def save_catalog(
    run: runtime.Run, data: pl.LightningDataModule, model: pl.LightningModule, evaluation: RetrievalEvaluation
) -> None:
    """Writes the test gallery, which the evaluation indexed already, as the run's catalog."""
    result = evaluation.results["test"]
    task = data.task("test")  # type: ignore[attr-defined]
    collection = data.collection  # type: ignore[attr-defined]
    rows = result.gallery.index
    columns: dict[str, list] = {"path": [f"{collection.name}/{row}" for row in rows.tolist()]}
    for names, attribute in zip(collection.classes, collection.attributes, strict=True):
        values = collection.column(attribute)[rows].tolist()
        key = "label" if attribute == task.attribute else attribute
        columns[key] = [names[value] if value >= 0 else None for value in values]
    images = collection.images[rows]
    bar = tqdm(images, desc="catalog", unit="img", leave=False)
    thumbnails = [encode_thumbnail(image, THUMBNAIL_SIDE) for image in bar]
    write_catalog(
        run.folder / "catalog",
        index=result.index,
        items=item_table(columns, thumbnails),
        encoder=model.encoder,
        config=runtime.encoder_config(run.config),
        about={"source": {"run": run.folder.name, "data": collection.name, "protocol": task.name}},
    )


def report(folder: Path) -> None:
    """Prints the results of a run and what to do next."""
    runtime.show(runtime.results_table(json.loads((folder / "metrics.json").read_text())))
    print(f"run directory: {folder}")
    if (picture := folder / "figures" / "neighbours.png").is_file():
        print(f"neighbours:    {picture}")
    if (folder / "catalog").is_dir():
        example = folder / "figures" / "queries" / "00.png"
        query = example if example.is_file() else "<image or folder>"
        arguments = shlex.join([f"catalog={folder / 'catalog'}", f"image={query}"])
        print(f"try next:      {program()} search {arguments}")
    print(f"your images:   {program()} index {shlex.quote(f'run={folder}')} images=<folder> out=<catalog>")


def program() -> str:
    """What to type to run simsearch in this shell: its name, or its path where that is not on PATH."""
    return "simsearch" if shutil.which("simsearch") else os.path.relpath(Path(sys.executable).parent / "simsearch")


if __name__ == "__main__":
    main()
