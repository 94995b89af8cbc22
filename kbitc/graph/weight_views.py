"""Calls that read a view of a parameter: slices, reshapes, casts, scaled ones, in any chain.

The one thing to know: a view is where its elements lie in the parameter (`kbitc.tensor.geometry`), worked out
by torch on tensors without data; what a chain multiplies by on its way is replayed beside the view.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from kbitc.graph.weight_reads import CHECKS, MOVES, op_name, same_shape, value_of
from kbitc.tensor.geometry import Geometry

aten = torch.ops.aten
_CASTS = (
    "alias",
    "detach",
    "contiguous",
    "clone",
    "lift_fresh",
    "lift_fresh_copy",
    "to",
    "_to_copy",
    "type_as",
)
_SCALES = ("aten.mul", "aten.div", "aten.neg", "aten._weight_norm")


@dataclass(frozen=True)
class ViewRead:
    """One call that reads a view of a parameter.

    Attributes:
        node: the call.
        view: what it takes: the parameter or the last node of a chain from it.
        parameter: that it is of.
        geometry: where its elements lie in the parameter.
        steps: the calls of the chain from the first one that multiplies on, each with the view that it takes.
        chain: all its nodes, of which the last is the view.
    """

    node: fx.Node
    view: fx.Node
    parameter: fx.Node
    geometry: Geometry
    steps: tuple[tuple[fx.Node, fx.Node], ...] = ()
    chain: tuple[fx.Node, ...] = ()


def view_reads(parameter: fx.Node) -> list[ViewRead]:
    """Every call that reads a parameter, looking through whatever keeps its elements what they are."""
    size = tuple(int(n) for n in value_of(parameter).shape)
    stack = [ViewRead(parameter, parameter, parameter, Geometry.row_major(size))]
    calls: list[ViewRead] = []
    while stack:
        at = stack.pop()
        for user in at.view.users:
            if op_name(user) in CHECKS:
                continue
            onward = list(_through(user, at))
            stack.extend(onward)
            if not onward:
                calls.append(replace(at, node=user))
    return calls


def _through(user: fx.Node, at: ViewRead) -> Iterator[ViewRead]:
    """The views that a call makes of another; nothing if it makes none."""
    if user.op != "call_function":
        return
    name = op_name(user)
    short, chain = name.rpartition(".")[2], (*at.chain, user)
    if name in _SCALES:
        if _keeps_shape(user, at.view):
            yield replace(at, view=user, steps=(*at.steps, (user, at.view)), chain=chain)
        return
    is_first = bool(user.args) and user.args[0] is at.view and user.all_input_nodes.count(at.view) == 1
    if short not in (*MOVES, *_CASTS) or not is_first or short == "getitem":
        return
    steps = (*at.steps, (user, at.view)) if at.steps else ()
    if short in _CASTS:
        if _is_cast(user, at.view):
            yield replace(at, view=user, steps=steps, chain=chain)
        return
    if len(user.all_input_nodes) > 1:
        return
    moved = at.geometry.moved(user.target, user.args[1:], user.kwargs)  # type: ignore[arg-type]
    if isinstance(moved, Geometry):
        yield replace(at, view=user, geometry=moved, steps=steps, chain=chain)
    elif moved is not None and all(part.target is operator.getitem for part in user.users):
        for part in user.users:
            index: Any = part.args[1]
            steps_to = (*steps, (part, user)) if steps else ()
            yield replace(at, view=part, geometry=moved[index], steps=steps_to, chain=(*chain, part))


def _is_cast(user: fx.Node, view: fx.Node) -> bool:
    before, after = value_of(view), user.meta.get("val")
    if not isinstance(after, Tensor) or not same_shape(after, before) or after.device != before.device:
        return False
    return after.is_floating_point() == before.is_floating_point()


def _keeps_shape(user: fx.Node, view: fx.Node) -> bool:
    """Whether a multiplication scales a view and leaves it what it is."""
    before, after = value_of(view), user.meta.get("val")
    if not isinstance(after, Tensor) or not same_shape(after, before) or not before.is_floating_point():
        return False
    if user.all_input_nodes.count(view) != 1 or user.kwargs:
        return False
    name = op_name(user)
    return name == "aten.mul" or user.args[0] is view


@dataclass(frozen=True)
class Scale:
    """What the elements of a view are multiplied by.

    Attributes:
        number: one for all.
        factors: tensors of the view's shape.
    """

    number: float
    factors: tuple[Any, ...]


def scale_of(read: ViewRead, call: Callable[..., Any], new: Callable[[fx.Node], Any]) -> Scale:
    """The scale of a view.

    Args:
        read: of the view.
        call: ``(target, *args)`` to a value: a node of a graph, or a tensor.
        new: the value of a node that the chain reads.
    """
    number, factors = 1.0, []
    for step, view in read.steps:
        name = op_name(step)
        if name in _SCALES:
            by = _factor(step, view, call, new)
            if isinstance(by, float):
                number *= by
            else:
                factors.append(call(aten.expand.default, by, list(value_of(view).shape)))
        elif step.target is operator.getitem:
            factors = [call(operator.getitem, factor, step.args[1]) for factor in factors]
        elif name.rpartition(".")[2] not in _CASTS:
            factors = [call(step.target, factor, *step.args[1:], **step.kwargs) for factor in factors]
    return Scale(number, tuple(factors))


def _factor(step: fx.Node, view: fx.Node, call: Callable[..., Any], new: Callable[[fx.Node], Any]) -> Any:
    """What one step multiplies by: a number, or a tensor that broadcasts to the view."""
    name = op_name(step)
    if name == "aten.neg":
        return -1.0
    if name == "aten._weight_norm":
        dim = step.args[2] if len(step.args) > 2 else 0
        norms = call(aten.norm_except_dim.default, new(view), 2, dim)
        return call(aten.div.Tensor, new(step.args[1]), norms)  # type: ignore[arg-type]
    other: Any = step.args[step.args[0] is view]
    is_divided = name == "aten.div"
    if isinstance(other, fx.Node):
        return call(aten.reciprocal.default, _core(other, call, new)) if is_divided else new(other)
    return 1 / other if is_divided else float(other)


def _core(factor: fx.Node, call: Callable[..., Any], new: Callable[[fx.Node], Any]) -> Any:
    """A factor without what it repeats, which arithmetic would write out."""
    core, value = new(factor), value_of(factor)
    for dim in range(value.dim()):
        if value.stride(dim) == 0:
            core = call(aten.slice.Tensor, core, dim, 0, 1)
    return core
