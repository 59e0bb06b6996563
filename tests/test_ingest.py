"""Collections from strangers: a folder of broken files, tables of every kind, kills, and what is made of them."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import struct
import tempfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import simsearch, start_forkserver
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from simsearch.commands import data_ingest
from simsearch.data.image_folder import FilesDataModule
from simsearch.data.ingest import pipeline as module
from simsearch.data.ingest import pixel_store as pixels
from simsearch.data.ingest.cleaning import clean, period_of, year_of
from simsearch.data.ingest.decisions import Decisions
from simsearch.data.ingest.pipeline import Decoding, band, decode_file
from simsearch.data.ingest.report import EXPLAINED
from simsearch.data.ingest.source import read_listing
from simsearch.data.manifest import read_manifest
from simsearch.data.process_pool import BoundedPool, Closed, Failure, bounded_map
from simsearch.data.protocols import ByAttribute
from simsearch.data.tables import decode_text
from simsearch.files import is_alive
from simsearch.functional.ragged import Ragged
from simsearch.images import read_image

BASE = ("near.descriptors=false", "workers=1")


def picture(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A picture of coarse random colours, far from all others by perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def put(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are not there."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def write_broken(root: Path) -> None:
    """Five sound files among what a crawl brings home."""
    put(root / "Monet" / "water_lilies.jpg", picture(1))
    put(root / "Monet" / "cmyk.jpg", picture(2).convert("CMYK"))
    put(root / "Degas" / "animated.gif", picture(3), save_all=True, append_images=[picture(4)])
    put(root / "Degas" / "naïve ☃, 'quoted'.png", picture(5))
    deep = np.asarray(picture(6).convert("L")).astype(np.uint16) * 257
    put(root / "Degas" / "deep.png", Image.fromarray(deep))
    whole = (root / "Monet" / "water_lilies.jpg").read_bytes()
    bad = root / "bad"
    bad.mkdir()
    (bad / "double.jpg").write_bytes(whole)
    (bad / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("no image at all")
    (bad / "bomb.png").write_bytes(png_claiming(50_000, 50_000))
    (bad / "huge.png").write_bytes(png_claiming(30_000, 20_000))
    put(bad / "tiny.png", picture(7, (16, 200)))
    put(bad / "blank.png", Image.new("RGB", (64, 64), "white"))
    outside = put(root.parent / "outside" / "secret.png", picture(8))
    (bad / "link.png").symlink_to(outside)
    (bad / "dangling.png").symlink_to("nothing.png")
    (root / "linked").symlink_to(outside.parent)
    os.mkfifo(bad / "pipe.jpg")
    (bad / "notes.txt").write_text("notes")
    Path(os.fsdecode(os.fsencode(bad) + b"/\xff\xfe.png")).write_bytes(whole)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[Path, Path, str]:
    """The folder of broken files, its ingest, and what the command said."""
    root = tmp_path_factory.mktemp("broken")
    write_broken(root / "art")
    done = simsearch("data", "ingest", f"images={root / 'art'}", f"out={root / 'out'}", "size=64", *BASE)
    return root / "art", root / "out", done.stdout


def rejected(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "rejected.csv").open(newline="", encoding="utf-8") as file:
        return {line["path"]: (line["reason"], line["detail"]) for line in csv.DictReader(file)}


def test_broken_files_neither_stop_nor_fool_it(broken):
    _, out, said = broken
    table = pq.read_table(out / "manifest.parquet").to_pydict()
    assert table["path"] == [
        "Degas/animated.gif",
        "Degas/deep.png",
        "Degas/naïve ☃, 'quoted'.png",
        "Monet/cmyk.jpg",
        "Monet/water_lilies.jpg",
    ]
    assert table["artist"] == ["Degas"] * 3 + ["Monet"] * 2
    assert table["title"][4] == "water lilies"
    assert (table["width"], table["height"]) == ([80] * 5, [60] * 5)
    reasons = {path: reason for path, (reason, _) in rejected(out).items()}
    assert reasons == {
        "bad/truncated.jpg": "truncated",
        "bad/empty.jpg": "empty",
        "bad/text.jpg": "not-an-image",
        "bad/bomb.png": "too-many-pixels",
        "bad/huge.png": "too-many-pixels",
        "bad/tiny.png": "too-small",
        "bad/blank.png": "blank",
        "bad/double.jpg": "duplicate",
        "bad/link.png": "path-leaves-root",
        "bad/dangling.png": "missing",
        "bad/pipe.jpg": "not-a-file",
        "bad/\\udcff\\udcfe.png": "name-not-utf8",
        "linked": "linked-folder",
    }
    assert rejected(out)["bad/double.jpg"][1] == "kept: Monet/water_lilies.jpg"
    report = json.loads((out / "report.json").read_text())
    assert {reason: entry["count"] for reason, entry in report["rejected"].items()} == Counter(reasons.values())
    assert (report["accepted"], report["skipped"]) == (5, {"other ending": 1})
    assert "refused 2: too-many-pixels" in said
    page = (out / "report.md").read_text()
    assert "| truncated | 1 | it is cut off: it ends before its image does | bad/truncated.jpg" in page
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.size[0] > 300


def test_the_shards_hold_what_reading_the_files_gives(broken):
    art, out, _ = broken
    manifest = read_manifest(out)
    assert (manifest.root, len(manifest)) == (art, 5)
    protocol = ByAttribute("a", attribute="artist", junk=None, group="work", evaluation=0.5, validation=None)
    data = FilesDataModule(protocol, str(out), size=48, fit="longest", cache="/nonexistent")
    data.prepare_data()
    collection = data.read()
    assert isinstance(collection.images, Ragged)
    for path, image in zip(manifest.paths, collection.images, strict=True):
        assert torch.equal(image, read_image(art / path, size=64, fit="longest"))
    assert collection.classes[collection.attributes.index("artist")] == ("Degas", "Monet")
    collection.images[0][:] = 0  # in memory alone
    assert data.read().images[0].any()
    # One fingerprint of the files, however they are decoded.
    square = FilesDataModule(protocol, str(out), size=16, fit="square", cache=str(out.parent / "cache")).read()
    assert square.images.shape == (5, 3, 16, 16)
    assert square.fingerprint == collection.fingerprint
    with pytest.raises(
        ValueError, match=r"ingested at 64 pixels, but data.size=65 is larger: ingest again with size=65"
    ):
        FilesDataModule(protocol, str(out), size=65, fit="longest", cache="/nonexistent").prepare_data()


def numbered(folder: Path, count: int) -> Path:
    """A table of so many images, two of them one picture twice saved."""
    lines = []
    for i in range(count):
        put(folder / f"{i:02}.jpg", picture(1000 + max(i, 1), (50 + i, 60)), quality=95 if i else 80)
        lines.append(f"{i:02}.jpg,{'Claude Monet' if i % 2 else 'claude  monet'},c. 18{50 + i}")
    (folder / "08.jpg").write_bytes(b"broken")
    table = folder / "table.csv"
    table.write_text("\n".join(["Image_Path,ARTIST,Year", *lines]) + "\n")
    return table


def snapshot(out: Path) -> dict[str, bytes]:
    """All that an ingest leaves, by name."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_kills_and_workers_change_nothing(tmp_path, monkeypatch):
    table = numbered(tmp_path / "art", 12)
    say = ("data", "ingest", f"images={table}", "size=40", "chunk=5", "near.descriptors=false")
    simsearch(*say, f"out={tmp_path / 'straight'}", "workers=1")
    real, written = pixels.write_shard, []

    def killed(folder, number, start, items):
        written.append(number)
        if written == [0, 1]:  # in the midst of a shard, some of its pixels written
            next(iter(items))
            with (folder / "pixels.bin").open("ab") as file:
                file.write(b"left over")
            raise KeyboardInterrupt
        return real(folder, number, start, items)

    monkeypatch.setattr(module, "write_shard", killed)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        simsearch(*say, f"out={out}", "workers=2")
    with pytest.raises(ValueError, match=r"is not finished: run the same"):
        read_manifest(out)
    simsearch(*say, f"out={out}", "workers=3")
    assert written == [0, 1, 1, 2]
    assert snapshot(out) == snapshot(tmp_path / "straight")
    again = simsearch(*say, f"out={out}", "workers=1")
    assert written == [0, 1, 1, 2]  # nothing is decoded
    assert "11 images of 10 works" in again.stdout  # 00.jpg is 01.jpg in another quality
    assert snapshot(out) == snapshot(tmp_path / "straight")


