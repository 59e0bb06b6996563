"""The program from a user's side: train, evaluate, index, search, export, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import SMALL, simsearch
from PIL import Image
from rich.console import Console
from wandb.proto.wandb_internal_pb2 import Record

from simsearch import __version__, configs
from simsearch.commands import search
from simsearch.commands.index import check_images
from simsearch.data.loading import ImageBatch
from simsearch.files import read_json, write_json
from simsearch.models.encoder import build_encoder
from simsearch.search.catalog import read_catalog
from simsearch.search.encoder_files import encoder_fingerprint
from simsearch.search.errors import CatalogError
from simsearch.types import SearchResult


def wandb_records(path: Path) -> list[Record]:
    """The records of an offline run: a 7-byte header, then LevelDB's log framing."""
    data, records, buffer, position = path.read_bytes(), [], b"", 7
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        buffer += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            records.append(Record.FromString(buffer))
            buffer = b""
    return records


class TestTrain:
    def test_leaves_a_run_that_describes_itself(self, small_run):
        for name in ("config.yaml", "metrics.json", "per_query.parquet", "metrics.csv", "run.json"):
            assert (small_run / name).is_file(), name
        assert (small_run / "checkpoints/best.ckpt").is_file()
        assert (small_run / "catalog/catalog.json").is_file()
        with Image.open(small_run / "figures/neighbours.png") as picture:
            assert picture.width > 500

    def test_keeps_a_log_and_says_what_made_it(self, small_run):
        log = (small_run / "train.log").read_text()
        metrics = read_json(small_run / "metrics.json")
        for text in (
            "simsearch train data.styles=4",
            f"begins {small_run}",
            f"simsearch {__version__}, ",
            f"validate: mAP {metrics['val']['metrics']['mAP']:.4f}",
            f"test: mAP {metrics['test']['metrics']['mAP']:.4f}",
            "finished",
        ):
            assert text in log
        versions = read_json(small_run / "run.json")["versions"]
        assert versions["simsearch"] == __version__
        root = Path(configs.CONF).parent
        if (root / ".git").exists():
            head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
            assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", versions["commit"])
            assert len(head.strip()) == 40

    def test_reports_metrics_with_protocol_and_intervals(self, small_run):
        stages = read_json(small_run / "metrics.json")
        assert set(stages) == {"val", "test"}
        assert stages["test"]["protocol"] == "rendered-artist"
        assert len(stages["test"]["fingerprint"]) == 16
        assert stages["test"]["fingerprint"] != stages["val"]["fingerprint"]
        assert stages["test"]["unit"] == stages["val"]["unit"] == "artist"
        units = pq.read_table(small_run / "per_query.parquet")["unit"].to_pylist()
        assert 1 < stages["test"]["units"] == len(set(units)) < len(units)
        for name in ("mAP", "P@1", "P@10", "R@10", "index/P@10"):
            low, high = stages["test"]["intervals"][name]
            assert 0 <= low <= stages["test"]["metrics"][name] <= high <= 1
        assert stages["test"]["metrics"]["index/recall@10"] == 1.0
        assert stages["test"]["metrics"]["bytes_per_item"] == 64
        out = (small_run / "stdout.txt").read_text()
        assert "mAP" in out
        assert "simsearch search catalog=" in out

    def test_per_query_values_average_to_the_metrics(self, small_run):
        table = pq.read_table(small_run / "per_query.parquet")
        metrics = json.loads((small_run / "metrics.json").read_text())["test"]
        assert table.schema.metadata[b"fingerprint"].decode() == metrics["fingerprint"]
        assert np.nanmean(table["AP"].to_numpy()) == pytest.approx(metrics["metrics"]["mAP"], abs=1e-12)

    def test_checkpoint_holds_tensors_and_no_backbone(self, small_run):
        checkpoint = torch.load(small_run / "checkpoints/best.ckpt", weights_only=True)
        assert {"head.whitening.mean", "head.whitening.projection"} == set(checkpoint["state_dict"])
        assert checkpoint["backbone"]["weights"] == "package"

    def test_offline_wandb_log_reads_back(self, small_run):
        (path,) = small_run.glob("wandb/offline-run-*/run-*.wandb")
        records = wandb_records(path)
        config = {u.key: json.loads(u.value_json) for r in records for u in r.run.config.update}
        assert config["protocol"]["name"] == "rendered-artist"
        logged: dict[str, object] = {}
        for record in records:
            for item in record.history.item:
                logged[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        metrics = json.loads((small_run / "metrics.json").read_text())
        assert logged["val/mAP"] == pytest.approx(metrics["val"]["metrics"]["mAP"])
        assert logged["examples/neighbours/count"] >= 5
        assert len(list(path.parent.glob("files/media/images/examples/neighbours_*.png"))) >= 5
        summary: dict[str, object] = {}
        for record in records:
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        assert summary["test/mAP"] == pytest.approx(metrics["test"]["metrics"]["mAP"])
        assert summary["test/fingerprint"] == metrics["test"]["fingerprint"]
        assert any(record.HasField("exit") for record in records), "the run was not finished"
        run_id = json.loads((small_run / "run.json").read_text())["wandb_id"]
        assert run_id in path.name

    def test_resume_of_a_finished_run_gives_the_same_numbers(self, small_run, tmp_path):
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(small_run, copy)
        before = json.loads((copy / "metrics.json").read_text())
        simsearch("train", f"run_dir={copy}", "resume=true", "logger.mode=disabled")
        after = json.loads((copy / "metrics.json").read_text())
        assert after["test"]["metrics"]["mAP"] == before["test"]["metrics"]["mAP"]

    def test_codes_and_a_sweep_share_one_extraction(self, tmp_path):
        started = time.time()
        simsearch(
            "train", "-m", *SMALL, "pooling=mac,gem", "model=frozen-itq", "model.binarizer.bits=12",
            "index=binary-flat", "logger.mode=disabled", f"hydra.sweep.dir={tmp_path}", f"run_root={tmp_path}/unused",
        )  # fmt: skip
        cache = Path(os.environ["SIMSEARCH_CACHE"]) / "features"
        newer = [p for p in cache.glob("*/array.npy") if p.stat().st_mtime > started]
        assert len(newer) <= 1
        jobs = [path.parent for path in tmp_path.glob("*/trial.json")]
        assert len(jobs) == 2
        for job in jobs:
            assert (job / "checkpoints/best.ckpt").is_file()
            assert (job / "catalog/catalog.json").is_file()
            metrics = json.loads((job / "metrics.json").read_text())["test"]["metrics"]
            assert metrics["bytes_per_item"] == 2
            assert metrics["mAP_pessimistic"] <= metrics["mAP"] <= metrics["mAP_optimistic"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["modle.x=1"], "modle"),
            (["pooling=median"], "rmac"),
            (["protocol=10k-50k"], "choose a protocol that fits the data"),
            (["model.whitening.dimension=5000"], "1280 channels"),
            (["backbone.weights=/nowhere.pth"], "no weights at /nowhere.pth"),
            (["index=binary-flat"], "index=flat"),
            (["model.scales=[0]"], "model.scales"),
            (["logger.mode=sometimes"], "auto, online, offline or disabled"),
        ],
    )
    def test_mistakes_end_in_one_clear_line(self, arguments, message, tmp_path):
        done = simsearch("train", *SMALL, f"run_dir={tmp_path}/r", "logger.mode=disabled", *arguments, expect=1)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        log = tmp_path / "r" / "train.log"  # where the traceback is kept
        assert not log.exists() or "Traceback" in log.read_text()

    def test_a_folder_holds_one_run(self, small_run):
        before = (small_run / "config.yaml").read_bytes()
        done = simsearch("train", *SMALL, f"run_dir={small_run}", "pooling=mac", "logger.mode=disabled", expect=1)
        assert "already holds a run" in done.stderr
        assert (small_run / "config.yaml").read_bytes() == before

    @pytest.mark.slow
    def test_random_weights_are_said_in_every_result_and_can_be_measured_again(self, tmp_path):
        run = tmp_path / "r"
        random = ("backbone.weights=random", "logger.mode=disabled", "catalog.write=false")
        done = simsearch("train", *SMALL, f"run_dir={run}", *random)
        assert "random weights" in done.stdout
        before = json.loads((run / "metrics.json").read_text())["test"]
        assert before["model"]["weights"] == "random"
        assert b'"random"' in pq.read_schema(run / "per_query.parquet").metadata[b"model"]
        simsearch("evaluate", f"run={run}", f"run_dir={tmp_path}/e")
        after = json.loads((tmp_path / "e/metrics.json").read_text())["test"]
        assert after["metrics"]["mAP"] == before["metrics"]["mAP"]

    @pytest.mark.slow
    def test_a_failing_job_leaves_the_rest_of_a_sweep(self, tmp_path):
        done = simsearch(
            "train", "-m", *SMALL, "model.whitening.dimension=5000,8", "logger.mode=disabled",
            "catalog.write=false", f"hydra.sweep.dir={tmp_path}", expect=1,
        )  # fmt: skip
        assert "1280 channels" in done.stderr
        states = {path.parent: json.loads(path.read_text())["state"] for path in tmp_path.glob("*/trial.json")}
        assert sorted(states.values()) == ["failed", "finished"]
        assert all((job / "metrics.json").is_file() == (state == "finished") for job, state in states.items())


