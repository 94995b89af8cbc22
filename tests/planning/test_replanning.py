"""Another budget's plan from a score table, without the model and without a request."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kbitc.errors import BudgetError, SourceError, UsageError
from kbitc.formats.spec import parse
from kbitc.planning.allocation import allocate
from kbitc.planning.replanning import replan
from kbitc.sensitivity.score_table import SCORES_FILE, Option, ScoreTable


@pytest.fixture
def folder(tmp_path):
    options = {
        name: tuple(
            Option(parse(f"int{bits}:64"), 1000 * bits // 8 + 32, importance * 4.0**-bits, 2.0**-bits)
            for bits in (2, 3, 4, 6, 8)
        )
        for name, importance in (("layers.0.w", 1.0), ("layers.1.w", 50.0))
    }
    groups = {"input": [], "role": [("layers.0.w", "layers.1.w")]}
    scores = ScoreTable(
        options, dict.fromkeys(options, 1000), 10, 2005, "error", "relative", "absmax", groups=groups
    )
    (tmp_path / SCORES_FILE).write_text(json.dumps(scores.to_json()))
    return tmp_path


def test_it_is_the_plan_that_compiling_would_make(folder):
    plan, solution = allocate(ScoreTable.open(folder), 5.0, quantizer="absmax")
    again = replan(folder, 5.0)
    assert again == replan(folder / SCORES_FILE, 5.0)
    assert again["weights"] == plan.to_json()["weights"]
    assert again["weights"]["layers.0.w"]["quantizer"] == "absmax"
    assert again["budget"] == 5.0
    assert again["bits_per_param"] == 8 * (solution.nbytes + 10) / 2005 <= 5.0
    assert again["predicted"] == {"cost": solution.cost, "unit": "relative", "gap": solution.gap}


def test_weights_that_agree(folder):
    def specs(agree):
        return {entry["spec"] for entry in replan(folder, 6.0, agree)["weights"].values()}

    assert len(specs("")) == 2
    assert len(specs("role")) == 1


def test_what_cannot_be_planned(folder, tmp_path):
    for bits in (1.9, 8.1):
        with pytest.raises(UsageError, match="the budget must be between 2 and 8"):
            replan(folder, bits)
    with pytest.raises(BudgetError, match="--bits 2 cannot be met"):
        replan(folder, 2.0)
    with pytest.raises(UsageError, match="no kind of weights"):
        replan(folder, 5.0, "roles")
    with pytest.raises(UsageError, match="cannot be read as a table of scores"):
        replan(tmp_path / "none", 5.0)
    table = json.loads((folder / SCORES_FILE).read_text())
    (tmp_path / "changed.json").write_text(json.dumps(table | {"format": str(table["format"])}))
    with pytest.raises(SourceError, match="does not match its checksum"):
        replan(tmp_path / "changed.json", 5.0)


def test_it_needs_no_request_and_opens_no_model(folder):
    """Defect: it made a whole request only to check the budget."""
    code = (
        "import sys; from pathlib import Path; from kbitc.planning.replanning import replan; "
        f"replan(Path({str(folder)!r}), 5.0); "
        "upper = ('kbitc.compiler', 'kbitc.passes', 'kbitc.checkpoint.hf_folder', 'transformers'); "
        "assert not [name for name in sys.modules if name.startswith(upper)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
