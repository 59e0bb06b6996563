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
from simsearch.search import change
from simsearch.search.catalog import read_catalog

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


def test_a_catalog_of_format_1_opens_as_it_is_and_migrates(tmp_path):
    old = Path(shutil.copytree(OLD / "catalog", tmp_path / "catalog"))
    before = read_catalog(old)
    assert (before.about["format"], before.names.of(range(3))) == (1, ["0", "1", "2"])
    thumbnails, paths = before.thumbnails(range(8)), before.items["path"].to_pylist()
    assert change.problems(old) == []
    assert json.loads((old / "catalog.json").read_text())["format"] == 1
    simsearch("catalog", "migrate", f"catalog={old}")
    catalog = read_catalog(old)
    assert catalog.about["format"] == 2
    assert catalog.fingerprint == before.fingerprint
    assert catalog.items.to_pydict() == before.items.to_pydict()
    assert catalog.thumbnails(range(8)) == thumbnails == before.thumbnails(range(8))
    assert catalog.names.of(range(8)) == [str(i) for i in range(8)]
    assert answer(old, OLD / "query.png") == ANSWER
    assert {path.name for path in old.iterdir()} == {"catalog.json", "encoder.safetensors", "segments"}
    change.remove(old, [paths[0]])
    assert change.problems(old) == []
    assert read_catalog(old).names.is_gone("0")


def test_the_first_change_of_a_catalog_migrates_it(tmp_path):
    old = Path(shutil.copytree(OLD / "catalog", tmp_path / "catalog"))
    change.remove(old, ["3"])
    assert read_catalog(old).about["format"] == 2
    assert len(read_catalog(old)) == 7
    (path, _), *_ = answer(old, OLD / "query.png")
    assert path == ANSWER[0][0]
