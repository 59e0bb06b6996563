"""A collection cut down: what is left is a part of what was, and searches itself as the whole does."""

from __future__ import annotations

import pytest
import torch
from conftest import SMALL, simsearch

from simsearch import saved_run
from simsearch.data.collection import Collection
from simsearch.data.protocols import ByAttribute, OfficialSplit, UnseenClasses
from simsearch.data.smoke import CLASSES, GALLERY, LEAST, QUERIES, TRAIN, shrunk
from simsearch.files import read_json


def collection(n: int = 3000, classes: int = 30) -> Collection:
    """Images whose pixels are their row, of classes of uneven size."""
    generator = torch.Generator().manual_seed(0)
    label = (torch.rand(n, generator=generator) ** 2 * classes).long()
    images = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(n) % 256, torch.arange(n) // 256
    names = tuple(f"c{i}" for i in range(classes))
    is_test = torch.rand(n, generator=generator) < 0.3
    return Collection("toy", images, label[:, None], ("class",), (names,), is_test, tuple(f"{i}.png" for i in range(n)))


def origin(small: Collection) -> torch.Tensor:
    """The row of the whole collection that each image was, by its pixels."""
    corner = small.images[:, 0, 0].long()
    return corner[:, 0] + 256 * corner[:, 1]


PROTOCOLS = [
    OfficialSplit("a", "train", False),
    OfficialSplit("b", "test", True, validation=None),
    OfficialSplit("c", "test", False),
    UnseenClasses("d", fold=0, validation=0.2),
]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_a_part_of_the_whole(protocol):
    whole = collection()
    split = protocol.split(whole)
    small, part = shrunk(whole, split)
    rows = origin(small)
    assert torch.equal(small.labels, whole.labels[rows])
    assert torch.equal(small.is_test, whole.is_test[rows])
    assert small.paths == tuple(whole.paths[row] for row in rows.tolist())
    assert len(small) <= CLASSES * (TRAIN + 2 * GALLERY + 2 * QUERIES) + LEAST
    assert torch.isin(rows[part.train], split.train).all()
    assert len(part.train) > 100
    for before, after in ((split.validation, part.validation), (split.test, part.test)):
        assert (before is None) == (after is None)
        if before is None:
            continue
        assert torch.isin(rows[after.query], before.query).all()
        assert torch.isin(rows[after.gallery], before.gallery).all()
        assert torch.isin(small.column("class")[after.query], small.column("class")[after.gallery]).all()
        assert 2 <= len(small.column("class")[after.query].unique()) <= CLASSES
        assert len(after.gallery) >= min(LEAST, len(before.gallery))
        assert after.name == f"{before.name}/smoke"
        assert after.fingerprint != before.fingerprint
    again, same = shrunk(whole, split)
    assert torch.equal(origin(again), rows)
    assert same.test.fingerprint == part.test.fingerprint


def test_units_and_junk_stay_with_their_rows():
    whole = collection(800, 20)
    work = torch.arange(800) // 2
    both = torch.stack([whole.labels[:, 0], work], dim=1)
    names = (*whole.classes, tuple(map(str, range(400))))
    whole = Collection("toy", whole.images, both, ("class", "work"), names, torch.zeros(800, dtype=torch.bool))
    split = ByAttribute("e", attribute="class", group="work", junk="work", unit="work", validation=0.2).split(whole)
    small, part = shrunk(whole, split)
    rows = origin(small)
    assert torch.equal(part.test.units, split.test.units[rows])
    assert part.test.junk == "work"


def test_without_labels_and_with_few_rows_all_stay():
    whole = collection(40, 3)
    split = OfficialSplit("a", "train", False, validation=None).split(whole)
    small, part = shrunk(whole, split)
    assert len(part.train) == len(split.train)
    assert len(part.test.gallery) == len(split.test.gallery)
    assert len(small) <= 40


def test_smoke_runs_in_few_steps_and_says_so(tmp_path):
    long = ("model=dsh", "trainer.max_steps=5000", "sampler.batch_size=500", "trainer.precision=32-true")
    small = ["data.size=32", *(text for text in SMALL if text.startswith("data.") and "size" not in text)]
    done = simsearch("train", *small, *long, "smoke=true", f"run_dir={tmp_path}/r", "logger.mode=disabled")
    assert "its numbers mean nothing" in done.stderr
    stages = read_json(tmp_path / "r" / "metrics.json")
    assert stages["test"]["protocol"] == "rendered-artist/smoke"
    config = saved_run.open_run(tmp_path / "r").config
    assert (config["trainer"]["max_steps"], config["sampler"]["batch_size"]) == (8, 32)
    assert config["logger"]["tags"] == ["smoke"]
    again = simsearch("evaluate", f"run={tmp_path}/r", f"run_dir={tmp_path}/e")
    assert "rendered-artist/smoke" in again.stdout
    assert read_json(tmp_path / "e" / "metrics.json")["test"]["fingerprint"] == stages["test"]["fingerprint"]


def test_smoke_fits_a_model_that_has_no_gradients(tmp_path):
    done = simsearch(
        "train", *SMALL, "sampler.batch_size=2", "smoke=true", f"run_dir={tmp_path}/r", "logger.mode=disabled"
    )
    assert "its numbers mean nothing" in done.stderr
    assert read_json(tmp_path / "r" / "metrics.json")["test"]["metrics"]["mAP"] > 0
    assert saved_run.open_run(tmp_path / "r").config["trainer"]["max_steps"] == -1
