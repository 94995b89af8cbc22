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


def test_bench_measures_what_was_exported(kbitc, compiled, tmp_path):
    pytest.importorskip("onnxruntime")
    out, _ = compiled
    assert kbitc("export", out, "--format", "onnx", "-o", tmp_path / "onnx").returncode == 0
    done = kbitc("bench", tmp_path / "onnx", "-n", "2", "--prompt-tokens", "8", "--runs", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert set(rows) == {"exported"}
    assert rows["exported"]["decode"] > 0
