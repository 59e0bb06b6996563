"""Reading CIFAR-10: both layouts, the cache, and every way in which files go wrong."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, utils

import simsearch.data.cifar10 as cifar10
from simsearch.data.cifar10 import ARCHIVE, BATCHES, CLASSES, DataError, read_cifar10
from simsearch.data.collection import Collection
from simsearch.data.protocols import OfficialSplit, SampledSplit, UnseenClasses


def pixels(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, blobs: list, labels: list, column: str = "img") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": blob, "path": None} for blob in blobs]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({column: pa.array(images, kind), "label": labels}), path)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder with 20 training and 10 test images."""
    root = tmp_path / "cifar10"
    write_parquet(root / "train-00000-of-00001.parquet", [png(x) for x in pixels(20, 0)], [*range(10)] * 2)
    write_parquet(root / "test-00000-of-00001.parquet", [png(x) for x in pixels(10, 1)], [*range(10)])
    return root


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 pickled CIFAR-10's: protocol 2, byte strings, numpy's old module names."""

    def string(value: bytes) -> bytes:
        return pickle.BINSTRING + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return pickle.BININT + struct.pack("<i", value)

    def call(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    dtype = call("numpy", "dtype") + string(b"u1") + integer(0) + integer(1) + pickle.TUPLE3 + pickle.REDUCE
    state = pickle.MARK + integer(3) + string(b"|") + pickle.NONE * 3 + integer(-1) * 2 + integer(0)
    dtype += state + pickle.TUPLE + pickle.BUILD
    shape = integer(data.shape[0]) + integer(data.shape[1]) + pickle.TUPLE2
    array = call("numpy.core.multiarray", "_reconstruct") + call("numpy", "ndarray")
    array += integer(0) + pickle.TUPLE1 + string(b"b") + pickle.TUPLE3 + pickle.REDUCE
    content = integer(1) + shape + dtype + pickle.NEWFALSE + string(data.tobytes())
    array += pickle.MARK + content + pickle.TUPLE + pickle.BUILD
    numbers = pickle.EMPTY_LIST + pickle.MARK + b"".join(map(integer, labels)) + pickle.APPENDS
    items = string(b"data") + array + string(b"labels") + numbers
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def publish(monkeypatch: pytest.MonkeyPatch, batches: dict[str, bytes]) -> None:
    """Makes the batches' checksums the published ones."""
    sums = [[name, hashlib.md5(content).hexdigest()] for name, content in batches.items()]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:-1])
    monkeypatch.setattr(CIFAR10, "test_list", sums[-1:])


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Five training batches and a test batch of 4 images each."""
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    content = {
        name: python2_batch(pixels(4, seed).reshape(4, 3072), [seed, 1, 2, 9]) for seed, name in enumerate(names)
    }
    publish(monkeypatch, content)
    return content


def write_batches(root: Path, batches: dict[str, bytes]) -> Path:
    (root / BATCHES).mkdir(parents=True)
    for name, content in batches.items():
        (root / BATCHES / name).write_bytes(content)
    return root


def archive_of(batches: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"{BATCHES}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def check_parquet_content(root: Path) -> None:
    collection = read_cifar10(root)
    assert collection.name == "cifar10"
    assert collection.attributes == ("class",)
    assert collection.classes == (CLASSES,)
    assert torch.equal(collection.images, torch.from_numpy(np.concatenate([pixels(20, 0), pixels(10, 1)])))
    assert collection.column("class").tolist() == [*range(10)] * 3
    assert collection.is_test.tolist() == [False] * 20 + [True] * 10


# Hugging Face's layout


@pytest.mark.parametrize("folder", [".", "data", "plain_text"])
@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_in_each_folder_and_column(tmp_path, folder, column):
    for part, n, seed in (("train", 20, 0), ("test", 10, 1)):
        path = tmp_path / folder / f"{part}-00000-of-00001.parquet"
        write_parquet(path, [png(x) for x in pixels(n, seed)], [*range(10)] * (n // 10), column)
    check_parquet_content(tmp_path)


def test_parquet_shards_are_read_in_order(tmp_path):
    train = [png(x) for x in pixels(20, 0)]
    for shard in range(2):
        path = tmp_path / f"train-{shard:05d}-of-00002.parquet"
        write_parquet(path, train[10 * shard :][:10], [*range(10)])
    write_parquet(tmp_path / "test-0.parquet", [png(x) for x in pixels(10, 1)], [*range(10)])
    check_parquet_content(tmp_path)
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"holds 1 of 2 train-\*\.parquet files: copy all"):
        read_cifar10(tmp_path)


def test_grey_images_become_rgb(parquet):
    grey = Image.fromarray(np.arange(1024, dtype=np.uint16).astype(np.uint8).reshape(32, 32))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    write_parquet(parquet / "test-00000-of-00001.parquet", [buffer.getvalue()], [3])
    image = read_cifar10(parquet).images[-1]
    assert torch.equal(image, torch.from_numpy(np.asarray(grey).copy()).expand(3, 32, 32))


def test_missing_data_name_the_folder_and_the_mend(tmp_path):
    with pytest.raises(DataError, match=r"no CIFAR-10 in .*nowhere.*SIMSEARCH_DATA.*download=true"):
        read_cifar10(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_missing_part(parquet):
    (parquet / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"holds 0 of 1 test-\*\.parquet"):
        read_cifar10(parquet)


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_truncated_parquet(parquet, keep):
    path = parquet / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"cannot read .*train-00000-of-00001\.parquet.*fetch it again"):
        read_cifar10(parquet)


def test_missing_columns(parquet):
    path = parquet / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"img": [1], "fine_label": [2]}), path)
    with pytest.raises(DataError, match=r"test-.*has the columns img, fine_label, expected img"):
        read_cifar10(parquet)
    pq.write_table(pa.table({"img": [b"x"], "label": [2]}), path)
    with pytest.raises(DataError, match=r"test-.*column img is binary, expected struct"):
        read_cifar10(parquet)


@pytest.mark.parametrize(("label", "shown"), [(10, "10"), (-1, "-1"), (None, "-1")])
def test_label_out_of_range(parquet, label, shown):
    path = parquet / "test-00000-of-00001.parquet"
    write_parquet(path, [png(x) for x in pixels(2, 0)], [0, label])
    with pytest.raises(DataError, match=rf"test-.*row 1 has label {shown}, expected 0\.\.9"):
        read_cifar10(parquet)


def test_labels_that_are_no_numbers(parquet):
    path = parquet / "test-00000-of-00001.parquet"
    write_parquet(path, [png(x) for x in pixels(2, 0)], ["cat", "dog"])
    with pytest.raises(DataError, match=r"cannot read .*test-00000-of-00001\.parquet"):
        read_cifar10(parquet)


def test_no_rows(parquet):
    schema = pq.read_schema(parquet / "test-00000-of-00001.parquet")
    pq.write_table(schema.empty_table(), parquet / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"test-.*has no rows"):
        read_cifar10(parquet)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (None, "cannot identify"),
        (b"not an image", "cannot identify"),
        (png(pixels(1, 0)[0])[:500], "truncated"),
        (png(np.zeros((3, 31, 32), np.uint8)), "32x31, expected 32x32"),
    ],
)
def test_unreadable_image(parquet, tmp_path, blob, reason):
    write_parquet(parquet / "test-00000-of-00001.parquet", [png(pixels(1, 0)[0]), blob], [0, 1])
    with pytest.raises(DataError, match=rf"test-.*row 1 holds no readable image \(.*{reason}.*\): fetch"):
        read_cifar10(parquet, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# torchvision's archive


def check_batches_content(root: Path) -> None:
    collection = read_cifar10(root)
    assert torch.equal(collection.images, torch.from_numpy(np.concatenate([pixels(4, seed) for seed in range(6)])))
    assert collection.column("class").tolist() == [x for seed in range(6) for x in (seed, 1, 2, 9)]
    assert collection.is_test.tolist() == [False] * 20 + [True] * 4


def test_batches_of_python2(tmp_path, batches):
    check_batches_content(write_batches(tmp_path, batches))


def test_batches_equal_torchvisions_reading(tmp_path, batches, monkeypatch):
    meta = pickle.dumps({"label_names": list(CLASSES)})
    sums = {"filename": "meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(CIFAR10, "meta", sums)
    write_batches(tmp_path, batches | {"meta": meta})
    ours = read_cifar10(tmp_path)
    for train in (True, False):
        theirs = CIFAR10(tmp_path, train=train)
        part = ours.is_test != train
        assert torch.equal(ours.images[part], torch.from_numpy(theirs.data).permute(0, 3, 1, 2))
        assert ours.column("class")[part].tolist() == theirs.targets


def test_archive_is_read_without_unpacking(tmp_path, batches, monkeypatch):
    content = archive_of(batches)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    (tmp_path / ARCHIVE).write_bytes(content)
    check_batches_content(tmp_path)
    assert os.listdir(tmp_path) == [ARCHIVE]
    (tmp_path / ARCHIVE).write_bytes(content[:-10])
    with pytest.raises(DataError, match=rf"{ARCHIVE} has MD5 .*truncated or altered; delete it"):
        read_cifar10(tmp_path)


def test_archive_without_a_batch(tmp_path, batches, monkeypatch):
    content = archive_of({name: content for name, content in batches.items() if name != "data_batch_3"})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    (tmp_path / ARCHIVE).write_bytes(content)
    with pytest.raises(DataError, match=rf"cannot unpack .*{ARCHIVE}.*data_batch_3"):
        read_cifar10(tmp_path)


def test_missing_and_altered_batch(tmp_path, batches):
    write_batches(tmp_path, batches)
    path = tmp_path / BATCHES / "data_batch_2"
    path.write_bytes(batches["data_batch_2"][:-1])
    with pytest.raises(DataError, match=r"data_batch_2 has MD5 \w+, expected \w+: .*download"):
        read_cifar10(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_2 is missing: delete the folder and unpack"):
        read_cifar10(tmp_path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps(Harmful(), protocol=2), r"mkdir, which is refused"),
        (pickle.dumps({"data": [1]}), "labels"),
        (b"\x80\x02}", "not a CIFAR-10 batch"),
        (python2_batch(pixels(3, 0).reshape(3, 3072), [0, 1]), r"\(3, 3072\) for 2 labels"),
        (python2_batch(pixels(2, 0).reshape(2, 3072), [0, 10]), "row 1 has label 10"),
    ],
)
def test_hostile_and_malformed_batches(tmp_path, batches, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    batches["data_batch_1"] = content
    publish(monkeypatch, batches)
    write_batches(tmp_path, batches)
    with pytest.raises(DataError, match=rf"data_batch_1.*{reason}"):
        read_cifar10(tmp_path)
    assert not (tmp_path / "harm").exists()


# Download


def test_download_leaves_the_archive(tmp_path, batches, monkeypatch):
    content = archive_of(batches)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    calls = []

    def download_url(url, root, filename, md5):
        calls.append((url, md5))
        (Path(root) / filename).write_bytes(content)

    monkeypatch.setattr(utils, "download_url", download_url)
    root = tmp_path / "new"
    for _ in range(2):
        assert len(read_cifar10(root, download=True)) == 24
    assert calls == [(CIFAR10.url, CIFAR10.tgz_md5)]
    assert os.listdir(root) == [ARCHIVE]
    check_batches_content(root)


def test_broken_download_leaves_nothing(tmp_path, monkeypatch):
    def download_url(url, root, filename, md5):
        (Path(root) / filename).write_bytes(b"half")
        raise ConnectionError("no network")

    monkeypatch.setattr(utils, "download_url", download_url)
    with pytest.raises(DataError, match=r"cannot download .*no network.*by hand from http"):
        read_cifar10(tmp_path, download=True)
    assert os.listdir(tmp_path) == []


def test_no_download_where_data_lie(parquet, monkeypatch):
    monkeypatch.setattr(utils, "download_url", None)
    assert len(read_cifar10(parquet, download=True)) == 30


# Cache


def test_cache_holds_what_was_read(parquet, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = read_cifar10(parquet, cache=cache)
    assert len(os.listdir(cache)) == 1
    monkeypatch.setattr(cifar10, "_read_parquet", None)
    second = read_cifar10(parquet, cache=cache)
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.images, first.images)


def test_cache_follows_the_sources(parquet, tmp_path):
    cache = tmp_path / "cache"
    read_cifar10(parquet, cache=cache)
    write_parquet(parquet / "test-00000-of-00001.parquet", [png(pixels(1, 7)[0])], [5])
    changed = read_cifar10(parquet, cache=cache)
    assert len(changed) == 21
    assert torch.equal(changed.images[-1], torch.from_numpy(pixels(1, 7)[0]))
    assert len(os.listdir(cache)) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "pickled", "no digest"])
def test_damaged_cache_is_rebuilt(parquet, tmp_path, damage):
    cache = tmp_path / "cache"
    sound = read_cifar10(parquet, cache=cache).fingerprint
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    flipped = bytearray(content)
    flipped[5000] ^= 1
    pickled = io.BytesIO()
    np.save(pickled, np.array([Harmful()], dtype=object))
    entry.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "flipped": bytes(flipped),
            "emptied": b"",
            "pickled": pickled.getvalue(),
            "no digest": content[:-32],
        }[damage]
    )
    with pytest.warns(UserWarning, match="is damaged: building it again"):
        assert read_cifar10(parquet, cache=cache).fingerprint == sound
    assert entry.read_bytes() == content
    assert list(cache.iterdir()) == [entry]


def test_cache_that_cannot_be_written(parquet, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot write the cache entry"):
        assert len(read_cifar10(parquet, cache=tmp_path / "file" / "cache")) == 30


# The real data


@pytest.fixture(scope="module")
def whole() -> Collection:
    if "SIMSEARCH_DATA" not in os.environ:
        pytest.skip("SIMSEARCH_DATA is not set: the real CIFAR-10 was not read")
    root = Path(os.environ["SIMSEARCH_DATA"]) / "cifar10"
    if not root.is_dir():
        pytest.skip(f"no folder {root}: the real CIFAR-10 was not read")
    return read_cifar10(root)


def test_the_whole_of_cifar10(whole):
    assert whole.images.shape == (60_000, 3, 32, 32)
    assert whole.is_test.nonzero()[:, 0].tolist() == [*range(50_000, 60_000)]
    assert whole.column("class")[:50_000].bincount().tolist() == [5_000] * 10
    assert whole.column("class")[50_000:].bincount().tolist() == [1_000] * 10
    # CIFAR-10's own order begins with a frog, two trucks, a deer and an automobile.
    assert whole.column("class")[:5].tolist() == [6, 9, 9, 4, 1]
    # The training set's mean colour, as published normalisations have it (JPEG shifts it a little).
    mean = torch.stack([whole.images[:50_000, channel].float().mean() for channel in range(3)]) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=2e-3)


def test_protocols_of_the_real_data(whole):
    protocols = {
        "dsh-release": OfficialSplit("dsh-release", gallery="test", exclude_self=False),
        "10k-50k": OfficialSplit("10k-50k", gallery="train", exclude_self=True),
        "1k-54k": SampledSplit("1k-54k", train_in_gallery=False),
        "1k-59k": SampledSplit("1k-59k", train_in_gallery=True),
        "unseen-classes/0": UnseenClasses(),
    }
    sizes = {}
    for name, protocol in protocols.items():
        split = protocol.split(whole)
        assert split.test.name == name
        assert split.test.fingerprint == protocol.split(whole).test.fingerprint
        sizes[name] = len(split.test.query), len(split.test.gallery)
    assert sizes == {
        "dsh-release": (10_000, 10_000),
        "10k-50k": (10_000, 50_000),
        "1k-54k": (1_000, 54_000),
        "1k-59k": (1_000, 59_000),
        "unseen-classes/0": (3_000, 15_000),
    }
