"""Extraction by several processes: the same shards whoever writes them, whatever is killed; and the catalog of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import simsearch
from PIL import Image
from torch import nn

from simsearch import configs, saved_run
from simsearch.commands.extract import place, rank_main
from simsearch.data.loading import load_batches, load_chunks
from simsearch.data.manifest import ImageFiles, Manifest, read_manifest
from simsearch.files import read_json
from simsearch.images import ImageError, read_image
from simsearch.index.faiss_index import FaissIndex
from simsearch.search import extract as module
from simsearch.search import leases as claims
from simsearch.search import writing
from simsearch.search.catalog import read_catalog
from simsearch.search.describe import encode
from simsearch.search.engine import Engine
from simsearch.search.extract import Work
from simsearch.search.leases import Claims, claimed
from simsearch.search.segments import regroup
from simsearch.search.shards import ShardError, Shards, open_shards
from simsearch.search.writing import fill_index

CHUNK = 4
IMAGES = 42  # with the broken ones: 10 chunks of 4, and one of 2
BROKEN = {"images/cut.png": "truncated", "images/zz.jpg": "not-an-image"}


def make_run(folder: Path, *, fit: str = "square", bits: int | None = None, seed: int = 0) -> Path:
    """A run directory of a tiny network on random weights, as far as extraction looks at it."""
    backbone = {"_target_": "simsearch.models.backbones.timm_backbone", "name": "test_resnet", "weights": "random"}
    backbone |= {"size": 32, "runtime": "torch", "fit": fit}
    model = {"_target_": "simsearch.models.frozen.FrozenRetriever", "backbone": backbone}
    model["pooling"] = {"_target_": "simsearch.models.pooling.GeM", "p": 3.0}
    if bits:
        model["binarizer"] = {"_target_": "simsearch.index.binarize.ITQ", "bits": bits}
    torch.manual_seed(seed)
    network = configs.build(model)
    if bits:
        nn.init.normal_(network.code_weight)
        noise = torch.randint(0, 256, (9, 3, 2, 2), dtype=torch.uint8).repeat_interleave(16, 2).repeat_interleave(16, 3)
        network.code_bias.copy_(-network.eval().embed(noise).detach().median(0).values)  # or all codes are equal
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {"state_dict": network.state_dict(), "backbone": dict(network.provenance)}
    torch.save(checkpoint, folder / "checkpoints/best.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "square")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of the rendered sample in several shapes, a broken file among them and one at the end."""
    folder = tmp_path_factory.mktemp("pictures")
    sample = ("data.styles=4", "data.artists=2", "data.works=5", "data.photographs=3", "data.size=48")
    simsearch("data", "export", *sample, f"out={folder}", f"limit={IMAGES - 2}")
    pictures = sorted((folder / "images").glob("*.png"))
    for i, picture in enumerate(pictures):
        if i % 3:
            with Image.open(picture) as image:
                image.crop((0, 0, 48, 48 - 8 * (i % 3))).save(picture)
    pictures[5].rename(folder / "images/cut.png")  # sorted between the others and zz.jpg
    (folder / "images/cut.png").write_bytes((folder / "images/cut.png").read_bytes()[:300])
    Image.new("RGB", (60, 20), (200, 30, 40)).save(pictures[5])
    (folder / "images/zz.jpg").write_text("no image")
    return folder


def arguments(run: Path, folder: Path, out: Path, *more: str) -> list[str]:
    given = ["extract", f"run={run}", f"images={folder}/images", f"out={out}", f"chunk={CHUNK}"]
    return [*given, "batch_size=3", "workers=0", "device=cpu", *more]


def extract(run: Path, folder: Path, out: Path, *more: str, expect: int = 0):
    return simsearch(*arguments(run, folder, out, *more), expect=expect)


