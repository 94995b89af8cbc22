"""Make one call of a dequantization and what reads it.

before:  linear(x, D, b)         embedding(ids, D)         grouped_linear(x, D, n)
after:   kbit.linear(x, W, b)    kbit.embedding(ids, W)    kbit.grouped_linear(x, W, n)
         D = kbit.dequantize(W)

So do the forms that models and export write: ``aten.linear``, mm, matmul, addmm, bmm, einsum (see
`kbitc.matching`), also through transposes and views of D. The dequantization dies when nothing else
reads it (``remove_dead_code``). The numbers are those of the op's definition, ``x @ D.T + b``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from kbitc import program as forms
from kbitc.fusions import Fired
from kbitc.kernels import ops
from kbitc.matching import Miss, match
from kbitc.program import CANONICAL, Program, Stage
from kbitc.reads import Read, reads, value_of
from kbitc.rewriting import build, call, copy_of

FACT = "fuse_dequantize"
kbit = torch.ops.kbit
TURNED = "multiplies along the rows of the packed weight, whose blocks run along the other dimension"


@dataclass(frozen=True)
class FuseDequantize:
    """Turns dequantize-then-multiply into packed calls."""

    needs: ClassVar[Stage] = Stage.PACKED
    gives: ClassVar[Stage] = Stage.PACKED
    provides: ClassVar[tuple[str, ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same computation; candidates are all dequantizations."""
        graph = copy_of(program)
        groups: list[tuple[str, ...]] = []
        left: dict[str, str] = {}
        found = [node for node in graph.nodes if node.target is kbit.dequantize.default]
        views = {view for node in found for view in _views(node)}
        for node in found:
            reasons: dict[str, None] = {} if reads(node) else {"nothing reads it": None}
            for read in reads(node):
                names = (node.name, read.node.name)
                reason = _fuse(graph, node, read, views)
                if reason is None:
                    groups.append(names)
                else:
                    reasons[reason] = None
            if reasons:
                left[node.name] = " and ".join(reasons)
        module = fx.GraphModule(program.graph, graph)
        return replace(program, graph=module).with_fact(FACT, Fired(tuple(groups), left))


def _views(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    yield from (read.view for read in reads(node))


def _fuse(graph: fx.Graph, dequantize: fx.Node, read: Read, views: set[fx.Node]) -> str | None:
    """Replace one read by a packed call; the reason if that cannot be."""
    old = read.node
    if CANONICAL.get(old.target) is not None:  # type: ignore[arg-type]  # a string for other nodes
        if old.args[1] is not read.view or sum(node is read.view for node in old.args) > 1:
            return f"read by {CANONICAL[old.target]} as something else than its weight"  # type: ignore[index]
        if read.is_turned ^ bool(old.kwargs.get("is_transposed", False)):
            return TURNED
        with graph.inserting_before(old):
            old.replace_all_uses_with(_packed_call(graph, old, dequantize))
        graph.erase_node(old)
        return None
    found = match(read, views.__contains__)
    if isinstance(found, Miss):
        return found.reason
    if found.is_transposed:
        return TURNED
    with graph.inserting_before(old):
        result, canonical = build(graph, old, found, dequantize, lambda node: node)
        packed = _packed_call(graph, canonical, dequantize)
    old.replace_all_uses_with(result)
    canonical.replace_all_uses_with(packed)
    graph.erase_node(canonical)
    graph.erase_node(old)
    return None


def _packed_call(graph: fx.Graph, canonical: fx.Node, dequantize: fx.Node) -> fx.Node:
    """The ``kbit`` op that a canonical call of a dequantized weight is."""
    operands = dequantize.args[: ops.OPERANDS]
    x, _, *rest = canonical.args
    target: Any = {
        forms.linear: kbit.linear.default,
        forms.embedding: kbit.embedding.default,
        forms.grouped_linear: kbit.grouped_linear.default,
    }[canonical.target]  # type: ignore[index]
    extra = [value_of(dequantize).dtype] if canonical.target is forms.embedding else rest
    return call(graph, canonical, target, x, *operands, *extra)


PASS = FuseDequantize
