"""A graph that Dynamo gives, on packed weights.

before:  inputs x, s, W, b             torch functions and methods: F.linear(x, W, b)
after:   inputs x, s, b, W's tensors   aten, as torch.export writes it; kbit.linear(x, W's tensors, b)

The one thing to know: the plan is the model's, made elsewhere; the graph is a piece of the model, in which
every parameter that is packed is first read by ``kbit.dequantize``, and the lowering passes then make packed
calls of what they can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kbitc.passes import fuse_dequantize
from kbitc.passes.insert_dequantize import InsertDequantize
from kbitc.pipeline import PassManager, lowering_pipeline
from kbitc.fusions import records
from kbitc.program import Program, Stage


@dataclass(frozen=True)
class Lowered:
    """A graph to compile, and where its inputs come from.

    Attributes:
        graph: aten and ``kbit`` calls.
        sources: for each of its inputs the position in Dynamo's graph, or the name of a packed tensor.
        left: packed weights that are dequantized to be read, and why.
    """

    graph: fx.GraphModule
    sources: Sequence[int | str]
    left: Mapping[str, str]

    def values(self) -> list[Any]:
        """The fake inputs to compile it for."""
        return [node.meta["val"] for node in self.graph.graph.find_nodes(op="placeholder")]


def traced(graph: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The same computation in aten calls, on fake inputs; its inputs in the same order.

    Args:
        graph: of Dynamo, which is compiling it.
        inputs: real tensors and symbolic sizes.
    """
    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    values = [_fake(value, context, mode) for value in inputs]
    # Without no_grad each @torch.no_grad function of the model becomes an opaque sub-graph.
    with mode, torch.no_grad():
        trace = make_fx(graph, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
        return trace(*values)


def _fake(value: Any, context: TracingContext, mode: FakeTensorMode) -> Any:
    """A tensor without data whose sizes are those that Dynamo guards: the same symbols."""
    if not isinstance(value, Tensor):
        return value
    about = context.tensor_to_context.get(value)
    if about is None:
        return mode.from_tensor(value, static_shapes=True)
    return mode.from_tensor(value, symbolic_context=about, source=about.tensor_source, trace=False)


def lifted_names(graph: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> dict[str, str]:
    """The model's tensors among the inputs of a graph: its node's name to the tensor's.

    Args:
        graph: with inputs in this order.
        inputs: the real ones.
        names: of the model's tensors, by ``id``.
    """
    nodes = graph.graph.find_nodes(op="placeholder")
    lifted = zip(nodes, inputs, strict=True)
    return {node.name: names[id(value)] for node, value in lifted if id(value) in names}


def lower_graph(
    source: fx.GraphModule,
    flat: fx.GraphModule,
    parameters: Mapping[str, str],
    model: Program,
    *,
    has_gradients: bool,
) -> Lowered:
    """Put packed weights into a graph.

    Args:
        source: as Dynamo gave it.
        flat: the same :func:`traced`.
        parameters: of :func:`lifted_names`, for ``flat``.
        model: planned, of the whole model.
        has_gradients: gradients with respect to inputs will be taken: only what has one may be made.
    """
    program = replace(model, graph=flat, parameters=parameters, facts={}, stage=Stage.PLANNED)
    disabled = ("merge_linears",) if has_gradients else ()
    passes = [InsertDequantize(), *lowering_pipeline(disabled=disabled)]
    lowered = PassManager(passes).run(program)
    places = {node.name: i for i, node in enumerate(flat.graph.find_nodes(op="placeholder"))}
    dynamo = source.graph.find_nodes(op="placeholder")
    sources: list[int | str] = []
    for node in lowered.graph.graph.find_nodes(op="placeholder"):
        if node.name in places:
            at = places[node.name]
            sources.append(at)
            _mark(node, dynamo[at].meta.get("tensor_dict", {}), getattr(dynamo[at], "_dynamo_source", None))
        else:
            sources.append(lowered.parameters[node.name])
            _mark(node, {"_dynamo_static_input_type": "unguarded"}, None)
    module = lowered.graph
    module.meta = dict(source.meta)
    # Constants that tracing found are attributes, which AOTAutograd takes for parameters.
    constants = [name for name, _ in module.named_buffers()]
    module._param_name_to_source = {name: ConstantSource(name) for name in constants}  # type: ignore[assignment]
    return Lowered(module, sources, _left(lowered))


def _mark(node: fx.Node, about: Mapping[str, Any], source: object) -> None:
    """What AOTAutograd reads of an input: where it is from, and whether it stays in its place."""
    node.meta["tensor_dict"] = about
    node._dynamo_source = source  # type: ignore[attr-defined]


def _left(lowered: Program) -> dict[str, str]:
    """Weights that are still dequantized, and why, of the record of ``fuse_dequantize``."""
    nodes = {node.name: node for node in lowered.graph.graph.nodes}
    found: dict[str, str] = {}
    for name, reason in records(lowered)[fuse_dequantize.FACT].left.items():
        if name in nodes:
            planes: Any = nodes[name].args[0]
            found[lowered.parameters[planes.name].removesuffix(".planes")] = reason
    return found


def is_differentiated(values: Sequence[Any]) -> bool:
    """Whether a graph that is run now would have to give gradients with respect to inputs of the model."""
    is_tensor = (isinstance(value, Tensor) and value.requires_grad for value in values)
    return torch.is_grad_enabled() and any(is_tensor)