@pytest.mark.slow
def test_audit_and_evaluation_without_what_it_found(small_run, tmp_path):
    done = simsearch("data", "audit", f"run={small_run}", f"out={tmp_path}", "min_correlation=0.3", "neighbours=9")
    about = json.loads((tmp_path / "audit.json").read_text())
    pairs = (tmp_path / "duplicates.csv").read_text().splitlines()[1:]
    assert len(pairs) == about["pairs"] > 0
    assert about["protocol"] == "rendered-artist"
    assert "estimated precision" in done.stdout or "cannot tell" in done.stdout
    assert f"({about['queries_with_duplicates']['gallery'] / about['queries']:.2%})" in done.stdout
    with Image.open(tmp_path / "duplicates.png") as sheet:
        assert sheet.format == "PNG"
    simsearch("evaluate", f"run={small_run}", f"run_dir={tmp_path}/e", f"without={tmp_path / 'duplicates.csv'}")
    measured = json.loads((tmp_path / "e" / "without" / "metrics.json").read_text())["test"]["metrics"]
    assert measured["queries"] == about["queries"] - len({pair.split(",")[0] for pair in pairs})
    assert measured["queries_in_own_ranking"] == 0

    # What does not fit is told before anything is measured.
    (tmp_path / "other.csv").write_text((tmp_path / "duplicates.csv").read_text().replace("\n", "\n9", 1))
    lost = simsearch(
        "evaluate", f"run={small_run}", f"run_dir={tmp_path}/f", f"without={tmp_path / 'other.csv'}", expect=1
    )
    assert "lists other rows than queries of rendered-artist: give the table that" in lost.stderr
    told = shlex.split(done.stdout.splitlines()[-1].partition("simsearch ")[2])
    assert told == ["evaluate", f"run={small_run}", f"without={tmp_path / 'duplicates.csv'}"]
    write_json(tmp_path / "audit.json", {"fingerprint": "0" * 16})  # the same rows of other data
    assert "lists other rows than queries of" in simsearch(*told, f"run_dir={tmp_path}/f", expect=1).stderr
    assert not (tmp_path / "f").exists()


