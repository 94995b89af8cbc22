"""Weights that a model's own code reads, and biases that it only adds, by the byte code of its methods."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kbitc.graph.direct_reads import added_biases, never_multiplied, read_directly

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


class Positions(nn.Module):
    """As Kimi's: rows of a table, mixed by constants."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x):
        return x + mixed(self.table, x)


class Scores(Positions):
    def forward(self, x):
        return scores(self.table, x)


class Operator(Positions):
    def forward(self, x):
        return [x @ row for row in self.table]


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Taker(Holder):
    def forward(self, x):
        return x @ self.inner.table


class Giver(Positions):
    """Hands its table to a module that multiplies."""

    def __init__(self):
        super().__init__()
        self.operator = Operator()

    def forward(self, x):
        return self.operator(self.table)


class Asker(Positions):
    """What its function does, its code does not say."""

    def __init__(self):
        super().__init__()
        self.function = torch.matmul

    def forward(self, x):
        return self.function(x, self.table)


class Chooser(Positions):
    def forward(self, x):
        return TABLE["product"](x, self.table)


TABLE = {"product": torch.matmul}


def mixed(table, x):
    return F.embedding_bag(x, table, mode="sum")


def scores(table, x):
    return products(x, table)


def products(x, table):
    return torch.einsum("ij,kj->ik", x, table)


@pytest.mark.parametrize(
    ("model", "is_safe"),
    [
        (Holder(Positions()), True),
        (Holder(Scores()), False),
        (Holder(Operator()), False),
        (Taker(Positions()), False),
        (Holder(Giver()), False),
        (Holder(Asker()), False),
        (Holder(Chooser()), False),
        (Holder(nn.Bilinear(2, 3, 4)), False),
    ],
)
def test_parameters_that_no_code_multiplies(model, is_safe):
    assert never_multiplied(model, "inner") == ({"table"} if is_safe else set())
