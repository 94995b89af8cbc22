"""Every command alike: help with an example, one-paragraph errors, exit codes, quick to start."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from kbitc import cli

HEAVY = ("torch", "transformers", "scipy", "onnx", "onnxruntime", "safetensors", "numpy")


def test_module_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "kbitc", "compile", "demo", "--bits", "1"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "between 2 and 8" in done.stderr


COMMANDS = get_command(cli.app).commands


def test_each_file_is_a_command():
    others = {"__init__", "app", "console", "main", "scores", "tables"}
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - others
    names = {name.replace("-", "_").replace("eval", "evaluate") for name in COMMANDS}
    assert files == names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(kbitc, command):
    done = kbitc(command, "--help")
    assert done.returncode == 0
    assert f"$ kbitc {command}" in done.stdout or f"kbitc {command}" in done.stdout.partition("Examples")[2]


def test_help_names_the_commands(kbitc):
    done = kbitc("--help")
    assert done.returncode == 0
    assert [name for name in COMMANDS if not re.search(rf"│ {name} +\S", done.stdout)] == []


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["eval", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    """Which is what makes it quick: 0.4 s, on any machine that is not busy."""
    code = (
        f"import sys; sys.argv = ['kbitc', *{arguments}]\n"
        "from kbitc.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert ended.code == 0\n"
        f"sys.stderr.write(' '.join(m for m in {HEAVY} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: kbitc" in done.stdout
    assert done.stderr == ""


BAD = [
    (["compile", "./nowhere", "--bits", "4"], 1, "no such file or folder"),
    (["compile", "demo", "--bits", "1"], 2, "between 2 and 8"),
    (["compile", "demo", "--bits", "9"], 2, "between 2 and 8"),
    (["compile", "demo", "--bits", "four"], 2, "Invalid value"),
    (["compile", "demo", "--spec", "nf4x:64"], 2, "is not a spec"),
    (["compile", "demo", "--spec", "xx4:64"], 2, "no data type 'xx'"),
    (["compile", "demo", "--spec", "nf4:0"], 2, "block size 0"),
    (["compile", "demo", "--spec", "nf4:64", "--bits", "4"], 2, "exactly one"),
    (["compile", "demo", "--quantizer", "absmx"], 2, "did you mean 'absmax'"),
    (
        ["compile", "demo", "--spec", "nf4:64", "--quantizer", "weighted", "--calibrate", "none"],
        2,
        "needs calibration",
    ),
    (["compile", "demo", "--plan", "none.json"], 2, "cannot be read"),
    (["compile", "demo", "--spec", "nf4:64", "-o", "/proc/x"], 2, "cannot be written|not a writable"),
    (["compile"], 2, "Missing argument"),
    (["compile", "demo", "--disable", "alocate_bits"], 2, "did you mean 'allocate_bits'"),
    (["compile", "demo", "--passes", "canonicalize"], 2, "only a program of stage PLANNED can be packed"),
    (
        ["compile", "demo", "--spec", "nf4:64", "--passes", "canonicalize,score_sensitivity,allocate_bits"],
        2,
        "add it, or leave",
    ),
    (["compile", "demo", "--print-after", "allocate"], 2, "no pass of this pipeline 'allocate'"),
    (["run", "demo-none", "hi"], 1, "no such file or folder"),
    (["eval", "demo", "--text", "none.txt"], 2, "cannot be read"),
    (["eval", "demo", "--context", "1"], 2, "takes 2 to"),
    (["run", "demo", "hi", "--backend", "cqu"], 2, "did you mean 'cpu'"),
    (["bench", "demo", "--backend", "onnxx"], 2, "no backend 'onnxx'"),
    (["nonsense"], 2, "No such command"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_bad_usage_is_one_paragraph(kbitc, arguments, code, message, tmp_path):
    done = kbitc(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_our_own_is_one_paragraph_and_a_traceback_on_request(monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(sys.modules["kbitc.cli.main"], "app", fail)
    monkeypatch.delenv("KBITC_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "a fault of kbitc, or a damaged file that it does not know: ZeroDivisionError: a mistake" in said
    monkeypatch.setenv("KBITC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()