def seeing_longer(small_run: Path, run: Path) -> Path:
    """A copy of a run whose encoder sees whole images of 96 pixels."""
    shutil.copytree(small_run, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["backbone"] |= {"size": 96, "fit": "longest"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def say_what_is_seen(config: dict[str, Any]) -> None:
    """In place of building the data."""
    raise ValueError(f"size={config['data']['size']} fit={config['data']['fit']}")


def test_an_audit_of_other_data_sees_and_says_what_evaluate_will(small_run, tmp_path, monkeypatch):
    run = seeing_longer(small_run, tmp_path / "a run")
    with monkeypatch.context() as patch:
        patch.setattr("simsearch.configs.build_data", say_what_is_seen)
        asked = ("data", "audit", f"run={run}", "data=files", f"data.source={tmp_path}", f"out={tmp_path}/x")
        assert "size=96 fit=longest" in simsearch(*asked, expect=1).stderr
    shutil.copy(small_run / "config.yaml", run)
    done = simsearch("data", "audit", f"run={run}", f"out={tmp_path}/o", "protocol=rendered-work", "neighbours=2")
    told = shlex.split(done.stdout.splitlines()[-1].partition("simsearch ")[2])
    assert told == ["evaluate", f"run={run}", "protocol=rendered-work", f"without={tmp_path}/o/duplicates.csv"]


class TestEvaluate:
    def test_other_data_are_decoded_as_the_encoder_sees_them(self, small_run, tmp_path, monkeypatch):
        run = seeing_longer(small_run, tmp_path / "run")
        monkeypatch.setattr("simsearch.configs.build_data", say_what_is_seen)
        asked = ("evaluate", f"run={run}", f"run_dir={tmp_path}/e", "data=files", f"data.source={tmp_path}")
        assert "size=96 fit=longest" in simsearch(*asked, expect=1).stderr
        assert "size=64 fit=longest" in simsearch(*asked, "data.size=64", expect=1).stderr

    def test_rerank_none_leaves_out_the_run_s_own(self, small_run, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(small_run, run)
        config = yaml.safe_load((run / "config.yaml").read_text())
        rerank = yaml.safe_load((Path(configs.CONF) / "rerank" / "aqe.yaml").read_text())
        config["rerank"], config["callbacks"]["evaluation"]["rerank"] = rerank, dict(rerank)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        for choice in ((), ("rerank=null",), ("rerank=none",)):
            folder = tmp_path / "-".join(["evaluated", *choice])
            simsearch("evaluate", f"run={run}", f"run_dir={folder}", *choice)
            metrics = json.loads((folder / "metrics.json").read_text())["test"]["metrics"]
            assert ("rerank/mAP" in metrics) == (choice == ())

    def test_gives_the_run_s_own_numbers_again(self, small_run, tmp_path):
        simsearch("evaluate", f"run={small_run}", f"run_dir={tmp_path}/e")
        before = json.loads((small_run / "metrics.json").read_text())["test"]
        after = json.loads((tmp_path / "e/metrics.json").read_text())["test"]
        assert after["fingerprint"] == before["fingerprint"]
        timed = ("index/build_s", "index/queries_per_s", "index/latency")
        for name, value in before["metrics"].items():
            if not name.startswith(timed):
                assert after["metrics"][name] == value, name

    def test_measures_anywhere_and_each_time_in_a_folder_of_its_own(self, small_run, tmp_path, monkeypatch):
        run = tmp_path / "run"
        shutil.copytree(small_run, run)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["trainer"]["accelerator"] = "gpu"  # which this machine may not have
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr("time.strftime", lambda *_: "noon")  # jobs of a cluster begin in one second
        for protocol in ("rendered-artist", "rendered-work"):
            simsearch("evaluate", f"run={run}", f"protocol={protocol}")
        places = {"rendered-artist": "noon", "rendered-work": "noon-2"}
        for protocol, name in places.items():
            stage = json.loads((run / "evaluations" / name / "metrics.json").read_text())["test"]
            assert stage["protocol"] == protocol

    def test_a_place_that_cannot_be_written_to_is_told_at_once(self, small_run, tmp_path, monkeypatch):
        monkeypatch.setattr("simsearch.commands.evaluate.measure", lambda *_, **__: 1 / 0)
        (tmp_path / "file").touch()
        done = simsearch("evaluate", f"run={small_run}", f"run_dir={tmp_path}/file/e", expect=1)
        assert "cannot write what is measured" in done.stderr
        assert "give another run_dir=" in done.stderr

    def test_takes_another_protocol_and_index(self, small_run, tmp_path):
        done = simsearch(
            *("evaluate", f"run={small_run}", f"run_dir={tmp_path}/e", "protocol=rendered-work", "index=sq8"),
            "verify=sift",
        )
        stage = json.loads((tmp_path / "e/metrics.json").read_text())["test"]
        assert stage["protocol"] == "rendered-work"
        assert stage["queries_trained_on"] == 0
        assert stage["metrics"]["bytes_per_item"] == 16
        for part in ("verified", "verification: mAP", "GAP", "ms a query"):
            assert part in done.stdout
        values = pq.read_table(tmp_path / "e/per_query.parquet")
        for name, mean in (("verify/AP", "verify/mAP"), ("verify/accepted", "verify/accepted")):
            assert np.nanmean(values[name].to_numpy()) == pytest.approx(stage["metrics"][mean], abs=1e-12)
        low, high = stage["intervals"]["verify/mAP_gain"]
        assert low <= stage["metrics"]["verify/mAP_gain"] <= high

    def test_names_what_is_no_run(self, tmp_path):
        done = simsearch("evaluate", f"run={tmp_path}", expect=1)
        assert "is not a run directory" in done.stderr


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory) -> Path:
    """Exported images of the sample beside files of every dirty kind."""
    folder = tmp_path_factory.mktemp("images")
    size = [a for a in SMALL if a.startswith("data.")]
    simsearch("data", "export", *size, f"out={folder}", "part=gallery", "limit=20")
    (folder / "images/not.jpg").write_text("no image")
    (folder / "images/cut.png").write_bytes((next((folder / "images").glob("0*.png"))).read_bytes()[:200])
    Image.new("CMYK", (30, 50), (10, 20, 30, 40)).save(folder / "images/cmyk.jpg")
    Image.new("L", (1, 1), 7).save(folder / "images/one.png")
    return folder


class TestIndexAndSearch:
    def test_catalog_of_a_dirty_folder(self, small_run, folder, tmp_path):
        done = simsearch("index", f"run={small_run}", f"images={folder}/images", f"out={tmp_path}/c", "workers=0")
        assert "22 images" in done.stdout
        assert "not-an-image" in done.stderr
        assert "truncated" in done.stderr
        catalog = read_catalog(tmp_path / "c")
        assert len(catalog) == 22
        assert catalog.about["skipped"] == {"not-an-image": 1, "truncated": 1}
        assert not list((tmp_path / "c").rglob("*.pkl"))
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def test_search_finds_the_image_itself_and_reads_attributes(self, small_run, folder, tmp_path):
        simsearch("index", f"run={small_run}", f"images={folder}/manifest.csv", f"out={tmp_path}/c", "workers=0")
        images = sorted((folder / "images").glob("0*.png"))[:3]
        for image in images:
            done = simsearch(
                "search",
                f"catalog={tmp_path}/c",
                f"image={image}",
                "k=4",
                "format=json",
                f"figure={tmp_path}/f.png",
            )
            (line,) = done.stdout.splitlines()
            answer = json.loads(line)
            first = answer["results"][0]
            assert first["path"] == f"images/{image.name}"
            assert first["score"] == pytest.approx(1, abs=1e-4)
            assert first["artist"]
            assert [r["rank"] for r in answer["results"]] == [1, 2, 3, 4]
        with Image.open(tmp_path / "f.png") as picture:
            assert picture.width > 400

    def test_search_in_the_run_s_own_catalog_prints_a_table(self, small_run, tmp_path):
        query = small_run / "figures/queries"
        done = simsearch("search", f"catalog={small_run}/catalog", f"image={query}", "k=3", cwd=tmp_path)
        assert "rank" in done.stdout
        assert not list(tmp_path.iterdir())  # a picture only where one is asked for

    def test_another_encoder_is_refused(self, small_run):
        catalog = read_catalog(small_run / "catalog")
        about = catalog.about | {"encoder_fingerprint": "0" * 16}
        with pytest.raises(CatalogError, match="cannot be compared"):
            _ = replace(catalog, about=about).encoder
        assert encoder_fingerprint(catalog.encoder) == catalog.about["encoder_fingerprint"]
        assert not catalog.encoder.training

    def test_mistakes(self, small_run, folder, tmp_path):
        done = simsearch("search", f"catalog={tmp_path}", f"image={folder}/images", expect=1)
        assert "no catalog in" in done.stderr
        done = simsearch("index", f"run={small_run}", f"images={tmp_path}/none", expect=1)
        assert "does not exist" in done.stderr
        bad = folder / "images/not.jpg"
        done = simsearch("search", f"catalog={small_run}/catalog", f"image={bad}", expect=1)
        assert "not-an-image" in done.stderr
        (tmp_path / "full").mkdir()
        (tmp_path / "full/mine.txt").write_text("keep")
        done = simsearch("index", f"run={small_run}", f"images={folder}/images", f"out={tmp_path}/full", expect=1)
        assert "is not a catalog" in done.stderr
        assert "img/s" not in done.stderr  # before the images are described
        assert (tmp_path / "full/mine.txt").read_text() == "keep"
        done = simsearch("search", f"catalog={small_run}/catalog", f"image={folder}/images", "k=0", expect=1)
        assert "k must be at least 1" in done.stderr

    def test_the_catalog_of_other_images_is_not_replaced_by_chance(self, tmp_path, capsys):
        here, there = tmp_path / "a/images", tmp_path / "b/images"
        check_images(tmp_path, here, given=False)  # there is none
        write_json(tmp_path / "catalog.json", {"source": {"images": str(here)}})
        check_images(tmp_path, here, given=False)
        with pytest.raises(
            ValueError, match=r"is the catalog of the images in .*/a/images, not of those in .*/b/images"
        ):
            check_images(tmp_path, there, given=False)
        assert capsys.readouterr().err == ""
        check_images(tmp_path, there, given=True)
        assert "/a/images, and is of those in " in capsys.readouterr().err

    @pytest.mark.parametrize(
        "node",
        [
            {"_target_": "torch.hub.load", "repo_or_dir": "x", "source": "local", "model": "y"},
            {"_target_": "simsearch.models.backbones.torch.hub.load", "repo_or_dir": "x", "model": "y"},
            {
                "_target_": "simsearch.models.pooling.MAC",
                "_args_": [{"_target_": "shutil.copy", "src": "a", "dst": "b"}],
            },
            {"_target_": "simsearch.models.pooling.GeM", "p": "${oc.env:HOME}"},
        ],
    )
    def test_a_stranger_s_catalog_runs_no_code(self, small_run, tmp_path, node):
        import shutil

        shutil.copytree(small_run / "catalog", tmp_path / "c")
        about = read_json(tmp_path / "c/catalog.json")
        about["config"]["model"]["pooling"] = node
        write_json(tmp_path / "c/catalog.json", about)
        with pytest.raises(ValueError, match="the catalog's config"):
            build_encoder(read_catalog(tmp_path / "c").about["config"])

    @pytest.mark.parametrize("name", ["photo (1).jpg", "a=b,c.png", "ümlaut é [x].png", "it's.png", "no ending"])
    def test_any_file_name_will_do(self, small_run, tmp_path, name):
        import shutil

        shutil.copy(small_run / "figures/queries/00.png", tmp_path / name)
        done = simsearch(
            "search", f"catalog={small_run}/catalog", f"image={tmp_path}/{name}", "k=1", "format=json", "figure=null"
        )
        assert json.loads(done.stdout)["query"] == name

    def test_damaged_catalog_is_named(self, small_run, tmp_path):
        import shutil

        shutil.copytree(small_run / "catalog", tmp_path / "c")
        (tmp_path / "c/segments/1/index/index.faiss").write_bytes(b"damaged")
        with pytest.raises(CatalogError, match="damaged"):
            read_catalog(tmp_path / "c")


@pytest.mark.parametrize("fit", ["square", "longest"])
def test_a_search_answers_as_it_goes_and_keeps_few_pixels(fit, tmp_path, monkeypatch):
    rows = [[1, 3, 4], [5, 7, 8]] if fit == "square" else [[8, 1, 5], [7, 4, 3]]
    read: list[int] = []

    def batches(*_: object, **__: object) -> Iterator[ImageBatch]:
        for batch in map(torch.tensor, rows):
            read.extend(batch.tolist())
            yield batch.to(torch.uint8)[:, None, None, None].repeat(1, 3, 2, 2), batch, []

    found = SearchResult(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    catalog = SimpleNamespace(encoder=SimpleNamespace(fit=fit), verification=None)
    engine = SimpleNamespace(catalog=catalog, nearest=lambda *_: found, verdicts=lambda *_: ["uncalibrated"])
    monkeypatch.setattr(search, "batches_of", batches)
    monkeypatch.setattr(search, "encode", lambda _, images: images.flatten(1).float())
    monkeypatch.setattr(search, "rows_of", lambda *_: ([], []))
    for row in range(9):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{row}.png")
    answers = search.search(engine, tmp_path, 1, 3, pictures=4)
    first = next(answers)
    assert len(read) == (3 if fit == "square" else 6)
    answers = [first, *answers]
    assert [answer.query for answer in answers] == [f"{row}.png" for row in (1, 3, 4, 5, 7, 8)]
    assert [int(answer.image[0, 0, 0]) for answer in answers[:4]] == [1, 3, 4, 5]
    assert {answer.image.untyped_storage().nbytes() for answer in answers[:4]} == {12}
    assert answers[4].image is answers[5].image is None
    assert {answer.image for answer in search.search(engine, tmp_path, 1, 3)} == {None}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_of_a_search_has_telling_columns_alone(width):
    facts = {
        "museum": "Rijksmuseum, Amsterdam",
        "artist": "Jan",
        "note": None,
        "work": 7,
        "licence": "CC0 1.0 universal",
    }
    items = [
        {"rank": i, "score": 0.5, "verdict": "uncalibrated", "path": f"a/{i}.jpg", **facts, "title": f"title {i}"}
        for i in (1, 2)
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(search.answer_table(search.Answer("q.jpg", "uncalibrated", items, [0, 1], torch.zeros(0)), width))
    text = console.file.getvalue()
    assert "note" not in text  # empty throughout
    for part in ("rank", "score", "a/1.jpg", "a/2.jpg", "title 1", "artist"):
        assert part in text
    assert ("licence" in text.partition("no room for")[0]) == (width == 120)
    assert ("no room for" in text) == (width < 120)


class TestProgram:
    def test_help_lists_the_commands_in_under_a_second(self):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "simsearch", "--help"], capture_output=True, text=True)
        assert time.perf_counter() - start < 1.0
        for name in ("train", "evaluate", "index", "search", "data audit", "data export"):
            assert name in done.stdout

    def test_unknown_command(self):
        done = subprocess.run([sys.executable, "-m", "simsearch", "trian"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "no command 'trian'" in done.stderr

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("simsearch tr", "train"),
            ("simsearch train pooling=g", "pooling=gem"),
            ("simsearch data ex", "export"),
        ],
    )
    def test_completion(self, line, expected, monkeypatch):
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert expected in simsearch("-sc", "query=bash").stdout.split()


def test_real_images_end_to_end(real_data, small_run, tmp_path):
    """Real paintings, catalogued by the sample's encoder: each finds itself."""
    source = sorted((real_data / "art/images").iterdir())[0] if (real_data / "art").is_dir() else None
    if source is None:
        pytest.skip("no art/ in SIMSEARCH_DATA: the search on real paintings is SKIPPED")
    simsearch("index", f"run={small_run}", f"images={source}", f"out={tmp_path}/c", "workers=0")
    query = sorted(source.glob("*.jpg"))[0]
    done = simsearch("search", f"catalog={tmp_path}/c", f"image={query}", "k=2", "format=json", "figure=null")
    first = json.loads(done.stdout)["results"][0]
    assert first["path"] == query.name
    assert first["score"] == pytest.approx(1, abs=1e-4)
