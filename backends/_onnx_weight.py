"""One packed weight as ONNX initializers and nodes: the matmul and the embedding.

before:  kbit::linear(x, W)                                      kbit::embedding(ids, W)
after:   sum over t of MatMulNBits(x, digits[t], scales) * 2**n   codebook[codes of the rows] * scales
         + blocksum(x) @ zeros.T        (+zp)
         + x[outliers] @ values.T       (+out; x is 0 there for the matmul)

The one thing to know: scales must be constants for ONNX Runtime's 8-bit activations, or it silently
answers zeros; so they are plain float32 there. With 32-bit activations, and wherever the digits are
computed too (compact storage), the file holds them as the artifact does and a chain that ONNX Runtime
folds at load makes them float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from kbitc import packing
from kbitc.backends._onnx_blocks import Blocks, make_blocks
from kbitc.backends._onnx_container import Container, choose_container
from kbitc.backends._onnx_emit import MICROSOFT, Emitter
from kbitc.blockwise import Packed, effective_scales
from kbitc.spec import SCALE_GROUP

TILE = 2**22  # codes that are repacked at a time
INT8 = 4  # accuracy levels of MatMulNBits
FP32 = 1


@dataclass(frozen=True)
class Options:
    """What the user chooses.

    Attributes:
        storage: "direct" stores what the matmul reads; "compact" k bits, widened at load.
        activations: "fp32", "int8" (rounded for each block), or "split" (int8 twice: value and rest).
    """

    storage: str = "direct"
    activations: str = "fp32"

    @property
    def is_compact(self) -> bool:
        """True for "compact"."""
        return self.storage == "compact"

    @property
    def has_chained_scales(self) -> bool:
        """True if scales may be computed at load."""
        return self.is_compact or self.activations == "fp32"


class LoweredWeight:
    """A 2-D packed weight in a graph; initializers appear when something first reads them.

    Attributes:
        name: prefix of its initializers.
        packed: the weight.
        container: of its matmul.
        blocks: geometry of its matmul.
    """

    def __init__(self, emitter: Emitter, name: str, packed: Packed, options: Options) -> None:
        self.emitter, self.name, self.packed, self.options = emitter, name, packed, options

    @cached_property
    def container(self) -> Container:
        """See the class."""
        return choose_container(self.packed, self.options.activations)

    @cached_property
    def blocks(self) -> Blocks:
        """See the class."""
        smallest = 32 if 2 in self.container.widths else 16
        return make_blocks(self.packed.in_features, self.packed.spec.block, smallest)

    @property
    def rows(self) -> int:
        """Output features."""
        return self.packed.planes.shape[0]

    @property
    def container_bytes(self) -> int:
        """Bytes of the matmul's digits and float32 scales in memory."""
        widths, blocks = self.container.widths, self.blocks
        each = blocks.stored * sum(widths) // 8 + 4 * blocks.groups
        return self.rows * each

    # The matmul.

    def linear(self, x: ir.Value, rank: int, bias: ir.Value | None) -> ir.Value:
        """``x @ W.T + bias`` for x of a rank, in float32."""
        e, packed = self.emitter, self.packed
        parts = []
        if packed.outlier_values is not None and packed.outlier_index is not None:
            columns = packed.outlier_index.long()
            picked = e.op("Gather", x, e.constant(columns), axis=-1)
            parts.append(e.op("MatMul", picked, e.op("Transpose", self._outliers, perm=[1, 0])))
            mask = torch.ones(packed.in_features).index_fill(0, columns, 0.0)
            x = e.op("Mul", x, e.constant(mask, np.float32))
        if packed.zeros is not None:
            parts.append(self._zero_part(x, rank))
        parts = [self._product(x, rank), *parts]
        return e.total(parts if bias is None else [*parts, bias])

    def _product(self, x: ir.Value, rank: int) -> ir.Value:
        """What the digits give: terms from the highest on, each sum times the next digit's size."""
        e, blocks, widths = self.emitter, self.blocks, self.container.widths
        width = blocks.width
        if self.options.has_chained_scales:
            # On x and not on the scales: queries, keys and values share it, and nothing is copied at load.
            x = e.scale(x, 1 / self.container.grid)
        if blocks.is_padded:
            whole = e.pad(x, rank, blocks.count * blocks.block - blocks.in_features)
            apart = e.fold(whole, rank - 1, [blocks.count, blocks.block])
            x = e.fold(e.pad(apart, rank + 1, blocks.padded - blocks.block), rank - 1, [width])
        if self.options.activations == "split":
            x, width = self._split(x, rank), blocks.stored
        level = FP32 if self.options.activations == "fp32" else INT8
        total: ir.Value | None = None
        for term, bits in enumerate(widths):
            product = e.op(
                "MatMulNBits",
                x,
                self.digits(term),
                self.scales,
                self.zero_points(term),
                domain=MICROSOFT,
                K=width,
                N=self.rows,
                bits=bits,
                block_size=blocks.group,
                accuracy_level=level,
            )
            total = product if total is None else e.op("Add", e.scale(total, 1 << bits), product)
        assert total is not None
        if self.options.activations == "split":
            total = e.op("ReduceSum", total, e.constant([0]), keepdims=0)
        return total

    def _split(self, x: ir.Value, rank: int) -> ir.Value:
        """``(2, ..., stored)``: x rounded to 8 bits for each group, and what that leaves."""
        e, blocks = self.emitter, self.blocks
        apart = e.fold(
            e.pad(x, rank, blocks.stored - blocks.width), rank - 1, [blocks.groups, blocks.group]
        )
        largest = e.op("ReduceMax", e.op("Abs", apart), e.constant([-1]), keepdims=1)
        step = e.op("Max", e.scale(largest, 1 / 127), e.constant(1e-30, np.float32))
        rounded = e.op("Mul", e.op("Round", e.op("Div", apart, step)), step)
        both = [
            e.op("Unsqueeze", part, e.constant([0])) for part in (rounded, e.op("Sub", apart, rounded))
        ]
        return e.fold(e.op("Concat", *both, axis=0), rank, [blocks.stored])

    def _zero_part(self, x: ir.Value, rank: int) -> ir.Value:
        """What blocks are centred on: the sum of x over each block, times its middle."""
        e, packed = self.emitter, self.packed
        block = min(packed.spec.block, packed.in_features)
        count = packed.scales.shape[1]
        whole = e.pad(x, rank, count * block - packed.in_features)
        apart = e.fold(whole, rank - 1, [count, block])
        sums = e.op("ReduceSum", apart, e.constant([-1]), keepdims=0)
        return e.op("MatMul", sums, e.op("Transpose", self._offsets, perm=[1, 0]))

    @cached_property
    def _offsets(self) -> ir.Value:
        """``(rows, count)`` float32: zero points, and the half step that the levels lack."""

        def make() -> Tensor:
            assert self.packed.zeros is not None
            half = self.container.shift / self.container.grid
            return self.packed.zeros.float() + half * self._all_scales()

        return self._initializer("offsets", ir.DataType.FLOAT, tuple(self.packed.scales.shape), make)

    @cached_property
    def _outliers(self) -> ir.Value:
        assert self.packed.outlier_values is not None
        return self._floats("outlier_values", self.packed.outlier_values)

    # What the matmul reads.

    def digits(self, term: int) -> ir.Value:
        """``(rows, groups, bytes)`` uint8, packed low bits first."""
        width, blocks = self.container.widths[term], self.blocks
        shape = (self.rows, blocks.groups, blocks.group * width // 8)
        if self.options.is_compact:
            return self._widened(term, shape)

        def make() -> Tensor:
            table = torch.from_numpy(self.container.digits(term))
            return self._from_codes(lambda codes: _pack(table[codes.int()], width)).view(shape)

        return self._initializer(f"digits{term}", ir.DataType.UINT8, shape, make)

    def _widened(self, term: int, shape: tuple[int, ...]) -> ir.Value:
        e = self.emitter
        codes = self._codes
        table = e.constant(self.container.digits(term), np.uint8)
        digits = e.op("Gather", table, e.op("Cast", codes, to=ir.DataType.INT32), axis=0)
        packed = e.pack(digits, self.rows, self.blocks.stored, self.container.widths[term])
        return e.op("Reshape", packed, e.constant(shape))

    @cached_property
    def _codes(self) -> ir.Value:
        """``(rows, stored)`` uint8 from the planes of the file, folded at load."""
        return self._join(self._planes(self.blocks.stored), 1, self.blocks.stored)

    @property
    def scales(self) -> ir.Value:
        """``(rows, groups)`` float32, of every term; over the grid, unless they are chained."""
        if self.options.has_chained_scales:
            return self._chained_groups
        return self._initializer(
            "scales_over_grid",
            ir.DataType.FLOAT,
            (self.rows, self.blocks.groups),
            lambda: self.blocks.repeat(self._all_scales()) / self.container.grid,
        )

    @cached_property
    def _chained_groups(self) -> ir.Value:
        """The stored scales as ``(rows, groups)`` float32."""
        e, blocks = self.emitter, self.blocks
        if blocks.repeats == 1:
            return self._chained_scales
        count = self.packed.scales.shape[1]
        apart = e.op("Unsqueeze", self._chained_scales, e.constant([2]))
        wide = e.op("Expand", apart, e.constant([self.rows, count, blocks.repeats]))
        flat = e.op("Reshape", wide, e.constant([self.rows, count * blocks.repeats]))
        return e.cut(flat, 0, blocks.groups)

    @cached_property
    def _chained_scales(self) -> ir.Value:
        """The stored scales as ``(rows, count)`` float32."""
        e, packed = self.emitter, self.packed
        if packed.scale_codebook is None:
            return self._floats("scales", packed.scales)
        assert packed.scale_absmax is not None
        assert packed.scale_mean is not None
        total, groups = packed.scales.numel(), packed.scale_absmax.numel()
        codes = self._initializer(
            "scales",
            ir.DataType.UINT8,
            (groups, SCALE_GROUP),
            lambda: torch.nn.functional.pad(
                packed.scales.flatten(), (0, groups * SCALE_GROUP - total)
            ).view(groups, SCALE_GROUP),
        )
        table = e.constant(packed.scale_codebook, np.float32)
        values = e.op("Gather", table, e.op("Cast", codes, to=ir.DataType.INT32), axis=0)
        largest = self._floats("scale_absmax", packed.scale_absmax.view(-1, 1))
        centred = e.op("Mul", values, largest)
        moved = e.op("Add", centred, e.constant(packed.scale_mean, np.float32))
        flat = e.cut(e.op("Reshape", moved, e.constant([-1])), 0, total, axis=0)
        return e.op("Reshape", flat, e.constant(packed.scales.shape))

    def zero_points(self, term: int) -> ir.Value | None:
        """Zero points of a term, where they are not ONNX Runtime's default."""
        width = self.container.widths[term]
        if self.container.zero(term) == 1 << (width - 1):
            return None
        assert self.container.zero(term) == 0
        shape = (self.rows, -(-self.blocks.groups * width // 8))
        name = f"kbit.zeros.{shape[0]}x{shape[1]}"
        return self.emitter.lazy(
            name, ir.DataType.UINT8, shape, lambda: torch.zeros(shape, dtype=torch.uint8)
        )

    # The embedding.

    def embedding(self, ids: ir.Value, rank: int, *, is_shared: bool) -> ir.Value:
        """Rows ``ids`` of W, float32, for ids of a rank.

        Args:
            is_shared: a matmul reads this weight too, so its digits are read instead of codes.
        """
        e, packed = self.emitter, self.packed
        if is_shared and not self.options.is_compact:
            rows = self._digit_rows(ids, rank)
        else:
            rows = self._code_rows(ids, rank, self.blocks.stored if is_shared else packed.in_features)
        if packed.outlier_values is not None and packed.outlier_index is not None:
            both = e.op("Concat", rows, e.op("Gather", self._outliers, ids, axis=0), axis=-1)
            places = torch.arange(packed.in_features)
            count = packed.outlier_index.numel()
            places[packed.outlier_index.long()] = packed.in_features + torch.arange(count)
            rows = e.op("Gather", both, e.constant(places), axis=-1)
        return rows

    def _code_rows(self, ids: ir.Value, rank: int, stored: int) -> ir.Value:
        e, packed = self.emitter, self.packed
        planes = [(width, e.op("Gather", plane, ids, axis=0)) for width, plane in self._planes(stored)]
        codes = self._compact_row(self._join(planes, rank, stored), rank, stored)
        table = e.constant(packed.codebook, np.float32)
        levels = e.op("Gather", table, e.op("Cast", codes, to=ir.DataType.INT32), axis=0)
        rows = e.op("Mul", levels, self._spread(e.op("Gather", self._chained_scales, ids, axis=0)))
        if packed.zeros is not None:
            zeros = e.op("Gather", self._floats("zeros", packed.zeros), ids, axis=0)
            rows = e.op("Add", rows, self._spread(zeros))
        return rows

    def _digit_rows(self, ids: ir.Value, rank: int) -> ir.Value:
        e, blocks, container = self.emitter, self.blocks, self.container
        total: ir.Value | None = None
        for term, width in enumerate(container.widths):
            data = e.op("Gather", self.digits(term), ids, axis=0)
            digits = e.unpack(data, rank + 1, blocks.group * width // 8, width)
            centred = e.op(
                "Sub",
                e.op("Cast", digits, to=ir.DataType.FLOAT),
                e.constant(container.zero(term), np.float32),
            )
            total = centred if total is None else e.op("Add", e.scale(total, 1 << width), centred)
        assert total is not None
        scales = e.op("Unsqueeze", e.op("Gather", self.scales, ids, axis=0), e.constant([-1]))
        if self.options.has_chained_scales:
            scales = e.scale(scales, 1 / container.grid)
        rows = e.fold(e.op("Mul", total, scales), rank, [blocks.stored])
        rows = self._compact_row(rows, rank, blocks.stored)
        if self.packed.zeros is not None:
            rows = e.op("Add", rows, self._spread(e.op("Gather", self._offsets, ids, axis=0)))
        return rows

    def _compact_row(self, rows: ir.Value, rank: int, stored: int) -> ir.Value:
        """``(..., stored)`` without the container's padding."""
        e, features = self.emitter, self.packed.in_features
        if stored == features:
            return rows
        if self.blocks.is_padded:
            rows = e.cut(rows, 0, self.blocks.width)
            apart = e.fold(rows, rank, [self.blocks.count, self.blocks.padded])
            rows = e.fold(e.cut(apart, 0, self.blocks.block), rank, [self.blocks.count * self.blocks.block])
        return e.cut(rows, 0, features)

    def _spread(self, values: ir.Value) -> ir.Value:
        """One number a block, ``(..., count)``, to one a weight, ``(..., in_features)``."""
        e, features = self.emitter, self.packed.in_features
        block = min(self.packed.spec.block, features)
        index = np.arange(features) // block
        return e.op("Gather", values, e.constant(index), axis=-1)

    # Stored tensors.

    def _planes(self, stored: int) -> list[tuple[int, ir.Value]]:
        """Bit planes of the codes, lowest bits first, rows of ``stored`` codes: width, bytes."""
        planes, shift = [], 0
        for width in packing.PLANES[self.packed.spec.bits]:
            shape = (self.rows, -(-stored * width // 8))

            def make(shift: int = shift, width: int = width) -> Tensor:
                return self._from_codes(
                    lambda codes: _pack((codes >> shift) & ((1 << width) - 1), width), stored
                )

            planes.append((width, self._initializer(f"plane{shift}", ir.DataType.UINT8, shape, make)))
            shift += width
        return planes

    def _join(self, planes: list[tuple[int, ir.Value]], lead: int, stored: int) -> ir.Value:
        """Codes ``(*lead, stored)`` from their planes."""
        e, shift = self.emitter, 0
        codes: ir.Value | None = None
        for width, plane in planes:
            count = -(-stored * width // 8)
            part = e.unpack(plane, lead, count, width)
            if count * 8 // width != stored:
                part = e.cut(part, 0, stored)
            if codes is None:
                codes = part
            else:
                moved = e.op("BitShift", part, e.constant(shift, np.uint8), direction="LEFT")
                codes = e.op("BitwiseOr", codes, moved)
            shift += width
        assert codes is not None
        return codes

    def _from_codes(self, convert: Callable[[Tensor], Tensor], stored: int | None = None) -> Tensor:
        """Codes in tiles of rows, padded as the container wants them, converted."""
        packed, parts = self.packed, []
        is_plain = stored == packed.in_features
        per_tile = max(1, TILE // packed.in_features)
        for start in range(0, self.rows, per_tile):
            codes = packing.unpack(
                packed.planes[start : start + per_tile], packed.in_features, packed.spec.bits
            )
            parts.append(convert(codes if is_plain else self.blocks.spread(codes, 0)))
        return torch.cat(parts)

    def _all_scales(self) -> Tensor:
        packed = self.packed
        return effective_scales(
            packed.scales, packed.scale_codebook, packed.scale_absmax, packed.scale_mean
        )

    def _floats(self, field: str, values: Tensor) -> ir.Value:
        """A stored float tensor as float32; half precision stays so in the file."""
        if values.dtype != torch.float16:
            return self._initializer(field, ir.DataType.FLOAT, tuple(values.shape), values.float)
        half = self._initializer(field, ir.DataType.FLOAT16, tuple(values.shape), lambda: values)
        return self.emitter.op("Cast", half, to=ir.DataType.FLOAT)

    def _initializer(
        self, field: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> ir.Value:
        return self.emitter.lazy(f"{self.name}.{field}", dtype, shape, make)


def _pack(codes: Tensor, width: int) -> Tensor:
    """``(rows, n)`` uint8 numbers to ``(rows, ceil(n * width / 8))`` bytes, low bits first."""
    per_byte = 8 // width
    apart = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    phases = torch.arange(0, 8, width, dtype=torch.uint8)
    return (apart << phases).sum(-1, dtype=torch.uint8)


def expert_of(packed: Packed, expert: int) -> Packed:
    """One expert of a 3-D weight as a 2-D one."""
    scales = effective_scales(
        packed.scales.flatten(0, 1), packed.scale_codebook, packed.scale_absmax, packed.scale_mean
    ).view(packed.scales.shape)
    plain: dict[str, Any] = {"scale_codebook": None, "scale_absmax": None, "scale_mean": None}
    return replace(
        packed,
        planes=packed.planes[expert],
        scales=packed.scales[expert] if packed.scale_codebook is None else scales[expert],
        zeros=None if packed.zeros is None else packed.zeros[expert],
        outlier_values=None if packed.outlier_values is None else packed.outlier_values[expert],
        **plain,
    )
