"""What the file holds of a packed weight: bit planes of its codes, scales, zero points, outliers.

before:  planes, scales, ... of `Packed`
after:   the same as ONNX initializers, and nodes that read them as codes and float32

The one thing to know: bits are repacked, low bits first and row by row, because ONNX has no lanes.
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

from kbitc.backends.onnx_export.container import Container, choose_container
from kbitc.backends.onnx_export.emit import Emitter
from kbitc.backends.onnx_export.geometry import Geometry, make_geometry
from kbitc.formats import bit_planes
from kbitc.formats.packed import Packed
from kbitc.formats.scales import effective_scales
from kbitc.formats.spec import SCALE_GROUP

TILE = 2**22  # codes that are repacked at a time


@dataclass(frozen=True)
class ExportOptions:
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


class WeightInitializers:
    """A 2-D packed weight in a graph.

    Attributes:
        name: prefix of its initializers.
        packed: the weight.
        container: of its matmul.
        blocks: geometry of its matmul.
    """

    def __init__(self, emitter: Emitter, name: str, packed: Packed, options: ExportOptions) -> None:
        self.emitter, self.name, self.packed = emitter, name, packed
        is_int8 = packed.spec.has_int8_inputs and options.activations == "fp32"
        self.options = replace(options, activations="int8") if is_int8 else options

    @cached_property
    def container(self) -> Container:
        """See the class."""
        return choose_container(self.packed, self.options.activations)

    @cached_property
    def blocks(self) -> Geometry:
        """See the class."""
        smallest = 32 if 2 in self.container.widths else 16
        return make_geometry(self.packed.in_features, self.packed.spec.block, smallest)

    @property
    def rows(self) -> int:
        """Output features."""
        return self.packed.planes.shape[0]

    # Stored tensors.

    def planes(self, stored: int) -> list[tuple[int, ir.Value]]:
        """Bit planes of the codes, lowest bits first, rows of ``stored`` codes: width, bytes."""
        planes, shift = [], 0
        for width in bit_planes.PLANES[self.packed.spec.bits]:
            shape = (self.rows, -(-stored * width // 8))

            def make(shift: int = shift, width: int = width) -> Tensor:
                return self.from_codes(
                    lambda codes: bit_planes.pack_row_by_row((codes >> shift) & ((1 << width) - 1), width),
                    stored,
                )

            planes.append((width, self.initializer(f"plane{shift}", ir.DataType.UINT8, shape, make)))
            shift += width
        return planes

    def join(self, planes: list[tuple[int, ir.Value]], lead: int, stored: int) -> ir.Value:
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

    def from_codes(self, convert: Callable[[Tensor], Tensor], stored: int | None = None) -> Tensor:
        """Codes in tiles of rows, padded as the container wants them, converted."""
        packed, parts = self.packed, []
        is_plain = stored == packed.in_features
        per_tile = max(1, TILE // packed.in_features)
        for start in range(0, self.rows, per_tile):
            codes = bit_planes.unpack(
                packed.planes[start : start + per_tile], packed.in_features, packed.spec.bits
            )
            parts.append(convert(codes if is_plain else self.blocks.spread(codes, 0)))
        return torch.cat(parts)

    def all_scales(self) -> Tensor:
        """``(rows, count)`` float32, as they are after double quantization."""
        packed = self.packed
        return effective_scales(packed.scales, packed.scale_codebook, packed.scale_absmax, packed.scale_mean)

    def floats(self, field: str, values: Tensor) -> ir.Value:
        """A stored float tensor as float32; half precision stays so in the file."""
        if values.dtype != torch.float16:
            return self.initializer(field, ir.DataType.FLOAT, tuple(values.shape), values.float)
        half = self.initializer(field, ir.DataType.FLOAT16, tuple(values.shape), lambda: values)
        return self.emitter.op("Cast", half, to=ir.DataType.FLOAT)

    def initializer(
        self, field: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> ir.Value:
        """One tensor of this weight in the file, made when it is written."""
        return self.emitter.lazy(f"{self.name}.{field}", dtype, shape, make)

    @cached_property
    def chained_scales(self) -> ir.Value:
        """The stored scales as ``(rows, count)`` float32."""
        e, packed = self.emitter, self.packed
        if packed.scale_codebook is None:
            return self.floats("scales", packed.scales)
        assert packed.scale_absmax is not None
        assert packed.scale_mean is not None
        total, groups = packed.scales.numel(), packed.scale_absmax.numel()
        codes = self.initializer(
            "scales",
            ir.DataType.UINT8,
            (groups, SCALE_GROUP),
            lambda: torch.nn.functional.pad(packed.scales.flatten(), (0, groups * SCALE_GROUP - total)).view(
                groups, SCALE_GROUP
            ),
        )
        table = e.constant(packed.scale_codebook, np.float32)
        values = e.op("Gather", table, e.op("Cast", codes, to=ir.DataType.INT32), axis=0)
        largest = self.floats("scale_absmax", packed.scale_absmax.view(-1, 1))
        centred = e.op("Mul", values, largest)
        moved = e.op("Add", centred, e.constant(packed.scale_mean, np.float32))
        flat = e.cut(e.op("Reshape", moved, e.constant([-1])), 0, total, axis=0)
        return e.op("Reshape", flat, e.constant(packed.scales.shape))


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
