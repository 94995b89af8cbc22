"""Work that is split over the processor's cores so that its results do not depend on their number.

The one thing to know: a sum that torch or its BLAS splits over threads comes out otherwise with another
number of them. Here each item is worked on by one thread that shares its work with no other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from kbitc.kernels.cpu.build import work_alone
from kbitc.system.stopping import WorkerPool

T = TypeVar("T")
R = TypeVar("R")

_here = threading.local()
_pools: dict[tuple[int, int], WorkerPool] = {}
_making = threading.Lock()


def cores() -> WorkerPool:
    """A pool of as many threads as torch uses, each of which works alone; the same one as long as it fits.

    New threads for each piece of work would each get a part of the memory allocator of their own, which keeps
    what they gave back: gigabytes.
    """
    key = os.getpid(), torch.get_num_threads()
    with _making:
        if key not in _pools:
            _pools.clear()
            _pools[key] = WorkerPool(key[1], initializer=_begin)
        return _pools[key]


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[function(item) for item in items]``, each on one core; from inside a pool's thread, one by one."""
    if getattr(_here, "is_alone", False):
        return [function(item) for item in items]
    return list(cores().map(function, items))


def alone(function: Callable[[], R]) -> R:
    """``function()`` on one core."""
    return side_by_side(lambda _: function(), [None])[0]


def _begin() -> None:
    work_alone()
    _here.is_alone = True
