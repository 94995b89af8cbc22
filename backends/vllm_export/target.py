"""What a folder of compressed-tensors holds of each weight, in groups that vLLM's packed matmuls take.

The one thing to know: `sint` is its symmetric format with the sign of scales turned, -8 to 7 times a scale of
16 bits, and `int4+zp+iz` the asymmetric one. A power of two lies between the two scales, so that nothing is
rounded on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kbitc.formats.spec import Spec, parse
from kbitc.graph.program import Rest, Weight

BITS = (4, 8)
GROUPS = (32, 64, 128)
SHAPE_BYTES = 16  # the dense shape is stored beside each weight


@dataclass(frozen=True)
class VllmTarget:
    """See `kbitc.planning.target.Target`."""

    name: ClassVar[str] = "vllm"
    agree: ClassVar[str] = "input"  # queries, keys and values are one matmul there; gate and up, too

    def candidates(self, weight: Weight) -> tuple[Spec, ...]:
        """Symmetric groups that the row is a multiple of: transformers 5.23 cannot load others.

        (Of asymmetric ones compressed-tensors 0.20 makes empty zero points in another shape than it stores.)
        """
        every = (parse(f"sint{bits}:{group}") for bits in BITS for group in GROUPS)
        return tuple(spec for spec in every if not self.misfit(weight, spec))

    def misfit(self, weight: Weight, spec: Spec) -> str:
        """What is no matrix of an nn.Linear alone, or no integer of 4 or 8 bits."""
        if spec.is_left_alone:
            return ""
        return "" if is_linear(weight) and holds(spec, weight.in_features) else "16 bits"

    def weight_bytes(self, weight: Weight, spec: Spec) -> int:
        """Of codes in 32-bit words, scales and the shape."""
        if spec.is_left_alone or self.misfit(weight, spec):
            return 2 * weight.numel
        words, groups = -(-weight.in_features * spec.bits // 32), weight.in_features // spec.block
        zeros = -(-weight.rows * spec.bits // 32) * groups if spec.has_zero_point else 0
        return weight.rows * (4 * words + 2 * groups) + 4 * zeros + SHAPE_BYTES

    def rest_bytes(self, rest: Rest) -> int:
        """As in the artifact."""
        return rest.slot.nbytes


def is_linear(weight: Weight) -> bool:
    """Whether it is the matrix of an nn.Linear, and of nothing else."""
    is_own = not weight.aliases and weight.view_of is None and not weight.is_transposed
    return is_own and weight.kinds == ("linear",) and len(weight.shape) == 2


def holds(spec: Spec, in_features: int) -> bool:
    """Whether a matrix of rows of that length is held bit by bit."""
    is_plain = not (spec.has_double_quant or spec.scale_bits or spec.outliers) and spec.block in GROUPS
    is_symmetric = spec.family == "sint" and not spec.has_zero_point and not spec.variant
    is_held = is_symmetric or (spec.has_integer_zeros and spec.bits == BITS[0])
    return is_plain and is_held and spec.bits in BITS and in_features % spec.block == 0
