"""Bytes that flip, files that end early or are of another folder: named, or the answer is what it would have been."""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import simsearch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import nn

from simsearch import program, saved_run
from simsearch.cache import ArrayCache
from simsearch.commands.data_ingest import describe
from simsearch.comparison.runs import Unreadable, read_run
from simsearch.data import cifar10
from simsearch.data.image_folder import decode_files, open_ingest
from simsearch.data.ingest.pipeline import Decoding
from simsearch.data.ingest.pipeline import begin as begin_ingest
from simsearch.data.ingest.source import read_listing
from simsearch.data.manifest import Manifest, read_manifest
from simsearch.data.revisited import Benchmark, Query, read_benchmark, write_benchmark
from simsearch.files import Damaged, check_zip, digests, read_array, read_json, sha256, write_array, write_json
from simsearch.functional.ragged import ragged
from simsearch.images import ImageError
from simsearch.index.faiss_index import FaissIndex
from simsearch.models import exported
from simsearch.models.backbones import load_state
from simsearch.search.calibration_file import write_calibration
from simsearch.search.catalog import read_catalog
from simsearch.search.encoder_files import load_tensors
from simsearch.search.errors import CatalogError
from simsearch.search.item_tables import item_table
from simsearch.search.items import ThumbnailGroups, write_items
from simsearch.search.shards import begin, open_shards
from simsearch.search.writing import write_catalog
from simsearch.serving.library import Library, Source, Thumbnails
from simsearch.serving.limits import Limits
from simsearch.sweeps.progress import summary
from simsearch.sweeps.trials import Trial, read_trials


@pytest.fixture(params=[40, pytest.param(300, marks=pytest.mark.slow)])
def flips(request) -> int:
    """How many bytes of each file are flipped, one at a time."""
    return request.param


def changes(content: bytes, flips: int, seed: int) -> Iterator[bytes]:
    """A file with one byte flipped at a random place, so many times; then cut off, and with a byte too much."""
    random = np.random.default_rng(seed)
    for _ in range(flips):
        changed = bytearray(content)
        changed[random.integers(len(content))] ^= int(random.integers(1, 256))
        yield bytes(changed)
    yield from (content[:-1], content[: len(content) // 2], b"", content + b"\0")


def damage(files: Iterable[Path], flips: int, read: Callable[[], Any], said: Callable[[], str] | None = None) -> None:
    """Damages file after file and checks that `read` names it in one line, or gives what it gave before.

    said: what standard error got; naming the file there suffices as well.
    """
    want, counts = read(), {}
    for seed, file in enumerate(files):
        content, counts[file.name] = file.read_bytes(), Counter()
        for changed in changes(content, flips, seed):
            file.write_bytes(changed)
            if said:
                said()
            try:
                problem, unchanged = "", same(read(), want)
            except (*program.USER_ERRORS, Unreadable) as error:
                problem = str(error)
            if problem:
                assert "\n" not in problem
                # One that has lost its checksum is read, and then the others do not fit it.
                assert file.name in problem or "of another" in problem
            else:
                problem = "named" if said is not None and file.name in said() else ""
                assert problem or unchanged, f"{file} gives another answer without a word"
            counts[file.name]["named" if problem else "the same answer"] += 1
        file.write_bytes(content)
        assert same(read(), want)
    print(f"flips, and 4 other changes of each file: { ({name: dict(count) for name, count in counts.items()}) }")


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# -------------------------------------------------------------------------------------------- catalogs


class Encoder(nn.Module):
    """As much of an encoder as catalogs and shards ask for."""

    bits, input_size, fit = None, 8, "square"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)))
        self.provenance = {"weights": "random"}

    def identity(self) -> dict[str, object]:
        return {"family": "test"}


N = 1500  # more than one group of rows


