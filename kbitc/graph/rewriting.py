"""What passes that rewrite a graph share: a copy to change, new calls with their values, what is safe.

The one thing to know: a call may move down to a later place only if nothing between changes what it
reads; `changed_between` answers that for values that in-place ops write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from kbitc.graph import program
from kbitc.graph.matching import Match
from kbitc.graph.program import Program
from kbitc.graph.weight_reads import is_move, value_of

aten = torch.ops.aten


def copy_of(program: Program) -> fx.Graph:
    """The program's graph to change, with the same names, values, inputs and outputs."""
    source = program.graph.graph
    graph = fx.Graph()
    graph.set_codegen(source._codegen)  # how inputs and outputs are flattened
    end = graph.output(graph.graph_copy(source, {}))
    end.meta = dict(source.output_node().meta)
    return graph


def call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node with its fake value, that belongs to the same module as ``like``."""
    node = graph.call_function(target, args, kwargs)
    with torch.no_grad():
        value = target(*fx.map_arg(args, value_of), **kwargs)
    node.meta = {**like.meta, "val": value}
    return node


def build(
    graph: fx.Graph, old: fx.Node, match: Match, weight: fx.Node, new: Callable[[fx.Node], fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """The canonical call with what moves its operands there and back.

    Args:
        graph: where to make it.
        old: the call that it takes the place of.
        match: what that call is.
        weight: in ``graph``, as it is stored.
        new: a node of the match to that of ``graph``.

    Returns:
        What has the old call's value, and the canonical node.
    """
    if match.row is None:
        x = new(match.x)
    else:
        options = {"dtype": torch.int64, "device": value_of(old).device}
        x = call(graph, old, aten.full.default, [], match.row, **options)
    if match.is_left:
        x = call(graph, old, aten.transpose.int, x, -2, -1)
    offsets = None if match.offsets is None else new(match.offsets)
    batch = value_of(x).shape[:-1]
    if match.is_batched:
        experts, rows = batch
        x = call(graph, old, aten.reshape.default, x, [experts * rows, value_of(x).shape[-1]])
        steps = (rows, experts * rows + 1, rows)
        options = {"dtype": torch.int32, "device": value_of(x).device}
        offsets = call(graph, old, aten.arange.start_step, *steps, **options)
    flags: dict[str, Any] = {"is_transposed": True} if match.is_transposed else {}
    if match.kind == "embedding":
        out = graph.call_function(program.embedding, (x, weight))
    elif match.kind == "grouped_linear":
        out = graph.call_function(program.grouped_linear, (x, weight, offsets), flags)
    else:
        bias = None if match.bias is None else new(match.bias)
        operands = (x, weight) if bias is None else (x, weight, bias)
        out = graph.call_function(program.linear, operands, flags)
    canonical = out
    # Its shape follows from the old call's by undoing, in reverse, what is redone below.
    value = value_of(old)
    value = value.mT if match.is_left else value
    out.meta = {**old.meta, "val": value.flatten(0, 1) if match.is_batched else value}
    if match.is_batched:
        out = call(graph, old, aten.reshape.default, out, [*batch, value.shape[-1]])
    if match.is_left:
        out = call(graph, old, aten.transpose.int, out, -2, -1)
    if match.addend is not None:
        out = call(graph, old, aten.add.Tensor, new(match.addend), out)
    return out, canonical


def changed_between(value: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
    """A node after ``first`` and before ``last`` that writes in place what ``value`` is a view of."""
    root = _root(value)
    node = first.next
    while node is not last:
        if any(_root(written) is root for written in _written(node)):
            return node
        node = node.next
    return None


def _root(node: fx.Node) -> fx.Node:
    """What a chain of views starts from."""
    while is_move(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that a node mutates."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(given, fx.Node):
                yield given
