"""What commands speak with."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kbitc.cli import console
from kbitc.errors import UsageError


def test_progress_is_silent_where_there_is_no_terminal(capsys):
    with console.progress("reading") as update:
        update("model.layers.0", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_ends_with_its_work(monkeypatch):
    """Also where that fails: a bar that is left running hides the cursor."""
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=120))
    with pytest.raises(ZeroDivisionError), console.progress("reading") as update:
        update("x" * 60, 1, 2)
        raise ZeroDivisionError
    shown = screen.getvalue()
    assert "reading: …" + "x" * 47 in shown
    assert "50 %" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_errors_are_text_and_not_markup(capsys):
    with pytest.raises(SystemExit) as ended:
        console.fail("no [bold] weight 'a[0]'", 1)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: no [bold] weight 'a[0]'\n"


def test_files_that_cannot_be_written(tmp_path):
    console.write_file(tmp_path / "x", "é")
    assert (tmp_path / "x").read_bytes() == "é".encode()
    with pytest.raises(UsageError, match="cannot be written"):
        console.write_file(tmp_path, "x")
