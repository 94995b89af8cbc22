"""Make every matmul with a weight one node of one form, and name what is not.

before:  linear(x, w, b)    addmm(b, x, w)        matmul(x, t(w))    _grouped_mm(x, mT(w), n)
after:   linear(x, w, b)    linear(x, w, b, T)    linear(x, w)       grouped_linear(x, w, n)

T is ``is_transposed``: w is stored as (in, out). A view of a weight (rows, a kernel over patches, one that is
scaled) is read as its whole matrix, and what meets it is moved there and back (`kbitc.graph.contraction`).
A parameter that no node reads is what its module's class says that it is. What is neither stays at 16 bits
in ``rest``, each with the reason. Tied weights are one `Weight`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from kbitc.graph.capture import capture
from kbitc.graph.computed_weights import computed_of, with_tables_looked_up
from kbitc.graph.context import Calibration
from kbitc.graph.contraction import Contraction, contraction
from kbitc.graph.contraction_nodes import build_contraction
from kbitc.graph.layers import written_as_matmuls
from kbitc.graph.matching import KERNEL, Match, Miss, match, one_row
from kbitc.graph.module_classes import ModuleUse
from kbitc.graph.program import Program, Rest, Stage, Use, Weight
from kbitc.graph.rewriting import build
from kbitc.graph.weight_reads import (
    CHECKS,
    WeightRead,
    has_effect,
    is_move,
    op_name,
    reads_of,
    stored_values,
    value_of,
)
from kbitc.graph.weight_views import ViewRead, view_reads
from kbitc.tensor.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Mapping

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEVER_READ = "never read by the captured graph"
EXP = "aten.exp"  # an error in what it takes is a relative one in what it gives: Mamba's A_log
NOT_KNOWN = "there is no graph that reads it, and the class of its module does not say what it is for"
POINTWISE = ("aten.add", "aten.sub", "aten.mul", "aten.div", "aten.tanh")


@dataclass(frozen=True)
class Canonicalize:
    """Finds the weights of a captured program."""

    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, program: Program) -> Program:
        """The same computation in canonical form, its tensors in ``weights`` and ``rest``."""
        program = with_tables_looked_up(written_as_matmuls(program))
        reads_by = _decide(program)
        misses = {name: _why_left(program, name, reads_by.get(name, [])) for name in program.rest}
        chosen = {
            node: (name, outcome)
            for name, outcomes in reads_by.items()
            for node, outcome in outcomes
            if misses[name] is None and not isinstance(outcome, Miss)
        }
        graph, nodes = _rewrite(program, chosen)
        stored = stored_values(graph, program.parameters)
        order = {node: i for i, node in enumerate(nodes)}
        weights: dict[str, Weight] = {}
        rest: dict[str, Rest] = {}
        for name, tensor in program.rest.items():
            miss, outcomes = misses[name], reads_by.get(name, [])
            if miss is None and outcomes:
                calls = sorted((node for node, _ in outcomes), key=order.__getitem__)
                weights[name] = _weight(tensor, [(nodes[n], chosen[n][1]) for n in calls], stored)
            elif miss is None:
                weights[name] = _weight_by_class(tensor, program.by_class[name])
            else:
                rest[name] = replace(
                    tensor,
                    reason=miss.reason,
                    is_matmul=miss.is_matmul,
                    is_wide=tensor.is_wide or any(op_name(node) == EXP for node, _ in outcomes),
                    is_summed=_is_summed(outcomes),
                )
        module = fx.GraphModule(program.graph, graph)
        hidden = _behind_products(rest, computed_of(graph, program.parameters, stored))
        rest |= {
            name: replace(rest[name], reason=reason, is_matmul=True, is_summed=True)
            for name, reason in hidden.items()
        }
        canonical = replace(program, graph=module, weights=weights, rest=rest, stage=Stage.CANONICAL)
        return canonical.with_stored_dtypes(rest)


Form = Match | Contraction
Outcomes = list[tuple[fx.Node, Form | Miss]]


def _decide(program: Program) -> dict[str, Outcomes]:
    """For each stored tensor the calls that read it, and what each of them is."""
    lifted = [
        (program.parameters[node.name], node)
        for node in program.graph.graph.nodes
        if node.name in program.parameters
    ]
    read_by = {name: reads_of(node) for name, node in lifted}
    views = {node for _, node in lifted} | {read.view for all_ in read_by.values() for read in all_}
    seen = {name: view_reads(node) for name, node in lifted}
    deep = views | {read.view for all_ in seen.values() for read in all_}
    decided: dict[str, Outcomes] = {}
    for name in program.rest:
        if name not in read_by:
            continue
        outcomes: Outcomes = [(read.node, match(read, views.__contains__)) for read in read_by[name]]
        if _is_odd(outcomes):
            size = program.rest[name].shape
            better = _agreed([(read.node, _general(read, deep)) for read in seen[name]], size)
            outcomes = _with_rows(read_by[name], outcomes) if better is None else better
        decided[name] = outcomes
    return decided


def _with_rows(reads: list[WeightRead], outcomes: Outcomes) -> Outcomes:
    """With single rows as look-ups, of a parameter that others are looked up in."""
    if not any(isinstance(form, Match) and form.kind == "embedding" for _, form in outcomes):
        return outcomes
    rows = [
        one_row(read) if isinstance(form, Miss) else None
        for read, (_, form) in zip(reads, outcomes, strict=True)
    ]
    return [(node, row or form) for row, (node, form) in zip(rows, outcomes, strict=True)]


def _is_odd(outcomes: Outcomes) -> bool:
    """Whether plain matching leaves a tensor out."""
    return any(isinstance(outcome, Miss) for _, outcome in outcomes)


def _general(read: ViewRead, views: set[fx.Node]) -> Form | Miss:
    """What a call is that reads a view of any kind."""
    if op_name(read.node) == "aten.embedding":
        if read.geometry.is_rows() and not read.steps and read.node.args[0] is read.view:
            return Match("embedding", is_transposed=False, x=read.node.args[1])  # type: ignore[arg-type]
        return Miss("look-up in something else than the rows of a matrix")
    size = tuple(int(n) for n in value_of(read.parameter).shape)
    for is_turned in (False, True):
        is_matrix = len(size) > 1 and not read.steps
        if is_matrix and read.geometry == Geometry.of_matrix(size, is_transposed=is_turned):
            outcome = match(WeightRead(read.node, read.view, is_turned), views.__contains__)
            if isinstance(outcome, Match):
                return outcome
    form = contraction(read)
    if isinstance(form, Contraction) and form.product.x in views:
        operands = read.node.all_input_nodes
        if operands.index(read.view) < operands.index(form.product.x):
            return Miss(f"left operand of {op_name(read.node)} of two parameters", is_matmul=True)
    return form


def _agreed(outcomes: Outcomes, size: tuple[int, ...]) -> Outcomes | None:
    """The forms of all reads, if they are of one matrix; None if not. ``size``: of the parameter."""
    if not outcomes or any(isinstance(form, Miss) for _, form in outcomes):
        return None
    # What is matched without a contraction takes the matrix as it is stored.
    matrices = {form.matrix if isinstance(form, Contraction) else size for _, form in outcomes}
    return outcomes if len(matrices) == 1 else None


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
    matrices = {(use.is_transposed, use.view_of) for use in known if isinstance(use, ModuleUse)}
    if not read and len(matrices) > 1:
        return Miss("of modules that take it as different matrices", is_matmul)
    return None


def _is_summed(outcomes: Outcomes) -> bool:
    """Whether rows of a tensor meet others in sums or are looked up, or nothing reads it."""
    return not outcomes or any(
        not isinstance(o, Miss) or o.is_matmul or o.reason == KERNEL for _, o in outcomes
    )


def _behind_products(rest: Mapping[str, Rest], matmul_of: Mapping[str, str]) -> dict[str, str]:
    """Parameters that a matmul's weight is computed of, and how: they are weights of it all the same."""
    return {
        name: f"the weight of {matmul} is computed of it"
        for name, matmul in matmul_of.items()
        if name in rest and not rest[name].is_matmul
        if rest[name].is_parameter and sum(size > 1 for size in rest[name].shape) > 1
    }


