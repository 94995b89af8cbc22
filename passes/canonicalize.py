"""Make every matmul with a weight one node of one form, and name what is not.

before:  linear(x, w, b)    addmm(b, x, w)        matmul(x, t(w))    _grouped_mm(x, mT(w), n)
after:   linear(x, w, b)    linear(x, w, b, T)    linear(x, w)       grouped_linear(x, w, n)

T is ``is_transposed``: w is stored as (in, out). A parameter that no node reads is what its module's class
says that it is. What is neither, or is read in two ways, stays at 16 bits in ``rest``, each with the reason.
Tied weights are one `Weight`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from kbitc.graph.matching import Match, Miss, match
from kbitc.graph.module_classes import ModuleUse
from kbitc.graph.program import Program, Rest, Stage, Use, Weight
from kbitc.graph.rewriting import build
from kbitc.graph.weight_reads import CHECKS, WeightRead, is_move, op_name, reads_of

if TYPE_CHECKING:
    from collections.abc import Mapping

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEVER_READ = "never read by the captured graph"
NOT_KNOWN = "there is no graph that reads it, and the class of its module does not say what it is for"
POINTWISE = ("aten.add", "aten.sub", "aten.mul", "aten.div", "aten.tanh")


@dataclass(frozen=True)
class Canonicalize:
    """Finds the weights of a captured program."""

    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, program: Program) -> Program:
        """The same computation in canonical form, its tensors in ``weights`` and ``rest``."""
        outcomes_of = _decide(program)
        chosen = {
            read.node: (name, outcome)
            for name, outcomes in outcomes_of.items()
            for read, outcome in outcomes
            if isinstance(outcome, Match) and _why_left(program, name, outcomes) is None
        }
        graph, nodes = _rewrite(program, chosen)
        order = {node: i for i, node in enumerate(nodes)}
        weights: dict[str, Weight] = {}
        rest: dict[str, Rest] = {}
        for name, tensor in program.rest.items():
            outcomes = outcomes_of.get(name, [])
            miss = _why_left(program, name, outcomes)
            if miss is None and outcomes:
                calls = sorted((read.node for read, _ in outcomes), key=order.__getitem__)
                weights[name] = _weight(program, tensor, [(nodes[n], chosen[n][1]) for n in calls])
            elif miss is None:
                weights[name] = _weight_by_class(tensor, program.by_class[name])
            else:
                rest[name] = replace(tensor, reason=miss.reason, is_matmul=miss.is_matmul)
        module = fx.GraphModule(program.graph, graph)
        return replace(program, graph=module, weights=weights, rest=rest, stage=Stage.CANONICAL)


Outcomes = list[tuple[WeightRead, Match | Miss]]


def _decide(program: Program) -> dict[str, Outcomes]:
    """For each stored tensor the calls that read it, and what each of them is."""
    lifted = [
        (program.parameters[node.name], node)
        for node in program.graph.graph.nodes
        if node.name in program.parameters
    ]
    read_by = {name: reads_of(node) for name, node in lifted}
    views = {node for _, node in lifted} | {read.view for all_ in read_by.values() for read in all_}
    return {
        name: [(read, match(read, views.__contains__)) for read in read_by[name]]
        for name in program.rest
        if name in read_by
    }


def _why_left(program: Program, name: str, outcomes: Outcomes) -> Miss | None:
    """Why a tensor is not packable; None if it is."""
    tensor, known = program.rest[name], program.by_class.get(name, ())
    read = [outcome for _, outcome in outcomes]
    is_matmul = any(o.is_matmul if isinstance(o, Miss) else o.kind != "embedding" for o in (*read, *known))
    reasons = dict.fromkeys(o.reason for o in read or known if isinstance(o, Miss))
    uses = [o for o in read or known if not isinstance(o, Miss)]
    if not tensor.is_parameter:
        return Miss("persistent buffer, not a parameter", is_matmul)
    if tensor.dtype not in DTYPES:
        return Miss(f"{str(tensor.dtype)[6:]} is not a dtype to quantize from", is_matmul)
    if not tensor.shape:
        return Miss("a scalar")
    if len(tensor.shape) == 1 and not is_matmul:
        return Miss("1-D: norm weight or bias")
    if tensor.numel == 0:
        return Miss("empty")
    if not (read or known):
        # It may be the weight of a matmul for all that anybody knows, unless it is a vector.
        never = NOT_KNOWN if program.untraced else NEVER_READ
        return Miss(never, is_matmul=sum(size > 1 for size in tensor.shape) > 1)
    if reasons:
        kinds = ", ".join(sorted({use.kind for use in uses}))
        listed = " and ".join(reasons)
        return Miss(f"used as {kinds}, but also {listed}" if kinds else listed, is_matmul)
    if len({use.is_transposed for use in uses}) > 1:
        return Miss("used both as (out, in) and as (in, out)", is_matmul)
    return None


def _rewrite(
    program: Program, chosen: Mapping[fx.Node, tuple[str, Match]]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A new graph with canonical calls; the second value is old call to canonical node."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    canonical: dict[fx.Node, fx.Node] = {}
    weight_of: dict[str, fx.Node] = {}
    for node in program.graph.graph.nodes:
        if op_name(node) in CHECKS:
            continue  # it would keep dead code alive
        if node not in chosen:
            new[node] = graph.node_copy(node, new.__getitem__)
            if node.name in program.parameters:
                weight_of[program.parameters[node.name]] = new[node]
            continue
        name, matched = chosen[node]
        new[node], canonical[node] = build(graph, node, matched, weight_of[name], new.__getitem__)
    # A call that reads a weight stays, whoever reads its result: the weight says that it is its use.
    kept = set(canonical.values())
    graph.eliminate_dead_code(lambda node: node in kept or node.is_impure())
    return graph, canonical


def _weight(program: Program, tensor: Rest, uses: list[tuple[fx.Node, Match]]) -> Weight:
    return Weight(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        tuple(
            Use(node.name, matched.kind, feeds_output=_feeds_output(node, program.parameters))
            for node, matched in uses
        ),
        tensor.aliases,
        is_transposed=uses[0][1].is_transposed,
    )


def _weight_by_class(tensor: Rest, outcomes: tuple[ModuleUse | Miss, ...]) -> Weight:
    known = [use for use in outcomes if isinstance(use, ModuleUse)]
    uses = tuple(Use("", use.kind, use.feeds_output, use.module) for use in known)
    return Weight(
        tensor.name, tensor.shape, tensor.dtype, uses, tensor.aliases, is_transposed=known[0].is_transposed
    )


def _feeds_output(node: fx.Node, parameters: Mapping[str, str]) -> bool:
    """True if only views and pointwise arithmetic with constants come before an output."""
    seen, stack = {node}, [node]
    while stack:
        source = stack.pop()
        for user in source.users:
            if user.op == "output":
                return True
            if user in seen or not (is_move(user) or op_name(user) in POINTWISE):
                continue
            others = [operand for operand in user.all_input_nodes if operand is not source]
            if all(_is_constant(operand, parameters) for operand in others):
                seen.add(user)
                stack.append(user)
    return False


def _is_constant(node: fx.Node, parameters: Mapping[str, str]) -> bool:
    """True if a node does not depend on the model's inputs."""
    seen, stack = {node}, [node]
    while stack:
        source = stack.pop()
        if source.op == "placeholder" and source.name not in parameters:
            return False
        fresh = [operand for operand in source.all_input_nodes if operand not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return True


PASS = Canonicalize
