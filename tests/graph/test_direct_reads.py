"""Weights that a model's own code reads, and biases that it only adds, by the byte code of its methods."""

from __future__ import annotations

import pytest
from torch import nn

from kbitc.graph.direct_reads import added_biases, read_directly

BODIES = {
    "self.table.weight[:2] + x": True,
    "self.table.weight.t() @ x": True,
    "[self.table.weight[i] for i in x]": True,
    "(lambda: self.table.weight + 1)()": True,
    "x.to(self.table.weight.dtype)": False,
    "self.table.weight.size(0) + x": False,
    "self.table(x)": False,
    "self.other.weight + x": False,
}
MANY = "; ".join(f"self.a{i}" for i in range(300))  # names beyond 255 have a step before their own


def made(body, before="pass"):
    """A model whose code has no source to look at."""
    space = {"nn": nn, "__name__": "somewhere"}
    exec(  # the text is this file's
        f"class Model(nn.Module):\n def run(self, x):\n  {before}\n  return {body}\n", space
    )
    model = space["Model"]()
    model.table = nn.Embedding(3, 4)
    return model


@pytest.mark.parametrize("before", ["pass", MANY])
@pytest.mark.parametrize("body", BODIES)
def test_weights_that_code_reads(body, before):
    assert read_directly(made(body, before), "table") is BODIES[body]


@pytest.mark.parametrize("before", ["pass", MANY])
def test_biases_that_code_only_adds(before):
    assert added_biases(type(made("x + self.bias_u", before))) == {"bias_u"}
    assert added_biases(type(made("(x + self.bias_u) @ (x * self.bias_u.t())", before))) == set()
    assert added_biases(type(made("x + self.weight_u", before))) == set()
