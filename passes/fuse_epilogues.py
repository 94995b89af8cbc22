"""Let a packed linear add its bias itself; name every other pointwise op that follows one.

before:  y = kbit.linear(x, W) + b         b: (rows,)
after:   y = kbit.linear(x, W, b)

Activations, gates and residual additions stay: the code generator (Inductor) makes one loop of each run
of pointwise ops, and a kernel with them inside would save only the loop's traffic. For one token that is
a float32 result written and read, 8 bytes a row, beside in_features * bits / 8 bytes of weights: 64 /
(in_features * bits), 2.6 % for the smallest linears of SmolLM2-135M at 4.25 bits and 0.4 % at 4096
features, all of it in the cache. One kernel for each activation and data type is not worth that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from kbitc.formats.packed import Operands
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program, Stage
from kbitc.graph.rewriting import changed_between, copy_of
from kbitc.graph.weight_reads import is_move, keeps_features, op_name, value_of
from kbitc.pipeline.records import Fired

FACT: Fact[Fired] = Fact("fuse_epilogues")
kbit = torch.ops.kbit
GENERATED = "pointwise: generated code fuses it with its neighbours, the kernel would save next to nothing"
RESIDUAL = f"adds an activation, not a bias; {GENERATED}"


@dataclass(frozen=True)
class FuseEpilogues:
    """Gives packed linears the bias that is added after them."""

    needs: ClassVar[Stage] = Stage.PACKED
    gives: ClassVar[Stage] = Stage.PACKED
    needs_graph: ClassVar[bool] = True
    provides: ClassVar[tuple[Fact[Any], ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same computation; candidates are pointwise ops that read a packed linear or a view of it."""
        graph = copy_of(program)
        order = {node: i for i, node in enumerate(graph.nodes)}
        groups: list[tuple[str, ...]] = []
        left: dict[str, str] = {}
        for linear in list(graph.nodes):
            if linear.target not in (kbit.linear.default, kbit.grouped_linear.default):
                continue
            paths = list(_epilogues(linear))
            while paths:
                path = paths.pop()
                end = path[-1]
                reason = _obstacle(path, order)
                if reason is not None:
                    left[end.name] = reason
                    continue
                groups.append((linear.name, end.name))
                left.pop(end.name, None)  # the other operand of a sum may be a linear too
                x, *rest = linear.args
                weight, _ = Operands.split(rest)
                linear.args = (x, *weight, _addend(path))
                end.replace_all_uses_with(path[-2])
                graph.erase_node(end)
                paths = list(_epilogues(linear))  # what read the sum reads the linear now
        module = fx.GraphModule(program.graph, graph)
        return replace(program, graph=module).with_fact(FACT, Fired(tuple(groups), left))


def _epilogues(linear: fx.Node) -> Iterator[list[fx.Node]]:
    """Paths from a linear through views to the pointwise ops that read it."""
    stack = [[linear]]
    while stack:
        path = stack.pop()
        for user in path[-1].users:
            if is_move(user):
                stack.append([*path, user])
            elif _is_pointwise(user):
                yield [*path, user]


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _addend(path: list[fx.Node]) -> fx.Node | None:
    """What the op at the end of a path adds to it; None if it is no plain addition of two tensors."""
    end, value = path[-1], path[-2]
    if op_name(end) != "aten.add" or end.kwargs.get("alpha", 1) != 1:
        return None
    others = [operand for operand in end.args if operand is not value]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _obstacle(path: list[fx.Node], order: dict[fx.Node, int]) -> str | None:
    """Why the op at the end of a path cannot be the bias of the linear at its start; None if it can."""
    linear, end = path[0], path[-1]
    bias = _addend(path)
    if bias is None:
        return GENERATED
    product = value_of(linear)
    if value_of(bias).shape != product.shape[-1:]:
        return RESIDUAL
    if linear.target is kbit.grouped_linear.default:
        return "kbit.grouped_linear takes no bias"
    if len(linear.args) > 1 + len(Operands._fields) or linear.kwargs:
        return "the linear has a bias already"
    if not all(keeps_features(step) for step in path[1:-1]):
        return "its product is cut, cast or turned before the bias is added"
    if value_of(bias).dtype != product.dtype:
        return "its product and its bias differ in dtype"
    if any(len(step.users) > 1 for step in path[:-1]):
        return "its product is also read without the bias"
    if order[bias] > order[linear]:
        return "its bias is computed after the product"
    if changed_between(bias, linear, end) is not None:
        return "its bias changes in place after the product"
    return None


PASS = FuseEpilogues
