"""`Work`, a list of independent pieces that an `Engine` does: this process, or the workers of a cluster.

The one thing to know: whoever has the work writes it once, as a :class:`Work`, and does not know who does it.
Results come with the place of their item, as they are ready; what is made of them is the same in any order.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from kbitc.system.stopping import WorkerPool

T = TypeVar("T")
L = TypeVar("L")
R = TypeVar("R")
T_in_contra = TypeVar("T_in_contra", contravariant=True)
R_out_co = TypeVar("R_out_co", covariant=True)


class Work(Protocol[T_in_contra, L, R_out_co]):
    """What is done to each item, with all that it needs.

    A cluster gets it pickled, and unpickles it once in each process that works: what it holds open it leaves
    out of its state, and opens again where it is needed. Both methods give the same wherever they run.
    """

    def load(self, item: T_in_contra) -> L:
        """What an item needs to be read. May run in another thread, while the item before is worked on."""
        ...

    def finish(self, item: T_in_contra, loaded: L) -> R_out_co:
        """The result, from what :meth:`load` gave."""
        ...


class Engine(Protocol):
    """Does work.

    Attributes:
        name: as ``--engine`` has it.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    def run(self, work: Work[T, L, R], items: Sequence[T]) -> Generator[tuple[int, R]]:
        """Places of items and their results, as they are ready, each once.

        Whoever stops early closes it (`contextlib.closing`); then no more work is begun.

        Raises:
            KbitcError: what the work raised, first of all; or too many workers were lost.
        """
        ...


class InProcess:
    """This process: an item is read while the one before is worked on, and results come in order."""

    name = "process"

    def run(self, work: Work[T, L, R], items: Sequence[T]) -> Generator[tuple[int, R]]:
        """See `Engine`."""
        with WorkerPool(1) as reading:
            ahead = _Ahead(work, items, reading)
            for place, item in enumerate(items):
                yield place, work.finish(item, ahead.take())


class _Ahead(Generic[T, L]):
    """Reads one item ahead; holds none that was taken."""

    def __init__(self, work: Work[T, L, Any], items: Sequence[T], pool: WorkerPool) -> None:
        self.work, self.items, self.pool = work, iter(items), pool
        self.next = self._begin()

    def _begin(self) -> Future[L] | None:
        return next((self.pool.submit(self.work.load, item) for item in self.items), None)

    def take(self) -> L:
        assert self.next is not None
        loaded = self.next.result()
        self.next = self._begin()
        return loaded


IN_PROCESS = InProcess()
