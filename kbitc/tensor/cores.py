"""Work that is split over the processor's cores so that its results do not depend on their number.

The one thing to know: a sum that torch or its BLAS splits over threads comes out otherwise with another
number of them. Here each item is worked on by one thread that shares its work with no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from kbitc.kernels.cpu.build import work_alone
from kbitc.system.stopping import WorkerPool

T = TypeVar("T")
R = TypeVar("R")

_here = threading.local()


def core_pool(count: int | None = None) -> WorkerPool:
    """A pool of ``count`` threads, or of as many as torch uses, each of which works alone."""
    return WorkerPool(count or torch.get_num_threads(), initializer=_begin)


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[function(item) for item in items]``, each on one core; from inside a pool's thread, one by one."""
    if getattr(_here, "is_alone", False):
        return [function(item) for item in items]
    with core_pool() as pool:
        return list(pool.map(function, items))


def _begin() -> None:
    work_alone()
    _here.is_alone = True
