"""HiGHS, the integer solver, in a process of its own.

The one thing to know: HiGHS may print "HighsMipSolverData::transformNewIntegerFeasibleSolution ..." by C's
printf, whatever its options say (scipy 1.17.1, with ``disp=False`` as without: at 5 of 13 budgets of
SmolLM2-135M). To silence that here would take standard output from all other threads; in a process of its
own nobody else writes. That one is started when first needed, in about a second, and lives as long as this.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

OPTIMAL, INFEASIBLE = 0, 2  # scipy's statuses


@dataclass(frozen=True)
class MilpAnswer:
    """What ``scipy.optimize.milp`` says.

    Attributes:
        status: 0 if it finished, 2 if nothing satisfies the constraints.
        x: the variables; None if it has none.
        bound: no value of the objective is less; None if it has none.
    """

    status: int
    x: NDArray[np.float64] | None
    bound: float | None


def milp(**problem: Any) -> MilpAnswer:
    """``scipy.optimize.milp(**problem)``; nothing is written to this process's standard output.

    Raises:
        RuntimeError: the solver's process ended.
    """
    return _SOLVER.ask(problem)


@dataclass
class _Solver:
    """A Python process that runs :func:`serve`: started when first asked, asked by one thread at a time."""

    process: subprocess.Popen[bytes] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, problem: dict[str, Any]) -> MilpAnswer:
        with self.lock:
            process = self.process
            if process is None or process.poll() is not None:  # a signal may have ended it
                process = _started()
            self.process = None  # until it has answered: after an interrupt, half a message is in the pipes
            try:
                requests, answers = _pipes(process)
                pickle.dump(problem, requests)
                requests.flush()
                status, x, bound = pickle.load(answers)  # noqa: S301  # from a process of our own
            except (EOFError, BrokenPipeError) as error:
                raise RuntimeError(f"the solver's process ended with code {process.wait()}") from error
            except BaseException:
                process.kill()
                raise
            self.process = process
            return MilpAnswer(status, x, bound)

    def close(self) -> None:
        """End the process, which ends when there is nothing more to read."""
        if self.process is not None:
            _pipes(self.process)[0].close()
            self.process.wait()
            self.process = None

    def forget(self) -> None:
        """Leave the process to the one that this was forked from."""
        self.process, self.lock = None, threading.Lock()


_SOLVER = _Solver()
atexit.register(_SOLVER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SOLVER.forget)


def _started() -> subprocess.Popen[bytes]:
    # Places of modules come after its own: beside a user's script may lie an "enum.py".
    command = [sys.executable, "-P", __file__, *sys.path]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def serve() -> None:
    """Answer problems from standard input on what was standard output, until there are no more."""
    sys.path += [place for place in sys.argv[1:] if place not in sys.path]
    from scipy import optimize

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process gets it too, and ends this one
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        try:
            problem = pickle.load(requests)  # noqa: S301  # of the process that started this one
        except EOFError:
            return
        result = optimize.milp(**problem)
        pickle.dump((result.status, result.x, result.mip_dual_bound), answers)
        answers.flush()


if __name__ == "__main__":
    serve()
