"""Appends ONNX nodes and initializers to a graph, one call each.

The one thing to know: initializers are lazy. Their bytes are made when the file is written, one tensor
at a time, so an export needs memory for the largest weight and not for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from kbitc.system.checksums import digest

MICROSOFT = "com.microsoft"


class Emitter:
    """Collects nodes for one place in a graph.

    Attributes:
        graph: where initializers are registered.
        nodes: what was emitted so far.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def take(self) -> list[ir.Node]:
        """The nodes since the last call."""
        taken, self.nodes = self.nodes, []
        return taken

    def op(self, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        return self.ops(name, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, name: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """One node with several outputs."""
        node = ir.node(name, list(inputs), attributes, domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs

    def constant(self, values: Any, dtype: type[np.generic] = np.int64) -> ir.Value:
        """A small initializer; equal ones are one."""
        array = np.asarray(values, dtype=dtype)
        text = "x".join(map(str, array.shape)) or "scalar"
        name = f"kbit.constant.{array.dtype}.{text}.{array.tobytes().hex()}"
        if len(name) > 120:
            name = f"kbit.constant.{array.dtype}.{text}.{digest(array.tobytes())[:16]}"
        if name not in self.graph.initializers:
            self._register(name, ir.tensor(array, name=name))
        return self.graph.initializers[name]

    def lazy(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], Tensor]
    ) -> ir.Value:
        """An initializer whose bytes ``make`` gives when they are written; one for each name."""
        if name not in self.graph.initializers:

            def read() -> ir.TensorProtocol:
                tensor = make()
                assert tuple(tensor.shape) == tuple(shape), (name, tuple(tensor.shape), tuple(shape))
                return ir.tensor(tensor.contiguous().numpy(), name=name)

            self._register(name, ir.LazyTensor(read, dtype, ir.Shape(shape), name=name))
        return self.graph.initializers[name]

    def _register(self, name: str, tensor: Any) -> None:
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)

    # Shapes: leading dimensions are dynamic, so only the rank and the last ones are known.

    def fold(self, x: ir.Value, lead: int, last: Sequence[int]) -> ir.Value:
        """Reshape to the ``lead`` leading dimensions of ``x`` and the given last ones."""
        return self.op("Reshape", x, self.constant([0] * lead + list(last)))

    def pad(self, x: ir.Value, rank: int, after: int) -> ir.Value:
        """Zeros behind the last dimension."""
        return self.op("Pad", x, self.constant([0] * (2 * rank - 1) + [after])) if after else x

    def cut(self, x: ir.Value, start: int, stop: int, axis: int = -1) -> ir.Value:
        """``x[start:stop]`` along an axis."""
        bounds = [self.constant([number]) for number in (start, stop, axis)]
        return self.op("Slice", x, *bounds)

    def scale(self, x: ir.Value, factor: float) -> ir.Value:
        """``x * factor`` in float32."""
        return x if factor == 1.0 else self.op("Mul", x, self.constant(factor, np.float32))

    def total(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Their sum."""
        result = parts[0]
        for part in parts[1:]:
            result = self.op("Add", result, part)
        return result

    def unpack(self, data: ir.Value, lead: int, bytes_: int, width: int) -> ir.Value:
        """Bytes ``(*lead, bytes_)`` to numbers ``(*lead, bytes_ * 8 / width)`` uint8, low bits first."""
        if width == 8:
            return data
        phases = self.constant(range(0, 8, width), np.uint8)
        spread = self.op("BitShift", self.fold(data, lead, [bytes_, 1]), phases, direction="RIGHT")
        masked = self.op("BitwiseAnd", spread, self.constant((1 << width) - 1, np.uint8))
        return self.fold(masked, lead, [bytes_ * 8 // width])

    def pack(self, codes: ir.Value, rows: int, count: int, width: int) -> ir.Value:
        """Inverse of :meth:`unpack` for ``(rows, count)``."""
        if width == 8:
            return codes
        phases = self.constant(range(0, 8, width), np.uint8)
        apart = self.op("Reshape", codes, self.constant([rows, count * width // 8, 8 // width]))
        shifted = self.op("BitShift", apart, phases, direction="LEFT")
        parts = self.ops("Split", shifted, outputs=8 // width, axis=-1, num_outputs=8 // width)
        result = parts[0]
        for part in parts[1:]:
            result = self.op("BitwiseOr", result, part)
        return self.op("Reshape", result, self.constant([rows, count * width // 8]))


def tensor_bytes(value: ir.Value) -> int:
    """Bytes of an initializer, without making them."""
    tensor: Any = value.const_value
    return -(-int(math.prod(tensor.shape.numpy()) * tensor.dtype.bitwidth) // 8)
