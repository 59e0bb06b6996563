"""The comparison page in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from simsearch.comparison.page import page
from tests.test_compare import HOSTILE, board, case, compared, make_run, read, values

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)

pytestmark = [pytest.mark.browser, pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")]

# Presses headings, and writes what a reader would see into the page.
PROBE = """
const rows = () => [...document.querySelector("tbody").rows].map((row) => row.cells[1].textContent[0]).join("");
const press = (title) => {
  [...document.querySelectorAll("th button")].find((b) => b.textContent === title).click();
  return rows();
};
const seen = { start: rows(), cost: press("training"), again: press("training"), run: press("run"), map: press("mAP") };
seen.sorted = document.querySelector("th[aria-sort]").textContent + document.querySelectorAll("th[aria-sort]").length;
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.back = getComputedStyle(document.body).backgroundColor;
seen.scripts = document.scripts.length;
seen.strangers = document.querySelectorAll("[onerror], [src=x]").length;
seen.texts = document.body.textContent.split("<script>alert(1)").length - 1;
// Texts whose contrast to what lies behind them is below 4.5 (WCAG 2.2, 1.4.3), each with its ratio.
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], under) => [r, g, b].map((part, i) => a * part + (1 - a) * under[i]);
const behind = (e) => (e ? over(parse(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255]);
const light = (colour) => {
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = colour.map((part) => linear(part / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const says = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
const written = [...document.body.querySelectorAll("*:not(script, title)")].filter(says);
seen.tinted = document.querySelectorAll("td[style] small").length;
seen.faint = written.map((e) => {
  const look = getComputedStyle(e);
  const back = behind(e);
  const front = over(parse(e.closest("svg") ? look.fill : look.color), back);
  const [x, y] = [light(front), light(back)].sort((a, b) => b - a);
  return [e.textContent.slice(0, 30), Number(((x + 0.05) / (y + 0.05)).toFixed(2))];
}).filter(([, ratio]) => ratio < 4.5);
const result = document.createElement("pre");
result.id = "seen";
result.textContent = JSON.stringify(seen);
document.body.append(result);
"""


def dump(path: Path, folder: Path, *flags: str) -> str:
    """The document after its scripts ran."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *flags]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def probed(text: str) -> str:
    """The page with the probe as one more script that its policy allows, beside the page's own."""
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    changed = text.replace("script-src ", f"script-src 'sha256-{digest}' ")
    assert changed != text
    return changed.replace("</body>", f"<script>{PROBE}</script></body>")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    times = {"a": 7200, "b": 90, "c": None}
    runs = []
    for i, (name, seconds) in enumerate(times.items()):
        facts = {} if seconds is None else {"train_seconds": seconds, "device": HOSTILE}
        runs.append(make_run(folder / name, values(i, 0.05 * i), lr=i, facts=facts))
    entries = board(read(*runs))
    cases = {entry.name: [case(caption=HOSTILE)] for entry in entries if entry.paired}
    long = {f"a.very.long.key.{i}": ["x" * 300, HOSTILE, "2"] for i in range(4)}
    return page(compared(entries, cases=cases, differences=long, classes=(HOSTILE, "bee", "cow" * 40)))


def test_it_sorts_fits_and_runs_nothing_of_others(text, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(probed(text), encoding="utf-8")
    seen = {}
    for name, flags in (("light", ["--window-size=1280,900"]), ("dark", ["--window-size=500,900"])):
        scheme = f"--blink-settings=preferredColorScheme={int(name == 'light')}"
        document = dump(path, tmp_path, scheme, *flags)
        found = re.search(r'<pre id="seen">(.*?)</pre>', document)
        assert found, "the probe did not run: does the policy hold the hash of what is in the page?"
        seen[name] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    # Best first; the shortest training first, runs without a time last in either order; names from a; best first.
    assert {k: seen["light"][k] for k in ("start", "cost", "again", "run", "map")} == {
        "start": "cba",
        "cost": "bac",
        "again": "abc",
        "run": "abc",
        "map": "cba",
    }
    for look in seen.values():
        assert look["sorted"] == "mAP1"
        assert (look["scripts"], look["strangers"]) == (2, 0), "the page's script and the probe"
        assert look["texts"] > 3
        assert look["tinted"] > 1
        assert look["faint"] == []
        assert look["wide"] <= 0, "the page itself must not scroll sideways"
    light, dark = (sum(map(int, re.findall(r"\d+", seen[name]["back"])[:3])) for name in ("light", "dark"))
    assert light > 600 > 200 > dark
