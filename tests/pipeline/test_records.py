"""The record that fusion and clean-up passes share."""

from __future__ import annotations

import json

import torch
from torch import nn

from kbitc.compiler.driver import lower
from kbitc.compiler.inspection import possible_fusions
from kbitc.graph.capture import capture
from kbitc.passes.apply_plan import ApplyPlan
from kbitc.pipeline import records
from kbitc.pipeline.defaults import LOWERING
from kbitc.pipeline.manager import PassManager
from kbitc.pipeline.records import Fired

RECORD = Fired((("a", "b"), ("c",)), {"d": "why", "e": "why", "f": "other"})


def test_json_keeps_everything():
    assert Fired.from_json(json.loads(json.dumps(RECORD.to_json()))) == RECORD
    assert Fired.from_json(Fired().to_json()) == Fired()


def test_lines_count_reasons():
    assert list(records.lines({"merge": RECORD, "other": Fired()})) == [
        "merge: fired 2 times (3 names), left 3",
        "  2 left: why",
        "  1 left: other",
        "other: fired 0 times (0 names), left 0",
    ]


def test_lowering_records_every_pass_and_needs_no_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
    program = PassManager(["canonicalize"]).run(capture(model, (torch.zeros(2, 7),)))
    planned = PassManager([ApplyPlan({"weights": {"*": "nf4:64"}})]).run(program)
    found = records.records(lower(planned))
    assert list(found) == list(LOWERING)
    assert len(found["fuse_dequantize"].groups) == 2
    assert list(found["fuse_epilogues"].left) == ["relu"]
    assert possible_fusions(program) == {"fold_norms": Fired(), **found}


def test_a_model_without_weights_has_nothing_to_fuse():
    program = PassManager(["canonicalize"]).run(capture(nn.ReLU(), (torch.zeros(3),)))
    assert possible_fusions(program) == {}
