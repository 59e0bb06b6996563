"""Nothing is lost: images that vanish while a command runs, kills by SIGKILL, catalogs that take another's place."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import simsearch
from PIL import Image
from test_extract import make_run

from simsearch.data import image_folder as files_module
from simsearch.data.image_folder import decode_files
from simsearch.data.manifest import read_manifest
from simsearch.data.presence import Presence, Vanished, file_sizes
from simsearch.search import describe
from simsearch.search.catalog import read_catalog
from simsearch.search.errors import CatalogError

COUNT = 24


def pictures(folder: Path, count: int = COUNT) -> Path:
    """Pictures of coarse colours in two sub-folders."""
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3)).astype(np.uint8)
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def images(tmp_path) -> Path:
    return pictures(tmp_path / "images")


def command(name: str, run: Path, images: Path, out: Path, *more: str) -> list[str]:
    given = ["batch_size=4", "workers=0", "device=cpu"]
    given += ["chunk=4"] if name == "extract" else []
    return [name, f"run={run}", f"images={images}", f"out={out}", *given, *more]


def lose(after: int, how: Callable[[], object], monkeypatch) -> None:
    """Has `how` happen after so many calls of `encode`; files read ahead are still in memory."""
    real, left = describe.encode, after

    def encode(encoder, batch):
        nonlocal left
        left -= 1
        if left == 0:
            how()
        return real(encoder, batch)

    monkeypatch.setattr(describe, "encode", encode)
    # Else a process decodes all of so few images before the first is encoded.
    monkeypatch.setattr("simsearch.data.process_pool._AHEAD", 1)
    monkeypatch.setattr("simsearch.data.process_pool._WINDOW", 1)


# ------------------------------------------------------------------------------------------- presence


class TestPresence:
    def test_a_file_that_is_deleted_is_one_file(self, images):
        paths = read_manifest(images).paths
        presence = Presence(images, (*paths, "never.png"))
        assert presence.seen == COUNT
        assert file_sizes(images, ("a/00.png", "never.png")).tolist() == [(images / "a/00.png").stat().st_size, -1]
        (images / "a/00.png").unlink()
        for path, reason in (("a/00.png", "missing"), ("never.png", "missing"), ("a/02.png", "truncated")):
            presence.check(path, reason)
        assert not presence.is_back("a/00.png", "missing")
        (images / "a/00.png").write_bytes(b"back")
        assert presence.is_back("a/00.png", "missing")
        assert not presence.is_back("a/00.png", "truncated")
        assert not presence.is_back("never.png", "missing")

    @pytest.mark.parametrize("how", ["gone", "empty", "another", "folder"])
    def test_a_folder_that_is_lost_is_more(self, how, images):
        presence = Presence(images, read_manifest(images).paths)
        if how == "folder":
            images.joinpath("a").rename(images / "c")
        else:
            images.rename(images.with_name("away"))
        if how in ("empty", "another"):
            images.mkdir()
        if how == "another":
            pictures(images, 3)
        with pytest.raises(Vanished, match=r"the last is a/04.png\): check that .*images is still connected"):
            presence.check("a/04.png", "missing")

    def test_so_are_many_files(self, images):
        presence = Presence(images, read_manifest(images).paths)
        for path in ("a/00.png", "a/02.png", "a/04.png"):
            (images / path).unlink()
        presence.check("a/00.png", "missing")
        presence.check("a/02.png", "missing")
        with pytest.raises(Vanished):  # 3 of 24 are more than a tenth
            presence.check("a/04.png", "missing")


# --------------------------------------------------------------------------- images vanish in mid command


@pytest.mark.parametrize("how", ["renamed", "emptied"])
def test_extract_stops_and_goes_on_when_they_are_back(how, run, images, tmp_path, monkeypatch):
    away, out = tmp_path / "away", tmp_path / "shards"

    def vanish() -> None:
        images.rename(away)
        if how == "emptied":
            images.mkdir()

    with monkeypatch.context() as patch:
        lose(2, vanish, patch)
        failed = simsearch(*command("extract", run, images, out), expect=1)
    assert "images have disappeared since this began" in failed.stderr
    assert 0 < len(list((out / "shards").iterdir())) < COUNT // 4
    if how == "emptied":
        images.rmdir()
    away.rename(images)
    done = simsearch(*command("extract", run, images, out))
    assert f"{COUNT} images in 6 shards" in done.stdout
    assert "skipped" not in done.stderr


def test_shards_that_call_images_missing_are_done_again(run, images, tmp_path, monkeypatch):
    """As an earlier version left them, or a file that was gone for a moment."""
    out, away = tmp_path / "shards", tmp_path / "away"
    monkeypatch.setattr(Presence, "check", lambda *_: None)
    with monkeypatch.context() as patch:
        lose(2, lambda: images.rename(away), patch)
        lost = simsearch(*command("extract", run, images, out))
    assert "missing" in lost.stderr
    refused = simsearch("index", f"shards={out}", f"out={tmp_path / 'c'}", expect=1)
    assert "images were lost while they were described" in refused.stderr
    assert "this command describes them again: simsearch extract" in refused.stderr
    away.rename(images)
    done = simsearch(*command("extract", run, images, out))
    assert "doing it again" in done.stderr
    assert f"{COUNT} images in 6 shards" in done.stdout


def test_index_stops_and_keeps_the_catalog_that_was_there(run, images, tmp_path, monkeypatch):
    out = tmp_path / "catalog"
    simsearch(*command("index", run, images, out))
    lose(2, lambda: images.rename(tmp_path / "away"), monkeypatch)
    failed = simsearch(*command("index", run, images, out), "index=sq8", expect=1)  # another index: all anew
    assert "have disappeared" in failed.stderr
    assert len(read_catalog(out)) == COUNT


def test_a_catalog_is_not_replaced_by_far_fewer_items(run, images, tmp_path):
    out = tmp_path / "catalog"
    simsearch(*command("index", run, images, out))
    for path in list(images.glob("a/*"))[:3]:
        path.write_bytes(b"damaged")  # 21 of 24 are left, which is only seen after the work
    failed = simsearch(*command("index", run, images, out), expect=1)
    assert "has 24 items, but the new one would have 21. Check that all images are there" in failed.stderr
    shutil.rmtree(images / "a")
    failed = simsearch(*command("index", run, images, out), expect=1)
    assert "has 24 items, but the new one would have 12" in failed.stderr
    assert len(read_catalog(out)) == COUNT
    simsearch(*command("index", run, images, out, "fewer=true"))
    assert len(read_catalog(out)) == 12


def test_ingest_and_decoded_files_stop_and_go_on(run, images, tmp_path, monkeypatch):
    """Their processes decode ahead, so the folder is lost when the first image has come."""
    away, out = tmp_path / "away", tmp_path / "out"
    monkeypatch.setattr("simsearch.data.process_pool._AHEAD", 1)
    monkeypatch.setattr("simsearch.data.process_pool._WINDOW", 1)
    say = ("data", "ingest", f"images={images}", f"out={out}", "near.descriptors=false", "workers=1", "chunk=5")
    real = Presence.check
    with monkeypatch.context() as patch:
        patch.setattr("simsearch.data.ingest.pipeline.tqdm.update", losing(images, away))
        assert "have disappeared" in simsearch(*say, expect=1).stderr
    away.rename(images)
    assert f"{COUNT} images of {COUNT} works" in simsearch(*say).stdout

    manifest, cache = read_manifest(images), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(files_module.tqdm, "update", losing(images, away))
        with pytest.raises(Vanished):
            decode_files(manifest, size=16, fit="square", cache=cache)
        away.rename(images)
        # What an earlier version wrote down is not believed.
        patch.setattr(files_module.tqdm, "update", losing(images, away))
        patch.setattr(Presence, "check", lambda *_: None)
        assert len(decode_files(manifest, size=16, fit="square", cache=cache).rows) < COUNT
    away.rename(images)
    assert Presence.check is real
    found = decode_files(manifest, size=16, fit="square", cache=cache)
    assert torch.equal(found.rows, torch.arange(COUNT))


def losing(images: Path, away: Path) -> Callable[..., None]:
    def update(*_: object) -> None:
        if images.exists() and not away.exists():
            images.rename(away)

    return update


# ---------------------------------------------------------------------------------------------- kills


def killed(arguments: list[str], place: Path, after: int) -> bool:
    """Whether a command in a process of its own was killed: it is at its so-manieth opening, making, moving or
    deleting of something below `place`."""

    def target() -> None:
        left = after

        def strike(event: str, values: tuple) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(place) in str(values[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(strike)
        simsearch(*arguments)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


STEPS = [pytest.param(7, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", STEPS)
def test_index_and_calibrate_are_killed_anywhere(step, run, images, tmp_path):
    """The catalog is always the old one or the new one, and a last run leaves what one that nobody disturbed does."""
    place, out = tmp_path / "place", tmp_path / "place" / "c"
    (images / "b" / "zz.png").write_bytes(b"no image")  # for skipped.csv
    say = command("index", run, images, out)
    simsearch(*say)
    calibrated = ["calibrate", f"catalog={out}", f"outside={images}", "device=cpu", "workers=1", f"cache={tmp_path}/x"]
    simsearch(*calibrated)
    whole = names(place)
    assert {"c/calibration.json", "c/calibration/curve.csv", "c/skipped.csv"} <= whole
    kills = 0
    for arguments in (say, calibrated):
        after = 1
        while killed(arguments, place, after):
            kills += 1
            assert len(read_catalog(out)) == COUNT, f"killed at {after}"
            after += step
    assert kills >= (5 if step > 1 else 40)
    simsearch(*say)
    simsearch(*calibrated)
    assert names(place) == whole


@pytest.mark.parametrize("step", STEPS)
def test_ingest_is_killed_anywhere(step, images, tmp_path):
    straight, place = tmp_path / "straight", tmp_path / "place" / "out"
    say = ["data", "ingest", f"images={images}", "near.descriptors=false", "workers=1", "chunk=9", "size=32"]
    simsearch(*say, f"out={straight}")
    kills = 0
    while killed([*say, f"out={place}"], place, 1 + kills * step):
        kills += 1
    assert kills >= (4 if step > 1 else 30)
    assert names(place) == names(straight)
    for name in ("pixels/pixels.bin", "manifest.parquet", "rejected.csv", "report.json"):
        assert (place / name).read_bytes() == (straight / name).read_bytes()


def test_a_kill_between_the_two_moves_of_a_catalog_loses_neither(run, images, tmp_path):
    out, place = tmp_path / "place" / "c", tmp_path / "place"
    simsearch(*command("index", run, images, out))
    process = multiprocessing.get_context("fork").Process(target=lambda: None)
    process.start()
    process.join()
    aside = place / f".c.{process.pid}.old"  # as an earlier version names it
    out.rename(aside)
    (place / f".c.{os.getppid()}").mkdir()  # of a process that lives
    assert len(read_catalog(out)) == COUNT
    assert {path.name for path in place.iterdir()} == {"c", f".c.{os.getppid()}"}


def test_leftovers_of_skipped_csv_do_not_refuse_a_catalog(run, images, tmp_path):
    out = tmp_path / "place" / "c"
    simsearch(*command("index", run, images, out))
    (out / ".1a2b3c4d.skipped.csv").write_text("path")
    os.utime(out / ".1a2b3c4d.skipped.csv", (0, 0))
    (out.parent / ".c.999999999").mkdir()
    simsearch(*command("index", run, images, out))
    assert not [name for name in names(out.parent) if "." in name[:1] or "/." in name]
    (out / "thesis.txt").write_text("years")
    simsearch(*command("index", run, images, out))  # what is up to date is not replaced
    assert (out / "thesis.txt").read_text() == "years"
    other = command("index", run, images, out)
    assert "also holds other files (thesis.txt)" in simsearch(*other, "index=sq8", expect=1).stderr


# ---------------------------------------------------------------------------------------- calibrations


@pytest.mark.slow
def test_a_calibration_stays_with_an_equal_catalog_and_goes_with_a_word(run, images, tmp_path):
    out = tmp_path / "c"
    simsearch(*command("index", run, images, out))
    simsearch("calibrate", f"catalog={out}", "device=cpu")
    before = (out / "calibration.json").read_bytes()
    done = simsearch(*command("index", run, images, out))
    assert "calibrat" not in done.stderr
    assert (out / "calibration.json").read_bytes() == before
    assert read_catalog(out).calibration is not None
    pictures(images, COUNT + 1)
    done = simsearch(*command("index", run, images, out))
    assert read_catalog(out).calibration is not None
    done = simsearch(*command("index", run, images, out), "index=sq8")
    assert "is calibrated" in done.stderr  # before the work
    assert f"was calibrated; the new one is not: simsearch calibrate catalog={out}" in done.stderr
    assert read_catalog(out).calibration is None
    (out / "calibration.json").write_text("{")
    with pytest.raises(CatalogError):
        read_catalog(out)
    assert "calibration.json is damaged" in simsearch(*command("index", run, images, out), "index=sq8").stderr
    assert "the new one is not" in simsearch(*command("index", run, images, out), "index=flat").stderr


def test_describing_images_from_outside_stops_too(run, images, tmp_path, monkeypatch):
    out, outside = tmp_path / "c", pictures(tmp_path / "outside", 12)
    simsearch(*command("index", run, images, out))
    say = ["calibrate", f"catalog={out}", f"outside={outside}", "batch_size=2", "workers=0", "device=cpu"]
    say.append(f"cache={tmp_path / 'cache'}")
    with monkeypatch.context() as patch:
        lose(1, lambda: outside.rename(tmp_path / "away"), patch)
        assert "have disappeared" in simsearch(*say, expect=1).stderr
    (tmp_path / "away").rename(outside)
    assert "could not" not in simsearch(*say).stderr
