"""`LargePages`: tensors side by side in memory of large pages.

The one thing to know: a decoded token reads every packed weight once, and in pages of 4 KiB a part of the
waiting is for page tables. Where the system has no larger ones to give, this is memory as any other.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

CHUNK = 1 << 25  # bytes that are asked for at a time; what nobody touches costs nothing
PAGE = 1 << 21  # bytes of a large page
ALIGNED = 64  # bytes, at which every tensor begins
LEAST = 1 << 12  # bytes of a tensor that is worth it
_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)


class LargePages:
    """Room for tensors that stay; a chunk of it is freed when the last of its tensors is."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor there, its storage its own; what is small is copied elsewhere.

        Args:
            tensor: one that is not on the CPU comes back as it is.
        """
        if tensor.device.type != "cpu":
            return tensor
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes < LEAST or not _PRIVATE:
            return tensor.clone(memory_format=torch.contiguous_format)
        if self._chunk is None or self._used + nbytes > len(self._chunk):
            self._open(nbytes)
        own = torch.frombuffer(self._chunk, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += -(-nbytes // ALIGNED) * ALIGNED
        return own.view(tensor.shape).copy_(tensor)

    def _open(self, nbytes: int) -> None:
        chunk = mmap.mmap(-1, max(CHUNK, nbytes) + PAGE, flags=_PRIVATE)
        with contextlib.suppress(OSError, AttributeError):  # a system without them
            chunk.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr()
        self._chunk, self._used = chunk, -address % PAGE
