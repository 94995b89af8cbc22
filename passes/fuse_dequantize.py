"""Make one call of a dequantization and what reads it.

before:  linear(x, D, b)         embedding(ids, D)         grouped_linear(x, D, n)
after:   kbit.linear(x, W, b)    kbit.embedding(ids, W)    kbit.grouped_linear(x, W, n)
         D = kbit.dequantize(W)

So do the forms that models and export write: ``aten.linear``, mm, matmul, addmm, bmm, einsum (see
`kbitc.graph.matching`), also through transposes and views of D. The dequantization dies when nothing else
reads it (``remove_dead_code``). The numbers are those of the op's definition, ``x @ D.T + b``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from kbitc.formats.packed import Operands
from kbitc.graph import program
from kbitc.graph.facts import Fact
from kbitc.graph.matching import Miss, match
from kbitc.graph.program import CANONICAL, Program, Stage
from kbitc.graph.rewriting import build, copy_of
from kbitc.graph.weight_reads import INT8_INPUTS, WeightRead, op_name, reads_of, value_of
from kbitc.pipeline.records import Fired

FACT: Fact[Fired] = Fact("fuse_dequantize")
kbit = torch.ops.kbit
TURNED = "multiplies along the rows of the packed weight, whose blocks run along the other dimension"


@dataclass(frozen=True)
class FuseDequantize:
    """Turns dequantize-then-multiply into packed calls."""

    needs: ClassVar[Stage] = Stage.PACKED
    gives: ClassVar[Stage] = Stage.PACKED
    needs_graph: ClassVar[bool] = True
    provides: ClassVar[tuple[Fact[Any], ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same computation; candidates are all dequantizations."""
        graph = copy_of(program)
        groups: list[tuple[str, ...]] = []
        left: dict[str, str] = {}
        dequantizations = [node for node in graph.nodes if node.target is kbit.dequantize.default]
        views = {view for node in dequantizations for view in _views(node)}
        for node in dequantizations:
            readers = reads_of(node)
            reasons: dict[str, None] = {} if readers else {"nothing reads it": None}
            count = Counter(read.node for read in readers)
            for read in readers:
                names = (node.name, read.node.name)
                is_once = count[read.node] == 1
                reason = (
                    _fuse(graph, node, read, views) if is_once else f"{op_name(read.node)} reads it twice"
                )
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
    yield from (read.view for read in reads_of(node))


def _fuse(graph: fx.Graph, dequantize: fx.Node, read: WeightRead, views: set[fx.Node]) -> str | None:
    """Replace one read by a packed call; the reason if that cannot be."""
    reader = read.node
    if reader.target not in CANONICAL:
        outcome = match(read, views.__contains__)
        if isinstance(outcome, Miss):
            return outcome.reason
        if outcome.is_transposed:
            return TURNED
        with graph.inserting_before(reader):
            result, canonical = build(graph, reader, outcome, dequantize, lambda node: node)
        _replace(graph, reader, result)
        reader = canonical
    elif reader.args[1] is not read.view:
        return f"read by {op_name(reader)} as something else than its weight"
    elif read.is_turned ^ bool(reader.kwargs.get("is_transposed", False)):
        return TURNED
    with graph.inserting_before(reader):
        packed = _packed_call(graph, reader, dequantize)
    _replace(graph, reader, packed)
    return None


def _replace(graph: fx.Graph, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    graph.erase_node(node)


def _packed_call(graph: fx.Graph, canonical: fx.Node, dequantize: fx.Node) -> fx.Node:
    """The ``kbit`` op that a canonical call of a dequantized weight is."""
    weight, _ = Operands.split(dequantize.args)
    target: Any = {
        program.linear: (kbit.linear_int8 if dequantize.meta.get(INT8_INPUTS) else kbit.linear).default,
        program.embedding: kbit.embedding.default,
        program.grouped_linear: kbit.grouped_linear.default,
    }[canonical.target]  # type: ignore[index]
    x, _, *rest = canonical.args
    if canonical.target is program.embedding:
        rest = [value_of(dequantize).dtype]
    packed = graph.call_function(target, (x, *weight, *rest))
    packed.meta = dict(canonical.meta)
    return packed


PASS = FuseDequantize