def test_another_setting_or_changed_files_are_refused(broken, tmp_path):
    art, out, _ = broken
    say = ("data", "ingest", f"images={art}")
    other = simsearch(*say, f"out={out}", "size=65", *BASE, expect=1).stderr
    assert "was begun with another settings {'size': 64" in other
    inside = simsearch(*say, f"out={art / 'out'}", *BASE, expect=1).stderr
    assert "lies in the folder of images" in inside
    (tmp_path / "mine.txt").write_text("x")
    strange = simsearch(*say, f"out={tmp_path}", *BASE, expect=1).stderr
    assert "holds other files (mine.txt)" in strange
    put(art / "Monet" / "new.png", picture(77))
    try:
        changed = simsearch(*say, f"out={out}", "size=64", *BASE, expect=1).stderr
    finally:
        (art / "Monet" / "new.png").unlink()
    assert "was begun with another images" in changed


# ------------------------------------------------------------------------------ bounds


def slow(item: int) -> int:
    if item == 2:
        time.sleep(60)
    if item == 5:
        os.kill(os.getpid(), 9)
    if item == 7:
        try:
            return len(bytearray(2**31))
        except MemoryError:
            return -7
    return item * item


def test_an_item_may_be_slow_greedy_or_deadly():
    started = time.monotonic()
    got = list(bounded_map(slow, range(10), workers=2, seconds=0.5, memory=2**28))
    assert time.monotonic() - started < 30
    assert got[2] == Failure("too-slow", "it took more than 0.5 s")
    assert got[5] == Failure("crashed", "decoding it crashed the process (signal 9)")
    assert got[7] == -7
    assert [got[i] for i in (0, 1, 3, 4, 6, 8, 9)] == [0, 1, 9, 16, 36, 64, 81]
    with pytest.raises(ZeroDivisionError):
        list(bounded_map(lambda x: 1 // x, [1, 0, 1], workers=1, seconds=9, memory=2**28))
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        list(bounded_map(slow, [1], workers=0, seconds=9, memory=2**28))


def test_a_stall_or_a_kill_costs_no_item(tmp_path):
    def work(item: int) -> int:
        first = not (tmp_path / str(item)).exists()
        (tmp_path / str(item)).touch()
        if first and item == 3:
            time.sleep(60)  # as if the disk stalled
        if first and item == 5:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short
        return item

    assert list(bounded_map(work, range(8), workers=2, seconds=1.0, memory=2**28)) == list(range(8))


def test_results_wait_and_who_is_to_blame_is_exact():
    """While the results of a process lie unread, it goes on; then only the item that it was killed at is blamed."""

    def work(item: int) -> int:
        (folder / str(item)).touch()
        if item == 5:
            time.sleep(60)
        return item

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = bounded_map(work, range(20), workers=1, seconds=1.0, memory=2**28)
        assert next(found) == 0
        deadline = time.monotonic() + 20
        while not (folder / "5").exists():  # nobody takes the results of 1 to 4
            assert time.monotonic() < deadline
            time.sleep(0.01)
        rest = list(found)
    assert rest == [1, 2, 3, 4, Failure("too-slow", "it took more than 1 s"), *range(6, 20)]


def test_processes_end_with_the_one_that_started_them(tmp_path):
    def sleep(item: int) -> None:
        (tmp_path / f"{os.getpid()}").touch()
        time.sleep(600)

    context = multiprocessing.get_context("fork")
    parent = context.Process(target=lambda: list(bounded_map(sleep, range(4), workers=2, seconds=900, memory=2**28)))
    parent.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.join()
    while any(is_alive(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pool_for_many_threads():
    start_forkserver()
    pool, taken = BoundedPool(2, seconds=600.0, memory=2**28), list[float]()
    assert pool.call(divmod, 7, 2, spent=taken.append) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        pool.call(divmod, 7, 0, spent=taken.append)
    assert pool.call(time.sleep, 0.1, spent=taken.append) is None
    assert pool.call(os._exit, 3) == Failure("crashed", "decoding it crashed the process (exit status 3)")
    impatient = BoundedPool(1, seconds=0.5, memory=2**28)
    assert impatient.call(time.sleep, 60, spent=taken.append) == Failure("too-slow", "it took more than 0.5 s")
    impatient.close()
    assert len(taken) == 4
    assert taken[2] >= 0.1
    assert taken[3] >= 0.5
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda i: pool.call(pow, i, 2), range(40))) == [i**2 for i in range(40)]
    endless = BoundedPool(1, seconds=600.0, memory=2**28)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(endless.call, time.sleep, 600)
        while not endless._all or next(iter(endless._all)).begun[0] != 0:
            time.sleep(0.01)
        endless.close()
        with pytest.raises(Closed):
            waiting.result(20)
    with pytest.raises(Closed):
        endless.call(divmod, 1, 1)
    pool.close()


def test_a_slow_or_greedy_image_is_refused_and_the_rest_goes_on(tmp_path, monkeypatch):
    for i in range(4):
        put(tmp_path / "art" / f"{i}.png", picture(i))
    real = module.read_image

    def hanging(data, **options):
        if data == (tmp_path / "art" / "1.png").read_bytes():
            time.sleep(60)
        if data == (tmp_path / "art" / "2.png").read_bytes():
            torch.empty(2**33, dtype=torch.uint8)
        return real(data, **options)

    monkeypatch.setattr(module, "read_image", hanging)
    out = tmp_path / "out"
    simsearch("data", "ingest", f"images={tmp_path / 'art'}", f"out={out}", "seconds=1", "memory=0.5", *BASE)
    assert {path: reason for path, (reason, _) in rejected(out).items()} == {
        "1.png": "too-slow",
        "2.png": "too-much-memory",
    }
    assert read_manifest(out).paths == ("0.png", "3.png")


def test_a_larger_image_is_reduced_and_a_smaller_one_is_not_enlarged(tmp_path):
    large, small = put(tmp_path / "l.png", picture(1, (90, 45))), put(tmp_path / "s.png", picture(2, (50, 40)))
    pixels, facts = decode_file(str(large), Decoding(size=60))
    assert pixels.shape == (3, 30, 60)
    assert facts["sides"].tolist() == [45, 90]
    pixels, facts = decode_file(str(small), Decoding(size=60))
    assert np.array_equal(pixels, np.asarray(Image.open(small)).transpose(2, 0, 1))


def test_what_was_filled_up_below_is_noticed():
    image = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8)
    assert band(image) == 0
    image[:, 24:] = torch.randint(126, 130, (3, 16, 30))
    assert band(image) == 16 / 40
    image[:, :10] = 255  # a margin above as well
    assert band(image) == 6 / 40


def test_the_largest_mapping_needs_no_memory(tmp_path):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(2**40)
    mapped = pixels.map_pixels(path, 2**40)
    mapped[2**39] = 7
    assert (len(mapped), int(mapped[2**39]), int(mapped[5])) == (2**40, 7, 0)
    with pytest.raises(ValueError, match="was cut off"):
        pixels.map_pixels(path, 2**40 + 1)


# ------------------------------------------------------------------------------ tables


@pytest.fixture
def two(tmp_path) -> Path:
    put(tmp_path / "a.png", picture(1))
    put(tmp_path / "sub" / "é.png", picture(2))
    return tmp_path


@pytest.mark.parametrize(
    ("encoding", "note"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", "it is UTF-16"),
        ("cp1252", "it is not UTF-8 (byte 0xe9, line 3) and was read as cp1252"),
    ],
)
def test_tables_of_any_encoding(two, encoding, note):
    table = two / "t.csv"
    table.write_bytes("Path;Artist Name\na.png;Dürer’s\nsub/é.png;Édouard\n".replace("Dürer’s", "x").encode(encoding))
    listing = read_listing(table)
    assert listing.paths == ("a.png", "sub/é.png")
    assert listing.attributes == {"artist_name": ("x", "Édouard")}
    assert [n for n in listing.notes if "UTF" in n] == ([note] if note else [])
    assert decode_text("’".encode("cp1252"))[0] == "’"


def test_bad_rows_cost_themselves_alone(two):
    (two / "out.png").symlink_to("/etc/hostname")
    lines = [
        'path,title,artist,path',
        'a.png,"two',
        'lines",Monet,',
        ",nothing,Monet,",
        "/etc/passwd,x,y,",
        "C:\\art\\x.png,x,y,",
        "../up.png,x,y,",
        "out.png,x,y,",
        "short.png",
        "long.png,a,b,c,d,e",
        'lost.png,"never closed,Monet,',
        "sub\\é.png,12\" canvas,Degas,,,",
        "./a.png,,,",
        "gone.png,x,y,",
        "",
    ]  # fmt: skip
    (two / "t.csv").write_text("\n".join(lines))
    listing = read_listing(two / "t.csv")
    assert listing.paths == ("a.png", "sub/é.png", "gone.png")
    assert listing.attributes["title"] == ("two\nlines", '12" canvas', "x")
    assert listing.attributes["artist"] == ("Monet", "Degas", "y")
    assert [(one.reason, one.path) for one in listing.rejected] == [
        ("row-ragged", "short.png"),
        ("row-ragged", "long.png,a,b,c,d,e"),
        ("row-unclosed", 'lost.png,"never closed,Monet,'),
        ("path-empty", ""),
        ("path-absolute", "/etc/passwd"),
        ("path-absolute", "C:\\art\\x.png"),
        ("path-climbs", "../up.png"),
        ("path-leaves-root", "out.png"),
        ("path-twice", "a.png"),
    ]
    assert {one.reason for one in listing.rejected} <= set(EXPLAINED)


def test_text_may_follow_a_quoted_value(two):
    lines = ["path,title,artist", 'a.png,"Madonna" (study),Monet', 'sub/é.png,"Eve" and "Adam",x', 'b.png,c"d,"e']
    (two / "t.csv").write_text("\n".join(lines))
    listing = read_listing(two / "t.csv")
    assert listing.attributes == {"title": ("Madonna (study)", 'Eve and "Adam"'), "artist": ("Monet", "x")}
    assert [(one.reason, one.path) for one in listing.rejected] == [("row-unclosed", 'b.png,c"d,"e')]


def test_of_a_path_that_comes_twice_the_fuller_row_is_kept(two):
    (two / "t.csv").write_text("path,artist,year\na.png,,\nsub/é.png,x,\na.png,Monet,1880\n")
    listing = read_listing(two / "t.csv")
    assert listing.paths == ("sub/é.png", "a.png")
    assert listing.attributes["year"] == (None, "1880")
    assert listing.rejected[0].detail == "row 1; row 3 is kept"


def test_parquet_without_what_no_table_can_hold(two):
    table = {"image_path": ["a.png"], "embedding": [[1.0, 2.0]], "year": [1885.0], "raw": [b"x"]}
    pq.write_table(pa.table(table), two / "t.parquet")
    listing = read_listing(two / "t.parquet")
    assert list(listing.attributes) == ["year"]
    assert year_of(listing.attributes["year"][0]) == 1885
    assert [note.split("'")[1] for note in listing.notes] == ["embedding", "raw"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", "link,artist\na.png,x\n", r"no column path or image_path; its columns: link, artist"),
        ("t.csv", "", r"no column path or image_path; its columns: none"),
        ("t.csv", "path\n/a\n../b\n", r"lists no image that could be taken \(1 path-absolute, 1 path-climbs\)"),
        ("t.json", "[]", "is neither a folder nor a table"),
        ("t.parquet", "text", "cannot be read as Parquet"),
    ],
)
def test_what_is_no_list_of_images_says_so(two, name, data, message):
    (two / name).write_text(data)
    with pytest.raises(ValueError, match=message):
        read_listing(two / name)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        read_listing(two / "absent")


