"""Weights of matmuls that are computed of parameters: which ones, and tables that are looked up as a whole.

before:  einsum("bhwc,hkc->bhwk", q, P[positions])
after:   einsum("bhwc,hkc->bhwk", q, embedding(P, 0 ... n - 1)[positions])

The one thing to know: what is read of such a table does not depend on the model's inputs, and no kernel has a
form for it, so that the whole of it is dequantized; a look-up of all its rows says so in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from kbitc.graph.matching import MATMULS
from kbitc.graph.program import CANONICAL, Program
from kbitc.graph.rewriting import call, copy_of
from kbitc.graph.weight_reads import op_name, stored_values, value_of
from kbitc.graph.weight_views import ViewRead, view_reads
from kbitc.tensor.reads import DENSE

aten = torch.ops.aten
DEQUANTIZED = {func._schema.name.replace("::", ".") for func in DENSE}.difference(
    ("aten.embedding", "aten.convolution")  # canonical, and no part of a weight
)
DEQUANTIZED |= {"aten.expand_as"}  # which takes its shape alone
"""Calls that a packed weight serves by dequantizing, whatever is done with what they give."""


def computed_of(graph: fx.Graph, parameters: Mapping[str, str], stored: set[fx.Node]) -> dict[str, str]:
    """The stored tensors that a matmul's weight is or is computed of, each with the name of the matmul.

    Args:
        graph: of the model, canonical or not.
        parameters: stored names by the names of their placeholders.
        stored: what the model's inputs do not change.
    """
    matmul_of: dict[str, str] = {}
    for node in graph.nodes:
        for operand in _weights_of(node, stored):
            seen, stack = {operand}, [operand]
            while stack:
                source = stack.pop()
                if source.name in parameters:
                    matmul_of.setdefault(parameters[source.name], op_name(node))
                if op_name(source) in MATMULS or source.target in CANONICAL:
                    continue
                fresh = [n for n in source.all_input_nodes if n not in seen]
                seen.update(fresh)
                stack.extend(fresh)
    return matmul_of


def _weights_of(node: fx.Node, stored: set[fx.Node]) -> list[fx.Node]:
    """The operand of a matmul that does not depend on the model's inputs, while the other does."""
    if op_name(node) not in MATMULS:
        return []
    operands = node.all_input_nodes
    if op_name(node) in ("aten.linear", "aten.addmm", "aten.baddbmm"):
        operands = operands[1:2] if op_name(node) == "aten.linear" else operands[1:]
    fixed = [operand for operand in operands if operand in stored]
    return fixed if len(fixed) < len(operands) or op_name(node) == "aten.linear" else []


def with_tables_looked_up(program: Program) -> Program:
    """The same computation, where what is read by dequantizing is a look-up of all rows.

    Only matrices that a matmul's weight is computed of.
    """
    graph, parameters = program.graph.graph, program.parameters
    matmul_of = computed_of(graph, parameters, stored_values(graph, parameters))
    names = {
        node.name
        for node in graph.nodes
        if parameters.get(node.name) in matmul_of and len(program.rest[parameters[node.name]].shape) == 2
        if any(_is_dequantizing(read) for read in view_reads(node))
    }
    if not names:
        return program
    graph = copy_of(program)
    for node in list(graph.nodes):
        if node.name in names:
            _look_up(graph, node)
    return replace(program, graph=fx.GraphModule(program.graph, graph))


def _is_dequantizing(read: ViewRead) -> bool:
    return op_name(read.node) in DEQUANTIZED


def _look_up(graph: fx.Graph, table: fx.Node) -> None:
    """Let what dequantizes a table, or views of it, read a look-up of its rows."""
    reads = [read for read in view_reads(table) if _is_dequantizing(read)]
    first = next(node for node in graph.nodes if node in table.users)
    options = {"dtype": torch.int64, "device": value_of(table).device}
    with graph.inserting_before(first):
        rows = call(graph, first, aten.arange.default, value_of(table).shape[0], **options)
        looked_up = call(graph, first, aten.embedding.default, table, rows)
    for read in reads:
        old, new = table, looked_up
        with graph.inserting_before(read.node):
            for node in read.chain:
                old, new = node, _copied(graph, node, old, new)
        read.node.replace_input_with(read.view, new)


def _copied(graph: fx.Graph, node: fx.Node, operand: fx.Node, by: fx.Node) -> fx.Node:
    """The same call of something else."""
    return graph.node_copy(node, lambda each: by if each is operand else each)
