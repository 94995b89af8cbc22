"""Where a replay stops to quantize: weights that read one value, in the order of the graph.

The one thing to know: a weight that is read once, by a matmul, is quantized where it is read. One that is
read at several places (a tied head, layers that share weights), as rows (an embedding) or along its rows has
no such place; it is quantized before.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from kbitc.graph.program import CANONICAL, Program

ADDITIONS = {operator.add, torch.add, torch.ops.aten.add.Tensor}
VIEWS = {
    *(torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default),
    *(torch.ops.aten.alias.default, torch.ops.aten.clone.default, torch.ops.aten.contiguous.default),
    *(torch.ops.aten.dropout.default, torch.ops.aten.to.dtype),
}


@dataclass(frozen=True)
class WeightRead:
    """A node that reads a weight.

    Attributes:
        node: of the graph.
        name: of the weight.
        kind: "linear", "embedding" or "grouped_linear".
        is_turned: it multiplies along the weight's rows.
    """

    node: fx.Node
    name: str
    kind: str
    is_turned: bool


@dataclass(frozen=True)
class Stop:
    """Weights that are quantized together.

    Attributes:
        reads: one a weight; all have the same input.
        position: of the first of them among the graph's nodes.
    """

    reads: tuple[WeightRead, ...]
    position: int

    @property
    def names(self) -> tuple[str, ...]:
        """The weights."""
        return tuple(read.name for read in self.reads)

    @property
    def kind(self) -> str:
        """Of the reads: linear, or grouped_linear."""
        return self.reads[0].kind

    @property
    def given(self) -> fx.Node:
        """The node whose value they multiply."""
        node = self.reads[0].node.args[0]
        assert isinstance(node, fx.Node)
        return node


def weight_reads(program: Program) -> list[WeightRead]:
    """Every node that reads a packable weight, in the order of the graph."""
    found = []
    for node in program.graph.graph.nodes:
        kind = CANONICAL.get(node.target) if node.op == "call_function" else None
        stored = node.args[1] if kind is not None else None
        name = program.parameters.get(stored.name, "") if isinstance(stored, fx.Node) else ""
        if kind is not None and name in program.weights:
            is_transposed = bool(node.kwargs.get("is_transposed", False))
            is_turned = kind != "embedding" and is_transposed != program.weights[name].is_transposed
            found.append(WeightRead(node, name, kind, is_turned))
    return found


def stops(program: Program) -> list[Stop]:
    """The stops of a canonical program, in the order of its graph."""
    reads = weight_reads(program)
    often = Counter(read.name for read in reads)
    order = {node: i for i, node in enumerate(program.graph.graph.nodes)}
    groups: dict[object, list[WeightRead]] = {}
    for read in reads:
        if often[read.name] == 1 and read.kind != "embedding" and not read.is_turned:
            rest = read.node.args[2:] if read.kind == "grouped_linear" else ()
            groups.setdefault((read.kind, read.node.args[0], *rest), []).append(read)
    return [Stop(tuple(own), order[own[0].node]) for own in groups.values()]


def added_to(read: WeightRead) -> fx.Node | None:
    """The node whose value a read's output is added to, with no more than views between; None for none."""
    node = read.node
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in ADDITIONS:
            first, second = user.args[:2]
            other = second if first is node else first
            return other if isinstance(other, fx.Node) and other is not node else None
        if user.target not in VIEWS or user.args[0] is not node:
            return None
        node = user
    return None
