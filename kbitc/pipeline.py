"""`PassManager`: runs passes in order, and checks between them what no pass should have to check.

The one thing to know: a pass is any frozen value with ``needs``, ``gives`` and ``run``. The manager
verifies stages, the graph, and that no tensor was lost; it measures what changed, so that a pass
claims nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, cast

from kbitc.errors import KbitcError, PassError, UsageError, did_you_mean
from kbitc.program import CANONICAL, Program, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = "kbitc.passes"  # also the entry-point group of passes in other packages
FACT = "pipeline"


class Pass(Protocol):
    """One step of the compiler.

    Attributes:
        needs: the stage that a program must have.
        gives: the stage that it has afterwards.
    """

    @property
    def needs(self) -> Stage: ...  # noqa: D102
    @property
    def gives(self) -> Stage: ...  # noqa: D102

    def run(self, program: Program) -> Program:
        """A changed copy of ``program``."""
        ...


@dataclass(frozen=True)
class Step:
    """What the manager measured of one pass.

    Attributes:
        name: of the pass.
        seconds: wall time.
        nodes_before: graph nodes.
        nodes_after: graph nodes.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int


def pass_names() -> list[str]:
    """The registered passes: files of the folder ``passes``, and entry points of other packages."""
    folder = importlib.import_module(FOLDER)
    files = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    return sorted({*files, *(point.name for point in entry_points(group=FOLDER))})


def load_pass(name: str) -> type[Pass]:
    """The class of a registered pass.

    Raises:
        UsageError: no pass has that name.

    >>> load_pass("canonicalize").__name__
    'Canonicalize'
    """
    if name not in pass_names():
        raise UsageError(did_you_mean("pass", name, pass_names()))
    elsewhere = {point.name: point for point in entry_points(group=FOLDER)}
    found = elsewhere[name].load() if name in elsewhere else _from_folder(name)
    return cast("type[Pass]", found)


def _from_folder(name: str) -> Any:
    module = importlib.import_module(f"{FOLDER}.{name}")
    if not hasattr(module, "PASS"):
        raise PassError(f"{module.__file__} defines no PASS; end it with 'PASS = <its class>'")
    return module.PASS


def name_of(pass_: Pass) -> str:
    """A pass's name: its class in snake case, which is also its file.

    >>> class FuseLora: ...
    >>> name_of(FuseLora())
    'fuse_lora'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(pass_).__name__).lower()


def default_pipeline(budget: float = 4.0) -> list[Pass]:
    """From a captured program to a plan of at most ``budget`` stored bits per parameter."""
    make_plan = cast("Any", load_pass("allocate_bits"))
    return [load_pass("canonicalize")(), make_plan(budget=budget)]


class PassManager:
    """Runs passes, given as values or by name.

    Attributes:
        passes: in order.
    """

    def __init__(self, passes: Sequence[Pass | str]) -> None:
        self.passes = tuple(load_pass(p)() if isinstance(p, str) else p for p in passes)

    def run(self, program: Program) -> Program:
        """The program after all passes.

        Raises:
            PassError: a pass is out of order, failed, or left a broken program.
            KbitcError: what a pass raises on purpose for its user goes through as it is.
        """
        for pass_ in self.passes:
            program = self._step(pass_, program)
        return program

    def _step(self, pass_: Pass, before: Program) -> Program:
        name = name_of(pass_)
        ran = f"after the passes {list(before.history)}" if before.history else "as the first pass"
        if before.stage is not pass_.needs:
            raise PassError(
                f"pass '{name}', {ran}: needs stage {pass_.needs.name}, but the program is "
                f"{before.stage.name}; {_advice(pass_.needs, before.stage)}"
            )
        started = time.perf_counter()
        try:
            after = pass_.run(before)
        except KbitcError:
            raise
        except Exception as error:
            raise PassError(f"pass '{name}', {ran}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - started
        fault = _fault(pass_, before, after)
        if fault:
            raise PassError(f"pass '{name}', {ran}: {fault}")
        step = Step(name, seconds, len(before.graph.graph.nodes), len(after.graph.graph.nodes))
        steps = cast("tuple[Step, ...]", after.facts.get(FACT, ()))
        return replace(after, history=(*before.history, name)).with_fact(FACT, (*steps, step))


def _advice(needed: Stage, found: Stage) -> str:
    if needed > found:
        return f"first run a pass that gives {needed.name}"
    return "it has already been run, or belongs before a pass that has"


def _fault(pass_: Pass, before: Program, after: object) -> str | None:
    """What a pass broke; None if nothing. Leaves the graph recompiled."""
    if not isinstance(after, Program):
        return f"run returned {type(after).__name__}, not a Program"
    if after.stage is not pass_.gives:
        return f"gives stage {pass_.gives.name}, but returned a program of stage {after.stage.name}"
    graph = after.graph.graph
    try:
        graph.lint()
    except RuntimeError as error:
        return f"left a broken graph: {error}"
    after.graph.recompile()
    had, has = {*before.weights, *before.rest}, {*after.weights, *after.rest}
    if had != has:
        lost, new = sorted(had - has), sorted(has - had)
        return f"lost the tensor '{lost[0]}'" if lost else f"made up a tensor '{new[0]}'"
    both = sorted({*after.weights} & {*after.rest})
    if both:
        return f"'{both[0]}' is a weight and also among the rest"
    nodes = {node.name: node for node in graph.nodes}
    missing = sorted(set(after.parameters) - set(nodes))
    if missing:
        return f"removed the graph input '{missing[0]}' of '{after.parameters[missing[0]]}'"
    for weight in after.weights.values():
        for use in weight.uses:
            node = nodes.get(use.node)
            if node is None or CANONICAL.get(cast("Any", node.target)) != use.kind:
                return f"'{weight.name}' says that '{use.node}' is its {use.kind}, which it is not"
    return None
