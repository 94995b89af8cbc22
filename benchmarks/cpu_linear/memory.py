"""The bandwidth of the memory, which is a contender of every comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_linear.contenders import Contender
from benchmarks.cpu_linear.times import Times, undisturbed
from benchmarks.peers import time_calls

DRAM_BYTES = 512 << 20
READ_BYTES = 16 << 20  # of one read: a short one may pass undisturbed


class Memory:
    """Reading memory, as a contender: the reductions of torch that read fastest, a large buffer."""

    def __init__(self) -> None:
        self._parts = torch.ones(DRAM_BYTES // 4).split(READ_BYTES // 4)

    def contenders(self) -> list[Contender]:
        """One for each reduction."""
        return [
            Contender(name, {"cold": partial(time_calls, [_readers(part)[name] for part in self._parts])})
            for name in _readers(self._parts[0])
        ]

    @classmethod
    def bandwidth(cls, times: dict[str, Times]) -> float:
        """Bytes a second of the reduction whose median was the fastest."""
        return READ_BYTES / min(read.middle() for read in cls._reads(times))

    @classmethod
    def best_bandwidth(cls, times: dict[str, Times]) -> float:
        """Bytes a second of the fastest read of all."""
        return READ_BYTES / min(read.least() for read in cls._reads(times))

    @classmethod
    def is_clean(cls, times: dict[str, Times]) -> bool:
        """Whether the bandwidth is one of undisturbed reads."""
        return all(read.is_clean() for read in cls._reads(times))

    @staticmethod
    def _reads(times: dict[str, Times]) -> list[Times]:
        return [read for name, read in times.items() if name.startswith("read ")]


def _readers(buffer: Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "read sum": buffer.sum,
        "read amax": buffer.amax,
        "read int64 sum": buffer.view(torch.int64).sum,
    }


def cache_bandwidth(nbytes: int) -> float:
    """Bytes a second of reading a buffer of this size again and again."""
    buffer = torch.ones(nbytes // 8 * 2)
    fastest = min(undisturbed(time_calls([call], 0.1)) for call in _readers(buffer).values())
    return buffer.nbytes / fastest
