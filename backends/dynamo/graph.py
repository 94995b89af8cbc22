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
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts
from torch.fx.traceback import preserve_node_meta

from kbitc.backends.dynamo.vmaps import without_vmaps
from kbitc.graph.program import Program, Stage
from kbitc.passes.fuse_dequantize import FACT
from kbitc.passes.insert_dequantize import InsertDequantize
from kbitc.pipeline.defaults import lowering_pipeline
from kbitc.pipeline.manager import PassManager


@dataclass(frozen=True)
class Lowered:
    """A graph to compile, and where its inputs come from.

    Attributes:
        graph: aten and ``kbit`` calls.
        inputs: fake, to compile it for.
        sources: for each of its inputs the position in Dynamo's graph, or the name of a packed tensor.
        left: packed weights that are dequantized to be read, and why.
    """

    graph: fx.GraphModule
    inputs: Sequence[Any]
    sources: Sequence[int | str]
    left: Mapping[str, str]


@dataclass(frozen=True)
class AtenGraph:
    """A graph of Dynamo in aten calls.

    Attributes:
        source: as Dynamo gave it.
        graph: its inputs in the same order.
        inputs: fake tensors and symbolic sizes, as they are guarded.
    """

    source: fx.GraphModule
    graph: fx.GraphModule
    inputs: Sequence[Any]

    def named(self, inputs: Sequence[Any], names: Mapping[int, str]) -> dict[str, str]:
        """The model's tensors among the inputs: the node's name to the tensor's.

        Args:
            inputs: the real ones.
            names: of the model's tensors, by ``id``.
        """
        lifted = zip(_inputs(self.graph), inputs, strict=True)
        return {node.name: names[id(value)] for node, value in lifted if id(value) in names}


def _inputs(graph: fx.GraphModule) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="placeholder"))


def trace(graph: fx.GraphModule, inputs: Sequence[Any]) -> AtenGraph:
    """A graph that Dynamo is compiling, in aten calls, without a look at any data.

    Args:
        graph: of Dynamo.
        inputs: real tensors and symbolic sizes.
    """
    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    values = [_fake(value, context, mode) for value in inputs]
    # Without no_grad each @torch.no_grad function of the model becomes an opaque sub-graph.
    with mode, torch.no_grad(), preserve_node_meta():
        run = PropagateUnbackedSymInts(without_vmaps(graph, values)).run
        flat = make_fx(run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    return AtenGraph(graph, flat, values)


def _fake(value: Any, context: TracingContext, mode: FakeTensorMode) -> Any:
    """A tensor without data whose sizes are those that Dynamo guards: the same symbols."""
    if not isinstance(value, Tensor):
        return value
    about = context.tensor_to_context.get(value)
    if about is None:
        return mode.from_tensor(value, static_shapes=True)
    return mode.from_tensor(value, symbolic_context=about, source=about.tensor_source, trace=False)


def lower_graph(
    traced: AtenGraph, parameters: Mapping[str, str], model: Program, *, has_gradients: bool
) -> Lowered:
    """Put packed weights into a graph.

    Args:
        traced: the graph.
        parameters: the model's tensors among its inputs, see :meth:`AtenGraph.named`.
        model: planned, of the whole model.
        has_gradients: gradients with respect to inputs will be taken: only what has one may be made.
    """
    program = replace(model, graph=traced.graph, parameters=parameters, facts={}, stage=Stage.PLANNED)
    disabled = ("merge_linears",) if has_gradients else ()
    lowered = PassManager([InsertDequantize(), *lowering_pipeline(disabled=disabled)]).run(program)
    places = {node.name: i for i, node in enumerate(_inputs(traced.graph))}
    given = _inputs(traced.source)
    sources: list[int | str] = []
    inputs: list[Any] = []
    for node in _inputs(lowered.graph):
        at = places.get(node.name)
        if at is None:
            sources.append(lowered.parameters[node.name])
            inputs.append(node.meta["val"])
            _mark(node, {"_dynamo_static_input_type": "unguarded"}, None)
        else:
            sources.append(at)
            inputs.append(traced.inputs[at])
            _mark(node, given[at].meta.get("tensor_dict", {}), getattr(given[at], "_dynamo_source", None))
    module = lowered.graph
    module.meta = dict(traced.source.meta)
    # Constants that tracing found are attributes, which AOTAutograd takes for parameters.
    constants = [name for name, _ in module.named_buffers()]
    module._param_name_to_source = {name: ConstantSource(name) for name in constants}  # type: ignore[assignment]
    return Lowered(module, inputs, sources, _left(lowered))


def _mark(node: fx.Node, about: Mapping[str, Any], source: object) -> None:
    """What AOTAutograd reads of an input: where it is from, and whether it stays in its place."""
    node.meta["tensor_dict"] = about
    node._dynamo_source = source  # type: ignore[attr-defined]


def _left(lowered: Program) -> dict[str, str]:
    """Weights that are still dequantized, and why, of the record of ``fuse_dequantize``."""
    nodes = {node.name: node for node in lowered.graph.graph.nodes}
    reasons: dict[str, str] = {}
    for name, reason in lowered.known(FACT).left.items():
        if name in nodes:
            planes: Any = nodes[name].args[0]
            reasons[lowered.parameters[planes.name].removesuffix(".planes")] = reason
    return reasons


def is_differentiated(values: Sequence[Any]) -> bool:
    """Whether a graph that is run now would have to give gradients with respect to inputs of the model."""
    is_tensor = (isinstance(value, Tensor) and value.requires_grad for value in values)
    return torch.is_grad_enabled() and any(is_tensor)
