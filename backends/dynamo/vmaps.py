"""Regions of `torch.vmap` in a graph of Dynamo, as plain aten calls.

before:  _vmap_increment_nesting(n); a = _add_batch_dim(x); _remove_batch_dim(f(a)); _vmap_decrement_nesting()
after:   aten calls of the batched f

The one thing to know: tracing before dispatch sees a batched tensor where the transform has not been applied
yet, and would take it for a constant. A region is therefore traced below the transform, by itself; the rest
of the graph keeps its linears whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts

from kbitc.graph.transforms import CLOSES_VMAP, OPENS_VMAP


def without_vmaps(graph: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph itself where it has no such regions, or a copy without them.

    Args:
        graph: of Dynamo.
        inputs: fake tensors and symbolic sizes, whose mode is on.
    """
    regions = list(_regions(graph.graph))
    if not regions:
        return graph
    values = _Values(graph)
    values.run(*inputs)
    copied = fx.GraphModule(graph, fx.Graph())
    copies: dict[fx.Node, fx.Node] = {}
    inside = {node: region for region in regions for node in region}
    for node in graph.graph.nodes:
        region = inside.get(node)
        if region is None:
            copies[node] = copied.graph.node_copy(node, copies.__getitem__)
        elif node is region[-1]:
            _inline(graph, region, values.known, copied, copies)
    copied.recompile()
    return copied


class _Values(PropagateUnbackedSymInts):
    """Keeps the value of every node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.known: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.known[n] = super().run_node(n)
        return self.known[n]


def _regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The outermost regions, each with what opens and closes it."""
    depth, region = 0, []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name == OPENS_VMAP
        if depth:
            region.append(node)
        depth -= name == CLOSES_VMAP
        if region and not depth:
            yield region
            region = []


def _inline(
    graph: fx.GraphModule,
    region: list[fx.Node],
    values: Mapping[fx.Node, Any],
    copied: fx.GraphModule,
    copies: dict[fx.Node, fx.Node],
) -> None:
    """Put the region's aten calls into ``copied``, and what is read of it later into ``copies``."""
    members = set(region)
    given = list(dict.fromkeys(node for own in region for node in own.all_input_nodes if node not in members))
    later = [node for node in region if any(user not in members for user in node.users)]
    own = fx.Graph()
    owned: dict[fx.Node, fx.Node] = {node: own.placeholder(node.name) for node in given}
    for node in region:
        owned[node] = own.node_copy(node, owned.__getitem__)
    own.output(tuple(owned[node] for node in later))
    run = fx.GraphModule(graph, own)
    traced = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(*(values[node] for node in given))
    places = traced.graph.find_nodes(op="placeholder")
    inlined = {place: copies[node] for place, node in zip(places, given, strict=True)}
    for node in traced.graph.nodes:
        if node.op == "call_function":
            inlined[node] = copied.graph.node_copy(node, inlined.__getitem__)
        elif node.op == "get_attr":
            inlined[node] = copied.graph.get_attr(_kept(copied, getattr(traced, node.target)))
        elif node.op == "output":
            copies |= dict(zip(later, (inlined[value] for value in node.args[0]), strict=True))


def _kept(module: fx.GraphModule, constant: Any) -> str:
    """The name under which the module now has a constant that tracing made."""
    name = next(free for i in count() if not hasattr(module, free := f"_constant_{i}"))
    setattr(module, name, constant)
    return name
