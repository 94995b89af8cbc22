"""Memory that was freed, given back to the system.

The one thing to know: the C library keeps what a thread frees for that thread's next request. Between
two kinds of work, of other sizes or in other threads, that is hundreds of megabytes that nobody uses.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Give back what is free; a few hundredths of a second. Nothing where the C library has no such call."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Of glibc, ``malloc_trim``."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of that kind
        return None
    return trim
