"""README and docs are true: their Python runs, and the commands, names, files and links that they show are there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from kbitc.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
MADE = {DOCS / "cli.md", DOCS / "reference" / "passes.md"}  # by docs/hooks.py
FENCE = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
GROUPS = {"kbitc.datatypes"}  # of entry points, where no module has that name
FOLDERS = "kbitc|passes|kernels|backends|benchmarks|docs|examples|tests"
RUNNER = """
import os, runpy, sys

from kbitc.compiler import calibrator

calibrator.COUNT, calibrator.LENGTH = 2, 16  # a short calibration says what a page has to say
for program in sys.argv[1:]:
    os.chdir(os.path.dirname(program))
    runpy.run_path(program)
"""


def text_of(page):
    return page.read_text("utf-8")


def blocks(page, *languages):
    return [
        body for skip, language, body in FENCE.findall(text_of(page)) if language in languages and not skip
    ]


def spans(page):
    """The inline code of a page."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text_of(page)))]


def name_of(page):
    return page.relative_to(ROOT).with_suffix("").as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def test_readme_is_for_a_newcomer():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


RUN = [page for page in PAGES if blocks(page, "python")]


def test_python_runs(tmp_path):
    """The blocks of a page, one after another, as one program in a folder of its own.

    The pages share a process, since much of their time is that of the imports.
    """
    programs = []
    for page in RUN:
        program = tmp_path / name_of(page) / "page.py"
        program.parent.mkdir(parents=True)
        program.write_text("\n\n".join(blocks(page, "python")), "utf-8")
        programs.append(str(program))
    command = [sys.executable, "-c", RUNNER, *programs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def command_lines(page):
    """What a page says to type after "kbitc": in consoles, in a synopsis, and in its text."""
    for body in blocks(page, "console"):
        yield from re.findall(r"^\$ (?:\w+=\S+ )?kbitc (.+)$", body, re.MULTILINE)
    for body in blocks(page, ""):
        yield from re.findall(r"^kbitc (.+(?:\n .+)*)$", body, re.MULTILINE)
    yield from (span.removeprefix("kbitc ") for span in spans(page) if span.startswith("kbitc "))


@each_page
def test_commands_have_the_options_that_are_shown(page):
    commands = typer.main.get_command(app).commands
    for line in command_lines(page):
        name, *words = shlex.split(re.sub(r"[\[\]|]", " ", line), comments=True)
        if name == "--help":
            continue
        assert name in commands, line
        known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= known, line


@each_page
def test_options_in_the_text_exist(page):
    commands = typer.main.get_command(app).commands.values()
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    shown = {span.split()[0] for span in spans(page) if span.startswith("--")}
    assert shown <= known | {"--help"}


@each_page
def test_names_in_the_text_exist(page):
    shown = {name for span in spans(page) for name in re.findall(r"(?<![\w/.])kbitc(?:\.\w+)+", span)}
    directives = set(re.findall(r"^::: (\S+)$", text_of(page), re.MULTILINE))
    missing = [name for name in sorted(shown | directives) if name not in GROUPS and not is_there(name)]
    assert missing == []


def is_there(name):
    """Whether a dotted name is a module, or can be reached from the longest of its beginnings that is one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


@each_page
def test_files_in_the_text_exist(page):
    shown = {path for span in spans(page) for path in re.findall(rf"^(?:{FOLDERS})/[\w./-]*$", span)}
    assert [path for path in sorted(shown) if not (ROOT / path).exists()] == []


@each_page
def test_links_lead_somewhere(page):
    targets = {page.parent / target for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", text_of(page))}
    assert [target for target in targets if target not in MADE and not target.exists()] == []


def test_reference_has_what_every_room_offers():
    shown = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", text_of(page), re.MULTILINE)}
    rooms = [
        "kbitc",
        *(f"kbitc.{init.parent.name}" for init in sorted((ROOT / "kbitc").glob("*/__init__.py"))),
    ]
    offering = {room for room in rooms if getattr(importlib.import_module(room), "__all__", ())}
    assert offering - shown == {"kbitc.cli", "kbitc.passes"}  # whose pages docs/hooks.py makes


def test_the_page_of_the_command_line_has_every_command_and_option():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.cli_page()
    for name, command in typer.main.get_command(app).commands.items():
        about = page.partition(f"## kbitc {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            assert all(option in about for option in parameter.opts if option.startswith("-")), name
        assert f"$ kbitc {name}" in about, name
    assert "[default: 512]" in page
    assert "[bold]" not in page


def test_pictures_are_small():
    assert [path.name for path in (DOCS / "images").iterdir() if path.stat().st_size > 200_000] == []
