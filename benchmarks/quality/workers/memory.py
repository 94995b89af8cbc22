"""The most memory that this process had resident.

The one thing to know: getrusage would also count what the process had that started this one.
"""

from __future__ import annotations

import resource
from pathlib import Path


def peak_bytes() -> int:
    """Bytes, by Linux's ``VmHWM``; elsewhere by getrusage."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
