"""Questions about a program's graph, answered by networkx.

The one thing to know: an edge goes from a value to the call that reads it, and nodes are named as in
the FX graph. Answers about weights are in the weights' names and order, as plans have them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TypeAlias

import networkx as nx
from torch import fx

from kbitc.errors import UsageError, did_you_mean
from kbitc.graph.program import CANONICAL, Program, Weight
from kbitc.graph.roles import repeated
from kbitc.graph.weight_reads import op_name

NameGroups: TypeAlias = list[tuple[str, ...]]
"""Names of weights that go together."""


def to_networkx(program: Program) -> nx.DiGraph[str]:
    """The graph, with what each node is.

    Node attributes: ``op`` (as FX has it), ``call`` (the function's name; "" for other nodes), ``kind``
    (of a canonical call; "" otherwise), ``stored`` (the tensor's name for a lifted parameter or buffer;
    "" otherwise).
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in program.graph.graph.nodes:
        is_call = node.op == "call_function"
        graph.add_node(
            node.name,
            op=node.op,
            call=op_name(node) if is_call else "",
            kind=CANONICAL.get(node.target, "") if is_call else "",
            stored=program.parameters.get(node.name, ""),
        )
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph


def dominators(program: Program) -> dict[str, str | None]:
    """For each node that depends on the model's inputs, its immediate dominator.

    That is the last node before it through which every path from every input goes: a value that
    alone carries what the node can know of the inputs, as the residual stream does between blocks.
    None where there is no such node: for the inputs, and where several of them meet.
    """
    graph = to_networkx(program)
    inputs = [
        name for name, about in graph.nodes.items() if about["op"] == "placeholder" and not about["stored"]
    ]
    start = ""  # no node's name
    graph.add_node(start)
    graph.add_edges_from((start, name) for name in inputs)
    above = nx.immediate_dominators(graph, start)
    return {name: above[name] or None for name in graph if name in above and name != start}


def shared_inputs(program: Program) -> NameGroups:
    """Weights whose matmuls read the very same value: queries, keys and values; gate and up.

    NameGroups of two or more, in the order of the graph. A weight with several uses may be in several.
    """
    kind_of = {use.node: use.kind for weight in program.weights.values() for use in weight.uses}
    name_of = {use.node: weight.name for weight in program.weights.values() for use in weight.uses}
    read_by: dict[str, dict[str, None]] = {}
    for node in program.graph.graph.nodes:
        if kind_of.get(node.name, "embedding") != "embedding":  # an id is not a feature
            read_by.setdefault(node.args[0].name, {})[name_of[node.name]] = None
    return list(dict.fromkeys(tuple(names) for names in read_by.values() if len(names) > 1))


def same_roles(program: Program) -> NameGroups:
    """Weights of one role (`kbitc.graph.roles`) and one shape: a projection in every layer."""
    return repeated({name: weight.shape for name, weight in program.weights.items()})


KINDS: Mapping[str, Callable[[Program], NameGroups]] = {"input": shared_inputs, "role": same_roles}


def previous_weights(program: Program) -> dict[str, tuple[str, str]]:
    """For the weight of each matmul the one before it, whose output units make its input features.

    That is the last matmul (or embedding) before it which reaches its input through no other one, has as
    many outputs as it has input features, and, where attention lies between, makes the values and not
    the scores. As ``(weight, kind)``, where kind is "linear" or "embedding"; a weight without one is missing.
    """
    graph = to_networkx(program)
    nodes = {node.name: node for node in program.graph.graph.nodes}
    made_by = {use.node: (weight, use.kind) for weight in program.weights.values() for use in weight.uses}
    previous = {}
    for weight in program.weights.values():
        reads = [use.node for use in weight.uses if use.node and use.kind != "embedding"]
        starts = [nodes[name].args[0].name for name in reads]
        for name in _upwards(graph, nodes, starts, made_by):
            source, kind = made_by[name]
            if _outputs(source, kind) == weight.in_features:
                previous[weight.name] = (source.name, "embedding" if kind == "embedding" else "linear")
                break
    return previous


def _upwards(
    graph: nx.DiGraph[str], nodes: Mapping[str, fx.Node], starts: Iterable[str], ends: Container[str]
) -> Iterator[str]:
    """The ``ends`` that reach ``starts`` along features through no other one, the last in the graph first."""
    names = list(nodes)
    order = {name: i for i, name in enumerate(names)}
    heap = [-order[name] for name in dict.fromkeys(starts)]
    heapq.heapify(heap)
    seen = set(heap)
    while heap:
        name = names[-heapq.heappop(heap)]
        if name in ends:
            yield name
            continue
        fresh = {-order[source] for source in _feature_sources(nodes[name], graph.predecessors(name))} - seen
        seen |= fresh
        for position in fresh:
            heapq.heappush(heap, position)


def _outputs(weight: Weight, kind: str) -> int:
    lead = weight.matrix[0] if len(weight.matrix) == 3 else 1
    return weight.in_features if kind == "embedding" else weight.rows // lead


def _feature_sources(node: fx.Node, operands: Iterable[str]) -> list[str]:
    """Of a node's operands those whose features are the node's: of attention, the values."""
    call = op_name(node).rpartition(".")[2] if node.op == "call_function" else ""
    at = _VALUES.get(call)
    if at is None:
        return list(operands)
    value = node.args[at] if len(node.args) > at else None
    return [value.name] if isinstance(value, fx.Node) else []


# Position of the operand that has the features of the result: softmax(q @ k) @ v.
_VALUES = {"scaled_dot_product_attention": 2, "matmul": 1, "bmm": 1, "mm": 1}


def agreeing_groups(program: Program, kind: str = "input") -> NameGroups:
    """Weights that a planner may have to give one spec, so that one kernel call can serve them.

    Every weight is in exactly one group, most of them perhaps alone. Tied weights and the experts of a
    layer need no group: each is one `Weight`.

    Args:
        program: canonical.
        kind: "input" joins weights that read the same value, directly or through a third; "role" those
            that stand at the same place of every layer.

    Raises:
        UsageError: no such kind.
    """
    if kind not in KINDS:
        raise UsageError(did_you_mean("kind of group", kind, KINDS))
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(program.weights)
    for names in KINDS[kind](program):
        graph.add_edges_from(pairwise(names))
    order = {name: i for i, name in enumerate(program.weights)}
    groups = (tuple(sorted(names, key=order.__getitem__)) for names in nx.connected_components(graph))
    return sorted(groups, key=lambda names: order[names[0]])
