"""Backends, which run or export a packed model: one folder each, found by the folder's name.

Other packages add theirs by the entry-point group ``kbitc.backends``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.backends._decoding.decoder import Decoder
    from kbitc.backends._exported import COMPRESSED, REPORT, exported_kind, verify_exported
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
    "COMPRESSED",
    "REPORT",
    "Backend",
    "Decoder",
    "Decoding",
    "Exporting",
    "Targeted",
    "backend_names",
    "export_formats",
    "exported_kind",
    "find_backend",
    "find_exporter",
    "find_target",
    "make_decoder",
    "verify_exported",
]
_OF_EXPORTS = ("COMPRESSED", "REPORT", "exported_kind", "verify_exported")

__getattr__, __dir__ = exports(
    __name__,
    {
        **dict.fromkeys(__all__, "kbitc.backends._finding"),
        **dict.fromkeys(_OF_EXPORTS, "kbitc.backends._exported"),
        "Decoder": "kbitc.backends._decoding.decoder",
    },
)
