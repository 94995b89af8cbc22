"""Scales that lose least by squared error, weighted by what an error in each input feature costs.

    loss = sum over a block of m_i (w_i - scale * level_i)²,  m = `Moments.importance`

`kbitc.formats.scale_search` has the search. With m = E[x²] the loss is the squared error of the layer's
output for uncorrelated features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kbitc.formats.packed import Packed
from kbitc.formats.spec import Spec
from kbitc.graph.facts import Fact
from kbitc.sensitivity.evidence import Evidence
from kbitc.sensitivity.moments import MOMENTS
from kbitc.tensor.packing import checked_importance, draft


@dataclass(frozen=True)
class Weighted:
    """Searched scales, nearest codes."""

    requires: ClassVar[tuple[Fact[Any], ...]] = (MOMENTS,)

    def quantize(self, weight: Tensor, spec: Spec, evidence: Evidence) -> Packed:
        """See `kbitc.quantizers.Quantizer`."""
        moments = evidence.get(MOMENTS)
        assert moments is not None
        importance = checked_importance(moments.importance(), weight, evidence.name)
        made = draft(weight, spec, outliers=evidence.outliers, name=evidence.name)
        return made.searched(importance).packed()


QUANTIZER = Weighted
