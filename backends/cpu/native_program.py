"""A native step as kernels/cpu/bindings_step.h reads it: operations, buffers, constants, weights.

The one thing to know: a buffer has a row of floats for each token. Operations name buffers by number; where
these lie in the row of a token is decided last, from who still reads what, so that rows stay short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from kbitc.backends._decoding.lifted import place_of
from kbitc.formats.packed import Operands

DIMS = 4  # of an elementwise operation
ALIGNED = 16  # floats


class Code(IntEnum):
    """Operations, in the order of the kernels' list."""

    UNARY = 0
    BINARY = 1
    MEAN = 2
    RMS_NORM = 3
    LAYER_NORM = 4
    EMBED = 5
    EMBED_DENSE = 6
    POSITIONS = 7
    LINEAR = 8
    DENSE = 9
    ATTEND = 10
    TAIL = 11


UNARY = (
    *("copy", "neg", "square", "rsqrt", "silu", "gelu", "gelu_tanh", "tanh", "relu", "sigmoid", "cos", "sin"),
    *("exp", "sqrt"),
)
BINARY = ("add", "sub", "mul", "div")


@dataclass(frozen=True)
class View:
    """Where an operand of an elementwise operation lies.

    Attributes:
        index: of a buffer or a constant.
        is_constant: which of these.
        offset: floats from the start of a token's row, or of the constant.
        strides: of each dimension.
    """

    index: int
    is_constant: bool
    offset: int
    strides: tuple[int, ...] = ()

    def words(self) -> list[int]:
        """As the kernels read it."""
        return [int(self.is_constant), self.index, self.offset, *_padded(self.strides, 0)]


@dataclass
class Operation:
    """One operation.

    Attributes:
        code: which.
        out: the buffer that it writes, -1 for none.
        reads: buffers.
        words: what the kernels read after the code.
    """

    code: Code
    out: int
    reads: tuple[int, ...]
    words: list[int]

    @property
    def is_of_rows(self) -> bool:
        """Whether it is done token by token."""
        return self.code < Code.LINEAR


@dataclass
class Assembler:
    """What a step is put together with.

    Attributes:
        operations: in order.
        widths: floats of a token in each buffer.
        constants: float32 tensors, contiguous.
        numbers: floats that operations name by index.
        weights: packed ones.
        slots: heads and their size of each part of the key-value cache.
        sources: what each constant was made of, alive, so that no other tensor gets a known one's address.
    """

    operations: list[Operation] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    weights: list[Operands] = field(default_factory=list)
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    sources: list[Tensor] = field(default_factory=list)
    _known: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def buffer(self, width: int) -> int:
        """A new buffer."""
        self.widths.append(width)
        return len(self.widths) - 1

    def constant(self, tensor: Tensor, *, is_dense: bool = False) -> int:
        """A tensor's index among the constants.

        Args:
            tensor: of floats.
            is_dense: a matrix, which stays in its 16 bits; all else is float32.
        """
        key = (*place_of(tensor), is_dense)
        if key not in self._known:
            self._known[key] = len(self.constants)
            own = tensor.detach()
            is_kept = is_dense and own.dtype in (torch.float16, torch.bfloat16)
            self.constants.append((own if is_kept else own.float()).contiguous())
            self.sources.append(tensor)
        return self._known[key]

    def number(self, value: float) -> int:
        """A number's index."""
        self.numbers.append(float(value))
        return len(self.numbers) - 1

    def weight(self, operands: Operands) -> int:
        """A packed weight's index."""
        key = ("weight", operands.planes.data_ptr(), operands.scales.data_ptr(), operands.numbers)
        if key not in self._known:
            self._known[key] = len(self.weights)
            self.weights.append(operands)
        return self._known[key]

    def add(self, code: Code, out: int, reads: Sequence[int], *words: int) -> None:
        """An operation."""
        self.operations.append(Operation(code, out, tuple(reads), list(words)))

    def unary(self, kind: str, sizes: Sequence[int], out: View, x: View) -> None:
        """Out = kind(x), element by element."""
        self._elementwise(Code.UNARY, UNARY.index(kind), sizes, out, (x,))

    def binary(self, kind: str, sizes: Sequence[int], out: View, a: View, b: View) -> None:
        """Out = a kind b, element by element."""
        self._elementwise(Code.BINARY, BINARY.index(kind), sizes, out, (a, b))

    def _elementwise(
        self, code: Code, kind: int, sizes: Sequence[int], out: View, operands: Sequence[View]
    ) -> None:
        sizes, strides = merged(sizes, [out.strides, *(view.strides for view in operands)])
        words = [kind, out.index, out.offset, *_padded(sizes, 1), *_padded(strides[0], 0)]
        for view, own in zip(operands, strides[1:], strict=True):
            words += View(view.index, view.is_constant, view.offset, tuple(own)).words()
        reads = [view.index for view in operands if not view.is_constant]
        self.operations.append(Operation(code, out.index, tuple(reads), words))

    def finished(self, output: int, tail_from: int) -> NativeProgram:
        """The program; what nobody reads is left out.

        Args:
            output: the buffer of the logits.
            tail_from: operations from here on are done for the tokens alone whose logits are wanted.
        """
        head = [(i < tail_from, operation) for i, operation in enumerate(self.operations)]
        needed, kept = {output}, []
        for is_head, operation in reversed(head):
            if operation.code == Code.ATTEND or operation.out in needed:
                needed.update(operation.reads)
                kept.append((is_head, operation))
        kept.reverse()
        operations = [operation for is_head, operation in kept if is_head]
        tail = [operation for is_head, operation in kept if not is_head]
        written = {operation.out for operation in operations}
        live = sorted(written & ({read for operation in tail for read in operation.reads} | {output}))
        operations.append(Operation(Code.TAIL, -1, tuple(live), [len(live), *live]))
        operations += tail
        offsets, row = _placed(operations, self.widths, output)
        code = [len(self.widths), row, output]
        for offset, width in zip(offsets, self.widths, strict=True):
            code += [offset, width]
        for operation in operations:
            code += [int(operation.code), *operation.words]
        slots = tuple(self.slots[i] for i in sorted(self.slots))
        return NativeProgram(
            tuple(self.weights),
            tuple(self.constants),
            tuple(code),
            tuple(self.numbers),
            slots,
            tuple(self.sources),
        )


