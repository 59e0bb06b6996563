"""Logging of runs: a CSV file in the run directory, and Weights & Biases to compare runs."""

from __future__ import annotations

import configparser
import csv
import json
import netrc
import os
import re
import shlex
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from simsearch import launch
from simsearch.callbacks.neighbours import Example
from simsearch.data.collection import Collection
from simsearch.figures import draw_grid
from simsearch.files import read_json
from simsearch.results import HEADLINES
from simsearch.saved_run import Run, read_run
from simsearch.text import warn

_STAGED = "WANDB_DATA_DIR"
_INIT_S = 30.0  # for W&B's server to answer at the beginning
_FINISH_S, _UPLOAD_S = 60.0, 1800.0  # time limits for the last upload, without and with checkpoint or catalog
_TELL_S = 5.0
_TRAINING = ("train_seconds", "device", "parameters")  # of run.json, as run_directory.note_training has them


# --------------------------------------------------------------------------------------- with or without


def wandb_mode(mode: str) -> str:
    """The mode of W&B. "auto" becomes "online" if a key is known, else "offline". Never prompts for a key.

    Args:
        mode: auto, online, offline or disabled.

    Raises:
        ValueError: If the mode is none of these.
    """
    if mode not in ("auto", "online", "offline", "disabled"):
        raise ValueError(f"logger.mode must be auto, online, offline or disabled, got {mode!r}")
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "online"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        path = os.environ.get("NETRC") or "~/.netrc"
        known = netrc.netrc(os.path.expanduser(path)).authenticators(_server())
    except (OSError, netrc.NetrcParseError, configparser.Error):
        known = None
    return "online" if known else "offline"


def _server() -> str:
    """The host of W&B's server: that of WANDB_BASE_URL, or what `wandb login --host` has noted, or W&B's own."""
    noted = configparser.ConfigParser(interpolation=None)
    noted.read(Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings")
    stored = noted.get("default", "base_url", fallback="https://api.wandb.ai")
    return urlsplit(os.environ.get("WANDB_BASE_URL") or stored).netloc


@contextmanager
def wandb_api() -> Iterator[Any]:
    """Yields wandb.Api. Raises ValueError on connection errors, also inside the block. Never prompts for a key."""
    if wandb_mode("auto") != "online":
        raise ValueError("W&B cannot be read: no key (`wandb login` or WANDB_API_KEY), or WANDB_MODE forbids it")
    import wandb

    try:
        yield wandb.Api(timeout=30)
    except wandb.errors.Error as error:
        raise ValueError(f"W&B cannot be read: {error}") from error


# ------------------------------------------------------------------------------------- beginning and end


def build_loggers(run: Run) -> list[Logger]:
    """The loggers of a run: always CSV, TensorBoard if the config asks for it, and W&B unless it is disabled.

    W&B's run has the id of the run, and only rank 0 writes to it. Its group is logger.group, or the name of the sweep's
    folder that the run lies in. A resumed run continues under its id; offline it uses another folder, which `wandb
    sync` appends to the first one.

    Args:
        run: The run.
    """
    history = run.folder / "metrics.csv"
    csv_logger = CSVLogger(run.folder, name="", version="", flush_logs_every_n_steps=1)  # a kill should lose nothing
    if launch.rank() > 0:
        return [csv_logger]
    if history.is_file():  # Lightning's logger starts a new file: keep the earlier log
        earlier = len(list(run.folder.glob("metrics-*.csv")))
        history.rename(run.folder / f"metrics-{earlier}.csv")
    settings, config = run.config["logger"], run.config
    files: list[Logger] = [csv_logger]
    if settings.get("tensorboard"):
        files.append(TensorBoardLogger(run.folder, name="", version="tensorboard"))
    if (start := _start_run(config)) is not None:
        config = {**config, "start_run": _identity(start)}
    name = settings["name"] or run.folder.name
    experiment = _start(run.folder, config, settings, _identity(run), name=name, group=_group(run), job_type="train")
    if experiment is None:
        return files
    return [_WandbLogger(experiment, best_validation(run.folder)), *files]


def evaluation_loggers(run: Run, config: Mapping[str, Any], folder: Path) -> list[Logger]:
    """W&B for a measurement of a run: a W&B run of job type `evaluate`.

    The checkpoint of the run is marked as used if the run logged it.

    Args:
        run: The run.
        config: The plain config of the measurement. Its `logger` has the form of a training's, or is None for no
            logger.
        folder: Folder that the measurement writes to.
    """
    settings = config["logger"]
    if settings is None:
        return []
    name = settings["name"] or f"{run.folder.name}/{folder.name}"
    group = settings["group"] or _group(run)
    config = {**config, "measured_run": _identity(run)}
    folder.mkdir(parents=True, exist_ok=True)
    identity = uuid.uuid4().hex[:8]
    experiment = _start(folder, config, settings, identity, name=name, group=group, job_type="evaluate")
    if experiment is None:
        return []
    if run.config["logger"].get("checkpoint"):
        _use(experiment, _checkpoint(run))
    return [_WandbLogger(experiment, {})]


def finish_loggers(loggers: list[Logger], status: str = "success") -> None:
    """Ends the runs of the loggers, so that the next job of a sweep gets its own.

    Data that W&B's server does not accept in time (say, because it is unreachable) stay in the run directory, and a
    warning says how to sync them.

    Args:
        loggers: The loggers.
        status: How the run ended.
    """
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger):
            _finish(logger.experiment, exit_code=0 if status == "success" else 1)
            ours = Path(logger.experiment.settings.wandb_dir).resolve() / "staged"
            if os.environ.get(_STAGED) == str(ours):  # the next job of a sweep has a place of its own
                del os.environ[_STAGED]


