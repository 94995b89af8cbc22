"""`Packed`: one packed weight as plain tensors, and its operands as every ``kbit::`` op takes them.

The one thing to know: ``dequantized = codebook[code] * scale (+ zero)``, one scale for each block of
consecutive weights along the *input* dimension (the last one of a row may be short).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from kbitc.formats.spec import Spec


class Operands(NamedTuple):
    """A packed weight as every ``kbit::`` op takes it: the fields of `Packed`, then three numbers.

    Experts have a leading dimension. Unpacked into a call (``*operands``) they stand in the ops' order.
    """

    planes: Tensor
    scales: Tensor
    codebook: Tensor
    zeros: Tensor | None
    scale_codebook: Tensor | None
    scale_absmax: Tensor | None
    scale_mean: Tensor | None
    outlier_values: Tensor | None
    outlier_index: Tensor | None
    in_features: int
    bits: int
    block: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields of `TENSOR_FIELDS`, in order."""
        return tuple(getattr(self, name) for name in TENSOR_FIELDS)

    @property
    def numbers(self) -> tuple[int, int, int]:
        """The fields of `NUMBER_FIELDS`, in order."""
        return self.in_features, self.bits, self.block

    @staticmethod
    def split(arguments: Sequence[Any]) -> tuple[Operands, Any]:
        """The weight that the arguments of an op begin with, and what comes after it; None for nothing."""
        count = len(Operands._fields)
        return Operands(*arguments[:count]), arguments[count] if len(arguments) > count else None


NUMBER_FIELDS = ("in_features", "bits", "block")
TENSOR_FIELDS = tuple(name for name in Operands._fields if name not in NUMBER_FIELDS)
"""The fields of `Packed` that are tensors, in the order of every ``kbit::`` op."""


@dataclass(frozen=True)
class Packed:
    """One packed weight: plain tensors and the numbers needed to read them.

    Shapes are for a weight of ``(*lead, rows, in_features)``; ``lead`` is the expert dimension of a
    3-D weight, or empty.

    Attributes:
        planes: ``(*lead, rows, row_bytes)`` uint8 bit planes (`kbitc.formats.bit_planes`).
        scales: ``(*lead, rows, blocks)`` float16 (bfloat16 where float16 cannot hold them), or uint8
            codes of double-quantized scales.
        codebook: ``(levels,)`` float32, sorted.
        zeros: like float16 ``scales``, added to each block; None without ``+zp``.
        scale_codebook: ``(256,)`` float32 dynamic map, ``+dq`` only.
        scale_absmax: ``(ceil(number of scales / 256),)`` float32 constants, ``+dq`` only.
        scale_mean: ``(1,)`` float32 mean that was subtracted from the scales, ``+dq`` only.
        outlier_values: ``(*lead, rows, outliers)`` float16 columns, ``+out`` only.
        outlier_index: ``(outliers,)`` int32 input features that they belong to, sorted.
        spec: the format.
        in_features: weights a row.
    """

    planes: Tensor
    scales: Tensor
    codebook: Tensor
    zeros: Tensor | None
    scale_codebook: Tensor | None
    scale_absmax: Tensor | None
    scale_mean: Tensor | None
    outlier_values: Tensor | None
    outlier_index: Tensor | None
    spec: Spec
    in_features: int
    _operands: Operands = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once and not at every call, where making it took 0.7 us of the 11 of an 8 x 64 linear.
        numbers = (self.in_features, self.spec.bits, self.spec.block)
        made = Operands._make((*(getattr(self, name) for name in TENSOR_FIELDS), *numbers))
        object.__setattr__(self, "_operands", made)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``(*lead, rows, in_features)``."""
        return (*self.planes.shape[:-1], self.in_features)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is present, by field name."""
        return {name: value for name in TENSOR_FIELDS if (value := getattr(self, name)) is not None}

    def scaled_tensors(self) -> list[Tensor]:
        """Those of which each value of the weight is a multiple, or a sum of multiples."""
        scales = (self.scales,) if self.scale_absmax is None else (self.scale_absmax, self.scale_mean)
        return [t for t in (*scales, self.zeros, self.outlier_values) if t is not None]

    def nbytes(self) -> int:
        """Bytes of this weight alone: all tensors but the codebooks that a data type shares."""
        shared = {"scale_codebook"}
        if not self.spec.is_fitted:
            shared.add("codebook")
        return sum(t.nbytes for name, t in self.tensors().items() if name not in shared)

    def operands(self) -> Operands:
        """The arguments that every ``kbit::`` op takes for a weight, in order."""
        return self._operands

    def map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        """A copy with every tensor replaced by ``function`` of it."""
        changed: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        return replace(self, **changed)