def catalog(folder: Path, mark: str = "", seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    index = FaissIndex("Flat")
    index.add(torch.from_numpy(random.normal(size=(N, 8)).astype("float32")))
    columns = {"path": [f"{mark}{i}.jpg" for i in range(N)], "artist": [f"{mark}{i % 7}" for i in range(N)]}
    thumbnails = [random.bytes(40) for _ in range(N)]
    items = item_table(columns, thumbnails)
    config, about = {"model": {"scales": [1.0, 0.5]}}, {"source": {"run": mark}}
    write_catalog(folder, index=index, items=items, encoder=Encoder(seed), config=config, about=about)
    fingerprint = read_catalog(folder).fingerprint
    calibration = {"catalog": fingerprint, "rate": {"same_work": 0.01, "similar": 0.01}, "neighbours": 3}
    calibration |= {"same_work": [0.9, 0.95], "similar": [0.5], "floor": 0.1}
    write_calibration(folder, calibration)
    return folder


def everything(folder: Path) -> list[Any]:
    """All that can be read of a catalog."""
    opened, encoder = read_catalog(folder), Encoder(99)
    load_tensors(folder, opened.about, encoder)
    found = opened.index.search(opened.index.reconstruct(0, 20), 5)
    answer = [opened.items.to_pydict(), opened.thumbnails(range(0, N, 100)), found.ids, found.scores]
    return [*answer, opened.about, opened.calibration, encoder.state_dict(), encoder.provenance]


def test_catalog(tmp_path, flips):
    folder = catalog(tmp_path / "c")
    damage([path for path in sorted(folder.rglob("*")) if path.is_file()], flips, lambda: everything(folder))


def test_thumbnails_of_a_server(tmp_path, flips):
    folder = catalog(tmp_path / "c")
    file = folder / "segments/1/thumbnails.parquet"
    about = read_json(folder / "segments/1/segment.json")

    def read() -> list[Any]:
        held = Thumbnails(ThumbnailGroups(file, about), held_bytes=1)
        return [held[position] for position in range(0, N, 100)]

    content, want = file.read_bytes(), read()
    spans = about["items_sha256"]["thumbnails"]
    random, named = np.random.default_rng(0), 0
    for _ in range(flips):
        span = spans[int(random.integers(len(spans)))]
        changed = bytearray(content)
        changed[int(random.integers(span["start"], span["stop"]))] ^= int(random.integers(1, 256))
        file.write_bytes(changed)
        with pytest.raises(Damaged, match=r"thumbnails\.parquet"):
            read()
        named += 1
    file.write_bytes(content)
    assert named == flips
    assert read() == want


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("segments/1/index", "index.* belongs to another catalog"),
        ("segments/1/items.arrow", r"items.arrow is damaged or belongs to another catalog"),
        ("segments/1/thumbnails.parquet", r"thumbnails.parquet is damaged or belongs to another catalog"),
        ("segments/1", r"segment.json is damaged or belongs to another catalog"),
        ("encoder.safetensors", r"encoder.safetensors is damaged or belongs to another folder"),
        ("calibration.json", r"calibration.json belongs to another catalog"),
        ("catalog.json", "belongs to another catalog"),
    ],
)
def test_files_of_two_catalogs(name, message, tmp_path):
    one, other = catalog(tmp_path / "one"), catalog(tmp_path / "other", "other ", seed=1)
    is_folder = (one / name).is_dir()
    shutil.rmtree(one / name) if is_folder else (one / name).unlink()
    (shutil.copytree if is_folder else shutil.copy)(other / name, one / name)
    with pytest.raises(CatalogError, match=message):
        everything(one)


def test_a_calibration_ends_with_its_catalog(tmp_path):
    """The same command makes the catalog again, of other images; what was calibrated is not put back."""
    folder = catalog(tmp_path / "c")
    kept = (folder / "calibration.json").read_bytes()
    catalog(tmp_path / "c", "other ", seed=1)
    (folder / "calibration.json").write_bytes(kept)
    with pytest.raises(
        CatalogError, match=r"calibration.json belongs to another catalog, whose scores differ: delete it"
    ):
        read_catalog(folder)
    assert len(read_catalog(folder, calibrated=False)) == N  # so that it can be calibrated again


def test_a_catalog_without_digests_opens(tmp_path):
    """As older versions wrote them."""
    folder = catalog(tmp_path / "c")
    want = everything(folder)
    older = {"sha256"}
    about = {name: value for name, value in read_json(folder / "catalog.json").items() if name not in older}
    write_json(folder / "catalog.json", about)
    calibration = read_json(folder / "calibration.json")
    write_json(folder / "calibration.json", {name: v for name, v in calibration.items() if name != "catalog"})
    inner = folder / "segments/1/index/index.json"
    for path in (folder / "catalog.json", folder / "calibration.json", inner):
        lines = path.read_text().replace(',\n  "checksum"', '\n  "checksum"').splitlines()
        path.write_text("\n".join(line for line in lines if "checksum" not in line))
    got = everything(folder)
    assert same(got[:4], want[:4])
    assert "checksum" not in (folder / "catalog.json").read_text()


