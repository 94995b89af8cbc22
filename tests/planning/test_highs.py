"""The integer solver's process: what it prints goes nowhere, and nothing else is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from scipy import optimize

from kbitc.planning.knapsack import highs

# An instance at which HiGHS of scipy 1.17.1 prints three lines of its own.
INSTANCE = """
import math, os, random, sys, threading
from kbitc.planning.knapsack import Item, solve

rng = random.Random(0)
groups = []
for _ in range(40):
    n, importance = rng.choice([110_592, 331_776, 884_736]), math.exp(rng.gauss(0, 1.2))
    groups.append([
        Item(n * bits // 8 + n // block,
             n * importance * 4.0**-bits * (1 + 0.2 * math.log2(block / 16)) * rng.uniform(0.8, 1.3),
             ("scales", f"t{kind}{bits}"), f"t{kind}{bits}:{block}")
        for kind in "uvw" for bits in range(2, 8) for block in (32, 64, 128, 256)
    ])
tables = {"scales": 1024, **{f"t{kind}{bits}": 4 * 2**bits for kind in "uvw" for bits in range(2, 8)}}
room = int(0.55 * sum(max(item.nbytes for item in items) for items in groups))
"""


def run(code):
    script = INSTANCE + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_what_other_threads_write_during_a_solve_arrives_and_nothing_else():
    done = run(
        """
        is_solved = threading.Event()
        written = 0

        def write():
            global written
            while not is_solved.wait(0.001):
                os.write(1, b"heartbeat\\n")
                written += 1

        thread = threading.Thread(target=write)
        thread.start()
        solution = solve(groups, room, tables)
        is_solved.set()
        thread.join()
        assert solution.is_proved
        print(written, file=sys.stderr)
        """
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) > 10
    assert done.stdout == "heartbeat\n" * int(done.stderr)


def test_a_closed_standard_output_is_no_obstacle():
    done = run("os.close(1)\nprint(solve(groups, room, tables).is_proved, file=sys.stderr)")
    assert (done.returncode, done.stderr) == (0, "True\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_forked_process_has_a_solver_of_its_own():
    done = run(
        """
        first = solve(groups, room, tables)
        child = os.fork()
        again = solve(groups, room, tables)
        assert again == first
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """
    )
    assert done.returncode == 0, done.stderr


def test_answers_are_those_of_scipy_and_survive_a_lost_process():
    problem = {
        "c": [-1.0, -1.0, 0.5],
        "constraints": optimize.LinearConstraint([[1, 1, 0]], -1, 1.5),
        "bounds": optimize.Bounds(0, 1),
        "integrality": [1, 1, 1],
    }
    impossible = problem | {"constraints": optimize.LinearConstraint([[1, 1, 1]], 4, 5)}
    expected = optimize.milp(**problem)
    answer = highs.milp(**problem)
    assert (answer.status, answer.bound) == (highs.OPTIMAL, expected.mip_dual_bound)
    assert answer.x.tolist() == expected.x.tolist()
    assert highs.milp(**impossible) == highs.MilpAnswer(highs.INFEASIBLE, None, None)
    highs._SOLVER.process.kill()
    with pytest.raises(RuntimeError, match="process ended with code -9"):
        highs.milp(**problem)
    assert highs.milp(**problem).x.tolist() == expected.x.tolist()
