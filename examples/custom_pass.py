"""A pass of your own: the first and the last block at 8 bits, the rest under the budget as planned."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

from kbitc.checkpoint import open_checkpoint
from kbitc.formats import parse
from kbitc.graph import Choice, Context, Plan, Program, Stage
from kbitc.graph.capture import capture
from kbitc.graph.stored import stored_bytes
from kbitc.pipeline import STEPS, PassManager, planning_pipeline


@dataclass(frozen=True)
class KeepEnds:
    """Gives the weights of the first and the last block one generous spec."""

    spec: str = "int8:64"
    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, program: Program) -> Program:  # noqa: D102
        block = {name: int(m[1]) for name in program.weights if (m := re.search(r"layers\.(\d+)\.", name))}
        ends = {name for name, i in block.items() if i in (0, max(block.values()))}
        kept = dict.fromkeys(ends, Choice(parse(self.spec), "first or last block"))
        return replace(program, plan=Plan({**program.plan.weights, **kept}, program.plan.budget))


with open_checkpoint("demo") as checkpoint:
    program = capture(checkpoint.skeleton(), context=Context(checkpoint.read))
    usual = planning_pipeline(is_measured=False, options={"allocate_bits": {"budget": 3.5}})
    program = PassManager([*usual, KeepEnds()]).run(program)
for step in program.known(STEPS):
    print(f"{step.name:>17}  {step.seconds:6.3f} s  {step}")
print(f"{8 * stored_bytes(program) / program.parameter_count:.4f} stored bits per parameter")
