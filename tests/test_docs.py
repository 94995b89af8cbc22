"""README and docs are true: their Python runs, their commands have the options that they show."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from kbitc.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(<!-- not run: [^>]+ -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page, language):
    return [
        body for skip, kind, body in FENCE.findall(page.read_text("utf-8")) if kind == language and not skip
    ]


def test_readme_is_for_a_newcomer():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_runs(page, tmp_path):
    """The blocks of a page, one after another, as one program."""
    program = tmp_path / "page.py"
    program.write_text("\n\n".join(blocks(page, "python")), "utf-8")
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_have_the_options_that_are_shown(page):
    commands = typer.main.get_command(app).commands
    for body in blocks(page, "console"):
        for line in body.splitlines():
            if not line.startswith("$ kbitc "):
                continue
            name, *words = shlex.split(line.removeprefix("$ kbitc "), comments=True)
            assert name in commands, line
            known = {option for parameter in commands[name].params for option in parameter.opts} | {"--help"}
            given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert given <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    made = {"cli.md"}  # by docs/hooks.py
    for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text("utf-8")):
        assert target in made or (page.parent / target).exists(), target
