"""`PageFile`: optimizer states in a file that is mapped a piece at a time.

The one thing to know: the file has no name, so the system removes it however the process ends. Its room on
the disk is taken when it grows, so that a full disk is an error then and not a crash of a later step.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from kbitc.errors import UsageError

ALIGNED = 64  # bytes, at which every tensor begins
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # all pages at once, not a fault for each


class PageFile:
    """A growing file whose parts are tensors while somebody holds them.

    Args:
        folder: on a disk, not on a file system that is itself memory.

    Raises:
        UsageError: no file can be made there, or the system has no files of this kind.
    """

    def __init__(self, folder: Path) -> None:
        if not hasattr(os, "posix_fallocate"):
            raise UsageError("paged optimizer states need Linux; leave out paged")
        self.folder = folder
        self._size = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # as long as this object
        except OSError as error:
            raise UsageError(
                f"{folder}: no file for paged optimizer states can be made there ({error.strerror}); give "
                "another folder as paged"
            ) from error

    def grow(self, size_bytes: int) -> int:
        """Room for so many bytes, all zero; where it begins.

        Raises:
            UsageError: the disk is full.
        """
        start = self._size
        try:
            if size_bytes:
                os.posix_fallocate(self._file.fileno(), start, size_bytes)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: no room for {size_bytes / 1e6:.1f} MB more of paged optimizer states, after "
                f"{start / 1e6:.1f} MB ({error.strerror}); free some, or give another folder as paged"
            ) from error
        self._size = start + -(-size_bytes // ALIGNED) * ALIGNED
        return start

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """``(count,)`` numbers as they stand in the file; what is written to them is written there.

        Args:
            start: of the first, in bytes.
            count: how many.
            dtype: of a number.
        """
        if count == 0:
            return torch.empty(0, dtype=dtype)
        inside = start % mmap.ALLOCATIONGRANULARITY
        flags = mmap.MAP_SHARED | _POPULATE
        pages = mmap.mmap(
            self._file.fileno(), inside + count * dtype.itemsize, flags=flags, offset=start - inside
        )
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=inside)

    def prefetch(self, start: int, size_bytes: int) -> None:
        """Has the system read a part soon; does not wait for it."""
        if size_bytes == 0:  # to the system, all that follows
            return
        os.posix_fadvise(self._file.fileno(), start, size_bytes, os.POSIX_FADV_WILLNEED)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an optimizer with paged states cannot be pickled or copied; save its state_dict()")
