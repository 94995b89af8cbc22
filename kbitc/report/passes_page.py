"""One self-contained HTML page about a run of passes: times, what changed, diffs, the planned graph.

The one thing to know: `PassesPage` is an observer, which keeps of each pass its step and the diff of the
program's text; the page is rendered once, when the last pass has run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from kbitc.artifact.plan_file import PassEntry
from kbitc.graph import queries
from kbitc.graph.program import Program
from kbitc.graph.text import program_diff
from kbitc.pipeline.manager import STEPS, Step
from kbitc.report.module_tree import module_tree
from kbitc.report.page import Section, page, render
from kbitc.report.parts import passes_section

MOST_LINES = 4000
"""Of one diff: 100 layers' worth; a page of more is slow to open."""


@dataclass
class PassesPage:
    """Observes a `PassManager`, then renders what it saw.

    Attributes:
        title: of the page, the model's name.
        runs: for each pass what the manager measured, and the diff of the program's text.
    """

    title: str
    runs: list[tuple[Step, str]] = field(default_factory=list)

    def __call__(self, name: str, before: Program, after: Program, seconds: float) -> None:
        """See `kbitc.pipeline.manager.Observer`."""
        del name, seconds  # both are in the step
        self.runs.append((after.known(STEPS)[-1], program_diff(before, after)))

    def html(self, program: Program) -> str:
        """The page; ``program`` is what the last pass returned."""
        steps = [step for step, _ in self.runs]
        entries = [PassEntry(s.name, s.nodes_before, s.nodes_after, str(s)) for s in steps]
        shared = queries.shared_inputs(program)
        sections = [
            passes_section(entries, [step.seconds for step in steps]),
            Section("Changes", self._changes()),
            Section("Graph", module_tree(program)),
            Section(
                "Weights that read the same input",
                render("shared_inputs", groups=shared) if shared else Markup(),
            ),
        ]
        subtitle = f"{len(steps)} passes in {sum(step.seconds for step in steps):,.1f} s"
        return page(f"Passes of {self.title}", subtitle, {}, sections)

    def _changes(self) -> Markup:
        changes = []
        for step, diff in self.runs:
            lines = diff.splitlines()[2:]  # without the two file names
            changes.append((step.name, lines[:MOST_LINES], max(0, len(lines) - MOST_LINES)))
        return render("changes", changes=changes)