def start(
    run: Path, folder: Path, out: Path, *more: str, after: int = 0, what: int = signal.SIGKILL, expect: int = 0
) -> multiprocessing.Process:
    """An extraction in a process of its own, by fork, which spares its imports.

    after: instead of opening, moving, deleting or making its so-manieth file in `out` it sends itself `what`.
    """

    def target() -> None:
        left = after

        def strike(event: str, values: tuple) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(out) in str(values[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), what)

        sys.addaudithook(strike)
        extract(run, folder, out, *more, expect=expect)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def finish(processes: Sequence[multiprocessing.Process]) -> None:
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def contents(out: Path) -> dict[str, bytes]:
    """Every shard's bytes; nothing else lies beside them, and nothing is claimed."""
    assert list((out / "claims").iterdir()) == []
    assert sorted(path.name for path in out.iterdir()) == ["claims", "plan", "shards"]
    return {path.name: path.read_bytes() for path in (out / "shards").iterdir()}


@pytest.fixture(scope="module")
def whole(run, folder, tmp_path_factory) -> Path:
    """What one process leaves that nobody disturbs."""
    out = tmp_path_factory.mktemp("shards") / "whole"
    extract(run, folder, out)
    return out


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "shards")
    return tmp_path / "shards"


class TestShards:
    def test_hold_each_image_once_as_the_encoder_sees_it(self, run, folder, whole):
        shards = open_shards(whole)
        assert len(shards) == 11
        encoder = saved_run.load_model(saved_run.open_run(run)).encoder
        names = sorted(f"images/{path.name}" for path in (folder / "images").iterdir())
        assert shards.items["path"].to_pylist() == [name.removeprefix("images/") for name in names]
        seen, failed = [], {}
        for number in range(len(shards)):
            assert shards.check(number) == len(shards.vectors(number))
            table = shards.catalog_items(number)
            for path, vector in zip(table["path"].to_pylist(), shards.vectors(number), strict=True):
                seen.append(path)
                image = read_image(folder / "images" / path, size=32)
                torch.testing.assert_close(vector, encode(encoder, image[None])[0], rtol=0, atol=1e-5)
            failed |= {f"images/{error.path.name}": error.reason for error in shards.errors(number)}
        assert failed == BROKEN
        assert sorted([*seen, *(name.removeprefix("images/") for name in failed)]) == shards.items["path"].to_pylist()

    def test_one_and_three_ranks_write_the_same_bytes(self, run, folder, whole, tmp_path):
        finish([start(run, folder, tmp_path / "s", "ranks=3", f"rank={rank}") for rank in range(3)])
        assert contents(tmp_path / "s") == contents(whole)

    @pytest.mark.slow
    def test_killed_anywhere_and_gone_on_by_others(self, run, folder, whole, tmp_path):
        rng = random.Random(0)
        out, seen = tmp_path / "s", []
        for attempt in range(100):
            ranks = 1 + attempt % 3
            processes = [  # killed sooner in the first attempts, which have the plan to make
                start(run, folder, out, f"ranks={ranks}", f"rank={rank}", after=rng.randint(1, 10 + 4 * attempt))
                for rank in range(ranks)
            ]
            for process in processes:
                process.join(60)
            seen.append(len(list(out.glob("shards/0*"))))
            if any(process.exitcode == 0 for process in processes):
                break
            assert {process.exitcode for process in processes} == {-signal.SIGKILL}
        assert len(set(seen)) >= 4, "too few kills in the midst of the work to prove anything"
        finish([start(run, folder, out, "ranks=2", f"rank={rank}") for rank in range(2)])
        assert contents(out) == contents(whole)

    @pytest.mark.parametrize("after", [35, 45])
    def test_sigterm_leaves_whole_shards_and_no_claim(self, after, run, folder, whole, tmp_path):
        expect = 128 + signal.SIGTERM
        finish([start(run, folder, tmp_path / "s", after=after, what=signal.SIGTERM, expect=expect)])
        left = contents(tmp_path / "s")
        assert 0 < len(left) < 11
        assert left.items() < contents(whole).items()

    @pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_ranks_that_are_started_here(self, method, run, folder, whole, tmp_path, monkeypatch):
        context = multiprocessing.get_context(method)  # spawn is what users get: 15 seconds of imports
        monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: context)
        done = extract(run, folder, tmp_path / "s", "ranks=2")
        assert "40 images in 11 shards" in done.stdout
        assert contents(tmp_path / "s") == contents(whole)

    def test_ranks_end_with_the_process_that_started_them(self, run, folder, copied):
        for path in (copied / "shards").iterdir():
            path.unlink()
        work = Work(copied, folder / "images", rank=0, ranks=1, local=0, batch_size=3, workers=0, device="cpu")
        context = multiprocessing.get_context("fork")

        def parent() -> None:
            child = context.Process(target=rank_main, args=(work,))
            child.start()
            (copied / "pid").write_text(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)

        process = context.Process(target=parent)
        process.start()
        process.join()
        child = Path("/proc", (copied / "pid").read_text())
        deadline = time.monotonic() + 30
        while child.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not child.exists()
        (copied / "pid").unlink()
        assert contents(copied) == {}

    def test_what_is_finished_is_not_done_again(self, run, folder, copied):
        before = {path: path.stat().st_mtime_ns for path in (copied / "shards").iterdir()}
        done = extract(run, folder, copied)
        assert {path: path.stat().st_mtime_ns for path in (copied / "shards").iterdir()} == before
        assert "40 images in 11 shards" in done.stdout
        assert "skipped 1 files, truncated" in done.stderr
        assert "try next: simsearch index" in done.stdout

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other", "gone"])
    def test_a_damaged_shard_is_found_and_done_again(self, damage, run, folder, whole, copied):
        path = copied / "shards/000003.safetensors"
        data = path.read_bytes()
        if damage == "gone":
            path.unlink()
        elif damage == "other":
            shutil.copy(copied / "shards/000004.safetensors", path)
        else:
            flipped = bytes([data[-9] ^ 1])
            path.write_bytes({"cut": data[:-5], "flip": data[:-9] + flipped + data[-8:], "empty": b""}[damage])
        (copied / "shards/.abc.000003.safetensors").write_bytes(b"left by a kill in the midst of writing")
        with pytest.raises(ShardError, match=r"000003.safetensors is damaged or missing"):
            open_shards(copied).check(3)
        done = simsearch("index", f"shards={copied}", f"out={copied.parent}/c", expect=1)
        assert f"simsearch extract run={run} images={folder}/images out={whole} chunk=4" in done.stderr
        assert ("1 of the 11 shards" in done.stderr) == (damage == "gone")
        assert not (copied.parent / "c").exists()
        done = extract(run, folder, copied)
        assert ("doing it again" in done.stderr) == (damage != "gone")
        assert contents(copied) == contents(whole)

    def test_images_lost_or_double_are_not_written(self, whole):
        shards = open_shards(whole)
        vectors, rows = torch.zeros(4, 3), torch.tensor([4, 5, 6, 7])
        bad = ImageError(Path(shards.items["path"][7].as_py()), "empty")
        for some, errors in ((rows[:3], []), (torch.tensor([4, 5, 6, 6]), []), (rows, [bad]), (rows - 4, [])):
            with pytest.raises(ValueError, match="chunk 1 does not hold each of its 4 images once"):
                shards.write(1, some, vectors[: len(some)], [b""] * len(some), errors)
        vectors[2, 1] = torch.nan
        with pytest.raises(ValueError, match=f"NaN or infinity for {shards.items['path'][6].as_py()}"):
            shards.write(1, rows, vectors, [b""] * 4, [])


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: (f / "more.png").write_bytes(b"x"), r"1 new, first more.png\): put them back"),
            (lambda f: (f / "zz.jpg").unlink(), "1 gone, first zz.jpg"),
            (lambda f: (f / "zz.jpg").write_text("another"), "1 of another size, first zz.jpg"),
        ],
    )
    def test_another_list(self, change, message, run, folder, copied, tmp_path):
        shutil.copytree(folder / "images", tmp_path / "images")
        change(tmp_path / "images")
        done = extract(run, tmp_path, copied, expect=1)
        assert re.search(message, done.stderr), done.stderr

    def test_another_encoder_or_cut(self, run, folder, copied, tmp_path):
        other = make_run(tmp_path / "other", seed=1)
        assert "begun with encoder" in extract(other, folder, copied, expect=1).stderr
        assert "begun with chunk=4, not 5" in extract(run, folder, copied, "chunk=5", expect=1).stderr
        assert "begun with thumbnail=128, not 32" in extract(run, folder, copied, "thumbnail=32", expect=1).stderr

    def test_other_attributes(self, run, folder, tmp_path):
        lines = (folder / "manifest.csv").read_text().splitlines()
        manifest = folder / "copy.csv"
        manifest.write_text("\n".join(lines[:4]))
        given = ["extract", f"run={run}", f"images={manifest}", f"out={tmp_path}/s", "workers=0", "device=cpu"]
        simsearch(*given)
        manifest.write_text("\n".join([lines[0], *(f"{line}x" for line in lines[1:4])]))
        assert "other attributes" in simsearch(*given, expect=1).stderr

    def test_other_folders(self, run, folder, tmp_path):
        (tmp_path / "thesis.txt").write_text("years")
        assert "holds other files (thesis.txt)" in extract(run, folder, tmp_path, expect=1).stderr
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
        assert "no shards in" in simsearch("index", f"shards={tmp_path}", expect=1).stderr
        assert "give run=<run> and images=" in simsearch("index", expect=1).stderr
        assert "leave run= and images= out" in simsearch("index", f"shards={tmp_path}", "images=x", expect=1).stderr

    def test_places(self, monkeypatch):
        for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]:
            monkeypatch.delenv(name)
        assert place(None, None) == (0, 1, 0)
        assert place(3, 8) == (3, 8, 3)
        assert place(None, 4) == (None, 4, 0)
        assert place(None, 1) == (0, 1, 0)
        for rank, ranks in ((3, None), (3, 3), (-1, 3), (None, 0)):
            with pytest.raises(ValueError, match="ranks"):
                place(rank, ranks)

        def places(**environment: str) -> tuple:
            with monkeypatch.context() as context:
                for name, value in environment.items():
                    context.setenv(name, value)
                return place(None, None)

        torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
        slurm = {"SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
        assert places(**torchrun) == (5, 8, 1)
        assert places(**slurm, SLURM_STEP_NUM_TASKS="3") == (2, 3, 0)
        assert places(**torchrun, **slurm, SLURM_STEP_NUM_TASKS="3") == (5, 8, 1)
        assert places(SLURM_NTASKS="3") == (0, 1, 0)  # a shell of salloc
        assert places(**slurm, SLURM_STEP_NUM_TASKS="1") == (0, 1, 0)  # a batch script without srun


# ---------------------------------------------------------------------------------- catalogs of shards


class TestCatalog:
    @pytest.mark.parametrize(("fit", "bits", "index"), [("square", None, "hnsw"), ("longest", 16, "binary-flat")])
    def test_is_that_of_the_images_themselves(self, fit, bits, index, folder, tmp_path):
        run = make_run(tmp_path / "run", fit=fit, bits=bits)
        given = [f"run={run}", f"images={folder}/images", "workers=0", "device=cpu", "thumbnail=40"]
        done = simsearch("extract", *given, f"out={tmp_path}/s", f"chunk={CHUNK}")
        assert done.stdout.rstrip().endswith(f"simsearch index shards={tmp_path}/s out=<catalog>")
        more = ["verify=sift", "verify.item_features=20"] if index == "hnsw" else []
        again = [f"images={folder}/images"] if more else []
        of_kind = [] if bits else [f"index={index}"]  # codes without it: the exact search that fits them
        simsearch("index", f"shards={tmp_path}/s", *of_kind, f"out={tmp_path}/of-shards", *more, *again)
        simsearch("index", *given, f"index={index}", f"out={tmp_path}/direct", *more)
        one, other = read_catalog(tmp_path / "of-shards"), read_catalog(tmp_path / "direct")
        of_content = ("segments", "first")  # shards do not record the digests of the images
        abouts = [{n: v for n, v in c.about.items() if n not in of_content} for c in (one, other)]
        assert abouts[0] == abouts[1]
        files = [read_json(c.segments[0].folder / "segment.json")["files"] for c in (one, other)]
        assert set(files[0]) == set(files[1])
        for name in set(files[0]) - {"items.arrow"}:
            if index != "hnsw" or name != "index/index.faiss":  # threads build a graph in any order
                assert files[0][name] == files[1][name]
        assert (one.verification is not None) == bool(more)
        if more:
            found = sum(len(features) for features in one.local_features(range(len(one))))
            assert found > 2 * len(one)  # and their digests are equal
        assert one.items.equals(other.items)
        positions = range(len(one))
        assert one.thumbnails(positions) == other.thumbnails(positions)
        skipped = (tmp_path / "of-shards/skipped.csv").read_text()
        assert sorted(skipped.splitlines()) == sorted((tmp_path / "direct/skipped.csv").read_text().splitlines())
        assert {line.split(",")[1] for line in skipped.splitlines()} == {"reason", *BROKEN.values()}
        stored = one.index.reconstruct()
        assert len(stored.unique(dim=0)) > 10
        torch.testing.assert_close(stored, other.index.reconstruct(), rtol=0, atol=1e-6)
        image = read_image(folder / "images" / one.items["path"][7].as_py(), size=32, fit=fit)
        found, expected = (Engine(c).nearest(encode(c.encoder, image[None]), 5) for c in (one, other))
        assert (stored[found.ids[0, 0]] == stored[7]).all()
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-6)

    def test_local_features_are_of_images_that_the_user_gives(self, whole, tmp_path):
        """Not of a folder that shards name, which somebody else may have made."""
        (tmp_path / "other").mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / "other/a.png")
        given = ("index", f"shards={whole}", f"out={tmp_path}/c", "verify=sift")
        assert "verify= needs images=<what they were made of>" in simsearch(*given, expect=1).stderr
        said = simsearch(*given, f"images={tmp_path}/other", expect=1).stderr
        assert "images of the shards are not in images=" in said
        assert not (tmp_path / "c").exists()

    def test_nothing_readable(self, run, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images/a.png").write_text("no image")
        done = extract(run, tmp_path, tmp_path / "s")
        assert "0 images in 1 shards" in done.stdout
        assert "none of the 1 images" in simsearch("index", f"shards={tmp_path}/s", expect=1).stderr

    def test_missing_shards_are_counted(self, copied):
        for number in (1, 5, 10):
            Shards.path(open_shards(copied), number).unlink()
        done = simsearch("index", f"shards={copied}", expect=1)
        assert "3 of the 11 shards" in done.stderr

    @pytest.mark.filterwarnings("ignore:.*fewer than the")
    @pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "PQ4x4", "HNSW8", "BFlat", "BIVF4"])
    @pytest.mark.parametrize("total", [300, 90, 33])
    def test_cuts_do_not_change_an_index(self, factory, total, monkeypatch):
        monkeypatch.setattr(writing, "_ADDED", 64)
        generator = torch.Generator().manual_seed(total)
        vectors = torch.randn(total, 16, generator=generator)
        if factory[0] == "B":
            vectors = torch.randint(0, 256, (total, 4), generator=generator, dtype=torch.uint8)
        answers, sizes = [], []
        for cuts in ([total], [1, total - 9, 8], [7] * (total // 7) + [total % 7], [0, 64, 0, total - 64, 0]):
            if min(cuts) < 0:
                continue
            parts = vectors.split(cuts)
            index = FaissIndex(factory, train_size=100, seed=3)
            fill_index(index, cuts, lambda part, parts=parts: parts[part])
            assert len(index) == total
            sizes.append(index.bytes_per_item)
            answers.append(index.search(vectors[:20], 5))
        for answer in answers[1:]:
            assert torch.equal(answer.ids, answers[0].ids)
            assert torch.equal(answer.scores, answers[0].scores)
        # FAISS alone, told everything at once, with its own choice of what trains it
        index = FaissIndex(factory, train_size=100, seed=3)
        index.add(vectors)
        assert index.bytes_per_item == sizes[0]
        if factory != "HNSW8":  # whose graph depends on the blocks that it grows by
            assert torch.equal(index.search(vectors[:20], 5).ids, answers[0].ids)

    def test_groups(self):
        parts = [torch.arange(0, 3), torch.arange(3, 3), torch.arange(3, 14), torch.arange(14, 16)]
        groups = [group.tolist() for group in regroup(parts, 4, torch.cat)]
        assert groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
        assert [group.tolist() for group in regroup(parts, 7, torch.cat)] == [[*range(7)], [*range(7, 14)], [14, 15]]
        assert list(regroup([], 4, torch.cat)) == []


# -------------------------------------------------------------------------------------- chunks, claims


class TestChunks:
    @pytest.mark.parametrize(("fit", "workers"), [("square", 0), ("longest", 0), ("longest", 2)])
    def test_are_batches_of_their_rows_alone(self, fit, workers, folder):
        manifest = read_manifest(folder / "images")
        files = ImageFiles(manifest, size=32, fit=fit)
        chunks = [range(8, 15), range(0, 8), range(15, 16), range(40, 42)]
        seen = []
        for chunk, batches in load_chunks(files, iter(chunks), batch_size=3, workers=workers):
            seen.append(chunk)
            part = ImageFiles(Manifest(manifest.root, manifest.paths[chunk.start : chunk.stop]), size=32, fit=fit)
            for (images, rows, errors), (own, local, other) in zip(
                batches, load_batches(part, batch_size=3), strict=True
            ):
                assert torch.equal(images, own)
                assert rows.tolist() == [chunk[i] for i in local.tolist()]
                assert [str(error) for error in errors] == [str(error) for error in other]
        assert seen == chunks

    def test_a_chunk_is_asked_for_when_it_is_needed(self, folder):
        asked = []

        def chunks():
            for start in range(0, 40, 8):
                asked.append(start)
                yield range(start, start + 8)

        files = ImageFiles(read_manifest(folder / "images"), size=32)
        stream = load_chunks(files, chunks(), batch_size=8)
        assert next(stream)[0] == range(0, 8)
        assert asked == [0]
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            next(load_chunks(files, [], batch_size=0))


class TestClaims:
    def test_one_has_it_until_it_is_released(self, tmp_path, monkeypatch):
        monkeypatch.setattr(claims, "_is_gone", lambda pid: False)
        with Claims(tmp_path) as one, Claims(tmp_path) as other:
            assert one.take(3)
            assert not other.take(3)
            assert other.take(4)
            one.release(3)
            assert other.take(3)
            assert set(claimed(tmp_path)) == {3, 4}
        assert not list(tmp_path.iterdir())

    def test_the_dead_lose_theirs(self, tmp_path):
        process = multiprocessing.get_context("fork").Process(target=lambda: None)
        process.start()
        process.join()
        host = claims.socket.gethostname()
        (tmp_path / "1").write_text(f"{host} {process.pid} 7")
        (tmp_path / "2").write_text(f"{host} {os.getppid()} 7")
        (tmp_path / "3").write_text("")
        with Claims(tmp_path) as own:
            assert own.take(1)
            assert not own.take(2)
            assert not own.take(3)

    def test_those_of_other_machines_are_watched(self, tmp_path, monkeypatch):
        monkeypatch.setattr(claims, "STALE_SECONDS", 0.2)
        (tmp_path / "1").write_text("elsewhere 1 7")
        (tmp_path / "2").write_text("elsewhere 1 7")
        with Claims(tmp_path) as own:
            assert not own.take(1)
            assert not own.take(2)
            time.sleep(0.3)
            os.utime(tmp_path / "2")  # that one lives
            assert own.take(1)
            assert not own.take(2)

    def test_are_renewed_with_what_is_done(self, tmp_path, monkeypatch):
        monkeypatch.setattr(claims, "BEAT_SECONDS", 0.01)
        with Claims(tmp_path) as own:
            assert own.take(5)
            own.advance(5, 12)
            deadline = time.monotonic() + 5
            while claimed(tmp_path) != {5: 12} and time.monotonic() < deadline:
                time.sleep(0.01)
            assert all(claimed(tmp_path) == {5: 12} for _ in range(1000))  # at no moment is it half written
            (tmp_path / "6").write_text("")  # in this moment being written
            assert claimed(tmp_path).keys() == {5}


def test_plan_holds_no_code(whole):
    about = json.loads((whole / "plan/plan.json").read_text())
    assert set(about) >= {"format", "listing", "encoder_fingerprint", "chunk", "thumbnail", "config", "command"}
    assert pq.read_table(whole / "plan/items.parquet").num_rows == IMAGES
    assert {path.suffix for path in whole.rglob("*") if path.is_file()} == {".json", ".npy", ".parquet", ".safetensors"}
