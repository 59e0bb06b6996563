"""The rooms of the house and who may import whom."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import types
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "simsearch"

GROUND = {"types", "files", "text", "errors"}
MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "trust": {"errors"},
    "files": {"errors", "text"},
    "text": set(),
    "slurm": {"text"},
    "usage": set(),
    "functional": {"types"},
    "figures": GROUND,
    "images": {"functional", *GROUND},
    "cache": GROUND,
    "metrics": {"functional", "types"},
    "losses": {"functional"},
    "data": {"functional", "images", *GROUND},
    "models": {"functional", "cache", "trust", *GROUND},
    "index": {"functional", *GROUND},
    "search": {"index", "models", "functional", "images", "cache", "data", "trust", *GROUND},
}
MAY_IMPORT["evaluation"] = {"index", "metrics", "functional", "figures", "data", *GROUND}
MAY_IMPORT["callbacks"] = {"evaluation", "index", "metrics", "functional", "figures", "slurm", *GROUND}
MAY_IMPORT["serving"] = {"search", "index", "models", "functional", "images", "data", *GROUND}
MAY_IMPORT["launch"] = {"slurm", *GROUND}
MAY_IMPORT["settings"] = {"callbacks", "evaluation", "index", "models", "trust", *GROUND}
MAY_IMPORT["terminal"] = GROUND
MAY_IMPORT["results"] = {"terminal", *GROUND}
MAY_IMPORT["saved_run"] = {"models", "trust", *GROUND}
MAY_IMPORT["configs"] = {"saved_run", "launch", "callbacks", "data", "slurm", "trust", "usage", *GROUND}
MAY_IMPORT["run_directory"] = {"saved_run", "configs", "launch", "settings", "slurm", *GROUND}
MAY_IMPORT["identity"] = {"saved_run", "trust"}
MAY_IMPORT["program"] = {"configs", "launch", "models", "slurm", "usage", *GROUND}
MAY_IMPORT["tracking"] = {"launch", "results", "saved_run", "callbacks", "evaluation", "data", "figures", *GROUND}
MAY_IMPORT["sweeps"] = {"identity", "launch", "program", "configs", "saved_run", "slurm", "terminal", *GROUND}
MAY_IMPORT["sweeps"] |= {"settings"}
MAY_IMPORT["comparison"] = {"search", "data", "images", "functional", "metrics", "identity", "trust", *GROUND}
MAY_IMPORT["studies"] = set(MAY_IMPORT)
MAY_IMPORT["commands"] = set(MAY_IMPORT)
MAY_IMPORT["worker"] = {"launch", "program", "saved_run", "commands"}
MAY_IMPORT["__main__"] = {"commands", "usage"}
MAY_IMPORT["api"] = {"saved_run", "search", "evaluation", "index", "models", "data", "images", "functional", *GROUND}
MAY_IMPORT["__init__"] = {
    "api",
    "saved_run",
    "search",
    "models",
    "images",
    "trust",
    *GROUND,
}  # when a name is asked for

ONLY_IN = {
    "faiss": {"simsearch/index/"},
    "cv2": {f"simsearch/functional/{name}.py" for name in ("geometry", "proposals", "sift")},
    "timm": {"simsearch/models/backbones.py"},
    "hydra": {
        *(f"simsearch/{name}.py" for name in ("configs", "program", "run_directory", "studies/runs")),
        "simsearch/sweeps/",
    },
    "optuna": {"simsearch/sweeps/"},
    "omegaconf": {
        *(f"simsearch/{name}.py" for name in ("configs", "program", "run_directory", "saved_run")),
        "simsearch/commands/",
        "simsearch/sweeps/",
    },
    "wandb": {"simsearch/tracking.py"},
    "psycopg": {"simsearch/search/stores/pgvector.py"},
    "pymilvus": {"simsearch/search/stores/milvus.py"},
    "lightning": set(),
    "jinja2": {"simsearch/comparison/templates.py", "simsearch/data/ingest/report.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = room(path)
    for name in imported(path):
        parts = name.split(".")
        if (
            parts[0] == "simsearch"
            and len(parts) > 1
            and (PACKAGE / parts[1]).exists() | (PACKAGE / f"{parts[1]}.py").exists()
        ):
            assert parts[1] == own or parts[1] in MAY_IMPORT[own], f"{own} must not import {name}"
        for library, places in ONLY_IN.items():
            if parts[0] == library:
                here = str(path.relative_to(ROOT))
                assert any(here.startswith(place) for place in places), f"{here} must not import {library}"


def test_every_room_has_a_rule():
    assert {room(path) for path in FILES} <= set(MAY_IMPORT)


def test_torchvision_models_only_in_backbones():
    for path in FILES:
        uses = [n for n in imported(path) if n.split(".")[0] == "torchvision"]
        assert not uses or path.name in ("backbones.py", "cifar10.py"), (path, uses)


def test_packages_import_nothing_by_themselves():
    for path in PACKAGE.rglob("__init__.py"):
        names = [f"{node.module}" for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        assert set(names) <= {"__future__", "typing"}, path
        assert not any(isinstance(node, ast.Import) for node in ast.parse(path.read_text()).body), path


def test_import_and_help_are_light():
    code = (
        "import sys, simsearch, simsearch.__main__; print([m for m in ('torch', 'hydra', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_no_star_kwargs_and_no_pickle():
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.args.kwarg is None, f"{path}:{node.lineno} takes **{node.args.kwarg.arg}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("allow_pickle") == "False", f"{path}:{node.lineno}"


def test_the_wheel_holds_the_files_that_are_no_python():
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folders = {ROOT / name.replace(".", "/"): ends for name, ends in given.items()}
    packaged = {path for folder, ends in folders.items() for end in ends for path in folder.glob(end)}
    kept = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in kept if path.suffix != ".py"} == packaged


def test_the_modules_of_the_page_import_without_a_circle():
    """What the page knows tells those who listen; app.js has them draw, and nothing imports it."""
    page = PACKAGE / "serving" / "page"
    imports = re.compile(r"""(?:\bfrom|\bimport)\s*\(?\s*["']\./([^"']+)["']""")
    graph = {path.name: set(imports.findall(path.read_text())) for path in page.glob("*.js")}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(graph), "a module is imported that is not there"
    used = ["app.js"]
    for name in used:
        used += graph[name] - set(used)
    assert set(used) == set(graph), "nothing imports this module"
    assert not any("app.js" in names for names in graph.values())
    drawing = {
        name
        for name in graph
        if name
        not in ("dom.js", "address.js", "api.js", "notes.js", "store.js", "route.js", "region.js", "selection.js")
    }
    for name in ("store.js", "route.js", "notes.js", "region.js", "selection.js"):
        assert not graph[name] & drawing, f"{name} holds or tells the state: it must not know who draws"


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("experiments/*/*.py")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_what_experiments_take_from_the_package_is_there(script):
    """Studies are run long after they were written, when what they import may have moved."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    taken = {}  # what is taken, by its name in the script
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "simsearch":
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                taken[name.asname or name.name] = getattr(module, name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = taken.get(node.value.id)
            if isinstance(owner, (type, types.ModuleType)):
                assert hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"
