"""Moments of a model that is run without a graph: the same as those of its graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from kbitc.checkpoint import open_checkpoint
from kbitc.compiler.calibrator import make_calibrator
from kbitc.graph.capture import capture
from kbitc.graph.context import Context, silent
from kbitc.passes.canonicalize import Canonicalize
from kbitc.passes.measure_moments import MeasureMoments
from kbitc.sensitivity.moments import CALIBRATION, MOMENTS


def untraced(program):
    graph = fx.Graph()
    graph.output(())
    empty = fx.GraphModule(nn.Module(), graph)
    return replace(program, graph=empty, parameters={}, untraced="for a test")


@pytest.fixture
def captured(tiny_model, tmp_path, monkeypatch):
    """``captured(family)``: a canonical program with something to measure on."""
    monkeypatch.setattr("kbitc.compiler.calibrator.cache_folder", lambda: tmp_path)

    def make(family):
        checkpoint = open_checkpoint(tiny_model(family))
        calibrator = make_calibrator(checkpoint, "auto", silent, is_wanted=True)
        context = Context(checkpoint.read, calibrator)
        return Canonicalize().run(capture(checkpoint.skeleton(), context=context))

    return make


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "roberta"])
def test_moments_without_a_graph_are_those_of_the_graph(captured, family, monkeypatch):
    program = captured(family)
    expected = MeasureMoments().run(program).known(MOMENTS)
    monkeypatch.setattr("kbitc.passes.canonicalize.capture", lambda *a: untraced(capture(*a)))
    found = MeasureMoments().run(replace(program, untraced="for a test")).known(MOMENTS)
    assert found.keys() == expected.keys() == program.weights.keys()
    for name, own in found.items():
        assert (own.reach is None) == (expected[name].reach is None)
        for factor, of_graph in zip(own.factors, expected[name].factors, strict=True):
            torch.testing.assert_close(factor.rows, of_graph.rows, rtol=1e-4, atol=1e-12)
            torch.testing.assert_close(factor.columns, of_graph.columns, rtol=1e-4, atol=1e-12)


def test_a_model_that_cannot_be_run_either_is_measured_on_nothing_and_says_so(captured, monkeypatch):
    program = captured("roberta")

    def fails(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("transformers.models.roberta.modeling_roberta.RobertaEmbeddings.forward", fails)
    after = MeasureMoments().run(untraced(program))
    assert after.known(MOMENTS) == {}
    assert "nothing: the model has no graph" in after.known(CALIBRATION)
    assert "RuntimeError: no such luck" in after.known(CALIBRATION)
