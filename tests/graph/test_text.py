"""Programs as text, diffs and DOT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kbitc.formats.spec import parse
from kbitc.graph.capture import capture
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.text import program_diff, program_dot, program_text
from kbitc.pipeline.manager import PassManager


@pytest.fixture(scope="module")
def program():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
    return PassManager(["canonicalize"]).run(capture(model, (torch.zeros(2, 7),)))


def test_text(program):
    text = program_text(program)
    assert text.splitlines()[:6] == [
        "stage CANONICAL, after the passes ['canonicalize']",
        "p_0_weight: float32[5, 7] = stored 0.weight",
        "p_0_bias: float32[5] = stored 0.bias",
        "p_2_weight: float32[3, 5] = stored 2.weight",
        "p_2_bias: float32[3] = stored 2.bias",
        "input_1: float32[2, 7] = input",
    ]
    assert "\nrelu: float32[2, 5] = aten.relu.default(linear)\n" in text
    assert "\n  0.bias float32[5]: 1-D: norm weight or bias\n" in text


def test_diff(program):
    assert program_diff(program, program) == ""
    planned = replace(program, plan=Plan({"2.weight": Choice(parse("nf4:64"), "mine")}))
    changed = [line for line in program_diff(program, planned).splitlines() if line[0] in "+-"]
    assert changed == [
        "--- before",
        "+++ after",
        "-  2.weight float32[3, 5], read by linear linear_1: no spec yet",
        "+  2.weight float32[3, 5], read by linear linear_1: nf4:64 (mine)",
    ]


def test_dot_has_each_call_once(program):
    dot = program_dot(program)
    assert dot.count('label="linear"') == 2
    assert dot.count('label="relu.default"') == 1
    assert '"p_0_weight" -> "linear";' in dot
