"""``kbitc run``: a prompt continued."""

from __future__ import annotations

import json


def test_run_continues_a_prompt(kbitc, compiled):
    out, _ = compiled
    eager = ("--backend", "eager")
    done = kbitc("run", out, "The function", "-n", "8", *eager)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The function")
    assert len(done.stdout) > len("The function") + 5
    assert "tokens/s (eager)" in done.stderr
    data = json.loads(kbitc("run", out, "The function", "-n", "8", "--json", *eager).stdout)
    assert data["text"] in done.stdout
    assert data["backend"] == "eager"


def test_run_refuses_a_cache_that_it_cannot_keep(kbitc, compiled):
    out, _ = compiled
    done = kbitc("run", out, "The function", "-n", "4", "--backend", "eager", "--kv", "int8:64")
    assert done.returncode != 0
    assert "without these take fp16" in " ".join(done.stderr.split())
    done = kbitc("run", out, "The function", "-n", "4", "--kv", "nf4:64+dq")
    assert "stores scales with those of other rows" in " ".join(done.stderr.split())
