"""simsearch evaluate: measures a run's checkpoint again, with its own or another protocol, index or store."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger
from torch import Tensor

from simsearch import configs, launch, program, results, saved_run, terminal, tracking
from simsearch.callbacks.evaluation import RetrievalEvaluation
from simsearch.data.audit import read_duplicates
from simsearch.data.collection import Collection
from simsearch.data.datamodule import RetrievalDataModule
from simsearch.data.protocols import WithoutRows
from simsearch.files import check_writable, new_folder, read_json, write_json
from simsearch.identity import measurement_identity, same_images, start_config
from simsearch.index.auto import check_budget
from simsearch.models.steps import DescribesBatches
from simsearch.search.stores.store import StoreError
from simsearch.search.stores.stored_gallery import StoredGallery


@program.command("evaluate")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch evaluate`.

    Args:
        config: The config of conf/evaluate.yaml.

    Raises:
        ValueError: If a value is invalid.
    """
    if config.stage not in ("test", "validate"):
        raise ValueError(f"stage must be test or validate, got {config.stage!r}")
    run = saved_run.open_run(Path(config.run), trusted=configs.trusts(config))
    model = saved_run.load_model(run)
    configs.see_as(config, run.config, model.encoder)
    values = configs.plain(config)
    merged = run.config | {
        group: values[group] for group in ("data", "protocol", "index", "rerank") if values.get(group)
    }
    if configs.choice("rerank") == "none":
        merged["rerank"] = None
    merged["logger"] = values.get("logger")
    evaluation = merged["callbacks"]["evaluation"] | {"index": merged["index"], "rerank": merged.get("rerank")}
    if values.get("verify"):
        evaluation["verify"] = values["verify"]
    if further := {**(evaluation.get("evaluators") or {}), **(values.get("evaluators") or {})}:
        evaluation["evaluators"] = further
    merged["callbacks"] = {"evaluation": evaluation}
    merged["trainer"] = launch.of_one_process(run.config["trainer"])
    if config.without and config.stage == "validate":
        raise ValueError("without= leaves queries out of the test: do not use it with stage=validate")
    if values.get("store") and values.get("index"):
        raise ValueError("index= and store= both say where to search: give one of them")
    check_budget(config.budget, "AutoIndex" in str((values.get("index") or {}).get("_target_")))
    data = configs.build_data(merged)
    left_out = None
    if config.without:  # read now, not after hours of work
        left_out = read_duplicates(Path(config.without)).query.unique()
        task, audited = data.task("test"), Path(config.without).with_name("audit.json")
        other = audited.is_file() and read_json(audited).get("fingerprint") != task.fingerprint
        if other or not torch.isin(left_out, task.query).all():
            raise ValueError(
                f"{config.without} lists other rows than queries of {merged['protocol']['name']}: give the table "
                "that `simsearch data audit` wrote for the same data and protocol"
            )
    by_index = bool(values.get("index") or values.get("store"))
    with (
        results_folder(config.run_dir, run.folder) as folder,
        gallery_in(values.get("store"), model, merged["index"].get("metric", "ip")) as stored,
    ):
        if stored is not None:
            merged["store"] = stored.settings
        loggers = tracking.evaluation_loggers(run, merged, folder)
        status = "failed"
        try:
            measure(model, data, merged, folder, config.stage, loggers, by_index=by_index, stored=stored)
            note_trained_queries(run, merged, data, folder, config.stage)
            tracking.log_summary(loggers, folder)
            status = "success"
        finally:
            tracking.finish_loggers(loggers, status)
        if left_out is not None:
            protocol = WithoutRows(configs.build(merged["protocol"]), left_out)
            data = configs.build_data(merged, protocol)
            measure(model, data, merged, folder / "without", config.stage, [], stored=stored)


