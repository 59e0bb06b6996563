"""Runs and catalogs of earlier versions open, and give the answers that they gave then.

fixtures/version-0.1 was made by 0.1.0, before modules moved: a training of data=files backbone=colour on 16 images of
the rendered sample, the catalog that it left, and one of the images. The answer below is what its `search` printed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import simsearch

from simsearch import configs, saved_run, trust

OLD = Path(__file__).parent / "fixtures" / "version-0.1"
ANSWER = [("images/000008.png", 1.0), ("images/000000.png", 0.9992), ("images/000013.png", 0.9523)]


def answer(catalog: Path, image: Path) -> list[tuple[str, float]]:
    done = simsearch("search", f"catalog={catalog}", f"image={image}", "k=3", "format=json", "device=cpu")
    (line,) = done.stdout.splitlines()
    return [(item["path"], round(item["score"], 4)) for item in json.loads(line)["results"]]


def test_a_catalog_answers_as_it_did():
    assert answer(OLD / "catalog", OLD / "query.png") == ANSWER


@pytest.fixture
def old_run(tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_fills_a_new_catalog(old_run, tmp_path):
    sample = ["data.styles=2", "data.artists=2", "data.works=2", "data.photographs=2", "data.size=32"]
    simsearch("data", "export", "data=rendered", *sample, f"out={tmp_path}/images")
    simsearch("index", f"run={old_run}", f"images={tmp_path}/images", f"out={tmp_path}/catalog", "device=cpu")
    found = dict(answer(tmp_path / "catalog", OLD / "query.png"))
    assert found["images/000008.png"] == pytest.approx(1, abs=1e-4)


def test_its_metrics_are_read(old_run):
    done = simsearch("compare", f"runs=[{old_run}]", f"out={old_run.parent / 'out'}")
    assert "by-artist" in done.stdout


def test_what_its_config_names_is_where_it_is_now(old_run):
    assert "simsearch.data.files.FilesDataModule" in (old_run / "config.yaml").read_text()
    run = saved_run.open_run(old_run)
    assert run.config["data"]["_target_"] == "simsearch.data.image_folder.FilesDataModule"
    assert configs.build(run.config["model"]).dimension == 8


def test_moved_names_lead_to_what_is_allowed():
    assert set(trust.MOVED.values()) <= trust.ALLOWED
    assert not set(trust.MOVED) & trust.ALLOWED
