"""Advice: what fits, in order, and commands that do what they say."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from kbitc.artifact.reader import Artifact
from kbitc.errors import UsageError
from kbitc.study.advise import advise, parse_size
from kbitc.study.grid import Grid
from kbitc.study.ledger import read_table
from kbitc.study.sweep import Study, sweep


@pytest.mark.parametrize("text", ["four", "4XB", "0", "-1GB", "GB"])
def test_bad_sizes(text):
    with pytest.raises(UsageError, match="--memory"):
        parse_size(text)


def test_the_lowest_loss_that_fits_comes_first(rows):
    for memory in (90_000, 200_000, 10**7):
        found = advise(rows, memory)
        fitting = [row for row in rows if row.total_bits <= 8 * memory]
        assert found[0].row.loss == min(row.loss for row in fitting)
        assert all(each.nbytes <= memory for each in found)
        assert [each.row.loss for each in found] == sorted(each.row.loss for each in found)
        assert len({each.row.model for each in found}) == len(found)
        low, high = found[0].interval
        assert low < found[0].row.loss < high


def test_nothing_fits(rows):
    with pytest.raises(UsageError, match=r"the smallest is models/100000 at .*3:"):
        advise(rows, 1000)


def test_families_are_not_compared(rows):
    both = [*rows, replace(rows[0], family="gpt2-1")]
    with pytest.raises(UsageError, match="2 families"):
        advise(both, 10**9)
    assert advise(both, 10**9, "gpt2")[0].row.family == "gpt2-1"
    with pytest.raises(UsageError, match="known: gpt2-1, llama-0"):
        advise(both, 10**9, "opt")


def test_formats_of_studies_have_no_command(make_row):
    flat = make_row(100_000, 4, loss=1.0, is_flat=True, format="int4:64+flat")
    (only,) = advise([flat], 10**9)
    assert only.command is None
    assert "--flat-blocks" in only.reason
    (best,) = advise([flat, make_row(100_000, 4)], 10**9)
    assert best.row.format == "int4:64"
    assert best.command is not None


@pytest.mark.parametrize("scope", ["linear", pytest.param("all", marks=pytest.mark.slow)])
def test_the_command_makes_what_was_measured(kbitc_path, text, tmp_path, scope):
    table = tmp_path / "t.parquet"
    study = Study(Grid([3, 5], ["nf"], [32]), text.read_text("utf-8"), text.name, scope, 64, 512)
    sweep(["demo"], study, table)
    smallest = min(read_table(table), key=lambda row: row.total_bits)
    advice = advise(read_table(table), smallest.total_bits // 8 + 1)[0]
    assert advice.row.format == "nf3:32"
    done = subprocess.run(
        ["bash", "-c", advice.command],
        cwd=tmp_path,
        env=kbitc_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 8 * Artifact.open(tmp_path / "demo-nf3-32").payload_bytes == advice.row.total_bits


@pytest.fixture
def kbitc_path(tmp_path):
    """An environment whose ``kbitc`` is this one."""
    import os
    import sys

    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "kbitc"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m kbitc "$@"\n')
    command.chmod(0o755)
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": root}
