"""The server: every address, every refusal, reload under load, batches, a real process."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn
from conftest import change_items, scan_bomb, start_forkserver
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.exceptions import HTTPException
from torch import Tensor, nn

from simsearch import api, configs
from simsearch.commands.serve import addresses, admitted, bind, find_sources, greeting, uploads_line
from simsearch.data.manifest import read_manifest
from simsearch.data.process_pool import Failure
from simsearch.images import encode_thumbnail, read_image
from simsearch.index.faiss_index import FaissIndex
from simsearch.search import change
from simsearch.search.calibration_file import write_calibration
from simsearch.search.catalog import read_catalog
from simsearch.search.describe import encode
from simsearch.search.errors import CatalogError
from simsearch.search.filters import Attributes, Condition
from simsearch.search.item_tables import item_table
from simsearch.search.items import ThumbnailGroups
from simsearch.search.verification import Verification
from simsearch.search.writing import write_catalog
from simsearch.serving import browse
from simsearch.serving import service as service_module
from simsearch.serving.app import PAGE, create_app
from simsearch.serving.browse import Listing
from simsearch.serving.encoder import EncoderWorker
from simsearch.serving.guard import JSON_BYTES, cost, host_name, read_host, read_origin
from simsearch.serving.library import Library, Source, Thumbnails, read_inside
from simsearch.serving.limits import Account, Busy, Limits, TokenBuckets, client_address
from simsearch.serving.uploads import Upload, UploadFolder, Uploads, decoded
from simsearch.text import folded

N = 24
MODEL = {
    "_target_": "simsearch.models.frozen.FrozenRetriever",
    "backbone": {
        "_target_": "simsearch.models.backbones.timm_backbone",
        "name": "test_resnet",
        "weights": "random",
        "size": 64,
        "runtime": "torch",
    },
    "pooling": {"_target_": "simsearch.models.pooling.RMAC", "levels": 2},
}
ARTISTS = ("Claude Monet", "Paul Cézanne", "Berthe Morisot")
FREE = Limits(rate=None)


# ------------------------------------------------------------------------------- a small collection


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """N pictures of 96 x 72, smooth and all different, beside a secret that no catalog may show."""
    folder = tmp_path_factory.mktemp("collection")
    (folder / "root").mkdir()
    generator = np.random.default_rng(0)
    for i in range(N):
        small = Image.fromarray(generator.integers(0, 255, (4, 5, 3), dtype=np.uint8))
        small.resize((96, 72), Image.Resampling.BICUBIC).save(folder / f"root/{i}.png")
    Image.new("RGB", (50, 50), "red").save(folder / "secret.png")
    return folder / "root"


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(1)
    return configs.build(MODEL).eval()


def make_catalog(folder: Path, root: Path, encoder: nn.Module, *, mark: str = "", count: int = N) -> Path:
    images = torch.stack([read_image(root / f"{i}.png", size=64) for i in range(count)])
    index = FaissIndex("Flat")
    index.add(encode(encoder, images))
    columns = {
        "path": [f"{i}.png" for i in range(count)],
        "title": [f"{mark}Water lilies {i}" if i % 2 else f"{mark}Étude {i}" for i in range(count)],
        "artist": [ARTISTS[i % 3] for i in range(count)],
        "year": [None if i == 0 else str(1850 + i) for i in range(count)],
        "work": [f"w{i // 2}" for i in range(count)],
        "id": [str(i) for i in range(count)],
    }
    thumbnails = [encode_thumbnail(read_image(root / f"{i}.png"), 48) for i in range(count)]
    write_catalog(folder, index=index, items=item_table(columns, thumbnails), encoder=encoder,
                  config={"model": MODEL}, about={})  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, root, encoder) -> Path:
    return make_catalog(tmp_path_factory.mktemp("catalogs") / "art", root, encoder)


def library(sources: dict[str, Source], limits: Limits = FREE) -> Library:
    return Library(sources, device=torch.device("cpu"), limits=limits)


@contextlib.contextmanager
def serving(books: Library, limits: Limits = FREE, **guards) -> Iterator[httpx.Client]:
    """A client of a real server on a free port of this machine."""
    start_forkserver()
    app = create_app(books, limits, **guards)
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, proxy_headers=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=300) as client:
            until(lambda: server.started)
            client.service = app.state.service  # type: ignore[attr-defined]
            yield client
    finally:
        server.should_exit = True
        thread.join()


def until(holds: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def client(folder, root) -> Iterator[httpx.Client]:
    with serving(library({"art": Source(folder, root), "bare": Source(folder)})) as client:
        yield client


def address(client: httpx.Client) -> tuple[str, int]:
    return client.base_url.host, client.base_url.port or 80


def png(i: int, root: Path) -> bytes:
    return (root / f"{i}.png").read_bytes()


def upload(client: httpx.Client, data: bytes, path: str = "/api/uploads", **more) -> httpx.Response:
    return client.post(path, files={"file": ("../../etc/passwd.jpg", data)}, **more)


def search(client: httpx.Client, catalog: str = "art", **body) -> httpx.Response:
    return client.post(f"/api/catalogs/{catalog}/search", json=body)


def error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()["error"]


# ----------------------------------------------------------------------------------------- browsing


class TestBrowsing:
    def test_health_and_catalogs(self, client):
        health = client.get("/api/health").json()
        assert health["status"] == "ok"
        assert health["queue"] == 0
        assert {name: about["items"] for name, about in health["catalogs"].items()} == {"art": N, "bare": N}
        art, _ = client.get("/api/catalogs").json()
        assert art["parts"] == {"content": 1.0}
        assert art["calibration"] is None
        assert art["explains"] is True
        assert art["verifies"] is False
        assert (
            art["bytes_per_item"] == read_catalog(client.service.library.sources["art"].folder).about["bytes_per_item"]
        )
        year = {"name": "year", "kind": "number", "distinct": N - 1, "low": 1851, "high": 1850 + N - 1}
        assert [a for a in art["attributes"] if a["name"] == "year"] == [year]
        assert {"name": "artist", "kind": "text", "distinct": 3} in art["attributes"]
        assert "path" not in {a["name"] for a in art["attributes"]}

    def test_values(self, client):
        def get(**asked: str) -> list[dict]:
            return client.get("/api/catalogs/art/values", params={"attribute": "artist", **asked}).json()

        assert get() == [{"value": name, "count": N // 3} for name in sorted(ARTISTS)]
        assert [v["value"] for v in get(prefix="mo")] == ["Berthe Morisot", "Claude Monet"]
        assert [v["value"] for v in get(prefix="CEZ")] == ["Paul Cézanne"]
        assert get(prefix="onet") == []
        assert len(get(limit="1")) == 1
        missing = client.get("/api/catalogs/art/values", params={"attribute": "period"})
        assert error(missing, 422) == "no attribute 'period': there are title, artist, year, work, id"

    def test_items_in_pages(self, client):
        def get(**asked: object) -> tuple[int, list[int]]:
            answer = client.get("/api/catalogs/art/items", params=asked).json()
            return answer["total"], [int(item["id"]) for item in answer["items"]]

        assert get() == (N, list(range(N)))
        assert get(offset=5, limit=3) == (N, [5, 6, 7])
        assert get(offset=N + 5) == (N, [])
        assert get(text="ETUDE") == (N // 2, list(range(0, N, 2)))
        assert get(text="cezanne lil") == (4, [1, 7, 13, 19])
        assert get(text="water monet xyz") == (0, [])
        assert get(where="artist=claude monet; year=1860..1868") == (3, [12, 15, 18])
        total, first = get(seed=7, limit=10)
        assert (total, get(seed=7, limit=10)[1]) == (N, first)
        assert sorted(first + get(seed=7, limit=N, offset=10)[1]) == list(range(N))
        assert get(seed=8, limit=10)[1] != first

    def test_an_item(self, client):
        item = client.get("/api/catalogs/art/item?id=0").json()
        attributes = {"id": "0", "path": "0.png", "title": "Étude 0", "artist": "Claude Monet", "work": "w0"}
        assert item == {"id": "0", "attributes": attributes, "width": 48, "height": 36}

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("/api/catalogs/none/items", "no catalog 'none': there are art, bare"),
            ("/api/catalogs/art/item?id=24", "no item '24' in art"),
            ("/api/catalogs/art/item?id=-1", "no item '-1'"),
            ("/api/catalogs/art/thumbnail?id=24", "no item '24'"),
            ("/api/catalogs/art/image?id=99", "no item '99'"),
            ("/api/uploads/AAAA/image", "no such upload, or it has expired"),
            ("/api/nothing", "no such address: see /docs"),
        ],
    )
    def test_what_there_is_not(self, client, path, message):
        assert message in error(client.get(path), 404)

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            ("where=artist", "has no ="),
            ("where=artist=Monet", "no item has artist 'Monet'"),
            ("where=colour=red", "no attribute 'colour'"),
            ("limit=100000", "limit: Input should be less than or equal to 500"),
            ("offset=x", "offset: "),
            ("text=" + "x" * 300, "text: "),
        ],
    )
    def test_bad_questions(self, client, query, message):
        assert message in error(client.get(f"/api/catalogs/art/items?{query}"), 422)
        assert "no such method" in error(client.delete("/api/catalogs/art/items"), 405)


class TestImages:
    def test_thumbnail_and_original(self, client, root, folder):
        small = client.get("/api/catalogs/art/thumbnail?id=3")
        assert small.content == read_catalog(folder).thumbnails([3])[0]
        assert small.headers["content-type"] == "image/png"
        large = client.get("/api/catalogs/art/image?id=3")
        assert large.headers["content-type"] == "image/jpeg"
        shown = read_image(large.content)
        assert shown.shape == (3, 72, 96)
        assert (shown.float() - read_image(png(3, root)).float()).abs().mean() < 4
        assert client.get("/api/catalogs/bare/image?id=3").content == small.content

    def test_items_by_their_ids(self, client):
        answer = client.post("/api/catalogs/art/items", json={"ids": ["7", "nothing", "2.png", "7", 0]}).json()
        assert [item["id"] for item in answer["items"]] == ["7", "2", "0"]
        assert answer["items"][0] == client.get("/api/catalogs/art/item?id=7").json()
        assert answer["missing"] == ["nothing"]
        for ids in ([], ["x"] * 501, [None]):
            assert error(client.post("/api/catalogs/art/items", json={"ids": ids}), 422)
        stale = client.post("/api/catalogs/art/items?v=0000", json={"ids": ["7"]})
        assert stale.json()["items"] == {"7": "7"}
        assert stale.status_code == 409

    def test_an_image_as_large_as_it_is_wanted(self, root, encoder, tmp_path):
        (tmp_path / "root").mkdir()
        for i in range(4):
            Image.new("RGB", (3000, 1500), (i, 90, 90)).save(tmp_path / f"root/{i}.png")
        folder = make_catalog(tmp_path / "c", tmp_path / "root", encoder, count=4)
        with serving(library({"art": Source(folder, tmp_path / "root")})) as client:
            for side, shown in (("", 1600), ("&side=6000", 3000), ("&side=500", 500)):
                data = client.get(f"/api/catalogs/art/image?id=1{side}").content
                with Image.open(io.BytesIO(data)) as image:
                    assert image.size == (shown, shown // 2)
            assert error(client.get("/api/catalogs/art/image?id=1&side=6001"), 422)

    def test_a_client_keeps_what_it_has(self, client):
        version = client.get("/api/catalogs").json()[0]["version"]
        for address in ("thumbnail?id=3", "image?id=3"):
            first = client.get(f"/api/catalogs/art/{address}")
            assert first.headers["etag"] == f'"{version}"'
            assert first.headers["cache-control"] == "no-cache"
            again = client.get(f"/api/catalogs/art/{address}", headers={"if-none-match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            old = client.get(f"/api/catalogs/art/{address}", headers={"if-none-match": '"0123"'})
            assert (old.status_code, old.content) == (200, first.content)
            kept = client.get(f"/api/catalogs/art/{address}&v={version}")
            assert "immutable" in kept.headers["cache-control"]
            assert "immutable" not in client.get(f"/api/catalogs/art/{address}&v=0").headers["cache-control"]

    def test_browsers_ask_for_the_files_of_the_page_anew(self, client):
        first = client.get("/static/app.js")
        assert first.headers["cache-control"] == "no-cache"
        again = client.get("/static/app.js", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.headers["cache-control"]) == (304, "no-cache")

    def test_nothing_outside_the_root_is_shown(self, root, encoder, tmp_path):
        place = make_catalog(tmp_path / "c", root, encoder, count=6)
        images = tmp_path / "images"
        images.mkdir()
        (images / "link.png").symlink_to(root.parent / "secret.png")
        (images / "folder").symlink_to(root.parent)
        (images / "inner.png").symlink_to(images / "real.png")
        Image.new("RGB", (60, 20), "blue").save(images / "real.png")
        os.mkfifo(images / "pipe.png")
        paths = ["../secret.png", str(root.parent / "secret.png"), "link.png", "folder/secret.png", "pipe.png",
                 "inner.png"]  # fmt: skip
        (images.parent / "secret.png").write_bytes((root.parent / "secret.png").read_bytes())
        change_items(place, lambda table: table.set_column(0, "path", pa.array(paths)))
        with serving(library({"c": Source(place, images)})) as client:
            thumbnails = read_catalog(place).thumbnails(range(6))
            for i in range(5):
                assert client.get(f"/api/catalogs/c/image?id={i}").content == thumbnails[i], paths[i]
                heat = client.post("/api/catalogs/c/heatmap", json={"like": [{"position": i}], "id": paths[5]})
                assert heat.status_code == 200
            assert read_image(client.get("/api/catalogs/c/image?id=5").content).shape == (3, 20, 60)
        for path in (*paths[:5], "x\0y", ".", "none.png"):
            assert read_inside(images, path) is None
        assert read_inside(images, "inner.png") == (images / "real.png").read_bytes()
        assert read_inside(images, "real.png", most=10) is None

    def test_an_original_that_cannot_be_read_gives_way_to_its_thumbnail(self, root, encoder, tmp_path):
        kinds = {
            "missing": lambda path: None,
            "empty": lambda path: path.write_bytes(b""),
            "text": lambda path: path.write_text("no image"),
            "pdf": lambda path: path.write_bytes(b"%PDF-1.7 ..."),
            "truncated": lambda path: path.write_bytes(png(1, root)[:200]),
            "header": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(50)),
            "damaged": lambda path: path.write_bytes(png(1, root)[:60] + bytes(500) + png(1, root)[560:]),
            "bomb": lambda path: path.write_bytes(bomb()),
            "scans": lambda path: path.write_bytes(scan_bomb(280_000)),
            "large": lambda path: (path.touch(), os.truncate(path, 2**29)),
            "folder": lambda path: path.mkdir(),
            "pipe": os.mkfifo,
            "circle": lambda path: path.symlink_to(path.name),
            "away": lambda path: path.symlink_to(root / "1.png"),
            "forbidden": lambda path: (path.write_bytes(png(1, root)), path.chmod(0)),
        }
        place, images = make_catalog(tmp_path / "c", root, encoder, count=len(kinds)), tmp_path / "images"
        images.mkdir()
        for kind, make in kinds.items():
            make(images / f"{kind}.png")
        paths = pa.array([f"{kind}.png" for kind in kinds])
        change_items(place, lambda table: table.set_column(0, "path", paths))
        thumbnails = read_catalog(place).thumbnails(range(len(kinds)))
        with serving(library({"c": Source(place, images)})) as client:
            for i, kind in enumerate(kinds):
                if kind == "forbidden" and os.access(images / "forbidden.png", os.R_OK):  # nothing is forbidden to root
                    continue
                shown = client.get(f"/api/catalogs/c/image?id={i}&v={client.get('/api/catalogs').json()[0]['version']}")
                assert (shown.status_code, shown.content) == (200, thumbnails[i]), kind
                assert shown.headers["content-type"] == "image/png"
                assert shown.headers["cache-control"] == "no-cache"  # the file may come back
                asked = {"like": [{"position": i}], "id": "missing.png"}
                assert client.post("/api/catalogs/c/heatmap", json=asked).status_code == 200
            (images / "missing.png").write_bytes(png(2, root))
            back = client.get("/api/catalogs/c/image?id=0")
            assert read_image(back.content).shape == (3, 72, 96)

    @pytest.mark.parametrize("path", ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "....//app.py", "/etc/passwd"])
    def test_static_files_stay_in_the_page(self, client, path):
        with socket.create_connection(address(client)) as raw:  # a client library would tidy the path up
            raw.sendall(f"GET /static/{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.split()[1] == b"404"


class TestPage:
    def test_head_is_get_without_a_body(self, client, root):
        token = upload(client, png(1, root)).json()["upload"]
        item = "/api/catalogs/art/item?id=1"
        for path in (
            *("/", "/docs", "/openapi.json", "/static/style.css", "/static/none", "/api/nothing", "/api/health"),
            *("/api/catalogs", "/api/catalogs/art/values?attribute=artist", "/api/catalogs/art/items?limit=2"),
            *(
                item,
                item.replace("item?", "thumbnail?"),
                item.replace("item?", "image?"),
                "/api/catalogs/art/item?id=99",
            ),
            f"/api/uploads/{token}/image",
            *("/api/uploads", "/api/catalogs/art/search"),
        ):
            with_body, without = client.get(path), client.head(path)
            assert without.status_code == with_body.status_code, path
            assert without.content == b""
            kept = ("content-type", "content-length", "etag", "cache-control", "content-security-policy")
            assert [without.headers.get(n) for n in kept[2:]] == [with_body.headers.get(n) for n in kept[2:]], path
            assert without.headers["content-type"] == with_body.headers["content-type"], path
            if path != "/api/health":  # whose length is that of its numbers
                assert without.headers.get("content-length") == with_body.headers.get("content-length"), path

    def test_page_and_documentation_need_nothing_else(self, client):
        if (PAGE / "index.html").is_file():
            page = client.get("/")
            assert page.headers["content-type"].startswith("text/html")
            assert client.get("/static/index.html").text == page.text
        docs = client.get("/docs")
        assert "POST</span> <code>/api/catalogs/{c}/search</code>" in docs.text
        assert not re.search(r"""(src|href)=["'](?!/)""", docs.text)
        assert "<script" not in docs.text
        paths = client.get("/openapi.json").json()["paths"]
        assert all(path in docs.text for path in paths)
        assert len(paths) == 12

    def test_errors_are_those_that_the_description_states(self, client, root):
        spec = client.get("/openapi.json").json()
        fields = {"error", "reason", "missing", "version", "items"}
        assert set(spec["components"]["schemas"]["Problem"]["properties"]) == fields
        seen: set[tuple[str, int]] = set()
        form = {"content-type": "multipart/form-data; boundary=b"}
        plain = {"content-type": "application/json"}
        like = {"like": [{"id": 1}]}
        file = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n%s\r\n--b--\r\n'

        def ask(path: str, method: str, stated: dict, url: str, **more) -> None:
            answer = client.request(method, url, **more)
            seen.add((path, answer.status_code))
            assert str(answer.status_code) in stated, (method, url, answer.text)
            if answer.status_code >= 400:
                content = stated[str(answer.status_code)]["content"]["application/json"]
                assert content == {"schema": {"$ref": "#/components/schemas/Problem"}}
                assert answer.headers["content-type"] == "application/json"
                assert isinstance(answer.json()["error"], str)
                assert set(answer.json()) <= fields

        good = {"c": "art", "item": "1", "token": upload(client, png(1, root)).json()["upload"]}
        for path, methods in spec["paths"].items():
            for method, route in methods.items():
                urls = [path.format(**good)]
                urls += [f"{urls[0]}?attribute=artist"] if path.endswith("/values") else []
                urls += [f"{urls[0]}?id=1"] if path.endswith(("/item", "/thumbnail", "/image")) else []
                urls += [path.format(**{**good, name: bad}) for name in good for bad in ("99", "x", "-1", "1" * 5000)]
                for parameter in route.get("parameters", ()):
                    urls += [f"{urls[0]}?{parameter['name']}={bad}" for bad in ("x" * 2500, "nan", "a=b=c", "%ff")]
                for url in urls:
                    ask(path, method, route["responses"], url)
                    ask(path, method, route["responses"], url, headers={"host": "a/b"})
                    ask(path, method, route["responses"], url, headers={"origin": "https://evil.example"})
                if method == "post":
                    for body in (b"", b"{", b"[]", b"\xff", b'{"like": [{"id": 99}]}', b"x" * 100_000):
                        for kind in (form, plain, {"content-type": "text/plain"}):
                            ask(path, method, route["responses"], urls[0], content=body, headers=kind)
                    for body in (
                        {},
                        like,
                        {**like, "id": 2},
                        {**like, "id": 99},
                        {**like, "where": "x"},
                        {**like, "weights": {"x": 1}},
                    ):
                        ask(path, method, route["responses"], urls[0], json=body)
                    for data in (b"", b"x", b"%PDF", png(1, root)[:100], bomb(), png(1, root)):
                        ask(path, method, route["responses"], urls[0], content=file % data, headers=form)
        kinds = {status for _, status in seen}
        assert {200, 201, 400, 403, 404, 413, 415, 422} <= kinds
        assert 500 not in kinds
        assert {path for path, status in seen if status < 300} == set(spec["paths"])

    def test_headers(self, client):
        for path in ("/api/health", "/api/nothing", "/static/index.html", "/api/catalogs/art/thumbnail?id=1"):
            headers = client.get(path).headers
            assert headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob: data:")
            assert headers["x-content-type-options"] == "nosniff"
            assert "server" not in headers or "uvicorn" in headers["server"]
        assert "default-src 'none'" in client.get("/docs").headers["content-security-policy"]


