"""What the docs site is built of besides docs/pages: a MkDocs hook, run by `make docs`.

The reference of commands and keys is read from conf/, the pages of the API and the tree from simsearch/, the studies
from experiments/; formulas become MathML, which browsers show without a script.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from simsearch import __version__, usage  # noqa: E402
from simsearch.__main__ import COMMANDS  # noqa: E402

PACKAGE = ROOT / "simsearch"
STUDY_FILES = {".md", ".png", ".csv", ".html", ".py", ".yaml"}
GROUPS = {  # what an option of each decides; the order is that of a training
    "data": "Where images come from.",
    "protocol": "Which images query, which are searched, and what is relevant.",
    "sampler": "How training batches are drawn.",
    "backbone": "The network below the descriptor.",
    "pooling": "How feature maps become descriptors.",
    "model": "The family: what is fitted, and how.",
    "loss": "What a family that learns minimises.",
    "optimizer": "How a family that learns takes its steps.",
    "scheduler": "The learning rate over time.",
    "index": "What answers queries.",
    "rerank": "What is done to a ranking afterwards.",
    "store": "Where a catalog is searched, if not in its own index.",
    "verify": "How the first items of a ranking are verified by geometry.",
    "evaluators": "What is measured beside the metrics of every evaluation.",
    "callbacks": "What is measured, kept and drawn while a run goes on.",
    "logger": "Where a run is logged.",
    "trainer": "Devices, precision and length.",
    "experiment": "Ready settings of all groups together.",
    "sweep": "Ready sweeps.",
    "hydra/launcher": "Where the runs of a sweep run.",
    "hydra/sweeper": "Who decides what the runs of a sweep are.",
    "hydra/sweeper/sampler": "How Optuna proposes the next trial.",
    "hydra/sweeper/pruner": "When a trial of Optuna ends early.",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = _nav()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for address, text in generated().items():
        files.append(File.generated(config, address, content=text))
    for study in studies():
        for path in sorted(study.iterdir()):
            if path.suffix in STUDY_FILES:
                name = "index.md" if path.name == "README.md" else path.name
                files.append(File.generated(config, f"studies/{study.name}/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    address = page.file.src_uri
    if address.startswith("studies/"):  # what stands beside a study is code to read, or conf/ and other folders
        return re.sub(r"\[([^]]*)\]\((?:\.\./)+(?!2)[^)]*\)", r"\1", markdown)
    markdown = re.sub(r"\{\{ flow: (.*?) \}\}", lambda found: flow(found[1].split(" | ")), markdown)
    if "{{ tree }}" in markdown:
        markdown = markdown.replace("{{ tree }}", tree()).replace("{{ rooms }}", rooms_table())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """The page with its formulas as MathML."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return latex2mathml.converter.convert(unescape(found[2]).strip(), display=display)

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', mathml, html, flags=re.DOTALL)


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Raises where a page would ask a network for something."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        if found := loaded_from_elsewhere(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path} loads {found[0]}: keep the file in docs/pages/assets")


def loaded_from_elsewhere(html: str) -> list[str]:
    """Addresses on other machines that a page loads by itself: scripts, styles, images, frames, fonts."""
    tags = re.findall(r"<(?:script|link|img|iframe|source|object|video|audio|embed)\b[^>]*>", html)
    found = [re.search(r"""\b(?:src|href|srcset|data)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)""", tag) for tag in tags]
    styles = re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", html)
    return [address[1] for address in found if address] + styles


# -------------------------------------------------------------------------------------------- navigation


def studies() -> list[Path]:
    """The folders of experiments/, the newest first."""
    return sorted((path.parent for path in (ROOT / "experiments").glob("*/README.md")), reverse=True)


def studies_page() -> str:
    """Each study by its title and its question."""
    rows = []
    for study in studies():
        text = (study / "README.md").read_text(encoding="utf-8")
        title, question = re.search(r"^# (.*)", text), re.search(r"\*\*Question\.\*\* (.*?)\n\n", text, re.DOTALL)
        asked = " ".join(question[1].split()) if question else ""
        rows.append((study.name[:10], f"[{title[1] if title else study.name}]({study.name}/index.md)", asked))
    about = (
        "Dated studies with their commands, data, seeds and departures. They import simsearch; nothing imports them."
    )
    return f"# Studies\n\n{about}\n\n{_table(('date', 'study', 'question'), rows)}\n"


def _nav() -> list[Any]:
    """What stands at the side: the pages in reading order, then what is generated."""

    def pages(folder: str, *names: str) -> list[str]:
        return [f"{folder}/{name}.md" for name in names]

    def of(folder: str) -> list[str]:
        return [address for address in generated() if address.startswith(folder)]

    guides = (
        "search",
        "art",
        "photographs",
        "train",
        "compare",
        "cluster",
        "stores",
        "serve",
        "python",
        "embeddings",
        "extend",
    )
    return [
        "index.md",
        "start.md",
        "install.md",
        {"Guides": pages("guides", *guides)},
        {"Families": pages("families", "index", "frozen", "hashing", "dsh", "dir", "art")},
        {"Measuring": pages("measuring", "protocols", "metrics", "intervals", "results")},
        {"Studies": ["studies/index.md", *(f"studies/{study.name}/index.md" for study in studies())]},
        {
            "Reference": [
                "reference/index.md",
                "reference/environment.md",
                {"Commands": of("reference/commands/")},
                {"Config": of("reference/config/")},
            ]
        },
        {"Python": of("api/")},
        {"The house": ["house.md", "contributing.md", "limits.md", "security.md", "changes.md"]},
    ]


