"""Multiply the scale of a norm into the weights that read it.

before:  y = normalized(x) * g + b      q = linear(y, W, c)
after:   y = normalized(x) * 1 + 0      q = linear(y, W * g, c + W @ b)

g (in,) scales W (rows, in) along its input features; b, of a LayerNorm, moves into the bias c where there
is one. Graph and names stay, so that the artifact is still the source's model: the norm is stored as
ones, and tensors are changed as they are read, one at a time. Any 1-D parameter that scales the input of
weights counts as a norm's.

Not in the usual pipeline, for what it costs: g makes the weights of a block more unequal. SmolLM2-135M,
WikiText-2 test, 10 x 512 tokens, everything quantized, without / with folding: nf4:64 absmax perplexity
41.9 / 45.0, weighted by E[x^2] 38.8 / 38.2; nf3:64 161 / 527 and 120 / 180 (16 bits: 30.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from kbitc.errors import UsageError
from kbitc.graph import weight_reads
from kbitc.graph.context import ReadTensor
from kbitc.graph.facts import Fact
from kbitc.graph.feature_flow import SCALES, SHIFT
from kbitc.graph.program import CANONICAL, Program, Stage
from kbitc.graph.weight_reads import keeps_features, op_name, reads_of, value_of
from kbitc.pipeline.records import Fired
from kbitc.sensitivity.moments import MOMENTS

FACT: Fact[Fired] = Fact("fold_norms")


@dataclass(frozen=True)
class FoldNorms:
    """Folds the scales of norms, and what they add, into the next weights."""

    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    needs_graph: ClassVar[bool] = True
    provides: ClassVar[tuple[Fact[Any], ...]] = (FACT,)

    def run(self, program: Program) -> Program:
        """The same function of other tensors; candidates are the 1-D parameters that scale a value.

        Raises:
            UsageError: the inputs of weights were measured before.
        """
        if program.get(MOMENTS) is not None:
            raise UsageError(
                "the pass 'fold_norms' changes the inputs that 'measure_moments' measures: put it before that"
            )
        changes: dict[str, Callable[[Tensor, ReadTensor], Tensor]] = {}
        groups: list[tuple[str, ...]] = []
        left: dict[str, str] = {}
        for scale in program.graph.graph.nodes:
            name = program.parameters.get(scale.name, "")
            if not _is_parameter(program, scale) or not any(_is_scale(read) for read in reads_of(scale)):
                continue
            norm = _norm(program, scale)
            if isinstance(norm, str):
                left[name] = norm
                continue
            changes |= _changes(program, name, norm)
            groups.append((name, *(program.parameters[_weight(call).name] for call in norm.calls)))
        return program.with_changes(changes).with_fact(FACT, Fired(tuple(groups), left))


@dataclass(frozen=True)
class _Norm:
    """A scale that can be folded: what the norm adds, if anything, and the canonical calls that read it."""

    shift: fx.Node | None
    calls: tuple[fx.Node, ...]


def _is_scale(read: weight_reads.WeightRead) -> bool:
    """Whether a call multiplies the features of a value by a 1-D parameter."""
    places = SCALES.get(op_name(read.node), ())
    scale, value = value_of(read.view), read.node.meta.get("val")
    is_features = isinstance(value, Tensor) and scale.dim() == 1 and value.shape[-1:] == scale.shape
    # Once: multiplied by itself it is no scale.
    return is_features and sum(read.view in read.node.args[at : at + 1] for at in places) == 1


def _weight(call: fx.Node) -> fx.Node:
    weight = call.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def _norm(program: Program, scale: fx.Node) -> _Norm | str:
    """What a scale can be folded into; or why it cannot be."""
    if not _is_own(program, scale):
        return "read in several places"
    node = reads_of(scale)[0].node
    shift = node.args[SHIFT] if op_name(node) == "aten.layer_norm" and len(node.args) > SHIFT else None
    if isinstance(shift, fx.Node) and not _is_own(program, shift):
        return "what the norm adds is no parameter, or read in several places"
    calls: list[fx.Node] = []
    stack = [node]
    while stack:
        value = stack.pop()
        for user in value.users:
            if keeps_features(user) and user.args[0] is value:
                stack.append(user)
                continue
            reason = _obstacle(program, value, user, shift)
            if reason is not None:
                return reason
            calls.append(user)
    return _Norm(shift if isinstance(shift, fx.Node) else None, tuple(calls)) if calls else "nothing reads it"


def _is_own(program: Program, node: fx.Node) -> bool:
    """Whether a node is a parameter with one reader, so that its values are free to change."""
    return _is_parameter(program, node) and len(reads_of(node)) == 1


def _is_parameter(program: Program, node: fx.Node) -> bool:
    rest = program.rest.get(program.parameters.get(node.name, ""))
    return rest is not None and rest.is_parameter


def _obstacle(program: Program, value: fx.Node, user: fx.Node, shift: object) -> str | None:
    """Why a reader of the norm keeps it from being folded; None if it takes the scale."""
    kind = CANONICAL.get(user.target)  # type: ignore[arg-type]  # a string for other nodes
    weight = program.weights.get(program.parameters.get(_weight(user).name, "")) if kind else None
    if weight is None or user.args[0] is not value or sum(a is value for a in user.args) > 1:
        what = "returned by the model" if user.op == "output" else f"read by {op_name(user)}"
        return f"the norm's result is {what}, not by weights alone"
    if len(weight.uses) > 1:
        return f"'{weight.name}' is read in {len(weight.uses)} places"
    if weight.view_of is not None or len(_weight(user).users) > 1:
        return f"'{weight.name}' is read in another form as well"
    if isinstance(shift, fx.Node):
        bias = user.args[2] if kind == "linear" and len(user.args) > 2 else None
        if not isinstance(bias, fx.Node):
            return f"the norm adds a bias, and '{weight.name}' has none to take it"
        if not _is_own(program, bias):
            return f"the norm adds a bias, and that of '{weight.name}' has other readers"
    return None


# Changes: in the source's dtype, as everything that is read; computed in float32 at least.


def _changes(
    program: Program, name: str, norm: _Norm
) -> Iterator[tuple[str, Callable[[Tensor, ReadTensor], Tensor]]]:
    yield name, lambda scale, _: torch.ones_like(scale)
    if norm.shift is not None:
        yield program.parameters[norm.shift.name], lambda shift, _: torch.zeros_like(shift)
    for call in norm.calls:
        weight = program.weights[program.parameters[_weight(call).name]]
        yield weight.name, partial(_scaled, name, weight.is_transposed)
        if norm.shift is not None:
            bias, shift = call.args[2], program.parameters[norm.shift.name]
            assert isinstance(bias, fx.Node)
            moved = partial(_moved, weight.name, shift, weight.is_transposed)
            yield program.parameters[bias.name], moved


def _scaled(scale: str, is_transposed: bool, weight: Tensor, read: ReadTensor) -> Tensor:
    """``W * g``: (..., rows, in) or, transposed, (..., in, rows)."""
    factor = _wide(read(scale))
    return (_wide(weight) * (factor[:, None] if is_transposed else factor)).to(weight.dtype)


def _moved(weight: str, shift: str, is_transposed: bool, bias: Tensor, read: ReadTensor) -> Tensor:
    """``c + W @ b``: (rows,)."""
    dense = _wide(read(weight))
    return (_wide(bias) + (dense.mT if is_transposed else dense) @ _wide(read(shift))).to(bias.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


PASS = FoldNorms
