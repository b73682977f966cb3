"""The rule of the house: imports run downwards only, files and functions stay small, commands run from anywhere."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from methods import METHODS

ROOT = Path(__file__).parent.parent
FOLDERS = ("inputs", "runtime", "downstream", "figures", "reporting")
COMMANDS = ("train", "evaluate", "transfer", "analyze", "bench", "reproduce")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for folder in (".", *FOLDERS, "reporting/pages")
    for path in sorted((ROOT / folder).glob("*.py"))
}
GROUND = (
    "runtime.errors",
    "runtime.ranks",
    "runtime.files",
    "runtime.process",
    "runtime.fast_paths",
    "runtime.randomness",
)
BUILDS_ON = {name: {"mae"} for name in METHODS}  # as its paper does
BUILDS_ON["cae"] |= {"dvae", "runtime.dalle_weights"}  # tokenizers
BUILDS_ON["dvae"] |= {"runtime.dalle_weights", "runtime.files"}  # the published one

# What a file of each layer may import of ours; a folder's name stands for all of its files.
MAY = {
    "ground": {*GROUND},
    "common": {"runtime.errors", "runtime.ranks", "runtime.fast_paths", "runtime.randomness"},
    "inputs": {"inputs", "common", *GROUND},
    "runtime": {"runtime", "common", "inputs"},
    "method": {"common", "inputs.augment", "runtime.errors", "runtime.knobs", "runtime.reconstruction_pictures"},
    "methods": {*METHODS},
}
for folder in FOLDERS[2:]:  # downstream, figures, reporting
    MAY[folder] = {*FOLDERS, "common", "methods", *METHODS}
MAY["command"] = {*FOLDERS, "common", "methods"}
CALLS = {"reproduce": {"analyze"}}  # it calls what it does


def layer(name: str) -> str:
    if name in GROUND:
        return "ground"
    for kind, names in dict(method=METHODS, command=COMMANDS).items():
        if name in names:
            return kind
    return name.split(".")[0]


def imports(tree: ast.Module) -> set[str]:
    """Every file of ours that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= whole or {node.module}
    return {name for name in found if name in FILES}


def test_imports_are_read_as_they_are_written():
    text = "import mae, torch\nfrom runtime import files, run_directory\ndef f():\n    from common import ViT"
    assert imports(ast.parse(text)) == {"mae", "runtime.files", "runtime.run_directory", "common"}
    assert imports(ast.parse("import runtime.log as log")) == {"runtime.log"}


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards_only(name):
    kind = layer(name)
    assert kind in MAY, f"{name}.py: stands in no layer of tests/test_repository_layout.py"
    may = MAY[kind] | (BUILDS_ON[name] if kind == "method" else CALLS.get(name, set()))
    wrong = {x for x in imports(FILES[name]) if not {x, x.split(".")[0]} & may}
    assert not wrong, f"{name}.py must not import {', '.join(sorted(wrong))}"


def test_methods_are_listed_in_one_place():
    """And they are all: each file at the top that has a Config and RECIPES."""
    assert imports(FILES["methods"]) == set(METHODS)
    assigned = {
        name: {node.name for node in tree.body if isinstance(node, ast.ClassDef)} | {
            target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
            if isinstance(target, ast.Name)}
        for name, tree in FILES.items() if "." not in name
    }  # fmt: skip
    assert {name for name, names in assigned.items() if {"Config", "RECIPES"} <= names} == set(METHODS)
    for name, Method in METHODS.items():
        assert Method.__module__ == name and Method.Config.__module__ == name


def test_no_import_goes_in_a_circle():
    def reached(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"{' -> '.join([*path, name])}"
        for other in imports(FILES[name]):
            if other not in done:
                reached(other, (*path, name))
        done.add(name)

    done: set[str] = set()
    for name in FILES:
        reached(name, ())


def test_files_and_functions_stay_small():
    """At most 500 lines a file, 60 a function."""
    for name, tree in FILES.items():
        lines = (ROOT / (name.replace(".", "/") + ".py")).read_text().splitlines()
        assert len(lines) <= 500, f"{name}: {len(lines)} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{name}.{node.name}: {length} lines"


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_commands_run_from_any_working_directory(tmp_path, command):
    words = [sys.executable, str(ROOT / f"{command}.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())