def _finish(experiment: Any, exit_code: int) -> None:
    limit = experiment.settings.finish_timeout
    waiting = threading.Timer(_TELL_S, warn, [f"W&B: waiting for the upload to end, up to {limit:.0f} s"])
    waiting.daemon = True
    waiting.start()
    try:
        experiment.finish(exit_code=exit_code)
    except TimeoutError:
        command = f"wandb sync --no-skip-online {shlex.quote(experiment.settings.sync_dir)}"
        warn(f"W&B did not receive everything in {limit:.0f} s. Nothing is lost: run `{command}` later")
    finally:
        waiting.cancel()


def _start(
    folder: Path,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    identity: str,
    *,
    name: str,
    group: str | None,
    job_type: str,
) -> Any:
    """W&B's run, or None if W&B is disabled. In mode auto, a run is logged offline if the server cannot be reached."""
    mode = wandb_mode(settings["mode"])
    if mode == "disabled":
        return None
    import wandb

    # Where W&B stages the files of artifacts until they are synced: in the run, not in the user's home.
    os.environ.setdefault(_STAGED, str(folder.resolve() / "wandb" / "staged"))

    catalog = config.get("catalog")
    uploads = settings.get("checkpoint") or (isinstance(catalog, Mapping) and catalog.get("log"))

    def start(mode: str) -> Any:
        return wandb.init(
            name=name,
            project=settings["project"],
            entity=settings.get("entity"),
            group=group,
            tags=settings["tags"] or None,
            job_type=job_type,
            id=identity,
            resume="allow",  # offline too: by this `wandb sync` counts on where the earlier part ended
            dir=folder,
            config=dict(config),
            reinit="create_new",  # never the run of an earlier job of this process
            settings=wandb.Settings(
                mode=mode,  # type: ignore[arg-type]
                silent=True,
                console="off",
                init_timeout=_INIT_S,
                finish_timeout=_UPLOAD_S if uploads else _FINISH_S,
                finish_timeout_raises=True,
            ),
        )

    try:
        experiment = start(mode)
    except wandb.errors.Error as error:
        wandb.teardown(exit_code=1)  # the service keeps the id of a run that did not begin, ...
        os.environ.pop("WANDB_SERVICE", None)  # ... and may be a parent's
        if settings["mode"] != "auto":
            raise ValueError(f"logger.mode={mode}: {error}") from error
        warn(f"W&B cannot be reached ({error}): logging offline; upload it later with `wandb sync`")
        experiment = start("offline")
    experiment.define_metric("trainer/global_step", hidden=True)
    experiment.define_metric("val/definitions/*", hidden=True)  # a dozen charts of one ranking: kept, and not shown
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return experiment


def _group(run: Run) -> str | None:
    sweep = run.folder.parent
    return run.config["logger"]["group"] or (sweep.name if (sweep / "sweep.json").is_file() else None)


