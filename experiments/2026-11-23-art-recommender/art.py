"""From paintings to a recommender in the browser: each step is a command, printed before it runs.

    python art.py                                    the embedded sample, drawn for it
    python art.py --images <folder or table>         your paintings: artist/work.jpg, one flat folder, or a table

Steps that are done already are skipped. What the last one writes is checked through the server: health, a search by
an item and by an upload, the page and all of its files, and, with a Chromium and playwright, a search by a click.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin
from urllib.request import Request, urlopen

from simsearch.data.collection import Collection
from simsearch.data.files import files_collection, open_ingest
from simsearch.data.manifest import read_manifest
from simsearch.data.protocols import ByHash
from simsearch.files import replacing

SAMPLE = ("data.works=7", "data.photographs=3", "data.size=128")
HELD_OUT = 2  # styles of the sample that the catalog lacks
FEW = 1000  # images to train on, below which their covariance is not to be trusted
MEASURABLE = ("artist", "style", "genre", "period")
LEAST_TRAINED = 10
START_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder or a table of images; the embedded sample by default")
    parser.add_argument("--outside", type=Path, help="images that are like nothing there, which calibrate 'similar'")
    parser.add_argument("--out", type=Path, help="outputs/art/<name of the images> by default")
    parser.add_argument("--size", type=int, help="pixels that the encoder sees; 224, of the sample 128")
    parser.add_argument("--port", type=int, default=0, help="of the server; any free one by default")
    parser.add_argument("--serve", action=argparse.BooleanOptionalAction, default=sys.stdout.isatty())
    given = parser.parse_args()
    name = given.images.resolve().stem if given.images else "rendered"
    out = given.out or Path("outputs/art") / name
    size = given.size or (224 if given.images else 128)
    try:
        make(given.images, given.outside, out, size)
        serve(out, given.port, stay=given.serve)
    except subprocess.CalledProcessError as error:
        sys.exit(f"art: that step failed with status {error.returncode}; the same command goes on from there")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"art: {error}")


def make(images: Path | None, outside: Path | None, out: Path, size: int) -> None:
    """Leaves collection, run, catalog and a picture of recommendations in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if images is None:
        images, outside = out / "paintings.csv", out / "others.csv"
        if not outside.exists():
            step("draw a sample", "data", "export", "data=rendered", *SAMPLE, f"out={out}")
            divide(out / "manifest.csv", images, outside)
    collection, run, catalog = out / "collection", out / "run", out / "catalog"
    if done := (collection / "ingest.json").is_file():
        if (before := json.loads((collection / "ingest.json").read_text())["source"]) != str(images.resolve()):
            raise ValueError(f"{out} is of the images in {before}: give another place by --out")
        print(f"there already: {collection}")
    else:
        step("check, clean and decode", "data", "ingest", f"images={images}", f"out={collection}")
    done = done and (run / "metrics.json").is_file()
    if done:
        print(f"there already: {run}")
    else:
        shutil.rmtree(run, ignore_errors=True)  # one that was cut off; what it has extracted is in the cache
        arguments = ["data=art", f"data.source={collection}", "model=art", f"backbone.size={size}"]
        arguments += [*describe_split(collection), "catalog.write=false", "logger.mode=disabled", f"run_dir={run}"]
        step("learn what tells artworks apart", "train", *arguments)
    if done := done and (catalog / "catalog.json").is_file():
        print(f"there already: {catalog}")
    else:
        step("describe all of them", "index", f"run={run}", f"images={collection}", f"out={catalog}")
    if not done or not (catalog / "calibration.json").is_file():
        arguments = [f"catalog={catalog}"]
        if outside is None:
            print("no --outside: the catalog will know the same work, but not from where on to call a work similar")
        else:
            arguments.append(f"outside={outside}")
        step("learn to say no", "calibrate", *arguments)
    if not done or not (out / "recommendations.png").is_file():
        step(
            "recommend",
            "recommend",
            f"catalog={catalog}",
            "id=position:0",
            "force=true",
            f"figure={out}/recommendations.png",
        )


def step(what: str, *command: str) -> None:
    """Runs a command of simsearch, printed before, its time after."""
    print(f"\n--- {what}\n$ {shlex.join(['simsearch', *command])}", flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "simsearch", *command], check=True)
    print(f"--- {time.perf_counter() - start:.1f} s", flush=True)


def divide(manifest: Path, inside: Path, outside: Path) -> None:
    """Two tables of one: without the last styles, and with them alone."""
    with manifest.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    held = sorted({row["style"] for row in rows})[-HELD_OUT:]
    for path, kept in ((inside, False), (outside, True)):
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, reader.fieldnames or (), lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if (row["style"] in held) == kept)


# -------------------------------------------------------------------------------- what can be measured


def describe_split(folder: Path) -> list[str]:
    """Arguments of train by which this collection can be divided and measured, said aloud.

    The first that fits: artists apart (the default); an artist, a style, a genre or a period on both sides; or
    without any of them a run that is not measured, for which most images train.
    """
    manifest = read_manifest(folder)
    collection = files_collection(folder.name, manifest, open_ingest(folder, manifest, 1))
    if trained := trains(collection, "artist", "artist"):
        arguments, said = [], "artists apart: those that search were never trained on (protocol=art-artist)"
    else:
        for attribute in MEASURABLE:
            if trained := trains(collection, attribute, None):
                arguments = ["protocol=art-artist-random"]
                if attribute != "artist":
                    arguments += [f"protocol.attribute={attribute}", f"protocol.name=art-{attribute}-random"]
                said = f"by {attribute}, whose works are trained on and searched: too few to keep them apart"
                break
        else:
            arguments = ["protocol=by-attribute", "protocol.attribute=work", "protocol.group=work"]
            arguments += ["protocol.evaluation=0.2", "protocol.validation=0.2"]
            works = len(collection.classes[collection.attributes.index("work")])
            if works < 4:
                raise ValueError(f"{works} works are too few for a recommender: give 4 or more")
            trained = round(0.6 * len(collection))
            said = f"not by artist or style, which are known of too few images of {len(collection)}: nothing to measure"
    print(f"\nmeasured {said}; {trained} images train", flush=True)
    if trained < FEW:
        arguments += [f"+model.encoders.{part}.whitening.shrinkage=0.1" for part in ("content", "style", "colour")]
    return arguments