@cache
def generated() -> dict[str, str]:
    """The Markdown of all generated pages, by their addresses."""
    pages = {f"reference/commands/{name.replace(' ', '-')}.md": command_page(name) for name in COMMANDS}
    pages["reference/index.md"] = reference_page()
    pages["studies/index.md"] = studies_page()
    pages["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    pages["changes.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    pages |= {f"reference/config/{group.replace('/', '-')}.md": group_page(group) for group in GROUPS}
    return pages | dict(api_pages())


# --------------------------------------------------------------------------------------------- reference


def reference_page() -> str:
    rows = [(f"[`simsearch {name}`](commands/{name.replace(' ', '-')}.md)", about) for name, about in COMMANDS.items()]
    groups = [(f"[`{group}=`](config/{group.replace('/', '-')}.md)", about) for group, about in GROUPS.items()]
    return f"""# Reference

This reference is generated from the comments in `conf/` of version {__version__}, as `simsearch COMMAND --help` is.

## Commands

{_table(("command", "what it does"), rows)}

## Config groups

`group=option` chooses an option, `group.key=value` sets a key of it.

{_table(("group", "what it decides"), groups)}
"""


def command_page(name: str) -> str:
    """Everything that a command takes."""
    page = usage.page_of(name)
    about = page.about.partition(": ")[2]
    needed = [key for key in page.keys if key.needed]
    parts = [f"# {name}", f"{about[:1].upper()}{about[1:]}"]
    parts.append("```sh\n" + "\n".join(page.examples) + "\n```")
    if needed:
        parts += ["## Needed", _table(("key", "meaning"), [(_code(key.name), _text(key.meaning)) for key in needed])]
    if own := [key for key in page.keys if not key.needed and not _is_section(key, page)]:
        parts += ["## Keys", _keys(own)]
    if page.groups:
        rows = [
            (f"[`{group}`](../config/{group.replace('/', '-')}.md)", _code(key.default), _text(key.meaning))
            for group, key in page.groups.items()
        ]
        parts += ["## Groups", _table(("group", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def group_page(group: str) -> str:
    """Every option of a group and what each of its keys means."""
    parts = [f"# {group}", GROUPS[group]]
    for option in usage.options_of(group):
        page = usage.read_page(usage.CONF / group / f"{option}.yaml")
        parts += [f"## {group}={option}", _text(page.about)]
        if page.examples:
            parts.append("```sh\n" + "\n".join(page.examples) + "\n```")
        if keys := [key for key in page.keys if not _is_section(key, page)]:
            parts.append(_keys(keys))
    return "\n\n".join(parts) + "\n"


def _is_section(key: usage.Key, page: usage.Page) -> bool:
    return not key.default and any(other.name.startswith(f"{key.name}.") for other in page.keys)


def _keys(keys: list[usage.Key] | tuple[usage.Key, ...]) -> str:
    rows = [(_code(key.name), _code(key.default), _text(key.meaning) or _source(key)) for key in keys]
    return _table(("key", "default", "meaning"), rows)


def _source(key: usage.Key) -> str:
    found = re.fullmatch(r"\$\{(?:oc\.select:)?([\w.]+)[^}]*\}", key.default)
    return f"the value of `{found[1].lstrip('.')}`" if found else "has no keys"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _text(text: str) -> str:
    """Plain text of a comment as Markdown: what Markdown would take for markup is escaped, but for code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<\[\]#])", r"\\\1", part) for part in parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --------------------------------------------------------------------------------------------- the API


def modules() -> dict[str, list[str]]:
    """The package's modules by room, in the order of the tree."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        room = ".".join(parts[1:-1])
        if path.stem != "__init__" or not room:
            rooms.setdefault(room, []).append(name)
    return rooms


def docstring(path: Path) -> str:
    """What a module says of itself."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def api_pages() -> Iterator[tuple[str, str]]:
    """A page for each room, with all of its modules."""
    for room, names in modules().items():
        title = f"simsearch.{room}" if room else "simsearch"
        about = _text(docstring(PACKAGE / room.replace(".", "/") / "__init__.py")) if room else ""
        blocks = [f"::: {name}\n    options:\n      heading_level: 2" for name in names]
        yield f"api/{room or 'simsearch'}.md", "\n\n".join([f"# {title}", about, *blocks]) + "\n"


# -------------------------------------------------------------------------------------------- pictures


def flow(steps: list[str]) -> str:
    """Steps in boxes with arrows between them, some in a row, as inline SVG."""
    wide, high, gap, in_row = 168, 54, 26, 4
    parts = []
    for i, step in enumerate(steps):
        x, y = i % in_row * (wide + gap), i // in_row * (high + gap)
        lines = textwrap.wrap(step, 22)
        parts.append(f'<rect x="{x + 1}" y="{y + 1}" width="{wide}" height="{high}" rx="5"/>')
        top = y + high / 2 + 6 - 8.5 * (len(lines) - 1)
        for j, line in enumerate(lines):
            parts.append(f'<text x="{x + 1 + wide / 2:g}" y="{top + 17 * j:g}">{escape(line)}</text>')
        if i + 1 < len(steps):
            same = (i + 1) % in_row
            middle = y + high / 2 + 1
            start = (x + wide + 1, middle) if same else (x + 1 + wide / 2, y + high + 1)
            end = (x + wide + gap, middle) if same else (1 + wide / 2, y + high + gap)
            bend = f"V{y + high + gap / 2 + 1:g} H{end[0]:g} V{end[1]:g}" if not same else f"H{end[0]:g}"
            parts.append(f'<path d="M{start[0]:g} {start[1]:g} {bend}" marker-end="url(#arrow)"/>')
    columns, rows = min(len(steps), in_row), -(-len(steps) // in_row)
    width, height = columns * (wide + gap) - gap + 2, rows * (high + gap) - gap + 2
    return (
        f'<svg class="flow" viewBox="0 0 {width} {height}" style="max-width: {width}px" role="img" '
        f'aria-label="{escape(", then ".join(steps))}" xmlns="http://www.w3.org/2000/svg"><defs><marker id="arrow" '
        'viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z"/></marker></defs>{"".join(parts)}</svg>'
    )


def rooms_table() -> str:
    """Rows of a table: each room with the first sentence of its docstring, the ground first."""
    rows = []
    for rooms in storeys():
        for room in rooms:
            path = PACKAGE / room / "__init__.py"
            path = path if path.exists() else PACKAGE / f"{room}.py"
            rows.append(f"| `{room}` | {_text(docstring(path).split(chr(10))[0])} |")
    return "\n".join(rows)


def room_of(module: str) -> str:
    """The top-level package or module below simsearch that a dotted name lies in."""
    return module.split(".")[1] if module.count(".") else ""


@cache
def imports() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own in ("__init__", "__main__"):
            continue
        used = found.setdefault(own, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "simsearch":
                used |= {alias.name for alias in node.names} & names
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simsearch."):
                used.add(room_of(node.module or ""))
            elif isinstance(node, ast.Import):
                used |= {room_of(alias.name) for alias in node.names if alias.name.startswith("simsearch.")}
        used.discard(own)
    return found


def storeys() -> list[list[str]]:
    """Rooms by storey: each imports only from the storeys below it."""
    below = imports()
    height: dict[str, int] = {}

    def storey(room: str) -> int:
        if room not in height:
            height[room] = 1 + max((storey(other) for other in below[room]), default=-1)
        return height[room]

    levels: dict[int, list[str]] = {}
    for room in below:
        levels.setdefault(storey(room), []).append(room)
    return [levels[level] for level in sorted(levels)]


def tree() -> str:
    """The rooms as a picture, the ground at the bottom; a line for each import that no other path implies."""
    below, rows = imports(), storeys()
    reached = reach()
    implied = {room: set().union(*(reached[other] for other in used)) for room, used in below.items()}
    wide, high, gap = 116, 30, 46
    most = max(map(len, rows))
    total = most * (wide + 12)
    place: dict[str, tuple[float, float]] = {}
    for level, rooms in enumerate(rows):
        left = (total - len(rooms) * (wide + 12)) / 2
        for i, room in enumerate(rooms):
            place[room] = (left + i * (wide + 12) + 6, (len(rows) - 1 - level) * (high + gap) + 6)
    lines, boxes = [], []
    for room, used in below.items():
        x, y = place[room]
        for other in sorted(used - implied[room]):
            a, b = place[other]
            middle = (y + high + b) / 2
            lines.append(
                f'<path d="M{x + wide / 2:g} {y + high} C{x + wide / 2:g} {middle:g} {a + wide / 2:g} {middle:g} '
                f'{a + wide / 2:g} {b:g}"/>'
            )
        boxes.append(f'<rect x="{x:g}" y="{y:g}" width="{wide}" height="{high}" rx="5"/>')
        boxes.append(f'<text x="{x + wide / 2:g}" y="{y + 20:g}">{escape(room)}</text>')
    height = len(rows) * (high + gap) - gap + 12
    return (
        f'<svg class="flow" viewBox="0 0 {total} {height}" role="img" '
        'aria-label="the rooms of simsearch and their imports" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(lines)}{''.join(boxes)}</svg>"
    )


def reach() -> dict[str, set[str]]:
    """All that each room imports, also by way of others."""
    found: dict[str, set[str]] = {}
    for rooms in storeys():
        for room in rooms:
            found[room] = imports()[room].union(*(found[other] for other in imports()[room]))
    return found
