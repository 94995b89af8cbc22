"""Which passes run, and whether they can in that order: stages, and facts that passes need of others.

The one thing to know: nothing runs here. Order follows from what passes declare, so that a mistake is
found before the first of them starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kbitc.errors import UsageError, did_you_mean
from kbitc.graph.facts import Fact
from kbitc.graph.program import Stage
from kbitc.pipeline.registry import Pass, load_pass, loadable_passes, name_of, provided, required


def edit_pipeline(
    passes: Sequence[Pass],
    chosen: Sequence[Pass | str] | None = None,
    disabled: Iterable[str] = (),
    *,
    start: Stage = Stage.CAPTURED,
    end: Stage = Stage.PLANNED,
) -> list[Pass]:
    """Another list of passes, by default of those between capture and pack.

    Args:
        passes: to begin with, configured by what the user asked for.
        chosen: what to run instead, as values or names; a name means the pass of that name in
            ``passes``, and one with its default options if there is none.
        disabled: names to leave out.
        start: what the program is before them.
        end: what it must be after them.

    Raises:
        UsageError: an unknown name, passes out of order, or another stage at the end.
    """
    configured = {name_of(pass_): pass_ for pass_ in passes}
    edited = list(passes) if chosen is None else [make_pass(entry, configured) for entry in chosen]
    for name in disabled:
        check_names("disable", [name], edited)
        edited = [pass_ for pass_ in edited if name_of(pass_) != name]
    fault = order_fault(edited, start)
    if fault is not None:
        raise UsageError(fault)
    reached = edited[-1].gives if edited else start
    if reached is not end:
        use = "packed" if end is Stage.PLANNED else "used here"
        raise UsageError(
            f"the passes {[name_of(pass_) for pass_ in edited]} end at stage {reached.name}, but only a "
            f"program of stage {end.name} can be {use}; {_advice(end, reached)}"
        )
    return edited


def make_pass(entry: Pass | str, configured: Mapping[str, Pass]) -> Pass:
    """A pass given as a value or by name: of those configured, or else with its default options.

    Raises:
        UsageError: no pass of that name or no pass at all, or one that cannot be made without options.
    """
    if isinstance(entry, type):
        raise UsageError(f"{entry.__name__} is a class; give a pass, {entry.__name__}()")
    if not isinstance(entry, str):
        lacks = [name for name in ("needs", "gives", "run") if not hasattr(entry, name)]
        if lacks:
            raise UsageError(f"{entry!r} is no pass: it has no '{lacks[0]}'")
        return entry
    if entry in configured:
        return configured[entry]
    make = load_pass(entry)
    try:
        return make()
    except TypeError as error:
        raise UsageError(f"pass '{entry}' cannot be made from its name alone: {error}") from error


def check_names(what: str, names: Iterable[str], passes: Iterable[Pass]) -> None:
    """Raises UsageError for a name that is none of the passes'; ``what`` is the option that gave it."""
    known = [name_of(pass_) for pass_ in passes]
    for name in names:
        if name not in known:
            raise UsageError(f"{what}: " + did_you_mean("pass of this pipeline", name, known))


def order_fault(
    passes: Sequence[Pass],
    stage: Stage = Stage.CAPTURED,
    facts: Iterable[Fact[Any]] = (),
    history: Iterable[str] = (),
) -> str | None:
    """Why passes cannot run in this order on a program of that stage, facts and history; None if they can."""
    known, ran = set(facts), list(history)
    for pass_ in passes:
        who = where(pass_, ran)
        if stage is not pass_.needs:
            return (
                f"{who}: needs stage {pass_.needs.name}, but the program is {stage.name}; "
                f"{_advice(pass_.needs, stage)}"
            )
        missing = [fact for fact in required(pass_) if fact not in known]
        if missing:
            return f"{who}: needs the fact '{missing[0]}', which {_provider(missing[0], passes)}"
        stage = pass_.gives
        known.update(provided(pass_))
        ran.append(name_of(pass_))
    return None


def where(pass_: Pass, history: Sequence[str]) -> str:
    """How errors begin: the pass, and what had run before it."""
    ran = f"after the passes {list(history)}" if history else "as the first pass"
    return f"pass '{name_of(pass_)}', {ran}"


def _advice(needed: Stage, reached: Stage) -> str:
    if needed < reached:
        return "it has already been run, or belongs before a pass that has"
    # Passes that only refine a stage need it themselves.
    makers = [name for name, p in loadable_passes() if p.gives is needed is not p.needs]  # type: ignore[comparison-overlap]  # a class variable
    listed = f" ({' or '.join(makers)})" if makers else ""
    return f"first run a pass that gives {needed.name}{listed}"


def _provider(fact: Fact[Any], passes: Iterable[Pass]) -> str:
    here = [name_of(pass_) for pass_ in passes if fact in provided(pass_)]
    if here:
        return f"the pass '{here[0]}' provides: put that one before it"
    registered = [name for name, loaded in loadable_passes() if fact in provided(loaded)]
    if registered:
        return f"the pass '{registered[0]}' provides: add that one before it"
    return "no registered pass provides"