def trains(collection: Collection, attribute: str, part: str | None) -> int:
    """Images to train on where relevance is by an attribute; 0 where that can't be measured or leaves too few."""
    try:
        split = ByHash(name="", attribute=attribute, part=part, junk="work").split(collection)
    except ValueError:
        return 0
    return len(split.train) if len(split.train) >= LEAST_TRAINED else 0


# ----------------------------------------------------------------------------------------- the browser


def serve(out: Path, port: int, stay: bool) -> None:
    """Starts a server, checks it and the page, then stops it or stays until Ctrl-C."""
    catalog, root = out / "catalog", json.loads((out / "collection" / "ingest.json").read_text())["root"]
    command = ["serve", f"catalog={catalog}", f"root={root}", f"port={port}"]
    print(f"\n--- serve\n$ {shlex.join(['simsearch', *command])}", flush=True)
    start = time.perf_counter()
    with running(command, out / "serve.log") as (address, process):
        check(address, Path(root))
        browse(address, out / "page.png")
        print(f"--- {time.perf_counter() - start:.1f} s", flush=True)
        print(f"\npictures: {out / 'recommendations.png'}, {out / 'collection' / 'contact-sheet.png'}")
        if stay:
            print(f"your recommender: {address} (ends with Ctrl-C)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
        else:
            print(f"all is well; to look at it: {shlex.join(['simsearch', *command[:-1], f'port={port or 8000}'])}")


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server while the block runs: its address and process. Raises ValueError where it does not start."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "simsearch", *command], stdout=subprocess.PIPE, stderr=stream, text=True
        )
        assert process.stdout is not None
        late = threading.Timer(START_SECONDS, process.kill)
        late.start()
        try:
            for line in process.stdout:
                print(line, end="")
                if found := re.search(r"serves at (http://\S+/)", line):
                    break
            else:
                raise ValueError(f"the server did not start: {log.read_text().strip()[-500:]}")
            late.cancel()
            threading.Thread(target=process.stdout.read, daemon=True).start()  # or it would wait for a reader
            yield found[1], process
        finally:
            late.cancel()
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def check(address: str, root: Path) -> None:
    """Asks the server for all that the page needs. Raises ValueError for an answer that is not as it must be."""
    health = ask(urljoin(address, "api/health"))
    (name, about), *_ = health["catalogs"].items()
    items = ask(urljoin(address, f"api/catalogs/{name}/items?limit=1"))["items"]
    if health["status"] != "ok" or not items:
        raise ValueError(f"the server is not well: {health}")
    item = items[0]
    search = urljoin(address, f"api/catalogs/{name}/search")
    by_item = ask(search, json.dumps({"like": [{"id": item["id"]}], "k": 5}).encode(), "application/json")
    file = root / item["attributes"]["path"]
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'.encode()
    body = head + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    by_upload = ask(f"{search}/image?k=5", body, f"multipart/form-data; boundary={boundary}")
    best = by_upload["results"][0] if by_upload["results"] else None
    if best is None or best["score"] < 0.9:
        raise ValueError(f"{file} was sent to the server, which did not find it: {best}")
    files = assets(address)
    found, took = len(by_item["results"]), by_item["milliseconds"]["search"]
    print(f"{about['items']} items; by an item {found} works in {took:.1f} ms; ", end="")
    print(f"an uploaded file found itself with {best['score']:.3f}; the page and its {len(files) - 1} files are there")


def ask(url: str, body: bytes | None = None, kind: str = "") -> Any:
    return json.loads(fetch(url, body, kind))


def fetch(url: str, body: bytes | None = None, kind: str = "") -> bytes:
    """The answer's bytes. Raises ValueError for another status than 200, and where nobody answers."""
    try:
        with urlopen(Request(url, body, {"Content-Type": kind} if kind else {}), timeout=60) as answer:
            return answer.read()
    except OSError as error:
        raise ValueError(f"{url}: {error}") from error


def assets(address: str) -> set[str]:
    """Addresses of the page and all of its own files that it loads, each of which was fetched."""
    seen: set[str] = set()
    ahead = [address]
    while ahead:
        if (url := ahead.pop()) in seen:
            continue
        seen.add(url)
        text = fetch(url).decode()
        named = re.findall(r'(?:href|src)="(static/[^"]+)"|from "(\./[^"]+\.js)"', text)
        ahead += [urljoin(url, one or other) for one, other in named]
    return seen


def browse(address: str, picture: Path) -> None:
    """Opens the page, searches by a click and keeps a picture, where there is a browser for it."""
    browser = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        browser = None
    if browser is None:
        print("left out: no playwright or no Chromium here, so the page was not opened in a browser")
        return
    complaints: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 850}, reduced_motion="reduce")
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(address)
        page.locator(".wall .frame").first.click()
        page.locator(".result").first.wait_for()
        page.wait_for_load_state("networkidle")
        results = page.locator(".result").count()
        page.screenshot(path=picture)
        chromium.close()
    if complaints:
        raise ValueError(f"the page complains: {complaints[0]}")
    print(f"in the browser a click on a work found {results}: {picture}")


if __name__ == "__main__":
    main()
