"""``kbitc bench``: both models, each in a process of its own."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(("dtype", "bits"), [("auto", 16), ("float32", 32)])
def test_bench_measures_both(kbitc, compiled, dtype, bits):
    out, _ = compiled
    short = ("-n", "2", "--prompt-tokens", "8", "--runs", "1", "--backend", "eager")
    done = kbitc("bench", out, *short, "--json", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert set(rows) == {"packed", f"{bits}-bit"}
    assert rows[f"{bits}-bit"]["bits_per_param"] == bits
    for row in rows.values():
        assert row["decode"] > 0
        assert row["prefill"] > 0
        assert row["peak_bytes"] > row["bytes"] > 0
        assert row["share"] == pytest.approx(row["decode"] / row["limit"])
        assert row["limit"] <= row["bandwidth"] / row["bytes"] * 2  # the demo's embedding is less than half


def test_bench_says_where_the_time_of_a_token_went(kbitc, compiled):
    out, _ = compiled
    done = kbitc("bench", out, "-n", "3", "--prompt-tokens", "8", "--runs", "1", "--backend", "cpu", "--json")
    if done.returncode != 0 and "compiler" in done.stderr:
        pytest.skip("needs the native kernels")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["packed, cpu"]
    assert set(row["spent"]) == {"products", "attention", "between"}
    assert 0 < sum(row["spent"].values()) < 1 / row["decode"]
    assert row["why_compiled"] == ""


def test_bench_measures_what_was_exported(kbitc, compiled, tmp_path):
    pytest.importorskip("onnxruntime")
    out, _ = compiled
    assert kbitc("export", out, "--format", "onnx", "-o", tmp_path / "onnx").returncode == 0
    done = kbitc("bench", tmp_path / "onnx", "-n", "2", "--prompt-tokens", "8", "--runs", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert set(rows) == {"exported"}
    assert rows["exported"]["decode"] > 0
