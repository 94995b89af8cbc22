"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_demo():
    out = run(EXAMPLES / "demo.py")
    assert "16-bit" in out
    assert "compiled" in out
    assert "continues" in out


def test_custom_pass():
    out = run(EXAMPLES / "custom_pass.py").splitlines()
    assert [line.split()[0] for line in out[:4]] == [
        "canonicalize",
        "score_sensitivity",
        "allocate_bits",
        "keep_ends",
    ]
    assert out[3].endswith("14 weights planned")
    assert 3.5 < float(out[4].split()[0]) < 6
    assert len((EXAMPLES / "custom_pass.py").read_text().splitlines()) < 40


@pytest.mark.slow
def test_train_demo_model(tmp_path):
    text = tmp_path / "text.txt"
    words = "the quick brown fox jumps over a lazy dog while seven wizards mix potent brews".split()
    lines = (" ".join(words[(i * j) % 14] for j in range(1, 12)) + "." for i in range(1, 3000))
    text.write_text("\n".join(lines))
    run(
        EXAMPLES / "train_demo_model.py", f"toy={text}", "--steps", "3", "--out", tmp_path / "out",
        "--checkpoint", tmp_path / "c.ckpt",
    )  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
