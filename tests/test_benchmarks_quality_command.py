"""The comparison with peers as a command, and the ledger of its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kbitc
from benchmarks.quality import comparison
from benchmarks.quality.__main__ import main
from benchmarks.quality.campaign import Sizes, open_campaign
from benchmarks.quality.evaluator import Scores
from benchmarks.quality.peer_runs import Outcome, remembered

DEMO = Path(kbitc.__file__).parent / "demo_model"
TEXT = DEMO / "heldout.txt"


def test_a_ledger_goes_on_in_another_folder(tmp_path):
    def opened(text):
        sizes = Sizes(calibration=2, test=2, context=16)
        work = tmp_path / f"work-{len(made)}"
        return open_campaign(DEMO, work, TEXT, {"a": text}, sizes, 1, tmp_path / "ledger.json")

    def make(label, *losses, reason=""):
        made.append(label)
        scores = {"a": Scores([*losses], [0.0] * len(losses))}
        return Outcome(label, reason=reason) if reason else Outcome(label, 4.0, scores, notes=("n",))

    made = []
    row = remembered(opened(TEXT), ["x"], lambda: make("x", 1.0, 2.0))
    assert remembered(opened(TEXT), ["x"], lambda: make("again", 3.0)) == row
    assert remembered(opened(Path(__file__)), ["x"], lambda: make("text", 4.0)).label == "text"
    for _ in range(2):  # what failed is not kept
        assert remembered(opened(TEXT), ["y"], lambda: make("y", reason="no compiler")).reason
    assert made == ["x", "text", "y", "y"]
    assert [file.name for file in tmp_path.glob("*.json")] == ["ledger.json"]


@pytest.fixture
def arguments(tmp_path):
    made = [str(DEMO), "--calibrate", str(TEXT), "--text", str(TEXT), "--work", str(tmp_path / "work")]
    made += ["--context", "16", "--windows", "2", "--calibration-windows", "2", "--threads", "1"]
    return [*made, "--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]


def test_the_command_writes_its_tables(arguments, tmp_path, monkeypatch, capsys):
    reason = Outcome("x", reason="not here")
    monkeypatch.setattr("benchmarks.quality.__main__.peer_outcome", lambda *_, **__: reason)
    assert main([*arguments, "--only", "HQQ 4*"]) == 0
    assert "not here" in (tmp_path / "out.md").read_text()
    assert len(json.loads((tmp_path / "out.json").read_text())["pairs"]) == 4
    assert "not here" in capsys.readouterr().out
    assert main([*arguments, "--context", "9999"]) == 2
    assert "--context 9999" in capsys.readouterr().err


def test_the_command_holds_quantizers_against_the_first(arguments, tmp_path, monkeypatch):
    def made(campaign, setting, bits):
        assert setting[1] == ("--quantizer", setting[0])
        return Outcome(setting[0], bits, {"heldout": Scores([bits, len(setting[0])], [0.0, 0.0])})

    monkeypatch.setattr(comparison, "shipped_outcome", made)
    assert main([*arguments, "--ablation", "absmax", "absmax(x)"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["pairs"]
    bases = [(row["base"]["label"], row["kbitc"] and row["kbitc"]["label"]) for row in rows]
    assert bases == [("absmax", None), ("absmax", "absmax(x)")] * 3
    assert [row["base"]["bits"] for row in rows[::2]] == [4.0, 3.0, 2.5]
    assert rows[1]["differences"]["heldout"]["loss"]["mean"] == 1.5
