"""The documentation: nothing is missing in it, it asks nothing of a network, and what it says to type works."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import SMALL, simsearch

import simsearch as simsearch_package
from simsearch import configs, saved_run, usage
from simsearch.__main__ import COMMANDS
from simsearch.search.describe import encode

DATA = [argument for argument in SMALL if argument.startswith("data.")]
ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "pages"
BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
TEXTS = [ROOT / "README.md", *sorted(PAGES.rglob("*.md"))]


@pytest.fixture(scope="module")
def site():
    """docs/build.py, the hook that generates pages."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the generated pages are NOT TESTED")
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def yaml_keys(path: Path) -> set[str]:
    """Dotted names of the keys of a yaml that hold a value, as PyYAML reads it."""
    found: set[str] = set()

    def walk(node: dict, before: str) -> None:
        for key, value in node.items():
            if key.startswith("_") or (not before and key in ("defaults", "hydra")):
                continue
            if isinstance(value, dict) and value:
                walk(value, f"{before}{key}.")
            else:
                found.add(f"{before}{key}")

    walk(yaml.safe_load(path.read_text()) or {}, "")
    return found


def rows(page: str, heading: str = "") -> dict[str, str]:
    """First cells in code of a page's tables, or of those below one heading, and their last cells."""
    if heading:
        page = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| ")]
    return {found[1]: line[-1] for line in cells if (found := re.search(r"`([^`]+)`", line[0]))}


class TestReference:
    def test_every_command_has_a_page_with_all_of_its_keys_and_groups(self, site):
        pages = site.generated()
        for command in COMMANDS:
            address = f"reference/commands/{command.replace(' ', '-')}.md"
            found = rows(pages[address])
            path = ROOT / "conf" / f"{command.replace(' ', '_')}.yaml"
            assert yaml_keys(path) <= set(found), command
            assert set(usage.page_of(command).groups) <= set(found), command
            assert [name for name, meaning in found.items() if not meaning] == []
            assert all(usage.mistake(*one) is None for one in commands(pages[address]))
        assert {path.stem for path in (ROOT / "conf").glob("*.yaml")} == {c.replace(" ", "_") for c in COMMANDS}

    def test_every_group_has_a_page_with_all_options_and_their_keys(self, site):
        pages = site.generated()
        options = [p for p in (ROOT / "conf").rglob("*.yaml") if p.parent != ROOT / "conf"]
        assert len(options) > 100
        for path in options:
            if path.parent.name == "job_logging":  # Hydra's own
                continue
            group = path.parent.relative_to(ROOT / "conf").as_posix()
            page = pages[f"reference/config/{group.replace('/', '-')}.md"]
            found = rows(page, f"{group}={path.stem}")
            assert yaml_keys(path) <= set(found), path
            assert [name for name, meaning in found.items() if not meaning] == [], path
        for group in site.GROUPS:
            for name, arguments in commands(pages[f"reference/config/{group.replace('/', '-')}.md"]):
                assert usage.mistake(name, arguments) is None, arguments

    def test_every_module_is_on_a_page_of_the_api(self, site):
        text = "\n".join(page for address, page in site.generated().items() if address.startswith("api/"))
        shown = set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
        for path in (ROOT / "simsearch").rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if path.name not in ("__init__.py", "__main__.py"):
                assert name in shown

    def test_every_variable_of_the_environment_that_the_code_reads_is_said(self):
        said = (PAGES / "reference" / "environment.md").read_text()
        code = "\n".join(p.read_text() for p in [*(ROOT / "simsearch").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")])
        for name in set(re.findall(r"\b(?:SIMSEARCH|WANDB)_[A-Z_]+\b", code)):
            assert name in said, name


class TestOffline:
    @pytest.mark.parametrize(
        "html",
        [
            '<script src="https://cdn.example/x.js"></script>',
            "<link rel=stylesheet href=//fonts.example/css>",
            '<img alt="a" src="http://example/a.png">',
            "<style>@import 'https://fonts.example/css';</style>",
            "<style>p{background:url(https://example/a.png)}</style>",
        ],
    )
    def test_what_a_page_loads_from_elsewhere_is_seen(self, site, html):
        assert len(site.loaded_from_elsewhere(html)) == 1

    def test_links_and_own_files_are_not(self, site):
        html = '<a href="https://example">x</a><script src="../assets/x.js"></script><img src="a.png">'
        assert site.loaded_from_elsewhere(html) == []


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: the site is NOT SEARCHED")
def test_the_built_site_is_searched_from_files_and_asks_no_network(site, tmp_path):
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--config-file", "docs/mkdocs.yml"]
    subprocess.run([*command, "--site-dir", str(tmp_path)], cwd=ROOT, check=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "guides" / "search.html").as_uri())
        page.locator("input.md-search__input").click()
        page.keyboard.type("harmonic_numbers", delay=10)
        page.locator(".md-search-result__link[href*='api/functional.html']").first.wait_for(state="attached")
        browser.close()
    assert all(address.startswith("file:") for address in asked)


class TestTree:
    def test_each_room_stands_above_all_that_it_imports(self, site):
        height = {room: level for level, rooms in enumerate(site.storeys()) for room in rooms}
        below = site.imports()
        assert {"functional", "types"} <= below["losses"] | below["metrics"]
        assert all(height[other] < height[room] for room, used in below.items() for other in used)
        names = re.findall(r"<text [^>]*>(\w+)</text>", site.tree())
        assert sorted(names) == sorted(below)


class TestTexts:
    @pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_commands_are_taken(self, path):
        text = path.read_text()
        added = {f"{group}={option}" for group, option in re.findall(r"`conf/(\w+)/(\w+)\.yaml`:", text)}
        for name, arguments in commands(text):
            arguments = [a for a in usage.spelled(name, arguments) if a not in added]
            assert usage.mistake(name, arguments) is None, (name, arguments)

    def test_there_are_commands(self):
        assert sum(len(commands(path.read_text())) for path in TEXTS) > 60

    def test_files_that_pages_name_exist(self):
        count = 0
        for path in TEXTS:
            text = path.read_text()
            added = set(re.findall(r"`([\w/.-]+)`:\n", text))
            for name in set(re.findall(r"`((?:simsearch|tests|conf|experiments)/[\w/.-]+)`", text)) - added:
                assert (ROOT / name).exists(), (path, name)
                count += 1
        assert count > 15

    def test_links_of_the_readme_lead_somewhere(self):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())
        assert len(links) > 10
        for link in links:
            assert link.startswith("https://") or (ROOT / link).exists(), link

    def test_the_readme_is_short(self):
        assert len((ROOT / "README.md").read_text().splitlines()) <= 130


