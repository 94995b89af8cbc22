"""Work in forked processes, each with a limit on time and memory, whose last words are kept.

The one thing to know: a fork has everything that its parent imported, so that a process costs milliseconds.
The parent must not have computed with several threads before: their locks do not survive a fork.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

LATE = "took over"
"""How the message begins of a job whose time was over."""

Record = dict[str, Any]
Tell = Callable[[Record], None]


@dataclass(frozen=True)
class Job:
    """Something to do in a process of its own.

    Attributes:
        work: is given a function that takes what is known so far, as JSON values; called as often as wanted.
        start: what is known before.
        timeout: seconds.
        memory: bytes that may be allocated.
    """

    work: Callable[[Tell], None]
    start: Record
    timeout: float
    memory: int


@dataclass
class _Running:
    job: Job
    pid: int
    pipe: int
    started: float = field(default_factory=time.monotonic)
    heard: bytes = b""
    is_late: bool = False

    def last(self) -> Record:
        lines = self.heard.split(b"\n")[:-1]
        record: Record = json.loads(lines[-1]) if lines else dict(self.job.start)
        return record


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """A cache of this process' own: what is measured is measured anew; the compiled kernels are shared."""
    from kbitc.cache import cache_folder

    kernels = cache_folder() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to(kernels.resolve())
    with mock.patch.dict(os.environ, {"KBITC_CACHE": str(folder)}):
        yield


@contextmanager
def discard_output() -> Iterator[None]:
    """Nothing of what is written to standard output and error, by libraries too, is seen."""
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in enumerate(kept, start=1):
            os.dup2(old, descriptor)
            os.close(old)
        os.close(nothing)


def run_jobs(jobs: Iterable[Job], count: int) -> Iterator[Record]:
    """The last record of each job, as they end; ``count`` run at one time.

    Each has ``seconds_total``, ``peak_mb``, and, where the process did not end by itself, ``message``.
    """
    waiting, running = iter(jobs), dict[int, _Running]()
    selector = selectors.DefaultSelector()
    try:
        while True:
            while len(running) < count and (job := next(waiting, None)) is not None:
                begun = _begin(job)
                running[begun.pipe] = begun
                selector.register(begun.pipe, selectors.EVENT_READ)
            if not running:
                return
            for key, _ in selector.select(timeout=0.2):
                each = running[key.fd]
                data = os.read(key.fd, 2**16)
                each.heard += data
                if not data:
                    selector.unregister(key.fd)
                    yield _end(running.pop(key.fd))
            for each in running.values():
                if not each.is_late and time.monotonic() - each.started > each.job.timeout:
                    each.is_late = True
                    _kill(each.pid)
    finally:
        for each in running.values():
            _kill(each.pid)


def _begin(job: Job) -> _Running:
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Running(job, pid, read)
    code = 1
    try:
        os.setsid()
        faulthandler.disable()
        os.close(read)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        resource.setrlimit(resource.RLIMIT_DATA, (job.memory, job.memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        def tell(record: Record) -> None:
            os.write(write, json.dumps(record).encode() + b"\n")

        try:
            job.work(tell)
            code = 0
        except Exception as error:  # noqa: BLE001  # the harness' own fault, or no memory: it is reported
            tell({**job.start, "message": f"{type(error).__name__}: {error}"[:400]})
    finally:
        os._exit(code)


def _end(each: _Running) -> Record:
    os.close(each.pipe)
    _kill(each.pid)  # what it started
    _, status, usage = os.wait4(each.pid, 0)
    record = each.last()
    if each.is_late:
        record["message"] = f"{LATE} {each.job.timeout:g} s"
    elif os.WIFSIGNALED(status):
        record["message"] = f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    record["seconds_total"] = round(time.monotonic() - each.started, 1)
    record["peak_mb"] = usage.ru_maxrss // 1024
    return record


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
