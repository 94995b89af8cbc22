"""What runs on a Ray cluster gives what one process gives, also when workers are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kbitc[ray]'")

from kbitc.checkpoint import demo
from kbitc.errors import SourceError, UsageError
from kbitc.evaluation.perplexity import read_text
from kbitc.study.grid import Grid
from kbitc.study.ledger import Ledger
from kbitc.study.sweep import Study, sweep
from kbitc.system.engine import engine_of
from kbitc.system.stopping import descendants

BUSY = {"seconds", "peak_bytes", "kbitc", "torch", "transformers"}


def study(text):
    return Study(Grid([3, 4, 5], ["int", "nf"], [64]), read_text(text), text.name, context=64, limit=512)


def figures(rows):
    return [{key: value for key, value in asdict(row).items() if key not in BUSY} for row in rows]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(demo.heldout().read_text("utf-8")[:6000], "utf-8")
    return path


@pytest.fixture(scope="module")
def ray():
    with engine_of("ray") as engine:
        yield engine


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    return figures(sweep(["demo"], study(text), tmp_path_factory.mktemp("whole") / "t.parquet").rows)


def working(root):
    """Ids of the workers that are at a task now."""
    names = {number: Path(f"/proc/{number}/cmdline") for number in descendants(root)}
    told = {number: path.read_bytes() for number, path in names.items() if path.exists()}
    return [number for number, name in told.items() if name.startswith(b"ray::_one")]


def test_a_worker_that_is_killed_costs_nothing(ray, whole, text, tmp_path):
    killed, told = [], []

    def kill(_):
        if not killed:
            killed.extend(working(os.getpid())[:1])
            os.kill(killed[0], signal.SIGKILL)

    table = tmp_path / "t.parquet"
    outcome = sweep(["demo"], study(text), table, lambda *step: told.append(step), kill, engine=ray)
    assert killed, "a worker was at work when the first row came"
    assert (outcome.ran, outcome.known) == (7, 0)
    assert figures(outcome.rows) == whole
    assert told == [("jobs", 0, 7), *((f"jobs {i}/7", i, 7) for i in range(1, 8))]
    again = sweep(["demo"], study(text), table, engine=ray)
    assert (again.ran, again.known) == (0, 7)


def test_what_goes_wrong_in_a_worker_is_told_as_in_a_process(ray, text, tmp_path):
    """The error itself, in one paragraph, and what was measured before stays."""
    short = Study(Grid([3], ["int"], [64]), "too short", "t.txt", context=64)
    with pytest.raises(UsageError, match="fewer than one window"):
        sweep(["demo"], short, tmp_path / "t.parquet", engine=ray)
    with pytest.raises(SourceError, match="nowhere"):
        sweep([str(tmp_path / "nowhere")], study(text), tmp_path / "t.parquet", engine=ray)


STOPPED = """
import os, sys
from pathlib import Path
from kbitc.cli import main
sys.argv = ["kbitc", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_stopped_and_gone_on_with(whole, text, tmp_path):
    """Ctrl-C in a terminal: a line, no process left, and the rest of the jobs by another command."""
    table = tmp_path / "t.parquet"
    command = ["sweep", "demo", "--text", text, "--bits", "3-5", "--types", "int,nf", "--blocks", "64"]
    command += ["--context", "64", "--limit-tokens", "512", "-o", table, "--engine", "ray"]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *map(str, command)],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    done = Ledger(table).folder
    for _ in range(1200):
        if list(done.glob("*.json")) or process.poll() is not None:
            break
        time.sleep(0.05)
    started = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, said
    assert said.strip() == "error: stopped by SIGINT"
    until = time.monotonic() + 20
    while time.monotonic() < until and any(map(is_running, started)):
        time.sleep(0.1)
    assert not [number for number in started if is_running(number)]
    kept = len(list(done.glob("*.json")))
    outcome = sweep(["demo"], study(text), table)
    assert 0 < kept == outcome.known
    assert figures(outcome.rows) == whole


def is_running(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
