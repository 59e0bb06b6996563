"""A served catalog of a million: a real painting is added, and appears in the browser without a restart.

    OMP_NUM_THREADS=1 python served.py catalog=<catalog> root=<its images> work=<folder> [items=1000000]

The catalog given is one of real paintings of one descriptor (the 3,964 of the art study through EfficientNet-Lite0, 256
columns). One painting is left out. The items of the million are the others, each many times: its descriptor with noise
of a fifth of its length, its thumbnail in 32 pixels, its artist and style, and the number of the copy in its title. The
catalog is built once, served by `simsearch serve`, and opened in Chromium by playwright. Then `simsearch catalog add`
adds the painting that was left out, while the page asks for its title until it is there, and then shows the image.
What happened when goes to served.csv, what was seen to served-title.png and served-similar.png of work=.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image

from simsearch.index.faiss_index import FaissIndex
from simsearch.search.catalog import read_catalog
from simsearch.search.item_tables import item_table
from simsearch.search.writing import fill_index, write_catalog

HERE = Path(__file__).parent
BLOCK, NOISE, LEFT_OUT = 2**16, 0.2, 1237
NAMES = ("path", "title", "artist", "style", "year")


def build(source: Path, folder: Path, items: int) -> dict[str, float]:
    """Writes the catalog of many items. Returns what it took."""
    start, cpu = time.perf_counter(), time.process_time()
    real = read_catalog(source, calibrated=False)
    kept = torch.cat([torch.arange(LEFT_OUT), torch.arange(LEFT_OUT + 1, len(real))])
    vectors = real.index.rows(kept)
    rows = real.items.take(kept.numpy()).to_pylist()
    small = []
    for first in range(0, len(kept), 500):
        for picture in real.thumbnails(kept[first : first + 500].tolist()):
            pixels, file = Image.open(io.BytesIO(picture)).convert("RGB"), io.BytesIO()
            pixels.thumbnail((32, 32))
            pixels.save(file, "JPEG", quality=50)
            small.append(file.getvalue())
    counts = [min(BLOCK, items - first) for first in range(0, items, BLOCK)]

    def part(number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        chosen = (torch.arange(counts[number]) + number * BLOCK) % len(kept)
        noise = torch.randn(counts[number], vectors.shape[1], generator=generator) * NOISE / vectors.shape[1] ** 0.5
        return torch.nn.functional.normalize(vectors[chosen] + noise, dim=1)

    def tables() -> Iterator[pa.Table]:
        for number, count in enumerate(counts):
            places = [(number * BLOCK + i, (number * BLOCK + i) % len(kept)) for i in range(count)]
            columns: dict[str, list[str]] = {"path": [f"{i}.jpg" for i, _ in places]}
            columns["title"] = [f"{rows[p]['title']}, copy {i // len(kept) + 1}" for i, p in places]
            columns |= {name: [str(rows[p][name] or "") for _, p in places] for name in NAMES[2:]}
            yield item_table(columns, [small[p] for _, p in places])

    index = FaissIndex("IVF1024,PQ64x4fsr,Refine(SQ8)", nprobe=16, k_factor=16)
    fill_index(index, counts, part)
    filled = time.perf_counter() - start
    write_catalog(
        folder, index=index, items=tables(), encoder=real.encoder, config=real.about["config"], about={"thumbnail": 32}
    )
    wall = time.perf_counter() - start
    return {"fill_s": filled, "write_s": wall - filled, "build_cpu_s": time.process_time() - cpu}


def memory(pid: int) -> dict[str, float]:
    """MiB of a process and its children: without mapped files, and their pages."""
    found = {"anon": 0.0, "mapped": 0.0}
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *map(int, children)):
        lines = Path(f"/proc/{one}/status").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
        found = {"anon": found["anon"] + values["RssAnon"], "mapped": found["mapped"] + values["RssFile"]}
    return found


class Watch(threading.Thread):
    """Notes when the catalog changes on the disk and how much memory the server takes meanwhile."""

    def __init__(self, folder: Path, pid: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.pid, self.ended = folder, pid, False
        self.segments = set(os.listdir(folder / "segments"))
        self.written_as = (folder / "catalog.json").stat().st_mtime_ns
        self.describes_until = self.written = self.most = 0.0

    def run(self) -> None:
        while not self.ended:
            if not self.describes_until and set(os.listdir(self.folder / "segments")) != self.segments:
                self.describes_until = time.perf_counter()
            if not self.written and (self.folder / "catalog.json").stat().st_mtime_ns != self.written_as:
                self.written = time.perf_counter()
            self.most = max(self.most, memory(self.pid)["anon"])
            time.sleep(0.01)


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    source, root, work = Path(given["catalog"]), Path(given["root"]), Path(given["work"])
    items, folder, images = int(given.get("items", 1_000_000)), work / "catalog", work / "images"
    torch.set_num_threads(1)
    row: dict[str, object] = {"items": items}
    if (work / "built.json").is_file():
        row |= json.loads((work / "built.json").read_text())
    if not folder.exists():
        row |= build(source, folder, items)
        (work / "built.json").write_text(json.dumps(row))
        print(row, flush=True)
    real = read_catalog(source, calibrated=False).items.slice(LEFT_OUT, 1).to_pylist()[0]
    images.mkdir(parents=True, exist_ok=True)
    painting = shutil.copy(root / real["path"], images / "new.jpg")
    with (work / "new.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([NAMES, ["new.jpg", *(real[name] or "" for name in NAMES[1:])]])
    row |= serve_and_add(folder, images, work / "new.csv", Path(painting), real["title"])
    print(row, flush=True)
    path, rows = HERE / "served.csv", [{k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}]
    if path.is_file():
        with path.open(newline="") as file:
            rows += [other for other in csv.DictReader(file) if other["items"] != str(items)]
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(dict.fromkeys(name for one in rows for name in one)), lineterminator="\n")
        out.writeheader()
        out.writerows(sorted(rows, key=lambda one: int(one["items"])))


def serve_and_add(folder: Path, images: Path, table: Path, painting: Path, title: str) -> dict[str, object]:
    from playwright.sync_api import sync_playwright

    row: dict[str, object] = {"load": f"{os.getloadavg()[0]:.1f}"}
    command = [sys.executable, "-m", "simsearch"]
    start = time.perf_counter()
    server = subprocess.Popen(
        [*command, "serve", f"catalog={folder}", f"root={images}", "port=0", "threads=1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        assert server.stdout is not None
        address = next(found[0] for line in server.stdout if (found := re.search(r"http://127\S+", line)))
        threading.Thread(target=server.stdout.read, daemon=True).start()
        row["start_s"] = time.perf_counter() - start
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(60_000)
            page.goto(address)
            page.wait_for_selector(".work:not(.skeleton)")
            before = memory(server.pid)
            row |= {"anon_before_mib": before["anon"], "mapped_before_mib": before["mapped"]}
            row["status_before"] = page.inner_text("#status")
            page.fill("#text", title)
            page.wait_for_selector("#none:not([hidden])")
            print(time.strftime("%T"), "the page knows no such work", flush=True)
            watch = Watch(folder, server.pid)
            watch.start()
            start = time.perf_counter()
            with (folder.parent / "add.log").open("w") as log:
                adding = subprocess.Popen(
                    [*command, "catalog", "add", f"catalog={folder}", f"images={table}", f"root={images}", "workers=0"],
                    stdout=log,
                    stderr=log,
                )
            cards = page.locator(".wall", has_text=title)
            while not watch.written and adding.poll() is None:
                page.wait_for_timeout(50)
            asked = 0
            while not cards.count() and time.perf_counter() - start < 600:
                page.fill("#text", f"{title} {(asked := asked + 1)}")  # not an answer that the page keeps
                page.wait_for_timeout(2000)
                page.fill("#text", title)
                page.wait_for_timeout(2000)
            appeared = time.perf_counter()
            adding.wait(120)
            print(time.strftime("%T"), "it appeared, or the time was over", flush=True)
            watch.ended = True
            watch.join()
            row["describe_s"] = watch.describes_until - start
            row["write_s_of_add"] = watch.written - watch.describes_until
            row["exchange_s"] = appeared - watch.written
            row |= {"command_rc": adding.returncode, "anon_most_mib": watch.most}
            page.wait_for_timeout(1000)
            page.screenshot(path=str(table.parent / "served-title.png"))
            row["found"] = cards.first.inner_text().replace("\n", " ")
            new = int(cards.first.get_attribute("data-id") or -1)
            row["id"] = new
            clock = time.perf_counter()
            cards.first.locator(".frame").click()
            page.wait_for_selector(".result")
            row["similar_s"] = time.perf_counter() - clock
            page.wait_for_timeout(1500)
            page.screenshot(path=str(table.parent / "served-similar.png"))
            row["status_after"] = page.inner_text("#status")
            chromium.close()
        after = memory(server.pid)
        row |= {"anon_after_mib": after["anon"], "mapped_after_mib": after["mapped"]}
        row["requests_ok"] = urllib.request.urlopen(address).status
    finally:
        server.terminate()
        server.wait(30)
    return row


if __name__ == "__main__":
    main()
