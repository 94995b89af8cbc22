"""Make one call of several packed linears that read the same input: queries, keys and values; gate and up.

before:  q = kbit.linear(x, Wq, bq)      k = kbit.linear(x, Wk)      v = kbit.linear(x, Wv)
after:   qkv = kbit.linears(x, [Wq, Wk, Wv], numbers, [bq, None, None])
         q, k, v = split_with_sizes(qkv, [rows of Wq, Wk, Wv], -1)

Nothing is copied or repacked, the formats may differ, and the numbers are those of the separate calls.
The one thing to know: it runs on the flat graph of a *packed* model, as ``torch.export`` gives it, and
for inference alone: the merged op has no gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from kbitc.kernels import ops
from kbitc.program import Program, Stage
from kbitc.reads import is_move

aten = torch.ops.aten
FACT = "merge_linears"


@dataclass(frozen=True)
class Merged:
    """What the pass did.

    Attributes:
        groups: node names of the calls that became one, in order.
        left: node name to the reason, for every other packed linear.
    """

    groups: tuple[tuple[str, ...], ...]
    left: dict[str, str]


@dataclass(frozen=True)
class MergeLinears:
    """Merges packed linears by their input; the fact ``merge_linears`` holds a `Merged`.

    Attributes:
        most: weights in one call at most.
    """

    most: int = 16

    needs: ClassVar[Stage] = Stage.PACKED
    gives: ClassVar[Stage] = Stage.PACKED
    provides: ClassVar[tuple[str, ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same computation with fewer calls."""
        graph = fx.Graph()
        graph.set_codegen(program.graph.graph._codegen)  # how inputs and outputs are flattened
        copied: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(program.graph.graph, copied)
        end = graph.output(output)
        end.meta = dict(program.graph.graph.output_node().meta)
        order = {node: i for i, node in enumerate(graph.nodes)}
        by_input: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.target is torch.ops.kbit.linear.default and not node.kwargs:
                by_input.setdefault(node.args[0], []).append(node)
        groups: list[tuple[str, ...]] = []
        left: dict[str, str] = {}
        for x, calls in by_input.items():
            merged = [calls[0]]
            for call in calls[1:]:
                reason = _obstacle(x, merged[0], call, order)
                if reason is None and len(merged) >= self.most:
                    reason = f"its input is read by more than {self.most} linears"
                if reason is None:
                    merged.append(call)
                else:
                    left[call.name] = reason
            if len(merged) == 1:
                left[merged[0].name] = "no other packed linear reads its input, or none that could be merged"
                continue
            groups.append(tuple(call.name for call in merged))
            _merge(graph, x, merged)
        graph.lint()
        module = fx.GraphModule(program.graph, graph)
        return replace(program, graph=module).with_fact(FACT, Merged(tuple(groups), left))


def _obstacle(x: fx.Node, first: fx.Node, call: fx.Node, order: dict[fx.Node, int]) -> str | None:
    """Why ``call`` cannot happen where ``first`` does; None if it can."""
    late = next((n for n in call.all_input_nodes if order[n] > order[first]), None)
    if late is not None:
        return f"its operand '{late.name}' is computed after '{first.name}', which reads the same input"
    root = _root(x)
    node = first.next
    while node is not call:
        if any(_root(written) is root for written in _written(node)):
            return f"'{node.name}' changes the input in place between '{first.name}' and it"
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


def _merge(graph: fx.Graph, x: fx.Node, calls: list[fx.Node]) -> None:
    weights: list[Any] = []
    numbers: list[Any] = []
    biases: list[Any] = []
    rows: list[int] = []
    for call in calls:
        operands, rest = call.args[1 : 1 + ops.OPERANDS], call.args[1 + ops.OPERANDS :]
        weights += operands[: ops.TENSORS]
        numbers += operands[ops.TENSORS :]
        biases.append(rest[0] if rest else None)
        rows.append(int(call.meta["val"].shape[-1]))
    with graph.inserting_before(calls[0]):
        merged = _call(graph, calls[0], torch.ops.kbit.linears.default, x, weights, numbers, biases)
        split = _call(graph, calls[0], aten.split_with_sizes.default, merged, rows, -1)
        for i, call in enumerate(calls):
            part = graph.call_function(operator.getitem, (split, i))
            part.meta = {**call.meta, "val": split.meta["val"][i]}
            call.replace_all_uses_with(part)
            for user in list(part.users):
                # A part is not contiguous when there are several tokens, and a view of it may not exist.
                if user.target is aten.view.default:
                    user.target = aten.reshape.default
    for call in calls:
        graph.erase_node(call)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node with its fake value, that belongs to the same module as ``like``."""
    node = graph.call_function(target, args)
    with torch.no_grad():
        value = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    node.meta = {**like.meta, "val": value}
    return node


PASS = MergeLinears
