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

from functools import cached_property

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from kbitc.backends.onnx_export.emit import MICROSOFT
from kbitc.backends.onnx_export.initializers import WeightInitializers
from kbitc.formats import bit_planes

INT8 = 4  # accuracy levels of MatMulNBits
FP32 = 1


class OnnxWeight(WeightInitializers):
    """A 2-D packed weight in a graph; initializers appear when something first reads them."""

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
        apart = e.fold(e.pad(x, rank, blocks.stored - blocks.width), rank - 1, [blocks.groups, blocks.group])
        largest = e.op("ReduceMax", e.op("Abs", apart), e.constant([-1]), keepdims=1)
        step = e.op("Max", e.scale(largest, 1 / 127), e.constant(1e-30, np.float32))
        rounded = e.op("Mul", e.op("Round", e.op("Div", apart, step)), step)
        both = [e.op("Unsqueeze", part, e.constant([0])) for part in (rounded, e.op("Sub", apart, rounded))]
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
            return self.packed.zeros.float() + half * self.all_scales()

        return self.initializer("offsets", ir.DataType.FLOAT, tuple(self.packed.scales.shape), make)

    @cached_property
    def _outliers(self) -> ir.Value:
        assert self.packed.outlier_values is not None
        return self.floats("outlier_values", self.packed.outlier_values)

    # What the matmul reads.

    def digits(self, term: int) -> ir.Value:
        """``(rows, groups, bytes)`` uint8, packed low bits first."""
        width, blocks = self.container.widths[term], self.blocks
        shape = (self.rows, blocks.groups, blocks.group * width // 8)
        if self.options.is_compact:
            return self._widened(term, shape)

        def make() -> Tensor:
            table = torch.from_numpy(self.container.digits(term))
            return self.from_codes(lambda codes: bit_planes.pack_row_by_row(table[codes.int()], width)).view(
                shape
            )

        return self.initializer(f"digits{term}", ir.DataType.UINT8, shape, make)

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
        return self.join(self.planes(self.blocks.stored), 1, self.blocks.stored)

    @property
    def scales(self) -> ir.Value:
        """``(rows, groups)`` float32, of every term; over the grid, unless they are chained."""
        if self.options.has_chained_scales:
            return self._chained_groups
        return self.initializer(
            "scales_over_grid",
            ir.DataType.FLOAT,
            (self.rows, self.blocks.groups),
            lambda: self.blocks.repeat(self.all_scales()) / self.container.grid,
        )

    @cached_property
    def _chained_groups(self) -> ir.Value:
        """The stored scales as ``(rows, groups)`` float32."""
        e, blocks = self.emitter, self.blocks
        if blocks.repeats == 1:
            return self.chained_scales
        count = self.packed.scales.shape[1]
        apart = e.op("Unsqueeze", self.chained_scales, e.constant([2]))
        wide = e.op("Expand", apart, e.constant([self.rows, count, blocks.repeats]))
        flat = e.op("Reshape", wide, e.constant([self.rows, count * blocks.repeats]))
        return e.cut(flat, 0, blocks.groups)

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
        planes = [(width, e.op("Gather", plane, ids, axis=0)) for width, plane in self.planes(stored)]
        codes = self._compact_row(self.join(planes, rank, stored), rank, stored)
        table = e.constant(packed.codebook, np.float32)
        levels = e.op("Gather", table, e.op("Cast", codes, to=ir.DataType.INT32), axis=0)
        rows = e.op("Mul", levels, self._spread(e.op("Gather", self.chained_scales, ids, axis=0)))
        if packed.zeros is not None:
            zeros = e.op("Gather", self.floats("zeros", packed.zeros), ids, axis=0)
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
