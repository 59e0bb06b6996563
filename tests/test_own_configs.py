"""Configs that lie elsewhere: those of a wheel, and a user's own folders beside conf/."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import simsearch

from simsearch import usage
from simsearch.studies.rows import row_files

OWN_LOSS = """\
# A loss of the user's own.
_target_: own_loss.Pull
strength: 2.0 # how hard pairs of one label are pulled
"""
OWN_CLASS = """\
import torch

class Pull(torch.nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, embeddings, labels):
        same = labels[:, None] == labels[None, :]
        return self.strength * (torch.cdist(embeddings, embeddings)[same] ** 2).mean()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with conf/loss/pull.yaml, and the class that it names on the path."""
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "pull.yaml").write_text(OWN_LOSS)
    (tmp_path / "own_loss.py").write_text(OWN_CLASS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "conf"


@pytest.mark.parametrize("how", ["--config-dir {}", "--config-dir={}", "-cd {}", "hydra.searchpath=[file://{}]"])
def test_what_to_give_is_known_with_a_folder_of_ones_own(own, how):
    where = how.format(own).split()
    assert usage.folders(where) == (usage.CONF, own)
    assert "pull" not in usage.options_of("loss")
    page = usage.help_page("train", [*where, "loss=pull"])
    assert all(text in page for text in ("| pull |", "loss.strength=2.0", "how hard pairs"))
    assert usage.completions(["train"], f"simsearch train {' '.join(where)} loss=pu") == ["loss=pull"]
    assert usage.mistake("train", [*where, "loss=pull", "loss.strength=3"]) is None
    assert usage.mistake("train", [*where, "own_key=1"]) is None  # an experiment of one's own may bring it
    assert "did you mean pull?" in (usage.mistake("train", [*where, "loss=pul"]) or "")
    assert "must be a number" in (usage.mistake("train", [*where, "loss=pull", "loss.strength=hard"]) or "")


def test_options_of_a_package_are_left_to_hydra():
    assert usage.mistake("train", ["hydra.searchpath=[pkg://somebody.conf]", "loss=theirs", "theirs=1"]) is None
    assert usage.mistake("train", ["loss=theirs"]) is not None


@pytest.mark.slow
def test_a_loss_of_ones_own_trains_from_a_folder_outside(own, tmp_path):
    run = tmp_path / "run"
    small = ["data.styles=2", "data.artists=4", "data.works=3", "data.photographs=3", "data.size=32"]
    simsearch(
        *("train", "--config-dir", str(own), "experiment=hashing-frozen", "loss=pull"),
        *("data=rendered", "protocol=rendered-artist", *small),
        *("backbone.size=32", "smoke=true", "logger=none"),
        f"run_dir={run}",
        cwd=tmp_path,
    )
    assert "own_loss.Pull" in (run / "config.yaml").read_text()
    assert (run / "metrics.json").is_file()


def test_a_wheel_has_its_configs_in_the_package_and_a_checkout_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "simsearch"
    package.mkdir()
    monkeypatch.setattr(usage.resources, "files", lambda name: package if name == "simsearch" else None)
    assert usage.conf_folder() == tmp_path / "conf"
    (package / "conf").mkdir()
    assert usage.conf_folder() == package / "conf"


def test_without_a_checkout_reproduce_asks_for_the_studies(tmp_path, monkeypatch):
    monkeypatch.setattr("simsearch.configs.CONF", str(tmp_path / "simsearch" / "conf"))
    with pytest.raises(ValueError, match=r"in experiments/ of the repository.*give rows="):
        row_files(None)
    studies = Path(usage.CONF).parent / "experiments"
    assert row_files(str(studies)) == sorted(studies.glob("*/rows.yaml")) != []
    one = row_files(str(studies))[0]
    assert row_files(str(one.parent)) == row_files(str(one)) == [one]
    with pytest.raises(ValueError, match="no study in"):
        row_files(str(tmp_path))
