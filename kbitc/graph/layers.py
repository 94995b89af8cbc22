"""Convolutions over patches and recurrent layers in a graph, put as the matmuls that they are.

before:  conv2d(x, W, b, stride)        lstm(x, (h, c), [W_ih, W_hh, ...])
after:   linear(patches, W.view, b)     linear(x, W_ih), then for each step linear(h, W_hh) and its gates

The one thing to know: the functions of `kbitc.tensor.layers`, with which packed models compute, are traced on
the call's own fake values, and their nodes take its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from kbitc.graph.matching import bound
from kbitc.graph.program import Program
from kbitc.graph.rewriting import copy_of
from kbitc.graph.weight_reads import op_name, stored_values, value_of
from kbitc.tensor.layers import as_matmuls


def written_as_matmuls(program: Program) -> Program:
    """The same computation, where a layer of another form with stored weights is a matmul."""
    stored = stored_values(program.graph.graph, program.parameters)
    forms = {node.name: form for node in program.graph.graph.nodes if (form := _form(node, stored))}
    if not forms:
        return program
    graph = copy_of(program)
    for node in list(graph.nodes):
        if node.name in forms:
            _inline(graph, node, forms[node.name])
    return replace(program, graph=fx.GraphModule(program.graph, graph))


def _form(node: fx.Node, stored: set[fx.Node]) -> Callable[..., Any] | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if stored.isdisjoint(node.all_input_nodes):
        return None
    return as_matmuls(op_name(node), _values(list(bound(node).values())))


def _values(args: Any) -> Any:
    return fx.map_arg(args, value_of)


def _inline(graph: fx.Graph, node: fx.Node, form: Callable[..., Any]) -> None:
    """Put a function of a call's arguments in the place of the call."""
    args = list(bound(node).values())
    leaves, spec = pytree.tree_flatten(args, is_leaf=lambda value: isinstance(value, fx.Node))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def run(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return form(*pytree.tree_unflatten(filled, spec))

    with torch.no_grad():
        values = [value_of(leaves[place]) for place in places]
        traced = make_fx(run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    given = iter(leaves[place] for place in places)
    new: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                new[inner] = next(given)
            elif inner.op == "call_function":
                new[inner] = graph.node_copy(inner, new.__getitem__)
                new[inner].meta = {**node.meta, "val": inner.meta["val"]}
            elif inner.op == "output":
                result = fx.map_arg(inner.args[0], new.__getitem__)
            else:
                raise AssertionError(f"{inner.op} in the trace of {op_name(node)}")
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for part in list(node.users):  # getitem of several results
            part.replace_all_uses_with(result[part.args[1]])
            graph.erase_node(part)
    graph.erase_node(node)
