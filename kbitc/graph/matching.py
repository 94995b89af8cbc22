"""Which aten calls are a matmul with a weight or a look-up in one, and why others are not.

    linear(x, w, b)   addmm(b, x, w)   mm(x, w)   matmul(x, w)   matmul(w, x)   einsum(eq, x, w)
    bmm(x, w)   baddbmm(a, x, w)   _grouped_mm(x, w, offsets)   embedding(w, ids)

The one thing to know: nothing is rewritten here. `match` answers with a `Match`, from which
``canonicalize`` builds the new nodes, or with a `Miss`, whose reason ends up in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kbitc.graph.weight_reads import WeightRead, is_move, op_name, value_of

KERNEL = "convolution kernel"


@dataclass(frozen=True)
class Match:
    """A call that is one canonical call, give or take movements of its activations.

    Attributes:
        kind: "linear", "embedding" or "grouped_linear".
        is_transposed: the weight, as it is stored, is (..., in, out).
        x: activations, or the ids of an embedding.
        bias: one number for each output feature.
        addend: added to the product.
        offsets: of a grouped matmul over a flat batch.
        is_left: the weight is the left operand: ``w @ x = linear(x.mT, w).mT``.
        is_batched: one matrix of ``x`` for each expert: flattened to groups of equal size.
        row: of an embedding: the one that is looked up, and ``x`` is the call itself.
    """

    kind: str
    is_transposed: bool
    x: fx.Node
    bias: fx.Node | None = None
    addend: fx.Node | None = None
    offsets: fx.Node | None = None
    is_left: bool = False
    is_batched: bool = False
    row: int | None = None


@dataclass(frozen=True)
class Miss:
    """A call that reads a parameter in no canonical way.

    Attributes:
        reason: one clause.
        is_matmul: the parameter is the weight of a matmul all the same.
    """

    reason: str
    is_matmul: bool = False


# Matchers: one for each kind of call. `call` is the read, `args` the call's bound arguments.

_Matcher = Callable[[WeightRead, dict[str, Any]], "Match | Miss"]


def match(read: WeightRead, is_parameter: Callable[[fx.Node], bool]) -> Match | Miss:
    """What a read is.

    Args:
        read: the call and the view of the parameter that it takes.
        is_parameter: whether a node is a parameter or a view of one.
    """
    node, name = read.node, op_name(read.node)
    if node.op == "output":
        return Miss("returned by the model")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        # What happens inside cannot be seen from here, so --strict must not pass over it.
        return Miss(f"read inside the sub-graph of '{name}'", is_matmul=True)
    if name in _CONVOLUTIONS:
        return Miss(KERNEL)
    matcher = _MATCHERS.get(name)
    if matcher is None:
        return _unknown(read)
    if count_of(node, read.view) > 1:
        return Miss(f"both operands of {name}", is_matmul=True)
    match = matcher(read, bound(node))
    if isinstance(match, Match) and match.is_left and is_parameter(match.x):
        return Miss(f"left operand of {name} of two parameters", is_matmul=True)
    return match


def one_row(read: WeightRead) -> Match | None:
    """``W[i]`` of a matrix as a look-up, for what else is looked up in; None for other calls."""
    node = read.node
    if op_name(node) != "aten.select" or read.is_turned or value_of(read.view).dim() != 2:
        return None
    args = bound(node)
    if args["dim"] != 0 or not isinstance(args["index"], int):
        return None
    row = range(value_of(read.view).shape[0])[args["index"]]
    return Match("embedding", is_transposed=False, x=node, row=row)


def count_of(node: fx.Node, operand: fx.Node) -> int:
    """How many times a call takes an operand, lists of operands looked into."""
    flat = pytree.tree_leaves((node.args, node.kwargs))
    return sum(leaf is operand for leaf in flat)


def bound(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, in the order of its schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False))
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    known = {**defaults, **given, **node.kwargs}
    return {argument.name: known[argument.name] for argument in arguments if argument.name in known}


def _unknown(read: WeightRead) -> Miss:
    """A call without a matcher; there may be a matmul behind it, past slices and casts."""
    name = op_name(read.node)
    if name in MATMULS or not is_move(read.node) or value_of(read.view).dim() < 2:
        return Miss(f"read by {name}", is_matmul=name in MATMULS)
    seen, stack = {read.node}, [read.node]
    while stack:
        node = stack.pop()
        for user in node.users:
            if _is_weight_of(user, node):
                return Miss(_behind(read, user), is_matmul=True)
            if is_move(user) and user not in seen:
                seen.add(user)
                stack.append(user)
    return Miss(f"read by {name}")


def _behind(read: WeightRead, matmul: fx.Node) -> str:
    before, after = value_of(read.view).dtype, read.node.meta.get("val")
    if isinstance(after, Tensor) and after.dtype != before:
        return f"cast to {str(after.dtype)[6:]} before {op_name(matmul)}"
    return f"read by {op_name(matmul)} through {op_name(read.node)}"


def _is_weight_of(node: fx.Node, operand: fx.Node) -> bool:
    """True if a call multiplies by an operand, as far as its name and position tell."""
    name = op_name(node)
    if name not in MATMULS:
        return False
    args = bound(node)
    if name == "aten.linear":
        return args["weight"] is operand
    return not (name in ("aten.addmm", "aten.baddbmm") and args["self"] is operand)


def _linear(read: WeightRead, args: dict[str, Any]) -> Match | Miss:
    if args["weight"] is not read.view:
        role = "input" if args["input"] is read.view else "bias"
        return Miss(f"the {role} of aten.linear")
    dims = value_of(read.view).dim()
    if dims != 2:
        return Miss(f"weight of aten.linear with {dims} dimensions", is_matmul=True)
    return Match("linear", read.is_turned, args["input"], bias=args["bias"])


def _product(read: WeightRead, left: fx.Node, right: fx.Node) -> Match | Miss:
    """``left @ right``, one of which is the weight."""
    is_left = left is read.view
    x = right if is_left else left
    weight, size = value_of(read.view), value_of(x).shape
    # As an operand on the right the weight is (in, out), on the left (out, in).
    is_transposed = read.is_turned if is_left else not read.is_turned
    if is_left and len(size) == 1:
        is_left = False  # w @ x of a vector: linear(x, w)
    if weight.dim() == 2:
        return Match("linear", is_transposed, x, is_left=is_left)
    if weight.dim() == 3 and len(size) == 3 and size[0] == weight.shape[0]:
        return Match("grouped_linear", is_transposed, x, is_left=is_left, is_batched=True)
    shapes = f"{tuple(value_of(left).shape)} by {tuple(value_of(right).shape)}"
    return Miss(f"{op_name(read.node)} of {shapes} is neither linear nor grouped", is_matmul=True)


def _mm(read: WeightRead, args: dict[str, Any]) -> Match | Miss:
    return _product(read, args["self"], args["mat2"])


def _matmul(read: WeightRead, args: dict[str, Any]) -> Match | Miss:
    return _product(read, args["self"], args["other"])


def _addmm(read: WeightRead, args: dict[str, Any]) -> Match | Miss:
    """``addend + left @ right`` for addmm and baddbmm."""
    name, addend = op_name(read.node), args["self"]
    operands = ("mat1", "mat2") if "mat1" in args else ("batch1", "batch2")
    if addend is read.view:
        return Miss(f"added by {name}")
    if (args["alpha"], args["beta"]) != (1, 1):
        return Miss(f"{name} with alpha {args['alpha']} and beta {args['beta']}", is_matmul=True)
    product = _product(read, *(args[operand] for operand in operands))
    if isinstance(product, Miss):
        return product
    out = value_of(read.node).shape[-1:]
    is_bias = value_of(addend).shape == out and not product.is_left and product.kind == "linear"
    return replace(product, bias=addend) if is_bias else replace(product, addend=addend)


def _grouped(read: WeightRead, args: dict[str, Any]) -> Match | Miss:
    name = op_name(read.node)
    names = ("self", "mat2") if "mat2" in args else ("input", "weight")
    x, weight = (args[operand] for operand in names)
    if weight is not read.view:
        return Miss(f"an operand of {name} other than its weight")
    if value_of(weight).dim() != 3 or value_of(x).dim() != 2 or args["offs"] is None:
        return Miss(f"{name} of other than (tokens, in) by (experts, in, out)", is_matmul=True)
    if args.get("bias") is not None or args.get("out_dtype") is not None:
        return Miss(f"{name} with a bias or an output dtype", is_matmul=True)
    return Match("grouped_linear", not read.is_turned, x, offsets=args["offs"])


def _embedding(read: WeightRead, args: dict[str, Any]) -> Match | Miss:
    if read.is_turned or value_of(read.view).dim() != 2:
        return Miss("look-up in something else than the rows of a matrix")
    return Match("embedding", is_transposed=False, x=args["indices"])


def _einsum(read: WeightRead, args: dict[str, Any]) -> Match | Miss:
    """``...i,oi->...o`` and ``...i,io->...o``, in any letters, the operands in either order."""
    equation, operands = args["equation"].replace(" ", ""), list(args["tensors"])
    miss = Miss(f"einsum '{equation}' is not a linear map of the last dimension", is_matmul=True)
    inputs, arrow, out = equation.partition("->")
    names = inputs.split(",")
    if not arrow or len(names) != 2 or value_of(read.view).dim() != 2:
        return miss
    at = operands.index(read.view)
    weight, other = names[at], names[1 - at]
    if len(set(weight)) != 2 or not other or other[-1] not in weight:
        return miss
    shared = other[-1]
    free = weight.replace(shared, "")
    if free in other or other.count(shared) > 1 or out != other[:-1] + free:
        return miss
    is_transposed = (weight[0] == shared) ^ read.is_turned
    return Match("linear", is_transposed, operands[1 - at])


_CONVOLUTIONS = (
    *("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten._convolution"),
    *("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"),
)
_MATCHERS: dict[str, _Matcher] = {
    "aten.linear": _linear,
    "aten.addmm": _addmm,
    "aten.baddbmm": _addmm,
    "aten.mm": _mm,
    "aten.bmm": _mm,
    "aten.matmul": _matmul,
    "aten.einsum": _einsum,
    "aten._grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "aten.embedding": _embedding,
}
# Calls that multiply by a weight without being one of the above: reported, and an error if strict.
MATMULS = {name for name in _MATCHERS if name != "aten.embedding"} | {
    *("aten.mv", "aten.addmv", "aten.dot", "aten.inner", "aten.tensordot", "aten.linalg_multi_dot"),
    *("aten.chain_matmul", "aten.bilinear", "aten.addbmm", "aten._scaled_mm", "aten.kron"),
    *("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu", "aten.lstm_cell", "aten.gru_cell"),
    *("aten._native_multi_head_attention", "aten._transformer_encoder_layer_fwd"),
}