class TestWhatPagesSayToType:
    """Commands and Python of the pages, on a sample that is small."""

    def test_start_in_five_minutes(self, small_run, tmp_path):
        shutil.copytree(small_run, tmp_path / "outputs" / "first")
        (first, *others) = commands((PAGES / "start.md").read_text())
        assert first == ("train", ["run_dir=outputs/first"])  # which small_run is, of fewer images
        for name, arguments in others:
            simsearch(*name.split(), *arguments, *(DATA if name == "data export" else ()), cwd=tmp_path)
        assert (tmp_path / "outputs/neighbours.png").exists()
        listed = re.findall(r"^\| `([\w./-]+)` \|", (PAGES / "start.md").read_text(), re.MULTILINE)
        assert len(listed) > 5
        for name in listed:  # "Look at the run"
            assert (tmp_path / "outputs/first" / name).exists(), name

    @pytest.mark.skipif(not hasattr(simsearch_package, "evaluate"), reason="there is no Python API yet")
    @pytest.mark.parametrize("page", ["README.md", "docs/pages/guides/python.md", "docs/pages/guides/embeddings.md"])
    def test_python_of_the_pages(self, page, small_run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(small_run, "outputs/first")
        shutil.copy(small_run / "figures/queries/00.png", "photo.jpg")
        if "embeddings" not in page:
            catalog = "outputs/pictures" if page == "README.md" else "outputs/pictures-catalog"
            shutil.copytree(small_run / "catalog", catalog)
        if "python" in page:
            simsearch("data", "export", *DATA, "out=outputs/pictures", "limit=20")
        names: dict[str, object] = {}
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert blocks
        for block in blocks:
            exec(block, names)

    @pytest.mark.slow
    def test_a_metric_as_the_guide_adds_it(self, small_run, tmp_path, monkeypatch):
        """The two commands of the guide, and its numbers against a loop over what the run's encoder describes."""
        folder, given = added_by_the_guide("A metric", tmp_path, monkeypatch)
        shutil.copytree(small_run, tmp_path / "outputs" / "first")
        evaluate, assess = given
        simsearch(evaluate[0], *folder, *evaluate[1:], "run_dir=measured", "logger=none", cwd=tmp_path)
        simsearch(assess[0], *folder, *assess[1:], "out=assessed", cwd=tmp_path)
        about = json.loads((tmp_path / "measured" / "metrics.json").read_text())["test"]
        table = pq.read_table(tmp_path / "measured" / "per_query.parquet")
        run = saved_run.open_run(tmp_path / "outputs" / "first")
        data = configs.build_data(run.config)
        task, encoder = data.task("test"), saved_run.load_model(run).encoder
        vectors = torch.cat([encode(encoder, data.collection.images[row][None]) for row in range(len(data.collection))])
        label, expected = data.collection.column(task.attribute), []
        for row in sorted(task.query.tolist()):
            others = [g for g in task.gallery.tolist() if g != row or not task.exclude_self]
            if task.junk:
                group = data.collection.column(task.junk)
                others = [g for g in others if group[g] != group[row] or group[g] < 0]
            first = sorted(others, key=lambda g: -float(vectors[row] @ vectors[g]))[:10]
            right = [g for g in others if label[g] == label[row]]
            expected.append(sum(g in right for g in first) / len(right) if right else float("nan"))
        assert table["recall@10"].to_pylist() == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert about["metrics"]["recall@10"] == pytest.approx(float(torch.tensor(expected).nanmean()), abs=1e-6)
        low, high = about["intervals"]["recall@10"]
        assert low < about["metrics"]["recall@10"] < high
        with (tmp_path / "assessed" / "results.csv").open() as file:
            lines = [line for line in csv.DictReader(file) if line["metric"] == "recall@10"]
        assert {line["protocol"] for line in lines} == {"art-artist", "art-style", "art-work"}
        assert all(0 <= float(line["value"]) <= 1 and line["ci_low"] for line in lines)

    @pytest.mark.slow
    @pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
    def test_commands_compose(self, path, tmp_path):
        text = path.read_text()
        added = {f"{group}={option}" for group, option in re.findall(r"`conf/(\w+)/(\w+)\.yaml`:", text)}
        for name, arguments in commands(text):
            if "-m" in arguments or "--config-dir" in arguments or added & set(arguments):
                continue  # tested by sweeps, and below
            simsearch(*name.split(), *usage.spelled(name, arguments), "--cfg", "job", cwd=tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["loss", "data"])
    def test_a_loss_and_a_dataset_as_the_guide_adds_them(self, what, tmp_path, monkeypatch):
        folder, ((command, *arguments),) = added_by_the_guide(
            {"loss": "A loss", "data": "A dataset"}[what], tmp_path, monkeypatch
        )
        small = [a for a in SMALL if what == "loss" or not a.startswith(("data.", "model."))]
        small = [a for a in small if what == "data" or not a.startswith("model.")]
        arguments = [*folder, *arguments, *small]
        done = simsearch(command, *arguments, "run_dir=run", "logger.mode=disabled", cwd=tmp_path)
        assert "run directory" in done.stdout


def added_by_the_guide(heading: str, folder: Path, monkeypatch) -> tuple[list[str], list[list[str]]]:
    """Lays out in a folder what a section of the guide adds: the arguments that find it, and the commands."""
    text = (PAGES / "guides" / "extend.md").read_text()
    section = re.search(rf"^## {heading}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    module, code = re.search(r"`simsearch/([\w/]+)\.py`:\n\n```python\n(.*?)```", section, re.DOTALL).groups()
    option, config = re.search(r"`conf/([\w/]+)\.yaml`:\n\n```yaml\n(.*?)```", section, re.DOTALL).groups()
    name = f"simsearch.{module.replace('/', '.')}"
    own = types.ModuleType(name)
    exec(compile(code, name, "exec"), own.__dict__)
    monkeypatch.setitem(sys.modules, name, own)
    room, _, last = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(room), last, own, raising=False)
    (folder / "conf" / option).parent.mkdir(parents=True)
    (folder / "conf" / f"{option}.yaml").write_text(config)
    found = [[*command.split(), *arguments] for command, arguments in commands(section)]
    return ["--config-dir", str(folder / "conf")], found


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Names and arguments of the simsearch commands in the shell blocks of a Markdown text."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        block = re.sub(r" \\\n\s*", " ", block)
        for line in block.splitlines():
            for part in re.split(r" && |; (?=simsearch)", line.partition("  #")[0]):
                part = re.sub(r"^srun( -n \d+)? ", "", part.strip())
                if not part.startswith("simsearch ") or part.startswith("simsearch -"):
                    continue
                words = shlex.split(re.sub("<[^>]*>", "x", part).replace(" ... ", " "), comments=True)[1:]
                name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
                found.append((name, words[len(name.split()) :]))
    return found
