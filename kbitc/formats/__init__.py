"""The bytes of a weight: data types, specs, bit planes, scales, and what packing stores.

No model, graph or file is known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.formats.datatypes import CodebookRequest, family
    from kbitc.formats.packed import Operands, Packed
    from kbitc.formats.spec import Spec, parse

__all__ = [
    "CodebookRequest",
    "Operands",
    "Packed",
    "Spec",
    "family",
    "parse",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "CodebookRequest": "kbitc.formats.datatypes",
        "Operands": "kbitc.formats.packed",
        "Packed": "kbitc.formats.packed",
        "Spec": "kbitc.formats.spec",
        "family": "kbitc.formats.datatypes",
        "parse": "kbitc.formats.spec",
    },
)