# ---------------------------------------------------------------------------------------- searching


class TestSearch:
    def test_by_id_equals_brute_force(self, client, folder):
        vectors = read_catalog(folder).index.reconstruct()
        answer = search(client, like=[{"id": 4}], k=5, collapse=False).json()
        scores = vectors @ vectors[4]
        scores[4] = -2
        order = scores.argsort(descending=True)[:5].tolist()
        assert [int(r["id"]) for r in answer["results"]] == order
        assert [r["rank"] for r in answer["results"]] == [1, 2, 3, 4, 5]
        for result in answer["results"]:
            assert result["score"] == pytest.approx(float(scores[int(result["id"])]), abs=1e-5)
            assert sum(result["parts"].values()) == pytest.approx(result["score"], abs=1e-5)
            assert result["attributes"]["artist"] == ARTISTS[int(result["id"]) % 3]
            assert result["verdict"] == answer["verdict"] == "uncalibrated"
            assert ("artist" in result["shared"]) == (int(result["id"]) % 3 == 1)
            assert (result["width"], result["height"]) == (48, 36)
        assert answer["total_candidates"] == N - 1
        assert set(answer["milliseconds"]) == {"encode", "search"}

    def test_an_upload_finds_itself_whichever_way_it_comes(self, client, root):
        data = png(9, root)
        sent = upload(client, data)
        assert sent.status_code == 201
        token = sent.json().pop("upload")
        assert sent.json() == {"upload": token, "width": 96, "height": 72, "expires_s": 604_800}
        by_token = search(client, like=[{"upload": token}], k=3).json()["results"]
        at_once = upload(client, data, "/api/catalogs/art/search/image?k=3").json()["results"]
        assert by_token[0]["id"] == "9"
        assert by_token[0]["score"] == pytest.approx(1, abs=1e-5)
        assert [r["id"] for r in at_once] == [r["id"] for r in by_token]
        assert len(at_once) == 3
        assert read_image(client.get(f"/api/uploads/{token}/image").content).shape == (3, 72, 96)

    def test_several_examples_filters_and_counterexamples(self, client, root):
        token = upload(client, png(9, root)).json()["upload"]
        both = search(
            client, like=[{"upload": token}, {"id": 2}], unlike=[{"id": 5}], k=50, where="artist!=Claude Monet"
        )
        found = [int(r["id"]) for r in both.json()["results"]]
        assert {i % 3 for i in found} == {1, 2}
        assert not {2, 3, 4, 5} & set(found)  # the examples and their works
        assert both.json()["total_candidates"] == 2 * N // 3 - 3
        assert search(client, like=[{"id": 0}], k=50, weights={"content": 2}).status_code == 200

    def test_the_least_score_cuts(self, client):
        whole = search(client, like=[{"id": 0}], k=10).json()["results"]
        least = whole[3]["score"] - 1e-5
        cut = search(client, like=[{"id": 0}], k=10, min_score=least).json()["results"]
        assert [result["id"] for result in cut] == [result["id"] for result in whole[:4]]
        assert search(client, like=[{"id": 0}], min_score=1.5).json()["results"] == []

    def test_verdicts_come_from_the_calibration(self, root, encoder, tmp_path):
        place = make_catalog(tmp_path / "c", root, encoder)
        stated = {"rate": {"same_work": 0.01}, "same_work": [-1.0, 0.4], "similar": None, "neighbours": 1}
        write_calibration(place, {**stated, "weights": {"content": 1.0}, "units": {"same_work": N // 4}})
        with serving(library({"c": Source(place)})) as client:
            assert client.get("/api/catalogs").json()[0]["calibration"]["same_work"] == [-1.0, 0.4]
            answer = upload(client, png(1, root), "/api/catalogs/c/search/image").json()
            assert answer["verdict"] == answer["results"][0]["verdict"] == "same work"

    @pytest.mark.parametrize(
        ("body", "status", "message"),
        [
            ({"like": []}, 422, "like: "),
            ({}, 422, "like: Field required"),
            ({"like": [{"id": 1, "upload": "x"}]}, 422, "give either"),
            ({"like": [{}]}, 422, "give either"),
            ({"like": [{"id": 24}]}, 404, "no item '24'"),
            ({"like": [{"upload": "../../etc/passwd"}]}, 404, "send the image again"),
            ({"like": [{"id": 1}], "unlike": [{"id": -2}]}, 404, "no item '-2'"),
            ({"like": [{"id": 1}], "where": "artist~x"}, 422, "has no ="),
            ({"like": [{"id": 1}], "where": "artist=Nobody"}, 422, "no item has artist 'Nobody'"),
            ({"like": [{"id": 1}], "weights": {"smell": 1}}, 422, "no part 'smell'"),
            ({"like": [{"id": 1}], "weights": {"content": -1}}, 422, "at least 0"),
            ({"like": [{"id": 1}], "k": 0}, 422, "k: "),
            ({"like": [{"id": 1}], "k": 10**9}, 422, "k: "),
            ({"like": [{"id": 1}], "diversity": 2}, 422, "diversity: "),
            ({"like": [{"id": 1}], "min_score": "a"}, 422, "min_score: "),
            ({"like": [{"id": 1}] * 17}, 422, "like: "),
            ({"like": [{"id": 1}], "colour": 1}, 422, "colour: Extra inputs"),
        ],
    )
    def test_bad_requests(self, client, body, status, message):
        assert message in error(search(client, **body), status)

    @pytest.mark.parametrize(
        "number",
        ["1e308", "-1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-320", "1" * 400, "1" * 5000],
    )
    def test_numbers_beyond_all_sense(self, client, number):
        """Every number that a request holds: an answer within its bounds, or a refusal that is no failure."""
        kind = {"content-type": "application/json"}
        like = '"like": [{"id": 1}]'
        for body in (
            *(f'{{"like": [{{"id": {number}}}]}}', f'{{{like}, "k": {number}}}', f'{{{like}, "diversity": {number}}}'),
            *(f'{{{like}, "weights": {{"content": {number}}}}}', f'{{{like}, "where": "year={number}..2e9"}}'),
            *(f'{{{like}, "where": "year=1..{number}"}}', f'{{{like}, "where": "year={number}"}}'),
        ):
            answer = client.post("/api/catalogs/art/search", content=body, headers=kind)
            assert answer.status_code in (200, 400, 404, 422), (body[:80], answer.text)
            if answer.status_code == 200:
                assert all(-1 <= result["score"] <= 1 for result in answer.json()["results"])
                json.loads(answer.text, parse_constant=lambda _: 1 / 0)
        heat = f'{{{like}, "id": 2, "weights": {{"content": {number}}}}}'
        assert client.post("/api/catalogs/art/heatmap", content=heat, headers=kind).status_code in (200, 400, 422)
        for path in (f"items?offset={number}", f"items?limit={number}", f"items?seed={number}", f"item?id={number}",
                     f"item?position={number}",
                     f"items?where=year={number}..2", f"values?attribute=year&limit={number}"):  # fmt: skip
            answer = client.get(f"/api/catalogs/art/{path}")
            assert answer.status_code in (200, 400, 404, 422), (path[:80], answer.text)

    def test_weights_of_any_size_are_ratios(self, client):
        usual, huge = (
            search(client, like=[{"id": 1}], weights={"content": weight}).json()["results"] for weight in (1, 1e308)
        )
        assert huge == usual

    def test_bad_json(self, client):
        for content in (b"{", b"[1]", b"\xff", b'{"like": NaN}'):
            headers = {"content-type": "application/json"}
            response = client.post("/api/catalogs/art/search", content=content, headers=headers)
            assert error(response, 400 if content == b"\xff" else 422)
        big = b'{"like": [' + b" " * JSON_BYTES + b"]}"
        too_large = client.post("/api/catalogs/art/search", content=big, headers={"content-type": "application/json"})
        assert "larger than" in error(too_large, 413)
        assert client.post("/api/catalogs/none/search", json={"like": [{"id": 1}]}).status_code == 404


NAMES = ("x", "7", "0007", "007", "a, b/c?.png", "1", "0", "position:0")  # ids of items 0, 1, ...


def named(folder: Path, root: Path, encoder: nn.Module, order: Sequence[int]) -> Path:
    """A catalog of the named items in this order; item i shows image i."""
    index = FaissIndex("Flat")
    index.add(encode(encoder, torch.stack([read_image(root / f"{i}.png", size=64) for i in order])))
    mediums = ("oil; canvas", "ink | paper", '"oil"', "a=b\nc\r\n", "1..2", "*", "!= no", "1900")
    columns = {"id": [NAMES[i] for i in order], "path": [f"{i}.png" for i in order]}
    columns |= {"medium": [mediums[i] for i in order], "year": [str(1900 + i) for i in order]}
    thumbnails = [encode_thumbnail(read_image(root / f"{i}.png"), 48) for i in order]
    write_catalog(folder, index=index, items=item_table(columns, thumbnails), encoder=encoder,
                  config={"model": MODEL}, about={})  # fmt: skip
    return folder


class TestNames:
    def test_ids_go_first_and_positions_where_asked_for(self, root, encoder, tmp_path):
        place = named(tmp_path / "c", root, encoder, range(8))
        thumbnails = read_catalog(place).thumbnails(range(8))
        with serving(library({"c": Source(place)})) as client:

            def get(kind: str, **asked: object) -> httpx.Response:
                return client.get(f"/api/catalogs/c/{kind}", params=asked)

            listed = get("items").json()["items"]
            assert [item["id"] for item in listed] == list(NAMES)
            for i, name in enumerate(NAMES):
                assert get("item", id=name).json() == listed[i]
                assert get("item", position=i).json() == get("item", id=f"{i}.png").json() == listed[i]
                assert get("thumbnail", id=name).content == get("image", id=name).content == thumbnails[i]
                ids = {r["id"] for r in search(client, "c", like=[{"id": name}]).json()["results"]}
                assert (
                    ids
                    == set(NAMES) - {name}
                    == {r["id"] for r in search(client, "c", like=[{"position": i}]).json()["results"]}
                )
            number = search(client, "c", like=[{"id": 7}, {"id": 1}], k=8).json()["results"]
            assert {r["id"] for r in number} == set(NAMES) - {"7", "1"}
            for name in ("3", "00007", "position:8", "X", ""):
                refused = get("item", id=name)
                assert refused.status_code == 404, name
                assert refused.json()["missing"] == [{"id": name}]
            assert "give the item either by id=" in error(get("item"), 422)
            assert "give the item either by id=" in error(get("item", id="x", position=0), 422)
            asked = [{"id": "x"}, {"id": "gone"}, {"upload": "A" * 20}, {"position": 8}]
            refused = search(client, "c", like=asked)
            assert refused.status_code == 404
            assert refused.json()["missing"] == asked[1:]

    def test_a_request_for_another_version_is_told_where_its_items_are(self, root, encoder, tmp_path):
        place = named(tmp_path / "c", root, encoder, range(8))
        with serving(library({"c": Source(place)})) as client:
            service = client.service
            (old,) = (about["version"] for about in client.get("/api/catalogs").json())
            asked = client.post(f"/api/catalogs/c/search?v={old}", json={"like": [{"id": "7"}]})
            assert asked.status_code == 200
            named(place, root, encoder, [7, 6, 5, 4, 3, 1, 0])  # without "0007"
            until(lambda: service.library.refresh() or service.library.catalogs[0].version != old)
            (new,) = (about["version"] for about in client.get("/api/catalogs").json())
            like = {"like": [{"id": "7"}, {"id": "0007"}, {"position": 3}, {"id": "0.png"}]}
            where = {"7": "7", "0007": None, "position:3": "007", "0.png": "x"}
            refused = client.post(f"/api/catalogs/c/search?v={old}", json=like)
            assert (refused.status_code, refused.json()["version"], refused.json()["items"]) == (409, new, where)
            heat = client.post(f"/api/catalogs/c/heatmap?v={old}", json={**like, "id": "1"})
            assert (heat.status_code, heat.json()["items"]) == (409, {**where, "1": "1"})
            for path in ("items", "values?attribute=medium", "item?id=7"):
                join = "&" if "?" in path else "?"
                assert client.get(f"/api/catalogs/c/{path}{join}v={old}").status_code == 409
                assert client.get(f"/api/catalogs/c/{path}{join}v={new}").status_code == 200
            unknown = client.get("/api/catalogs/c/item?position=3&v=0123456789abcdef")
            assert (unknown.status_code, unknown.json()["items"]) == (409, {"position:3": None})
            assert client.get(f"/api/catalogs/c/image?position=3&v={old}").json()["items"] == {"position:3": "007"}
            shown = client.get(f"/api/catalogs/c/thumbnail?id=7&v={old}")  # the same work, not to be kept
            assert (shown.content, shown.headers["cache-control"]) == (
                read_catalog(place).thumbnails([5])[0],
                "no-cache",
            )
            assert search(client, "c", like=[{"id": "7"}]).status_code == 200

    def test_filters_are_data(self, root, encoder, tmp_path):
        place = named(tmp_path / "c", root, encoder, range(8))
        mediums = read_catalog(place).items["medium"].to_pylist()
        with serving(library({"c": Source(place)})) as client:

            def both(*filters: dict) -> set[str]:
                listed = client.get("/api/catalogs/c/items", params={"filters": json.dumps(filters)}).json()
                found = search(client, "c", like=[{"id": "x"}], filters=list(filters), k=50).json()
                ids = {item["id"] for item in listed["items"]}
                assert {r["id"] for r in found["results"]} == ids - {"x"}
                return ids

            assert both() == set(NAMES)
            for i, medium in enumerate(mediums):
                assert both({"attribute": "medium", "values": [medium]}) == {NAMES[i]}
                assert both({"attribute": "medium", "values": [medium], "negate": True}) == set(NAMES) - {NAMES[i]}
            assert both({"attribute": "medium", "values": mediums[:3]}) == set(NAMES[:3])
            assert both({"attribute": "medium", "values": [""]}) == set()
            assert both({"attribute": "medium", "values": ["", "INK|PAPER"]}) == {NAMES[1]}
            assert both({"attribute": "year", "values": ["1903"]}) == {NAMES[3]}
            assert both({"attribute": "year", "low": 1902, "high": None}, {"attribute": "year", "high": 1903.5}) == {
                *NAMES[2:4]
            }
            assert both({"attribute": "medium"}) == set(NAMES)
            for filters, message in (
                ([{"attribute": "smell"}], "no attribute 'smell'"),
                ([{"attribute": "medium", "values": ["none"]}], "no item has medium 'none'"),
                ([{"attribute": "year", "low": 3, "high": 1}], "its lower end is above its upper end"),
                ([{"attribute": "year", "values": ["1"], "low": 1}], "write two conditions"),
                ([{"attribute": "year", "above": 1}], "filters.0.above"),
                ([{"attribute": "year"}] * 101, "filters"),
            ):
                assert message in error(search(client, "c", like=[{"id": "x"}], filters=filters), 422)
                listed = client.get("/api/catalogs/c/items", params={"filters": json.dumps(filters)})
                assert message in error(listed, 422)
            assert "filters: " in error(client.get("/api/catalogs/c/items?filters=["), 422)


class TestHeatMaps:
    def test_of_several_examples_they_sum_to_the_score_of_the_card(self, client, root):
        token = upload(client, png(9, root)).json()["upload"]
        asked = {"like": [{"id": 9}, {"upload": token}, {"id": 2}], "unlike": [{"id": 6}], "weights": {"content": 3}}
        found = search(client, **asked, k=N, collapse=False).json()["results"]
        score = next(r["score"] for r in found if r["id"] == "4")
        plain = search(client, like=[{"id": 2}], k=N, collapse=False).json()["results"]
        of_example = next(r["score"] for r in plain if r["id"] == "4")
        for shown, of in ((2, of_example), (0, None)):
            answer = client.post("/api/catalogs/art/heatmap", json={**asked, "id": 4, "shown": shown}).json()
            assert answer["score"] == pytest.approx(score, abs=1e-5)
            assert np.sum(answer["item"]["values"]) + answer["item"]["rest"] == pytest.approx(score, abs=1e-5)
            assert answer["rest"] == answer["item"]["rest"]
            if of is not None:
                assert np.sum(answer["query"]["values"]) + answer["query"]["rest"] == pytest.approx(of, abs=1e-5)
        assert "which has 3 images" in error(
            client.post("/api/catalogs/art/heatmap", json={**asked, "id": 4, "shown": 3}), 422
        )

    def test_contributions_sum_to_the_score(self, client, root):
        token = upload(client, png(9, root)).json()["upload"]
        for like in ({"id": 9}, {"upload": token}):
            answer = client.post("/api/catalogs/art/heatmap", json={"like": [like], "id": 4}).json()
            found = search(client, like=[like], k=N, collapse=False).json()["results"]
            score = next(r["score"] for r in found if r["id"] == "4")
            assert answer["score"] == pytest.approx(score, abs=1e-5)
            for side in ("query", "item"):
                values = np.array(answer[side]["values"])
                assert values.shape == (answer[side]["height"], answer[side]["width"])
                assert values.sum() + answer[side]["rest"] == pytest.approx(score, abs=1e-5)

    def test_refusals(self, client):
        heat = "/api/catalogs/art/heatmap"
        assert "no item '99'" in error(client.post(heat, json={"like": [{"id": 1}], "id": 99}), 404)
        assert "no item '99'" in error(client.post(heat, json={"like": [{"id": 99}], "id": 1}), 404)
        wrong = {"like": [{"id": 1}], "id": 2, "weights": {"smell": 1}}
        assert "no part 'smell'" in error(client.post(heat, json=wrong), 422)


# ---------------------------------------------------------------------------------- hostile uploads


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG whose header claims many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    packed = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + packed


def slow_image(size: int = 18_000_000) -> bytes:
    """A BMP whose runs of one pixel each keep Pillow's decoder, which is Python, for seconds."""
    side = int((size / 2) ** 0.5)
    header = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54 + 1024)
    header += struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    row = b"\x01\x07\x01\x09" * (side // 2) + b"\x01\x07" * (side % 2) + b"\0\0"
    return header + bytes(1024) + row * side


def endless(raw: socket.socket) -> int:
    """How many bytes of a body without end the server takes."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < 100_000_000:
            raw.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
            sent += 65_536
    return sent


class TestUploads:
    @pytest.mark.parametrize("path", ["/api/uploads", "/api/catalogs/art/search/image"])
    def test_bad_images_are_refused_with_a_reason(self, client, root, path):
        for data, status, message in (
            (b"this is no picture at all", 415, "not-an-image"),
            (b"%PDF-1.7 ...", 415, "unsupported: PDF"),
            (b"", 415, "empty"),
            (png(1, root)[:200], 422, "truncated"),
            (bomb(), 422, "too-many-pixels"),
            (bomb(9000, 9000), 422, "too-many-pixels"),
            (b"\xff\xd8\xff\xe0" + b"\0" * 50, 422, "decode-failed"),
            (scan_bomb(280_000), 422, "too-many-scans: more than 83 scans of 4000 x 3000 pixels"),
        ):
            assert message in error(upload(client, data, path), status)
        assert client.service.pending == 0

    def test_an_upload_that_breaks_off_is_one_line_in_the_log(self, client, root, caplog):
        head = b"host: x\r\ncontent-length: 9000\r\n"
        form = (
            b'content-type: multipart/form-data; boundary=b\r\n\r\n--b\r\ncontent-disposition: form-data; name="file"'
        )
        with caplog.at_level("INFO"):
            for path, rest in (
                ("/api/uploads", form),
                ("/api/uploads", form + b'; filename="x"\r\n\r\n' + png(1, root)[:2000]),
                ("/api/catalogs/art/search/image", form),
                ("/api/catalogs/art/search", b'content-type: application/json\r\n\r\n{"like": '),
                ("/api/nothing", form),
            ):
                with socket.create_connection(address(client)) as raw:
                    raw.sendall(f"POST {path} HTTP/1.1\r\n".encode() + head + rest)
                    time.sleep(0.1)
            with socket.create_connection(address(client)) as raw:  # goes before its answer
                raw.sendall(b"GET /api/catalogs/art/items?limit=24 HTTP/1.1\r\nhost: x\r\n\r\n")
            until(lambda: sum(r.name == "simsearch.serving" for r in caplog.records) >= 6)
        assert [r for r in caplog.records if r.levelname != "INFO" or r.exc_info] == []
        said = [r.getMessage() for r in caplog.records if r.name == "simsearch.serving"]
        assert sum(bool(re.search(r"POST /api/\S+ (499|400|404) ", line)) for line in said) == 5
        assert client.service.pending == 0

    def test_forms(self, client, root):
        url = "/api/uploads"
        assert "multipart/form-data" in error(client.post(url, content=png(1, root)), 415)
        assert "field file" in error(client.post(url, files={"picture": png(1, root)}), 422)
        assert "field file" in error(client.post(url, files={"a": b""}, data={"file": "text"}), 422)
        two = [("file", png(1, root)), ("file", png(2, root))]
        assert "cannot be read" in error(client.post(url, files=two), 400)
        for kind, body in (("multipart/form-data", b"x"), ("multipart/form-data; boundary=x", b"nonsense")):
            assert error(client.post(url, content=body, headers={"content-type": kind}), 400)

    def test_an_oversized_upload_is_cut_off(self, folder):
        limits = Limits(rate=None, max_upload_bytes=100_000)
        with serving(library({"art": Source(folder)}, limits), limits) as client:
            assert "0.1 MB" in error(upload(client, b"\x89PNG" + b"x" * 400_000), 413)
            assert "0.1 MB" in error(upload(client, b"\x89PNG" + b"x" * 100_001), 413)
            form = {"content-type": "multipart/form-data; boundary=b"}
            head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'

            host = address(client)
            start = f"POST /api/uploads HTTP/1.1\r\nhost: x\r\ncontent-type: {form['content-type']}\r\n".encode()
            with socket.create_connection(host, timeout=10) as raw:  # chunked and endless
                raw.sendall(start + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(head), head))
                assert endless(raw) < 100_000_000
            for path in ("/api/uploads", "/api/catalogs/art/search", "/api/nothing"):
                for origin in (b"", b"origin: https://evil.example\r\n"):
                    with socket.create_connection(host, timeout=10) as raw:
                        raw.sendall(start.replace(b"/api/uploads", path.encode()) + origin)
                        raw.sendall(b"transfer-encoding: chunked\r\n\r\n")
                        assert endless(raw) < 100_000_000
            for length in (10**12, 500):  # a length that is not the truth
                with socket.create_connection(host, timeout=10) as raw:
                    raw.sendall(start + f"content-length: {length}\r\n\r\n".encode() + head)
                    raw.sendall(b"x" * 450_000)
                    assert re.match(rb"HTTP/1.1 4(13|00|22)", raw.recv(1000))
            assert client.get("/api/health").json()["queue"] == 0

    def test_a_slow_upload_is_given_up(self, folder):
        limits = Limits(rate=None, upload_seconds=1)
        books, kind = library({"art": Source(folder)}, limits), b"content-type: multipart/form-data; boundary=b"
        with serving(books, limits) as client, socket.create_connection(address(client), timeout=10) as raw:
            raw.sendall(b"POST /api/uploads HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n" + kind + b"\r\n\r\n--b")
            assert raw.recv(1000).startswith(b"HTTP/1.1 408")

    def test_they_expire_and_make_room(self, client, root):
        now = [0.0]
        kept = Uploads(2, 10_000, 60, clock=lambda: now[0])
        one, two, three = (Upload(bytes(1000)) for _ in range(3))
        first, second = kept.add(one), kept.add(two)
        assert kept.get(first) is one  # now the second is the longest unused
        third = kept.add(three)
        assert (kept.get(second), kept.get(first), kept.get(third)) == (None, one, three)
        now[0] = 59
        assert kept.get(first) is one
        now[0] = 100
        assert (kept.get(third), kept.get(first), len(kept)) == (None, one, 1)
        now[0] = 200
        assert kept.get(first) is None
        large = Uploads(10, 2500, 60, clock=lambda: now[0])
        tokens = [large.add(Upload(bytes(1000))) for _ in range(3)]
        assert [large.get(token) is None for token in tokens] == [True, False, False]
        large.get(tokens[1]).pixels[1, "square", None] = torch.zeros(2000, dtype=torch.uint8)
        large.sweep()  # too much, but the last one used
        assert [large.get(token) is None for token in tokens] == [True, False, True]
        assert len({*tokens, first, second, third}) == 6

        token = upload(client, png(1, root)).json()["upload"]
        client.service.uploads._clock = lambda: time.monotonic() + Limits().uploads_kept_seconds + 1
        try:
            assert "expired" in error(search(client, like=[{"upload": token}]), 404)
            assert "expired" in error(client.get(f"/api/uploads/{token}/image"), 404)
        finally:
            client.service.uploads._clock = time.monotonic

    def test_weights_and_version_beside_an_image(self, client, root):
        def status(**query: str) -> tuple[int, dict]:
            answer = upload(client, png(3, root), "/api/catalogs/art/search/image", params=query)
            return answer.status_code, answer.json()

        version = client.get("/api/catalogs").json()[0]["version"]
        code, found = status(weights='{"content": 2}', v=version, k="2")
        assert (code, found["results"][0]["id"], len(found["results"])) == (200, "3", 2)
        code, stale = status(v="0000")
        assert (code, stale["version"], stale["items"]) == (409, version, {})
        for weights, message in (('{"form": 1}', "form"), ("content:1", "weights: Invalid JSON"), ("[1]", "weights")):
            code, refused = status(weights=weights)
            assert (code, message in refused["error"]) == (422, True), refused
        assert "other: Extra inputs" in status(other="1")[1]["error"]

    def test_a_folder_keeps_them_for_the_next_server(self, folder, root, tmp_path):
        place = tmp_path / "kept"
        with serving(library({"art": Source(folder)}), uploads_folder=place) as client:
            token = upload(client, png(3, root)).json()["upload"]
            first = search(client, like=[{"upload": token}]).json()["results"]
            assert place.stat().st_mode & 0o777 == 0o700
            assert [file.name for file in place.iterdir()] == [f"{token}.upload"]
            assert (place / f"{token}.upload").read_bytes() == png(3, root)
        with serving(library({"art": Source(folder)}), uploads_folder=place) as client:
            assert search(client, like=[{"upload": token}]).json()["results"] == first
            assert client.get(f"/api/uploads/{token}/image").status_code == 200
            for other in ("..%2F..%2Fsecret", "a" * 22, f"{token}.upload", "x" * 300):
                assert client.get(f"/api/uploads/{other}/image").status_code == 404
            (place / f"{'l' * 22}.upload").symlink_to(folder / "catalog.json")
            assert client.get(f"/api/uploads/{'l' * 22}/image").status_code == 404
        with serving(library({"art": Source(folder)})) as client:  # in memory only
            assert "expired" in error(search(client, like=[{"upload": token}]), 404)

    def test_the_folder_is_bounded_and_holds_what_is_in_use(self, tmp_path):
        now = [1e9]
        bounds = 3, 2500, 60
        (tmp_path / "holiday.jpg").write_bytes(bytes(9000))  # nobody's upload
        (tmp_path / ".0a0b0c0d-99999999-1.half.upload").write_bytes(b"half")
        kept = UploadFolder(tmp_path, *bounds, clock=lambda: now[0])
        tokens = [letter * 22 for letter in "abcd"]
        for token in tokens[:2]:
            kept.write(token, bytes(1000))
            now[0] += 10
        assert kept.read(tokens[0]) == bytes(1000)  # now the second is the longest unused
        now[0] += 10
        kept.write(tokens[2], bytes(1000))  # 3000 bytes are too many
        assert [kept.read(token) is None for token in tokens] == [False, True, False, True]
        for token in tokens:
            now[0] += 1
            kept.write(token, bytes(10))
        assert [kept.read(token) is None for token in tokens] == [True, False, False, False]
        now[0] += 59
        kept.use(tokens[3])
        now[0] += 2
        assert [kept.read(token) is None for token in tokens] == [True, True, True, False], "before they are removed"
        kept.sweep()
        assert {path.name for path in tmp_path.iterdir()} >= {"holiday.jpg", f"{tokens[3]}.upload"}
        os.utime(tmp_path / ".0a0b0c0d-99999999-1.half.upload", (now[0] - 7200, now[0] - 7200))
        kept.sweep()
        assert {path.name for path in tmp_path.iterdir()} == {"holiday.jpg", f"{tokens[3]}.upload"}
        kept.write(tokens[0], bytes(9000))  # larger than all may be: the last one stays
        kept.sweep()
        assert {path.name for path in tmp_path.glob("*.upload")} == {f"{tokens[0]}.upload"}

    def test_a_folder_that_cannot_be_written_costs_no_upload(self, folder, root, tmp_path, monkeypatch, caplog):
        (tmp_path / "file").write_text("no folder")
        with serving(library({"art": Source(folder)}), uploads_folder=tmp_path / "file/below") as client:
            assert "memory only" in uploads_line(client.service)
            assert "file" in uploads_line(client.service)
            token = upload(client, png(3, root)).json()["upload"]
            assert search(client, like=[{"upload": token}]).status_code == 200
        with serving(library({"art": Source(folder)}), uploads_folder=tmp_path / "full") as client:
            assert "7 days" in uploads_line(client.service)

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(UploadFolder, "write", full)
            token = upload(client, png(3, root)).json()["upload"]
            assert search(client, like=[{"upload": token}]).status_code == 200
            assert "No space left" in caplog.text

    def test_a_part_is_what_a_file_of_it_is(self, client, root):
        with Image.open(root / "4.png") as image:
            buffer = io.BytesIO()
            image.crop((24, 18, 72, 54)).save(buffer, "PNG")
        token = upload(client, png(4, root)).json()["upload"]
        expected = upload(client, buffer.getvalue(), "/api/catalogs/art/search/image").json()["results"]
        whole = search(client, like=[{"upload": token}]).json()["results"]
        parts = ([0.25, 0.25, 0.5, 0.5], [24, 18, 48, 36])
        for part in parts:
            found = search(client, like=[{"upload": token, "region": part}]).json()["results"]
            assert [(r["id"], r["score"]) for r in found] == [(r["id"], r["score"]) for r in expected]
            once = "/api/catalogs/art/search/image?region=" + ",".join(map(str, part))
            assert upload(client, png(4, root), once).json()["results"] == found
        assert [r["score"] for r in whole] != [r["score"] for r in expected]
        assert search(client, like=[{"upload": token}]).json()["results"] == whole, "the part took the whole's place"
        by_item = search(client, like=[{"id": "4", "region": parts[0]}]).json()["results"]
        others = [(r["id"], r["score"]) for r in expected if r["attributes"]["work"] != "w2"]
        assert [(r["id"], r["score"]) for r in by_item] == others
        card, part = expected[3], {"upload": token, "region": parts[0]}
        heat = client.post("/api/catalogs/art/heatmap", json={"like": [part], "id": card["id"]}).json()
        assert heat["score"] == pytest.approx(card["score"], abs=1e-4)
        for _ in range(40):
            corner = [*np.random.default_rng(_).uniform(0, 0.5, 2), 0.4, 0.4]
            assert search(client, like=[{"upload": token, "region": corner}]).status_code == 200
        held = client.service.uploads.get(token)
        assert max(len(held.pixels), len(held.descriptors)) <= 18

    @pytest.mark.parametrize(
        ("example", "message"),
        [
            ({"region": [0, 0, 1.5, 1]}, "outside: the region 0,0,200,1"),
            ({"region": [0.5, 0, 0.7, 1]}, "at most 1"),
            ({"region": [0, 0, 0]}, "region"),
            ({"region": [0, 0, 0, 0]}, "w and h above 0"),
            ({"id": "4", "region": [0, 0, 20, 20]}, "in fractions"),
        ],
    )
    def test_what_is_no_part(self, client, root, example, message):
        if "id" not in example:
            example = {**example, "upload": upload(client, png(4, root)).json()["upload"]}
        if example["region"] == [0, 0, 1.5, 1]:
            example["region"] = [0, 0, 200, 1]
        assert message in error(search(client, like=[example]), 422)
        way = "/api/catalogs/art/search/image?region=" + ",".join(map(str, example["region"]))
        if "id" not in example:
            assert error(upload(client, png(4, root), way), 422)

    def test_size_is_that_of_the_upright_image(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
        pixels, size = decoded(buffer.getvalue(), 10, "longest", 10**6)
        assert size == (20, 40)
        assert pixels.shape == (3, 10, 5)


# ------------------------------------------------------------------------------------------ verification


def textured(i: int) -> Image.Image:
    """A picture of 240 x 180 with many corners, unlike the others."""
    generator = np.random.default_rng(i)
    coarse, fine = (generator.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((9, 12), (36, 48)))
    layers = [Image.fromarray(one).resize((240, 180), Image.Resampling.BICUBIC) for one in (coarse, fine)]
    return Image.blend(*layers, 0.55)


OUTLINES = {  # of two works on the wall, in its pixels
    "1": [[30, 40], [270, 40], [270, 220], [30, 220]],
    "4": [[350, 100], [550, 100], [550, 250], [350, 250]],
}


class TestVerification:
    @pytest.fixture(scope="class")
    def hall(self, tmp_path_factory, encoder) -> Path:
        """A catalog that verifies, and a photograph of a wall with works 1 and 4."""
        folder = tmp_path_factory.mktemp("hall")
        (folder / "root").mkdir()
        for i in range(8):
            textured(i).save(folder / f"root/{i}.png")
        wall = Image.new("RGB", (600, 300), (200, 190, 170))
        wall.paste(textured(1), (30, 40))
        wall.paste(textured(4).resize((200, 150)), (350, 100))
        wall.save(folder / "wall.png")
        loaded = api.LoadedEncoder(encoder, {"model": MODEL}, "toy")
        api.build_catalog(loaded, folder / "root", folder / "catalog", workers=0, verification=Verification())
        return folder

    def test_works_of_a_photograph_come_first_with_their_outlines(self, hall):
        wall = (hall / "wall.png").read_bytes()
        with serving(library({"hall": Source(hall / "catalog", hall / "root")})) as client:
            assert client.get("/api/catalogs").json()[0]["verifies"] is True
            example = {"upload": upload(client, wall).json()["upload"]}
            answer = search(client, "hall", like=[example]).json()
            assert answer["verdict"] == "same work"
            assert {result["id"] for result in answer["results"][:2]} == set(OUTLINES)
            for result in answer["results"][:2]:
                assert result["verdict"] == "same work"
                assert result["inliers"] >= 10
                expected = np.array(OUTLINES[result["id"]]) / (600, 300)
                np.testing.assert_allclose(result["outline"], expected, atol=0.01)
                points = np.array(result["points"])
                assert 10 <= len(points) <= min(200, result["inliers"] + 5)
                corner, size = expected[0], expected[2] - expected[0]
                np.testing.assert_allclose(points[:, :2], corner + size * points[:, 2:], atol=0.01)
            assert all("inliers" not in result for result in answer["results"][2:])
            again = search(client, "hall", like=[example]).json()
            assert again["results"] == answer["results"]

            part = {**example, "region": [0.5, 0.2, 0.5, 0.8]}  # the right work alone, in fractions of the part
            found = search(client, "hall", like=[part]).json()["results"]
            assert found[0]["id"] == "4"
            assert "inliers" not in found[1]
            expected = (np.array(OUTLINES["4"]) - (300, 60)) / (300, 240)
            np.testing.assert_allclose(found[0]["outline"], expected, atol=0.015)
            once = upload(client, wall, "/api/catalogs/hall/search/image?region=0.5,0.2,0.5,0.8").json()["results"]
            assert once == found
            of_python = api.open_catalog(hall / "catalog", device="cpu").search(
                hall / "wall.png", region=(0.5, 0.2, 0.5, 0.8), k=2
            )
            assert of_python[0].id == "4"
            np.testing.assert_allclose(of_python[0].outline, found[0]["outline"], atol=1e-3)

            without = search(client, "hall", like=[example], verify=False).json()["results"]
            assert all("inliers" not in result for result in without)
            for item in ({"id": "4.png"}, {"id": "4.png", "region": [0.1, 0.1, 0.7, 0.8]}):
                answered = search(client, "hall", like=[item]).json()
                assert "4" not in [result["id"] for result in answered["results"]]
                assert answered["verdict"] != "same work"
        with serving(library({"bare": Source(hall / "catalog")})) as client:  # a part of an item's thumbnail
            assert search(client, "bare", like=[{"id": "4.png", "region": [0.1, 0.1, 0.7, 0.8]}]).status_code == 200

    def test_regions_are_described_only_for_photographs_whose_work_does_not_fill_them(self, hall):
        with serving(library({"hall": Source(hall / "catalog", hall / "root")})) as client:

            def asked(path: Path) -> list[int]:
                token = upload(client, path.read_bytes()).json()["upload"]
                for _ in range(2):
                    found = search(client, "hall", like=[{"upload": token}])
                    assert found.json()["verdict"] == "same work"
                return [len(vectors) for vectors in client.service.uploads.get(token).regions.values()]

            assert asked(hall / "root/1.png") == []
            (count,) = asked(hall / "wall.png")
            assert count > 0
            with ThreadPoolExecutor(6) as threads:  # more than there are threads that search
                assert list(threads.map(asked, [hall / "wall.png"] * 6)) == [[count]] * 6
            example = {"upload": upload(client, (hall / "wall.png").read_bytes()).json()["upload"]}
            assert search(client, "hall", like=[example]).status_code == 200
            client.service.uploads.get(example["upload"]).regions.clear()
            with mock.patch.object(client.service._decoders, "call", return_value=Failure("too-slow", "1 s")):
                assert "too-slow: 1 s" in error(search(client, "hall", like=[example]), 422)
            client.service.stop_decoding()
            assert "shutting down" in error(search(client, "hall", like=[example]), 503)


# ------------------------------------------------------------------------------------------- growing


def test_a_new_picture_appears_and_a_removed_one_is_said_to_be_gone(tmp_path, encoder):
    root, place = tmp_path / "root", tmp_path / "c"
    root.mkdir()
    for i in range(8):
        textured(i).save(root / f"{i}.png")
    api.build_catalog(api.LoadedEncoder(encoder, {"model": MODEL}, "toy"), root, place, workers=0)
    with serving(library({"c": Source(place, root)})) as client:
        before = search(client, "c", like=[{"id": "3"}], k=10).json()
        textured(9).save(root / "new.png")
        change.update(place, read_manifest(root / "new.png", root), encoder, remove=False)
        change.remove(place, ["2"])
        assert client.service.library.refresh() == ["c"]
        after = search(client, "c", like=[{"id": "3"}], k=10).json()
        assert {result["id"] for result in after["results"]} == {"0", "1", "4", "5", "6", "7", "8"}
        scores = {result["id"]: result["score"] for result in before["results"]}
        for result in after["results"]:
            assert result["id"] == "8" or result["score"] == pytest.approx(scores[result["id"]], abs=2e-6)
        assert client.get("/api/catalogs/c/image?id=8").content != client.get("/api/catalogs/c/image?id=7").content
        assert search(client, "c", like=[{"id": "8"}]).json()["results"]
        assert error(search(client, "c", like=[{"id": "2"}]), 404) == "the item 2 was removed from c"
        assert error(client.get("/api/catalogs/c/image?id=2"), 404) == "the item 2 was removed from c"
        old = client.post(f"/api/catalogs/c/search?v={before['version']}", json={"like": [{"id": "2"}, {"id": "3"}]})
        assert (old.status_code, old.json()["items"]) == (409, {"2": None, "3": "3"})


# --------------------------------------------------------------------------------- limits and guards


class TestLimits:
    @pytest.mark.parametrize(("name", "value"), [("rate", 0), ("queue", 0), ("batch_wait_ms", -1), ("burst", 0)])
    def test_values(self, name, value):
        with pytest.raises(ValueError, match=f"limits.{name} must be"):
            Limits(**{name: value})

    def test_buckets(self):
        now = [0.0]
        buckets = TokenBuckets(2.0, 3, clock=lambda: now[0])
        assert [buckets.take("a", 1) for _ in range(3)] == [0, 0, 0]
        assert buckets.take("a", 1) == pytest.approx(0.5)
        assert buckets.take("b", 1) == 0
        now[0] = 0.5
        assert buckets.take("a", 1) == 0
        assert buckets.take("a", 1) > 0
        now[0] = 1000
        assert [buckets.take("a", 1) > 0 for _ in range(4)] == [False, False, False, True]
        buckets.charge("a", 10)
        assert buckets.take("a", 0) == pytest.approx(5)
        now[0] += 5.5
        assert buckets.take("a", 1) == 0

    def test_decoding_costs_what_it_takes(self):
        now = [0.0]
        buckets = TokenBuckets(2.0, 3, clock=lambda: now[0])
        one, other = Account(buckets, "a", 1.0), Account(buckets, "a", 1.0)
        one.pay()
        one.charge(0.25)  # half a request's time, which its price covers
        one.charge(0.5)
        assert buckets.take("a", 1.5) == 0  # 3 tokens less 1 paid, less 2 * .75 - 1 owed
        assert buckets.take("a", 0.1) > 0
        other.check()
        one.charge(10)
        with pytest.raises(HTTPException, match="try again in 10 s"):
            other.check()
        free = Account(None, "a", 1.0)
        free.pay()
        free.charge(1000)
        free.check()

    @pytest.mark.parametrize(
        ("method", "path", "price"),
        [
            ("GET", "/", 0),
            ("GET", "/api/health", 0),
            ("GET", "/api/catalogs", 1),
            ("GET", "/api/catalogs/art/thumbnail", 0.1),
            ("HEAD", "/api/catalogs/art/thumbnail", 0.1),
            ("GET", "/api/catalogs/art/image", 0.25),
            ("POST", "/api/catalogs/art/search/image", 1),  # an upload with a search is no picture that is shown
            ("POST", "/api/uploads", 1),
            ("OPTIONS", "/api/uploads", 0),
        ],
    )
    def test_prices(self, method, path, price):
        assert cost(method, path) == price

    def test_uploads_that_take_long_are_paid_for(self, folder):
        limits, slow = Limits(rate=20.0, burst=25, decode_seconds=1.0, threads=4), slow_image(10_000_000)
        with serving(library({"art": Source(folder)}, limits), limits) as client, ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: upload(client, slow), range(8)))
            states = {answer.status_code: answer for answer in answers}
            assert set(states) == {422, 429}  # each second is 20 requests, of which there are 25 and 20 a second
            assert "too-slow: it took more than 1 s" in error(states[422], 422)
            assert "too many requests" in error(states[429], 429)

    def test_a_wall_of_a_catalogs_own_pictures_has_a_fixed_price(self, folder, root, monkeypatch):
        limits = Limits(rate=1.0, burst=60)
        with serving(library({"art": Source(folder, root)}, limits), limits) as client:
            monkeypatch.setattr(client.service._decoders, "call", lambda f, *given, spent: (spent(1000), f(*given))[1])
            for address in ("thumbnail", "image"):
                assert {client.get(f"/api/catalogs/art/{address}?id={i}").status_code for i in range(N)} == {200}
            assert search(client, like=[{"id": "3"}]).status_code == 200
            assert client.get("/api/catalogs/art/image?id=3&side=6000").status_code == 200
            assert "too many requests" in error(search(client, like=[{"id": "3"}]), 429)

    def test_pictures_that_wait_leave_room_for_uploads(self, folder, root, monkeypatch):
        limits = Limits(rate=None, queue=1, threads=1)
        books = library({"art": Source(folder, root)}, limits)
        with serving(books, limits) as client, ThreadPoolExecutor(2) as threads:
            gate = threading.Event()

            def call(function: Callable, *given: object, spent: Callable) -> object:
                return function(*given) if function is decoded or gate.wait(20) else None

            monkeypatch.setattr(client.service._decoders, "call", call)
            try:
                path = "/api/catalogs/art/image?id="
                shown = [threads.submit(client.get, f"{path}{i}") for i in range(2)]
                until(lambda: client.service.showing.pending == 2)
                assert "too many requests are waiting" in error(client.get(f"{path}2"), 503)
                assert upload(client, png(1, root)).status_code == 201
            finally:
                gate.set()
            assert [one.result().status_code for one in shown] == [200, 200]

    @pytest.mark.parametrize(
        ("peer", "forwarded", "proxies", "client"),
        [
            ("10.0.0.1", ["1.2.3.4"], 0, "10.0.0.1"),
            ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], 1, "1.2.3.4"),
            ("10.0.0.1", ["6.6.6.6, 1.2.3.4, 10.0.0.2"], 2, "1.2.3.4"),
            ("10.0.0.1", [], 1, "10.0.0.1"),
            ("10.0.0.1", ["nonsense"], 1, "10.0.0.1"),
            ("2001:db8:1:2:3::4", [], 0, "2001:db8:1:2::/64"),
            ("10.0.0.1", ["6.6.6.6", "1.2.3.4"], 1, "1.2.3.4"),  # a proxy may add a line of its own
            ("10.0.0.1", ["1.2.3.4:5678"], 1, "1.2.3.4"),
            ("10.0.0.1", ["[2001:db8:1:2:3::4]:443"], 1, "2001:db8:1:2::/64"),
            ("::ffff:1.2.3.4", [], 0, "1.2.3.4"),  # else all of IPv4 would be one client
        ],
    )
    def test_who_a_client_is(self, peer, forwarded, proxies, client):
        assert client_address(peer, forwarded, proxies) == client

    def test_rate(self, folder):
        limits = Limits(rate=0.5, burst=3)
        with serving(library({"art": Source(folder)}, limits), limits, proxies=1) as client:
            path = "/api/catalogs/art/item?id=1"
            assert [client.get(path).status_code for _ in range(4)] == [200, 200, 200, 429]
            refused = client.get(path)
            assert "too many requests from 127.0.0.1" in error(refused, 429)
            assert 1 <= int(refused.headers["retry-after"]) <= 2
            assert "content-security-policy" in refused.headers
            assert client.get("/api/health").status_code == 200
            assert client.get(path, headers={"x-forwarded-for": "9.9.9.9"}).status_code == 200

    def test_thumbnails_cost_a_tenth(self, folder):
        limits = Limits(rate=0.01, burst=2)
        with serving(library({"art": Source(folder)}, limits), limits) as client:
            states = [client.get(f"/api/catalogs/art/thumbnail?id={i}").status_code for i in range(21)]
            assert states == [200] * 20 + [429]
            assert client.get("/api/health", headers={"x-forwarded-for": "9.9.9.9"}).status_code == 200

    def test_a_full_queue_tells_to_come_back(self, folder, root):
        limits = Limits(rate=None, queue=2, batch_size=1)
        books = library({"art": Source(folder)}, limits)
        with serving(books, limits) as client, ThreadPoolExecutor(8) as threads:
            (loaded,) = books.catalogs
            gate = threading.Event()
            blocked = loaded.worker.call(lambda _: gate.wait(20))
            until(blocked.running)
            token = upload(client, png(1, root)).json()["upload"]
            asked = [threads.submit(search, client, like=[{"upload": token}]) for _ in range(6)]
            done, waiting = wait(asked, timeout=2)
            for answer in done:
                refused = answer.result()
                assert "too many requests are waiting" in error(refused, 503)
                assert refused.headers["retry-after"] == "1"
            assert (len(done), len(waiting)) == (4, 2)
            assert client.get("/api/health").json()["queue"] == 2
            gate.set()
            assert [answer.result().status_code for answer in waiting] == [200, 200]
            assert upload(client, png(2, root)).status_code == 201


class TestOrigins:
    @pytest.mark.parametrize(
        ("host", "name"),
        [
            ("localhost", "localhost"),
            ("LOCALHOST:8000", "localhost"),
            ("localhost:", "localhost"),
            ("127.0.0.1:1", "127.0.0.1"),
            ("[::1]", "::1"),
            ("[::1]:8000", "::1"),
            ("localhost.", "localhost."),  # another name, which is not in the list
            ("127.1", "127.1"),
            ("0x7f.1", "0x7f.1"),
            *((bad, None) for bad in (
                "", "[::1]evil.com", "localhost:evil.com", "localhost:80:80", "[::1]:evil", "[::1]:80.evil.com", "[::1",
                "::1", "[::1%25x]", "[]", "[localhost]", "localhost@evil.com", "evil.com@localhost", "localhost/",
                "localhost evil.com", "localhost\t", " localhost", "localhost,evil.com", "http://localhost", "a\0b",
                "localhost:123456", "localhost:８０", "ｌocalhost", "localhost?x", "localhost#x", "a\\b", ":80",
                "localhost\n",
            )),
        ],
    )  # fmt: skip
    def test_names_in_host(self, host, name):
        assert host_name(host) == name

    def test_odd_names_are_refused(self, folder):
        with serving(library({"art": Source(folder)}), hosts=["127.0.0.1", "localhost", "::1"]) as client:

            def status(*lines: str, target: str = "/api/health") -> int:
                with socket.create_connection(address(client)) as raw:
                    raw.sendall("\r\n".join([f"GET {target} HTTP/1.1", *lines, "connection: close", "", ""]).encode())
                    return int(b"".join(iter(lambda: raw.recv(65536), b"")).split()[1])

            for good in ("localhost", "LocalHost:99", "[::1]:8000", "127.0.0.1"):
                assert status(f"host: {good}") == 200, good
            for bad in (
                "[::1]evil.com",
                "localhost:evil.com",
                "localhost@evil.com",
                "localhost evil.com",
                "[::1",
                "a/b",
            ):
                assert status(f"host: {bad}") == 400, bad
            for other in ("evil.com", "localhost.", "127.1", "0x7f.1", "localhost.evil.com", "[::2]", ""):
                assert status(f"host: {other}") in (400, 403), other
            assert status("host: localhost", "host: evil.com") == 400
            assert status() in (400, 403)
            assert status("host: localhost", target="http://evil.com/api/health") == 404
            for origin in ("http://[::1", "http://localhost:99999", "//x", "\\", "null"):
                answer = client.post("/api/catalogs/art/search", json={"like": [{"id": 1}]}, headers={"origin": origin})
                assert "may not use this server" in error(answer, 403), origin

    def test_pages_of_others_may_not_ask(self, folder):
        books = library({"art": Source(folder)})
        with serving(books, hosts=["127.0.0.1", "localhost"], origins=["https://art.example"]) as client:
            port = client.base_url.port

            def post(**headers: str) -> httpx.Response:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return client.post("/api/catalogs/art/search", json={"like": [{"id": 1}]}, headers=named)

            assert post().status_code == 200
            assert post(origin=f"http://127.0.0.1:{port}").status_code == 200
            allowed = post(origin="https://art.example")
            assert allowed.headers["access-control-allow-origin"] == "https://art.example"
            for origin in ("https://evil.example", "null", f"http://localhost:{port}", "http://127.0.0.1:1"):
                assert "may not use this server" in error(post(origin=origin), 403)
            assert "may not use this server" in error(post(sec_fetch_site="cross-site"), 403)
            for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example"):
                assert "does not answer to the name" in error(post(host=host, origin=f"http://{host}"), 403)
            preflight = {"origin": "https://art.example", "access-control-request-method": "POST"}
            assert client.options("/api/catalogs/art/search", headers=preflight).status_code == 200
            preflight["origin"] = "https://evil.example"
            assert client.options("/api/catalogs/art/search", headers=preflight).status_code == 400

    def test_pages_that_may_ask_can_read_refusals(self, folder):
        books, limits = library({"art": Source(folder)}), Limits(rate=0.1, burst=1)
        with serving(books, limits, hosts=["127.0.0.1"], origins=["https://art.example"]) as client:
            path, asks = "/api/catalogs/art/search", {"access-control-request-method": "POST"}
            for origin, allowed in (("https://art.example", "https://art.example"), ("https://evil.example", None)):
                own = {"origin": origin}
                answers = [client.get("/api/catalogs", headers=own) for _ in range(2)]
                assert answers[-1].status_code == 429
                answers.append(client.get("/api/catalogs", headers={**own, "host": "evil.example"}))
                assert answers[-1].status_code == 403
                answers.append(client.get("/api/nothing", headers=own))
                for answer in answers:
                    assert answer.headers.get("access-control-allow-origin") == allowed
                    assert "vary" not in answer.headers or answer.headers["vary"].lower() == "origin"
                    exposed = answer.headers.get("access-control-expose-headers", "")
                    assert ("retry-after" in exposed) == (allowed is not None)
                before = client.options(path, headers=own | asks)  # is no request of the page, and costs nothing
                assert before.status_code == (200 if allowed else 400)

    @pytest.mark.parametrize(
        ("given", "hosts"),
        [
            (None, []),
            ([], []),
            ("", []),
            ("art.example", ["art.example"]),
            ("Art.Example, b.example", ["art.example", "b.example"]),
            (["10.0.0.7", "[::1]", "2001:DB8::0:1"], ["10.0.0.7", "::1", "2001:db8::1"]),
            ("art.example:8000", "write art.example, without a port"),
            ("[::1]:8000", "write ::1, without a port"),
            *((bad, "is not the name of a host") for bad in ("*", "https://art.example", "art.example/", "münchen.de")),
        ],
    )
    def test_hosts_of_a_setting(self, given, hosts):
        if isinstance(hosts, str):
            with pytest.raises(ValueError, match=f"allow_hosts: .*{hosts}"):
                addresses("allow_hosts", given, read_host)
        else:
            assert addresses("allow_hosts", given, read_host) == hosts

    @pytest.mark.parametrize(
        ("given", "origin"),
        [
            ("https://art.example", "https://art.example"),
            ("HTTPS://Art.Example:443/", "https://art.example"),
            ("http://art.example:80", "http://art.example"),
            ("http://art.example:443", "http://art.example:443"),
            ("http://[::1]:8000/", "http://[::1]:8000"),
            ("moz-extension://ab-12", "moz-extension://ab-12"),
            *((bad, None) for bad in ("*", "null", "art.example", "https://art.example/page", "https://*.art.example")),
        ],
    )
    def test_origins_of_a_setting(self, given, origin):
        if origin is None:
            with pytest.raises(ValueError, match=r"allow_origins: .* is not the origin of a site"):
                addresses("allow_origins", given, read_origin)
        else:
            assert addresses("allow_origins", given, read_origin) == [origin]

    @pytest.mark.parametrize("address", ["0.0.0.0", "192.0.2.7", "127.0.0.1"])
    def test_the_address_that_is_printed_is_admitted(self, client, folder, address):
        (printed,) = re.findall(r"at (http://\S+)/ ", greeting(client.service.library, address, 8000))
        with serving(library({"art": Source(folder)}), hosts=admitted(["art.example"], address)) as other:

            def status(host: str) -> int:
                return other.get("/api/health", headers={"host": host}).status_code

            assert status(printed.removeprefix("http://")) == status("art.example") == 200
            assert status("evil.example") == status("0.0.0.0") == 403
        assert admitted([], "192.0.2.7") is None


# --------------------------------------------------------------------------------- encoder in a worker


class Toy(nn.Module):
    """Describes an image by its mean colour; refuses black ones; remembers its batches."""

    bits, input_size, fit = None, 8, "longest"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3), requires_grad=False)
        self.batches: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()

    def embed(self, image: Tensor) -> Tensor:
        self.gate.wait(20)
        self.batches.append(tuple(image.shape))
        means = image.float().mean((2, 3)) @ self.weight
        if (means == 0).all(1).any():
            raise RuntimeError("black")
        return means / (means.norm(dim=1, keepdim=True) - (means == 255).all(1, keepdim=True) * means.norm())


def worker(toy: nn.Module, **settings) -> EncoderWorker:
    return EncoderWorker(toy, **{"batch_size": 4, "wait_ms": 50.0, "queue_length": 100, **settings})


class TestEncoderWorker:
    def test_batches_form_by_shape_and_equal_one_by_one(self):
        toy = Toy()
        work = worker(toy)
        generator = torch.Generator().manual_seed(0)
        shapes = [(8, 6), (6, 8), (8, 6), (8, 6), (6, 8), (8, 6), (8, 6), (8, 6)]
        images = [torch.randint(1, 255, (3, *s), generator=generator, dtype=torch.uint8) for s in shapes]
        toy.gate.clear()
        held = work.describe(images[0])
        until(held.running)
        found = [work.describe(image) for image in images]
        toy.gate.set()
        vectors = torch.stack([one.result(20) for one in found])
        assert toy.batches == [(1, 3, 8, 6), (3, 3, 8, 6), (1, 3, 6, 8), (1, 3, 6, 8), (3, 3, 8, 6)]
        alone = torch.cat([encode(toy, image[None]) for image in images])
        torch.testing.assert_close(vectors, alone, rtol=0, atol=1e-6)
        work.release()

    def test_a_real_encoder_in_batches(self, encoder, root):
        work = worker(encoder, batch_size=5)
        images = [read_image(root / f"{i}.png", size=64) for i in range(10)]
        sizes = []
        real = encoder.embed
        encoder.embed = lambda image: (sizes.append(len(image)), real(image))[1]
        try:
            gate = threading.Event()
            until(work.call(lambda _: gate.wait(20)).running)
            found = [work.describe(image) for image in images]
            gate.set()
            vectors = torch.stack([one.result(20) for one in found])
        finally:
            del encoder.embed
        assert sizes == [5, 5]
        alone = torch.cat([encode(encoder, image[None]) for image in images])
        torch.testing.assert_close(vectors, alone, rtol=0, atol=1e-5)
        work.release()

    def test_an_image_that_fails_fails_alone(self):
        toy = Toy()
        work = worker(toy)
        toy.gate.clear()
        values = (7, 0, 255, 90)
        found = [work.describe(torch.full((3, 8, 6), value, dtype=torch.uint8)) for value in values]
        toy.gate.set()
        assert found[0].result(20).tolist() == pytest.approx([3**-0.5] * 3)
        with pytest.raises(RuntimeError, match="black"):
            found[1].result(20)
        with pytest.raises(ValueError, match="returned NaN or infinity"):
            found[2].result(20)
        assert found[3].result(20).tolist() == pytest.approx([3**-0.5] * 3)
        with pytest.raises(ZeroDivisionError):
            work.call(lambda _: 1 / 0).result(20)
        assert work.call(lambda module: module is toy).result(20)
        work.release()

    def test_full_cancelled_and_released(self):
        toy = Toy()
        work = worker(toy, queue_length=2, batch_size=1)
        image = torch.full((3, 8, 6), 9, dtype=torch.uint8)
        toy.gate.clear()
        first = work.describe(image)
        until(first.running)
        second, third = work.describe(image), work.describe(image)
        with pytest.raises(Busy):
            work.describe(image)
        second.cancel()
        assert work.retain()
        work.release()
        work.release()  # nobody holds it: what is asked is answered, then it ends
        toy.gate.set()
        assert third.result(20).shape == (3,)
        assert first.result(20).shape == (3,)
        assert len(toy.batches) == 2
        assert not work.retain()
        with pytest.raises(Busy):  # else it would wait for ever
            work.call(len)
        until(lambda: not any(t.name == "encoder" and t is work._thread for t in threading.enumerate()))


# ---------------------------------------------------------------------------------- library, listing


class TestLibrary:
    def test_catalogs_of_one_encoder_share_its_worker(self, client):
        art, bare = client.service.library.catalogs
        assert art.worker is bare.worker

    def test_an_upload_is_described_once_for_catalogs_that_share_an_encoder(self, folder, root):
        books = library({"a": Source(folder), "b": Source(folder)})
        with serving(books) as client:
            sizes = []
            encoder = books.catalogs[0].worker.encoder
            real = encoder.embed
            encoder.embed = lambda image: (sizes.append(len(image)), real(image))[1]
            token = upload(client, png(3, root)).json()["upload"]
            assert sizes == []
            for name in ("a", "b", "a"):
                assert search(client, name, like=[{"upload": token}]).json()["results"][0]["id"] == "3"
            assert sizes == [1]

    def test_reload_while_requests_run(self, root, encoder, tmp_path, monkeypatch):
        monkeypatch.setattr(service_module, "POLL_SECONDS", 0.05)
        place = make_catalog(tmp_path / "c", root, encoder)
        torch.manual_seed(2)
        other = configs.build(MODEL).eval()
        with serving(library({"c": Source(place, root)})) as client, ThreadPoolExecutor(3) as threads:
            token = upload(client, png(7, root)).json()["upload"]
            first = client.get("/api/catalogs").json()[0]["version"]
            old_worker = client.service.library.catalogs[0].worker
            end, versions, failures = threading.Event(), set(), []

            def ask(like: dict) -> None:
                while not end.is_set():
                    answer = search(client, "c", like=[like], k=5)
                    if answer.status_code != 200:
                        failures.append(answer.text)
                        continue
                    content = answer.json()
                    versions.add(content["version"])
                    titles = {r["attributes"]["title"].startswith("new ") for r in content["results"]}
                    if len(titles) != 1 or ("upload" in like and content["results"][0]["id"] != "7"):
                        failures.append(answer.text)

            asking = [threads.submit(ask, like) for like in ({"id": 3}, {"upload": token}, {"upload": token})]
            until(lambda: first in versions)
            make_catalog(place, root, encoder, mark="new ")  # the same encoder
            until(lambda: len(versions) == 2)
            assert client.service.library.catalogs[0].worker is old_worker
            make_catalog(place, root, other, mark="new ")
            until(lambda: len(versions) == 3)
            assert client.service.library.catalogs[0].worker is not old_worker
            write_calibration(
                place,
                {"rate": {"same_work": 0.01}, "same_work": [0.0], "similar": None, "neighbours": 1, "weights": {}},
            )
            until(lambda: len(versions) == 4)
            end.set()
            for one in asking:
                one.result(20)
            assert not failures
            until(lambda: not old_worker._thread.is_alive())
            last = client.get("/api/catalogs").json()[0]
            assert last["calibration"]["rate"] == {"same_work": 0.01}
            again = client.get("/api/catalogs/c/thumbnail?id=1", headers={"if-none-match": f'"{first}"'})
            assert again.status_code == 200
            assert search(client, "c", like=[{"upload": token}]).json()["verdict"] == "same work"

    def test_encoders_of_exchanged_catalogs_are_let_go(self, root, encoder, tmp_path):
        place, seen = tmp_path / "c", []
        books = None
        for number in range(4):
            torch.manual_seed(10 + number)
            make_catalog(place, root, configs.build(MODEL).eval(), count=4)
            if books is None:
                books = library({"c": Source(place)})
            else:
                assert books.refresh() == ["c"]
            seen += [weakref.ref(books.catalogs[0].worker.encoder), weakref.ref(books.catalogs[0])]
            if number == 2:
                with books.lease("c") as held:
                    torch.manual_seed(20)
                    make_catalog(place, root, configs.build(MODEL).eval(), count=4)
                    assert books.refresh() == ["c"]
                    gc.collect()
                    assert held.worker.describe(torch.zeros(3, 64, 64, dtype=torch.uint8)).result(20).shape
                del held
        until(lambda: gc.collect() and [one() is None for one in seen] == [True] * 6 + [False] * 2)
        books.close()

    def test_a_damaged_new_catalog_leaves_the_old_one(self, root, encoder, tmp_path):
        place = make_catalog(tmp_path / "c", root, encoder)
        books = library({"c": Source(place)})
        with serving(books) as client:
            assert books.refresh() == []
            good = (place / "segments/1/index/index.faiss").read_bytes()
            with books.lease("c") as before:
                (place / "segments/1/index/index.faiss").write_bytes(b"damaged")
                assert books.refresh() == []
                assert "damaged" in client.get("/api/health").json()["catalogs"]["c"]["error"]
                assert search(client, "c", like=[{"id": 1}]).status_code == 200
                assert client.get("/api/catalogs/c/thumbnail?id=1").status_code == 200
                (place / "segments/1/index/index.faiss").write_bytes(good)
                assert books.refresh() == ["c"]
                assert "error" not in client.get("/api/health").json()["catalogs"]["c"]
                assert before.thumbnails[3] == books.catalogs[0].thumbnails[3]
            (place / "catalog.json").unlink()
            assert books.refresh() == []
            assert "no catalog in" in books.problems["c"]
            assert books.refresh() == []

    def test_what_cannot_be_loaded_at_the_start(self, tmp_path):
        with pytest.raises(CatalogError, match="no catalog in"):
            library({"c": Source(tmp_path)})

    def test_an_old_catalog_shows_its_own_thumbnails(self, root, encoder, tmp_path):
        place = make_catalog(tmp_path / "c", root, encoder)
        small = Thumbnails(read_catalog(place).pictures, held_bytes=1)
        expected = read_catalog(place).thumbnails(range(N))
        make_catalog(place, root, encoder, count=5)
        assert [small[i] for i in (23, 0, 7)] == [expected[i] for i in (23, 0, 7)]

    def test_thumbnails_of_many_groups(self, tmp_path):
        n = 2500
        data = [f"thumbnail {i}".encode() for i in range(n)]
        pq.write_table(pa.table({"thumbnail": pa.array(data, pa.binary())}), tmp_path / "t", row_group_size=1024)
        for held in (1, 10**9):
            found = Thumbnails(ThumbnailGroups(tmp_path / "t", {}), held_bytes=held)
            assert [found[i] for i in (0, 1023, 1024, 2499, 5)] == [data[i] for i in (0, 1023, 1024, 2499, 5)]


class TestListing:
    def test_columns_of_all_kinds(self):
        table = pa.table(
            {
                "year": ["1850", "c. 1851", *["1860"] * 20],
                "height": pa.array([None, *[2.0] * 21]),
                "price": pa.array([float("nan"), 3.5, *[4.0] * 20]),
                "rank": pa.array(range(22)),
                "public": pa.array([True, False] * 11),
                "nothing": pa.array([None] * 22, pa.string()),
            }
        )
        listing = Listing(Attributes(table))
        kinds = {a.name: (a.kind, a.distinct, a.low, a.high) for a in listing.attributes}
        assert kinds == {
            "year": ("number", 3, 1850, 1860),
            "price": ("number", 2, 3.5, 4.0),
            "rank": ("number", 22, 0, 21),
            "public": ("text", 2, None, None),
            "nothing": ("text", 0, None, None),
        }
        assert listing.values("nothing", "", 5) == []
        assert listing.values("rank", "2", 2) == [{"value": 2, "count": 1}, {"value": 20, "count": 1}]
        assert [v["value"] for v in listing.values("rank", "", 12)] == list(range(12))
        assert listing.values("price", "", 3) == [{"value": 4.0, "count": 20}, {"value": 3.5, "count": 1}]
        assert listing.values("public", "", 3) == [{"value": value, "count": 11} for value in (False, True)]
        assert listing.page(text="1850", where=(), seed=None, offset=0, limit=5) == (0, [])
        assert listing.page(text="", where=(), seed=None, offset=20, limit=5) == (22, [20, 21])

    def test_each_value_is_listed_once_and_its_filter_finds_all_spellings(self):
        column = ["Paul Cézanne", "paul cezanne", "PAUL-CÉZANNE", "paul cezanne", None, " ", "Eugène Boudin", "1..2"]
        listing = Listing(
            Attributes(pa.table({"artist": column, "title": ["Été", "ete", "", None, "x", "", "ÉTÉ", "e"]}))
        )
        values = listing.values("artist", "", 9)
        assert values == [
            {"value": "paul cezanne", "count": 4},
            {"value": "1..2", "count": 1},
            {"value": "Eugène Boudin", "count": 1},
        ]
        for one in values:
            where = (Condition("artist", (one["value"],)),)
            assert listing.page(text="", where=where, seed=None, offset=0, limit=9)[0] == one["count"]
        assert [v["value"] for v in listing.values("artist", "CÉZ", 9)] == ["paul cezanne"]
        assert [v["value"] for v in listing.values("artist", "eugene", 9)] == ["Eugène Boudin"]
        assert listing.page(text="ÉTE", where=(), seed=None, offset=0, limit=9) == (3, [0, 1, 6])

    @pytest.mark.parametrize("numbers", [9, 8])
    def test_page_and_filters_agree_on_what_is_a_column_of_numbers(self, numbers):
        """Of ten known values nine must be; blanks are not known. Old pages and filters had a rule each."""
        texts = [*["+1", "2.", "3e2", ".5", "-7", "6", "7", "8", "9"][:numbers], *["?"] * (10 - numbers), " ", None]
        attributes = Attributes(pa.table({"x": texts}))
        (about,) = Listing(attributes).attributes
        assert about.kind == ("number" if numbers == 9 else "text")
        assert attributes.column("x").is_numeric == (about.kind == "number")
        if about.kind == "number":
            assert (about.low, about.high) == (-7, 300)
            assert int(attributes.select([Condition("x", (), about.low, about.high)]).sum()) == numbers

    def test_orders_are_remembered_for_a_few_questions(self):
        table = pa.table({"title": [f"t{i}" for i in range(50)]})
        listing = Listing(Attributes(table))
        for seed in range(40):
            first = listing.page(text="", where=(), seed=seed, offset=0, limit=50)[1]
            assert first == listing.page(text="", where=(), seed=seed, offset=0, limit=50)[1]
            assert sorted(first) == list(range(50))
        assert len(listing._orders) <= 16


# -------------------------------------------------------------------------------------- the command


class TestCommand:
    def test_catalogs_get_names(self, tmp_path):
        for name in ("a", "my prints (1)", "x/a"):
            (tmp_path / name).mkdir(parents=True)
        path = str(tmp_path)
        assert list(find_sources(f"{path}/a", None)) == ["a"]
        assert list(find_sources([f"{path}/a", f"{path}/my prints (1)"], None)) == ["a", "my-prints-1"]
        both = find_sources({"one": f"{path}/a", "two": f"{path}/x/a"}, {"two": path})
        assert both == {"one": Source(tmp_path / "a"), "two": Source(tmp_path / "x/a", tmp_path)}
        for catalog, root, message in (
            ([f"{path}/a", f"{path}/x/a"], None, "two catalogs are named a"),
            ({"a/b": path}, None, "part of addresses"),
            ([], None, "catalog is empty"),
            (f"{path}/a", f"{path}/none", "is not a folder"),
            ({"a": path}, {"b": path}, "root names b"),
        ):
            with pytest.raises(ValueError, match=message):
                find_sources(catalog, root)

    def test_homes_are_found(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a").mkdir()
        for catalog in ("~/a", ["~/a"], {"a": "~/a"}):
            for folders in ("~/a", {"a": "~/a"}):
                assert find_sources(catalog, folders, folders) == {"a": Source(*[tmp_path / "a"] * 3)}

    def test_a_taken_port_is_named(self):
        with bind("127.0.0.1", 0) as taken:
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port} .*another host= or port="):
                bind("127.0.0.1", port)
        with pytest.raises(ValueError, match="got 99999"):
            bind("127.0.0.1", 99_999)
        with pytest.raises(ValueError, match="cannot listen on 192"):
            bind("192.0.2.1", 0)

    def test_greeting(self, client):
        said = greeting(client.service.library, "127.0.0.1", 8000)
        assert "http://127.0.0.1:8000/" in said
        assert f"art: {N} items, images in" in said
        assert f"bare: {N} items, thumbnails only" in said
        assert "simsearch calibrate catalog=" in said
        assert "http://localhost:8000/" in greeting(client.service.library, "0.0.0.0", 8000)

    @pytest.mark.slow
    def test_a_process_ends_in_the_middle_of_an_image(self, folder):
        command = [
            sys.executable,
            "-m",
            "simsearch",
            "serve",
            f"catalog={folder}",
            "port=0",
            "limits.decode_seconds=100",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                address = re.search(r"http://[\d.:]+", process.stdout.readline())
                with httpx.Client(base_url=address[0], timeout=100) as client, ThreadPoolExecutor(1) as threads:
                    assert upload(client, b"").status_code == 415  # its decoders are up
                    sent = threads.submit(upload, client, slow_image(19_900_000))
                    until(lambda: client.get("/api/health").json()["queue"] == 1, 60)
                    asked = time.monotonic()
                    process.send_signal(signal.SIGTERM)
                    answer = sent.result()
                    _, log = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == 0
        assert "Traceback" not in log
        assert answer.status_code in (201, 503)  # unless it was quick enough, the server ended it
        assert time.monotonic() - asked < 60

    @pytest.mark.slow
    def test_a_process_serves_and_ends_in_order(self, folder, root):
        command = [sys.executable, "-m", "simsearch", "serve", f"catalog={folder}", f"root={root}", "port=0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                address = re.search(r"http://[\d.:]+", process.stdout.readline())
                assert address
                with httpx.Client(base_url=address[0], timeout=20) as client:
                    found = upload(client, png(5, root), "/api/catalogs/art/search/image?k=2").json()
                    assert found["results"][0]["id"] == "5"
                    port = client.base_url.port
                second = subprocess.run([*command[:-1], f"port={port}"], capture_output=True, text=True)
                assert second.returncode == 1
                assert "cannot listen on" in second.stderr
                assert "Traceback" not in second.stderr
                process.send_signal(signal.SIGTERM)
                rest, log = process.communicate(timeout=30)
            finally:
                process.kill()
        assert process.returncode == 0
        assert rest.endswith("ended\n")
        assert re.fullmatch(r"[\d:]+ 127.0.0.1 POST /api/catalogs/art/search/image 200 \d+ ms", log.strip())

    @pytest.mark.slow
    def test_a_process_on_an_open_network_answers_to_the_names_it_should(self, folder):
        command = [sys.executable, "-m", "simsearch", "serve", f"catalog={folder}", "port=0", "host=0.0.0.0"]
        with subprocess.Popen([*command, "allow_hosts=art.example"], stdout=subprocess.PIPE, text=True) as process:
            try:
                port = int(re.search(r"http://localhost:(\d+)/", process.stdout.readline())[1])
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                    for host, status in ((f"localhost:{port}", 200), ("art.example", 200), ("a", 403), ("evil", 403)):
                        assert client.get("/api/health", headers={"host": host}).status_code == status
            finally:
                process.kill()
        wrong = subprocess.run([*command, "allow_origins=['*']"], capture_output=True, text=True)
        assert wrong.returncode == 1
        assert "allow_origins: '*' is not the origin of a site" in wrong.stderr

    def test_the_log_has_one_line_a_request(self, client, caplog):
        with caplog.at_level("INFO", logger="simsearch.serving"):
            client.get("/api/health?x=%0Ay")
            client.get("/api/a%0Ab%1b[31m")

            def lines() -> list[str]:  # each comes after its answer
                return [record.getMessage() for record in caplog.records if record.name == "simsearch.serving"]

            until(lambda: len(lines()) >= 2)
        assert re.fullmatch(r"127.0.0.1 GET /api/health 200 \d+ ms", lines()[0])
        assert re.fullmatch(r"127.0.0.1 GET /api/a%0Ab%1b(\[|%5B)31m 404 \d+ ms", lines()[1])
        assert len(lines()) == 2

    def test_a_failure_of_the_server_is_told_and_logged(self, client, caplog, monkeypatch):
        monkeypatch.setattr(client.service.library.catalogs[0].listing, "rows", lambda _: 1 / 0)
        answer = client.get("/api/catalogs/art/item?id=1")
        assert error(answer, 500) == "the server failed on this request: its log says why"
        assert "content-security-policy" in answer.headers
        assert "ZeroDivisionError" in caplog.text


def test_replies_have_no_nan():
    from simsearch.serving.messages import Reply

    body = Reply({"a": float("nan"), "b": [float("inf"), 1.5], "c": "é"}).body
    assert json.loads(body) == {"a": None, "b": [None, 1.5], "c": "é"}


@given(st.lists(st.sampled_from(["A Head", "Café de nuit", "the head of a man", "Nuit", None]), min_size=1), st.data())
@settings(deadline=None)
def test_a_search_for_words_finds_what_a_loop_finds(titles, data):
    years = [str(1800 + i % 3) for i in range(len(titles))]
    listing = Listing(Attributes(pa.table({"title": titles, "year": years})))
    words = data.draw(st.lists(st.sampled_from(["head", "a", "nuit", "cafe", "man", "x"]), max_size=3))
    where = data.draw(st.sampled_from([(), (Condition("year", ("1800",)),)]))
    with mock.patch.object(browse, "_FEW", data.draw(st.sampled_from([1, 8, 10**9]))):
        count, found = listing.page(text=" ".join(words), where=where, seed=None, offset=0, limit=100)
    expected = [
        i
        for i, title in enumerate(titles)
        if all(word in folded(title or "") for word in words) and (not where or years[i] == "1800")
    ]
    assert (count, found) == (len(expected), expected[:100])