def _rewrite(
    program: Program, chosen: Mapping[fx.Node, tuple[str, Form]]
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
        name, form = chosen[node]
        make: Any = build_contraction if isinstance(form, Contraction) else build
        new[node], canonical[node] = make(graph, node, form, weight_of[name], new.__getitem__)
    # A call that reads a weight stays, whoever reads its result: the weight says that it is its use.
    kept = set(canonical.values())
    graph.eliminate_dead_code(lambda node: node in kept or has_effect(node))
    return graph, canonical


def _weight(tensor: Rest, uses: list[tuple[fx.Node, Form]], stored: set[fx.Node]) -> Weight:
    matrices = {form.matrix for _, form in uses if isinstance(form, Contraction)} - {tensor.shape}
    # What is looked up decides: its rows are read one by one.
    first = next((form for _, form in uses if form.kind == "embedding"), uses[0][1])
    view_of = matrices.pop() if matrices else None
    is_transposed = first.is_transposed
    if view_of is not None and is_transposed:
        # What cannot be seen as the parameter that the model has is packed along its rows.
        is_transposed = _turned(view_of).reshaped(tensor.shape) is not None
    return Weight(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        tuple(
            Use(node.name, matched.kind, feeds_output=_feeds_output(node, stored)) for node, matched in uses
        ),
        tensor.aliases,
        is_transposed=is_transposed,
        view_of=view_of,
    )


def _turned(matrix: tuple[int, ...]) -> Geometry:
    """A stored (..., in, out), in the (..., out, in) that is packed of it."""
    return Geometry.of_matrix((*matrix[:-2], matrix[-1], matrix[-2]), is_transposed=True)


def _weight_by_class(tensor: Rest, outcomes: tuple[ModuleUse | Miss, ...]) -> Weight:
    known = [use for use in outcomes if isinstance(use, ModuleUse)]
    uses = tuple(Use("", use.kind, use.feeds_output, use.module) for use in known)
    return Weight(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        uses,
        tensor.aliases,
        is_transposed=known[0].is_transposed,
        view_of=known[0].view_of,
    )


def _feeds_output(node: fx.Node, stored: set[fx.Node]) -> bool:
    """True if only views and pointwise arithmetic with constants come before an output."""
    seen, stack = {node}, [node]
    while stack:
        source = stack.pop()
        for user in source.users:
            if user.op == "output":
                return True
            if user in seen or not (is_move(user) or op_name(user) in POINTWISE):
                continue
            if all(operand is source or operand in stored for operand in user.all_input_nodes):
                seen.add(user)
                stack.append(user)
    return False


def traced_on(source: Calibration, feed: Mapping[str, Any]) -> Program:
    """The canonical program of what is calibrated, in float32, at the shapes of an input; made once."""
    shapes = tuple((name, _shape_of(value)) for name, value in feed.items())
    return source.once(("traced", shapes), lambda: Canonicalize().run(capture(source.skeleton(), feed)))


def _shape_of(value: Any) -> Hashable:
    """What a graph depends on of an input."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return repr(value)


PASS = Canonicalize
