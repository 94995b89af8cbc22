"""The canonical program of a model, run and read; for the tests of `canonicalize`."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from kbitc.graph.capture import capture
from kbitc.graph.program import CANONICAL
from kbitc.passes.canonicalize import Canonicalize
from kbitc.pipeline.manager import PassManager


def _canonicalize(model, inputs=None):
    return PassManager([Canonicalize()], is_checked=True).run(capture(model, inputs))


def _run(program, model, inputs):
    """The program's graph on a model's real tensors and real inputs."""
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    names = [node.name for node in program.graph.graph.nodes if node.op == "placeholder"]
    given = iter(inputs)
    lifted = program.parameters
    return program.graph(*(state[lifted[name]] if name in lifted else next(given) for name in names))


def _check(model, *inputs):
    """Canonicalize a module; its outputs must not change."""
    program = _canonicalize(model, inputs)
    expected = pytree.tree_leaves(model(*inputs))
    for got, want in zip(_run(program, model, inputs), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    return program


def _calls(program):
    return [n for n in program.graph.graph.nodes if n.op == "call_function" and n.target in CANONICAL]


def _lines(program):
    """The canonical calls as text, in order."""
    return [
        f"{CANONICAL[n.target]}({', '.join(str(a) for a in (*n.args, *n.kwargs))})" for n in _calls(program)
    ]


@pytest.fixture(scope="session")
def canonicalize():
    """``canonicalize(model, inputs=None)``: the canonical program."""
    return _canonicalize


@pytest.fixture(scope="session")
def run():
    """``run(program, model, inputs)``: the graph on a model's real tensors."""
    return _run


@pytest.fixture(scope="session")
def check():
    """``check(model, *inputs)``: the canonical program, whose outputs are the model's."""
    return _check


@pytest.fixture(scope="session")
def calls():
    """``calls(program)``: the canonical calls."""
    return _calls


@pytest.fixture(scope="session")
def lines():
    """``lines(program)``: the same as text."""
    return _lines
