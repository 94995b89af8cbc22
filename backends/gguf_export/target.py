"""What a GGUF file holds of each weight, in llama.cpp's block types.

The one thing to know: rows are whole numbers of blocks. Most types are of 256 weights, which the rows of many
small models are no multiple of: those of 576 (SmolLM2-135M) have only the types of 32, from 4.5 bits on. And
a budget leaves out what llama.cpp is slow at: `SLOW` takes longer than Q8_0 for fewer bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kbitc.backends.gguf_export.blocks import KINDS, kind_of
from kbitc.formats.spec import Spec
from kbitc.graph.program import Rest, Weight

SLOW = frozenset({"Q4_1", "Q5_0", "Q5_1"})
"""No kernels of rows side by side: SmolLM2-135M in one of them takes 16, 19 and 18 ms a token (AVX2, one
thread), in Q8_0 15, in Q4_0 or IQ4_NL 11."""
ALIGNMENT = 32
"""Bytes that every tensor starts at a multiple of."""


@dataclass(frozen=True)
class GgufTarget:
    """See `kbitc.planning.target.Target`."""

    name: ClassVar[str] = "gguf"
    agree: ClassVar[str] = ""

    def candidates(self, weight: Weight) -> tuple[Spec, ...]:
        """Types that the row is a multiple of, but for slow ones; a plan may name those, too."""
        quick = (spec for spec, kind in KINDS.items() if kind.name not in SLOW)
        return tuple(spec for spec in quick if not self.misfit(weight, spec))

    def misfit(self, weight: Weight, spec: Spec) -> str:
        """What llama.cpp has no type for; 16 bits instead."""
        if spec.is_left_alone:
            return ""
        is_matrix = weight.view_of is None and kind_of(spec, weight.in_features) is not None
        return "" if is_matrix else "F16"

    def weight_bytes(self, weight: Weight, spec: Spec) -> int:
        """Of its blocks; the file's header has its name and shape."""
        if spec.is_left_alone or self.misfit(weight, spec):
            return padded(2 * weight.numel)
        *lead, rows, width = weight.oriented_shape
        return padded(math.prod(lead) * rows * KINDS[spec].row_bytes(width))

    def rest_bytes(self, rest: Rest) -> int:
        """Vectors are at 32 bits there."""
        return padded(rest.numel * (4 if rest.dtype.is_floating_point else rest.dtype.itemsize))


def padded(nbytes: int) -> int:
    """With what fills up to the next tensor."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
