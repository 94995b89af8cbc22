"""Errors by who must act: the caller, the author of a pass, or whoever installs packages."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class KbitcError(Exception):
    """Base of every error that kbitc raises on purpose."""


class UsageError(KbitcError, ValueError):
    """The caller asked for something that cannot be done; the message says what to do instead."""


class SourceError(KbitcError):
    """The source model or artifact cannot be read: missing, truncated, corrupt or unsupported."""


class BudgetError(UsageError):
    """No plan meets the bit budget; the message names the smallest one that can."""


class PassError(KbitcError):
    """A pass broke the pipeline's contract; carries the pass name and the passes that had run."""


class BackendUnavailable(KbitcError):
    """A backend or an optional package is missing; the message says what to install."""


class MemoryShortage(KbitcError):
    """The process got no more memory; the message says what to do with less."""


@contextmanager
def out_of_memory(doing: str, instead: str) -> Iterator[None]:
    """Turns whatever Python, torch or the system say when memory ends into one error.

    Args:
        doing: what goes on in the block.
        instead: what the user can do.

    Raises:
        MemoryShortage: memory ended in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_shortage(error):
            raise
        raise MemoryShortage(f"memory ended while {doing} ({first_line(error)}); {instead}") from error


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ended."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    said = str(error).lower()  # torch has no class of its own for the allocator of the CPU
    return any(words in said for words in ("not enough memory", "can't allocate memory", "out of memory"))


@contextmanager
def foreign(what: str, advice: str = "") -> Iterator[None]:
    """Around calls into other libraries: whatever they raise is an error about what they were given.

    Nothing of kbitc belongs into it that can fail by a mistake of its own.

    Args:
        what: was done, and with which file.
        advice: what to do then.
    """
    try:
        yield
    except KbitcError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise SourceError(f"{what}: {said}{'; ' if advice else ''}{advice}") from error


class UntracedWarning(UserWarning):
    """A model could not be traced; its weights were found by module class, and passes were left out."""


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says, without a full stop; its class where it says nothing.

    >>> first_line(ValueError("bad size.\nmore"))
    'bad size'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def did_you_mean(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for an unknown name: the nearest known one, and all of them.

    >>> did_you_mean("data type", "nff", ["nf", "int"])
    "no data type 'nff'; did you mean 'nf'? (known: int, nf)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"no {kind} '{name}'{hint} (known: {', '.join(names)})"
