"""``kbitc eval``: the numbers of the file, and the result kept beside an artifact."""

from __future__ import annotations

import json

import pytest

from kbitc.artifact.evaluations import EVAL_FILE, Evaluation, read_evaluations
from kbitc.kernels.cpu.build import load


def test_eval_reports_the_bits_of_the_file(kbitc, compiled):
    from kbitc.artifact.reader import Artifact

    out, data = compiled
    done = kbitc("eval", out, "--limit-tokens", "1024", "--json")
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)
    stored = sum(tensor.nbytes for _, tensor in Artifact.open(out).tensors())
    assert score["bits_per_param"] == pytest.approx(8 * stored / data["parameters"], rel=1e-3)
    assert score["bytes"] == stored
    assert {"perplexity", "tokens", "bits_per_param", "bytes"} <= set(score)
    assert score["tokens"] == 4 * 255


def test_eval_against_the_source(kbitc, compiled):
    out, _ = compiled
    done = kbitc("eval", out, "--against", "demo", "--limit-tokens", "512", "--json", "--record")
    score = json.loads(done.stdout)
    assert 0 < score["kl_divergence"] < 0.5
    (kept,) = read_evaluations(out / EVAL_FILE)
    assert kept == Evaluation.from_json(score)
    assert kept.loss == score["loss"]
    assert kept.divergence == score["kl_divergence"]
    done = kbitc("eval", "demo", "--limit-tokens", "512", "--record")
    assert done.returncode == 2
    assert "no artifact" in done.stderr


def test_demo_quality(kbitc, compiled):
    """4 bits a parameter cost little perplexity on text that the model has not seen."""
    out, _ = compiled
    before = json.loads(kbitc("eval", "demo", "--limit-tokens", "6000", "--json").stdout)["perplexity"]
    after = json.loads(kbitc("eval", out, "--limit-tokens", "6000", "--json").stdout)["perplexity"]
    assert before < after < 1.10 * before


@pytest.mark.skipif(not load(), reason="no native kernels here")
def test_eval_with_a_packed_cache(kbitc, compiled):
    out, _ = compiled
    plain, packed, coarse = (
        json.loads(kbitc("eval", out, "--limit-tokens", "512", "--json", *kv).stdout)
        for kv in ((), ("--kv", "int8:64"), ("--kv", "int2:64"))
    )
    assert "kv" not in plain
    assert packed["kv"] == "int8:64"
    assert abs(packed["loss"] - plain["loss"]) < 2e-3
    assert coarse["loss"] > plain["loss"] + 2e-3  # the cache is what was scored
