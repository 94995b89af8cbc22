"""Backends, which run or export a packed model: one folder each, found by the folder's name.

Other packages add theirs by the entry-point group ``kbitc.backends``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.backends._decoding.decoder import Decoder
    from kbitc.backends._finding import (
        AUTO,
        Backend,
        Decoding,
        Exporting,
        Targeted,
        backend_names,
        export_formats,
        find_backend,
        find_exporter,
        find_target,
        make_decoder,
    )

__all__ = [
    "AUTO",
    "Backend",
    "Decoder",
    "Decoding",
    "Exporting",
    "Targeted",
    "backend_names",
    "export_formats",
    "find_backend",
    "find_exporter",
    "find_target",
    "make_decoder",
]

__getattr__, __dir__ = exports(
    __name__,
    {**dict.fromkeys(__all__, "kbitc.backends._finding"), "Decoder": "kbitc.backends._decoding.decoder"},
)
