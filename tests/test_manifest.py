"""Lists of images: every rule of folders and tables, every error, and loading that survives bad files."""

import os
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from simsearch.data.ingest.source import read_listing
from simsearch.data.manifest import ImageFiles, Manifest, load_images, read_manifest
from simsearch.images import ImageError, read_image


def put(path: Path, colour: tuple[int, int, int] = (10, 20, 30), side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path, "PNG")
    return path


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Folders


def test_flat_folder_is_sorted_and_has_no_labels(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.TiFf", "ü.webp"):
        put(tmp_path / name)
    manifest = read_manifest(tmp_path)
    assert manifest == Manifest(tmp_path, ("a.jpg", "b.PNG", "c.TiFf", "ü.webp"))
    assert len(manifest) == 4


def test_first_folder_is_the_label(tmp_path):
    for name in ("monet/1.png", "monet/late/2.png", "degas/3.png", "loose.png"):
        put(tmp_path / name)
    manifest = read_manifest(tmp_path)
    assert manifest.paths == ("degas/3.png", "loose.png", "monet/1.png", "monet/late/2.png")
    assert manifest.attributes == {"label": ("degas", None, "monet", "monet")}


def test_folder_below_a_root(tmp_path):
    put(tmp_path / "images" / "monet" / "1.png")
    manifest = read_manifest(tmp_path / "images", root=tmp_path)
    assert (manifest.root, manifest.paths) == (tmp_path, ("images/monet/1.png",))
    assert manifest.attributes == {"label": ("monet",)}
    with pytest.raises(ValueError, match="is not inside root"):
        read_manifest(tmp_path, root=tmp_path / "images")


def test_what_a_folder_leaves_out_is_counted(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    put(root / "a.png")
    put(root / ".hidden.png")
    put(root / ".cache" / "b.png")
    write(root / "notes.txt", "x")
    write(root / "no_ending", "x")
    put(outside / "c.png")
    (root / "out.png").symlink_to(outside / "c.png")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "in.png").symlink_to("a.png")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.png")).write_bytes(b"x")
    manifest = read_manifest(root)
    assert manifest.paths == ("a.png", "in.png")
    assert manifest.skipped == {
        "hidden": 2,
        "other ending": 2,
        "link out of the root": 1,
        "linked folder": 2,
        "name not UTF-8": 1,
    }


def test_hidden_and_linked_above_the_folder_do_not_count(tmp_path):
    put(tmp_path / ".store" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / ".store")
    assert read_manifest(tmp_path / ".store").paths == ("a.png",)
    assert read_manifest(tmp_path / "link").paths == ("a.png",)


def test_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images .*it is empty"):
        read_manifest(tmp_path)
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(ValueError, match=r"holds no images .*1 other ending"):
        read_manifest(tmp_path)


def test_one_image(tmp_path):
    path = put(tmp_path / "sub" / "a.JPG")
    assert read_manifest(path) == Manifest(tmp_path / "sub", ("a.JPG",))
    assert read_manifest(path, root=tmp_path) == Manifest(tmp_path, ("sub/a.JPG",))


def test_missing_and_unknown_sources(tmp_path):
    put(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"absent does not exist"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"root .*absent is not a folder"):
        read_manifest(tmp_path / "a.png", root=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"list\.doc: the name of a table must end in \.csv"):
        read_manifest(write(tmp_path / "list.doc", "a.png"))
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ValueError, match=r"pipe\.csv is neither a folder nor a regular file"):
        read_manifest(tmp_path / "pipe.csv")


# Tables


