"""Searches a second and their latencies of a server on this machine, with 1, 8, 64 and 256 clients at once.

    simsearch serve catalog=<catalog> limits.rate=null
    python experiments/2026-11-23-art-recommender/load.py --url http://127.0.0.1:8000 --images <folder> --out load.csv

Each client asks again as soon as it has its answer. Kinds: `id` searches by an item of the catalog, `token` by an
image sent before, `upload` sends an image that the server has not seen, so that it is decoded and described. Every
cell ends after --seconds or --requests, whichever comes first. Latency is that of answers 200; all others are counted
by status (503: the queue was full; 0: no answer). Clients run in this process, on the same processor as the server.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import random
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

COLUMNS = ("clients", "kind", "searches", "seconds", "searches_per_s", "p50_ms", "p95_ms", "p99_ms", "status")
KINDS = ("id", "token", "upload")
BACK_OFF = 0.05  # seconds that a client waits after a refusal


def variants(folder: Path, count: int, side: int = 800) -> list[bytes]:
    """JPEGs of `side` pixels of the folder's images, no two alike."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[:count]
    if not paths:
        raise SystemExit(f"no images in {folder}")
    found = []
    for path in paths:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        picture = picture.resize((side, max(1, side * picture.height // picture.width)))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


class Asker:
    """Sends searches of one kind to one catalog."""

    def __init__(self, client: httpx.AsyncClient, catalog: str, items: int, tokens: list[str], images: list[bytes]):
        self.client, self.items, self.tokens, self.images = client, items, tokens, images
        self.path = f"/api/catalogs/{catalog}/search"
        self.random = random.Random(0)

    async def ask(self, kind: str) -> int:
        """The status of an answer, 0 where there was none."""
        try:
            if kind == "upload":
                # Bytes behind the end of a JPEG change no pixel: the file is new, the work the same.
                data = self.random.choice(self.images) + self.random.randbytes(8)
                answer = await self.client.post(f"{self.path}/image?k=24", files={"file": ("a.jpg", data)})
            else:
                like = {"position": self.random.randrange(self.items)}
                if kind == "token":
                    like = {"upload": self.random.choice(self.tokens)}
                answer = await self.client.post(self.path, json={"like": [like], "k": 24})
        except httpx.TransportError:
            return 0
        return answer.status_code


async def cell(asker: Asker, kind: str, clients: int, seconds: float, requests: int) -> list[object]:
    """One line of load.csv."""
    left, spent, status = requests, [], Counter()
    start = time.perf_counter()

    async def client() -> None:
        nonlocal left
        while left > 0 and time.perf_counter() - start < seconds:
            left -= 1
            began = time.perf_counter()
            code = await asker.ask(kind)
            status[code] += 1
            if code == 200:
                spent.append(time.perf_counter() - began)
            else:
                await asyncio.sleep(BACK_OFF)

    await asyncio.gather(*(client() for _ in range(clients)))
    wall = time.perf_counter() - start
    quantiles = np.percentile(1e3 * np.array(spent), [50, 95, 99]).round(1).tolist() if spent else ["", "", ""]
    codes = " ".join(f"{code}:{count}" for code, count in sorted(status.items()))
    return [clients, kind, len(spent), round(wall, 2), round(len(spent) / wall, 1), *quantiles, codes]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--catalog", help="its name; the first where left out")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images to send")
    parser.add_argument("--out", type=Path, default=Path("load.csv"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each cell, at most 60")
    parser.add_argument("--requests", type=int, default=5000, help="of each cell, at most 20000")
    given = parser.parse_args()
    if urlsplit(given.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit("load is for a server on this machine only: give --url http://127.0.0.1:<port>")
    if max(given.clients) > 512 or given.seconds > 60 or given.requests > 20_000:
        raise SystemExit("at most 512 clients, 60 s and 20000 requests a cell")
    images = variants(given.images, 32)
    limits = httpx.Limits(max_connections=max(given.clients), max_keepalive_connections=max(given.clients))
    async with httpx.AsyncClient(base_url=given.url, timeout=60, limits=limits) as client:
        catalogs = {c["name"]: c for c in (await client.get("/api/catalogs")).json()}
        name = given.catalog or next(iter(catalogs))
        sent = [await client.post("/api/uploads", files={"file": ("a.jpg", image)}) for image in images]
        tokens = [answer.raise_for_status().json()["upload"] for answer in sent]
        asker = Asker(client, name, catalogs[name]["items"], tokens, images)
        lines = []
        for kind in KINDS:
            await cell(asker, kind, 1, 2, 20)  # what is set up lazily
            for clients in given.clients:
                lines.append(await cell(asker, kind, clients, given.seconds, given.requests))
                print(*(f"{n}={v}" for n, v in zip(COLUMNS, lines[-1], strict=True)), flush=True)
    with given.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *lines])


if __name__ == "__main__":
    asyncio.run(main())
