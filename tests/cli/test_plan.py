"""``kbitc plan``: another budget, without the model."""

from __future__ import annotations

import json
import re

import pytest


def test_another_budget_from_the_score_table(kbitc, compiled, tmp_path):
    out, _ = compiled
    done = kbitc("plan", out, "--bits", "3.5", "-o", tmp_path / "plan.json", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert 3.45 < data["bits_per_param"] <= 3.5
    assert json.loads((tmp_path / "plan.json").read_text()) == data
    again = kbitc("compile", "demo", "--plan", tmp_path / "plan.json", "--dry-run", "--json")
    assert json.loads(again.stdout)["bits_per_param"] == pytest.approx(data["bits_per_param"], abs=1e-9)
    done = kbitc("plan", tmp_path, "--bits", "3.5")
    assert done.returncode == 2
    assert "kbit_scores.json" in done.stderr
    shown = kbitc("plan", out, "--bits", "3.5")
    assert shown.returncode == 0, shown.stderr
    rows = [line for line in shown.stdout.splitlines() if re.match(r"│ +\d\.\d\d ", line)]
    assert "3.50" in "".join(rows)
    assert len(rows) >= 3  # the trade-off around the budget
