"""What a plan's graph looks like once its weights are packed."""

from __future__ import annotations

from kbitc.graph.program import Program
from kbitc.passes.insert_dequantize import InsertDequantize
from kbitc.pipeline.defaults import lowering_pipeline
from kbitc.pipeline.manager import PassManager


def lower(program: Program) -> Program:
    """The graph of a planned program on packed weights, fused and cleaned up; needs no weights."""
    return PassManager([InsertDequantize(), *lowering_pipeline()]).run(program)
