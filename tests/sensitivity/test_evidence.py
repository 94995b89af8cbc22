"""What a program's facts say of one weight."""

from __future__ import annotations

import torch
from torch import fx, nn

from kbitc.formats.spec import parse
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program
from kbitc.sensitivity.evidence import Evidence
from kbitc.sensitivity.moments import CALIBRATION, MOMENTS, Moments
from kbitc.sensitivity.outliers import OUTLIERS, OutlierFeatures

HESSIANS: Fact[dict[str, str]] = Fact("hessians")


def program():
    moments = {"a": Moments.of_importance(torch.ones(4))}
    outliers = {
        "a": OutlierFeatures((3,), {}, "one", torch.tensor([3, 1, 0, 2])),
        "b": OutlierFeatures(),
    }
    empty = Program(fx.GraphModule(nn.Module(), fx.Graph()), {})
    known = empty.with_fact(MOMENTS, moments).with_fact(OUTLIERS, outliers).with_fact(CALIBRATION, "text")
    return known.with_fact(HESSIANS, {"b": "of b"})


def test_facts_of_this_weight_alone():
    first, second = (Evidence.of(program(), name, parse("nf4:64")) for name in "ab")
    assert (first.name, second.name) == ("a", "b")
    assert first.get(MOMENTS) is not None
    assert first.get(HESSIANS) is None
    assert second.get(MOMENTS) is None
    assert second.get(HESSIANS) == "of b"
    assert CALIBRATION not in first.facts  # of the whole model, not of a weight
    assert Evidence.of(program(), "c", parse("nf4:64")).facts == {}


def test_outliers_are_as_many_as_the_spec_keeps():
    def picked(name, spec):
        index = Evidence.of(program(), name, parse(spec)).outliers
        return None if index is None else index.tolist()

    assert picked("a", "nf4:64") is None
    assert picked("a", "nf4:64+out25%") == [3]
    assert picked("a", "nf4:64+out50%") == [1, 3]  # sorted, the strongest two
    assert picked("b", "nf4:64+out25%") is None  # nothing ranks them: the packer chooses
