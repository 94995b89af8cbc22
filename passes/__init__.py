"""The passes, one a file; the file's name is the pass's name.

Names are imported when they are first used, so that importing this package loads no pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.passes.canonicalize import Canonicalize
    from kbitc.pipeline import Pass, PassManager, Step, default_pipeline, edit_pipeline

__all__ = ["Canonicalize", "Pass", "PassManager", "Step", "default_pipeline", "edit_pipeline"]

__getattr__, __dir__ = exports(
    __name__, {**dict.fromkeys(__all__, "kbitc.pipeline"), "Canonicalize": "kbitc.passes.canonicalize"}
)
