"""What a pass is, and which passes there are: files of the folder ``passes``, and entry points.

The one thing to know: the folder is the registry. A file's name is its pass's name, and a pass is
imported when it is first asked for; other packages add theirs by the entry-point group ``kbitc.passes``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import re
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

from kbitc.errors import PassError, UsageError, did_you_mean
from kbitc.program import Program, Stage

FOLDER = "kbitc.passes"  # also the entry-point group of passes in other packages


class Pass(Protocol):
    """One step of the compiler.

    A pass may also declare, as tuples of names, what it needs to know and finds out:

        requires: ClassVar[tuple[str, ...]] = ("moments",)    # facts that must be there before
        provides: ClassVar[tuple[str, ...]] = ("sensitivity",)    # facts that it adds

    Attributes:
        needs: the stage that a program must have.
        gives: the stage that it has afterwards.
    """

    @property
    def needs(self) -> Stage: ...  # noqa: D102
    @property
    def gives(self) -> Stage: ...  # noqa: D102

    def run(self, program: Program) -> Program:
        """A changed copy of ``program``; its graph, too, is changed in a copy."""
        ...


def pass_names() -> list[str]:
    """The registered passes: files of the folder ``passes``, and entry points of other packages."""
    folder = importlib.import_module(FOLDER)
    files = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    return sorted({*files, *(point.name for point in entry_points(group=FOLDER))})


def load_pass(name: str) -> type[Pass]:
    """The class of a registered pass.

    Raises:
        UsageError: no pass has that name.
        PassError: its file or entry point is broken.

    >>> load_pass("canonicalize").__name__
    'Canonicalize'
    """
    if name not in pass_names():
        raise UsageError(did_you_mean("pass", name, pass_names()))
    elsewhere = {point.name: point for point in entry_points(group=FOLDER)}
    if name not in elsewhere:
        return cast("type[Pass]", _from_folder(name))
    try:
        return cast("type[Pass]", elsewhere[name].load())
    except (ImportError, AttributeError) as error:
        raise PassError(f"the pass '{name}', {elsewhere[name].value}, cannot be loaded: {error}") from error


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


def required(pass_: object) -> tuple[str, ...]:
    """Names of the facts that a pass, or its class, requires."""
    return _fact_names(pass_, "requires")


def provided(pass_: object) -> tuple[str, ...]:
    """Names of the facts that a pass, or its class, provides."""
    return _fact_names(pass_, "provides")


def _fact_names(pass_: object, attribute: str) -> tuple[str, ...]:
    names = getattr(pass_, attribute, ())
    if not isinstance(names, tuple):
        raise PassError(f'{pass_!r}: {attribute} is {names!r}; write a tuple of names, ("moments",)')
    return names


def describe(name: str) -> dict[str, object]:
    """What ``kbitc passes`` says about a registered pass.

    >>> describe("canonicalize")["gives"]
    'CANONICAL'
    """
    loaded = load_pass(name)
    about = (inspect.getdoc(loaded) or "").partition("\n")[0]
    return {
        "name": name,
        "needs": loaded.needs.name,  # type: ignore[attr-defined]  # a class variable of each pass
        "gives": loaded.gives.name,  # type: ignore[attr-defined]
        "requires": list(required(loaded)),
        "provides": list(provided(loaded)),
        "summary": about,
    }


def loadable_passes() -> list[tuple[str, type[Pass]]]:
    """The registered passes, for advice: one that is broken must not hide what the advice is about."""
    found = []
    for name in pass_names():
        with contextlib.suppress(PassError):
            found.append((name, load_pass(name)))
    return found
