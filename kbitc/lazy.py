"""What is loaded when it is first used: names that a package offers, and entry points of other packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from typing import Any

from kbitc.errors import KbitcError, first_line


def exports(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        home: the names that it offers, to the modules that define them.
    """

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(home[name]), name)

    return get, lambda: sorted(home)


def load_point(kind: str, point: EntryPoint, broken: type[KbitcError]) -> Any:
    """What another package adds by an entry point.

    Args:
        kind: as errors call what it adds.
        point: the entry point.
        broken: raised whatever goes wrong in that package, which it names.
    """
    try:
        return point.load()
    except Exception as error:
        owner = "another package" if point.dist is None else f"the package '{point.dist.name}'"
        raise broken(
            f"the {kind} '{point.name}' of {owner} cannot be loaded from {point.value}: "
            f"{type(error).__name__}: {first_line(error)}; mend or uninstall it"
        ) from error
