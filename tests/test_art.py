"""make art: from paintings to a recommender that a server answers with."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from simsearch.data.rendered import render_collection

ART = Path(__file__).parents[1] / "experiments/2026-11-23-art-recommender/art.py"


@pytest.fixture(scope="module")
def art():
    spec = importlib.util.spec_from_file_location("art", ART)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sample_is_divided_by_style(art, tmp_path):
    rows = [f"{i}.png,{style}" for i, style in enumerate("abcdab")]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,style", *rows]) + "\n")
    art.divide(tmp_path / "manifest.csv", tmp_path / "in.csv", tmp_path / "out.csv")
    assert (tmp_path / "in.csv").read_text() == "path,style\n0.png,a\n1.png,b\n4.png,a\n5.png,b\n"
    assert (tmp_path / "out.csv").read_text() == "path,style\n2.png,c\n3.png,d\n"


@pytest.mark.slow
def test_a_flat_folder_with_a_broken_file_ends_in_a_recommender(tmp_path):
    images, out = tmp_path / "paintings", tmp_path / "out"
    images.mkdir()
    collection = render_collection(styles=4, artists=2, works=3, photographs=1, size=96)
    for i, image in enumerate(collection.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(images / f"{i}.png")
    (images / "broken.jpg").write_text("no picture")
    command = [sys.executable, str(ART), "--images", str(images), "--out", str(out), "--size", "96", "--no-serve"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "protocol.attribute=work" in said
    assert "all is well" in said
    assert "not-an-image" in (out / "collection" / "rejected.csv").read_text()
    assert json.loads((out / "catalog" / "calibration.json").read_text())["similar"] is None
    assert (out / "recommendations.png").is_file()
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert again.count("there already") == 3
    assert "simsearch train" not in again
    assert "all is well" in again
