"""The tables of a study, of a sweep's table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import scaling
from kbitc.study.curves import PAPER
from kbitc.study.ledger import write_table
from kbitc.study.page import findings_of
from tests.study.conftest import SIZES, row

ROOT = Path(__file__).parent.parent


def test_tables_are_written(tmp_path):
    rows = [row(size, bits, seed=0) for size in SIZES[:4] for bits in (3, 4, 5, 16)]
    write_table(tmp_path / "r.parquet", rows)
    command = [
        sys.executable,
        "-m",
        "benchmarks.scaling",
        tmp_path / "r.parquet",
        "--markdown",
        tmp_path / "r.md",
    ]
    subprocess.run([*command, "--about", "Made up."], check=True, cwd=ROOT)
    text = (tmp_path / "r.md").read_text("utf-8")
    assert "16 jobs, 8 s" in text
    for title in ("Losses, int, blocks of 64", "Loss above 16 bits", "Claims, counting", "Fits"):
        assert f"## {title}" in text
    (first, *_), shares = scaling.losses(findings_of(rows)).rows, scaling.shares(findings_of(rows, PAPER))
    assert first["k3"] == "+0.1475"  # 4 e^(-3.3)
    assert len(shares.rows) == 1