def test_a_server_keeps_what_it_has(tmp_path, monkeypatch):
    """A folder that is exchanged for a damaged one is not served."""

    class Described(Encoder):
        def embed(self, image: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(image.float().flatten(1)[:, :64] @ self.weight, dim=1)

    folder = catalog(tmp_path / "c")
    monkeypatch.setattr("simsearch.search.encoder_files.build_encoder", lambda *_, **__: Described())
    library = Library({"c": Source(folder)}, device=torch.device("cpu"), limits=Limits())
    try:
        with library.lease("c") as before:
            want = before.describe([3, 1400]), before.thumbnails[1400]
        catalog(folder, "new ", seed=1)
        inside = ("segments/1/items.arrow", "segments/1/index/index.faiss", "segments/1/segment.json")
        for name in (*inside, "encoder.safetensors", "catalog.json"):
            path = folder / name
            content = path.read_bytes()
            path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
            assert library.refresh() == []
            assert name.rpartition("/")[2] in library.problems["c"]
            with library.lease("c") as held:
                assert held is before
                assert (held.describe([3, 1400]), held.thumbnails[1400]) == want
            path.write_bytes(content)
        assert library.refresh() == ["c"]
        assert not library.problems
    finally:
        library.close()


def test_index(tmp_path, flips):
    index = FaissIndex("IVF4,Flat", nprobe=2)
    vectors = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    index.add(vectors)
    index.save(tmp_path)

    def read() -> list[Any]:
        found = FaissIndex.load(tmp_path).search(vectors[:20], 5)
        return [found.ids, found.scores]

    damage([tmp_path / "index.faiss", tmp_path / "index.json"], flips, read)


# ------------------------------------------------------------------------------------------------ runs


class Model(nn.Module):
    """As much of a LightningModule as load_model asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        self.loaded: dict[str, Any] = {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["hyper_parameters"]


def test_checkpoints(tmp_path, flips, monkeypatch):
    monkeypatch.setattr("simsearch.models.encoder.build", lambda *_: Model())
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "best.ckpt"
    torch.manual_seed(0)
    state = {"state_dict": Model().state_dict(), "hyper_parameters": {"lr": 0.5, "names": ["a", "b"]}, "epoch": 3}
    torch.save(state, path)
    run = saved_run.Run(tmp_path, {"model": {}})

    def read() -> list[Any]:
        model = saved_run.load_model(run)
        return [dict(model.state_dict()), model.loaded, dict(load_state(path))]

    damage([path], flips, read)
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as weights of old releases are: no CRC in them
    assert same(dict(load_state(path)), dict(state["state_dict"]))


def test_a_resumed_training_looks_at_its_checkpoint(tmp_path, small_run):
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy)
    last = copy / "checkpoints" / "last.ckpt"
    shutil.copy(copy / "checkpoints" / "best.ckpt", last)
    with zipfile.ZipFile(last) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(last.read_bytes())
    content[largest.header_offset + largest.file_size] ^= 1  # in the midst of its largest tensor
    last.write_bytes(content)
    done = simsearch("train", f"run_dir={copy}", "resume=true", "logger.mode=disabled", expect=1)
    assert "last.ckpt is damaged: the CRC-32 of" in done.stderr


def test_results_of_a_run(tmp_path, small_run, flips, capsys):
    for name in ("config.yaml", "run.json", "metrics.json", "per_query.parquet"):
        shutil.copy(small_run / name, tmp_path / name)

    def read() -> list[Any]:
        result = read_run(tmp_path)
        assert not isinstance(result, str), result  # without a test
        queries = result.per_query("mAP")
        answer = [result.config, result.protocol, result.fingerprint, result.metrics, result.intervals, result.facts]
        return [*answer, queries.index, queries.label, queries.value, result.found(queries.index[:5].tolist())]

    def said() -> str:
        return capsys.readouterr().err

    files = [tmp_path / name for name in ("metrics.json", "per_query.parquet", "run.json", "config.yaml")]
    damage(files, flips // 4, read, said)


def test_a_changed_config_is_noted(tmp_path, small_run, capsys):
    """By hand it may be changed: where the data lie, say."""
    shutil.copy(small_run / "run.json", tmp_path)
    text = (small_run / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    saved_run.open_run(tmp_path)
    assert not capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    assert saved_run.open_run(tmp_path).config["seed"] == 1
    assert "config.yaml was changed or damaged since it was written" in capsys.readouterr().err


def test_trials_of_a_sweep(tmp_path, flips):
    trial = Trial(tmp_path / "a", ["optimizer.lr=0.1"], values=[0.123, 16.0])
    trial.folder.mkdir()
    trial.write("finished")
    write_json(tmp_path / "sweep.json", {"planned": 40})
    files = [tmp_path / "a/trial.json", tmp_path / "sweep.json"]
    damage(files, flips, lambda: [read_trials(tmp_path), summary(tmp_path)])


# ---------------------------------------------------------------------------------------------- caches


def test_cache_of_arrays(tmp_path, flips, capsys):
    cache, parts, want = ArrayCache(tmp_path), {"data": "x"}, np.arange(3000.0, dtype="float32").reshape(100, 30)

    def fill(array: np.ndarray, start: int) -> Iterator[int]:
        for row in range(start, 100, 10):
            array[row : row + 10] = want[row : row + 10]
            yield row + 10

    def read() -> np.ndarray:
        return np.array(cache.get(parts, want.shape, "float32", fill))

    read()
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert same(read(), want)
    assert not capsys.readouterr().err
    damage([entry / "array.npy", entry / "meta.json"], flips, read)
    content = (entry / "array.npy").read_bytes()
    (entry / "array.npy").write_bytes(content[:-9] + b"\1" + content[-8:])
    capsys.readouterr()
    assert same(read(), want)
    assert f"the cache entry {entry} is damaged" in capsys.readouterr().err


def test_a_damaged_beginning_of_an_array_goes_on_before_the_damage(tmp_path, monkeypatch):
    import simsearch.cache

    monkeypatch.setattr(simsearch.cache, "_SAVE_BYTES", 1)
    cache, parts, begun = ArrayCache(tmp_path), {"data": "x"}, []

    def fill(array: np.ndarray, start: int) -> Iterator[int]:
        begun.append(start)
        for row in range(start, 20, 5):
            if len(begun) == 1 and row == 15:
                raise KeyboardInterrupt
            array[row : row + 5] = row
            yield row + 5

    with pytest.raises(KeyboardInterrupt):
        cache.get(parts, (20, 3), "float32", fill)
    (file,) = tmp_path.rglob("array.npy")
    content = bytearray(file.read_bytes())
    content[128 + 4 * 3 * 7] ^= 1  # row 7
    file.write_bytes(content)
    found = cache.get(parts, (20, 3), "float32", fill)
    assert begun == [0, 5]
    assert found[:, 0].tolist() == [row for row in range(0, 20, 5) for _ in range(5)]


@pytest.mark.filterwarnings("ignore:cache entry .* is damaged")
def test_cache_of_cifar10(tmp_path, flips):
    rows = np.zeros(5, cifar10._ROW)
    rows["image"] = np.random.default_rng(0).integers(0, 256, rows["image"].shape)
    path = tmp_path / "cifar10-x.npy"
    cifar10._store(path, rows)
    content = path.read_bytes()
    for changed in changes(content, flips, 0):
        path.write_bytes(changed)
        found = cifar10._load(path)
        assert found is None or found.tobytes() == rows.tobytes()


# ---------------------------------------------------------------------------------------- decoded images


def pictures(folder: Path, count: int = 8) -> Path:
    folder.mkdir()
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 6, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_decoded_files(tmp_path, flips, capsys):
    manifest = read_manifest(pictures(tmp_path / "art"))

    def read() -> list[Any]:
        found = decode_files(manifest, size=20, fit="longest", cache=tmp_path / "cache")
        errors = [str(error) for error in found.errors]
        return [[image.clone() for image in found.images], found.rows, errors, found.digest]

    read()
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    damage([entry / "pixels.bin", entry / "000000.safetensors"], flips // 4, read)
    content = (entry / "pixels.bin").read_bytes()
    (entry / "pixels.bin").write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    capsys.readouterr()
    read()
    assert "000000.safetensors or its part of pixels.bin is damaged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ingest")
    say = ("size=32", "chunk=5", "near.descriptors=false", "workers=1")
    simsearch("data", "ingest", f"images={pictures(root / 'art')}", f"out={root / 'out'}", *say)
    return root / "out"


def test_ingest(ingested, flips):
    def read() -> list[Any]:
        manifest = read_manifest(ingested)
        found = open_ingest(ingested, manifest, 32)
        return [manifest, [image.clone() for image in found.images], found.rows, found.digest]

    want = read()
    damage([ingested / name for name in ("ingest.json", "manifest.parquet", "pixels/index.npy")], flips // 2, read)
    for file in (ingested / "pixels/pixels.bin", *sorted((ingested / "pixels").glob("*.safetensors"))):
        content = file.read_bytes()
        for changed in changes(content, flips // 2, 0):
            file.write_bytes(changed)
            try:
                problem, unchanged = "", same(read(), want)
            except ValueError as error:
                problem = str(error)
            assert unchanged if not problem else "run `simsearch data ingest` again" in problem
        file.write_bytes(content)


def test_pixels_of_another_ingest(ingested, tmp_path):
    root = pictures(tmp_path / "art")
    for path in root.glob("?.png"):
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    say = ("size=32", "chunk=5", "near.descriptors=false", "workers=1")
    simsearch("data", "ingest", f"images={root}", f"out={tmp_path / 'out'}", *say)
    for name in ("pixels.bin", "000000.safetensors", "000001.safetensors"):
        shutil.copy(ingested / "pixels" / name, tmp_path / "out/pixels" / name)
    manifest = read_manifest(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"pixels.bin has changed since it was decoded.* run `simsearch data ingest` again"
    ):
        open_ingest(tmp_path / "out", manifest, 32)


def test_plan_of_an_ingest(tmp_path, flips):
    listing, out = read_listing(pictures(tmp_path / "art"), None), tmp_path / "out"
    out.mkdir()
    begin_ingest(out, listing, Decoding(size=32), tmp_path / "art")
    damage([out / "plan.json"], flips, lambda: begin_ingest(out, listing, Decoding(size=32), tmp_path / "art"))


class Colours(nn.Module):
    """A backbone of one pixel."""

    def identity(self, size: int) -> dict[str, object]:
        return {"name": "colours", "size": size}

    def forward(self, images: torch.Tensor, size: int) -> torch.Tensor:
        return images.float().add(1).mean((2, 3), keepdim=True)


def test_descriptors_of_an_ingest(tmp_path, flips):
    images = ragged([torch.randint(0, 256, (3, 9, 8), dtype=torch.uint8) for _ in range(7)])
    files = SimpleNamespace(sha256=tuple(f"{number:064x}" for number in range(7)))
    (read := lambda: describe(tmp_path, files, images, Colours(), 8, 4))()
    damage(sorted(tmp_path.rglob("*.npy")), flips // 2, read)


def test_ground_truth(tmp_path, flips):
    queries = tuple(Query(f"q{i}", (1.0, 2.0, 30.0, 40.0), (i,), (i + 10,), ()) for i in range(5))
    write_benchmark(tmp_path / "gnd.json", Benchmark("toy", tuple(f"i{i}" for i in range(20)), queries))
    damage([tmp_path / "gnd.json"], flips, lambda: read_benchmark(tmp_path / "gnd.json"))


# ------------------------------------------------------------------------------------- extract and export


def test_shards_and_their_plan(tmp_path, flips):
    root = pictures(tmp_path / "art")
    manifest = Manifest(root, tuple(f"{i}.png" for i in range(8)), {"artist": tuple("abcdabcd")})
    given = {"config": {"model": {}}, "source": {"run": "r", "images": str(root)}, "command": "simsearch extract"}

    def open_again(encoder: Encoder) -> Any:
        return begin(tmp_path / "s", manifest, encoder=encoder, chunk=8, thumbnail=16, **given)

    shards = open_again(Encoder())
    vectors = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    error = ImageError(Path("7.png"), "truncated", "half of it")
    shards.write(0, torch.arange(7), vectors, [bytes([i]) * 30 for i in range(7)], [error])

    def read() -> list[Any]:
        opened, encoder = open_shards(tmp_path / "s"), Encoder(99)
        load_tensors(tmp_path / "s/plan", opened.about, encoder)
        assert opened.check(0) == 7
        errors = [str(error) for error in opened.errors(0)]
        return [opened.about, opened.vectors(0), opened.catalog_items(0).to_pydict(), errors, encoder.state_dict()]

    names = ("plan/plan.json", "plan/items.parquet", "plan/encoder.safetensors", "shards/000000.safetensors")
    damage([tmp_path / "s" / name for name in names], flips, read)

    def change() -> str:
        shutil.copy(root / "0.png", root / "1.png")  # of another size
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (its message is what is compared)
            open_again(Encoder())
        return str(caught.value)

    want = change()
    assert "1 of another size, first 1.png" in want
    sizes = tmp_path / "s/plan/sizes.npy"
    content = sizes.read_bytes()
    for changed in changes(content, flips, 0):
        sizes.write_bytes(changed)
        assert "sizes.npy is damaged" in (message := change()) or message == want


def test_exported_encoder(tmp_path, flips, monkeypatch):
    monkeypatch.setattr(exported, "OnnxFile", lambda data, one_shape: data)
    kind = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [kind], [kind])
    (tmp_path / "content.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    tensors = {"weight": torch.eye(5), "bias": torch.ones(5)}
    (tmp_path / "content.safetensors").write_bytes(save(tensors))
    part = {
        "scales": [{"file": "content.onnx", "size": 32}],
        "mean": [0.1, 0.2, 0.3],
        "weight": 1.0,
        "start": 0,
        "stop": 5,
    }
    about = {"format": 1, "image": {"size": 32, "fit": "longest"}, "dimension": 5}
    about["parts"] = {"content": {**part, "head": {"file": "content.safetensors", "levels": 3}}}
    names = ["content.onnx", "content.safetensors"]
    write_json(tmp_path / "encoder.json", {**about, "sha256": digests(tmp_path, names)})

    def read() -> list[Any]:
        encoder = exported.ExportedEncoder(tmp_path)
        return [encoder.parts, encoder.fit, encoder._files, encoder._tensors]

    damage([tmp_path / name for name in (*names, "encoder.json")], flips, read)


# ------------------------------------------------------------------------------------------------ parts

leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
plain = leaf | st.lists(leaf, max_size=3) | st.dictionaries(st.text(max_size=3), leaf, max_size=3)


@given(st.dictionaries(st.text(max_size=3), plain, max_size=3))
@settings(max_examples=50, deadline=None)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    write_json(path, read_json(path) | {"more": 1})  # its checksum is made anew
    assert read_json(path) == value | {"more": 1}


def test_json_by_hand_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    write_json(tmp_path / "a.json", {"a": 1, 2: (3, 4)})
    assert read_json(tmp_path / "a.json") == {"a": 1, "2": [3, 4]}
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("1", "5", 1))
    with pytest.raises(Damaged, match=r"a.json is damaged or was changed by hand: .* delete its line 'checksum'"):
        read_json(tmp_path / "a.json")


def test_digest_of_parts_of_a_file(tmp_path):
    import hashlib

    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "f").write_bytes(content)
    assert sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    spans = [(5, 5), (7, 1_500_000), (2_000_000, 3_000_000)]
    want = hashlib.sha256(b"".join(content[start:stop] for start, stop in spans)).hexdigest()
    assert sha256(tmp_path / "f", *spans) == want
    assert sha256(tmp_path / "f", (0, 10**12)) == sha256(tmp_path / "f")


def test_arrays_come_back(tmp_path):
    for array in (np.arange(12, dtype="float16").reshape(3, 4).T, np.zeros((0, 3), "int64"), np.zeros(2, cifar10._ROW)):
        write_array(tmp_path / "a.npy", array)
        found = read_array(tmp_path / "a.npy", array.dtype)
        assert found.shape == array.shape
        assert found.tobytes() == array.tobytes()
        with pytest.raises(Damaged, match=r"a\.npy"):
            read_array(tmp_path / "a.npy", np.dtype("uint8"))


def test_what_is_no_zip_file_is_left_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"\x80\x02 an old pickle")
    assert check_zip(tmp_path / "a") == tmp_path / "a"


def test_items_in_groups(tmp_path):
    tables = [pa.table({"path": [f"{g}-{i}" for i in range(n)], "thumbnail": [b"x" * (i + 1) for i in range(n)]})
              for g, n in enumerate((4, 1, 3))]  # fmt: skip
    about = write_items(tmp_path / "items.parquet", tables)
    assert about["items"] == 8
    assert pq.ParquetFile(tmp_path / "items.parquet").num_row_groups == 3
    spans = [(group["start"], group["stop"]) for group in about["items_sha256"]["thumbnails"]]
    assert spans == sorted(spans)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
