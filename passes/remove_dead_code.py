"""Remove nodes that nothing reads and that do nothing else, and dropouts, which do nothing here.

before:  a = f(dropout(x))    b = g(x)    return a
after:   a = f(x)                         return a

What tracing leaves behind to check itself goes as well. Inputs of the graph stay, whoever calls it gives
them: those that nothing reads are named, stored tensors among them, as bytes that buy nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from kbitc.graph.facts import Fact
from kbitc.graph.program import Program, Stage
from kbitc.graph.rewriting import copy_of
from kbitc.graph.weight_reads import CHECKS, has_effect, is_idle_dropout, op_name
from kbitc.pipeline.records import Fired

FACT: Fact[Fired] = Fact("remove_dead_code")


@dataclass(frozen=True)
class RemoveDeadCode:
    """Removes what the passes before it left without a reader."""

    needs: ClassVar[Stage] = Stage.PACKED
    gives: ClassVar[Stage] = Stage.PACKED
    needs_graph: ClassVar[bool] = True
    provides: ClassVar[tuple[Fact[Any], ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same computation; candidates are nodes without a reader, and dropouts."""
        graph = copy_of(program)
        before = [node.name for node in graph.nodes]
        for node in list(graph.nodes):
            if op_name(node) in CHECKS:
                graph.erase_node(node)
            elif is_idle_dropout(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code(has_effect)
        unread = [node for node in graph.nodes if not node.users and node.op != "output"]
        left = {node.name: _why_kept(program, node) for node in unread}
        kept = {node.name for node in graph.nodes}
        groups = tuple((name,) for name in before if name not in kept)
        module = fx.GraphModule(program.graph, graph)
        return replace(program, graph=module).with_fact(FACT, Fired(groups, left))


def _why_kept(program: Program, node: fx.Node) -> str:
    if node.op != "placeholder":
        return "it does something beside computing a value"
    stored = program.parameters.get(node.name)
    return "an input that nothing reads" if stored is None else f"'{stored}' is stored, but nothing reads it"


PASS = RemoveDeadCode
