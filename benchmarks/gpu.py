"""The device of a benchmark, and how calls are timed on it.

The one thing to know: on a GPU the calls are captured in one CUDA graph, long enough that launching it
costs nothing, and CUDA events time its replays; on the CPU the same calls are made one by one. What is
compared is timed in the same rounds, in turn.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from benchmarks.peers import last_line
from benchmarks.tables import Section

ROTATION = 4  # copies of a weight are at least so many times the L2 cache together
GRAPH_SECONDS = 2e-3  # a graph lasts about so long
GRAPH_CALLS = 2000  # at most
ROUNDS = 5
REPLAYS = 7  # in each round

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BAR_COLUMNS = (
    ("name", "bar", ""),
    ("wanted", "wanted", ""),
    ("figure", "measured", ".2f"),
    ("met", "met", ""),
)
NOT_A_GPU = "Run on the CPU as a check of the script: the bars are a GPU's, and these verdicts mean nothing."

Call = Callable[[], object]


class NoDevice(Exception):
    """There is no such device here."""


@dataclass(frozen=True)
class Loop:
    """Calls that are timed together.

    Attributes:
        run: makes all of them.
        count: how many they are.
    """

    run: Call
    count: int


class Clock:
    """Times calls on one device.

    Raises:
        NoDevice: the name is "cuda" and there is no CUDA device.
    """

    def __init__(self, name: str) -> None:
        if name == "cuda" and not torch.cuda.is_available():
            raise NoDevice(
                "no CUDA device here; --device cpu runs the same code for a check, not for figures"
            )
        self.device = torch.device(name)
        self.is_cuda = self.device.type == "cuda"

    def copies_of(self, nbytes: int) -> int:
        """How many copies of a weight the L2 cache does not hold; on the CPU two."""
        if not self.is_cuda:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, math.ceil(ROTATION * cache / nbytes))

    def prepare(self, calls: Sequence[Call]) -> Loop:
        """Warm the calls up; on a GPU capture them, each as often as the others."""
        if not self.is_cuda:
            calls[0]()
            return Loop(lambda: [call() for call in calls], len(calls))
        self._warm_up(calls)
        once = _capture(calls, 1)
        once.replay()
        seconds = self._sample(once.replay)
        most = max(1, GRAPH_CALLS // len(calls))
        passes = min(most, math.ceil(GRAPH_SECONDS / seconds))
        graph = once if passes == 1 else _capture(calls, passes)
        return Loop(graph.replay, passes * len(calls))

    def capture(self, call: Call) -> Call:
        """The same work as one CUDA graph, for calls that were made before; on the CPU the call itself."""
        return _capture([call], 1).replay if self.is_cuda else call

    def race(self, loops: Sequence[Loop]) -> list[float]:
        """Median seconds of a call, for each loop."""
        samples: list[list[float]] = [[] for _ in loops]
        for _ in range(ROUNDS):
            for loop, found in zip(loops, samples, strict=True):
                found.extend(self._samples(loop))
        return [median(found) for found in samples]

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _warm_up(self, calls: Sequence[Call]) -> None:
        stream = torch.cuda.Stream(self.device)  # a capture wants its warm-up on another stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in (*calls, *calls[:2]):  # all: some peers repack a weight at its first call
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.wait()

    def _samples(self, loop: Loop) -> list[float]:
        if not self.is_cuda:
            return [self._sample(loop.run) / loop.count]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        loop.run()
        events[0].record()
        for event in events[1:]:  # all are queued before the first is done
            loop.run()
            event.record()
        self.wait()
        return [1e-3 * start.elapsed_time(end) / loop.count for start, end in pairwise(events)]

    def _sample(self, run: Call) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start


def _capture(calls: Sequence[Call], passes: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for call in calls:
                call()
    return graph


def refuse(error: NoDevice) -> int:
    """Say on standard error what is missing; the exit code of a benchmark that could not run."""
    sys.stderr.write(f"{error}\n")
    return 2


def reason(error: Exception) -> str:
    """Why a row has no figures."""
    return f"{type(error).__name__}: {last_line(error)}"


def verdict(is_met: bool | None) -> str:
    """Of a bar; None: its figure is not known."""
    if is_met is None:
        return "not measured"
    return "yes" if is_met else "NO"


def bars_section(rows: list[dict[str, Any]], *, is_judged: bool) -> Section:
    """The bars as a table; on the CPU with a note that they are a GPU's."""
    return Section("Bars", BAR_COLUMNS, rows, [] if is_judged else [NOT_A_GPU])


def device_line(clock: Clock, packages: Sequence[str] = ()) -> str:
    """Device, date and versions: the head of a table.

    Args:
        packages: further ones whose version matters; those that are not installed are named as such.
    """
    if clock.is_cuda:
        properties = torch.cuda.get_device_properties(clock.device)
        name = (
            f"{properties.name}, {properties.multi_processor_count} SMs, "
            f"L2 {properties.L2_cache_size / 2**20:.0f} MiB"
        )
    else:
        name = f"CPU ({platform.machine()}): a check of the script, no figures"
    today = datetime.now(UTC).date().isoformat()
    versions = (f"{package} {_version(package)}" for package in ("torch", "triton", "kbitc", *packages))
    return f"{name}; {today}; {', '.join(versions)}."


def _version(package: str) -> str:
    if package == "kbitc":  # from the source tree, which may not be installed
        from kbitc.version import VERSION

        return VERSION
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
