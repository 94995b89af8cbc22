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
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from kbitc.formats.packed import Operands
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program, Stage
from kbitc.graph.rewriting import call, changed_between, copy_of
from kbitc.pipeline.records import Fired

aten = torch.ops.aten
kbit = torch.ops.kbit
FACT: Fact[Fired] = Fact("merge_linears")


@dataclass(frozen=True)
class MergeLinears:
    """Merges packed linears that read the same input into one call.

    Attributes:
        most: weights in one call at most.
    """

    most: int = 16

    needs: ClassVar[Stage] = Stage.PACKED
    gives: ClassVar[Stage] = Stage.PACKED
    needs_graph: ClassVar[bool] = True
    provides: ClassVar[tuple[Fact[Any], ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same computation with fewer calls; candidates are all packed linears."""
        graph = copy_of(program)
        order = {node: i for i, node in enumerate(graph.nodes)}
        by_input: dict[fx.Node, list[fx.Node]] = {}
        groups: list[tuple[str, ...]] = []
        left: dict[str, str] = {}
        for node in graph.nodes:
            if node.target is kbit.linear.default:
                by_input.setdefault(node.args[0], []).append(node)
            elif node.target is kbit.grouped_linear.default:
                left[node.name] = "a linear over experts, which the merged op has no form of"
        for x, calls in by_input.items():
            merged = [calls[0]]
            for linear in calls[1:]:
                reason = _obstacle(x, merged[0], linear, order)
                if reason is None and len(merged) >= self.most:
                    reason = f"its input is read by more than {self.most} linears"
                if reason is None:
                    merged.append(linear)
                else:
                    left[linear.name] = reason
            if len(merged) == 1:
                left[merged[0].name] = "no other packed linear reads its input, or none that could be merged"
                continue
            groups.append(tuple(linear.name for linear in merged))
            _merge(graph, x, merged)
        module = fx.GraphModule(program.graph, graph)
        return replace(program, graph=module).with_fact(FACT, Fired(tuple(groups), left))


def _obstacle(x: fx.Node, first: fx.Node, linear: fx.Node, order: dict[fx.Node, int]) -> str | None:
    """Why ``linear`` cannot happen where ``first`` does; None if it can."""
    late = next((n for n in linear.all_input_nodes if order[n] > order[first]), None)
    if late is not None:
        return f"its operand '{late.name}' is computed after '{first.name}', which reads the same input"
    writer = changed_between(x, first, linear)
    if writer is not None:
        return f"'{writer.name}' changes the input in place between '{first.name}' and it"
    return None


def _merge(graph: fx.Graph, x: fx.Node, linears: list[fx.Node]) -> None:
    weights: list[Any] = []
    numbers: list[Any] = []
    biases: list[Any] = []
    rows: list[int] = []
    for linear in linears:
        weight, bias = Operands.split(linear.args[1:])
        weights += weight.tensors
        numbers += weight.numbers
        biases.append(linear.kwargs.get("bias") if bias is None else bias)
        rows.append(int(linear.meta["val"].shape[-1]))
    with graph.inserting_before(linears[0]):
        merged = call(graph, linears[0], kbit.linears.default, x, weights, numbers, biases)
        split = call(graph, linears[0], aten.split_with_sizes.default, merged, rows, -1)
        for i, linear in enumerate(linears):
            part = graph.call_function(operator.getitem, (split, i))
            part.meta = {**linear.meta, "val": split.meta["val"][i]}
            linear.replace_all_uses_with(part)
            for user in list(part.users):
                # A part is not contiguous when there are several tokens, and a view of it may not exist.
                if user.target is aten.view.default:
                    user.target = aten.reshape.default
    for linear in linears:
        graph.erase_node(linear)


PASS = MergeLinears
