"""Values of a native step while it is put together, and how they lie in their buffers.

The one thing to know: how a value lies is kept as a meta tensor of ``TOKENS`` tokens, so that views are
torch's own arithmetic. One of its dimensions is the tokens'; the others are alike for every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kbitc.backends.cpu.native_program import Assembler, View
from kbitc.errors import UsageError

TOKENS = 10007  # a prime, so that no other dimension looks like it


class Unknown(UsageError):
    """A node that the native step has no operation for."""


@dataclass(eq=False)
class Rows:
    """Floats of each token.

    Attributes:
        lies: meta tensor: sizes, strides and offset in ``(TOKENS, width)``.
        buffer: which.
        made: what it was made by and of, for who looks for patterns.
    """

    lies: Tensor
    buffer: int
    made: tuple[Any, ...] = ()


@dataclass(eq=False)
class Cached:
    """Keys or values of each token, on their way into a slot of the cache; attention alone may read them."""

    states: Rows
    slot: int


@dataclass(eq=False)
class Index:
    """The tokens, or their positions, plus a number: int64, one of each token."""

    lies: Tensor
    is_position: bool
    shift: int = 0


@dataclass
class Placing:
    """Buffers, and views of them.

    Attributes:
        into: what gets the operations.
    """

    into: Assembler = field(default_factory=Assembler)

    def new(self, shape: Sequence[int]) -> Rows:
        """A buffer for rows of a shape, one dimension of which is the tokens'."""
        places = [i for i, size in enumerate(shape) if size == TOKENS]
        if len(places) != 1:
            raise Unknown(f"values of shape {tuple(shape)}, which are not one of each token")
        strides, width = [0] * len(shape), 1
        for i in reversed(range(len(shape))):
            if i != places[0]:
                strides[i], width = width, width * shape[i]
        strides[places[0]] = width
        base = torch.empty(TOKENS * max(width, 1), device="meta")
        return Rows(base.as_strided(tuple(shape), tuple(strides)), self.into.buffer(width))

    def view(self, value: Any, shape: Sequence[int]) -> View:
        """An operand as one of some shape, its dimension of the tokens left out."""
        token = list(shape).index(TOKENS)
        if isinstance(value, Rows):
            lies = value.lies.expand(tuple(shape))
            strides = [step for i, step in enumerate(lies.stride()) if i != token]
            return View(value.buffer, False, int(lies.storage_offset()), tuple(strides))
        constant = torch.as_tensor(value, dtype=torch.float32)
        if TOKENS in constant.shape:
            raise Unknown("a constant of each token")
        index = self.into.constant(constant)
        whole = self.into.constants[index].view(constant.shape).expand(tuple(shape))
        strides = [step for i, step in enumerate(whole.stride()) if i != token]
        return View(index, True, 0, tuple(strides))

    def copied(self, value: Rows) -> Rows:
        """The same in a buffer of its own, in the order of its shape."""
        out = self.new(value.lies.shape)
        self.copy_into(value, out)
        return out

    def copy_into(self, value: Rows, out: Rows) -> None:
        """The same into a view of a buffer."""
        shape = out.lies.shape
        self.into.unary("copy", sizes(shape), self.view(out, shape), self.view(value, shape))

    def whole(self, value: Rows, width: int) -> Rows:
        """The same, as a buffer of its own ``width`` that has nothing else."""
        lies = value.lies
        is_whole = _is_packed(_dims(lies), width) and self.into.widths[value.buffer] == width
        if is_whole and lies.storage_offset() == 0:
            return value
        if lies.numel() != TOKENS * width:
            raise Unknown(f"values of shape {tuple(lies.shape)} in the place of {width} a token")
        return self.copied(value)

    def last_packed(self, value: Rows) -> tuple[Rows, int, int, int]:
        """With the last dimension side by side: its value, rows of it a token, their distance, its size."""
        width = value.lies.shape[-1]
        rows = _dims(value.lies[..., 0])
        count = math.prod(size for size, _ in rows)
        apart = rows[-1][1] if rows else width
        if value.lies.stride(-1) != 1 or not _is_packed(rows, count, apart):
            return self.last_packed(self.copied(value))
        return value, count, apart, width

    def unary(self, kind: str, x: Rows) -> Rows:
        """kind(x), element by element."""
        out = self.new(x.lies.shape)
        self.into.unary(
            kind, sizes(out.lies.shape), self.view(out, out.lies.shape), self.view(x, out.lies.shape)
        )
        out.made = (kind, x)
        return out


def sizes(shape: Sequence[int]) -> list[int]:
    """Without the tokens."""
    return [size for size in shape if size != TOKENS]


def _dims(lies: Tensor) -> list[tuple[int, int]]:
    """Size and stride of each dimension of a token that has more than one place."""
    return [dim for dim in zip(lies.shape, lies.stride(), strict=True) if dim[0] not in (1, TOKENS)]


def _is_packed(dims: Sequence[tuple[int, int]], count: int, apart: int = 1) -> bool:
    """Whether (size, stride) pairs run through ``count`` places in order, ``apart`` from one another."""
    step = apart
    for size, stride in reversed(dims):
        if stride != step:
            return False
        step *= size
    return step == count * apart
