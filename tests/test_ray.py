"""What runs on a Ray cluster gives what one process gives, also when workers are lost."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kbitc[ray]'")

from kbitc.checkpoint import demo, open_checkpoint
from kbitc.checkpoint.reading import Reading
from kbitc.compiler.driver import compile_to
from kbitc.compiler.request import Request
from kbitc.errors import SourceError, UsageError
from kbitc.evaluation.perplexity import read_text
from kbitc.study.grid import Grid
from kbitc.study.ledger import Ledger
from kbitc.study.sweep import Study, sweep
from kbitc.system.engine import engine_of
from kbitc.system.stopping import descendants
from kbitc.system.work import IN_PROCESS

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


COMMAND = """
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
        [sys.executable, "-c", COMMAND, *map(str, command)],
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


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_model("llama").half().save_pretrained(folder)
    return folder


def compiled(source, out, engine=IN_PROCESS, on_progress=lambda *_: None, **options):
    request = Request.of(options.pop("bits", None), options.pop("spec", None), None, **options)
    return compile_to(source, out, request, engine=engine, on_progress=on_progress)


def test_a_compile_has_the_same_bytes_when_a_worker_is_killed(ray, tmp_path):
    """Scored and packed by workers, one of which is lost while scoring, and one while packing."""
    options = {"bits": 4.0, "quantizer": "weighted", "calibrate": "random", "types": ("int",)}
    compiled("demo", tmp_path / "one", **options)
    killed, told = {}, []

    def kill(what, done, total):
        phase = what.partition(" ")[0]
        told.append((phase, done, total))
        if phase in ("pricing", "packing") and phase not in killed and done < total and working(os.getpid()):
            killed[phase] = working(os.getpid())
            os.kill(killed[phase][0], signal.SIGKILL)

    result = compiled("demo", tmp_path / "ray", ray, kill, **options)
    assert set(killed) == {"pricing", "packing"}
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert result.in_order == ()
    for phase in killed:
        steps = [(done, total) for name, done, total in told if name == phase]
        assert len(steps) > 10, "a step a tensor"
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize("options", [
    {"spec": "nf4:64", "calibrate": "none"},
    {"bits": 4.0, "calibrate": "random", "equalize": "on"},
])  # fmt: skip
def test_what_is_compiled_on_a_cluster(ray, source, tmp_path, options):
    """What passes change goes along; feedback's weights are packed here, in order, and told of."""
    compiled(source, tmp_path / "one", **options)
    result = compiled(source, tmp_path / "ray", ray, **options)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert bool(result.in_order) == ("bits" in options)
    assert result.to_json()["in_order"] == list(result.in_order)


@pytest.mark.slow
def test_a_cluster_that_runs_already(ray, source, tmp_path):
    """The command line joins it, and leaves it running."""
    address = ray.ray.get_runtime_context().gcs_address
    command = ["compile", source, "--spec", "nf4:64", "--calibrate", "none"]
    joined = [*command, "-o", tmp_path / "ray", "--engine", "ray", "--address", address]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, joined)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "packed by this process" not in done.stdout
    compiled(source, tmp_path / "one", spec="nf4:64", calibrate="none")
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert ray.nodes()


def test_no_cluster_is_there():
    """Said at once, in a paragraph; in another process, since this one has a cluster."""
    command = ["compile", "demo", "--spec", "nf4:64", "--engine", "ray", "--address", "127.0.0.1:1"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *command], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 2
    assert "--address 127.0.0.1:1: " in done.stderr
    assert "'ray start --head'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_modules_in_memory_are_refused(ray, tiny_model, tmp_path):
    with pytest.raises(UsageError, match="is a module in memory"):
        compiled(tiny_model("llama"), tmp_path / "out", ray, spec="nf4:64", calibrate="none")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_another_one_there(source, tiny_model, tmp_path):
    """Workers compare what they open with what the process that asks has opened."""
    reading = pickle.loads(pickle.dumps(Reading(open_checkpoint(source))))
    (name, *_) = open_checkpoint(source).tensors()
    assert torch.equal(reading(name), open_checkpoint(source).read(name))
    folder = tmp_path / "model"
    tiny_model("llama").half().save_pretrained(folder)
    stale = pickle.dumps(Reading(open_checkpoint(folder)))
    tiny_model("gpt2").half().save_pretrained(folder)
    with pytest.raises(SourceError, match="is another model here"):
        pickle.loads(stale)(name)
