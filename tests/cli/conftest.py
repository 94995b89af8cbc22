"""The command in this process, and one compiled artifact that the commands share."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest

from kbitc import cli


def _kbitc(*arguments, cwd="."):
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["kbitc", *map(str, arguments)])
        cli.main()
    return subprocess.CompletedProcess(arguments, ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def kbitc():
    """As ``python -m kbitc``, but in this process: importing PyTorch for every command takes seconds."""
    return _kbitc


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The demo model at 4 bits, and what compile said of it; tests add no file but an evaluation."""
    out = tmp_path_factory.mktemp("cli") / "demo"
    done = _kbitc("compile", "demo", "--bits", "4", "-o", out, "--json", "--strict")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)
