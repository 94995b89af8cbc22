"""Signals at the command line: one line, 128 and the signal's number, nothing half-written, resumable."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kbitc.compiler import driver


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_model("llama").half().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def usual_handler():
    """Of SIGINT, which shells ignore for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_packing(number, kbitc, source, tmp_path, monkeypatch):
    command = ["compile", source, "--spec", "nf4:64", "-o"]
    assert kbitc(*command, tmp_path / "whole").returncode == 0
    pack_to = driver.pack_to

    def interrupted(program, writer):
        put, count = writer.put, len(writer.slots) // 2

        def counted(*arguments):
            put(*arguments)
            if len(writer.done) == count:
                os.kill(os.getpid(), number)

        writer.put = counted
        pack_to(program, writer)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "pack_to", interrupted)
        done = kbitc(*command, tmp_path / "out")
    assert done.returncode == 128 + number
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"stopped by {number.name}; what was packed is kept" in done.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "journal.jsonl").exists()
    assert kbitc(*command, tmp_path / "out", "--resume").returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_signal_before_packing_leaves_nothing(kbitc, source, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "run_passes", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    done = kbitc("compile", source, "--spec", "nf4:64", "-o", tmp_path / "out")
    assert done.returncode == 143
    assert done.stderr.strip().endswith("stopped by SIGTERM")
    assert list(tmp_path.iterdir()) == []


def test_a_second_compile_into_one_folder_is_refused_at_once(kbitc, source, tmp_path, monkeypatch):
    run_passes, seen = driver.run_passes, []

    def meanwhile(*arguments, **options):
        if not seen:
            seen.append(None)
            seen.append(kbitc("compile", source, "--spec", "int3:64", "-o", tmp_path / "out"))
        return run_passes(*arguments, **options)

    monkeypatch.setattr(driver, "run_passes", meanwhile)
    assert kbitc("compile", source, "--spec", "nf4:64", "-o", tmp_path / "out").returncode == 0
    assert seen[1].returncode == 2
    assert f"is being written by process {os.getpid()}" in seen[1].stderr
    assert kbitc("compile", source, "--spec", "nf4:64", "-o", tmp_path / "other").returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


def test_compilers_end_with_the_command(tmp_path):
    """SIGTERM to the command alone, while the kernels are compiled; the compiler has a child of its own."""
    script = tmp_path / "slow-c++"
    script.write_text('#!/bin/sh\ncase " $* " in *" -c "*) sleep 60;; esac\n')
    script.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "kbitc", "build-kernels"],
        env=os.environ | {"CXX": str(script), "KBITC_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def sleepers():
        from kbitc.system.stopping import descendants

        return [i for i in descendants(process.pid) if "sleep" in command_of(i)]

    deadline = time.monotonic() + 60
    while not sleepers() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = sleepers()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143, err
    assert err.strip().endswith("stopped by SIGTERM")
    deadline = time.monotonic() + 10  # whoever inherits them reaps them
    while any(os.path.exists(f"/proc/{i}") for i in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [path.suffix for path in (tmp_path / "cache" / "kernels").iterdir()] == [".lock"]


def command_of(number):
    """The name of a process's program; empty if it has ended since."""
    try:
        return Path(f"/proc/{number}/comm").read_text()
    except OSError:
        return ""


def test_handlers_are_as_before(kbitc):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    kbitc("passes")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
