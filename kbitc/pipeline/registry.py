"""What is found by name: passes here, quantizers and backends by the same `Registry`.

The one thing to know: the folder is the registry. A file's name is its thing's name, and it is imported
when it is first asked for; other packages add theirs by the entry-point group of the folder's name.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, cast

from kbitc.errors import KbitcError, PassError, UsageError, did_you_mean
from kbitc.graph.facts import Fact
from kbitc.graph.program import Program, Stage
from kbitc.lazy import load_point


@dataclass(frozen=True)
class Registry:
    """Things of one kind: one file each in a folder of this package, and entry points of other packages.

    Attributes:
        kind: as errors call one of them.
        folder: the package; also the entry-point group. Names that begin with an underscore are parts.
        constant: what a file names its thing.
        broken: raised for a file or entry point that cannot be loaded.
        inner: where each thing has a folder of its own, the file in it that names the thing.
    """

    kind: str
    folder: str
    constant: str
    broken: type[KbitcError]
    inner: str = ""

    def names(self) -> list[str]:
        """All of them, sorted."""
        return sorted({*self._files(), *self._elsewhere()})

    def _files(self) -> list[str]:
        folder = importlib.import_module(self.folder)
        files = [module.name for module in pkgutil.iter_modules(folder.__path__)]
        return [name for name in files if not name.startswith("_")]

    def _elsewhere(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.folder)}

    def load(self, name: str) -> Any:
        """The thing of that name; one of another package wins over ours.

        Raises:
            UsageError: there is none.
            KbitcError: as ``broken`` says, it cannot be loaded.
        """
        elsewhere = self._elsewhere()
        if name in elsewhere:
            return load_point(self.kind, elsewhere[name], self.broken)
        if name not in self._files():
            raise UsageError(did_you_mean(self.kind, name, self.names()))
        path = f"{self.folder}.{name}.{self.inner}" if self.inner else f"{self.folder}.{name}"
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            raise self.broken(f"the {self.kind} '{name}' cannot be loaded: {error}") from error
        if not hasattr(module, self.constant):
            raise self.broken(f"{module.__file__} defines no {self.constant}; end it with one")
        return getattr(module, self.constant)


class Pass(Protocol):
    """One step of the compiler.

    A pass may also declare, as tuples of `kbitc.graph.Fact`, what it needs to know and finds out:

        requires: ClassVar[tuple[Fact[Any], ...]] = (MOMENTS,)    # facts that must be there before
        provides: ClassVar[tuple[Fact[Any], ...]] = (SCORES,)    # facts that it adds

    and one that does nothing without the model's graph, ``needs_graph: ClassVar[bool] = True``: it is left
    out where the model could not be traced.

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


PASSES = Registry("pass", "kbitc.passes", "PASS", PassError)


def pass_names() -> list[str]:
    """The registered passes: files of the folder ``passes``, and entry points of other packages."""
    return PASSES.names()


def load_pass(name: str) -> type[Pass]:
    """The class of a registered pass.

    Raises:
        UsageError: no pass has that name.
        PassError: its file or entry point is broken.

    >>> load_pass("canonicalize").__name__
    'Canonicalize'
    """
    return cast("type[Pass]", PASSES.load(name))


def name_of(pass_: Pass) -> str:
    """A pass's name: its class in snake case, which is also its file.

    >>> class FuseLora: ...
    >>> name_of(FuseLora())
    'fuse_lora'
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(pass_).__name__).lower()


def required(pass_: object) -> tuple[Fact[Any], ...]:
    """The facts that a pass, or its class, requires."""
    return _facts(pass_, "requires")


def provided(pass_: object) -> tuple[Fact[Any], ...]:
    """The facts that a pass, or its class, provides."""
    return _facts(pass_, "provides")


def needs_graph(pass_: object) -> bool:
    """Whether a pass has nothing to do for a program without a graph."""
    return bool(getattr(pass_, "needs_graph", False))


def _facts(pass_: object, attribute: str) -> tuple[Fact[Any], ...]:
    facts = getattr(pass_, attribute, ())
    if not isinstance(facts, tuple) or not all(isinstance(fact, Fact) for fact in facts):
        raise PassError(f"{pass_!r}: {attribute} is {facts!r}; write a tuple of facts, (MOMENTS,)")
    return facts


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
        "requires": [fact.name for fact in required(loaded)],
        "provides": [fact.name for fact in provided(loaded)],
        "summary": about,
    }


def loadable_passes() -> list[tuple[str, type[Pass]]]:
    """The registered passes, for advice: one that is broken must not hide what the advice is about."""
    loadable = []
    for name in pass_names():
        with contextlib.suppress(PassError):
            loadable.append((name, load_pass(name)))
    return loadable
