"""Being told to stop: signals become an exception, and the processes that this one started end with it.

The one thing to know: :class:`Stopped` is no ``Exception``, so that nothing on the way takes it for a
failure; what cleans up on ``BaseException`` does its work, and the command line makes a line and an exit
code of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = (
    1.0  # seconds in which the same signal again is an echo: some senders signal a process and its group
)


class Stopped(BaseException):
    """A signal asked this process to end.

    Attributes:
        name: of the signal.
        code: the exit code that says so, 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.code = 128 + number
        super().__init__(self.name)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, ``SIGINT``, ``SIGTERM`` and ``SIGHUP`` end the children and raise :class:`Stopped`.

    A second one, a second later, ends the process as it is. Signals that are ignored (nohup) stay so, and
    in another thread than the main one nothing changes.

    Raises:
        Stopped: in the main thread, wherever it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def stop(number: int, _: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            end_children()
            raise Stopped(number)
        if time.monotonic() - first[0] > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except Stopped:
        end_children()  # those that were started in the meantime
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


_spared = False
_before: set[int] = set()


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Within, :func:`end_children` leaves alone what was started within: who started it ends it in order."""
    global _spared, _before
    kept = _spared, _before
    _spared, _before = True, set(descendants(os.getpid()))
    try:
        yield
    finally:
        _spared, _before = kept


def end_children() -> None:
    """Send ``SIGTERM`` to all processes that this one, or one of those, started; where /proc lists them."""
    for number in descendants(os.getpid()):
        if not _spared or number in _before:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGTERM)


def descendants(root: int) -> list[int]:
    """Ids of the processes below one, parents first; empty without /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # "4711 (any name) S 42 ...": the state, then the parent
            parent = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        except OSError:
            continue  # it has ended
        children.setdefault(int(parent.split()[1]), []).append(int(folder.name))
    found = [root]
    for number in found:
        found += children.get(number, [])
    return found[1:]


class WorkerPool(ThreadPoolExecutor):
    """A pool of threads that drops what has not begun when the work around it ends early."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self.shutdown(wait=True, cancel_futures=kind is not None)
        return None