# ------------------------------------------------------------------------------ attributes


@pytest.mark.parametrize(
    ("text", "year"),
    [
        ("1885", 1885), ("c. 1885", 1885), ("1885-90", 1885), ("1885.0", 1885), ("between 1601 and 1605", 1601),
        ("12.5.1885", 1885), ("ca.1503–1519", 1503), ("842", 842), ("19th century", None), ("", None), (None, None),
        ("0", None), ("18850", None), ("3100", None), ("ca. 1390-1352 B.C.", None), ("1390BC", None), ("-1390", None),
        ("\N{MINUS SIGN}1390", None), ("1353 bis 1336 v. Chr.", None), ("1390 BCE", None), ("1390–1352 B. C. E.", None),
        ("B.C. Koekkoek, 1839", 1839), ("1885 Bcd", 1885),
    ],
)  # fmt: skip
def test_years(text, year):
    assert year_of(text) == year


def test_columns_are_cleaned():
    columns = {
        "artist": ("  Monet ", "monet", "Monet", "unknown", "NaN", None),
        "title": ("monet", "Monet", "E\u0301te\u0301", "unknown", "a\n b", " "),
        "year": ("c. 1874", "1875", "18th c.", None, "1899.0", "n/a"),
    }
    got = clean(columns, ["artist", "genre"])
    assert got.columns == {
        "artist": ("Monet", "Monet", "Monet", None, None, None),
        "title": ("monet", "Monet", "Été", "unknown", "a b", None),
        "year": ("1874", "1875", None, None, "1899", None),
        "year_text": ("c. 1874", "1875", "18th c.", None, "1899.0", None),
        "period": ("1850-1874", "1875-1899", None, None, "1875-1899", None),
    }
    assert got.merges == {"artist": {"Monet": {"monet": 1}}}
    assert (got.unknown, got.unparsed) == ({"artist": 1}, {"18th c.": 1})
    assert period_of(1900) == "1900-1924"