def _identity(run: Run) -> str:
    return str(read_json(run.folder / "run.json")["wandb_id"])


def in_section(name: str) -> str:
    """The name under which W&B shows a metric. The part before the first slash is a section of charts.

    Args:
        name: Name of the metric.

    Example:
        >>> [in_section(name) for name in ("val/mAP", "lr-SGD/pg2", "lr-SGD", "epoch")]
        ['val/mAP', 'train/lr/pg2', 'train/lr', 'train/epoch']
    """
    if name.startswith("lr-"):
        return f"train/lr{name[name.find('/') :] if '/' in name else ''}"
    return name if "/" in name else f"train/{name}"


# ------------------------------------------------------------------------------------- the best validation


class _WandbLogger(WandbLogger):
    """Keeps the metrics of the best validation in the summary (see `best_validation`).

    All of them belong to one checkpoint, and a resumed run takes its earlier parts into account. define_metric(summary=
    "max") would take each metric's own best in this part of the run, and store it as {"max": ...}, where W&B's sweeps
    expect a number.
    """

    def __init__(self, experiment: Any, best: Mapping[str, float]) -> None:
        super().__init__(experiment=experiment)
        self._best = dict(best)
        experiment.summary.update(self._best)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # The test is measured once: a chart of it would be a dot.
        once = {name: value for name, value in metrics.items() if name.startswith("test/")}
        self.experiment.summary.update(once)
        series = {in_section(name): value for name, value in metrics.items() if name not in once}
        if series.keys() - {in_section("epoch")}:
            super().log_metrics(series, step)
        best = _better(self._best, {**metrics, "step": step})
        if best is not self._best:
            self._best = best
            self.experiment.summary.update(best)


def best_validation(folder: Path) -> dict[str, float]:
    """The metrics of the validation with the highest mAP.

    These are `best/mAP`, the other headline metrics, `best/epoch` and `best/step`. They come from metrics.csv and those
    of earlier parts of the run. Empty if nothing was validated.

    Args:
        folder: The run directory.
    """
    parts = sorted(folder.glob("metrics-*.csv"), key=lambda path: int(path.stem.rpartition("-")[2]))
    best: dict[str, float] = {}
    for path in (*parts, folder / "metrics.csv"):
        if path.is_file():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    best = _better(best, {name: float(value) for name, value in row.items() if value})
    return best


def _better(best: dict[str, float], row: Mapping[str, Any]) -> dict[str, float]:
    """`best`, or the corresponding values of a logged row if the row holds a better validation."""
    if not row.get("val/mAP", -1.0) > best.get("best/mAP", -1.0):
        return best
    kept = {f"best/{name}": row[name] for name in ("epoch", "step") if row.get(name) is not None}
    return kept | {f"best/{name}": float(row[f"val/{name}"]) for name in HEADLINES if f"val/{name}" in row}


# ---------------------------------------------------------------------------------------- what was measured


def log_summary(loggers: list[Logger], folder: Path) -> None:
    """Adds the content of a run directory to the logged metrics.

    From metrics.json come the protocol of each stage, its sampling unit and the intervals of its headline metrics; from
    run.json come the costs of the training.

    Args:
        loggers: The loggers.
        folder: The run directory.
    """
    summary: dict[str, Any] = {}
    for stage, about in read_json(folder / "metrics.json").items():
        summary |= {
            f"{stage}/{key}": about[key] for key in ("protocol", "fingerprint", "unit", "units") if key in about
        }
        for name in HEADLINES:
            if name in about["intervals"]:
                low, high = about["intervals"][name]
                value = about["metrics"][name]  # of the weights that were tested, not of the last validation
                summary |= {f"{stage}/{name}": value, f"{stage}/{name}_low": low, f"{stage}/{name}_high": high}
    if (folder / "run.json").is_file():
        facts = read_json(folder / "run.json")
        summary |= {name: facts[name] for name in _TRAINING if name in facts}
    for experiment in _experiments(loggers):
        experiment.summary.update(summary)


