"""A pass of your own: the first and the last block at 8 bits, the rest under the budget as planned."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

from kbitc.artifact.pack import payload_bytes
from kbitc.checkpoint import open_checkpoint
from kbitc.formats.spec import parse
from kbitc.graph.capture import capture
from kbitc.graph.plan import Choice, Plan
from kbitc.graph.program import Program, Stage
from kbitc.passes import PassManager, default_pipeline


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
    program = capture(checkpoint.skeleton(), read=checkpoint.read)
    program = PassManager([*default_pipeline(budget=3.5), KeepEnds()]).run(program)
for step in program.facts["pipeline"]:
    print(f"{step.name:>15}  {step.seconds:6.3f} s  {step}")
print(f"{8 * payload_bytes(program) / program.parameter_count:.4f} stored bits per parameter")