@dataclass(frozen=True)
class NativeProgram:
    """What ``kbit::build_step`` takes.

    Attributes:
        slots: heads and their size of each part of a key-value cache: keys, then values, layer by layer.
        sources: what each constant was made of.
    """

    weights: tuple[Operands, ...]
    constants: tuple[Tensor, ...]
    code: tuple[int, ...]
    numbers: tuple[float, ...]
    slots: tuple[tuple[int, int], ...] = ()
    sources: tuple[Tensor, ...] = ()

    def build(self) -> int:
        """The kernels' number of the step, which is good until ``kbit::free_step``."""
        tensors = [tensor for weight in self.weights for tensor in weight.tensors]
        numbers = [number for weight in self.weights for number in weight.numbers]
        build: Any = torch.ops.kbit.build_step
        made: int = build(tensors, numbers, list(self.constants), list(self.code), list(self.numbers))
        return made


def merged(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The same elements in fewer dimensions.

    Args:
        sizes: of the dimensions.
        strides: of each operand.

    Raises:
        ValueError: more than `DIMS` are left.
    """
    dims = [(size, [own[i] for own in strides]) for i, size in enumerate(sizes) if size != 1]
    out: list[tuple[int, list[int]]] = []
    for size, steps in dims:
        if out and all(outer == inner * size for outer, inner in zip(out[-1][1], steps, strict=True)):
            out[-1] = (out[-1][0] * size, steps)
        else:
            out.append((size, steps))
    if len(out) > DIMS:
        raise ValueError(f"an operation on {len(out)} dimensions")
    return [size for size, _ in out], [[steps[n] for _, steps in out] for n in range(len(strides))]


def _padded(values: Sequence[int], filler: int) -> list[int]:
    return [filler] * (DIMS - len(values)) + list(values)


def _placed(operations: Sequence[Operation], widths: Sequence[int], output: int) -> tuple[list[int], int]:
    """Where each buffer lies in a token's row, and how long that is: what nobody reads any more gives way.

    Operations between two products are done token by token, so that what one of them writes for a token may
    lie where no other of them reads or writes for a later one: they count as one.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {output: len(operations)}
    time = 0
    for before, operation in zip((None, *operations), operations, strict=False):
        if before is None or not (before.is_of_rows and operation.is_of_rows):
            time += 1
        for buffer in (operation.out, *operation.reads):
            if buffer >= 0:
                first.setdefault(buffer, time)
                last[buffer] = max(last.get(buffer, time), time)
    offsets, row = [0] * len(widths), 0
    placed: list[tuple[int, int, int]] = []  # start, end, last use
    for buffer in sorted(first, key=lambda own: first[own]):
        placed = [own for own in placed if own[2] >= first[buffer]]
        width = -(-widths[buffer] // ALIGNED) * ALIGNED
        start = 0
        for begin, end, _ in sorted(placed):
            if begin - start >= width:
                break
            start = max(start, end)
        placed.append((start, start + width, last[buffer]))
        offsets[buffer] = start
        row = max(row, start + width)
    return offsets, row
