"""Names inside an artifact's folder, and the folder itself: what may be replaced, and how."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kbitc.errors import UsageError

FORMAT = 1
PLAN_FILE = "kbit_plan.json"
REPORT_FILE = "report.html"


def check_target(out: Path, *, is_forced: bool, marker: str = PLAN_FILE) -> None:
    """Refuse early what :class:`Writer` could not finish.

    Args:
        out: the folder to be written.
        is_forced: it may exist, if it is one of ours.
        marker: the file that ours hold.

    Raises:
        UsageError: the folder exists and is not an artifact to replace, or its parent is not writable.
    """
    if out.exists() and not is_forced:
        raise UsageError(f"{out}: exists already; pass --force to replace it, or choose another -o")
    if out.exists() and not (out / marker).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out}: is not a kbitc artifact (it holds no {marker}), so --force will not replace it; remove "
            "it yourself or choose another -o"
        )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{out}: {parent} is not a writable folder; choose another -o")


def replace_folder(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; an old ``out`` is moved aside first and removed last."""
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