def test_a_table_becomes_a_manifest_with_works(tmp_path):
    art = tmp_path / "art"
    for i in range(5):
        put(art / f"{i}.png", picture(i))
    put(art / "again.jpg", picture(4), quality=90)  # near 4.png
    (art / "copy.png").write_bytes((art / "1.png").read_bytes())
    lines = [
        "Filename,id,Artist,group_id,year,score,sha256",
        "0.png,x,MONET,g1,1870,1,s",
        "1.png,x,Monet,,,1,s",
        "2.png,,Degas,g2,1880,1,s",
        "3.png,y,Monet,g1,1880,1,s",
        "4.png,z,Degas,,,1,s",
        "again.jpg,w,Monet,,,1,s",
        "copy.png,v,Monet,g2,1890,1,s",
    ]
    (art / "t.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    said = simsearch("data", "ingest", f"images={art / 't.csv'}", f"out={out}", *BASE).stdout
    assert "6 images of 3 works" in said
    table = pq.read_table(out / "manifest.parquet").to_pydict()
    assert list(table) == [
        "path", "id", "artist", "group_id", "year", "period", "work", "sha256", "width", "height",
    ]  # fmt: skip
    assert table["path"] == ["0.png", "2.png", "3.png", "4.png", "again.jpg", "copy.png"]  # about 1.png less is known
    assert table["id"][:2] == ["x", table["sha256"][1][:12]]
    assert table["artist"] == ["Monet", "Degas", "Monet", "Degas", "Monet", "Monet"]
    works = table["work"]
    assert works[0] == works[2]  # of one group
    assert works[1] == works[5]  # of one group
    assert works[3] == works[4]  # near-duplicates
    assert len(set(works)) == 3
    report = json.loads((out / "report.json").read_text())
    assert report["merges"] == {"artist": {"Monet": {"MONET": 1}}}
    assert report["works"]["of_two_artists_count"] == 2
    assert {"artists": ["Degas", "Monet"], "paths": ["4.png", "again.jpg"]} in report["works"]["of_two_artists"]
    assert report["attributes"]["year"]["known"] == 4
    assert len([note for note in report["notes"] if "left out" in note]) == 2
    about = json.loads((out / "ingest.json").read_text())
    assert (about["images"], about["root"]) == (6, str(art))
    assert read_manifest(out).attributes["artist"] == tuple(table["artist"])


def test_works_of_unknown_artists_are_not_of_one_artist():
    names = ("Unknown artist", "anonymous", "Unidentified Artist", "Monet")
    got = clean({"artist": names, "title": names}, ["artist"])
    assert got.columns == {"artist": (None, None, None, "Monet"), "title": names}
    assert got.unknown == {"artist": 3}


def test_an_unknown_group_ties_nothing(tmp_path):
    names = ["unknown", "unknown", "-", "-", "g", "g"]
    for i in range(len(names)):
        put(tmp_path / "art" / f"{i}.png", picture(i))
    lines = ["path,group", *(f"{i}.png,{name}" for i, name in enumerate(names))]
    (tmp_path / "art" / "t.csv").write_text("\n".join(lines))
    said = simsearch("data", "ingest", f"images={tmp_path / 'art' / 't.csv'}", f"out={tmp_path / 'out'}", *BASE).stdout
    assert "6 images of 5 works" in said


# ------------------------------------------------------------------------------ layouts and formats


def test_wikiarts_layout(tmp_path):
    for name in (
        "Baroque/rembrandt_the-night-watch-1642.jpg",
        "Post_Impressionism/vincent-van-gogh_the-starry-night-1889(1).jpg",
        "Ukiyo_e/hiroshige_rain.jpg",
    ):
        put(tmp_path / name, picture(len(name)))
    listing = read_listing(tmp_path)
    assert listing.attributes["style"] == ("Baroque", "Post Impressionism", "Ukiyo e")
    assert listing.attributes["artist"] == ("rembrandt", "vincent van gogh", "hiroshige")
    assert listing.attributes["title"] == ("the night watch 1642", "the starry night 1889(1)", "rain")
    assert "WikiArt" in listing.notes[0]
    for i in range(2):  # most are not laid out so
        put(tmp_path / "Monet" / f"{i}.jpg", picture(i))
    assert read_listing(tmp_path).attributes["artist"][0] == "Baroque"


def test_excluded_patterns_and_what_is_not_opened(tmp_path):
    for name in ("a/1.png", "a/@eaDir/1.png", "a/1_thumb.png", "tmp/2.png", "a/scan.psd", "a/raw.NEF"):
        put(tmp_path / name, picture(1)) if name.endswith("png") else (tmp_path / name).write_bytes(b"x")
    listing = read_listing(tmp_path)
    assert listing.paths == ("a/1.png", "a/1_thumb.png", "tmp/2.png")
    assert listing.skipped == {"excluded": 1}
    assert [(one.path, one.reason) for one in listing.rejected] == [
        ("a/raw.NEF", "unsupported"),
        ("a/scan.psd", "unsupported"),
    ]
    assert read_listing(tmp_path, exclude=["*_thumb.*", "tmp", "a/@*"]).paths == ("a/1.png",)


def test_images_in_a_table_are_unpacked(tmp_path):
    pictures = [put(tmp_path / f"{i}.png", picture(i)).read_bytes() for i in range(4)]
    rows = [{"bytes": data, "path": f"x/night_{i}.png"} for i, data in enumerate(pictures)]
    rows[2] = {"bytes": None, "path": "gone.png"}
    table = pa.table({"img": rows, "style": [1, 0, 1, None]})
    features = {"style": {"names": ["Baroque", "Cubism"], "_type": "ClassLabel"}, "img": {"_type": "Image"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "t.parquet")
    out = tmp_path / "out"
    say = ("data", "ingest", f"images={tmp_path / 't.parquet'}", f"out={out}", *BASE)
    assert "3 images of 3 works" in simsearch(*say).stdout
    assert "3 images of 3 works" in simsearch(*say).stdout  # again, with what is unpacked
    manifest = read_manifest(out)
    assert manifest.attributes["style"] == ("Cubism", "Baroque", None)
    assert manifest.attributes["title"] == ("night 0", "night 1", "night 3")
    assert (manifest.root / manifest.paths[2]).read_bytes() == pictures[3]
    assert [reason for reason, _ in rejected(out).values()] == ["path-empty"]


def test_an_image_in_a_table_that_changed_is_unpacked_again(tmp_path):
    for content in (b"\x89PNG one", b"\x89PNG two"):
        pq.write_table(pa.table({"image": [{"bytes": content, "path": "a.png"}]}), tmp_path / "t.parquet")
        listing = read_listing(tmp_path / "t.parquet", unpacked=tmp_path / "unpacked")
        assert (listing.root / listing.paths[0]).read_bytes() == content


def test_a_limit_of_megapixels(tmp_path):
    put(tmp_path / "art" / "large.png", picture(1).resize((1100, 1000)))
    put(tmp_path / "art" / "small.png", picture(2))
    say = ("data", "ingest", f"images={tmp_path / 'art'}", *BASE)
    simsearch(*say, f"out={tmp_path / 'some'}", "megapixels=1")
    assert rejected(tmp_path / "some")["large.png"][0] == "too-many-pixels"
    simsearch(*say, f"out={tmp_path / 'all'}", "megapixels=120")
    assert read_manifest(tmp_path / "all").max_pixels == 120_000_000
    assert len(read_manifest(tmp_path / "all")) == 2


# ------------------------------------------------------------------------------ one work


def test_blank_and_equal_files_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("simsearch.data.near_duplicates._MAX_PAIRS", 300)
    for i in range(8):
        put(tmp_path / "art" / f"blank{i}.png", Image.new("L", (64, 64), 100 + i))
        put(tmp_path / "art" / f"equal{i}.png", picture(1))
    put(tmp_path / "art" / "z.png", picture(2))
    put(tmp_path / "art" / "z.jpg", picture(2), quality=90)
    out = tmp_path / "out"
    said = simsearch("data", "ingest", f"images={tmp_path / 'art'}", f"out={out}", *BASE).stdout
    assert "3 images of 2 works" in said
    assert read_manifest(out).paths == ("equal0.png", "z.jpg", "z.png")
    for i in range(8):
        (tmp_path / "art" / f"blank{i}.png").rename(put(tmp_path / "blank" / f"{i}.png", picture(1)))
        put(tmp_path / "alike" / f"{i}.png", picture(1), compress_level=i)
    say = ("data", "ingest", *BASE)
    said = simsearch(*say, f"images={tmp_path / 'blank'}", f"out={tmp_path / 'none'}", expect=1).stderr
    assert "all 8 images that could be decoded are blank" in said
    monkeypatch.setattr("simsearch.data.near_duplicates._MAX_PAIRS", 60)
    said = simsearch(*say, f"images={tmp_path / 'alike'}", f"out={tmp_path / 'many'}", expect=1).stderr
    assert "too many images have the same perceptual hash: leave most of them out" in said


def test_decisions_that_cannot_be_read_are_not_overwritten(tmp_path):
    written = tmp_path / "groups.csv"
    written.write_text("group,path_a,path_b,same,decision\n1,a.jpg,b.jpg,yes,,cut\n")  # one comma too many
    with pytest.raises(ValueError, match=r"line 2: 6 values for 5 columns.*would overwrite"):
        data_ingest.check_decided(written)
    written.write_text("group,path_a,path_b,same,decision\n1,a.jpg,b.jpg,yes,\n")
    data_ingest.check_decided(written)


def test_ids_are_unique_also_where_a_column_holds_one_id_everywhere():
    notes: list[str] = []
    ids = module._ids(("a", "a-2", "a", "a", None, *["7"] * 20_000), ["d" * 64] * 20_005, notes)
    assert ids[:5] == ["a", "a-2", "a-3", "a-4", "d" * 12]
    assert ids[5:8] == ["7", "7-2", "7-3"]  # looking for each number from the start would take minutes
    assert len(set(ids)) == len(ids)
    assert notes == ["20001 ids were in use already and got a number appended"]


def test_decisions_on_equal_files_are_on_the_one_that_is_kept():
    decisions = Decisions([(0, 1), (2, 5)], [(1, 3), (0, 4), (4, 5)])
    assert decisions.among([1, 3, 5], {0: 1, 2: 3}) == Decisions([(1, 2)], [(0, 1)])  # 4 is blank


def test_a_turned_copy_is_of_the_work(tmp_path):
    for i in range(6):
        put(tmp_path / "art" / f"{i}.png", picture(100 + i))
    turned = picture(102).transpose(Image.Transpose.ROTATE_90)
    put(tmp_path / "art" / "turned.jpg", turned, quality=80)
    out = tmp_path / "out"
    said = simsearch("data", "ingest", f"images={tmp_path / 'art'}", f"out={out}", *BASE).stdout
    assert "7 images of 6 works" in said
    works = dict(zip(*(pq.read_table(out / "manifest.parquet").to_pydict()[n] for n in ("path", "work")), strict=True))
    assert works["turned.jpg"] == works["2.png"]


def test_a_large_group_is_told_and_not_tied_until_it_is_confirmed(tmp_path):
    for i in range(5):
        put(tmp_path / "art" / f"{i}.jpg", picture(7), quality=80 + i)
        put(tmp_path / "art" / f"other{i}.jpg", picture(50 + i))
    (tmp_path / "art" / "again.jpg").write_bytes((tmp_path / "art" / "0.jpg").read_bytes())  # equal files are one
    out = tmp_path / "out"
    say = ("data", "ingest", f"images={tmp_path / 'art'}", f"out={out}", *BASE)
    said = simsearch(*say, "near.largest=4").stdout
    assert "10 images of 10 works" in said
    assert "1 groups of images look like one work each, but are too large to be joined" in said
    with (out / "suspicious.csv").open(newline="") as file:
        assert [line["path"] for line in csv.DictReader(file)] == [f"{i}.jpg" for i in range(5)]
    assert "near.largest=5 joins them" in (out / "report.md").read_text()
    written, mine = out / "groups.csv", tmp_path / "mine.csv"
    decided = written.read_text().replace(",yes,\n", ",yes,confirm\n", 1)
    written.write_text(decided)
    assert "copy it and give decisions=<copy>" in simsearch(*say, "near.largest=4", expect=1).stderr
    assert written.read_text() == decided
    mine.write_text(decided)
    assert "10 images of 9 works" in simsearch(*say, "near.largest=4", f"decisions={mine}").stdout
    written.unlink()
    said = simsearch(*say, "near.largest=5").stdout  # nothing is decoded again
    assert "10 images of 6 works" in said
    assert not (out / "suspicious.csv").exists()


def page(seed: int, lines: int = 14) -> Image.Image:
    """A page of words, as alike to all others as printed pages are."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (180, 240), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    for line in range(lines):
        text = " ".join("".join(rng.choice(list("aeinorstlm"), rng.integers(2, 9))) for _ in range(5))
        draw.text((14, 12 + 16 * line), text, fill=(30, 30, 30), font=ImageFont.load_default(size=11))
    return image


@pytest.mark.slow
def test_unlike_pages_are_works_of_their_own_and_scans_are_found(tmp_path):
    """With the descriptors of the default, to which all pages are one."""
    for i in range(40):
        put(tmp_path / "art" / f"{i:02}.png", page(i))
        if i < 6:
            scan = ImageEnhance.Contrast(page(i).crop((2, 1, 179, 238)).resize((150, 200))).enhance(0.9)
            put(tmp_path / "art" / f"{i:02}-scan.jpg", scan, quality=75)
    out = tmp_path / "out"
    simsearch("data", "ingest", f"images={tmp_path / 'art'}", f"out={out}", "workers=1")
    table = pq.read_table(out / "manifest.parquet").to_pydict()
    groups: dict[str, set[str]] = {}
    for path, work in zip(table["path"], table["work"], strict=True):
        groups.setdefault(work, set()).add(path[:2])
    assert all(len(group) == 1 for group in groups.values())  # none of two pages
    assert len(groups) <= 41  # of six scans one may be missed


def test_what_to_try_next_fits_a_folder_without_artists(tmp_path):
    for i in range(12):
        put(tmp_path / "art" / f"{i}.png", picture(i))
    said = simsearch("data", "ingest", f"images={tmp_path / 'art'}", f"out={tmp_path / 'out'}", *BASE).stdout
    assert "protocol=by-attribute protocol.attribute=work protocol.group=work" in said
    data = FilesDataModule(
        ByAttribute("x", attribute="work", junk=None, group="work", evaluation=0.2, validation=0.2),
        str(tmp_path / "out"),
        size=48,
        fit="longest",
        cache="/nonexistent",
    )
    data.prepare_data()
    data.setup()  # as that command does: it can be divided


def test_images_that_are_all_alike():
    # 3,000 pages of 16 hashes, 8 bits apart at least: too many pairs within 10 bits, not of equal ones.
    hashes = torch.randint(0, 2, (3000, 1), generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    hashes = torch.cat([hashes, torch.zeros(3000, 7, dtype=torch.uint8)], 1)
    hashes[:, 1:4] = torch.randint(0, 2, (3000, 3), generator=torch.Generator().manual_seed(1)).mul(255).to(torch.uint8)
    files = SimpleNamespace(hashes=hashes, turned=255 - hashes[:, None].repeat(1, 3, 1))
    pairs = data_ingest.by_hash(files, 10)["by hash"]  # type: ignore[arg-type]
    assert (hashes[pairs[:, 0]] == hashes[pairs[:, 1]]).all()
    assert 0 < len(pairs) <= 200 * 3000
