"""Memory that was freed, given back to the system, and the most that was held.

The one thing to know: the C library keeps what a thread frees for that thread's next request. Between
two kinds of work, of other sizes or in other threads, that is hundreds of megabytes that nobody uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import resource
from collections.abc import Callable
from pathlib import Path


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


def forget_peak() -> None:
    """Let :func:`peak_bytes` count from now on; where that cannot be done, it counts from the start."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The most memory that this process held at a time."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
