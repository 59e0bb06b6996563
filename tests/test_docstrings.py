"""The docstrings of the package: their examples run, and they name every parameter."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "losses",
    "functional",
    "metrics",
    "evaluation",
    "index",
    "callbacks",
    "models",
    "search",
    "serving",
    "comparison",
    "studies",
    "commands",
    "data",
    "data/ingest",
    "data/rendered",
)
FILES = sorted(path for room in ROOMS for path in (ROOT / "simsearch" / room).glob("*.py") if path.read_text())
TOP = sorted((ROOT / "simsearch").glob("*.py"))
EXAMPLES = [*FILES, *(path for path in TOP if path.stem != "api")]  # those of the API need files: tests/test_api.py
ITEM = re.compile(r"    (\w+): \S")
# Lightning and torch say what these are given and when they are called.
HOOK = re.compile(
    r"on_\w+|setup|teardown|(load_)?state_dict|configure_\w+|(training|validation|test|predict)_step|extra_repr"
)


def public(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """The public functions, classes and methods of a module or class, without hooks and setters, by qualified name."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if prefix and (HOOK.fullmatch(node.name) or any("setter" in ast.unparse(d) for d in node.decorator_list)):
                continue
            if isinstance(node, ast.FunctionDef) and ast.unparse(node.body) == "...":  # a Protocol's, from torch
                continue
            found.append((prefix + node.name, node))
            if isinstance(node, ast.ClassDef):
                found += public(node.body, f"{node.name}.")
    return found


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [a.arg for a in every if a.arg not in ("self", "cls")]


def named(docstring: str, section: str) -> list[str]:
    """The names that a section of a Google-style docstring describes, in order."""
    lines = docstring.split("\n")
    if f"{section}:" not in lines:
        return []
    inside = lines[lines.index(f"{section}:") + 1 :]
    names = []
    for line in inside:
        if line and not line.startswith("    "):
            break
        if match := ITEM.match(line):
            names.append(match[1])
    return names


def faults(source: str) -> list[str]:
    """What the docstrings of a module lack, a line for each."""
    tree = ast.parse(source)
    wrong = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for name, node in public(tree.body):
        docstring = ast.get_docstring(node)
        if docstring is None:
            wrong.append(f"{name} has no docstring")
            continue
        section = "Args"
        if isinstance(node, ast.FunctionDef):
            wanted = parameters(node)
        elif init := [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]:
            wanted = parameters(init[0])
        elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            section = "Attributes"
            wanted = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        else:
            wanted = []
        if (got := named(docstring, section)) != wanted:
            wrong.append(f"{name}: {section} names {got}, the code has {wanted}")
    return wrong


@pytest.mark.parametrize("path", [*FILES, *TOP], ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_name_every_parameter(path):
    assert faults(path.read_text()) == []


def test_the_check_sees_what_is_missing():
    arguments = "        a: One.\n        b: Two.\n        c: Three.\n"
    whole = f'"""M."""\ndef f(a, b=1, *, c):\n    """F.\n\n    Args:\n{arguments}    """\n'
    assert faults(whole) == []
    assert faults(whole.replace("        b: Two.\n", "")) == ["f: Args names ['a', 'c'], the code has ['a', 'b', 'c']"]
    assert faults(whole.replace('"""M."""\n', "")) == ["the module has no docstring"]
    assert faults('"""M."""\ndef f(a):\n    pass\n') == ["f has no docstring"]
    methods = "    def setup(self, stage):\n        pass\n    def read(self):\n        pass\n"
    assert faults(f'"""M."""\nclass C:\n    """C."""\n{methods}') == ["C.read has no docstring"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_run(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert doctest.testmod(module).failed == 0


def test_examples_are_short():
    for path in EXAMPLES:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for test in doctest.DocTestFinder().find(module):
            steps = sum(len(example.source.splitlines()) for example in test.examples)
            assert steps <= 6, f"{test.name} has {steps} lines of example"
