"""Who reads a parameter in a traced graph: its calls, seen through aliases and transposes.

The one thing to know: a transpose of a weight is not an operation but a way to read it. Chains of
them end here, in `WeightRead.is_turned`, and their nodes die with the call that used them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kbitc.graph.transforms import CLOSES_VMAP, OPENS_VMAP


@dataclass(frozen=True)
class WeightRead:
    """One call that reads a parameter, possibly through aliases and transposes.

    Attributes:
        node: the call.
        view: what it takes: the parameter itself or the last node of a chain of views.
        is_turned: the view has the parameter's last two dimensions swapped.
    """

    node: fx.Node
    view: fx.Node
    is_turned: bool


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that a node computes."""
    value: Tensor = node.meta["val"]
    return value


def same_shape(one: Tensor, other: Tensor) -> bool:
    """Whether two fake tensors have one shape; a size that depends on data is like no other."""
    pairs = zip(one.shape, other.shape, strict=False)
    return one.dim() == other.dim() and all(statically_known_true(a == b) for a, b in pairs)


def op_name(node: fx.Node) -> str:
    """How reports call a node's function: "aten.linear", "cond"."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


INT8_INPUTS = "has_int8_inputs"
"""In the ``meta`` of a dequantization: the linears that read it round their inputs to int8 (``+a8``)."""

# What tracing leaves behind to check itself; it computes nothing.
CHECKS = ("aten._assert_tensor_metadata",)

_SAME = (
    *("alias", "detach", "contiguous", "lift_fresh", "to", "_to_copy"),
    *("view", "reshape", "clone"),
)
MOVES = (
    *_SAME,
    *("t", "transpose", "permute", "numpy_T", "mT", "matrix_H", "unsqueeze", "squeeze", "expand"),
    *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "flatten"),
    *("unflatten", "type_as", "index", "index_select", "getitem"),
)


def is_move(node: fx.Node) -> bool:
    """True for a call that only moves, cuts, casts or passes on its first argument."""
    if node.op != "call_function":
        return False
    return op_name(node).rpartition(".")[2] in MOVES or is_idle_dropout(node)


def has_effect(node: fx.Node) -> bool:
    """True for a call that stays although nothing reads it: it writes, or begins or ends a ``torch.vmap``."""
    # No schema says it of what torch.vmap leaves.
    return node.is_impure() or op_name(node) in (OPENS_VMAP, CLOSES_VMAP)


def stored_values(graph: fx.Graph, parameters: Mapping[str, str]) -> set[fx.Node]:
    """The values of stored tensors and constants alone, which the model's inputs do not change.

    Args:
        graph: of the model.
        parameters: stored names by the names of their placeholders.
    """
    stored: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            is_stored = node.name in parameters
        else:
            is_stored = all(operand in stored for operand in node.all_input_nodes)
        if is_stored:
            stored.add(node)
    return stored


def is_idle_dropout(node: fx.Node) -> bool:
    """True for a dropout in evaluation, which drops nothing."""
    return op_name(node) == "aten.dropout" and node.args[2:] == (False,)


_ROW_MAJOR = (*_SAME, "expand", "flatten", "unflatten")


def keeps_features(node: fx.Node) -> bool:
    """True for a move after which the last dimension holds the same features in the same order."""
    if not is_move(node) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor) and before.dim() and after.dim()):
        return False
    if before.dtype != after.dtype or before.shape[-1] != after.shape[-1]:
        return False
    short, last = op_name(node).rpartition(".")[2], before.dim() - 1
    if short in _ROW_MAJOR or is_idle_dropout(node):
        return True
    if len(node.args) < 2:
        return False
    if short == "index":
        indices: Any = node.args[1]
        return len(indices) <= last or indices[last] is None
    if short == "permute":
        order: Any = node.args[1]
        return bool(order[-1] % before.dim() == last)
    dims: Any = node.args[1:3] if short == "transpose" else node.args[1:2]
    if short == "unsqueeze":
        return bool(dims[0] % after.dim() <= last)
    is_known = short in ("transpose", "slice", "select", "narrow", "index_select")
    return is_known and all(dim % before.dim() != last for dim in dims)


def reads_of(parameter: fx.Node) -> list[WeightRead]:
    """Every call that reads a parameter, looking through aliases and transposes."""
    calls, stack = [], [(parameter, False)]
    while stack:
        view, is_turned = stack.pop()
        for user in view.users:
            if op_name(user) in CHECKS:
                continue
            turns = _turns(user, view)
            if turns is None:
                calls.append(WeightRead(user, view, is_turned))
            else:
                stack.append((user, is_turned ^ turns))
    return calls


def _turns(node: fx.Node, view: fx.Node) -> bool | None:
    """True: the last two dimensions swap; False: nothing changes; None: not a view of that kind."""
    if node.op != "call_function" or not node.args or node.args[0] is not view:
        return None
    before, after = value_of(view), node.meta.get("val")
    if not isinstance(after, Tensor):
        return None
    if (before.dtype, before.device) != (after.dtype, after.device):
        return None
    short = op_name(node).rpartition(".")[2]
    if short in _SAME:
        return False if same_shape(before, after) else None
    last = (before.dim() - 2, before.dim() - 1)
    if before.dim() >= 2 and (short == "mT" or (before.dim() == 2 and short in ("t", "numpy_T"))):
        return True
    if short == "transpose":
        dims = sorted(int(dim) % before.dim() for dim in node.args[1:3])  # type: ignore[arg-type]
        return True if tuple(dims) == last else None
    if short == "permute":
        order = [int(dim) % before.dim() for dim in node.args[1]]  # type: ignore[union-attr,arg-type]
        swapped = [*range(before.dim() - 2), last[1], last[0]]
        return True if order == swapped else (False if order == sorted(order) else None)
    return None
