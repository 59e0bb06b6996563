"""The descriptor cache: computed once, resumed, rebuilt when damaged; files whole or not at all."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import simsearch.cache
from simsearch import files
from simsearch.cache import ArrayCache, cache_key
from simsearch.files import is_temporary, read_json, replacing, replacing_folder, write_json

PARTS = {"model": "lite0", "data": "abc", "size": 224}


class Rows:
    """A fill that writes 10 i + j into row i, column j, notes which rows it wrote and may fail at one."""

    def __init__(self, fail_at: int | None = None, block: int = 2) -> None:
        self.fail_at, self.block = fail_at, block
        self.written: list[int] = []

    def __call__(self, array: np.ndarray, start: int) -> Iterator[int]:
        for first in range(start, len(array), self.block):
            stop = min(first + self.block, len(array))
            for row in range(first, stop):
                if row == self.fail_at:
                    raise KeyboardInterrupt
                array[row] = 10 * row + np.arange(array.shape[1])
                self.written.append(row)
            yield stop


def expected(n: int, d: int) -> np.ndarray:
    return (10 * np.arange(n)[:, None] + np.arange(d)).astype("float32")


@pytest.fixture
def cache(tmp_path: Path) -> ArrayCache:
    return ArrayCache(tmp_path / "deep" / "cache")


def test_a_miss_computes_and_a_hit_reads(cache):
    rows = Rows()
    assert PARTS not in cache
    first = cache.get(PARTS, (7, 3), "float32", rows)
    assert PARTS in cache
    np.testing.assert_array_equal(first, expected(7, 3))
    assert rows.written == list(range(7))
    again = cache.get(dict(reversed(PARTS.items())), (7, 3), "float32", rows)
    np.testing.assert_array_equal(again, expected(7, 3))
    assert rows.written == list(range(7))
    other = cache.get(PARTS | {"size": 192}, (7, 3), "float32", rows)
    assert len(rows.written) == 14
    assert len(other) == 7


def test_the_result_is_read_only_and_mapped(cache):
    array = cache.get(PARTS, (4, 3), "float32", Rows())
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_an_entry_names_what_it_is(cache):
    cache.get(PARTS, (4, 3), "float32", Rows())
    entry = cache.root / cache_key(PARTS)
    assert sorted(path.name for path in entry.iterdir()) == ["array.npy", "meta.json"]
    assert read_json(entry / "meta.json") == {
        "parts": PARTS,
        "shape": [4, 3],
        "dtype": "float32",
        "blocks": [[4, hashlib.sha256(expected(4, 3).tobytes()).hexdigest()]],
    }


def test_keys_depend_on_content_alone():
    assert cache_key({"a": 1, "b": [1, 2]}) == cache_key({"b": (1, 2), "a": 1})
    assert cache_key({"a": 1}) != cache_key({"a": 2})
    assert cache_key({"a": 1}) != cache_key({"a": "1"})
    assert len(cache_key({})) == 32


def test_an_interrupted_job_is_resumed(cache, monkeypatch):
    monkeypatch.setattr(simsearch.cache, "_SAVE_BYTES", 1)  # save after every block
    broken = Rows(fail_at=5)
    with pytest.raises(KeyboardInterrupt):
        cache.get(PARTS, (9, 3), "float32", broken)
    assert PARTS not in cache
    assert broken.written == [0, 1, 2, 3, 4]
    assert not list(cache.root.rglob("meta.json"))
    second = Rows()
    array = cache.get(PARTS, (9, 3), "float32", second)
    assert second.written == [4, 5, 6, 7, 8]  # the block of row 4 was not done
    np.testing.assert_array_equal(array, expected(9, 3))
    assert not list(cache.root.glob("*.partial"))


def test_progress_is_saved_at_intervals(cache, monkeypatch):
    monkeypatch.setattr(simsearch.cache, "_SAVE_BYTES", 4 * 3 * 4)  # four rows
    with pytest.raises(KeyboardInterrupt):
        cache.get(PARTS, (20, 3), "float32", Rows(fail_at=11))
    (progress,) = cache.root.rglob("progress.json")
    digests = [hashlib.sha256(expected(8, 3)[rows].tobytes()).hexdigest() for rows in (slice(4), slice(4, 8))]
    assert read_json(progress)["blocks"] == [[4, digests[0]], [8, digests[1]]]


def test_a_job_that_died_before_the_last_rename_only_finishes(cache, monkeypatch):
    monkeypatch.setattr(simsearch.cache.os, "replace", _fail_on_folders(os.replace))
    with pytest.raises(OSError, match="killed"):
        cache.get(PARTS, (4, 3), "float32", Rows())
    monkeypatch.undo()
    assert PARTS not in cache
    rows = Rows()
    np.testing.assert_array_equal(cache.get(PARTS, (4, 3), "float32", rows), expected(4, 3))
    assert rows.written == []


def _fail_on_folders(replace):
    def replaced(source, target):
        if Path(source).is_dir():
            raise OSError("killed")
        replace(source, target)

    return replaced


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "gone", "pickle"])
def test_a_damaged_array_is_rebuilt(cache, damage):
    cache.get(PARTS, (50, 3), "float32", Rows())
    path = cache.root / cache_key(PARTS) / "array.npy"
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not an array")
    elif damage == "pickle":
        np.save(path, np.array([object()]), allow_pickle=True)
    rows = Rows()
    np.testing.assert_array_equal(cache.get(PARTS, (50, 3), "float32", rows), expected(50, 3))
    assert len(rows.written) == 50


@pytest.mark.parametrize("damage", ["progress.json", "array.npy", "other shape"])
def test_damaged_beginnings_are_started_again(cache, monkeypatch, damage):
    monkeypatch.setattr(simsearch.cache, "_SAVE_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        cache.get(PARTS, (9, 3), "float32", Rows(fail_at=5))
    if damage != "other shape":
        (path,) = cache.root.rglob(damage)
        path.write_bytes(b"")
    shape = (8, 3) if damage == "other shape" else (9, 3)
    rows = Rows()
    np.testing.assert_array_equal(cache.get(PARTS, shape, "float32", rows), expected(*shape))
    assert rows.written == list(range(shape[0]))


@pytest.mark.parametrize("denied", ["lock", "entry", "partial"])
def test_what_another_user_left_is_told_before_the_work(denied, cache, monkeypatch):
    """In a cache that a group shares: a missing entry, a damaged one and one that is half made."""
    entry = cache.root / cache_key(PARTS)
    (entry if denied == "entry" else entry.with_name(f"{entry.name}.partial")).mkdir(parents=True)

    def deny(*_: object, **options: object) -> None:
        if not options.get("ignore_errors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(*(simsearch.cache.FileLock, "acquire") if denied == "lock" else (shutil, "rmtree"), deny)
    rows = Rows()
    with pytest.raises(OSError, match=r"another user's .*: set SIMSEARCH_CACHE to a folder of your own"):
        cache.get(PARTS, (7, 3), "float32", rows)
    assert rows.written == []


def test_another_shape_or_dtype_is_rebuilt(cache):
    cache.get(PARTS, (4, 3), "float32", Rows())
    assert cache.get(PARTS, (5, 3), "float32", Rows()).shape == (5, 3)
    assert cache.get(PARTS, (5, 3), "float16", Rows()).dtype == np.float16


def test_no_rows(cache):
    assert cache.get(PARTS, (0, 3), "float32", Rows()).shape == (0, 3)
    assert PARTS in cache


def test_too_few_rows_are_no_entry(cache):
    def lazy(array: np.ndarray, start: int) -> Iterator[int]:
        yield 3

    with pytest.raises(RuntimeError, match="4 rows were announced to the cache"):
        cache.get(PARTS, (4, 3), "float32", lazy)
    assert PARTS not in cache


def test_a_full_disk_is_said_before_the_work(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 60, 40))
    rows = Rows()
    with pytest.raises(OSError, match="on a larger disk"):
        cache.get(PARTS, (4, 3), "float32", rows)
    assert rows.written == []
    monkeypatch.undo()
    assert len(cache.get(PARTS, (4, 3), "float32", rows)) == 4


def _slow_job(root: str, notes: str, start: float) -> None:
    def fill(array: np.ndarray, first: int) -> Iterator[int]:
        (Path(notes) / str(os.getpid())).touch()
        for row in range(first, len(array)):
            time.sleep(0.1)
            array[row] = row
            yield row + 1

    time.sleep(max(0.0, start - time.time()))
    array = ArrayCache(root).get(PARTS, (5, 2), "float32", fill)
    assert array[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_two_jobs_compute_an_entry_once(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    context = multiprocessing.get_context("spawn")
    start = time.time() + 1.0
    jobs = [context.Process(target=_slow_job, args=(str(tmp_path / "cache"), str(notes), start)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert len(list(notes.iterdir())) == 1


def test_the_root_may_name_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ArrayCache("~/cache").get(PARTS, (2, 2), "float32", Rows())
    assert (tmp_path / "cache" / cache_key(PARTS) / "array.npy").is_file()


def test_files_are_whole_or_unchanged(tmp_path):
    path = tmp_path / "new" / "value.json"
    write_json(path, {"a": [1, 2]})
    assert read_json(path) == {"a": [1, 2]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_json(path) == {"a": [1, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


# ------------------------------------------------------------------------------------- full disks, kills


def test_an_entry_has_its_place_on_the_disk_before_it_is_filled(cache):
    """Else a disk that is full ends the process by SIGBUS, at a page that is written to."""

    def fill(array: np.ndarray, start: int) -> Iterator[int]:
        (path,) = cache.root.glob("*.partial/array.npy")
        assert path.stat().st_blocks * 512 >= array.nbytes
        yield len(array)

    cache.get(PARTS, (4096, 64), "float32", fill)


def test_a_full_disk_is_told_and_leaves_nothing(cache, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"the disk of the cache .*/deep/cache is full .*SIMSEARCH_CACHE"):
        cache.get(PARTS, (9, 3), "float32", Rows())
    assert not list(cache.root.glob("*.partial"))
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: _raise(OSError(errno.EOPNOTSUPP, "not supported")))
    np.testing.assert_array_equal(cache.get(PARTS, (9, 3), "float32", Rows()), expected(9, 3))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a small disk: SKIPPED")
def test_a_disk_that_fills_while_an_entry_is_filled_ends_no_process(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs: SKIPPED")

    def fill(array: np.ndarray, start: int) -> Iterator[int]:
        with suppress(OSError), (disk / "other").open("wb") as file:  # another program takes what is left
            file.write(bytes(4 * 2**20))
        array[:] = 1
        yield len(array)

    def work() -> None:
        for size in (0, 1):  # the first finds the disk filled meanwhile, the second from the beginning
            with pytest.raises(OSError, match=r"the disk of the cache .* is full|needs .* GiB and its disk has"):
                ArrayCache(disk / "cache").get(PARTS | {"size": size}, (2**19,), "float32", fill)

    try:
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join()
        assert process.exitcode == 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_writing_takes_away_what_the_dead_left_of_the_same_file(tmp_path):
    dead = multiprocessing.get_context("fork").Process(target=lambda: None)
    dead.start()
    dead.join()
    machine = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    other = "0" * 8 if machine != "0" * 8 else "1" * 8
    ours, theirs = f".{machine}-{dead.pid}-0.a.json", f".{machine}-{os.getppid()}-0.a.json"
    elsewhere, forgotten = f".{other}-1-0.a.json", f".{other}-1-1.a.json"
    names = [ours, theirs, elsewhere, forgotten, ".1a2b3c4d.a.json", ".notes.a.json", f".{machine}-{dead.pid}-0.b.json"]
    for name in names:
        (tmp_path / name).write_text("left")
    for name in (forgotten, ".1a2b3c4d.a.json"):
        os.utime(tmp_path / name, (0, 0))
    with replacing(tmp_path / "a.json") as one, replacing(tmp_path / "a.json") as two:  # neither takes the other's
        one.write_text("1")
        two.write_text("2")
        assert is_temporary(one.name)
        assert one != two
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.json", theirs, elsewhere, ".notes.a.json", f".{machine}-{dead.pid}-0.b.json"}
    assert (tmp_path / "a.json").read_text() == "1"
    assert not is_temporary(".notes.a.json")


def test_a_folder_takes_the_place_of_another_whole(tmp_path):
    folder = tmp_path / "f"
    for content in ("first", "second"):
        with replacing_folder(folder) as temporary:
            (temporary / "x").write_text(content)
        assert (folder / "x").read_text() == content
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder) as temporary:
        raise KeyboardInterrupt
    assert (folder / "x").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_that_is_replaced_is_never_missing(at_once, tmp_path, monkeypatch):
    """Where folders cannot be exchanged, it is missing between two moves, and `restore` brings it back."""
    folder, missing = tmp_path / "f", []
    if not at_once:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("only Linux exchanges folders")
    is_file, there = os.path.isfile, str(folder / "x")

    def look(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call") and not is_file(there):
            missing.append(argument)

    with replacing_folder(folder) as temporary:
        (temporary / "x").write_text("first")
    sys.setprofile(look)
    try:
        with replacing_folder(folder) as temporary:
            (temporary / "x").write_text("second")
    finally:
        sys.setprofile(None)
    assert bool(missing) != at_once
    assert (folder / "x").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def _raise(error: Exception) -> None:
    raise error
