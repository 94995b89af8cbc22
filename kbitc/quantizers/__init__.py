"""How a weight's codes and scales are chosen under its spec: one file a quantizer, which is its name.

Other packages add theirs by the entry-point group ``kbitc.quantizers``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.quantizers._finding import (
        AUTO,
        Quantizer,
        choose_quantizer,
        find_quantizer,
        quantizer_names,
        settled_quantizer,
        strongest_quantizer,
    )
    from kbitc.quantizers._tensors import quantize, quantize_weight
    from kbitc.sensitivity.evidence import Evidence

__all__ = [
    "AUTO",
    "Evidence",
    "Quantizer",
    "choose_quantizer",
    "find_quantizer",
    "quantize",
    "quantize_weight",
    "quantizer_names",
    "settled_quantizer",
    "strongest_quantizer",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        **dict.fromkeys(__all__, "kbitc.quantizers._finding"),
        "Evidence": "kbitc.sensitivity.evidence",
        "quantize": "kbitc.quantizers._tensors",
        "quantize_weight": "kbitc.quantizers._tensors",
    },
)
