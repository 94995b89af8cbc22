"""The engine of Ray clusters: each item is a Ray task; Ray schedules, and runs again what a lost worker had.

The one thing to know: a task takes as many cores as torch uses in the process that asks, and torch uses as
many there, because sums come out otherwise with another number of threads. All machines see the same files
under the same names.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kbitc.errors import BackendUnavailable, KbitcError, UsageError, first_line
from kbitc.system.stopping import spared
from kbitc.system.work import Work
from kbitc.version import VERSION

T = TypeVar("T")
L = TypeVar("L")
R = TypeVar("R")

RAY = "ray"
RETRIES = 5  # of one item, whose worker is lost each time
AHEAD = 2  # tasks for each place where one can run, so that none waits for this process
ANSWER = 10.0  # seconds that a cluster has to take a connection
PATIENCE = 1.0  # seconds between two looks at the size of the cluster
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def ray_engine(address: str | None = None) -> Iterator[RayEngine]:
    """A connection to a Ray cluster, or to one that is started on this machine and ends with the block.

    Args:
        address: of a cluster, as ``ray start`` tells it; None starts one.

    Raises:
        BackendUnavailable: Ray is not installed.
        UsageError: no cluster answers there, or none of its machines has as many cores as torch uses here.
    """
    ray = _need_ray()
    if ray.is_initialized():  # by whoever called us: it is theirs to end
        yield _checked(RayEngine(ray))
        return
    # The names of sockets that Ray makes there may have 107 characters, so the folder's has few.
    folder = tempfile.mkdtemp(prefix="kbitc-", dir="/tmp") if address is None else None
    with spared():  # Ray ends its own processes; where others end them, it ends this one without a word
        try:
            with _own_signals():
                _start(ray, address, folder)
            yield _checked(RayEngine(ray))
        finally:
            with _own_signals():
                ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _need_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of each start
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable(
            "--engine ray: needs Ray; install it with: pip install 'kbitc[ray]', or leave --engine out"
        ) from error
    return ray


def _start(ray: Any, address: str | None, folder: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            cores = max(os.cpu_count() or 1, _threads())
            ray.init("local", num_cpus=cores, include_dashboard=False, _temp_dir=folder, **quiet)
        else:
            _check_listens(address)
            ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        where = "a local Ray cluster cannot be started" if address is None else f"--address {address}"
        raise UsageError(
            f"{where}: {first_line(error)}; 'ray start --head' starts a cluster, and tells its address"
        ) from error


def _check_listens(address: str) -> None:
    """See that somebody does: Ray itself would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), ANSWER).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Within, Ray may set handlers of signals as it likes; afterwards those are back that were there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _checked(engine: RayEngine) -> RayEngine:
    most = max((int(node["Resources"].get("CPU", 0)) for node in engine.nodes()), default=0)
    if most < engine.threads:
        raise UsageError(
            f"--engine ray: a task takes {engine.threads} cores, as torch does here, and no machine of the "
            f"cluster has more than {most}; set OMP_NUM_THREADS={max(most, 1)} for this command"
        )
    return engine


class RayEngine:
    """A connected cluster."""

    name = RAY

    def __init__(self, ray: Any) -> None:
        self.ray, self.threads = ray, _threads()

    def nodes(self) -> list[Mapping[str, Any]]:
        """Machines that are alive."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _places(self) -> int:
        """How many tasks can run at once."""
        cores = (int(node["Resources"].get("CPU", 0)) for node in self.nodes())
        return max(1, sum(own // self.threads for own in cores))

    def run(self, work: Work[T, L, R], items: Sequence[T]) -> Generator[tuple[int, R]]:
        """See `kbitc.system.work.Engine`."""
        ray = self.ray
        where = _Where(uuid.uuid4().hex, str(Path.cwd()), self.threads, VERSION)
        # In a list, or Ray would unpickle it for every task.
        held = [ray.put(work)]
        task = ray.remote(num_cpus=self.threads, max_retries=RETRIES, retry_exceptions=False)(_one)
        waiting = iter(enumerate(items))
        flying: dict[Any, int] = {}
        try:
            while True:
                room = AHEAD * self._places() - len(flying)
                for place, item in (found for _, found in zip(range(room), waiting, strict=False)):
                    flying[task.remote(where, held, item)] = place
                if not flying:
                    return
                ready, _ = ray.wait(list(flying), timeout=PATIENCE)
                for reference in ready:
                    place = flying.pop(reference)
                    yield place, self._result(reference, items[place])
        finally:
            for reference in flying:
                ray.cancel(reference, force=True)

    def _result(self, reference: Any, item: object) -> Any:
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else KbitcError(first_line(error))) from error
        except errors.RayError as error:
            raise KbitcError(
                f"--engine ray: workers were lost {RETRIES + 1} times at {item}, the last one with: "
                f"{first_line(error)}; see whether they run out of memory"
            ) from error


@dataclass(frozen=True)
class _Where:
    """What a worker needs to be as the process that asks.

    Attributes:
        token: of one piece of work.
        folder: of that process, for relative names.
        threads: of torch.
        version: of kbitc.
    """

    token: str
    folder: str
    threads: int
    version: str


_held: dict[str, Work[Any, Any, Any]] = {}
"""In a worker, the work that it is at, by its token."""


def _one(where: _Where, held: list[Any], item: Any) -> Any:
    """An item, in a worker."""
    if where.token not in _held:
        _held.clear()
        _held[where.token] = _begun(where, held)
    work = _held[where.token]
    return work.finish(item, work.load(item))


def _begun(where: _Where, held: list[Any]) -> Work[Any, Any, Any]:
    """The work, in a process that is as the one that asks."""
    import ray
    import torch

    node = socket.gethostname()
    if where.version != VERSION:
        raise UsageError(
            f"--engine ray: {node} has kbitc {VERSION}, and {where.version} asks; install the same there"
        )
    try:
        os.chdir(where.folder)
    except OSError as error:
        raise UsageError(
            f"--engine ray: {node} cannot work in {where.folder} ({error.strerror}); all machines must see "
            "the same files under the same names"
        ) from error
    torch.set_num_threads(where.threads)
    work: Work[Any, Any, Any] = ray.get(held[0])
    return work