def make_table(folder: Path, kind: str, columns: dict[str, list]) -> Path:
    """The same table as CSV or Parquet."""
    path = folder / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = zip(*columns.values(), strict=True)
        lines = [",".join("" if value is None else str(value) for value in row) for row in (columns, *rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=["csv", "parquet"])
def table(request, tmp_path):
    """Writes a table of either kind beside a.png and sub/b.png."""
    put(tmp_path / "a.png")
    put(tmp_path / "sub" / "b.png")
    return lambda columns: make_table(tmp_path, request.param, columns)


@pytest.mark.parametrize("name", ["path", "image_path"])
def test_table(table, tmp_path, name):
    source = table({"artist": ["Müller", None], name: ["sub/b.png", "./a.png"], "year": [1888, None]})
    expected = {"artist": ("Müller", None), "year": ("1888", None)}
    assert read_manifest(source) == Manifest(tmp_path, ("sub/b.png", "a.png"), expected)


def test_table_with_another_root(table, tmp_path):
    source = table({"path": ["b.png"]})
    assert read_manifest(source, root=tmp_path / "sub").paths == ("b.png",)
    with pytest.raises(ValueError, match=r"none of the 1 files .* exists under .*: check root"):
        read_manifest(source)


def test_table_may_list_missing_files(table):
    manifest = read_manifest(table({"path": ["a.png", "gone.png"]}))
    (_, index, errors) = next(load_images(manifest, size=4))
    assert index.tolist() == [0]
    assert [error.reason for error in errors] == ["missing"]


@pytest.mark.parametrize(
    ("paths", "reason", "where"),
    [
        (["a.png", "/etc/passwd"], "path-absolute", "row 2"),
        (["sub/../../x.png", "a.png"], "path-climbs", "row 1"),
        (["a.png", "sub/b.png", "sub//b.png"], "path-twice", "row 3; row 2 is kept"),
        (["a.png", "."], "path-empty", "row 2"),
        (["a.png", "zero\0byte.png"], "path-zero-byte", "row 2"),
        (["out.png", "a.png"], "path-leaves-root", "row 1"),
        (["a.png", "outside/c.png"], "path-leaves-root", "row 2"),
    ],
)
def test_paths_that_a_table_may_not_list_cost_their_row_alone(table, tmp_path, tmp_path_factory, paths, reason, where):
    outside = tmp_path_factory.mktemp("outside")
    (tmp_path / "out.png").symlink_to(put(outside / "c.png"))
    (tmp_path / "outside").symlink_to(outside)
    manifest = read_manifest(table({"path": paths}))
    assert set(manifest.paths) <= {"a.png", "sub/b.png"}
    assert len(manifest) == len(paths) - 1
    assert manifest.skipped == {reason: 1}
    assert [(one.reason, one.detail) for one in manifest.rejected] == [(reason, where)]


def test_table_errors(table):
    with pytest.raises(ValueError, match=r"no column path or image_path; its columns: photo, label"):
        read_manifest(table({"photo": ["a.png"], "label": ["x"]}))
    with pytest.raises(ValueError, match=r"lists no images \(1 path-absolute\)"):
        read_manifest(table({"path": ["/a.png"]}))
    with pytest.raises(ValueError, match="lists no images"):
        read_manifest(table({"path": []}))


def test_columns_keep_their_names_and_that_of_paths_may_be_written_in_many_ways(table, tmp_path):
    manifest = read_manifest(table({"Artist Name": ["Monet"], "File Name": ["a.png"]}))
    assert manifest == Manifest(tmp_path, ("a.png",), {"Artist Name": ("Monet",)})


def test_byte_order_mark_quotes_blank_lines_and_unnamed_columns(tmp_path):
    put(tmp_path / "a,b.png")
    text = '\ufeff,path , title\r\n0,"a,b.png","two\r\nlines"\r\n\r\n'
    manifest = read_manifest(write(tmp_path / "list.CSV", text))
    assert manifest == Manifest(tmp_path, ("a,b.png",), {"title": ("two\r\nlines",)})


@pytest.mark.parametrize(
    ("data", "artists", "skipped"),
    [
        ("path,artist\na.png,Müller\n".encode("latin-1"), ("Müller",), {}),
        ("path\tartist\na.png\tMüller\n".encode("utf-16"), ("Müller",), {}),
        ("sep=;\npath;artist\na.png;Müller\n".encode("utf-8-sig"), ("Müller",), {}),
        (b"sep=|\r\npath|artist\r\na.png|x, y; z\r\n", ("x, y; z",), {}),
        (b'path;artist;"height, width, depth"\na.png;x;1\n', ("x",), {}),
        (b"path,artist\na.png,1\nb.png,2,3\nb.png\n", ("1",), {"row-ragged": 2}),
        (b'path,artist\na.png,1\n"b.png,2\n', ("1",), {"row-unclosed": 1}),
        (b"path,artist,artist,\na.png,1,2,3\n", ("1",), {}),
    ],
)
def test_tables_are_read_as_ingest_reads_them(tmp_path, data, artists, skipped):
    put(tmp_path / "a.png")
    source = write(tmp_path / "list.csv", data)
    manifest = read_manifest(source)
    assert manifest.attributes["artist"] == artists
    assert manifest.skipped == skipped
    listing = read_listing(source)
    assert (listing.paths, listing.attributes["artist"], listing.rejected) == (
        manifest.paths,
        artists,
        manifest.rejected,
    )


def test_an_empty_table(tmp_path):
    with pytest.raises(ValueError, match="no column path or image_path; its columns: none"):
        read_manifest(write(tmp_path / "list.csv", b""))


def test_a_name_is_taken_as_it_is_before_it_is_mended(tmp_path):
    for name in (" a.png", "a.png", "b.png"):
        put(tmp_path / name)
    source = write(tmp_path / "list.csv", 'path\n" a.png"\na.png\n b.png\n')
    assert read_manifest(source).paths == (" a.png", "a.png", "b.png")


def test_parquet_values_become_text(tmp_path):
    put(tmp_path / "a.png")
    columns = {
        "path": pa.array(["a.png"]).dictionary_encode(),
        "born": pa.array([date(1840, 11, 14)]),
        "style": pa.array(["Impressionism"]).dictionary_encode(),
        "sold": pa.array([True]),
        "empty": pa.array([""]),
        "none": pa.nulls(1),
    }
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    assert read_manifest(tmp_path / "list.parquet").attributes == {
        "born": ("1840-11-14",),
        "style": ("Impressionism",),
        "sold": ("true",),
        "empty": (None,),
        "none": (None,),
    }


def tensors() -> pa.Array:
    values = pa.array([[1, 2]], pa.list_(pa.int32(), 2))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.int32(), (2,)), values)


