"""What is logged where: read back from offline logs, and synced to a server that plays W&B's."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import simsearch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from test_commands import wandb_records

from simsearch import configs, launch, run_directory, tracking
from simsearch.callbacks.neighbours import Example
from simsearch.data.collection import Collection
from simsearch.figures import Tile
from simsearch.saved_run import Run, open_run
from simsearch.tracking import best_validation, wandb_mode

LOGGER = {
    "mode": "offline", "project": "p", "name": None, "group": None, "tags": ["t"], "checkpoint": False,
}  # fmt: skip
STAGE = {
    "protocol": "p", "fingerprint": "f", "metrics": {"mAP": 0.5},
    "intervals": {"mAP": [0.4, 0.6], "NDCG@10": [0.1, 0.2]},
}  # fmt: skip
TILE = Tile(torch.zeros(3, 4, 4, dtype=torch.uint8), "c", True)


@dataclass
class Logged:
    """One part of a run, as its offline log has it: a value or record for each time that it was written."""

    records: list[Any]
    history: dict[str, list[Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        for record in self.records:
            for item in record.history.item:
                self.history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
            for item in record.summary.update:
                self.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            for item in record.run.config.update:
                self.config[item.key] = json.loads(item.value_json)
            if record.HasField("artifact"):
                self.artifacts.append(record.artifact)
        (self.run,) = (record.run for record in self.records if record.HasField("run"))
        (self.exit_code,) = (record.exit.exit_code for record in self.records if record.HasField("exit"))

    def artifact(self, kind: str) -> Any:
        (artifact,) = (artifact for artifact in self.artifacts if artifact.type == kind)
        return artifact


def logged(folder: Path) -> list[Logged]:
    """The parts of the offline log in a run directory."""
    parts = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        deadline = time.monotonic() + 20
        while True:  # W&B's own process closes the file a moment after the run was finished
            records = wandb_records(path)
            if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        parts.append(Logged(records))
    return parts


def make_run(folder: Path, logger: dict[str, Any] | None = None, start: Path | None = None) -> Run:
    """A run directory that is trained and measured, as far as its loggers look at it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best.ckpt").write_text(f"weights of {folder.name}")
    (folder / "catalog").mkdir()
    (folder / "catalog" / "catalog.json").write_text("{}")
    facts = {"wandb_id": f"id{folder.name}", "train_seconds": 7.5, "device": "CPU", "parameters": 3, "slurm_step": None}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.json").write_text(json.dumps({"test": STAGE}))
    model = {"start": None if start is None else str(start)}
    config = {"logger": LOGGER | (logger or {}), "model": model, "catalog": {"log": False}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return open_run(folder)


def train(loggers: list[Logger], values: list[float], first: int = 0) -> None:
    """Logs validations as the trainer does."""
    for epoch, value in enumerate(values, first):
        for logger in loggers:
            logger.log_metrics({"train/loss": 1 - value, "epoch": epoch}, step=10 * epoch + 9)
            validated = {"val/mAP": value, "val/P@1": value / 2, "val/queries": 5.0, "epoch": epoch}
            logger.log_metrics(validated, step=10 * epoch + 9)


def collection() -> Collection:
    labels, test = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    return Collection("my works/2", images, labels, ("artist",), (("a",),), test)


class TestWandbMode:
    @pytest.fixture(autouse=True)
    def _no_key(self, monkeypatch, tmp_path):
        for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))

        def never(*_: object) -> str:
            raise AssertionError("asked")

        monkeypatch.setattr("builtins.input", never)
        self.netrc = tmp_path / ".netrc"

    def test_without_a_key_it_is_offline(self):
        assert wandb_mode("auto") == "offline"

    def test_with_a_key_it_is_online(self, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        assert wandb_mode("auto") == "online"
        assert wandb_mode("offline") == "offline"
        assert wandb_mode("disabled") == "disabled"

    def test_with_a_key_in_netrc_it_is_online(self):
        self.netrc.write_text("machine example.org login me password secret\n")
        self.netrc.chmod(0o600)
        assert wandb_mode("auto") == "offline"
        self.netrc.write_text("machine api.wandb.ai login user password secret\n")
        assert wandb_mode("auto") == "online"
        self.netrc.write_text("machine machine (((")
        assert wandb_mode("auto") == "offline"

    def test_the_key_is_that_of_the_server(self, monkeypatch, tmp_path):
        """A company's own, which WANDB_BASE_URL names, or `wandb login --host` has noted."""
        self.netrc.write_text("machine wandb.example.org login user password secret\n")
        self.netrc.chmod(0o600)
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
        assert wandb_mode("auto") == "online"
        monkeypatch.delenv("WANDB_BASE_URL")
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
        assert wandb_mode("auto") == "online"
        self.netrc.rename(tmp_path / "keys")
        assert wandb_mode("auto") == "offline"
        monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
        assert wandb_mode("auto") == "online"
        monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
        assert wandb_mode("auto") == "offline"

    @pytest.mark.parametrize("mode", ["offline", "disabled", "online"])
    def test_the_environment_decides_before_a_key(self, mode, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_MODE", mode)
        assert wandb_mode("auto") == mode
        assert wandb_mode("offline") == "offline"

    @pytest.mark.parametrize("mode", ["", "Online", "dryrun", "sometimes"])
    def test_other_values(self, mode):
        with pytest.raises(ValueError, match=f"must be auto, online, offline or disabled, got '{mode}'"):
            wandb_mode(mode)


def test_disabled_leaves_csv(tmp_path):
    run = make_run(tmp_path / "r", {"mode": "disabled"})
    (logger,) = tracking.build_loggers(run)
    assert isinstance(logger, CSVLogger)
    logger.log_metrics({"a": 1.0}, step=0)
    assert (run.folder / "metrics.csv").read_text().splitlines()[1].split(",")[0] == "1.0"  # at once: a kill may come
    tracking.log_inputs([logger], run, collection())
    tracking.log_summary([logger], run.folder)
    tracking.log_outputs([logger], run)
    tracking.finish_loggers([logger])
    assert not (run.folder / "wandb").exists()


def test_the_test_is_a_summary_and_charts_have_sections(tmp_path):
    run = make_run(tmp_path / "r")
    loggers = tracking.build_loggers(run)
    loggers[0].log_metrics({"train/loss": 1.0, "lr-SGD/pg1": 0.1, "epoch": 0}, step=9)
    loggers[0].log_metrics({"test/mAP": 0.5, "test/index/P@10": 0.25, "epoch": 0}, step=9)
    tracking.finish_loggers(loggers)
    (found,) = logged(run.folder)
    assert not [name for name in found.history if name.startswith("test/")]
    assert (found.summary["test/mAP"], found.summary["test/index/P@10"]) == (0.5, 0.25)
    sections = {name.partition("/")[0] for name in found.history if not name.startswith("_")}
    assert sections == {"train", "trainer"}


def test_what_is_staged_lies_in_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DATA_DIR")
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        loggers = tracking.build_loggers(run)
        tracking.log_inputs(loggers, run, collection())
        tracking.log_neighbours(loggers, [Example([TILE, TILE], 0.5)])
        tracking.log_curve(loggers, [(0.0, 1.0), (1.0, 0.5)])
        tracking.finish_loggers(loggers)
        (found,) = logged(run.folder)
        places = [entry.local_path for artifact in found.artifacts for entry in artifact.manifest.contents]
        assert places
        assert all(Path(place).is_relative_to(run.folder) and Path(place).is_file() for place in places)
    assert "WANDB_DATA_DIR" not in os.environ


def test_the_environment_names_project_entity_and_run(monkeypatch):
    for name, value in (("WANDB_PROJECT", "ours"), ("WANDB_ENTITY", "team"), ("WANDB_NAME", "first")):
        monkeypatch.setenv(name, value)
    node = OmegaConf.load(Path(configs.CONF) / "logger" / "default.yaml")
    assert (node.project, node.entity, node.name) == ("ours", "team", "first")
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME"):
        monkeypatch.delenv(name)
    node = OmegaConf.load(Path(configs.CONF) / "logger" / "default.yaml")
    assert (node.project, node.entity, node.name) == ("simsearch", None, None)


def test_project_and_entity_reach_wandb(tmp_path, monkeypatch):
    import wandb

    given: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: given.update(settings) or Recorded())
    tracking.build_loggers(make_run(tmp_path / "r", {"project": "ours", "entity": "team"}))
    assert (given["project"], given["entity"], given["name"]) == ("ours", "team", "r")


class Recorded:
    """As much of W&B's run as is looked at before anything is logged."""

    summary: ClassVar[dict[str, Any]] = {}

    def define_metric(self, *_: object, **__: object) -> None:
        pass


def test_tensorboard_stands_beside_csv(tmp_path):
    pytest.importorskip("tensorboard")
    run = make_run(tmp_path / "r", {"mode": "disabled", "tensorboard": True})
    loggers = tracking.build_loggers(run)
    train(loggers, [0.25])
    tracking.finish_loggers(loggers)
    assert list((run.folder / "tensorboard").glob("events.*"))
    assert (run.folder / "metrics.csv").is_file()


def test_other_ranks_do_not_log_to_wandb(tmp_path, monkeypatch):
    run = make_run(tmp_path / "r")
    monkeypatch.setattr(launch, "rank", lambda: 1)
    (logger,) = tracking.build_loggers(run)
    assert isinstance(logger, CSVLogger)
    assert not (run.folder / "wandb").exists()


def test_two_runs_of_a_sweep_stay_two_and_lie_in_one_group(tmp_path):
    sweep = tmp_path / "margins"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}")
    runs = [make_run(sweep / "first"), make_run(sweep / "second", {"group": "mine", "name": "called", "tags": []})]
    loggers = [tracking.build_loggers(run) for run in runs]
    for value, (online, csv_logger) in enumerate(loggers):
        assert isinstance(online, WandbLogger)
        train([online, csv_logger], [0.25 + value])
    tracking.log_neighbours(loggers[0], [Example([TILE, TILE, TILE], 0.5), Example([TILE, TILE], 0.9)])
    tracking.log_curve(loggers[0], [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
    tracking.log_summary(loggers[0], runs[0].folder)
    tracking.finish_loggers(loggers[0])
    tracking.finish_loggers(loggers[1], "failed")

    ((first,), (second,)) = (logged(run.folder) for run in runs)
    assert (first.run.run_id, second.run.run_id) == ("idfirst", "idsecond")
    assert (first.exit_code, second.exit_code) == (0, 1)
    assert (first.history["val/mAP"], second.history["val/mAP"]) == ([0.25], [1.25])
    assert (first.run.run_group, second.run.run_group) == ("margins", "mine")
    assert (first.run.display_name, second.run.display_name) == ("first", "called")
    assert (first.run.job_type, second.run.job_type) == ("train", "train")
    assert (list(first.run.tags), list(second.run.tags)) == (["t"], [])
    assert first.config["logger"] == runs[0].config["logger"]
    axes = {r.metric.name or r.metric.glob_name: r.metric.step_metric for r in first.records if r.HasField("metric")}
    assert axes == {"trainer/global_step": "", "val/definitions/*": "", "*": "trainer/global_step"}
    assert set(first.history["trainer/global_step"]) == {9}
    assert first.history["examples/neighbours/count"] == [2]
    assert first.history["examples/neighbours/captions"] == [["AP 0.500 ++", "AP 0.900 +"]]
    assert first.history["precision_recall_table/nrows"] == [3]
    assert "examples/neighbours/count" not in second.history
    assert first.summary.items() >= {
        "test/protocol": "p", "test/fingerprint": "f", "test/mAP_low": 0.4, "test/mAP_high": 0.6,
        "train_seconds": 7.5, "device": "CPU", "parameters": 3,
        "best/mAP": 0.25, "best/P@1": 0.125, "best/epoch": 0, "best/step": 9,
    }.items()  # fmt: skip
    assert "test/NDCG@10_low" not in first.summary
    (files,) = sweep.glob("first/wandb/offline-run-*/files/media/table")
    assert len(list(files.glob("../images/examples/neighbours_*.png"))) == 2
    (table,) = files.glob("precision_recall_table_*.table.json")
    assert json.loads(table.read_text())["data"] == [[0, 1], [0.5, 0.75], [1, 0.5]]


class TestBest:
    def write(self, folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", "step", "train/loss", "val/P@1", "val/mAP"])
            writer.writeheader()
            writer.writerows(rows)

    def test_is_one_validation_of_all_parts(self, tmp_path):
        assert best_validation(tmp_path) == {}
        self.write(tmp_path, "metrics.csv", [{"epoch": 0, "step": 4, "train/loss": 0.1}])
        assert best_validation(tmp_path) == {}
        rows = [{"epoch": i, "step": 10 * i, "val/mAP": value} for i, value in enumerate([0.2, 0.5, 0.3])]
        self.write(tmp_path, "metrics-0.csv", [*rows, {"epoch": 2, "step": 20, "train/loss": 9.0}])
        self.write(tmp_path, "metrics-10.csv", [{"epoch": 7, "step": 70, "val/mAP": 0.6}])
        self.write(tmp_path, "metrics-9.csv", [{"epoch": 6, "step": 60, "val/mAP": 0.6, "val/P@1": 0.1}])
        self.write(tmp_path, "metrics.csv", [{"epoch": 8, "step": 80, "val/mAP": 0.4, "val/P@1": 0.9}])
        # The first of equals, as the checkpoint; not each metric's own best.
        assert best_validation(tmp_path) == {"best/epoch": 6, "best/step": 60, "best/mAP": 0.6, "best/P@1": 0.1}

    def test_a_metric_without_value_is_no_best(self, tmp_path):
        rows = [{"epoch": 0, "step": 0, "val/mAP": "nan"}, {"epoch": 1, "step": 9, "val/mAP": 0.0}]
        self.write(tmp_path, "metrics.csv", rows)
        assert best_validation(tmp_path) == {"best/epoch": 1, "best/step": 9, "best/mAP": 0.0}


def test_what_a_run_uses_and_makes(tmp_path):
    start = make_run(tmp_path / "start", {"checkpoint": True})
    weights = start.folder / "checkpoints" / "best.ckpt"
    quiet = make_run(tmp_path / "quiet")
    runs = [start, *(make_run(tmp_path / str(i), start=p) for i, p in enumerate((start.folder, weights, quiet.folder)))]
    start.config["catalog"]["log"] = True
    for run in runs:
        loggers = tracking.build_loggers(run)
        tracking.log_inputs(loggers, run, collection())
        tracking.log_outputs(loggers, run)
        tracking.finish_loggers(loggers)
    found, *others = (logged(run.folder)[0] for run in runs)
    kinds = {artifact.type: (artifact.name, artifact.use_after_commit) for artifact in found.artifacts}
    assert kinds == {
        "dataset": ("data-my-works-2", True),
        "model": ("checkpoint-idstart", False),
        "catalog": ("catalog-idstart", False),
    }
    assert found.artifact("dataset").metadata == json.dumps(
        {"fingerprint": collection().fingerprint, "images": 2}, separators=(",", ":")
    )
    model = found.artifact("model")
    assert set(model.aliases) == {"latest", "best"}
    assert json.loads(model.metadata) == {"protocol": "p", "fingerprint": "f", "mAP": 0.5}
    assert [(c.path, Path(c.local_path)) for c in model.manifest.contents] == [("best.ckpt", weights)]  # not copied
    for other in others[:2]:
        assert other.config["start_run"] == "idstart"
        used = other.artifact("model")
        assert (used.name, used.digest, used.use_after_commit) == ("checkpoint-idstart", model.digest, True)
    assert [a.type for a in others[2].artifacts] == ["dataset"]  # its start logged no checkpoint
    assert others[2].config["start_run"] == "idquiet"


def test_a_run_without_a_test_is_an_input_too(tmp_path):
    """Its training was interrupted, or goes on."""
    start = make_run(tmp_path / "start", {"checkpoint": True})
    (start.folder / "metrics.json").write_text(json.dumps({"val": STAGE}))
    run = make_run(tmp_path / "r", start=start.folder)
    loggers = tracking.build_loggers(run)
    tracking.log_inputs(loggers, run, collection())
    tracking.finish_loggers(loggers)
    assert logged(run.folder)[0].artifact("model").name == "checkpoint-idstart"
    (start.folder / "metrics.json").unlink()
    tracking.finish_loggers(tracking.evaluation_loggers(start, {"logger": LOGGER}, tmp_path / "e"))
    assert logged(tmp_path / "e")[0].artifact("model").name == "checkpoint-idstart"


def test_a_start_from_elsewhere_has_no_lineage(tmp_path):
    (tmp_path / "weights.pth").write_text("")
    run = make_run(tmp_path / "r", start=tmp_path / "weights.pth")
    loggers = tracking.build_loggers(run)
    tracking.log_inputs(loggers, run, collection())
    tracking.finish_loggers(loggers)
    (part,) = logged(run.folder)
    assert "start_run" not in part.config
    assert [artifact.type for artifact in part.artifacts] == ["dataset"]


class Server(ThreadingHTTPServer):
    """As much of W&B's server as `wandb sync` needs: it keeps the history and summary of one run."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.names: set[str] = set()
        self.used: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.offsets: list[int] = []
        self.summary: dict[str, Any] = {}

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = match[1] if match else ""
        project = {"name": "p", "entity": {"name": "me"}}
        about = {
            "id": "r", "name": variables.get("name"), "displayName": "r", "config": "{}", "sweepName": None,
            "historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]), "tags": [],
            "wandbConfig": '{"t": 1}',  # by this the run has begun
            "summaryMetrics": json.dumps(self.summary), "project": project,
        }  # fmt: skip
        if name == "RunResumeStatus":
            return {"model": {"id": "m", **project, "bucket": about if self.names else None}}
        if name == "UpsertBucket":
            inserted = variables["name"] not in self.names
            self.names.add(variables["name"])
            return {"upsertBucket": {"bucket": about, "inserted": inserted}}
        if name == "CreateArtifact":
            collection_name = variables["input"]["artifactCollectionName"]
            made = {
                "id": collection_name,
                "state": "COMMITTED",
                "artifactSequence": {"id": "s", "latestArtifact": None},
            }
            return {"createArtifact": {"artifact": made}}
        if name == "UseArtifact":
            self.used.append(variables["input"]["artifactID"])
            return {"useArtifact": {"artifact": {"id": "a"}}}
        if name == "CreateRunFiles":
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        return {}

    def stream(self, files: dict[str, Any]) -> None:
        if history := files.get("wandb-history.jsonl"):
            self.offsets.append(history["offset"])
            self.rows[history["offset"] :] = [json.loads(line) for line in history["content"]]
        if summary := files.get("wandb-summary.json"):
            self.summary = json.loads(summary["content"][-1])


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            answer = {"data": self.server.graphql(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(json.loads(body).get("files", {}))
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_resumed_run_syncs_as_one(tmp_path):
    run = make_run(tmp_path / "r")
    for place, values in enumerate(([0.2, 0.9, 0.4], [0.5, 0.3])):
        loggers = tracking.build_loggers(run)
        if place == 0:
            tracking.log_inputs(loggers, run, collection())
        train(loggers, values, first=3 * place)
        tracking.finish_loggers(loggers, "failed" if place == 0 else "success")
        time.sleep(1.1 * (place == 0))  # W&B names a part by the second
    parts = logged(run.folder)
    assert [part.run.run_id for part in parts] == ["idr"] * 2
    assert [part.history["val/mAP"] for part in parts] == [[0.2, 0.9, 0.4], [0.5, 0.3]]
    assert [part.history["_step"][0] for part in parts] == [0, 0]  # offline nobody knows better: see below
    assert [part.summary["best/mAP"] for part in parts] == [0.9, 0.9]
    assert [part.summary["best/epoch"] for part in parts] == [1, 1]

    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sync(list(run.folder.glob("wandb/offline-run-*")), server, tmp_path)
        server.shutdown()
    assert server.names == {"idr"}
    assert [row["val/mAP"] for row in server.rows if "val/mAP" in row] == [0.2, 0.9, 0.4, 0.5, 0.3]
    assert [row["_step"] for row in server.rows] == list(range(10))
    assert [row["trainer/global_step"] for row in server.rows] == [10 * e + 9 for e in range(5) for _ in range(2)]
    assert server.summary["best/mAP"] == 0.9
    assert server.used == ["data-my-works-2"]


ONLINE = """
import sys
from pathlib import Path

import test_tracking
from simsearch import tracking
from simsearch.saved_run import open_run

tracking._INIT_S, tracking._FINISH_S, tracking._TELL_S = 3.0, 3.0, 0.5
for mode in sys.argv[2:]:
    run = open_run(Path(sys.argv[1]))
    run.config["logger"]["mode"] = mode
    try:
        loggers = tracking.build_loggers(run)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        continue
    test_tracking.train(loggers, [0.2, 0.9])
    print("logged", flush=True)
    sys.stdin.readline()
    tracking.finish_loggers(loggers)
"""


def online(run: Path, port: int, *modes: str) -> subprocess.Popen[str]:
    """Logs a run, of a user with a key, to the server at that port, in parts; one ends once a line comes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SERVICE")}
    environment = kept | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "k" * 40, "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(run), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }  # fmt: skip
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", ONLINE, str(run), *modes]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def sync(folders: list[Path], server: Server, config: Path) -> None:
    environment = os.environ | {
        "WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
        "WANDB_API_KEY": "k" * 40, "WANDB_ERROR_REPORTING": "false", "WANDB_CONFIG_DIR": str(config),
    }  # fmt: skip
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--no-skip-online", *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_key_without_a_route_logs_offline_and_goes_on_so(tmp_path):
    run = make_run(tmp_path / "r")
    with Server() as closed:
        port = closed.server_port
    with online(run.folder, port, "auto", "auto", "online") as process:  # the second is a resumed one
        out, err = process.communicate("go\ngo\n", timeout=300)
    assert process.returncode == 0, err
    assert out == "logged\nlogged\n"
    assert err.count("W&B cannot be reached") == err.count("logging offline; upload it later with `wandb sync`") == 2
    assert err.count("refused: logger.mode=online: ") == 1  # who asks for it gets no other
    assert [part.history["val/mAP"] for part in logged(run.folder)] == [[0.2, 0.9]] * 2


@pytest.mark.slow
def test_a_server_that_is_lost_holds_nobody_up_and_gets_it_all_later(tmp_path):
    run = make_run(tmp_path / "r")
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with online(run.folder, server.server_port, "auto") as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "logged\n", process.communicate("go\n")
            assert server.names == {"idr"}
            server.shutdown()
            server.server_close()
            _, err = process.communicate("go\n", timeout=300)  # it would hang for minutes
    assert process.returncode == 0, err
    (folder,) = run.folder.glob("wandb/run-*")
    assert "waiting for the upload to end, up to 3 s" in err
    assert f"Nothing is lost: run `wandb sync --no-skip-online {folder}` later" in err
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sync([folder], server, tmp_path)
        server.shutdown()
    assert [row["val/mAP"] for row in server.rows if "val/mAP" in row] == [0.2, 0.9]
    assert server.summary["best/mAP"] == 0.9


def test_an_agent_of_wandb_names_its_runs(monkeypatch):
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "fromagent")
    assert len({run_directory._new_id() for _ in range(5)}) == 5  # of many jobs each needs its own
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert run_directory._new_id() == "fromagent"


def test_a_real_training_and_its_evaluation(small_run, tmp_path):
    (part,) = logged(small_run)
    stages = json.loads((small_run / "metrics.json").read_text())
    facts = json.loads((small_run / "run.json").read_text())
    assert (part.run.job_type, part.run.display_name, part.exit_code) == ("train", "small", 0)
    assert part.summary["test/mAP"] == pytest.approx(stages["test"]["metrics"]["mAP"])
    assert part.summary["best/mAP"] == pytest.approx(stages["val"]["metrics"]["mAP"])
    for name in ("test/bytes_per_item", "test/index/latency_ms_p50", "val/mAP"):
        assert isinstance(part.summary[name], float | int)
    assert {name: part.summary[name] for name in ("train_seconds", "device", "parameters")}.items() <= facts.items()
    with (small_run / "figures" / "precision-recall.csv").open(newline="") as file:
        points = [(float(row["recall"]), float(row["precision"])) for row in csv.DictReader(file)]
    (table,) = small_run.glob("wandb/offline-run-*/files/media/table/precision_recall_table_*.json")
    assert [tuple(row) for row in json.loads(table.read_text())["data"]] == [pytest.approx(point) for point in points]
    assert sorted(artifact.type for artifact in part.artifacts) == ["dataset", "run_table"]

    simsearch("evaluate", f"run={small_run}", f"run_dir={tmp_path}/e", "index=sq8", "logger=default")
    (evaluated,) = logged(tmp_path / "e")
    again = json.loads((tmp_path / "e" / "metrics.json").read_text())["test"]
    assert (evaluated.run.job_type, evaluated.run.display_name, evaluated.exit_code) == ("evaluate", "small/e", 0)
    assert evaluated.run.run_id != part.run.run_id
    assert evaluated.config["measured_run"] == part.run.run_id
    assert evaluated.summary["test/bytes_per_item"] == 16
    assert evaluated.summary["test/mAP"] == pytest.approx(again["metrics"]["mAP"])
    assert evaluated.summary["test/fingerprint"] == again["fingerprint"]
