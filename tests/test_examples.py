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


# Several programs in one process: much of their time is that of the imports. A short calibration and a short
# text say what they have to say.
SEVERAL = """
import runpy, sys

from kbitc.compiler import calibrator
from kbitc.evaluation import perplexity

calibrator.COUNT, calibrator.LENGTH = 2, 16
whole = perplexity.read_text
perplexity.read_text = lambda path: whole(path)[:20_000]
programs, sys.argv = sys.argv[1:], ["example"]
for program in programs:
    print("program")
    runpy.run_path(program, run_name="__main__")
"""


def test_demo_and_custom_pass():
    printed = run("-c", SEVERAL, EXAMPLES / "demo.py", EXAMPLES / "custom_pass.py")
    _, demo, custom_pass = printed.split("program\n")
    assert "16-bit" in demo
    assert "compiled" in demo
    assert "continues" in demo
    out = custom_pass.splitlines()
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


@pytest.mark.slow
def test_train_family_goes_on_where_it_stopped(tmp_path):
    from transformers import AutoModelForCausalLM

    text = tmp_path / "text.txt"
    words = "the quick brown fox jumps over a lazy dog while seven wizards mix potent brews".split()
    lines = (" ".join(words[(i * j) % 14] for j in range(1, 12)) + "." for i in range(1, 6000))
    text.write_text("\n".join(lines))
    command = [
        EXAMPLES / "train_family.py", text, "--out", tmp_path / "family", "--tokens-per-parameter", "0.2",
        "--vocab", "300", "--batch", "2", "--context", "32", "--save-every", "20", "--threads", "1",
    ]  # fmt: skip
    run(*command, "--sizes", "20k")
    printed = run(*command, "--sizes", "20k,40k")
    assert "20k: " in printed
    assert "step 50" not in printed.partition("40k: ")[0], "a size that is there is not trained again"
    losses = {}
    for size in ("20k", "40k"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "family" / size, trust_remote_code=False)
        losses[size] = model.num_parameters()
    assert 1.5 < losses["40k"] / losses["20k"] < 3
    other = subprocess.run(
        [sys.executable, *map(str, command), "--seed", "1"], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "another seed" in other.stderr
