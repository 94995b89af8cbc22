"""`PassManager`: runs passes in order, and checks between them what no pass should have to check.

The one thing to know: a pass is any frozen value with ``needs``, ``gives`` and ``run``. The manager
verifies stages, facts, the graph, and that no tensor was lost (`kbitc.pipeline.invariants`); it measures what
changed, so that a pass claims nothing.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from kbitc.errors import KbitcError, PassError
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program
from kbitc.graph.text import node_lines, program_diff, program_text
from kbitc.pipeline.invariants import first_fault
from kbitc.pipeline.order import check_names, make_pass, order_fault, where
from kbitc.pipeline.registry import Pass, name_of, needs_graph, provided

Observer = Callable[[str, Program, Program, float], object]
"""Called after each pass: ``(name, program before, program after, seconds)``."""


@dataclass(frozen=True)
class Step:
    """What the manager measured of one pass.

    Attributes:
        name: of the pass.
        seconds: wall time.
        nodes_before: graph nodes.
        nodes_after: graph nodes.
        added: nodes of new names.
        removed: nodes whose names are gone.
        changed: nodes of the same name that call, read or compute something else.
        planned: weights that have another choice than before.
        facts: names of the facts that are new.
        is_skipped: it did not run, since it needs a graph.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    added: int
    removed: int
    changed: int
    planned: int
    facts: tuple[str, ...]
    is_skipped: bool = False

    def __str__(self) -> str:
        if self.is_skipped:
            return "left out: it needs the model's graph, and the model could not be traced"
        nodes = [
            f"{count} nodes {how}"
            for how, count in (("added", self.added), ("removed", self.removed), ("changed", self.changed))
            if count
        ]
        planned = [f"{self.planned} weights planned"] if self.planned else []
        facts = [f"new facts: {', '.join(self.facts)}"] if self.facts else []
        return ", ".join([*nodes, *planned, *facts]) or "nothing changed"


class PassManager:
    """Runs passes, given as values or by name.

    Attributes:
        passes: in order.
        observe: called after each pass with ``(name, before, after, seconds)``.
        print_before: names of the passes before which the program is written as text.
        print_after: the same, after.
        print_diff: names of the passes whose changes to that text are written.
        write: takes that text; standard error by default.
        is_checked: also run the checks between passes that take as long as a pass. Tests do.
    """

    def __init__(
        self,
        passes: Sequence[Pass | str],
        *,
        observe: Observer | None = None,
        print_before: Collection[str] = (),
        print_after: Collection[str] = (),
        print_diff: Collection[str] = (),
        write: Callable[[str], object] = sys.stderr.write,
        is_checked: bool = False,
    ) -> None:
        self.passes = tuple(make_pass(entry, {}) for entry in passes)
        for what, names in (("before", print_before), ("after", print_after), ("diff", print_diff)):
            check_names(f"print {what}", names, self.passes)
        self.observe = observe
        self.print_before, self.print_after, self.print_diff = print_before, print_after, print_diff
        self.write = write
        self.is_checked = is_checked

    def without(self, names: Collection[str]) -> PassManager:
        """The same manager of fewer passes."""
        kept = copy.copy(self)
        kept.passes = tuple(pass_ for pass_ in self.passes if name_of(pass_) not in names)
        return kept

    def run(self, program: Program) -> Program:
        """The program after all passes.

        Raises:
            PassError: the passes are out of order, or one failed or left a broken program.
            KbitcError: what a pass raises on purpose for its user goes through as it is.
        """
        skipped = [pass_ for pass_ in self.passes if program.untraced and needs_graph(pass_)]
        passes = [pass_ for pass_ in self.passes if pass_ not in skipped]
        fault = order_fault(passes, program.stage, program.facts, program.history)
        if fault is not None:
            raise PassError(fault)
        lines: Mapping[str, str] = node_lines(program)
        for pass_ in self.passes:
            if pass_ in skipped:
                program = _noted(program, _skipped(name_of(pass_), len(lines)))
            else:
                program, lines = self._step(pass_, program, lines)
        return program

    def _step(
        self, pass_: Pass, before: Program, lines: Mapping[str, str]
    ) -> tuple[Program, Mapping[str, str]]:
        """The program after one pass, and its nodes' lines; ``lines`` are those of ``before``."""
        name, who = name_of(pass_), where(pass_, before.history)
        if name in self.print_before:
            self.write(f"before {name}: {program_text(before)}")
        started = time.perf_counter()
        try:
            after = pass_.run(before)
        except KbitcError:
            raise
        except Exception as error:
            raise PassError(f"{who}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - started
        fault = _broken_promise(pass_, after) or first_fault(before, after, is_checked=self.is_checked)
        if fault is not None:
            raise PassError(f"{who}: {fault}")
        after_lines = node_lines(after)
        is_same_graph = after.graph.graph is before.graph.graph
        if (is_same_graph and after_lines != lines) or (self.is_checked and node_lines(before) != lines):
            raise PassError(f"{who}: changed the graph of the program that it was given; change a copy")
        step = _measure(name, seconds, before, after, lines, after_lines)
        after = _noted(replace(after, history=(*before.history, name)), step)
        self._show(name, before, after)
        if self.observe is not None:
            self.observe(name, before, after, seconds)
        return after, after_lines

    def _show(self, name: str, before: Program, after: Program) -> None:
        if name in self.print_after:
            self.write(f"after {name}: {program_text(after)}")
        if name in self.print_diff:
            self.write(f"changes of {name}:\n{program_diff(before, after)}\n")


STEPS: Fact[tuple[Step, ...]] = Fact("pipeline")
"""What the manager measured of every pass that has run."""


def _noted(program: Program, step: Step) -> Program:
    return program.with_fact(STEPS, (*(program.get(STEPS) or ()), step))


def _skipped(name: str, nodes: int) -> Step:
    return Step(name, 0.0, nodes, nodes, 0, 0, 0, 0, (), is_skipped=True)


def _broken_promise(pass_: Pass, after: object) -> str | None:
    """What a pass declares and did not do; None if it did."""
    if not isinstance(after, Program):
        return f"run returned {type(after).__name__}, not a Program"
    if after.stage is not pass_.gives:
        return f"gives stage {pass_.gives.name}, but returned a program of stage {after.stage.name}"
    missing = [fact for fact in provided(pass_) if fact not in after.facts]
    if missing:
        return f"declares that it provides the fact '{missing[0]}', but did not add it"
    return None


def _measure(
    name: str,
    seconds: float,
    before: Program,
    after: Program,
    old: Mapping[str, str],
    new: Mapping[str, str],
) -> Step:
    planned = {} if before.plan is None else before.plan.weights
    choices = {} if after.plan is None else after.plan.weights
    return Step(
        name,
        seconds,
        len(old),
        len(new),
        added=len(new.keys() - old.keys()),
        removed=len(old.keys() - new.keys()),
        changed=sum(new[node] != old[node] for node in new.keys() & old.keys()),
        planned=sum(planned.get(weight) != choice for weight, choice in choices.items()),
        facts=tuple(fact.name for fact in after.facts if fact not in before.facts),
    )
