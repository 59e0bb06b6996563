"""Exports of catalogs: what other programs read is what the catalog holds, and an export is replaced as a whole."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import change_items, simsearch
from test_living import OTHERS, ROWS, SIDE, Encoder, made, manifest

import simsearch as package
from simsearch.files import read_json, sha256
from simsearch.images import read_image
from simsearch.search import change, parquet
from simsearch.search.catalog import Catalog, read_catalog
from simsearch.search.parquet import export_parquet
from simsearch.types import Part

pytestmark = pytest.mark.filterwarnings("ignore:.*learns")


@pytest.fixture
def grown(tmp_path):
    """Makes a catalog of two segments and a removed item in one of two folders."""

    def make(factory: str = "Flat", bits: int | None = None, name: str = "c") -> Catalog:
        made(tmp_path / name, manifest(tmp_path / "i", ROWS), Encoder(bits), factory)
        change.update(tmp_path / name, manifest(tmp_path / "i", OTHERS), Encoder(bits), remove=True, fewer=True)
        return read_catalog(tmp_path / name)

    return make


def described(catalog: Catalog, images: Path, bits: int | None) -> np.ndarray:
    """The vectors of the items, from their files."""
    pixels = [read_image(images / path, size=SIDE, fit="square") for path in catalog.items["path"].to_pylist()]
    vectors = Encoder(bits).embed(torch.stack(pixels)).numpy()
    return vectors if bits is None else np.packbits(vectors > 0, axis=1, bitorder="little")


def about(path: Path) -> dict:
    return json.loads(pq.read_schema(path).metadata[b"simsearch"])


@pytest.mark.parametrize(
    ("factory", "bits", "error"),
    [("Flat", None, 1e-6), ("BFlat", 16, 0), ("SQ8", None, 0.05), ("IVF2,SQ8", None, 0.05)],
)
def test_others_read_what_the_catalog_holds(factory, bits, error, grown, tmp_path, monkeypatch):
    catalog = grown(factory, bits)
    assert len(catalog.segments) == 2
    monkeypatch.setattr(parquet, "_GROUP", 2)
    files = export_parquet(catalog, tmp_path / "out", rows=3)
    assert [path.name for path in files] == [f"items-0000{n}.parquet" for n in range(-(-len(catalog) // 3))]
    assert [pq.ParquetFile(path).metadata.row_group(0).num_rows for path in files[:2]] == [2, 2]
    table = pq.read_table(tmp_path / "out")  # the folder: _export.json is no hindrance
    kind = pa.float32() if bits is None else pa.uint8()
    width = 16 if bits is None else 2
    assert table.schema.field("vector").type == pa.list_(kind, width)
    assert table["id"].to_pylist() == catalog.names.numbers.tolist()
    artists = dict(zip(table["path"].to_pylist(), table["artist"].to_pylist(), strict=True))
    assert artists == {path: artist for path, (_, artist) in OTHERS.items()}
    assert table["path"].to_pylist() == catalog.items["path"].to_pylist()
    vectors = np.array(table["vector"].to_pylist())
    expected = described(catalog, tmp_path / "i", bits)
    assert vectors.shape == expected.shape
    differences = np.abs(vectors.astype(float) - expected).max(1)
    came = [name in ("3.png", "9.png") for name in table["path"].to_pylist()]  # after SQ8 had learnt its ranges
    assert differences[~np.array(came)].max() <= error
    assert error > 1e-3 or differences.max() <= error
    found = about(files[-1])
    assert found == {
        "format": 1,
        "catalog": catalog.fingerprint,
        "version": 2,
        "encoder": catalog.about["encoder_fingerprint"],
        "items": len(OTHERS),
        "ids": "numbers of the catalog",
        "metric": "ip" if bits is None else "hamming",
        **({"dimension": 16} if bits is None else {"bits": 16}),
        "parts": {"content": {"start": 0, "stop": 16, "weight": 1.0}},
        "decoded": "SQ8" in factory,
        "index": factory,
    }
    note = read_json(tmp_path / "out" / "_export.json")
    assert note == {**found, "sha256": {path.name: sha256(path) for path in files}}


def test_pandas_reads_the_folder(grown, tmp_path):
    pandas = pytest.importorskip("pandas")
    catalog = grown()
    export_parquet(catalog, tmp_path / "out", rows=3)
    frame = pandas.read_parquet(tmp_path / "out")
    assert np.array_equal(np.stack(frame["vector"]), catalog.index.reconstruct().numpy())


def test_parts_are_said_with_their_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "parts", {"style": Part(0, 6, 0.7), "colour": Part(6, 16, 0.3)})
    catalog = made(tmp_path / "c", manifest(tmp_path / "i", ROWS), Encoder(), "Flat")
    (path,) = export_parquet(catalog, tmp_path / "out")
    assert about(path)["parts"] == {
        "style": {"start": 0, "stop": 6, "weight": 0.7},
        "colour": {"start": 6, "stop": 16, "weight": 0.3},
    }


def test_ids_and_columns_of_the_same_names(grown, tmp_path):
    count = len(made(tmp_path / "c", manifest(tmp_path / "i", ROWS), Encoder(), "Flat"))
    own = [f"0{n}" for n in range(count)]
    change_items(tmp_path / "c", lambda t: t.append_column("id", pa.array(own)).append_column("vector", pa.array(own)))
    (path,) = export_parquet(read_catalog(tmp_path / "c"), tmp_path / "out")
    table = pq.read_table(path)
    assert table.column_names == ["id", "vector", "path", "artist", "attribute:vector"]
    assert table["id"].to_pylist() == own  # as text: 01 is not 1
    assert about(path)["ids"] == "the column id"
    same = ["x"] * count  # names no item
    for name, values in (("id", same), ("attribute:id", own)):
        change_items(
            tmp_path / "c", lambda t, n=name, v=values: pa.table({**{c: t[c] for c in t.column_names}, n: pa.array(v)})
        )
    catalog = read_catalog(tmp_path / "c")
    table = pq.read_table(export_parquet(catalog, tmp_path / "out")[0])
    assert table["id"].to_pylist() == catalog.names.numbers.tolist()
    assert table["attribute:attribute:id"].to_pylist() == same
    assert table["attribute:id"].to_pylist() == own


def test_holds_a_block_in_memory(grown, tmp_path, monkeypatch):
    catalog, asked = grown(), []
    rows = catalog.index.rows
    monkeypatch.setattr(parquet, "_GROUP", 2)
    monkeypatch.setattr(catalog.index, "rows", lambda positions: asked.append(len(positions)) or rows(positions))
    export_parquet(catalog, tmp_path / "out")
    assert max(asked) == 2
    assert sum(asked) == len(catalog)


def test_the_command_and_the_method(grown, tmp_path):
    catalog = grown("SQ8")
    out = tmp_path / "out"
    done = simsearch("catalog", "export", f"catalog={catalog.folder}", f"out={out}", "rows=4")
    assert f"{out}: {len(catalog)} items in 2 files (" in done.stdout
    assert "the vectors are decoded from SQ8" in done.stdout
    assert "export" in done.stderr  # the progress bar
    files = package.open_catalog(catalog.folder).export(out)
    assert [path.name for path in files] == ["items-00000.parquet"]
    assert sorted(path.name for path in out.iterdir()) == ["_export.json", "items-00000.parquet"]


def test_refuses_what_it_would_destroy(grown, tmp_path):
    catalog = grown()

    def refused(*options: str) -> str:
        return simsearch("catalog", "export", f"catalog={catalog.folder}", *options, expect=1).stderr

    assert "to must be parquet, got 'csv'" in refused(f"out={tmp_path}/o", "to=csv")
    assert "rows must be at least 1, got 0" in refused(f"out={tmp_path}/o", "rows=0")
    for inside in (catalog.folder, catalog.folder / "o", catalog.folder / "segments", tmp_path):
        assert "lie in each other" in refused(f"out={inside}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    assert "holds a.jpg and is not an export: give another out=" in refused(f"out={tmp_path}/photos")
    (tmp_path / "photos/_export.json").touch()
    assert "holds a.jpg and is not an export" in refused(f"out={tmp_path}/photos")
    (tmp_path / "p").mkdir()
    (tmp_path / "p/items-00000.parquet").touch()  # another program's
    assert "holds items-00000.parquet and is not an export" in refused(f"out={tmp_path}/p")
    assert "a.jpg is a file and is not an export" in refused(f"out={tmp_path}/photos/a.jpg")
    assert change.problems(catalog.folder) == []
    assert not (tmp_path / "o").exists()


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_full_disk_leaves_the_old_one(grown, tmp_path):
    catalog, out = grown(), tmp_path / "out"
    export_parquet(catalog, out)
    old, names = content(out), sorted(path.name for path in tmp_path.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # no file may grow further: as real as a full disk
    try:
        done = simsearch("catalog", "export", f"catalog={catalog.folder}", f"out={out}", "rows=4", expect=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "simsearch catalog export: " in done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr
    assert "Traceback" not in done.stderr
    assert content(out) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_folder_that_cannot_be_written_leaves_the_old_one(grown, tmp_path, monkeypatch):
    catalog, out = grown(), tmp_path / "out"
    export_parquet(catalog, out)
    old = content(out)
    real = Path.mkdir

    def mkdir(path: Path, *rest, **more) -> None:
        if path.parent == tmp_path and not path.exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, *rest, **more)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    done = simsearch("catalog", "export", f"catalog={catalog.folder}", f"out={out}", expect=1)
    assert "Read-only file system" in done.stderr
    assert content(out) == old


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_the_old_or_the_new(grown, tmp_path):
    """60 kills at seeded random moments, the replacing export always differing from what is there."""
    catalogs = [grown(name=name) for name in ("c", "d")]
    change.remove(tmp_path / "d", ["2"])
    catalogs[1] = read_catalog(tmp_path / "d")
    (tmp_path / "x").mkdir()
    out, whole = tmp_path / "x" / "out", []
    for catalog in catalogs:
        export_parquet(catalog, out, rows=1)
        whole.append(content(out))
    assert whole[0] != whole[1]
    generator, context = random.Random(0), multiprocessing.get_context("fork")
    begun = time.monotonic()
    export_parquet(catalogs[0], out, rows=1)
    seconds = time.monotonic() - begun
    struck, seen = 0, set()
    for kill in range(60):
        process = context.Process(target=export_parquet, args=(catalogs[kill % 2], out), kwargs={"rows": 1})
        process.start()
        time.sleep(generator.uniform(0, 1.5 * seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        struck += process.exitcode == -signal.SIGKILL
        parquet.restore(out)
        assert content(out) in whole
        seen.add(whole.index(content(out)))
        assert sum(path.name != "out" for path in out.parent.iterdir()) <= 2  # cleared by the next one
    assert struck >= 40
    assert seen == {0, 1}
    export_parquet(catalogs[0], out, rows=1)
    assert content(out) == whole[0]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    shutil.rmtree(out)
