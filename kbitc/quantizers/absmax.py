"""The largest magnitude of each block as its scale: the k-bit paper's choice, which needs no evidence.

scale = max |w|  (with its sign for ``bof``);  with a zero point, half of the block's range
code  = the level nearest to w / scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kbitc.formats.packed import Packed
from kbitc.formats.spec import Spec
from kbitc.graph.facts import Fact
from kbitc.sensitivity.evidence import Evidence
from kbitc.tensor.packing import draft


@dataclass(frozen=True)
class Absmax:
    """Absmax scales, nearest codes."""

    requires: ClassVar[tuple[Fact[Any], ...]] = ()

    def quantize(self, weight: Tensor, spec: Spec, evidence: Evidence) -> Packed:
        """See `kbitc.quantizers.Quantizer`."""
        return draft(weight, spec, outliers=evidence.outliers, name=evidence.name).packed()


QUANTIZER = Absmax
