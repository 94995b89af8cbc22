"""The folder that keeps what can be made again: compiled kernels, decode steps, measured moments."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$KBITC_CACHE``, or ``~/.cache/kbitc``."""
    given = os.environ.get("KBITC_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "kbitc"
