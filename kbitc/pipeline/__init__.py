"""How passes are found, ordered, run and checked, and the default orders.

No pass is in here: they lie in the folder ``passes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kbitc.lazy import exports

if TYPE_CHECKING:
    from kbitc.pipeline.defaults import (
        COMPILING,
        LOWERING,
        default_pipeline,
        lowering_pipeline,
        planning_pipeline,
    )
    from kbitc.pipeline.manager import STEPS, PassManager, Step
    from kbitc.pipeline.order import edit_pipeline
    from kbitc.pipeline.records import Fired
    from kbitc.pipeline.registry import Pass

__all__ = [
    "COMPILING",
    "LOWERING",
    "STEPS",
    "Fired",
    "Pass",
    "PassManager",
    "Step",
    "default_pipeline",
    "edit_pipeline",
    "lowering_pipeline",
    "planning_pipeline",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "COMPILING": "kbitc.pipeline.defaults",
        "Fired": "kbitc.pipeline.records",
        "LOWERING": "kbitc.pipeline.defaults",
        "Pass": "kbitc.pipeline.registry",
        "PassManager": "kbitc.pipeline.manager",
        "STEPS": "kbitc.pipeline.manager",
        "Step": "kbitc.pipeline.manager",
        "default_pipeline": "kbitc.pipeline.defaults",
        "edit_pipeline": "kbitc.pipeline.order",
        "lowering_pipeline": "kbitc.pipeline.defaults",
        "planning_pipeline": "kbitc.pipeline.defaults",
    },
)
