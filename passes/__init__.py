"""The passes, one a file; the file's name is the pass's name.

The one thing to know: names are imported when they are first used, so that importing this package
loads no pass.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbitc.passes.canonicalize import Canonicalize
    from kbitc.pipeline import Pass, PassManager, Step, default_pipeline, edit_pipeline

__all__ = ["Canonicalize", "Pass", "PassManager", "Step", "default_pipeline", "edit_pipeline"]

_HOME = {
    "Canonicalize": "kbitc.passes.canonicalize",
    "Pass": "kbitc.pipeline",
    "PassManager": "kbitc.pipeline",
    "Step": "kbitc.pipeline",
    "default_pipeline": "kbitc.pipeline",
    "edit_pipeline": "kbitc.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kbitc.passes' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
