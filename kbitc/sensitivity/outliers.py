"""Outlier features of a weight: which input features stay at 16 bits, and the figures that say so.

The one thing to know: a `OutlierFeatures` ranks *all* input features, those found first. A spec asks for a
number of them (``+outP%``), so a spec that asks for as many as were found gets exactly these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kbitc.formats.spec import Spec
from kbitc.graph.facts import Fact


@dataclass(frozen=True)
class OutlierFeatures:
    """What is known of one weight's input features.

    Attributes:
        index: the outlier features, sorted.
        figures: what was measured of each, in the same order: "magnitude" (largest |x|), "layers" and
            "positions" (shares in [0, 1]) on text; "deviation" (standard deviations above the mean) without.
        reason: why these, or why none, in one clause.
        ranking: ``(in_features,)`` int64, strongest first; None for a weight that is no matmul's.
    """

    index: tuple[int, ...] = ()
    figures: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    reason: str = ""
    ranking: Tensor | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in a plan file."""
        figures = {name: [float(f"{v:.4g}") for v in values] for name, values in self.figures.items()}
        return {"index": list(self.index), **figures, "reason": self.reason}

    def kept_under(self, spec: Spec) -> Spec:
        """``spec`` with these features at 16 bits: with their share, or as it is where there are none."""
        if not self.index or self.ranking is None or len(self.index) == len(self.ranking):
            return spec
        return replace(spec, outliers=share_of(len(self.index), len(self.ranking)))

    def picked(self, spec: Spec) -> Tensor | None:
        """The sorted input features that ``spec`` keeps at 16 bits; None where nothing ranks them."""
        if self.ranking is None or not spec.outliers:
            return None
        return self.ranking[: spec.outlier_count(len(self.ranking))].sort().values


OUTLIERS: Fact[Mapping[str, OutlierFeatures]] = Fact("outliers")
"""Of every weight, by name."""


def share_of(count: int, in_features: int) -> float:
    """The shortest percentage for which a spec keeps exactly ``count`` input features.

    >>> share_of(3, 576)
    0.5
    """
    for digits in range(12):
        share = round(100 * count / in_features, digits)
        if 0 < share < 100 and Spec("nf", 4, outliers=share).outlier_count(in_features) == count:
            return share
    raise ValueError(f"no share of {in_features} input features below 100 % is {count} of them")
