"""Run a canonical program's graph on real data, forward and backward, one weight in memory at a time.

The one thing to know: a weight is read when a node needs it and dropped after that node; the backward
pass reads it again. Memory is that of the activations, not of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kbitc.checkpoint.finite import check_finite
from kbitc.graph.context import ReadTensor
from kbitc.graph.program import CANONICAL, Program, as_matrix

Seen = Callable[[str, str, Any, Tensor], None]
"""Called for each use of a weight: ``(weight's name, kind, input, output)``; the input of a grouped linear
is ``(x, offsets)``."""

PART = 2**22
"""Weights of a matrix that are dense at one time, 16 MB."""

LARGE = 2**14
"""Values from which on a tensor that waits for its gradient's turn is kept at half of its size."""

TURNED = "turned "
"""Before the kind of a use that multiplies along the weight's rows, as a decoder tied to an encoder does: its
input meets the rows, and its output has the features."""


def writes(node: fx.Node) -> bool:
    """Whether a node writes into what it is given."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


@dataclass(frozen=True)
class _Stored:
    """A tensor of the checkpoint, not read yet."""

    name: str


class Kept(NamedTuple):
    """A tensor that waits for its gradient's turn, and the dtype that it had."""

    tensor: Tensor
    dtype: torch.dtype

    def back(self) -> Tensor:
        """As it was, but for what 16 bits lose."""
        return self.tensor.to(self.dtype)


class Keeper:
    """Keeps what a backward pass needs of the way there, large float32 tensors as bfloat16.

    That changes a gradient less than other windows of text would.

    Args:
        is_writing: whether the graph may write into what is kept later.
    """

    def __init__(self, *, is_writing: bool = False) -> None:
        self.is_writing = is_writing
        # Not the input itself: its gradient's graph may lead to this, a circle that no collector sees.
        self.last: tuple[weakref.ref[Tensor], Kept] | None = None

    def keep(self, tensor: Tensor) -> Kept:
        """One tensor."""
        if tensor.dtype == torch.float32 and tensor.numel() >= LARGE:
            return Kept(tensor.bfloat16(), torch.float32)
        return Kept(tensor.clone() if self.is_writing else tensor, tensor.dtype)

    def keep_input(self, x: Tensor) -> Kept:
        """A linear's input; once, where several linears in a row have the same."""
        if self.last is None or self.last[0]() is not x or self.is_writing:
            self.last = weakref.ref(x), self.keep(x.detach())
        return self.last[1]

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Under which autograd keeps its tensors so."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, Kept.back)


@dataclass(frozen=True)
class WeightCall:
    """One use of a weight in a canonical graph.

    Attributes:
        kind: "linear", "embedding" or "grouped_linear".
        name: of the weight.
        matrix: what its shape is a view of, see `kbitc.graph.program.as_matrix`.
        is_transposed: whether that matrix is ``(..., in, rows)``.
        is_turned: it multiplies along the weight's rows, see `TURNED`.
    """

    kind: str
    name: str
    matrix: tuple[int, ...] | None = None
    is_transposed: bool = False
    is_turned: bool = False


class Streamed(fx.Interpreter):
    """Executes a graph whose parameters lie in a checkpoint.

    Args:
        program: canonical, captured in float32 at the shapes that it will run on.
        read: a tensor by name.
        seen: called for each use of a weight, before later nodes run.
    """

    def __init__(self, program: Program, read: ReadTensor, seen: Seen = lambda *_: None) -> None:
        super().__init__(program.graph, garbage_collect_values=True)
        self.parameters = program.parameters
        self.weights = program.weights
        self.source = finite(program, read)
        self.seen = seen
        # Of a graph that writes in place, what a use read may be another when its gradient comes.
        self.is_writing = any(writes(node) for node in program.graph.graph.nodes)
        self.keeper = Keeper(is_writing=self.is_writing)
        self.given: Mapping[str, Any] = {}

    def call(self, **inputs: Any) -> list[Any]:
        """The graph's outputs for inputs by the names of forward's parameters, flat."""
        self.given = inputs
        with self.keeper.hooks():
            outputs = self.run(enable_io_processing=False)
        # The gradient's graph refers to this, and would refer to itself through its outputs here.
        self.env = {}
        return list(torch.utils._pytree.tree_leaves(outputs))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A stored tensor's name, or an input."""
        del args, kwargs
        return _Stored(self.parameters[target]) if target in self.parameters else self.given[target]

    def load(self, name: str) -> Tensor:
        """A stored tensor, floats in float32.

        Raises:
            UsageError: a parameter that is not finite.
        """
        tensor = self.source(name)
        return tensor.float() if tensor.is_floating_point() else tensor

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One node, its stored operands read now."""
        kind = CANONICAL.get(target)
        if kind is None or not isinstance(args[1], _Stored) or args[1].name not in self.weights:
            args, kwargs = torch.utils._pytree.tree_map_only(
                _Stored, lambda stored: self.load(stored.name), (args, kwargs)
            )
            return super().call_function(target, args, kwargs)
        name = args[1].name
        x, *rest = [self.load(a.name) if isinstance(a, _Stored) else a for a in (args[0], *args[2:])]
        is_transposed = bool(kwargs.get("is_transposed", False))
        is_turned = is_transposed != self.weights[name].is_transposed
        y = self.use(WeightCall(kind, name, kwargs.get("matrix"), is_transposed, is_turned), x, rest)
        if kind == "grouped_linear":
            x = (x, *rest)
        if self.is_writing and kind != "embedding":
            x = (x[0].clone(), *x[1:]) if isinstance(x, tuple) else x.clone()
        if torch.is_grad_enabled() and not y.requires_grad:
            # Nothing before it has a gradient. A copy, as no model may write into a leaf of the gradient.
            y = y.requires_grad_().clone()
        self.seen(name, TURNED + kind if is_turned else kind, x, y)
        return y

    def use(self, call: WeightCall, x: Tensor, rest: Sequence[Any]) -> Tensor:
        """What one use of a weight gives; who has other weights than the checkpoint's says so here.

        Args:
            call: of which weight, and how.
            x: the input; of an embedding, the ids.
            rest: the bias, if any; of a grouped linear, the offsets.
        """

        def matrix() -> Tensor:
            return as_matrix(self.source(call.name), call.matrix, is_transposed=call.is_transposed)

        if call.kind == "embedding":
            return F.embedding(x, self.load(call.name))
        return apply(LinearOnLoad if call.kind == "linear" else _GroupedLinear, x, matrix, *rest)


def finite(program: Program, read: ReadTensor) -> ReadTensor:
    """``read``, which raises UsageError where a parameter is not finite; each is looked at once."""
    # Parameters alone: a buffer may hold minus infinity for what attention must not see.
    unchecked = {name for name, rest in program.rest.items() if rest.is_parameter} | {*program.weights}

    def checked(name: str) -> Tensor:
        tensor = read(name)
        if name in unchecked:
            check_finite(name, tensor)
            unchecked.remove(name)
        return tensor

    return checked


def apply(function: Any, *args: Any) -> Tensor:
    """``function.apply``, which torch leaves untyped."""
    out: Tensor = function.apply(*args)
    return out


def writable(y: Tensor) -> Tensor:
    """What a function of autograd may give: torch lets nobody write into a view that comes out of one."""
    # The same memory, and no view of it.
    plain: Tensor = torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
    return plain


Parts = Iterable[tuple[slice, Tensor]]
"""Rows of a matrix, some at a time, as one of a vocabulary is large."""


def in_parts(rows: int, width: int) -> Iterator[slice]:
    """Rows of a matrix that are dense at one time."""
    step = max(1, PART // width)
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def product(x: Tensor, parts: Parts, rows: int, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a matrix of so many rows."""
    out = None
    for part, matrix in parts:
        if len(matrix) == rows:
            return writable(F.linear(x, matrix, bias))
        out = x.new_empty(*x.shape[:-1], rows) if out is None else out
        out[..., part] = F.linear(x, matrix, None if bias is None else bias[part])
    assert out is not None
    return out


def product_back(grad: Tensor, parts: Parts) -> Tensor:
    """The gradient of ``x``, from that of the product."""
    total = None
    for part, matrix in parts:
        own = grad[..., part] @ matrix
        total = own if total is None else total.add_(own)
    assert total is not None
    return total


class LinearOnLoad(torch.autograd.Function):
    """``F.linear`` that keeps no weight for the backward pass: it is read again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, load: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
        """``x @ load().T + bias``."""
        ctx.load = load
        matrix = load()
        return product(x, _converted(matrix, x.dtype), len(matrix), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input alone."""
        return product_back(grad, _converted(ctx.load(), grad.dtype)), None, None


def _converted(matrix: Tensor, dtype: torch.dtype) -> Parts:
    return ((part, matrix[part].to(dtype)) for part in in_parts(*matrix.shape))


class _GroupedLinear(torch.autograd.Function):
    """Rows of x, sorted by expert, times their expert's weight; experts are few, so a plain loop."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, load: Callable[[], Tensor], offsets: Tensor) -> Tensor:
        ctx.load, ctx.offsets = load, offsets
        return each_expert(x, load(), offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return each_expert(grad, ctx.load().mT, ctx.offsets), None, None


def each_expert(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of ``x`` (tokens, in), sorted by expert, times their expert's of ``weight`` (experts, out, in)."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, tokens in expert_slices(offsets):
        out[tokens] = x[tokens] @ weight[expert].mT.to(x.dtype)
    return out


def expert_slices(offsets: Tensor) -> list[tuple[int, slice]]:
    """``(expert, its rows)`` from cumulative token counts."""
    ends = offsets.tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