def log_neighbours(loggers: list[Logger], examples: Sequence[Example]) -> None:
    """Logs examples as the W&B images `examples/neighbours`: each query beside its neighbours, worst query first.

    A W&B table is not used. Its images would be an artifact, whose files an offline run stores by absolute path, so
    that a copied run could not be synced.

    Args:
        loggers: The loggers.
        examples: The examples.
    """
    for experiment in _experiments(loggers):
        if not examples:
            continue
        import wandb

        def picture(example: Example) -> Any:
            right = "".join("+" if tile.right else "-" for tile in example.tiles[1:])
            return wandb.Image(draw_grid([example.tiles]), caption=f"AP {example.average_precision:.3f} {right}")

        experiment.log({"examples/neighbours": [picture(example) for example in examples]})


def log_curve(loggers: list[Logger], points: Sequence[tuple[float, float]]) -> None:
    """Logs the precision-recall curve of the test as the W&B line plot `precision_recall`, which overlays runs.

    Args:
        loggers: The loggers.
        points: Pairs (recall, precision).
    """
    for experiment in _experiments(loggers):
        import wandb

        table = wandb.Table(columns=["recall", "precision"], data=[list(point) for point in points])
        plot = wandb.plot.line(table, "recall", "precision", title="Precision and recall of the test")
        experiment.log({"precision_recall": plot})


# ---------------------------------------------------------------------------------- artifacts and lineage


def log_inputs(loggers: list[Logger], run: Run, collection: Collection) -> None:
    """Marks the inputs of a run as used: its data (by fingerprint, without images), and the checkpoint in model.start.

    The checkpoint is marked if its own run logged it (logger.checkpoint). In any case `start_run` in the config has its
    id.

    Args:
        loggers: The loggers.
        run: The run.
        collection: The data.
    """
    for experiment in _experiments(loggers):
        import wandb

        about = {"fingerprint": collection.fingerprint, "images": len(collection)}
        data = wandb.Artifact(f"data-{_named(collection.name)}", type="dataset", metadata=about)
        with data.new_file("data.json") as file:  # without a file all versions would be one
            json.dump(about, file)
        _use(experiment, data)
        start = _start_run(run.config)
        if start is not None and start.config["logger"].get("checkpoint"):
            _use(experiment, _checkpoint(start))


def log_outputs(loggers: list[Logger], run: Run) -> None:
    """Logs the outputs of a run that its config asks for: the best checkpoint, type `model`, and the catalog.

    Args:
        loggers: The loggers.
        run: The run.
    """
    for experiment in _experiments(loggers):
        if run.config["logger"].get("checkpoint"):
            experiment.log_artifact(_checkpoint(run), aliases=["best"])
        if run.config["catalog"]["log"] and (run.folder / "catalog").is_dir():
            import wandb

            about = _measured(run.folder)
            artifact = wandb.Artifact(f"catalog-{_identity(run)}", type="catalog", metadata=about)
            artifact.add_dir(str(run.folder / "catalog"), policy="immutable")  # that is: not copied
            experiment.log_artifact(artifact)


def _checkpoint(run: Run) -> Any:
    """The artifact of a run's best checkpoint. It is the same whichever run logs or uses it."""
    import wandb

    artifact = wandb.Artifact(f"checkpoint-{_identity(run)}", type="model", metadata=_measured(run.folder))
    artifact.add_file(str(run.folder / "checkpoints" / "best.ckpt"), policy="immutable")
    return artifact


def _measured(folder: Path) -> dict[str, Any]:
    """What a run's test says of its checkpoint. Empty if it was not tested, or not since it goes on."""
    path = folder / "metrics.json"
    about = read_json(path).get("test") if path.is_file() else None
    if about is None:
        return {}
    return {"protocol": about["protocol"], "fingerprint": about["fingerprint"], "mAP": about["metrics"]["mAP"]}


def _use(experiment: Any, artifact: Any) -> None:
    """Marks an artifact as an input of a run, and logs it if W&B does not have it.

    Run.use_artifact does the same, but fails offline, and waits for the server online.
    """
    experiment._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)


def _start_run(config: Mapping[str, Any]) -> Run | None:
    """The run that model.start names by its folder or its best checkpoint. None if there is none."""
    start = config.get("model", {}).get("start")
    if start is None:
        return None
    path = Path(start)
    folder = path.parent.parent if path.name == "best.ckpt" else path
    there = all((folder / name).is_file() for name in ("config.yaml", "run.json", "metrics.json"))
    return read_run(folder) if there else None


def _named(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:100]


def _experiments(loggers: list[Logger]) -> list[Any]:
    return [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]
