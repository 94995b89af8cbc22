"""The house: rooms in one order of import, no two files in a circle, and what a room keeps to itself."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A file imports files of its own room and of the rooms before it.
ROOMS = [
    "kbitc.errors",
    "kbitc.version",
    "kbitc.lazy",
    "kbitc.system",
    "kbitc.cache",
    "kbitc.checkpoint",
    "kbitc.formats",
    "kbitc.kernels",
    "kbitc.optim",
    "kbitc.nn",
    "kbitc.tensor",
    "kbitc.graph",
    "kbitc.pipeline",
    "kbitc.sensitivity",
    "kbitc.planning",
    "kbitc.quantizers",
    "kbitc.replay",
    "kbitc.passes",
    "kbitc.artifact",
    "kbitc.report",  # above artifact: a page is made of an artifact's own files
    "kbitc.compiler",
    "kbitc.backends",
    "kbitc.evaluation",
    "kbitc.study",
    "kbitc.training",
    "kbitc.cli",
]
ABOVE = {"kbitc", "kbitc.__main__", "kbitc.transformers_hook"}  # what is imported first, and loads by name
LINKED = {"passes": "kbitc.passes", "kernels": "kbitc.kernels", "backends": "kbitc.backends"}
WALL = 400  # lines of a file


def source_files():
    files = {}
    for folder, prefix in {"kbitc": "kbitc", **LINKED}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "kbitc" and parts[0] in LINKED:
                continue  # the same file behind a link
            files[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return files


FILES = source_files()
PACKAGES = {name for name, path in FILES.items() if path.name == "__init__.py"}


def room_of(name):
    return next((i for i, room in enumerate(ROOMS) if name == room or name.startswith(f"{room}.")), None)


def imports(path):
    """``(module, name)`` of every import of ours, those inside functions too; name is None for a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "kbitc")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module is None or node.module.split(".")[0] != "kbitc":
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full, None) if full in FILES else (node.module, alias.name)


def test_every_file_is_in_a_room():
    assert [name for name in FILES if room_of(name) is None and name not in ABOVE] == []


@pytest.mark.parametrize("name", sorted(set(FILES) - ABOVE))
def test_imports_point_down(name):
    for target, _ in imports(FILES[name]):
        assert target not in ABOVE, f"{name} imports {target}, which is above every room"
        assert room_of(target) <= room_of(name), f"{name} imports {target}, whose room is above its own"


def test_no_two_files_import_in_a_circle():
    """Imports for types alone and those inside functions count: a circle is one of ideas, not of load order.

    A package that only offers names of its files lazily is not what they import.
    """
    graph = nx.DiGraph(
        (name, target)
        for name, path in FILES.items()
        if name not in PACKAGES and name not in ABOVE
        for target, _ in imports(path)
        if target not in PACKAGES
    )
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_begins_with_an_underscore_stays_in_its_room(name):
    """Files of a room keep their names to themselves, and rooms their files (ruff's PLC2701 says it too)."""
    for target, imported in imports(FILES[name]):
        assert imported is None or not imported.startswith("_"), f"{name} imports {imported} of {target}"
        inner = [part for part in target.split(".") if part.startswith("_") and not part.startswith("__")]
        if inner:
            owner = target[: target.index(f".{inner[0]}")]
            assert name == owner or name.startswith(f"{owner}."), (
                f"{name} imports {target}, a part of {owner}"
            )


@pytest.mark.parametrize("name", sorted(PACKAGES - {"kbitc"}))
def test_every_room_says_what_it_holds(name):
    text = " ".join((ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8"))) or "").split())
    sentences = [part for part in text.replace("e.g.", "eg").rstrip(".").split(". ") if part]
    assert len(sentences) == 2, f"{name}: say in two sentences what is in it, not: {text!r}"


def test_every_file_says_what_it_is():
    for name, path in FILES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_the_top_of_the_package_is_small():
    files = [path.name for path in (ROOT / "kbitc").iterdir() if path.is_file()]
    assert len(files) <= 8, files


def test_no_file_is_longer_than_one_sitting():
    """Kernels and benchmarks aside, whose length is that of their cases."""
    roots = ["kbitc", "passes", "backends", "tests", "examples"]
    paths = [path for root in roots for path in (ROOT / root).rglob("*.py")]
    own = [path for path in paths if not any(part.is_symlink() for part in path.parents)]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in own}
    assert {name: lines for name, lines in lengths.items() if lines > WALL} == {}


def test_kernels_is_no_package_at_the_root():
    """With an __init__.py there, transformers would take it for Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