@contextmanager
def results_folder(given: str | None, run: Path) -> Iterator[Path]:
    """Yields a folder that can be written to, before hours of work. If it stays empty, it is removed again.

    Args:
        given: The folder. None for a new one in the run's evaluations/.
        run: The run directory.

    Raises:
        OSError: If it cannot be made or written to, as in the run of somebody else.
    """
    folder = run / "evaluations" / time.strftime("%Y-%m-%d_%H-%M-%S") if given is None else Path(given)
    check_writable(folder, "run_dir")
    if given is None:
        folder = new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def gallery_in(store: Any, model: DescribesBatches, metric: str) -> Iterator[StoredGallery | None]:
    """Yields the gallery in a store, which is removed again at the end of the block. None if no store is given.

    Args:
        store: The plain config of the store, or None.
        model: The model that describes the gallery.
        metric: How vectors are compared, "ip" or "l2".

    Raises:
        StoreError: If the store cannot be reached, or does not take such a gallery.
    """
    if not store:
        yield None
        return
    encoder = model.encoder
    with closing(configs.build(store)) as built:
        gallery = StoredGallery(built, metric if encoder.bits is None else "hamming")
        gallery.check(encoder.dimension)  # before hours of work, not after
        try:
            yield gallery
        except BaseException:
            with suppress(StoreError):  # the first error tells more
                gallery.drop()
            raise
        gallery.drop()


def measure(
    model: pl.LightningModule,
    data: RetrievalDataModule,
    config: dict[str, Any],
    folder: Path,
    stage: str,
    loggers: list[Logger],
    *,
    by_index: bool = False,
    stored: StoredGallery | None = None,
) -> None:
    """Measures one stage, writes metrics.json (and per_query.parquet) and prints the table.

    Args:
        model: The model.
        data: Its data.
        config: The plain config.
        folder: Folder to write to.
        stage: validate or test.
        loggers: The loggers.
        by_index: Also show the metrics of the lists that the index returns.
        stored: A gallery in a store, which takes the place of the config's index.
    """
    trainer = configs.build_trainer(config, folder, loggers)
    if stored is not None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RetrievalEvaluation):
                callback.index = stored
    run_stage = trainer.test if stage == "test" else trainer.validate
    run_stage(model, data, verbose=False)
    stages = read_json(folder / "metrics.json")
    about = stages["test" if stage == "test" else "val"]
    about["measured_by"] = measurement_identity(config)
    if stored is not None:
        about["store"] = stored.settings
    write_json(folder / "metrics.json", stages)
    asked = ("rerank", "verify", *(("index",) if by_index else ()))
    terminal.show(results.results_table(read_json(folder / "metrics.json"), also=asked))
    print(f"results: {folder / 'metrics.json'}")


def trainings(run: saved_run.Run) -> Iterator[dict[str, Any]]:
    """Yields the config of a run, and of the runs that it starts from (model.start), as far as they are there.

    Args:
        run: The run, as `open_run` admits it: its protocol may be built.

    Raises:
        Untrusted: If one of them would need to be trusted and the run is not.
    """
    config: dict[str, Any] | None = run.config
    while config is not None:
        yield config
        config = start_config(config)
        if config is not None and not run.trusted:
            config = saved_run.admitted(config, f"a run that {run.folder} starts from")


def trained_rows(run: saved_run.Run, config: Mapping[str, Any], collection: Collection) -> Tensor | None:
    """The rows of a collection that a run, or one that it starts from, was trained on, int64 (n,). None if none is.

    Args:
        run: The run, as `open_run` admits it: its protocol may be built.
        config: The plain config that the collection is of.
        collection: The collection.

    Raises:
        Untrusted: As `trainings` does.
    """
    found = []
    for training in trainings(run):
        if same_images(training, config):
            with suppress(ValueError):  # the images have changed since
                found.append(configs.build(training["protocol"]).split(collection).train)
    return torch.cat(found).unique() if found else None


def note_trained_queries(
    run: saved_run.Run,
    config: Mapping[str, Any],
    data: RetrievalDataModule,
    folder: Path,
    stage: Literal["validate", "test"],
) -> None:
    """Records in metrics.json how many queries the run was trained on, where the images are those of a training.

    Another protocol may include such queries.

    Args:
        run: The run.
        config: The plain config of the evaluation.
        data: The data of the evaluation.
        folder: Folder of metrics.json.
        stage: validate or test.
    """
    trained = trained_rows(run, config, data.collection)
    if trained is None:
        return
    count = int(torch.isin(data.task(stage).query, trained).sum())
    stages = read_json(folder / "metrics.json")
    stages["test" if stage == "test" else "val"]["queries_trained_on"] = count
    write_json(folder / "metrics.json", stages)
    if count:
        print(f"note: the run, or one that it starts from, was fitted on {count} of these queries", file=sys.stderr)


if __name__ == "__main__":
    main()
