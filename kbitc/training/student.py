"""The compiled model as a graph that is run on tuned weights, forward and backward, one in memory at a time.

The one thing to know: a dense weight lives as long as the one product that reads it, and its gradient as long
as one tile of it: what a backward pass leaves are the sums that `kbitc.training.tunable` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kbitc.formats.packed import Packed
from kbitc.graph.context import ReadTensor
from kbitc.graph.program import Program
from kbitc.sensitivity.streaming import (
    Kept,
    Parts,
    Streamed,
    WeightCall,
    apply,
    each_expert,
    expert_slices,
    in_parts,
    product,
    product_back,
)
from kbitc.training.tunable import BlockSums


@dataclass
class Sink:
    """What backward passes leave.

    Attributes:
        sums: of packed weights, by name.
        whole: gradients of tensors that are not packed, by name.
        make: of a weight by name, what is summed.
    """

    make: Callable[[str, Packed], BlockSums] = lambda _, packed: BlockSums(packed)
    sums: dict[str, BlockSums] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str, packed: Packed) -> BlockSums:
        """The sums of one weight."""
        if name not in self.sums:
            self.sums[name] = self.make(name, packed)
        return self.sums[name]


class Student(Streamed):
    """Runs a model's graph on packed weights.

    Args:
        program: canonical, captured in float32 at the shapes that it will run on.
        read: any other tensor of the artifact, by name.
        packed: packed weights by name.
        plain: tensors by name, in place of those that ``read`` gives, whose gradients are wanted.
        sink: where gradients go.
    """

    def __init__(
        self,
        program: Program,
        read: ReadTensor,
        packed: Mapping[str, Packed],
        plain: Mapping[str, Tensor],
        sink: Sink,
    ) -> None:
        super().__init__(program, read)
        self.packed = packed
        self.sink = sink
        # Every use has a gradient, also one of an input that has none.
        self.anchor = torch.zeros((), requires_grad=True)
        self.plain = {name: tensor.detach().float().requires_grad_() for name, tensor in plain.items()}

    def load(self, name: str) -> Tensor:
        """A tensor that is not packed, floats in float32."""
        return self.plain[name] if name in self.plain else super().load(name)

    def use(self, call: WeightCall, x: Tensor, rest: Sequence[Any]) -> Tensor:
        """The same as of the checkpoint's weight, of the packed one."""
        if call.name not in self.packed:
            return super().use(call, x, rest)
        packed = self.packed[call.name]
        weight = _Used(packed, self.sink.of(call.name, packed), call.is_turned)
        if call.kind == "embedding":
            return apply(_Embedding, x, self.anchor, weight)
        kept = self.keeper.keep_input(x)
        function = _Linear if call.kind == "linear" else _GroupedLinear
        return apply(function, x, self.anchor, weight, kept, *rest)

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients of a loss in the sink."""
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        for name, tensor in self.plain.items():
            if tensor.grad is not None:
                self.sink.whole[name] = tensor.grad


@dataclass(frozen=True)
class _Used:
    """One use of a packed weight."""

    packed: Packed
    sums: BlockSums
    is_turned: bool

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """``(*lead, out, in)`` as the use multiplies with it."""
        dense: Tensor = torch.ops.kbit.dequantize(*self.packed.operands(), dtype)
        return dense.mT if self.is_turned else dense

    def parts(self, dtype: torch.dtype) -> Parts:
        """The same matrix ``(out, in)``, some rows at a time."""
        parts = list(in_parts(self.rows, self.packed.in_features))
        if self.is_turned or len(parts) == 1:
            yield slice(0, self.rows), self.matrix(dtype)
            return
        for part in parts:
            ids = torch.arange(part.start, part.stop)
            yield part, torch.ops.kbit.embedding(ids, *self.packed.operands(), dtype)

    @property
    def rows(self) -> int:
        """Features of the output."""
        return self.packed.in_features if self.is_turned else self.packed.planes.shape[-2]

    def note(self, grad: Tensor, x: Tensor, expert: int = 0) -> None:
        """Add the gradient ``grad.T @ x``; grad ``(tokens, out)``, x ``(tokens, in)``."""
        left, right = (x, grad) if self.is_turned else (grad, x)
        self.sums.add_product(left.float(), right.float(), expert * left.shape[1])


class _Linear(torch.autograd.Function):
    """``F.linear`` on a packed weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, weight: _Used, kept: Kept, bias: Tensor | None = None
    ) -> Tensor:
        del anchor
        ctx.weight, ctx.kept, ctx.has_bias = weight, kept, bias is not None
        return product(x, weight.parts(x.dtype), weight.rows, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.reshape(-1, grad.shape[-1])
        ctx.weight.note(rows, ctx.kept.back().reshape(len(rows), -1))
        bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
        back = product_back(grad, ctx.weight.parts(grad.dtype)) if ctx.needs_input_grad[0] else None
        return (back, None, None, None, bias)[: len(ctx.needs_input_grad)]


class _GroupedLinear(torch.autograd.Function):
    """Rows of x, sorted by expert, times their expert's weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, weight: _Used, kept: Kept, offsets: Tensor) -> Tensor:
        del anchor
        ctx.weight, ctx.kept, ctx.offsets = weight, kept, offsets
        return each_expert(x, weight.matrix(x.dtype), offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.kept.back()
        for expert, tokens in expert_slices(ctx.offsets):
            if tokens.stop > tokens.start:
                ctx.weight.note(grad[tokens], x[tokens], expert)
        back = None
        if ctx.needs_input_grad[0]:
            back = each_expert(grad, ctx.weight.matrix(grad.dtype).mT, ctx.offsets)
        return back, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a packed weight."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, weight: _Used) -> Tensor:
        del anchor
        ctx.weight, ctx.ids = weight, ids
        out: Tensor = torch.ops.kbit.embedding(ids, *weight.packed.operands(), torch.float32)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.weight.sums.add_rows(ctx.ids.flatten(), grad.reshape(ctx.ids.numel(), -1).float())
        return None, None, None
