"""``kbitc bench``: both models, each in a process of its own."""

from __future__ import annotations

import json


def test_bench_measures_both(kbitc, compiled):
    out, _ = compiled
    done = kbitc(
        "bench", out, "-n", "2", "--prompt-tokens", "8", "--runs", "1", "--json", "--backend", "eager"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert set(rows) == {"packed", "16-bit"}
    for row in rows.values():
        assert row["decode"] > 0
        assert row["prefill"] > 0
        assert row["peak_bytes"] > row["bytes"] > 0
