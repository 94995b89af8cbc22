"""The folder that keeps what can be made again: compiled kernels, decode steps, measured moments.

The one thing to know: code is loaded from it, so only this user may be able to write there.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kbitc.errors import BackendUnavailable

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """``$KBITC_CACHE``, or ``~/.cache/kbitc``."""
    given = os.environ.get("KBITC_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "kbitc"


def make_private(folder: Path) -> Path:
    """Make a folder in the cache folder, and that one, for this user alone.

    Raises:
        OSError: it cannot be made.
        BackendUnavailable: see :func:`check_private`.
    """
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder.parent, folder)
    return folder


def check_private(*paths: Path) -> None:
    """See that nobody else but root could have written what lies in the cache.

    Args:
        paths: the cache folder, the folders in it on the way to a file, and that file.

    Raises:
        OSError: one is not there.
        BackendUnavailable: one belongs to another user, or others may write to it.
    """
    for path in paths:
        about = path.stat()
        owner, mode = about.st_uid, stat.S_IMODE(about.st_mode)
        if owner not in (0, os.geteuid()):
            raise BackendUnavailable(
                f"{path}: belongs to another user (id {owner}), so what is loaded from it could be anyone's; "
                "set KBITC_CACHE to a folder of your own"
            )
        if mode & _OTHERS_WRITE:
            raise BackendUnavailable(
                f"{path}: other users may write to it (mode {mode:o}), so what is loaded from it could be "
                f"anyone's; empty it and 'chmod go-w {path}', or set KBITC_CACHE to a folder of your own"
            )