@pytest.mark.parametrize("value", [[[1.0, 2.0]], [b"\xff"], [{"x": b"x"}], tensors()])
def test_parquet_column_that_is_no_plain_value_is_left_out(tmp_path, value):
    put(tmp_path / "a.png")
    pq.write_table(pa.table({"path": ["a.png"], "extra": value}), tmp_path / "list.parquet")
    manifest = read_manifest(tmp_path / "list.parquet")
    assert (manifest.paths, manifest.attributes) == (("a.png",), {})
    assert "column 'extra' holds" in manifest.notes[0]


def test_images_in_a_table_are_for_ingest(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "a.png"}]}), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match=r"'image' holds images: `simsearch data ingest` unpacks them"):
        read_manifest(tmp_path / "list.parquet")


def test_what_programs_leave_and_what_is_not_opened(tmp_path):
    for name in ("a.png", "@eaDir/a.png", "x/@eaDir/b.png", ".thumbnails/a.png", "x/raw.nef", "x/c.HEIC"):
        put(tmp_path / name)
    manifest = read_manifest(tmp_path)
    assert manifest.paths == ("a.png", "x/c.HEIC")
    assert manifest.skipped == {"excluded": 3, "unsupported": 1}


def test_damaged_parquet(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_manifest(write(tmp_path / "text.parquet", "path\na.png\n"))
    pq.write_table(pa.table({"path": [f"{i}.png" for i in range(1000)]}), tmp_path / "whole.parquet")
    data = (tmp_path / "whole.parquet").read_bytes()
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_manifest(write(tmp_path / "cut.parquet", data[: len(data) // 2]))


def test_manifest_checks_itself(tmp_path):
    with pytest.raises(ValueError, match="attribute 'label' has 2 values for 1 paths"):
        Manifest(tmp_path, ("a.png",), {"label": ("x", "y")})
    with pytest.raises(ValueError, match=r"row 1: path '\.\./a\.png' leaves the root"):
        Manifest(tmp_path, ("../a.png",))


# Loading


@pytest.fixture
def mixed(tmp_path):
    """Seven readable images, and three that are not, as rows 2, 5 and 9."""
    for row in range(10):
        path = put(tmp_path / f"{row}.png", colour=(row, 2 * row, 3 * row), side=6 + row)
        if row in (2, 5, 9):
            path.write_bytes(path.read_bytes()[:50] if row == 5 else b"no image")
    return read_manifest(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_load_images_keeps_order_and_reports_unreadable_files(mixed, workers):
    batches = list(load_images(mixed, size=4, batch_size=4, workers=workers))
    assert [index.tolist() for _, index, _ in batches] == [[0, 1, 3], [4, 6, 7], [8]]
    for images, index, _ in batches:
        assert images.dtype == torch.uint8
        expected = index[:, None] * torch.tensor([1, 2, 3])
        assert torch.equal(images.long(), expected[:, :, None, None].expand(-1, 3, 4, 4))
    errors = [error for _, _, errors in batches for error in errors]
    assert [(error.path.name, error.reason) for error in errors] == [
        ("2.png", "not-an-image"),
        ("5.png", "truncated"),
        ("9.png", "not-an-image"),
    ]


def test_batch_without_readable_images(tmp_path):
    write(tmp_path / "a.png", "no image")
    images, index, errors = next(load_images(read_manifest(tmp_path), size=4))
    assert (images.shape, images.dtype) == ((0, 3, 4, 4), torch.uint8)
    assert (index.shape, index.dtype) == ((0,), torch.int64)
    assert [error.reason for error in errors] == ["not-an-image"]


def test_image_files_items(mixed):
    files = ImageFiles(mixed, size=5)
    assert len(files) == 10
    row, image = files[7]
    assert row == 7
    assert torch.equal(image, read_image(mixed.root / "7.png", size=5))
    row, error = files[2]
    assert (row, error.path) == (2, mixed.root / "2.png")
    assert isinstance(error, ImageError)


def test_reported_errors_do_not_keep_files_in_memory(mixed):
    for row in (2, 5, 9):
        _, error = ImageFiles(mixed, size=5)[row]
        # Frames of a traceback hold their local variables, here the bytes of the whole file.
        assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


@pytest.mark.parametrize(("size", "batch_size", "name"), [(0, 4, "size"), (4, 0, "batch_size")])
def test_load_images_refuses(mixed, size, batch_size, name):
    with pytest.raises(ValueError, match=name):
        load_images(mixed, size=size, batch_size=batch_size)


@pytest.mark.skipif("SIMSEARCH_DATA" not in os.environ, reason="SIMSEARCH_DATA is not set: no real files")
def test_real_paintings():
    root = Path(os.environ["SIMSEARCH_DATA"]) / "art"
    by_table, by_folder = read_manifest(root / "metadata.csv"), read_manifest(root / "images", root=root)
    assert set(by_table.paths) == set(by_folder.paths)
    artists = dict(zip(by_table.paths, by_table.attributes["artist_slug"], strict=True))
    assert tuple(artists[path] for path in by_folder.paths) == by_folder.attributes["label"]
    images, index, errors = next(load_images(by_table, size=32))
    assert (images.shape, index.tolist(), errors) == ((64, 3, 32, 32), list(range(64)), [])
