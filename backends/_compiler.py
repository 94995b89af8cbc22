"""The C++ compiler that Inductor calls."""

from __future__ import annotations

import os
import shutil

COMPILERS = ("g++", "clang++")


def missing_compiler() -> str | None:
    """What to install so that Inductor can compile for the CPU; None if nothing."""
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ((named,) if named else COMPILERS)):
        return None
    return "no C++ compiler was found; install g++ or clang++, or name one in CXX"
